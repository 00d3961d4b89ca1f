# SPDX-License-Identifier: Apache-2.0
"""DINOv2 (RAE) and SigLIP 2 (Scale-RAE): frozen vision models as encoders, and their projects' ViT decoders."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from pidecode.encoders.autoencoder_kl import fill
from pidecode.encoders.base import PathLike, need
from pidecode.errors import CheckpointError, DownloadError
from pidecode.latents.layout import LatentStatistics
from pidecode.models.vit_decoder import VitDecoder, positions, shape_of
from pidecode.registry.checkpoints import ENCODERS
from pidecode.registry.spaces import LatentSpace
from pidecode.weights.read import check_finite, check_formats, read_tensors
from pidecode.weights.resolve import Hub


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """How a vision model is used as an encoder (docs/architecture.md, Latent spaces)."""

    repository: str
    kinds: tuple[str, ...]
    """`model_type` values of its config.json."""
    side: int
    """Pixels along each side of what the model sees."""
    antialias: bool
    mean: tuple[float, float, float]
    deviation: tuple[float, float, float]
    decoder_files: tuple[str, ...]
    """Where the projects keep the decoder's weights, below their collection's folder."""
    statistics_files: tuple[str, ...] = ()


RECIPES = {
    "dinov2": Recipe(
        repository="facebook/dinov2-with-registers-base",
        kinds=("dinov2_with_registers",),
        side=448,
        antialias=False,
        mean=(0.485, 0.456, 0.406),
        deviation=(0.229, 0.224, 0.225),
        decoder_files=("decoders/dinov2/wReg_base/ViTXL_n08_i512/model.pt", "decoder.safetensors", "model.pt"),
        statistics_files=("stats/dinov2/wReg_base/imagenet1k_512/stat.pt", "stat.safetensors", "stat.pt"),
    ),
    "siglip": Recipe(
        repository="google/siglip2-so400m-patch14-224",
        kinds=("siglip", "siglip_vision_model"),
        side=224,
        antialias=True,
        mean=(0.5, 0.5, 0.5),
        deviation=(0.5, 0.5, 0.5),
        decoder_files=("decoder/siglip2_sop14_i224_web73M_ganw3_decXL.pt", "decoder.safetensors", "model.pt"),
    ),
}


class RepresentationNative:
    """A vision model's patch features as raw latents `[B, C, h, w]`, and a ViT that turns them back into images."""

    def __init__(self, tower: Any, space: LatentSpace, decoder: VitDecoder | None) -> None:
        self._tower = tower.eval().requires_grad_(False)
        self._decoder = decoder.eval().requires_grad_(False) if decoder is not None else None
        self._recipe = RECIPES[space.name]
        self._side = space.fixed_input or RECIPES[space.name].side
        self._dtype = next(tower.parameters()).dtype
        # Class and register tokens stand before the patches; SigLIP has none.
        self._special = 1 + tower.config.num_register_tokens if space.name == "dinov2" else 0

    @property
    def can_decode(self) -> bool:
        """Whether the ViT is at hand."""
        return self._decoder is not None

    def _colors(self, like: Tensor) -> tuple[Tensor, Tensor]:
        recipe = self._recipe
        mean, deviation = like.new_tensor([recipe.mean, recipe.deviation]).view(2, 1, 3, 1, 1)
        return mean, deviation

    def encode(self, images: Tensor) -> Tensor:
        """Features of the model's last layer, before SigLIP's last norm, after DINOv2's without its weights."""
        recipe = self._recipe
        seen = (images + 1) / 2
        if seen.shape[-2:] != (recipe.side, recipe.side):
            seen = functional.interpolate(
                seen, size=(recipe.side, recipe.side), mode="bicubic", align_corners=False, antialias=recipe.antialias
            )
        mean, deviation = self._colors(seen)
        tokens = self._tower(((seen - mean) / deviation).to(self._dtype)).last_hidden_state[:, self._special :]
        side = math.isqrt(tokens.shape[1])
        features: Tensor = tokens.transpose(1, 2).unflatten(2, (side, side))
        return features

    def decode(self, raw: Tensor) -> Tensor:
        """Images of the space's own square size, in [-1, 1]."""
        assert self._decoder is not None
        images = self._decoder(raw.flatten(2).transpose(1, 2).to(self._dtype)).float()
        mean, deviation = self._colors(images)
        images = (images * deviation + mean).clamp(0, 1)
        if images.shape[-1] != self._side:  # Scale-RAE decodes to 224 pixels what stands for 256
            images = functional.interpolate(
                images, size=(self._side, self._side), mode="bicubic", align_corners=False
            ).clamp(0, 1)
        result: Tensor = images * 2 - 1
        return result

    def to(self, device: torch.device) -> None:
        """Move the weights."""
        self._tower.to(device)
        if self._decoder is not None:
            self._decoder.to(device)


def load_representation(
    space: LatentSpace,
    path: Path,
    *,
    dtype: torch.dtype,
    backbone: PathLike | None,
    statistics: PathLike | None,
    native_decoder: PathLike | None,
) -> tuple[RepresentationNative, LatentStatistics | None]:
    """The encoder of dinov2 or siglip, its statistics, and its decoder where there is one; see `load_encoder`.

    Raises CheckpointError or DownloadError naming the missing part.
    """
    recipe = RECIPES[space.name]
    if not path.is_dir():
        raise CheckpointError(
            f"{path} is no folder; the {space.name} encoder is a folder: the model {recipe.repository}, or the "
            "project's collection with its decoder beside it."
        )
    tower = _load_tower(space, _find_backbone(path, recipe, backbone), dtype)
    found = None
    if space.statistics == "per_position":
        file = _find(path, statistics, recipe.statistics_files) or _pulled_statistics(space)
        found = _read_statistics(space, file, path)
    decoder_file = _find(path, native_decoder, recipe.decoder_files)
    decoder = None if decoder_file is None else _load_decoder(space, decoder_file, dtype)
    return RepresentationNative(tower, space, decoder), found


