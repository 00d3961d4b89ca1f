# SPDX-License-Identifier: Apache-2.0
"""One image over several processes equals the image of one."""

from __future__ import annotations

import multiprocessing
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from pidecode.engine.runner import Runner
from pidecode.engine.sequence_parallel import denoise_sharded, is_parallel, row_shards
from pidecode.errors import SizeError
from pidecode.models.pid.network import Condition, PiDNet
from pidecode.registry.configs import debug_config
from random_networks import random_net

TIME = torch.tensor([634.0])


def scene() -> tuple[PiDNet, Tensor, Condition]:
    net = random_net(debug_config(pixel_depth=2), std=0.03)
    text, latent = torch.randn(1, 7, 16), torch.randn(1, 16, 3, 2)
    # Five rows of patches do not divide by two: the shards differ in size.
    return net, torch.randn(1, 3, 80, 64), net.prepare((5, 4), text, latent, 0.2)


def worker(rank: int, meeting: str, out: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=2)
    try:
        assert is_parallel()
        net, x, condition = scene()
        torch.save(denoise_sharded(net, Runner(net).denoise, x, TIME, condition), f"{out}/{rank}.pt")
        assert all(block.attn.gather is None for block in net.patch_blocks)
    finally:
        dist.destroy_process_group()


@pytest.mark.slow
def test_two_processes_make_the_image_of_one(tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    processes = [context.Process(target=worker, args=(rank, f"{tmp_path}/meet", str(tmp_path))) for rank in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(300)
        assert process.exitcode == 0
    net, x, condition = scene()
    with torch.no_grad():
        alone = Runner(net).denoise(x, TIME, condition)
    for rank in range(2):
        together = torch.load(tmp_path / f"{rank}.pt", weights_only=True)
        assert (together - alone).abs().max() < 5e-6 * alone.abs().max()


def test_shards_cover_all_rows() -> None:
    assert row_shards(5, 2) == [(0, 2), (2, 5)]
    assert row_shards(4, 4) == [(0, 1), (1, 2), (2, 3), (3, 4)]
    with pytest.raises(SizeError, match="cannot be sharded over 4"):
        row_shards(3, 4)


def test_one_process_is_not_parallel() -> None:
    assert not is_parallel()
