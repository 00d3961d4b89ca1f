# SPDX-License-Identifier: Apache-2.0
"""Latents on disk: .safetensors with a record of what the tensor means, read strictly and written whole."""

from __future__ import annotations

import io
import json
import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import safetensors
import safetensors.torch
from torch import Tensor

from pidecode.errors import FileError, LatentError
from pidecode.files import atomic_write
from pidecode.registry.spaces import SPACES

FORMAT = 1
METADATA_KEY = "pidecode_latent"
TENSOR_NAME = "latent"
IN_MEMORY = "The latent file"
"""What messages call a file that came as bytes."""
# Far above any honest header of one tensor and its prompts.
MAX_HEADER_BYTES = 1 << 20

_ITEM_BYTES = {"F64": 8, "F32": 4, "BF16": 2, "F16": 2}


@dataclass(frozen=True, slots=True, kw_only=True)
class LatentRecord:
    """What a latent file says beside its tensor: space, sigma per sample, prompts or None, seed or None."""

    space: str
    sigma: tuple[float, ...]
    prompt: tuple[str, ...] | None
    seed: int | None


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredLatent:
    """A tensor read from a file, and its record (None in a file that is not ours)."""

    tensor: Tensor
    record: LatentRecord | None


def write_latent(
    path: str | os.PathLike[str], tensor: Tensor, record: LatentRecord, *, overwrite: bool = False
) -> None:
    """Write tensor `[B, C, h, w]` and record, whole or not at all. Raises FileError."""
    note = {
        "format": FORMAT,
        "space": record.space,
        "frame": "normalized",
        "sigma": list(record.sigma),
        "prompt": None if record.prompt is None else list(record.prompt),
        "seed": record.seed,
    }
    text = json.dumps(note)
    if len(text) > MAX_HEADER_BYTES // 2:
        raise LatentError(f"The prompts take {len(text)} characters; a latent file holds {MAX_HEADER_BYTES // 2}.")
    data = safetensors.torch.save({TENSOR_NAME: tensor.detach().cpu().contiguous()}, {METADATA_KEY: text})
    with atomic_write(path, overwrite=overwrite) as file:
        file.write(data)


def read_latent(source: str | os.PathLike[str] | bytes) -> StoredLatent:
    """Read a latent file, by its path or from its bytes. The header is checked before anything is allocated.

    Raises FileError for what is no sound .safetensors file, LatentError for one that holds no usable latent.
    """
    path = IN_MEMORY if isinstance(source, bytes) else source
    header = read_header(source)
    note = header.pop("__metadata__", {}).get(METADATA_KEY)
    record = None if note is None else _parse_record(note, path)
    name = _tensor_name(header, path, ours=record is not None)
    kind = header[name]["dtype"]
    if kind not in _ITEM_BYTES:
        raise LatentError(f"The tensor of {path} is {kind}; a latent is one of {', '.join(_ITEM_BYTES)}.")
    try:
        if isinstance(source, bytes):
            tensor: Tensor = safetensors.torch.load(source)[name]
        else:
            with safetensors.safe_open(os.fspath(source), framework="pt") as file:
                tensor = file.get_tensor(name)
    except (safetensors.SafetensorError, OSError, RuntimeError, ValueError, KeyError, TypeError) as error:
        raise FileError(f"{path} could not be read as .safetensors: {error}.") from error
    if record is not None and (tensor.ndim != 4 or len(record.sigma) != tensor.shape[0]):
        raise LatentError(f"{path} contradicts itself: {len(record.sigma)} sigmas for a tensor {list(tensor.shape)}.")
    return StoredLatent(tensor=tensor, record=record)


def read_header(path: str | os.PathLike[str] | bytes) -> dict[str, Any]:
    """The header of a .safetensors file (path or bytes), at most 1 MiB of it; every tensor lies inside the file.

    Raises FileError otherwise.
    """
    if isinstance(path, bytes):
        return _checked_header(io.BytesIO(path), len(path), IN_MEMORY)
    try:
        if not Path(path).is_file():  # a pipe would block for ever
            raise FileError(f"{path} is not a file; give a .safetensors file.")
        with open(path, "rb") as file:
            return _checked_header(file, os.fstat(file.fileno()).st_size, path)
    except (OSError, ValueError) as error:
        raise FileError(f"{path} could not be read: {error}.") from error


