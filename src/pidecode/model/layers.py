# SPDX-License-Identifier: Apache-2.0
"""Small parts: norms, embedders, feed-forwards, and the way between a picture and its patches.

Shapes: B batch, L patch tokens, N caption tokens, D hidden, P pixels of a patch, C pixel width.
Precision: streams stay in float32; matrices run in the weights' own type.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn


class RMSNorm(nn.Module):
    """Root-mean-square norm: statistics in float32, eps 1e-6, result in the weight's type."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        x = x.float()
        x = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6)
        return x.to(self.weight.dtype) * self.weight


def timestep_features(t_B: Tensor, count: int = 256) -> Tensor:
    """Cosines then sines `[B, count]` of the flow time times 1000, with a longest period of 10."""
    half = count // 2
    k = torch.arange(half, dtype=torch.float32, device=t_B.device)
    angles = t_B.float()[:, None] * torch.exp(-math.log(10.0) * k / half)
    features = torch.cat((angles.cos(), angles.sin()), dim=-1)
    return F.pad(features, (0, count % 2))


class TimestepEmbedder(nn.Module):
    """Flow time (times 1000) `[B]` to `[B, D]`."""

    def __init__(self, hidden_size: int) -> None:
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(256, hidden_size), nn.SiLU(), nn.Linear(hidden_size, hidden_size))

    def forward(self, t_B: Tensor) -> Tensor:
        return self.mlp(timestep_features(t_B).to(self.mlp[0].weight))  # type: ignore[no-any-return, arg-type]


class PatchEmbedder(nn.Module):
    """Flattened patches `[B, L, 3 P]` to tokens `[B, L, D]`."""

    def __init__(self, in_width: int, hidden_size: int) -> None:
        super().__init__()
        self.proj = nn.Linear(in_width, hidden_size)

    def forward(self, patches: Tensor) -> Tensor:
        return self.proj(patches.to(self.proj.weight.dtype))  # type: ignore[no-any-return]


class TextEmbedder(nn.Module):
    """Caption states `[B, N, text_dim]` to tokens `[B, N, D]`."""

    def __init__(self, text_dim: int, hidden_size: int) -> None:
        super().__init__()
        self.proj = nn.Linear(text_dim, hidden_size)
        self.norm = RMSNorm(hidden_size)

    def forward(self, text: Tensor) -> Tensor:
        return self.norm(self.proj(text.to(self.proj.weight.dtype)))  # type: ignore[no-any-return]


class PixelEmbedder(nn.Module):
    """Colors `[..., 3]` to pixel tokens `[..., C]`."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.proj = nn.Linear(3, width)

    def forward(self, colors: Tensor) -> Tensor:
        return self.proj(colors.to(self.proj.weight.dtype))  # type: ignore[no-any-return]


class GatedFeedForward(nn.Module):
    """SwiGLU without bias: `w2(silu(w1 v) * w3 v)`."""

    def __init__(self, width: int, inner_width: int) -> None:
        super().__init__()
        self.w1 = nn.Linear(width, inner_width, bias=False)
        self.w3 = nn.Linear(width, inner_width, bias=False)
        self.w2 = nn.Linear(inner_width, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.w2(F.silu(self.w1(x)) * self.w3(x))  # type: ignore[no-any-return]


class PixelFeedForward(nn.Module):
    """Linear, exact GELU, Linear on every pixel: C -> 4C -> C."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, 4 * width)
        self.fc2 = nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x)))  # type: ignore[no-any-return]


class FinalLayer(nn.Module):
    """Pixel tokens `[..., C]` to colors `[..., 3]`."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = RMSNorm(width)
        self.linear = nn.Linear(width, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(self.norm(x))  # type: ignore[no-any-return]


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """`x (1 + scale) + shift`."""
    return x * (1 + scale) + shift


def to_patches(image_B3HW: Tensor, patch: int) -> Tensor:
    """Picture to patches `[B, L, P, 3]`: patches row-major, and pixels row-major within a patch."""
    B, _, H, W = image_B3HW.shape
    x = image_B3HW.reshape(B, 3, H // patch, patch, W // patch, patch)
    return x.permute(0, 2, 4, 3, 5, 1).reshape(B, (H // patch) * (W // patch), patch * patch, 3)


def from_patches(pixels_BLP3: Tensor, grid: tuple[int, int], patch: int) -> Tensor:
    """Inverse of `to_patches`: `[B, L, P, 3]` to `[B, 3, H, W]`."""
    rows, columns = grid
    x = pixels_BLP3.reshape(-1, rows, columns, patch, patch, 3)
    return x.permute(0, 5, 1, 3, 2, 4).reshape(-1, 3, rows * patch, columns * patch)
