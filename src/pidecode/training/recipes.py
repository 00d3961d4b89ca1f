# SPDX-License-Identifier: Apache-2.0
"""Recipes: functions that return a training configuration; `pidecode train --list` shows them."""

from __future__ import annotations

import inspect
import math
import os
import runpy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from pidecode.encoders.text import default_negative_prompt
from pidecode.errors import SettingError
from pidecode.registry.configs import PiDConfig, backbone, debug_config, v1pt5
from pidecode.registry.spaces import LatentSpace, did_you_mean, get_space
from pidecode.training.config import (
    DataConfig,
    DistillationConfig,
    LoRAConfig,
    OptimizerConfig,
    PiDRunConfig,
    TeacherLossConfig,
    TrainConfig,
)
from pidecode.training.losses import to_ycbcr

RecipeFn = Callable[[str], TrainConfig]  # A recipe: the name of a latent space to a training configuration

_DEFAULT_SPACE = "flux"
_BLOCK = 8
_LUMA = ((0, 0), (0, 1), (1, 0), (1, 1), (0, 2), (2, 0), (1, 2), (2, 1), (0, 3), (3, 0))
_CHROMA = 3  # cosines of each color difference: the first of those of luma

BLOCK_DCT = LatentSpace(
    name="block-dct", title="Block DCT (for tests)", channels=16, down=_BLOCK, statistics="constants", input_multiple=8
)
"""Latent space of `encode_block_dct`: 16 channels, one cell per 8x8 pixels of the low-resolution image."""


def _config(space: LatentSpace, *, color_head: bool) -> PiDConfig:
    """The v1.5 architecture for a space."""
    config = v1pt5(
        latent_channels=space.channels, latent_down=space.down, latent_unpatchify=space.raw_patch, color_head=color_head
    )
    return replace(config, scale=space.scale)


def _data(space: LatentSpace) -> DataConfig:
    side = (space.fixed_input or 0) * space.scale
    return DataConfig(sizes=((side, side),)) if side else DataConfig()


def pixeldit(space: str = _DEFAULT_SPACE) -> TrainConfig:
    """Fine-tune the text-to-image backbone on images with captions."""
    return TrainConfig(
        title="PixelDiT fine-tuning, text to image", method="backbone", net=backbone(),
        negative_prompt=default_negative_prompt(),
        optimizer=OptimizerConfig(lr=2e-5, warmup_steps=1000, max_grad_norm=0.1), run=PiDRunConfig(steps=50_000),
    )  # fmt: skip


def teacher_adapter(space: str = _DEFAULT_SPACE) -> TrainConfig:
    """First stage of a teacher: train the latent adapter on a frozen backbone."""
    row = get_space(space)
    return TrainConfig(
        title=f"PiD teacher for {row.name}, adapter only", method="teacher", net=_config(row, color_head=True),
        space=row, negative_prompt=default_negative_prompt(), trainable="adapter", data=_data(row),
        optimizer=OptimizerConfig(lr=5e-5, warmup_steps=2000, weight_decay=1e-3, max_grad_norm=0.1),
        run=PiDRunConfig(steps=30_000, checkpoint_every=1000, sample_every=1000),
    )  # fmt: skip


def teacher(space: str = _DEFAULT_SPACE) -> TrainConfig:
    """Second stage of a teacher: train the whole network."""
    first = teacher_adapter(space)
    return replace(
        first, title=f"PiD teacher for {space}", trainable="all",
        optimizer=OptimizerConfig(lr=2e-5, warmup_steps=1000, weight_decay=1e-3, max_grad_norm=0.1),
        run=replace(first.run, steps=20_000),
    )  # fmt: skip


def student(space: str = _DEFAULT_SPACE) -> TrainConfig:
    """Distill a teacher into a student of four steps (DMD2), as the released ones were."""
    row = get_space(space)
    return TrainConfig(
        title=f"PiD student for {row.name}", method="student", net=_config(row, color_head=False), space=row,
        negative_prompt=default_negative_prompt(), data=replace(_data(row), caption_dropout=0.0, latent_dropout=0.0),
        optimizer=OptimizerConfig(lr=1e-5, max_grad_norm=0.1),
        run=PiDRunConfig(steps=3000, checkpoint_every=250, sample_every=250),
    )  # fmt: skip


