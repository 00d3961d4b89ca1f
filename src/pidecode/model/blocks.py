# SPDX-License-Identifier: Apache-2.0
"""The two kinds of block: patch blocks (image and caption attend jointly) and pixel blocks."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from pidecode.facts.architecture import NetConfig
from pidecode.kernels.attention import attention
from pidecode.model.layers import GatedFeedForward, PixelFeedForward, RMSNorm, modulate
from pidecode.model.rope import Rotation, rotate

Gather = Callable[[Tensor], Tensor]
"""Keys or values `[B, local tokens, heads, head_dim]` of this process to those of all, in the picture's order."""


def _split_heads(qkv: Tensor, heads: int) -> tuple[Tensor, ...]:
    """`[B, L, 3 D]` to q, k, v of `[B, L, heads, head_dim]`."""
    return qkv.unflatten(-1, (3, heads, -1)).unbind(2)  # type: ignore[no-any-return]


def _attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attention over `[B, L, heads, head_dim]`, merged back to `[B, L, D]`."""
    q, k, v = (x.to(v.dtype).transpose(1, 2) for x in (q, k, v))
    return attention(q, k, v).transpose(1, 2).flatten(-2)


class JointAttention(nn.Module):
    """Caption tokens first, then image tokens, all attending to all."""

    def __init__(self, config: NetConfig) -> None:
        super().__init__()
        D, head_dim = config.hidden_size, config.hidden_size // config.num_heads
        self.heads = config.num_heads
        self.gather: Gather | None = None  # set where one picture's tokens are spread over processes
        self.qkv_x = nn.Linear(D, 3 * D, bias=False)
        self.q_norm_x = RMSNorm(head_dim)
        self.k_norm_x = RMSNorm(head_dim)
        self.proj_x = nn.Linear(D, D)
        if config.has_text:
            self.qkv_y = nn.Linear(D, 3 * D, bias=False)
            self.q_norm_y = RMSNorm(head_dim)
            self.k_norm_y = RMSNorm(head_dim)
            self.proj_y = nn.Linear(D, D)

    def _image_qkv(self, x: Tensor, rotation: Rotation) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = _split_heads(self.qkv_x(x), self.heads)
        return rotate(self.q_norm_x(q), rotation), rotate(self.k_norm_x(k), rotation), v

    def _text_qkv(self, y: Tensor, rotation: Rotation | None) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = _split_heads(self.qkv_y(y), self.heads)
        q, k = self.q_norm_y(q), self.k_norm_y(k)
        return (q, k, v) if rotation is None else (rotate(q, rotation), rotate(k, rotation), v)

    def forward(
        self,
        x: Tensor,
        y: Tensor | None,
        rotation: Rotation,
        text_rotation: Rotation | None,
        want_text: bool,
    ) -> tuple[Tensor, Tensor | None]:
        q, k, v = self._image_qkv(x, rotation)
        if self.gather is not None:
            k, v = self.gather(k), self.gather(v)
        if y is None:
            return self.proj_x(_attend(q, k, v)), None
        text_q, text_k, text_v = self._text_qkv(y, text_rotation)
        length = y.shape[1] if want_text else 0
        if want_text:
            q = torch.cat((text_q, q), dim=1)
        out = _attend(q, torch.cat((text_k, k), dim=1), torch.cat((text_v, v), dim=1))
        return self.proj_x(out[:, length:]), self.proj_y(out[:, :length]) if want_text else None


class PatchBlock(nn.Module):
    """A dual-stream block: image tokens `[B, L, D]` and caption tokens `[B, N, D]`, each with its own weights.

    The condition `[B, 1, D]` gives both streams their shifts, scales and gates.
    """

    def __init__(self, config: NetConfig) -> None:
        super().__init__()
        D = config.hidden_size
        self.norm_x1 = RMSNorm(D)
        self.norm_x2 = RMSNorm(D)
        self.attn = JointAttention(config)
        self.mlp_x = GatedFeedForward(D, config.mlp_width)
        self.adaLN_modulation_img = nn.Sequential(nn.Linear(D, 6 * D))
        if config.has_text:
            self.norm_y1 = RMSNorm(D)
            self.norm_y2 = RMSNorm(D)
            self.mlp_y = GatedFeedForward(D, config.mlp_width)
            self.adaLN_modulation_txt = nn.Sequential(nn.Linear(D, 6 * D))

    def forward(
        self,
        x: Tensor,
        y: Tensor | None,
        condition: Tensor,
        rotation: Rotation,
        text_rotation: Rotation | None = None,
        *,
        want_text: bool = True,
    ) -> tuple[Tensor, Tensor | None]:
        """Both streams after the block; `want_text=False` skips the caption's, which nobody reads after the last."""
        shift1, scale1, gate1, shift2, scale2, gate2 = self.adaLN_modulation_img(condition).chunk(6, dim=-1)
        y_in, text = None, None
        if y is not None:
            text = self.adaLN_modulation_txt(condition).chunk(6, dim=-1)
            y_in = modulate(self.norm_y1(y), text[0], text[1])
        x_out, y_out = self.attn(modulate(self.norm_x1(x), shift1, scale1), y_in, rotation, text_rotation, want_text)
        x = x + gate1 * x_out
        x = x + gate2 * self.mlp_x(modulate(self.norm_x2(x), shift2, scale2))
        if y is None or text is None or y_out is None:
            return x, None
        y = y + text[2] * y_out
        return x, y + text[5] * self.mlp_y(modulate(self.norm_y2(y), text[3], text[4]))


