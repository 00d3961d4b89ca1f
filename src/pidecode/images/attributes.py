# SPDX-License-Identifier: Apache-2.0
"""What an image file carries beside its pixels: EXIF, XMP, resolution, texts and color profile, read and written."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from PIL import Image

KEYWORD = "pidecode"
"""Keyword of the PNG text chunk with the metadata, and its prefix in the EXIF comment of other files."""

MAX_EXIF_BYTES = {"JPEG": 60_000, "WEBP": 1 << 24}  # a JPEG segment holds 64 KiB

_XMP = "XML:com.adobe.xmp"
_EXIF_IFD, _GPS_IFD = 0x8769, 0x8825
_USER_COMMENT, _IMAGE_HISTORY, _SOFTWARE, _MAKE, _MODEL = 0x9286, 0x9213, 0x0131, 0x010F, 0x0110
_XP_COMMENT = 0x9C9C
_DESCRIPTION, _ARTIST, _COPYRIGHT, _MAKER_NOTE, _COLOR_SPACE = 0x010E, 0x013B, 0x8298, 0x927C, 0xA001
_X_RESOLUTION, _Y_RESOLUTION, _RESOLUTION_UNIT = 0x011A, 0x011B, 0x0128
_ASCII, _UNICODE = b"ASCII\0\0\0", b"UNICODE\0"
# What describes the photograph; the others describe how the pixels of that one file are stored.
_KEPT_TAGS = {
    _DESCRIPTION, _MAKE, _MODEL, _SOFTWARE, _ARTIST, _COPYRIGHT, 0x0132, 0x013C, 0x4746, 0x4749,
    0x9C9B, 0x9C9C, 0x9C9D, 0x9C9E, 0x9C9F, 0x9003, 0x9004,
}  # fmt: skip
_PIXEL_TAGS = {0xA002, 0xA003, 0xA005}
_TAG_OF_TEXT = {"Description": _DESCRIPTION, "Title": _DESCRIPTION, "Author": _ARTIST, "Copyright": _COPYRIGHT}
_COMFYUI = {"prompt": _MODEL, "workflow": _MAKE}
"""Tags in which ComfyUI's WebP files keep what its PNG files have as texts, prefixed by the name."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Attributes:
    """What a source carried, as it is written into the images made of it."""

    tags: Mapping[int, Any] = field(default_factory=dict)  # EXIF values of the main directory
    exif: Mapping[int, Any] = field(default_factory=dict)  # EXIF values of its Exif directory
    gps: Mapping[int, Any] = field(default_factory=dict)  # EXIF values of its GPS directory
    xmp: bytes = b""  # XMP packet
    dpi: tuple[float, float] | None = None  # horizontal and vertical resolution
    # Texts by keyword, such as Automatic1111's `parameters` and ComfyUI's `prompt` and `workflow`.
    texts: Mapping[str, str] = field(default_factory=dict)
    comment: str = ""  # comment of a JPEG, GIF or WebP file
    icc_profile: bytes | None = None  # profile of the pixels; None for sRGB without a profile

    def exif_block(self, metadata: str | None, kind: str, *, with_texts: bool = True) -> bytes:
        """The EXIF block of a file, b"" if it would be empty.

        Args:
            metadata: The metadata of this package, as ASCII.
            kind: "JPEG" and "WEBP" have no chunks for resolution and texts (WebP none for comments), which go here.
            with_texts: Whether the texts go with them.
        """
        tags, exif = dict(self.tags), dict(self.exif)
        if kind in MAX_EXIF_BYTES and self.dpi is not None:
            tags |= {_X_RESOLUTION: self.dpi[0], _Y_RESOLUTION: self.dpi[1], _RESOLUTION_UNIT: 2}  # per inch
        if kind in MAX_EXIF_BYTES and with_texts:
            for name, text in self.texts.items():
                if name == "parameters":
                    exif.setdefault(_USER_COMMENT, _UNICODE + text.encode("utf-16-be", errors="replace"))
                elif name in _COMFYUI:
                    tags.setdefault(_COMFYUI[name], f"{name}:{_ascii_json(text)}")
                elif name in _TAG_OF_TEXT:
                    tags.setdefault(_TAG_OF_TEXT[name], text)
            if kind == "WEBP" and (others := self.other_texts()):
                tags.setdefault(_XP_COMMENT, (others + "\0").encode("utf-16-le", errors="replace"))
        if metadata is not None:
            tags.setdefault(_SOFTWARE, KEYWORD)
            taken = _USER_COMMENT in exif
            text = f"{KEYWORD}:{metadata}"
            exif[_IMAGE_HISTORY if taken else _USER_COMMENT] = text if taken else _ASCII + text.encode("ascii")
        if not (tags or exif or self.gps):
            return b""
        return _exif_bytes(tags, exif, self.gps, MAX_EXIF_BYTES["JPEG" if kind == "JPEG" else "WEBP"])

    def other_texts(self) -> str:
        """The comment and the texts that have no EXIF tag, as lines."""
        others = [item for item in self.texts.items() if item[0] not in {"parameters", *_COMFYUI, *_TAG_OF_TEXT}]
        lines = [text if name == "Comment" else f"{name}: {text}" for name, text in others]
        return "\n".join([self.comment, *lines] if self.comment else lines)


