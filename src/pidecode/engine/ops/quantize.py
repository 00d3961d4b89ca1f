# SPDX-License-Identifier: Apache-2.0
"""Weight quantization (w8a16) and eight-bit matrix products (w8a8), int8 and fp8.

Weights carry one scale per output (`quantize.py`), activations get one per token as they come. The sums are
those of `plain_product`, which widens the same codes first: rounding the factors is all that differs from the exact
product.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal, cast

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from pidecode.errors import SettingError

Format = Literal["int8", "fp8"]
Way = Literal["int8", "fp8 by rows", "fp8"]
"""How a device multiplies: in integers; in floats, with the scales given to the kernel; or scaled back afterwards."""

STORED: dict[Format, tuple[torch.dtype, float]] = {"int8": (torch.int8, 127.0), "fp8": (torch.float8_e4m3fn, 448.0)}
"""Type and largest value of each format."""

WAYS: dict[Format, tuple[Way, ...]] = {"int8": ("int8",), "fp8": ("fp8 by rows", "fp8")}
"""Ways of each format, the better one first."""

STEP = 16
"""Kernels multiply matrices whose sides divide by this."""

FEWEST = 17
"""Tokens that an integer product needs on some devices; fewer are padded."""


def narrow(x_TK: Tensor, form: Format) -> tuple[Tensor, Tensor]:
    """Codes `[T, K]` and scales `[T, 1]`, float32, of a matrix: each row fills the format's range."""
    stored, largest = STORED[form]
    scales = torch.linalg.vector_norm(x_TK, ord=float("inf"), dim=-1, keepdim=True, dtype=torch.float32)
    scales = scales.clamp_(min=1e-12).div_(largest)
    codes = x_TK / scales
    return (codes.round_() if form == "int8" else codes).to(stored), scales


def product(x_TK: Tensor, codes_OK: Tensor, scales_O1: Tensor, way: Way, bias: Tensor | None = None) -> Tensor:
    """`x @ (codes * scales)^T + bias` in eight bits, `[T, O]` in x's own type; twin: `plain_product`."""
    form: Format = "int8" if way == "int8" else "fp8"
    codes, scales = narrow(x_TK, form)
    if way == "fp8 by rows":
        out = torch._scaled_mm(
            codes, codes_OK.t(), scale_a=scales, scale_b=scales_O1.t().contiguous(), out_dtype=torch.bfloat16
        )
        out = out.to(x_TK.dtype)
        return out if bias is None else out.add_(bias)
    if way == "int8":
        short = FEWEST - len(codes)
        raw = torch._int_mm(F.pad(codes, (0, 0, 0, short)) if short > 0 else codes, codes_OK.t())[: len(codes)]
    else:
        one = torch.ones((), device=x_TK.device)
        raw = torch._scaled_mm(codes, codes_OK.t(), scale_a=one, scale_b=one, out_dtype=torch.float32)
    wide = raw * scales
    del raw
    wide.mul_(scales_O1.t())
    if bias is not None:
        wide.add_(bias)
    return wide.to(x_TK.dtype)


def plain_product(
    x_TK: Tensor, codes_OK: Tensor, scales_O1: Tensor, form: Format, bias: Tensor | None = None
) -> Tensor:
    """The same sums in float32: what every way is compared with."""
    codes, scales = narrow(x_TK, form)
    out = (codes.float() * scales) @ (codes_OK.float() * scales_O1).t()
    return (out if bias is None else out + bias).to(x_TK.dtype)


def works(way: Way, dtype: torch.dtype, device: torch.device) -> bool:
    """Whether a device multiplies this way for activations of `dtype`, and its answer is right."""
    if way == "fp8 by rows" and dtype != torch.bfloat16:
        return False  # such kernels answer in bfloat16 only
    form: Format = "int8" if way == "int8" else "fp8"
    generator = torch.Generator().manual_seed(0)
    x, weight = (torch.randn(64, 64, generator=generator) for _ in range(2))
    codes, scales = narrow(weight, form)
    expected = plain_product(x.to(dtype), codes, scales, form).float()
    try:
        answer = product(x.to(device, dtype), codes.to(device), scales.to(device), way).float().cpu()
    except (RuntimeError, NotImplementedError, AttributeError):
        return False
    return bool((answer - expected).abs().max() <= 1e-2 * expected.abs().max())


def best_way(form: Format, dtype: torch.dtype, device: torch.device) -> Way:
    """The first way in which the device multiplies this format right. Raises SettingError where there is none."""
    if device.type == "meta":  # where memory is counted and nothing computed
        return WAYS[form][0] if form == "int8" or dtype == torch.bfloat16 else "fp8"
    # Processors only imitate eight-bit floats, at a small part of float32's speed.
    if form == "int8" or device.type != "cpu":
        for way in WAYS[form]:
            if works(way, dtype, device):
                return way
    need = (
        "an NVIDIA card of compute capability 8.9 or above, or an AMD one with the like"
        if form == "fp8"
        else "an NVIDIA card, or a processor and a torch with integer products"
    )
    raise SettingError(
        f"{device} does not multiply in {form}: that takes {need}. Keep the weights in {form} and multiply wide "
        'instead (products="wide").'
    )


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
