# SPDX-License-Identifier: Apache-2.0
"""What one step starts on a GPU, counted on shapes: launches, elementwise bytes, nothing that waits for the device."""

from __future__ import annotations

import pytest
import torch

from benchmarks.launches import Launches, count_step
from pidecode.engine import inplace
from pidecode.engine.machine import Chunks
from pidecode.engine.ops import elementwise
from pidecode.engine.runner import Runner
from pidecode.engine.timesteps import step_modulation
from pidecode.registry.configs import PID_CONFIGS, debug_config
from random_networks import random_net

V15 = PID_CONFIGS["v1.5"]


def test_a_step_of_2048_pixels_starts_few_kernels_and_waits_for_none() -> None:
    eager, compiled = (count_step(V15, (2048, 2048), compile=compile) for compile in (False, True))
    assert eager.launches.total() <= 1500
    assert not eager.blocking
    assert compiled.launches.total() <= 400
    assert compiled.bytes.total() <= 30e9


def test_a_batch_of_small_images_is_one_launch_each() -> None:
    one, eight = (count_step(V15, (512, 512), batch=batch) for batch in (1, 8))
    assert eight.launches.total() <= 1.25 * one.launches.total()


def test_what_waits_for_the_device_is_counted() -> None:
    vectors = torch.zeros(5, 6, device="meta")
    with Launches() as counted:
        vectors[[2]]
        vectors.add_(torch.ones(6).to("meta"))
    assert counted.blocking == {"index": 1, "_to_copy": 1}


@pytest.mark.parametrize("one_kernel", [False, True])
@pytest.mark.parametrize("times", [(866.0,), (866.0, 342.0, 634.0)])
def test_whole_images_in_a_batch_equal_the_reference(
    times: tuple[float, ...], one_kernel: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(elementwise, "one_kernel_norm", lambda x: one_kernel)
    net = random_net(debug_config(pixel_depth=2))
    config, t = net.config, torch.tensor(times)
    text, latent = torch.randn(3, 7, config.text_dim), torch.randn(3, config.latent_channels, 2, 3)
    x = torch.randn(3, 3, 4 * config.patch_size, 6 * config.patch_size)
    with torch.no_grad():
        condition = net.prepare((4, 6), text, latent, torch.rand(3))
        plain = net.denoise(x, t.expand(3), condition)
        runner = Runner(net)
        runner.chunks = Chunks.whole(config.patch_size)
        for _ in range(2):  # the second time with the modulation that the first kept
            assert (runner.denoise(x, t, condition) - plain).abs().max() < 5e-6 * plain.abs().max()
        net.pixel_blocks[0].adaLN_modulation[0].weight.mul_(1.5)  # type: ignore[operator, union-attr, index]
        runner.forget()
        changed = inplace.denoise(net, x, step_modulation(net, t), condition)
        assert (runner.denoise(x, t, condition) - changed).abs().max() < 5e-6 * plain.abs().max()
        assert (changed - plain).abs().max() > 1e-3 * plain.abs().max()


def test_chunks_follow_the_free_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    net = random_net(debug_config())
    monkeypatch.setattr(type(net), "device", torch.device("cuda"))
    for free, whole in ((10**6, False), (10**12, True)):
        monkeypatch.setattr("pidecode.engine.runner.free_memory", lambda device, free=free: free)
        assert Runner(net).plan_for((512, 512), 2).chunks == (Chunks.whole(16) if whole else Chunks.large(16))
