# SPDX-License-Identifier: Apache-2.0
"""The ViT decoder of RAE and Scale-RAE: feature tokens to an image, with the parameter names of their files.

RAE: https://arxiv.org/abs/2510.11690; the decoder is that of ViT-MAE, https://arxiv.org/abs/2111.06377.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from pidecode.errors import CheckpointError
from pidecode.models.pid.blocks import from_patches


@dataclass(frozen=True, slots=True, kw_only=True)
class VitDecoderConfig:
    """Shape of a VitDecoder; the released ones are "ViT-XL": hidden size 1152, 28 layers, 16 heads."""

    in_channels: int  # channels of a feature token
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    patch_size: int  # side of a patch, in pixels
    grid_size: int  # tokens along each side of the square image
    eps: float = 1e-12  # epsilon of the LayerNorms

    @property
    def side(self) -> int:
        """Pixels along each side of the image."""
        return self.grid_size * self.patch_size


class VitSelfAttention(nn.Module):
    """Multi-head self-attention with the nested parameter names of ViT-MAE."""

    def __init__(self, hidden_size: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.attention = nn.ModuleDict(
            {name: nn.Linear(hidden_size, hidden_size) for name in ("query", "key", "value")}
        )
        self.output = nn.ModuleDict({"dense": nn.Linear(hidden_size, hidden_size)})

    def forward(self, x: Tensor) -> Tensor:
        """Tokens `[B, N, hidden_size]` to the same shape."""
        q, k, v = (
            self.attention[name](x).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
            for name in ("query", "key", "value")
        )
        mixed = functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        return self.output["dense"](mixed)  # type: ignore[no-any-return]


class VitLayer(nn.Module):
    """Pre-norm transformer layer: self-attention, then an MLP with exact GELU."""

    def __init__(self, config: VitDecoderConfig) -> None:
        super().__init__()
        self.layernorm_before = nn.LayerNorm(config.hidden_size, eps=config.eps)
        self.attention = VitSelfAttention(config.hidden_size, config.num_heads)
        self.layernorm_after = nn.LayerNorm(config.hidden_size, eps=config.eps)
        self.intermediate = nn.ModuleDict({"dense": nn.Linear(config.hidden_size, config.intermediate_size)})
        self.output = nn.ModuleDict({"dense": nn.Linear(config.intermediate_size, config.hidden_size)})

    def forward(self, x: Tensor) -> Tensor:
        """Tokens `[B, N, hidden_size]` to the same shape."""
        x = x + self.attention(self.layernorm_before(x))
        inner = functional.gelu(self.intermediate["dense"](self.layernorm_after(x)))
        return x + self.output["dense"](inner)  # type: ignore[no-any-return]


class VitDecoder(nn.Module):
    """Decodes feature tokens `[B, N, in_channels]` to images `[B, 3, side, side]`.

    Images are in the normalization of the vision model (its mean and standard deviation per color). Square grids of
    another size than the trained one are resized to it by bilinear interpolation, as both projects do.
    """

    def __init__(self, config: VitDecoderConfig) -> None:
        super().__init__()
        self.config = config
        self.decoder_embed = nn.Linear(config.in_channels, config.hidden_size)
        self.decoder_pos_embed = nn.Parameter(
            torch.zeros(1, config.grid_size**2 + 1, config.hidden_size), requires_grad=False
        )
        self.trainable_cls_token = nn.Parameter(torch.zeros(1, 1, config.hidden_size))
        self.decoder_layers = nn.ModuleList(VitLayer(config) for _ in range(config.num_layers))
        self.decoder_norm = nn.LayerNorm(config.hidden_size, eps=config.eps)
        self.decoder_pred = nn.Linear(config.hidden_size, 3 * config.patch_size**2)

    def forward(self, tokens: Tensor) -> Tensor:
        """Images `[B, 3, side, side]` of row-major tokens `[B, N, in_channels]` without class token; N is a square."""
        config = self.config
        x = self._resize_grid(self.decoder_embed(tokens))
        x = torch.cat([self.trainable_cls_token.expand(len(x), -1, -1), x], dim=1) + self.decoder_pos_embed
        for layer in self.decoder_layers:
            x = layer(x)
        values = self.decoder_pred(self.decoder_norm(x))[:, 1:]
        # The values of a token are ordered (row, column, color).
        values = values.unflatten(-1, (config.patch_size**2, 3))
        return from_patches(values, (config.grid_size, config.grid_size), config.patch_size)

    def _resize_grid(self, x: Tensor) -> Tensor:
        side = math.isqrt(x.shape[1])
        if side == self.config.grid_size:
            return x
        cells = x.transpose(1, 2).unflatten(2, (side, side))
        size = (self.config.grid_size, self.config.grid_size)
        return functional.interpolate(cells, size=size, mode="bilinear", align_corners=False).flatten(2).transpose(1, 2)


def sincos_position_embedding(hidden_size: int, grid_size: int) -> Tensor:
    """Fixed 2-D sine-cosine position embedding of ViT-MAE, `[1, grid_size^2 + 1, hidden_size]`, float32.

    The first half of the channels encodes the column, the second the row; the class token, which is first, has zeros.
    """
    quarter = hidden_size // 4
    omega = 10000.0 ** (-torch.arange(quarter, dtype=torch.float64) / quarter)
    angles = torch.arange(grid_size, dtype=torch.float64)[:, None] * omega
    table = torch.cat([angles.sin(), angles.cos()], dim=1)
    column, row = table[None].expand(grid_size, -1, -1), table[:, None].expand(-1, grid_size, -1)
    cells = torch.cat([column, row], dim=2).flatten(0, 1)
    return torch.cat([torch.zeros(1, cells.shape[1], dtype=cells.dtype), cells])[None].float()


def infer_vit_config(
    tensors: Mapping[str, Tensor], source: object, *, num_heads: int | None, eps: float
) -> VitDecoderConfig:
    """Infer the shape of a decoder from its state dict; attention heads do not show, None stands for ViT-XL's 16.

    Raises:
        CheckpointError: The tensors are not those of such a decoder.
    """
    try:
        hidden_size, in_channels = tensors["decoder_embed.weight"].shape
        layers = {int(m[1]) for name in tensors if (m := re.match(r"decoder_layers\.(\d+)\.", name))}
        patch_size = math.isqrt(tensors["decoder_pred.weight"].shape[0] // 3)
        grid_size = math.isqrt(tensors["decoder_pos_embed"].shape[1] - 1)
        intermediate_size = tensors["decoder_layers.0.intermediate.dense.weight"].shape[0]
    except (KeyError, ValueError, IndexError) as fault:
        raise CheckpointError(
            f"{source} is not a decoder of RAE or Scale-RAE: it lacks {fault}. Give their model.pt."
        ) from None
    num_heads = 16 if num_heads is None else num_heads
    if num_heads < 1 or hidden_size % num_heads:
        raise CheckpointError(
            f"{source}: {num_heads} attention heads do not divide the hidden size {hidden_size}; check its config."
        )
    return VitDecoderConfig(
        in_channels=in_channels, hidden_size=hidden_size, intermediate_size=intermediate_size, num_layers=len(layers),
        num_heads=num_heads, patch_size=patch_size, grid_size=grid_size, eps=eps,
    )  # fmt: skip
