# SPDX-License-Identifier: Apache-2.0
"""Weights in int8 and fp8, dequantized to multiply (w8a16) or multiplied in eight bits (w8a8), and int8 attention.

Weights carry one scale per output channel. In w8a8, activations get one scale per token as they come; the kernels
compute what `reference_linear` computes from the same codes, so rounding to eight bits is all that differs from the
exact product. w8a8 is experimental: it was compared on a CPU only, and no gain was measured on a GPU yet.
"""

from __future__ import annotations

import math
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
# How a device multiplies in eight bits: integers; floats with rowwise scales given to the kernel, or scaled afterwards.
Kernel = Literal["int8", "fp8 rowwise", "fp8"]

# Type and largest value of each format; and its kernels, the better one first.
STORED: dict[Format, tuple[torch.dtype, float]] = {"int8": (torch.int8, 127.0), "fp8": (torch.float8_e4m3fn, 448.0)}
KERNELS: dict[Format, tuple[Kernel, ...]] = {"int8": ("int8",), "fp8": ("fp8 rowwise", "fp8")}

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


def w8a8_linear(
    x_TK: Tensor, codes_OK: Tensor, scales_O1: Tensor, kernel: Kernel, bias: Tensor | None = None
) -> Tensor:
    """`x @ (codes * scales)^T + bias`, `[T, O]` in x's type, with both factors in eight bits: x is quantized here.

    `reference_linear` is the reference implementation.
    """
    format: Format = "int8" if kernel == "int8" else "fp8"
    codes, scales = quantize_rows(x_TK, format)
    if kernel == "fp8 rowwise":
        out = torch._scaled_mm(
            codes, codes_OK.t(), scale_a=scales, scale_b=scales_O1.t().contiguous(), out_dtype=torch.bfloat16
        )
        out = out.to(x_TK.dtype)
        return out if bias is None else out.add_(bias)
    if kernel == "int8":
        missing = MIN_ROWS - len(codes)
        raw = torch._int_mm(F.pad(codes, (0, 0, 0, missing)) if missing > 0 else codes, codes_OK.t())[: len(codes)]
    else:
        one = torch.ones((), device=x_TK.device)
        raw = torch._scaled_mm(codes, codes_OK.t(), scale_a=one, scale_b=one, out_dtype=torch.float32)
    out = raw * scales
    del raw
    out.mul_(scales_O1.t())
    if bias is not None:
        out.add_(bias)
    return out.to(x_TK.dtype)


def reference_linear(
    x_TK: Tensor, codes_OK: Tensor, scales_O1: Tensor, format: Format, bias: Tensor | None = None
) -> Tensor:
    """`w8a8_linear` with the same codes multiplied in float32: what every kernel is compared with."""
    codes, scales = quantize_rows(x_TK, format)
    out = (codes.float() * scales) @ (codes_OK.float() * scales_O1).t()
    return (out if bias is None else out + bias).to(x_TK.dtype)


def kernel_works(kernel: Kernel, dtype: torch.dtype, device: torch.device) -> bool:
    """Whether a device has the kernel for activations of `dtype`, and its result is right."""
    if kernel == "fp8 rowwise" and dtype != torch.bfloat16:
        return False  # such kernels give bfloat16 only
    format: Format = "int8" if kernel == "int8" else "fp8"
    generator = torch.Generator().manual_seed(0)
    x, weight = (torch.randn(64, 64, generator=generator) for _ in range(2))
    codes, scales = quantize_rows(weight, format)
    expected = reference_linear(x.to(dtype), codes, scales, format).float()
    try:
        out = w8a8_linear(x.to(device, dtype), codes.to(device), scales.to(device), kernel).float().cpu()
    except (RuntimeError, NotImplementedError, AttributeError):
        return False
    return bool((out - expected).abs().max() <= 1e-2 * expected.abs().max())


