# SPDX-License-Identifier: Apache-2.0
"""Weights in int8 and fp8, dequantized to multiply (w8a16) or multiplied in eight bits (w8a8), and int8 attention.

Weights carry one scale per output channel. In w8a8, activations get one scale per token as they come; the kernels
compute what `reference_linear` computes from the same codes, so rounding to eight bits is all that differs from the
exact product. w8a8 is experimental: it was compared on a CPU only, and no gain was measured on a GPU yet.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from importlib import import_module
from importlib.util import find_spec
from typing import Literal, cast

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from pidecode.errors import SettingError
from pidecode.models.attention import AttentionKernel

Format = Literal["int8", "fp8"]
# Type and largest value of each format.
STORED: dict[Format, tuple[torch.dtype, float]] = {"int8": (torch.int8, 127.0), "fp8": (torch.float8_e4m3fn, 448.0)}

ALIGNMENT = 16  # kernels multiply matrices whose sides are multiples of this
MIN_ROWS = 17  # tokens that `torch._int_mm` needs on some devices; fewer are padded
MIN_WEIGHTS = 2**16  # smaller layers are not quantized: nothing to gain, and the gates among them are sensitive


def quantize_rows(x_TK: Tensor, format: Format) -> tuple[Tensor, Tensor]:
    """Codes `[T, K]` and scales `[T, 1]`, float32, of a matrix: each row fills the format's range."""
    stored, largest = STORED[format]
    scales = torch.linalg.vector_norm(x_TK, ord=float("inf"), dim=-1, keepdim=True, dtype=torch.float32)
    scales = scales.clamp_(min=1e-12).div_(largest)
    codes = x_TK / scales
    return (codes.round_() if format == "int8" else codes).to(stored), scales


