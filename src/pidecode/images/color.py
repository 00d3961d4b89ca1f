# SPDX-License-Identifier: Apache-2.0
"""Conversion of colors to sRGB: ICC profiles, coding points (cICP), PNG's gAMA and cHRM, EXIF's mark of Adobe RGB."""

from __future__ import annotations

import io
import struct
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageCms

from pidecode.errors import ImageError
from pidecode.images.png import read_chunk

Curve = Callable[[NDArray[Any]], NDArray[Any]]  # encoded values in [0, 1] to linear light

_ROWS = 256  # converted at a time, since linear light takes 12 bytes a pixel
_D65 = (0.3127, 0.3290)
_SRGB = (0.64, 0.33, 0.30, 0.60, 0.15, 0.06)
_ADOBE = (0.64, 0.33, 0.21, 0.71, 0.15, 0.06)
_P3 = (0.68, 0.32, 0.265, 0.69, 0.15, 0.06)
_BT2020 = (0.708, 0.292, 0.17, 0.797, 0.131, 0.046)
_SMPTE_C, _PAL = (0.63, 0.34, 0.31, 0.595, 0.155, 0.07), (0.64, 0.33, 0.29, 0.60, 0.15, 0.06)
# https://www.itu.int/rec/T-REC-H.273; 2 is unspecified
_CICP_PRIMARIES = {1: _SRGB, 2: _SRGB, 5: _PAL, 6: _SMPTE_C, 7: _SMPTE_C, 9: _BT2020, 12: _P3}
_HDR = {16: "PQ", 18: "HLG"}
_DIFFUSE_WHITE = 203.0  # cd/m² of white in high dynamic range, https://www.itu.int/pub/R-REP-BT.2408
_KNEE = 0.8  # light of an HDR image up to which it stays; what is brighter, up to the display's limit, is compressed
_D50_TO_D65 = np.array(
    [[0.9555766, -0.0230393, 0.0631636], [-0.0282895, 1.0099416, 0.0210077], [0.0122982, -0.0204830, 1.3299098]]
)  # Bradford


def _linear(values: NDArray[Any]) -> NDArray[Any]:
    return np.where(values <= 0.04045, values / 12.92, ((np.maximum(values, 0.0) + 0.055) / 1.055) ** 2.4)


def _bt709(values: NDArray[Any]) -> NDArray[Any]:
    return np.where(values < 0.081, values / 4.5, ((np.maximum(values, 0.0) + 0.099) / 1.099) ** (1 / 0.45))


def _power(exponent: float) -> Curve:
    return lambda values: np.maximum(values, 0.0) ** exponent


def _pq(values: NDArray[Any]) -> NDArray[Any]:
    """SMPTE ST 2084, relative to diffuse white."""
    root = np.maximum(values, 0.0) ** (32 / 2523)
    light = np.maximum(root - 107 / 128, 0.0) / (2413 / 128 - 2392 / 128 * root)
    nits: NDArray[Any] = 10_000 * light ** (8192 / 1305)
    return nits / _DIFFUSE_WHITE


def _hlg(values: NDArray[Any]) -> NDArray[Any]:
    """ITU-R BT.2100 on a display of 1,000 cd/m², its gamma per channel, relative to diffuse white."""
    a, b, c = 0.17883277, 0.28466892, 0.55991073
    scene = np.where(values <= 0.5, values**2 / 3, (np.exp((np.maximum(values, 0.5) - c) / a) + b) / 12)
    return 1000 / _DIFFUSE_WHITE * scene**1.2


