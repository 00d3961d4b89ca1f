# SPDX-License-Identifier: Apache-2.0
"""Chunk sizes of the in-place forward: larger is faster up to a point, smaller needs less memory."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Chunks:
    """What one evaluation works on at once; the default suits a CPU's caches. No size changes more than rounding.

    Attributes:
        tokens: Patch tokens that pass through a patch block's linear layers together.
        tile_tokens: Patch tokens of a tile of the pixel blocks; rounded to whole rows of patches.
        tile_rows: Pixel rows, within each of those patches, of such a tile.
    """

    tokens: int = 512
    tile_tokens: int = 256
    tile_rows: int = 1

    @classmethod
    def large(cls, patch_size: int) -> Chunks:
        """Few, large matrix products, as suits accelerators."""
        return cls(tokens=4096, tile_tokens=2048, tile_rows=max(1, patch_size // 4))
