# SPDX-License-Identifier: Apache-2.0
"""How many bytes of tensors are alive at once: counted as they are allocated and freed, on any device.

The count is exact for tensors and excludes workspaces inside kernels, an allocator's slack and a driver's own memory.
On the meta device it needs neither the memory nor the time of the real run.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from pidecode.engine.plan import Plan
from pidecode.engine.runner import Runner
from pidecode.models.pid.network import PiDNet
from pidecode.registry.configs import PiDConfig
from pidecode.sampling import sample_student


class LiveBytes(TorchDispatchMode):
    """Inside `with LiveBytes() as live:`, `live.peak` is the most that tensors made inside ever held together.

    What existed before, such as weights and inputs, counts for nothing, and neither do views of it.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.now = 0
        self.peak = 0
        self._sizes: dict[int, int] = {}

    def __torch_dispatch__(
        self, func: Callable[..., Any], types: Sequence[type], args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Count what an operation made; never what it was given."""
        for leaf in tree_leaves((args, kwargs)):
            if isinstance(leaf, Tensor):
                self._see(leaf, counts=False)
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                self._see(leaf, counts=True)
        return result

    def _see(self, tensor: Tensor, counts: bool) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._sizes:
            return
        size = storage.nbytes() if counts else 0
        self._sizes[key] = size
        self.now += size
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._forget, key)

    def _forget(self, key: int) -> None:
        self.now -= self._sizes.pop(key, 0)


@dataclass(frozen=True, slots=True)
class TracedMemory:
    """Bytes of one decode."""

    weights: int
    peak: int
    """Most that was alive above the weights."""

    @property
    def total(self) -> int:
        """Weights and activations."""
        return self.weights + self.peak


def weight_bytes(module: nn.Module) -> int:
    """Bytes of all parameters and buffers."""
    held: Mapping[int, Tensor] = {id(t): t for t in (*module.parameters(), *module.buffers())}
    return sum(t.numel() * t.element_size() for t in held.values())


@torch.no_grad()
def trace_decode(config: PiDConfig, plan: Plan, *, stripped: bool = True) -> TracedMemory:
    """Count a student's decode under a plan on the meta device: the real runner runs, and nothing is computed.

    A few patch blocks stand for all, which are alike: only the latent tokens kept per injection point grow with their
    number, and are added.

    Args:
        config: Shape of the network.
        plan: How it runs.
        stripped: Strip it for inference at the distilled times, as decoders do.
    """
    short = replace(config, patch_depth=min(config.patch_depth, config.inject_interval + 1))
    runner = _arranged(short, plan, stripped)
    net, (width, height), meta, batch = runner.net, plan.size, torch.device("meta"), plan.batch
    grid, cell = net.grid_of(height, width), config.pixels_per_latent_cell
    text = torch.empty(batch, config.text_length, config.text_dim, device=meta) if config.has_text else None
    latent = torch.empty(batch, config.latent_channels, height // cell, width // cell, device=meta)
    with LiveBytes() as live:
        condition = runner.prepare(grid, text, latent, torch.empty(batch, device=meta))
        # Two steps reach every state that four do.
        sample_student(
            runner.predict(condition),
            lambda: torch.empty(batch, 3, height, width, device=meta),
            num_steps=2,
            prediction=config.prediction,
        )
    kept = 0.0
    if plan.keep_tokens and condition.injections:
        one = condition.injections[0]
        kept = sum(t.numel() * t.element_size() for t in one.read())
        if plan.window is not None:  # a window's own cut of them
            kept *= 1 + min(plan.window, width) * min(plan.window, height) / (width * height)
    more = config.num_injections - len(condition.injections)
    full = _arranged(config, plan, stripped)
    weights = weight_bytes(full.net) - (weight_bytes(full.net.patch_blocks) if full.offloader else 0)
    return TracedMemory(weights=weights, peak=live.peak + int(more * kept))


def _arranged(config: PiDConfig, plan: Plan, stripped: bool) -> Runner:
    """A runner whose network has shapes and no numbers."""
    with torch.device("meta"):
        net = PiDNet(config).to(getattr(torch, plan.dtype)).requires_grad_(False).eval()
    runner = Runner(net, plan, distilled=stripped)
    runner.arrange(torch.device("meta"))
    return runner
