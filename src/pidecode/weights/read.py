# SPDX-License-Identifier: Apache-2.0
"""Weights file -> named tensors: .safetensors or official .pth, never code; prefixes removed, values checked."""

from __future__ import annotations

import io
import pickletools
import re
import warnings
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from pidecode.errors import CheckpointError
from pidecode.weights.safetensors import check_file, foreign_kind, looks_like_safetensors, read_safetensors, read_start

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)  # formats a network's weights may be stored in

# Prefixes a network's names may carry, in order of preference where several are present.
_WRAPPERS = ("net_ema.", "net.", "model.diffusion_model.", "module.", "_orig_mod.", "core.")

# What may stand beside the network in a file and is no part of it, PixelDiT's unused table included.
_STRANGERS = (
    "net.", "net_ema.", "fake_score.", "discriminator.", "net_fake_score.", "net_discriminator.",
    "first_stage_model.", "text_encoders.", "cond_stage_model.", "vae.", "pos_embed", "_repa_projector.",
)  # fmt: skip

# Names of tensors beside quantized weights.
_QUANTIZED_NAMES = (
    ".comfy_quant", ".weight_scale", ".scale_weight", "scaled_fp8", ".input_scale", ".weight._data",
    ".weight._scale", ".quant_map", ".absmax", ".weight_scale_2", ".qweight", ".qzeros",
)  # fmt: skip

MAX_PICKLE_BYTES = 16 << 20  # longest pickle read, tensors apart: some 60,000 tensors

# Pickles that torch before 1.6 wrote one after another: magic number, version, system, content, storage keys.
_LEGACY_PICKLES = 5

