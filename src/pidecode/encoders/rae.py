# SPDX-License-Identifier: Apache-2.0
"""Representation autoencoders: DINOv2 (RAE) and SigLIP 2 (Scale-RAE) as encoders, with their ViT decoders.

RAE: "Diffusion Transformers with Representation Autoencoders", https://arxiv.org/abs/2510.11690. Scale-RAE:
"Scaling Text-to-Image Diffusion Transformers with Representation Autoencoders", https://arxiv.org/abs/2601.16208.
"""

from __future__ import annotations

import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from pidecode.errors import CheckpointError, DownloadError, MissingDependencyError
from pidecode.files import PathLike
from pidecode.latents.layout import LatentStatistics
from pidecode.models.vit_decoder import VitDecoder, infer_vit_config, sincos_position_embedding
from pidecode.registry.checkpoints import ENCODERS
from pidecode.registry.configs import check_foreign_config
from pidecode.registry.spaces import LatentSpace
from pidecode.strict_json import read_json
from pidecode.weights.load import load_state
from pidecode.weights.read import check_finite, check_formats, read_tensors
from pidecode.weights.resolve import HubCache


@dataclass(frozen=True, slots=True, kw_only=True)
class VisionModelSpec:
    """How a vision model is used as an encoder (docs/architecture.md, "Latent spaces")."""

    repository: str
    model_types: tuple[str, ...]  # `model_type` values of its config.json
    side: int  # side, in pixels, of the square the model is given
    antialias: bool
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    decoder_files: tuple[str, ...]  # places of the decoder's weights in the project's repository, the best first
    statistics_files: tuple[str, ...] = ()


VISION_MODELS = {
    "dinov2": VisionModelSpec(
        repository="facebook/dinov2-with-registers-base", model_types=("dinov2_with_registers",), side=448,
        antialias=False, mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225),
        decoder_files=("decoders/dinov2/wReg_base/ViTXL_n08_i512/model.pt", "decoder.safetensors", "model.pt"),
        statistics_files=("stats/dinov2/wReg_base/imagenet1k_512/stat.pt", "stat.safetensors", "stat.pt"),
    ),
    "siglip": VisionModelSpec(
        repository="google/siglip2-so400m-patch14-224", model_types=("siglip", "siglip_vision_model"), side=224,
        antialias=True, mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5),
        decoder_files=("decoder/siglip2_sop14_i224_web73M_ganw3_decXL.pt", "decoder.safetensors", "model.pt"),
    ),
}  # fmt: skip


class RepresentationAutoencoder:
    """A frozen vision model whose patch features are the raw latents, with a ViT decoder if there is one."""

    def __init__(self, model: Any, space: LatentSpace, decoder: VitDecoder | None) -> None:
        self._model = model.eval().requires_grad_(False)
        self._decoder = decoder.eval().requires_grad_(False) if decoder is not None else None
        self.can_decode = decoder is not None
        self._spec = VISION_MODELS[space.name]
        self._side = space.fixed_input or VISION_MODELS[space.name].side
        self._dtype = next(model.parameters()).dtype
        # DINOv2 puts a class token and register tokens before the patches; SigLIP has none.
        self._num_prefix_tokens = 1 + model.config.num_register_tokens if space.name == "dinov2" else 0

    def _mean_std(self, like: Tensor) -> Tensor:
        return like.new_tensor([self._spec.mean, self._spec.std]).view(2, 1, 3, 1, 1)

    def encode(self, images: Tensor) -> Tensor:
        """Features `[B, C, h, w]` of the last layer, of images `[B, 3, H, W]` in [-1, 1] resized to the model's square.

        DINOv2's are taken after its last LayerNorm without the affine weights, SigLIP's before it.
        """
        spec = self._spec
        resized = (images + 1) / 2
        if resized.shape[-2:] != (spec.side, spec.side):
            resized = functional.interpolate(
                resized, size=(spec.side, spec.side), mode="bicubic", align_corners=False, antialias=spec.antialias
            )
        mean, std = self._mean_std(resized)
        tokens = self._model(((resized - mean) / std).to(self._dtype)).last_hidden_state[:, self._num_prefix_tokens :]
        side = math.isqrt(tokens.shape[1])
        features: Tensor = tokens.transpose(1, 2).unflatten(2, (side, side))
        return features

    def decode(self, raw: Tensor) -> Tensor:
        """Decode features `[B, C, h, w]` to images `[B, 3, side, side]` in [-1, 1]."""
        assert self._decoder is not None
        images = self._decoder(raw.flatten(2).transpose(1, 2).to(self._dtype)).float()
        mean, std = self._mean_std(images)
        images = (images * std + mean).clamp(0, 1)
        side = (self._side, self._side)
        if images.shape[-1] != self._side:  # Scale-RAE decodes to 224 pixels; the space counts 256
            images = functional.interpolate(images, size=side, mode="bicubic", align_corners=False).clamp(0, 1)
        result: Tensor = images * 2 - 1
        return result

    def to(self, device: torch.device) -> None:
        """Move the weights to a device."""
        self._model.to(device)
        if self._decoder is not None:
            self._decoder.to(device)


