# SPDX-License-Identifier: Apache-2.0
"""The ViT that RAE and Scale-RAE decode with: feature tokens to an image, under the names their files use."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from pidecode.errors import CheckpointError


@dataclass(frozen=True, slots=True, kw_only=True)
class VitConfig:
    """Shape of a decoder; the released ones are "ViT-XL": width 1152, 28 layers, 16 heads."""

    features: int
    width: int
    inner: int
    layers: int
    heads: int
    patch: int
    grid: int
    """Tokens along each side of the square image."""
    epsilon: float = 1e-12

    @property
    def side(self) -> int:
        """Pixels along each side of the image."""
        return self.grid * self.patch


class Attention(nn.Module):
    """Plain self-attention; its parameters have the nested names of ViT-MAE."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.attention = nn.ModuleDict({name: nn.Linear(width, width) for name in ("query", "key", "value")})
        self.output = nn.ModuleDict({"dense": nn.Linear(width, width)})

    def forward(self, x: Tensor) -> Tensor:
        """Tokens `[B, N, width]` to the same."""
        q, k, v = (
            self.attention[name](x).unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for name in ("query", "key", "value")
        )
        mixed = functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        out: Tensor = self.output["dense"](mixed)
        return out


class Layer(nn.Module):
    """Attention and an MLP with exact GELU, each behind its LayerNorm."""

    def __init__(self, config: VitConfig) -> None:
        super().__init__()
        self.layernorm_before = nn.LayerNorm(config.width, eps=config.epsilon)
        self.attention = Attention(config.width, config.heads)
        self.layernorm_after = nn.LayerNorm(config.width, eps=config.epsilon)
        self.intermediate = nn.ModuleDict({"dense": nn.Linear(config.width, config.inner)})
        self.output = nn.ModuleDict({"dense": nn.Linear(config.inner, config.width)})

    def forward(self, x: Tensor) -> Tensor:
        """Tokens `[B, N, width]` to the same."""
        x = x + self.attention(self.layernorm_before(x))
        inner = functional.gelu(self.intermediate["dense"](self.layernorm_after(x)))
        out: Tensor = x + self.output["dense"](inner)
        return out


class VitDecoder(nn.Module):
    """Tokens `[B, grid^2, features]` (row-major, no class token) to images `[B, 3, side, side]`.

    The images are in the encoder's own normalization (its mean and deviation of colors). Other square grids of
    tokens are brought to the trained one by bilinear interpolation, as both projects do.
    """

    def __init__(self, config: VitConfig) -> None:
        super().__init__()
        self.config = config
        self.decoder_embed = nn.Linear(config.features, config.width)
        self.decoder_pos_embed = nn.Parameter(torch.zeros(1, config.grid**2 + 1, config.width), requires_grad=False)
        self.trainable_cls_token = nn.Parameter(torch.zeros(1, 1, config.width))
        self.decoder_layers = nn.ModuleList(Layer(config) for _ in range(config.layers))
        self.decoder_norm = nn.LayerNorm(config.width, eps=config.epsilon)
        self.decoder_pred = nn.Linear(config.width, 3 * config.patch**2)

    def forward(self, tokens: Tensor) -> Tensor:
        """See the class."""
        config = self.config
        x = self._on_grid(self.decoder_embed(tokens))
        x = torch.cat([self.trainable_cls_token.expand(len(x), -1, -1), x], dim=1) + self.decoder_pos_embed
        for layer in self.decoder_layers:
            x = layer(x)
        values = self.decoder_pred(self.decoder_norm(x))[:, 1:]
        # A token holds its patch as (row, column, color).
        patches = values.unflatten(1, (config.grid, config.grid)).unflatten(-1, (config.patch, config.patch, 3))
        image: Tensor = patches.permute(0, 5, 1, 3, 2, 4).flatten(4, 5).flatten(2, 3)
        return image

    def _on_grid(self, x: Tensor) -> Tensor:
        side = math.isqrt(x.shape[1])
        if side == self.config.grid:
            return x
        cells = x.transpose(1, 2).unflatten(2, (side, side))
        size = (self.config.grid, self.config.grid)
        return functional.interpolate(cells, size=size, mode="bilinear", align_corners=False).flatten(2).transpose(1, 2)


def positions(width: int, grid: int) -> Tensor:
    """Fixed sine-cosine positions `[1, grid^2 + 1, width]`: half column, half row; zeros for the class token."""
    quarter = width // 4
    omega = 10000.0 ** (-torch.arange(quarter, dtype=torch.float64) / quarter)
    angles = torch.arange(grid, dtype=torch.float64)[:, None] * omega
    table = torch.cat([angles.sin(), angles.cos()], dim=1)
    column, row = table[None].expand(grid, -1, -1), table[:, None].expand(-1, grid, -1)
    cells = torch.cat([column, row], dim=2).flatten(0, 1)
    return torch.cat([torch.zeros(1, cells.shape[1], dtype=cells.dtype), cells])[None].float()


def shape_of(tensors: Mapping[str, Tensor], source: object, *, heads: int | None, epsilon: float) -> VitConfig:
    """A decoder's shape, read from its weights; the heads are not in them (ViT-XL: 16). Raises CheckpointError."""
    try:
        width, features = tensors["decoder_embed.weight"].shape
        layers = {int(m[1]) for name in tensors if (m := re.match(r"decoder_layers\.(\d+)\.", name))}
        patch = math.isqrt(tensors["decoder_pred.weight"].shape[0] // 3)
        grid = math.isqrt(tensors["decoder_pos_embed"].shape[1] - 1)
        inner = tensors["decoder_layers.0.intermediate.dense.weight"].shape[0]
    except (KeyError, ValueError, IndexError) as fault:
        raise CheckpointError(
            f"{source} is no RAE or Scale-RAE decoder: it lacks {fault}. Name their model.pt."
        ) from None
    heads = 16 if heads is None else heads
    if heads < 1 or width % heads:
        raise CheckpointError(f"{source}: {heads} attention heads do not divide the width {width}; check its config.")
    return VitConfig(
        features=features, width=width, inner=inner, layers=len(layers), heads=heads, patch=patch, grid=grid,
        epsilon=epsilon,
    )  # fmt: skip