_ITEM_BYTES = {
    "Double": 8, "Float": 4, "Half": 2, "BFloat16": 2, "Long": 8, "Int": 4, "Short": 2, "Char": 1, "Byte": 1, "Bool": 1,
    "ComplexFloat": 8, "ComplexDouble": 16, "Untyped": 1,
}  # fmt: skip
_STORAGES = {f"torch {name}Storage": size for name, size in _ITEM_BYTES.items()} | {"torch.storage UntypedStorage": 1}
_TYPES = {
    "torch float64", "torch float32", "torch float16", "torch bfloat16", "torch int64", "torch int32", "torch int16",
    "torch int8", "torch uint8", "torch uint16", "torch uint32", "torch uint64", "torch bool", "torch complex64",
    "torch complex128", "torch float8_e4m3fn", "torch float8_e5m2", "torch float8_e4m3fnuz", "torch float8_e5m2fnuz",
}  # fmt: skip
_DICT = "collections OrderedDict"
_CALLED = {
    _DICT, "torch Size", "torch._utils _rebuild_tensor", "torch._utils _rebuild_tensor_v2",
    "torch._utils _rebuild_tensor_v3", "torch._utils _rebuild_parameter",
}  # fmt: skip
_LITERALS = {
    "BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT", "BINUNICODE", "SHORT_BINUNICODE", "BINSTRING",
    "SHORT_BINSTRING", "BINBYTES", "SHORT_BINBYTES",
}  # fmt: skip
_CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}
_TUPLES = {"EMPTY_TUPLE": 0, "TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}
_MARK = object()
_ZIP = b"PK\x03\x04"


@dataclass(frozen=True, slots=True)
class WeightFile:
    """The tensors of one file under the names the network gives them, and what the file says of itself.

    `tensors` may be views of the file's own pages: reading them costs no memory until they are used.
    """

    path: Path
    tensors: dict[str, Tensor]
    metadata: Mapping[str, str] = field(default_factory=dict)

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shape of every tensor."""
        return {name: tuple(tensor.shape) for name, tensor in self.tensors.items()}


def read_weights(path: str | Path, *, check_values: bool = True) -> WeightFile:
    """Tensors of a network file, named as the network names them (docs/architecture.md, Released files).

    Understands .safetensors and torch's .pth (tensors only, whatever the file's suffix), the official
    prefixes (`net_ema.` before `net.`), PixelDiT's `core.` and the ComfyUI repackaging, also in fp8 or int8, which
    become bfloat16. `check_values=False` skips the search for NaN and infinity, which reads the whole file.

    Raises:
        CheckpointError: It is anything else; the message says what was found and the fix.
    """
    raw = read_tensors(path, eight_bits=True)
    tensors = strip_prefixes(raw.tensors, path)
    if any(tensor.dtype in EIGHT_BITS for tensor in tensors.values()):
        tensors = dequantized(tensors, torch.bfloat16, path, raw.metadata)
    check_formats(tensors, path)
    if check_values:
        check_finite(tensors, path)
    return WeightFile(raw.path, tensors, raw.metadata)


def read_tensors(path: str | Path, *, eight_bits: bool = False) -> WeightFile:
    """Every tensor of a file under the name it has there; content, not suffix, decides the format.

    Formats of less than 16 bits are refused, but for fp8 if `eight_bits` is set.

    Raises:
        CheckpointError: The file is neither .safetensors nor a pickle of tensors, or is damaged.
    """  # noqa: DOC501 (`_quantized` makes a CheckpointError)
    path = Path(path)
    check_file(path)
    start = read_start(path)
    known = looks_like_safetensors(start) or start.startswith((_ZIP, b"\x80"))
    if not known and (what := foreign_kind(start)):
        raise CheckpointError(f"{path} is {what}.")
    if looks_like_safetensors(start) or (path.suffix == ".safetensors" and not start.startswith(_ZIP)):
        header, tensors = read_safetensors(path)
        read = {"F8_E4M3", "F8_E5M2"} if eight_bits else set()
        formats = {entry.dtype for entry in header.tensors.values()} - read
        if small := sorted(each for each in formats if each.startswith(("F8", "F6", "F4"))):
            raise _quantized(path, small)
        if not tensors:
            raise CheckpointError(f"{path} holds no tensors; weights were expected.")
        return WeightFile(path, tensors, header.metadata)
    if not known:
        raise CheckpointError(f"{path} is neither .safetensors nor written by torch.save; fetch the file again.")
    return WeightFile(path, only_tensors(path, load_pickle(path, path)))


def load_pickle(source: Path | bytes, name: object) -> Any:
    """What `torch.save` wrote, after its opcodes were checked (`_scan_pickle`); never code.

    Args:
        source: The file, whose tensors then are views of its pages, or its content.
        name: What errors call it.

    Raises:
        CheckpointError: It is damaged, holds more than numbers, text and dense tensors, or lies about its sizes.
    """
    size = len(source) if isinstance(source, bytes) else source.stat().st_size
    with io.BytesIO(source) if isinstance(source, bytes) else open(source, "rb") as file:
        zipped = file.read(len(_ZIP)) == _ZIP  # as torch tells it: a pickle may end in an archive, which it ignores
        _scan_pickle(name, file, size, zipped=zipped)
        file.seek(0)
        try:
            if zipped and isinstance(source, Path) and source.suffix != ".safetensors":
                return torch.load(source, map_location="cpu", weights_only=True, mmap=True)
            # torch goes by the name where it is given one; a handle makes it look at the content
            with warnings.catch_warnings():  # of formats that old versions of torch wrote
                warnings.simplefilter("ignore")
                return torch.load(file, map_location="cpu", weights_only=True)
        except MemoryError:
            raise CheckpointError(f"{name} asks for more memory than there is; do not trust this file.") from None
        except Exception as fault:  # torch raises whatever a damaged stream leads it into
            first_line = (str(fault).splitlines() or [""])[0]
            raise CheckpointError(
                f"{name} is no readable file of tensors (truncated, or not written by torch.save or safetensors): "
                f"{type(fault).__name__}: {first_line[:200]}. Fetch it again."
            ) from None


def _entry_sizes(name: object, archive: zipfile.ZipFile, size: int) -> dict[str, int]:
    """Sizes of an archive's entries. torch.save stores them uncompressed; anything else is another kind or a trap."""
    entries = archive.infolist()
    names = [entry.filename for entry in entries]
    if len(set(names)) != len(names) or sum(inner.endswith("data.pkl") for inner in names) > 1:
        raise CheckpointError(f"{name} holds two files of one name; do not trust this file.")
    if not any(inner.endswith("data.pkl") for inner in names):
        raise CheckpointError(f"{name} is a zip archive without weights in it; unpack it, or name the weights file.")
    if any(entry.compress_type != zipfile.ZIP_STORED for entry in entries):
        raise CheckpointError(f"{name} is compressed, which torch.save never does; do not trust this file.")
    if sum(entry.file_size for entry in entries) > size:
        raise CheckpointError(f"{name} claims to hold more bytes than it has; do not trust this file.")
    return {entry.filename: entry.file_size for entry in entries}


