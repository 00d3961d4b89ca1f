# SPDX-License-Identifier: Apache-2.0
"""An optimiser for short runs: orthogonalised momentum for matrices and kernels, Adam for everything else."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

QUINTIC = (3.4445, -4.7750, 2.0315)
"""Newton-Schulz coefficients: singular values in (0, 1] are pushed near 1 within five rounds."""


def orthogonalised(matrix: Tensor, rounds: int = 5) -> Tensor:
    """A matrix with the singular vectors of `matrix` [rows, columns] and singular values near 1, by Newton-Schulz.

    Every factor is a polynomial in the small Gram matrix, so the rounds run at that size and the large matrix is
    touched twice; for kernels of 3x3 that is three times cheaper than iterating on the matrix itself.
    """
    tall = matrix.shape[0] > matrix.shape[1]
    x = matrix.T if tall else matrix
    x = x / (x.norm() + 1e-7)
    a, b, c = QUINTIC
    gram = x @ x.T
    identity = torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
    total = identity
    for _ in range(rounds):
        factor = a * identity + b * gram + c * gram @ gram
        total = factor @ total
        gram = factor @ gram @ factor
    even: Tensor = total @ x
    return even.T if tall else even


class Muon(torch.optim.Optimizer):
    """Orthogonalised Nesterov momentum (groups with `muon=True`) beside Adam (the rest).

    An update of a matrix is scaled to the root mean square of 0.2 that Adam's usually has, so both kinds
    share one learning rate. Kernels [out, in, 3, 3] are seen as matrices [out, in * 9].
    """

    def __init__(self, groups: list[dict[str, Any]], lr: float, weight_decay: float = 0.0) -> None:
        super().__init__(groups, {"lr": lr, "weight_decay": weight_decay, "muon": False})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """One update from the gradients that are there; parameters without one are left alone."""
        loss = None if closure is None else torch.enable_grad()(closure)()
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                parameter.mul_(1 - group["lr"] * group["weight_decay"])
                update = self._matrix_update(parameter) if group["muon"] else self._adam_update(parameter)
                parameter.add_(update, alpha=-group["lr"])
        return loss

    def _matrix_update(self, parameter: Tensor) -> Tensor:
        state, gradient = self.state[parameter], parameter.grad
        assert gradient is not None
        if "momentum" not in state:
            state["momentum"] = torch.zeros_like(parameter)
        momentum: Tensor = state["momentum"]
        momentum.lerp_(gradient, 0.05)
        ahead = gradient.lerp(momentum, 0.95).reshape(parameter.shape[0], -1)
        scale = 0.2 * float(max(ahead.shape)) ** 0.5
        update: Tensor = orthogonalised(ahead).view_as(parameter) * scale
        return update

    def _adam_update(self, parameter: Tensor) -> Tensor:
        state, gradient = self.state[parameter], parameter.grad
        assert gradient is not None
        if "step" not in state:
            state["step"] = torch.zeros(())
            state["mean"], state["square"] = torch.zeros_like(parameter), torch.zeros_like(parameter)
        state["step"] += 1
        count = float(state["step"])
        state["mean"].lerp_(gradient, 0.1)
        state["square"].lerp_(gradient.square(), 0.01)
        scale = (state["square"] / (1 - 0.99**count)).sqrt() + 1e-8
        return state["mean"] / (1 - 0.9**count) / scale  # type: ignore[no-any-return]


def muon_groups(named: Iterable[tuple[str, nn.Parameter]], *, adam_names: tuple[str, ...] = ()) -> list[dict[str, Any]]:
    """Matrices and kernels of 16 rows and columns or more get Muon, unless a name holds one of `adam_names`."""
    matrices: list[nn.Parameter] = []
    others: list[nn.Parameter] = []
    for name, parameter in named:
        wide = parameter.ndim >= 2 and min(parameter.shape[0], parameter[0].numel()) >= 16
        (matrices if wide and not any(part in name for part in adam_names) else others).append(parameter)
    return [{"params": matrices, "muon": True}, {"params": others, "muon": False}]
