# SPDX-License-Identifier: Apache-2.0
"""Many processes: copies of a network (DDP), parts of it (FSDP2), and one image over several (sequence parallelism).

The processes form a grid: `across` neighbors share an image, the others see different ones. Losses are means over
a process's images, and gradients are averaged over all processes; neighbors compute the same loss of the whole
image, so their average is right as well.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

from pidecode.devices import pick_device
from pidecode.errors import SettingError, TrainingError
from pidecode.models.pid.blocks import JointAttention, PatchBlock, PixelAttention, PixelBlock
from pidecode.models.pid.network import Condition
from pidecode.training.config import Spread
from pidecode.training.denoiser import Evaluator


@dataclass(frozen=True, slots=True)
class DistEnv:
    """This process among all: where it computes, which images it sees, and with whom it shares them."""

    device: torch.device
    rank: int = 0
    size: int = 1
    across: int = 1
    band_group: Any = None
    """The processes that share an image with this one."""

    @property
    def is_first(self) -> bool:
        """Whether this process writes files and speaks."""
        return self.rank == 0

    @property
    def place(self) -> int:
        """Which part of the global batch this process sees."""
        return self.rank // self.across

    @property
    def places(self) -> int:
        """Parts of the global batch."""
        return self.size // self.across

    @property
    def band(self) -> int:
        """Which band of its image this process has."""
        return self.rank % self.across


def local_device() -> torch.device:
    """This process's own device: of several accelerators, the one torchrun means for it."""
    best = pick_device()
    if "LOCAL_RANK" not in os.environ or best.type == "cpu":
        return best
    index = int(os.environ["LOCAL_RANK"])
    torch.get_device_module(best).set_device(index)
    return torch.device(best.type, index)


@contextmanager
def world(spread: Spread, device: torch.device | None = None) -> Iterator[DistEnv]:
    """Join the processes torchrun started, or be alone. Raises SettingError when `across` does not divide them."""
    device = local_device() if device is None else device
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size % spread.across:
        raise SettingError(
            f"spread.across is {spread.across}, which does not divide {size} processes; "
            "start a multiple of it with torchrun."
        )
    if size == 1:
        yield DistEnv(device)
        return
    dist.init_process_group(timeout=timedelta(seconds=spread.patience))
    try:
        rank = dist.get_rank()
        group = None
        for first in range(0, size, spread.across):
            made = dist.new_group(list(range(first, first + spread.across)))
            group = made if first <= rank < first + spread.across else group
        yield DistEnv(device, rank, size, spread.across, group)
    finally:
        dist.destroy_process_group()


class _GatherBands(torch.autograd.Function):
    """Bands of all neighbors along `dim`; gradients of all their uses come back summed."""

    @staticmethod
    def forward(ctx: Any, band: Tensor, dim: int, group: Any) -> Tensor:
        """Concatenate."""
        ctx.dim, ctx.group, ctx.length = dim, group, band.shape[dim]
        parts = [torch.empty_like(band) for _ in range(dist.get_world_size(group))]
        dist.all_gather(parts, band.contiguous(), group=group)
        return torch.cat(parts, dim=dim)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        """Sum over neighbors, keep our own band."""
        total = gradients[0].contiguous()
        dist.all_reduce(total, group=ctx.group)
        start = dist.get_rank(ctx.group) * ctx.length
        return total.narrow(ctx.dim, start, ctx.length), None, None


def gather_bands(band: Tensor, dim: int, group: Any) -> Tensor:
    """Every neighbor's part along `dim`, in order, differentiable."""
    joined: Tensor = _GatherBands.apply(band, dim, group)  # type: ignore[no-untyped-call]
    return joined


class Bands:
    """One image in bands of whole patch rows, one band per process of a group (the evaluator's `Slice`)."""

    def __init__(self, band: int, bands: int, group: Any) -> None:
        self._band, self._bands, self._group = band, bands, group

    def _span(self, rows: int) -> tuple[int, int]:
        if rows % self._bands:
            raise SettingError(
                f"{rows} patch rows do not divide over spread.across={self._bands} processes; change data.sizes."
            )
        share = rows // self._bands
        return self._band * share, share

    def condition(self, condition: Condition) -> Condition:
        """This process's tokens, positions and injections."""
        rows, columns = condition.grid
        first, share = self._span(rows)
        return condition.crop(slice(first, first + share), slice(0, columns))

    def rows(self, image: Tensor) -> Tensor:
        """This process's band of `[B, 3, H, W]`."""
        height = image.shape[-2]
        if height % self._bands:
            raise SettingError(f"{height} pixel rows do not divide over {self._bands} processes.")
        share = height // self._bands
        return image.narrow(-2, self._band * share, share)

    def join(self, band: Tensor) -> Tensor:
        """All bands of `[B, C, h, w]`."""
        return gather_bands(band, 2, self._group)

    def attach(self, evaluator: Evaluator) -> None:
        """Let every attention of the network see the keys and values of all bands."""
        evaluator.slice = self
        for module in evaluator.modules():
            if isinstance(module, (JointAttention, PixelAttention)):
                module.gather = lambda x: gather_bands(x, 1, self._group)


