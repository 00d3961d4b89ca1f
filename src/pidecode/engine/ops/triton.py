# SPDX-License-Identifier: Apache-2.0
"""Triton kernels of the elementwise ops.

Experimental: tested in Triton's interpreter, no gain was measured on a GPU yet. They run in
`with elementwise.triton_ops():`. Each equals the function of its name in `elementwise`, its reference implementation.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor, nn


@triton.jit  # type: ignore[untyped-decorator]
def _norm_modulate(  # type: ignore[no-untyped-def]
    x_ptr,
    shift_ptr,
    factor_ptr,
    out_ptr,
    groups,
    row_stride,
    WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
    LANES: tl.constexpr,
):
    # One program normalizes ROWS vectors of WIDTH values. `row_stride` is 0 where all share one shift and factor.
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    lanes = tl.arange(0, LANES)
    mask_in = (rows[:, None] < groups) & (lanes[None, :] < WIDTH)
    offset = rows[:, None].to(tl.int64) * WIDTH + lanes[None, :]
    x = tl.load(x_ptr + offset, mask=mask_in, other=0.0).to(tl.float32)
    scale = 1.0 / tl.sqrt(tl.sum(x * x, axis=1) / WIDTH + 1e-6)
    table = rows[:, None].to(tl.int64) * row_stride + lanes[None, :]
    shift = tl.load(shift_ptr + table, mask=mask_in, other=0.0).to(tl.float32)
    factor = tl.load(factor_ptr + table, mask=mask_in, other=0.0).to(tl.float32)
    result = x * scale[:, None] * factor + shift
    tl.store(out_ptr + offset, result.to(out_ptr.dtype.element_ty), mask=mask_in)


def norm_modulate(x: Tensor, shift: Tensor, factor: Tensor, dtype: torch.dtype) -> Tensor:
    """`rms_norm(x) * factor + shift` over the last axis, read and written once; factor and shift may be one vector."""
    x = x.contiguous()
    width = x.shape[-1]
    groups = x.numel() // width
    shared = shift.numel() == width
    out = torch.empty_like(x, dtype=dtype)
    lanes = triton.next_power_of_2(width)
    rows = max(1, 4096 // lanes)
    _norm_modulate[(triton.cdiv(groups, rows),)](
        x, shift.contiguous(), factor.contiguous(), out, groups, 0 if shared else width, width, rows, lanes
    )
    return out


@triton.jit  # type: ignore[untyped-decorator]
def _add_gated(  # type: ignore[no-untyped-def]
    x_ptr,
    branch_ptr,
    gate_ptr,
    width,
    x_stride,
    branch_stride,
    gate_stride,
    gate_step,
    SIGMOID: tl.constexpr,
    LANES: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    lanes = tl.program_id(1) * LANES + tl.arange(0, LANES)
    mask_in = lanes < width
    gate = tl.load(gate_ptr + row * gate_stride + lanes * gate_step, mask=mask_in, other=0.0).to(tl.float32)
    if SIGMOID:
        gate = 1.0 / (1.0 + tl.exp(-gate))
    branch = tl.load(branch_ptr + row * branch_stride + lanes, mask=mask_in, other=0.0).to(tl.float32)
    x = tl.load(x_ptr + row * x_stride + lanes, mask=mask_in, other=0.0).to(tl.float32)
    tl.store(x_ptr + row * x_stride + lanes, (x + gate * branch).to(x_ptr.dtype.element_ty), mask=mask_in)


def add_gated_(x_TD: Tensor, branch_TD: Tensor, gate: Tensor, *, logits: bool = False) -> Tensor:
    """`x += gate * branch` in place, or `sigmoid(gate)` with `logits`.

    The gate is `[T, D]`, `[T, 1]` or `[D]`; rows of all three may be any distance apart, their last axis must be dense.
    """
    rows, width = x_TD.shape
    expanded_gate = gate.expand(rows, width)
    lanes = min(1024, triton.next_power_of_2(width))
    _add_gated[(rows, triton.cdiv(width, lanes))](
        x_TD, branch_TD, expanded_gate, width, x_TD.stride(0), branch_TD.stride(0),
        expanded_gate.stride(0), expanded_gate.stride(1), logits, lanes,
    )  # fmt: skip
    return x_TD


@triton.jit  # type: ignore[untyped-decorator]
def _norm_rotate(  # type: ignore[no-untyped-def]
    x_ptr,
    weight_ptr,
    rotation_ptr,
    rows,
    heads,
    token_stride,
    head_stride,
    WIDTH: tl.constexpr,
    ROTATE: tl.constexpr,
    ROWS: tl.constexpr,
    LANES: tl.constexpr,
):
    # One program takes ROWS heads; a row's lanes are its pairs of channels, even and odd apart.
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    pair = tl.arange(0, LANES)
    mask_in = (row[:, None] < rows) & (pair[None, :] < WIDTH // 2)
    token = (row // heads).to(tl.int64)[:, None]
    offset = token * token_stride + (row % heads)[:, None] * head_stride + 2 * pair[None, :]
    even = tl.load(x_ptr + offset, mask=mask_in, other=0.0).to(tl.float32)
    odd = tl.load(x_ptr + offset + 1, mask=mask_in, other=0.0).to(tl.float32)
    scale = 1.0 / tl.sqrt((tl.sum(even * even, axis=1) + tl.sum(odd * odd, axis=1)) / WIDTH + 1e-6)
    valid = pair[None, :] < WIDTH // 2
    even = even * scale[:, None] * tl.load(weight_ptr + 2 * pair[None, :], mask=valid, other=0.0).to(tl.float32)
    odd = odd * scale[:, None] * tl.load(weight_ptr + 2 * pair[None, :] + 1, mask=valid, other=0.0).to(tl.float32)
    if ROTATE:
        entry = token * WIDTH + 2 * pair[None, :]
        cos = tl.load(rotation_ptr + entry, mask=mask_in, other=0.0)
        sin = tl.load(rotation_ptr + entry + 1, mask=mask_in, other=0.0)
        even, odd = even * cos - odd * sin, even * sin + odd * cos
    tl.store(x_ptr + offset, even.to(x_ptr.dtype.element_ty), mask=mask_in)
    tl.store(x_ptr + offset + 1, odd.to(x_ptr.dtype.element_ty), mask=mask_in)


def norm_rotate_(heads_TNK: Tensor, weight_K: Tensor, rotation: Tensor | None) -> None:
    """Normalize each head and rotate its channel pairs, in place, in one pass.

    Heads may have any strides with a dense last axis; the rotation is `[tokens, head_dim / 2]` complex64 or None.
    """
    tokens, heads, width = heads_TNK.shape
    lanes = triton.next_power_of_2(width // 2)
    rows = max(1, 2048 // lanes)
    rotation_values = weight_K if rotation is None else torch.view_as_real(rotation.contiguous())
    _norm_rotate[(triton.cdiv(tokens * heads, rows),)](
        heads_TNK, weight_K, rotation_values, tokens * heads, heads, heads_TNK.stride(0), heads_TNK.stride(1),
        width, rotation is not None, rows, lanes,
    )  # fmt: skip


@triton.jit  # type: ignore[untyped-decorator]
def _gate_latent(  # type: ignore[no-untyped-def]
    x_ptr, token_ptr, weight_ptr, logit_ptr, width, x_stride, token_stride, logit_stride, LANES: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64)
    lanes = tl.arange(0, LANES)
    mask_in = lanes < width
    x = tl.load(x_ptr + row * x_stride + lanes, mask=mask_in, other=0.0).to(tl.float32)
    weight = tl.load(weight_ptr + lanes, mask=mask_in, other=0.0)
    # The plain gate reads the stream in the weight's type.
    seen = x.to(weight.dtype).to(tl.float32)
    logit = tl.sum(seen * weight.to(tl.float32), axis=0) + tl.load(logit_ptr + row * logit_stride).to(tl.float32)
    token = tl.load(token_ptr + row * token_stride + lanes, mask=mask_in, other=0.0).to(tl.float32)
    out = x + token / (1.0 + tl.exp(-logit))
    tl.store(x_ptr + row * x_stride + lanes, out.to(x_ptr.dtype.element_ty), mask=mask_in)


def gate_latent_(x_TD: Tensor, tokens_TD: Tensor, weight_1D: Tensor, logits_T1: Tensor) -> Tensor:
    """One gate per token, computed and applied in one pass over the stream."""
    rows, width = x_TD.shape
    _gate_latent[(rows,)](
        x_TD, tokens_TD, weight_1D.contiguous(), logits_T1, width, x_TD.stride(0), tokens_TD.stride(0),
        logits_T1.stride(0), triton.next_power_of_2(width),
    )  # fmt: skip
    return x_TD


@triton.jit  # type: ignore[untyped-decorator]
def _update_pixels(  # type: ignore[no-untyped-def]
    x_ptr,
    branch_ptr,
    gate1_ptr,
    shift_ptr,
    factor_ptr,
    gate2_ptr,
    w1_ptr,
    b1_ptr,
    w2_ptr,
    b2_ptr,
    pixels,
    group,
    x_stride,
    branch_stride,
    vector_stride,
    WIDTH: tl.constexpr,
    HIDDEN: tl.constexpr,
    ROWS: tl.constexpr,
    LANES: tl.constexpr,
    INNER: tl.constexpr,
    UPCAST: tl.constexpr,
):
    # One program finishes ROWS pixels of WIDTH channels; nothing between the loads and the store leaves the chip.
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    lane = tl.arange(0, LANES)
    inner = tl.arange(0, INNER)
    mask_in = (row[:, None] < pixels) & (lane[None, :] < WIDTH)
    token = (row // group).to(tl.int64)[:, None]
    offset = (row % group)[:, None] * WIDTH + lane[None, :]
    vector = token * vector_stride + offset
    x = tl.load(x_ptr + token * x_stride + offset, mask=mask_in, other=0.0).to(tl.float32)
    branch = tl.load(branch_ptr + token * branch_stride + offset, mask=mask_in, other=0.0).to(tl.float32)
    x += tl.load(gate1_ptr + vector, mask=mask_in, other=0.0).to(tl.float32) * branch
    scale = 1.0 / tl.sqrt(tl.sum(x * x, axis=1) / WIDTH + 1e-6)
    factor = tl.load(factor_ptr + vector, mask=mask_in, other=0.0).to(tl.float32)
    shift = tl.load(shift_ptr + vector, mask=mask_in, other=0.0).to(tl.float32)
    valid = (lane[:, None] < WIDTH) & (inner[None, :] < HIDDEN)
    w1 = tl.load(w1_ptr + inner[None, :] * WIDTH + lane[:, None], mask=valid, other=0.0)
    b1 = tl.load(b1_ptr + inner, mask=inner < HIDDEN, other=0.0).to(tl.float32)
    modulated = (x * scale[:, None] * factor + shift).to(w1.dtype)
    if UPCAST:
        modulated = modulated.to(tl.float32)
        w1 = w1.to(tl.float32)
    hidden = tl.dot(modulated, w1, input_precision="ieee") + b1[None, :]
    hidden = 0.5 * hidden * (1.0 + tl.erf(hidden * 0.7071067811865476))
    valid = (inner[:, None] < HIDDEN) & (lane[None, :] < WIDTH)
    w2 = tl.load(w2_ptr + lane[None, :] * HIDDEN + inner[:, None], mask=valid, other=0.0)
    b2 = tl.load(b2_ptr + lane, mask=lane < WIDTH, other=0.0).to(tl.float32)
    hidden = hidden.to(w2.dtype)
    if UPCAST:
        hidden = hidden.to(tl.float32)
        w2 = w2.to(tl.float32)
    out = tl.dot(hidden, w2, input_precision="ieee") + b2[None, :]
    x += tl.load(gate2_ptr + vector, mask=mask_in, other=0.0).to(tl.float32) * out
    tl.store(x_ptr + token * x_stride + offset, x.to(x_ptr.dtype.element_ty), mask=mask_in)


def _interpreted() -> bool:
    """Whether kernels run in Triton's interpreter, which does not multiply bfloat16 matrices."""
    return type(_update_pixels).__name__ == "InterpretedFunction"


def update_pixels_(
    tile_TGC: Tensor, expanded_TGC: Tensor, vectors: tuple[Tensor, ...], fc1: nn.Linear, fc2: nn.Linear
) -> Tensor:
    """The second half of a pixel block after its large products, in place.

    Vectors are gate, shift, factor and gate of the tile, each `[T, G * C]` with rows equally far apart.
    """
    tokens, group, width = tile_TGC.shape
    hidden = fc1.weight.shape[0]
    assert tile_TGC.stride()[1:] == (width, 1)
    assert all(vector.stride() == vectors[0].stride() for vector in vectors)
    lanes, inner = max(16, triton.next_power_of_2(width)), max(16, triton.next_power_of_2(hidden))
    rows = 64
    _update_pixels[(triton.cdiv(tokens * group, rows),)](
        tile_TGC, expanded_TGC, *vectors, fc1.weight, fc1.bias, fc2.weight, fc2.bias,
        tokens * group, group, tile_TGC.stride(0), expanded_TGC.stride(0), vectors[0].stride(0),
        width, hidden, rows, lanes, inner, _interpreted(),
    )  # fmt: skip
    return tile_TGC