def best_kernel(format: Format, dtype: torch.dtype, device: torch.device) -> Kernel:
    """The first kernel of a format that works on the device. Raises SettingError if none does."""
    if device.type == "meta":  # where memory is counted and nothing computed
        return KERNELS[format][0] if format == "int8" or dtype == torch.bfloat16 else "fp8"
    # CPUs only emulate eight-bit floats, at a small part of float32's speed.
    if format == "int8" or device.type != "cpu":
        for kernel in KERNELS[format]:
            if kernel_works(kernel, dtype, device):
                return kernel
    need = "an NVIDIA GPU, or a CPU and a torch with integer products"
    if format == "fp8":
        need = "an NVIDIA GPU of compute capability 8.9 or above, or an AMD one with fp8 units"
    raise SettingError(
        f"{device} does not multiply in {format}: that takes {need}. Keep the weights in {format} and dequantize them "
        'to multiply instead (scheme="w8a16").'
    )


def quantize_tokens(x_BNLK: Tensor, block: int) -> tuple[Tensor, Tensor]:
    """Codes `[B, N, L, K]` and scales `[B, N, blocks]` of `block` tokens of a head each, in int8."""
    tokens = x_BNLK.shape[2]
    blocks = F.pad(x_BNLK.float(), (0, 0, 0, -tokens % block)).unflatten(2, (-1, block))
    scales = blocks.abs().amax((-2, -1)).clamp_(min=1e-8).div_(127.0)
    codes = blocks.div(scales[..., None, None]).add_(0.5).floor_().to(torch.int8)
    return codes.flatten(2, 3)[:, :, :tokens], scales


def reference_int8_attention(q_BNLK: Tensor, k_BNLK: Tensor, v_BNLK: Tensor) -> Tensor:
    """Attention with queries and keys in int8, rounding as the kernel (SageAttention, https://arxiv.org/abs/2410.02367).

    Keys have their mean over tokens subtracted first, which the softmax does not see and large channels need. Each
    block of tokens of a head has one scale. The softmax runs over blocks of keys, its weights and the values are
    multiplied in the values' type and added in float32.
    """
    queries, keys = 128, 64  # tokens of a block, as in `ops.triton`
    k = k_BNLK.float() - k_BNLK.mean(2, keepdim=True, dtype=torch.float32)
    (q_codes, q_scales), (k_codes, k_scales) = quantize_tokens(q_BNLK, queries), quantize_tokens(k, keys)
    q_scales = (q_scales * (q_BNLK.shape[-1] ** -0.5 * math.log2(math.e))).repeat_interleave(queries, dim=2)
    q_scales = q_scales[:, :, : q_BNLK.shape[2], None]
    highest = torch.full_like(q_scales, float("-inf"))
    total, out = torch.zeros_like(q_scales), torch.zeros_like(q_BNLK, dtype=torch.float32)
    for index, start in enumerate(range(0, k.shape[2], keys)):
        part = slice(start, start + keys)
        scores = (q_codes.float() @ k_codes[:, :, part].float().mT) * (q_scales * k_scales[:, :, index, None, None])
        new_highest = torch.maximum(highest, scores.amax(-1, keepdim=True))
        weights, shrink = torch.exp2(scores - new_highest), torch.exp2(highest - new_highest)
        total = total * shrink + weights.sum(-1, keepdim=True)
        out = out * shrink + weights.to(v_BNLK.dtype).float() @ v_BNLK[:, :, part].float()
        highest = new_highest
    return (out / total).to(v_BNLK.dtype)


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


class EightBitAttention:
    """Attention in eight bits for the heads that gain by it, and exact attention for the others."""

    def __init__(self, eight_bit: AttentionKernel, exact: AttentionKernel) -> None:
        self.eight_bit, self.exact = eight_bit, exact

    def __call__(self, q_BNLK: Tensor, k_BNLK: Tensor, v_BNLK: Tensor) -> Tensor:
        """See `pidecode.models.attention.attention`."""
        kernel = self.eight_bit if q_BNLK.shape[-1] in EIGHT_BIT_HEADS else self.exact
        return kernel(q_BNLK, k_BNLK, v_BNLK)


