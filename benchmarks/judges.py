# SPDX-License-Identifier: Apache-2.0
"""Judges of detail: DISTS-like and LPIPS-like distances of EfficientNet-Lite0 features, and NIQE. Lower is better."""

from __future__ import annotations

import math
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

sys.path.append(str(Path(__file__).parent.parent / "recipes" / "tiny"))
from losses import PerceptualFeatures, dists_distance, lpips_distance

BLOCK = 96
"""Side of the blocks whose statistics NIQE compares, in pixels."""
_SHARP = 0.75
"""Blocks of at least this share of an image's largest local contrast describe pristine images."""
_SHIFTS = ((0, 1), (1, 0), (1, 1), (1, -1))


class FeatureJudge:
    """Distances over pixels and all feature layers, the stem included; training leaves the finest ones out."""

    def __init__(self) -> None:
        self.features = PerceptualFeatures()

    @torch.inference_mode()
    def distances(self, image: Tensor, original: Tensor) -> dict[str, float]:
        """DISTS-like and LPIPS-like distance of two images `[1, 3, H, W]` in [-1, 1]."""
        found, reference = (self.features(each.float(), stem=True) for each in (image, original))
        pixels = ((image.float() + 1) / 2, (original.float() + 1) / 2)
        return {
            "dists": dists_distance([pixels[0], *found], [pixels[1], *reference]).item(),
            "lpips": lpips_distance(found, reference).item(),
        }


def _shapes() -> tuple[Tensor, Tensor]:
    """Shapes of a generalized Gaussian, and the ratio of squared mean and mean square that each has."""
    shapes = torch.arange(0.2, 10.0, 0.001, dtype=torch.float64)
    one, two, three = ((n / shapes).lgamma() for n in (1, 2, 3))
    return shapes, (2 * two - one - three).exp()


def fit_asymmetric_gaussian(values: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Shape, mean, left and right scale `[N]` of the asymmetric generalized Gaussian of each row `[N, n]`."""

    def spread(side: Tensor) -> Tensor:
        return ((values.square() * side).sum(1) / side.sum(1).clamp(min=1)).sqrt().clamp(min=1e-6)

    left, right = spread(values < 0), spread(values > 0)
    ratio = left / right
    seen = values.abs().mean(1).square() / (values.square().mean(1) + 1e-12)
    seen = seen * (ratio**3 + 1) * (ratio + 1) / (ratio.square() + 1).square()
    shapes, ratios = _shapes()
    shape = shapes[(ratios - seen[:, None]).abs().argmin(1)]
    scale = (((1 / shape).lgamma() - (3 / shape).lgamma()) / 2).exp()
    left, right = left * scale, right * scale
    mean = (right - left) * ((2 / shape).lgamma() - (1 / shape).lgamma()).exp()
    return shape, mean, left, right


def _normalized(luma: Tensor) -> tuple[Tensor, Tensor]:
    """Luma `[H, W]` less its local mean over its local standard deviation, and that deviation."""
    offsets = torch.arange(-3, 4, dtype=luma.dtype)
    line = (-(offsets.square()) / (2 * (7 / 6) ** 2)).exp()
    line = line / line.sum()
    padded = F.pad(luma[None, None], (3, 3, 3, 3), mode="replicate")
    # A sum of shifted planes is several times faster than a convolution in double precision.
    both = torch.cat([padded, padded.square()])
    for dim in (2, 3):
        length = both.shape[dim] - 6
        both = sum(weight * both.narrow(dim, shift, length) for shift, weight in enumerate(line.tolist()))
    mean, square = both.split(1)
    deviation = (square - mean.square()).clamp(min=0).sqrt()
    return ((luma - mean) / (deviation + 1))[0, 0], deviation[0, 0]


def _blocks(plane: Tensor, side: int) -> Tensor:
    """Whole blocks `[N, side, side]` of a plane, row by row."""
    rows, columns = plane.shape[0] // side, plane.shape[1] // side
    plane = plane[: rows * side, : columns * side]
    return plane.reshape(rows, side, columns, side).transpose(1, 2).reshape(-1, side, side)


def block_statistics(image: Tensor) -> tuple[Tensor, Tensor]:
    """NIQE's 36 features of each block `[N, 36]`, and the blocks' contrast `[N]`, of an image `[1, 3, H, W]`."""
    weights = torch.tensor([65.481, 128.553, 24.966], dtype=torch.float64)
    luma = torch.einsum("c,chw->hw", weights, (image[0].double() + 1) / 2) + 16
    parts: list[Tensor] = []
    contrast = torch.empty(0)
    for scale in (1, 2):
        if scale == 2:
            size = [extent // 2 for extent in luma.shape]
            luma = F.interpolate(luma[None, None], size=size, mode="bicubic", antialias=True)[0, 0]
        normalized, deviation = _normalized(luma)
        blocks = _blocks(normalized, BLOCK // scale)
        shape, _, left, right = fit_asymmetric_gaussian(blocks.flatten(1))
        parts += [shape, (left + right) / 2]
        for shift in _SHIFTS:
            parts += fit_asymmetric_gaussian((blocks * blocks.roll(shift, (1, 2))).flatten(1))
        if scale == 1:
            contrast = _blocks(deviation, BLOCK).mean((1, 2))
    count = min(len(part) for part in parts)
    return torch.stack([part[:count] for part in parts], dim=1), contrast[:count]


@dataclass(frozen=True)
class Niqe:
    """Natural image quality evaluator (https://doi.org/10.1109/LSP.2012.2227726) with statistics of pristine images."""

    mean: Tensor
    covariance: Tensor

    @classmethod
    def fit(cls, images: Iterable[Tensor]) -> Niqe:
        """Statistics of the sharp blocks of pristine images `[1, 3, H, W]` in [-1, 1]."""
        rows = []
        for image in images:
            statistics, contrast = block_statistics(image)
            rows.append(statistics[contrast > _SHARP * contrast.max()])
        found = torch.cat(rows)
        found = found[found.isfinite().all(1)]
        return cls(found.mean(0), found.T.cov())

    def __call__(self, image: Tensor) -> float:
        """Distance of an image `[1, 3, H, W]` in [-1, 1], of at least two blocks, from pristine ones."""
        found = block_statistics(image)[0]
        found = found[found.isfinite().all(1)]
        if len(found) < 2:  # no covariance
            return math.nan
        apart = found.mean(0) - self.mean
        return float((apart @ torch.linalg.pinv((found.T.cov() + self.covariance) / 2, hermitian=True) @ apart).sqrt())
