# SPDX-License-Identifier: Apache-2.0
"""The small encoder that ships with `tiny`, as an encoder of FLUX.2's space that needs no other library."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pidecode.encoders.autoencoder_kl import fill
from pidecode.errors import CheckpointError
from pidecode.models.tiny import Reconstruct, TinyEncoder
from pidecode.registry.configs import TinyEncoderConfig
from pidecode.registry.spaces import LatentSpace
from pidecode.weights.read import read_tensors
from pidecode.weights.safetensors import looks_like_safetensors, read_header, read_start


class TinyNative:
    """The small encoder that ships with `tiny`; its output is normalized already, and there is no way back."""

    can_decode = False

    def __init__(self, model: TinyEncoder) -> None:
        self.model = model.eval().requires_grad_(False)

    def encode(
        self, images: Tensor, reconstruct: Reconstruct | None = None, num_refinements: int | None = None
    ) -> Tensor:
        """Normalized latents `[B, 128, h, w]`; with `reconstruct`, corrected by what they decode to."""
        latents: Tensor = self.model(images.to(self.model.dtype), reconstruct, num_refinements)
        return latents

    def decode(self, raw: Tensor) -> Tensor:
        """Never called: `can_decode` is False."""
        raise AssertionError(f"no decoder for {list(raw.shape)}")

    def to(self, device: torch.device) -> None:
        """Move the weights."""
        self.model.to(device)


def is_tiny_encoder(path: Path) -> bool:
    """Whether this file says that it is one of our own small encoders."""
    return path.is_file() and looks_like_safetensors(read_start(path)) and _own_note(path).get("kind") == "encoder"


def _own_note(path: Path) -> dict[str, Any]:
    try:
        note = json.loads(read_header(path).metadata.get("pidecode", "{}"))
    except (ValueError, RecursionError):
        return {}
    return note if isinstance(note, dict) else {}


def load_tiny_encoder(path: Path, space: LatentSpace, dtype: torch.dtype) -> TinyNative:
    """Our own small encoder. Raises CheckpointError if it is not of `space` or its weights do not fit."""
    note = _own_note(path)
    config = TinyEncoderConfig.from_dict(note.get("config", {}))
    if note.get("space", "flux2") != space.name or config.channels != space.channels:
        raise CheckpointError(
            f"{path} encodes images into space {note.get('space', 'flux2')}, not {space.name}; name that space's own."
        )
    tensors = read_tensors(path).tensors
    with torch.device("meta"):
        model = TinyEncoder(config)
    fill(model, tensors, path)
    return TinyNative(model.to(dtype))
