# SPDX-License-Identifier: Apache-2.0
"""`pidecode decode` and `info` from end to end, on a small network of the real class in the release format."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner, Result
from PIL import Image
from safetensors import safe_open
from safetensors.torch import save_file

from pidecode.cli.app import cli
from pidecode.encoders.text import PromptEmbedsCache, TextOptions
from pidecode.errors import DownloadError
from pidecode.images.tensors import LABEL_HEIGHT
from pidecode.latents.latent import Latent
from pidecode.models.pid.network import PiDNet
from pidecode.registry.configs import PiDConfig, debug_config
from pidecode.weights.metadata import CheckpointMetadata

FLUX2 = debug_config(text_dim=0, latent_channels=128, latent_down=16, latent_unpatchify=2, prediction="x0")


def save_weights(path: Path, config: PiDConfig) -> Path:
    """A network with random weights as a release file."""
    torch.manual_seed(0)
    net = PiDNet(config).requires_grad_(False)
    for parameter in net.parameters():
        parameter.normal_(std=0.2)
    identity = CheckpointMetadata(kind="student", config=config, space="flux2", license="Apache-2.0")
    save_file(dict(net.state_dict()), path, metadata=identity.to_metadata())
    return path


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_weights(tmp_path_factory.mktemp("weights") / "small.safetensors", FLUX2)


@pytest.fixture
def latent(tmp_path: Path) -> Path:
    path = tmp_path / "cat.safetensors"
    made = torch.Generator().manual_seed(1)
    Latent(torch.randn(1, 128, 1, 2, generator=made) * 0.8, "flux2", 0.0, seed=11).save(path)
    return path


def size_and_format(path: Path) -> tuple[tuple[int, int], str | None]:
    with Image.open(path) as image:
        return image.size, image.format


def run(*arguments: object) -> Result:
    return CliRunner().invoke(cli, [str(argument) for argument in arguments])


def test_several_noise_levels_make_one_sheet(tmp_path: Path, weights: Path, latent: Path) -> None:
    decode = ("decode", latent, "-m", weights, "--device", "cpu")
    result = run(*decode, "--sigma", "0,0.2,0.4")
    assert result.exit_code == 0, result.output
    sheet = Image.open(tmp_path / "cat-sigmas.png")
    assert sheet.size == (3 * 128, 64 + LABEL_HEIGHT)
    assert json.loads(sheet.info["pidecode"])["sigma"] == [0, 0.2, 0.4]
    for index, level in enumerate(("0", "0.2", "0.4")):
        run(*decode, "--sigma", level, "-o", tmp_path / f"{level}.png")
        column = sheet.crop((index * 128, LABEL_HEIGHT, index * 128 + 128, LABEL_HEIGHT + 64))
        assert column.tobytes() == Image.open(tmp_path / f"{level}.png").tobytes()
    assert "has a noise level twice" in run(*decode, "--sigma", "0.2,0.2").output
    assert "0.9 is not in the range" in run(*decode, "--sigma", "0,0.9").output
    assert (
        "sigma is (0.0, 0.2); it must be a number"
        in run("batch", tmp_path, tmp_path / "out", "-m", weights, "--sigma", "0,0.2").output
    )


def test_prompts_without_a_text_encoder(tmp_path: Path, latent: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """States written where the text encoder is (here its cache) decode elsewhere, from the file or once imported."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("PIDECODE_CACHE", str(tmp_path / "there"))
    config = dataclasses.replace(FLUX2, text_dim=16, text_length=10)
    reads_text = save_weights(tmp_path / "text.safetensors", config)
    for seed, prompt in enumerate(("", "a cat")):
        states = torch.randn(10, 16, generator=torch.Generator().manual_seed(seed))
        PromptEmbedsCache().put(prompt, TextOptions().identity(), states)
    file = tmp_path / "states.safetensors"
    result = run("captions", "export", "a cat", "", "-o", file)
    assert (result.exit_code, result.output.startswith(f"{file}  2 prompts, ")) == (0, True), result.output
    assert "exists" in run("captions", "export", "a cat", "-o", file).output
    assert "give at least one" in run("captions", "export", "-o", tmp_path / "none.safetensors").output

    monkeypatch.setenv("PIDECODE_CACHE", str(tmp_path / "here"))
    decode = ("decode", latent, "-m", reads_text, "--device", "cpu", "-o")
    refused = run(*decode, tmp_path / "no.png")
    assert refused.exit_code == DownloadError.exit_code
    assert "captions export" in refused.output
    written = [
        run(*decode, tmp_path / "cat.png", "--prompt-embeds", file, "--prompt", "a cat"),
        run(*decode, tmp_path / "empty.png", "--prompt-embeds", file),
        run("captions", "import", file),
        run(*decode, tmp_path / "imported.png", "--prompt", "a cat"),
    ]
    assert [result.exit_code for result in written] == [0, 0, 0, 0], [result.output for result in written]
    cat, empty, imported = (Image.open(tmp_path / f"{name}.png") for name in ("cat", "empty", "imported"))
    assert cat.tobytes() == imported.tobytes() != empty.tobytes()
    assert json.loads(cat.info["pidecode"])["prompt"] == "a cat"
    unknown = run(*decode, tmp_path / "no.png", "--prompt-embeds", file, "--prompt", "a dog")
    assert "no states of the prompt 'a dog'; it holds 'a cat', ''" in unknown.output
    assert not (tmp_path / "no.png").exists()


