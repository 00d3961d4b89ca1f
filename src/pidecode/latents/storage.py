# SPDX-License-Identifier: Apache-2.0
"""Latent files: .safetensors with metadata that says what the tensor means, and the files of other programs."""

from __future__ import annotations

import io
import json
import os
from collections.abc import Collection
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pidecode.errors import FileError, LatentError
from pidecode.registry.spaces import SPACES
from pidecode.strict_json import JSONError, parse_json
from pidecode.weights.read import load_pickle, only_tensors
from pidecode.weights.safetensors import (
    Header,
    looks_like_safetensors,
    read_header,
    read_safetensors,
    write_safetensors,
)

FORMAT = 1
METADATA_KEY = "pidecode_latent"
TENSOR_NAME = "latent"
IN_MEMORY = "The latent file"  # what error messages call a file that was given as bytes

MAX_HEADER_BYTES = 1 << 20  # largest header read: far more than one tensor and its prompts need

MAX_LATENTS = 1 << 16  # most latents in one file

COMFYUI_NAMES = ("latent_tensor", "samples")  # what ComfyUI's `.latent` files and its LATENT call the tensor
_NAMES = (TENSOR_NAME, "latents", *COMFYUI_NAMES)  # of the latent among the tensors of a file, in order of preference
_OLD_COMFYUI_SCALE = 1 / 0.18215  # of .latent files without a version
_DTYPES = ("F64", "F32", "BF16", "F16", "F8_E4M3", "F8_E5M2")


@dataclass(frozen=True, slots=True, kw_only=True)
class LatentMetadata:
    """Metadata of a latent file."""

    space: str
    sigma: tuple[float, ...]  # of each sample
    prompt: tuple[str, ...] | None  # of each sample
    seed: int | None


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredLatent:
    """A tensor read from a file."""

    tensor: Tensor
    metadata: LatentMetadata | None  # None in a file of another program
    comfyui: bool = False  # whether it is scaled as ComfyUI has it: raw, but for FLUX.2


def write_latent(
    path: str | os.PathLike[str], tensor: Tensor, metadata: LatentMetadata, *, overwrite: bool = False
) -> None:
    """Write a normalized latent `[B, C, h, w]` and its metadata as .safetensors, completely or not at all.

    Raises:
        FileError: The file exists or cannot be written.
        LatentError: The prompts are too long for a file header.
    """
    # "frame" is the key of file format 1 for the normalization.
    text = json.dumps({"format": FORMAT, "frame": "normalized", **asdict(metadata)})
    if len(text) > MAX_HEADER_BYTES // 2:
        raise LatentError(f"The prompts take {len(text)} characters; a latent file holds {MAX_HEADER_BYTES // 2}.")
    write_safetensors(Path(path), {TENSOR_NAME: tensor}, {METADATA_KEY: text}, overwrite=overwrite)


def read_latent(source: str | os.PathLike[str] | bytes) -> StoredLatent:
    """Read a latent file, by path or content. The header is checked before the tensor is allocated.

    Read are .safetensors, ComfyUI's `.latent`, a tensor saved by `torch.save` (tensors only, never code), `.npy`
    and `.npz`.

    Raises:
        FileError: The file is damaged, or none of these.
        LatentError: The file holds no latent, or its metadata is wrong.
    """
    path = IN_MEMORY if isinstance(source, bytes) else source
    other = _read_array(source, path)
    if other is not None:
        return StoredLatent(tensor=_fp8_as_float32(other), metadata=None)
    header = read_latent_header(source)
    text = header.metadata.get(METADATA_KEY)
    metadata = None if text is None else _parse_metadata(text, path)
    name = _tensor_name(header.tensors, path, ours=metadata is not None)
    dtype = header.tensors[name].dtype
    if dtype not in _DTYPES:
        raise LatentError(f"The tensor of {path} is {dtype}; a latent is one of {', '.join(_DTYPES)}.")
    tensor = _fp8_as_float32(read_safetensors(source, [name], name=path, max_header_bytes=MAX_HEADER_BYTES)[1][name])
    if metadata is not None and (tensor.ndim != 4 or len(metadata.sigma) != tensor.shape[0]):
        raise LatentError(f"{path} contradicts itself: {len(metadata.sigma)} sigmas for a tensor {list(tensor.shape)}.")
    comfyui = metadata is None and name in COMFYUI_NAMES
    if name == "latent_tensor" and "latent_format_version_0" not in header.tensors:
        tensor = tensor * _OLD_COMFYUI_SCALE
    return StoredLatent(tensor=tensor, metadata=metadata, comfyui=comfyui)


def _fp8_as_float32(tensor: Tensor) -> Tensor:
    """Eight-bit floats as float32, in which all of their values are exact."""
    return tensor.float() if tensor.is_floating_point() and tensor.element_size() == 1 else tensor