class PixelAttention(nn.Module):
    """Self-attention over patch tokens at the pixel blocks' own width."""

    def __init__(self, config: NetConfig) -> None:
        super().__init__()
        width = config.pixel_attn_hidden_size
        self.heads = config.pixel_num_heads
        self.gather: Gather | None = None  # as in JointAttention
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.q_norm = RMSNorm(width // self.heads)
        self.k_norm = RMSNorm(width // self.heads)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor, rotation: Rotation) -> Tensor:
        q, k, v = _split_heads(self.qkv(x), self.heads)
        q, k = rotate(self.q_norm(q), rotation), rotate(self.k_norm(k), rotation)
        if self.gather is not None:
            k, v = self.gather(k), self.gather(v)
        return self.proj(_attend(q, k, v))  # type: ignore[no-any-return]


class PixelBlock(nn.Module):
    """A pixel block: pixel tokens `[B, L, P, C]`, every pixel modulated by its patch's condition `[B, L, D]`."""

    def __init__(self, config: NetConfig) -> None:
        super().__init__()
        self.pixels, C = config.patch_size**2, config.pixel_hidden_size
        self.adaLN_modulation = nn.Sequential(nn.Linear(config.hidden_size, 6 * C * self.pixels))
        self.norm1 = RMSNorm(C)
        self.compress_to_attn = nn.Linear(self.pixels * C, config.pixel_attn_hidden_size)
        self.attn = PixelAttention(config)
        self.expand_from_attn = nn.Linear(config.pixel_attn_hidden_size, self.pixels * C)
        self.norm2 = RMSNorm(C)
        self.mlp = PixelFeedForward(C)

    def forward(self, x_BLPC: Tensor, condition_BLD: Tensor, rotation: Rotation) -> Tensor:
        modulation = self.adaLN_modulation(condition_BLD.to(self.norm1.weight.dtype))
        shift1, scale1, gate1, shift2, scale2, gate2 = modulation.unflatten(-1, (self.pixels, -1)).chunk(6, dim=-1)
        patches = self.compress_to_attn(modulate(self.norm1(x_BLPC), shift1, scale1).flatten(2))
        attended = self.expand_from_attn(self.attn(patches, rotation)).unflatten(-1, (self.pixels, -1))
        x_BLPC = x_BLPC + gate1 * attended
        return x_BLPC + gate2 * self.mlp(modulate(self.norm2(x_BLPC), shift2, scale2))  # type: ignore[no-any-return]
