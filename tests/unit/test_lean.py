# SPDX-License-Identifier: Apache-2.0
"""Each saving of the lean evaluation against its plain twin: same numbers, in chunks and in place."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from pidecode.engine.chunks import Chunks
from pidecode.engine.ops import elementwise as sums
from pidecode.engine.timesteps import precompute, strip_for_inference
from pidecode.errors import SettingError
from pidecode.models.pid.blocks import GatedFeedForward, RMSNorm, image_rotation, modulate, rotate
from pidecode.models.pid.network import Condition, PiDNet
from pidecode.registry.configs import PiDConfig, debug_config

TOLERANCE = 5e-6
"""Of the largest value: these random networks answer in tens, not in units."""
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


def random_net(config: PiDConfig, seed: int = 0) -> PiDNet:
    torch.manual_seed(seed)
    net = PiDNet(config).eval().requires_grad_(False)
    for parameter in net.parameters():
        parameter.add_(torch.randn_like(parameter) * 0.05)
    return net


def inputs(net: PiDNet, grid: tuple[int, int] = (4, 6), batch: int = 1, **options: Any) -> tuple[Tensor, Condition]:
    config, generator = net.config, torch.Generator().manual_seed(1)
    x = torch.randn(batch, 3, grid[0] * config.patch_size, grid[1] * config.patch_size, generator=generator)
    text = torch.randn(batch, 7, config.text_dim, generator=generator) if config.has_text else None
    latent = sigma = None
    if config.has_adapter:
        latent = torch.randn(batch, config.latent_channels, grid[0] // 2, grid[1] // 2, generator=generator)
        sigma = torch.rand(batch, generator=generator)
    return x, net.prepare(grid, text, latent, sigma, **options)


def apart(a: Tensor, b: Tensor) -> float:
    return ((a - b).abs().max() / b.abs().max()).item()


def both(net: PiDNet, x: Tensor, t: Tensor, condition: Condition) -> tuple[Tensor, Tensor]:
    with torch.enable_grad():
        plain = net.denoise(x, t, condition)
    with torch.no_grad():
        return plain, net.denoise(x, t, condition)


@pytest.mark.parametrize("name", VARIANTS)
def test_lean_equals_plain(name: str) -> None:
    net = random_net(VARIANTS[name])
    x, condition = inputs(net, batch=2)
    before = x.clone()
    plain, leanly = both(net, x, torch.tensor([866.0, 342.0]), condition)
    assert plain.std() > 0.01
    assert apart(plain, leanly) < TOLERANCE
    assert torch.equal(x, before)


@pytest.mark.parametrize(
    "chunks",
    [Chunks(tokens=5, tile_tokens=6, tile_rows=3), Chunks(tokens=10**6, tile_tokens=10**6, tile_rows=16)],
)
def test_any_chunk_gives_the_same(chunks: Chunks) -> None:
    net = random_net(VARIANTS["v1.5"])
    net.chunks = chunks
    x, condition = inputs(net)
    plain, leanly = both(net, x, torch.tensor([634.0]), condition)
    assert apart(plain, leanly) < TOLERANCE


def test_running_twice_alters_nothing() -> None:
    net = random_net(VARIANTS["v1.5"])
    x, condition = inputs(net)
    with torch.no_grad():
        first, second = (net.denoise(x, torch.tensor([634.0]), condition) for _ in range(2))
    assert torch.equal(first, second)


def test_the_schedule_gives_what_each_step_would_compute() -> None:
    net = random_net(VARIANTS["v1.5"])
    schedule = precompute(net, (0.999, 0.866, 0.634, 0.342, 1.0))
    x, condition = inputs(net, batch=2)
    known = replace(condition, schedule=schedule)
    with torch.no_grad():
        for t in (torch.tensor([866.0, 866.0]), torch.tensor([999.0, 342.0]), torch.tensor([123.0, 866.0])):
            assert apart(net.denoise(x, t, known), net.denoise(x, t, condition)) < TOLERANCE
    assert schedule.find(torch.tensor([123.0])) is None
    found = schedule.find(torch.tensor([866.0, 866.0]))
    assert found is not None and len(found.embedding) == 1


def test_a_slimmed_network_runs_at_its_times_and_says_so_at_others() -> None:
    net = random_net(VARIANTS["v1.5"])
    times = (0.866, 0.342)
    x, condition = inputs(net)
    t = torch.tensor([342.0])
    with torch.no_grad():
        before = net.denoise(x, t, condition)
        known = replace(condition, schedule=precompute(net, times))
        size = sum(p.numel() for p in net.parameters())
        strip_for_inference(net)
        assert sum(p.numel() for p in net.parameters()) < 0.95 * size
        assert apart(net.denoise(x, t, known), before) < TOLERANCE
        with pytest.raises(SettingError, match="stripped"):
            net.denoise(x, torch.tensor([500.0]), known)


@pytest.mark.parametrize("name", ["v1.5", "v1"])
def test_late_tokens_equal_kept_ones(name: str) -> None:
    net = random_net(VARIANTS[name])
    t = torch.tensor([634.0])
    mask = torch.tensor([1.0, 0.0])
    x, kept = inputs(net, batch=2, latent_mask=mask)
    _, late = inputs(net, batch=2, latent_mask=mask, keep_tokens=False)
    with torch.no_grad():
        assert apart(net.denoise(x, t, kept), net.denoise(x, t, late)) < TOLERANCE
    plain, _ = both(net, x, t.expand(2), late)
    assert apart(plain, both(net, x, t.expand(2), kept)[0]) < TOLERANCE


def test_the_color_head_needs_its_tokens() -> None:
    net = random_net(debug_config(color_head=True))
    with pytest.raises(SettingError, match="keep_tokens"):
        inputs(net, keep_tokens=False, want_color=True)


def test_half_precision_stays_near_the_exact_image() -> None:
    net = random_net(VARIANTS["v1.5"])
    x, condition = inputs(net)
    exact, _ = both(net, x, torch.tensor([634.0]), condition)
    net.bfloat16()
    x, condition = inputs(net)
    plain, leanly = both(net, x, torch.tensor([634.0]), condition)
    assert leanly.dtype == torch.float32
    error_lean, error_plain = ((y - exact).square().mean().sqrt() / exact.std() for y in (leanly, plain))
    assert error_lean < 0.03
    assert error_lean < 1.2 * error_plain


def test_gradients_take_the_plain_path() -> None:
    net = random_net(VARIANTS["v1.5"]).requires_grad_(True)
    x, condition = inputs(net)
    net.denoise(x, torch.tensor([634.0]), condition).square().mean().backward()
    assert all(p.grad is not None for n, p in net.named_parameters() if n.startswith("pixel_blocks"))


def test_norm_and_modulation_in_one_go() -> None:
    x, shift, scale = torch.randn(3, 5, 8), torch.randn(8), torch.randn(8)
    norm = RMSNorm(8)
    torch.nn.init.normal_(norm.weight)
    with torch.no_grad():
        plain = modulate(norm(x), shift, scale)
        assert torch.allclose(sums.norm_modulate(x, shift, (1 + scale) * norm.weight, torch.float32), plain, atol=1e-6)
        narrow = sums.norm_modulate(x, shift, (1 + scale) * norm.weight, torch.bfloat16)
    assert torch.allclose(narrow.float(), plain, rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_norm_and_rotation_in_place(dtype: torch.dtype) -> None:
    qkv = torch.randn(6, 3, 2, 8).to(dtype)
    rotation = image_rotation((2, 3), 8, reference_grid=None, device=torch.device("cpu"))
    norm = RMSNorm(8)
    with torch.no_grad():
        norm.weight.normal_()
        plain = rotate(norm(qkv[None, :, 0].float()), rotation)[0]
        sums.norm_rotate_(qkv[:, 0], norm.weight, torch.complex(*rotation))
    assert torch.allclose(qkv[:, 0].float(), plain, atol=1e-6 if dtype == torch.float32 else 5e-2)


def test_feed_forward_with_one_buffer_less() -> None:
    mlp, x = GatedFeedForward(8, 12), torch.randn(4, 8)
    with torch.no_grad():
        assert torch.allclose(sums.gated_feed_forward(x, mlp.w1, mlp.w3, mlp.w2), mlp(x), atol=1e-7)


def test_linear_into_writes_where_it_is_told() -> None:
    with torch.no_grad():
        for bias in (True, False):
            layer, x, out = torch.nn.Linear(4, 6, bias=bias), torch.randn(5, 4), torch.zeros(9, 12)
            sums.linear_into(layer, x, out[2:7, :6])
            assert torch.allclose(out[2:7, :6], F.linear(x, layer.weight, layer.bias), atol=1e-6)
            assert out[:2].eq(0).all() and out[7:].eq(0).all() and out[:, 6:].eq(0).all()


@pytest.mark.parametrize(("length", "size"), [(10, 3), (1, 5), (512, 512), (513, 512), (7, 1)])
def test_parts_cover_a_length_evenly(length: int, size: int) -> None:
    pieces = list(sums.parts(length, size))
    assert [i for piece in pieces for i in range(piece.start, piece.stop)] == list(range(length))
    widths = [piece.stop - piece.start for piece in pieces]
    assert max(widths) <= size and max(widths) - min(widths) <= len(widths)
