# SPDX-License-Identifier: Apache-2.0
"""Networks with random weights, none of them zero, so that every path shows in the prediction."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import save_file

from pidecode.models.pid.network import PiDNet
from pidecode.registry.configs import PiDConfig
from pidecode.weights.metadata import CheckpointMetadata


def random_net(config: PiDConfig, *, std: float = 0.05, seed: int = 0) -> PiDNet:
    """The initial weights plus Gaussian noise of a standard deviation."""
    torch.manual_seed(seed)
    net = PiDNet(config).eval().requires_grad_(False)
    for parameter in net.parameters():
        parameter.add_(torch.randn_like(parameter) * std)
    return net


def normal_net(config: PiDConfig, *, seed: int = 0) -> PiDNet:
    """All weights from a normal distribution of standard deviation 0.2; single numbers are 1."""
    torch.manual_seed(seed)
    net = PiDNet(config).eval().requires_grad_(False)
    for parameter in net.parameters():
        parameter.normal_(std=0.2) if parameter.ndim else parameter.fill_(1.0)
    return net


def save_student(config: PiDConfig, path: Path, *, space: str) -> Path:
    """Write a `normal_net` in the release's file format."""
    metadata = CheckpointMetadata(kind="student", config=config, space=space, license="Apache-2.0")
    save_file(dict(normal_net(config).state_dict()), path, metadata=metadata.to_metadata())
    return path
