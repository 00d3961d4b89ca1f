# SPDX-License-Identifier: Apache-2.0
"""Scaled-dot-product attention on a backend that is probed, chosen and reported."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch
import torch.nn.functional as F  # noqa: N812 - torch's own convention
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from pidecode.errors import SettingError

BACKENDS: dict[str, SDPBackend] = {
    "cudnn": SDPBackend.CUDNN_ATTENTION, "flash": SDPBackend.FLASH_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION, "math": SDPBackend.MATH,
}  # fmt: skip
"""torch's kernels by name, the fastest at PiD's head sizes first. "math" holds all scores at once."""

_chosen: ContextVar[str | None] = ContextVar("attention_backend", default=None)


def attention(q_BNLK: Tensor, k_BNLK: Tensor, v_BNLK: Tensor) -> Tensor:
    """`softmax(q k^T / sqrt(head_dim)) v` without a mask, on the backend that `use_backend` chose or torch picks.

    All are `[B, heads, tokens, head_dim]`; keys and values may have another number of tokens than queries. PiD masks
    nothing: padded prompt positions are attended (docs/architecture.md, Text).
    """
    if q_BNLK.is_meta:
        # Stands for a kernel that never holds all scores, so that memory can be counted where nothing is computed.
        return torch.empty_like(q_BNLK.transpose(1, 2), memory_format=torch.contiguous_format).transpose(1, 2)
    name = _chosen.get()
    if name is None:
        return F.scaled_dot_product_attention(q_BNLK, k_BNLK, v_BNLK)
    with sdpa_kernel(BACKENDS[name]):
        return F.scaled_dot_product_attention(q_BNLK, k_BNLK, v_BNLK)


@contextmanager
def use_backend(name: str | None) -> Iterator[None]:
    """Run attention on one named backend inside the `with`; None leaves the choice to torch.

    Raises:
        SettingError: There is no such backend.
    """
    if name is not None and name not in BACKENDS:
        raise SettingError(f"There is no attention backend {name!r}; there are {', '.join(BACKENDS)}.")
    token = _chosen.set(name)
    try:
        yield
    finally:
        _chosen.reset(token)


def reference_attention(q_BNLK: Tensor, k_BNLK: Tensor, v_BNLK: Tensor) -> Tensor:
    """The reference implementation, in float64: what every backend is compared with."""
    q, k, v = (x.double() for x in (q_BNLK, k_BNLK, v_BNLK))
    out: Tensor = (q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5).softmax(-1) @ v
    return out.to(v_BNLK.dtype)


def backend_works(name: str, head_dim: int, dtype: torch.dtype, device: torch.device) -> bool:
    """Whether a backend runs heads of this size here and its result is right: some give NaN instead of an error."""
    tolerance = 1e-4 if dtype == torch.float32 else 5e-2
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, 2, 300, head_dim, generator=generator).to(device, dtype) for _ in range(3))
    try:
        with warnings.catch_warnings(), torch.no_grad(), use_backend(name):
            warnings.simplefilter("ignore")  # torch explains at length why a kernel was refused
            out = attention(q, k, v)
    except RuntimeError:
        return False
    return bool((out - reference_attention(q.cpu(), k.cpu(), v.cpu()).to(out)).abs().max() < tolerance)


def best_backend(head_dims: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> str:
    """The first backend that works for all these head sizes on the device; warns if that is the slow one.

    Raises:
        SettingError: None works.
    """
    for name in BACKENDS:
        if all(backend_works(name, head_dim, dtype, device) for head_dim in head_dims):
            if name == "math":
                warnings.warn(
                    f"Attention on {device} in {dtype} has no fast kernel that works: decoding will be slow and need "
                    "much memory. Another dtype or version of torch may have one.",
                    stacklevel=2,
                )
            return name
    raise SettingError(f"No attention backend gives a right result on {device} in {dtype}; use float32.")