def _checked_header(file: BinaryIO, size: int, path: object) -> dict[str, Any]:
    length = int.from_bytes(file.read(8), "little")
    if size < 10 or length > size - 8:
        raise FileError(f"{path} is no .safetensors file, or is cut off: {size} bytes, of which a header of {length}.")
    if length > MAX_HEADER_BYTES:
        raise FileError(
            f"The header of {path} is {length} bytes long; that of a latent has at most {MAX_HEADER_BYTES}."
        )
    try:
        header = json.loads(file.read(length).decode("utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
        raise FileError(f"The header of {path} is not JSON: it is no .safetensors file, or is damaged.") from error
    if not isinstance(header, dict):
        raise FileError(f"The header of {path} is not a table of tensors.")
    metadata = header.get("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise FileError(f"The metadata of {path} is not a table of texts.")
    for name, entry in header.items():
        if name != "__metadata__":
            _check_entry(name, entry, size - 8 - length, path)
    return header


def _check_entry(name: str, entry: Any, data_bytes: int, path: object) -> None:
    problem = FileError(f"The header of {path} describes tensor {name[:80]!r} wrongly; the file is damaged.")
    if not isinstance(entry, dict) or not isinstance(entry.get("dtype"), str):
        raise problem
    shape: Any = entry.get("shape")
    span: Any = entry.get("data_offsets")
    for numbers in (shape, span):
        if not isinstance(numbers, list) or not all(type(number) is int and number >= 0 for number in numbers):
            raise problem
    if len(span) != 2 or not span[0] <= span[1] <= data_bytes:
        raise FileError(f"Tensor {name[:80]!r} of {path} lies outside the file; the file is cut off or damaged.")
    item = _ITEM_BYTES.get(entry["dtype"])
    if item is not None and math.prod(shape) * item != span[1] - span[0]:
        raise problem


def _tensor_name(header: dict[str, Any], path: object, *, ours: bool) -> str:
    if TENSOR_NAME in header:
        return TENSOR_NAME
    if "latent_tensor" in header:
        raise LatentError(
            f"{path} is a ComfyUI latent, which is stored raw: load its latent_tensor with safetensors and build it "
            "with Latent.from_raw()."
        )
    if ours or len(header) != 1:
        raise LatentError(
            f"{path} must hold one tensor, or one named {TENSOR_NAME!r}; it holds {len(header)}: "
            f"{', '.join(name[:40] for name in list(header)[:5]) or 'none'}."
        )
    return next(iter(header))


def _parse_record(text: str, path: object) -> LatentRecord:
    try:
        note = json.loads(text)
    except (json.JSONDecodeError, RecursionError) as error:
        raise LatentError(f"What {path} says about its latent is not JSON; the file is damaged.") from error
    if not isinstance(note, dict) or note.get("format") != FORMAT:
        given = note.get("format") if isinstance(note, dict) else note
        raise LatentError(f"{path} is of latent format {given!r}; this version reads {FORMAT}. Update pidecode.")
    space, frame, seed = note.get("space"), note.get("frame"), note.get("seed")
    if not isinstance(space, str) or space not in SPACES:
        raise LatentError(f"{path} is of space {space!r}; known are {', '.join(SPACES)}.")
    if frame != "normalized":
        raise LatentError(f"{path} says its frame is {frame!r}; a latent file holds the normalized one. Convert it.")
    sigma, prompt = note.get("sigma"), note.get("prompt")
    if not isinstance(sigma, list) or not all(type(s) in (int, float) and 0 <= s <= 1 for s in sigma):
        raise LatentError(f"{path} says sigma {sigma!r}; it must be a list of numbers in [0, 1], one per sample.")
    if prompt is not None and (
        not isinstance(prompt, list) or len(prompt) != len(sigma) or not all(isinstance(text, str) for text in prompt)
    ):
        raise LatentError(f"The prompts in {path} are not {len(sigma)} texts; the file is damaged.")
    if seed is not None and type(seed) is not int:
        raise LatentError(f"The seed in {path} is {seed!r}; it must be a whole number.")
    return LatentRecord(
        space=space,
        sigma=tuple(float(number) for number in sigma),
        prompt=None if prompt is None else tuple(prompt),
        seed=seed,
    )