def _find(path: Path, given: PathLike | None, places: tuple[str, ...]) -> Path | None:
    if given is not None:
        return Path(given).expanduser()
    return next((path / place for place in places if (path / place).is_file()), None)


def _pulled_statistics(space: LatentSpace) -> Path | None:
    """Where `pidecode pull` puts the statistics: RAE's own repository in the hub's cache."""
    place = ENCODERS[space.name].statistics
    return Hub().cached(*place) if place else None


def _find_backbone(path: Path, recipe: Recipe, given: PathLike | None) -> str:
    if given is not None:
        return str(Path(given).expanduser()) if Path(given).expanduser().is_dir() else str(given)
    name = recipe.repository.split("/")[1]
    for folder in (path, path / "encoder", path / name, path / recipe.repository):
        if (folder / "config.json").is_file() and _kind(folder) in recipe.kinds:
            return str(folder)
    return recipe.repository


def _kind(folder: Path) -> object:
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return config.get("model_type") if isinstance(config, dict) else None


def _load_tower(space: LatentSpace, source: str, dtype: torch.dtype) -> Any:
    try:
        from transformers import Dinov2WithRegistersModel, SiglipVisionModel
    except ImportError as fault:
        raise need("transformers", "captions") from fault
    recipe = RECIPES[space.name]
    if Path(source).is_dir() and _kind(Path(source)) not in recipe.kinds:
        raise CheckpointError(
            f"{source} holds a {_kind(Path(source))!r} model; the {space.name} encoder is {recipe.repository}."
        )
    kind = Dinov2WithRegistersModel if space.name == "dinov2" else SiglipVisionModel
    try:
        model = kind.from_pretrained(source, local_files_only=True, dtype=dtype)
    except (OSError, ValueError) as fault:
        first = (str(fault).splitlines() or [""])[0]
        raise DownloadError(
            f"The vision model {source} is not on this machine or not whole ({first[:160]}). Fetch it with "
            f"`hf download {recipe.repository}`, or name its folder as backbone=."
        ) from None
    if space.name == "dinov2":
        norm = model.layernorm
        model.layernorm = torch.nn.LayerNorm(norm.normalized_shape, eps=norm.eps, elementwise_affine=False)
        return model
    tower = getattr(model, "vision_model", model)
    tower.post_layernorm = torch.nn.Identity()  # the project took the features before it
    tower.head = torch.nn.Identity()  # pooling that nobody reads
    return tower


def _read_statistics(space: LatentSpace, file: Path | None, path: Path) -> LatentStatistics:
    if file is None:
        raise CheckpointError(
            f"{path} holds no stat.pt, and {space.name} latents cannot be normalized without RAE's statistics. Fetch "
            f"{RECIPES[space.name].statistics_files[0]} of nyu-visionx/RAE-collections, or name it as statistics=."
        )
    tensors = read_tensors(file).tensors
    if not {"mean", "var"} <= set(tensors):
        raise CheckpointError(f"{file} holds {', '.join(sorted(tensors)[:4])}; RAE's statistics are `mean` and `var`.")
    mean, variance = tensors["mean"].float().squeeze(0), tensors["var"].float().squeeze(0)
    if mean.ndim != 3 or mean.shape != variance.shape or not bool((variance >= 0).all()):
        raise CheckpointError(
            f"{file} has a mean {list(mean.shape)} and variance {list(variance.shape)}; fetch it again."
        )
    return LatentStatistics(mean, variance)


def _load_decoder(space: LatentSpace, file: Path, dtype: torch.dtype) -> VitDecoder:
    tensors = dict(read_tensors(file).tensors)
    tensors = {name.removeprefix("module.").removeprefix("decoder."): value for name, value in tensors.items()}
    check_formats(tensors, file)
    check_finite(tensors, file)
    heads, epsilon = _from_config(file)
    if "decoder_pos_embed" not in tensors and "decoder_embed.weight" in tensors:  # it is fixed, so files may omit it
        grid = 32 if space.name == "dinov2" else 16
        tensors["decoder_pos_embed"] = positions(tensors["decoder_embed.weight"].shape[0], grid)
    config = shape_of(tensors, file, heads=heads, epsilon=epsilon)
    if config.features != space.channels:
        raise CheckpointError(
            f"{file} decodes {config.features} channels and {space.name} latents have {space.channels}; name its own."
        )
    with torch.device("meta"):
        decoder = VitDecoder(config)
    fill(decoder, tensors, file)
    return decoder.to(dtype)


def _from_config(file: Path) -> tuple[int | None, float]:
    """Heads and LayerNorm epsilon, which the weights do not tell: from a config beside them, else ViT-XL's."""
    for beside in sorted(file.parent.glob("*config.json")):
        try:
            config = json.loads(beside.read_text(encoding="utf-8"))
            if isinstance(config, dict) and "decoder_num_attention_heads" in config:
                return int(config["decoder_num_attention_heads"]), float(config.get("layer_norm_eps", 1e-12))
        except (OSError, TypeError, ValueError) as fault:
            raise CheckpointError(f"{beside} cannot be read: {fault}. Fetch it again.") from None
    return None, 1e-12
