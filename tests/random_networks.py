# SPDX-License-Identifier: Apache-2.0
"""Networks with random weights, none of them zero, so that every path shows in the prediction."""

from __future__ import annotations

import torch

from pidecode.models.pid.network import PiDNet
from pidecode.registry.configs import PiDConfig


def random_net(config: PiDConfig, *, std: float = 0.05, seed: int = 0) -> PiDNet:
    """The initial weights plus Gaussian noise of a standard deviation."""
    torch.manual_seed(seed)
    net = PiDNet(config).eval().requires_grad_(False)
    for parameter in net.parameters():
        parameter.add_(torch.randn_like(parameter) * std)
    return net