def test_a_latent_becomes_a_image_with_its_metadata(weights: Path, latent: Path) -> None:
    result = run("decode", latent, "-m", weights, "--seed", 7, "--num-steps", 2)
    assert result.exit_code == 0, result.stderr
    image = latent.with_suffix(".png")
    assert result.stdout.startswith(f"{image}  128x64  ")
    assert result.stderr == ""  # no bar where nobody watches
    assert size_and_format(image) == ((128, 64), "PNG")

    told = json.loads(run("info", image, "--json").stdout)
    assert {"what": "image", "format": "PNG", "width": 128, "height": 64}.items() <= told.items()
    expected = {"seed": 7, "num_steps": 2, "space": "flux2", "sampler": "sde", "latent_seed": 11, "sigma": 0.0}
    assert expected.items() <= told["metadata"].items()
    assert "metadata\n  model" in run("info", image).stdout


def test_json_says_what_was_written(weights: Path, latent: Path, tmp_path: Path) -> None:
    result = run("decode", latent, "-m", weights, "-o", tmp_path / "made", "--json")
    (line,) = json.loads(result.stdout)
    assert line["image"] == str(tmp_path / "made" / "cat.png")
    assert (line["width"], line["height"], line["seed"]) == (128, 64, 0)
    assert line["seconds"] >= 0
    assert line["seconds_saving"] >= 0


def test_sixteen_bits_and_webp(weights: Path, latent: Path, tmp_path: Path) -> None:
    assert run("decode", latent, "-m", weights, "-o", tmp_path / "deep.png", "--bits", 16).exit_code == 0
    deep = (tmp_path / "deep.png").read_bytes()
    assert deep[24] == 16  # the header's bit depth
    assert json.loads(run("info", tmp_path / "deep.png", "--json").stdout)["metadata"]["space"] == "flux2"
    assert run("decode", latent, "-m", weights, "-o", tmp_path / "flat.webp").exit_code == 0
    assert size_and_format(tmp_path / "flat.webp") == ((128, 64), "WEBP")
    refused = run("decode", latent, "-m", weights, "-o", tmp_path / "deep.webp", "--bits", 16)
    assert refused.exit_code == 2
    assert "Only .png files hold 16 bits" in refused.stderr


