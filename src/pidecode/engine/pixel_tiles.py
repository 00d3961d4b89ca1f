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

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import zip_longest
from typing import Any, TypeVar

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from pidecode.engine.machine import Chunks
from pidecode.engine.ops import elementwise as ops
from pidecode.engine.ops.quantize import WeightSlice, weight_block, weight_columns, weight_rows
from pidecode.models.pid.blocks import attend, split_heads
from pidecode.models.pid.network import Condition, PiDNet

Half = TypeVar("Half", "_Compress", "_Update")
SHIFT1, SCALE1, GATE1, SHIFT2, SCALE2, GATE2 = range(6)


@dataclass(frozen=True, slots=True)
class PixelModulation:
    """Rows of `adaLN_modulation` for some pixels and some of the six vectors, as one matrix."""

    weight: WeightSlice  # `[vectors * G * C, D]`, vector by vector
    bias: Tensor  # `[vectors * G * C]`
    vectors: int  # how many of the six

    def __call__(self, condition_TD: Tensor) -> tuple[Tensor, ...]:
        """Each vector `[T, G * C]`."""
        return self.weight(condition_TD, self.bias).chunk(self.vectors, dim=-1)


def modulation_rows(block: Any, pixels: slice, which: slice) -> PixelModulation:
    """Cut `which` of the six vectors of `pixels` out of a block's modulation; scales become factors.

    A factor is `(1 + scale) * norm weight`, merged into the matrix here: exact in float32 up to rounding. In half
    precision the merged matrix rounds once more, as the reference does each time it adds 1 to a scale.
    """
    linear, P = block.adaLN_modulation[0], block.pixels
    C = block.norm1.weight.shape[0]

    def by_vector(rows: Tensor) -> Tensor:
        return rows.transpose(0, 1).clone(memory_format=torch.contiguous_format)

    matrix = weight_block(linear, (P, 6, C), (pixels, which)).map(by_vector)
    bias = by_vector(linear.bias.unflatten(0, (P, 6, C))[pixels, which])
    for scale, norm in ((SCALE1, block.norm1), (SCALE2, block.norm2)):
        index = scale - which.start
        if 0 <= index < len(bias) and scale < which.stop:
            matrix.per_output[index].mul_(norm.weight[:, None])
            bias[index].add_(1).mul_(norm.weight)
    return PixelModulation(matrix.map(lambda rows: rows.flatten(0, 2)), bias.flatten(), len(bias))


class _Compress:
    """First half of a pixel block on the pixels `group`: adds a tile's part to the compressed patches."""

    def __init__(self, block: Any, group: slice) -> None:
        C = block.norm1.weight.shape[0]
        self.channels = C
        self.modulation = modulation_rows(block, group, slice(SHIFT1, SCALE1 + 1))
        self.compress = weight_columns(block.compress_to_attn, slice(group.start * C, group.stop * C))

    def __call__(self, tile_TGC: Tensor, condition_TD: Tensor, compressed_TA: Tensor) -> None:
        shift, factor = (v.view(tile_TGC.shape) for v in self.modulation(condition_TD))
        pixels = ops.norm_modulate(tile_TGC, shift, factor, condition_TD.dtype)
        ops.accumulate_(compressed_TA, pixels.flatten(1), self.compress)


class _Update:
    """Second half of a pixel block on the pixels `group`: updates the tile in place."""

    def __init__(self, block: Any, group: slice) -> None:
        C = block.norm1.weight.shape[0]
        self.modulation = modulation_rows(block, group, slice(GATE1, GATE2 + 1))
        features = slice(group.start * C, group.stop * C)
        self.expand = weight_rows(block.expand_from_attn, features)
        self.expand_bias = block.expand_from_attn.bias[features]
        self.mlp = block.mlp

    def __call__(self, tile_TGC: Tensor, condition_TD: Tensor, attended_TA: Tensor) -> None:
        vectors = self.modulation(condition_TD)
        expanded = self.expand(attended_TA, self.expand_bias).view(tile_TGC.shape)
        ops.update_pixels_(tile_TGC, expanded, vectors, self.mlp.fc1, self.mlp.fc2)


