# SPDX-License-Identifier: Apache-2.0
"""Crops turned, joined and recoloured at random: a few hundred pictures have too few colours to learn colours from.

Without this a small decoder learns its training pictures' colours by heart: on them it is nearer to the truth than its
teacher, on others two and a half times as far.
"""

from __future__ import annotations

import math

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from pidecode.training.tiny.cache import SCALE

LUMA = (0.299, 0.587, 0.114)
PLAIN = 0.2
"""Share of the crops joined to another whose other part is a single colour: flat areas are rare in photographs."""
MOST_KNOTS = 4
"""Largest grid of points between which a recoloured picture's light changes smoothly."""


def varied(target: Tensor, random: np.random.Generator, *, recoloured: float, joined: float) -> tuple[Tensor, Tensor]:
    """Crops [B,3,S,S] in [-1,1], each turned by a multiple of 90 degrees and mirrored or not, a share of them
    `recoloured` and a share of them `joined` with another or with a single colour; and each reduced to a
    quarter by antialiased bicubic interpolation, [B,3,S/4,S/4].
    """

    def drawn(picture: Tensor) -> Tensor:
        turned = torch.rot90(picture, int(random.integers(4)), (-2, -1))
        turned = turned.flip(-1) if random.random() < 0.5 else turned
        return recolour(turned, random) if random.random() < recoloured else turned

    pictures = [drawn(picture) for picture in target]
    for index in range(len(pictures)):
        if random.random() < joined:
            plain = random.random() < PLAIN
            other = one_colour(target[index], random) if plain else drawn(target[index - 1])
            pictures[index] = join(pictures[index], other, random)
    varied = torch.stack(pictures)
    small = F.interpolate(varied, scale_factor=1 / SCALE, mode="bicubic", antialias=True)
    return varied, small.clamp(-1, 1)


def recolour(picture: Tensor, random: np.random.Generator) -> Tensor:
    """One picture [3,H,W] with other colours: channels in any order, saturation of its own, and light and contrast that
    may change smoothly from place to place.
    """
    if random.random() < 0.5:
        picture = picture[torch.from_numpy(random.permutation(3))]
    grey = torch.tensor(LUMA).to(picture).view(3, 1, 1).mul(picture).sum(0, keepdim=True)
    picture = grey + float(random.uniform(0.0, 1.6)) * (picture - grey)
    if random.random() < 0.1:
        picture = -picture

    def field(low: float, high: float, spread: float) -> Tensor:
        knots = int(random.integers(1, MOST_KNOTS + 1))
        points = random.uniform(low, high) + random.uniform(-spread, spread, (1, 3, knots, knots))
        return F.interpolate(
            torch.from_numpy(points).to(picture), size=picture.shape[-2:], mode="bilinear", align_corners=True
        )[0]

    return (picture * field(-0.5, 0.3, 0.2).exp() + field(-0.3, 0.3, 0.2)).clamp(-1, 1)


def one_colour(like: Tensor, random: np.random.Generator) -> Tensor:
    """A picture of the size of `like` [3,H,W] in a single colour."""
    return torch.from_numpy(random.uniform(-1, 1, (3, 1, 1))).to(like).expand_as(like)


def join(picture: Tensor, other: Tensor, random: np.random.Generator) -> Tensor:
    """`picture` [3,H,W] on one side of a straight line somewhere through it, and `other` beyond; the edge is clean."""
    height, width = picture.shape[-2:]
    angle, through = random.uniform(0, 2 * math.pi), random.uniform(0.25, 0.75, 2)
    rows = torch.arange(height).to(picture).view(-1, 1) - float(through[0]) * height
    columns = torch.arange(width).to(picture) - float(through[1]) * width
    distance = rows * math.sin(angle) + columns * math.cos(angle)
    return torch.lerp(other, picture, (distance + 0.5).clamp(0, 1))
