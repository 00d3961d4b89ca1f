# SPDX-License-Identifier: Apache-2.0
"""Crops turned, joined and recolored at random: a few hundred images have too few colors to learn colors from.

Without this a small decoder learns its training images' colors by heart: on them it is nearer to the truth than its
teacher, on others two and a half times as far. Everything here is drawn for all crops at once, on their own device and
without waiting for it, so that a step can be recorded as a whole.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from pidecode.training.tiny.cache import SCALE

LUMA = (0.299, 0.587, 0.114)
PLAIN = 0.2
"""Share of the crops joined to another whose other part is a single color: flat areas are rare in photographs."""
NEGATIVE = 0.1
"""Share of the recolored crops that are a negative."""
KNOTS = 4
"""Points along each side between which a recolored image's light changes smoothly."""


class Chance:
    """Random numbers on one device, one row of them for each of `count` samples.

    generator: where they come from, of that device or of the processor; without it, that device's default.
    """

    def __init__(self, count: int, device: torch.device, generator: torch.Generator | None = None) -> None:
        self.count, self.device, self.generator = count, device, generator
        self.drawn_on = device if generator is None else generator.device

    def uniform(self, low: float, high: float, *shape: int) -> Tensor:
        """[count, *shape], evenly from [low, high)."""
        drawn = torch.rand((self.count, *shape), device=self.drawn_on, generator=self.generator)
        return low + (high - low) * drawn.to(self.device)

    def normal(self, *shape: int) -> Tensor:
        """[count, *shape] of unit variance."""
        return torch.randn((self.count, *shape), device=self.drawn_on, generator=self.generator).to(self.device)

    def happens(self, share: float) -> Tensor:
        """[count,1,1,1]: true for about that share."""
        return self.uniform(0, 1, 1, 1, 1) < share


def varied(
    target: Tensor, generator: torch.Generator | None = None, *, recolored: float, joined: float
) -> tuple[Tensor, Tensor]:
    """Crops [B,3,S,S] in [-1,1], each turned by a multiple of 90 degrees and mirrored or not, a share of them
    `recolored` and a share of them `joined` with another or with a single color; and each reduced to a
    quarter by antialiased bicubic interpolation, [B,3,S/4,S/4].
    """
    chance = Chance(len(target), target.device, generator)
    images = turned(target, chance)
    images = torch.where(chance.happens(recolored), recolor(images, chance), images)
    plain = chance.uniform(-1, 1, 3, 1, 1).expand_as(target)
    other = torch.where(chance.happens(PLAIN), plain, images.roll(1, 0))
    images = torch.where(chance.happens(joined), join(images, other, chance), images)
    small = F.interpolate(images, scale_factor=1 / SCALE, mode="bicubic", antialias=True)
    return images, small.clamp(-1, 1)


def turned(images: Tensor, chance: Chance) -> Tensor:
    """Squares [B,3,S,S], each in one of its eight positions."""
    images = torch.where(chance.happens(0.5), images.transpose(-1, -2), images)
    for side in (-1, -2):
        images = torch.where(chance.happens(0.5), images.flip(side), images)
    return images


def recolor(images: Tensor, chance: Chance) -> Tensor:
    """Images [B,3,H,W] with other colors: channels in any order, saturation of its own, and light and contrast that
    may change smoothly from place to place.
    """
    identity = torch.eye(3, device=images.device)
    order = torch.where(chance.happens(0.5)[..., 0], identity[chance.uniform(0, 1, 3).argsort(1)], identity)
    gray = torch.stack([torch.full((3,), share, device=images.device) for share in LUMA], dim=1)
    saturation = chance.uniform(0.0, 1.6, 1, 1)
    mixed = (gray + saturation * (identity - gray)) @ order
    mixed = torch.where(chance.happens(NEGATIVE)[..., 0], -mixed, mixed)

    def field(low: float, high: float, spread: float) -> Tensor:
        """One level for all of an image, one for each of its channels, and changes from place to place."""
        changes = chance.uniform(-spread, spread, 3, KNOTS, KNOTS) * chance.uniform(0, 1, 1, 1, 1)
        points = chance.uniform(low, high, 1, 1, 1) + chance.uniform(-spread, spread, 3, 1, 1) + changes
        return F.interpolate(points, size=images.shape[-2:], mode="bilinear", align_corners=True)

    colored = torch.einsum("bij,bjhw->bihw", mixed.to(images), images)
    return (colored * field(-0.5, 0.3, 0.2).exp() + field(-0.3, 0.3, 0.2)).clamp(-1, 1)


def join(images: Tensor, others: Tensor, chance: Chance) -> Tensor:
    """`images` [B,3,H,W] on one side of a straight line through each, `others` beyond it; the edge is clean."""
    height, width = images.shape[-2:]
    angle, through = chance.uniform(0, 2 * math.pi, 1, 1), chance.uniform(0.25, 0.75, 2, 1, 1)
    rows = torch.arange(height, device=images.device).view(-1, 1) - through[:, 0] * height
    columns = torch.arange(width, device=images.device) - through[:, 1] * width
    distance = rows * angle.sin() + columns * angle.cos()
    return torch.lerp(others, images, (distance + 0.5).clamp(0, 1)[:, None])
