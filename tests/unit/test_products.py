# SPDX-License-Identifier: Apache-2.0
"""Products in eight bits: equal to their plain twin, near the exact network, and refused where a device has none."""

from __future__ import annotations

import copy
from itertools import product as every

import pytest
import torch
from torch import Tensor

import pidecode
from pidecode.benchmarking.networks import NETWORKS
from pidecode.benchmarking.speed import random_network
from pidecode.engine.inplace import denoise
from pidecode.engine.ops import quantize as door
from pidecode.engine.ops import quantize as q8
from pidecode.engine.ops.quantize import (
    KERNELS,
    Format,
    QuantizedLinear,
    Way,
    best_kernel,
    weight_block,
    weight_columns,
    weight_rows,
    narrow,
    reference_linear,
    product,
    quantize,
    works,
)
from pidecode.engine.plan import Plan
from pidecode.engine.runner import Runner
from pidecode.engine.timesteps import step_modulation
from pidecode.errors import SettingError
from pidecode.models.pid.network import PiDNet
from pidecode.registry.configs import PiDConfig, debug_config

CPU = torch.device("cpu")
CONFIG = debug_config(pixel_depth=2, pixel_attn_hidden_size=48)
FORMS: tuple[Format, ...] = ("int8", "fp8")
ALL_WAYS: tuple[tuple[Format, Way], ...] = tuple((form, way) for form in FORMS for way in KERNELS[form])


def form_of(way: Way) -> Format:
    return "int8" if way == "int8" else "fp8"


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


@pytest.mark.parametrize(("form", "way"), ALL_WAYS)
@pytest.mark.parametrize("tokens", [1, 16, 50])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_product_is_its_plain_twin(form: Format, way: Way, tokens: int, dtype: torch.dtype) -> None:
    x, weight, bias = torch.randn(tokens, 64).to(dtype), torch.randn(96, 64), torch.randn(96).to(dtype)
    codes, scales = narrow(weight, form)
    for offset in (None, bias):
        actual = product(x, codes, scales, way, offset)
        expected = reference_linear(x, codes, scales, form, offset)
        assert actual.dtype == dtype and actual.shape == (tokens, 96)
        rounding = 1e-5 if dtype == torch.float32 and way != "fp8 rowwise" else 2e-2
        assert torch.allclose(actual.float(), expected.float(), rtol=rounding, atol=rounding * expected.abs().max())


@pytest.mark.parametrize("form", FORMS)
def test_rows_fill_the_format_and_nothing_is_nothing(form: Format) -> None:
    x = torch.randn(5, 32) * torch.tensor([1e-3, 1.0, 1e3, 0.0, 7.0])[:, None]
    codes, scales = narrow(x, form)
    largest = codes.float().abs().amax(1)
    assert torch.equal(largest[[0, 1, 2, 4]], torch.full((4,), 127.0 if form == "int8" else 448.0))
    assert torch.equal(codes[3].float() * scales[3], torch.zeros(32))


@pytest.mark.parametrize(("form", "way"), ALL_WAYS)
def test_parts_of_a_layer_multiply_as_the_whole_does(form: Format, way: Way) -> None:
    layer = QuantizedLinear(torch.nn.Linear(64, 96), form, way)
    x = torch.randn(20, 64)
    whole = layer(x)
    bias = layer.bias
    assert bias is not None
    assert torch.allclose(weight_rows(layer, slice(16, 48))(x, bias[16:48]), whole[:, 16:48], atol=1e-5)
    block = weight_block(layer, (2, 3, 16), (slice(0, 2), slice(1, 3))).map(lambda rows: rows.flatten(0, 2))
    assert torch.allclose(block(x), (whole - bias).unflatten(1, (2, 3, 16))[:, :, 1:].flatten(1), atol=0.02)
    halves = [weight_columns(layer, part)(x[:, part]) for part in (slice(0, 32), slice(32, 64))]
    exact = x @ layer.weight.t()
    assert (halves[0] + halves[1] - exact).std() < (0.02 if form == "int8" else 0.06) * exact.std()


def test_a_layer_with_odd_sides_is_widened() -> None:
    layer = QuantizedLinear(torch.nn.Linear(24, 96), "int8", "int8")
    assert layer.way is None
    x = torch.randn(4, 24)
    assert torch.allclose(layer(x), x @ layer.weight.t() + layer.bias)


