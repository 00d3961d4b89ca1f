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
    """A picture to `[1, 3, H, W]`, float32, in [-1, 1]; anything but RGB is converted by Pillow first."""
    array = np.array(image.convert("RGB"), dtype=np.uint8)
    return torch.from_numpy(array).permute(2, 0, 1)[None].float().div_(127.5).sub_(1.0)


def to_array(picture: Tensor, *, bits: int = 8) -> NDArray[Any]:
    """`[3, H, W]` or `[1, 3, H, W]` in [-1, 1] to `[H, W, 3]`, uint8 or (bits=16) uint16.

    Values are clamped and rounded to the nearest level: truncation would darken by half a level on average.
    Raises ImageError for NaN or infinite values or another shape, SettingError for other `bits`.
    """
    if bits not in (8, 16):
        raise SettingError(f"A picture has 8 or 16 bits per channel; got bits={bits}.")
    picture = check_picture(picture)
    if len(picture) != 1:
        raise ImageError(f"One picture is wanted; got a batch of {len(picture)}. Take them one by one.")
    wide = picture[0].detach().float()
    bad = int((~torch.isfinite(wide)).sum())
    if bad:
        raise ImageError(
            f"{bad} of {wide.numel()} values of the picture are NaN or infinite: the network overflowed. "
            "Run it in float32 or bfloat16."
        )
    top = 2**bits - 1
    levels = wide.clamp(-1.0, 1.0).add_(1.0).mul_(top / 2).round_().clamp_(0, top)
    # torch knows little of uint16, so 16 bits take the way round.
    whole = levels.to(torch.uint8 if bits == 8 else torch.int32)
    array: NDArray[Any] = whole.permute(1, 2, 0).contiguous().cpu().numpy()
    return array if bits == 8 else array.astype(np.uint16)


def to_pil(picture: Tensor) -> Image.Image:
    """`[3, H, W]` or `[1, 3, H, W]` in [-1, 1] to an 8-bit RGB picture; see `to_array`."""
    return Image.fromarray(to_array(picture))


def to_pils(pictures: Tensor) -> list[Image.Image]:
    """`[B, 3, H, W]` in [-1, 1] to a list of 8-bit RGB pictures."""
    return [to_pil(picture) for picture in check_picture(pictures)]


def check_picture(picture: Tensor) -> Tensor:
    """The tensor as `[B, 3, H, W]`. Raises ImageError unless it is float, three- or four-dimensional, RGB."""
    if not picture.is_floating_point():
        raise ImageError(f"A picture tensor is float in [-1, 1]; got {picture.dtype}. Use images.normalize_image().")
    batch = picture[None] if picture.ndim == 3 else picture
    if batch.ndim != 4 or batch.shape[1] != 3 or not batch.numel():
        raise ImageError(f"A picture tensor is [3, H, W] or [B, 3, H, W]; got {list(picture.shape)}.")
    return batch


def normalize_image(image: Tensor) -> Tensor:
    """Guess the range of a picture tensor of any origin and bring it to [-1, 1], float32.

    Whole numbers, and anything above 1, count as 0..255; else anything without negative values as 0..1; else it
    is left as it is. This is the reference's guess (its golden block `normalize_image`): a dark picture in
    [-1, 1] without a negative value is misread by it, so our own functions never guess.
    """
    wide = image.float()
    if not image.is_floating_point() or bool(wide.max() > 1.0):
        return wide / 127.5 - 1.0
    return wide * 2.0 - 1.0 if bool(wide.min() >= 0.0) else wide