_CICP_CURVES: dict[int, Curve] = {
    1: _bt709, 2: _linear, 4: _power(2.2), 5: _power(2.8), 6: _bt709, 8: _power(1.0), 13: _linear, 14: _bt709,
    15: _bt709, 16: _pq, 18: _hlg,
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class RGBColors:
    """How encoded values become linear sRGB light: a curve per channel, then a matrix (None for gray).

    `hdr` names the transfer of a high dynamic range, whose highlights are compressed to white.
    """

    curves: tuple[Curve, ...]
    matrix: NDArray[Any] | None
    hdr: str | None = None

    def to_srgb(self, array: NDArray[Any]) -> NDArray[Any]:
        """Convert `[H, W, 1 or 3]`, uint8 or uint16, to sRGB in the same format."""
        top = float(np.iinfo(array.dtype).max)
        levels = np.arange(int(top) + 1, dtype=np.float64) / top
        tables = [curve(levels).astype(np.float32) for curve in self.curves]
        out = np.empty_like(array)
        for start in range(0, len(array), _ROWS):
            rows = array[start : start + _ROWS]
            light = np.stack([tables[channel % len(tables)][rows[..., channel]] for channel in range(rows.shape[2])], 2)
            if self.matrix is not None and rows.shape[2] == 3:
                light = light @ self.matrix.T.astype(np.float32)
            if self.hdr:
                most = light.max(axis=2, keepdims=True)  # one factor for all channels keeps the hue
                over = np.maximum(most - _KNEE, 0.0) / (1 - _KNEE)
                kept = _KNEE + (1 - _KNEE) * over / (1 + over)
                light = np.where(most > _KNEE, light * (kept / np.maximum(most, _KNEE)), light)
            light = np.clip(light, 0.0, 1.0)
            encoded = np.where(light <= 0.0031308, light * 12.92, 1.055 * light ** np.float32(1 / 2.4) - 0.055)
            out[start : start + _ROWS] = np.rint(encoded * top).clip(0, top).astype(array.dtype)
        return out


def _primaries_to_xyz(primaries: tuple[float, ...], white: tuple[float, float] = _D65) -> NDArray[Any]:
    columns = np.array([[x / y, 1.0, (1 - x - y) / y] for x, y in zip(primaries[::2], primaries[1::2], strict=True)]).T
    white_xyz = np.array([white[0] / white[1], 1.0, (1 - white[0] - white[1]) / white[1]])
    scaled: NDArray[Any] = columns * np.linalg.solve(columns, white_xyz)
    return scaled


def _to_linear_srgb(primaries: tuple[float, ...], white: tuple[float, float] = _D65) -> NDArray[Any]:
    matrix: NDArray[Any] = np.linalg.inv(_primaries_to_xyz(_SRGB)) @ _primaries_to_xyz(primaries, white)
    return matrix


def described_colors(image: Image.Image, file: BinaryIO | None) -> RGBColors | None:
    """The colors that a file states by coding points, or without an ICC profile by other means; None for sRGB.

    Args:
        image: The open image.
        file: Its file, if there is one.

    Raises:
        ImageError: They are stated by coding points that are not known here.
    """
    if file is not None and image.format == "PNG":
        points = read_chunk(file, b"cICP")
        if points is not None and len(points) == 4:
            return _coded_colors(points[0], points[1], full=bool(points[3]))
    if file is not None and image.format == "AVIF":
        file.seek(0)
        _, found, points = file.read(4096).partition(b"colrnclx")
        if found and len(points) >= 4:
            return _coded_colors(points[1], points[3])
    info = image.info
    if info.get("icc_profile"):
        return None
    if image.format == "PNG" and "srgb" not in info and info.get("gamma"):
        gamma, chroma = float(info["gamma"]), info.get("chromaticity")
        standard = chroma is None or np.allclose(chroma, (*_D65, *_SRGB), atol=0.002)
        if abs(gamma - 0.45455) < 0.005 and standard:
            return None
        curve = _power(1 / gamma) if 0.1 <= gamma <= 10 else _linear
        if chroma is None or standard:
            return RGBColors((curve,), np.eye(3))
        try:
            scale = _to_linear_srgb(tuple(chroma[2:]), tuple(chroma[:2]))
            return RGBColors((curve,), scale / scale.sum(axis=1, keepdims=True))  # white stays white
        except (np.linalg.LinAlgError, ZeroDivisionError, ValueError):
            return None
    exif = image.getexif() if image.format in ("JPEG", "MPO") else Image.Exif()
    # DCF 2.0 marks Adobe RGB by "uncalibrated" and the interoperability index R03; some writers leave the index out.
    if exif and exif.get_ifd(0x8769).get(0xA001) == 0xFFFF:
        index = exif.get_ifd(0xA005).get(1)
        if index is None or str(index).startswith("R03"):
            return RGBColors((_power(563 / 256),), _to_linear_srgb(_ADOBE))
    return None


def _coded_colors(primaries: int, transfer: int, *, full: bool = True) -> RGBColors | None:
    """Colors by their coding points (ITU-T H.273); those not of the full range begin at 16 of 255 and end at 235."""
    if primaries in (1, 2) and transfer in (2, 13) and full:
        return None
    if primaries not in _CICP_PRIMARIES or transfer not in _CICP_CURVES:
        raise ImageError(
            f"The colors of the image are coded by primaries {primaries} and transfer {transfer} of ITU-T H.273, which "
            "are not read here; export it in sRGB."
        )
    curve = _CICP_CURVES[transfer]
    shown = curve if full else lambda values: curve(((values * 255 - 16) / 219).clip(0.0, 1.0))
    return RGBColors((shown,), _to_linear_srgb(_CICP_PRIMARIES[primaries]), _HDR.get(transfer))


def profile_colors(profile: bytes) -> RGBColors | None:
    """The curves and matrix of an ICC profile, or its coding points if these are of a high dynamic range.

    None for profiles with tables in place of them.
    """
    try:
        count = struct.unpack(">I", profile[128:132])[0]
        tags = {}
        for index in range(min(count, 64)):
            name, offset, size = struct.unpack(">4sII", profile[132 + 12 * index : 144 + 12 * index])
            tags[name] = profile[offset : offset + size]
        points = tags.get(b"cicp", b"")
        if len(points) >= 12 and points[9] in _HDR and points[8] in _CICP_PRIMARIES:
            return _coded_colors(points[8], points[9])
        if profile[16:20] == b"GRAY" and b"kTRC" in tags:
            return RGBColors((_icc_curve(tags[b"kTRC"]),), None)
        if profile[16:20] != b"RGB " or b"A2B0" in tags:
            return None
        columns = [np.array(struct.unpack(">3i", tags[name][8:20])) / 65536 for name in (b"rXYZ", b"gXYZ", b"bXYZ")]
        matrix = np.linalg.inv(_primaries_to_xyz(_SRGB)) @ _D50_TO_D65 @ np.array(columns).T
        curves = tuple(_icc_curve(tags[name]) for name in (b"rTRC", b"gTRC", b"bTRC"))
        return RGBColors(curves, matrix)
    except (KeyError, struct.error, ValueError, IndexError, ZeroDivisionError, np.linalg.LinAlgError):
        return None


def _icc_curve(tag: bytes) -> Curve:
    """A `curv` or `para` tag (ICC.1:2010, 10.5 and 10.15)."""
    if tag[:4] == b"curv":
        count = struct.unpack(">I", tag[8:12])[0]
        points = np.frombuffer(tag[12 : 12 + 2 * count], ">u2").astype(np.float64)
        if count == 0:
            return _power(1.0)
        if count == 1:
            return _power(float(points[0]) / 256)
        return lambda values: np.interp(values, np.linspace(0, 1, len(points)), points / 65535)
    if tag[:4] != b"para":
        raise ValueError("unknown curve")
    kind = struct.unpack(">H", tag[8:10])[0]
    length = (1, 3, 4, 5, 7)[kind]
    given = [value / 65536 for value in struct.unpack(f">{length}i", tag[12 : 12 + 4 * length])]
    g, a, b, c, d, e, f = {
        1: [*given, 1.0, 0.0, 0.0, -1.0, 0.0, 0.0],
        3: [*given, 0.0, -given[2] / given[1] if length == 3 else 0.0, 0.0, 0.0],
        4: [*given[:3], 0.0, -given[2] / given[1] if length == 4 else 0.0, given[-1], given[-1]],
        5: [*given, 0.0, 0.0],
        7: given,
    }[length]
    return lambda values: np.where(values >= d, np.maximum(a * values + b, 0.0) ** g + e, c * values + f)


def is_srgb(profile: bytes) -> bool:
    """Whether a profile is by its own description sRGB."""
    try:
        return "srgb" in ImageCms.getProfileDescription(ImageCms.ImageCmsProfile(io.BytesIO(profile))).lower()
    except (OSError, ImageCms.PyCMSError, ValueError, TypeError):
        return False


def srgb_profile() -> bytes:
    """An ICC profile of sRGB."""
    return ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()


def to_srgb_by_profile(image: Image.Image, profile: bytes) -> Image.Image:
    """Convert an 8-bit image by its ICC profile; a damaged or wrong profile is ignored."""
    try:
        source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        target = ImageCms.createProfile("sRGB")
        return ImageCms.profileToProfile(image, source, target, outputMode="RGB") or image
    except Exception:  # a damaged or wrong profile, or a Pillow without color management
        return image
