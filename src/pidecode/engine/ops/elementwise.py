# SPDX-License-Identifier: Apache-2.0
"""Elementwise ops of the in-place forward: norm, modulation, gates, rotary embedding.

Each has a reference implementation in `pidecode.models.pid` that autograd can differentiate. These write in place,
compute statistics in float32 without a float32 copy of the input, and agree with the reference to rounding.
Inside `with compiled_ops(...)` those that can run as fused kernels (`ops.compiled`), experimental.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from pidecode.engine.ops.quantize import WeightSlice

if TYPE_CHECKING:
    from pidecode.engine.ops.compiled import CompiledOps


EPS = 1e-6

_compiled: ContextVar[CompiledOps | None] = ContextVar("compiled_ops", default=None)


@contextmanager
def compiled_ops(ops: CompiledOps) -> Iterator[None]:
    """Inside the `with`, run the ops that have one as fused kernels. Experimental."""
    token = _compiled.set(ops)
    try:
        yield
    finally:
        _compiled.reset(token)


def parts(length: int, size: int) -> Iterator[slice]:
    """Slices of at most `size` that cover `length`, as equal as can be: a short tail would waste a matrix product."""
    count = max(1, -(-length // size))
    step = -(-length // count)
    for start in range(0, length, step):
        yield slice(start, min(start + step, length))


def runs(batch: int, length: int, size: int) -> Iterator[tuple[slice, slice]]:
    """Samples and tokens of runs of at most `size` tokens: several whole samples, or a part of one."""
    if length > size // 2:
        for b in range(batch):
            for part in parts(length, size):
                yield slice(b, b + 1), part
        return
    for samples in parts(batch, size // length):
        yield samples, slice(0, length)


def cut_run(x: Tensor, run: tuple[slice, slice]) -> Tensor:
    """A run of `runs` of a contiguous `[B, L, ...]` as `[T, ...]`, a view."""
    return x[run].flatten(0, 1)


def inverse_rms(x: Tensor) -> Tensor:
    """`1 / sqrt(mean(x^2) + eps)` over the last axis, kept, float32; x of any float type is not copied."""
    norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=torch.float32)
    return norm.square_().div_(x.shape[-1]).add_(EPS).rsqrt_()  # type: ignore[no-any-return]


def one_kernel_norm(x: Tensor) -> bool:
    """Whether torch has the RMS norm as one kernel where x is; on CPUs the ops below copy less."""
    return not x.is_cpu


def rms_norm_(x: Tensor, weight: Tensor) -> Tensor:
    """`x / rms(x) * weight` over the last axis of a float32 x, which may be overwritten."""
    if one_kernel_norm(x):
        return F.rms_norm(x, x.shape[-1:], weight.float(), EPS)
    return x.mul_(inverse_rms(x)).mul_(weight)


def norm_to(x: Tensor, weight: Tensor, dtype: torch.dtype) -> Tensor:
    """`rms_norm_(x, weight)` as `dtype`."""
    if (ops := _compiled.get()) is not None:
        return ops.norm_modulate(x, torch.zeros_like(weight), weight, dtype)
    return rms_norm_(x, weight).to(dtype)


def norm_modulate(x: Tensor, shift: Tensor, factor: Tensor, dtype: torch.dtype) -> Tensor:
    """`rms_norm(x) * factor + shift`, computed in float32, as `dtype`; reference: `modulate(RMSNorm(x), shift, scale)`.

    `factor` is `(1 + scale) * norm weight`, merged once per step rather than per token.
    """
    if (ops := _compiled.get()) is not None:
        return ops.norm_modulate(x, shift, factor, dtype)
    normed = F.rms_norm(x, x.shape[-1:], eps=EPS) if one_kernel_norm(x) else x * inverse_rms(x)
    out = normed if normed.dtype == dtype else torch.empty_like(normed, dtype=dtype)
    return torch.addcmul(shift, normed, factor, out=out)


def add_gated_(x: Tensor, branch: Tensor, gate: Tensor) -> Tensor:
    """`x += gate * branch`, in place, whatever the types of the two."""
    if (ops := _compiled.get()) is not None:
        return ops.add_gated_(x, branch, gate)
    return x.addcmul_(branch, gate)


def add_norm_modulate_(
    x: Tensor, branch: Tensor, gate: Tensor, shift: Tensor, factor: Tensor, dtype: torch.dtype
) -> Tensor:
    """`add_gated_`, then `norm_modulate` of the result: one pass over the stream where ops are compiled."""
    if (ops := _compiled.get()) is not None:
        return ops.add_norm_modulate_(x, branch, gate, shift, factor, dtype)
    return norm_modulate(add_gated_(x, branch, gate), shift, factor, dtype)


def gate_latent_(x_TD: Tensor, tokens_TD: Tensor, weight_OD: Tensor, logits: Tensor) -> Tensor:
    """`x += sigmoid(x @ weight^T + logits) * tokens`, in place; reference: `Gate.forward`.

    One gate per token (O is 1, logits `[T, 1]`) or per channel (O is D).
    """
    if len(weight_OD) == 1 and (ops := _compiled.get()) is not None:
        return ops.gate_latent_(x_TD, tokens_TD, weight_OD[0], logits)
    return add_gated_(x_TD, tokens_TD, torch.sigmoid(F.linear(x_TD.to(weight_OD.dtype), weight_OD) + logits))


def update_pixels_(
    tile_TGC: Tensor, expanded_TGC: Tensor, vectors: tuple[Tensor, ...], fc1: nn.Module, fc2: nn.Module
) -> Tensor:
    """What a pixel block does after its attention, in place; reference: the end of `PixelBlock.forward`.

    Args:
        tile_TGC: Pixel tokens of a tile, float32.
        expanded_TGC: Attention output, expanded to pixels.
        vectors: Gate, shift, factor and gate, each `[T, G * C]`.
        fc1: First layer of the feed-forward.
        fc2: Its second layer.
    """
    if (ops := _compiled.get()) is not None and ops.fuses_pixels(tile_TGC, fc1, fc2):
        return ops.update_pixels_(tile_TGC, expanded_TGC, vectors, fc1, fc2)
    gate1, shift2, factor2, gate2 = (vector.view(tile_TGC.shape) for vector in vectors)
    inner = add_norm_modulate_(tile_TGC, expanded_TGC, gate1, shift2, factor2, expanded_TGC.dtype)
    hidden = fc1(inner.flatten(0, 1))
    return add_gated_(tile_TGC, fc2(torch.ops.aten.gelu_(hidden)).view(tile_TGC.shape), gate2)


def norm_rotate_(heads_TNK: Tensor, weight_K: Tensor, rotation: Tensor | None) -> None:
    """RMS-normalize each head and rotate its channel pairs, in place; reference: `rotate(RMSNorm(x), rotation)`.

    Args:
        heads_TNK: Queries or keys `[tokens, heads, head_dim]`, any strides with a dense last axis.
        weight_K: The norm's weight.
        rotation: `[tokens, head_dim / 2]` complex64, or None where nothing is rotated.
    """
    if (ops := _compiled.get()) is not None:
        ops.norm_rotate_(heads_TNK, weight_K, rotation)
        return
    x = heads_TNK if heads_TNK.dtype == torch.float32 else heads_TNK.float()
    x = rms_norm_(x, weight_K)
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
    new_odd = even * sin + odd * cos
    even.copy_(even * cos - odd * sin)
    odd.copy_(new_odd)


def linear_into(linear: nn.Module, x_TD: Tensor, out: Tensor) -> None:
    """Write `linear(x)` into `out`, directly from the matrix product where the layer is an `nn.Linear`."""
    if type(linear) is nn.Linear and out.dtype == linear.weight.dtype:
        if linear.bias is None:
            torch.mm(x_TD, linear.weight.t(), out=out)
        else:
            torch.addmm(linear.bias, x_TD, linear.weight.t(), out=out)
    else:
        out.copy_(linear(x_TD))


def silu_times_(x: Tensor, other: Tensor) -> Tensor:
    """`silu(x) * other`, into `x`."""
    if (ops := _compiled.get()) is not None:
        return ops.silu_times_(x, other)
    return F.silu(x, inplace=True).mul_(other)


def gated_feed_forward(x: Tensor, w1: nn.Module, w3: nn.Module, w2: nn.Module) -> Tensor:
    """`w2(silu(w1 x) * w3 x)` with one inner buffer less; reference: `GatedFeedForward`."""
    return w2(silu_times_(w1(x), w3(x)))  # type: ignore[no-any-return]


def accumulate_(total: Tensor, x: Tensor, matrix: WeightSlice) -> None:
    """`total += x @ matrix^T`; a float32 total stays float32."""
    if total.dtype == x.dtype and matrix.scales is None:
        total.addmm_(x, matrix.weight.t())
    else:
        total.add_(matrix(x))
