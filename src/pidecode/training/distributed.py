# SPDX-License-Identifier: Apache-2.0
"""Several processes: replicated networks (DDP), sharded ones (FSDP2), and one image over several (context parallelism).

The processes form a grid: `context_parallel` of them share an image, the others see different ones. Losses are means
over a process's images, and gradients are averaged over all processes; processes that share an image compute the same
loss of all of it, so their average is right as well.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator
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

from pidecode.devices import select_device
from pidecode.errors import SettingError, TrainingError
from pidecode.models.pid.blocks import PatchBlock, PixelBlock
from pidecode.training.config import ParallelConfig
from pidecode.training.denoiser import Denoiser, RowSharding


@dataclass(frozen=True, slots=True)
class DistEnv:
    """This process among all: its device, its part of the global batch, and the group it shares an image with."""

    device: torch.device
    rank: int = 0
    world_size: int = 1
    context_parallel: int = 1
    context_group: Any = None  # the processes that share an image with this one

    @property
    def is_first(self) -> bool:
        """Whether this process writes files and reports progress."""
        return self.rank == 0

    @property
    def data_rank(self) -> int:
        """Which part of the global batch this process sees."""
        return self.rank // self.context_parallel

    @property
    def data_world_size(self) -> int:
        """Parts of the global batch."""
        return self.world_size // self.context_parallel


@contextmanager
def init_distributed(parallel: ParallelConfig, device: torch.device | None = None) -> Iterator[DistEnv]:
    """Join the processes torchrun started; without torchrun there is one.

    Yields:
        This process's place among them.

    Raises:
        SettingError: `parallel.context_parallel` does not divide the number of processes.
    """
    if device is None:
        device = select_device()
        if "LOCAL_RANK" in os.environ and device.type != "cpu":  # of several accelerators, the process's own
            device = torch.device(device.type, int(os.environ["LOCAL_RANK"]))
            torch.get_device_module(device).set_device(device)
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size % parallel.context_parallel:
        raise SettingError(
            f"parallel.context_parallel is {parallel.context_parallel}, which does not divide {size} processes; "
            "start a multiple of it with torchrun."
        )
    if size == 1:
        yield DistEnv(device)
        return
    dist.init_process_group(timeout=timedelta(seconds=parallel.timeout))
    try:
        group, _ = dist.new_subgroups(parallel.context_parallel)
        yield DistEnv(device, dist.get_rank(), size, parallel.context_parallel, group)
    finally:
        dist.destroy_process_group()


def parallelize(module: nn.Module, parallel: ParallelConfig, env: DistEnv) -> nn.Module:
    """Replicate or shard a module over the processes; trained modules exchange their gradients from now on."""
    if isinstance(module, Denoiser) and env.context_parallel > 1:
        module.shard(RowSharding(env.rank % env.context_parallel, env.context_parallel, env.context_group))
    if env.world_size == 1:
        return module
    if parallel.weights == "shard":
        # Single numbers (the gates' log_alpha) cannot be sharded; `reduce_unsharded_gradients` averages theirs.
        single = {parameter for parameter in module.parameters() if parameter.ndim == 0}
        for part in module.modules():
            if isinstance(part, (PatchBlock, PixelBlock)):
                fully_shard(part)
        fully_shard(module, ignored_params=single)
    elif any(parameter.requires_grad for parameter in module.parameters()):
        return DistributedDataParallel(module, device_ids=None if env.device.type == "cpu" else [env.device])
    return module


def reshard(module: nn.Module) -> None:
    """Let every sharded module hold its own shard again: FSDP2 leaves the outermost gathered after a forward."""
    for part in module.modules():
        if isinstance(part, FSDPModule):
            part.reshard()


def unwrap(module: nn.Module) -> nn.Module:
    """The module itself, without DDP's wrapping."""
    return module.module if isinstance(module, DistributedDataParallel) else module


def set_gradient_sync(modules: list[nn.Module], active: bool) -> None:
    """Whether backward passes exchange gradients; if not, they only accumulate them."""
    for module in modules:
        if isinstance(module, DistributedDataParallel):
            module.require_backward_grad_sync = active
        elif isinstance(module, FSDPModule):
            module.set_requires_gradient_sync(active)


def reduce_unsharded_gradients(modules: list[nn.Module], env: DistEnv) -> None:
    """Average over processes what neither DDP nor FSDP2 exchanges: whole parameters of sharded modules."""
    if env.world_size == 1:
        return
    for module in modules:
        if isinstance(module, FSDPModule):
            for parameter in module.parameters():
                if parameter.grad is not None and not isinstance(parameter, DTensor):
                    dist.all_reduce(parameter.grad)
                    parameter.grad /= env.world_size


def by_sharding(tensors: list[Tensor]) -> list[list[Tensor]]:
    """Sharded and unsharded tensors apart, since no optimizer steps them together."""
    groups = ([x for x in tensors if isinstance(x, DTensor) == sharded] for sharded in (True, False))
    return [group for group in groups if group]


def clip_gradients(module: nn.Module, limit: float) -> float:
    """Scale the gradient of a module down to norm `limit`; returns its norm before."""
    gradients = [parameter.grad for parameter in module.parameters() if parameter.grad is not None]
    norms = [full_tensor(nn.utils.get_total_norm(group)) for group in by_sharding(gradients)]
    norm = torch.linalg.vector_norm(torch.stack(norms)) if norms else torch.zeros(())
    share = (limit / (norm + 1e-6)).clamp(max=1.0)
    for gradient in gradients:
        gradient.mul_(share.to(gradient.device))
    return float(norm)


def full_tensor(tensor: Tensor) -> Tensor:
    """A tensor's full value, gathered where it is sharded (then every process must ask)."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def full_tensors(named: Iterable[tuple[str, Tensor]], env: DistEnv) -> dict[str, Tensor]:
    """Full values of tensors by name, on the CPU, in the first process; the others help to gather them."""
    gathered: dict[str, Tensor] = {}
    for name, value in named:
        full = full_tensor(value.detach())
        if env.is_first:
            gathered[name] = full.to("cpu", copy=True).contiguous()
    return gathered


def copy_full_(tensor: Tensor, value: Tensor) -> None:
    """Copy a full tensor, which every process has, into one that may be sharded."""
    value = value.to(tensor.device, tensor.dtype)
    if isinstance(tensor, DTensor):
        value = distribute_tensor(value, tensor.device_mesh, tensor.placements)
    with torch.no_grad():
        tensor.copy_(value)


def mean_over_processes(value: Tensor, env: DistEnv) -> Tensor:
    """Mean of a number over all processes; all of them must ask."""
    if env.world_size == 1:
        return value
    value = value.detach().clone()
    dist.all_reduce(value)
    return value / env.world_size


def barrier(env: DistEnv) -> None:
    """Wait until every process has come this far."""
    if env.world_size > 1:
        dist.barrier()


@contextmanager
def report_lost_processes() -> Iterator[None]:
    """Turn a broken connection to another process into a plain error.

    Raises:
        TrainingError: The connection broke.
        RuntimeError: Any other error, unchanged.
    """
    try:
        yield
    except RuntimeError as fault:
        text = str(fault)
        if isinstance(fault, dist.DistError) or re.search("onnection|ime(d )?out|NCCL|[Gg]loo|peer", text):
            raise TrainingError(
                f"Another process was lost, so this one stops; the last checkpoint is complete. Start all of them "
                f"again with --resume. ({text.splitlines()[0]})"
            ) from fault
        raise