@dataclass(frozen=True, slots=True)
class _Value:
    """Stands for an object the pickle would make: what it is, and the items of a tuple."""

    kind: str
    items: tuple[Any, ...] = ()


def _scan_pickle(path: object, file: BinaryIO, size: int, *, zipped: bool) -> None:
    """Raises CheckpointError for a pickle of more than numbers, text and dense tensors that the file has room for."""
    # torch's `weights_only` unpickler runs no code, but it allocates what a pickle asks for: `bytearray(6000000000)` is
    # a file of a kilobyte. Here the opcodes are followed without making any of their objects.
    try:
        # From memory, because reading from a file allocates as much as an opcode claims.
        if not zipped:
            file.seek(0)
            stream = io.BytesIO(file.read(MAX_PICKLE_BYTES))
            for _ in range(_LEGACY_PICKLES):
                _Scan(path, stream, size, lambda key: size).run()
            return
        with zipfile.ZipFile(file) as archive:
            sizes = _entry_sizes(path, archive, size)
            name = next(name for name in sizes if name.endswith("data.pkl"))
            if sizes[name] > MAX_PICKLE_BYTES:
                raise CheckpointError(
                    f"{path} holds a pickle of {sizes[name]:,} bytes beside its tensors; at most {MAX_PICKLE_BYTES:,} "
                    "are read. Get the weights as .safetensors."
                )
            folder = name.removesuffix("data.pkl") + "data/"
            _Scan(path, io.BytesIO(archive.read(name)), size, lambda key: sizes.get(folder + key)).run()
    except (ValueError, IndexError, OSError, zipfile.BadZipFile, NotImplementedError, RuntimeError) as error:
        raise CheckpointError(
            f"{path} is no pickle of plain tensors (truncated, or not written by torch.save or safetensors: "
            f"{str(error)[:120]}); fetch it again, or get the .safetensors."
        ) from None