class PixelHalves:
    """The halves of pixel blocks, each cut to the pixels of a tile: made at each use, or kept if `keep`."""

    def __init__(self) -> None:
        self.keep = False
        self._kept: dict[tuple[type, int, int, int], Any] = {}

    def clear(self) -> None:
        """Drop what is kept, as is needed when weights change."""
        self._kept.clear()

    def get(self, kind: type[Half], block: Any | None, group: slice) -> Half | None:
        """One half of a block on some pixels; None without a block."""
        if block is None or not self.keep:
            return None if block is None else kind(block, group)
        key = kind, id(block), group.start, group.stop
        if key not in self._kept:
            # Ordinary tensors even in inference mode: they outlive the image.
            with torch.inference_mode(False), torch.no_grad():
                self._kept[key] = kind(block, group)
        return self._kept[key]  # type: ignore[no-any-return]


class _TiledImage:
    """The noisy image as tiles of pixel tokens, and finished tiles as parts of the prediction."""

    def __init__(self, net: PiDNet, x_B3HW: Tensor, condition: Condition, chunks: Chunks) -> None:
        config = net.config
        self.net, self.patch, self.width = net, config.patch_size, config.pixel_hidden_size
        (self.rows, self.columns), self.batch = condition.grid, x_B3HW.shape[0]
        self.noisy = self._grid(x_B3HW)
        # The first half of a pixel's channels has the position of its column, the second that of its row.
        self.x_table = condition.column_table.view(1, self.columns, 1, self.patch, -1)
        self.y_table = condition.row_table.view(self.rows, 1, self.patch, 1, -1)
        self.rows_per_tile = max(1, chunks.tile_tokens // self.columns)
        self.tile_rows = min(self.patch, max(1, chunks.tile_rows))

    def _grid(self, image: Tensor) -> Tensor:
        """`[B, 3, H, W]` as `[B, 3, rows, patch, columns, patch]`, a view."""
        return image.unflatten(3, (self.columns, self.patch)).unflatten(2, (self.rows, self.patch))  # type: ignore[no-any-return]

    def groups(self) -> Iterator[slice]:
        """Rows of a patch that are processed together."""
        yield from ops.parts(self.patch, self.tile_rows)

    def tiles(self) -> Iterator[tuple[tuple[slice, slice], tuple[slice, slice]]]:
        """Samples and rows of patches of each tile, and the same as samples and tokens."""
        for samples, part in ops.runs(self.batch, self.rows, self.rows_per_tile):
            yield (samples, part), (samples, slice(part.start * self.columns, part.stop * self.columns))

    def pixels(self, place: tuple[slice, slice], group: slice) -> Tensor:
        """A tile of embedded pixel tokens `[T, G, C]`, float32: colors plus their position in the image."""
        samples, part = place
        # [samples, rows of patches, columns, rows of pixels, patch, 3]
        colors = self.noisy[samples, :, part, group].permute(0, 2, 4, 3, 5, 1)
        proj = self.net.pixel_embedder.proj
        embedded = F.linear(colors.to(proj.weight.dtype), proj.weight, proj.bias)
        tile = embedded if embedded.dtype == torch.float32 else torch.empty_like(embedded, dtype=torch.float32)
        half = self.x_table.shape[-1]
        torch.add(embedded[..., :half], self.x_table, out=tile[..., :half])
        torch.add(embedded[..., half:], self.y_table[part, :, group], out=tile[..., half:])
        return tile.flatten(3, 4).flatten(0, 2)

    def write(self, prediction: Tensor, place: tuple[slice, slice], group: slice, tile_TGC: Tensor) -> None:
        """Apply the final layer to a finished tile and write its colors into the prediction."""
        final = self.net.final_layer
        colors = final.linear(ops.norm_to(tile_TGC, final.norm.weight, final.linear.weight.dtype))
        samples, part = place
        shape = (-1, part.stop - part.start, self.columns, group.stop - group.start, self.patch, 3)
        self._grid(prediction)[samples, :, part, group] = colors.view(shape).permute(0, 5, 1, 3, 2, 4)


def run_pixel_blocks(
    net: PiDNet,
    x_B3HW: Tensor,
    tokens_BLD: Tensor,
    condition: Condition,
    chunks: Chunks,
    halves: PixelHalves | None = None,
) -> Tensor:
    """Pixel blocks and final layer: noisy image `[B, 3, H, W]` and patch conditions `[B, L, D]` to the prediction."""
    blocks: list[Any] = list(net.pixel_blocks)
    passes = _TilePasses(_TiledImage(net, x_B3HW, condition, chunks), tokens_BLD, halves or PixelHalves())
    compressed = passes.run(None, None, blocks[0] if blocks else None)
    for block, following in zip_longest(blocks, blocks[1:]):
        assert compressed is not None
        # Not bound to a name, so that the attention's output is freed before the next block attends.
        compressed = passes.run(
            block, attend_patches(block.attn, compressed, condition.pixel_rotation, chunks.tokens), following
        )
    return passes.prediction


class _TilePasses:
    """Passes over all tiles: pixels kept between them, and the prediction after the last."""

    def __init__(self, image: _TiledImage, tokens_BLD: Tensor, halves: PixelHalves) -> None:
        self.image, self.tokens, self.halves = image, tokens_BLD, halves
        self.kept: dict[int, Tensor] = {}
        """Pixel tokens `[B, L, G, C]` by their group's first row, float32, from the first update to the last."""

    @cached_property
    def prediction(self) -> Tensor:
        """The prediction `[B, 3, H, W]`, float32."""
        image = self.image
        sides = (image.rows * image.patch, image.columns * image.patch)
        return self.tokens.new_empty(image.batch, 3, *sides, dtype=torch.float32)

    def run(self, block: Any | None, attended_BLA: Tensor | None, following: Any | None) -> Tensor | None:
        """Update every tile with `block`, then compress it for the `following` block or write it to the prediction.

        Returns:
            Compressed patches `[B, L, A]` for the following block, or None.
        """
        image, B, L = self.image, *self.tokens.shape[:2]
        # Accumulated over groups of pixels, hence in float32.
        compressed = None if following is None else following.compress_to_attn.bias.float().expand(B, L, -1).clone()
        first_pass = not self.kept
        for group in image.groups():
            pixels = slice(group.start * image.patch, group.stop * image.patch)
            update = self.halves.get(_Update, block, pixels)
            compress_tile = self.halves.get(_Compress, following, pixels)
            for place, run in image.tiles():
                condition = ops.cut_run(self.tokens, run)
                tile = image.pixels(place, group) if first_pass else ops.cut_run(self.kept[group.start], run)
                if update is not None and attended_BLA is not None:
                    update(tile, condition, ops.cut_run(attended_BLA, run))
                if compress_tile is None or compressed is None:
                    image.write(self.prediction, place, group, tile)
                    continue
                compress_tile(tile, condition, ops.cut_run(compressed, run))
                if update is not None and first_pass:
                    self._keep(run, group, tile)
            if following is None:
                self.kept.pop(group.start, None)
        return None if compressed is None else compressed.to(self.tokens.dtype)

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
    for samples, part in runs:
        place = ops.cut_run(joint, (samples, part))
        ops.linear_into(attn.qkv, ops.cut_run(compressed_BLA, (samples, part)), place)
        q, k, _ = split_heads(place, attn.heads)
        count = samples.stop - samples.start
        turns = rotation_LH[part].repeat(count, 1) if count > 1 else rotation_LH[part]
        ops.norm_rotate_(q, attn.q_norm.weight, turns)
        ops.norm_rotate_(k, attn.k_norm.weight, turns)
    q, k, v = split_heads(joint, attn.heads)
    if attn.gather is not None:
        k, v = attn.gather(k.contiguous()), attn.gather(v.contiguous())
    out = attend(q, k, v)
    for run in runs:
        ops.linear_into(attn.proj, out[run].flatten(0, 1), ops.cut_run(compressed_BLA, run))
    return compressed_BLA
