# SPDX-License-Identifier: Apache-2.0
"""Pictures as tensors in [-1, 1] and back, rounded and never truncated."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from pidecode.errors import ImageError, SettingError


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
