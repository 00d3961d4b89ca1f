# SPDX-License-Identifier: Apache-2.0
"""Stand-ins that need no weights, for dry runs and tests: a latent space of 8x8 block DCTs and a text encoder."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from pidecode.registry.spaces import LatentSpace
from pidecode.training.losses import to_ycbcr

_BLOCK = 8
_LUMA = ((0, 0), (0, 1), (1, 0), (1, 1), (0, 2), (2, 0), (1, 2), (2, 1), (0, 3), (3, 0))
_CHROMA = ((0, 0), (0, 1), (1, 0))

BLOCK_DCT = LatentSpace(
    name="block-dct", title="Block DCT (for tests)", channels=16, down=_BLOCK, statistics="constants", input_multiple=8
)
"""Latent space of `encode_block_dct`: 16 channels, one cell per 8x8 pixels of the low-resolution image."""


def encode_block_dct(low: Tensor) -> Tensor:
    """Images `[B, 3, h, w]` in [-1, 1] to latents `[B, 16, h / 8, w / 8]`: ten luma cosines, three of each color."""
    planes = to_ycbcr((low.float() + 1) / 2) - low.new_tensor([0.5, 0.0, 0.0]).view(1, 3, 1, 1)
    size = (low.shape[-2] // _BLOCK, low.shape[-1] // _BLOCK)
    blocks = F.unfold(planes.flatten(0, 1).unsqueeze(1), _BLOCK, stride=_BLOCK)
    waves = torch.stack([_wave(*place) for place in _LUMA]).to(blocks)
    cosines = torch.einsum("kp,npl->nkl", waves, blocks).unflatten(0, (-1, 3))
    chosen = [_LUMA.index(place) for place in _CHROMA]
    channels = torch.cat((cosines[:, 0], cosines[:, 1, chosen], cosines[:, 2, chosen]), dim=1)
    return channels.reshape(*channels.shape[:2], *size)


def _wave(row: int, column: int) -> Tensor:
    """One orthonormal cosine of the block, flattened; means are halved so that every channel is of order one."""

    def axis(frequency: int) -> Tensor:
        places = (torch.arange(_BLOCK) + 0.5) * math.pi * frequency / _BLOCK
        return torch.cos(places) * math.sqrt((1 if frequency == 0 else 2) / _BLOCK)

    wave = torch.outer(axis(row), axis(column)).flatten()
    return wave / 2 if (row, column) == (0, 0) else wave


class ByteTextEncoder:
    """A text encoder for tests: a fixed random vector for each byte of a caption."""

    def __init__(self, length: int, width: int) -> None:
        self.length, self.width = length, width
        generator = torch.Generator().manual_seed(int.from_bytes(hashlib.sha256(b"bytes").digest()[:7], "little"))
        self._table = torch.randn(257, width, generator=generator)

    def __call__(self, captions: Sequence[str]) -> Tensor:
        """States `[B, length, width]`; shorter captions are padded."""
        rows = torch.full((len(captions), self.length), 256)
        for row, caption in zip(rows, captions, strict=True):
            data = list(caption.encode("utf-8"))[: self.length]
            row[: len(data)] = torch.tensor(data, dtype=torch.long)
        return self._table[rows]
