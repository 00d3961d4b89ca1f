# SPDX-License-Identifier: Apache-2.0
"""Whole runs in debug_config: they learn, they resume bit for bit, and whatever stops them leaves nothing broken."""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from pidecode.errors import CheckpointError, FileError, PidecodeError, SettingError, TrainingError
from pidecode.training.checkpoint import newest_checkpoint
from pidecode.training.config import EMAConfig, OptimizerConfig, TrainConfig, apply_settings
from pidecode.training.ema import ema_decay, power_exponent
from pidecode.training.losses import distribution_matching
from pidecode.training.recipes import get_recipe
from pidecode.training.tasks import export, train
from pidecode.training.trainer import lr_factor

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two small images with something to learn in them."""
    place = tmp_path_factory.mktemp("images")
    rows, columns = np.mgrid[0:64, 0:64] / 64
    for index, (first, second) in enumerate(((rows, columns), (columns * rows, 1 - rows))):
        pixels = np.stack((first, second, np.hypot(rows - 0.5, columns - 0.5)), axis=-1)
        Image.fromarray((255 * pixels).astype(np.uint8)).save(place / f"{index}.png")
        (place / f"{index}.txt").write_text(f"image {index}")
    return place


def recipe_for(name: str, images: Path, *settings: str) -> TrainConfig:
    fast = ["data.sizes=((32, 32),)", "run.sample_every=0", "run.log_every=1", "run.checkpoint_every=1000"]
    return apply_settings(get_recipe(name), [f"data.source={str(images)!r}", *fast, *settings])


def metrics(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def mean(records: list[dict[str, Any]], key: str) -> float:
    return sum(record[key] for record in records) / len(records)


OVERFIT = (
    "data.caption_dropout=0", "data.latent_dropout=0", "noise.probability=0", "net.patch_depth=1", "ema.kind=none",
    "optimizer.lr=1e-2", "run.steps=80", "distillation.student_input=teacher_forcing",
)  # fmt: skip


@pytest.mark.parametrize("name", ["debug_direct", "debug_teacher", "debug_backbone"])
def test_a_debug_network_overfits_two_images(name: str, images: Path, tmp_path: Path) -> None:
    # Seen: the loss falls by 1.9 to 2.3, the squared error of the clean image by 2.2 to 3.7.
    train(recipe_for(name, images, *OVERFIT), tmp_path / "run", device=CPU)
    seen = metrics(tmp_path / "run")
    assert mean(seen[:10], "loss") / mean(seen[-10:], "loss") > 1.6
    assert mean(seen[:10], "mse") / mean(seen[-10:], "mse") > 1.8


def test_a_distillation_trains_both_sides(images: Path, tmp_path: Path) -> None:
    settings = [*OVERFIT, "run.steps=12", "distillation.gan_warmup=2", "run.checkpoint_every=1", "run.keep=12"]
    train(recipe_for("debug_student", images, *settings), tmp_path / "run", device=CPU)
    seen = metrics(tmp_path / "run")
    assert {"dmd", "g_loss", "fake", "d_loss", "r1", "grad_norm_net", "grad_norm_fake_score"} <= set(seen[-1])
    folders = sorted((tmp_path / "run" / "checkpoints").iterdir())
    states = [load_file(folder / "tensors.safetensors") for folder in folders]
    for step, (before, after) in enumerate(itertools.pairwise(states), start=1):
        moved = {key.split(".")[1] for key, value in after.items() if not torch.equal(value, before.get(key, value))}
        assert moved & {"net", "fake_score", "discriminator"} == (
            {"net"} if step % 3 == 0 else {"fake_score", "discriminator"}
        )


def test_distribution_matching_leads_an_image_to_the_teachers() -> None:
    # With a fake score that knows the student's image exactly, the gradient points straight at the teacher's.
    teacher = torch.rand(2, 3, 8, 8)
    generated = torch.zeros_like(teacher, requires_grad=True)
    first = (generated - teacher).abs().mean().item()
    for _ in range(40):
        loss = distribution_matching(generated, teacher, generated.detach())
        (gradient,) = torch.autograd.grad(loss, generated)
        with torch.no_grad():
            generated -= 0.02 * gradient * gradient.numel()
    assert first / (generated - teacher).abs().mean().item() > 5


FAST = ("net.patch_depth=1", "run.steps=6", "run.checkpoint_every=3", "data.crop=32", "data.sizes=((64, 64),)")


class Interrupt:
    """Stops a run from outside once it reports a step."""

    def __init__(self, step: int) -> None:
        self.step = step

    def __call__(self, words: str) -> None:
        if words.startswith(f"step {self.step}/"):
            raise KeyboardInterrupt


@pytest.mark.parametrize("name", ["debug_teacher", "debug_student"])
def test_a_resumed_run_equals_an_unbroken_one_bit_for_bit(name: str, images: Path, tmp_path: Path) -> None:
    recipe = recipe_for(name, images, *FAST, "optimizer.grad_accumulation=2")
    whole = train(recipe, tmp_path / "whole", device=CPU)
    with pytest.raises(KeyboardInterrupt):
        train(recipe, tmp_path / "broken", device=CPU, progress=Interrupt(5))
    said: list[str] = []
    resumed = train(recipe, tmp_path / "broken", resume=True, device=CPU, progress=said.append)
    assert "Resuming from step 3." in said
    assert_same_weights(whole, resumed)
    states = [newest_checkpoint(tmp_path / run / "checkpoints") for run in ("whole", "broken")]
    assert states[0] is not None and states[1] is not None
    assert states[0].tensors.keys() == states[1].tensors.keys()
    for key, value in states[0].tensors.items():
        assert torch.equal(value, states[1].tensors[key]), key
    drop = ("images_per_second", "memory_gb")
    plain = [
        [{k: v for k, v in r.items() if k not in drop} for r in metrics(tmp_path / run)] for run in ("whole", "broken")
    ]
    assert plain[0] == plain[1]


@pytest.mark.parametrize(("precision", "multiplies"), [("bfloat16", False), ("bfloat16", True), ("float32", False)])
def test_a_cpu_that_emulates_bfloat16_is_said(
    precision: str, multiplies: bool, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("_is_amx_tile_supported", "_is_avx512_bf16_supported"):
        monkeypatch.setattr(torch.cpu, name, lambda: multiplies, raising=False)
    said: list[str] = []
    recipe = recipe_for("debug_direct", images, *FAST, f"run.precision={precision}", "run.steps=1")
    train(recipe, tmp_path, device=CPU, progress=said.append)
    assert any("run.precision=float32" in line for line in said) == (precision == "bfloat16" and not multiplies)


def assert_same_weights(first: Path, second: Path) -> None:
    one, two = load_file(first), load_file(second)
    assert one.keys() == two.keys()
    for key, value in one.items():
        assert torch.equal(value, two[key]), key


def command(recipe: str, images: Path, out: Path, *settings: str) -> list[str]:
    fast = ["data.sizes=((32, 32),)", "run.sample_every=0", "net.patch_depth=1", *settings]
    pairs = [part for setting in fast for part in ("--set", setting)]
    return [sys.executable, "-m", "pidecode", "train", recipe, "--data", str(images), "--out", str(out), *pairs]


def test_a_run_killed_at_any_moment_goes_on_as_if_it_had_not_been(images: Path, tmp_path: Path) -> None:
    out = tmp_path / "killed"
    process = subprocess.Popen(
        command("debug_teacher", images, out, "run.steps=100000", "run.checkpoint_every=2"),
        stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
    )  # fmt: skip
    try:
        deadline = time.monotonic() + 120
        while not list((out / "checkpoints").glob("step-0000000[4-9]")) and time.monotonic() < deadline:
            assert process.poll() is None
            time.sleep(0.02)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    stored = newest_checkpoint(out / "checkpoints")
    assert stored is not None
    until = stored.step + 2
    recipe = recipe_for("debug_teacher", images, "net.patch_depth=1", f"run.steps={until}")
    (
        out / "checkpoints" / ".step-00000009.0123abcd.pidecode.part"
    ).mkdir()  # what a kill in the middle of saving leaves
    resumed = train(recipe, out, resume=True, device=CPU)
    assert not list((out / "checkpoints").glob("*.part"))
    assert_same_weights(resumed, train(recipe, tmp_path / "whole", device=CPU))


def test_a_damaged_checkpoint_is_passed_over_and_named(images: Path, tmp_path: Path) -> None:
    recipe = recipe_for("debug_direct", images, *FAST)
    train(recipe, tmp_path / "run", device=CPU)
    newest = tmp_path / "run" / "checkpoints" / "step-00000006" / "tensors.safetensors"
    newest.write_bytes(newest.read_bytes()[:1000])
    said: list[str] = []
    stored = newest_checkpoint(tmp_path / "run" / "checkpoints", said.append)
    assert stored is not None and stored.step == 3
    assert "is damaged and skipped" in said[0]


@pytest.mark.parametrize("file", ["tensors.safetensors", "state.json"])
def test_one_flipped_bit_is_noticed(file: str, images: Path, tmp_path: Path) -> None:
    recipe = recipe_for("debug_direct", images, *FAST)
    train(recipe, tmp_path / "run", device=CPU)
    path = tmp_path / "run" / "checkpoints" / "step-00000006" / file
    content = bytearray(path.read_bytes())
    content[-40] ^= 1
    path.write_bytes(content)
    said: list[str] = []
    stored = newest_checkpoint(tmp_path / "run" / "checkpoints", said.append)
    assert stored is not None and stored.step == 3
    assert f"{file} has changed since it was written" in said[0]


def test_without_a_complete_checkpoint_a_run_does_not_start_again_in_silence(images: Path, tmp_path: Path) -> None:
    recipe = recipe_for("debug_direct", images, *FAST, "run.steps=1")
    train(recipe, tmp_path / "run", device=CPU)
    (folder,) = (tmp_path / "run" / "checkpoints").iterdir()
    (folder / "SHA256SUMS").unlink()
    with pytest.raises(
        CheckpointError, match=r"No checkpoint in .* is complete .*SHA256SUMS.* Restore one from a copy"
    ):
        train(recipe, tmp_path / "run", resume=True, device=CPU)


def test_a_checkpoint_that_lacks_a_key_is_refused_with_a_sentence(images: Path, tmp_path: Path) -> None:
    recipe = recipe_for("debug_direct", images, *FAST, "run.steps=1")
    train(recipe, tmp_path / "run", device=CPU)
    stored = newest_checkpoint(tmp_path / "run" / "checkpoints")
    assert stored is not None
    (folder,) = (tmp_path / "run" / "checkpoints").iterdir()

    def resume_with(tensors: dict[str, torch.Tensor], state: dict[str, Any]) -> None:
        save_file(tensors, folder / "tensors.safetensors")
        (folder / "state.json").write_text(json.dumps(state))
        names = ("tensors.safetensors", "state.json")
        sums = [f"{hashlib.sha256((folder / name).read_bytes()).hexdigest()}  {name}\n" for name in names]
        (folder / "SHA256SUMS").write_text("".join(sums))
        train(recipe, tmp_path / "run", resume=True, device=CPU)

    state = json.loads((folder / "state.json").read_text())
    with pytest.raises(CheckpointError, match="does not hold the number of steps"):
        resume_with(stored.tensors, {"format": 1})
    for key in ("rng.cpu", next(key for key in stored.tensors if key.startswith("weights."))):
        with pytest.raises(CheckpointError, match=r"lacks the tensor rng\.cpu|is of another network or method"):
            resume_with({name: value for name, value in stored.tensors.items() if name != key}, state)
    odd = {"optimizer.net.nowhere/exp_avg": torch.zeros(1)}
    with pytest.raises(CheckpointError, match=r"optimizer state of net\.nowhere"):
        resume_with(stored.tensors | odd, state)


def test_two_runs_in_one_folder_do_not_both_write(images: Path, tmp_path: Path) -> None:
    recipe = recipe_for("debug_direct", images, *FAST, "run.steps=2")
    refused: list[str] = []

    def start_another(text: str) -> None:
        if text.startswith("step 1/"):
            before = sorted((path, path.stat().st_mtime_ns) for path in (tmp_path / "run").rglob("*"))
            with pytest.raises(FileError, match=r"is in use by a training: process \d+ on ") as info:
                train(recipe, tmp_path / "run", resume=True, device=CPU)
            refused.append(str(info.value))
            assert sorted((path, path.stat().st_mtime_ns) for path in (tmp_path / "run").rglob("*")) == before

    train(recipe, tmp_path / "run", device=CPU, progress=start_another)
    assert len(refused) == 1
    assert not list((tmp_path / "run").glob("*.lock"))


def test_a_place_that_cannot_be_written_is_noticed_before_a_network_is_built(
    images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setattr("pidecode.training.tasks.build_task", None)
    for place in (tmp_path / "file" / "run", tmp_path / ("x" * 300)):
        with pytest.raises(FileError, match="cannot be created"):
            train(recipe_for("debug_direct", images), place, device=CPU)


@pytest.mark.parametrize("source", ["x" * 300, "a\0b", "~nosuchuser/images"])
def test_a_source_that_is_no_path_is_refused_with_a_sentence(source: str, images: Path, tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match=r"cannot be read|There are no images at"):
        train(replace_source(recipe_for("debug_direct", images), source), tmp_path / "run", device=CPU)


def replace_source(recipe: TrainConfig, source: str) -> TrainConfig:
    return replace(recipe, data=replace(recipe.data, source=source))


def test_a_folder_with_a_run_is_not_overwritten_and_another_recipe_is_refused(images: Path, tmp_path: Path) -> None:
    recipe = recipe_for("debug_direct", images, *FAST, "run.steps=1")
    train(recipe, tmp_path / "run", device=CPU)
    with pytest.raises(SettingError, match=r"holds a run already; continue it with --resume"):
        train(recipe, tmp_path / "run", device=CPU)
    other = apply_settings(recipe, ["net.adapter_width=16"])
    with pytest.raises(CheckpointError, match=r"is of another network or method"):
        train(other, tmp_path / "run", resume=True, device=CPU)


def test_changed_images_are_told(images: Path, tmp_path: Path) -> None:
    own = tmp_path / "images"
    shutil.copytree(images, own)
    train(recipe_for("debug_direct", own, *FAST, "run.steps=1"), tmp_path / "run", device=CPU)
    (own / "1.png").unlink()
    said: list[str] = []
    longer = recipe_for("debug_direct", own, *FAST, "run.steps=2")
    train(longer, tmp_path / "run", resume=True, device=CPU, progress=said.append)
    assert any("The images have changed" in line for line in said)


def test_nan_stops_clearly_and_spares_what_was_saved(images: Path, tmp_path: Path) -> None:
    good = recipe_for("debug_direct", images, *FAST, "run.steps=2")
    train(good, tmp_path / "run", device=CPU)

    def encode(low: torch.Tensor) -> torch.Tensor:
        return torch.full((len(low), 16, low.shape[-2] // 8, low.shape[-1] // 8), float("nan"))

    bad = replace(good, encode=encode, run=replace(good.run, steps=5))
    with pytest.raises(TrainingError, match=r"became NaN or infinite at step 3 \(images here: .*step 2 is complete"):
        train(bad, tmp_path / "run", resume=True, device=CPU)
    stored = newest_checkpoint(tmp_path / "run" / "checkpoints")
    assert stored is not None and stored.step == 2
    assert all(torch.isfinite(value).all() for value in stored.tensors.values() if value.is_floating_point())


@pytest.mark.skipif(os.name == "nt", reason="limits of a process's file size are a POSIX matter")
def test_a_full_disk_stops_clearly_and_leaves_no_half_checkpoint(images: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    settings = ["run.steps=4", "run.checkpoint_every=2"]
    start = (
        "import resource, sys; resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, 200_000));"
        "from pidecode.cli.app import main; main()"
    )
    line = command("debug_direct", images, out, *settings)
    done = subprocess.run([sys.executable, "-c", start, *line[3:]], capture_output=True, text=True, check=False)
    assert done.returncode == TrainingError.exit_code, done.stderr
    assert "could not be written" in done.stderr
    assert "--resume" in done.stderr
    assert list((out / "checkpoints").iterdir()) == []


def test_the_command_lists_shows_and_refuses() -> None:
    from click.testing import CliRunner

    from pidecode.cli.train import train as command_line

    runner = CliRunner()
    listed = runner.invoke(command_line, ["--list"])
    assert listed.exit_code == 0 and "student_rollout" in listed.output
    shown = runner.invoke(command_line, ["debug_teacher", "--show", "--set", "data.batch_size=7"])
    assert "data.batch_size = 7\n    images per process and forward pass" in shown.output
    assert isinstance(runner.invoke(command_line, ["debug_teecher"]).exception, SettingError)
    assert isinstance(runner.invoke(command_line, ["debug_teacher"]).exception, SettingError)


def test_the_command_prints_where_the_result_is(images: Path, tmp_path: Path) -> None:
    from click.testing import CliRunner

    from pidecode.cli.train import train as command_line

    run = ["debug_direct", "--data", str(images), "--out", str(tmp_path), "--set", "run.steps=1"]
    result = str(tmp_path / "decoder.safetensors")
    sizes = ["--set", "data.sizes=((32, 32),)"]
    for line in ([*run, *sizes], [*run, *sizes, "--export"]):
        done = CliRunner().invoke(command_line, line, catch_exceptions=False)
        assert done.stdout.splitlines()[-1] == result


def test_a_recipe_of_ones_own_file_is_found(tmp_path: Path) -> None:
    path = tmp_path / "mine.py"
    path.write_text(
        "from dataclasses import replace\nfrom pidecode.training.recipes import debug_direct\n"
        "def my_decoder():\n    return replace(debug_direct(), title='mine')\ndef other():\n    return 3\n"
    )
    assert get_recipe(f"{path}:my_decoder").title == "mine"
    with pytest.raises(SettingError, match="returns int, not a TrainConfig"):
        get_recipe(f"{path}:other")
    with pytest.raises(SettingError, match="has no function 'third'"):
        get_recipe(f"{path}:third")


def test_samples_and_export_without_training_on(images: Path, tmp_path: Path) -> None:
    settings = [*FAST, "run.sample_every=3", "run.num_samples=2", "run.sample_steps=2", "run.trackers=tensorboard"]
    recipe = recipe_for("debug_teacher", images, *settings)
    made = train(recipe, tmp_path / "run", device=CPU)
    with Image.open(tmp_path / "run" / "samples" / "step-00000003.png") as grid:
        assert grid.size == (3 * 68, 2 * 68)
    assert list((tmp_path / "run" / "tensorboard").iterdir())
    kept = made.rename(tmp_path / "before.safetensors")
    assert_same_weights(export(recipe, tmp_path / "run"), kept)


def test_the_result_is_a_decoder(images: Path, tmp_path: Path) -> None:
    from pidecode.weights.detect import detect
    from pidecode.weights.load import build_network
    from pidecode.weights.read import read_weights

    path = train(recipe_for("debug_direct", images, *FAST, "run.steps=1"), tmp_path / "run", device=CPU)
    file = read_weights(path)
    identity = detect(file)
    assert (identity.kind, identity.space) == ("student", "block-dct")
    assert identity.config is not None
    net = build_network(dict(file.tensors), identity.config)
    image = net(torch.zeros(1, 3, 32, 32), torch.tensor([999.0]), torch.zeros(1, 10, 16), torch.zeros(1, 16, 1, 1), 0.0)
    assert image.shape == (1, 3, 32, 32)


def test_the_power_average_follows_training_time() -> None:
    exponent = power_exponent(0.1)
    assert exponent == pytest.approx(6.9372, abs=1e-4)  # golden notes, section 9
    settings = EMAConfig()
    assert ema_decay(settings, 9) == pytest.approx((1 - 1 / 10) ** (exponent + 1))
    weights = torch.zeros(200)
    for step in range(1, 200):
        weights *= ema_decay(settings, step)
        weights[step] = 1 - ema_decay(settings, step)
    weights /= weights.sum()
    times = torch.arange(200.0)
    center = (weights * times).sum()
    spread = ((weights * (times - center) ** 2).sum().sqrt() / 200).item()
    assert spread == pytest.approx(0.1, abs=0.01)


def test_the_rate_warms_up_and_falls() -> None:
    assert [lr_factor(OptimizerConfig(warmup_steps=4), step, 100) for step in (0, 1, 3, 50)] == [0.25, 0.5, 1.0, 1.0]
    falling = [lr_factor(OptimizerConfig(lr_schedule="cosine"), step, 100) for step in (0, 50, 100)]
    assert falling == pytest.approx([1.0, 0.5, 0.0])


LONG = "x" * 300


@pytest.mark.parametrize(
    "changed",
    [
        ["--out", LONG, "--export"],
        ["--set", f"init_from=/tmp/{LONG}"],
        [f"{LONG}.py:recipe"],
        ["--set", f"run.seed={'9' * 5000}"],
    ],
    ids=["export", "init_from", "recipe", "digits"],
)
def test_names_and_numbers_that_are_too_long_end_with_a_sentence(
    changed: list[str], images: Path, tmp_path: Path
) -> None:
    from click.testing import CliRunner

    from pidecode.cli.train import train as command_line

    recipe = [] if changed[0].endswith("recipe") else ["debug_direct"]
    done = CliRunner().invoke(command_line, [*recipe, "--data", str(images), "--out", str(tmp_path / "run"), *changed])
    assert isinstance(done.exception, PidecodeError)
    assert len(str(done.exception)) < 1000