def _ascii_json(text: str) -> str:
    """ComfyUI's JSON in ASCII, as its EXIF tags hold it; another text as it is."""
    try:
        return text if text.isascii() else json.dumps(json.loads(text))
    except (ValueError, RecursionError):
        return text


def _raw_text(text: str) -> bytes:
    """A text's bytes: Pillow reads those of every encoding as Latin-1, and writes none but ASCII."""
    return text.encode("latin-1" if max(text) < "\u0100" else "utf-8", errors="replace")


def _exif_bytes(tags: Mapping[int, Any], exif: Mapping[int, Any], gps: Mapping[int, Any], limit: int) -> bytes:
    for dropped in ((), (_MAKER_NOTE,)):
        block = Image.Exif()
        for tag, value in tags.items():
            block[tag] = _raw_text(value) if isinstance(value, str) and not value.isascii() else value
        for directory, values in ((_EXIF_IFD, exif), (_GPS_IFD, gps)):
            kept = {tag: value for tag, value in values.items() if tag not in dropped}
            if kept:
                block.get_ifd(directory).update(kept)
        data = block.tobytes()
        if len(data) <= limit:
            break
    return data


def read_attributes(image: Image.Image, icc_profile: bytes | None) -> Attributes:
    """The attributes of a loaded image; unreadable ones are left out. The orientation is left out: it was applied."""
    try:
        block = image.getexif()
        tags = {tag: value for tag, value in block.items() if tag in _KEPT_TAGS}
        exif = {tag: value for tag, value in block.get_ifd(_EXIF_IFD).items() if tag not in _PIXEL_TAGS}
        gps = dict(block.get_ifd(_GPS_IFD))
        if exif.get(_COLOR_SPACE) == 0xFFFF:
            exif[_COLOR_SPACE] = 1  # the pixels are sRGB now
        for tag in (_USER_COMMENT, _IMAGE_HISTORY):
            if comment_text(exif.get(tag)) is not None:  # of an image made by this package, to be replaced
                del exif[tag]
        if tags.get(_SOFTWARE) == KEYWORD:
            del tags[_SOFTWARE]
        told = _texts_in_exif(tags, exif)
        _exif_bytes(tags, exif, gps, 1 << 24)  # a damaged value is found here, before the decode
    except Exception:  # the image is readable without its EXIF data
        tags, exif, gps, told = {}, {}, {}, {}
    texts = told | {
        name: str(text)
        for name, text in (getattr(image, "text", None) or {}).items()
        if name not in (KEYWORD, _XMP) and not name.startswith("Raw profile type")
    }
    comment = image.info.get("comment")
    xmp = image.info.get("xmp") or (getattr(image, "text", None) or {}).get(_XMP, b"")
    return Attributes(
        tags=tags, exif=exif, gps=gps, xmp=_upright(xmp), dpi=_resolution(image.info.get("dpi")), texts=texts,
        comment=_text(comment) if comment_text(comment) is None else "", icc_profile=icc_profile,
    )  # fmt: skip