def load_representation_autoencoder(
    space: LatentSpace,
    path: Path,
    *,
    dtype: torch.dtype,
    backbone: PathLike | None,
    statistics: PathLike | None,
    decoder: PathLike | None,
) -> tuple[RepresentationAutoencoder, LatentStatistics | None]:
    """The autoencoder of dinov2 or siglip, without a decoder if none was found, and the statistics of dinov2 or None.

    What is not given is looked for in `path`, then (vision model and statistics) in the hub cache.

    Raises:
        CheckpointError: A file is missing or does not fit.
        DownloadError: The vision model is not on this machine.
        MissingDependencyError: transformers is not installed.
    """
    spec = VISION_MODELS[space.name]
    if not os.path.isdir(path):
        raise CheckpointError(
            f"{path} is not a folder. The {space.name} encoder is a folder: the model {spec.repository}, or the "
            "project's collection, which also holds the decoder."
        )
    model = _load_vision_model(space, path, backbone, dtype)
    latent_statistics = None
    if space.statistics == "per_position":
        cached = ENCODERS[space.name].statistics  # where `pidecode pull` puts them
        file = _find(path, statistics, spec.statistics_files) or (HubCache().cached(*cached) if cached else None)
        latent_statistics = _read_statistics(space, file, path)
    decoder_file = _find(path, decoder, spec.decoder_files)
    vit = None if decoder_file is None else _load_decoder(space, decoder_file, dtype)
    return RepresentationAutoencoder(model, space, vit), latent_statistics


def _find(path: Path, given: PathLike | None, places: tuple[str, ...]) -> Path | None:
    if given is not None:
        return Path(os.path.expanduser(given))
    return next((path / place for place in places if os.path.isfile(path / place)), None)


def _model_type(folder: Path) -> object:
    """What the configuration in a folder says that its model is; None where there is no configuration."""
    try:
        config = read_json(folder / "config.json")
    except (OSError, ValueError):
        return None
    if not isinstance(config, dict):
        return None
    check_foreign_config(config, folder / "config.json")
    return config.get("model_type")


