# SPDX-License-Identifier: Apache-2.0
"""Images as tensors: conversion, resize, pad, crop."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from torch.nn import functional

from pidecode.errors import ImageError, SettingError, SizeError

_BAND = 1 << 18  # pixels that are converted at once: they stay in a CPU's caches


def to_tensor(image: Image.Image) -> Tensor:
    """Convert a Pillow image (converted to RGB first) to a tensor `[1, 3, H, W]`, float32 in [-1, 1]."""
    array = np.array(image.convert("RGB"), dtype=np.uint8)
    return torch.from_numpy(array).permute(2, 0, 1)[None].float().div_(127.5).sub_(1.0)


LABEL_HEIGHT = 48  # height in pixels of the strip of labels above a contact sheet


def contact_sheet(columns: Sequence[Sequence[Tensor]], labels: Sequence[str]) -> Tensor:
    """Columns of images `[3, H, W]` in [-1, 1] under their labels, as `[3, LABEL_HEIGHT + rows * H, columns * W]`."""
    from PIL import ImageDraw, ImageFont

    strips = []
    for images, label in zip(columns, labels, strict=True):
        strip = Image.new("RGB", (images[0].shape[-1], LABEL_HEIGHT), (24, 24, 24))
        font = ImageFont.load_default(LABEL_HEIGHT // 2)
        ImageDraw.Draw(strip).text((LABEL_HEIGHT // 4, LABEL_HEIGHT // 5), label, (255, 255, 255), font)
        strips.append(torch.cat([to_tensor(strip)[0].to(images[0]), *images], 1))
    return torch.cat(strips, 2)


def to_array(image: Tensor, *, bits: int = 8) -> NDArray[Any]:
    """Convert an image `[3, H, W]` or `[1, 3, H, W]` in [-1, 1] to an array `[H, W, 3]`, uint8 or uint16.

    Values are clamped and rounded to the nearest level; truncation would darken by half a level on average.

    Raises:
        ImageError: NaN or infinite values, or another shape.
        SettingError: Other `bits`.
    """
    if bits not in (8, 16):
        raise SettingError(f"An image has 8 or 16 bits per channel; got bits={bits}.")
    image = check_image(image)
    if len(image) != 1:
        raise ImageError(f"One image was expected; got a batch of {len(image)}. Take them one by one.")
    values = image[0].detach()
    if not is_finite(values):
        bad = int((~torch.isfinite(values)).sum())
        raise ImageError(
            f"{bad} of {values.numel()} values of the image are NaN or infinite: the network overflowed. "
            "Run it in float32 or bfloat16."
        )
    top, (height, width) = 2**bits - 1, values.shape[1:]
    array: NDArray[Any] = np.empty((height, width, 3), dtype=np.uint8 if bits == 8 else np.uint16)
    rows = max(1, _BAND // width)
    for begin in range(0, height, rows):
        levels = values[:, begin : begin + rows].float().clamp(-1.0, 1.0).add_(1.0).mul_(top / 2).round_()
        # torch has few operations on uint16, so 16 bits are converted by numpy.
        whole = levels.to(torch.uint8 if bits == 8 else torch.int32)
        array[begin : begin + rows] = whole.permute(1, 2, 0).cpu().numpy()
    return array


def is_finite(values: Tensor) -> bool:
    """Whether a tensor holds neither NaN nor infinite values; many times faster than `torch.isfinite` on a CPU."""
    low, high = torch.aminmax(values.detach())
    return bool(torch.isfinite(low) and torch.isfinite(high))


def array_to_pil(array: NDArray[Any]) -> Image.Image:
    """Convert `[H, W, 1 to 4]`, uint8, to an image of that many channels."""
    return Image.fromarray(array[..., 0] if array.shape[2] == 1 else array)


def to_pil(image: Tensor) -> Image.Image:
    """Convert `[3, H, W]` or `[1, 3, H, W]` in [-1, 1] to an 8-bit RGB image; raises as `to_array`."""
    return Image.fromarray(to_array(image))


def check_image(image: Tensor) -> Tensor:
    """A floating-point image tensor `[3, H, W]` or `[B, 3, H, W]` as `[B, 3, H, W]`."""
    if not image.is_floating_point():
        raise ImageError(f"An image tensor is float in [-1, 1]; got {image.dtype}. Convert it: x.float() / 127.5 - 1.")
    batch = image[None] if image.ndim == 3 else image
    if batch.ndim != 4 or batch.shape[1] != 3 or not batch.numel():
        raise ImageError(f"An image tensor is [3, H, W] or [B, 3, H, W]; got {list(image.shape)}.")
    return batch


def image_from_values(
    values: Tensor | NDArray[Any], value_range: tuple[float, float] | None = None
) -> tuple[Tensor, Tensor | None, bool]:
    """Colors `[B, 3, H, W]`, float32 in [-1, 1]; alpha `[B, 1, H, W]` in [0, 1] or None; whether the image is gray.

    The values are gray, gray and alpha, RGB or RGBA; uint8, uint16 or floating point; `value_range` is that of
    `read_image`.

    Raises:
        ImageError: Another type or shape, or values out of range, NaN or infinite.
        SettingError: `value_range` is no range, or the type has one of its own.
    """
    image = _channels_first(values)
    whole = {torch.uint8: 255.0, torch.uint16: 65535.0}.get(image.dtype)
    if not (whole or image.is_floating_point()):
        raise ImageError(
            f"{image.dtype} values of an image have no known range. Convert them to uint8 in 0 to 255, or to floats."
        )
    if value_range is not None and (whole or len(value_range) != 2 or not value_range[0] < value_range[1]):
        raise SettingError(
            f"value_range is {value_range}; it is black and white of floating-point values, such as (0, 1), and the "
            f"image is {image.dtype}."
        )
    low, high = (0.0, whole) if whole else value_range or (-1.0, 1.0)
    scaled = image.float() if (low, high) == (-1.0, 1.0) else (image.float() - low).div_((high - low) / 2).sub_(1.0)
    if not whole:
        _check_range(scaled, image, value_range)
    channels = scaled.shape[1]
    alpha = scaled[:, -1:].add(1.0).div_(2.0).clamp_(0.0, 1.0) if channels in (2, 4) else None
    colors = scaled[:, :1].expand(-1, 3, -1, -1) if channels < 3 else scaled[:, :3]
    return colors.clamp(-1.0, 1.0), alpha, channels < 3


def _channels_first(values: Tensor | NDArray[Any]) -> Tensor:
    """`[B, C, H, W]` of a tensor or an array."""
    tensor = isinstance(values, Tensor)
    if isinstance(values, Tensor):
        image = values.detach()
        image = image[None] if image.ndim == 3 else image
    else:
        try:
            image = torch.from_numpy(np.array(values, dtype=values.dtype.newbyteorder("="), order="C"))
        except TypeError as error:
            raise ImageError(f"An array of an image is uint8, uint16 or floating point; got {values.dtype}.") from error
        image = image[..., None] if image.ndim == 2 else image
        image = image[None] if image.ndim == 3 else image
        image = image.permute(0, 3, 1, 2) if image.ndim == 4 else image
    if image.ndim != 4 or image.shape[1] not in (1, 2, 3, 4) or not image.numel():
        shapes = "tensor of an image is [C, H, W] or [B, C, H, W]"
        shapes = shapes if tensor else "array of an image is [H, W], [H, W, C] or [B, H, W, C]"
        message = f"The {shapes} with 1 to 4 channels; got {list(values.shape)}."
        orders = {(True, 3): "permute(2, 0, 1)", (True, 4): "permute(0, 3, 1, 2)",
                  (False, 3): "transpose(1, 2, 0)", (False, 4): "transpose(0, 2, 3, 1)"}  # fmt: skip
        if values.ndim in (3, 4) and values.shape[-1 if tensor else -3] in (1, 3, 4):
            message += f" Move its channels: image.{orders[tensor, values.ndim]}."
        raise ImageError(message)
    return image


def _check_range(scaled: Tensor, image: Tensor, value_range: tuple[float, float] | None) -> None:
    """Check that values, scaled to [-1, 1], lie there, and that they are not those of another range."""
    lowest, highest = float(scaled.min()), float(scaled.max())
    if not math.isfinite(highest - lowest):
        raise ImageError("The image holds NaN or infinite values.")
    if max(-lowest, highest) > 1.5:  # resizing and editing overshoot a little
        problem = f"and {value_range or (-1, 1)} is black and white. Say what is"
    elif value_range is None and lowest >= -0.25:
        problem = "so they may be in [0, 1], and [-1, 1] is expected. Say which it is"
    else:
        return
    raise ImageError(
        f"The values of the image lie between {float(image.min()):.4g} and {float(image.max()):.4g}, {problem}: "
        "pidecode.read_image(image, value_range=(black, white))."
    )


def fill_transparent(image: Tensor, alpha: Tensor | None) -> Tensor:
    """Replace the colors of transparent pixels of `[1, 3, H, W]` by those of the nearest opaque ones, coarse to fine.

    What lies under full transparency is arbitrary (mostly black), and would leak into the edge when enlarged.
    """
    if alpha is None:
        return image
    weight = (alpha * 8.0).clamp(max=1.0)  # colors of nearly transparent pixels are badly rounded
    if bool((weight == 1.0).all()):
        return image
    if max(image.shape[-2:]) == 1 or not bool((weight > 0).any()):
        total = weight.sum(dim=(2, 3), keepdim=True)
        mean = (image * weight).sum(dim=(2, 3), keepdim=True) / total.clamp(min=1e-6)
        return image * weight + mean * (1.0 - weight)
    half = functional.avg_pool2d(weight, 2, ceil_mode=True)
    colors = functional.avg_pool2d(image * weight, 2, ceil_mode=True) / half.clamp(min=1e-6)
    coarse = fill_transparent(colors, half)
    wide = functional.interpolate(coarse, size=image.shape[-2:], mode="bilinear", align_corners=False)
    return image * weight + wide * (1.0 - weight)


def turn(array: NDArray[Any], orientation: int) -> NDArray[Any]:
    """Rotate and mirror `[H, W, ...]` as the EXIF orientation asks."""
    if orientation in (5, 6, 7, 8):
        array = array.swapaxes(0, 1)
    if orientation in (3, 4, 7, 8):
        array = array[::-1]
    if orientation in (2, 3, 6, 7):
        array = array[:, ::-1]
    return np.ascontiguousarray(array)


def to_eight_bits(array: NDArray[Any]) -> NDArray[Any]:
    """16 bits to 8, each value to its nearest level."""
    if array.dtype == np.uint8:
        return array
    return ((array.astype(np.uint32) * 255 + 32767) // 65535).astype(np.uint8)


def to_unit(array: NDArray[Any]) -> Tensor:
    """`[H, W, C]` to `[1, C, H, W]` in [0, 1]."""
    values = torch.from_numpy(array.astype(np.float32) / np.float32(np.iinfo(array.dtype).max))
    return values.permute(2, 0, 1)[None].contiguous()


def center_crop(image: Tensor, multiple: int) -> Tensor:
    """Center-crop the sides of an image `[B, 3, H, W]` to multiples, in pixels.

    Of an odd remainder the extra row or column is cut at the lower or right edge.

    Raises:
        SizeError: A side is shorter than `multiple`.
    """
    height, width = _sides(image, multiple)
    if height < multiple or width < multiple:
        raise SizeError(
            f"An image of {height}x{width} pixels cannot be cropped to multiples of {multiple}; "
            f"enlarge or pad it to at least {multiple}x{multiple}."
        )
    top, left = height % multiple // 2, width % multiple // 2
    return image[..., top : top + height // multiple * multiple, left : left + width // multiple * multiple]


def pad_to_multiple(image: Tensor, multiple: int) -> tuple[Tensor, tuple[int, int]]:
    """Pad an image `[B, 3, H, W]` at the lower and right edge to multiples; also returns its height and width before.

    Padded by reflection, or by its edge where it is too small for that.
    """
    padded, (height, width) = image, _sides(image, multiple)
    for axis, side in ((2, height), (3, width)):
        amount = -side % multiple
        if amount:
            pad = (0, 0, 0, amount) if axis == 2 else (0, amount, 0, 0)
            padded = functional.pad(padded, pad, mode="reflect" if amount < side else "replicate")
    return padded, (height, width)


def fit_to_encoder(image: Tensor, fit: str, multiple: int, fixed: int | None) -> tuple[Tensor, tuple[int, int] | None]:
    """An image `[B, 3, H, W]` at a size that an encoder takes, and its height and width before it was padded, if so.

    The encoder takes sides that are multiples of `multiple`, or squares of side `fixed` alone.

    Raises:
        SettingError: `fit` is neither.
        SizeError: The image is too small to be cropped.
    """
    if fit not in ("pad", "crop"):
        raise SettingError(f"fit is {fit!r}; it must be 'pad' or 'crop'.")
    if fixed is not None:
        return resize(image, fixed, fixed).clamp(-1, 1), None
    return (center_crop(image, multiple), None) if fit == "crop" else pad_to_multiple(image, multiple)


def crop_back(image: Tensor, unpadded: tuple[int, int], *, scale: int = 1) -> Tensor:
    """Crop an image `[B, 3, H, W]`, enlarged `scale` times since, to the height and width before `pad_to_multiple`."""
    height, width = (side * scale for side in unpadded)
    if image.shape[-2] < height or image.shape[-1] < width:
        raise SizeError(f"{image.shape[-2]}x{image.shape[-1]} pixels cannot be cropped back to {height}x{width}.")
    return image[..., :height, :width]


def resize(
    image: Tensor, height: int, width: int, *, method: Literal["bicubic", "area", "lanczos"] = "bicubic"
) -> Tensor:
    """Resize an image `[B, 3, H, W]`: antialiased bicubic, area average, or Lanczos.

    Bicubic and Lanczos may overshoot [-1, 1] slightly.

    Raises:
        SizeError: A side is not positive.
        SettingError: An unknown method.
    """
    if method not in ("bicubic", "area", "lanczos"):
        raise SettingError(f"Images are resized by bicubic, area or lanczos; not {method!r}.")
    if height < 1 or width < 1:
        raise SizeError(f"An image has positive sides; got {height}x{width}.")
    image = check_image(image)
    if method != "lanczos":
        return functional.interpolate(image, size=(height, width), mode=method, antialias=method == "bicubic")
    planes = image.detach().float().cpu().flatten(0, 1).numpy()
    sized = [np.asarray(Image.fromarray(plane).resize((width, height), Image.Resampling.LANCZOS)) for plane in planes]
    out = torch.from_numpy(np.stack(sized)).view(len(image), -1, height, width)
    return out.to(device=image.device, dtype=image.dtype)


def downsample(image: Tensor, factor: int = 4) -> Tensor:
    """The low-resolution image `[B, 3, H / factor, W / factor]` of training, in [-1, 1].

    Antialiased bicubic (docs/architecture.md, Training); sides are rounded down.
    """
    height, width = image.shape[-2] // factor, image.shape[-1] // factor
    return resize(image, height, width).clamp(-1.0, 1.0)


def downsampled(pixels: Tensor, size: tuple[int, int]) -> tuple[Tensor, dict[str, Any]]:
    """An image `[B, 3, H, W]` in [-1, 1] at a width and height no larger than its own, and what its metadata say."""
    own, described = (pixels.shape[-1], pixels.shape[-2]), {"width": size[0], "height": size[1]}
    if size == own:
        return pixels, described
    small = resize(pixels, size[1], size[0], method="lanczos").clamp(-1.0, 1.0)
    return small, described | {"downsampled_from": list(own)}


def _sides(image: Tensor, multiple: int) -> tuple[int, int]:
    if multiple < 1:
        raise SettingError(f"Sides are multiples of a positive number; got {multiple}.")
    batch = check_image(image)
    return batch.shape[2], batch.shape[3]
