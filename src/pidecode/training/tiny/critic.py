# SPDX-License-Identifier: Apache-2.0
"""Small critics that tell decoded squares from photographed ones, for the sharpness that a squared error gives up."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm

FINE = (48, 96, 192, 192)
"""Widths of a critic of whole images: a logit for each square of 16 pixels, which sees about 90."""
COARSE = (64, 128, 192)
"""Widths of one of images at a quarter of their size: a logit for each square of 8 pixels, which sees about 40."""


class PatchCritic(nn.Module):
    """Images [B,3,H,W] to one logit for each of their squares, [B,1,H/2^n,W/2^n] for n `widths`."""

    def __init__(self, widths: Sequence[int]) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        before = 3
        for width in widths:
            layers += [
                spectral_norm(nn.Conv2d(before, width, 4, stride=2, padding=1)), nn.LeakyReLU(0.2),
                spectral_norm(nn.Conv2d(width, width, 3, padding=1)), nn.LeakyReLU(0.2),
            ]  # fmt: skip
            before = width
        self.layers = nn.Sequential(*layers, spectral_norm(nn.Conv2d(before, 1, 3, padding=1)))

    def forward(self, image: Tensor) -> Tensor:
        """Higher for what it takes for a photograph."""
        judged: Tensor = self.layers(image)
        return judged


class Critics(nn.Module):
    """One critic of images as they are, for their finest detail, and one of them at a quarter of their size, for the
    grains and leaves that a latent does not hold; either only if its share is not 0.
    """

    def __init__(self, fine_share: float, coarse_share: float) -> None:
        super().__init__()
        self.shares = {"fine": fine_share, "coarse": coarse_share}
        if fine_share:
            self.fine = PatchCritic(FINE)
        if coarse_share:
            self.coarse = PatchCritic(COARSE)

    def taking(self, state: Mapping[str, Any]) -> Critics:
        """These, with the weights of those that a stage's state has."""
        before: Mapping[str, Tensor] = state.get("critics", {})
        own = self.state_dict()
        self.load_state_dict(own | {name: value for name, value in before.items() if name in own})
        return self

    def views(self, image: Tensor, shrunk: Callable[[Tensor], Tensor]) -> Iterator[tuple[PatchCritic, Tensor, float]]:
        """Each critic, what it sees of `image`, and its share. shrunk: to a quarter of the size."""
        for name, critic in self.named_children():
            assert isinstance(critic, PatchCritic)
            yield critic, image if name == "fine" else shrunk(image), self.shares[name]


def critic_loss(of_made: Tensor, of_real: Tensor) -> Tensor:
    """The hinge loss: decoded squares below -1, photographed ones above 1."""
    return F.relu(1 + of_made).mean() + F.relu(1 - of_real).mean()