def _load_vision_model(space: LatentSpace, path: Path, given: PathLike | None, dtype: torch.dtype) -> Any:
    """The vision model: the one given, else the one in `path`, else the official one in the hub cache."""
    try:
        from transformers import Dinov2WithRegistersModel, SiglipVisionModel
    except ImportError as fault:
        raise MissingDependencyError(
            f'The {space.name} encoder needs transformers, which is not installed; run `pip install "pidecode[text]"`.'
        ) from fault
    spec = VISION_MODELS[space.name]
    if given is not None:
        source = os.path.expanduser(given) if os.path.isdir(os.path.expanduser(given)) else str(given)
        if os.path.isdir(source) and _model_type(Path(source)) not in spec.model_types:
            raise CheckpointError(
                f"{source} holds a {_model_type(Path(source))!r} model; the {space.name} encoder is {spec.repository}."
            )
    else:
        folders = (path, path / "encoder", path / spec.repository.split("/")[1], path / spec.repository)
        source = next((str(place) for place in folders if _model_type(place) in spec.model_types), spec.repository)
    model_class = Dinov2WithRegistersModel if space.name == "dinov2" else SiglipVisionModel
    try:
        model = model_class.from_pretrained(source, local_files_only=True, dtype=dtype)
    except (OSError, ValueError) as fault:
        first = (str(fault).splitlines() or [""])[0]
        raise DownloadError(
            f"The vision model {source} is not on this machine or incomplete ({first[:160]}). Fetch it with "
            f"`hf download {spec.repository}`, or pass its folder as backbone=."
        ) from None
    if space.name == "dinov2":
        norm = model.layernorm
        model.layernorm = torch.nn.LayerNorm(norm.normalized_shape, eps=norm.eps, elementwise_affine=False)
        return model
    model = getattr(model, "vision_model", model)
    model.post_layernorm = torch.nn.Identity()  # Scale-RAE takes the features before it
    model.head = torch.nn.Identity()  # the pooled output is not used
    return model


def _read_statistics(space: LatentSpace, file: Path | None, path: Path) -> LatentStatistics:
    if file is None:
        raise CheckpointError(
            f"{path} holds no stat.pt, and {space.name} latents cannot be normalized without RAE's statistics. Fetch "
            f"{VISION_MODELS[space.name].statistics_files[0]} of nyu-visionx/RAE-collections, or pass statistics=."
        )
    tensors = read_tensors(file).tensors
    if not {"mean", "var"} <= set(tensors):
        raise CheckpointError(f"{file} holds {', '.join(sorted(tensors)[:4])}; RAE's statistics are `mean` and `var`.")
    mean, variance = tensors["mean"].float().squeeze(0), tensors["var"].float().squeeze(0)
    if mean.ndim != 3 or mean.shape != variance.shape or not bool((variance >= 0).all()):
        raise CheckpointError(
            f"{file} has a mean {list(mean.shape)} and variance {list(variance.shape)}; download it again."
        )
    return LatentStatistics(mean, variance)


def _load_decoder(space: LatentSpace, file: Path, dtype: torch.dtype) -> VitDecoder:
    tensors = dict(read_tensors(file).tensors)
    tensors = {name.removeprefix("module.").removeprefix("decoder."): value for name, value in tensors.items()}
    check_formats(tensors, file)
    check_finite(tensors, file)
    num_heads, eps = _read_decoder_config(file)
    if "decoder_pos_embed" not in tensors and "decoder_embed.weight" in tensors:  # not trained, so files may omit it
        grid = 32 if space.name == "dinov2" else 16
        tensors["decoder_pos_embed"] = sincos_position_embedding(tensors["decoder_embed.weight"].shape[0], grid)
    config = infer_vit_config(tensors, file, num_heads=num_heads, eps=eps)
    if config.in_channels != space.channels:
        raise CheckpointError(
            f"{file} decodes {config.in_channels} channels, and {space.name} latents have {space.channels}; give the "
            "decoder of that space."
        )
    with torch.device("meta"):
        decoder = VitDecoder(config)
    load_state(decoder, tensors, file)
    return decoder.to(dtype)


def _read_decoder_config(file: Path) -> tuple[int | None, float]:
    """Heads and LayerNorm epsilon, which weights do not show: from a config in the same folder, else ViT-XL's."""
    for config_path in sorted(file.parent.glob("*config.json")):
        try:
            config = read_json(config_path)
            if isinstance(config, dict) and "decoder_num_attention_heads" in config:
                return int(config["decoder_num_attention_heads"]), float(config.get("layer_norm_eps", 1e-12))
        except (OSError, TypeError, ValueError) as fault:
            raise CheckpointError(f"{config_path} cannot be read: {fault}. Download it again.") from None
    return None, 1e-12
