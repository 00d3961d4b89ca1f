# SPDX-License-Identifier: Apache-2.0
"""Triton kernels against the eager ops, in Triton's interpreter: equality without a GPU, says nothing of speed."""

from __future__ import annotations

import os
from types import ModuleType
from typing import Literal

import pytest
import torch

from pidecode.engine.inplace import denoise
from pidecode.engine.ops import elementwise
from pidecode.engine.timesteps import step_modulation
from pidecode.registry.configs import debug_config
from random_networks import random_net


@pytest.fixture(scope="module")
def kernels() -> ModuleType:
    pytest.importorskip("triton")
    if os.environ.get("TRITON_INTERPRET") != "1" and not torch.cuda.is_available():
        pytest.skip("needs a GPU, or TRITON_INTERPRET=1 before Triton is imported")
    from pidecode.engine.ops import triton as kernels

    return kernels


@pytest.mark.parametrize(("rows", "width"), [(37, 16), (5, 24), (3, 1536)])
@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_norm_and_modulation(kernels: ModuleType, rows: int, width: int, shared: bool, dtype: torch.dtype) -> None:
    x = torch.randn(rows, width)
    shift, factor = torch.randn(2, *((width,) if shared else (rows, width))).unbind(0)
    expected = elementwise.norm_modulate(x, shift, factor, dtype)
    actual = kernels.norm_modulate(x, shift, factor, dtype)
    assert actual.dtype == dtype
    close = 1e-5 if dtype == torch.float32 else 2e-2
    assert torch.allclose(actual.float(), expected.float(), rtol=close, atol=close)


@pytest.mark.parametrize("gate_shape", [(7, 40), (7, 1), (40,)])
@pytest.mark.parametrize("logits", [True, False])
def test_gated_sum(kernels: ModuleType, gate_shape: tuple[int, ...], logits: bool) -> None:
    stream, branch, gate = torch.randn(9, 48), torch.randn(7, 40), torch.randn(gate_shape)
    expected = stream.clone()
    elementwise.add_gated_(expected[1:8, :40], branch, gate.sigmoid() if logits else gate)
    kernels.add_gated_(stream[1:8, :40], branch, gate, logits=logits)
    assert torch.allclose(stream, expected, atol=1e-6)


@pytest.mark.parametrize(("heads", "width"), [(2, 64), (3, 8), (5, 72)])
@pytest.mark.parametrize("turned", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_norm_and_rotation_of_heads(
    kernels: ModuleType, heads: int, width: int, turned: bool, dtype: torch.dtype
) -> None:
    joint = torch.randn(11, 3 * heads * width).to(dtype)  # queries, keys and values side by side, as they lie
    weight = torch.randn(width).to(dtype)
    rotation = torch.polar(torch.ones(11, width // 2), torch.randn(11, width // 2)) if turned else None
    expected = joint.clone()
    elementwise.norm_rotate_(expected.unflatten(1, (3, heads, width))[:, 1], weight, rotation)
    kernels.norm_rotate_(joint.unflatten(1, (3, heads, width))[:, 1], weight, rotation)
    close = 1e-5 if dtype == torch.float32 else 2e-2
    assert torch.allclose(joint.float(), expected.float(), rtol=close, atol=close)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_gate_of_one_opening_per_token(kernels: ModuleType, dtype: torch.dtype) -> None:
    stream, tokens, weight = torch.randn(9, 48), torch.randn(7, 40).to(dtype), torch.randn(1, 80).to(dtype)[:, :40]
    logits = torch.randn(7, 1)
    expected = stream.clone()
    elementwise.gate_latent_(expected[1:8, :40], tokens, weight, logits)
    kernels.gate_latent_(stream[1:8, :40], tokens, weight, logits)
    close = 1e-5 if dtype == torch.float32 else 1e-2
    assert torch.allclose(stream, expected, rtol=close, atol=close)


@pytest.mark.parametrize(("group", "width"), [(4, 16), (16, 4), (3, 24)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_second_half_of_a_pixel_block(kernels: ModuleType, group: int, width: int, dtype: torch.dtype) -> None:
    tile, expanded = torch.randn(7, group, width), torch.randn(7, group, width).to(dtype)
    vectors = torch.randn(7, 4 * group * width).to(dtype).chunk(4, dim=-1)
    fc1, fc2 = torch.nn.Linear(width, 4 * width).to(dtype), torch.nn.Linear(4 * width, width).to(dtype)
    expected = tile.clone()
    with torch.no_grad():
        elementwise.update_pixels_(expected, expanded, vectors, fc1, fc2)
        kernels.update_pixels_(tile, expanded, vectors, fc1, fc2)
    close = 1e-5 if dtype == torch.float32 else 5e-2
    assert torch.allclose(tile, expected, rtol=close, atol=close)


@pytest.mark.parametrize("gate", ["per_token", "per_channel"])
def test_a_whole_evaluation(kernels: ModuleType, gate: Literal["per_token", "per_channel"]) -> None:
    net = random_net(debug_config(pixel_depth=2, patch_size=4, gate=gate), std=0.03)
    t = torch.tensor([634.0])
    with torch.no_grad():
        condition = net.prepare((2, 4), torch.randn(1, 3, 16), torch.randn(1, 16, 1, 1), 0.1)
        x = torch.randn(1, 3, 8, 16)
        modulation = step_modulation(net, t)
        expected = denoise(net, x, modulation, condition)
        with elementwise.triton_ops():
            assert (denoise(net, x, modulation, condition) - expected).abs().max() < 1e-5 * expected.abs().max()
