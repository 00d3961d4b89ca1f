# SPDX-License-Identifier: Apache-2.0
"""Sizes of picture tensors: cropping and padding to multiples, and resampling."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional

from pidecode.errors import SettingError, SizeError
from pidecode.images.tensors import check_picture

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
