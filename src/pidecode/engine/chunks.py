# SPDX-License-Identifier: Apache-2.0
"""How much an evaluation works on at once: the one knob between speed and memory that changes no number."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Chunks:
    """Larger is faster up to a point, smaller needs less memory. The default suits a processor's caches."""

    tokens: int = 512
    """Patch tokens that pass through a patch block's linear layers together."""
    tile_tokens: int = 256
    """Patch tokens of a tile of the pixel path; rounded to whole rows of patches."""
    tile_rows: int = 1
    """Pixel rows, within each of those patches, of such a tile."""

    @classmethod
    def large(cls, patch_size: int) -> Chunks:
        """Few, large matrix products, as accelerators like them."""
        return cls(tokens=4096, tile_tokens=2048, tile_rows=max(1, patch_size // 4))
