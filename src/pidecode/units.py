# SPDX-License-Identifier: Apache-2.0
"""Image sizes, byte counts and durations as text, parsed and formatted; text from outside made safe to print."""

from __future__ import annotations

import codecs
import os
import re

from pidecode.errors import FileError, SettingError, SizeError

_PREFIXES = {"": 0, "k": 1, "m": 2, "g": 3, "t": 4}

MAX_PIXELS = 2**26  # largest image read unless the caller allows more: 67,108,864 pixels, 8192 x 8192
LARGEST_PIXELS = 178_956_970  # largest image that Pillow opens


def parse_size(text: str) -> tuple[int, int]:
    """Width and height in pixels of "4096x3072"; SizeError for text of another form."""
    try:
        width, height = parse_sides(text)
    except SizeError:
        width = height = None
    if width is None or height is None:
        raise SizeError(f"The size is {text[:20]!r}; it must be WIDTHxHEIGHT in pixels, such as 2048x1536.")
    return width, height


def parse_sides(text: str) -> tuple[int | None, int | None]:
    """Width and height in pixels of "4096x3072", or of "4096x" or "x3072" with None for the other side."""
    match = re.fullmatch(r"\s*([1-9]\d{0,5})?\s*[x×]\s*([1-9]\d{0,5})?\s*", text.lower())
    if match is None or match[1] is match[2]:
        raise SizeError(
            f"The size is {text[:20]!r}; it must be WIDTHxHEIGHT in pixels, such as 2048x1536, or one side alone: "
            "2048x or x1536."
        )
    return int(match[1]) if match[1] else None, int(match[2]) if match[2] else None


def parse_bytes(text: str) -> int:
    """Bytes of "12GB", "800 MB", "11.5GiB" or a large plain number; SettingError for text of another form."""
    match = re.fullmatch(r"\s*(\d{0,9}\.?\d{1,15})\s*([kmgt]?)(i?)b?\s*", text.lower())
    if match is None or (match[3] and not match[2]):
        raise SettingError(f"{text[:20]!r} is not an amount of memory; write it like 12GB, 800MB or 11.5GiB.")
    if match[2] == "" and "b" not in text.lower() and float(match[1]) < 1e6:
        raise SettingError(f"{text.strip()} has no unit, and so few bytes hold nothing; write it like {match[1]}GB.")
    return int(float(match[1]) * (1024 if match[3] else 1000) ** _PREFIXES[match[2]])


def format_bytes(count: int | None) -> str:
    """Format bytes with three digits or fewer, as "2.7 GB"; "?" for None."""
    if count is None:
        return "?"
    size, units = float(count), ["B", "kB", "MB", "GB", "TB"]
    while size >= 1000 and len(units) > 1:
        size, units = size / 1000, units[1:]
    return f"{size:.0f} {units[0]}" if units[0] == "B" or size >= 100 else f"{size:.1f} {units[0]}"


def format_seconds(seconds: float) -> str:
    """Format a duration, as "4.2 s", "42 s", "3 min 20 s" or "2 h 5 min"."""
    if seconds < 60:
        return f"{seconds:.1f} s" if seconds < 10 else f"{seconds:.0f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s"


_UNPRINTABLE = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")
"""Control characters but tab and newline, marks that reverse the order of text, and bytes of names not UTF-8."""


def printable(text: str, *, json_escapes: bool = False) -> str:
    """Write as escapes, of Python or of JSON, what a terminal would obey or a stream refuse."""

    def escape(match: re.Match[str]) -> str:
        code = ord(match[0])
        return f"\\x{code:02x}" if code < 0x100 and not json_escapes else f"\\u{code:04x}"

    return _UNPRINTABLE.sub(escape, text)


_DTYPES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}
DTYPES = tuple(_DTYPES.values())  # number formats that weights run in and are written in, by torch's names


def parse_dtype(text: str) -> str:
    """Torch's name of a number format, "bfloat16" for "bf16" and "bfloat16"; SettingError if there is none here."""
    name = _DTYPES.get(text.lower(), text.lower().removeprefix("torch."))
    if name not in DTYPES:
        raise SettingError(f"dtype is {text!r}; it must be one of {', '.join((*DTYPES, *_DTYPES))}.")
    return name


_BYTE_ORDER_MARKS = (
    (codecs.BOM_UTF8, "utf-8-sig"), (codecs.BOM_UTF32_LE, "utf-32"), (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"), (codecs.BOM_UTF16_BE, "utf-16"),
)  # fmt: skip


MAX_TEXT = 64 << 20  # bytes of a text file: a token, prompts, one a line


def read_text(path: str | os.PathLike[str]) -> str:
    """Text of a file or pipe of at most MAX_TEXT bytes, as `decode_text` reads it; FileError for anything else."""
    try:
        with open(path, "rb") as file:
            data = file.read(MAX_TEXT + 1)
    except (OSError, ValueError) as error:
        raise FileError(f"{os.fspath(path)} cannot be read: {getattr(error, 'strerror', None) or error}.") from None
    if len(data) > MAX_TEXT:
        raise FileError(f"{os.fspath(path)} is larger than {format_bytes(MAX_TEXT)}; a text file was expected.")
    return decode_text(data, path)


def decode_text(data: bytes, name: object) -> str:
    """Text in UTF-8, or the Unicode encoding that its byte-order mark tells; FileError for legacy ones."""
    encoding = next((encoding for mark, encoding in _BYTE_ORDER_MARKS if data.startswith(mark)), "utf-8")
    try:
        return data.decode(encoding)
    except UnicodeDecodeError as error:
        raise FileError(
            f"{name} is not Unicode text ({error.reason} at byte {error.start}); save it as UTF-8, for example by "
            "`iconv -f WINDOWS-1252 -t UTF-8`."
        ) from error
