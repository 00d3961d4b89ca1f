# SPDX-License-Identifier: Apache-2.0
"""Plans: predictions against counted tensors, what is tried in which order, and what a refusal says."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from pidecode.errors import DoesNotFitError, SettingError
from pidecode.facts.architecture import NetConfig, v1, v1pt5
from pidecode.kernels.chunks import Chunks
from pidecode.measure.memory import Job, trace_decode, weight_bytes
from pidecode.model.network import PixelNet
from pidecode.model.schedule import slim
from pidecode.planner import GB, Machine, Plan, parameters, parse_bytes, parse_size, plan_decode, predict

V15 = v1pt5(latent_channels=16, latent_down=8)
SMALL = NetConfig(
    hidden_size=256, num_heads=4, patch_depth=6, pixel_attn_hidden_size=192, pixel_num_heads=4, adapter_width=256,
    adapter_padding="replicate", gate="per_token", inject_pixels=True, rope_reference=(2048, 2048),
)  # fmt: skip


@pytest.mark.parametrize("config", [V15, v1(latent_channels=16, latent_down=8), SMALL], ids=["v1.5", "v1", "small"])
@pytest.mark.parametrize("slimmed", [True, False])
def test_parameters_are_counted_without_building(config: NetConfig, slimmed: bool) -> None:
    with torch.device("meta"):
        net = PixelNet(config)
    if slimmed:
        slim(net)
    assert sum(parameters(config, slimmed=slimmed)) == pytest.approx(weight_bytes(net) / 4, rel=1e-3)


@pytest.mark.parametrize(
    ("size", "dtype", "keep", "chunks"),
    [
        # Small chunks mean many operations to follow, hence slow: minutes on a busy machine.
        pytest.param((1024, 1024), "float32", True, Chunks(), marks=pytest.mark.slow),
        ((1024, 1024), "bfloat16", False, Chunks.large(16)),
        pytest.param(
            (768, 512), "bfloat16", True, Chunks(tokens=256, tile_tokens=128, tile_rows=2), marks=pytest.mark.slow
        ),
    ],
)
def test_the_prediction_is_within_a_tenth_of_what_is_counted(
    size: tuple[int, int], dtype: str, keep: bool, chunks: Chunks
) -> None:
    counted = trace_decode(SMALL, size, Job(dtype=getattr(torch, dtype), keep_tokens=keep, chunks=chunks))
    plan = Plan(size=size, dtype=dtype, keep_tokens=keep, chunks=chunks)
    assert predict(plan, SMALL, accelerator=False).peak == pytest.approx(counted.total, rel=0.1)


@pytest.mark.slow
@pytest.mark.parametrize(("side", "limit"), [(2048, 2.9e9), (4096, 5.7e9)])
def test_full_size_decodes_stay_within_their_bars(side: int, limit: float) -> None:
    counted = trace_decode(V15, (side, side), Job(keep_tokens=False))
    assert counted.total < limit
    plan = Plan(size=(side, side), keep_tokens=False, chunks=Chunks.large(16))
    assert predict(plan, V15, accelerator=False).peak == pytest.approx(counted.total, rel=0.1)


def test_less_memory_gives_a_sparer_plan() -> None:
    plans = [plan_decode(V15, (2048, 2048), Machine(memory=int(gb * GB))) for gb in (24, 3.2, 2.0, 1.5)]
    assert plans[0].keep_tokens and plans[0].exact
    assert not plans[1].keep_tokens and plans[1].exact
    assert "blocks" in plans[2].offload
    peaks = [plan.peak for plan in plans]
    assert peaks == sorted(peaks, reverse=True)
    assert all(plan.peak <= gb * GB for plan, gb in zip(plans, (24, 3.2, 2.0, 1.5), strict=True))


def test_exact_ways_come_before_those_that_change_the_picture() -> None:
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


def test_a_plan_says_what_it_does() -> None:
    plan = predict(Plan(size=(4096, 3072), offload=("text", "encoder")), V15)
    text = plan.describe()
    assert "4096x3072" in text and "predicted peak" in text and "text, encoder" in text
    assert "changes the picture" in replace(plan, weights="int8").describe()


@pytest.mark.parametrize(
    ("text", "size"), [("12GB", 12 * GB), ("800 mb", 8 * 10**8), ("1.5GiB", 3 * 2**29), ("7", 7), ("2k", 2000)]
)
def test_amounts_of_memory(text: str, size: int) -> None:
    assert parse_bytes(text) == size


def test_unreadable_amounts_and_sizes() -> None:
    with pytest.raises(SettingError, match="no amount of memory"):
        parse_bytes("much")
    with pytest.raises(SettingError, match="no size"):
        parse_size("big")
    assert parse_size("4096x3072") == (4096, 3072)
