# SPDX-License-Identifier: Apache-2.0
"""`pidecode upscale` from end to end, on small networks of the real classes, decoder and encoder."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner, Result
from PIL import Image
from safetensors.torch import save_file
from test_cli_decode import FLUX2, save_weights, size_and_format

from pidecode.cli.app import cli
from pidecode.models.tiny import TinyEncoder
from pidecode.registry.configs import TinyEncoderConfig


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
