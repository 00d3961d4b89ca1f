# SPDX-License-Identifier: Apache-2.0
"""Recipes: functions that return a whole training run; `pidecode train --list` shows them."""

from __future__ import annotations

import importlib.util
import inspect
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType

from pidecode.encoders.text import default_negative_prompt
from pidecode.errors import SettingError
from pidecode.registry.configs import PiDConfig, backbone, debug_config, v1pt5
from pidecode.registry.spaces import LatentSpace, did_you_mean, get_space
from pidecode.training.config import Adapt, Average, Data, Optimize, Recipe, Run
from pidecode.training.dataloader import ByteStates
from pidecode.training.debug import COSINES, encode_cosines
from pidecode.training.dmd import Distillation
from pidecode.training.flow_matching import TeacherLoss

Maker = Callable[[str], Recipe]
"""A recipe: the name of a latent space to a run. Recipes that are bound to one space ignore the default only."""

_FIXED = "flux"


def _config(space: LatentSpace, *, color_head: bool) -> PiDConfig:
    """The v1.5 architecture for a space."""
    config = v1pt5(
        latent_channels=space.channels,
        latent_down=space.down,
        latent_unpatchify=space.raw_patch,
        color_head=color_head,
    )
    return replace(config, scale=space.scale)


def _data(space: LatentSpace) -> Data:
    if space.fixed_input is None:
        return Data()
    side = space.fixed_input * space.scale
    return Data(sizes=((side, side),))


def pixeldit(space: str = _FIXED) -> Recipe:
    """Fine-tune the text-to-image backbone on images with captions."""
    return Recipe(
        title="PixelDiT fine-tuning, text to image",
        method="backbone",
        net=backbone(),
        negative=default_negative_prompt(),
        optimize=Optimize(rate=2e-5, warmup=1000, clip=0.1),
        run=Run(steps=50_000),
    )


def teacher_adapter(space: str = _FIXED) -> Recipe:
    """First stage of a teacher: grow the latent's adapter on a frozen backbone."""
    row = get_space(space)
    return Recipe(
        title=f"PiD teacher for {row.name}, adapter only",
        method="teacher",
        net=_config(row, color_head=True),
        space=row,
        negative=default_negative_prompt(),
        only="adapter",
        data=_data(row),
        optimize=Optimize(rate=5e-5, warmup=2000, decay=1e-3, clip=0.1),
        run=Run(steps=30_000, save_every=1000, sample_every=1000),
    )


def teacher(space: str = _FIXED) -> Recipe:
    """Second stage of a teacher: train the whole network."""
    first = teacher_adapter(space)
    return replace(
        first,
        title=f"PiD teacher for {space}",
        only="all",
        optimize=Optimize(rate=2e-5, warmup=1000, decay=1e-3, clip=0.1),
        run=replace(first.run, steps=20_000),
    )


def student(space: str = _FIXED) -> Recipe:
    """Distil a teacher into a student of four steps, as the released ones were."""
    row = get_space(space)
    return Recipe(
        title=f"PiD student for {row.name}",
        method="student",
        net=_config(row, color_head=False),
        space=row,
        negative=default_negative_prompt(),
        data=replace(_data(row), caption_drop=0.0, latent_drop=0.0),
        optimize=Optimize(rate=1e-5, critic_rate=1e-5, decay=0.0, fake_decay=1e-3, clip=0.1),
        run=Run(steps=3000, save_every=250, sample_every=250),
    )


def student_rollout(space: str = _FIXED) -> Recipe:
    """The same distillation with the student starting from its own rollouts, closer to decoding."""
    made = student(space)
    return replace(made, title=f"{made.title}, self-rollout", distil=Distillation(student_input="self_rollout"))


def teacher_lora(space: str = _FIXED) -> Recipe:
    """Low-rank adapters on a teacher, for a style or a camera."""
    made = teacher(space)
    return replace(
        made,
        title=f"Adapters on the PiD teacher for {space}",
        adapt=Adapt(rank=16),
        optimize=Optimize(rate=1e-4, warmup=100, clip=0.1),
        run=replace(made.run, steps=2000, save_every=250, sample_every=250),
    )


def student_lora(space: str = _FIXED) -> Recipe:
    """Low-rank adapters on a student, by the direct loss: a few images are enough."""
    made = student(space)
    return replace(
        made,
        title=f"Adapters on the PiD student for {space}",
        method="direct",
        adapt=Adapt(rank=16),
        optimize=Optimize(rate=1e-4, warmup=100, clip=0.1),
        run=replace(made.run, steps=2000, save_every=250, sample_every=250),
    )


def _small_run(steps: int) -> Run:
    return Run(
        steps=steps, precision="float32", recompute=False, save_every=100, sample_every=100, samples=2, sample_steps=8,
        export_as="float32",
    )  # fmt: skip


