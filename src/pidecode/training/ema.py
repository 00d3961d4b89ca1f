# SPDX-License-Identifier: Apache-2.0
"""Exponential moving average of the weights, with a constant decay or one that follows training time."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor, nn

from pidecode.training.config import EMAConfig
from pidecode.training.distributed import reshard, unwrap


def power_exponent(sigma_rel: float) -> float:
    """Exponent of a power-function average whose width is `sigma_rel` of the training time.

    The average weighs step s of t by (s / t) ** g; its relative standard deviation is
    sqrt((g + 1) / ((g + 2)^2 (g + 3))) (Karras et al., https://arxiv.org/abs/2312.02696, equation 6).
    """
    inverse = sigma_rel**-2
    roots = np.roots([1.0, 7.0, 16.0 - inverse, 12.0 - inverse])
    return float(roots.real.max())


def ema_decay(config: EMAConfig, step: int) -> float:
    """Share of the average that is kept at step `step`, counted from 1."""
    if config.kind == "constant":
        return min(config.decay, (1 + step) / (10 + step))
    return float((1.0 - 1.0 / (step + 1)) ** (power_exponent(config.sigma_rel) + 1))


class ExponentialMovingAverage:
    """Averages of a module's trained parameters, by name, float32; frozen parameters are not averaged."""

    def __init__(self, module: nn.Module, config: EMAConfig) -> None:
        self.config = config
        self.tensors: dict[str, Tensor] = {
            name: parameter.detach().clone()
            for name, parameter in unwrap(module).named_parameters()
            if parameter.requires_grad
        }

    @torch.no_grad()
    def update(self, module: nn.Module, step: int) -> None:
        """Average the weights after step `step`, counted from 1."""
        weight = 1.0 - ema_decay(self.config, step)
        parameters = dict(unwrap(module).named_parameters())
        for name, average in self.tensors.items():
            average.lerp_(parameters[name].detach(), weight)

    @torch.no_grad()
    def swap(self, module: nn.Module) -> None:
        """Exchange averages and weights; a second call restores them."""
        reshard(module)
        parameters: Mapping[str, Tensor] = dict(unwrap(module).named_parameters())
        for name, average in self.tensors.items():
            current = parameters[name].detach().clone()
            parameters[name].detach().copy_(average)
            average.copy_(current)
