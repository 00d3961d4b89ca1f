# SPDX-License-Identifier: Apache-2.0
"""Reading images that may be anything: upright, in sRGB, on white, and refused when broken or too large."""

from __future__ import annotations

import io
import os
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
from PIL import Image, ImageCms, ImageOps, UnidentifiedImageError
from torch import Tensor

from pidecode.errors import ImageError
from pidecode.images.tensors import check_image, to_pil, to_tensor

ImageSource = str | os.PathLike[str] | bytes | Image.Image | Tensor
"""A path, the bytes of a file, a Pillow image, or a tensor `[3, H, W]` or `[1, 3, H, W]` in [-1, 1]."""

MAX_PIXELS = 2**26
"""Largest image read unless the caller allows more: 67,108,864 pixels, 8192 x 8192."""

# Formats that hold pixels and nothing that runs: no PostScript, no documents.
_FORMATS = ("PNG", "JPEG", "MPO", "WEBP", "TIFF", "BMP", "GIF", "PPM", "AVIF", "JPEG2000", "TGA")
_SIXTEEN_BIT = ("I;16", "I;16L", "I;16B", "I;16N")


def load_image(source: ImageSource, *, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """An image as 8-bit RGB: upright by its EXIF orientation, in sRGB by its profile, transparency on white.

    Gray, palette, CMYK and 16-bit images are converted; of an animation the first frame is taken. An
    unreadable color profile or orientation is passed over.

    Raises ImageError for what is no image, is cut off, has more than `max_pixels` pixels (judged by its
    header, before it is unpacked), or has a range of values that cannot be known.
    """
    if isinstance(source, Tensor):
        return to_pil(source)
    if isinstance(source, Image.Image):
        return _tidy(source, "The image", max_pixels)
    name, data = _open(source)
    try:
        with data, Image.open(data, formats=readable_formats()) as image:
            return _tidy(image, name, max_pixels)
    except ImageError:
        raise
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise ImageError(f"{name} is too large to be read safely: {error}") from error
    except UnidentifiedImageError as error:
        raise ImageError(f"{name} is no image of a known kind ({', '.join(_FORMATS)}).") from error
    except Exception as error:  # a hostile file can make a decoder raise nearly anything
        raise ImageError(f"{name} is damaged or cut off: {error}. Export it anew.") from error


def load_tensor(source: ImageSource, *, max_pixels: int = MAX_PIXELS) -> Tensor:
    """An image as `[1, 3, H, W]` float32 in [-1, 1]; a tensor passes with its precision, clamped.

    Raises ImageError as `load_image` does.
    """
    if not isinstance(source, Tensor):
        return to_tensor(load_image(source, max_pixels=max_pixels))
    image = check_image(source).float()
    if not bool(torch.isfinite(image).all()):
        raise ImageError("The image tensor holds NaN or infinite values.")
    if float(image.abs().max()) > 1.5:
        raise ImageError(
            f"An image tensor lies in [-1, 1]; this one reaches {float(image.abs().max()):.4g}. "
            "If it is 0..255, use images.normalize_image()."
        )
    return image.clamp(-1.0, 1.0)


def _open(source: str | os.PathLike[str] | bytes) -> tuple[str, BinaryIO]:
    if isinstance(source, bytes):
        return "The image", io.BytesIO(source)
    if not isinstance(source, (str, os.PathLike)):
        raise ImageError(f"An image is a path, bytes, a Pillow image or a tensor; got {type(source).__name__}.")
    try:
        if not Path(source).is_file():  # a pipe would block for ever
            kind = "is a folder" if Path(source).is_dir() else "is not a file"
            raise ImageError(f"{os.fspath(source)} {kind if Path(source).exists() else 'does not exist'}.")
        return os.fspath(source), open(source, "rb")
    except (OSError, ValueError) as error:
        raise ImageError(f"{os.fspath(source)!r} could not be opened: {error}.") from error


def readable_formats() -> list[str]:
    """The formats this package reads, as far as the Pillow at hand knows them."""
    Image.init()
    return [name for name in _FORMATS if name in Image.OPEN]


def _tidy(image: Image.Image, name: str, max_pixels: int) -> Image.Image:
    width, height = image.size
    if width * height > max_pixels:
        raise ImageError(
            f"{name} has {width}x{height} = {width * height:,} pixels; the limit is {max_pixels:,}. "
            "Make it smaller, or raise max_pixels."
        )
    if not width * height:
        raise ImageError(f"{name} has no pixels: {width}x{height}.")
    profile = image.info.get("icc_profile")
    image = _upright(image)
    image = _eight_bits(image, name)
    image = _on_white(image)
    if image.mode not in ("RGB", "L", "CMYK"):
        image = image.convert("RGB")
    return _to_srgb(image, profile).convert("RGB")


def _upright(image: Image.Image) -> Image.Image:
    image.load()
    try:
        return ImageOps.exif_transpose(image)
    except Exception:  # broken EXIF must not cost the image
        return image


def _eight_bits(image: Image.Image, name: str) -> Image.Image:
    """16-bit gray to 8, each value to its nearest level."""
    if image.mode in _SIXTEEN_BIT or image.mode == "I":
        values = np.asarray(image).astype(np.int64)
        if values.min() < 0 or values.max() > 65535:
            raise ImageError(f"{name} has 32-bit values whose range is unknown. Export it with 8 or 16 bits.")
        return Image.fromarray(((values * 255 + 32767) // 65535).astype(np.uint8))
    if image.mode == "F":
        raise ImageError(f"{name} has floating-point values whose range is unknown. Export it with 8 or 16 bits.")
    return image


def _on_white(image: Image.Image) -> Image.Image:
    if not image.has_transparency_data:
        return image
    layered = image.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", layered.size, "white"), layered).convert("RGB")


def _to_srgb(image: Image.Image, profile: bytes | None) -> Image.Image:
    if not profile:
        return image
    try:
        source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        target = ImageCms.createProfile("sRGB")
        return ImageCms.profileToProfile(image, source, target, outputMode="RGB") or image
    except Exception:  # a broken or unfitting profile, or a Pillow without color management
        return image
