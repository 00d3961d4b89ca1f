# SPDX-License-Identifier: Apache-2.0
"""The in-place forward and its elementwise ops against the reference forward: same numbers, in chunks and in place."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from pidecode.engine.inplace import denoise, prepare_recomputed, runs_in_place
from pidecode.engine.machine import Chunks
from pidecode.engine.ops import elementwise
from pidecode.engine.runner import Runner
from pidecode.engine.timesteps import is_stripped, precompute, step_modulation, strip_for_inference
from pidecode.errors import LatentError, SettingError
from pidecode.models.pid.blocks import GatedFeedForward, RMSNorm, image_rotation, modulate, rotate
from pidecode.models.pid.network import Condition, PiDNet
from pidecode.registry.configs import PiDConfig, debug_config
from random_networks import random_net

TOLERANCE = 5e-6
"""Of the largest value: these random networks predict values in tens."""
VARIANTS: dict[str, PiDConfig] = {
    "v1.5": debug_config(pixel_depth=2),
    "v1": debug_config(gate="per_channel", inject_pixels=False, adapter_padding="zeros", patch_depth=2),
    "one pixel block": debug_config(pixel_depth=1),
    "three pixel blocks": debug_config(pixel_depth=3),
    "no pixel block": debug_config(pixel_depth=0),
    "no prompt": debug_config(text_dim=0),
    "no latent": debug_config(latent_channels=0, inject_pixels=False),
    "small patches": debug_config(patch_size=8, latent_down=8),
}


def inputs(
    net: PiDNet, grid: tuple[int, int] = (4, 6), batch: int = 1, *, recomputed: bool = False
) -> tuple[Tensor, Condition]:
    config, generator = net.config, torch.Generator().manual_seed(1)
    x = torch.randn(batch, 3, grid[0] * config.patch_size, grid[1] * config.patch_size, generator=generator)
    text = torch.randn(batch, 7, config.text_dim, generator=generator) if config.has_text else None
    latent = sigma = None
    if config.has_adapter:
        latent = torch.randn(batch, config.latent_channels, grid[0] // 2, grid[1] // 2, generator=generator)
        sigma = torch.rand(batch, generator=generator)
    if recomputed:
        assert latent is not None
        return x, prepare_recomputed(net, grid, text, latent, sigma)
    return x, net.prepare(grid, text, latent, sigma)


def apart(a: Tensor, b: Tensor) -> float:
    return ((a - b).abs().max() / b.abs().max()).item()


def both(net: PiDNet, x: Tensor, t: Tensor, condition: Condition, **how: Any) -> tuple[Tensor, Tensor]:
    """The reference forward, and the in-place one."""
    with torch.no_grad():
        return net.denoise(x, t, condition), denoise(net, x, step_modulation(net, t), condition, **how)


@pytest.mark.parametrize("name", VARIANTS)
def test_in_place_equals_the_reference(name: str) -> None:
    net = random_net(VARIANTS[name])
    x, condition = inputs(net, batch=2)
    before = x.clone()
    plain, in_place = both(net, x, torch.tensor([866.0, 342.0]), condition)
    assert plain.std() > 0.01
    assert apart(plain, in_place) < TOLERANCE
    assert torch.equal(x, before)


@pytest.mark.parametrize(
    "chunks", [Chunks(tokens=5, tile_tokens=6, tile_rows=3), Chunks(tokens=10**6, tile_tokens=10**6, tile_rows=16)]
)
def test_any_chunk_gives_the_same(chunks: Chunks) -> None:
    net = random_net(VARIANTS["v1.5"])
    x, condition = inputs(net)
    plain, in_place = both(net, x, torch.tensor([634.0]), condition, chunks=chunks)
    assert apart(plain, in_place) < TOLERANCE


def test_running_twice_alters_nothing() -> None:
    net = random_net(VARIANTS["v1.5"])
    x, condition = inputs(net)
    with torch.no_grad():
        first, second = (Runner(net).denoise(x, torch.tensor([634.0]), condition) for _ in range(2))
    assert torch.equal(first, second)


def test_the_cache_gives_what_each_step_would_compute() -> None:
    net = random_net(VARIANTS["v1.5"])
    cached, computed = Runner(net, distilled=True), Runner(net)
    cached.precompute_timesteps()
    x, condition = inputs(net, batch=2)
    with torch.no_grad():
        for t in (torch.tensor([866.0, 866.0]), torch.tensor([999.0, 342.0]), torch.tensor([123.0, 866.0])):
            assert apart(cached.denoise(x, t, condition), computed.denoise(x, t, condition)) < TOLERANCE
    cache = precompute(net, (0.999, 0.866, 0.634, 0.342, 1.0))
    assert cache.find(torch.tensor([123.0])) is None
    found = cache.find(torch.tensor([866.0, 866.0]))
    assert found is not None and len(found.embedding) == 1


def test_a_stripped_network_runs_at_its_times_and_says_so_at_others() -> None:
    net = random_net(VARIANTS["v1.5"])
    x, condition = inputs(net)
    t = torch.tensor([342.0])
    with torch.no_grad():
        before = net.denoise(x, t, condition)
        runner = Runner(net, distilled=True)
        runner.precompute_timesteps()
        size = sum(p.numel() for p in net.parameters())
        strip_for_inference(net)
        assert is_stripped(net)
        assert sum(p.numel() for p in net.parameters()) < 0.95 * size
        assert apart(runner.denoise(x, t, condition), before) < TOLERANCE
        with pytest.raises(SettingError, match="stripped"):
            runner.denoise(x, torch.tensor([500.0]), condition)
    with pytest.raises(SettingError, match="inference_mode"):
        runner.denoise(x, t, condition)


@pytest.mark.parametrize("name", ["v1.5", "v1"])
def test_recomputed_tokens_equal_kept_ones(name: str) -> None:
    net = random_net(VARIANTS[name])
    t = torch.tensor([634.0])
    x, kept = inputs(net, batch=2)
    _, recomputed = inputs(net, batch=2, recomputed=True)
    references, in_place = zip(*(both(net, x, t.expand(2), each) for each in (kept, recomputed)), strict=True)
    assert apart(*references) < TOLERANCE
    assert apart(*in_place) < TOLERANCE


def test_recomputed_tokens_need_what_kept_ones_need() -> None:
    net = random_net(VARIANTS["v1.5"])
    with pytest.raises(LatentError, match="without sigma"):
        prepare_recomputed(net, (2, 2), torch.zeros(1, 7, 16), torch.zeros(1, 16, 1, 1), None)


def test_half_precision_stays_near_the_exact_image() -> None:
    net = random_net(VARIANTS["v1.5"])
    x, condition = inputs(net)
    exact, _ = both(net, x, torch.tensor([634.0]), condition)
    net.bfloat16()
    x, condition = inputs(net)
    plain, in_place = both(net, x, torch.tensor([634.0]), condition)
    assert in_place.dtype == torch.float32
    error_in_place, error_plain = ((y - exact).square().mean().sqrt() / exact.std() for y in (in_place, plain))
    assert error_in_place < 0.03
    assert error_in_place < 1.2 * error_plain


def test_gradients_take_the_reference_forward() -> None:
    net = random_net(VARIANTS["v1.5"]).requires_grad_(True)
    x, condition = inputs(net)
    assert not runs_in_place(net, net.device)
    Runner(net).denoise(x, torch.tensor([634.0]), condition).square().mean().backward()
    assert all(p.grad is not None for n, p in net.named_parameters() if n.startswith("pixel_blocks"))


def test_norm_and_modulation() -> None:
    x, shift, scale = torch.randn(3, 5, 8), torch.randn(8), torch.randn(8)
    norm = RMSNorm(8)
    torch.nn.init.normal_(norm.weight)
    with torch.no_grad():
        plain = modulate(norm(x), shift, scale)
        assert torch.allclose(
            elementwise.norm_modulate(x, shift, (1 + scale) * norm.weight, torch.float32), plain, atol=1e-6
        )
        narrow = elementwise.norm_modulate(x, shift, (1 + scale) * norm.weight, torch.bfloat16)
    assert torch.allclose(narrow.float(), plain, rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_norm_and_rotation_in_place(dtype: torch.dtype) -> None:
    qkv = torch.randn(6, 3, 2, 8).to(dtype)
    rotation = image_rotation((2, 3), 8, reference_grid=None, device=torch.device("cpu"))
    norm = RMSNorm(8)
    with torch.no_grad():
        norm.weight.normal_()
        plain = rotate(norm(qkv[None, :, 0].float()), rotation)[0]
        elementwise.norm_rotate_(qkv[:, 0], norm.weight, torch.complex(*rotation))
    assert torch.allclose(qkv[:, 0].float(), plain, atol=1e-6 if dtype == torch.float32 else 5e-2)


def test_feed_forward_with_one_buffer_less() -> None:
    mlp, x = GatedFeedForward(8, 12), torch.randn(4, 8)
    with torch.no_grad():
        assert torch.allclose(mlp.w2(elementwise.silu_times_(mlp.w1(x), mlp.w3(x))), mlp(x), atol=1e-7)


def test_linear_into_writes_where_it_is_told() -> None:
    with torch.no_grad():
        for bias in (True, False):
            layer, x, out = torch.nn.Linear(4, 6, bias=bias), torch.randn(5, 4), torch.zeros(9, 12)
            elementwise.linear_into(layer, x, out[2:7, :6])
            assert torch.allclose(out[2:7, :6], F.linear(x, layer.weight, layer.bias), atol=1e-6)
            assert out[:2].eq(0).all() and out[7:].eq(0).all() and out[:, 6:].eq(0).all()


@pytest.mark.parametrize(("length", "size"), [(10, 3), (1, 5), (512, 512), (513, 512), (7, 1)])
def test_parts_cover_a_length_evenly(length: int, size: int) -> None:
    pieces = list(elementwise.parts(length, size))
    assert [i for piece in pieces for i in range(piece.start, piece.stop)] == list(range(length))
    widths = [piece.stop - piece.start for piece in pieces]
    assert max(widths) <= size and max(widths) - min(widths) <= len(widths)