@pytest.mark.parametrize(
    ("form", "way", "error"),
    [("int8", None, 0.003), ("fp8", None, 0.016), ("int8", "int8", 0.005), ("fp8", "fp8", 0.02)],
)
@pytest.mark.parametrize("large", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_a_whole_evaluation_against_the_exact_one(
    form: Format, way: Way | None, error: float, large: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The stated error: relative to the prediction's standard deviation.
    torch.manual_seed(0)
    config, side = (NETWORKS["small"], 256) if large else (CONFIG, 64)
    if large:
        net = random_network(config, torch.float32, CPU)
    else:
        monkeypatch.setattr(q8, "MIN_WEIGHTS", 512)
        net = PiDNet(config).eval().requires_grad_(False)
        for parameter in net.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.03)
    exact = evaluate(net, config, side, side)
    assert sum(quantize(blocks, form, way) for blocks in (net.patch_blocks, net.pixel_blocks)) > 40
    assert 0 < (evaluate(net, config, side, side) - exact).std() < error * exact.std()


def test_int8_products_inside_a_network_are_their_twin(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(q8, "MIN_WEIGHTS", 512)
    torch.manual_seed(0)
    net = PiDNet(CONFIG).eval().requires_grad_(False)
    for parameter in net.parameters():
        parameter.add_(torch.randn_like(parameter) * 0.03)
    quantize(net.patch_blocks, "int8", "int8")
    quantize(net.pixel_blocks, "int8", "int8")
    actual = evaluate(net, CONFIG, 64, 64)
    monkeypatch.setattr(
        q8, "product", lambda x, codes, scales, way, bias=None: reference_linear(x, codes, scales, form_of(way), bias)
    )
    expected = evaluate(net, CONFIG, 64, 64)
    # A sum that differs in its last place may tip a code at a later layer, hence more than rounding.
    assert (actual - expected).std() < 1e-3 * expected.std()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("form", "way", "decibels"), [("int8", None, 58), ("fp8", None, 42), ("int8", "int8", 50), ("fp8", "fp8", 41)]
)
def test_the_shipped_decoder_against_its_exact_self(form: Format, way: Way | None, decibels: float) -> None:
    generator = torch.Generator().manual_seed(3)
    cells = torch.nn.functional.interpolate(torch.randn(1, 128, 4, 4, generator=generator), size=(8, 8), mode="bicubic")
    latent = pidecode.Latent(cells, "flux2", 0.0)
    decoder = pidecode.PixelDecoder.from_pretrained("tiny")
    decoder.runner.look = None  # the way that runs the blocks
    exact = decoder.decode(latent, output="pt")
    quantize(decoder.net.patch_blocks, form, way)
    quantize(decoder.net.pixel_blocks, form, way)
    answer = decoder.decode(latent, output="pt")
    assert isinstance(exact, Tensor) and isinstance(answer, Tensor)
    assert 10 * torch.log10(4 / (answer - exact).square().mean()) > decibels


def test_devices_are_asked_what_they_multiply(monkeypatch: pytest.MonkeyPatch) -> None:
    assert best_kernel("int8", torch.float32, CPU) == "int8"
    with pytest.raises(SettingError, match=r"cpu does not multiply in fp8: .*compute capability 8\.9"):
        best_kernel("fp8", torch.bfloat16, CPU)
    assert not works("fp8 rowwise", torch.float32, CPU)

    def faulty(*_: object) -> Tensor:
        raise RuntimeError("not here")

    monkeypatch.setattr(torch, "_int_mm", faulty)
    with pytest.raises(SettingError, match='products="wide"'):
        best_kernel("int8", torch.float32, CPU)


def test_a_device_that_multiplies_wrong_is_not_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    real = torch._int_mm
    monkeypatch.setattr(door.torch, "_int_mm", lambda a, b: real(a, b) * 2)
    assert not works("int8", torch.float32, CPU)


def test_a_runner_multiplies_as_its_plan_says(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(q8, "MIN_WEIGHTS", 512)
    torch.manual_seed(0)
    first = PiDNet(CONFIG).eval().requires_grad_(False)
    for products, dtype in every(("wide", "eight"), ("float32",)):
        net = copy.deepcopy(first)
        runner = Runner(net, Plan(size=(64, 64), dtype=dtype, weights="int8", products=products))
        if products == "eight":
            with pytest.warns(UserWarning, match="slower than float32 on a processor"):
                runner.arrange(CPU)
        else:
            runner.arrange(CPU)
        layer = net.patch_blocks[0].attn.qkv_x
        assert isinstance(layer, QuantizedLinear)
        assert layer.way == ("int8" if products == "eight" else None)
    runner = Runner(first, Plan(size=(64, 64), dtype="float32", weights="fp8", products="eight"))
    with pytest.raises(SettingError, match="cpu does not multiply in fp8"):
        runner.arrange(CPU)


def test_formats_are_not_mixed() -> None:
    with pytest.raises(SettingError, match="Weights in int8 cannot be multiplied in fp8"):
        quantize(torch.nn.Linear(8, 8), "int8", "fp8")


@pytest.mark.gpu
@pytest.mark.parametrize("form", FORMS)
def test_a_card_multiplies_as_the_twin(form: Format) -> None:
    device = torch.device("cuda")
    if form == "fp8" and torch.cuda.get_device_capability() < (8, 9):
        pytest.skip("needs compute capability 8.9")
    way = best_kernel(form, torch.bfloat16, device)
    x, weight = torch.randn(300, 1536, dtype=torch.bfloat16), torch.randn(4608, 1536)
    codes, scales = narrow(weight, form)
    expected = reference_linear(x, codes, scales, form).float()
    answer = product(x.to(device), codes.to(device), scales.to(device), way).float().cpu()
    assert (answer - expected).abs().max() < 1e-2 * expected.abs().max()
