# SPDX-License-Identifier: Apache-2.0
"""Safe reading of image files: orientation, color profile, transparency; damaged or huge files are refused."""

from __future__ import annotations

import io
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from PIL import Image, ImageCms, ImageOps, UnidentifiedImageError
from torch import Tensor

from pidecode.errors import ImageError
from pidecode.images.tensors import check_image, to_pil, to_tensor

ImageSource = str | os.PathLike[str] | bytes | Image.Image | Tensor
"""A path, the bytes of a file, a Pillow image, or a tensor `[3, H, W]` or `[1, 3, H, W]` in [-1, 1]."""

MAX_PIXELS = 2**26  # largest image read unless the caller allows more: 67,108,864 pixels, 8192 x 8192
READS_FREE, BYTES_PER_READ = 50_000, 256  # reads of a file that Pillow may make, and one more for so many bytes of it

# Pixel formats only: no PostScript, no documents.
_FORMATS = ("PNG", "JPEG", "MPO", "WEBP", "TIFF", "BMP", "GIF", "PPM", "AVIF", "JPEG2000", "TGA")
_SIXTEEN_BIT = ("I;16", "I;16L", "I;16B", "I;16N")


def load_image(source: ImageSource, *, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """Read an image as 8-bit RGB in sRGB, rotated by its EXIF orientation, transparency on white.

    Gray, palette, CMYK and 16-bit images are converted; of an animation the first frame is read. An unreadable color
    profile or orientation is ignored.

    Args:
        source: A path, the bytes of a file, a Pillow image, or a tensor `[3, H, W]` in [-1, 1].
        max_pixels: Largest number of pixels; checked in the header, before the image is decompressed.

    Returns:
        The image.

    Raises:
        ImageError: Not an image, truncated, too large, or values of an unknown range.
    """
    if isinstance(source, Tensor):
        return to_pil(source)
    if isinstance(source, Image.Image):
        return _to_rgb(source, "The image", max_pixels)
    with _opened(source) as (name, image):
        return _to_rgb(image, name, max_pixels)


def image_size(source: str | os.PathLike[str] | bytes, *, max_pixels: int = MAX_PIXELS) -> tuple[int, int]:
    """Width and height as the header says, before any orientation is applied; nothing is decompressed.

    Raises:
        ImageError: Not an image, or too large.
    """
    with _opened(source) as (name, image):
        _check_pixels(image, name, max_pixels)
        return image.size


def load_tensor(source: ImageSource, *, max_pixels: int = MAX_PIXELS) -> Tensor:
    """Read an image, as `load_image` does, as float32 `[1, 3, H, W]` in [-1, 1]; a tensor is only checked and clamped.

    Raises:
        ImageError: As in `load_image`, or the tensor is not in [-1, 1].
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


@contextmanager
def _opened(source: str | os.PathLike[str] | bytes) -> Iterator[tuple[str, Image.Image]]:
    """Name and image of a source; whatever goes wrong inside is an ImageError."""
    name, data = _open(source)
    try:
        with data, Image.open(BoundedFile(data), formats=readable_formats()) as image:
            yield name, image
    except ImageError:
        raise
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise ImageError(f"{name} is too large to be read safely: {error}") from error
    except UnidentifiedImageError as error:
        raise ImageError(f"{name} is not an image of a known format ({', '.join(_FORMATS)}).") from error
    except MemoryError:
        raise
    except Exception as error:  # a malicious file can make a decoder raise any exception
        raise ImageError(f"{name} is damaged or truncated: {error}. Export it again.") from error


class BoundedFile:
    """A file that may be read only so often: one of millions of tiny chunks would take Pillow minutes."""

    def __init__(self, file: BinaryIO) -> None:
        self.file = file
        self.reads_left = READS_FREE + file.seek(0, os.SEEK_END) // BYTES_PER_READ
        file.seek(0)

    def read(self, *size: int) -> bytes:
        """Read as the file does."""
        self.reads_left -= 1
        if self.reads_left < 0:
            raise ImageError("The image consists of very many tiny pieces. Export it again.")
        return self.file.read(*size)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.file, name)


def _open(source: str | os.PathLike[str] | bytes) -> tuple[str, BinaryIO]:
    if isinstance(source, bytes):
        return "The image", io.BytesIO(source)
    if not isinstance(source, (str, os.PathLike)):
        raise ImageError(f"An image is a path, bytes, a Pillow image or a tensor; got {type(source).__name__}.")
    try:
        if not Path(source).is_file():  # a pipe would block forever
            kind = "is a folder" if Path(source).is_dir() else "is not a file"
            raise ImageError(f"{os.fspath(source)} {kind if Path(source).exists() else 'does not exist'}.")
        return os.fspath(source), open(source, "rb")
    except (OSError, ValueError) as error:
        raise ImageError(f"{os.fspath(source)!r} could not be opened: {error}.") from error


def readable_formats() -> list[str]:
    """The formats this package reads and the installed Pillow supports."""
    Image.init()
    return [name for name in _FORMATS if name in Image.OPEN]


def _check_pixels(image: Image.Image, name: str, max_pixels: int) -> None:
    width, height = image.size
    if width * height > max_pixels:
        raise ImageError(
            f"{name} has {width}x{height} = {width * height:,} pixels; the limit is {max_pixels:,}. "
            "Make it smaller, or raise max_pixels."
        )
    if not width * height:
        raise ImageError(f"{name} has no pixels: {width}x{height}.")


def _to_rgb(image: Image.Image, name: str, max_pixels: int) -> Image.Image:
    _check_pixels(image, name, max_pixels)
    profile = image.info.get("icc_profile")
    image = _apply_orientation(image)
    image = _to_8_bits(image, name)
    image = _flatten_transparency(image)
    if image.mode not in ("RGB", "L", "CMYK"):
        image = image.convert("RGB")
    return _to_srgb(image, profile).convert("RGB")


def _apply_orientation(image: Image.Image) -> Image.Image:
    image.load()
    try:
        return ImageOps.exif_transpose(image)
    except Exception:  # the image is readable without its EXIF data
        return image


def _to_8_bits(image: Image.Image, name: str) -> Image.Image:
    """16-bit gray to 8, each value to its nearest level."""
    if image.mode in _SIXTEEN_BIT or image.mode == "I":
        values = np.asarray(image).astype(np.int64)
        if values.min() < 0 or values.max() > 65535:
            raise ImageError(f"{name} has 32-bit values whose range is unknown. Export it with 8 or 16 bits.")
        return Image.fromarray(((values * 255 + 32767) // 65535).astype(np.uint8))
    if image.mode == "F":
        raise ImageError(f"{name} has floating-point values whose range is unknown. Export it with 8 or 16 bits.")
    return image


def _flatten_transparency(image: Image.Image) -> Image.Image:
    if not image.has_transparency_data:
        return image
    rgba = image.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba).convert("RGB")


def _to_srgb(image: Image.Image, profile: bytes | None) -> Image.Image:
    if not profile:
        return image
    try:
        source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        target = ImageCms.createProfile("sRGB")
        return ImageCms.profileToProfile(image, source, target, outputMode="RGB") or image
    except Exception:  # a damaged or wrong profile, or a Pillow without color management
        return image
