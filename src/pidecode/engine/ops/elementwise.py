# SPDX-License-Identifier: Apache-2.0
"""Elementwise ops of the in-place forward: norm, modulation, gates, rotary embedding.

Each sum has a plain twin in `model/layers.py` or `model/rope.py` that autograd can follow; these write in place,
take their statistics in float32 without a float32 copy of the input, and agree with the twin to rounding.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from importlib.util import find_spec
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from pidecode.engine.ops.quantize import WeightSlice
from pidecode.errors import MissingDependencyError

if TYPE_CHECKING:
    from pidecode.engine.ops.compiled import CompiledOps


EPS = 1e-6

_fused: ContextVar[bool] = ContextVar("fused_sums", default=False)
_compiled: ContextVar[CompiledOps | None] = ContextVar("compiled_sums", default=None)


@contextmanager
def fused() -> Iterator[None]:
    """Within the block, run the sums that have one as a Triton kernel (`triton.py`).

    Raises MissingDependencyError where Triton is not installed.
    """
    if find_spec("triton") is None:
        raise MissingDependencyError("Fused kernels need triton, which comes with GPU builds of torch on Linux.")
    token = _fused.set(True)
    try:
        yield
    finally:
        _fused.reset(token)


@contextmanager
def compiled(sums: CompiledOps) -> Iterator[None]:
    """Within the block, run the sums that have one as the framework compiled them."""
    token = _compiled.set(sums)
    try:
        yield
    finally:
        _compiled.reset(token)


def parts(length: int, size: int) -> Iterator[slice]:
    """Cut `length` into runs of at most `size`, as equal as can be, so that no short tail wastes a matrix product."""
    count = max(1, -(-length // size))
    step = -(-length // count)
    for start in range(0, length, step):
        yield slice(start, min(start + step, length))


def inverse_rms(x: Tensor) -> Tensor:
    """`1 / sqrt(mean(x^2) + eps)` over the last axis, kept, float32; x of any float type is not copied."""
    norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=torch.float32)
    return norm.square_().div_(x.shape[-1]).add_(EPS).rsqrt_()  # type: ignore[no-any-return]


def norm_modulate(x: Tensor, shift: Tensor, factor: Tensor, dtype: torch.dtype) -> Tensor:
    """`rms_norm(x) * factor + shift`, summed in float32, as `dtype`; twin: `modulate(RMSNorm(x), shift, scale)`.

    `factor` is `(1 + scale) * norm weight`: a step's scales are known before its tokens, so they are merged once.
    """
    if (sums := _compiled.get()) is not None:
        return sums.norm_modulate(x, shift, factor, dtype)
    if _fused.get() and (shift.ndim == 1 or shift.shape == x.shape == factor.shape):
        from pidecode.engine.ops import triton as triton_kernels

        return triton_kernels.norm_modulate(x, shift, factor, dtype)
    normed = x * inverse_rms(x)
    out = normed if normed.dtype == dtype else torch.empty_like(normed, dtype=dtype)
    return torch.addcmul(shift, normed, factor, out=out)


def add_gated_(x: Tensor, branch: Tensor, gate: Tensor) -> Tensor:
    """`x += gate * branch`, in place, whatever the types of the two."""
    if (sums := _compiled.get()) is not None:
        return sums.add_gated_(x, branch, gate)
    if _fused.get() and x.ndim == 2 and x.stride(1) == branch.stride(1) == 1:
        from pidecode.engine.ops import triton as triton_kernels

        return triton_kernels.add_gated_(x, branch, gate)
    return x.addcmul_(branch, gate)


def add_norm_modulate_(
    x: Tensor, branch: Tensor, gate: Tensor, shift: Tensor, factor: Tensor, dtype: torch.dtype
) -> Tensor:
    """`add_gated_`, then `norm_modulate` of what came of it: one pass over the stream where sums are compiled."""
    if (sums := _compiled.get()) is not None:
        return sums.add_norm_modulate_(x, branch, gate, shift, factor, dtype)
    return norm_modulate(add_gated_(x, branch, gate), shift, factor, dtype)


def gate_latent_(x_TD: Tensor, tokens_TD: Tensor, weight_OD: Tensor, logits: Tensor) -> Tensor:
    """`x += sigmoid(x @ weight^T + logits) * tokens`, in place; twin: `Gate.forward`.

    One opening per token (`O` is 1, logits `[T, 1]`) or per channel.
    """
    if _fused.get() and len(weight_OD) == 1 and x_TD.stride(1) == tokens_TD.stride(1) == 1:
        from pidecode.engine.ops import triton as triton_kernels

        return triton_kernels.gate_latent_(x_TD, tokens_TD, weight_OD, logits)
    return add_gated_(x_TD, tokens_TD, torch.sigmoid(F.linear(x_TD.to(weight_OD.dtype), weight_OD) + logits))


def update_pixels_(
    tile_TGC: Tensor, expanded_TGC: Tensor, vectors: tuple[Tensor, ...], fc1: nn.Module, fc2: nn.Module
) -> Tensor:
    """The second half of a pixel block after its large products, in place; twin: the end of `PixelBlock.forward`.

    expanded_TGC: what was attended, expanded to pixels. vectors: gate, shift, factor and gate, each `[T, G * C]`.
    """
    if _fused.get() and type(fc1) is type(fc2) is nn.Linear and tile_TGC.stride()[1:] == (tile_TGC.shape[2], 1):
        from pidecode.engine.ops import triton as triton_kernels

        return triton_kernels.update_pixels_(tile_TGC, expanded_TGC, vectors, fc1, fc2)
    gate1, shift2, factor2, gate2 = (vector.view(tile_TGC.shape) for vector in vectors)
    inner = add_norm_modulate_(tile_TGC, expanded_TGC, gate1, shift2, factor2, expanded_TGC.dtype)
    hidden = fc1(inner.flatten(0, 1))
    return add_gated_(tile_TGC, fc2(torch.ops.aten.gelu_(hidden)).view(tile_TGC.shape), gate2)


def norm_rotate_(heads_TNK: Tensor, weight_K: Tensor, rotation: Tensor | None) -> None:
    """RMS-normalize each head and rotate its channel pairs, in place; twin: `rotate(RMSNorm(x), rotation)`.

    heads_TNK: queries or keys `[tokens, heads, head_dim]`, any strides with a dense last axis.
    rotation: `[tokens, head_dim / 2]` complex64, or None where nothing is rotated.
    """
    if (sums := _compiled.get()) is not None:
        sums.norm_rotate_(heads_TNK, weight_K, rotation)
        return
    if _fused.get() and heads_TNK.stride(2) == 1:
        from pidecode.engine.ops import triton as triton_kernels

        return triton_kernels.norm_rotate_(heads_TNK, weight_K, rotation)
    x = heads_TNK if heads_TNK.dtype == torch.float32 else heads_TNK.float()
    x.mul_(inverse_rms(x)).mul_(weight_K)
    if rotation is not None:
        _rotate_(x, rotation)
    if x is not heads_TNK:
        heads_TNK.copy_(x)


def _rotate_(x_TNK: Tensor, rotation: Tensor) -> None:
    if x_TNK.is_cpu or x_TNK.is_cuda or x_TNK.is_meta:
        torch.view_as_complex(x_TNK.unflatten(-1, (-1, 2))).mul_(rotation.unsqueeze(1))
        return
    # Not every device multiplies complex numbers.
    even, odd = x_TNK.unflatten(-1, (-1, 2)).unbind(-1)
    cos, sin = rotation.real.unsqueeze(1), rotation.imag.unsqueeze(1)
    turned = even * sin + odd * cos
    even.copy_(even * cos - odd * sin)
    odd.copy_(turned)


def linear_into(linear: nn.Module, x_TD: Tensor, out: Tensor) -> None:
    """Write `linear(x)` into `out`, straight from the matrix product where the layer is a plain one."""
    if type(linear) is nn.Linear and out.dtype == linear.weight.dtype:
        if linear.bias is None:
            torch.mm(x_TD, linear.weight.t(), out=out)
        else:
            torch.addmm(linear.bias, x_TD, linear.weight.t(), out=out)
    else:
        out.copy_(linear(x_TD))


def silu_times_(x: Tensor, other: Tensor) -> Tensor:
    """`silu(x) * other`, into `x`."""
    if (sums := _compiled.get()) is not None:
        return sums.silu_times_(x, other)
    return F.silu(x, inplace=True).mul_(other)


def gated_feed_forward(x: Tensor, w1: nn.Module, w3: nn.Module, w2: nn.Module) -> Tensor:
    """`w2(silu(w1 x) * w3 x)` with one inner buffer less; twin: `GatedFeedForward`."""
    return w2(silu_times_(w1(x), w3(x)))  # type: ignore[no-any-return]


def accumulate_(total: Tensor, x: Tensor, matrix: WeightSlice) -> None:
    """`total += x @ matrix^T`; a total wider than its terms stays wide."""
    if total.dtype == x.dtype and matrix.scales is None:
        total.addmm_(x, matrix.weight.t())
    else:
        total.add_(matrix(x))
