# SPDX-License-Identifier: Apache-2.0
"""The decode benchmark: what it reports and under which conditions, what a suite leaves out, and what it refuses."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner

from benchmarks.configs import CONFIGS
from benchmarks.decode import MODES, SIZES, Selection, main, why_not
from benchmarks.gpu import main as benchmark_gpu
from benchmarks.profiler import KINDS, REST, kind_of
from benchmarks.speed import Benchmark, Trial
from pidecode.errors import SettingError

CPU = torch.device("cpu")


def bench(*arguments: str, refused: bool = False) -> Any:
    done = CliRunner().invoke(main, ["--size", "64x64", "--steps", "1", "--repeats", "1", *arguments])
    if refused:
        assert isinstance(done.exception, SettingError)
        return str(done.exception)
    assert done.exit_code == 0, done.output
    return done.output


def trial(**given: Any) -> Trial:
    return Trial(**{"network": "debug", "config": CONFIGS["debug"], "size": (64, 64), "dtype": torch.float32,
                    "device": CPU, **given})  # fmt: skip


def test_figures_come_with_their_conditions(tmp_path: Path) -> None:
    place = tmp_path / "figures.json"
    text = bench("--network", "debug", "--dtype", "float32", "-o", str(place))
    (result,) = json.loads(place.read_text())["results"]
    assert result["mode"] == "eager" and result["first"] is None
    assert result["peak"] > 0 and result["whole"] >= result["step"] > 0 and result["share"] > 0
    assert result["size"] == [64, 64] and result["dtype"] == "float32"
    assert f"commit {result['commit']}; torch {torch.__version__}" in text
    assert "threads" in result["device"]


def test_a_profile_says_what_kind_of_work_takes_the_time() -> None:
    (found,) = json.loads(bench("--network", "debug", "--profile", "--json"))["profiles"]
    assert sum(found["shares"].values()) == pytest.approx(1)
    assert set(found["shares"]) == {*KINDS, REST}
    assert found["shares"]["matrix products"] > 0 and found["shares"][REST] > 0
    assert "aten::" in found["table"]


@pytest.mark.parametrize(
    ("operation", "kind"),
    [
        ("aten::addmm", "matrix products"),
        ("aten::mm", "matrix products"),
        ("aten::_scaled_dot_product_flash_attention_for_cpu", "attention"),
        ("aten::mkldnn_convolution", "convolutions"),
        ("aten::copy_", "copies"),
        ("aten::addcmul", REST),
        ("Command Buffer Full", REST),
    ],
)
def test_kinds_of_work(operation: str, kind: str) -> None:
    assert kind_of(operation) == kind


def test_a_suite_is_every_network_size_and_mode() -> None:
    trials = list(Selection(device=CPU, suite=True).trials())
    assert len(trials) == len(CONFIGS) * len(SIZES) * len(MODES)
    named = list(Selection(device=CPU, suite=True, networks=["v1"], modes=["eager"]).trials())
    assert [one.size for one in named] == list(SIZES)


def test_what_cannot_run_is_left_out_with_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    assert why_not(trial()) is None
    assert "need a CUDA device" in str(why_not(trial(mode="cuda-graphs")))
    assert "GB are free" in str(why_not(trial(network="v1", config=CONFIGS["v1"], size=(4096, 4096)), memory=10**9))
    monkeypatch.setenv("CXX", "no-such-compiler")
    assert "no-such-compiler" in str(why_not(trial(mode="compile")))
    data = json.loads(bench("--suite", "--network", "debug", "--json"))
    assert [result["mode"] for result in data["results"]] == ["eager"]
    assert set(data["skipped"]) == {"debug 64x64 compile", "debug 64x64 cuda-graphs"}


def test_modes_that_were_named_and_cannot_run_are_errors(tmp_path: Path) -> None:
    assert "need a CUDA device" in bench("--mode", "cuda-graphs", refused=True)
    assert "eager mode alone" in bench("--profile", "--reference", str(tmp_path), refused=True)


def test_a_plan_is_measured() -> None:
    text = bench("--network", "debug", "--quantization", "int8", "--json")
    assert json.loads(text)["results"][0]["quantization"] == "int8, w8a16"


@pytest.mark.slow
def test_compiled_code_is_timed_and_not_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    from pidecode.engine.ops.elementwise import CompiledOps

    monkeypatch.setattr("pidecode.engine.runner.CompiledOps", lambda: CompiledOps("eager"))
    measured = Benchmark(trial(mode="compile", steps=1))
    assert measured.peak() is None
    assert measured.step_times


BARE = """
import sys
for name in ("PIL", "numpy", "safetensors", "click", "huggingface_hub", "transformers", "diffusers"):
    sys.modules[name] = None
from benchmarks.gpu import main
main(sys.argv[1:])
"""


def test_the_gpu_benchmark_checks_times_saves_and_resumes(tmp_path: Path) -> None:
    place = tmp_path / "gpu.json"
    root = Path(__file__).resolve().parents[2]
    given = [word for mode in ("eager", "graphs", "int8") for word in ("--mode", mode)]
    arguments = ["-o", str(place), "--device", "cpu", "--size", "64x64", "--size", "96x64", *given, "--network"]
    threads = str(torch.get_num_threads())
    environment = os.environ | {"PYTHONPATH": f"{root}/src:{root}", "OMP_NUM_THREADS": threads}
    done = subprocess.run(
        [sys.executable, "-c", BARE, *arguments, "debug"], capture_output=True, text=True, env=environment, check=False
    )
    text = done.stdout + done.stderr
    rows = json.loads(place.read_text())["rows"]
    kinds = [(row["what"], row["mode"], row["size"]) for row in rows]
    assert kinds[:3] == [("check", mode, [256, 256]) for mode in ("eager", "graphs", "int8")], text
    assert kinds[3:] == [("time", mode, [w, 64]) for w in (64, 96) for mode in ("eager", "int8")]
    assert rows[0]["passed"] and rows[2]["passed"] and "need a CUDA device" in rows[1]["failure"]
    assert all(row["first"] and row["later"] and row["step"] for row in rows[3:])
    assert "| 64 x 64 | eager | torch's choice |" in text
    data = json.loads(place.read_text())
    place.write_text(json.dumps(data | {"rows": rows[:-1]}))
    benchmark_gpu([*arguments, "debug"])
    again = json.loads(place.read_text())["rows"]
    assert again[:-1] == rows[:-1] and len(again) == len(rows)
    with pytest.raises(SettingError, match="name another file"):
        benchmark_gpu([*arguments, "v1.5-narrow"])