def student_rollout(space: str = _DEFAULT_SPACE) -> TrainConfig:
    """The same distillation with the student starting from its own rollouts, closer to decoding."""
    config = student(space)
    return replace(
        config, title=f"{config.title}, self-rollout", distillation=DistillationConfig(student_input="self_rollout")
    )


def teacher_lora(space: str = _DEFAULT_SPACE) -> TrainConfig:
    """Low-rank adapters on a teacher, for a style or a camera."""
    config = teacher(space)
    return replace(
        config, title=f"Adapters on the PiD teacher for {space}", lora=LoRAConfig(rank=16),
        optimizer=OptimizerConfig(lr=1e-4, warmup_steps=100, max_grad_norm=0.1),
        run=replace(config.run, steps=2000, checkpoint_every=250, sample_every=250),
    )  # fmt: skip


def student_lora(space: str = _DEFAULT_SPACE) -> TrainConfig:
    """Low-rank adapters on a student, by the direct loss: a few images are enough."""
    adapters = teacher_lora(space)
    return replace(
        student(space), title=f"Adapters on the PiD student for {space}", method="direct", lora=adapters.lora,
        optimizer=adapters.optimizer, run=adapters.run,
    )  # fmt: skip


def encode_block_dct(low: Tensor) -> Tensor:
    """Images `[B, 3, h, w]` in [-1, 1] to latents `[B, 16, h / 8, w / 8]`: ten luma cosines, three of each color.

    The cosines are orthonormal over a block; means are halved so that every channel is of order one.
    """
    planes = to_ycbcr((low.float() + 1) / 2) - low.new_tensor([0.5, 0.0, 0.0]).view(1, 3, 1, 1)
    places = (torch.arange(_BLOCK) + 0.5) * math.pi / _BLOCK
    axes = [torch.cos(places * k) * math.sqrt((1 if k == 0 else 2) / _BLOCK) for k in range(_BLOCK)]
    waves = torch.stack([torch.outer(axes[row], axes[column]) for row, column in _LUMA])[:, None]
    waves[0] /= 2
    cosines = F.conv2d(planes.flatten(0, 1)[:, None], waves.to(planes), stride=_BLOCK).unflatten(0, (-1, 3))
    return torch.cat((cosines[:, 0], cosines[:, 1, :_CHROMA], cosines[:, 2, :_CHROMA]), dim=1)


class ByteTextEncoder:
    """A text encoder for tests: a fixed random vector for each byte of a caption."""

    def __init__(self, length: int, width: int) -> None:
        self.length, self.width = length, width
        self._table = torch.randn(257, width, generator=torch.Generator().manual_seed(0))

    def __call__(self, captions: Sequence[str]) -> Tensor:
        """States `[B, length, width]`; shorter captions are padded."""
        rows = torch.full((len(captions), self.length), 256)
        for row, caption in zip(rows, captions, strict=True):
            data = list(caption.encode("utf-8"))[: self.length]
            row[: len(data)] = torch.tensor(data, dtype=torch.long)
        return self._table[rows]


_DEBUG_RUN = PiDRunConfig(
    steps=200, precision="float32", activation_checkpointing=False, checkpoint_every=100, sample_every=100,
    num_samples=2, sample_steps=8, export_dtype="float32",
)  # fmt: skip
_DEBUG_DATA = DataConfig(sizes=((64, 64), (64, 96), (96, 64)), batch_size=2, num_workers=2)


def debug_backbone(space: str = BLOCK_DCT.name) -> TrainConfig:
    """A dry run of the backbone's recipe: seconds on a CPU."""
    net = debug_config(latent_channels=0, inject_pixels=False)
    return TrainConfig(
        title="Debug backbone", method="backbone", net=net,
        encode_text=ByteTextEncoder(net.text_length, net.text_dim), data=_DEBUG_DATA,
        teacher=TeacherLossConfig(shift=1.0, shift_base_size=None),
        optimizer=OptimizerConfig(lr=3e-3, max_grad_norm=1.0, warmup_steps=5), run=_DEBUG_RUN,
    )  # fmt: skip


