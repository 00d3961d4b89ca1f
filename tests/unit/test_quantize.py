# SPDX-License-Identifier: Apache-2.0
"""Eight-bit weights and blocks that live on the host: how far from, and how equal to, the plain network."""

from __future__ import annotations

import pytest
import torch

from pidecode.engine.inplace import denoise
from pidecode.engine.offload import BlockOffloader
from pidecode.engine.ops import quantize as q8
from pidecode.engine.ops.quantize import QuantizedLinear, weight_block, weight_columns, weight_rows, quantize
from pidecode.engine.timesteps import step_modulation
from pidecode.errors import SettingError
from pidecode.models.pid.network import PiDNet
from pidecode.registry.configs import debug_config


@pytest.fixture
def net() -> PiDNet:
    torch.manual_seed(0)
    net = PiDNet(debug_config(pixel_depth=2)).eval().requires_grad_(False)
    for parameter in net.parameters():
        parameter.add_(torch.randn_like(parameter) * 0.03)
    return net


def predict(net: PiDNet, offloader: BlockOffloader | None = None) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    x, text, latent = (torch.randn(*s, generator=generator) for s in ((1, 3, 64, 96), (1, 7, 16), (1, 16, 2, 3)))
    with torch.no_grad():
        condition = net.prepare((4, 6), text, latent, 0.2)
        return denoise(net, x, step_modulation(net, torch.tensor([634.0])), condition, offloader=offloader)


@pytest.mark.parametrize(("form", "error"), [("int8", 0.01), ("fp8", 0.04)])
def test_a_layer_in_eight_bits(form: q8.Format, error: float) -> None:
    linear = torch.nn.Linear(256, 96)
    small = QuantizedLinear(linear, form)
    x = torch.randn(50, 256)
    with torch.no_grad():
        expected = linear(x)
        assert ((small(x) - expected).std() / expected.std()) < error
    assert small.codes.element_size() == 1


@pytest.mark.parametrize("form", ["int8", "fp8"])
def test_parts_of_a_weight_are_those_of_the_whole(form: q8.Format) -> None:
    linear = torch.nn.Linear(10, 24)
    for layer in (linear, QuantizedLinear(linear, form)):
        whole = layer.weight
        assert torch.equal(weight_rows(layer, slice(3, 9)).weight, whole[3:9])
        assert torch.equal(weight_columns(layer, slice(3, 9)).weight, whole[:, 3:9])
        cut = (slice(0, 2), slice(1, 3))
        assert torch.equal(weight_block(layer, (2, 3, 4), cut).weight, whole.view(2, 3, 4, 10)[cut])


@pytest.mark.parametrize(("form", "error"), [("int8", 0.02), ("fp8", 0.08)])
def test_a_network_in_eight_bits(net: PiDNet, form: q8.Format, error: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(q8, "MIN_WEIGHTS", 512)
    exact = predict(net)
    count = quantize(net, form)
    assert count > 40
    assert quantize(net, form) == 0
    answer = predict(net)
    assert 0 < (answer - exact).std() / exact.std() < error


def test_an_unknown_format_is_an_error(net: PiDNet) -> None:
    with pytest.raises(SettingError, match="no weight format 'int3'"):
        quantize(net, "int3")  # type: ignore[arg-type]


def test_blocks_that_visit_give_the_same_and_leave(net: PiDNet) -> None:
    expected = predict(net)
    offloader = BlockOffloader(net.patch_blocks, torch.device("cpu"))
    home = net.patch_blocks[0].norm_x1.weight.data_ptr()
    for _ in range(2):
        assert torch.equal(predict(net, offloader), expected)
    assert net.patch_blocks[0].norm_x1.weight.data_ptr() == home
    assert len(offloader._resident) == 1
