# SPDX-License-Identifier: Apache-2.0
"""Writing image files with metadata in them, atomically, and reading the metadata back."""

from __future__ import annotations

import io
import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, BinaryIO, Literal, cast

import numpy as np
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from pidecode.errors import ImageError, SettingError, SizeError
from pidecode.files import atomic_write, check_writable
from pidecode.images.png import SIGNATURE, encode_png, read_texts
from pidecode.images.read import BoundedFile, readable_formats
from pidecode.images.tensors import to_array, to_pils
from pidecode.strict_json import JSONError, parse_json

KEYWORD = "pidecode"
"""Keyword of the PNG text chunk with the metadata, and its prefix in the EXIF user comment of other files."""

_LONGEST = {"JPEG": 65535, "WEBP": 16383}
_FORMATS = {".png": "PNG", ".jpg": "JPEG", ".jpeg": "JPEG", ".webp": "WEBP"}
_MAX_EXIF_BYTES = 60_000  # an EXIF block must fit a JPEG segment of 64 KiB
_EXIF_IFD, _USER_COMMENT, _SOFTWARE = 0x8769, 0x9286, 0x0131
_ASCII = b"ASCII\0\0\0"


@dataclass(frozen=True)
class DecodeOutput:
    """Decoded images with what they were made by.

    Attributes:
        tensor: `[B, 3, H, W]`, float32 in [-1, 1].
        metadata: One table per image, as it is written into files: model, options, size, versions.
    """

    tensor: Tensor
    metadata: tuple[dict[str, Any], ...]

    @cached_property
    def images(self) -> list[Image.Image]:
        """8-bit RGB images; each carries its metadata in `.info["pidecode"]`."""
        images = to_pils(self.tensor)
        for image, metadata in zip(images, self.metadata, strict=True):
            image.info[KEYWORD] = metadata
        return images

    @property
    def image(self) -> Image.Image:
        """The one image.

        Raises:
            SettingError: The batch holds several.
        """
        if len(self.tensor) != 1:
            raise SettingError(f"There are {len(self.tensor)} images; use .images.")
        return self.images[0]

    def save(
        self,
        path: str | os.PathLike[str],
        *,
        overwrite: bool = False,
        bits: Literal[8, 16] = 8,
        quality: int | None = None,
    ) -> list[Path]:
        """Write the images, with their metadata, in the format of the path's ending.

        Args:
            path: Name of the file; several images are numbered: `a-1.png`, `a-2.png`.
            overwrite: Replace files that exist.
            bits: 16 for PNG with 16 bits a channel.
            quality: 1 to 100 for WebP and JPEG.

        Returns:
            The paths written.

        Raises:
            FileError: A file exists or cannot be written.
            SettingError: An option cannot act on the format.
            SizeError: The image is beyond the format's longest side.
        """
        return [
            save_image(place, pixels, metadata=metadata, overwrite=overwrite, bits=bits, quality=quality)
            for place, pixels, metadata in zip(self.paths(path), self.tensor, self.metadata, strict=True)
        ]

    def paths(self, path: str | os.PathLike[str]) -> list[Path]:
        """The files that `save` writes."""
        place = Path(path)
        if len(self.tensor) == 1:
            return [place]
        return [place.with_name(f"{place.stem}-{index}{place.suffix}") for index in range(1, len(self.tensor) + 1)]


def save_image(
    path: str | os.PathLike[str],
    image: Image.Image | Tensor | NDArray[Any],
    *,
    metadata: Mapping[str, Any] | None = None,
    overwrite: bool = False,
    bits: int = 8,
    quality: int | None = None,
) -> Path:
    """Write an image as PNG, WebP or JPEG.

    Args:
        path: The file; its suffix chooses the format.
        image: Pillow RGB, a tensor `[3, H, W]` or `[1, 3, H, W]` in [-1, 1], or an array `[H, W, 3]` uint8 or uint16.
        metadata: JSON values that say how the image was made, kept in the file (PNG text "pidecode", else the EXIF user
            comment). Default: `image.info["pidecode"]` of a Pillow image made by a decoder.
        overwrite: Whether an existing file may be replaced.
        bits: 16 for PNG from a tensor or uint16 array.
        quality: 1 to 100 for WebP and JPEG, 95 if not given.

    Returns:
        The path written.

    Raises:
        FileError: The file exists or cannot be written.
        SettingError: A setting cannot act.
        SizeError: A side is longer than the format allows.
        ImageError: The values are not an image.
    """
    kind = _FORMATS.get(Path(path).suffix.lower())
    if kind is None:
        raise SettingError(f"{path}: images are written as {', '.join(_FORMATS)}; choose one of these endings.")
    target = check_writable(path, overwrite=overwrite)
    chunks = _encode(kind, image, metadata, bits, quality)
    first = next(chunks)  # settings and sizes are checked before the file is opened
    with atomic_write(target, overwrite=overwrite) as file:
        file.write(first)
        for chunk in chunks:
            file.write(chunk)
    return target


def encode_image(
    image: Image.Image | Tensor | NDArray[Any],
    kind: str = "png",
    *,
    metadata: Mapping[str, Any] | None = None,
    bits: int = 8,
    quality: int | None = None,
) -> bytes:
    """The bytes of the file of that kind ("png", "webp" or "jpeg"); arguments and errors are those of `save_image`."""
    name = _FORMATS.get(f".{kind.lower()}")
    if name is None:
        raise SettingError(f"Images are written as png, webp or jpeg; not {kind!r}.")
    return b"".join(_encode(name, image, metadata, bits, quality))


