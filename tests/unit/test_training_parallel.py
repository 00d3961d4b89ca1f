# SPDX-License-Identifier: Apache-2.0
"""Two processes against one: the same gradients to rounding, the same weights, and a clear stop when one is lost."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from pidecode.errors import SettingError, TrainingError
from pidecode.training.config import apply_settings
from pidecode.training.denoiser import RowSharding
from pidecode.training.distributed import DistEnv, init_distributed
from pidecode.training.recipes import get_recipe
from training_worker import CPU, gradients

TESTS = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("images")
    for index in range(4):
        pixels = np.random.default_rng(index).integers(0, 256, (64, 64, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(place / f"{index}.png")
        (place / f"{index}.txt").write_text(f"image {index}")
    return place


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def start(words: list[str], processes: int = 2) -> list[subprocess.Popen[str]]:
    """Start the same program in several processes, as torchrun would."""
    common = {**os.environ, "WORLD_SIZE": str(processes), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    path = os.pathsep.join([*sys.path, str(TESTS)])
    return [
        subprocess.Popen(
            [sys.executable, *words],
            env={**common, "RANK": str(rank), "LOCAL_RANK": str(rank), "PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )
        for rank in range(processes)
    ]  # fmt: skip


def finish(started: list[subprocess.Popen[str]], limit: float = 900) -> list[tuple[int, str]]:
    try:
        ends = [process.communicate(timeout=limit) for process in started]
    except subprocess.TimeoutExpired:
        for process in started:
            process.kill()
        ends = [process.communicate() for process in started]
    return [(process.returncode, end[1]) for process, end in zip(started, ends, strict=True)]


PLAIN = ["net.patch_depth=2", "data.sizes=((64, 64),)", "data.caption_dropout=0"]
# The color loss is a weighted mean over each process's own images, as in the reference: of a batch in two parts it
# is another number. Everything else is a mean over images.
SPLIT = ["teacher.color_weight=0"]
CASES: dict[str, tuple[str, int, list[str], list[str], list[str]]] = {
    # recipe, iteration, settings of both, of two processes, of one
    "copied": ("debug_teacher", 0, SPLIT, ["data.batch_size=1"], ["data.batch_size=2"]),
    "copied and accumulated": (
        "debug_teacher", 0, [*SPLIT, "optimizer.grad_accumulation=2", "run.activation_checkpointing=true"],
        ["data.batch_size=1"], ["data.batch_size=2"],
    ),
    "sharded": ("debug_teacher", 0, SPLIT, ["data.batch_size=1", "parallel.weights=shard"], ["data.batch_size=2"]),
    "one image over two": ("debug_teacher", 0, ["data.batch_size=2"], ["parallel.context_parallel=2"], []),
    "one image over two, sharded and recomputed": (
        "debug_teacher", 0, ["data.batch_size=2", "run.activation_checkpointing=true"],
        ["parallel.context_parallel=2", "parallel.weights=shard"], [],
    ),
    "student copied": ("debug_student", 6, [], ["data.batch_size=1"], ["data.batch_size=2"]),
    "student sharded": ("debug_student", 6, [], ["data.batch_size=1", "parallel.weights=shard"], ["data.batch_size=2"]),
    "student over two": ("debug_student", 6, ["data.batch_size=2"], ["parallel.context_parallel=2"], []),
    "fake score copied": ("debug_student", 7, [], ["data.batch_size=1"], ["data.batch_size=2"]),
    "fake score sharded": (
        "debug_student", 7, [], ["data.batch_size=1", "parallel.weights=shard"], ["data.batch_size=2"],
    ),
    "fake score over two": ("debug_student", 7, ["data.batch_size=2"], ["parallel.context_parallel=2"], []),
    "rollout over two": (
        "debug_student", 6, ["data.batch_size=2", "distillation.student_input=self_rollout"],
        ["parallel.context_parallel=2"], [],
    ),
}  # fmt: skip


@pytest.mark.slow
def test_two_processes_have_the_gradients_of_one(images: Path, tmp_path: Path) -> None:
    source = f"data.source={str(images)!r}"
    words: list[str] = []
    for name, step, shared, double, _ in CASES.values():
        words += ["--", name, str(step), source, *PLAIN, *shared, *double]
    ends = finish(start([str(TESTS / "training_worker.py"), str(tmp_path), *words[1:]]))
    assert [code for code, _ in ends] == [0, 0], "\n".join(text for _, text in ends)
    for index, (case, (name, step, shared, _, single)) in enumerate(CASES.items()):
        recipe = apply_settings(get_recipe(name), [source, *PLAIN, *shared, *single])
        expected = gradients(recipe, DistEnv(CPU), step)
        found = load_file(tmp_path / f"{index}.safetensors")
        assert found.keys() == expected.keys(), case
        for key, value in expected.items():
            error = (found[key] - value).abs().max().item()
            assert error <= 2e-5 * max(value.abs().max().item(), 1e-3), (case, key, error, value.abs().max().item())


def train_words(images: Path, out: Path, *settings: str) -> list[str]:
    pairs = [
        part
        for setting in [*PLAIN, *SPLIT, "run.sample_every=2", "run.sample_steps=2", *settings]
        for part in ("--set", setting)
    ]
    return ["-m", "pidecode", "train", "debug_teacher", "--data", str(images), "--out", str(out), *pairs]


@pytest.mark.slow
@pytest.mark.parametrize(
    "parallel",
    [["data.batch_size=1"], ["data.batch_size=1", "parallel.weights=shard"], ["parallel.context_parallel=2"]],
)
def test_a_run_of_two_ends_like_one_and_can_go_on_alone(parallel: list[str], images: Path, tmp_path: Path) -> None:
    length = ["run.steps=4", "run.checkpoint_every=2", "run.num_samples=1"]
    ends = finish(start(train_words(images, tmp_path / "two", *length, *parallel)))
    assert [code for code, _ in ends] == [0, 0], "\n".join(text for _, text in ends)
    ends = finish(start(train_words(images, tmp_path / "one", *length), processes=1))
    assert ends[0][0] == 0, ends[0][1]
    two, one = (load_file(tmp_path / run / "decoder.safetensors") for run in ("two", "one"))
    for key, value in one.items():
        # AdamW turns the rounding of tiny gradients into steps of the size of the rate (3e-3, still warming up).
        assert (two[key] - value).abs().max().item() < 2e-3, key
    longer = train_words(images, tmp_path / "two", "run.steps=5", "run.num_samples=1")
    ends = finish(start([*longer, "--resume"], processes=1))
    assert ends[0][0] == 0, ends[0][1]
    assert "Resuming from step 4." in ends[0][1]


@pytest.mark.slow
def test_a_lost_process_is_named_and_what_was_saved_is_whole(images: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    both = start(train_words(images, out, "run.steps=100000", "run.checkpoint_every=2", "parallel.timeout=120"))
    deadline = time.monotonic() + 600
    while not list((out / "checkpoints").glob("step-*")) and time.monotonic() < deadline:
        assert both[0].poll() is None
        time.sleep(0.05)
    both[1].kill()
    ends = finish(both)
    assert ends[0][0] == TrainingError.exit_code, ends[0][1]
    assert "Another process was lost" in ends[0][1]
    ends = finish(start([*train_words(images, out, "run.steps=3"), "--export"], processes=1))
    assert ends[0][0] == 0, ends[0][1]


def test_processes_that_cannot_share_a_image_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = apply_settings(get_recipe("debug_teacher"), ["parallel.context_parallel=2"])
    monkeypatch.setenv("WORLD_SIZE", "3")
    with pytest.raises(SettingError, match="does not divide 3 processes"), init_distributed(recipe.parallel, CPU):
        pass
    with pytest.raises(SettingError, match="pixel rows do not divide over parallel.context_parallel=5"):
        RowSharding(0, 5, None).rows(torch.zeros(1, 3, 64, 64))
