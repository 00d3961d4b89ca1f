# SPDX-License-Identifier: Apache-2.0
"""Safe reading of image files: orientation, colors, transparency, 16 bits; damaged or huge files are refused."""

from __future__ import annotations

import io
import os
import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, BinaryIO, Union, cast

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageFile, UnidentifiedImageError
from torch import Tensor

from pidecode.errors import ImageError, PidecodeError, SettingError, naming
from pidecode.files import BASE64, why_no_file
from pidecode.images import tensors
from pidecode.images.attributes import Attributes, read_attributes
from pidecode.images.color import described_colors, is_srgb, profile_colors, srgb_profile, to_srgb_by_profile
from pidecode.units import MAX_PIXELS

FileSource = str | os.PathLike[str] | bytes | BinaryIO
"""A path, the bytes of a file, or an open file."""
ImageSource = Union[FileSource, Image.Image, NDArray[Any], Tensor, "SourceImage"]
"""A path, the bytes of a file, an open file, a Pillow image, a NumPy array (`[H, W]` to `[B, H, W, C]`), a tensor
(`[C, H, W]` or `[B, C, H, W]`), or what `read_image` returned. Floating-point values are in [-1, 1]."""

READS_FREE, BYTES_PER_READ = 50_000, 256  # reads of a file that Pillow may make, and one more for so many bytes of it
MAX_SCANS = 1000  # of a JPEG, each of which goes over all pixels; progressive ones have about ten

# Pixel formats only: no PostScript, no documents.
_FORMATS = ("PNG", "JPEG", "MPO", "WEBP", "TIFF", "BMP", "GIF", "PPM", "AVIF", "JPEG2000", "TGA")
_SIXTEEN_BIT = ("I;16", "I;16L", "I;16B", "I;16N")
_GRAY_MODES = ("1", "L", "LA", "La", "I", *_SIXTEEN_BIT)
_RAW_SUFFIXES = (
    ".dng", ".cr2", ".cr3", ".nef", ".arw", ".raf", ".orf", ".rw2", ".pef", ".srw", ".raw", ".nrw", ".3fr", ".iiq",
)  # fmt: skip
_RAW = ("a camera's raw file", "develop it to a 16-bit TIFF or PNG: `darktable-cli FILE photo.png`")
# What people have beside the formats read here: how their files begin, what they are, the step that helps.
_OTHER_FORMATS: tuple[tuple[int, tuple[bytes, ...], str, str], ...] = (
    (4, (b"ftypheic", b"ftypheix", b"ftyphevc", b"ftypheim", b"ftypmif1", b"ftypmsf1"), "HEIC",
     "convert it: `heif-convert FILE photo.png` (libheif), or install pillow-heif and give its image in Python"),
    (0, (b"\xff\x0a", b"\0\0\0\x0cJXL \r\n\x87\n"), "JPEG XL", "convert it: `djxl FILE photo.png` (libjxl)"),
    (4, (b"ftypcrx ",), *_RAW),
    (0, (b"FUJIFILMCCD-RAW", b"IIRO", b"IIRS", b"IIU\0", b"II*\0\x10\0\0\0CR"), *_RAW),
    (0, (b"%PDF",), "PDF", "make images of its pages: `pdftoppm -png -r 300 FILE page` (poppler)"),
    (0, (b"8BPS",), "a Photoshop document", "export it as PNG, or `magick 'FILE[0]' photo.png`"),
    (0, (b"v/1\x01", b"#?RADIANCE", b"#?RGBE"), "a high dynamic range image", "tone-map it and export it as PNG"),
    (4, (b"ftyp",), "a video", "make images of its frames: `ffmpeg -i FILE frame-%05d.png`"),
    (0, (b"\x1aE\xdf\xa3",), "a video", "make images of its frames: `ffmpeg -i FILE frame-%05d.png`"),
)  # fmt: skip
_HEAD_BYTES = 4096
_DNG_VERSION = 0xC612
_ORIENTATION, _TURNED = 0x0112, (5, 6, 7, 8)  # EXIF entry, and its values that swap width and height
_SUBFILE_TYPE = 0x00FE


