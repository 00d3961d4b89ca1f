# SPDX-License-Identifier: Apache-2.0
"""Elementwise ops of the in-place forward: norm, modulation, gates, rotary embedding.

Each has a reference implementation in `pidecode.models.pid` that autograd can differentiate. These write in place,
compute statistics in float32 without a float32 copy of the input, and agree with the reference to rounding.

Inside `with compiled_ops(...)` most run as fused kernels (experimental: no gain was measured on a GPU yet).
`torch.compile` fuses what lies between the matrix products, which stay library calls: they may be quantized or
offloaded. The one op that it cannot fuse, a pixel block's feed-forward between its gates, is a Triton kernel on GPUs
(`ops.triton`). The number of tokens is dynamic, so that one compiled op serves every image size, chunk and tile;
another width or type compiles again, and so does a single token. torch keeps compiled code on disk, and the next
process finds it there (docs/performance.md).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import wraps
from types import FunctionType
from typing import Any, TypeVar, cast

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from pidecode.engine.ops.quantize import WeightSlice
from pidecode.errors import SettingError

EPS = 1e-6

Op = TypeVar("Op", bound=Callable[..., Any])
_compiled: ContextVar[CompiledOps | None] = ContextVar("compiled_ops", default=None)


class CompiledOps:
    """The fused ops of one network; each is compiled when first called.

    Args:
        backend: Of `torch.compile`; another than "inductor" is for tests.
        interpreted: Run Triton kernels on a CPU too, as Triton's interpreter can; for tests.
    """

    def __init__(self, backend: str | Callable[..., Any] = "inductor", *, interpreted: bool = False) -> None:
        self._backend, self._interpreted = backend, interpreted
        self._cache: dict[str, Callable[..., Any]] = {}

    def run(self, body: Callable[..., Any], *arguments: Any) -> Any:
        """Run a function compiled; one without a result alters its first argument, which is then the result."""
        for argument in arguments:
            if isinstance(argument, Tensor) and argument.ndim > 1 and len(argument) == len(arguments[0]):
                torch._dynamo.maybe_mark_dynamic(argument, 0)
        name = body.__name__
        if name not in self._cache:
            assert isinstance(body, FunctionType)
            # torch limits how often one code object is recompiled in a process: each network has its own copy, so that
            # several networks do not exhaust the limit together.
            own = FunctionType(body.__code__.replace(), body.__globals__, name)
            self._cache[name] = torch.compile(own, backend=self._backend, fullgraph=True, dynamic=False)
        try:
            out = self._cache[name](*arguments)
        except torch._dynamo.exc.TorchDynamoException as error:
            detail = " ".join(line.strip() for line in str(error).splitlines()[:2]) or type(error).__name__
            raise SettingError(
                f"Compiling {name.strip('_')} for {arguments[0].device} failed: {detail} Run without compiling, "
                "or fix what the compiler needs; TORCH_LOGS=+dynamo,+inductor shows all of it."
            ) from error
        return arguments[0] if out is None else out

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
        """The function of this name below."""
        from pidecode.engine.ops import triton as kernels

        return kernels.update_pixels_(tile_TGC, expanded_TGC, vectors, fc1, fc2)  # type: ignore[arg-type]


@contextmanager
def compiled_ops(ops: CompiledOps | None) -> Iterator[None]:
    """Inside the `with`, run the ops that have one as fused kernels, where some are given. Experimental."""
    token = _compiled.set(ops)
    try:
        yield
    finally:
        _compiled.reset(token)


def _fused(body: Callable[..., Any]) -> Callable[[Op], Op]:
    """Run `body`, float32 arithmetic that compiles to one pass, in place of an op where ops are compiled."""

    def decorate(op: Op) -> Op:
        @wraps(op)
        def run(*arguments: Any) -> Any:
            ops = _compiled.get()
            return op(*arguments) if ops is None else ops.run(body, *arguments)

        return cast(Op, run)

    return decorate


def parts(length: int, size: int) -> Iterator[slice]:
    """Slices of at most `size` that cover `length`, as equal as can be: a short tail would waste a matrix product."""
    count = max(1, -(-length // size))
    step = -(-length // count)
    for start in range(0, length, step):
        yield slice(start, min(start + step, length))


def runs(batch: int, length: int, size: int) -> Iterator[tuple[slice, slice]]:
    """Samples and tokens of runs of at most `size` tokens: several whole samples, or a part of one."""
    if length > size // 2:
        for b in range(batch):
            for part in parts(length, size):
                yield slice(b, b + 1), part
        return
    for samples in parts(batch, size // length):
        yield samples, slice(0, length)


def cut_run(x: Tensor, run: tuple[slice, slice]) -> Tensor:
    """A run of `runs` of a contiguous `[B, L, ...]` as `[T, ...]`, a view."""
    return x[run].flatten(0, 1)


def cut_table(table_LK: Tensor, run: tuple[slice, slice]) -> Tensor:
    """Rows of a rotary table for a run of `runs`, once per sample."""
    samples, part = run
    count = samples.stop - samples.start
    return table_LK[part].repeat(count, 1) if count > 1 else table_LK[part]


def inverse_rms(x: Tensor) -> Tensor:
    """`1 / sqrt(mean(x^2) + eps)` over the last axis, kept, float32; x of any float type is not copied."""
    norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=torch.float32)
    return norm.square_().div_(x.shape[-1]).add_(EPS).rsqrt_()  # type: ignore[no-any-return]


def one_kernel_norm(x: Tensor) -> bool:
    """Whether torch has the RMS norm as one kernel where x is; on CPUs the ops below copy less."""
    return not x.is_cpu


def rms_norm_(x: Tensor, weight: Tensor) -> Tensor:
    """`x / rms(x) * weight` over the last axis of a float32 x, which may be overwritten."""
    if one_kernel_norm(x):
        return F.rms_norm(x, x.shape[-1:], weight.float(), EPS)
    return x.mul_(inverse_rms(x)).mul_(weight)


def _normed(x: Tensor) -> Tensor:
    x = x.float()
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + EPS)


def norm_to(x: Tensor, weight: Tensor, dtype: torch.dtype) -> Tensor:
    """`rms_norm_(x, weight)` as `dtype`."""
    if _compiled.get() is not None:
        return norm_modulate(x, torch.zeros_like(weight), weight, dtype)
    return rms_norm_(x, weight).to(dtype)


def _norm_modulate(x: Tensor, shift: Tensor, factor: Tensor, dtype: torch.dtype) -> Tensor:
    return (_normed(x) * factor + shift).to(dtype)


@_fused(_norm_modulate)
def norm_modulate(x: Tensor, shift: Tensor, factor: Tensor, dtype: torch.dtype) -> Tensor:
    """`rms_norm(x) * factor + shift`, computed in float32, as `dtype`; reference: `modulate(RMSNorm(x), shift, scale)`.

    `factor` is `(1 + scale) * norm weight`, merged once per step rather than per token.
    """
    normed = F.rms_norm(x, x.shape[-1:], eps=EPS) if one_kernel_norm(x) else x * inverse_rms(x)
    out = normed if normed.dtype == dtype else torch.empty_like(normed, dtype=dtype)
    return torch.addcmul(shift, normed, factor, out=out)


def _add_gated_(x: Tensor, branch: Tensor, gate: Tensor) -> None:
    x.add_(gate.float() * branch.float())


@_fused(_add_gated_)
def add_gated_(x: Tensor, branch: Tensor, gate: Tensor) -> Tensor:
    """`x += gate * branch`, in place, whatever the types of the two."""
    return x.addcmul_(branch, gate)


def _add_norm_modulate_(
    x: Tensor, branch: Tensor, gate: Tensor, shift: Tensor, factor: Tensor, dtype: torch.dtype
) -> Tensor:
    x.add_(gate.float() * branch.float())
    return (_normed(x) * factor + shift).to(dtype)


@_fused(_add_norm_modulate_)
def add_norm_modulate_(
    x: Tensor, branch: Tensor, gate: Tensor, shift: Tensor, factor: Tensor, dtype: torch.dtype
) -> Tensor:
    """`add_gated_`, then `norm_modulate` of the result: one pass over the stream where ops are compiled."""
    return norm_modulate(add_gated_(x, branch, gate), shift, factor, dtype)


def _gate_latent_(x_TD: Tensor, tokens_TD: Tensor, weight_D: Tensor, logits_T1: Tensor) -> None:
    # The plain gate reads the stream in the weight's type.
    opening = (x_TD.to(weight_D.dtype).float() * weight_D.float()).sum(-1, keepdim=True) + logits_T1
    x_TD.add_(torch.sigmoid(opening) * tokens_TD.float())


def gate_latent_(x_TD: Tensor, tokens_TD: Tensor, weight_OD: Tensor, logits: Tensor) -> Tensor:
    """`x += sigmoid(x @ weight^T + logits) * tokens`, in place; reference: `Gate.forward`.

    One gate per token (O is 1, logits `[T, 1]`) or per channel (O is D).
    """
    if len(weight_OD) == 1 and (ops := _compiled.get()) is not None:
        return cast(Tensor, ops.run(_gate_latent_, x_TD, tokens_TD, weight_OD[0], logits))
    return add_gated_(x_TD, tokens_TD, torch.sigmoid(F.linear(x_TD.to(weight_OD.dtype), weight_OD) + logits))


def update_pixels_(
    tile_TGC: Tensor, expanded_TGC: Tensor, vectors: tuple[Tensor, ...], fc1: nn.Module, fc2: nn.Module
) -> Tensor:
    """What a pixel block does after its attention, in place; reference: the end of `PixelBlock.forward`.

    Args:
        tile_TGC: Pixel tokens of a tile, float32.
        expanded_TGC: Attention output, expanded to pixels.
        vectors: Gate, shift, factor and gate, each `[T, G * C]`.
        fc1: First layer of the feed-forward.
        fc2: Its second layer.
    """
    if (ops := _compiled.get()) is not None and ops.fuses_pixels(tile_TGC, fc1, fc2):
        return ops.update_pixels_(tile_TGC, expanded_TGC, vectors, fc1, fc2)
    gate1, shift2, factor2, gate2 = (vector.view(tile_TGC.shape) for vector in vectors)
    inner = add_norm_modulate_(tile_TGC, expanded_TGC, gate1, shift2, factor2, expanded_TGC.dtype)
    hidden = fc1(inner.flatten(0, 1))
    return add_gated_(tile_TGC, fc2(torch.ops.aten.gelu_(hidden)).view(tile_TGC.shape), gate2)


def _norm_heads_(heads_TNK: Tensor, weight_K: Tensor) -> None:
    heads_TNK.copy_(_normed(heads_TNK) * weight_K)


def _norm_rotate_(heads_TNK: Tensor, weight_K: Tensor, rotation_TH2: Tensor) -> None:
    even, odd = (_normed(heads_TNK) * weight_K).unflatten(-1, (-1, 2)).unbind(-1)
    cos, sin = rotation_TH2.unsqueeze(1).unbind(-1)
    heads_TNK.copy_(torch.stack((even * cos - odd * sin, even * sin + odd * cos), dim=-1).flatten(-2))


def norm_rotate_(heads_TNK: Tensor, weight_K: Tensor, rotation: Tensor | None) -> None:
    """RMS-normalize each head and rotate its channel pairs, in place; reference: `rotate(RMSNorm(x), rotation)`.

    Args:
        heads_TNK: Queries or keys `[tokens, heads, head_dim]`, any strides with a dense last axis.
        weight_K: The norm's weight.
        rotation: `[tokens, head_dim / 2]` complex64, or None where nothing is rotated.
    """
    if (ops := _compiled.get()) is not None:
        if rotation is None:
            ops.run(_norm_heads_, heads_TNK, weight_K)
        else:  # the compiler does not support complex numbers
            ops.run(_norm_rotate_, heads_TNK, weight_K, torch.view_as_real(rotation))
        return
    x = heads_TNK if heads_TNK.dtype == torch.float32 else heads_TNK.float()
    x = rms_norm_(x, weight_K)
    if rotation is not None and (x.is_cpu or x.is_cuda or x.is_meta):
        torch.view_as_complex(x.unflatten(-1, (-1, 2))).mul_(rotation.unsqueeze(1))
    elif rotation is not None:  # not every device multiplies complex numbers
        even, odd = x.unflatten(-1, (-1, 2)).unbind(-1)
        cos, sin = rotation.real.unsqueeze(1), rotation.imag.unsqueeze(1)
        new_odd = even * sin + odd * cos
        even.copy_(even * cos - odd * sin)
        odd.copy_(new_odd)
    if x is not heads_TNK:
        heads_TNK.copy_(x)


def linear_into(linear: nn.Module, x_TD: Tensor, out: Tensor) -> None:
    """Write `linear(x)` into `out`, directly from the matrix product where the layer is an `nn.Linear`."""
    if type(linear) is nn.Linear and out.dtype == linear.weight.dtype:
        if linear.bias is None:
            torch.mm(x_TD, linear.weight.t(), out=out)
        else:
            torch.addmm(linear.bias, x_TD, linear.weight.t(), out=out)
    else:
        out.copy_(linear(x_TD))


def _silu_times_(x: Tensor, other: Tensor) -> None:
    x.copy_(F.silu(x.float()) * other.float())


@_fused(_silu_times_)
def silu_times_(x: Tensor, other: Tensor) -> Tensor:
    """`silu(x) * other`, into `x`."""
    return F.silu(x, inplace=True).mul_(other)


def accumulate_(total: Tensor, x: Tensor, matrix: WeightSlice) -> None:
    """`total += x @ matrix^T`; a float32 total stays float32."""
    if total.dtype == x.dtype and matrix.scales is None:
        total.addmm_(x, matrix.weight.t())
    else:
        total.add_(matrix(x))