def spread_module(module: nn.Module, spread: Spread, here: DistEnv) -> nn.Module:
    """The module as all processes hold it; trained modules exchange their gradients from now on."""
    if isinstance(module, Evaluator) and here.across > 1:
        Bands(here.band, here.across, here.band_group).attach(module)
    if here.size == 1:
        return module
    if spread.weights == "sharded":
        # Single numbers (the gates' log_alpha) cannot be sharded; `finish_gradients` averages theirs.
        single = {parameter for parameter in module.parameters() if parameter.ndim == 0}
        for part in module.modules():
            if isinstance(part, (PatchBlock, PixelBlock)):
                fully_shard(part)
        fully_shard(module, ignored_params=single)
        return module
    if not any(parameter.requires_grad for parameter in module.parameters()):
        return module
    return DistributedDataParallel(module, device_ids=None if here.device.type == "cpu" else [here.device])


def own_shards(module: nn.Module) -> None:
    """Let every sharded part hold its own share again: FSDP2 leaves the outermost gathered after a forward."""
    for part in module.modules():
        if isinstance(part, FSDPModule):
            part.reshard()


def bare(module: nn.Module) -> nn.Module:
    """The module itself, without DDP's wrapping."""
    return module.module if isinstance(module, DistributedDataParallel) else module


@contextmanager
def gradients_stay_here(modules: list[nn.Module], stay: bool) -> Iterator[None]:
    """While `stay`, backward passes only add up gradients and exchange none (accumulation)."""
    if not stay:
        yield
        return
    for module in modules:
        if isinstance(module, DistributedDataParallel):
            module.require_backward_grad_sync = False
        elif isinstance(module, FSDPModule):
            module.set_requires_gradient_sync(False)
    try:
        yield
    finally:
        for module in modules:
            if isinstance(module, DistributedDataParallel):
                module.require_backward_grad_sync = True
            elif isinstance(module, FSDPModule):
                module.set_requires_gradient_sync(True)


def finish_gradients(modules: list[nn.Module], here: DistEnv) -> None:
    """Average over processes what neither DDP nor FSDP2 exchanges: whole parameters of sharded modules."""
    if here.size == 1:
        return
    for module in modules:
        if isinstance(module, FSDPModule):
            for parameter in module.parameters():
                if parameter.grad is not None and not isinstance(parameter, DTensor):
                    dist.all_reduce(parameter.grad)
                    parameter.grad /= here.size


def parameter_groups(module: nn.Module) -> list[dict[str, Any]]:
    """Trained parameters for an optimizer; sharded and whole ones apart, since they cannot be stepped together."""
    trained = [parameter for parameter in module.parameters() if parameter.requires_grad]
    kinds = ([p for p in trained if isinstance(p, DTensor)], [p for p in trained if not isinstance(p, DTensor)])
    return [{"params": kind} for kind in kinds if kind]


def clip_gradients(module: nn.Module, limit: float) -> float:
    """Shorten the gradient of a whole module to `limit`; returns its norm before."""
    gradients = [parameter.grad for parameter in module.parameters() if parameter.grad is not None]
    kinds = ([g for g in gradients if isinstance(g, DTensor)], [g for g in gradients if not isinstance(g, DTensor)])
    norms = [whole(nn.utils.get_total_norm(kind)) for kind in kinds if kind]
    norm = torch.linalg.vector_norm(torch.stack(norms)) if norms else torch.zeros(())
    share = (limit / (norm + 1e-6)).clamp(max=1.0)
    for gradient in gradients:
        gradient.mul_(share.to(gradient.device))
    return float(norm)


def whole(tensor: Tensor) -> Tensor:
    """A tensor's full value, gathered where it is sharded (then every process must ask)."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def fill(tensor: Tensor, value: Tensor) -> None:
    """Give a tensor, sharded or not, the values of a full one that every process has."""
    value = value.to(tensor.device, tensor.dtype)
    with torch.no_grad():
        if isinstance(tensor, DTensor):
            tensor.copy_(distribute_tensor(value, tensor.device_mesh, tensor.placements))
        else:
            tensor.copy_(value)


def mean_over_processes(value: Tensor, here: DistEnv) -> Tensor:
    """A number's mean over all processes."""
    if here.size == 1:
        return value
    value = value.detach().clone()
    dist.all_reduce(value)
    return value / here.size


def wait_for_all(here: DistEnv) -> None:
    """Go on when every process has come this far."""
    if here.size > 1:
        dist.barrier()


@contextmanager
def lost_workers_named() -> Iterator[None]:
    """Turn a broken connection into a plain statement."""
    try:
        yield
    except RuntimeError as fault:
        text = str(fault)
        signs = ("onnection", "imed out", "imeout", "NCCL", "Gloo", "gloo", "peer")
        if isinstance(fault, dist.DistError) or any(sign in text for sign in signs):
            raise TrainingError(
                f"Another process was lost, so this one stops; the last checkpoint is whole. Start all of them again "
                f"with --resume. ({text.splitlines()[0]})"
            ) from fault
        raise