class _Scan:
    """Follows one pickle's opcodes on a stack of literals and stand-ins."""

    def __init__(self, path: object, stream: BinaryIO, size: int, capacity: Callable[[str], int | None]) -> None:
        self.path, self.stream, self.capacity = path, stream, capacity
        self.stack: list[Any] = []
        self.memo: dict[int, Any] = {}
        self.claimed: dict[str, int] = {}
        self.total, self.size = 0, size

    def run(self) -> None:
        """Follow the pickle to its end."""
        for opcode, argument, _ in pickletools.genops(self.stream):
            self._step(opcode.name, argument)

    def _step(self, name: str, argument: Any) -> None:
        stack = self.stack
        if name in _LITERALS:
            stack.append(argument)
        elif name in _CONSTANTS:
            stack.append(_CONSTANTS[name])
        elif name == "GLOBAL":
            stack.append(self._global(argument))
        elif name in _TUPLES:
            items = [stack.pop() for _ in range(_TUPLES[name])]
            stack.append(_Value("tuple", tuple(reversed(items))))
        elif name == "TUPLE":
            stack.append(_Value("tuple", tuple(self._to_mark())))
        elif name == "MARK":
            stack.append(_MARK)
        elif name in ("EMPTY_DICT", "EMPTY_LIST"):
            stack.append(_Value(name))
        elif name in ("BINPUT", "LONG_BINPUT", "MEMOIZE"):
            self.memo[len(self.memo) if name == "MEMOIZE" else argument] = stack[-1]
        elif name in ("BINGET", "LONG_BINGET"):
            stack.append(self._shared(argument))
        elif name in ("SETITEM", "SETITEMS"):
            items = self._to_mark() if name == "SETITEMS" else [stack.pop(), stack.pop()][::-1]
            if len(items) % 2 or not all(isinstance(key, (str, int)) for key in items[::2]):
                raise ValueError("a name in it is neither text nor a number")
        elif name == "APPENDS":
            self._to_mark()
        elif name == "APPEND":
            stack.pop()
        elif name == "REDUCE":
            self._call(stack.pop(), stack.pop())
        elif name == "BUILD":
            stack.pop()
            if stack[-1] != _Value(_DICT):
                raise ValueError("it sets the state of something other than a state dict")
        elif name == "BINPERSID":
            stack.append(self._storage(stack.pop()))
        elif name not in ("PROTO", "FRAME", "STOP"):
            raise ValueError(f"it has the opcode {name}")

    def _to_mark(self) -> list[Any]:
        items: list[Any] = []
        while (item := self.stack.pop()) is not _MARK:
            items.append(item)
        return items[::-1]

    def _global(self, name: str) -> _Value:
        if name not in _CALLED and name not in _STORAGES and name not in _TYPES:
            raise CheckpointError(
                f"{self.path} is a pickle that asks to run code ({name.replace(' ', '.')}), not plain tensors; nothing "
                "was run. Get the weights as .safetensors from a source you trust."
            )
        return _Value("global", (name,))

    def _shared(self, index: int) -> Any:
        if index not in self.memo:
            raise ValueError("it refers to an object that it does not hold")
        item = self.memo[index]
        if isinstance(item, _Value) and item.kind == "tuple":  # hashing nested ones takes exponential time
            raise ValueError("it refers to one tuple twice")
        return item

    def _call(self, arguments: Any, function: Any) -> None:
        if not isinstance(function, _Value) or function.kind != "global" or function.items[0] not in _CALLED:
            raise ValueError("it calls something that is no known function")
        if not isinstance(arguments, _Value) or arguments.kind != "tuple":
            raise ValueError("it calls a function without arguments")
        self.stack.append(_Value(function.items[0]))

    def _storage(self, about: Any) -> _Value:
        """Check that the file has the bytes a storage claims: `("storage", type, key, device, count, ...)`."""
        items = about.items if isinstance(about, _Value) else ()
        if len(items) < 5 or items[0] != "storage" or not isinstance(items[1], _Value) or type(items[4]) is not int:
            raise ValueError("it refers to something other than a storage")
        item_bytes = _STORAGES.get(items[1].items[0] if items[1].items else "")
        if item_bytes is None:
            raise ValueError("a storage in it has no known type")
        key, claim, capacity = str(items[2]), items[4] * item_bytes, self.capacity(str(items[2]))
        self.total += max(0, claim - self.claimed.get(key, 0))
        self.claimed[key] = max(claim, self.claimed.get(key, 0))
        if capacity is None or not 0 <= claim <= capacity or self.total > self.size:
            raise CheckpointError(
                f"{self.path} claims {items[4]:,} values for storage {key[:20]!r}, and the file has "
                f"{'none' if capacity is None else f'{capacity:,} bytes'}; do not trust this file."
            )
        return _Value("storage")


