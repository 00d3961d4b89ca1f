# SPDX-License-Identifier: Apache-2.0
"""Attention kernels against the reference implementation, in eight bits too, and how the fastest is chosen."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import get_args

import pytest
import torch
from torch import Tensor

from pidecode.engine.ops.quantize import EIGHT_BIT_TOLERANCE, EightBitAttention, reference_int8_attention
from pidecode.engine.runner import Runner
from pidecode.errors import SettingError
from pidecode.models.attention import (
    BACKENDS,
    PACKAGES,
    AttentionKernel,
    MeasuredAttention,
    attention,
    exact_kernels,
    is_right,
    kernel_works,
    read_record,
    reference_attention,
    use_kernel,
)
from pidecode.options import Attention, RuntimeOptions
from pidecode.registry.configs import debug_config
from random_networks import random_net

CPU = torch.device("cpu")


def heads(*shape: int) -> tuple[Tensor, Tensor, Tensor]:
    q, k, v = torch.randn(3, *shape, generator=torch.Generator().manual_seed(0)).unbind(0)
    return q, k, v


def wrong(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return reference_attention(q, k, v) * float("nan")


def missing(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    raise RuntimeError("no kernel for this device")


class Clock:
    """Gives each kernel the time that was set for it, and counts what it was asked for."""

    def __init__(self, **times: float) -> None:
        self.times, self.asked = times, 0

    def __call__(self, run: Callable[[], Tensor], device: torch.device) -> float:
        self.asked += 1
        return self.times[run.func.__name__]  # type: ignore[attr-defined]


def quick(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return reference_attention(q, k, v)


def slow(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return reference_attention(q, k, v)


KERNELS: dict[str, AttentionKernel] = {"missing": missing, "wrong": wrong, "slow": slow, "quick": quick}


@pytest.mark.parametrize("head_dim", [8, 64, 72])
def test_the_default_equals_the_reference(head_dim: int) -> None:
    q, k, v = heads(2, 3, 37, head_dim)
    assert torch.allclose(
        attention(q, k[:, :, :20], v[:, :, :20]), reference_attention(q, k[:, :, :20], v[:, :, :20]), atol=1e-5
    )


@pytest.mark.parametrize("name", ["flash", "math"])
def test_named_kernels_equal_the_reference(name: str) -> None:
    q, k, v = heads(1, 2, 50, 64)
    with use_kernel(exact_kernels()[name]):
        assert torch.allclose(attention(q, k, v), reference_attention(q, k, v), atol=1e-5)
    assert kernel_works(exact_kernels()[name], 64, torch.float32, CPU, 1e-4)
    assert not kernel_works(exact_kernels()["cudnn"], 64, torch.float32, CPU, 1e-4)


def test_the_fastest_right_kernel_is_chosen_once_for_each_shape_and_remembered(tmp_path: Path) -> None:
    record, clock = tmp_path / "cache" / "attention.json", Clock(quick=1.0, slow=2.0)
    measured = MeasuredAttention(KERNELS, record=record, seconds=clock)
    for tokens in (40, 64, 37, 65):
        q, k, v = heads(1, 2, tokens, 16)
        assert torch.equal(measured(q, k, v), reference_attention(q, k, v))
    assert measured.chosen == dict.fromkeys(
        ("float32, heads of 16, 64 tokens", "float32, heads of 16, 128 tokens"), "quick"
    )
    assert clock.asked == 2 * 2 * 3  # two shapes, two kernels that are right, three rounds
    ((machine, shapes),) = read_record(record).items()
    assert machine == f"cpu, torch {torch.__version__}: missing wrong slow quick"
    assert shapes["float32, heads of 16, 64 tokens"]["seconds"] == {"slow": 2.0, "quick": 1.0}
    again = MeasuredAttention(KERNELS, record=record, seconds=Clock())
    again(*heads(1, 2, 50, 16))
    # One that is not right any more, as with another driver, is measured again.
    broken = MeasuredAttention({**KERNELS, "quick": wrong}, record=record, seconds=Clock(slow=2.0))
    broken(*heads(1, 2, 50, 16))
    assert list(broken.chosen.values()) == ["slow"]
    MeasuredAttention(KERNELS, record=record, seconds=Clock(quick=1.0, slow=2.0))(*heads(1, 2, 50, 16))
    # A package installed since is measured, and beside it what was.
    more = MeasuredAttention({**KERNELS, "new": quick}, record=record, seconds=Clock(quick=3.0, slow=1.0))
    more(*heads(1, 2, 50, 16))
    assert list(more.chosen.values()) == ["slow"] and len(read_record(record)) == 2


@pytest.mark.parametrize("content", ["", "[]", '{"cpu": 1}', '{"cpu": {"a": {}}}', '{"cpu": {"a": {"kernel": 1}}}'])
def test_a_record_that_is_damaged_or_cannot_be_written_is_measured_again(tmp_path: Path, content: str) -> None:
    record = tmp_path / "attention.json"
    record.write_text(content)
    MeasuredAttention(KERNELS, record=record, seconds=Clock(quick=1.0, slow=2.0))(*heads(1, 2, 9, 16))
    (entry,) = next(iter(json.loads(record.read_text()).values())).values()
    assert entry["kernel"] == "quick"
    blocked = MeasuredAttention(KERNELS, record=record / "below", seconds=Clock(quick=1.0, slow=2.0))
    blocked(*heads(1, 2, 9, 16))
    assert list(blocked.chosen.values()) == ["quick"]


def test_math_is_for_where_nothing_else_works() -> None:
    bad: dict[str, AttentionKernel] = {"missing": missing, "wrong": wrong}
    q, k, v = heads(1, 2, 9, 16)
    with pytest.warns(UserWarning, match="has no fast kernel that works"):
        out = MeasuredAttention({**bad, "math": exact_kernels()["math"]})(q, k, v)
    assert torch.allclose(out, reference_attention(q, k, v), atol=1e-5)
    with pytest.raises(SettingError, match="None of missing, wrong gives a right result on cpu"):
        MeasuredAttention(bad)(q, k, v)


def test_a_result_that_is_wrong_in_some_rows_is_seen() -> None:
    q, k, v = heads(1, 3, 64, 16)
    out = reference_attention(q, k, v)
    assert is_right(out, q, k, v, 1e-5)
    out[:, 1, 63] += 1
    assert not is_right(out, q, k, v, 1e-2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("offset", [0.0, 20.0])
def test_attention_in_int8_is_as_exact_as_stated(dtype: torch.dtype, offset: float) -> None:
    q, k, v = heads(1, 2, 300, 64)
    k = k + offset * torch.linspace(-1, 1, 64)  # channels that are large for every token
    q, k, v = (x.to(dtype) for x in (q, k, v))
    exact, out = reference_attention(q, k, v).float(), reference_int8_attention(q, k, v)
    assert out.dtype == dtype
    assert (out.float() - exact).std() < 0.02 * exact.std()
    assert is_right(out, q, k, v, EIGHT_BIT_TOLERANCE)


def test_heads_that_gain_nothing_stay_exact() -> None:
    both = EightBitAttention(wrong, quick)
    assert both(*heads(1, 2, 9, 72)).isfinite().all()
    assert both(*heads(1, 2, 9, 64)).isnan().all()


def test_a_choice_that_cannot_act_is_refused() -> None:
    runner = Runner(random_net(debug_config()), attention="int8")
    with pytest.raises(SettingError, match=r"int8 acts on heads of \(64, 128\) channels; this has none"):
        runner.require(CPU)
    wide = random_net(debug_config(hidden_size=128, num_heads=2))
    with pytest.raises(SettingError, match=r"'int8' does not work on cpu .* needs a GPU"):
        Runner(wide, attention="int8").require(CPU)
    with pytest.raises(SettingError, match="'cudnn' does not work on cpu"):
        Runner(wide, attention="cudnn").require(CPU)
    with pytest.raises(SettingError, match="attention is 'magic'; it must be one of auto, cudnn"):
        RuntimeOptions(attention="magic")  # type: ignore[arg-type]
    with pytest.raises(SettingError, match="There is no attention 'magic' here; there are auto, "):
        Runner(wide, attention="magic").require(CPU)
    with pytest.raises(SettingError, match="no attention 'flash-3' here without the package flash_attn_interface"):
        Runner(wide, attention="flash-3").require(CPU)


def test_the_options_name_every_kernel() -> None:
    assert set(get_args(Attention)) == {"auto", "int8", *BACKENDS, *PACKAGES}


def test_a_meta_tensor_stands_for_a_streaming_kernel() -> None:
    q = torch.empty(1, 2, 10, 8, device="meta")
    assert attention(q, q, q).shape == q.shape
