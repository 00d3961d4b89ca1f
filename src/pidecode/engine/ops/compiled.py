# SPDX-License-Identifier: Apache-2.0
"""The elementwise ops as `torch.compile` compiles them. Experimental: no gain was measured on a GPU yet.

Each equals the function of its name in `elementwise`, its reference implementation. Matrix products are not compiled:
they are library calls either way, may be quantized or offloaded, and no op fuses across one. The number of tokens is
dynamic, so that one compiled op serves every image size, chunk and tile; another width or type compiles again, and so
does a single token.

torch keeps compiled code on disk, and the next process finds it there (docs/performance.md).
"""

from __future__ import annotations

from collections.abc import Callable
from types import FunctionType
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from pidecode.errors import SettingError

EPS = 1e-6


class CompiledOps:
    """The compiled ops of one network; each is compiled when first called. A backend but "inductor" is for tests."""

    def __init__(self, backend: str | Callable[..., Any] = "inductor") -> None:
        from torch._dynamo.exc import TorchDynamoException

        self._backend, self._errors = backend, TorchDynamoException
        self._cache: dict[str, Callable[..., Any]] = {}

    def norm_modulate(self, x: Tensor, shift: Tensor, factor: Tensor, dtype: torch.dtype) -> Tensor:
        """See `elementwise.norm_modulate`."""
        return self._run(_norm_modulate, (x, shift, factor), dtype)  # type: ignore[no-any-return]

    def add_gated_(self, x: Tensor, branch: Tensor, gate: Tensor) -> Tensor:
        """See `elementwise.add_gated_`."""
        self._run(_add_gated_, (x, branch, gate))
        return x

    def add_norm_modulate_(
        self, x: Tensor, branch: Tensor, gate: Tensor, shift: Tensor, factor: Tensor, dtype: torch.dtype
    ) -> Tensor:
        """See `elementwise.add_norm_modulate_`; the stream is read once for both."""
        return self._run(_add_norm_modulate_, (x, branch, gate, shift, factor), dtype)  # type: ignore[no-any-return]

    def norm_rotate_(self, heads_TNK: Tensor, weight_K: Tensor, rotation: Tensor | None) -> None:
        """See `elementwise.norm_rotate_`."""
        if rotation is None:
            self._run(_norm_heads_, (heads_TNK, weight_K))
        else:  # the compiler does not support complex numbers
            self._run(_norm_rotate_, (heads_TNK, weight_K, torch.view_as_real(rotation)))

    def silu_times_(self, x: Tensor, other: Tensor) -> Tensor:
        """See `elementwise.silu_times_`."""
        self._run(_silu_times_, (x, other))
        return x

    def _run(self, body: Callable[..., Any], tensors: tuple[Tensor, ...], *constants: Any) -> Any:
        tokens = tensors[0].shape[0]
        for tensor in tensors:
            if tensor.ndim > 1 and tensor.shape[0] == tokens:
                torch._dynamo.maybe_mark_dynamic(tensor, 0)
        try:
            return self._compiled(body)(*tensors, *constants)
        except self._errors as error:
            detail = " ".join(line.strip() for line in str(error).splitlines()[:2]) or type(error).__name__
            raise SettingError(
                f"Compiling {body.__name__.strip('_')} for {tensors[0].device} failed: {detail} Run without compiling, "
                "or fix what the compiler needs; TORCH_LOGS=+dynamo,+inductor shows all of it."
            ) from error

    def _compiled(self, body: Callable[..., Any]) -> Callable[..., Any]:
        name = body.__name__
        if name not in self._cache:
            assert isinstance(body, FunctionType)
            # torch limits how often one code object is recompiled in a process: each network has its own copy, so that
            # several networks do not exhaust the limit together.
            own = FunctionType(body.__code__.replace(), body.__globals__, name)
            self._cache[name] = torch.compile(own, backend=self._backend, fullgraph=True, dynamic=False)
        return self._cache[name]


# What is compiled: float32 arithmetic, which the compiler fuses into one pass over memory.


def _normed(x: Tensor) -> Tensor:
    x = x.float()
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + EPS)


def _norm_modulate(x: Tensor, shift: Tensor, factor: Tensor, dtype: torch.dtype) -> Tensor:
    return (_normed(x) * factor + shift).to(dtype)


def _add_gated_(x: Tensor, branch: Tensor, gate: Tensor) -> None:
    x.add_(gate.float() * branch.float())


def _add_norm_modulate_(
    x: Tensor, branch: Tensor, gate: Tensor, shift: Tensor, factor: Tensor, dtype: torch.dtype
) -> Tensor:
    x.add_(gate.float() * branch.float())
    return (_normed(x) * factor + shift).to(dtype)


def _norm_heads_(heads_TNK: Tensor, weight_K: Tensor) -> None:
    heads_TNK.copy_(_normed(heads_TNK) * weight_K)


def _norm_rotate_(heads_TNK: Tensor, weight_K: Tensor, rotation_TH2: Tensor) -> None:
    even, odd = (_normed(heads_TNK) * weight_K).unflatten(-1, (-1, 2)).unbind(-1)
    cos, sin = rotation_TH2.unsqueeze(1).unbind(-1)
    heads_TNK.copy_(torch.stack((even * cos - odd * sin, even * sin + odd * cos), dim=-1).flatten(-2))


def _silu_times_(x: Tensor, other: Tensor) -> None:
    x.copy_(F.silu(x.float()) * other.float())
