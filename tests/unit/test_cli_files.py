# SPDX-License-Identifier: Apache-2.0
"""Where the command line writes, how it reads sizes, and how it says numbers."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from PIL import Image
from safetensors.torch import save_file

from pidecode.cli.app import UNEXPECTED, cli
from pidecode.cli.common import table
from pidecode.cli.decode import target_paths
from pidecode.errors import FileError, SettingError


def test_beside_the_source_by_default() -> None:
    sources = [Path("a/cat.jpg"), Path("b/dog.png")]
    assert target_paths(sources, None, "-upscaled") == [Path("a/cat-upscaled.png"), Path("b/dog-upscaled.png")]


def test_into_a_folder_or_a_named_file(tmp_path: Path) -> None:
    assert target_paths([Path("cat.jpg")], tmp_path / "new", "") == [tmp_path / "new" / "cat.png"]
    assert target_paths([Path("cat.jpg")], tmp_path / "x.webp", "") == [tmp_path / "x.webp"]
    (tmp_path / "v1.5").mkdir()
    assert target_paths([Path("cat.jpg")], tmp_path / "v1.5", "") == [tmp_path / "v1.5" / "cat.png"]


def test_what_cannot_be_is_refused() -> None:
    with pytest.raises(FileError, match=r"x\.tiff is not a format written here; its name must end in \.png"):
        target_paths([Path("cat.jpg")], Path("x.tiff"), "")
    with pytest.raises(SettingError, match="2 images cannot all be written to x.png; name a folder"):
        target_paths([Path("cat.jpg"), Path("dog.jpg")], Path("x.png"), "")
    for other in ("b/cat.png", "b/CAT.png"):
        said = r"would both be written to out/(cat|CAT)\.png.*keep_suffix=True.*two folders \(--out\)"
        with pytest.raises(SettingError, match=said):
            target_paths([Path("a/cat.jpg"), Path(other)], Path("out"), "")
    with pytest.raises(SettingError, match="some file systems take for"):
        target_paths([Path("caf\xe9.jpg"), Path("cafe\u0301.jpg")], Path("out"), "")
    with pytest.raises(SettingError, match="--keep-suffix chooses names in a folder"):
        target_paths([Path("cat.jpg")], Path("x.png"), "", keep_suffix=True)


def test_what_batch_offers_for_twins() -> None:
    sources = [Path("a.jpg"), Path("a.png")]
    assert target_paths(sources, "out", "", keep_suffix=True) == [Path("out/a.jpg.png"), Path("out/a.png.png")]


def test_a_name_that_ends_in_a_slash_is_a_folder() -> None:
    assert target_paths([Path("cat.jpg")], "out.v2/", "") == [Path("out.v2/cat.png")]


ODD_NAMES = ("x" * 300, "y" * 5000, "loop.png", "closed.png/x", "~nosuchuser/x")


@pytest.mark.parametrize("name", ODD_NAMES)
@pytest.mark.parametrize(
    "command",
    ["info FILE", "convert FILE out.safetensors", "decode FILE", "upscale a.png -m FILE", "web -m FILE",
     "upscale a.png --encoder FILE", "serve --token-file FILE", "train debug_direct --out out --set data.source=FILE"],
)  # fmt: skip
def test_odd_names_end_in_a_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: str, name: str) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "loop.png").symlink_to("loop.png")
    (tmp_path / "closed.png").touch()
    Image.new("RGB", (16, 16)).save("a.png")
    result = CliRunner().invoke(cli, [word.replace("FILE", name) for word in command.split()])
    assert result.exit_code not in (0, UNEXPECTED), result.output
    assert "Error: " in result.output


def test_endless_files_end_in_a_sentence(tmp_path: Path) -> None:
    result = CliRunner().invoke(cli, ["serve", "--token-file", "/dev/zero"])
    assert result.exit_code == 4 and "a text file was expected" in result.output


@pytest.mark.parametrize("name", ["x" * 300 + ".png", "loop.png", "closed.png/x.png"])
def test_odd_names_of_sources_end_in_a_sentence(tmp_path: Path, name: str) -> None:
    (tmp_path / "loop.png").symlink_to("loop.png")
    (tmp_path / "closed.png").touch()
    for command in (["upscale", str(tmp_path / name)], ["batch", str(tmp_path / name), str(tmp_path / "out")]):
        result = CliRunner().invoke(cli, command)
        assert 0 < result.exit_code < UNEXPECTED, result.output


def test_a_destination_is_checked_before_the_decoder_is_loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    monkeypatch.setattr("pidecode.decoder.PixelDecoder.from_pretrained", pytest.fail)
    for out in ("/proc/a.png", "/proc/new/", str(tmp_path / "a.png" / "new") + "/", str(tmp_path / ("x" * 300)) + "/"):
        result = CliRunner().invoke(cli, ["upscale", str(tmp_path / "a.png"), "-o", out])
        assert 0 < result.exit_code < UNEXPECTED, result.output
        assert "cannot be" in result.output


def test_a_table_lines_up() -> None:
    assert table([{"name": "a", "size": "10 MB"}, {"name": "long", "size": "1"}]) == (
        "name  size\na     10 MB\nlong  1"
    )
    assert table([]) == "(none)"


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
@pytest.mark.parametrize("arguments", [["models"], ["batch", "--help"], ["--help"]])
def test_a_full_output_is_a_sentence(arguments: list[str]) -> None:
    with open("/dev/full", "w") as full:
        result = subprocess.run(
            [sys.executable, "-m", "pidecode", *arguments], stdout=full, stderr=subprocess.PIPE, text=True, check=False
        )
    assert (result.returncode, result.stderr.count("\n")) == (1, 1)
    assert result.stderr.startswith("Error: The output could not be written: No space left on device.")


@pytest.mark.skipif(os.name == "nt", reason="needs a shell that closes streams")
def test_closed_streams_change_no_exit_code(tmp_path: Path) -> None:
    command = f"{sys.executable} -m pidecode info {tmp_path / 'none.png'}"
    closed = subprocess.run(f"{command} <&- >&- 2>&-", shell=True, check=False)
    assert closed.returncode == FileError.exit_code


def test_info_shows_the_adapter_of_a_folder(tmp_path: Path) -> None:
    folder = tmp_path / "style"
    folder.mkdir()
    halves = {"base_model.model.blocks.0.lora_A.weight": torch.ones(4, 8)}
    save_file(
        halves | {"base_model.model.blocks.0.lora_B.weight": torch.ones(8, 4)}, folder / "adapter_model.safetensors"
    )
    (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 4, "lora_alpha": 16}))
    shown = CliRunner().invoke(cli, ["info", str(folder), "--json"])
    assert shown.exit_code == 0, shown.output
    found = json.loads(shown.stdout)
    assert (found["layers"], found["rank"], found["alpha"], found["strength"]) == (1, 4, 16.0, 4.0)
    assert found["file"].endswith("adapter_model.safetensors") and "LoRA" in found["network"]
    (folder / "adapter_model.safetensors").unlink()
    empty = CliRunner().invoke(cli, ["info", str(folder)])
    assert (empty.exit_code, "is a folder" in empty.stderr) == (4, True)
