# SPDX-License-Identifier: Apache-2.0
"""`pidecode upscale` from end to end, on small networks of the real classes, decoder and encoder."""

from __future__ import annotations

import io
import json
import os
import re
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner, Result
from PIL import Image
from safetensors.torch import save_file
from test_cli_decode import FLUX2, save_weights, size_and_format

from pidecode.cli import common
from pidecode.cli.app import cli
from pidecode.cli.common import WorkBar
from pidecode.images import frames_in, image_size
from pidecode.latents.latent import Latent
from pidecode.models.tiny import TinyEncoder
from pidecode.registry.configs import TinyEncoderConfig
from pidecode.sampling import Progress


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Options that name a small decoder and its encoder."""
    folder = tmp_path_factory.mktemp("weights")
    config = TinyEncoderConfig(
        half_width=4, half_blocks=1, quarter_width=4, quarter_blocks=1, eighth_width=8, eighth_blocks=1
    )
    torch.manual_seed(0)
    record = {"format": 1, "kind": "encoder", "space": "flux2", "config": config.to_dict()}
    tensors = dict(TinyEncoder(config).state_dict())
    save_file(tensors, folder / "encoder.safetensors", metadata={"pidecode": json.dumps(record)})
    weights = save_weights(folder / "small.safetensors", FLUX2)
    return ["-m", str(weights), "--encoder", str(folder / "encoder.safetensors")]


@pytest.fixture
def photo(tmp_path: Path) -> Path:
    pixels = np.random.default_rng(0).integers(0, 256, (21, 37, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "photo.jpg")
    return tmp_path / "photo.jpg"


def run(*arguments: object) -> Result:
    return CliRunner().invoke(cli, ["upscale", *map(str, arguments)])


def test_a_image_of_any_size_becomes_exactly_four_times_as_large(model: list[str], photo: Path) -> None:
    result = run(photo, *model)
    assert result.exit_code == 0, result.stderr
    made = photo.with_name("photo-upscaled.png")
    assert result.stdout.startswith(f"{made}  148x84  ")
    assert size_and_format(made) == ((148, 84), "PNG")


def test_crop_cuts_to_what_the_encoder_takes(model: list[str], photo: Path, tmp_path: Path) -> None:
    result = run(photo, *model, "--fit", "crop", "-o", tmp_path / "cropped.jpg", "--json")
    (line,) = json.loads(result.stdout)
    assert (line["width"], line["height"]) == (128, 64)
    assert size_and_format(tmp_path / "cropped.jpg") == ((128, 64), "JPEG")


def test_several_images_into_a_folder_in_sixteen_bits(model: list[str], photo: Path, tmp_path: Path) -> None:
    other = tmp_path / "other.png"
    Image.new("RGB", (16, 32), "teal").save(other)
    result = run(photo, other, *model, "-o", tmp_path / "large", "--bits", 16, "--seed", 3)
    assert result.exit_code == 0, result.stderr
    assert sorted(path.name for path in (tmp_path / "large").iterdir()) == ["other-upscaled.png", "photo-upscaled.png"]
    info = CliRunner().invoke(cli, ["info", str(tmp_path / "large" / "other-upscaled.png"), "--json"])
    told = json.loads(info.stdout)
    assert (told["width"], told["height"], told["metadata"]["seed"]) == (64, 128, 3)


def test_the_same_seed_writes_the_same_bytes(model: list[str], photo: Path, tmp_path: Path) -> None:
    for name, seed in (("a", 5), ("b", 5), ("c", 6)):
        assert run(photo, *model, "-o", tmp_path / f"{name}.png", "--seed", seed).exit_code == 0
    first, again, other = ((tmp_path / f"{name}.png").read_bytes() for name in "abc")
    assert first == again
    assert first != other


def test_what_is_no_image_is_one_line_and_leaves_nothing(model: list[str], tmp_path: Path) -> None:
    broken = tmp_path / "broken.png"
    broken.write_bytes(b"\x89PNG\r\n\x1a\nand then nothing of the kind")
    result = run(broken, *model, "-o", tmp_path / "made")
    assert result.exit_code == 4
    assert result.stderr.startswith("Error: ")
    assert [path.name for path in tmp_path.iterdir()] == ["broken.png"]


@pytest.mark.parametrize(
    ("arguments", "size"),
    [
        (["--scale", "2"], (74, 42)), (["--scale", "1.5"], (56, 32)), (["--size", "100x"], (100, 57)),
        (["--size", "x42"], (74, 42)), (["--size", "74x42"], (74, 42)), (["--size", "148x84"], (148, 84)),
    ],
)  # fmt: skip
def test_a_smaller_result_is_downsampled(model: list[str], photo: Path, arguments: list[str], size: Any) -> None:
    result = run(photo, *model, *arguments)
    assert result.exit_code == 0, result.stderr
    made = photo.with_name("photo-upscaled.png")
    assert size_and_format(made) == (size, "PNG")
    metadata = json.loads(CliRunner().invoke(cli, ["info", str(made), "--json"]).stdout)["metadata"]
    assert metadata.get("downsampled_from") == (None if size == (148, 84) else [148, 84])


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--scale", "5"], "enlarges 4 times; give 1 to 4"), (["--size", "200x"], "makes 148x84 of this"),
        (["--size", "100x80"], "give one side alone, or 100x57"), (["--size", "x"], "such as 2048x1536"),
        (["--size", "100x", "--scale", "2"], "give one"), (["--quality", "90"], "quality acts on webp and jpeg"),
        (["--format", "webp", "-o", "a.png"], "--out names the file a.png; drop one"),
        (["--format", "jpeg", "--bits", "16"], "Only .png files hold 16 bits"),
        (["-o", "-", "--json"], "both write to standard output"),
    ],
)  # fmt: skip
def test_what_cannot_be_done_is_refused_with_what_can(
    model: list[str], photo: Path, arguments: list[str], words: str
) -> None:
    result = run(photo, *model, *arguments)
    assert result.exit_code == 2
    assert words in result.stderr
    assert [path.name for path in photo.parent.iterdir()] == ["photo.jpg"]


def test_format_and_quality_choose_the_file(model: list[str], photo: Path) -> None:
    sizes = []
    for quality in (20, 95):
        result = run(photo, *model, "--format", "webp", "--quality", quality, "--overwrite")
        assert result.exit_code == 0, result.stderr
        made = photo.with_name("photo-upscaled.webp")
        assert size_and_format(made) == ((148, 84), "WEBP")
        sizes.append(made.stat().st_size)
    assert sizes[0] < sizes[1]
    assert run(photo, *model, "--format", "jpeg").exit_code == 0
    assert photo.with_name("photo-upscaled.jpg").is_file()


def test_one_bad_file_does_not_stop_the_others(model: list[str], photo: Path) -> None:
    broken = photo.with_name("broken.png")
    broken.write_bytes(b"\x89PNG\r\n\x1a\nand then nothing of the kind")
    result = run(broken, photo.with_name("missing.png"), photo, *model, "--json")
    assert result.exit_code == 1
    written, *failures = json.loads(result.stdout)
    assert written["image"].endswith("photo-upscaled.png")
    assert {failure["source"] for failure in failures} == {str(broken), str(photo.with_name("missing.png"))}
    assert f"2 of 3 failed: {photo.with_name('missing.png')}, {broken}" in result.stderr


def test_standard_input_and_output(
    model: list[str], photo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    result = CliRunner().invoke(cli, ["upscale", "-", *model, "-o", "-", "--format", "webp"], input=photo.read_bytes())
    assert result.exit_code == 0, result.stderr
    with Image.open(io.BytesIO(result.stdout_bytes)) as image:
        assert (image.size, image.format) == ((148, 84), "WEBP")
    nameless = CliRunner().invoke(cli, ["upscale", "-", *model], input=photo.read_bytes())
    assert nameless.exit_code == 2
    assert "--out FILE" in nameless.stderr
    several = run(photo, photo, *model, "-o", "-")
    assert "name a folder" in several.stderr
    broken = CliRunner().invoke(cli, ["upscale", "-", *model, "-o", str(tmp_path / "a.png")], input=b"no image")
    assert broken.exit_code == 4
    monkeypatch.setattr(common, "MAX_INPUT", 1000)
    endless = CliRunner().invoke(cli, ["upscale", "-", *model, "-o", str(tmp_path / "a.png")], input=bytes(1001))
    assert endless.exit_code == 4
    assert "Standard input holds more than 1.0 kB; give such a file by its name." in endless.stderr


def test_a_folder_is_a_batch(photo: Path, model: list[str]) -> None:
    weights = Path(model[1])
    folder = photo.parent / "photos"
    folder.mkdir()
    photo.rename(folder / "photo.jpg")
    refused = run(folder, *model)
    assert refused.exit_code == 2
    assert "--encoder cannot act on a batch" in refused.stderr
    result = run(folder, "-m", weights, "--scale", "2", "--format", "webp")
    assert result.exit_code == 0, result.stderr
    assert size_and_format(photo.parent / "photos-upscaled" / "photo.webp") == ((74, 42), "WEBP")


def test_a_file_for_the_other_command_names_it(model: list[str], photo: Path, tmp_path: Path) -> None:
    latent = tmp_path / "cat.safetensors"
    Latent(torch.zeros(1, 128, 1, 1), "flux2").save(latent)
    assert f"use `pidecode decode {latent}`" in run(latent, *model).stderr
    result = CliRunner().invoke(cli, ["decode", str(photo), *model])
    assert result.exit_code == 3
    assert f"use `pidecode upscale {photo}`" in result.stderr
    png = tmp_path / "there.png"  # which the result of the wrong command would be written over
    Image.new("RGB", (8, 8)).save(png)
    assert f"use `pidecode upscale {png}`" in CliRunner().invoke(cli, ["decode", str(png), *model]).stderr
    several = run(photo, tmp_path / "missing.png", *model, "-o", tmp_path / "one.png")
    assert "2 images cannot all be written" in several.stderr


class Terminal(io.StringIO):
    """A standard error that says it is a terminal."""

    def isatty(self) -> bool:
        return True


def test_a_terminal_shows_what_is_being_done(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stderr", terminal := Terminal())
    with WorkBar() as bar:
        assert "loading ... 00:00" in terminal.getvalue()  # at once
        bar.expect([3.0, 1.0], seconds=40.0)
        bar.begin(0, "a.png")
        bar.report(Progress("decoding", 0.5, "strip", 1, 2))
        bar.begin(1, "b.png")
        bar.report(Progress("decoding", 0.0, "strip", 1, 12))
    shown = terminal.getvalue()
    assert "1/2 a.png: decoding, strip 1 of 2  38%" in shown
    assert "2/2 b.png: decoding, strip 1 of 12  75%" in shown
    assert re.search(r"about \d+", shown)


def test_the_line_moves_while_nothing_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stderr", terminal := Terminal())
    with WorkBar() as bar:
        bar.expect([1.0], seconds=5.0)
        bar.begin(0, "a.png")
        before = terminal.getvalue()
        deadline = time.monotonic() + 5
        while terminal.getvalue() == before and time.monotonic() < deadline:
            time.sleep(0.02)
    assert "1%" in terminal.getvalue()[len(before) :] or "about 4" in terminal.getvalue()[len(before) :]


def test_sizes_are_those_of_the_upright_image(model: list[str], tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # stored lying on its side
    Image.new("RGB", (32, 16), "teal").save(tmp_path / "phone.jpg", exif=exif)
    assert image_size(tmp_path / "phone.jpg") == (16, 32)
    result = run(tmp_path / "phone.jpg", *model, "--size", "32x64")
    assert result.exit_code == 0, result.stderr
    assert size_and_format(tmp_path / "phone-upscaled.png") == ((32, 64), "PNG")


def test_all_frames_and_pages_come_out(model: list[str], tmp_path: Path) -> None:
    frames = [Image.new("RGB", (20, 12), color) for color in ("red", "green", "white")]
    for name in ("a.gif", "a.tif"):
        frames[0].save(tmp_path / name, save_all=True, append_images=frames[1:], duration=[40, 80, 120], loop=0)
    result = run(tmp_path / "a.gif", tmp_path / "a.tif", *model, "-o", tmp_path / "out/", "--json")
    assert result.exit_code == 0, result.stderr
    found = json.loads(result.stdout)
    assert [Path(entry["image"]).name for entry in found] == [
        "a-upscaled.gif", "a-1-upscaled.png", "a-2-upscaled.png", "a-3-upscaled.png",
    ]  # fmt: skip
    assert (found[0]["frames"], found[1]["source"]) == (3, f"{tmp_path / 'a.tif'}, page 1")
    written = frames_in(tmp_path / "out/a-upscaled.gif")
    assert written is not None
    assert (written.durations, written.loop, written.sizes[0]) == ((40, 80, 120), 0, (80, 48))
    assert run(tmp_path / "a.tif", *model, "-o", tmp_path / "b.webp").exit_code == 0
    assert (tmp_path / "b-3.webp").exists()
    assert run(tmp_path / "a.gif", *model, "-o", tmp_path / "b.png").exit_code == 0
    assert frames_in(tmp_path / "b.png") is not None
    for arguments, words in (
        (["--format", "jpeg"], "animations are written as"),
        (["--bits", "16"], "Only .png files hold 16 bits"),
        (["--max-pixels", "500"], "3 frames of more than 500 pixels together"),
    ):
        assert words in run(tmp_path / "a.gif", *model, *arguments).stderr


def test_the_longest_name_is_cut(model: list[str], photo: Path) -> None:
    long = photo.with_name("é" * 125 + "a.png")
    Image.open(photo).save(long)
    result = run(long, *model)
    assert result.exit_code == 0, result.stderr
    assert max(len(os.fsencode(path.name)) for path in photo.parent.iterdir()) == 255


def test_patterns_that_the_shell_left_are_expanded(model: list[str], photo: Path, tmp_path: Path) -> None:
    for name in ("b[1].jpg", "b1.jpg"):  # a name that is a pattern stands for itself
        (tmp_path / name).write_bytes(photo.read_bytes())
    result = run(tmp_path / "ph*.jpg", tmp_path / "b[1].jpg", *model, "-o", f"{tmp_path}/out/", "--scale", "2x")
    assert result.exit_code == 0, result.stderr
    made = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert (made, image_size(tmp_path / "out" / made[0])) == (["b[1]-upscaled.png", "photo-upscaled.png"], (74, 42))
    assert "no file" in run(tmp_path / "x*.jpg", *model).stderr


def test_an_address_is_told_as_one(model: list[str]) -> None:
    result = run("https://example.org/a.png", *model)
    assert (result.exit_code, "is an address, and nothing is fetched" in result.stderr) == (4, True)


@pytest.mark.parametrize(
    ("typed", "answer"),
    [(["-i", "a.png"], "pidecode COMMAND FILE"), (["--input", "a.png"], "pidecode COMMAND FILE"),
     (["-s", "2"], "--scale"), (["--tile", "400"], "--memory 4GB sets a limit.\n"),
     (["--gpu-id", "0"], "--device"), (["-n", "x4plus"], "--model")],
)  # fmt: skip
def test_options_of_other_upscalers_are_answered_with_ours(typed: list[str], answer: str) -> None:
    result = run(*typed, "-o", "b.png")
    assert (result.exit_code, "No such option" in result.stderr, answer in result.stderr) == (2, True, True)