_SMALL_DATA = Data(sizes=((64, 64), (64, 96), (96, 64)), batch=2, workers=2)


def miniature_backbone(space: str = COSINES.name) -> Recipe:
    """A dry run of the backbone's recipe: seconds on a processor."""
    net = debug_config(latent_channels=0, inject_pixels=False)
    return Recipe(
        title="Miniature backbone",
        method="backbone",
        net=net,
        encode_text=ByteStates(net.text_length, net.text_dim),
        data=_SMALL_DATA,
        teacher=TeacherLoss(shift=1.0, shift_base_size=None),
        optimize=Optimize(rate=3e-3, clip=1.0, warmup=5),
        run=_small_run(200),
    )


def miniature_teacher(space: str = COSINES.name) -> Recipe:
    """A dry run of the teacher's recipe in a made-up latent space: seconds on a processor."""
    net = debug_config(color_head=True)
    return replace(
        miniature_backbone(),
        title="Miniature teacher",
        method="teacher",
        net=net,
        space=COSINES,
        encode=encode_cosines,
    )


def miniature_student(space: str = COSINES.name) -> Recipe:
    """A dry run of the distillation, from a debug_config teacher."""
    return replace(
        miniature_teacher(),
        title="Miniature student",
        method="student",
        net=debug_config(),
        data=replace(_SMALL_DATA, caption_drop=0.0, latent_drop=0.0),
        distil=Distillation(student_every=3, guidance=1.5, r1_weight=10.0),
        optimize=Optimize(rate=5e-4, critic_rate=1e-3, clip=1.0),
    )


def miniature_direct(space: str = COSINES.name) -> Recipe:
    """A dry run of the direct recipe."""
    return replace(miniature_teacher(), title="Miniature direct", method="direct", net=debug_config())


def photographs(space: str = "flux2") -> Recipe:
    """From a folder of photographs to a small four-step decoder in ten minutes on a processor (docs/training.md)."""
    row = get_space(space)
    net = PiDConfig(
        hidden_size=96, num_heads=4, patch_depth=4, patch_size=16,
        pixel_hidden_size=8, pixel_depth=1, pixel_attn_hidden_size=96, pixel_num_heads=4, text_dim=0, text_length=1,
        latent_channels=row.channels, latent_down=row.down, latent_unpatchify=row.raw_patch, scale=row.scale,
        adapter_width=64, adapter_blocks=2, adapter_padding="replicate", gate="per_token", inject_interval=1,
        inject_pixels=True, rope_reference=(256, 256),
    )  # fmt: skip
    return Recipe(
        title="A small decoder from photographs",
        method="direct",
        net=net,
        space=row,
        data=Data(sizes=((256, 256), (256, 384), (384, 256)), crop=128, batch=4, workers=2, latent_drop=0.0),
        distil=Distillation(student_input="self_rollout"),
        optimize=Optimize(rate=2e-3, warmup=50, clip=1.0, fall="cosine"),
        average=Average(rate=0.1),
        run=replace(_small_run(1000), save_every=200, sample_every=200),
    )


RECIPES: Mapping[str, Maker] = MappingProxyType(
    {
        maker.__name__: maker
        for maker in (
            pixeldit, teacher_adapter, teacher, student, student_rollout, teacher_lora, student_lora,
            photographs, miniature_backbone, miniature_teacher, miniature_student, miniature_direct,
        )
    }
)  # fmt: skip
"""Every recipe by its name."""


def summary(maker: Maker) -> str:
    """A recipe's first line."""
    return (inspect.getdoc(maker) or "").splitlines()[0]


def get_recipe(name: str, space: str | None = None) -> Recipe:
    """A recipe by its name, or by `file.py:function` for one of your own.

    Raises SettingError for a name that does not exist or a function that returns no Recipe.
    """
    maker = _own(name) if ".py" in name else RECIPES.get(name)
    if maker is None:
        raise SettingError(f"There is no recipe {name!r}.{did_you_mean(name, RECIPES)}")
    made = maker(space) if space is not None else maker()  # type: ignore[call-arg]
    if not isinstance(made, Recipe):
        raise SettingError(f"{name} returns {type(made).__name__}, not a Recipe.")
    if space is not None and made.space is not None and made.space.name != get_space(space).name:
        raise SettingError(f"{name} is made for space {made.space.name}; it cannot be given another.")
    return made


def _own(name: str) -> Maker:
    path, _, function = name.partition(":")
    if not Path(path).is_file() or not function:
        raise SettingError(f"{name!r} names no recipe; write the file and the function: my_recipe.py:my_decoder.")
    found = importlib.util.spec_from_file_location(Path(path).stem, path)
    assert found is not None
    assert found.loader is not None
    module = importlib.util.module_from_spec(found)
    found.loader.exec_module(module)
    maker = getattr(module, function, None)
    if not callable(maker):
        raise SettingError(f"{path} has no function {function!r}.")
    made: Maker = maker
    return made
