# SPDX-License-Identifier: Apache-2.0
"""Writing image files with metadata in them, atomically, and reading the metadata back."""

from __future__ import annotations

import io
import json
import os
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, fields
from functools import cached_property
from itertools import chain
from pathlib import Path
from typing import Any, BinaryIO, Literal, cast

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, PngImagePlugin
from torch import Tensor

from pidecode.errors import ImageError, SettingError, SizeError
from pidecode.files import atomic_write, check_writable
from pidecode.images.attributes import KEYWORD, MAX_EXIF_BYTES, Attributes, metadata_in_exif, png_texts
from pidecode.images.png import SIGNATURE, encode_png, read_texts
from pidecode.images.read import BoundedFile, Frames, as_image_error, open_image, open_source
from pidecode.images.tensors import array_to_pil, to_array
from pidecode.strict_json import JSONError, parse_json

ATTRIBUTES = "pidecode_attributes"  # entry of a Pillow image's `info` with the attributes of the source it was made of

_LONGEST = {"JPEG": 65535, "WEBP": 16383, "GIF": 65535}
_FORMATS = {".png": "PNG", ".jpg": "JPEG", ".jpeg": "JPEG", ".webp": "WEBP"}
_ANIMATED = {".png": "PNG", ".apng": "PNG", ".webp": "WEBP", ".gif": "GIF"}
_MODES = {1: "L", 2: "LA", 3: "RGB", 4: "RGBA"}


@dataclass(frozen=True, eq=False, repr=False)
class DecodeOutput:
    """Decoded images with what they were made by.

    Attributes:
        tensors: `[3, H, W]` of each image, float32 in [-1, 1].
        metadata: One table per image, as it is written into files: model, options, size, versions.
        alphas: Opacity `[1, H, W]` in [0, 1] of each image, None where the source has no transparency; or nothing.
        gray: Whether each file is written gray, as its source was; or nothing.
        attributes: What each source carried (EXIF, texts, resolution), written beside the metadata; or nothing.
    """

    tensors: Sequence[Tensor]
    metadata: Sequence[dict[str, Any]]
    alphas: Sequence[Tensor | None] = ()
    gray: Sequence[bool] = ()
    attributes: Sequence[Attributes] = ()

    @staticmethod
    def cat(outputs: Sequence[DecodeOutput]) -> DecodeOutput:
        """The images of several outputs, each with what its source carried, or all without."""
        names = [entry.name for entry in fields(DecodeOutput)]
        return DecodeOutput(*(tuple(chain.from_iterable(getattr(one, name) for one in outputs)) for name in names))

    def __len__(self) -> int:
        return len(self.tensors)

    @property
    def num_pixels(self) -> int:
        """Of all images together."""
        return sum(tensor.shape[-1] * tensor.shape[-2] for tensor in self.tensors)

    def __repr__(self) -> str:
        sizes = ", ".join(f"{tensor.shape[-1]}x{tensor.shape[-2]}" for tensor in self.tensors)
        return f"DecodeOutput({len(self)} image{'s' * (len(self) != 1)}, {sizes})"

    @cached_property
    def tensor(self) -> Tensor:
        """All images, `[B, 3, H, W]`, float32 in [-1, 1]."""
        if len({tensor.shape for tensor in self.tensors}) != 1:
            raise SizeError("The images differ in size, so that one tensor cannot hold them; use .tensors.")
        return self.tensors[0][None] if len(self) == 1 else torch.stack(tuple(self.tensors))

    @cached_property
    def images(self) -> list[Image.Image]:
        """8-bit images, RGB, RGBA, L or LA; each carries its metadata in `.info["pidecode"]`."""
        images = [array_to_pil(self._array(index, 8)) for index in range(len(self))]
        for index, image in enumerate(images):
            image.info[KEYWORD] = self.metadata[index]
            if self.attributes:
                image.info[ATTRIBUTES] = self.attributes[index]
        return images

    def _array(self, index: int, bits: int) -> NDArray[Any]:
        """One image `[H, W, 1 to 4]`, uint8 or uint16."""
        array = to_array(self.tensors[index], bits=bits)
        array = array[..., 1:2] if self.gray and self.gray[index] else array
        alpha = self.alphas[index] if self.alphas else None
        if alpha is None:
            return array
        opacity = to_array(alpha.mul(2.0).sub(1.0).expand(3, -1, -1), bits=bits)
        return np.concatenate([array, opacity[..., :1]], axis=2)

    @property
    def image(self) -> Image.Image:
        """The one image."""
        if len(self) != 1:
            raise SettingError(f"There are {len(self)} images; use .images.")
        return self.images[0]

    def save(
        self,
        path: str | os.PathLike[str],
        *,
        overwrite: bool = False,
        bits: Literal[8, 16] = 8,
        quality: int | None = None,
        strip: bool = False,
    ) -> list[Path]:
        """Write the images, with their metadata, in the format of the path's ending.

        Args:
            path: Name of the file; several images are numbered: `a-1.png`, `a-2.png`.
            overwrite: Replace files that exist.
            bits: 16 for PNG with 16 bits a channel.
            quality: 1 to 100 for WebP and JPEG; WebP is lossless at 100.
            strip: Leave out what the source carried; the metadata and the color profile stay.

        Returns:
            The paths written.

        Raises:
            FileError: A file exists or cannot be written.
            SettingError: An option cannot act on the format.
            SizeError: The image is beyond the format's longest side.
        """
        attributes = self.attributes or [Attributes()] * len(self)
        if strip:
            attributes = [Attributes(icc_profile=one.icc_profile) for one in attributes]
        return [
            save_image(
                place, self._array(index, bits), metadata=self.metadata[index], overwrite=overwrite, bits=bits,
                quality=quality, attributes=attributes[index],
            )
            for index, place in enumerate(self.paths(path))
        ]  # fmt: skip

    def paths(self, path: str | os.PathLike[str]) -> list[Path]:
        """The files that `save` writes."""
        place = _as_path(path)
        if len(self) == 1:
            return [place]
        return [place.with_name(f"{place.stem}-{index}{place.suffix}") for index in range(1, len(self) + 1)]


