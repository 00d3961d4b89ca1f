# SPDX-License-Identifier: Apache-2.0
"""The one reader of JSON that comes from outside: bounded in size, depth and digits, and without surprises."""

from __future__ import annotations

import json
import math
import os
from typing import Any, NoReturn

MAX_BYTES = 4 << 20
MAX_DEPTH = 32
_MAX_DIGITS = 20  # digits of a whole number: enough for 64 bits
_MAX_NUMBER = 64  # characters of a decimal number


class JSONError(ValueError):
    """Text that is not JSON, or JSON that is not accepted; the message says why, as the end of a sentence."""


def parse_json(text: str | bytes, *, max_bytes: int = MAX_BYTES, max_depth: int = MAX_DEPTH) -> Any:
    """Parse JSON of unknown origin.

    What it returns can be hashed, printed, encoded in UTF-8 and written as JSON again.

    Args:
        text: The document; bytes are UTF-8, with or without a byte-order mark.
        max_bytes: Longest document accepted.
        max_depth: How deep arrays and objects may be nested.

    Raises:
        JSONError: The text is not JSON, too long or nested too deeply; it has a name twice, NaN, infinity,
            a number of too many digits, or half of a surrogate pair.
    """
    if len(text) > max_bytes:
        raise JSONError(f"it is longer than {max_bytes:,} bytes")
    try:
        if isinstance(text, bytes):
            text = text.decode("utf-8-sig")
        value = json.loads(
            text, object_pairs_hook=_object, parse_int=_whole, parse_float=_decimal, parse_constant=_constant
        )
    except UnicodeDecodeError:
        raise JSONError("it is not UTF-8") from None
    except RecursionError:
        raise JSONError(f"it is nested more than {max_depth} levels deep") from None
    except json.JSONDecodeError as error:
        raise JSONError(f"{error.msg} at line {error.lineno}, column {error.colno}") from None
    _check(value, max_depth)
    return value


def read_json(path: str | os.PathLike[str], *, max_bytes: int = MAX_BYTES) -> Any:
    """Parse the JSON of a file, of which no more than `max_bytes` are read.

    Raises:
        OSError: The file cannot be read.
        JSONError: As `parse_json`; or it is a device or pipe.
    """
    if os.path.exists(path) and not os.path.isfile(path):  # a pipe would block forever
        raise JSONError("it is not a regular file")
    with open(path, "rb") as file:
        return parse_json(file.read(max_bytes + 1), max_bytes=max_bytes)


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    unique: dict[str, Any] = {}
    for name, value in pairs:
        if name in unique:
            raise JSONError(f"it has {name[:40]!r} twice in one object")
        unique[name] = value
    return unique


def _whole(digits: str) -> int:
    if len(digits.lstrip("-")) > _MAX_DIGITS:
        raise JSONError(f"it has a whole number of more than {_MAX_DIGITS} digits")
    return int(digits)


def _decimal(digits: str) -> float:
    value = float(digits) if len(digits) <= _MAX_NUMBER else math.inf
    if not math.isfinite(value):
        raise JSONError(f"its number {digits[:20]} is too large or too long")
    return value


def _constant(name: str) -> NoReturn:
    raise JSONError(f"it has {name}, which is no JSON number")


def _check(value: Any, max_depth: int) -> None:
    """Refuse deep nesting, and text that UTF-8 cannot hold; level by level, so that no depth exhausts the stack."""
    level: list[Any] = [value]
    for _ in range(max_depth + 1):
        inner: list[Any] = []
        for item in level:
            if isinstance(item, dict):
                inner += [*item, *item.values()]
            elif isinstance(item, list):
                inner += item
            elif isinstance(item, str):
                try:
                    item.encode()
                except UnicodeEncodeError:
                    raise JSONError("it has half of a surrogate pair, which is no character") from None
        if not inner:
            return
        level = inner
    raise JSONError(f"it is nested more than {max_depth} levels deep")
