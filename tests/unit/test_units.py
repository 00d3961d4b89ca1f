# SPDX-License-Identifier: Apache-2.0
"""Sizes, bytes and durations as text."""

from __future__ import annotations

import json

import pytest

from pidecode.errors import SettingError, SizeError
from pidecode.units import format_bytes, format_seconds, parse_bytes, parse_dtype, parse_sides, parse_size, printable


@pytest.mark.parametrize(("text", "size"), [("2048x1536", (2048, 1536)), ("64X32", (64, 32)), ("8×9", (8, 9))])
def test_sizes(text: str, size: tuple[int, int]) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "2048", "x", "20x", "-1x2", "1.5x2", "axb", "1x2x3", "0x8", "9" * 5000 + "x1"])
def test_no_sizes(text: str) -> None:
    with pytest.raises(SizeError, match="it must be WIDTHxHEIGHT in pixels"):
        parse_size(text)


@pytest.mark.parametrize(("text", "sides"), [("2048x", (2048, None)), (" x64", (None, 64)), ("8x9", (8, 9))])
def test_one_side_alone(text: str, sides: tuple[int | None, int | None]) -> None:
    assert parse_sides(text) == sides


@pytest.mark.parametrize("text", ["x", "", "2048", "0x"])
def test_no_sides(text: str) -> None:
    with pytest.raises(SizeError, match="or one side alone"):
        parse_sides(text)


@pytest.mark.parametrize(
    ("text", "size"),
    [("12GB", 12 * 10**9), ("800 mb", 8 * 10**8), ("1.5GiB", 3 * 2**29), ("7B", 7), ("2k", 2000), (".5k", 500)],
)
def test_amounts_of_memory(text: str, size: int) -> None:
    assert parse_bytes(text) == size


@pytest.mark.parametrize("text", ["", "much", "-1GB", "1e9", "5ib", "GB"])
def test_no_amounts_of_memory(text: str) -> None:
    with pytest.raises(SettingError, match="is not an amount of memory; write it like 12GB"):
        parse_bytes(text)


@pytest.mark.parametrize(
    ("count", "text"),
    [(None, "?"), (0, "0 B"), (999, "999 B"), (1500, "1.5 kB"), (2_730_000_000, "2.7 GB"), (123_000_000, "123 MB")],
)
def test_format_bytes(count: int | None, text: str) -> None:
    assert format_bytes(count) == text


@pytest.mark.parametrize(("seconds", "text"), [(4.21, "4.2 s"), (42, "42 s"), (200, "3 min 20 s"), (7500, "2 h 5 min")])
def test_format_seconds(seconds: float, text: str) -> None:
    assert format_seconds(seconds) == text


def test_what_a_terminal_would_obey_is_escaped() -> None:
    hostile = "a\x1b[2J\x07\r\x9bb\x7f\u202egpj.exe\u2066\udc80\ttab\nline ü \U0001f600"
    shown = printable(hostile)
    assert shown == "a\\x1b[2J\\x07\\x0d\\x9bb\\x7f\\u202egpj.exe\\u2066\\udc80\ttab\nline ü \U0001f600"
    shown.encode("utf-8")
    text = json.dumps({hostile: 1}, ensure_ascii=False)
    assert json.loads(printable(text, json_escapes=True)) == {hostile: 1}


@pytest.mark.parametrize(("text", "name"), [("bf16", "bfloat16"), ("FP32", "float32"), ("torch.float16", "float16")])
def test_both_spellings_of_a_dtype(text: str, name: str) -> None:
    assert parse_dtype(text) == name


def test_no_dtype() -> None:
    with pytest.raises(SettingError, match="must be one of float32, bfloat16"):
        parse_dtype("fp8")


def test_a_small_number_without_a_unit_asks_for_one() -> None:
    with pytest.raises(SettingError, match="12 has no unit, .* write it like 12GB"):
        parse_bytes("12")
    assert parse_bytes("12000000000") == 12 * 10**9
