# SPDX-License-Identifier: Apache-2.0
"""Weights in eight bits: half of bfloat16's memory, a small and stated error; products stay in the wider type."""

from __future__ import annotations

from typing import Literal, cast

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from pidecode.errors import SettingError

Format = Literal["int8", "fp8"]

_STORED: dict[str, tuple[torch.dtype, float]] = {"int8": (torch.int8, 127.0), "fp8": (torch.float8_e4m3fn, 448.0)}
"""Type and largest value of each format."""

SMALLEST = 2**16
"""Layers with fewer weights stay as they are: nothing to gain, and the gates among them are sensitive."""


class QuantizedLinear(nn.Module):
    """A linear layer whose weight is kept in eight bits with one scale per output, and widened when it is used."""

    codes: Tensor
    scales: Tensor
    bias: Tensor | None

    def __init__(self, linear: nn.Linear, form: Format) -> None:
        super().__init__()
        stored, largest = _STORED[form]
        self.in_features, self.out_features, self.dtype = linear.in_features, linear.out_features, linear.weight.dtype
        weight = linear.weight.detach().float()
        scales = weight.abs().amax(1, keepdim=True).clamp(min=1e-12) / largest
        codes = weight / scales
        self.register_buffer("codes", (codes.round() if form == "int8" else codes).to(stored))
        self.register_buffer("scales", scales)
        self.register_buffer("bias", None if linear.bias is None else linear.bias.detach())

    @property
    def weight(self) -> Tensor:
        """The weight, widened; made anew each time."""
        return (self.codes.to(torch.float32) * self.scales).to(self.dtype)

    def forward(self, x: Tensor) -> Tensor:
        """x `[..., in]` to `[..., out]`, in x's own type."""
        return F.linear(x, self.weight.to(x.dtype), self.bias)


def weight_rows(linear: nn.Module, rows: slice) -> Tensor:
    """Rows `[rows, in]` of a layer's weight, widening no others."""
    if isinstance(linear, QuantizedLinear):
        return (linear.codes[rows].to(torch.float32) * linear.scales[rows]).to(linear.dtype)
    return cast(Tensor, linear.weight)[rows]


def weight_columns(linear: nn.Module, columns: slice) -> Tensor:
    """Columns `[out, columns]` of a layer's weight, widening no others."""
    if isinstance(linear, QuantizedLinear):
        return (linear.codes[:, columns].to(torch.float32) * linear.scales).to(linear.dtype)
    return cast(Tensor, linear.weight)[:, columns]


def weight_block(linear: nn.Module, split: tuple[int, ...], index: tuple[slice, ...]) -> Tensor:
    """Rows of a layer seen as a `split` grid, cut by `index`: `[*cut, in]`, widening no others."""
    if isinstance(linear, QuantizedLinear):
        codes, scales = (t.unflatten(0, split)[index] for t in (linear.codes, linear.scales))
        return (codes.to(torch.float32) * scales).to(linear.dtype)  # type: ignore[no-any-return]
    return cast(Tensor, linear.weight).unflatten(0, split)[index]  # type: ignore[no-any-return]


@torch.no_grad()
def quantize(module: nn.Module, form: Format) -> int:
    """Replace the large linear layers below `module`, one after the other; returns how many.

    Raises SettingError for a format that does not exist.
    """
    if form not in _STORED:
        raise SettingError(f"There is no weight format {form!r}; there are {', '.join(_STORED)}.")
    count = 0
    for parent in list(module.modules()):
        for name, child in list(parent.named_children()):
            if type(child) is nn.Linear and child.weight.numel() >= SMALLEST:
                setattr(parent, name, QuantizedLinear(child, form))
                count += 1
    return count
