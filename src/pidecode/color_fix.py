# SPDX-License-Identifier: Apache-2.0
"""Color fix: low-frequency and back-projection correction against a reference image.

A diffusion decoder generates pixels, and over wide areas its brightness and hue may drift by a level or a few. The
reference is the VAE's decode of the same latent or, in `upscale`, the image itself. A feed-forward decoder also loses
detail that the image being enlarged still shows; "back-projection" restores it.
"""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from pidecode.errors import SettingError
from pidecode.options import COLOR_FIXES, ColorFix

DEFAULT_FIDELITY = 1.0
MAX_CHROMA_DRIFT = 20.0
"""Chroma drift, in levels of 255, from which users of tiled PiD call an image spoiled; 8 to 12 are usual."""
MAX_GREEN_DRIFT = 3.0  # likewise the mean shift of green, which a decoder outside of its trained sizes gets wrong first
_ADVICE = {
    "off": "color_fix auto corrects this.",
    "coarse": "This is after color_fix coarse; try fine.",
    "fine": "This is after color_fix fine; try back-projection.",
    "back-projection": "This is after color_fix back-projection; see whether the reference shows this image.",
}
"""What a warning advises, by the fix that has acted."""
_FINE_SIGMA = 2.0
"""Sigma of the blur of "fine", in pixels of the reference: finer drift is left alone, as it may be detail."""
_COARSE_SHARE = 16
"""Sigma of the blur of "coarse" is the reference's longer side over this: only drift over wide areas goes."""
_STRUCTURE_SIGMA = 1.0  # sigma of the window, in pixels of the reference, in which "back-projection" compares structure
_DOUBT = 0.75
"""How much structure found wrong lowers finer detail in "back-projection": at 1 it is softer, at 0 type gets ghosts."""
_STRIP = 1 << 18  # pixels of an image that "back-projection" corrects at once: they stay in a CPU's caches
_WEAK_VARIANCE = 3e-4
"""Variance of images in [-1, 1], about two levels of 255, below which structure is too weak to compare."""


@dataclass(frozen=True, slots=True)
class ColorDrift:
    """How far an image, reduced to its reference's size, lies from that reference."""

    psnr: float  # in decibels, over all channels; infinite for equal images
    shift: tuple[float, float, float]  # mean difference of red, green, blue in levels of 255; positive if brighter
    chroma: float  # mean distance of the color differences (Cb, Cr) over the reference's midtones, in levels of 255

    @property
    def is_large(self) -> bool:
        """Whether it is beyond what users accept: `MAX_CHROMA_DRIFT` or `MAX_GREEN_DRIFT`."""
        return self.chroma > MAX_CHROMA_DRIFT or abs(self.shift[1]) > MAX_GREEN_DRIFT

    def to_metadata(self) -> dict[str, float]:
        """The colors' part, for an image's metadata."""
        values = zip(("red", "green", "blue", "chroma"), (*self.shift, self.chroma), strict=True)
        return {name: round(value, 2) for name, value in values}

    def __str__(self) -> str:
        red, green, blue = self.shift
        shift = f"mean shift R {red:+.2f} G {green:+.2f} B {blue:+.2f}, chroma {self.chroma:.2f}"
        return f"PSNR {self.psnr:.2f} dB, {shift} of 255"


class ColorDriftWarning(UserWarning):
    """An image's colors are far from those of its reference."""


def apply_color_fix(
    images: Tensor, reference: Tensor, color_fix: ColorFix, fidelity: float = DEFAULT_FIDELITY
) -> Tensor:
    """Correct images by a smaller reference, in place: of a large image there is memory for few copies.

    Args:
        images: `[B, 3, H, W]` in [-1, 1].
        reference: `[B, 3, h, w]` in [-1, 1], of the same shape.
        color_fix: "off" changes nothing. "coarse" corrects brightness and hue over areas of about a sixteenth of the
            image. "fine" corrects them down to a few pixels of the reference, and detail finer than that is the
            image's own. "back-projection" takes all that the reference shows
            (https://doi.org/10.1016/1049-9652(91)90045-L); still finer detail is the image's own, weighted by how well
            the image agrees with the reference's structure there. "auto" is "coarse" for images whose drift is large
            (`ColorDrift.is_large`) and "off" for the others.
        fidelity: How much "back-projection" holds of the reference, from 1 (all that it shows) to 0 (its colors alone,
            as "fine" does; what the image shows instead of the reference's detail stays).

    Raises:
        SettingError: There is no such color fix, the reference is no smaller version of the images, or `fidelity` is
            out of range.
    """
    _check(images, reference, color_fix)
    if not 0 <= fidelity <= 1:
        raise SettingError(f"fidelity is {fidelity:g}; it must be from 0 to 1.")
    if color_fix == "auto":
        for index, drift in enumerate(color_drift(images, reference)):
            if drift.is_large:
                apply_color_fix(images[index : index + 1], reference[index : index + 1], "coarse", fidelity)
        return images
    if color_fix == "off":
        return images
    reference = reference.to(images)
    reduced = _reduced(images, reference)
    if color_fix == "back-projection":
        weight = _agreement(reduced, reference) ** fidelity
        if fidelity < 1:
            corrected = reduced + _blurred(reference - reduced, _FINE_SIGMA)
            reference = torch.lerp(corrected, reference, fidelity)
        return _back_projected(images, reduced, reference, weight)
    sigma = _FINE_SIGMA if color_fix == "fine" else max(reference.shape[-2:]) / _COARSE_SHARE
    difference = _blurred(reference - reduced, sigma)
    for channel in range(3):  # one at a time, to save memory
        part = difference[:, channel : channel + 1]
        part = functional.interpolate(part, size=images.shape[-2:], mode="bicubic")
        images[:, channel : channel + 1].add_(part).clamp_(-1, 1)
    return images


