# SPDX-License-Identifier: Apache-2.0
"""The .safetensors format: header, and writing whole files."""

from __future__ import annotations

import errno
import hashlib
import json
import math
import os
import stat
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeGuard

from pidecode.errors import CheckpointError
from pidecode.files import atomic_write
from pidecode.strict_json import JSONError, parse_json

if TYPE_CHECKING:
    import torch
    from torch import Tensor

BITS: Mapping[str, int] = {
    "BOOL": 8, "U8": 8, "I8": 8, "U16": 16, "I16": 16, "U32": 32, "I32": 32, "U64": 64, "I64": 64,
    "F16": 16, "BF16": 16, "F32": 32, "F64": 64, "C64": 64,
    "F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8, "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8,
    "F4": 4, "F6_E2M3": 6, "F6_E3M2": 6,
}  # fmt: skip
"""Bits per value of every dtype of the format."""

MAX_HEADER_BYTES = 4 << 20  # longest header read, some 30,000 tensors; the format's own limit takes gigabytes to parse
_FORMAT_HEADER_BYTES = 100_000_000  # the format's own limit: beyond it, a file is something else
_MAX_DIMENSIONS = 8


@dataclass(frozen=True, slots=True)
class TensorEntry:
    """A tensor as the header describes it; `begin` and `end` are byte offsets after the header."""

    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int


