# SPDX-License-Identifier: Apache-2.0
"""Low-rank adapter files: written with what they say of themselves, applied to a network at any strength."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from safetensors.torch import save
from torch import Tensor, nn

from pidecode.errors import CheckpointError, SettingError
from pidecode.files import atomic_write
from pidecode.weights.read import check_finite, read_tensors

METADATA_KEY = "pidecode_lora"
_PREFIX = "base_model.model."  # peft's own files name the layers from the outside
_A, _B = ".lora_A.weight", ".lora_B.weight"


@dataclass(frozen=True, slots=True, kw_only=True)
class LoraIdentity:
    """What an adapter file says of itself."""

    rank: int
    alpha: float
    space: str | None = None
    """Latent space of the network it was trained on."""
    base: str | None = None
    """What it was trained on, in words."""


def write_lora(path: str | Path, tensors: Mapping[str, Tensor], identity: LoraIdentity) -> None:
    """Write adapters (`<layer>.lora_A.weight`, `<layer>.lora_B.weight`) as one .safetensors file."""
    metadata = {"format": "pt", METADATA_KEY: json.dumps({"format": 1, **asdict(identity)})}
    content = save({name: tensor.contiguous() for name, tensor in tensors.items()}, metadata)
    with atomic_write(path, overwrite=True) as file:
        file.write(content)


@torch.no_grad()
def apply_lora(net: nn.Module, path: str | Path, scale: float = 1.0) -> int:
    """Add an adapter file's change, times `scale`, to the network's own weights; returns how many layers changed.

    `W + scale * alpha / rank * B A`, computed in float32. Applying the same file with the negated scale takes it
    back to rounding. Files of ours and of peft are read; peft's without our metadata count alpha as the rank.
    Raises CheckpointError for a file that is no adapter of this network, SettingError for a scale that is no number.
    """
    if not torch.isfinite(torch.tensor(float(scale))):
        raise SettingError(f"lora_scale is {scale}; it must be a finite number (1 is full strength).")
    file = read_tensors(path)
    check_finite(file.tensors, path)
    tensors = {name.removeprefix(_PREFIX): tensor for name, tensor in file.tensors.items()}
    layers = sorted(name.removesuffix(_A) for name in tensors if name.endswith(_A))
    if not layers or len(tensors) != 2 * len(layers) or any(layer + _B not in tensors for layer in layers):
        raise CheckpointError(f"{path} is no adapter file: it must hold pairs of lora_A and lora_B, and nothing else.")
    told = _identity(path, file.metadata)
    own = dict(net.named_parameters())
    changes = []
    for layer in layers:
        down, up = tensors[layer + _A].float(), tensors[layer + _B].float()
        weight = own.get(f"{layer}.weight")
        if weight is None or down.ndim != 2 or (up.shape[0], down.shape[1]) != tuple(weight.shape):
            what = "which this network lacks" if weight is None else f"of shape {tuple(weight.shape)} here"
            raise CheckpointError(f"{path} adapts {layer}, {what}; it was trained on another network.")
        if up.shape[1] != down.shape[0]:
            raise CheckpointError(f"{path} is damaged: the two halves of {layer} do not fit together.")
        strength = scale * (1.0 if told is None else told.alpha / told.rank)
        changes.append((weight, down, up, strength))
    for weight, down, up, strength in changes:  # only once all are known to fit
        device = weight.device
        change = strength * (up.to(device) @ down.to(device))
        weight.copy_((weight.float() + change).to(weight.dtype))
    return len(changes)


def _identity(path: str | Path, metadata: Mapping[str, str]) -> LoraIdentity | None:
    if METADATA_KEY not in metadata:
        return None
    try:
        record = json.loads(metadata[METADATA_KEY])
        identity = LoraIdentity(
            rank=int(record["rank"]), alpha=float(record["alpha"]), space=record.get("space"), base=record.get("base")
        )
        if record.get("format") != 1 or identity.rank < 1:
            raise ValueError("its format or rank is unknown")
    except (ValueError, KeyError, TypeError) as fault:
        raise CheckpointError(f"{path} describes itself wrongly ({fault}); export it again.") from None
    return identity
