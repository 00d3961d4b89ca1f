# SPDX-License-Identifier: Apache-2.0
"""Scaled-dot-product attention on a kernel that was named, or measured to be the fastest right one where it runs."""

from __future__ import annotations

import json
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from dataclasses import dataclass, field
from functools import partial
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812 - torch's own convention
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from pidecode.errors import FileError, SettingError
from pidecode.files import atomic_write, cache_folder
from pidecode.strict_json import JSONError, read_json

# Queries, keys and values `[B, heads, tokens, head_dim]` to the output, shaped as the queries.
AttentionKernel = Callable[[Tensor, Tensor, Tensor], Tensor]

# torch's kernels by name. "math" holds all scores at once.
BACKENDS: dict[str, SDPBackend] = {
    "cudnn": SDPBackend.CUDNN_ATTENTION, "flash": SDPBackend.FLASH_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION, "math": SDPBackend.MATH,
}  # fmt: skip

# Modules of FlashAttention 4 and 3, used where they are installed.
PACKAGES = {"flash-4": "flash_attn.cute", "flash-3": "flash_attn_interface"}

ROUNDS = 3  # timed calls of each kernel, of which the fastest counts
_kernel: ContextVar[AttentionKernel | None] = ContextVar("attention_kernel", default=None)


def attention(q_BNLK: Tensor, k_BNLK: Tensor, v_BNLK: Tensor) -> Tensor:
    """`softmax(q k^T / sqrt(head_dim)) v` without a mask, on the kernel of `use_kernel` or the one torch picks.

    All are `[B, heads, tokens, head_dim]`; keys and values may have another number of tokens than queries. PiD masks
    nothing: padded prompt positions are attended (docs/architecture.md, Text).
    """
    if q_BNLK.is_meta:
        # Stands for a kernel that never holds all scores, so that memory can be counted where nothing is computed.
        return torch.empty_like(q_BNLK.transpose(1, 2), memory_format=torch.contiguous_format).transpose(1, 2)
    return (_kernel.get() or F.scaled_dot_product_attention)(q_BNLK, k_BNLK, v_BNLK)


@contextmanager
def use_kernel(kernel: AttentionKernel | None) -> Iterator[None]:
    """Run attention on a kernel inside the `with`; None leaves the choice to torch."""
    token = _kernel.set(kernel)
    try:
        yield
    finally:
        _kernel.reset(token)


def exact_kernels() -> dict[str, AttentionKernel]:
    """Kernels that compute attention in the tensors' own type, by name; not all run everywhere. "math" is the last."""
    found: dict[str, AttentionKernel] = {}
    for name, module in PACKAGES.items():
        with suppress(ImportError, ValueError):  # of the package that a module would be in
            if find_spec(module) is not None:
                found[name] = partial(_package_attention, module)
    return {**found, **{name: partial(_torch_attention, backend) for name, backend in BACKENDS.items()}}


def _torch_attention(backend: SDPBackend, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    with sdpa_kernel(backend):
        return F.scaled_dot_product_attention(q, k, v)


def _package_attention(module: str, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    out: Any = import_module(module).flash_attn_func(*(x.transpose(1, 2) for x in (q, k, v)))
    return (out[0] if isinstance(out, tuple) else out).transpose(1, 2)  # type: ignore[no-any-return]


def reference_attention(q_BNLK: Tensor, k_BNLK: Tensor, v_BNLK: Tensor) -> Tensor:
    """The reference implementation, in float64: what every kernel is compared with."""
    q, k, v = (x.double() for x in (q_BNLK, k_BNLK, v_BNLK))
    out: Tensor = (q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5).softmax(-1) @ v
    return out.to(v_BNLK.dtype)


def tolerance(dtype: torch.dtype) -> float:
    """Largest error of an exact kernel, relative to the largest value of the output."""
    return 1e-4 if dtype == torch.float32 else 3e-2


def is_right(out: Tensor, q: Tensor, k: Tensor, v: Tensor, tolerance: float) -> bool:
    """Whether an output is the reference's at some queries of two heads: some kernels give NaN instead of an error."""
    rows = torch.linspace(0, q.shape[2] - 1, min(16, q.shape[2]), device="cpu").long().tolist()
    few = [torch.stack([x[:1, :2, row] for row in rows], 2).cpu() for x in (q, out)]
    expected = reference_attention(few[0], k[:1, :2].cpu(), v[:1, :2].cpu()).float()
    return bool((few[1].float() - expected).abs().max() <= tolerance * expected.abs().max())


def gives_right(kernel: AttentionKernel, q_BNLK: Tensor, k_BNLK: Tensor, v_BNLK: Tensor, tolerance: float) -> bool:
    """Whether a kernel runs on these tensors, and its result is right."""
    with warnings.catch_warnings(), suppress(Exception):  # compilers and packages of others fail in many ways
        warnings.simplefilter("ignore")  # torch explains at length why a kernel was refused
        return is_right(kernel(q_BNLK, k_BNLK, v_BNLK), q_BNLK, k_BNLK, v_BNLK, tolerance)
    return False


def kernel_works(
    kernel: AttentionKernel, head_dim: int, dtype: torch.dtype, device: torch.device, tolerance: float
) -> bool:
    """Whether a kernel runs heads of this size on the device, and its result is right."""
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, 2, 300, head_dim, generator=generator).to(device, dtype) for _ in range(3))
    with torch.no_grad():
        return gives_right(kernel, q, k, v, tolerance)