def save_image(
    path: str | os.PathLike[str],
    image: Image.Image | Tensor | NDArray[Any],
    *,
    metadata: Mapping[str, Any] | None = None,
    overwrite: bool = False,
    bits: int = 8,
    quality: int | None = None,
    attributes: Attributes | None = None,
) -> Path:
    """Write an image as PNG, WebP or JPEG.

    Args:
        path: The file; its suffix chooses the format.
        image: Pillow image, a tensor `[3, H, W]` or `[1, 3, H, W]` in [-1, 1], or an array `[H, W, 1 to 4]` uint8 or
            uint16, whose second or fourth channel is alpha.
        metadata: JSON values that say how the image was made, kept in the file (PNG text "pidecode", else the EXIF user
            comment). Default: `image.info["pidecode"]` of a Pillow image made by a decoder.
        overwrite: Whether an existing file may be replaced.
        bits: 16 for PNG from a tensor or uint16 array.
        quality: 1 to 100 for WebP and JPEG, 95 if not given; WebP is lossless at 100.
        attributes: What else is written into the file; default that of a Pillow image made by a decoder.

    Returns:
        The path written.

    Raises:
        FileError: The file exists or cannot be written.
        SettingError: A setting cannot act.
        SizeError: A side is longer than the format allows.
        ImageError: The values are not an image.

    Warns:
        UserWarning: The format has no alpha, and transparency was composited on white.
    """
    kind = _format_of(path, _FORMATS, "images")
    target = check_writable(path, overwrite=overwrite)
    chunks = _encode(kind, image, metadata, bits, quality, attributes)
    first = next(chunks)  # settings and sizes are checked before the file is opened
    with atomic_write(target, overwrite=overwrite) as file:
        file.write(first)
        for chunk in chunks:
            file.write(chunk)
    return target


