# SPDX-License-Identifier: Apache-2.0
"""PSNR and SSIM."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from pidecode.errors import SizeError

WINDOW = 11
"""Side of the structural similarity's Gaussian window, in pixels."""
WINDOW_SIGMA = 1.5
"""Its standard deviation, in pixels."""


def _unit(image: Tensor, other: Tensor) -> tuple[Tensor, Tensor]:
    if image.shape != other.shape or image.ndim != 4:
        raise SizeError(f"Images of shapes {list(image.shape)} and {list(other.shape)}; give two of one [B,C,H,W].")
    return (image.double().clamp(-1, 1) + 1) / 2, (other.double().clamp(-1, 1) + 1) / 2


def psnr(image: Tensor, original: Tensor) -> Tensor:
    """Peak signal-to-noise ratio in dB, one value an image; [B,C,H,W] in [-1,1], all channels pooled."""
    a, b = _unit(image, original)
    return -10 * (a - b).square().mean((1, 2, 3)).clamp(min=1e-12).log10()


def ssim(image: Tensor, original: Tensor) -> Tensor:
    """Structural similarity, one value an image: Gaussian window 11 px wide, sigma 1.5, per channel, no padding.

    The constants are the customary 0.01 and 0.03 of the data range; [B,C,H,W] in [-1,1], sides at least 11.
    """
    a, b = _unit(image, original)
    if min(a.shape[-2:]) < WINDOW:
        raise SizeError(f"Structural similarity needs sides of at least {WINDOW} px; got {list(a.shape[-2:])}.")
    line = window_line(a.dtype, a.device)
    channels = a.shape[1]

    def blur(x: Tensor) -> Tensor:
        x = F.conv2d(x, line.view(1, 1, 1, -1).expand(channels, 1, 1, -1), groups=channels)
        return F.conv2d(x, line.view(1, 1, -1, 1).expand(channels, 1, -1, 1), groups=channels)

    return similarity(a, b, blur)


def window_line(dtype: torch.dtype, device: torch.device) -> Tensor:
    """The Gaussian window along one side, [WINDOW]; it sums to one."""
    offsets = torch.arange(WINDOW, dtype=dtype, device=device) - WINDOW // 2
    line = torch.exp(-(offsets**2) / (2 * WINDOW_SIGMA**2))
    return line / line.sum()


def similarity(a: Tensor, b: Tensor, blur: Callable[[Tensor], Tensor]) -> Tensor:
    """Structural similarity of images in [0,1], one value an image, by means that `blur` takes over windows.

    It has gradients; `ssim` is this in float64 with the customary window.
    """
    mean_a, mean_b = blur(a), blur(b)
    var_a, var_b = blur(a * a) - mean_a**2, blur(b * b) - mean_b**2
    covariance = blur(a * b) - mean_a * mean_b
    c1, c2 = 0.01**2, 0.03**2
    score = ((2 * mean_a * mean_b + c1) * (2 * covariance + c2)) / ((mean_a**2 + mean_b**2 + c1) * (var_a + var_b + c2))
    return score.mean((1, 2, 3))


def channel_error(image: Tensor, original: Tensor) -> Tensor:
    """Mean signed error per channel in 1/255 steps, [B,C]: what a color cast shows up as."""
    a, b = _unit(image, original)
    return 255 * (a - b).mean((2, 3))


def sharpness(image: Tensor) -> Tensor:
    """Mean gradient magnitude of the luma in 1/255 steps per pixel, one value an image; needs no original."""
    weights = torch.tensor([0.299, 0.587, 0.114], dtype=torch.float64, device=image.device).view(1, 3, 1, 1)
    luma = 255 * ((image.double().clamp(-1, 1) + 1) / 2 * weights).sum(1)
    across, down = luma[:, :-1, 1:] - luma[:, :-1, :-1], luma[:, 1:, :-1] - luma[:, :-1, :-1]
    return (across.square() + down.square()).sqrt().mean((1, 2))
