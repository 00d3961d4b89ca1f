# SPDX-License-Identifier: Apache-2.0
"""The elementwise ops as fused kernels. Experimental: no gain was measured on a GPU yet.

Each equals the function of its name in `elementwise`, its reference implementation. `torch.compile` fuses what lies
between the matrix products, which stay library calls: they may be quantized or offloaded. The one op that it cannot
fuse, a pixel block's feed-forward between its gates, is a Triton kernel on GPUs (`ops.triton`).

The number of tokens is dynamic, so that one compiled op serves every image size, chunk and tile; another width or type
compiles again, and so does a single token.

torch keeps compiled code on disk, and the next process finds it there (docs/performance.md).
"""

from __future__ import annotations

from collections.abc import Callable
from types import FunctionType
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from pidecode.errors import SettingError

EPS = 1e-6


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


def _gate_latent_(x_TD: Tensor, tokens_TD: Tensor, weight_D: Tensor, logits_T1: Tensor) -> None:
    # The plain gate reads the stream in the weight's type.
    opening = (x_TD.to(weight_D.dtype).float() * weight_D.float()).sum(-1, keepdim=True) + logits_T1
    x_TD.add_(torch.sigmoid(opening) * tokens_TD.float())


def _silu_times_(x: Tensor, other: Tensor) -> None:
    x.copy_(F.silu(x.float()) * other.float())


def _fused(body: Callable[..., Any]) -> Callable[..., Tensor]:
    """The method that runs a body, of tensors and then constants; a body without a result alters its first tensor."""

    def method(self: CompiledOps, *arguments: Any) -> Tensor:
        tensors = tuple(argument for argument in arguments if isinstance(argument, Tensor))
        out: Tensor | None = self._run(body, tensors, *arguments[len(tensors) :])
        return tensors[0] if out is None else out

    return method


class CompiledOps:
    """The fused ops of one network; each is compiled when first called.

    Args:
        backend: Of `torch.compile`; another than "inductor" is for tests.
        interpreted: Run Triton kernels on a CPU too, as Triton's interpreter can; for tests.
    """

    def __init__(self, backend: str | Callable[..., Any] = "inductor", *, interpreted: bool = False) -> None:
        from torch._dynamo.exc import TorchDynamoException

        self._backend, self._interpreted, self._errors = backend, interpreted, TorchDynamoException
        self._cache: dict[str, Callable[..., Any]] = {}

    norm_modulate = _fused(_norm_modulate)
    add_gated_ = _fused(_add_gated_)
    add_norm_modulate_ = _fused(_add_norm_modulate_)  # the stream is read once for both
    silu_times_ = _fused(_silu_times_)
    gate_latent_ = _fused(_gate_latent_)  # for one gate per token

    def norm_rotate_(self, heads_TNK: Tensor, weight_K: Tensor, rotation: Tensor | None) -> None:
        """See `elementwise.norm_rotate_`."""
        if rotation is None:
            self._run(_norm_heads_, (heads_TNK, weight_K))
        else:  # the compiler does not support complex numbers
            self._run(_norm_rotate_, (heads_TNK, weight_K, torch.view_as_real(rotation)))

    def fuses_pixels(self, tile_TGC: Tensor, fc1: nn.Module, fc2: nn.Module) -> bool:
        """Whether `update_pixels_` takes these: plain layers where Triton runs, pixels side by side."""
        return (
            (tile_TGC.is_cuda or self._interpreted)
            and type(fc1) is type(fc2) is nn.Linear
            and tile_TGC.stride()[1:] == (tile_TGC.shape[2], 1)
        )

    def update_pixels_(
        self, tile_TGC: Tensor, expanded_TGC: Tensor, vectors: tuple[Tensor, ...], fc1: nn.Module, fc2: nn.Module
    ) -> Tensor:
        """See `elementwise.update_pixels_`."""
        from pidecode.engine.ops import triton as kernels

        return kernels.update_pixels_(tile_TGC, expanded_TGC, vectors, fc1, fc2)  # type: ignore[arg-type]

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
