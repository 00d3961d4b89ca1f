# SPDX-License-Identifier: Apache-2.0
"""Latent formats: how a model normalizes a LATENT, for the families with a decoder and one without."""

from __future__ import annotations

import torch
from torch import Tensor

from pidecode.registry.spaces import SPACES


class Constants:
    """Shift and scale."""

    shift, scale = 0.0, 1.0

    def process_in(self, latent: Tensor) -> Tensor:
        return (latent - self.shift) * self.scale


class Flux(Constants):
    shift, scale = 0.1159, 0.3611


class SD3(Constants):
    shift, scale = 0.0609, 1.5305


class SDXL(Constants):
    scale = 0.13025


class Flux2(Constants):
    """Its LATENT is normalized already."""


class Mochi(Constants):
    """A family without a decoder."""


class Wan21:
    """A mean and deviation per channel, of videos."""

    def process_in(self, latent: Tensor) -> Tensor:
        row = SPACES["qwenimage"]
        mean, deviation = (torch.tensor(values).view(1, -1, 1, 1, 1) for values in (row.mean, row.std))
        return (latent - mean) / deviation