def test_an_adapter_and_a_color_fix_act(weights: Path, latent: Path, tmp_path: Path) -> None:
    layer = "patch_blocks.0.mlp_x.w1"
    halves = {f"{layer}.lora_A.weight": torch.randn(2, 32), f"{layer}.lora_B.weight": torch.randn(85, 2)}
    save_file(halves, tmp_path / "style.safetensors")
    plain, styled = tmp_path / "plain.png", tmp_path / "styled.png"
    assert run("decode", latent, "-m", weights, "-o", plain).exit_code == 0
    adapter = ("--lora", tmp_path / "style.safetensors", "--lora-scale", 2.0)
    assert run("decode", latent, "-m", weights, "-o", styled, *adapter).exit_code == 0
    with Image.open(plain) as one, Image.open(styled) as other:
        assert one.tobytes() != other.tobytes()
    assert "style at 2" in json.loads(run("info", styled, "--json").stdout)["metadata"]["model"]

    Image.new("RGB", (32, 16), (200, 60, 30)).save(tmp_path / "photo.png")
    locked = run("upscale", tmp_path / "photo.png", "-m", weights, "--color-fix", "fine")
    assert locked.exit_code == 0, locked.stderr
    with Image.open(tmp_path / "photo-upscaled.png") as image:
        red, green, blue = (band.getextrema() for band in image.resize((2, 1), Image.Resampling.BOX).split())
    assert abs(red[0] - 200) < 30
    assert abs(green[0] - 60) < 30
    assert abs(blue[0] - 30) < 30


def test_what_exists_stays_unless_told(weights: Path, latent: Path) -> None:
    place = latent.with_suffix(".png")
    place.write_bytes(b"precious")
    refused = run("decode", latent, "-m", weights)
    assert refused.exit_code == 4
    assert "exists already" in refused.stderr
    assert place.read_bytes() == b"precious"
    assert run("decode", latent, "-m", weights, "--overwrite").exit_code == 0
    assert size_and_format(place) == ((128, 64), "PNG")


def test_a_batch_is_numbered(weights: Path, tmp_path: Path) -> None:
    Latent(torch.randn(2, 128, 1, 1), "flux2").save(tmp_path / "two.safetensors")
    result = run("decode", tmp_path / "two.safetensors", "-m", weights, "--json")
    assert [Path(line["image"]).name for line in json.loads(result.stdout)] == ["two-1.png", "two-2.png"]
    assert [line["seed"] for line in json.loads(result.stdout)] == [0, 1]


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["missing.safetensors"], 4, "There is no file missing.safetensors"),
        (["{latent}", "--num-steps", "9"], 2, "a distilled decoder takes 1 to 4"),
        (["{latent}", "--size", "big"], 2, "such as 2048x1536"),
        (["{latent}", "--sigma", "0.9"], 2, "0.9 is not in the range"),
        (["{latent}", "--space", "sdxl"], 3, "sdxl"),
        (["{latent}", "--device", "toaster"], 2, "toaster"),
        (["{weights}"], 3, ""),
        (["{latent}", "-m", "nothing-like-that"], 2, "nothing-like-that"),
        (["{latent}", "-o", "cat.gif"], 4, "not a format written here"),
        (["{latent}", "--lora-scale", "0.5"], 2, "add --lora FILE"),
        (["{latent}", "--lora", "{latent}"], 4, "no adapter file"),
        (["{latent}", "--bits", "12"], 2, "'12' is not one of '8', '16'"),
    ],
)
def test_each_wrong_argument_is_one_line_and_leaves_nothing(
    weights: Path,
    latent: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    arguments: list[str],
    code: int,
    words: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    before = sorted(tmp_path.iterdir())
    named = [argument.format(latent=latent, weights=weights) for argument in arguments]
    if "-m" not in named:
        named += ["-m", str(weights)]
    result = run("decode", *named)
    assert result.exit_code == code, result.stderr
    assert words in result.stderr
    assert "Traceback" not in result.stderr
    assert sorted(tmp_path.iterdir()) == before


def test_info_on_a_latent_and_on_weights(weights: Path, latent: Path, tmp_path: Path) -> None:
    told = json.loads(run("info", latent, "--json").stdout)
    assert {"what": "latent", "shape": [1, 128, 1, 2], "space": "flux2", "frame": "normalized"}.items() <= told.items()
    told = json.loads(run("info", weights, "--json").stdout)
    assert told["what"] == "weights"
    assert told["record"]["space"] == "flux2"
    assert told["record"]["config"]["hidden_size"] == FLUX2.hidden_size
    assert told["parameters"] > 1000

    save_file(dict(PiDNet(FLUX2).state_dict()), tmp_path / "foreign.safetensors")
    told = json.loads(run("info", tmp_path / "foreign.safetensors", "--json").stdout)
    assert told["network"].startswith("PiD")
    assert told["seen"]["hidden_size"] == FLUX2.hidden_size
    save_file({"encoder.weight": torch.zeros(2)}, tmp_path / "other.safetensors")
    assert "none of PiD's" in run("info", tmp_path / "other.safetensors").stdout
    save_file({"transformer.a.lora_A.weight": torch.zeros(2, 2)}, tmp_path / "style.safetensors")
    assert "a LoRA adapter; --lora adds it" in run("info", tmp_path / "style.safetensors").stdout
    for format, said in (("nvfp4", "nvfp4 (not read here)"), ("float8_e4m3fn", "float8_e4m3fn")):
        note = torch.tensor(list(json.dumps({"format": format}).encode()), dtype=torch.uint8)
        save_file({"a.weight": torch.ones(2, 2), "a.comfy_quant": note}, tmp_path / "small.safetensors")
        assert f"quantized      {said}\n" in run("info", tmp_path / "small.safetensors").stdout
    for text, reason in (('{"x": 1, "x": 2}', "it has 'x' twice in one object"), ("[1]", "is not a table")):
        save_file({"a.weight": torch.ones(2, 2)}, tmp_path / "odd.safetensors", metadata={"pidecode": text})
        assert reason in run("info", tmp_path / "odd.safetensors").stderr


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "empty"),
        (b"just some words, no image", "is a text, not tensors"),
        (b"\0\0\0\x18ftypheic", "is HEIC, which is not read here; convert it"),
        (b"\x89PNG\r\n\x1a\nbroken", ""),
        (b"\x80\x04cos\nsystem\n", ""),
        ((10**6).to_bytes(8, "little") + b'{"a": 1}', "is cut off: its header takes"),
    ],
)
def test_info_on_what_is_broken(tmp_path: Path, content: bytes, words: str) -> None:
    path = tmp_path / "file"
    path.write_bytes(content)
    result = run("info", path)
    assert result.exit_code == 4, result.stderr
    assert words in result.stderr
    assert result.stderr.startswith("Error: ")