def color_drift(images: Tensor, reference: Tensor) -> list[ColorDrift]:
    """One report per image: `[B, 3, H, W]` against its smaller reference `[B, 3, h, w]`, both in [-1, 1]."""
    _check(images, reference, "off")
    difference = _reduced(images.float(), reference) - reference.to(images.device).float()
    errors = difference.square().mean(dim=(1, 2, 3)).tolist()
    difference, luma = difference * 127.5, _weighted(reference.to(images.device).float() * 127.5 + 127.5, _LUMA)
    shifts = difference.mean(dim=(2, 3)).tolist()
    distance = torch.hypot(_weighted(difference, _CB), _weighted(difference, _CR))
    midtones = (luma > 64) & (luma < 192)
    reports = []
    for error, (red, green, blue), one, mask in zip(errors, shifts, distance, midtones, strict=True):
        psnr = 10 * math.log10(4 / error) if error > 0 else math.inf
        reports.append(ColorDrift(psnr, (red, green, blue), float((one[mask] if mask.any() else one).mean())))
    return reports


_LUMA, _CB, _CR = (0.299, 0.587, 0.114), (-0.168736, -0.331264, 0.5), (0.5, -0.418688, -0.081312)  # BT.601


def _weighted(image: Tensor, weights: tuple[float, float, float]) -> Tensor:
    return sum((weight * image[:, channel] for channel, weight in enumerate(weights)), torch.zeros(()))


def corrected(
    images: Tensor, reference: Tensor, color_fix: ColorFix | None, fidelity: float | None, *, stacklevel: int = 2
) -> tuple[Tensor, list[dict[str, Any]]]:
    """Images corrected by their reference, and for the metadata of each which correction acted and what drift is left.

    The images are overwritten. Arguments and errors are those of `apply_color_fix`; None corrects nothing. Warns of a
    large drift that is left.
    """
    before = color_drift(images, reference) if color_fix == "auto" else []
    images = apply_color_fix(images, reference, color_fix or "off", DEFAULT_FIDELITY if fidelity is None else fidelity)
    described: list[dict[str, Any]] = []
    for index, drift in enumerate(color_drift(images, reference)):
        acted = ("coarse" if before[index].is_large else "off") if before else color_fix
        described.append({"color_drift": drift.to_metadata()} | ({"color_fix": acted} if acted else {}))
        if drift.is_large:
            message = (
                f"Colors drift from the reference's: chroma by {drift.chroma:.1f} (up to {MAX_CHROMA_DRIFT:g} is "
                f"usual), green by {drift.shift[1]:+.1f} (up to {MAX_GREEN_DRIFT:g}) levels of 255. "
                f"{_ADVICE[acted or 'off']}"
            )
            warnings.warn(message, ColorDriftWarning, stacklevel=stacklevel)
    return images, described


def _check(images: Tensor, reference: Tensor, color_fix: str) -> None:
    if color_fix not in COLOR_FIXES:
        raise SettingError(f"color_fix is {color_fix!r}; it must be one of {', '.join(COLOR_FIXES)}.")
    if reference.ndim != 4 or reference.shape[:2] != images.shape[:2]:
        raise SettingError(f"The reference must be [{len(images)}, 3, h, w] in [-1, 1]; got {list(reference.shape)}.")
    height, width = images.shape[-2:]
    small_height, small_width = reference.shape[-2:]
    if not 0.98 <= (height * small_width) / (width * small_height) <= 1.02 or small_height > height:
        raise SettingError(
            f"A reference of {small_width}x{small_height} is not a smaller version of a {width}x{height} image; give "
            "one of the same shape."
        )