def _read_array(source: str | os.PathLike[str] | bytes, path: object) -> Tensor | None:
    """The one tensor of a `.npy` or `.npz` file or one written by `torch.save`; None for other files."""
    if isinstance(source, bytes):
        data = source
    else:
        try:
            if not os.path.isfile(source):  # a pipe would block forever
                return None
            with open(source, "rb") as file:
                data = file.read(8)
                if not data.startswith((b"PK\x03\x04", b"\x80", b"\x93NUMPY")) or looks_like_safetensors(data):
                    return None
                data += file.read()
        except (OSError, ValueError):
            return None  # told by the reader of .safetensors
    if data.startswith(b"\x93NUMPY") or (data.startswith(b"PK\x03\x04") and b".npy" in data[:64]):
        try:
            found = np.load(io.BytesIO(data), allow_pickle=False)
            array = found if isinstance(found, np.ndarray) else found[_tensor_name(found.files, path)]
            return torch.from_numpy(array.astype(array.dtype.newbyteorder("="), order="C"))
        except LatentError:
            raise
        except Exception as error:  # also RuntimeError (encrypted), NotImplementedError, LZMAError, MemoryError
            raise FileError(f"{path} is a damaged NumPy file, or not of numbers: {error}.") from error
    if not data.startswith((b"PK\x03\x04", b"\x80")) or looks_like_safetensors(data[:16]):
        return None
    loaded = load_pickle(data, path)
    if isinstance(loaded, dict):
        loaded = {name: value for name, value in loaded.items() if isinstance(value, Tensor)}
        loaded = loaded[_tensor_name(loaded, path)]
    if not isinstance(loaded, Tensor):
        raise LatentError(f"{path} holds {type(loaded).__name__}, not one tensor; save the latent alone by torch.save.")
    return only_tensors(path, {TENSOR_NAME: loaded})[TENSOR_NAME]


def read_latent_header(source: str | os.PathLike[str] | bytes) -> Header:
    """The header of a latent file (path or bytes), at most 1 MiB. Raises FileError as `read_latent` does."""
    name = IN_MEMORY if isinstance(source, bytes) else source
    return read_header(source, name=name, max_header_bytes=MAX_HEADER_BYTES)


def count_latents(path: str | os.PathLike[str]) -> int:
    """Number of latents in a file by its header alone; 1 where the header does not show it, so that loading reports it.

    Raises:
        FileError: The file is not a valid .safetensors file.
        LatentError: It claims to hold more than 65,536 latents.
    """
    other = _read_array(path, path)
    if other is not None:
        return len(other) if other.ndim in (4, 5) and len(other) else 1
    header, shape = read_latent_header(path), tuple[int, ...]()
    with suppress(LatentError):
        entry = header.tensors[_tensor_name(header.tensors, path, ours=METADATA_KEY in header.metadata)]
        shape = entry.shape if entry.dtype in _DTYPES else ()
    count = shape[0] if len(shape) in (4, 5) and 0 not in shape else 1
    if count > MAX_LATENTS:
        raise LatentError(f"{path} says it holds {count:,} latents; at most {MAX_LATENTS:,} are read from one file.")
    return count


def _tensor_name(names: Collection[str], path: object, *, ours: bool = False) -> str:
    """Which of a file's tensors is the latent; in a file that `write_latent` wrote there is but one name for it."""
    chosen = next((name for name in _NAMES[: 1 if ours else None] if name in names), None)
    if chosen is None and (ours or len(names) != 1):
        raise LatentError(
            f"{path} must hold one tensor, or one named {TENSOR_NAME!r}; it holds {len(names)}: "
            f"{', '.join(str(name)[:40] for name in list(names)[:5]) or 'none'}."
        )
    return chosen or next(iter(names))


def _parse_metadata(text: str, path: object) -> LatentMetadata:
    try:
        values: Any = parse_json(text)
    except JSONError as error:
        raise LatentError(f"The latent metadata of {path} cannot be read: {error}. The file is damaged.") from None
    if not isinstance(values, dict) or values.get("format") != FORMAT:
        given = values.get("format") if isinstance(values, dict) else values
        raise LatentError(f"{path} is of latent format {given!r}; this version reads {FORMAT}. Update pidecode.")
    sigma, prompt, seed = values.get("sigma", ()), values.get("prompt"), values.get("seed")
    are_levels = isinstance(sigma, list) and all(type(s) in (int, float) and 0 <= s <= 1 for s in sigma)
    are_texts = isinstance(prompt, list) and all(isinstance(text, str) for text in prompt)
    for name, fits, expected in (
        ("space", isinstance(values.get("space"), str) and values["space"] in SPACES, f"one of {', '.join(SPACES)}"),
        ("frame", values.get("frame") == "normalized", "'normalized'"),
        ("sigma", are_levels, "a list of numbers in [0, 1], one per sample"),
        ("prompt", prompt is None or (are_levels and are_texts and len(prompt) == len(sigma)), "a text per sample"),
        ("seed", seed is None or type(seed) is int, "a whole number"),
    ):
        if not fits:
            raise LatentError(f"{path} says {name} {values.get(name)!r}; it must be {expected}.")
    prompts = None if prompt is None else tuple(prompt)
    return LatentMetadata(space=values["space"], sigma=tuple(map(float, sigma)), prompt=prompts, seed=seed)
