# SPDX-License-Identifier: Apache-2.0
"""A small critic that tells decoded squares from photographed ones, for the sharpness that a squared error gives up."""

from __future__ import annotations

import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm

WIDTHS = (48, 96, 192, 192)


class PatchCritic(nn.Module):
    """Pictures [B,3,H,W] to one logit for each square of 16 pixels, [B,1,H/16,W/16]; it sees about 90 pixels."""

    def __init__(self) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        before = 3
        for width in WIDTHS:
            layers += [
                spectral_norm(nn.Conv2d(before, width, 4, stride=2, padding=1)), nn.LeakyReLU(0.2),
                spectral_norm(nn.Conv2d(width, width, 3, padding=1)), nn.LeakyReLU(0.2),
            ]  # fmt: skip
            before = width
        self.layers = nn.Sequential(*layers, spectral_norm(nn.Conv2d(before, 1, 3, padding=1)))

    def forward(self, picture: Tensor) -> Tensor:
        """Higher for what it takes for a photograph."""
        judged: Tensor = self.layers(picture)
        return judged


def critic_loss(of_made: Tensor, of_real: Tensor) -> Tensor:
    """The hinge loss: decoded squares below -1, photographed ones above 1."""
    return F.relu(1 + of_made).mean() + F.relu(1 - of_real).mean()