def _texts_in_exif(tags: dict[int, Any], exif: dict[int, Any]) -> dict[str, str]:
    """Take what Automatic1111 and ComfyUI put into the EXIF data of JPEG and WebP files out of it, as texts."""
    texts = {}
    for name, tag in _COMFYUI.items():
        value = tags.get(tag)
        if isinstance(value, str) and value.startswith(f"{name}:"):
            texts[name] = tags.pop(tag).removeprefix(f"{name}:")
    comment = exif.get(_USER_COMMENT)
    comment = comment.encode("latin-1", errors="replace") if isinstance(comment, str) else comment
    if isinstance(comment, bytes):
        text = comment.removeprefix(_ASCII).decode("utf-8", errors="replace")
        if comment.startswith(_UNICODE):
            raw = comment.removeprefix(_UNICODE)
            little = raw[1::2].count(0) > raw[::2].count(0)  # the standard leaves the byte order to the file's
            text = raw.decode("utf-16-le" if little else "utf-16-be", errors="replace")
        if "Steps: " in text:
            texts["parameters"] = text.strip("\0")
            del exif[_USER_COMMENT]
    return texts


def comment_text(value: Any) -> str | None:
    """The metadata of this package in an EXIF comment; None if it holds something else."""
    if isinstance(value, str):
        value = value.encode("latin-1", errors="replace")
    if not isinstance(value, bytes):
        return None
    value = value.removeprefix(_ASCII)
    prefix = KEYWORD.encode() + b":"
    return value.removeprefix(prefix).rstrip(b"\0").decode("ascii", "replace") if value.startswith(prefix) else None


def metadata_in_exif(image: Image.Image) -> str | None:
    """The metadata of this package in the EXIF data, or a GIF's comment, of an open image."""
    exif = image.getexif().get_ifd(_EXIF_IFD)
    places = (exif.get(_USER_COMMENT), exif.get(_IMAGE_HISTORY), image.info.get("comment"))
    found = (comment_text(place) for place in places)
    return next((text for text in found if text is not None), None)


def png_texts(attributes: Attributes, metadata: str | None) -> dict[str, str]:
    """The text chunks of a PNG file."""
    texts = dict(attributes.texts)
    if attributes.comment:
        texts.setdefault("Comment", attributes.comment)
    if attributes.xmp:
        texts[_XMP] = attributes.xmp.decode("utf-8", errors="replace")
    # Keywords have 1 to 79 Latin-1 characters.
    texts = {name: text for name, text in texts.items() if 0 < len(name) < 80 and name.isascii()}
    return texts if metadata is None else {**texts, KEYWORD: metadata}


def _resolution(dpi: Any) -> tuple[float, float] | None:
    try:
        across, down = (float(value) for value in dpi)
    except (TypeError, ValueError, ZeroDivisionError):
        return None
    return (across, down) if 1 <= across <= 65535 and 1 <= down <= 65535 else None


def _upright(xmp: Any) -> bytes:
    data = xmp.encode("utf-8", errors="replace") if isinstance(xmp, str) else xmp
    if not isinstance(data, bytes):
        return b""
    data = re.sub(rb"(tiff:Orientation\s*=\s*[\"'])\d", rb"\g<1>1", data.rstrip(b"\0"))
    return re.sub(rb"(<tiff:Orientation>\s*)\d", rb"\g<1>1", data)


def _text(value: Any) -> str:
    if isinstance(value, bytes):
        value = value.decode("utf-8", errors="replace")
    return value.strip("\0") if isinstance(value, str) else ""