def test_convert_writes_what_loads_with_no_further_argument(weights: Path, latent: Path, tmp_path: Path) -> None:
    with safe_open(weights, framework="pt") as file:
        bare = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - it is no mapping
    save_file(bare, tmp_path / "bare.safetensors")
    undecided = run("convert", tmp_path / "bare.safetensors", tmp_path / "made.safetensors")
    assert undecided.exit_code in (2, 4)
    assert not (tmp_path / "made.safetensors").exists()

    result = run("convert", weights, tmp_path / "made.safetensors", "--dtype", "bfloat16", "--json")
    assert result.exit_code == 0, result.stderr
    told = json.loads(result.stdout)
    assert {"kind": "student", "space": "flux2", "license": "Apache-2.0"}.items() <= told.items()
    assert told["bytes"] < 0.7 * weights.stat().st_size
    assert run("convert", weights, tmp_path / "made.safetensors").exit_code == 4
    assert run("decode", latent, "-m", tmp_path / "made.safetensors", "--dtype", "float32").exit_code == 0


@pytest.mark.skipif(os.name == "nt", reason="interrupts are sent differently there")
def test_an_interrupt_leaves_no_partial_file(weights: Path, tmp_path: Path) -> None:
    Latent(torch.randn(1, 128, 32, 32) * 0.8, "flux2").save(tmp_path / "large.safetensors")
    # A test run started in the background passes "ignore interrupts" on to its children; a terminal does not.
    as_in_a_terminal = (
        "import runpy, signal; signal.signal(signal.SIGINT, signal.default_int_handler); "
        "runpy.run_module('pidecode', run_name='__main__', alter_sys=True)"
    )
    arguments = ["decode", "large.safetensors", "-m", str(weights), "-o", "out/"]
    command = [sys.executable, "-c", as_in_a_terminal, *arguments]
    with subprocess.Popen(command, cwd=tmp_path, stderr=subprocess.PIPE, text=True) as process:
        while process.poll() is None and not (tmp_path / "out").exists():  # made before anything is loaded
            time.sleep(0.01)
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=60)
    assert (process.returncode, errors) == (130, "Stopped.\n")
    assert [path.name for path in tmp_path.iterdir()] == ["large.safetensors"]