@dataclass(frozen=True, slots=True)
class Header:
    """A checked .safetensors header: tensors by name, and the text metadata of the file."""

    tensors: Mapping[str, TensorEntry]
    metadata: Mapping[str, str]

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shape of every tensor."""
        return {name: entry.shape for name, entry in self.tensors.items()}


def check_file(path: str | os.PathLike[str]) -> int:
    """Size of a regular, non-empty, readable file or a link to one. Raises CheckpointError for anything else."""
    path = Path(path)
    try:
        status = os.stat(path)
    except ValueError as error:  # a null byte in the name
        raise CheckpointError(f"{str(path)!r} cannot be opened: {error}.") from None
    except OSError as error:
        reasons = {
            errno.ELOOP: "is a symbolic link that leads back to itself; point it at the file",
            errno.EACCES: "may not be read; change its permissions",
            errno.ENOTDIR: "lies below a file, not a folder; check the path",
            errno.ENAMETOOLONG: "is too long a name for a file",
        }
        missing = "is a symbolic link to nothing" if os.path.islink(path) else "does not exist; check the path"
        raise CheckpointError(f"{path} {reasons.get(error.errno or 0, missing)}.") from None
    if stat.S_ISDIR(status.st_mode):
        raise CheckpointError(f"{path} is a folder; give the file in it (.safetensors or .pth).")
    if not stat.S_ISREG(status.st_mode):
        raise CheckpointError(f"{path} is a device or pipe; weights are read from regular files only.")
    if status.st_size == 0:
        raise CheckpointError(f"{path} is empty (0 bytes); the download or copy failed. Fetch it again.")
    if not os.access(path, os.R_OK):
        raise CheckpointError(f"{path} may not be read; change its permissions.")
    return status.st_size


def read_start(path: str | os.PathLike[str], count: int = 512) -> bytes:
    """The first bytes of a file, at most `count`. Raises CheckpointError if it cannot be read."""
    try:
        with open(path, "rb") as file:
            return file.read(count)
    except OSError as error:
        raise CheckpointError(f"{path} could not be read: {error.strerror or error}.") from error


def looks_like_safetensors(start: bytes) -> bool:
    """Whether the first bytes of a file are a plausible header length and the beginning of a JSON object."""
    return len(start) >= 9 and start[8:9] == b"{" and int.from_bytes(start[:8], "little") <= _FORMAT_HEADER_BYTES


_PAGE = "a web page, not tensors; download the file itself, as with `hf download`"
_KNOWN_STARTS = (
    ((b"gguf",), "a GGUF file (quantized); take the bfloat16 .safetensors or the official .pth"),
    ((b"version https://git-lfs",), "only a Git LFS pointer; get the file by `git lfs pull` or `hf download`"),
    ((b"<!doctype html", b"<html"), _PAGE),
    ((b"\x89png", b"\xff\xd8\xff", b"gif8", b"riff"), "an image, not tensors; name the file with the tensors"),
    ((b"\x1f\x8b", b"7z\xbc\xaf", b"rar!", b"\xfd7zxz", b"\x28\xb5\x2f\xfd", b"bzh"),
     "an archive; unpack it, and name the file in it"),
    ((b"\x93numpy",), "a NumPy array; weights are read from .safetensors and .pth, latents from .npy too"),
    ((b"\x89hdf",), "an HDF5 file; take the .safetensors or the official .pth"),
)  # fmt: skip


def foreign_kind(start: bytes) -> str | None:
    """What a file is that holds no tensors, by its first bytes (512 or the whole), and the fix; None if unknown."""
    for marks, what in _KNOWN_STARTS:
        if start.lstrip()[:30].lower().startswith(marks):
            return what
    text = start.decode("utf-16" if start.startswith((b"\xff\xfe", b"\xfe\xff")) else "latin-1", "replace")
    controls = any(char < " " and char not in "\t\n\f\r" for char in text)
    return None if controls or len(start) < 2 else "a text, not tensors; name the file with the tensors"


def read_header(
    source: str | os.PathLike[str] | bytes, *, name: object = None, max_header_bytes: int = MAX_HEADER_BYTES
) -> Header:
    """Read the header of a .safetensors file, given by path or bytes, and check it against the size of the file.

    Args:
        source: Path of the file, or its bytes.
        name: What error messages call the file; default its path.
        max_header_bytes: Largest header accepted.

    Raises:
        CheckpointError: The file is truncated; lengths, offsets or shapes contradict each other or the file's size;
            or the header is not valid JSON.
    """
    if isinstance(source, bytes):
        size, start, name = len(source), source[:8], name or "The file"
    else:
        size, start, name = check_file(source), read_start(source, 8), name or source
    length = int.from_bytes(start, "little")
    if len(start) < 8 or length < 2 or (length > size and length > _FORMAT_HEADER_BYTES):
        if what := foreign_kind(source[:512] if isinstance(source, bytes) else read_start(source)):
            raise CheckpointError(f"{name} is {what}.")
        raise CheckpointError(f"{name} is not a .safetensors file, or is cut off: it has no valid header length.")
    if 8 + length > size:
        raise CheckpointError(
            f"{name} is cut off: its header takes {length:,} bytes, and the whole file has {size:,}. Fetch it again."
        )
    if length > max_header_bytes:
        raise CheckpointError(f"The header of {name} has {length:,} bytes; at most {max_header_bytes:,} are read.")
    text = source[8 : 8 + length] if isinstance(source, bytes) else read_start(source, 8 + length)[8:]
    try:
        fields = parse_json(text)
    except JSONError as error:
        raise CheckpointError(f"{name} has no readable .safetensors header: {error}. Fetch it again.") from None
    if not isinstance(fields, dict):
        raise CheckpointError(f"{name} is not a .safetensors file: its header is not a JSON object.")
    metadata = fields.pop("__metadata__", None) or {}
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise CheckpointError(f"The metadata of {name} is not a table of strings; safetensors did not write this file.")
    tensors = {tensor: _parse_entry(name, tensor, entry) for tensor, entry in fields.items()}
    _check_extent(name, tensors, size - 8 - length)
    return Header(tensors, metadata)


def read_safetensors(
    source: str | os.PathLike[str] | bytes,
    names: Iterable[str] | None = None,
    *,
    name: object = None,
    max_header_bytes: int = MAX_HEADER_BYTES,
) -> tuple[Header, dict[str, Tensor]]:
    """Tensors of a .safetensors file, all or those named, as views of it; the rest is as in `read_header`."""
    import safetensors.torch  # not at the top: reading headers needs neither it nor torch

    header = read_header(source, name=name, max_header_bytes=max_header_bytes)
    wanted = list(header.tensors if names is None else names)
    failures = (safetensors.SafetensorError, OSError, RuntimeError, ValueError, TypeError, AttributeError, KeyError)
    try:
        # The library opens no paths that are not UTF-8.
        if not isinstance(source, bytes) and os.fspath(source).encode(errors="replace") != os.fsencode(source):
            source = Path(source).read_bytes()
        if isinstance(source, bytes):
            loaded: dict[str, Tensor] = safetensors.torch.load(source)
            return header, {tensor: loaded[tensor] for tensor in wanted}
        with safetensors.safe_open(os.fspath(source), framework="pt", device="cpu") as file:
            return header, {tensor: file.get_tensor(tensor) for tensor in wanted}
    except failures as error:
        called = name or ("The file" if isinstance(source, bytes) else source)
        raise CheckpointError(f"{called} could not be read as .safetensors: {error}.") from error


def _parse_entry(path: object, name: str, entry: Any) -> TensorEntry:
    name = name[:80]
    if not isinstance(entry, dict):
        raise CheckpointError(f"{path} describes tensor {name!r} by {type(entry).__name__}, not by a JSON object.")
    dtype, shape, offsets = (entry.get(key) for key in ("dtype", "shape", "data_offsets"))
    if not isinstance(dtype, str) or dtype not in BITS:
        raise CheckpointError(f"{path} stores tensor {name!r} as {dtype!r}; known formats are {', '.join(BITS)}.")
    if not _whole_numbers(shape) or not _whole_numbers(offsets) or len(shape) > _MAX_DIMENSIONS or len(offsets) != 2:
        raise CheckpointError(
            f"{path} gives tensor {name!r} a shape or offsets that are not whole numbers, or more than "
            f"{_MAX_DIMENSIONS} dimensions; do not trust this file."
        )
    begin, end = offsets
    needed = math.prod(shape) * BITS[dtype]
    if needed % 8 or end - begin != needed // 8:
        raise CheckpointError(
            f"{path} contradicts itself: {name!r} of shape {list(shape)} in {dtype} takes {needed // 8:,} bytes, "
            f"but its offsets span {end - begin:,}. Do not trust this file."
        )
    return TensorEntry(dtype, tuple(shape), begin, end)


def _whole_numbers(value: Any) -> TypeGuard[list[int]]:
    return isinstance(value, list) and all(type(item) is int and item >= 0 for item in value)


def _check_extent(path: object, tensors: Mapping[str, TensorEntry], available: int) -> None:
    end = 0
    for name, entry in sorted(tensors.items(), key=lambda item: (item[1].begin, item[1].end)):
        if entry.begin != end:
            what = "overlaps the one before it" if entry.begin < end else "leaves a gap before it"
            raise CheckpointError(f"{path} contradicts itself: tensor {name[:80]!r} {what}.")
        end = entry.end
    if end > available:
        raise CheckpointError(
            f"{path} is truncated: its tensors take {end:,} bytes, and the file holds {available:,}. Fetch it again."
        )
    if end < available:
        raise CheckpointError(
            f"{path} holds {available - end:,} bytes that belong to no tensor; do not trust this file."
        )


def sha256(path: str | Path) -> str:
    """SHA-256 of a file, in hexadecimal. Raises CheckpointError if the file cannot be read."""
    check_file(path)
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


_NAMES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16", "float64": "F64"}

_ALIGNMENT = 64  # bytes tensors are aligned to, as torch aligns its own memory, so that mapped files compute as fast


def write_safetensors(
    path: str | Path,
    tensors: Mapping[str, Tensor],
    metadata: Mapping[str, str],
    *,
    dtype: torch.dtype | None = None,
    overwrite: bool = False,
) -> None:
    """Write floating-point tensors to a .safetensors file, of a `dtype` or each of its own.

    At most one converted tensor is in memory at a time, and on an error nothing is left behind.

    Raises:
        FileError: The file exists or cannot be written.
        CheckpointError: A tensor's values overflow `dtype`.
    """
    stored = {name: dtype or tensor.dtype for name, tensor in tensors.items()}
    sizes = {name: tensor.numel() * stored[name].itemsize for name, tensor in tensors.items()}
    # Wide dtypes first, unaligned sizes last, so that nearly every tensor begins aligned.
    order = sorted(tensors, key=lambda name: (-stored[name].itemsize, sizes[name] % _ALIGNMENT != 0, name))
    header: dict[str, Any] = {"__metadata__": dict(metadata)}
    end = 0
    for name in order:
        begin, end = end, end + sizes[name]
        kind, shape = _NAMES[str(stored[name]).removeprefix("torch.")], list(tensors[name].shape)
        header[name] = {"dtype": kind, "shape": shape, "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    text += b" " * (-(8 + len(text)) % _ALIGNMENT)
    with atomic_write(path, overwrite=overwrite) as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name in order:
            file.write(_bytes(name, tensors[name], stored[name]))


def _bytes(name: str, tensor: Tensor, dtype: torch.dtype) -> memoryview:
    import torch  # not at the top: reading headers does not need it

    stored = tensor.detach().to(device="cpu", dtype=dtype)
    if dtype != tensor.dtype and not torch.isfinite(stored).all():
        raise CheckpointError(
            f"{name} has values up to {tensor.detach().abs().max().item():g}, too large for "
            f"{str(dtype).removeprefix('torch.')}; use bfloat16 or float32."
        )
    values: Any = stored.contiguous().reshape(-1).view(torch.uint8).numpy()
    return memoryview(values)
