# SPDX-License-Identifier: Apache-2.0
"""The moving average of the weights, with a decay that follows training time or stays."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor, nn

from pidecode.training.config import Average
from pidecode.training.distributed import bare, own_shards


def power_exponent(rate: float) -> float:
    """The exponent of a power-function average whose width is `rate` of the training time.

    The average weighs step s of t by (s / t) ** g; its relative deviation sqrt((g+1) / ((g+2)^2 (g+3))) is the rate.
    """
    wanted = rate**-2
    roots = np.roots([1.0, 7.0, 16.0 - wanted, 12.0 - wanted])
    return float(roots.real.max())


def decay_at(settings: Average, step: int) -> float:
    """Share of the average kept at step `step`, counted from 1."""
    if settings.kind == "constant":
        return settings.decay
    return float((1.0 - 1.0 / (step + 1)) ** (power_exponent(settings.rate) + 1))


class ExponentialMovingAverage:
    """Averages of a module's trained parameters, by name, float32; the others are as they are."""

    def __init__(self, module: nn.Module, settings: Average) -> None:
        self.settings = settings
        self.tensors: dict[str, Tensor] = {
            name: parameter.detach().clone()
            for name, parameter in bare(module).named_parameters()
            if parameter.requires_grad
        }

    @torch.no_grad()
    def update(self, module: nn.Module, step: int) -> None:
        """Take in the weights after step `step`, counted from 1."""
        weight = 1.0 - decay_at(self.settings, step)
        parameters = dict(bare(module).named_parameters())
        for name, average in self.tensors.items():
            average.lerp_(parameters[name].detach(), weight)

    @torch.no_grad()
    def swap(self, module: nn.Module) -> None:
        """Exchange averages and weights; twice is as before."""
        own_shards(module)
        parameters: Mapping[str, Tensor] = dict(bare(module).named_parameters())
        for name, average in self.tensors.items():
            kept = parameters[name].detach().clone()
            parameters[name].detach().copy_(average)
            average.copy_(kept)
