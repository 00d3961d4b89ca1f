# SPDX-License-Identifier: Apache-2.0
"""The closed-form start of a regressor: the best linear map from a cell's neighbourhood to its patch of the picture."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from pidecode.training.tiny.cache import CELL, LatentCache

UNPATCHIFY = 2
"""Cells a side of a packed latent (FLUX.2)."""


@dataclass(frozen=True, slots=True)
class LinearStart:
    """The linear map from a cell's neighbourhood to scaled coefficients of its patch, and what they stand for."""

    basis: Tensor
    """[3 p^2, R]: the patches' leading principal directions."""
    mean: Tensor
    """[3 p^2]"""
    scales: Tensor
    """[R]: fourth root of each direction's variance, which evens features and pixels out half each."""
    weights: Tensor
    """[R, cells, 3, 3]: from the neighbourhood to the scaled coefficients."""
    bias: Tensor
    """[R]"""


def fit_linear_start(
    cache: LatentCache, rank: int, *, batches: int = 40, side: int = 320, seed: int = 0
) -> LinearStart:
    """Ridge regression and principal directions from `batches` of 16 crops; a few seconds a batch of ten."""
    random = np.random.default_rng(seed)
    gram, cross = torch.zeros(()), torch.zeros(())
    patch_gram, patch_sum, count = torch.zeros(()), torch.zeros(()), 0
    inner = torch.zeros(side // CELL, side // CELL, dtype=torch.bool)
    inner[1:-1, 1:-1] = True
    for _ in range(batches):
        batch = cache.crops(16, side, random)
        cells = F.pixel_shuffle(batch.latent, UNPATCHIFY)
        near = F.unfold(cells, 3, padding=1).unflatten(2, inner.shape)[:, :, inner].transpose(1, 2).flatten(0, 1)
        near = torch.cat((near, torch.ones(len(near), 1)), dim=1)
        patches = F.pixel_unshuffle(batch.target, CELL)[:, :, inner].transpose(1, 2).flatten(0, 1)
        gram, cross = gram + (near.T @ near).double(), cross + (near.T @ patches).double()
        patch_gram, patch_sum = patch_gram + patches.T @ patches, patch_sum + patches.sum(0)
        count += len(near)
    mean = patch_sum / count
    covariance = patch_gram / count - torch.outer(mean, mean)
    basis, variances = principal_directions(covariance, rank)
    scales = variances.clamp(min=1e-8) ** 0.25
    ridge = 1e-3 * count * torch.eye(len(gram), dtype=torch.float64)
    solution = torch.linalg.solve(gram + ridge, cross).float()
    weights = (solution[:-1] @ basis / scales).T.reshape(rank, -1, 3, 3)
    return LinearStart(basis, mean, scales, weights, (solution[-1] - mean) @ basis / scales)


def principal_directions(covariance: Tensor, rank: int, *, rounds: int = 8) -> tuple[Tensor, Tensor]:
    """The leading eigenvectors [N, rank] and eigenvalues [rank] of a covariance, by subspace iteration.

    A whole decomposition of a 32-pixel patch's 3072 x 3072 costs a minute; the leading few hundred cost a second.
    """
    size = len(covariance)
    start = torch.randn(size, min(size, rank + 16), generator=torch.Generator().manual_seed(0))
    space = torch.linalg.qr(start).Q
    for _ in range(rounds):
        space = torch.linalg.qr(covariance @ space).Q
    values, turn = torch.linalg.eigh(space.T @ covariance @ space)
    return (space @ turn).flip(1)[:, :rank], values.flip(0)[:rank]
