# SPDX-License-Identifier: Apache-2.0
"""Matrix products in eight bits: both factors narrow, their sums wide, the result scaled back; not exact.

Weights carry one scale per output (`kernels/quantize.py`), activations get one per token as they come. The sums are
those of `plain_product`, which widens the same codes first: rounding the factors is all that differs from the exact
product.
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

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