def seconds_of(run: Callable[[], Tensor], device: torch.device) -> float:
    """Wall seconds of one call, all that it queued included."""
    wait = torch.accelerator.synchronize if device.type != "cpu" else lambda device: None
    wait(device)
    start = time.perf_counter()
    run()
    wait(device)
    return time.perf_counter() - start


def record_path() -> Path:
    """Where the kernels that were measured on this machine are remembered."""
    return cache_folder() / "attention.json"


def read_record(path: Path) -> dict[str, dict[str, dict[str, Any]]]:
    """What was measured: by device and kernels, then by shape, the fastest `kernel` and the `seconds` of each."""
    try:
        found = read_json(path)
        shapes = [entry for entries in found.values() for entry in entries.values()]
        valid = all(isinstance(entry["kernel"], str) and isinstance(entry["seconds"], dict) for entry in shapes)
    except (OSError, JSONError, AttributeError, KeyError, TypeError):
        return {}  # measured again
    return found if valid else {}


@dataclass(eq=False)
class MeasuredAttention:
    """Attention on the fastest of some kernels, measured where a shape is first met and remembered on disk.

    Shapes are alike whose heads, type and number of keys, up to the next power of two, are the same.
    """

    kernels: Mapping[str, AttentionKernel]  # by name; "math", if among them, is for where no other works
    tolerance: float | None = None  # largest error, relative to the largest value; None is that of exact kernels
    record: Path | None = None  # where results are remembered; None forgets them with this object
    seconds: Callable[[Callable[[], Tensor], torch.device], float] = seconds_of  # times one call on a device
    chosen: dict[str, str] = field(default_factory=dict)  # kernel in use for each shape met

    def __call__(self, q_BNLK: Tensor, k_BNLK: Tensor, v_BNLK: Tensor) -> Tensor:
        """See `attention`."""
        tokens = 1 << max(0, k_BNLK.shape[2] - 1).bit_length()
        shape = f"{str(q_BNLK.dtype).removeprefix('torch.')}, heads of {q_BNLK.shape[3]}, {tokens} tokens"
        if shape not in self.chosen:
            self.chosen[shape] = self._choose(shape, q_BNLK, k_BNLK, v_BNLK)
        return self.kernels[self.chosen[shape]](q_BNLK, k_BNLK, v_BNLK)

    def _choose(self, shape: str, q: Tensor, k: Tensor, v: Tensor) -> str:
        """The kernel remembered for a shape, or the fastest that is right on these tensors."""
        device, limit = q.device, self.tolerance or tolerance(q.dtype)
        named = getattr(torch.get_device_module(device), "get_device_name", lambda device: device.type)
        machine = f"{named(device)}, torch {torch.__version__}: {' '.join(self.kernels)}"
        known = {} if self.record is None else read_record(self.record)
        name = known.get(machine, {}).get(shape, {}).get("kernel")
        if name and name in self.kernels and gives_right(self.kernels[name], q, k, v, limit):
            return str(name)
        times = dict[str, float]()
        for name, kernel in self.kernels.items():
            if name != "math" and gives_right(kernel, q, k, v, limit):
                with suppress(Exception):  # where memory is short
                    times[name] = min(self.seconds(partial(kernel, q, k, v), device) for _ in range(ROUNDS))
        if times:
            fastest = min(times, key=times.__getitem__)
            if self.record is not None:
                found = read_record(self.record)
                found.setdefault(machine, {})[shape] = {"kernel": fastest, "seconds": times}
                with suppress(FileError, OSError):  # measured again by the next process
                    self.record.parent.mkdir(parents=True, exist_ok=True)
                    with atomic_write(self.record, overwrite=True) as file:
                        file.write(json.dumps(found, indent=1).encode())
            return fastest
        if "math" not in self.kernels:
            raise SettingError(f"None of {', '.join(self.kernels)} gives a right result on {device} for {shape}.")
        warnings.warn(
            f"Attention on {device} for {shape} has no fast kernel that works: decoding will be slow and need much "
            "memory. Another dtype or version of torch may have one.",
            stacklevel=2,
        )
        return "math"