class QuantizedLinear(nn.Module):
    """A linear layer whose weight is stored in eight bits with one scale per output channel.

    Args:
        linear: The layer to replace.
        format: Format of the stored weight.
        kernel: Multiplies in eight bits (w8a8); None dequantizes the weight at each use (w8a16), as a layer always
            does whose sides are no multiples of `ALIGNMENT`.
    """

    codes: Tensor
    scales: Tensor
    bias: Tensor | None

    def __init__(self, linear: nn.Linear, format: Format, kernel: Kernel | None = None) -> None:
        super().__init__()
        self.in_features, self.out_features, self.dtype = linear.in_features, linear.out_features, linear.weight.dtype
        self.kernel = None if self.in_features % ALIGNMENT or self.out_features % ALIGNMENT else kernel
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
        if self.kernel is None:
            return F.linear(x, self.weight.to(x.dtype), self.bias)
        out = w8a8_linear(x.flatten(0, -2), self.codes, self.scales, self.kernel, self.bias)
        return out.view(*x.shape[:-1], -1)


@dataclass(frozen=True, slots=True)
class WeightSlice:
    """Some of a layer's weight, dequantized or with its scales, ready to multiply with."""

    weight: Tensor  # `[..., out, in]`; eight-bit codes where the layer multiplies in eight bits
    scales: Tensor | None = None  # `[..., out, 1]` of such codes
    kernel: Kernel | None = None  # multiplies them

    def __call__(self, x_TK: Tensor, bias: Tensor | None = None) -> Tensor:
        """`x @ weight^T + bias`, in x's type."""
        if self.scales is None or self.kernel is None:
            return F.linear(x_TK, self.weight, bias)
        return w8a8_linear(x_TK, self.weight, self.scales, self.kernel, bias)

    @property
    def per_output(self) -> Tensor:
        """The tensor that a factor per output channel is multiplied into: the weight itself, or its scales."""
        return self.weight if self.scales is None else self.scales

    def map(self, change: Callable[[Tensor], Tensor]) -> WeightSlice:
        """The same with weight and scales both rearranged."""
        return replace(self, weight=change(self.weight), scales=None if self.scales is None else change(self.scales))


def _slice(linear: nn.Module, rows: Callable[[Tensor], Tensor], columns: slice = slice(None)) -> WeightSlice:
    if not isinstance(linear, QuantizedLinear):
        return WeightSlice(rows(cast(Tensor, linear.weight))[..., columns])
    codes, scales = rows(linear.codes)[..., columns], rows(linear.scales)
    if linear.kernel is None or codes.shape[-1] % ALIGNMENT or codes.shape[:-1].numel() % ALIGNMENT:
        return WeightSlice(dequantize(codes, scales, linear.dtype))
    return WeightSlice(codes, scales, linear.kernel)


def weight_rows(linear: nn.Module, rows: slice) -> WeightSlice:
    """Rows `[rows, in]` of a layer's weight; no others are dequantized."""
    return _slice(linear, lambda t: t[rows])


def weight_columns(linear: nn.Module, columns: slice) -> WeightSlice:
    """Columns `[out, columns]` of a layer's weight; no others are dequantized."""
    # Kernels want contiguous rows; made so once here, not at each product.
    cut = _slice(linear, lambda t: t, columns)
    return cut if cut.scales is None else cut.map(Tensor.contiguous)


def weight_block(linear: nn.Module, split: tuple[int, ...], index: tuple[slice, ...]) -> WeightSlice:
    """Rows of a layer seen as a `split` grid, indexed: `[*indexed, in]`; no others are dequantized."""
    return _slice(linear, lambda t: t.unflatten(0, split)[index])


@torch.no_grad()
def quantize(module: nn.Module, format: Format, kernel: Kernel | None = None) -> int:
    """Replace the large linear layers below `module` by quantized ones, one after the other; returns how many.

    With a kernel of `best_kernel` they also multiply in eight bits.

    Raises:
        SettingError: The format does not exist, or the kernel is not one of its own.
    """
    if format not in STORED:
        raise SettingError(f"There is no weight format {format!r}; there are {', '.join(STORED)}.")
    if kernel is not None and kernel not in KERNELS[format]:
        raise SettingError(f"Weights in {format} cannot be multiplied in {kernel}; use one format for both.")
    count = 0
    for parent in list(module.modules()):
        for name, child in list(parent.named_children()):
            if type(child) is nn.Linear and child.weight.numel() >= MIN_WEIGHTS:
                setattr(parent, name, QuantizedLinear(child, format, kernel))
                count += 1
    return count