Method = Literal["bicubic", "area", "lanczos"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Padding:
    """Size in pixels before padding at the lower and right edge."""

    height: int
    width: int


def center_crop(picture: Tensor, multiple: int) -> Tensor:
    """The middle of `[B, 3, H, W]`, each side cut to a multiple. Raises SizeError if a side is shorter than one.

    An odd remainder loses the extra row or column at the lower or right edge.
    """
    height, width = _sides(picture, multiple)
    if height < multiple or width < multiple:
        raise SizeError(
            f"A picture of {height}x{width} pixels cannot be cropped to multiples of {multiple}; "
            f"enlarge or pad it to at least {multiple}x{multiple}."
        )
    top, left = height % multiple // 2, width % multiple // 2
    return picture[..., top : top + height // multiple * multiple, left : left + width // multiple * multiple]


def pad_to_multiple(picture: Tensor, multiple: int) -> tuple[Tensor, Padding]:
    """`[B, 3, H, W]` grown at the lower and right edge to multiples, and what `crop_back` needs.

    The picture is mirrored there; where it is too small for that, its edge is repeated.
    """
    height, width = _sides(picture, multiple)
    padded = check_picture(picture)
    for axis, side in ((2, height), (3, width)):
        amount = -side % multiple
        if amount:
            pad = (0, 0, 0, amount) if axis == 2 else (0, amount, 0, 0)
            padded = functional.pad(padded, pad, mode="reflect" if amount < side else "replicate")
    return padded, Padding(height=height, width=width)


def crop_back(picture: Tensor, padding: Padding, *, scale: int = 1) -> Tensor:
    """Undo `pad_to_multiple` on a picture since enlarged `scale` times. Raises SizeError if it is too small."""
    height, width = padding.height * scale, padding.width * scale
    if picture.shape[-2] < height or picture.shape[-1] < width:
        raise SizeError(f"{picture.shape[-2]}x{picture.shape[-1]} pixels cannot be cropped back to {height}x{width}.")
    return picture[..., :height, :width]


def resize(picture: Tensor, height: int, width: int, *, method: Method = "bicubic") -> Tensor:
    """`[B, 3, H, W]` resampled: antialiased bicubic, area means, or Lanczos. May overshoot [-1, 1] by a little."""
    if height < 1 or width < 1:
        raise SizeError(f"A picture has positive sides; got {height}x{width}.")
    picture = check_picture(picture)
    match method:
        case "bicubic":
            return functional.interpolate(
                picture, size=(height, width), mode="bicubic", align_corners=False, antialias=True
            )
        case "area":
            return functional.interpolate(picture, size=(height, width), mode="area")
        case "lanczos":
            return _lanczos(picture, height, width)
    raise SettingError(f"Pictures are resized by bicubic, area or lanczos; not {method!r}.")


def downsample(picture: Tensor, factor: int = 4) -> Tensor:
    """The low-quality picture of training: `[B, 3, H, W]` to 1/factor of its sides, rounded down, clamped.

    Antialiased bicubic (SPEC.md section 7); agrees with the reference's golden block `downsample4`.
    """
    height, width = picture.shape[-2] // factor, picture.shape[-1] // factor
    return resize(picture, height, width).clamp(-1.0, 1.0)


def lanczos(picture: Tensor, scale: int) -> Tensor:
    """`[B, 3, H, W]` enlarged by Lanczos and clamped to [-1, 1]: the yardstick to compare with."""
    return resize(picture, picture.shape[-2] * scale, picture.shape[-1] * scale, method="lanczos").clamp(-1.0, 1.0)


def _lanczos(picture: Tensor, height: int, width: int) -> Tensor:
    planes = picture.detach().float().cpu().flatten(0, 1).numpy()
    sized = [np.asarray(Image.fromarray(plane).resize((width, height), Image.Resampling.LANCZOS)) for plane in planes]
    out = torch.from_numpy(np.stack(sized)).view(len(picture), -1, height, width)
    return out.to(device=picture.device, dtype=picture.dtype)


def _sides(picture: Tensor, multiple: int) -> tuple[int, int]:
    if multiple < 1:
        raise SettingError(f"Sides are multiples of a positive number; got {multiple}.")
    batch = check_picture(picture)
    return batch.shape[2], batch.shape[3]
