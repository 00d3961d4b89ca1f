# SPDX-License-Identifier: Apache-2.0
"""The pixel blocks in tiles: some patches by some rows of their pixels at a time.

A pixel block is two halves around its attention over patches. The first compresses pixels to patches (modulate,
compress), the second updates them (gated attention, modulate, feed-forward, gate). So one pass over the tiles updates
with block k and compresses for block k + 1, or writes the prediction after the last block; pixels are embedded from the
noisy image in the first pass, and kept between passes only.

Each half multiplies the patch conditions with its own rows of `adaLN_modulation` (shift and scale; gate, shift, scale,
gate), so no product is computed twice, and the whole modulation, six vectors for every pixel, never exists.

Shapes: B batch, L tokens, D hidden, P pixels of a patch, C pixel width, A attention width, T tokens of a tile,
G pixels of a tile per patch.
"""

from __future__ import annotations

from itertools import zip_longest
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from pidecode.engine.machine import Chunks
from pidecode.engine.ops import elementwise as ops
from pidecode.engine.ops.quantize import slice_weight
from pidecode.models.pid.blocks import attend, split_heads
from pidecode.models.pid.network import Condition, PiDNet

SHIFT1, SCALE1, GATE1, SHIFT2, SCALE2, GATE2 = range(6)


class PixelModulation:
    """Rows of a block's `adaLN_modulation` for some pixels and `which` of the six vectors, as one matrix.

    Scales become factors, `(1 + scale) * norm weight`, merged into the matrix: exact in float32 up to rounding. In half
    precision the merged matrix rounds once more, as the reference does each time it adds 1 to a scale.
    """

    def __init__(self, block: Any, pixels: slice, which: slice) -> None:
        linear, P, C = block.adaLN_modulation[0], block.pixels, len(block.norm1.weight)

        def by_vector(rows: Tensor) -> Tensor:
            """Rows `[6 P C, ...]` to those of the pixels, vector by vector `[vectors, G, C, ...]`."""
            part: Tensor = rows.unflatten(0, (P, 6, C))[pixels, which]
            return part.transpose(0, 1).clone(memory_format=torch.contiguous_format)

        matrix, bias = slice_weight(linear, by_vector), by_vector(linear.bias)
        for scale, norm in ((SCALE1, block.norm1), (SCALE2, block.norm2)):
            if which.start <= scale < which.stop:
                matrix.per_output[scale - which.start].mul_(norm.weight[:, None])
                bias[scale - which.start].add_(1).mul_(norm.weight)
        self.weight, self.bias, self.vectors = matrix.map(lambda rows: rows.flatten(0, 2)), bias.flatten(), len(bias)

    def __call__(self, condition_TD: Tensor) -> tuple[Tensor, ...]:
        """Each vector `[T, G * C]`."""
        return self.weight(condition_TD, self.bias).chunk(self.vectors, dim=-1)


class _Compress:
    """First half of a pixel block on the pixels `group`: adds a tile's part to the compressed patches."""

    def __init__(self, block: Any, group: slice) -> None:
        C = len(block.norm1.weight)
        self.modulation = PixelModulation(block, group, slice(SHIFT1, SCALE1 + 1))
        self.compress = slice_weight(block.compress_to_attn, columns=slice(group.start * C, group.stop * C))

    def __call__(self, tile_TGC: Tensor, condition_TD: Tensor, compressed_TA: Tensor) -> None:
        shift, factor = (v.view(tile_TGC.shape) for v in self.modulation(condition_TD))
        pixels = ops.norm_modulate(tile_TGC, shift, factor, condition_TD.dtype)
        ops.accumulate_(compressed_TA, pixels.flatten(1), self.compress)


class _Update:
    """Second half of a pixel block on the pixels `group`: updates the tile in place."""

    def __init__(self, block: Any, group: slice) -> None:
        C = len(block.norm1.weight)
        features = slice(group.start * C, group.stop * C)
        self.modulation = PixelModulation(block, group, slice(GATE1, GATE2 + 1))
        self.expand = slice_weight(block.expand_from_attn, lambda t: t[features])
        self.expand_bias, self.mlp = block.expand_from_attn.bias[features], block.mlp

    def __call__(self, tile_TGC: Tensor, condition_TD: Tensor, attended_TA: Tensor) -> None:
        vectors = self.modulation(condition_TD)
        expanded = self.expand(attended_TA, self.expand_bias).view(tile_TGC.shape)
        ops.update_pixels_(tile_TGC, expanded, vectors, self.mlp.fc1, self.mlp.fc2)


