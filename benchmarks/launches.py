# SPDX-License-Identifier: Apache-2.0
"""Kernel launches, elementwise bytes and blocking copies of one denoising step, counted on shapes: no GPU needed.

python -m benchmarks.launches --size 2048
"""

from __future__ import annotations

import argparse
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from pidecode.engine.machine import GB, Machine
from pidecode.engine.ops.elementwise import CompiledOps
from pidecode.engine.plan import Plan, plan_decode
from pidecode.engine.runner import Runner
from pidecode.models.pid.network import PiDNet
from pidecode.registry.checkpoints import STUDENT_TIMES
from pidecode.registry.configs import PID_CONFIGS, PiDConfig
from pidecode.sampling import TIMESCALE

PRODUCTS = {"linear", "mm", "addmm", "addmm_", "bmm", "convolution", "attention", "_scaled_mm", "_int_mm"}
FREE = {"empty", "new_empty", "empty_like", "empty_strided", "new_empty_strided", "detach"}
WAITING = {"_local_scalar_dense", "item", "index", "nonzero", "lift_fresh", "is_nonzero", "equal"}
"""Operations that read a value on the host, or a list of indices from it."""


@dataclass(eq=False)
class Launches(TorchDispatchMode):
    """Counts what runs inside the `with`.

    Attributes:
        launches: Operations that start a kernel, by name.
        bytes: What each of them that is no matrix product, convolution or attention reads and writes.
        blocking: Operations that wait for the device, or copy to it from memory that is not pinned.
    """

    launches: Counter[str] = field(default_factory=Counter)
    bytes: Counter[str] = field(default_factory=Counter)
    blocking: Counter[str] = field(default_factory=Counter)

    def __post_init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        inputs = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        outputs = [t for t in tree_leaves(out) if isinstance(t, Tensor)]
        devices = {t.device.type for t in (*inputs, *outputs) if t.ndim}
        held = {t.untyped_storage()._cdata for t in inputs}
        is_view = func.is_view and all(t.untyped_storage()._cdata in held for t in outputs)
        if devices == {"cpu"} or not devices or is_view or name in FREE:
            return out
        if name in WAITING or len(devices) > 1:
            self.blocking[name] += 1
        self.launches[name] += 1
        if name not in PRODUCTS:
            self.bytes[name] += sum(map(_moved, inputs)) + sum(map(_moved, outputs))
        return out


def _moved(tensor: Tensor) -> int:
    """Bytes a kernel reads or writes of a tensor: an expanded axis is read once."""
    sizes = (size for size, stride in zip(tensor.shape, tensor.stride(), strict=True) if stride)
    total = tensor.itemsize
    for size in sizes:
        total *= size
    return total


class CountedOps(CompiledOps):
    """Stands for the fused ops: each counts as one kernel that reads its arguments and writes its result once."""

    def __init__(self) -> None:
        super().__init__("eager", interpreted=True)
        self.launches: Counter[str] = Counter()
        self.bytes: Counter[str] = Counter()

    def run(self, body: Callable[..., Any], *arguments: Any) -> Any:
        """Counts as one kernel."""
        name, out = body.__name__.strip("_"), arguments[0]
        tensors = [argument for argument in arguments if isinstance(argument, Tensor)]
        written = [] if name == "norm_modulate" else [out]
        if len(tensors) < len(arguments):  # the last is the type of a result of its own
            written.append(out := torch.empty_like(out, dtype=arguments[-1]))
        self.launches[name] += 1
        self.bytes[name] += sum(map(_moved, (*tensors, *written)))
        return out

    def update_pixels_(
        self, tile_TGC: Tensor, expanded_TGC: Tensor, vectors: tuple[Tensor, ...], fc1: nn.Module, fc2: nn.Module
    ) -> Tensor:
        """Counts as one kernel, its matrix products included."""
        read = (tile_TGC, expanded_TGC, *vectors, *fc1.parameters(), *fc2.parameters())
        self.launches["update_pixels"] += 1
        self.bytes["update_pixels"] += sum(map(_moved, (*read, tile_TGC)))
        return tile_TGC


def count_step(
    config: PiDConfig, size: tuple[int, int], *, batch: int = 1, memory: int = 80 * GB, compile: bool = False
) -> Launches:
    """Count one evaluation in bfloat16, under the plan for `memory`, of a network that exists as shapes only."""
    plan = plan_decode(config, size, Machine(memory=memory), batch=batch)
    assert isinstance(plan, Plan)
    with torch.device("meta"):
        net = PiDNet(config).to(torch.bfloat16).eval().requires_grad_(False)
    runner, ops = Runner(net, plan, distilled=True), CountedOps()
    runner.arrange(torch.device("meta"))
    (width, height), patch = size, config.patch_size
    grid = (height // patch, width // patch)
    with torch.inference_mode():
        text = torch.zeros(batch, config.text_length, config.text_dim, device="meta") if config.has_text else None
        cell = config.pixels_per_latent_cell
        latent = torch.zeros(batch, config.latent_channels, height // cell, width // cell, device="meta")
        predict = runner.predict(runner.prepare(grid, text, latent, torch.zeros(batch, device="meta")))
        if compile:
            runner.compiled_ops = ops
        x, t = torch.zeros(batch, 3, height, width, device="meta"), torch.full((batch,), STUDENT_TIMES[1]) * TIMESCALE
        predict(x, t)  # what is made once per image is made
        ops.launches.clear()
        ops.bytes.clear()
        counted = Launches()
        with counted:
            predict(x, t)
    counted.launches.update(ops.launches)
    counted.bytes.update(ops.bytes)
    counted.launches["attention"] += config.patch_depth + config.pixel_depth  # on the meta device it is no operation
    return counted


def main() -> None:
    """Print the counts of one step."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--network", choices=PID_CONFIGS, default="v1.5")
    parser.add_argument("--size", type=int, default=2048)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--memory", type=float, default=80, help="GB that the plan may take")
    parser.add_argument("--compile", action="store_true", help="count each elementwise op as one kernel")
    args = parser.parse_args()
    counted = count_step(
        PID_CONFIGS[args.network],
        (args.size, args.size),
        batch=args.batch,
        memory=int(args.memory * GB),
        compile=args.compile,
    )
    for name, count in counted.launches.most_common():
        print(f"{name:40s} {count:6d} launches {counted.bytes[name] / 1e9:8.2f} GB")
    print(
        f"{counted.launches.total()} launches, {counted.bytes.total() / 1e9:.1f} GB elementwise, "
        f"blocking: {dict(counted.blocking)}"
    )


if __name__ == "__main__":
    main()