def _encode(
    kind: str,
    image: Image.Image | Tensor | NDArray[Any],
    metadata: Mapping[str, Any] | None,
    bits: int,
    quality: int | None,
) -> Iterator[bytes]:
    """The chunks of an image file; every error is raised before the first chunk."""
    if quality is not None and (kind == "PNG" or not 1 <= quality <= 100):
        raise SettingError(f"quality={quality}: PNG is exact and takes none; WebP and JPEG take 1 to 100.")
    if bits != 8 and (kind != "PNG" or isinstance(image, Image.Image)):
        raise SettingError(f"bits={bits} needs a .png file and a tensor or array to write.")
    array = _as_array(image, bits)
    longest = _LONGEST.get(kind)
    if longest is not None and max(array.shape[:2]) > longest:
        raise SizeError(f"{kind} holds sides up to {longest} pixels; {max(array.shape[:2])} need a .png file.")
    if metadata is None and isinstance(image, Image.Image):
        metadata = image.info.get(KEYWORD)
    text = None if metadata is None else _metadata_text(metadata)
    if kind == "PNG":
        yield from encode_png(array, {} if text is None else {KEYWORD: text})
        return
    buffer = io.BytesIO()
    extra = {"subsampling": 0} if kind == "JPEG" else {"method": 2}
    exif = b"" if text is None else _exif(text)
    Image.fromarray(array).save(buffer, kind, quality=quality or 95, exif=exif, **extra)
    yield buffer.getvalue()


def read_metadata(path: str | os.PathLike[str] | bytes) -> dict[str, Any] | None:
    """Read the metadata of an image file that `save_image` wrote; the image itself is not decompressed.

    Args:
        path: The file, or its bytes.

    Returns:
        The metadata, or None if the file has none.

    Raises:
        ImageError: The file is missing, not an image, or its metadata is damaged.
    """
    if isinstance(path, bytes):
        return _read_metadata(io.BytesIO(path), "The image")
    try:
        if not Path(path).is_file():
            raise ImageError(f"There is no file {path}.")
        with open(path, "rb") as file:
            return _read_metadata(file, os.fspath(path))
    except (OSError, ValueError) as error:
        raise ImageError(f"{path!r} could not be opened: {error}.") from error


def _read_metadata(file: BinaryIO, name: str) -> dict[str, Any] | None:
    try:
        file = cast(BinaryIO, BoundedFile(file))
        is_png = file.read(8) == SIGNATURE
        file.seek(0)
        text = read_texts(file).get(KEYWORD) if is_png else _read_exif_comment(file)
    except ImageError:
        raise
    except UnidentifiedImageError as error:
        raise ImageError(f"{name} is not an image of a known format.") from error
    except Exception as error:  # a malicious file can make a decoder raise any exception
        raise ImageError(f"{name} is damaged or truncated: {error}.") from error
    if text is None:
        return None
    try:
        metadata = parse_json(text)
    except JSONError as error:
        raise ImageError(f"The metadata in {name} is damaged: {error}.") from None
    if not isinstance(metadata, dict):
        raise ImageError(f"The metadata in {name} is damaged: it is not a JSON object.")
    return metadata


def _as_array(image: Image.Image | Tensor | NDArray[Any], bits: int) -> NDArray[Any]:
    if isinstance(image, Tensor):
        return to_array(image, bits=bits)
    if isinstance(image, Image.Image):
        return np.asarray(image.convert("RGB"))
    wanted = np.uint8 if bits == 8 else np.uint16
    if not isinstance(image, np.ndarray) or image.ndim != 3 or image.shape[2] != 3 or image.dtype != wanted:
        what = f"{list(image.shape)} {image.dtype}" if isinstance(image, np.ndarray) else type(image).__name__
        raise ImageError(f"An image array of {bits} bits is [H, W, 3] {wanted.__name__}; got {what}.")
    if not image.size:
        raise ImageError("The image has no pixels.")
    return image


def _metadata_text(metadata: Mapping[str, Any]) -> str:
    try:
        # ASCII, which fits into the fields of every format.
        return json.dumps(dict(metadata), allow_nan=False)
    except (TypeError, ValueError) as error:
        raise SettingError(f"The metadata holds a value that JSON cannot represent: {error}.") from error


def _exif(text: str) -> bytes:
    if len(text) > _MAX_EXIF_BYTES:
        raise SettingError(f"The metadata has {len(text)} characters; {_MAX_EXIF_BYTES} fit. Write a .png file.")
    exif = Image.Exif()
    exif[_SOFTWARE] = KEYWORD
    exif.get_ifd(_EXIF_IFD)[_USER_COMMENT] = _ASCII + f"{KEYWORD}:{text}".encode("ascii")
    return exif.tobytes()


def _read_exif_comment(file: BinaryIO) -> str | None:
    with Image.open(file, formats=readable_formats()) as image:
        comment = image.getexif().get_ifd(_EXIF_IFD).get(_USER_COMMENT)
    if isinstance(comment, str):
        comment = comment.encode("latin-1", errors="replace")
    prefix = _ASCII + KEYWORD.encode() + b":"
    if not isinstance(comment, bytes) or not comment.startswith(prefix):
        return None
    return comment.removeprefix(prefix).rstrip(b"\0").decode("ascii", errors="replace")