def only_tensors(path: object, content: Any) -> dict[str, Tensor]:
    """The named tensors of what `load_pickle` returned. Raises CheckpointError unless they are dense and all there."""
    for name in ("state_dict", "model") * 3:
        if isinstance(content, Mapping) and isinstance(content.get(name), Mapping):
            content = content[name]
    if not isinstance(content, Mapping):
        raise CheckpointError(f"{path} holds one {type(content).__name__}; a table of named tensors was expected.")
    tensors = {str(name): value for name, value in content.items() if isinstance(value, Tensor)}
    if not tensors:
        names = ", ".join(str(name) for name in list(content)[:5]) or "nothing"
        fix = "name the file with the network's weights."
        if {"params", "params_ema"} & set(content):
            fix = "weights of other upscalers, such as Real-ESRGAN, are not read here."
        raise CheckpointError(f"{path} holds no tensors (it holds {names}); {fix}")
    for name, tensor in tensors.items():
        if tensor.layout != torch.strided or tensor.is_quantized or tensor.device.type != "cpu":
            raise CheckpointError(f"{path}: {name} is sparse, quantized or without data; dense tensors were expected.")
        if tensor.numel() * tensor.element_size() > tensor.untyped_storage().nbytes():
            raise CheckpointError(
                f"{path}: {name} claims {tensor.numel():,} values and stores fewer; do not trust this file."
            )
    stored = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors.values()}
    if sum(tensor.nbytes for tensor in tensors.values()) > 4 * sum(stored.values()):  # a few may share values
        raise CheckpointError(f"{path} shows the same values under many names; do not trust this file.")
    return {name: tensor.detach() for name, tensor in tensors.items()}


def strip_prefixes(tensors: Mapping[str, Tensor], source: object = "the file") -> dict[str, Tensor]:
    """Names as the network has them; other networks in the same file and `_extra_state` entries are left out.

    A tensor that belongs to nothing known keeps its name, so that loading can report it.

    Raises:
        CheckpointError: Two tensors end under one name.
    """
    kept = {name: tensor for name, tensor in tensors.items() if not name.endswith("_extra_state")}
    for _ in range(4):
        wrapper = next((prefix for prefix in _WRAPPERS if any(name.startswith(prefix) for name in kept)), None)
        if wrapper is None:
            break
        own = [name for name in kept if name.startswith(wrapper) or not name.startswith(_STRANGERS)]
        stripped = {name.removeprefix(wrapper): kept[name] for name in own}
        if len(stripped) < len(own):
            twice = next(name for name in stripped if name in kept and wrapper + name in kept)
            raise CheckpointError(f"{source} holds {twice} twice, with and without the prefix {wrapper!r}.")
        kept = stripped
    return {name: tensor for name, tensor in kept.items() if not name.startswith(_STRANGERS)}


def check_formats(tensors: Mapping[str, Tensor], source: object = "the file") -> None:
    """Raises CheckpointError unless every tensor is an ordinary floating-point one."""
    marks = sorted({mark for name in tensors for mark in _QUANTIZED_NAMES if name.endswith(mark)})
    wrong = [name for name, tensor in tensors.items() if tensor.dtype not in FLOATS]
    small = sorted({_plain(tensors[name].dtype) for name in wrong if tensors[name].is_floating_point()})
    if marks or small:
        raise _quantized(source, layer_formats(tensors, {}) + small + marks)
    if wrong:
        raise CheckpointError(
            f"{source} stores {wrong[0]} as {_plain(tensors[wrong[0]].dtype)}{_and_more(wrong)}; "
            "weights must be float32, bfloat16 or float16. Take the bfloat16 file of the same model."
        )


# Number formats of quantized weights that are read, and what ComfyUI calls a layer stored so.
EIGHT_BITS = {
    torch.float8_e4m3fn: "float8_e4m3fn", torch.float8_e5m2: "float8_e5m2", torch.int8: "int8_tensorwise",
}  # fmt: skip
_NOTES = (".comfy_quant", ".weight_scale", ".scale_weight", ".input_scale", ".scale_input", "scaled_fp8")


