# SPDX-License-Identifier: Apache-2.0
"""The tutorial of docs/training.md: its own files and commands, in debug_config, from photographs to an image."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

import pidecode
from pidecode.cli.app import cli
from pidecode.training.config import apply_settings
from pidecode.training.recipes import RECIPES, get_recipe
from pidecode.training.tasks import train
from pidecode.weights.detect import detect
from pidecode.weights.read import read_weights

CPU = torch.device("cpu")
SMALL = [
    "run.steps=4", "run.checkpoint_every=2", "run.sample_every=4", "run.num_samples=1", "data.batch_size=2",
    "data.crop=64",
    "data.sizes=((64, 64), (64, 128), (128, 64))", "net.hidden_size=32", "net.patch_depth=1",
    "net.pixel_attn_hidden_size=32", "net.adapter_width=8",
]  # fmt: skip


@pytest.fixture(scope="module")
def page(root: Path) -> str:
    return (root / "docs" / "training.md").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    skimage = pytest.importorskip("skimage")
    from PIL import Image

    place = tmp_path_factory.mktemp("my-photos")
    for name in ("astronaut", "coffee"):
        Image.fromarray(getattr(skimage.data, name)()).resize((160, 120)).save(place / f"{name}.jpg")
    return place


def stand_in(low: torch.Tensor) -> torch.Tensor:
    """A latent of FLUX.2's shape without its encoder."""
    return torch.nn.functional.pixel_unshuffle(torch.nn.functional.avg_pool2d(low, 2), 8)[:, :128]


@pytest.mark.slow
def test_the_tutorial_ends_in_a_decoder(photos: Path, tmp_path: Path) -> None:
    settings = [f"data.source={str(photos)!r}", f"data.cache={str(tmp_path / 'latents')!r}", *SMALL]
    recipe = replace(apply_settings(get_recipe("photographs"), settings), encode=stand_in)
    path = train(recipe, tmp_path / "mine", device=CPU)
    assert (tmp_path / "mine" / "samples" / "step-00000004.png").exists()
    assert list((tmp_path / "latents").glob("*.safetensors"))
    decoder = pidecode.PixelDecoder.from_pretrained(str(path), device="cpu")
    latent = pidecode.Latent(stand_in(torch.rand(1, 3, 32, 48) * 2 - 1), "flux2")
    output = decoder.decode(latent, seed=0)
    assert output.image.size == (192, 128)


@pytest.mark.slow
def test_the_example_of_an_own_space_trains(page: str, photos: Path, tmp_path: Path) -> None:
    code = next(block for block in re.findall(r"```python\n(.*?)```", page, re.DOTALL) if "STRIPES" in block)
    (tmp_path / "stripes.py").write_text(code, encoding="utf-8")
    pairs = [word for setting in SMALL for word in ("--set", setting)]
    line = [
        "train",
        f"{tmp_path / 'stripes.py'}:stripes_decoder",
        "--data",
        str(photos),
        "--out",
        str(tmp_path / "run"),
    ]
    done = CliRunner().invoke(cli, [*line, *pairs], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    identity = detect(read_weights(tmp_path / "run" / "decoder.safetensors"))
    assert (identity.kind, identity.space) == ("student", "stripes")


def test_every_recipe_and_setting_the_page_names_exists(page: str) -> None:
    for name in re.findall(r"pidecode train ([a-z_]+)(?![a-z_.])", page):
        assert name in RECIPES, name
    recipe = get_recipe("student")
    for setting in re.findall(r"--set ([a-z_.]+=[^\s`]+)", page):
        if not setting.startswith(("net.hidden_size", "teacher.repa", "data.crop", "teacher=")):
            apply_settings(recipe, [setting])
