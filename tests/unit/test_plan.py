# SPDX-License-Identifier: Apache-2.0
"""Plans: predictions against counted tensors, what is tried in which order, and what a refusal says."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from benchmarks.memory import trace_decode, weight_bytes
from pidecode.engine.machine import DRIVER, GB, Chunks, Machine
from pidecode.engine.plan import Plan, parameters, plan_decode, predict
from pidecode.engine.timesteps import strip_for_inference
from pidecode.errors import DoesNotFitError, SettingError
from pidecode.models.pid.network import PiDNet
from pidecode.registry.configs import PiDConfig, v1, v1pt5

V15 = v1pt5(latent_channels=16, latent_down=8)
SMALL = PiDConfig(
    hidden_size=256, num_heads=4, patch_depth=6, pixel_attn_hidden_size=192, pixel_num_heads=4, adapter_width=256,
    adapter_padding="replicate", gate="per_token", inject_pixels=True, rope_reference=(2048, 2048),
)  # fmt: skip

SHALLOW = PiDConfig(
    hidden_size=256, num_heads=4, patch_depth=1, pixel_hidden_size=4, pixel_depth=1, pixel_attn_hidden_size=32,
    pixel_num_heads=2, text_dim=0, latent_channels=128, latent_down=16, latent_unpatchify=2, adapter_width=64,
    adapter_blocks=2, adapter_padding="replicate", gate="per_token", inject_pixels=True, prediction="x0",
)  # fmt: skip


@pytest.mark.parametrize("config", [V15, v1(latent_channels=16, latent_down=8), SMALL], ids=["v1.5", "v1", "small"])
@pytest.mark.parametrize("stripped", [True, False])
def test_parameters_are_counted_without_building(config: PiDConfig, stripped: bool) -> None:
    with torch.device("meta"):
        net = PiDNet(config)
    if stripped:
        strip_for_inference(net)
    assert sum(parameters(config, stripped=stripped)) == pytest.approx(weight_bytes(net) / 4, rel=1e-3)


LARGE = Chunks.large(16)
SMALL_CHUNKS = Chunks(tokens=256, tile_tokens=128, tile_rows=2)


@pytest.mark.parametrize(
    "plan",
    [
        Plan(size=(512, 512), keep_tokens=False, chunks=LARGE),
        Plan(size=(512, 384), batch=2, offload=("blocks",), chunks=LARGE),
        Plan(size=(512, 512), dtype="float32", quantization="int8", chunks=LARGE),
        Plan(size=(512, 384), batch=3, chunks=Chunks.whole(16)),
        Plan(size=(384, 512), quantization="int8", scheme="w8a8", chunks=LARGE),
        Plan(size=(1024, 512), quantization="fp8", scheme="w8a8", chunks=LARGE, offload=("blocks",)),
        pytest.param(Plan(size=(1024, 768), batch=2, offload=("blocks",), chunks=LARGE), marks=pytest.mark.slow),
        pytest.param(Plan(size=(1024, 1024), quantization="int8", scheme="w8a8", chunks=LARGE), marks=pytest.mark.slow),
        # Small chunks and many windows mean many operations to follow, hence slow: minutes on a busy machine.
        pytest.param(Plan(size=(1024, 1024), dtype="float32"), marks=pytest.mark.slow),
        pytest.param(Plan(size=(768, 512), chunks=SMALL_CHUNKS), marks=pytest.mark.slow),
        pytest.param(Plan(size=(2048, 2048), window=1024, chunks=LARGE), marks=pytest.mark.slow),
        pytest.param(Plan(size=(2048, 1024), window=1024, keep_tokens=False, chunks=LARGE), marks=pytest.mark.slow),
    ],
    ids=lambda plan: f"{plan.size[0]}-{plan.dtype}-{plan.quantization}-{plan.scheme}-{plan.window}-{plan.offload}",
)
def test_the_prediction_is_within_a_tenth_of_what_is_counted(plan: Plan) -> None:
    counted = trace_decode(SMALL, plan)
    assert predict(plan, SMALL, accelerator=False).peak == pytest.approx(counted.total, rel=0.1)


@pytest.mark.parametrize("size", [(512, 512), (1024, 1024)])
def test_a_small_network_is_mostly_the_images_between_its_evaluations(size: tuple[int, int]) -> None:
    tiny, plan = SHALLOW, Plan(size=size, dtype="float32", chunks=LARGE)
    counted = trace_decode(tiny, plan)
    assert predict(plan, tiny, accelerator=False).peak == pytest.approx(counted.total, rel=0.1)


FULL = Plan(size=(2048, 2048), keep_tokens=False, chunks=LARGE)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("plan", "limit"),
    [
        (FULL, 2.9e9),
        (replace(FULL, size=(4096, 4096)), 5.7e9),
        (replace(FULL, keep_tokens=True), 3.0e9),
        (replace(FULL, quantization="int8"), 1.8e9),
        (replace(FULL, quantization="int8", scheme="w8a8"), 1.9e9),
        (replace(FULL, quantization="fp8", scheme="w8a8"), 1.8e9),
        (replace(FULL, offload=("blocks",)), 1.2e9),
        (replace(FULL, quantization="int8", offload=("blocks",)), 1.1e9),
        (replace(FULL, size=(4096, 4096), window=2048, quantization="int8", offload=("blocks",)), 1.8e9),
    ],
)
def test_full_size_decodes_stay_within_their_bars(plan: Plan, limit: float) -> None:
    counted = trace_decode(V15, plan)
    assert counted.total < limit
    assert predict(plan, V15, accelerator=False).peak == pytest.approx(counted.total, rel=0.1)


@pytest.mark.parametrize("gb", [pytest.param(4.0, marks=pytest.mark.slow), 1.7])
def test_eight_bit_weights_and_offload_keep_2048_pixels_within_four_gigabytes(gb: float) -> None:
    plan = plan_decode(V15, (2048, 2048), Machine(memory=int(gb * GB)), quantization="int8")
    assert plan.quantization == "int8" and {"text", "encoder"} <= set(plan.offload) and plan.text_on_host
    assert ("blocks" in plan.offload) == (gb < 2)
    assert plan.window is None
    counted = trace_decode(V15, replace(plan, chunks=LARGE))  # fewer operations to follow, and no less memory
    assert counted.total + DRIVER < 4 * GB
    assert plan.peak <= gb * GB


def test_8192_pixels_in_twelve_gigabytes() -> None:
    plan = plan_decode(V15, (8192, 8192), Machine(memory=12 * GB))
    assert plan.exact and plan.peak <= 12 * GB
    with pytest.raises(DoesNotFitError, match=r"8192x8192 .* would fit"):
        plan_decode(V15, (8192, 8192), Machine(memory=4 * GB))


def test_less_memory_gives_a_plan_that_needs_less() -> None:
    plans = [plan_decode(V15, (2048, 2048), Machine(memory=int(gb * GB))) for gb in (24, 3.2, 2.0, 1.5)]
    assert plans[0].keep_tokens and plans[0].exact
    assert not plans[1].keep_tokens and plans[1].exact
    assert "blocks" in plans[2].offload
    peaks = [plan.peak for plan in plans]
    assert peaks == sorted(peaks, reverse=True)
    assert all(plan.peak <= gb * GB for plan, gb in zip(plans, (24, 3.2, 2.0, 1.5), strict=True))


def test_exact_ways_come_before_those_that_change_the_image() -> None:
    plan = plan_decode(V15, (4096, 4096), Machine(memory=4 * GB))
    assert plan.exact and "blocks" in plan.offload
    tight = plan_decode(V15, (8192, 8192), Machine(memory=int(6.5 * GB)))
    assert not tight.exact


def test_a_processor_offloads_nothing() -> None:
    plan = plan_decode(V15, (2048, 2048), Machine(memory=16 * GB, accelerator=False))
    assert plan.dtype == "float32" and plan.offload == ()
    assert "driver" not in dict(plan.parts)


def test_what_cannot_fit_is_refused_with_what_would() -> None:
    with pytest.raises(DoesNotFitError, match=r"8192x6144 .* would fit"):
        plan_decode(V15, (8192, 6144), Machine(memory=int(2.2 * GB)))
    with pytest.raises(DoesNotFitError, match="No size fits"):
        plan_decode(V15, (1024, 1024), Machine(memory=GB // 4))


def test_settings_that_are_none_are_refused() -> None:
    with pytest.raises(SettingError, match="does not divide"):
        plan_decode(V15, (1000, 1000), Machine(memory=GB))
    with pytest.raises(SettingError, match="dtype is 'int4'"):
        plan_decode(V15, (1024, 1024), Machine(memory=GB), dtype="int4")
    with pytest.raises(SettingError, match="quantization is 'int3'"):
        Plan(size=(64, 64), quantization="int3")  # type: ignore[arg-type]


def test_w8a8_is_only_asked_for_and_only_of_machines_that_have_it() -> None:
    card = Machine(memory=24 * GB, w8a8=("int8", "fp8"))
    assert plan_decode(V15, (1024, 1024), card).scheme == "w8a16"
    assert plan_decode(V15, (1024, 1024), card, scheme="w8a8").quantization == "int8"
    assert plan_decode(V15, (1024, 1024), card, scheme="w8a8", quantization="fp8").quantization == "fp8"
    with pytest.raises(SettingError, match="does not multiply in fp8, only in int8"):
        plan_decode(V15, (1024, 1024), replace(card, w8a8=("int8",)), scheme="w8a8", quantization="fp8")
    with pytest.raises(SettingError, match="does not multiply in eight bits"):
        plan_decode(V15, (1024, 1024), replace(card, w8a8=()), scheme="w8a8")
    with pytest.raises(SettingError, match="multiplies quantized weights"):
        plan_decode(V15, (1024, 1024), card, scheme="w8a8", quantization="none")


def test_a_fixed_quantization_stays() -> None:
    for gb in (24, 3, 2):
        assert plan_decode(V15, (2048, 2048), Machine(memory=gb * GB), quantization="none").quantization == "none"
    with pytest.raises(DoesNotFitError):
        plan_decode(V15, (1024, 1024), Machine(memory=GB), quantization="none")
    assert plan_decode(V15, (1024, 1024), Machine(memory=int(1.05 * GB))).quantization == "int8"


def test_the_text_encoder_runs_on_the_device_where_there_is_room() -> None:
    assert not plan_decode(V15, (1024, 1024), Machine(memory=12 * GB)).text_on_host
    tight = plan_decode(V15, (1024, 1024), Machine(memory=6 * GB))
    assert tight.text_on_host and "text encoder runs on the host" in tight.describe()
    textless = plan_decode(replace(V15, text_dim=0), (1024, 1024), Machine(memory=4 * GB))
    assert textless.offload == ("encoder",) and not textless.text_on_host


def test_a_plan_says_what_it_does() -> None:
    plan = predict(Plan(size=(4096, 3072), offload=("text", "encoder")), V15)
    text = plan.describe()
    assert "4096x3072" in text and "predicted peak" in text and "text encoder, image encoder" in text
    assert "dequantized to multiply (changes the image" in replace(plan, quantization="int8").describe()
    assert "multiplied in eight bits" in replace(plan, quantization="int8", scheme="w8a8").describe()
