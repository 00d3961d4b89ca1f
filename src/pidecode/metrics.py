# SPDX-License-Identifier: Apache-2.0
"""Image metrics: PSNR, SSIM (https://doi.org/10.1109/TIP.2003.819861), color error, sharpness."""

from __future__ import annotations

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from pidecode.errors import SizeError

WINDOW = 11  # side of the Gaussian window of SSIM, in pixels


def _to_unit_range(image: Tensor, other: Tensor) -> tuple[Tensor, Tensor]:
    if image.shape != other.shape or image.ndim != 4:
        raise SizeError(f"Images of shapes {list(image.shape)} and {list(other.shape)}; give two of one [B,C,H,W].")
    return (image.double().clamp(-1, 1) + 1) / 2, (other.double().clamp(-1, 1) + 1) / 2


def psnr(image: Tensor, original: Tensor) -> Tensor:
    """Peak signal-to-noise ratio `[B]` in dB over all channels, of images `[B, C, H, W]` in [-1, 1]."""
    a, b = _to_unit_range(image, original)
    return -10 * (a - b).square().mean((1, 2, 3)).clamp(min=1e-12).log10()


def ssim(image: Tensor, original: Tensor) -> Tensor:
    """Structural similarity `[B]` of images `[B, C, H, W]` in [-1, 1], per channel and without padding.

    The window is a Gaussian of 11 pixels and sigma 1.5 (https://doi.org/10.1109/TIP.2003.819861).

    Raises:
        SizeError: The shapes differ, or a side is too short.
    """
    a, b = _to_unit_range(image, original)
    if min(a.shape[-2:]) < WINDOW:
        raise SizeError(f"Structural similarity needs sides of at least {WINDOW} px; got {list(a.shape[-2:])}.")
    offsets = torch.arange(WINDOW, dtype=a.dtype, device=a.device) - WINDOW // 2
    window = torch.exp(-(offsets**2) / (2 * 1.5**2))
    window, channels = window / window.sum(), a.shape[1]

    def blur(x: Tensor) -> Tensor:
        x = F.conv2d(x, window.view(1, 1, 1, -1).expand(channels, 1, 1, -1), groups=channels)
        return F.conv2d(x, window.view(1, 1, -1, 1).expand(channels, 1, -1, 1), groups=channels)

    mean_a, mean_b = blur(a), blur(b)
    var_a, var_b = blur(a * a) - mean_a**2, blur(b * b) - mean_b**2
    covariance = blur(a * b) - mean_a * mean_b
    c1, c2 = 0.01**2, 0.03**2
    score = ((2 * mean_a * mean_b + c1) * (2 * covariance + c2)) / ((mean_a**2 + mean_b**2 + c1) * (var_a + var_b + c2))
    return score.mean((1, 2, 3))


def channel_error(image: Tensor, original: Tensor) -> Tensor:
    """Mean signed error per channel in units of 1/255, `[B, C]`; shows a color cast."""
    a, b = _to_unit_range(image, original)
    return 255 * (a - b).mean((2, 3))


def sharpness(image: Tensor) -> Tensor:
    """Mean gradient magnitude of the luma in units of 1/255 per pixel, `[B]`."""
    weights = torch.tensor([0.299, 0.587, 0.114], dtype=torch.float64, device=image.device).view(1, 3, 1, 1)
    luma = 255 * ((image.double().clamp(-1, 1) + 1) / 2 * weights).sum(1)
    dx, dy = luma[:, :-1, 1:] - luma[:, :-1, :-1], luma[:, 1:, :-1] - luma[:, :-1, :-1]
    return (dx.square() + dy.square()).sqrt().mean((1, 2))
