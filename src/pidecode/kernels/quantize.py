# SPDX-License-Identifier: Apache-2.0
"""Weights in eight bits: half of bfloat16's memory, a small and stated error; widened to multiply by default."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import cast

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from pidecode.errors import SettingError
from pidecode.kernels.products import STEP, STORED, Format, Way, narrow, product

SMALLEST = 2**16
"""Layers with fewer weights stay as they are: nothing to gain, and the gates among them are sensitive."""


class QuantizedLinear(nn.Module):
    """A linear layer whose weight is kept in eight bits with one scale per output.

    way: how it multiplies in eight bits too; None widens the weight when it is used. A layer whose sides the kernels
    do not take (`products.STEP`) is always widened.
    """

    codes: Tensor
    scales: Tensor
    bias: Tensor | None

    def __init__(self, linear: nn.Linear, form: Format, way: Way | None = None) -> None:
        super().__init__()
        self.in_features, self.out_features, self.dtype = linear.in_features, linear.out_features, linear.weight.dtype
        self.way = None if self.in_features % STEP or self.out_features % STEP else way
        codes, scales = narrow(linear.weight.detach().float(), form)
        self.register_buffer("codes", codes)
        self.register_buffer("scales", scales)
        self.register_buffer("bias", None if linear.bias is None else linear.bias.detach())

    @property
    def weight(self) -> Tensor:
        """The weight, widened; made anew each time."""
        return widened(self.codes, self.scales, self.dtype)

    def forward(self, x: Tensor) -> Tensor:
        """x `[..., in]` to `[..., out]`, in x's own type."""
        if self.way is None:
            return F.linear(x, self.weight.to(x.dtype), self.bias)
        out = product(x.flatten(0, -2), self.codes, self.scales, self.way, self.bias)
        return out.view(*x.shape[:-1], -1)


def widened(codes: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
    """`codes * scales`, rounded to `dtype` once: every code is exact in it, and no float32 copy is made."""
    return codes.to(dtype, copy=True).mul_(scales)


@dataclass(frozen=True, slots=True)
class Matrix:
    """Some of a layer's weight, ready to multiply with: wide, or in eight bits where its layer multiplies so."""

    weight: Tensor
    """`[..., out, in]`"""
    scales: Tensor | None = None
    """`[..., out, 1]` of a weight in eight bits."""
    way: Way | None = None

    def __call__(self, x_TK: Tensor, bias: Tensor | None = None) -> Tensor:
        """`x @ weight^T + bias`, in x's own type."""
        if self.scales is None or self.way is None:
            return F.linear(x_TK, self.weight, bias)
        return product(x_TK, self.weight, self.scales, self.way, bias)

    @property
    def per_output(self) -> Tensor:
        """The tensor that a factor for each output belongs into: the weight itself, or its scales."""
        return self.weight if self.scales is None else self.scales

    def map(self, change: Callable[[Tensor], Tensor]) -> Matrix:
        """The same with weight and scales both rearranged."""
        return replace(self, weight=change(self.weight), scales=None if self.scales is None else change(self.scales))


def _cut(linear: nn.Module, rows: Callable[[Tensor], Tensor], columns: slice = slice(None)) -> Matrix:
    if not isinstance(linear, QuantizedLinear):
        return Matrix(rows(cast(Tensor, linear.weight))[..., columns])
    codes, scales = rows(linear.codes)[..., columns], rows(linear.scales)
    if linear.way is None or codes.shape[-1] % STEP or codes.shape[:-1].numel() % STEP:
        return Matrix(widened(codes, scales, linear.dtype))
    return Matrix(codes, scales, linear.way)


def matrix_rows(linear: nn.Module, rows: slice) -> Matrix:
    """Rows `[rows, in]` of a layer's weight, widening no others."""
    return _cut(linear, lambda t: t[rows])


def matrix_columns(linear: nn.Module, columns: slice) -> Matrix:
    """Columns `[out, columns]` of a layer's weight, widening no others."""
    # Kernels want rows that lie side by side; done once here, not at each product.
    cut = _cut(linear, lambda t: t, columns)
    return cut if cut.scales is None else cut.map(Tensor.contiguous)


def matrix_block(linear: nn.Module, split: tuple[int, ...], index: tuple[slice, ...]) -> Matrix:
    """Rows of a layer seen as a `split` grid, cut by `index`: `[*cut, in]`, widening no others."""
    return _cut(linear, lambda t: t.unflatten(0, split)[index])


@torch.no_grad()
def quantize(module: nn.Module, form: Format, way: Way | None = None) -> int:
    """Replace the large linear layers below `module`, one after the other; returns how many.

    way: multiply in eight bits too, as `products.best_way` says this device can.
    Raises SettingError for a format that does not exist, or a way that is not the format's.
    """
    if form not in STORED:
        raise SettingError(f"There is no weight format {form!r}; there are {', '.join(STORED)}.")
    if way is not None and not way.startswith(form):
        raise SettingError(f"Weights in {form} cannot be multiplied in {way}; use one format for both.")
    count = 0
    for parent in list(module.modules()):
        for name, child in list(parent.named_children()):
            if type(child) is nn.Linear and child.weight.numel() >= SMALLEST:
                setattr(parent, name, QuantizedLinear(child, form, way))
                count += 1
    return count
