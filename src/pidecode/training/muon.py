# SPDX-License-Identifier: Apache-2.0
"""Muon: orthogonalized momentum for weight matrices and convolution kernels, Adam for all other parameters.

https://kellerjordan.github.io/posts/muon/, scaled as in https://arxiv.org/abs/2502.16982.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

_NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)
"""Coefficients of the quintic iteration: singular values in (0, 1] are pushed near 1 within five rounds."""
_MOMENTUM = 0.95
_ADAM_BETAS = (0.9, 0.99)


def orthogonalize(matrices: Tensor, rounds: int = 5) -> Tensor:
    """Matrices with the singular vectors of `matrices` `[..., rows, columns]` and singular values near 1.

    Newton-Schulz iteration. Every factor is a polynomial in the small Gram matrix, so the rounds run at that size and
    the large matrix is touched twice; for 3x3 kernels that is three times cheaper than iterating on the matrix itself.
    """
    tall = matrices.shape[-2] > matrices.shape[-1]
    x = matrices.mT if tall else matrices
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    a, b, c = _NEWTON_SCHULZ
    gram = x @ x.mT
    identity = torch.eye(gram.shape[-1], dtype=gram.dtype, device=gram.device)
    total = identity
    for _ in range(rounds):
        factor = a * identity + b * gram + c * gram @ gram
        total = factor @ total
        gram = factor @ gram @ factor
    result: Tensor = total @ x
    return result.mT if tall else result


class Muon(torch.optim.Optimizer):
    """Orthogonalized Nesterov momentum for groups with `muon=True`, Adam for the others.

    The update of a matrix is scaled to a root mean square of 0.2, which Adam's usually has, so both share one learning
    rate. Kernels `[out, in, 3, 3]` are treated as matrices `[out, in * 9]`; matrices of one shape are processed
    together.
    """

    def __init__(self, groups: list[dict[str, Any]], lr: float, weight_decay: float = 0.0) -> None:
        super().__init__(groups, {"lr": lr, "weight_decay": weight_decay, "muon": False})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """One update; parameters without a gradient are left alone."""
        loss = None if closure is None else torch.enable_grad()(closure)()
        for group in self.param_groups:
            parameters = [parameter for parameter in group["params"] if parameter.grad is not None]
            if not parameters:
                continue
            if group["weight_decay"]:
                torch._foreach_mul_(parameters, 1 - group["lr"] * group["weight_decay"])
            updates = self._matrix_updates(parameters) if group["muon"] else self._adam_updates(parameters)
            torch._foreach_add_(parameters, updates, alpha=-group["lr"])
        return loss

    def _moments(self, parameters: Sequence[Tensor], name: str) -> list[Tensor]:
        for parameter in parameters:
            if name not in self.state[parameter]:
                self.state[parameter][name] = torch.zeros_like(parameter)
        return [self.state[parameter][name] for parameter in parameters]

    def _matrix_updates(self, parameters: Sequence[Tensor]) -> list[Tensor]:
        gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
        momenta = self._moments(parameters, "momentum")
        torch._foreach_lerp_(momenta, gradients, 1 - _MOMENTUM)
        nesterov = torch._foreach_lerp(gradients, momenta, _MOMENTUM)
        by_shape: dict[tuple[int, ...], list[int]] = {}
        for index, parameter in enumerate(parameters):
            by_shape.setdefault((parameter.shape[0], parameter[0].numel()), []).append(index)
        updates: list[Tensor] = list(nesterov)
        for shape, indices in by_shape.items():
            matrices = orthogonalize(torch.stack([nesterov[index].reshape(shape) for index in indices]))
            for index, update in zip(indices, matrices.mul(0.2 * max(shape) ** 0.5), strict=True):
                updates[index] = update.view(parameters[index].shape)
        return updates

    def _adam_updates(self, parameters: Sequence[Tensor]) -> list[Tensor]:
        gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
        means, squares = self._moments(parameters, "exp_avg"), self._moments(parameters, "exp_avg_sq")
        torch._foreach_lerp_(means, gradients, 1 - _ADAM_BETAS[0])
        torch._foreach_lerp_(squares, torch._foreach_mul(gradients, gradients), 1 - _ADAM_BETAS[1])
        updates: list[Tensor] = []
        for parameter, mean, square in zip(parameters, means, squares, strict=True):
            step = self.state[parameter].setdefault("step", torch.zeros(()))
            step += 1
            first, second = (1 - beta ** float(step) for beta in _ADAM_BETAS)
            updates.append((mean / first) / ((square / second).sqrt() + 1e-8))
        return updates


def muon_groups(named: Iterable[tuple[str, nn.Parameter]], *, adam_names: tuple[str, ...] = ()) -> list[dict[str, Any]]:
    """Parameter groups: Muon for matrices and kernels of at least 16 rows and columns, Adam for the rest.

    Parameters with a part of `adam_names` in their name, such as first and last layers, get Adam in any case.
    """
    matrices: list[nn.Parameter] = []
    others: list[nn.Parameter] = []
    for name, parameter in named:
        wide = parameter.ndim >= 2 and min(parameter.shape[0], parameter[0].numel()) >= 16
        (matrices if wide and not any(part in name for part in adam_names) else others).append(parameter)
    return [{"params": params, "muon": muon} for params, muon in ((matrices, True), (others, False)) if params]
