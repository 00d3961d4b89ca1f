# SPDX-License-Identifier: Apache-2.0
"""Blocks of the network: rotary and sin-cos positions, norms, embedders, patch blocks and pixel blocks.

Shapes: B batch, L patch tokens, N prompt tokens, D hidden, P pixels of a patch, C pixel width.
Precision: residual streams stay in float32; matrix products run in the type of the weights.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Callable

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from pidecode.models.attention import attention
from pidecode.registry.configs import PiDConfig

IMAGE_SPAN = 16.0  # positions of patches run from 0 to 16 on both axes, whatever the image's size

Rotation = tuple[Tensor, Tensor]  # cos and sin, each `[tokens, head_dim / 2]`, float32
Rotations = tuple[Rotation, Rotation | None]  # of image tokens, and of prompt tokens where those are rotated


def _axis_angles(length: int, head_dim: int, reference: float | None, device: torch.device) -> Tensor:
    """Angles `[length, head_dim / 4]` of one axis; with a reference length, the base is that of NTK-aware RoPE."""
    theta, axis_dim = 10000.0, head_dim / 2
    if reference is not None and axis_dim > 2:
        theta *= (length / reference) ** (axis_dim / (axis_dim - 2))
    exponents = torch.arange(0, head_dim, 4, dtype=torch.float32, device=device) / head_dim
    positions = torch.linspace(0.0, IMAGE_SPAN, length, dtype=torch.float32, device=device)
    return torch.outer(positions, 1.0 / theta**exponents)


def image_rotation(
    grid: tuple[int, int], head_dim: int, *, reference_grid: tuple[float, float] | None, device: torch.device
) -> Rotation:
    """2D rotary table of a grid of patches, row-major (RoPE, https://arxiv.org/abs/2104.09864).

    `reference_grid` has the rows and columns for which the NTK-aware form leaves the frequencies as they are; None
    selects the plain form.
    """
    rows, columns = grid
    reference_rows, reference_columns = reference_grid or (None, None)
    y_RK = _axis_angles(rows, head_dim, reference_rows, device).unsqueeze(1).expand(-1, columns, -1)
    x_CK = _axis_angles(columns, head_dim, reference_columns, device).unsqueeze(0).expand(rows, -1, -1)
    # Interleaved (x0, y0, x1, y1, ...): neighboring pairs of channels alternate between the axes.
    angles = torch.stack((x_CK, y_RK), dim=-1).reshape(rows * columns, head_dim // 2)
    return angles.cos(), angles.sin()


def text_rotation(length: int, head_dim: int, theta: float, *, device: torch.device) -> Rotation:
    """1D rotary table of prompt tokens at positions 0, 1, 2, ..."""
    exponents = torch.arange(0, head_dim, 2, dtype=torch.float32, device=device) / head_dim
    positions = torch.arange(length, dtype=torch.float32, device=device)
    angles = torch.outer(positions, 1.0 / theta**exponents)
    return angles.cos(), angles.sin()


def rotate(x_BLNK: Tensor, rotation: Rotation) -> Tensor:
    """Apply a rotary table to channel pairs (2j, 2j + 1) of `[B, tokens, heads, head_dim]`, in float32."""
    cos, sin = (table[None, :, None, :] for table in rotation)
    even, odd = x_BLNK.float().unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack((even * cos - odd * sin, even * sin + odd * cos), dim=-1).flatten(-2)


def pixel_axis_table(length: int, channels: int, *, device: torch.device) -> Tensor:
    """Sines then cosines `[length, channels]` of integer pixel coordinates along one axis, float32.

    A pixel's position is the entry of its column beside that of its row.
    """
    half = channels // 2
    # float64 as in the reference, and on the CPU since some devices (Apple's) have none.
    k = torch.arange(half, dtype=torch.float64)
    angles = torch.outer(torch.arange(length, dtype=torch.float64), 10000.0 ** (-k / half))
    return torch.cat((angles.sin(), angles.cos()), dim=1).float().to(device)


class RMSNorm(nn.Module):
    """RMS norm (https://arxiv.org/abs/1910.07467): float32 statistics, eps 1e-6, result in the weight's type."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        x = x.float()
        x = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6)
        return x.to(self.weight.dtype) * self.weight


def timestep_features(t_B: Tensor, count: int = 256) -> Tensor:
    """Cosines then sines `[B, count]` of the flow time times 1000; frequencies fall from 1 to 1/10."""
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


class Embedder(nn.Module):
    """A linear layer in the type of its weights: flattened patches `[B, L, 3 P]` or colors `[..., 3]` to tokens."""

    def __init__(self, in_width: int, width: int) -> None:
        super().__init__()
        self.proj = nn.Linear(in_width, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(x.to(self.proj.weight.dtype))  # type: ignore[no-any-return]


class TextEmbedder(nn.Module):
    """Prompt states `[B, N, text_dim]` to tokens `[B, N, D]`."""

    def __init__(self, text_dim: int, hidden_size: int) -> None:
        super().__init__()
        self.proj = nn.Linear(text_dim, hidden_size)
        self.norm = RMSNorm(hidden_size)

    def forward(self, text: Tensor) -> Tensor:
        return self.norm(self.proj(text.to(self.proj.weight.dtype)))  # type: ignore[no-any-return]


class GatedFeedForward(nn.Module):
    """SwiGLU without bias, https://arxiv.org/abs/2002.05202: `w2(silu(w1 x) * w3 x)`."""

    def __init__(self, width: int, inner_width: int) -> None:
        super().__init__()
        self.w1 = nn.Linear(width, inner_width, bias=False)
        self.w3 = nn.Linear(width, inner_width, bias=False)
        self.w2 = nn.Linear(inner_width, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.w2(F.silu(self.w1(x)) * self.w3(x))  # type: ignore[no-any-return]


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
    """Image `[B, 3, H, W]` to patches `[B, L, P, 3]`, both patches and their pixels row-major."""
    B, _, H, W = image_B3HW.shape
    x = image_B3HW.reshape(B, 3, H // patch, patch, W // patch, patch)
    return x.permute(0, 2, 4, 3, 5, 1).reshape(B, (H // patch) * (W // patch), patch * patch, 3)


def from_patches(pixels_BLP3: Tensor, grid: tuple[int, int], patch: int) -> Tensor:
    """Inverse of `to_patches`: `[B, L, P, 3]` to `[B, 3, H, W]`."""
    rows, columns = grid
    x = pixels_BLP3.reshape(-1, rows, columns, patch, patch, 3)
    return x.permute(0, 5, 1, 3, 2, 4).reshape(-1, 3, rows * patch, columns * patch)


# Sequence parallelism: keys or values `[B, local tokens, heads, head_dim]` of this process to those of all.
Gather = Callable[[Tensor], Tensor]


def split_heads(qkv: Tensor, heads: int) -> tuple[Tensor, ...]:
    """`[..., L, 3 D]` to q, k, v of `[..., L, heads, head_dim]`."""
    return qkv.unflatten(-1, (3, heads, -1)).unbind(-3)  # type: ignore[no-any-return]


def normed_qkv(
    qkv: Tensor, heads: int, q_norm: RMSNorm, k_norm: RMSNorm, rotation: Rotation | None
) -> tuple[Tensor, Tensor, Tensor]:
    """`split_heads` with queries and keys normalized and, by their rotary table, rotated."""
    q, k, v = split_heads(qkv, heads)
    q, k = q_norm(q), k_norm(k)
    return (q, k, v) if rotation is None else (rotate(q, rotation), rotate(k, rotation), v)


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attention over `[B, L, heads, head_dim]`, merged back to `[B, L, D]`."""
    q, k, v = (x.to(v.dtype).transpose(1, 2) for x in (q, k, v))
    return attention(q, k, v).transpose(1, 2).flatten(-2)


class JointAttention(nn.Module):
    """Attention over prompt tokens and image tokens together, each stream with its own projections (MMDiT).

    The joint sequence has the prompt first; see https://arxiv.org/abs/2403.03206.
    """

    def __init__(self, config: PiDConfig) -> None:
        super().__init__()
        D, head_dim = config.hidden_size, config.hidden_size // config.num_heads
        self.heads = config.num_heads
        self.gather: Gather | None = None  # set where the image's tokens are sharded over processes
        self.qkv_x = nn.Linear(D, 3 * D, bias=False)
        self.q_norm_x = RMSNorm(head_dim)
        self.k_norm_x = RMSNorm(head_dim)
        self.proj_x = nn.Linear(D, D)
        if config.has_text:
            self.qkv_y = nn.Linear(D, 3 * D, bias=False)
            self.q_norm_y = RMSNorm(head_dim)
            self.k_norm_y = RMSNorm(head_dim)
            self.proj_y = nn.Linear(D, D)

    def forward(
        self, x: Tensor, y: Tensor | None, rotations: Rotations, want_text: bool
    ) -> tuple[Tensor, Tensor | None]:
        q, k, v = normed_qkv(self.qkv_x(x), self.heads, self.q_norm_x, self.k_norm_x, rotations[0])
        if self.gather is not None:
            k, v = self.gather(k), self.gather(v)
        if y is None:
            return self.proj_x(attend(q, k, v)), None
        text_q, text_k, text_v = normed_qkv(self.qkv_y(y), self.heads, self.q_norm_y, self.k_norm_y, rotations[1])
        length = y.shape[1] if want_text else 0
        if want_text:
            q = torch.cat((text_q, q), dim=1)
        out = attend(q, torch.cat((text_k, k), dim=1), torch.cat((text_v, v), dim=1))
        return self.proj_x(out[:, length:]), self.proj_y(out[:, :length]) if want_text else None


class PatchBlock(nn.Module):
    """Dual-stream transformer block on float32 image tokens `[B, L, D]` and, if any, prompt tokens `[B, N, D]`.

    The condition, SiLU of the timestep embedding `[B, 1, D]`, gives both streams shifts, scales and gates (AdaLN,
    https://arxiv.org/abs/2212.09748). `want_text=False` skips the prompt's output.
    """

    def __init__(self, config: PiDConfig) -> None:
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
        self, x: Tensor, y: Tensor | None, condition: Tensor, rotations: Rotations, *, want_text: bool
    ) -> tuple[Tensor, Tensor | None]:
        shift1, scale1, gate1, shift2, scale2, gate2 = self.adaLN_modulation_img(condition).chunk(6, dim=-1)
        y_in, text = None, None
        if y is not None:
            text = self.adaLN_modulation_txt(condition).chunk(6, dim=-1)
            y_in = modulate(self.norm_y1(y), text[0], text[1])
        x_out, y_out = self.attn(modulate(self.norm_x1(x), shift1, scale1), y_in, rotations, want_text)
        x = x + gate1 * x_out
        x = x + gate2 * self.mlp_x(modulate(self.norm_x2(x), shift2, scale2))
        if y is None or text is None or y_out is None:
            return x, None
        y = y + text[2] * y_out
        return x, y + text[5] * self.mlp_y(modulate(self.norm_y2(y), text[3], text[4]))


class PixelAttention(nn.Module):
    """Self-attention of a pixel block over one token per patch, at its own width."""

    def __init__(self, config: PiDConfig) -> None:
        super().__init__()
        width = config.pixel_attn_hidden_size
        self.heads = config.pixel_num_heads
        self.gather: Gather | None = None  # as in JointAttention
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.q_norm = RMSNorm(width // self.heads)
        self.k_norm = RMSNorm(width // self.heads)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor, rotation: Rotation) -> Tensor:
        q, k, v = normed_qkv(self.qkv(x), self.heads, self.q_norm, self.k_norm, rotation)
        if self.gather is not None:
            k, v = self.gather(k), self.gather(v)
        return self.proj(attend(q, k, v))  # type: ignore[no-any-return]


class PixelBlock(nn.Module):
    """Pixel block (PiT) on pixel tokens `[B, L, P, C]`, every pixel modulated by its patch's condition `[B, L, D]`.

    The pixels of a patch are compressed to one token for attention, and its output is expanded to them again.
    """

    def __init__(self, config: PiDConfig) -> None:
        super().__init__()
        self.pixels, C = config.patch_size**2, config.pixel_hidden_size
        self.adaLN_modulation = nn.Sequential(nn.Linear(config.hidden_size, 6 * C * self.pixels))
        self.norm1 = RMSNorm(C)
        self.compress_to_attn = nn.Linear(self.pixels * C, config.pixel_attn_hidden_size)
        self.attn = PixelAttention(config)
        self.expand_from_attn = nn.Linear(config.pixel_attn_hidden_size, self.pixels * C)
        self.norm2 = RMSNorm(C)
        self.mlp = nn.Sequential(OrderedDict(fc1=nn.Linear(C, 4 * C), gelu=nn.GELU(), fc2=nn.Linear(4 * C, C)))

    def forward(self, x_BLPC: Tensor, condition_BLD: Tensor, rotation: Rotation) -> Tensor:
        modulation = self.adaLN_modulation(condition_BLD.to(self.norm1.weight.dtype))
        shift1, scale1, gate1, shift2, scale2, gate2 = modulation.unflatten(-1, (self.pixels, -1)).chunk(6, dim=-1)
        patches = self.compress_to_attn(modulate(self.norm1(x_BLPC), shift1, scale1).flatten(2))
        attended = self.expand_from_attn(self.attn(patches, rotation)).unflatten(-1, (self.pixels, -1))
        x_BLPC = x_BLPC + gate1 * attended
        return x_BLPC + gate2 * self.mlp(modulate(self.norm2(x_BLPC), shift2, scale2))  # type: ignore[no-any-return]