def debug_teacher(space: str = BLOCK_DCT.name) -> TrainConfig:
    """A dry run of the teacher's recipe in a latent space for tests: seconds on a CPU."""
    return replace(
        debug_backbone(), title="Debug teacher", method="teacher", net=debug_config(color_head=True), space=BLOCK_DCT,
        encode=encode_block_dct,
    )  # fmt: skip


def debug_student(space: str = BLOCK_DCT.name) -> TrainConfig:
    """A dry run of the distillation, from a debug-size teacher."""
    return replace(
        debug_teacher(), title="Debug student", method="student", net=debug_config(),
        data=replace(_DEBUG_DATA, caption_dropout=0.0, latent_dropout=0.0),
        distillation=DistillationConfig(student_every=3, guidance_scale=1.5, r1_weight=10.0, fake_score_lr=1e-3),
        optimizer=OptimizerConfig(lr=5e-4, max_grad_norm=1.0),
    )  # fmt: skip


def debug_direct(space: str = BLOCK_DCT.name) -> TrainConfig:
    """A dry run of the direct recipe."""
    return replace(debug_teacher(), title="Debug direct", method="direct", net=debug_config())


def photographs(space: str = "flux2") -> TrainConfig:
    """From a folder of photographs to a small four-step decoder in ten minutes on a CPU (docs/training.md)."""
    row = get_space(space)
    net = PiDConfig(
        hidden_size=96, num_heads=4, patch_depth=4, patch_size=16,
        pixel_hidden_size=8, pixel_depth=1, pixel_attn_hidden_size=96, pixel_num_heads=4, text_dim=0, text_length=1,
        latent_channels=row.channels, latent_down=row.down, latent_unpatchify=row.raw_patch, scale=row.scale,
        adapter_width=64, adapter_blocks=2, adapter_padding="replicate", gate="per_token", inject_interval=1,
        inject_pixels=True, rope_reference=(256, 256),
    )  # fmt: skip
    return TrainConfig(
        title="A small decoder from photographs", method="direct", net=net, space=row,
        data=DataConfig(
            sizes=((256, 256), (256, 384), (384, 256)), crop=128, batch_size=4, num_workers=2, latent_dropout=0.0
        ),
        distillation=DistillationConfig(student_input="self_rollout"),
        optimizer=OptimizerConfig(lr=2e-3, warmup_steps=50, max_grad_norm=1.0, lr_schedule="cosine"),
        run=replace(_DEBUG_RUN, steps=1000, checkpoint_every=200, sample_every=200),
    )  # fmt: skip


RECIPES: Mapping[str, RecipeFn] = {
    recipe.__name__: recipe
    for recipe in (
        pixeldit, teacher_adapter, teacher, student, student_rollout, teacher_lora, student_lora,
        photographs, debug_backbone, debug_teacher, debug_student, debug_direct,
    )
}  # fmt: skip
"""Every recipe by its name."""


def summary(recipe: RecipeFn) -> str:
    """A recipe's first line."""
    return (inspect.getdoc(recipe) or "").splitlines()[0]


def get_recipe(name: str, space: str | None = None) -> TrainConfig:
    """A recipe by its name, or by `file.py:function` for one of your own."""
    recipe = RECIPES.get(name)
    if ".py" in name:
        path, _, function = name.partition(":")
        if not os.path.isfile(path) or not function:
            raise SettingError(f"{name!r} names no recipe; write the file and the function: my_recipe.py:my_decoder.")
        recipe = runpy.run_path(path).get(function)
        if not callable(recipe):
            raise SettingError(f"{path} has no function {function!r}.")
    if recipe is None:
        raise SettingError(f"There is no recipe {name!r}.{did_you_mean(name, RECIPES)}")
    config = recipe(space) if space is not None else recipe()  # type: ignore[call-arg]
    if not isinstance(config, TrainConfig):
        raise SettingError(f"{name} returns {type(config).__name__}, not a TrainConfig.")
    if space is not None and config.space is not None and config.space.name != get_space(space).name:
        raise SettingError(f"{name} is for space {config.space.name}; it cannot be given another.")
    return config