@dataclass(frozen=True, slots=True, eq=False, repr=False, kw_only=True)
class SourceImage:
    """An image to upscale, with what its file carries beside the colors.

    Attributes:
        tensor: `[1, 3, H, W]` in [-1, 1], sRGB unless the profile was kept. Under transparent pixels lie the colors of
            their neighbors, so that no fringe appears when it is enlarged.
        alpha: Opacity `[1, 1, H, W]` in [0, 1]; None where the file has none.
        gray: Whether the file is gray; what is made of it is gray too.
        attributes: EXIF, texts, resolution and so on, carried over to what is made of it.
    """

    tensor: Tensor
    alpha: Tensor | None = None
    gray: bool = False
    attributes: Attributes = field(default_factory=Attributes)

    def __repr__(self) -> str:
        count, _, height, width = self.tensor.shape
        kind = ("gray" if self.gray else "RGB") + ("" if self.alpha is None else " with alpha")
        return f"SourceImage({count} of {width}x{height}, {kind})"

    def stripped(self) -> SourceImage:
        """The same image without attributes but the color profile, which its colors need."""
        return replace(self, attributes=Attributes(icc_profile=self.attributes.icc_profile))

    def applied_to(self, pixels: Tensor, cropped: int | None) -> tuple[Tensor, Tensor | None]:
        """Make the enlarged image `[B, 3, H, W]` gray if this one is, and enlarge the alpha to its size.

        Args:
            pixels: In [-1, 1].
            cropped: The multiple that the image was center-cropped to before, if it was.
        """
        if self.gray:
            luma = pixels.new_tensor([0.299, 0.587, 0.114]).view(1, 3, 1, 1)  # BT.601
            pixels = (pixels * luma).sum(dim=1, keepdim=True).expand(-1, 3, -1, -1)
        if self.alpha is None:
            return pixels, None
        alpha = self.alpha.expand(-1, 3, -1, -1)
        alpha = tensors.resize(alpha if cropped is None else tensors.center_crop(alpha, cropped), *pixels.shape[-2:])
        return pixels, alpha[:, :1].clamp(0.0, 1.0).to(pixels)

    def on_white(self) -> Tensor:
        """The tensor with transparency composited on white."""
        return self.tensor if self.alpha is None else self.tensor * self.alpha + (1.0 - self.alpha)


@dataclass(frozen=True, slots=True, kw_only=True)
class Frames:
    """The frames of an animation, or the pages of a document, in one file."""

    indices: tuple[int, ...]  # where the file has them
    sizes: tuple[tuple[int, int], ...]  # width and height of each, upright
    durations: tuple[int, ...] = ()  # milliseconds that each frame is shown; empty for pages
    loop: int = 1  # how often they are shown; 0 without end
    suffix: str = ".png"  # ending of a file of the same kind

    def __len__(self) -> int:
        return len(self.indices)