Halves = dict[tuple[type, int, int, int], Any]  # halves of pixel blocks by kind, block and pixels, as they are kept


def _half(kind: type[_Compress | _Update], block: Any | None, group: slice, kept: Halves | None) -> Any:
    """One half of a block on some pixels, made or `kept`; None without a block."""
    if block is None or kept is None:
        return None if block is None else kind(block, group)
    key = kind, id(block), group.start, group.stop
    if key not in kept:
        # Ordinary tensors even in inference mode: they outlive the image.
        with torch.inference_mode(False), torch.no_grad():
            kept[key] = kind(block, group)
    return kept[key]


def run_pixel_blocks(
    net: PiDNet, x_B3HW: Tensor, tokens_BLD: Tensor, condition: Condition, chunks: Chunks, halves: Halves | None = None
) -> Tensor:
    """Pixel blocks and final layer: noisy image `[B, 3, H, W]` and patch conditions `[B, L, D]` to the prediction."""
    blocks: list[Any] = list(net.pixel_blocks)
    passes = _TilePasses(net, x_B3HW, tokens_BLD, condition, chunks, halves)
    compressed = passes.run(None, None, blocks[0] if blocks else None)
    for block, following in zip_longest(blocks, blocks[1:]):
        assert compressed is not None
        # Not bound to a name, so that the attention's output is freed before the next block attends.
        compressed = passes.run(
            block, attend_patches(block.attn, compressed, condition.pixel_rotation, chunks.tokens), following
        )
    return passes.prediction


