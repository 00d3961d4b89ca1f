# SPDX-License-Identifier: Apache-2.0
"""`pidecode models`, `pull` and `doctor`: what is listed, what is refused, what is said about this machine."""

from __future__ import annotations

import json
import os
import shlex
import tomllib
from pathlib import Path

import click
import pytest
import torch
from click.shell_completion import ShellComplete
from click.testing import CliRunner, Result
from PIL import Image
from safetensors.torch import save_file

from pidecode.cli.app import COMMANDS, cli
from pidecode.cli.common import GroupedCommand, emit
from pidecode.cli.doctor import EXTRAS
from pidecode.engine.machine import Machine
from pidecode.engine.plan import plan_decode
from pidecode.engine.runner import measured_step_seconds
from pidecode.registry.checkpoints import CHECKPOINTS, ENCODERS, REPOSITORY, get_checkpoint
from pidecode.registry.configs import debug_config


def run(*arguments: str) -> Result:
    return CliRunner().invoke(cli, list(arguments))


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty hub cache; files are put into it as the hub's library lays them out."""
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    return tmp_path


def put(hub: Path, repository: str, path: str, content: bytes = b"x") -> Path:
    home = hub / f"models--{repository.replace('/', '--')}"
    place = home / "snapshots" / ("0" * 40) / path
    place.parent.mkdir(parents=True)
    place.write_bytes(content)
    (home / "refs").mkdir(exist_ok=True)
    (home / "refs" / "main").write_text("0" * 40)
    return place


def test_everything_is_listed_with_license_and_size(hub: Path) -> None:
    rows = json.loads(run("models", "--json").stdout)
    assert len(rows) == len(CHECKPOINTS) + len(ENCODERS) + 2  # and the small encoder, and the text encoder
    official = [row for row in rows if row["source"] == REPOSITORY and row["kind"] != "encoder"]
    assert all(row["license"] == "NSCLv1" and row["commercial"] is False and row["path"] is None for row in official)
    assert all(row["bytes"] > 2e9 for row in official)
    table = run("models").stdout
    assert "flux2/tiny" in table.splitlines()[1]
    assert "NSCLv1, non-commercial" in table


def test_what_lies_in_the_cache_is_on_disk(hub: Path) -> None:
    row = get_checkpoint("sdxl")
    place = put(hub, REPOSITORY, row.path, b"12345")
    here = [row for row in json.loads(run("models", "--on-disk", "--json").stdout) if row["source"] == REPOSITORY]
    assert [(row["name"], row["path"], row["bytes"]) for row in here] == [("sdxl/2kto4k", str(place), 5)]


def test_pull_shows_the_license_before_anything(hub: Path) -> None:
    result = run("pull", "flux2-klein-4b", "--variant", "2k")
    assert result.exit_code == 5
    assert "non-commercial" in result.stderr
    assert "--accept-license" in result.stderr
    assert list(hub.iterdir()) == []


def test_pull_without_a_network_is_one_line_that_helps(hub: Path) -> None:
    result = run("pull", "flux", "--accept-license")
    assert result.exit_code == 5
    assert "hf download nvidia/PiD" in result.stderr
    assert len(result.stderr.strip().splitlines()) == 1


def test_pull_of_what_is_here_asks_nothing(hub: Path) -> None:
    place = put(hub, REPOSITORY, get_checkpoint("sdxl").path)
    result = run("pull", "sdxl", "--no-encoder", "--no-text", "--json")
    assert result.exit_code == 0, result.stderr
    assert json.loads(result.stdout) == {"decoder": str(place)}


def test_pull_of_nothing_there_is(hub: Path) -> None:
    assert run("pull", "fluxx").exit_code == 2
    wrong = run("pull", "sdxl", "--variant", "2k")
    assert wrong.exit_code == 2
    assert "2kto4k" in wrong.stderr


def test_doctor_knows_every_extra(root: Path) -> None:
    with (root / "pyproject.toml").open("rb") as file:
        there = tomllib.load(file)["project"]["optional-dependencies"]
    assert set(EXTRAS) == set(there) - {"all", "dev"}


def test_doctor_tells_versions_devices_extras_and_verdicts(hub: Path) -> None:
    told = json.loads(run("doctor", "--json").stdout)
    assert told["versions"]["torch"]
    cpu = told["devices"][0]
    assert cpu["device"] == "cpu"
    assert cpu["cores"] >= 1
    if os.name == "posix":
        assert cpu["total_bytes"] >= cpu["available_bytes"] > 0
    assert set(told["extras"]) == set(EXTRAS)
    assert {"name", "ok", "reason"} == set(told["checks"][0])
    missing = [line["reason"] for line in told["checks"] if line["name"] == "released decoders for flux"]
    assert missing == ["not on this disk: pidecode pull flux"]
    put(hub, REPOSITORY, get_checkpoint("flux").path)
    shown = run("doctor").stdout
    assert "yes  released decoders for flux: 2k; without the text encoder" in shown
    assert "and without the encoder, so latents decode but images cannot be upscaled: pidecode pull flux" in shown