def _back_projected(images: Tensor, reduced: Tensor, reference: Tensor, weight: Tensor) -> Tensor:
    """Images whose share that the reference shows is the reference's, with their own detail weighted; overwritten."""
    size = images.shape[-2:]
    old, new = (_before_upsampling(small, size) for small in (reduced, reference))
    height = reference.shape[2]
    rows = max(1, _STRIP * height // images[0, 0].numel()) if _whole_scale(reference, size) else height
    for begin in range(0, height, rows):
        end = min(begin + rows, height)
        strip = images[:, :, begin * size[0] // height : end * size[0] // height]
        strip -= _upsampled(old, size, begin, end)
        strip *= _upsampled(weight, size, begin, end, mode="bilinear")
        strip += _upsampled(new, size, begin, end)
        strip.clamp_(-1, 1)
    return images


def _before_upsampling(small: Tensor, size: torch.Size) -> Tensor:
    """What gives very nearly `small` if it is upsampled to `size` and reduced again: one back-projection ahead."""
    scale = _whole_scale(small, size)
    if not scale:
        return 2 * small - _reduced(functional.interpolate(small, size=size, mode="bicubic"), small)
    kernel = _phases(small, scale, "bicubic").mean(0)
    padded = functional.pad(small.flatten(0, 1)[:, None], (2, 2, 2, 2), mode="replicate")
    kernel = torch.outer(kernel, kernel)[None, None]
    # Plane by plane: a CPU's convolution pads one channel to sixteen.
    again = torch.cat([functional.conv2d(plane, kernel) for plane in padded.split(1)])
    return 2 * small - again.view_as(small)


def _upsampled(small: Tensor, size: torch.Size, begin: int, end: int, *, mode: str = "bicubic") -> Tensor:
    """What the rows of `small` from `begin` to `end` become where it is upsampled to `size`.

    At a whole scale an output pixel depends on 5x5 of the input, with the same weights in every cell, which is a
    convolution: torch's interpolation takes three times as long.
    """
    scale = _whole_scale(small, size)
    if not scale:
        return functional.interpolate(small, size=size, mode=mode)
    first, last = max(0, begin - 2), min(end + 2, small.shape[2])
    part = small[:, :, first:last].flatten(0, 1)[:, None]
    part = functional.pad(part, (2, 2, 2 - begin + first, 2 - last + end), mode="replicate")
    phases = _phases(small, scale, mode)
    kernel = (phases[:, None, :, None] * phases[None, :, None, :]).flatten(0, 1)[:, None]
    upsampled: Tensor = functional.pixel_shuffle(functional.conv2d(part, kernel), scale)
    return upsampled.unflatten(0, small.shape[:2]).flatten(1, 2)  # type: ignore[no-any-return]


def _phases(small: Tensor, scale: int, mode: str) -> Tensor:
    """Weights of torch's interpolation in one dimension: `[scale, 5]`, of the pixel itself and two on either side."""
    impulses = torch.eye(5, dtype=small.dtype, device=small.device)[None, None]
    return functional.interpolate(impulses, size=(5, 5 * scale), mode=mode)[0, 0, :, 2 * scale : 3 * scale].T


def _whole_scale(small: Tensor, size: torch.Size) -> int:
    """How many times larger `size` is along each side, or 0 where that is no whole number above 1."""
    height, width = small.shape[-2:]
    scale = size[0] // height
    return scale if scale > 1 and (height * scale, width * scale) == tuple(size) else 0


def _agreement(reduced: Tensor, reference: Tensor) -> Tensor:
    """How well a reduced image agrees with the reference's structure around each pixel, `[B, 1, h, w]` from 0 to 1.

    It falls with the share of local variance that it does not explain: where a decoder gets strokes or leaves wrong
    that the reference shows, its detail between the pixels is no better. Drifting colors do not count.
    """

    def variance(image: Tensor) -> Tensor:
        structure = image - _blurred(image, _FINE_SIGMA)
        return _blurred(structure.square().mean(1, keepdim=True), _STRUCTURE_SIGMA)

    unexplained = variance(reference - reduced) / (variance(reference) + _WEAK_VARIANCE)
    return (1 - _DOUBT * unexplained).clamp_(0, 1).square_()


def _reduced(images: Tensor, reference: Tensor) -> Tensor:
    """Mean over the pixels of each of the reference's."""
    return functional.interpolate(images, size=reference.shape[-2:], mode="area")


def _blurred(image: Tensor, sigma: float) -> Tensor:
    """Gaussian blur that repeats the border, so that edges are corrected as well as the middle."""
    radius = max(1, math.ceil(3 * sigma))
    offsets = torch.arange(-radius, radius + 1, dtype=image.dtype, device=image.device)
    kernel = torch.exp(-0.5 * (offsets / sigma) ** 2)
    kernel = (kernel / kernel.sum()).expand(image.shape[1], 1, 1, -1)
    image = functional.pad(image, (radius, radius, radius, radius), mode="replicate")
    image = functional.conv2d(image, kernel, groups=image.shape[1])
    return functional.conv2d(image, kernel.transpose(2, 3), groups=image.shape[1])