def dequantize(codes: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
    """`codes * scales`, rounded to `dtype` once: every code is exact in it, and no float32 copy is made."""
    return codes.to(dtype, copy=True).mul_(scales)


def w8a8_linear(x_TK: Tensor, codes_OK: Tensor, scales_O1: Tensor, bias: Tensor | None = None) -> Tensor:
    """`x @ (codes * scales)^T + bias`, `[T, O]` in x's type, with both factors in eight bits: x is quantized here.

    `reference_linear` is the reference implementation.
    """
    if codes_OK.dtype == torch.int8:
        codes, scales = quantize_rows(x_TK, "int8")
        missing = MIN_ROWS - len(codes)
        out = torch._int_mm(F.pad(codes, (0, 0, 0, missing)) if missing > 0 else codes, codes_OK.t())
        out = (out[: len(codes)] * scales).mul_(scales_O1.t())
    else:  # the kernel scales by itself, and gives bfloat16 only
        codes, scales = quantize_rows(x_TK, "fp8")
        scale_b = scales_O1.t().contiguous()
        out = torch._scaled_mm(codes, codes_OK.t(), scale_a=scales, scale_b=scale_b, out_dtype=torch.bfloat16)
        out = out.to(x_TK.dtype)
    return (out if bias is None else out.add_(bias)).to(x_TK.dtype)


def reference_linear(x_TK: Tensor, codes_OK: Tensor, scales_O1: Tensor, bias: Tensor | None = None) -> Tensor:
    """`w8a8_linear` with the same codes multiplied in float32: what products of devices are compared with."""
    codes, scales = quantize_rows(x_TK, "int8" if codes_OK.dtype == torch.int8 else "fp8")
    out = (codes.float() * scales) @ (codes_OK.float() * scales_O1).t()
    return (out if bias is None else out + bias).to(x_TK.dtype)


def products_work(format: Format, dtype: torch.dtype, device: torch.device) -> bool:
    """Whether a device multiplies activations of `dtype` in a format, and its result is right."""
    generator = torch.Generator().manual_seed(0)
    x, weight = (torch.randn(64, 64, generator=generator) for _ in range(2))
    codes, scales = quantize_rows(weight, format)
    expected = reference_linear(x.to(dtype), codes, scales).float()
    try:
        out = w8a8_linear(x.to(device, dtype), codes.to(device), scales.to(device)).float().cpu()
    except (RuntimeError, NotImplementedError, AttributeError):
        return False
    return bool((out - expected).abs().max() <= 1e-2 * expected.abs().max())


def require_products(format: Format, dtype: torch.dtype, device: torch.device) -> None:
    """Raises SettingError unless a device multiplies in a format; the meta device, which computes nothing, does."""
    # CPUs only emulate eight-bit floats, at a small part of float32's speed.
    emulated = format == "fp8" and device.type == "cpu"
    if device.type == "meta" or (not emulated and products_work(format, dtype, device)):
        return
    need = "an NVIDIA GPU, or a CPU and a torch with integer products"
    if format == "fp8":
        need = "an NVIDIA GPU of compute capability 8.9 or above, or an AMD one with fp8 units"
    raise SettingError(
        f"{device} does not multiply in {format}: that takes {need}. Keep the weights in {format} and dequantize them "
        'to multiply instead (scheme="w8a16").'
    )


def _quantize_tokens(x_BNLK: Tensor, block: int) -> Tensor:
    """Queries or keys rounded to int8, with one scale for each `block` tokens of a head; float32."""
    tokens = x_BNLK.shape[2]
    blocks: Tensor = F.pad(x_BNLK.float(), (0, 0, 0, -tokens % block)).unflatten(2, (-1, block))
    scales = blocks.abs().amax((-2, -1), keepdim=True).clamp_(min=1e-8).div_(127.0)
    return blocks.div(scales).add_(0.5).floor_().mul_(scales).flatten(2, 3)[:, :, :tokens]


def reference_int8_attention(q_BNLK: Tensor, k_BNLK: Tensor, v_BNLK: Tensor) -> Tensor:
    """Attention with queries and keys in int8, as the kernel has it (SageAttention, https://arxiv.org/abs/2410.02367).

    Keys have their mean over tokens subtracted first, which the softmax does not see and large channels need. The
    softmax's weights and the values are multiplied in the values' type and added in float32.
    """
    q = _quantize_tokens(q_BNLK, 128)  # tokens of a block, as in `ops.triton`
    k = _quantize_tokens(k_BNLK.float() - k_BNLK.mean(2, keepdim=True, dtype=torch.float32), 64)
    scores = q @ k.mT * q.shape[-1] ** -0.5
    weights = torch.exp(scores - scores.amax(-1, keepdim=True))
    out = weights.to(v_BNLK.dtype).float() @ v_BNLK.float() / weights.sum(-1, keepdim=True)
    return out.to(v_BNLK.dtype)


EIGHT_BIT_HEADS = (64, 128)  # head sizes of int8 attention; kernels pad others to these, which costs what it gains
EIGHT_BIT_TOLERANCE = 0.1  # largest error of attention in eight bits, relative to the largest value of the output


def int8_kernels() -> dict[str, AttentionKernel]:
    """Kernels of attention in eight bits that are installed, by name: SageAttention, and the package's own."""
    found: dict[str, AttentionKernel] = {}
    if find_spec("sageattention") is not None:
        found["sage"] = lambda q, k, v: import_module("sageattention").sageattn(q, k, v, tensor_layout="HND")
    if find_spec("triton") is not None:
        found["int8"] = lambda q, k, v: import_module("pidecode.engine.ops.triton").int8_attention(q, k, v)
    return found


@dataclass(frozen=True, slots=True)
class EightBitAttention:
    """Attention in eight bits for the heads that gain by it, and exact attention for the others."""

    eight_bit: AttentionKernel
    exact: AttentionKernel

    def __call__(self, q_BNLK: Tensor, k_BNLK: Tensor, v_BNLK: Tensor) -> Tensor:
        """See `pidecode.models.attention.attention`."""
        kernel = self.eight_bit if q_BNLK.shape[-1] in EIGHT_BIT_HEADS else self.exact
        return kernel(q_BNLK, k_BNLK, v_BNLK)


class QuantizedLinear(nn.Module):
    """A linear layer whose weight is stored in eight bits with one scale per output channel.

    Args:
        linear: The layer to replace.
        format: Format of the stored weight.
        eight_bit: Multiply in eight bits (w8a8). Else the weight is dequantized at each use (w8a16), as it always is
            in a layer whose sides are no multiples of `ALIGNMENT`.
    """

    codes: Tensor
    scales: Tensor
    bias: Tensor | None

    def __init__(self, linear: nn.Linear, format: Format, eight_bit: bool = False) -> None:
        super().__init__()
        self.dtype = linear.weight.dtype
        self.eight_bit = eight_bit and not (linear.in_features % ALIGNMENT or linear.out_features % ALIGNMENT)
        codes, scales = quantize_rows(linear.weight.detach().float(), format)
        self.register_buffer("codes", codes)
        self.register_buffer("scales", scales)
        self.register_buffer("bias", None if linear.bias is None else linear.bias.detach())

    @property
    def weight(self) -> Tensor:
        """The dequantized weight `[out, in]`, computed at each access."""
        return dequantize(self.codes, self.scales, self.dtype)

    def forward(self, x: Tensor) -> Tensor:
        """Input `[..., in]` to `[..., out]`, in x's type."""
        if not self.eight_bit:
            return F.linear(x, self.weight.to(x.dtype), self.bias)
        out = w8a8_linear(x.flatten(0, -2), self.codes, self.scales, self.bias)
        return out.view(*x.shape[:-1], -1)


@dataclass(frozen=True, slots=True)
class WeightSlice:
    """Some of a layer's weight, dequantized or with its scales, ready to multiply with."""

    weight: Tensor  # `[..., out, in]`; eight-bit codes where the layer multiplies in eight bits
    scales: Tensor | None = None  # `[..., out, 1]` of such codes

    def __call__(self, x_TK: Tensor, bias: Tensor | None = None) -> Tensor:
        """`x @ weight^T + bias`, in x's type."""
        if self.scales is None:
            return F.linear(x_TK, self.weight, bias)
        return w8a8_linear(x_TK, self.weight, self.scales, bias)

    @property
    def per_output(self) -> Tensor:
        """The tensor that a factor per output channel is multiplied into: the weight itself, or its scales."""
        return self.weight if self.scales is None else self.scales

    def map(self, change: Callable[[Tensor], Tensor]) -> WeightSlice:
        """The same with weight and scales both rearranged."""
        return replace(self, weight=change(self.weight), scales=None if self.scales is None else change(self.scales))


def slice_weight(
    linear: nn.Module, rows: Callable[[Tensor], Tensor] = lambda t: t, columns: slice = slice(None)
) -> WeightSlice:
    """Part of a layer's weight; no other is dequantized.

    Args:
        linear: The layer, quantized or not.
        rows: Takes them from a tensor `[out, ...]`, as `[..., out, ...]`.
        columns: Inputs that they are cut to.
    """
    if not isinstance(linear, QuantizedLinear):
        return WeightSlice(rows(cast(Tensor, linear.weight))[..., columns])
    codes, scales = rows(linear.codes)[..., columns], rows(linear.scales)
    if not linear.eight_bit or codes.shape[-1] % ALIGNMENT or codes.shape[:-1].numel() % ALIGNMENT:
        return WeightSlice(dequantize(codes, scales, linear.dtype))
    # Kernels want contiguous rows; made so once here, not at each product.
    return WeightSlice(codes if columns == slice(None) else codes.contiguous(), scales)


@torch.no_grad()
def quantize(module: nn.Module, format: Format, eight_bit: bool = False) -> int:
    """Replace the large linear layers below `module` by quantized ones, one after the other; returns how many."""
    count = 0
    for parent in list(module.modules()):
        for name, child in list(parent.named_children()):
            if type(child) is nn.Linear and child.weight.numel() >= MIN_WEIGHTS:
                setattr(parent, name, QuantizedLinear(child, format, eight_bit))
                count += 1
    return count
