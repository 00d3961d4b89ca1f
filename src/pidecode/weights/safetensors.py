# SPDX-License-Identifier: Apache-2.0
"""The .safetensors format: header, and writing whole files."""

from __future__ import annotations

import errno
import hashlib
import json
import math
import os
import stat
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pidecode.errors import CheckpointError
from pidecode.files import atomic_write

if TYPE_CHECKING:
    import torch
    from torch import Tensor

BITS: Mapping[str, int] = {
    "BOOL": 8, "U8": 8, "I8": 8, "U16": 16, "I16": 16, "U32": 32, "I32": 32, "U64": 64, "I64": 64,
    "F16": 16, "BF16": 16, "F32": 32, "F64": 64, "C64": 64,
    "F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8, "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8,
    "F4": 4, "F6_E2M3": 6, "F6_E3M2": 6,
}  # fmt: skip
"""Bits per value of every number format a .safetensors file may name."""

MAX_HEADER_BYTES = 100_000_000
"""The format's own limit; a larger claim is a lie or another kind of file."""


@dataclass(frozen=True, slots=True)
class TensorEntry:
    """One tensor as the header describes it: number format, shape, and its bytes' place after the header."""

    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int


@dataclass(frozen=True, slots=True)
class Header:
    """A checked .safetensors header: tensors by name, and the file's free text metadata."""

    tensors: Mapping[str, TensorEntry]
    metadata: Mapping[str, str]

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shape of every tensor."""
        return {name: entry.shape for name, entry in self.tensors.items()}


def check_file(path: str | Path) -> int:
    """Size in bytes of an ordinary, non-empty, readable file; symbolic links are followed.

    Raises CheckpointError when it is missing, a directory, a link loop, a device, empty, or not ours to read.
    """
    path = Path(path)
    try:
        status = os.stat(path)
    except OSError as fault:
        reasons = {
            errno.ELOOP: "is a symbolic link that leads back to itself; point it at the file",
            errno.EACCES: "may not be read; change its permissions",
            errno.ENOTDIR: "lies below a file, not a folder; check the path",
            errno.ENAMETOOLONG: "is too long a name for a file",
        }
        missing = "is a symbolic link to nothing" if path.is_symlink() else "does not exist; check the path"
        raise CheckpointError(f"{path} {reasons.get(fault.errno or 0, missing)}.") from None
    if stat.S_ISDIR(status.st_mode):
        raise CheckpointError(f"{path} is a folder; name the weights file in it (.safetensors or .pth).")
    if not stat.S_ISREG(status.st_mode):
        raise CheckpointError(f"{path} is a device or pipe, not a file; weights are read from ordinary files only.")
    if status.st_size == 0:
        raise CheckpointError(f"{path} is empty (0 bytes); the download or copy failed: fetch it again.")
    if not os.access(path, os.R_OK):
        raise CheckpointError(f"{path} may not be read; change its permissions.")
    return status.st_size


def read_start(path: str | Path, count: int = 512) -> bytes:
    """The first bytes of a checked file."""
    try:
        with open(path, "rb") as file:
            return file.read(count)
    except OSError as fault:
        raise CheckpointError(f"{path} could not be read: {fault.strerror or fault}.") from fault


def looks_like_safetensors(start: bytes) -> bool:
    """Whether the first bytes are a header length and the opening of its JSON."""
    return len(start) >= 9 and start[8:9] == b"{" and int.from_bytes(start[:8], "little") <= MAX_HEADER_BYTES


def read_header(path: str | Path) -> Header:
    """The header of a .safetensors file, with every claim checked against the file's true size.

    Raises CheckpointError when the file is truncated, when lengths, offsets or shapes disagree with
    each other or with the file, or when the header is not the JSON it must be.
    """
    size = check_file(path)
    start = read_start(path, 8)
    length = int.from_bytes(start, "little")
    if len(start) < 8 or length > MAX_HEADER_BYTES or length < 2:
        raise CheckpointError(f"{path} is not a .safetensors file: it has no header of a believable length.")
    if 8 + length > size:
        raise CheckpointError(
            f"{path} is truncated or lies about its header: it claims {length:,} bytes of header "
            f"in a file of {size:,}; fetch it again."
        )
    with open(path, "rb") as file:
        file.seek(8)
        text = file.read(length)
    fields = _parse(path, text)
    metadata = fields.pop("__metadata__", None) or {}
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise CheckpointError(f"{path} has metadata that is not text by name; the file was not written by safetensors.")
    tensors = {name: _entry(path, name, claim) for name, claim in fields.items()}
    _check_extent(path, tensors, size - 8 - length)
    return Header(tensors, metadata)


def _parse(path: str | Path, text: bytes) -> dict[str, Any]:
    def no_twins(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        unique = dict(pairs)
        if len(unique) != len(pairs):
            raise CheckpointError(f"{path} names a tensor twice in its header; do not trust this file.")
        return unique

    try:
        fields = json.loads(text.decode("utf-8"), object_pairs_hook=no_twins)
    except (ValueError, RecursionError):
        raise CheckpointError(f"{path} is not a .safetensors file: its header is not JSON. Fetch it again.") from None
    if not isinstance(fields, dict):
        raise CheckpointError(f"{path} is not a .safetensors file: its header is not a table of tensors.")
    return fields


def _entry(path: str | Path, name: str, claim: Any) -> TensorEntry:
    if not isinstance(claim, dict):
        raise CheckpointError(f"{path} describes tensor {name!r} by {type(claim).__name__}, not by a table.")
    dtype: Any = claim.get("dtype")
    shape: Any = claim.get("shape")
    offsets: Any = claim.get("data_offsets")
    if not isinstance(dtype, str) or dtype not in BITS:
        raise CheckpointError(f"{path} stores tensor {name!r} as {dtype!r}; known formats are {', '.join(BITS)}.")
    if not _whole_numbers(shape) or not _whole_numbers(offsets) or len(offsets) != 2:
        raise CheckpointError(f"{path} gives tensor {name!r} a shape or place that is not whole numbers.")
    begin, end = offsets
    needed = math.prod(shape) * BITS[dtype]
    if needed % 8 or end - begin != needed // 8:
        raise CheckpointError(
            f"{path} lies about tensor {name!r}: shape {list(shape)} as {dtype} takes {needed // 8:,} bytes, "
            f"but it is given {end - begin:,}. Do not trust this file."
        )
    return TensorEntry(dtype, tuple(shape), begin, end)


def _whole_numbers(value: Any) -> bool:
    return isinstance(value, list) and all(type(item) is int and item >= 0 for item in value)


def _check_extent(path: str | Path, tensors: Mapping[str, TensorEntry], available: int) -> None:
    reached = 0
    for name, entry in sorted(tensors.items(), key=lambda item: (item[1].begin, item[1].end)):
        if entry.begin != reached:
            what = "overlaps the one before it" if entry.begin < reached else "leaves a gap before it"
            raise CheckpointError(f"{path} lies about tensor {name!r}: its bytes start where it {what}.")
        reached = entry.end
    if reached > available:
        raise CheckpointError(
            f"{path} is truncated: its tensors take {reached:,} bytes and only {available:,} are there; fetch it again."
        )
    if reached < available:
        raise CheckpointError(
            f"{path} carries {available - reached:,} bytes that no tensor owns; do not trust this file."
        )


def sha256(path: str | Path, on_progress: Callable[[int], None] | None = None) -> str:
    """SHA-256 of a file as 64 lower-case hexadecimal digits; `on_progress` is told the bytes read so far."""
    check_file(path)
    digest, done = hashlib.sha256(), 0
    with open(path, "rb") as file:
        while chunk := file.read(1 << 22):
            digest.update(chunk)
            done += len(chunk)
            if on_progress:
                on_progress(done)
    return digest.hexdigest()


_NAMES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16", "float64": "F64"}

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
        header[name] = {
            "dtype": _NAMES[str(stored).removeprefix("torch.")],
            "shape": list(tensors[name].shape),
            "data_offsets": [begin, end],
        }
    text = json.dumps(header).encode()
    text += b" " * (-(8 + len(text)) % _ALIGNMENT)
    with atomic_write(path, overwrite=overwrite) as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name in order:
            file.write(_bytes(name, tensors[name], dtype))


def _place(name: str, tensor: Tensor, stored: torch.dtype) -> tuple[int, bool, str]:
    """Order in the file: wide formats first, and odd sizes last, so that nearly every tensor begins aligned."""
    return -stored.itemsize, tensor.numel() * stored.itemsize % _ALIGNMENT != 0, name


def _bytes(name: str, tensor: Tensor, dtype: torch.dtype | None) -> memoryview:
    import torch  # reading headers needs no torch, and is much of what this module is for

    stored = tensor.detach().to(device="cpu", dtype=dtype or tensor.dtype)
    if stored.dtype != tensor.dtype and not torch.isfinite(stored).all():
        largest = tensor.detach().abs().max().item()
        raise CheckpointError(
            f"{name} has values up to {largest:g}, too large for {str(stored.dtype).removeprefix('torch.')}; "
            "use bfloat16 or float32."
        )
    values: Any = stored.contiguous().reshape(-1).view(torch.uint8).numpy()
    return memoryview(values)
