# SPDX-License-Identifier: Apache-2.0
"""Sequence parallelism: the tokens of one image sharded over several processes.

Started by `torchrun`, every process runs the same program with the same inputs. Within a step only keys and values are
gathered, and at its end the shards of the prediction, so every process holds the finished image.
"""

from __future__ import annotations

import os
from functools import partial
from itertools import pairwise
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from pidecode.engine.tiling import Denoise
from pidecode.errors import SizeError
from pidecode.models.pid.network import Condition, PiDNet


def is_parallel() -> bool:
    """Whether this process is one of several in an initialized process group."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def init_process_group() -> bool:
    """Join the process group of a `torchrun` job, each process on its own device; False outside of one."""
    if int(os.environ.get("WORLD_SIZE", "1")) < 2:
        return False
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count())
    dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
    return True


def is_main_process() -> bool:
    """Whether this process is the one that writes files."""
    return not is_parallel() or dist.get_rank() == 0


def destroy_process_group() -> None:
    """Leave the process group, if there is one."""
    if is_parallel():
        dist.destroy_process_group()


def row_shards(rows: int, processes: int) -> list[tuple[int, int]]:
    """First row of patches and one past the last, per process. Raises SizeError for fewer rows than processes."""
    if rows < processes:
        raise SizeError(f"An image of {rows} rows of patches cannot be sharded over {processes} processes; use {rows}.")
    return list(pairwise(index * rows // processes for index in range(processes + 1)))


def _gather(part: Tensor, sizes: list[int], axis: int) -> Tensor:
    """The shards of all processes, in order, along `axis`; they may differ in size."""
    largest = max(sizes)
    padded = part.new_zeros(*part.shape[:axis], largest, *part.shape[axis + 1 :])
    padded.narrow(axis, 0, part.shape[axis]).copy_(part)
    received = [torch.empty_like(padded) for _ in sizes]
    dist.all_gather(received, padded)
    return torch.cat([other.narrow(axis, 0, size) for other, size in zip(received, sizes, strict=True)], dim=axis)


@torch.no_grad()
def denoise_sharded(net: PiDNet, denoise: Denoise, x_B3HW: Tensor, t_B: Tensor, condition: Condition) -> Tensor:
    """One evaluation of the whole image, each process doing a shard by `denoise`; every one gets the prediction."""
    (rows, columns), patch = condition.grid, net.config.patch_size
    shards = row_shards(rows, dist.get_world_size())
    top, bottom = shards[dist.get_rank()]
    part = condition.crop(slice(top, bottom), slice(0, columns))
    attentions: list[Any] = [block.attn for block in (*net.patch_blocks, *net.pixel_blocks)]
    for attention in attentions:
        attention.gather = partial(_gather, sizes=[(stop - start) * columns for start, stop in shards], axis=1)
    try:
        prediction = denoise(x_B3HW[:, :, top * patch : bottom * patch].contiguous(), t_B, part)
    finally:
        for attention in attentions:
            attention.gather = None
    return _gather(prediction, [(stop - start) * patch for start, stop in shards], axis=2)
