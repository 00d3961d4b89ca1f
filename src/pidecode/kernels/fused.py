# SPDX-License-Identifier: Apache-2.0
"""Triton kernels for the sums around the matrix products; each equals its plain twin in `kernels/lean.py`.

Not the default: they were tested in Triton's interpreter and never timed on a GPU. Inside `with lean.fused():` they
are used, on devices that Triton knows.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit  # type: ignore[untyped-decorator]
def _norm_modulate(  # type: ignore[no-untyped-def]
    x_ptr, shift_ptr, factor_ptr, out_ptr, groups, spread, WIDTH: tl.constexpr, ROWS: tl.constexpr, LANES: tl.constexpr
):
    # One program normalises ROWS vectors of WIDTH values. `spread` is 0 where all share one shift and factor.
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    lanes = tl.arange(0, LANES)
    inside = (rows[:, None] < groups) & (lanes[None, :] < WIDTH)
    place = rows[:, None].to(tl.int64) * WIDTH + lanes[None, :]
    x = tl.load(x_ptr + place, mask=inside, other=0.0).to(tl.float32)
    scale = 1.0 / tl.sqrt(tl.sum(x * x, axis=1) / WIDTH + 1e-6)
    table = rows[:, None].to(tl.int64) * spread + lanes[None, :]
    shift = tl.load(shift_ptr + table, mask=inside, other=0.0).to(tl.float32)
    factor = tl.load(factor_ptr + table, mask=inside, other=0.0).to(tl.float32)
    result = x * scale[:, None] * factor + shift
    tl.store(out_ptr + place, result.to(out_ptr.dtype.element_ty), mask=inside)


def norm_modulate(x: Tensor, shift: Tensor, factor: Tensor, dtype: torch.dtype) -> Tensor:
    """`rms_norm(x) * factor + shift` over the last axis, read once and written once; twin: `lean.norm_modulate`.

    shift, factor: of x's shape, or one vector for all.
    """
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
    OPEN: tl.constexpr,
    LANES: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    lanes = tl.program_id(1) * LANES + tl.arange(0, LANES)
    inside = lanes < width
    gate = tl.load(gate_ptr + row * gate_stride + lanes * gate_step, mask=inside, other=0.0).to(tl.float32)
    if OPEN:
        gate = 1.0 / (1.0 + tl.exp(-gate))
    branch = tl.load(branch_ptr + row * branch_stride + lanes, mask=inside, other=0.0).to(tl.float32)
    x = tl.load(x_ptr + row * x_stride + lanes, mask=inside, other=0.0).to(tl.float32)
    tl.store(x_ptr + row * x_stride + lanes, (x + gate * branch).to(x_ptr.dtype.element_ty), mask=inside)


def add_gated_(x_TD: Tensor, branch_TD: Tensor, gate: Tensor, *, logits: bool = False) -> Tensor:
    """`x += gate * branch` in place, or `sigmoid(gate)` with `logits`; twin: `lean.add_gated_`.

    gate: `[T, D]`, `[T, 1]` or `[D]`; rows of all three may be any distance apart, their last axis must be dense.
    """
    rows, width = x_TD.shape
    wide = gate.expand(rows, width)
    lanes = min(1024, triton.next_power_of_2(width))
    _add_gated[(rows, triton.cdiv(width, lanes))](
        x_TD, branch_TD, wide, width, x_TD.stride(0), branch_TD.stride(0), wide.stride(0), wide.stride(1),
        logits, lanes,
    )  # fmt: skip
    return x_TD