def test_escapes_in_names_and_metadata_reach_no_terminal(tmp_path: Path) -> None:
    name = "a\x1b[31m\u202e.safetensors"
    record = {"format": 1, "kind": "encoder", "note\x1b]0;": "\x1b[2J\x9b\x07"}
    save_file({"t\x1b[1m": torch.zeros(1)}, tmp_path / name, {"pidecode": json.dumps(record)})
    shown = [run("info", str(tmp_path / name)), run("info", str(tmp_path / name), "--json")]
    assert [result.exit_code for result in shown] == [0, 0]
    assert json.loads(shown[1].stdout)["record"] == record
    (tmp_path / ("b" + name)).write_bytes(b"junk")
    shown += [
        run("info", str(tmp_path / ("b" + name))),
        run("info", str(tmp_path / ("none" + name))),
        run("info", "x", "--no\x1b[1m"),
        run("no\x1b[1m"),
        run("upscale", str(tmp_path / ("b" + name)), "-o", str(tmp_path / "out")),
    ]
    assert all(result.exit_code for result in shown[2:])
    for result in shown:
        assert not set("\x1b\x9b\x07\u202e") & set(result.output), result.output


def test_json_has_no_nan(capsys: pytest.CaptureFixture[str]) -> None:
    emit({"a": [float("nan"), (float("inf"), 1.5)], 2: {"b": -0.0}}, "", as_json=True)
    assert json.loads(capsys.readouterr().out, parse_constant=pytest.fail) == {"a": [None, [None, 1.5]], "2": {"b": 0}}


def test_plan_predicts_the_time_of_this_machine_only() -> None:
    told = json.loads(run("plan", "--size", "512x512", "--network", "tiny", "--json").stdout)
    decoding, upscaling = (told["seconds"][f"time to {what}"] for what in ("decode", "upscale"))
    assert 0 < decoding < upscaling < 600
    assert "predicted time to upscale" in run("plan", "--size", "512x512", "--network", "tiny").stdout
    assert (
        json.loads(run("plan", "--size", "512x512", "--network", "tiny", "--ram", "8GB", "--json").stdout)["seconds"]
        is None
    )


def test_the_time_of_a_step_grows_with_the_image() -> None:
    config = debug_config()
    plans = [plan_decode(config, (side, side), Machine(memory=10**9, accelerator=False)) for side in (256, 1024)]
    small, large = (measured_step_seconds(plan, config, torch.device("cpu")) for plan in plans)
    assert 0 < small < large


def test_the_recipe_of_tiny_is_named_with_its_place() -> None:
    refused = run("train", "tiny", "--show")
    assert refused.exit_code == 2
    assert "recipes/tiny" in refused.stderr
    assert (Path(__file__).resolve().parents[2] / "recipes" / "tiny" / "train.py").is_file()


def test_an_animation_is_described_with_its_frames(tmp_path: Path) -> None:
    frames = [Image.new("L", (8, 6), level) for level in (0, 100, 200)]
    frames[0].save(tmp_path / "anim.gif", save_all=True, append_images=frames[1:])
    told = json.loads(run("info", str(tmp_path / "anim.gif"), "--json").stdout)
    assert {"format": "GIF", "width": 8, "height": 6, "frames": 3}.items() <= told.items()


@pytest.mark.parametrize(
    ("words", "offered"),
    [
        ("upscale -m flux2/", {"flux2/2k", "flux2/tiny"}), ("upscale --var", {"--variant"}),
        ("upscale -m flux2 --variant 2k", {"2k", "2kto4k_v1pt5"}), ("train stud", {"student", "student_lora"}),
        ("upscale --format ", {"png", "webp"}),
    ],
)  # fmt: skip
def test_the_shell_completes_models_variants_and_recipes(words: str, offered: set[str]) -> None:
    *typed, incomplete = words.split(" ")
    completed = ShellComplete(cli, {}, "pidecode", "_PIDECODE_COMPLETE").get_completions(typed, incomplete)
    assert offered <= {item.value for item in completed}


@pytest.mark.parametrize("name", list(COMMANDS))
def test_each_command_has_two_examples_that_it_understands(name: str) -> None:
    command = cli.get_command(click.Context(cli), name)
    assert isinstance(command, GroupedCommand | click.Group)
    assert len(COMMANDS[name].examples) == 2
    for line in COMMANDS[name].examples:
        program, called, *arguments = shlex.split(line)
        assert (program, called) == ("pidecode", name)
        command.make_context(name, arguments)
        assert line in run(name, "--help").stdout


def test_options_stand_in_groups() -> None:
    text = run("upscale", "--help").stdout
    groups = [
        text.index(f"\n{title}:") for title in ("Options", "Result", "Model", "Machine", "Other options", "Examples")
    ]
    assert groups == sorted(groups)