@dataclass(frozen=True, slots=True, eq=False)
class Animation:
    """Upscaled frames of an animation.

    Attributes:
        images: Of one size, as `DecodeOutput.images` has them; the first has the metadata and attributes of all.
        frames: The frames they were made of, for their durations.
    """

    images: Sequence[Image.Image]
    frames: Frames

    @property
    def num_pixels(self) -> int:
        """Of all images together."""
        return sum(image.width * image.height for image in self.images)

    def save(
        self, path: str | os.PathLike[str], *, overwrite: bool = False, bits: int = 8, quality: int | None = None
    ) -> list[Path]:
        """Write an animated PNG, WebP or GIF, which has 256 colors a frame; arguments are those of `DecodeOutput.save`.

        Raises:
            FileError: The file exists or cannot be written.
            SettingError: The format holds no animation, or `bits` or `quality` cannot act.
            SizeError: A side is longer than the format allows.
        """
        kind = animated_format(path)
        if bits != 8:
            raise SettingError(f"bits={bits}: animations have 8 bits a channel; leave it out.")
        if quality is not None and (kind != "WEBP" or not 1 <= quality <= 100):
            raise SettingError(f"quality={quality}: it acts on WebP, from 1 to 100, and {path} is {kind}.")
        check_format(path, *self.images[0].size)
        target = check_writable(path, overwrite=overwrite)
        attributes, metadata = self.images[0].info.get(ATTRIBUTES) or Attributes(), self.images[0].info.get(KEYWORD)
        text = _metadata_text(metadata)
        mode = "RGBA" if any(image.has_transparency_data for image in self.images) else "RGB"
        first, *others = (image.convert(mode) for image in self.images)
        options: dict[str, Any] = {"duration": list(self.frames.durations)}
        if kind != "GIF" or self.frames.loop != 1:  # without a number a GIF is shown once
            options["loop"] = self.frames.loop
        if kind == "GIF":
            comment = f"{KEYWORD}:{text}"[: MAX_EXIF_BYTES["JPEG"]] if text else attributes.comment
            options |= {"comment": comment, "disposal": 2}
        elif kind == "PNG":
            info = PngImagePlugin.PngInfo()
            for name, value in png_texts(attributes, text).items():
                info.add_itxt(name, value)
            options |= {"pnginfo": info, "exif": attributes.exif_block(None, kind)}
            options |= {"dpi": attributes.dpi} if attributes.dpi else {}
        else:
            options |= _webp_options(quality) | {"exif": _exif(attributes, text, kind)}
        if kind != "GIF" and attributes.icc_profile:
            options["icc_profile"] = attributes.icc_profile
        with atomic_write(target, overwrite=overwrite) as file:
            first.save(file, kind, save_all=True, append_images=others, **options)
        return [target]


def animated_format(path: str | os.PathLike[str]) -> str:
    """The format of an animation by its file's ending. Raises SettingError for one that holds none."""
    return _format_of(path, _ANIMATED, "animations")


def _format_of(path: str | os.PathLike[str], formats: Mapping[str, str], what: str) -> str:
    kind = formats.get(_as_path(path).suffix.lower())
    if kind is None:
        raise SettingError(f"{path}: {what} are written as {', '.join(formats)}; choose one of these endings.")
    return kind


def encode_image(image: Image.Image, kind: str = "png", *, quality: int | None = None) -> bytes:
    """The bytes of the file of that kind ("png", "webp" or "jpeg"); arguments and errors are those of `save_image`."""
    return b"".join(_encode(_format_of(f"image.{kind}", _FORMATS, "images"), image, quality=quality))


def _as_path(path: Any) -> Path:
    if not isinstance(path, (str, os.PathLike)):
        raise SettingError(
            f"An image is saved under a name; got {type(path).__name__}. The bytes of a file are given by "
            "pidecode.images.encode_image(output.image, 'png')."
        )
    return Path(path)


def check_format(path: str | os.PathLike[str], width: int, height: int) -> None:
    """Check, before an image is made, that the format of a file's ending holds its size in pixels."""
    name = os.fspath(path)
    suffix = name.lower() if name.startswith(".") else Path(name).suffix.lower()
    kind = {**_ANIMATED, **_FORMATS}.get(suffix, "")
    longest = _LONGEST.get(kind)
    if longest is not None and max(width, height) > longest:
        raise SizeError(
            f"{kind} holds sides up to {longest:,} pixels, and this image has {width}x{height}; write a .png file."
        )


def _encode(
    kind: str,
    image: Image.Image | Tensor | NDArray[Any],
    metadata: Mapping[str, Any] | None = None,
    bits: int = 8,
    quality: int | None = None,
    attributes: Attributes | None = None,
) -> Iterator[bytes]:
    """The chunks of an image file; every error is raised before the first chunk."""
    if quality is not None and (kind == "PNG" or not 1 <= quality <= 100):
        raise SettingError(f"quality={quality}: PNG is exact and takes none; WebP and JPEG take 1 to 100.")
    if bits != 8 and (kind != "PNG" or isinstance(image, Image.Image)):
        raise SettingError(f"bits={bits} needs a .png file and a tensor or array to write.")
    array = _as_array(image, bits)
    height, width, channels = array.shape
    check_format(f".{kind.lower()}", width, height)
    if isinstance(image, Image.Image):
        metadata = image.info.get(KEYWORD) if metadata is None else metadata
        attributes = image.info.get(ATTRIBUTES) if attributes is None else attributes
    attributes = attributes or Attributes()
    text = _metadata_text(metadata)
    if kind == "PNG":
        exif = attributes.exif_block(None, kind)
        texts = png_texts(attributes, text)
        yield from encode_png(array, texts, exif=exif, dpi=attributes.dpi, icc_profile=attributes.icc_profile)
        return
    if kind == "JPEG" and channels in (2, 4):
        array = _flattened(array)
    if kind == "WEBP" and channels < 3:  # it has no gray
        array = np.concatenate([array[..., :1].repeat(3, axis=2), array[..., 1:]], axis=2)
    buffer = io.BytesIO()
    extra: dict[str, Any] = {"icc_profile": attributes.icc_profile or b"", "exif": _exif(attributes, text, kind)}
    if kind == "WEBP":
        extra |= _webp_options(quality) | {"exact": quality == 100}  # the colors under transparency stay too
    else:
        extra |= {"quality": quality or 95} | ({"subsampling": 0} if channels > 2 else {})
        if attributes.dpi:
            extra["dpi"] = tuple(round(value) for value in attributes.dpi)
        comment = attributes.other_texts()
        if comment and len(comment.encode()) < MAX_EXIF_BYTES[kind]:
            extra["comment"] = comment
    if attributes.xmp and (kind == "WEBP" or len(attributes.xmp) < MAX_EXIF_BYTES[kind]):
        extra["xmp"] = attributes.xmp
    array_to_pil(array).save(buffer, kind, **extra)
    yield buffer.getvalue()


