# SPDX-License-Identifier: Apache-2.0
"""Windows: they cover an image, their weights sum to one, and only attention notices them."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from torch import Tensor

from pidecode.engine.inplace import prepare_recomputed
from pidecode.engine.tiling import blend_weights, denoise_windows, window_spans
from pidecode.models.pid.network import Condition, PiDNet
from pidecode.registry.configs import debug_config
from pidecode.sampling import NoiseStream, sample_student

GRID = (6, 10)


def windowed(net: PiDNet, x: Tensor, t: Tensor, condition: Condition, side: int, overlap: int) -> Tensor:
    return denoise_windows(net.denoise, x, t, condition, side, overlap)


def net_and_condition(without_attention: bool = False) -> tuple[PiDNet, Condition, Tensor]:
    torch.manual_seed(0)
    config = debug_config(pixel_depth=2)
    net = PiDNet(config).eval().requires_grad_(False)
    for name, parameter in net.named_parameters():
        parameter.add_(torch.randn_like(parameter) * 0.05)
        if without_attention and "attn.proj" in name:
            parameter.zero_()
    text, latent = torch.randn(1, 7, config.text_dim), torch.randn(1, 16, GRID[0] // 2, GRID[1] // 2)
    condition = net.prepare(GRID, text, latent, 0.3)
    return net, condition, torch.randn(1, 3, GRID[0] * 16, GRID[1] * 16)


@pytest.mark.parametrize(("length", "side", "overlap"), [(10, 4, 1), (10, 4, 0), (11, 4, 3), (3, 8, 2), (257, 128, 32)])
def test_spans_cover_the_axis_with_their_overlap(length: int, side: int, overlap: int) -> None:
    spans = window_spans(length, side, overlap)
    assert spans[0][0] == 0 and spans[-1][1] == length
    assert all(stop - start == min(side, length) for start, stop in spans)
    for (_, stop), (start, _) in pairwise(spans):
        assert stop - start >= overlap
    total = torch.zeros(length * 4)
    for (start, stop), weight in zip(spans, blend_weights(spans, 4, torch.device("cpu")), strict=True):
        assert weight.min() > 0
        total[start * 4 : stop * 4] += weight
    assert torch.allclose(total, torch.ones_like(total), atol=1e-6)


def test_one_window_is_the_whole_image() -> None:
    net, condition, x = net_and_condition()
    t = torch.tensor([634.0])
    with torch.no_grad():
        assert torch.equal(windowed(net, x, t, condition, 10, 2), net.denoise(x, t, condition))


def test_all_but_attention_is_as_in_the_whole() -> None:
    # Without what attention brings, a patch depends on its own position, latent tokens and pixels only. Equality
    # here says that windows keep the whole image's positions and latent tokens, and that blending leaves no seam.
    net, condition, x = net_and_condition(without_attention=True)
    for block in net.pixel_blocks:
        block.attn.proj.weight.zero_()
    t = torch.tensor([634.0])
    with torch.no_grad():
        whole = net.denoise(x, t, condition)
        blended = windowed(net, x, t, condition, 4, 1)
    assert (whole - blended).abs().max() < 5e-6 * whole.abs().max()


def test_a_whole_decode_in_windows_has_no_seam() -> None:
    net, condition, _ = net_and_condition()
    size = (3, GRID[0] * 16, GRID[1] * 16)

    def decode(side: int) -> Tensor:
        draw = NoiseStream([5], size, torch.device("cpu"))
        return sample_student(lambda x, t: windowed(net, x, t, condition, side, 2), draw)

    with torch.no_grad():
        whole, fused = decode(10), decode(4)
    error = (whole - fused).abs()
    jump = (fused - whole).diff(dim=-1).abs().mean((0, 1, 2))
    edges = [edge * 16 - 1 for span in window_spans(GRID[1], 4, 2) for edge in span if 0 < edge < GRID[1]]
    assert error.mean() < whole.std()
    assert jump[edges].mean() < 2 * jump.mean()


def test_recomputed_latent_tokens_are_cropped_alike() -> None:
    net, condition, x = net_and_condition()
    torch.manual_seed(0)
    recomputed = prepare_recomputed(net, GRID, torch.randn(1, 7, 16), torch.randn(1, 16, 3, 5), 0.3)
    torch.manual_seed(0)
    kept = net.prepare(GRID, torch.randn(1, 7, 16), torch.randn(1, 16, 3, 5), 0.3)
    t = torch.tensor([634.0])
    with torch.no_grad():
        a, b = (windowed(net, x, t, c, 4, 1) for c in (recomputed, kept))
    assert (a - b).abs().max() < 5e-6 * b.abs().max()
    assert condition.grid == GRID
