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
from torch.nn import functional as F  # noqa: N812

from pidecode.errors import CheckpointError
from pidecode.models.pid.blocks import from_patches, pixel_axis_table


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


class VitLayer(nn.Module):
    """Pre-norm transformer layer on tokens `[B, N, hidden_size]`, with the nested parameter names of ViT-MAE."""

    def __init__(self, config: VitDecoderConfig) -> None:
        super().__init__()
        D, self.num_heads = config.hidden_size, config.num_heads
        self.layernorm_before = nn.LayerNorm(D, eps=config.eps)
        heads = nn.ModuleDict({name: nn.Linear(D, D) for name in ("query", "key", "value")})
        self.attention = nn.ModuleDict({"attention": heads, "output": nn.ModuleDict({"dense": nn.Linear(D, D)})})
        self.layernorm_after = nn.LayerNorm(D, eps=config.eps)
        self.intermediate = nn.ModuleDict({"dense": nn.Linear(D, config.intermediate_size)})
        self.output = nn.ModuleDict({"dense": nn.Linear(config.intermediate_size, D)})

    def forward(self, x: Tensor) -> Tensor:
        normed, heads = self.layernorm_before(x), self.attention["attention"].values()  # type: ignore[operator]
        q, k, v = (head(normed).unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for head in heads)
        mixed = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        x = x + self.attention["output"]["dense"](mixed)  # type: ignore[index]
        return x + self.output["dense"](F.gelu(self.intermediate["dense"](self.layernorm_after(x))))  # type: ignore[no-any-return]


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
        config, grid = self.config, (self.config.grid_size, self.config.grid_size)
        x, side = self.decoder_embed(tokens), math.isqrt(tokens.shape[1])
        if side != config.grid_size:
            cells = x.transpose(1, 2).unflatten(2, (side, side))
            cells = F.interpolate(cells, size=grid, mode="bilinear", align_corners=False)
            x = cells.flatten(2).transpose(1, 2)
        x = torch.cat([self.trainable_cls_token.expand(len(x), -1, -1), x], dim=1) + self.decoder_pos_embed
        for layer in self.decoder_layers:
            x = layer(x)
        values = self.decoder_pred(self.decoder_norm(x))[:, 1:]
        # The values of a token are ordered (row, column, color).
        values = values.unflatten(-1, (config.patch_size**2, 3))
        return from_patches(values, grid, config.patch_size)


def sincos_position_embedding(hidden_size: int, grid_size: int) -> Tensor:
    """Fixed 2-D sine-cosine position embedding of ViT-MAE, `[1, grid_size^2 + 1, hidden_size]`, float32.

    The first half of the channels encodes the column, the second the row; the class token, which is first, has zeros.
    """
    table = pixel_axis_table(grid_size, hidden_size // 2, device=torch.device("cpu"))
    column, row = table[None].expand(grid_size, -1, -1), table[:, None].expand(-1, grid_size, -1)
    return F.pad(torch.cat([column, row], dim=2).flatten(0, 1), (0, 0, 1, 0))[None]


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
