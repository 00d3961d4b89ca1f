# SPDX-License-Identifier: Apache-2.0
"""Overlapping windows blended at every step, for images beyond the trained size or memory.

This is MultiDiffusion (https://arxiv.org/abs/2302.08113): all windows denoise one shared noisy image, and their
predictions are blended before the sampler moves on, so they cannot drift apart and leave seams. Latent tokens are
computed once for the whole image, and every window keeps the positions it has in the whole. Only attention ends at a
window's edge.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from pidecode.models.pid.network import Condition

Denoise = Callable[[Tensor, Tensor, Condition], Tensor]  # image, time, condition to prediction, as `PiDNet.denoise`
Span = tuple[int, int]  # first patch and one past the last, along one axis


def window_spans(length: int, side: int, overlap: int) -> list[Span]:
    """Windows of `side` patches along an axis of `length`, placed evenly: neighbors share at least `overlap`."""
    if side >= length:
        return [(0, length)]
    steps = -(-(length - side) // (side - overlap))
    starts = [round(index * (length - side) / steps) for index in range(steps + 1)]
    return [(start, start + side) for start in starts]


def blend_weights(spans: list[Span], patch: int, device: torch.device) -> list[Tensor]:
    """Weights of each window's pixels along one axis: ramps where windows overlap; they sum to 1 at every pixel."""
    total, ramps = torch.zeros(spans[-1][1] * patch, device=device), []
    for start, stop in spans:
        distance = torch.arange(0.5, (stop - start) * patch, device=device)
        ramps.append((slice(start * patch, stop * patch), torch.minimum(distance, distance.flip(0))))
        total[ramps[-1][0]] += ramps[-1][1]
    return [ramp / total[pixels] for pixels, ramp in ramps]


@torch.no_grad()
def denoise_windows(
    denoise: Denoise, x_B3HW: Tensor, t_B: Tensor, condition: Condition, side: int, overlap: int
) -> Tensor:
    """One evaluation of an image, in blended windows of `side` patches; at once where one window covers it."""
    patch, device = x_B3HW.shape[2] // condition.grid[0], x_B3HW.device
    rows, columns = (window_spans(length, side, overlap) for length in condition.grid)
    if len(rows) == len(columns) == 1:
        return denoise(x_B3HW, t_B, condition)
    row_weights, column_weights = blend_weights(rows, patch, device), blend_weights(columns, patch, device)
    blended = torch.zeros_like(x_B3HW, dtype=torch.float32)
    for (top, bottom), weight_H in zip(rows, row_weights, strict=True):
        for (left, right), weight_W in zip(columns, column_weights, strict=True):
            window = (..., slice(top * patch, bottom * patch), slice(left * patch, right * patch))
            part = condition.crop(slice(top, bottom), slice(left, right))
            prediction = denoise(x_B3HW[window].contiguous(), t_B, part)
            blended[window] += prediction.mul_(weight_H[:, None]).mul_(weight_W)
    return blended
