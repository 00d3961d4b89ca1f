# SPDX-License-Identifier: Apache-2.0
"""A made-up latent space that needs no weights: cosines of 8x8 blocks, as in JPEG; for dry runs, tests and teaching."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from pidecode.registry.spaces import LatentSpace
from pidecode.training.losses import to_ycbcr

_BLOCK = 8
_LUMA = ((0, 0), (0, 1), (1, 0), (1, 1), (0, 2), (2, 0), (1, 2), (2, 1), (0, 3), (3, 0))
_CHROMA = ((0, 0), (0, 1), (1, 0))

COSINES = LatentSpace(
    name="cosines", title="Block cosines (made up)", channels=16, down=_BLOCK, statistics="constants", input_multiple=8
)
"""The space's row: 16 channels, one cell per 8x8 pixels of the low-resolution image."""


def encode_cosines(low: Tensor) -> Tensor:
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