def load_image(source: ImageSource, *, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """Read an image as 8-bit RGB in sRGB, rotated by its EXIF orientation, transparency on white.

    Gray, palette, CMYK and 16-bit images are converted. An unreadable color profile or orientation is ignored.

    Args:
        source: One image of any kind of `ImageSource`.
        max_pixels: Largest number of pixels; checked in the header, before the image is decompressed.

    Returns:
        The image.

    Raises:
        ImageError: Not an image, truncated, too large, of several frames, or values of an unknown range.
    """
    if isinstance(source, (Tensor, np.ndarray, SourceImage)):
        return tensors.to_pil(read_image(source).on_white())
    with _opened(source) as (name, image):
        pixels = _pixels_of(image, name, max_pixels)
    colors = Image.fromarray(tensors.to_eight_bits(pixels.colors))
    if pixels.alpha is None:
        return colors
    colors.putalpha(Image.fromarray(tensors.to_eight_bits(pixels.alpha)))
    return Image.alpha_composite(Image.new("RGBA", colors.size, "white"), colors).convert("RGB")


def read_image(
    source: ImageSource,
    *,
    max_pixels: int = MAX_PIXELS,
    keep_profile: bool = False,
    value_range: tuple[float, float] | None = None,
    frame: int | None = None,
) -> SourceImage:
    """Read an image for `PixelDecoder.upscale` with its transparency, depth and attributes.

    Args:
        source: A path, the bytes of a file, an open file, a Pillow image, an array or a tensor.
        max_pixels: Largest number of pixels; checked in the header, before the image is decompressed.
        keep_profile: Keep the colors as they are and carry their ICC profile over, instead of converting to sRGB.
        value_range: What black and white are in an array or tensor of floating-point values. By default (-1, 1), but
            values that could as well be in [0, 1], none of them below -0.25, are then refused.
        frame: Which frame or page of a file that holds several, counted from 0.

    Returns:
        The image: values of 16 bits where the file has them.

    Raises:
        ImageError: As in `load_image`, or the values are in another range.
        SettingError: `value_range` cannot act on the source.
    """
    if isinstance(source, (Tensor, np.ndarray)):
        tensor, alpha, gray = tensors.image_from_values(source, value_range)
        return SourceImage(tensor=tensors.fill_transparent(tensor, alpha), alpha=alpha, gray=gray)
    if value_range is not None:
        raise SettingError(f"value_range acts on arrays and tensors; this is {type(source).__name__}. Leave it out.")
    if isinstance(source, SourceImage):
        return source
    with _opened(source) as (name, image):
        return _source_image(_pixels_of(image, name, max_pixels, keep_profile=keep_profile, frame=frame))


def read_frames(
    source: FileSource, *, max_pixels: int = MAX_PIXELS, keep_profile: bool = False
) -> Iterator[SourceImage]:
    """Read the frames of an animation or the pages of a TIFF file one after another, each as `read_image` does.

    Args:
        source: A path, the bytes of a file, or an open file.
        max_pixels: Largest number of pixels of all together.
        keep_profile: As in `read_image`.

    Yields:
        The images; the one image of a file that holds no more.

    Raises:
        ImageError: As in `read_image`, or all together have too many pixels.
    """
    frames = frames_in(source, max_pixels=max_pixels)
    with _opened(source) as (name, image):
        for index in frames.indices if frames else (_frame_indices(image)[0],):
            yield _source_image(_pixels_of(image, name, max_pixels, keep_profile=keep_profile, frame=index))


def _source_image(pixels: _Pixels) -> SourceImage:
    if pixels.colors.dtype == np.uint16:
        tensor = tensors.to_unit(pixels.colors).mul_(2.0).sub_(1.0)
    else:
        tensor = tensors.to_tensor(Image.fromarray(pixels.colors))
    alpha = None if pixels.alpha is None else tensors.to_unit(pixels.alpha[..., None])
    tensor = tensors.fill_transparent(tensor, alpha)
    return SourceImage(tensor=tensor, alpha=alpha, gray=pixels.gray, attributes=pixels.attributes)


def read_images(source: ImageSource | Sequence[ImageSource]) -> list[SourceImage]:
    """Read an image, or each of a list or tuple."""
    if not isinstance(source, (list, tuple)):
        return [read_image(cast(ImageSource, source))]
    images = []
    for index, one in enumerate(source):
        with naming(f"Element {index} of the list"):
            images.append(read_image(one))
            if len(images[-1].tensor) != 1:
                raise ImageError(f"It is a batch of {len(images[-1].tensor)} images; give these one by one.")
    return images


def image_size(source: FileSource, *, max_pixels: int = MAX_PIXELS, frame: int | None = None) -> tuple[int, int]:
    """Width and height of the upright image, by the header; nothing is decompressed. `frame` as in `read_image`.

    Raises:
        ImageError: Not an image, too large, or of several frames.
    """
    with _opened(source) as (name, image):
        _select(image, name, frame)
        _check_pixels(image, name, max_pixels)
        return _upright_size(image)


def _upright_size(image: Any) -> tuple[int, int]:
    width, height = image.size
    if _orientation(image) in _TURNED and (image.format != "TIFF" or image.tag_v2[256] == width):
        return height, width  # Pillow has turned the size of a TIFF already
    return width, height


def frames_in(source: FileSource, *, max_pixels: int = MAX_PIXELS) -> Frames | None:
    """The frames or pages of an image file; None if it holds one image.

    Previews and depth maps of an MPO file and reduced copies in a TIFF file do not count.

    Raises:
        ImageError: Not an image, a frame is damaged, or all together have more than `max_pixels`.
    """
    with _opened(source) as (name, image):
        indices = _frame_indices(image)
        if len(indices) == 1:
            return None
        pages, left = image.format == "TIFF", max_pixels
        sizes: list[tuple[int, int]] = []
        durations: list[int] = []
        for index in indices:
            if pages:  # they have sizes of their own; a frame is decoded by seeking it
                image.seek(index)
            left -= image.width * image.height * (1 if pages else len(indices) - len(sizes))
            if left < 0:
                raise ImageError(
                    f"{name} has {len(indices)} {'pages' if pages else 'frames'} of more than {max_pixels:,} pixels "
                    "together.", python="Split it, or raise max_pixels.", http="Split it.",
                )  # fmt: skip
            image.seek(index)
            sizes.append(_upright_size(image))
            if not pages:
                image.load()  # after which a WebP tells the duration
                left += image.width * image.height * (len(indices) - len(sizes))
                durations.append(round(image.info.get("duration", 0)))
        loop = image.info.get("loop", 1 if image.format == "GIF" else 0)
        suffix = {"GIF": ".gif", "WEBP": ".webp", "AVIF": ".webp"}.get(image.format or "", ".png")
    return Frames(indices=tuple(indices), sizes=tuple(sizes), durations=tuple(durations), loop=loop, suffix=suffix)


def load_tensor(source: ImageSource, *, max_pixels: int = MAX_PIXELS) -> Tensor:
    """Read an image as float32 `[B, 3, H, W]` in [-1, 1], transparency on white.

    Raises:
        ImageError: As in `read_image`.
    """
    return read_image(source, max_pixels=max_pixels).on_white()


@contextmanager
def _opened(source: Any) -> Iterator[tuple[str, Image.Image]]:
    """Name and image of a source; whatever goes wrong inside is an ImageError."""
    if isinstance(source, Image.Image):
        with as_image_error("The image"):  # its file may be read only now, and be damaged or closed
            yield "The image", source
        return
    name, data = open_source(source)
    with as_image_error(name), nullcontext() if data is source else data:
        refuse_other_formats(name, data)
        with warnings.catch_warnings():  # the limit of pixels is checked by this package
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            opened = open_image(BoundedFile(data))
        with opened as image:
            if image.format in ("JPEG", "MPO"):
                _refuse_many_scans(name, data)
            if image.format == "TIFF" and _DNG_VERSION in image.getexif():
                raise ImageError(_other_format(name, *_RAW))
            yield name, image


def _refuse_many_scans(name: str, file: BinaryIO) -> None:
    """A scan of a dozen bytes costs as much time as a whole one."""
    at = file.seek(0, os.SEEK_CUR)
    file.seek(0)
    scans = sum(part.count(b"\xff\xda") for part in iter(lambda: file.read(2**20), b""))
    file.seek(at)
    if scans > MAX_SCANS:
        raise ImageError(f"{name} consists of {scans:,} scans, and at most {MAX_SCANS:,} are read. Export it again.")


@contextmanager
def as_image_error(name: str) -> Iterator[None]:
    """Turn whatever goes wrong while `name` is read into an ImageError."""
    try:
        yield
    except (PidecodeError, MemoryError):
        raise
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise ImageError(f"{name} is too large to be read safely: {error}") from error
    except UnidentifiedImageError as error:
        raise ImageError(f"{name} is not an image of a known format ({', '.join(_FORMATS)}).") from error
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


def open_source(source: Any) -> tuple[str, BinaryIO]:
    """Name and open file of a path, the bytes of a file, or an open file, which is given back from its start."""
    if isinstance(source, (bytes, bytearray, memoryview)):
        return "The image", io.BytesIO(source)
    if hasattr(source, "read") and hasattr(source, "seek"):
        name = source.name if isinstance(getattr(source, "name", None), str) else "The image"
        try:
            source.seek(0)  # also where something has read or written it before
            if not isinstance(source.read(0), bytes):
                raise ImageError(f"{name} is open as text; open it in binary mode: open(path, 'rb').")
        except (OSError, ValueError) as error:  # a pipe or a socket; a closed file
            raise ImageError(f"{name} cannot be read from its start ({error}). Give its bytes: file.read().") from error
        return name, source
    if not isinstance(source, (str, os.PathLike)):
        raise ImageError(
            "An image is a path, the bytes of a file, an open file, a Pillow image, a NumPy array or a tensor; got "
            f"{type(source).__name__}."
        )
    try:
        if not os.path.isfile(source):  # a pipe would block forever
            name = os.fspath(source)
            shown = name if len(name) <= 200 else f"{name[:60]}..."
            raise ImageError(f"{shown or 'An empty name'} {why_no_file(name)}.")
        return os.fspath(source), open(source, "rb")
    except (OSError, ValueError) as error:
        raise ImageError(f"{os.fspath(source)!r} could not be opened: {error}.") from error


def refuse_other_formats(name: str, file: BinaryIO) -> None:
    """Name the formats that people have and this package does not read, with the step that helps."""
    head = file.read(_HEAD_BYTES)
    file.seek(0)
    if Path(name).suffix.lower() in _RAW_SUFFIXES:
        raise ImageError(_other_format(name, *_RAW))
    if head.startswith(b"\x89PNG"):
        return
    if not head:
        raise ImageError(f"{name} is empty: nothing was written into it. Download or export it again.")
    if head.startswith(b"version https://git-lfs"):
        raise ImageError(f"{name} is only a Git LFS pointer; get the image itself with `git lfs pull`.")
    if head.lstrip()[:14].lower().startswith((b"<!doctype html", b"<html")):
        raise ImageError(f"{name} is a web page, perhaps an error or a login; download the image itself.")
    text = head.lstrip(b"\xef\xbb\xbf \t\r\n\"'")
    if text.startswith((b"data:image/", *BASE64)):
        raise ImageError(
            f"{name} is base64 text, not the image itself; decode it first: `sed 's/^data:.*,//' FILE | base64 -d`."
        )
    if text.startswith(b"{"):
        raise ImageError(f"{name} is JSON text; give the image itself, as the bytes of its file.")
    for offset, magics, kind, step in _OTHER_FORMATS:
        if head[offset:].startswith(magics) and b"avif" not in head[8:32] and b"avis" not in head[8:32]:
            raise ImageError(_other_format(name, kind, step))
    if b"<svg" in head and head.lstrip(b"\xef\xbb\xbf \t\r\n").startswith(b"<"):
        raise ImageError(_other_format(name, "SVG", "render it at the size you need: `rsvg-convert -w 4096 FILE`"))


def _other_format(name: str, kind: str, step: str) -> str:
    return f"{name} is {kind}, which is not read here; {step}."


def open_image(file: BinaryIO | BoundedFile) -> Image.Image:
    """Open a file of one of `_FORMATS` that the installed Pillow supports."""
    for load in (Image.preinit, Image.init):  # PNG and JPEG need none of the other formats' modules, which take 30 ms
        load()
        with suppress(UnidentifiedImageError):
            return Image.open(cast(BinaryIO, file), formats=[name for name in _FORMATS if name in Image.OPEN])
    raise UnidentifiedImageError("none of the formats that Pillow knows")


def _check_pixels(image: Image.Image, name: str, max_pixels: int) -> None:
    width, height = image.size
    if width * height > max_pixels:
        raise ImageError(
            f"{name} has {width}x{height} = {width * height:,} pixels; the limit is {max_pixels:,}.",
            python=f"Make it smaller, or allow so many: max_pixels={width * height}.", http="Make it smaller.",
        )  # fmt: skip
    if not width * height:
        raise ImageError(f"{name} has no pixels: {width}x{height}.")


@dataclass(frozen=True, slots=True, eq=False)
class _Pixels:
    """Upright colors `[H, W, 3]` and alpha `[H, W]`, each uint8 or uint16."""

    colors: NDArray[Any]
    alpha: NDArray[Any] | None
    gray: bool
    attributes: Attributes


def _pixels_of(
    image: Image.Image, name: str, max_pixels: int, *, keep_profile: bool = False, frame: int | None = None
) -> _Pixels:
    _select(image, name, frame)
    _check_pixels(image, name, max_pixels)
    profile = image.info.get("icc_profile") or None
    profile = profile if isinstance(profile, bytes) else None
    keeps = keep_profile and profile is not None and image.mode not in ("CMYK", "YCbCr", "LAB")
    with naming(name):
        described = None if keeps else described_colors(image, _file_of(image))
    if described is not None:  # by coding points, which go before a profile
        profile = None
    deep = _read_16_bits(image)
    image.load()
    gray = image.mode in _GRAY_MODES
    if image.mode in ("P", "PA"):
        palette = np.array(image.getpalette("RGB") or [0, 0, 1]).reshape(-1, 3)
        gray = bool((palette == palette[:, :1]).all())
    colors, alpha = _split_alpha(image, name) if deep is None else deep
    if profile is not None and not keeps:
        found = profile_colors(profile)
        matches = found is not None and (found.matrix is None) == (colors.shape[2] == 1)
        if found is not None and (found.hdr or (colors.dtype != np.uint8 and matches)):
            described = found
        elif colors.dtype == np.uint8 or (found is None and colors.shape[2] == 3):  # tables take eight bits
            # The profile speaks of CMYK itself, else of the colors without alpha.
            own = image if image.mode == "CMYK" else tensors.array_to_pil(tensors.to_eight_bits(colors))
            colors = np.asarray(to_srgb_by_profile(own, profile).convert("RGB"))
    if described is not None:
        colors = described.to_srgb(colors)
        if described.hdr:
            warnings.warn(
                f"{name} has a high dynamic range ({described.hdr}); it was tone-mapped to sRGB.", stacklevel=2
            )
    carried: bytes | None = None
    if profile is not None and (keeps or not gray):
        carried = profile if keeps or (image.mode != "CMYK" and is_srgb(profile)) else srgb_profile()
    if frame is not None and colors.shape[2] == 3:
        gray = gray or not bool(np.ptp(colors, axis=2).any())  # Pillow makes RGB of all frames of a GIF but the first
    if colors.shape[2] == 1:
        colors = colors.repeat(3, axis=2)
    elif gray and not keeps:  # a profile may leave a rounding error between the channels
        colors = colors[..., 1:2].repeat(3, axis=2)
    attributes = read_attributes(image, carried)
    orientation = _orientation(image)
    turned = tensors.turn(colors, orientation)
    return _Pixels(turned, None if alpha is None else tensors.turn(alpha, orientation), gray, attributes)


def _file_of(image: Any) -> BinaryIO | None:
    """The open file of an image; None of a Pillow image that was loaded before, and its file closed."""
    try:
        image.fp.tell()
    except (AttributeError, ValueError, OSError):
        return None
    return cast(BinaryIO, image.fp)


def _frame_indices(image: Any) -> list[int]:
    """Where the frames or pages of an image are, but for what is only a preview of another."""
    count = getattr(image, "n_frames", 1) if image.format != "MPO" else 1
    indices = list(range(1 if count > 1 and getattr(image, "default_image", False) else 0, count))
    if image.format == "TIFF" and count > 1:
        now, every, indices = image.tell(), indices, []
        for index in every:
            image.seek(index)
            if not image.tag_v2.get(_SUBFILE_TYPE, 0) & 0b101:  # of lower resolution, or a transparency mask
                indices.append(index)
        image.seek(now)
    return indices or [0]


def _select(image: Image.Image, name: str, frame: int | None) -> None:
    """Seek a frame or page; without one the image must hold no more."""
    if frame is not None:
        if not 0 <= frame < getattr(image, "n_frames", 1):
            raise ImageError(f"{name} has {getattr(image, 'n_frames', 1)} frames or pages; there is no {frame}.")
        image.seek(frame)
        return
    indices = _frame_indices(image)
    if len(indices) > 1:
        what = "pages" if image.format == "TIFF" else "frames"
        raise ImageError(
            f"{name} has {len(indices)} {what}, and one image is taken here.",
            python="Give list(pidecode.images.read_frames(file)), or one: pidecode.read_image(file, frame=0).",
            cli=f"`pidecode upscale` and `pidecode batch` take all {what}; elsewhere give one as a file of its own.",
            http=f"Send one of the {what} as an image of its own.",
        )
    if indices[0]:
        image.seek(indices[0])


def _read_16_bits(image: Image.Image) -> tuple[NDArray[Any], NDArray[Any] | None] | None:
    """Colors and alpha of a PNG or TIFF with 16 bits for each of several channels; None for others.

    Pillow keeps the upper byte of these. Reading the file as if its bytes were in the other order gives the lower.
    """
    tiles = getattr(image, "tile", None)
    if image.format not in ("PNG", "TIFF") or not isinstance(image, ImageFile.ImageFile) or not tiles:
        return None
    raw = tiles[0].args if isinstance(tiles[0].args, str) else tiles[0].args[0]
    mode, _, order = str(raw).partition(";16")
    if mode not in ("RGB", "RGBA", "LA") or order not in ("B", "L", "N"):
        return None
    if mode == "LA":  # four bytes a pixel
        image._mode = "RGBA"
        image.tile = [_with_raw_mode(tile, "RGBA") for tile in tiles]
        pixels = np.asarray(image).astype(np.uint16)
        image._mode = "LA"
        colors = pixels[..., 0:1] << 8 | pixels[..., 1:2]
        return colors, pixels[..., 2] << 8 | pixels[..., 3]
    file = BoundedFile(cast(BinaryIO, image.fp))
    second = Image.open(cast(BinaryIO, file), formats=[image.format])  # never closed: the file is the first's
    assert isinstance(second, ImageFile.ImageFile)
    lower = {"B": "L", "L": "B", "N": "B" if sys.byteorder == "little" else "L"}[order]
    second.seek(image.tell())
    second.tile = [_with_raw_mode(tile, f"{mode};16{lower}") for tile in second.tile]
    low = np.asarray(second).astype(np.uint16)
    both = np.asarray(image).astype(np.uint16) << 8 | low
    clear = image.info.get("transparency")
    if mode == "RGB" and isinstance(clear, tuple):
        return both, np.where((both == np.array(clear)).all(axis=2), 0, 255).astype(np.uint8)
    return both[..., :3], both[..., 3] if mode == "RGBA" else None


def _with_raw_mode(tile: Any, raw: str) -> Any:
    args = raw if isinstance(tile.args, str) else (raw, *tile.args[1:])
    return tile._replace(args=args)


def _split_alpha(image: Image.Image, name: str) -> tuple[NDArray[Any], NDArray[Any] | None]:
    """Colors `[H, W, 1 or 3]` and alpha of a loaded image; CMYK is converted without its profile."""
    if image.mode in _SIXTEEN_BIT or image.mode == "I":
        values = np.asarray(image).astype(np.int64)
        if values.min() < 0 or values.max() > 65535:
            raise ImageError(f"{name} has 32-bit values whose range is unknown. Export it with 8 or 16 bits.")
        clear = image.info.get("transparency")
        alpha = np.where(values == clear, 0, 255).astype(np.uint8) if isinstance(clear, int) else None
        return values.astype(np.uint16)[..., None], alpha
    if image.mode == "F":
        raise ImageError(f"{name} has floating-point values whose range is unknown. Export it with 8 or 16 bits.")
    if image.has_transparency_data:
        rgba = np.asarray(image.convert("RGBA"))
        gray = image.mode in _GRAY_MODES
        return rgba[..., :1] if gray else rgba[..., :3], rgba[..., 3]
    if image.mode in ("1", "L"):
        return np.asarray(image.convert("L"))[..., None], None
    return np.asarray(image.convert("RGB")), None


def _orientation(image: Image.Image) -> int:
    try:
        return int(image.getexif().get(_ORIENTATION, 1))
    except Exception:  # the image is readable without its EXIF data
        return 1
