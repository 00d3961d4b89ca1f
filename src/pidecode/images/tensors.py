# SPDX-License-Identifier: Apache-2.0
"""Images as tensors: conversion, resize, pad, crop."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from torch.nn import functional

from pidecode.errors import ImageError, SettingError, SizeError


def to_tensor(image: Image.Image) -> Tensor:
    """An image to `[1, 3, H, W]`, float32, in [-1, 1]; anything but RGB is converted by Pillow first."""
    array = np.array(image.convert("RGB"), dtype=np.uint8)
    return torch.from_numpy(array).permute(2, 0, 1)[None].float().div_(127.5).sub_(1.0)


def to_array(image: Tensor, *, bits: int = 8) -> NDArray[Any]:
    """`[3, H, W]` or `[1, 3, H, W]` in [-1, 1] to `[H, W, 3]`, uint8 or (bits=16) uint16.

    Values are clamped and rounded to the nearest level: truncation would darken by half a level on average.
    Raises ImageError for NaN or infinite values or another shape, SettingError for other `bits`.
    """
    if bits not in (8, 16):
        raise SettingError(f"An image has 8 or 16 bits per channel; got bits={bits}.")
    image = check_image(image)
    if len(image) != 1:
        raise ImageError(f"One image is wanted; got a batch of {len(image)}. Take them one by one.")
    wide = image[0].detach().float()
    bad = int((~torch.isfinite(wide)).sum())
    if bad:
        raise ImageError(
            f"{bad} of {wide.numel()} values of the image are NaN or infinite: the network overflowed. "
            "Run it in float32 or bfloat16."
        )
    top = 2**bits - 1
    levels = wide.clamp(-1.0, 1.0).add_(1.0).mul_(top / 2).round_().clamp_(0, top)
    # torch knows little of uint16, so 16 bits take the way round.
    whole = levels.to(torch.uint8 if bits == 8 else torch.int32)
    array: NDArray[Any] = whole.permute(1, 2, 0).contiguous().cpu().numpy()
    return array if bits == 8 else array.astype(np.uint16)


def to_pil(image: Tensor) -> Image.Image:
    """`[3, H, W]` or `[1, 3, H, W]` in [-1, 1] to an 8-bit RGB image; see `to_array`."""
    return Image.fromarray(to_array(image))


def to_pils(images: Tensor) -> list[Image.Image]:
    """`[B, 3, H, W]` in [-1, 1] to a list of 8-bit RGB images."""
    return [to_pil(image) for image in check_image(images)]


def check_image(image: Tensor) -> Tensor:
    """The tensor as `[B, 3, H, W]`. Raises ImageError unless it is float, three- or four-dimensional, RGB."""
    if not image.is_floating_point():
        raise ImageError(f"An image tensor is float in [-1, 1]; got {image.dtype}. Use images.normalize_image().")
    batch = image[None] if image.ndim == 3 else image
    if batch.ndim != 4 or batch.shape[1] != 3 or not batch.numel():
        raise ImageError(f"An image tensor is [3, H, W] or [B, 3, H, W]; got {list(image.shape)}.")
    return batch


def normalize_image(image: Tensor) -> Tensor:
    """Guess the range of an image tensor of any origin and bring it to [-1, 1], float32.

    Whole numbers, and anything above 1, count as 0..255; else anything without negative values as 0..1; else it
    is left as it is. This is the reference's guess (its golden block `normalize_image`): a dark image in
    [-1, 1] without a negative value is misread by it, so our own functions never guess.
    """
    wide = image.float()
    if not image.is_floating_point() or bool(wide.max() > 1.0):
        return wide / 127.5 - 1.0
    return wide * 2.0 - 1.0 if bool(wide.min() >= 0.0) else wide


ResizeMethod = Literal["bicubic", "area", "lanczos"]


@dataclass(frozen=True, slots=True, kw_only=True)
class UnpaddedSize:
    """Size in pixels before padding at the lower and right edge."""

    height: int
    width: int


def center_crop(image: Tensor, multiple: int) -> Tensor:
    """The middle of `[B, 3, H, W]`, each side cut to a multiple. Raises SizeError if a side is shorter than one.

    An odd remainder loses the extra row or column at the lower or right edge.
    """
    height, width = _sides(image, multiple)
    if height < multiple or width < multiple:
        raise SizeError(
            f"An image of {height}x{width} pixels cannot be cropped to multiples of {multiple}; "
            f"enlarge or pad it to at least {multiple}x{multiple}."
        )
    top, left = height % multiple // 2, width % multiple // 2
    return image[..., top : top + height // multiple * multiple, left : left + width // multiple * multiple]


def pad_to_multiple(image: Tensor, multiple: int) -> tuple[Tensor, UnpaddedSize]:
    """`[B, 3, H, W]` grown at the lower and right edge to multiples, and what `crop_back` needs.

    The image is mirrored there; where it is too small for that, its edge is repeated.
    """
    height, width = _sides(image, multiple)
    padded = check_image(image)
    for axis, side in ((2, height), (3, width)):
        amount = -side % multiple
        if amount:
            pad = (0, 0, 0, amount) if axis == 2 else (0, amount, 0, 0)
            padded = functional.pad(padded, pad, mode="reflect" if amount < side else "replicate")
    return padded, UnpaddedSize(height=height, width=width)


def crop_back(image: Tensor, padding: UnpaddedSize, *, scale: int = 1) -> Tensor:
    """Undo `pad_to_multiple` on an image since enlarged `scale` times. Raises SizeError if it is too small."""
    height, width = padding.height * scale, padding.width * scale
    if image.shape[-2] < height or image.shape[-1] < width:
        raise SizeError(f"{image.shape[-2]}x{image.shape[-1]} pixels cannot be cropped back to {height}x{width}.")
    return image[..., :height, :width]


def resize(image: Tensor, height: int, width: int, *, method: ResizeMethod = "bicubic") -> Tensor:
    """`[B, 3, H, W]` resampled: antialiased bicubic, area means, or Lanczos. May overshoot [-1, 1] by a little."""
    if height < 1 or width < 1:
        raise SizeError(f"An image has positive sides; got {height}x{width}.")
    image = check_image(image)
    match method:
        case "bicubic":
            return functional.interpolate(
                image, size=(height, width), mode="bicubic", align_corners=False, antialias=True
            )
        case "area":
            return functional.interpolate(image, size=(height, width), mode="area")
        case "lanczos":
            return _lanczos(image, height, width)
    raise SettingError(f"Images are resized by bicubic, area or lanczos; not {method!r}.")


def downsample(image: Tensor, factor: int = 4) -> Tensor:
    """The low-quality image of training: `[B, 3, H, W]` to 1/factor of its sides, rounded down, clamped.

    Antialiased bicubic (docs/architecture.md, Training); agrees with the reference's golden block `downsample4`.
    """
    height, width = image.shape[-2] // factor, image.shape[-1] // factor
    return resize(image, height, width).clamp(-1.0, 1.0)


def lanczos(image: Tensor, scale: int) -> Tensor:
    """`[B, 3, H, W]` enlarged by Lanczos and clamped to [-1, 1]: the yardstick to compare with."""
    return resize(image, image.shape[-2] * scale, image.shape[-1] * scale, method="lanczos").clamp(-1.0, 1.0)


def _lanczos(image: Tensor, height: int, width: int) -> Tensor:
    planes = image.detach().float().cpu().flatten(0, 1).numpy()
    sized = [np.asarray(Image.fromarray(plane).resize((width, height), Image.Resampling.LANCZOS)) for plane in planes]
    out = torch.from_numpy(np.stack(sized)).view(len(image), -1, height, width)
    return out.to(device=image.device, dtype=image.dtype)


def _sides(image: Tensor, multiple: int) -> tuple[int, int]:
    if multiple < 1:
        raise SettingError(f"Sides are multiples of a positive number; got {multiple}.")
    batch = check_image(image)
    return batch.shape[2], batch.shape[3]
