# SPDX-License-Identifier: Apache-2.0
"""Crops turned and recoloured at random: a few hundred pictures have too few colours to learn colours from.

Without this a small decoder learns its training pictures' colours by heart: on them it is nearer to the truth than its
teacher, on others two and a half times as far.
"""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from pidecode.training.tiny.cache import SCALE

LUMA = (0.299, 0.587, 0.114)


def varied(target: Tensor, random: np.random.Generator, *, recoloured: float) -> tuple[Tensor, Tensor]:
    """Crops [B,3,S,S] in [-1,1], each turned by a multiple of 90 degrees and mirrored or not, a share of them
    `recoloured`; and each reduced to a quarter by antialiased bicubic interpolation, [B,3,S/4,S/4].
    """
    pictures = []
    for picture in target:
        turned = torch.rot90(picture, int(random.integers(4)), (-2, -1))
        turned = turned.flip(-1) if random.random() < 0.5 else turned
        pictures.append(recolour(turned, random) if random.random() < recoloured else turned)
    varied = torch.stack(pictures)
    small = F.interpolate(varied, scale_factor=1 / SCALE, mode="bicubic", antialias=True)
    return varied, small.clamp(-1, 1)


def recolour(picture: Tensor, random: np.random.Generator) -> Tensor:
    """One picture [3,H,W] with other colours: channels in any order, and light, contrast and saturation of its own."""
    if random.random() < 0.5:
        picture = picture[torch.from_numpy(random.permutation(3))]
    grey = torch.tensor(LUMA).to(picture).view(3, 1, 1).mul(picture).sum(0, keepdim=True)
    picture = grey + float(random.uniform(0.0, 1.6)) * (picture - grey)
    if random.random() < 0.1:
        picture = -picture
    gain = np.exp(random.uniform(-0.5, 0.3) + random.uniform(-0.15, 0.15, 3))
    shift = random.uniform(-0.3, 0.3) + random.uniform(-0.15, 0.15, 3)
    scale, offset = (torch.from_numpy(part).to(picture).view(3, 1, 1) for part in (gain, shift))
    return (picture * scale + offset).clamp(-1, 1)