def dequantized(
    tensors: Mapping[str, Tensor], dtype: torch.dtype, source: object, metadata: Mapping[str, str] | None = None
) -> dict[str, Tensor]:
    """Weights of a file of ComfyUI's that are stored in fp8 or int8, times their scale; others as they are.

    Args:
        tensors: By name; a weight's scale is `<layer>.weight_scale` or `<layer>.scale_weight`, one value or one a row.
            fp8 may have none.
        dtype: Number format of what was quantized.
        source: What error messages call the file.
        metadata: The file's, which may name formats as well.

    Raises:
        CheckpointError: The file is quantized in another way.
    """  # noqa: DOC501 (`_quantized` makes a CheckpointError)
    others = [name for name in layer_formats(tensors, metadata or {}) if name not in EIGHT_BITS.values()]
    found: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        if name.endswith(_NOTES):
            continue
        stem = name.removesuffix("weight")
        scale = tensors.get(f"{stem}weight_scale", tensors.get(f"{stem}scale_weight"))
        if tensor.dtype in EIGHT_BITS and (scale is not None or tensor.dtype != torch.int8):
            if scale is not None and scale.numel() > 1 and tuple(scale.squeeze().shape) != tuple(tensor.shape[:1]):
                others.append(f"{_plain(tensor.dtype)} with a scale of shape {list(scale.shape)}")
                continue
            factor = 1.0 if scale is None else scale.float().reshape(-1, *[1] * (tensor.ndim - 1))
            found[name] = (tensor.float() * factor).to(dtype)
        elif scale is not None or tensor.dtype not in FLOATS:
            others.append(_plain(tensor.dtype))
        else:
            found[name] = tensor
    if others:
        raise _quantized(source, sorted(set(others)))
    return found


def layer_formats(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> list[str]:
    """Formats that ComfyUI names beside each quantized layer, as JSON in a tensor of bytes or in the metadata."""
    notes = {metadata.get("_quantization_metadata", "").encode()} | {
        bytes(t.tolist()) for name, t in tensors.items() if name.endswith(".comfy_quant") and t.numel() < 1024
    }
    found = {match[1].decode() for note in notes for match in re.finditer(rb'"format"\s*:\s*"([a-z0-9_]+)"', note)}
    # Rotated weights need more than their scale.
    return sorted(found | {"convrot" for note in notes if re.search(rb'"convrot"\s*:\s*true', note)})


def check_finite(tensors: Mapping[str, Tensor], source: object) -> None:
    """Raises CheckpointError naming the first tensor with NaN or infinite values."""
    bounds = {name: torch.stack(torch.aminmax(tensor)) for name, tensor in tensors.items() if tensor.numel()}
    bad = [name for name, low_high in bounds.items() if not torch.isfinite(low_high).all()]
    if bad:
        raise CheckpointError(
            f"{source} has NaN or infinite values in {bad[0]}{_and_more(bad)} (of {len(tensors)} tensors); "
            "the file is damaged or its training diverged: fetch it again."
        )


def _quantized(source: object, marks: list[str]) -> CheckpointError:
    """An error that calls the format what people call it: by its dtypes, or by what ComfyUI stores of a layer."""
    found = ", ".join(marks)
    names = {"F4": "NVFP4", "nvfp4": "NVFP4", "mxfp8": "MXFP8", "F8_E8M0": "MXFP8", "absmax": "bitsandbytes"}
    names |= {"qweight": "GPTQ or AWQ", "F8": "fp8", "float8": "fp8", "scaled_fp8": "fp8", "int8": "int8"}
    name = next((title for mark, title in names.items() if mark in found), "by another program")
    what = f"{source} is quantized ({name}: {found})"
    return CheckpointError(f"{what}; such files are not read here. Take the bfloat16 file of the same model.")


def _plain(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _and_more(names: list[str]) -> str:
    return f" and {len(names) - 1} more" if len(names) > 1 else ""
