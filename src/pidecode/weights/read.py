# SPDX-License-Identifier: Apache-2.0
"""Weights file -> named tensors: .safetensors or official .pth, never code; prefixes removed, values checked."""

from __future__ import annotations

import zipfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from pidecode.errors import CheckpointError
from pidecode.weights.pickle_scan import scan_pickle
from pidecode.weights.safetensors import check_file, looks_like_safetensors, read_safetensors, read_start

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
"""Number formats a network's weights may be stored in."""

_WRAPPERS = ("net_ema.", "net.", "model.diffusion_model.", "module.", "_orig_mod.", "core.")
"""Prefixes a network's names may carry, in order of preference where several are present."""

_STRANGERS = (
    "net.", "net_ema.", "fake_score.", "discriminator.", "net_fake_score.", "net_discriminator.",
    "first_stage_model.", "text_encoders.", "cond_stage_model.", "vae.", "pos_embed", "_repa_projector.",
)  # fmt: skip
"""What may stand beside the network in a file and is no part of it, PixelDiT's unused table included."""

_QUANTizED_NAMES = (
    ".comfy_quant", ".weight_scale", ".scale_weight", "scaled_fp8", ".input_scale", ".weight._data",
    ".weight._scale", ".quant_map", ".absmax", ".weight_scale_2", ".qweight", ".qzeros",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class WeightFile:
    """The tensors of one file under the names the network gives them, and what the file says of itself.

    `tensors` may be views of the file's own pages: reading them costs no memory until they are used.
    """

    path: Path
    tensors: dict[str, Tensor]
    metadata: Mapping[str, str] = field(default_factory=dict)
    format: Literal["safetensors", "pickle"] = "safetensors"

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shape of every tensor."""
        return {name: tuple(tensor.shape) for name, tensor in self.tensors.items()}


def read_weights(path: str | Path, *, check_values: bool = True) -> WeightFile:
    """Tensors of a network file, named as the network names them (docs/architecture.md, Released files).

    Understands .safetensors and torch's .pth (tensors only, whatever the file's suffix), the official
    prefixes (`net_ema.` before `net.`), PixelDiT's `core.` and the ComfyUI repackaging. `check_values=False`
    skips the search for NaN and infinity, which reads the whole file.

    Raises CheckpointError for anything else, naming what was found and the fix.
    """
    raw = read_tensors(path)
    tensors = strip_prefixes(raw.tensors, path)
    check_formats(tensors, path)
    if check_values:
        check_finite(tensors, path)
    return WeightFile(raw.path, tensors, raw.metadata, raw.format)


def read_tensors(path: str | Path) -> WeightFile:
    """Every tensor of a file under the name it has there; content, not suffix, decides the format.

    Raises CheckpointError when the file is neither .safetensors nor a pickle of tensors, or is damaged.
    """
    path = Path(path)
    check_file(path)
    start = read_start(path)
    _refuse_known_strangers(path, start)
    if looks_like_safetensors(start) or (path.suffix == ".safetensors" and not start.startswith(b"PK\x03\x04")):
        header, tensors = read_safetensors(path)
        if small := sorted(
            {entry.dtype for entry in header.tensors.values() if entry.dtype.startswith(("F8", "F6", "F4"))}
        ):
            raise _quantized(path, small)
        if not tensors:
            raise CheckpointError(f"{path} holds no tensors; weights were expected.")
        return WeightFile(path, tensors, header.metadata, "safetensors")
    return WeightFile(path, _read_pickle(path), {}, "pickle")


def _refuse_known_strangers(path: Path, start: bytes) -> None:
    if start.startswith(b"GGUF"):
        raise CheckpointError(
            f"{path} is a GGUF file (quantized); take the bfloat16 .safetensors or the official .pth."
        )
    if start.startswith(b"version https://git-lfs"):
        raise CheckpointError(
            f"{path} is only a Git LFS pointer; get the file itself with `git lfs pull` or `hf download`."
        )
    if start.lstrip()[:15].lower().startswith((b"<!doctype html", b"<html")):
        raise CheckpointError(f"{path} is a web page, not weights; download the file itself, as with `hf download`.")


def _read_pickle(path: Path) -> dict[str, Tensor]:
    zipped = zipfile.is_zipfile(path)
    if zipped:
        _check_archive(path)
    scan_pickle(path, zipped=zipped)
    try:
        if zipped and path.suffix != ".safetensors":
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        else:  # torch goes by the name where it is given one; a handle makes it look at the content
            with open(path, "rb") as file:
                content = torch.load(file, map_location="cpu", weights_only=True)
    except MemoryError:
        raise CheckpointError(f"{path} asks for more memory than there is; do not trust this file.") from None
    except Exception as fault:  # torch raises whatever a damaged stream leads it into
        first_line = (str(fault).splitlines() or [""])[0]
        raise CheckpointError(
            f"{path} is no readable weights file (truncated, or not written by torch.save or safetensors): "
            f"{type(fault).__name__}: {first_line[:200]}. Fetch it again."
        ) from None
    return _only_tensors(path, content)


def _check_archive(path: Path) -> None:
    """torch.save stores entries uncompressed; anything else is a trap or another kind of archive."""
    try:
        with zipfile.ZipFile(path) as archive:
            entries = archive.infolist()
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError) as fault:
        raise CheckpointError(f"{path} is a damaged archive ({fault}); fetch it again.") from None
    names = [entry.filename for entry in entries]
    if len(set(names)) != len(names) or sum(name.endswith("data.pkl") for name in names) > 1:
        raise CheckpointError(f"{path} holds two files of one name; do not trust this file.")
    if not any(name.endswith("data.pkl") for name in names):
        raise CheckpointError(f"{path} is a zip archive without weights in it; unpack it, or name the weights file.")
    if any(entry.compress_type != zipfile.ZIP_STORED for entry in entries):
        raise CheckpointError(f"{path} is compressed, which torch.save never does; do not trust this file.")
    if sum(entry.file_size for entry in entries) > path.stat().st_size:
        raise CheckpointError(f"{path} claims to hold more bytes than it has; do not trust this file.")


def _only_tensors(path: Path, content: Any) -> dict[str, Tensor]:
    for _ in range(3):
        if not isinstance(content, Mapping):
            break
        inner = next(
            (content[name] for name in ("state_dict", "model") if isinstance(content.get(name), Mapping)), None
        )
        if inner is None:
            break
        content = inner
    if not isinstance(content, Mapping):
        raise CheckpointError(f"{path} holds one {type(content).__name__}; a table of named tensors was expected.")
    tensors = {str(name): value for name, value in content.items() if isinstance(value, Tensor)}
    if not tensors:
        names = ", ".join(str(name) for name in list(content)[:5]) or "nothing"
        raise CheckpointError(f"{path} holds no tensors (it holds {names}); name the file with the network's weights.")
    for name, tensor in tensors.items():
        dense = tensor.layout == torch.strided and not tensor.is_quantized and tensor.device.type == "cpu"
        if not dense:
            raise CheckpointError(f"{path}: {name} is sparse, quantized or without data; dense tensors were expected.")
        if tensor.numel() * tensor.element_size() > tensor.untyped_storage().nbytes():
            raise CheckpointError(
                f"{path}: {name} claims {tensor.numel():,} values and stores fewer; do not trust this file."
            )
    if sum(tensor.nbytes for tensor in tensors.values()) > 4 * path.stat().st_size:  # a few may share values
        raise CheckpointError(f"{path} shows the same values under many names; do not trust this file.")
    return {name: tensor.detach() for name, tensor in tensors.items()}


def strip_prefixes(tensors: Mapping[str, Tensor], source: str | Path = "the file") -> dict[str, Tensor]:
    """Names as the network has them; other networks in the same file and `_extra_state` entries are left out.

    A tensor that belongs to nothing known keeps its name, so that loading can report it.
    Raises CheckpointError when two tensors end under one name.
    """
    kept = {name: tensor for name, tensor in tensors.items() if not name.endswith("_extra_state")}
    for _ in range(4):
        wrapper = next((prefix for prefix in _WRAPPERS if any(name.startswith(prefix) for name in kept)), None)
        if wrapper is None:
            break
        stripped: dict[str, Tensor] = {}
        for name, tensor in kept.items():
            inside = name.startswith(wrapper)
            if not inside and name.startswith(_STRANGERS):
                continue
            short = name.removeprefix(wrapper) if inside else name
            if short in stripped:
                raise CheckpointError(f"{source} holds {short} twice, with and without the prefix {wrapper!r}.")
            stripped[short] = tensor
        kept = stripped
    return {name: tensor for name, tensor in kept.items() if not name.startswith(_STRANGERS)}


def check_formats(tensors: Mapping[str, Tensor], source: str | Path = "the file") -> None:
    """Raises CheckpointError unless every tensor is an ordinary floating-point one."""
    marks = sorted({mark for name in tensors for mark in _QUANTizED_NAMES if name.endswith(mark)})
    small = sorted({_plain(t.dtype) for t in tensors.values() if t.dtype not in FLOATS and t.dtype.is_floating_point})
    if marks or small:
        raise _quantized(source, small + marks)
    wrong = [name for name, tensor in tensors.items() if tensor.dtype not in FLOATS]
    if wrong:
        raise CheckpointError(
            f"{source} stores {wrong[0]} as {_plain(tensors[wrong[0]].dtype)}{_and_more(wrong)}; "
            "weights must be float32, bfloat16 or float16. Take the bfloat16 file of the same model."
        )


def check_finite(tensors: Mapping[str, Tensor], source: str | Path = "the file") -> None:
    """Raises CheckpointError naming the first tensor with NaN or infinite values."""
    bad = []
    for name, tensor in tensors.items():
        if tensor.numel():
            low, high = torch.aminmax(tensor)
            if not (torch.isfinite(low) and torch.isfinite(high)):
                bad.append(name)
    if bad:
        raise CheckpointError(
            f"{source} has NaN or infinite values in {bad[0]}{_and_more(bad)} (of {len(tensors)} tensors); "
            "the file is damaged or its training diverged: fetch it again."
        )


def _quantized(source: str | Path, marks: list[str]) -> CheckpointError:
    return CheckpointError(
        f"{source} is quantized by another program ({', '.join(marks)}); such files are not read here. "
        "Take the bfloat16 file of the same model."
    )


def _plain(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _and_more(names: list[str]) -> str:
    return f" and {len(names) - 1} more" if len(names) > 1 else ""
