# SPDX-License-Identifier: Apache-2.0
"""Triton kernels of what `torch.compile` cannot fuse: a pixel block's feed-forward, and attention in eight bits.

Experimental: compared with their reference implementations in Triton's interpreter and compiled ahead for the GPUs in
docs/benchmarks.md; no gain was measured on one yet.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor, nn

QUERIES, KEYS = 128, 64  # tokens that share a scale in eight-bit attention, and that a program multiplies together


@triton.jit  # type: ignore[untyped-decorator]
def _update_pixels(  # type: ignore[no-untyped-def]
    x_ptr, branch_ptr, gate1_ptr, shift_ptr, factor_ptr, gate2_ptr, w1_ptr, b1_ptr, w2_ptr, b2_ptr,
    pixels, group,
    x_stride, branch_stride, vector_stride,
    WIDTH: tl.constexpr, HIDDEN: tl.constexpr,
    ROWS: tl.constexpr, LANES: tl.constexpr, INNER: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
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


@triton.jit  # type: ignore[untyped-decorator]
def _quantize_tokens(  # type: ignore[no-untyped-def]
    x_ptr, mean_ptr, codes_ptr, scales_ptr,
    tokens, heads,
    batch_stride, head_stride, token_stride,
    factor, SMOOTH: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    # One program quantizes BLOCK tokens of a head to int8 with one scale.
    block = tl.program_id(0)
    index = tl.program_id(1).to(tl.int64)
    token = block * BLOCK + tl.arange(0, BLOCK)
    lane = tl.arange(0, WIDTH)
    mask_in = token[:, None] < tokens
    x_ptr += (index // heads) * batch_stride + (index % heads) * head_stride
    x = tl.load(x_ptr + token[:, None].to(tl.int64) * token_stride + lane[None, :], mask=mask_in, other=0.0)
    x = x.to(tl.float32)
    if SMOOTH:
        x = tl.where(mask_in, x - tl.load(mean_ptr + index * WIDTH + lane)[None, :], 0.0)
    scale = tl.maximum(tl.max(tl.max(tl.abs(x), axis=1), axis=0), 1e-8) / 127.0
    row = index * tl.num_programs(0) * BLOCK + token
    codes = tl.floor(x / scale + 0.5).to(tl.int8)
    tl.store(codes_ptr + row[:, None] * WIDTH + lane[None, :], codes)
    tl.store(scales_ptr + index * tl.num_programs(0) + block, scale * factor)


@triton.jit  # type: ignore[untyped-decorator]
def _int8_attention(  # type: ignore[no-untyped-def]
    q_ptr, q_scale_ptr, k_ptr, k_scale_ptr, v_ptr, out_ptr,
    q_tokens, k_tokens, heads,
    v_batch_stride, v_head_stride, v_token_stride,
    WIDTH: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    # One program attends with ROWS queries of a head to all its keys, COLUMNS at a time, with a running softmax.
    block = tl.program_id(0)
    index = tl.program_id(1).to(tl.int64)
    row = block * ROWS + tl.arange(0, ROWS)
    lane = tl.arange(0, WIDTH)
    column = tl.arange(0, COLUMNS)
    blocks = tl.cdiv(k_tokens, COLUMNS)
    q = tl.load(q_ptr + (index * tl.num_programs(0) * ROWS + row)[:, None] * WIDTH + lane[None, :])
    q_scale = tl.load(q_scale_ptr + index * tl.num_programs(0) + block)
    k_ptr += index * blocks * COLUMNS * WIDTH
    k_scale_ptr += index * blocks
    v_ptr += (index // heads) * v_batch_stride + (index % heads) * v_head_stride
    highest = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    out = tl.zeros([ROWS, WIDTH], tl.float32)
    for key_block in range(blocks):
        token = key_block * COLUMNS + column
        k = tl.load(k_ptr + token[None, :] * WIDTH + lane[:, None])
        scores = tl.dot(q, k, out_dtype=tl.int32).to(tl.float32) * (q_scale * tl.load(k_scale_ptr + key_block))
        scores = tl.where(token[None, :] < k_tokens, scores, float("-inf"))
        new_highest = tl.maximum(highest, tl.max(scores, axis=1))
        weights = tl.exp2(scores - new_highest[:, None])
        shrink = tl.exp2(highest - new_highest)
        total = total * shrink + tl.sum(weights, axis=1)
        v_offset = token[:, None].to(tl.int64) * v_token_stride + lane[None, :]
        v = tl.load(v_ptr + v_offset, mask=token[:, None] < k_tokens, other=0.0)
        weights = weights.to(v.dtype)
        if UPCAST:
            weights = weights.to(tl.float32)
            v = v.to(tl.float32)
        out = tl.dot(weights, v, out * shrink[:, None], input_precision="ieee")
        highest = new_highest
    out = out / total[:, None]
    out_row = ((index // heads) * q_tokens + row) * heads + index % heads
    out_offset = out_row[:, None] * WIDTH + lane[None, :]
    tl.store(out_ptr + out_offset, out.to(out_ptr.dtype.element_ty), mask=row[:, None] < q_tokens)


def _quantized(x_BNLK: Tensor, block: int, factor: float, mean_BNK: Tensor | None) -> tuple[Tensor, Tensor]:
    """Codes `[B, N, blocks * block, K]` and scales `[B, N, blocks]`, these multiplied by a factor."""
    batch, heads, tokens, width = x_BNLK.shape
    blocks = triton.cdiv(tokens, block)
    codes = x_BNLK.new_empty(batch, heads, blocks * block, width, dtype=torch.int8)
    scales = x_BNLK.new_empty(batch, heads, blocks, dtype=torch.float32)
    _quantize_tokens[(blocks, batch * heads)](
        x_BNLK, scales if mean_BNK is None else mean_BNK, codes, scales, tokens, heads,
        *x_BNLK.stride()[:3], factor, mean_BNK is not None, width, block,
    )  # fmt: skip
    return codes, scales


def int8_attention(q_BNLK: Tensor, k_BNLK: Tensor, v_BNLK: Tensor) -> Tensor:
    """Attention with queries and keys in int8; reference: `quantize.reference_int8_attention`.

    Heads have 32, 64 or 128 channels; all strides are free but the last, which is dense.
    """
    batch, heads, tokens, width = q_BNLK.shape
    q, q_scales = _quantized(q_BNLK, QUERIES, width**-0.5 * math.log2(math.e), None)
    k, k_scales = _quantized(k_BNLK, KEYS, 1.0, k_BNLK.mean(2, dtype=torch.float32))
    out = q_BNLK.new_empty(batch, tokens, heads, width)
    _int8_attention[(q_scales.shape[2], batch * heads)](
        q, q_scales, k, k_scales, v_BNLK, out, tokens, k_BNLK.shape[2], heads,
        *v_BNLK.stride()[:3], width, QUERIES, KEYS, _interpreted(),
        num_warps=4 if width <= 64 else 8, num_stages=3,
    )  # fmt: skip
    return out.transpose(1, 2)