class _TilePasses:
    """Passes over all tiles of the noisy image: pixels kept between them, and the prediction made by the last."""

    prediction: Tensor  # `[B, 3, H, W]`, float32

    def __init__(
        self, net: PiDNet, image: Tensor, tokens: Tensor, condition: Condition, chunks: Chunks, halves: Halves | None
    ) -> None:
        self.net, self.image, self.tokens, self.patch, self.halves = net, image, tokens, net.config.patch_size, halves
        self.rows, self.columns = condition.grid
        # The first half of a pixel's channels has the position of its column, the second that of its row.
        self.x_table = condition.column_table.view(1, self.columns, 1, self.patch, -1)
        self.y_table = condition.row_table.view(self.rows, 1, self.patch, 1, -1)
        self.rows_per_tile = max(1, chunks.tile_tokens // self.columns)
        self.tile_rows = min(self.patch, max(1, chunks.tile_rows))
        # Pixel tokens `[B, L, G, C]` by their group's first row, float32, from the first update to the last.
        self.kept: dict[int, Tensor] = {}

    def run(self, block: Any | None, attended_BLA: Tensor | None, following: Any | None) -> Tensor | None:
        """Update every tile with `block`, then compress it for the `following` block or write it to the prediction.

        Returns:
            Compressed patches `[B, L, A]` for the following block, or None.
        """
        (B, L), columns = self.tokens.shape[:2], self.columns
        compressed = None
        if following is None:
            self.prediction = torch.empty_like(self.image, dtype=torch.float32, memory_format=torch.contiguous_format)
        else:  # accumulated over groups of pixels, hence in float32
            compressed = following.compress_to_attn.bias.float().expand(B, L, -1).clone()
        first_pass = not self.kept
        for group in ops.parts(self.patch, self.tile_rows):  # rows of a patch that are processed together
            pixels = slice(group.start * self.patch, group.stop * self.patch)
            update = _half(_Update, block, pixels, self.halves)
            compress_tile = _half(_Compress, following, pixels, self.halves)
            for samples, part in ops.runs(B, self.rows, self.rows_per_tile):  # rows of patches
                run = samples, slice(part.start * columns, part.stop * columns)
                condition = ops.cut_run(self.tokens, run)
                tile = self._embed(samples, part, group) if first_pass else ops.cut_run(self.kept[group.start], run)
                if update is not None and attended_BLA is not None:
                    update(tile, condition, ops.cut_run(attended_BLA, run))
                if compressed is None:
                    self._write(samples, part, group, tile)
                    continue
                compress_tile(tile, condition, ops.cut_run(compressed, run))
                if update is not None and first_pass:
                    self._keep(run, group, tile)
            if following is None:
                self.kept.pop(group.start, None)
        return None if compressed is None else compressed.to(self.tokens.dtype)

    def _grid(self, image: Tensor) -> Tensor:
        """`[B, 3, H, W]` as `[B, 3, rows, patch, columns, patch]`, a view."""
        return image.unflatten(3, (self.columns, self.patch)).unflatten(2, (self.rows, self.patch))  # type: ignore[no-any-return]

    def _embed(self, samples: slice, part: slice, group: slice) -> Tensor:
        """A tile of embedded pixel tokens `[T, G, C]`, float32: colors plus their position in the image."""
        # [samples, rows of patches, columns, rows of pixels, patch, 3]
        colors = self._grid(self.image)[samples, :, part, group].permute(0, 2, 4, 3, 5, 1)
        proj = self.net.pixel_embedder.proj
        embedded = F.linear(colors.to(proj.weight.dtype), proj.weight, proj.bias)
        tile = embedded if embedded.dtype == torch.float32 else torch.empty_like(embedded, dtype=torch.float32)
        half = self.x_table.shape[-1]
        torch.add(embedded[..., :half], self.x_table, out=tile[..., :half])
        torch.add(embedded[..., half:], self.y_table[part, :, group], out=tile[..., half:])
        return tile.flatten(3, 4).flatten(0, 2)

    def _write(self, samples: slice, part: slice, group: slice, tile_TGC: Tensor) -> None:
        """Apply the final layer to a finished tile and write its colors into the prediction."""
        final = self.net.final_layer
        colors = final.linear(ops.norm_to(tile_TGC, final.norm.weight, final.linear.weight.dtype))
        shape = (-1, part.stop - part.start, self.columns, group.stop - group.start, self.patch, 3)
        self._grid(self.prediction)[samples, :, part, group] = colors.view(shape).permute(0, 5, 1, 3, 2, 4)

    def _keep(self, run: tuple[slice, slice], group: slice, tile_TGC: Tensor) -> None:
        shape = (*self.tokens.shape[:2], *tile_TGC.shape[1:])
        if len(tile_TGC) == shape[0] * shape[1]:  # the one tile is all there is
            self.kept[group.start] = tile_TGC.view(shape)
            return
        if group.start not in self.kept:
            self.kept[group.start] = tile_TGC.new_empty(shape)
        ops.cut_run(self.kept[group.start], run).copy_(tile_TGC)


def attend_patches(attn: Any, compressed_BLA: Tensor, rotation: tuple[Tensor, Tensor], chunk: int) -> Tensor:
    """Self-attention of a pixel block over compressed patches, in place; reference: `PixelAttention.forward`."""
    B, L, width = compressed_BLA.shape
    rotation_LH = torch.complex(*rotation)
    joint = compressed_BLA.new_empty(B, L, 3 * width)
    runs = list(ops.runs(B, L, chunk))
    for run in runs:
        place = ops.cut_run(joint, run)
        ops.linear_into(attn.qkv, ops.cut_run(compressed_BLA, run), place)
        q, k, _ = split_heads(place, attn.heads)
        turns = ops.cut_table(rotation_LH, run)
        ops.norm_rotate_(q, attn.q_norm.weight, turns)
        ops.norm_rotate_(k, attn.k_norm.weight, turns)
    q, k, v = split_heads(joint, attn.heads)
    if attn.gather is not None:
        k, v = attn.gather(k.contiguous()), attn.gather(v.contiguous())
    out = attend(q, k, v)
    for run in runs:
        ops.linear_into(attn.proj, out[run].flatten(0, 1), ops.cut_run(compressed_BLA, run))
    return compressed_BLA
