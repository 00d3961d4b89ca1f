# SPDX-License-Identifier: Apache-2.0
"""Quantized weights, w8a8 kernels and offloaded blocks: how near to, and how equal to, the exact network."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor

from benchmarks.configs import CONFIGS
from benchmarks.speed import random_network
from pidecode.engine.inplace import denoise
from pidecode.engine.offload import BlockOffloader
from pidecode.engine.ops import quantize as q8
from pidecode.engine.ops.quantize import (
    Format,
    QuantizedLinear,
    products_work,
    quantize,
    quantize_rows,
    reference_linear,
    require_products,
    slice_weight,
    w8a8_linear,
)
from pidecode.engine.plan import SCHEMES, Plan
from pidecode.engine.runner import Runner
from pidecode.engine.timesteps import step_modulation
from pidecode.errors import SettingError
from pidecode.models.pid.network import PiDNet
from pidecode.registry.configs import PiDConfig, debug_config
from random_networks import random_net

CPU = torch.device("cpu")
CONFIG = debug_config(pixel_depth=2, pixel_attn_hidden_size=48)


def evaluate(net: PiDNet, config: PiDConfig, height: int, width: int) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    cell = config.pixels_per_latent_cell
    x, text, latent = (
        torch.randn(*shape, generator=generator)
        for shape in (
            (1, 3, height, width),
            (1, config.text_length, config.text_dim),
            (1, config.latent_channels, height // cell, width // cell),
        )
    )
    with torch.no_grad():
        condition = net.prepare((height // 16, width // 16), text, latent, 0.2)
        return denoise(net, x, step_modulation(net, torch.tensor([634.0])), condition)


@pytest.mark.parametrize("format", ["int8", "fp8"])
@pytest.mark.parametrize("tokens", [1, 16, 50])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_w8a8_product_equals_the_reference(format: Format, tokens: int, dtype: torch.dtype) -> None:
    x, weight, bias = torch.randn(tokens, 64).to(dtype), torch.randn(96, 64), torch.randn(96).to(dtype)
    codes, scales = quantize_rows(weight, format)
    for offset in (None, bias):
        actual = w8a8_linear(x, codes, scales, offset)
        expected = reference_linear(x, codes, scales, offset)
        assert actual.dtype == dtype and actual.shape == (tokens, 96)
        rounding = 1e-5 if dtype == torch.float32 and format == "int8" else 2e-2
        assert torch.allclose(actual.float(), expected.float(), rtol=rounding, atol=rounding * expected.abs().max())


@pytest.mark.parametrize("format", ["int8", "fp8"])
def test_rows_fill_the_format_and_nothing_is_nothing(format: Format) -> None:
    x = torch.randn(5, 32) * torch.tensor([1e-3, 1.0, 1e3, 0.0, 7.0])[:, None]
    codes, scales = quantize_rows(x, format)
    largest = codes.float().abs().amax(1)
    assert torch.equal(largest[[0, 1, 2, 4]], torch.full((4,), 127.0 if format == "int8" else 448.0))
    assert torch.equal(codes[3].float() * scales[3], torch.zeros(32))


@pytest.mark.parametrize("format", ["int8", "fp8"])
def test_parts_of_a_layer_multiply_as_the_whole_does(format: Format) -> None:
    layer = QuantizedLinear(torch.nn.Linear(64, 96), format, eight_bit=True)
    x = torch.randn(20, 64)
    whole = layer(x)
    bias = layer.bias
    assert bias is not None
    assert torch.allclose(slice_weight(layer, lambda t: t[16:48])(x, bias[16:48]), whole[:, 16:48], atol=1e-5)
    block = slice_weight(layer, lambda t: t.unflatten(0, (2, 3, 16))[:2, 1:3]).map(lambda rows: rows.flatten(0, 2))
    assert torch.allclose(block(x), (whole - bias).unflatten(1, (2, 3, 16))[:, :, 1:].flatten(1), atol=0.02)
    halves = [slice_weight(layer, columns=part)(x[:, part]) for part in (slice(0, 32), slice(32, 64))]
    exact = x @ layer.weight.t()
    assert (halves[0] + halves[1] - exact).std() < (0.02 if format == "int8" else 0.06) * exact.std()


def test_a_layer_with_unaligned_sides_is_dequantized() -> None:
    layer = QuantizedLinear(torch.nn.Linear(24, 96), "int8", eight_bit=True)
    assert not layer.eight_bit
    x = torch.randn(4, 24)
    assert torch.allclose(layer(x), x @ layer.weight.t() + layer.bias)


@pytest.mark.parametrize(
    ("format", "eight_bit", "error"),
    [("int8", False, 0.003), ("fp8", False, 0.016), ("int8", True, 0.005), ("fp8", True, 0.02)],
)
@pytest.mark.parametrize("large", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_a_whole_evaluation_against_the_exact_one(
    format: Format, eight_bit: bool, error: float, large: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The stated error: relative to the prediction's standard deviation.
    torch.manual_seed(0)
    config, side = (CONFIGS["v1.5-narrow"], 256) if large else (CONFIG, 64)
    if large:
        net = random_network(config, torch.float32, CPU)
    else:
        monkeypatch.setattr(q8, "MIN_WEIGHTS", 512)
        net = random_net(config, std=0.03)
    exact = evaluate(net, config, side, side)
    assert sum(quantize(blocks, format, eight_bit) for blocks in (net.patch_blocks, net.pixel_blocks)) > 40
    assert 0 < (evaluate(net, config, side, side) - exact).std() < error * exact.std()


def test_int8_products_inside_a_network_equal_the_reference(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(q8, "MIN_WEIGHTS", 512)
    net = random_net(CONFIG, std=0.03)
    quantize(net.patch_blocks, "int8", eight_bit=True)
    quantize(net.pixel_blocks, "int8", eight_bit=True)
    actual = evaluate(net, CONFIG, 64, 64)
    monkeypatch.setattr(q8, "w8a8_linear", reference_linear)
    expected = evaluate(net, CONFIG, 64, 64)
    # A difference in the last place may change a code at a later layer, hence more than rounding.
    assert (actual - expected).std() < 1e-3 * expected.std()


def test_kernels_are_probed_on_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    require_products("int8", torch.float32, CPU)
    with pytest.raises(SettingError, match=r"cpu does not multiply in fp8: .*compute capability 8\.9"):
        require_products("fp8", torch.bfloat16, CPU)

    def faulty(*_: object) -> Tensor:
        raise RuntimeError("not here")

    monkeypatch.setattr(torch, "_int_mm", faulty)
    with pytest.raises(SettingError, match='scheme="w8a16"'):
        require_products("int8", torch.float32, CPU)


def test_a_kernel_that_gives_a_wrong_result_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    real = torch._int_mm
    monkeypatch.setattr(q8.torch, "_int_mm", lambda a, b: real(a, b) * 2)
    assert not products_work("int8", torch.float32, CPU)


def test_a_runner_multiplies_as_its_plan_says(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(q8, "MIN_WEIGHTS", 512)
    torch.manual_seed(0)
    first = PiDNet(CONFIG).eval().requires_grad_(False)
    for scheme in SCHEMES:
        net = copy.deepcopy(first)
        runner = Runner(net, Plan(size=(64, 64), dtype="float32", quantization="int8", scheme=scheme))
        if scheme == "w8a8":
            with pytest.warns(UserWarning, match="slower than float32 on a CPU"):
                runner.arrange(CPU)
        else:
            runner.arrange(CPU)
        layer = net.patch_blocks[0].attn.qkv_x
        assert isinstance(layer, QuantizedLinear)
        assert layer.eight_bit == (scheme == "w8a8")
    runner = Runner(first, Plan(size=(64, 64), dtype="float32", quantization="fp8", scheme="w8a8"))
    with pytest.raises(SettingError, match="cpu does not multiply in fp8"):
        runner.arrange(CPU)


@pytest.mark.gpu
@pytest.mark.parametrize("format", ["int8", "fp8"])
def test_a_gpu_multiplies_as_the_reference(format: Format) -> None:
    device = torch.device("cuda")
    if format == "fp8" and torch.cuda.get_device_capability() < (8, 9):
        pytest.skip("needs compute capability 8.9")
    require_products(format, torch.bfloat16, device)
    x, weight = torch.randn(300, 1536, dtype=torch.bfloat16), torch.randn(4608, 1536)
    codes, scales = quantize_rows(weight, format)
    expected = reference_linear(x, codes, scales).float()
    out = w8a8_linear(x.to(device), codes.to(device), scales.to(device)).float().cpu()
    assert (out - expected).abs().max() < 1e-2 * expected.abs().max()


@pytest.fixture
def net() -> PiDNet:
    return random_net(debug_config(pixel_depth=2), std=0.03)


def predict(net: PiDNet, offloader: BlockOffloader | None = None) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    x, text, latent = (torch.randn(*s, generator=generator) for s in ((1, 3, 64, 96), (1, 7, 16), (1, 16, 2, 3)))
    with torch.no_grad():
        condition = net.prepare((4, 6), text, latent, 0.2)
        return denoise(net, x, step_modulation(net, torch.tensor([634.0])), condition, offloader=offloader)


@pytest.mark.parametrize(("format", "error"), [("int8", 0.01), ("fp8", 0.04)])
def test_a_layer_in_eight_bits(format: q8.Format, error: float) -> None:
    linear = torch.nn.Linear(256, 96)
    small = QuantizedLinear(linear, format)
    x = torch.randn(50, 256)
    with torch.no_grad():
        expected = linear(x)
        assert ((small(x) - expected).std() / expected.std()) < error
    assert small.codes.element_size() == 1


@pytest.mark.parametrize("format", ["int8", "fp8"])
def test_parts_of_a_weight_are_those_of_the_whole(format: q8.Format) -> None:
    linear = torch.nn.Linear(10, 24)
    for layer in (linear, QuantizedLinear(linear, format)):
        whole = layer.weight
        assert torch.equal(slice_weight(layer, lambda t: t[3:9]).weight, whole[3:9])
        assert torch.equal(slice_weight(layer, columns=slice(3, 9)).weight, whole[:, 3:9])
        block = slice_weight(layer, lambda t: t.unflatten(0, (2, 3, 4))[:2, 1:3]).weight
        assert torch.equal(block, whole.view(2, 3, 4, 10)[:2, 1:3])


@pytest.mark.parametrize(("format", "error"), [("int8", 0.02), ("fp8", 0.08)])
def test_a_network_in_eight_bits(net: PiDNet, format: q8.Format, error: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(q8, "MIN_WEIGHTS", 512)
    exact = predict(net)
    count = quantize(net, format)
    assert count > 40
    assert quantize(net, format) == 0
    out = predict(net)
    assert 0 < (out - exact).std() / exact.std() < error


def test_offloaded_blocks_give_the_same_and_return_to_the_host(net: PiDNet) -> None:
    expected = predict(net)
    offloader = BlockOffloader(net.patch_blocks, torch.device("cpu"))
    host = net.patch_blocks[0].norm_x1.weight.data_ptr()
    for _ in range(2):
        assert torch.equal(predict(net, offloader), expected)
    assert net.patch_blocks[0].norm_x1.weight.data_ptr() == host
    assert len(offloader._resident) == 1
