# SPDX-License-Identifier: Apache-2.0
"""Hostile variants of bytes and of JSON values, made with a seeded generator."""

from __future__ import annotations

import json
import struct
from copy import deepcopy
from random import Random
from typing import Any

RAW = (
    "NaN", "Infinity", "-Infinity", "1e300", "1e999", "-0.0", "9" * 5000, str(2**63), str(2**64), str(10**9), "-1",
    "[" * 400 + "]" * 400, '"\\ud800"', '"\\u0000"', '"\\u001b[2J"', '""', '"' + "x" * 5000 + '"', "null", "true",
    "[]", "{}", '{"a": 1, "a": 2}', "0.5", '"../../x"', '"~nobody/x"', "[[[]]]", '"\\u202e"', "1" + "0" * 30, "\x00",
)  # fmt: skip
"""Tokens of JSON, some of them no JSON, that take the place of a value."""

_EXTREMES = (0, 1, 0xFF, 2**31 - 1, 2**31, 2**32 - 1, 2**63 - 1, 2**63, 2**64 - 1, 10**9)


def mutated(rng: Random, data: bytes) -> bytes:
    """The bytes with one to four changes: flipped, cut, repeated, inserted, or numbers made extreme."""
    for _ in range(rng.choice((1, 1, 2, 4))):
        at = rng.randrange(len(data) + 1) if rng.random() < 0.5 else rng.randrange(min(len(data), 200) + 1)
        length = rng.choice((1, 4, 8, 64, 4096))
        kind = rng.randrange(7)
        if kind == 0 and data:
            changed = bytearray(data)
            for _ in range(rng.choice((1, 3, 16))):
                changed[rng.randrange(len(changed))] ^= 1 << rng.randrange(8)
            data = bytes(changed)
        elif kind == 1:
            data = data[:at]
        elif kind == 2:
            data = data[:at] + data[at + length :]
        elif kind == 3:
            data = data[:at] + data[at : at + length] * rng.choice((2, 50)) + data[at + length :]
        elif kind == 4:
            data = data[:at] + rng.randbytes(length) + data[at:]
        elif kind == 5:
            number = struct.pack(rng.choice("<>") + "Q", rng.choice(_EXTREMES))[: rng.choice((2, 4, 8))]
            data = data[:at] + number + data[at + len(number) :]
        else:
            other = rng.randrange(len(data) + 1)
            data = data[:at] + data[other : other + length] + data[at + length :]
    return data


def hostile_json(rng: Random, value: Any) -> str:
    """The value as JSON text, with one to three of its parts replaced, removed or added."""
    value = deepcopy(value)
    tokens: list[str] = []
    for _ in range(rng.choice((1, 1, 2, 3))):
        tokens.append(rng.choice(RAW))
        value = _replaced(rng, value, f"@raw{len(tokens) - 1}@")
    text = json.dumps(value)
    for index, token in enumerate(tokens):
        text = text.replace(f'"@raw{index}@"', token)
    return text if rng.random() < 0.95 else text[: rng.randrange(len(text) + 1)]


def _replaced(rng: Random, value: Any, token: str) -> Any:
    if isinstance(value, dict) and value and rng.random() < 0.9:
        name = rng.choice(list(value))
        if rng.random() < 0.1:
            del value[name]
        elif rng.random() < 0.1:
            value[rng.choice(("x", "\x1b[1m", "__proto__", name + " "))] = token
        else:
            value[name] = _replaced(rng, value[name], token)
        return value
    if isinstance(value, list) and value and rng.random() < 0.8:
        index = rng.randrange(len(value))
        value[index] = _replaced(rng, value[index], token)
        return value
    return token


def safetensors_bytes(header: str | bytes, data: bytes = b"", length: int | None = None) -> bytes:
    """A .safetensors file around any header."""
    text = header.encode("utf-8", "surrogatepass") if isinstance(header, str) else header
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def split_safetensors(data: bytes) -> tuple[dict[str, Any], bytes]:
    """Header and tensors of a valid file."""
    length = int.from_bytes(data[:8], "little")
    return json.loads(data[8 : 8 + length]), data[8 + length :]
