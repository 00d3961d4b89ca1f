# SPDX-License-Identifier: Apache-2.0
"""Color fix: low-frequency and back-projection correction against a reference image.

PiD draws pixels anew, and over large areas its brightness and hue may drift by a level or a few. The reference is what
the space's own decoder makes of the same latent, or, when enlarging, the image itself. A small decoder also loses
detail that the image being enlarged still shows; it can be held as well.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor
from torch.nn import functional

from pidecode.errors import SettingError

Lock = Literal["off", "soft", "full", "detail"]
"""Nothing; wide areas' brightness and hue; the same down to a few pixels; all that the reference shows."""

LOCKS: tuple[Lock, ...] = get_args(Lock)
HOLDING = LOCKS[1:]
"""Those that need a reference."""


_FULL_SIGMA = 2.0
"""Width of the "full" lock's blur, in pixels of the reference: finer drift is left alone, as it may be detail."""
_SOFT_PART = 16
"""The "soft" lock blurs over this part of the reference's longer side: only wide drift goes."""
_NEIGHBOURHOOD = 1.0
"""Width of the area, in pixels of the reference, whose structure the "detail" lock compares."""
_BARELY_SEEN = 3e-4
"""Variance of images in [-1, 1], about two levels of 255, below which structure is too weak to compare."""


@dataclass(frozen=True, slots=True)
class Fidelity:
    """How near an image, reduced to its reference's size, stays to that reference.

    psnr: in decibels, over all channels; infinite for equal images.
    shift: mean difference of red, green and blue in levels of 255; positive where the image is brighter.
    """

    psnr: float
    shift: tuple[float, float, float]

    def __str__(self) -> str:
        red, green, blue = self.shift
        return f"PSNR {self.psnr:.2f} dB, mean shift R {red:+.2f} G {green:+.2f} B {blue:+.2f} of 255"


def apply_color_fix(images: Tensor, reference: Tensor, lock: str) -> Tensor:
    """Images `[B, 3, H, W]` with the low frequencies of `reference` `[B, 3, h, w]`, both in [-1, 1].

    lock: "off" changes nothing; "soft" corrects brightness and hue over areas of about a sixteenth of the image;
        "full" corrects them down to a few pixels of the reference, and detail finer than that is the image's own;
        "detail" takes all that the reference shows, and still finer detail is the image's own, the less of it the
        less the image tells of the reference's structure there.
    Raises SettingError for another lock or a reference that is not of the images' shape.
    """
    _check(images, reference, lock)
    if lock == "off":
        return images
    reference, size = reference.to(images), images.shape[-2:]
    reduced = _reduced(images, reference)
    if lock == "detail":
        fine = _enlarged_whole(reduced, size).neg_().add_(images)
        fine *= functional.interpolate(_told(reduced, reference), size=size, mode="bilinear")
        return fine.add_(_enlarged_whole(reference, size)).clamp_(-1, 1)
    sigma = _FULL_SIGMA if lock == "full" else max(reference.shape[-2:]) / _SOFT_PART
    drift = _blurred(reference - reduced, sigma)
    return functional.interpolate(drift, size=size, mode="bicubic").add_(images).clamp_(-1, 1)


def fidelity(images: Tensor, reference: Tensor) -> list[Fidelity]:
    """One report per image: `[B, 3, H, W]` against its smaller reference `[B, 3, h, w]`, both in [-1, 1]."""
    _check(images, reference, "off")
    difference = _reduced(images.float(), reference) - reference.to(images.device).float()
    errors = difference.square().mean(dim=(1, 2, 3)).tolist()
    shifts = (difference.mean(dim=(2, 3)) * 127.5).tolist()
    return [
        Fidelity(10 * math.log10(4 / error) if error > 0 else math.inf, (shift[0], shift[1], shift[2]))
        for error, shift in zip(errors, shifts, strict=True)
    ]


def _check(images: Tensor, reference: Tensor, lock: str) -> None:
    if lock not in LOCKS:
        raise SettingError(f"color_fix is {lock!r}; it must be one of {', '.join(LOCKS)}.")
    if reference.ndim != 4 or reference.shape[:2] != images.shape[:2]:
        raise SettingError(f"The reference must be [{len(images)}, 3, h, w] in [-1, 1]; got {list(reference.shape)}.")
    height, width = images.shape[-2:]
    small_height, small_width = reference.shape[-2:]
    if not 0.98 <= (height * small_width) / (width * small_height) <= 1.02 or small_height > height:
        raise SettingError(
            f"A reference of {small_width}x{small_height} is not a smaller version of a {width}x{height} image; give "
            "one of the same shape."
        )


def _enlarged_whole(small: Tensor, size: torch.Size) -> Tensor:
    """Enlarged so that, reduced again, it is very nearly `small`: what blurs on the way is added once more."""
    blurred = _reduced(functional.interpolate(small, size=size, mode="bicubic"), small)
    return functional.interpolate(2 * small - blurred, size=size, mode="bicubic")


def _told(reduced: Tensor, reference: Tensor) -> Tensor:
    """How far a reduced image tells the reference's structure around each pixel, `[B, 1, h, w]` from 0 to 1.

    It is the square of the share of local variance that it explains: where a decoder gets strokes or leaves wrong that
    the reference shows, what it paints between the pixels is no better. Drifting colors do not count.
    """

    def strength(image: Tensor) -> Tensor:
        structure = image - _blurred(image, _FULL_SIGMA)
        return _blurred(structure.square().mean(1, keepdim=True), _NEIGHBOURHOOD)

    missed = strength(reference - reduced) / (strength(reference) + _BARELY_SEEN)
    return (1 - missed).clamp_(0, 1).square_()


def _reduced(images: Tensor, reference: Tensor) -> Tensor:
    """Mean over the pixels that make one of the reference's."""
    return functional.interpolate(images, size=reference.shape[-2:], mode="area")


def _blurred(image: Tensor, sigma: float) -> Tensor:
    """Gaussian blur that repeats the border, so that edges are held as well as the middle."""
    radius = max(1, math.ceil(3 * sigma))
    offsets = torch.arange(-radius, radius + 1, dtype=image.dtype, device=image.device)
    kernel = torch.exp(-0.5 * (offsets / sigma) ** 2)
    kernel = (kernel / kernel.sum()).expand(image.shape[1], 1, 1, -1)
    image = functional.pad(image, (radius, radius, radius, radius), mode="replicate")
    image = functional.conv2d(image, kernel, groups=image.shape[1])
    return functional.conv2d(image, kernel.transpose(2, 3), groups=image.shape[1])
