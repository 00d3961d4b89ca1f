# SPDX-License-Identifier: Apache-2.0
"""Positions: rotary tables for image and text tokens, and the sine table of pixels."""

from __future__ import annotations

import torch
from torch import Tensor

IMAGE_SPAN = 16.0
"""Every picture spans 0..16 on both axes, whatever its size (SPEC.md section 1, 2D RoPE)."""

Rotation = tuple[Tensor, Tensor]
"""cos and sin, each `[tokens, head_dim / 2]`, float32."""


def _axis_angles(length: int, head_dim: int, theta: float, device: torch.device) -> Tensor:
    """Angles `[length, head_dim / 4]` of one axis."""
    exponents = torch.arange(0, head_dim, 4, dtype=torch.float32, device=device) / head_dim
    positions = torch.linspace(0.0, IMAGE_SPAN, length, dtype=torch.float32, device=device)
    return torch.outer(positions, 1.0 / theta**exponents)


def _scaled_theta(length: int, reference: float, head_dim: int) -> float:
    """NTK-aware base: the frequencies stretch with the grid, per axis, relative to a reference grid."""
    axis_dim = head_dim / 2
    if axis_dim <= 2:
        return 10000.0
    return float(10000.0 * (length / reference) ** (axis_dim / (axis_dim - 2)))


def image_rotation(
    grid: tuple[int, int],
    head_dim: int,
    *,
    reference_grid: tuple[float, float] | None,
    device: torch.device,
) -> Rotation:
    """Rotary table of a grid (rows, columns) of patches, row-major (SPEC.md section 1, 2D RoPE).

    `reference_grid` (rows, columns) selects the NTK-aware form; None the plain one.
    """
    rows, columns = grid
    theta_y = theta_x = 10000.0
    if reference_grid is not None:
        theta_y = _scaled_theta(rows, reference_grid[0], head_dim)
        theta_x = _scaled_theta(columns, reference_grid[1], head_dim)
    y_RK = _axis_angles(rows, head_dim, theta_y, device)
    x_CK = _axis_angles(columns, head_dim, theta_x, device)
    # Interleaved (x0, y0, x1, y1, ...): neighboring pairs of channels alternate between the axes.
    angles = torch.stack(
        (x_CK.unsqueeze(0).expand(rows, -1, -1), y_RK.unsqueeze(1).expand(-1, columns, -1)), dim=-1
    ).reshape(rows * columns, head_dim // 2)
    return angles.cos(), angles.sin()


def text_rotation(length: int, head_dim: int, theta: float, *, device: torch.device) -> Rotation:
    """Rotary table of `length` caption tokens at positions 0, 1, 2, ..."""
    exponents = torch.arange(0, head_dim, 2, dtype=torch.float32, device=device) / head_dim
    positions = torch.arange(length, dtype=torch.float32, device=device)
    angles = torch.outer(positions, 1.0 / theta**exponents)
    return angles.cos(), angles.sin()


def rotate(x_BLNK: Tensor, rotation: Rotation) -> Tensor:
    """Rotate neighboring channel pairs (2j, 2j+1) of `[batch, tokens, heads, head_dim]`, in float32."""
    cos, sin = (table[None, :, None, :] for table in rotation)
    even, odd = x_BLNK.float().unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack((even * cos - odd * sin, even * sin + odd * cos), dim=-1).flatten(-2)


def pixel_axis_table(length: int, channels: int, *, device: torch.device) -> Tensor:
    """Sines then cosines `[length, channels]` of integer pixel coordinates along one axis.

    Built in float64, stored in float32 (SPEC.md section 1, sin-cos table of pixels); the table of a
    picture is this one for its columns beside this one for its rows.
    """
    quarter = channels // 2
    # Devices without float64 (Apple's) get the table from the processor.
    k = torch.arange(quarter, dtype=torch.float64)
    angles = torch.outer(torch.arange(length, dtype=torch.float64), 10000.0 ** (-k / quarter))
    return torch.cat((angles.sin(), angles.cos()), dim=1).float().to(device)
