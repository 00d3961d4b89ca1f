# SPDX-License-Identifier: Apache-2.0
"""Triton kernels against their reference implementations, in Triton's interpreter, and compiled ahead for GPUs.

Equality without a GPU, says nothing of speed. `TRITON_INTERPRET=1` must be set before Triton is imported.
"""

from __future__ import annotations

import os
from types import ModuleType
from typing import Literal

import pytest
import torch

from pidecode.engine.inplace import denoise
from pidecode.engine.ops import elementwise
from pidecode.engine.ops.elementwise import CompiledOps
from pidecode.engine.ops.quantize import reference_int8_attention
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


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("queries", "keys", "width"), [(130, 70, 64), (40, 129, 32), (128, 64, 128)])
def test_attention_in_int8(kernels: ModuleType, queries: int, keys: int, width: int, dtype: torch.dtype) -> None:
    joint = torch.randn(2, keys, 3, 3, width).to(dtype)  # keys and values as they lie in the engine's joint buffer
    k, v = (joint[:, :, which].transpose(1, 2) for which in (1, 2))
    k.add_(torch.randn(width).to(dtype) * 5)
    q = torch.randn(2, queries, 3, width).to(dtype).transpose(1, 2)
    expected, actual = reference_int8_attention(q, k, v), kernels.int8_attention(q, k, v)
    assert actual.dtype == dtype and actual.shape == q.shape and actual.transpose(1, 2).is_contiguous()
    close = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}[dtype]
    assert torch.allclose(actual.float(), expected.float(), rtol=close, atol=close)


@pytest.mark.parametrize("gate", ["per_token", "per_channel"])
def test_a_whole_evaluation(kernels: ModuleType, gate: Literal["per_token", "per_channel"]) -> None:
    net = random_net(debug_config(pixel_depth=2, patch_size=4, gate=gate), std=0.03)
    t = torch.tensor([634.0])
    with torch.no_grad():
        condition = net.prepare((2, 4), torch.randn(1, 3, 16), torch.randn(1, 16, 1, 1), 0.1)
        x = torch.randn(1, 3, 8, 16)
        modulation = step_modulation(net, t)
        expected = denoise(net, x, modulation, condition)
        with elementwise.compiled_ops(CompiledOps("eager", interpreted=True)):
            assert (denoise(net, x, modulation, condition) - expected).abs().max() < 1e-5 * expected.abs().max()
