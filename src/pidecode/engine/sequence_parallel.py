# SPDX-License-Identifier: Apache-2.0
"""Sequence parallelism: one image over several processes.

Started by `torchrun`, every process runs the same program with the same inputs. Only keys and values travel within a
step, and the stripes of the prediction at its end, so every process holds the finished image.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from itertools import pairwise
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from pidecode.errors import SizeError
from pidecode.models.pid.network import Condition, PiDNet


def is_spread() -> bool:
    """Whether this process is one of several that were set up to work together."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def join() -> bool:
    """Meet the other processes of a `torchrun` job, each on its own device; False outside of one."""
    if int(os.environ.get("WORLD_SIZE", "1")) < 2:
        return False
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count())
    dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
    return True


def leads() -> bool:
    """Whether this process is the one that writes what all of them hold."""
    return not is_spread() or dist.get_rank() == 0


def leave() -> None:
    """End the meeting, if there was one."""
    if is_spread():
        dist.destroy_process_group()


def stripes(rows: int, processes: int) -> list[tuple[int, int]]:
    """First row of patches and one past the last for each process. Raises SizeError if one would have none."""
    if rows < processes:
        raise SizeError(f"An image of {rows} rows of patches cannot be spread over {processes} processes; use {rows}.")
    edges = [index * rows // processes for index in range(processes + 1)]
    return list(pairwise(edges))


def _gather(part: Tensor, sizes: list[int], axis: int) -> Tensor:
    """Every process's part, in order, along `axis`; parts may differ in size."""
    largest = max(sizes)
    padded = part.new_zeros(*part.shape[:axis], largest, *part.shape[axis + 1 :])
    padded.narrow(axis, 0, part.shape[axis]).copy_(part)
    received = [torch.empty_like(padded) for _ in sizes]
    dist.all_gather(received, padded)
    return torch.cat([other.narrow(axis, 0, size) for other, size in zip(received, sizes, strict=True)], dim=axis)


@contextmanager
def _attending_together(net: PiDNet, sizes: list[int]) -> Iterator[None]:
    attentions: list[Any] = [block.attn for block in (*net.patch_blocks, *net.pixel_blocks)]
    for attention in attentions:
        attention.gather = partial(_gather, sizes=sizes, axis=1)
    try:
        yield
    finally:
        for attention in attentions:
            attention.gather = None


@torch.no_grad()
def denoise_together(net: PiDNet, x_B3HW: Tensor, t_B: Tensor, condition: Condition) -> Tensor:
    """`PiDNet.denoise` with the work spread over all processes; every one gets the whole prediction."""
    rows, columns = condition.grid
    patch = net.config.patch_size
    cuts = stripes(rows, dist.get_world_size())
    top, bottom = cuts[dist.get_rank()]
    part = condition.window(slice(top, bottom), slice(0, columns))
    tokens = [(stop - start) * columns for start, stop in cuts]
    with _attending_together(net, tokens):
        prediction = net.denoise(x_B3HW[:, :, top * patch : bottom * patch].contiguous(), t_B, part)
    return _gather(prediction, [(stop - start) * patch for start, stop in cuts], axis=2)
