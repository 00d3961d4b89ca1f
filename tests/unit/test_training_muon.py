# SPDX-License-Identifier: Apache-2.0
"""Muon: updates of matrices are nearly orthogonal, both kinds of parameters learn, and the state resumes exactly."""

from __future__ import annotations

import copy

import torch
from torch import nn

from pidecode.training.config import OptimizerConfig
from pidecode.training.muon import Muon, muon_groups, orthogonalize
from pidecode.training.trainer import make_optimizer


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 3, 1))


def test_singular_values_are_brought_near_one() -> None:
    matrices = torch.randn(2, 16, 40, generator=torch.Generator().manual_seed(0))
    for given in (matrices, matrices.mT):
        values = torch.linalg.svdvals(orthogonalize(given))
        assert values.min() > 0.5 and values.max() < 1.3


def test_matrices_and_kernels_get_muon_and_the_rest_adam() -> None:
    groups = muon_groups(network().named_parameters())
    assert [(group["muon"], [tuple(p.shape) for p in group["params"]]) for group in groups] == [
        (True, [(16, 3, 3, 3)]),
        (False, [(16,), (3, 16, 1, 1), (3,)]),
    ]
    assert not muon_groups(network().named_parameters(), adam_names=("0.",))[0]["muon"]


def run(net: nn.Module, optimizer: torch.optim.Optimizer, steps: range) -> list[float]:
    losses = []
    for step in steps:
        image = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(step % 4))
        loss = (net(image) - image.flip(1)).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def test_it_learns_and_resumes_from_its_state() -> None:
    net = network()
    optimizer = make_optimizer(net, OptimizerConfig(name="muon"), lr=1e-2, weight_decay=1e-3)
    assert isinstance(optimizer, Muon)
    losses = run(net, optimizer, range(40))
    assert losses[-1] < 0.5 * losses[0]
    other = copy.deepcopy(net)
    restored = make_optimizer(other, OptimizerConfig(name="muon"), lr=1e-2, weight_decay=1e-3)
    restored.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert run(net, optimizer, range(40, 44)) == run(other, restored, range(40, 44))
