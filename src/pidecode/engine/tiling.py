# SPDX-License-Identifier: Apache-2.0
"""Overlapping windows blended at every step (MultiDiffusion), for images beyond the trained size or memory.

All windows denoise one shared noisy canvas; their predictions are blended before the sampler moves on, so they cannot
drift apart and leave seams. Latent tokens are computed once for the whole image, and every window sees the positions
it has in the whole. Only attention ends at a window's edge.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from pidecode.errors import SettingError
from pidecode.models.pid.network import Condition, PiDNet

Span = tuple[int, int]
"""First patch and one past the last, along one axis."""


@dataclass(frozen=True, slots=True)
class Windows:
    """How an image is cut: sides in patches. `side` may exceed the image, which then is one window."""

    side: int = 128
    overlap: int = 32
    """Least overlap of neighbors; they are spread evenly, so it may be more."""

    def __post_init__(self) -> None:
        if self.side < 1 or not 0 <= self.overlap < self.side:
            raise SettingError(
                f"Windows of {self.side} patches with an overlap of {self.overlap} cannot advance; "
                "the overlap must be at least 0 and less than the side."
            )

    @classmethod
    def of_pixels(cls, window: int, patch_size: int) -> Windows:
        """Square windows of about `window` pixels a side, a quarter of it shared with each neighbor."""
        side = max(1, window // patch_size)
        return cls(side, side // 4)

    def spans(self, length: int) -> list[Span]:
        """Windows along an axis of `length` patches."""
        if self.side >= length:
            return [(0, length)]
        steps = -(-(length - self.side) // (self.side - self.overlap))
        starts = [round(index * (length - self.side) / steps) for index in range(steps + 1)]
        return [(start, start + self.side) for start in starts]

    def count(self, grid: tuple[int, int]) -> int:
        """Windows of a whole image."""
        return len(self.spans(grid[0])) * len(self.spans(grid[1]))


def blend(spans: list[Span], patch: int, device: torch.device) -> list[Tensor]:
    """Weights of each window's pixels along one axis: ramps where windows overlap, and 1 in sum everywhere."""
    length = spans[-1][1] * patch
    weights = []
    for start, stop in spans:
        distance = torch.arange(0.5, (stop - start) * patch, device=device)
        weights.append(torch.minimum(distance, distance.flip(0)))
    total = torch.zeros(length, device=device)
    for (start, stop), weight in zip(spans, weights, strict=True):
        total[start * patch : stop * patch] += weight
    return [weight / total[start * patch : stop * patch] for (start, stop), weight in zip(spans, weights, strict=True)]


@torch.no_grad()
def denoise_windows(net: PiDNet, x_B3HW: Tensor, t_B: Tensor, condition: Condition, windows: Windows) -> Tensor:
    """`PiDNet.denoise` window by window, blended; the same where one window covers the image."""
    patch, device = net.config.patch_size, x_B3HW.device
    rows, columns = (windows.spans(length) for length in condition.grid)
    if len(rows) == len(columns) == 1:
        return net.denoise(x_B3HW, t_B, condition)
    down, across = blend(rows, patch, device), blend(columns, patch, device)
    fused = torch.zeros_like(x_B3HW, dtype=torch.float32)
    for (top, bottom), weight_H in zip(rows, down, strict=True):
        for (left, right), weight_W in zip(columns, across, strict=True):
            window = (..., slice(top * patch, bottom * patch), slice(left * patch, right * patch))
            part = condition.window(slice(top, bottom), slice(left, right))
            prediction = net.denoise(x_B3HW[window].contiguous(), t_B, part)
            fused[window] += prediction.mul_(weight_H[:, None]).mul_(weight_W)
    return fused