def _webp_options(quality: int | None) -> dict[str, Any]:
    lossless = quality == 100  # where quality is the effort
    return {"lossless": lossless, "quality": 50 if lossless else quality or 95, "method": 2}


def _flattened(array: NDArray[Any]) -> NDArray[Any]:
    """Composite `[H, W, 2 or 4]` on white, with a warning if that changes the image."""
    colors, alpha = array[..., :-1], array[..., -1:]
    if int(alpha.min()) == 255:
        return colors
    warnings.warn("JPEG has no transparency: it was composited on white. Write a .png or .webp file.", stacklevel=5)
    weight = alpha.astype(np.uint16)
    mixed: NDArray[Any] = ((colors * weight + 255 * (255 - weight) + 127) // 255).astype(np.uint8)
    return mixed


def read_metadata(path: str | os.PathLike[str] | bytes | BinaryIO) -> dict[str, Any] | None:
    """The metadata of an image file that `save_image` wrote, or None; the image itself is not decompressed.

    Args:
        path: The file, its bytes, or the open file.

    Raises:
        ImageError: The file is missing, not an image, or its metadata is damaged.
    """
    name, opened = open_source(path)
    with as_image_error(name), nullcontext() if opened is path else opened:
        file = cast(BinaryIO, BoundedFile(opened))
        if file.read(8) == SIGNATURE:
            text = read_texts(file).get(KEYWORD)
        else:
            file.seek(0)
            with open_image(file) as image:
                text = metadata_in_exif(image)
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
        mode = image.mode if image.mode in _MODES.values() else "RGBA" if image.has_transparency_data else "RGB"
        array = np.asarray(image.convert(mode))
        return array[..., None] if array.ndim == 2 else array
    wanted = np.uint8 if bits == 8 else np.uint16
    shaped = isinstance(image, np.ndarray) and image.ndim == 3 and image.shape[2] in _MODES
    if not isinstance(image, np.ndarray) or not shaped or image.dtype != wanted:
        what = f"{list(image.shape)} {image.dtype}" if isinstance(image, np.ndarray) else type(image).__name__
        raise ImageError(f"An image array of {bits} bits is [H, W, 1 to 4] {wanted.__name__}; got {what}.")
    if not image.size:
        raise ImageError("The image has no pixels.")
    return image


def _metadata_text(metadata: Mapping[str, Any] | None) -> str | None:
    """Metadata as JSON in ASCII, which fits into the fields of every format."""
    try:
        return None if metadata is None else json.dumps(dict(metadata), allow_nan=False)
    except (TypeError, ValueError) as error:
        raise SettingError(f"The metadata holds a value that JSON cannot represent: {error}.") from error


def _exif(attributes: Attributes, text: str | None, kind: str) -> bytes:
    """The EXIF block with what fits: the metadata always, then what the source carried, its texts last."""
    limit = MAX_EXIF_BYTES[kind]
    if text is not None and len(text) > limit:
        raise SettingError(f"The metadata has {len(text)} characters; {limit} fit. Write a .png file.")
    for what, carried in (("", attributes), ("texts", attributes), ("EXIF data", Attributes())):
        exif = carried.exif_block(text, kind, with_texts=not what)
        if len(exif) <= limit + 1000:
            break
    if what:
        warnings.warn(
            f"The {what} of the source do not fit into a {kind} file beside the metadata and were left out; a .png or "
            ".webp file holds them.", stacklevel=5,
        )  # fmt: skip
    return exif
