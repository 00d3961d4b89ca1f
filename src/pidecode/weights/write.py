# SPDX-License-Identifier: Apache-2.0
"""Tensors -> one .safetensors file, a tensor at a time, whole or not at all."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pidecode.errors import CheckpointError
from pidecode.files import atomic_write

_NAMES = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.float64: "F64"}

_ALIGNMENT = 64
"""Bytes the tensors are aligned to, as torch aligns its own memory: mapped files are then computed on as fast."""


def write_safetensors(
    path: str | Path,
    tensors: Mapping[str, Tensor],
    metadata: Mapping[str, str],
    *,
    dtype: torch.dtype | None = None,
    overwrite: bool = False,
) -> None:
    """Write tensors, converted to `dtype` if given; no more than one converted tensor is held at a time.

    Raises FileError when the file exists (unless `overwrite`) or cannot be written, CheckpointError when a tensor's
    values do not fit the number format. Nothing is left behind then.
    """
    order = sorted(tensors, key=lambda name: _place(name, tensors[name], dtype or tensors[name].dtype))
    header: dict[str, Any] = {"__metadata__": dict(metadata)}
    end = 0
    for name in order:
        stored = dtype or tensors[name].dtype
        begin, end = end, end + tensors[name].numel() * stored.itemsize
        header[name] = {"dtype": _NAMES[stored], "shape": list(tensors[name].shape), "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    text += b" " * (-(8 + len(text)) % _ALIGNMENT)
    with atomic_write(path, overwrite=overwrite) as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name in order:
            file.write(_bytes(name, tensors[name], dtype))


def _place(name: str, tensor: Tensor, stored: torch.dtype) -> tuple[int, bool, str]:
    """Order in the file: wide formats first, and odd sizes last, so that nearly every tensor begins aligned."""
    return -stored.itemsize, tensor.numel() * stored.itemsize % _ALIGNMENT != 0, name


@torch.no_grad()
def _bytes(name: str, tensor: Tensor, dtype: torch.dtype | None) -> memoryview:
    stored = tensor.detach().to(device="cpu", dtype=dtype or tensor.dtype)
    if stored.dtype != tensor.dtype and not torch.isfinite(stored).all():
        largest = tensor.detach().abs().max().item()
        raise CheckpointError(
            f"{name} has values up to {largest:g}, too large for {str(stored.dtype).removeprefix('torch.')}; "
            "use bfloat16 or float32."
        )
    values: Any = stored.contiguous().reshape(-1).view(torch.uint8).numpy()
    return memoryview(values)
