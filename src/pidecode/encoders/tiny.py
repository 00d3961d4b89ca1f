# SPDX-License-Identifier: Apache-2.0
"""The image encoder that ships with `tiny`: FLUX.2's latent space, no other library needed."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pidecode.errors import CheckpointError, SettingError
from pidecode.models.tiny import TinyEncoder
from pidecode.registry.configs import TinyEncoderConfig
from pidecode.registry.spaces import LatentSpace
from pidecode.strict_json import JSONError, parse_json
from pidecode.weights.load import load_state
from pidecode.weights.metadata import METADATA_KEY
from pidecode.weights.read import check_finite, check_formats, read_tensors
from pidecode.weights.safetensors import looks_like_safetensors, read_header, read_start


class TinyImageEncoder:
    """A TinyEncoder as an `Autoencoder` without a decoder; its latents are normalized already."""

    can_decode = False

    def __init__(self, model: TinyEncoder) -> None:
        # Channels last, so that convolutions on a CPU need not reorder their inputs.
        self.model = model.eval().requires_grad_(False).to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    def encode(self, images: Tensor) -> Tensor:
        """Normalized latents `[B, 128, H / 16, W / 16]` of images `[B, 3, H, W]` in [-1, 1]."""
        latents: Tensor = self.model(images.to(self.model.dtype))
        return latents

    def decode(self, raw: Tensor) -> Tensor:
        """Never called, because `can_decode` is False."""
        raise AssertionError(f"no decoder for latents {list(raw.shape)}")

    def to(self, device: torch.device) -> None:
        """Move the weights to a device."""
        self.model.to(device)


def is_tiny_encoder(path: Path) -> bool:
    """Whether a file's metadata says that it holds a TinyEncoder."""
    readable = os.path.isfile(path) and looks_like_safetensors(read_start(path))
    return readable and _metadata(path).get("kind") == "encoder"


def _metadata(path: Path) -> dict[str, Any]:
    try:
        metadata = parse_json(read_header(path).metadata.get(METADATA_KEY, "{}"))
    except JSONError:
        return {}
    return metadata if isinstance(metadata, dict) else {}


def load_tiny_encoder(path: Path, space: LatentSpace, dtype: torch.dtype) -> TinyImageEncoder:
    """Load a TinyEncoder of a space from a .safetensors file, to the CPU."""
    metadata = _metadata(path)
    given = metadata.get("config", {})
    if not isinstance(given, dict):
        raise CheckpointError(f"{path} has a configuration that is no JSON object; the file is damaged.")
    try:
        config = TinyEncoderConfig.from_dict(given)
    except SettingError as error:
        raise CheckpointError(f"{path} describes no encoder: {error}") from None
    if metadata.get("space", "flux2") != space.name or config.channels != space.channels:
        raise CheckpointError(
            f"{path} encodes images into space {metadata.get('space', 'flux2')}, not {space.name}; "
            "use the encoder of that space."
        )
    with torch.device("meta"):
        model = TinyEncoder(config)
    tensors = read_tensors(path).tensors
    check_formats(tensors, path)
    check_finite(tensors, path)
    load_state(model, tensors, path)
    return TinyImageEncoder(model.to(dtype))
