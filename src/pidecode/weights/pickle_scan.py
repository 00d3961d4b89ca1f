# SPDX-License-Identifier: Apache-2.0
"""Check of a pickled state dict before anything unpickles it: known opcodes and classes, sizes the file can hold.

torch's own `weights_only` unpickler runs no code, but it allocates what a pickle asks for: `bytearray(6000000000)` is a
file of a kilobyte. Here the opcodes are followed without making any object of theirs.
"""

from __future__ import annotations

import io
import pickletools
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO
from zipfile import BadZipFile, ZipFile

from pidecode.errors import CheckpointError

MAX_PICKLE_BYTES = 16 << 20
"""Longest pickle read, tensors apart: some 60,000 tensors."""

_LEGACY_PICKLES = 5
"""Pickles that torch before 1.6 wrote one after another: magic number, version, system, content, storage keys."""

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


@dataclass(frozen=True, slots=True)
class _Made:
    """Stands for an object the pickle would make: what it is, and the items of a tuple."""

    kind: str
    items: tuple[Any, ...] = ()


def scan_pickle(path: Path, *, zipped: bool) -> None:
    """Check the pickle of a file that torch.save wrote, as a zip archive (torch 1.6 and later) or without.

    Raises:
        CheckpointError: The pickle holds more than numbers, text and dense tensors, or tensors that the file has no
            room for.
    """
    try:
        # From memory, because reading from a file allocates as much as an opcode claims.
        if not zipped:
            with open(path, "rb") as file:
                stream = io.BytesIO(file.read(MAX_PICKLE_BYTES))
            for _ in range(_LEGACY_PICKLES):
                _Scan(path, stream, lambda key: path.stat().st_size).run()
            return
        with ZipFile(path) as archive:
            sizes = {entry.filename: entry.file_size for entry in archive.infolist()}
            name = next(name for name in sizes if name.endswith("data.pkl"))
            if sizes[name] > MAX_PICKLE_BYTES:
                raise CheckpointError(
                    f"{path} holds a pickle of {sizes[name]:,} bytes beside its tensors; at most {MAX_PICKLE_BYTES:,} "
                    "are read. Get the weights as .safetensors."
                )
            folder = name.removesuffix("data.pkl") + "data/"
            _Scan(path, io.BytesIO(archive.read(name)), lambda key: sizes.get(folder + key)).run()
    except (ValueError, IndexError, OSError, BadZipFile, NotImplementedError, RuntimeError) as error:
        raise CheckpointError(
            f"{path} is no pickle of plain tensors (truncated, or not written by torch.save or safetensors: "
            f"{str(error)[:120]}); fetch it again, or get the .safetensors."
        ) from None


class _Scan:
    """Follows one pickle's opcodes on a stack of literals and stand-ins."""

    def __init__(self, path: Path, stream: BinaryIO, room: Callable[[str], int | None]) -> None:
        self.path, self.stream, self.room = path, stream, room
        self.stack: list[Any] = []
        self.memo: dict[int, Any] = {}
        self.claimed: dict[str, int] = {}
        self.total, self.size = 0, path.stat().st_size

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
            stack.append(_Made("tuple", tuple(reversed(items))))
        elif name == "TUPLE":
            stack.append(_Made("tuple", tuple(self._to_mark())))
        elif name == "MARK":
            stack.append(_MARK)
        elif name in ("EMPTY_DICT", "EMPTY_LIST"):
            stack.append(_Made(name))
        elif name in ("BINPUT", "LONG_BINPUT", "MEMOIZE"):
            self.memo[len(self.memo) if name == "MEMOIZE" else argument] = stack[-1]
        elif name in ("BINGET", "LONG_BINGET"):
            stack.append(self._shared(argument))
        elif name in ("SETITEM", "SETITEMS"):
            items = self._to_mark() if name == "SETITEMS" else [stack.pop(), stack.pop()][::-1]
            if len(items) % 2 or not all(isinstance(key, (str, int)) for key in items[::2]):
                raise ValueError("a name in it is neither text nor a number")
        elif name in ("APPEND", "APPENDS"):
            _ = self._to_mark() if name == "APPENDS" else stack.pop()
        elif name == "REDUCE":
            self._call(stack.pop(), stack.pop())
        elif name == "BUILD":
            stack.pop()
            if stack[-1] != _Made(_DICT):
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

    def _global(self, name: str) -> _Made:
        if name not in _CALLED and name not in _STORAGES and name not in _TYPES:
            raise CheckpointError(
                f"{self.path} is a pickle that asks to run code ({name.replace(' ', '.')}), not plain tensors; nothing "
                "was run. Get the weights as .safetensors from a source you trust."
            )
        return _Made("global", (name,))

    def _shared(self, index: int) -> Any:
        if index not in self.memo:
            raise ValueError("it refers to an object that it does not hold")
        item = self.memo[index]
        if isinstance(item, _Made) and item.kind == "tuple":  # tuples in tuples take exponential time to hash and print
            raise ValueError("it refers to one tuple twice")
        return item

    def _call(self, arguments: Any, function: Any) -> None:
        if not isinstance(function, _Made) or function.kind != "global" or function.items[0] not in _CALLED:
            raise ValueError("it calls something that is no known function")
        if not isinstance(arguments, _Made) or arguments.kind != "tuple":
            raise ValueError("it calls a function without arguments")
        self.stack.append(_Made(function.items[0]))

    def _storage(self, about: Any) -> _Made:
        """Check that the file has the bytes a storage claims: `("storage", type, key, device, count, ...)`."""
        items = about.items if isinstance(about, _Made) else ()
        if len(items) < 5 or items[0] != "storage" or not isinstance(items[1], _Made) or type(items[4]) is not int:
            raise ValueError("it refers to something other than a storage")
        item_bytes = _STORAGES.get(items[1].items[0] if items[1].items else "")
        if item_bytes is None:
            raise ValueError("a storage in it has no known type")
        key, claim, room = str(items[2]), items[4] * item_bytes, self.room(str(items[2]))
        self.total += max(0, claim - self.claimed.get(key, 0))
        self.claimed[key] = max(claim, self.claimed.get(key, 0))
        if room is None or not 0 <= claim <= room or self.total > self.size:
            raise CheckpointError(
                f"{self.path} claims {items[4]:,} values for storage {key[:20]!r}, and the file has "
                f"{'none' if room is None else f'{room:,} bytes'}; do not trust this file."
            )
        return _Made("storage")
