# SPDX-License-Identifier: Apache-2.0
"""An optimizer for short runs: orthogonalised momentum for matrices and kernels, Adam for everything else."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

QUINTIC = (3.4445, -4.7750, 2.0315)
"""Newton-Schulz coefficients: singular values in (0, 1] are pushed near 1 within five rounds."""
MOMENTUM = 0.95
ADAM_KEEP = (0.9, 0.99)
"""What Adam keeps of its means of gradients and of their squares."""


def orthogonalised(matrices: Tensor, rounds: int = 5) -> Tensor:
    """Matrices with the singular vectors of `matrices` [..., rows, columns] and singular values near 1.

    By Newton-Schulz. Every factor is a polynomial in the small Gram matrix, so the rounds run at that size and the
    large matrix is touched twice; for kernels of 3x3 that is three times cheaper than iterating on the matrix itself.
    """
    tall = matrices.shape[-2] > matrices.shape[-1]
    x = matrices.mT if tall else matrices
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    a, b, c = QUINTIC
    gram = x @ x.mT
    identity = torch.eye(gram.shape[-1], dtype=gram.dtype, device=gram.device)
    total = identity
    for _ in range(rounds):
        factor = a * identity + b * gram + c * gram @ gram
        total = factor @ total
        gram = factor @ gram @ factor
    even: Tensor = total @ x
    return even.mT if tall else even


class Muon(torch.optim.Optimizer):
    """Orthogonalised Nesterov momentum (groups with `muon=True`) beside Adam (the rest).

    An update of a matrix is scaled to the root mean square of 0.2 that Adam's usually has, so both kinds
    share one learning rate. Kernels [out, in, 3, 3] are seen as matrices [out, in * 9]; matrices of one shape are
    worked on together. A group's `lr` may be a tensor, which a recorded step reads anew each time.
    """

    def __init__(self, groups: list[dict[str, Any]], lr: float | Tensor, weight_decay: float = 0.0) -> None:
        super().__init__(groups, {"lr": lr, "weight_decay": weight_decay, "muon": False})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """One update from the gradients that are there; parameters without one are left alone."""
        loss = None if closure is None else torch.enable_grad()(closure)()
        for group in self.param_groups:
            learning = [parameter for parameter in group["params"] if parameter.grad is not None]
            if not learning:
                continue
            if group["weight_decay"]:
                for parameter in learning:
                    parameter.mul_(1 - group["lr"] * group["weight_decay"])
            updates = self._matrix_updates(learning) if group["muon"] else self._adam_updates(learning, group)
            torch._foreach_mul_(updates, -group["lr"])
            torch._foreach_add_(learning, updates)
        return loss

    def _kept(self, parameters: Sequence[Tensor], name: str) -> list[Tensor]:
        """What the optimizer remembers by that name of each parameter; nothing yet is zero."""
        for parameter in parameters:
            if name not in self.state[parameter]:
                self.state[parameter][name] = torch.zeros_like(parameter)
        return [self.state[parameter][name] for parameter in parameters]

    def _matrix_updates(self, parameters: Sequence[Tensor]) -> list[Tensor]:
        gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
        momenta = self._kept(parameters, "momentum")
        torch._foreach_lerp_(momenta, gradients, 1 - MOMENTUM)
        ahead = torch._foreach_lerp(gradients, momenta, MOMENTUM)
        alike: dict[tuple[int, ...], list[int]] = {}
        for index, parameter in enumerate(parameters):
            alike.setdefault((parameter.shape[0], parameter[0].numel()), []).append(index)
        updates: list[Tensor] = list(ahead)
        for shape, indices in alike.items():
            even = orthogonalised(torch.stack([ahead[index].reshape(shape) for index in indices]))
            for index, update in zip(indices, even.mul(0.2 * max(shape) ** 0.5), strict=True):
                updates[index] = update.view_as(parameters[index])
        return updates

    def _adam_updates(self, parameters: Sequence[Tensor], group: dict[str, Any]) -> list[Tensor]:
        gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
        means, squares = self._kept(parameters, "mean"), self._kept(parameters, "square")
        torch._foreach_lerp_(means, gradients, 1 - ADAM_KEEP[0])
        torch._foreach_lerp_(squares, torch._foreach_mul(gradients, gradients), 1 - ADAM_KEEP[1])
        group.setdefault("count", torch.zeros((), device=parameters[0].device)).add_(1)
        first, second = (1 - keep ** group["count"] for keep in ADAM_KEEP)
        sizes = torch._foreach_sqrt(torch._foreach_div(squares, second))
        torch._foreach_add_(sizes, 1e-8)
        updates: list[Tensor] = list(torch._foreach_div(torch._foreach_div(means, first), sizes))
        return updates


def muon_groups(named: Iterable[tuple[str, nn.Parameter]], *, adam_names: tuple[str, ...] = ()) -> list[dict[str, Any]]:
    """Matrices and kernels of 16 rows and columns or more get Muon, unless a name holds one of `adam_names`."""
    matrices: list[nn.Parameter] = []
    others: list[nn.Parameter] = []
    for name, parameter in named:
        wide = parameter.ndim >= 2 and min(parameter.shape[0], parameter[0].numel()) >= 16
        (matrices if wide and not any(part in name for part in adam_names) else others).append(parameter)
    return [{"params": matrices, "muon": True}, {"params": others, "muon": False}]
