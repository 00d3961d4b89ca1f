# SPDX-License-Identifier: Apache-2.0
"""Every example, run as a reader runs it: pipeline and decoder from disk, at tiny size."""

from __future__ import annotations

import ast
import importlib.util
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

import pidecode
import tiny_models
import tiny_pipelines as tiny
from pidecode import PixelDecoder
from pidecode.images import to_tensor
from pidecode.latents.latent import Latent, NormalizationWarning

ROOT = Path(__file__).resolve().parent.parent
EXAMPLES = sorted((ROOT / "examples").glob("*.py"))

pytestmark = [
    pytest.mark.filterwarnings(f"ignore::{NormalizationWarning.__module__}.NormalizationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning"),
]


def main_of(name: str) -> Callable[..., None]:
    spec = importlib.util.spec_from_file_location(f"example_{name}", ROOT / "examples" / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.main  # type: ignore[no-any-return]


def decoder_on_disk(folder: Path, space: str) -> str:
    decoder = tiny.decoder_for(space)
    tensors = {name: tensor.clone() for name, tensor in decoder.net.state_dict().items()}
    save_file(tensors, folder / "decoder.safetensors", decoder.metadata.to_metadata())
    return str(folder / "decoder.safetensors")


def run_pipeline(folder: Path, model: str, *options: str) -> Path:
    """Run the example with a tiny pipeline and a tiny decoder from disk."""
    name = {"flux2": "klein"}.get(model, model)
    tiny.build(name).save_pretrained(folder / "pipeline")
    decoder = decoder_on_disk(folder, tiny.SPACE.get(name, name))
    out = folder / "out.png"
    files = ["--pipeline", str(folder / "pipeline"), "--decoder", decoder, "--out", str(out)]
    small = dict(height=tiny.HEIGHT, width=tiny.WIDTH, num_inference_steps=tiny.STEPS)
    main_of("diffusers_pipeline")(["a cat", "--model", model, *files, *options], **small, **tiny.CALL[name])
    return out


def test_every_example_is_run_here() -> None:
    assert {path.stem for path in EXAMPLES} == {"diffusers_pipeline", "rae"}


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_examples_use_public_names_alone(path: Path) -> None:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    imported = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    imported |= {node.module or "" for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    assert {name for name in imported if name.startswith("pidecode")} == {"pidecode"}
    used = {
        node.attr
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "pidecode"
    }
    assert used <= set(pidecode.__all__)


@pytest.mark.parametrize("model", ["flux", "flux2", "sd3", "sdxl", "qwenimage", "zimage"])
def test_diffusers_pipeline(model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = run_pipeline(tmp_path, model, "--stop-after", "3", "--capture", "3")
    assert Image.open(out).size == (4 * tiny.WIDTH, 4 * tiny.HEIGHT)
    metadata = pidecode.read_metadata(out)
    assert metadata is not None
    assert (metadata["prompt"], metadata["pipeline_num_steps"]) == ("a cat", 3)
    assert "3 steps were run; sigma 0." in capsys.readouterr().out
    assert 0 < float(Latent.load(out.with_suffix(".safetensors")).sigma) < 1
    assert len(list(tmp_path.glob("out-step-3-sigma-0.*.png"))) == 1


def test_diffusers_pipeline_with_a_color_fix(tmp_path: Path) -> None:
    tiny_models.autoencoder("sd3").save_pretrained(tmp_path / "vae")
    out = run_pipeline(tmp_path, "sd3", "--color-fix", "fine", "--encoder", str(tmp_path / "vae"))
    metadata = pidecode.read_metadata(out)
    assert metadata is not None
    assert metadata["color_fix"] == "fine"


@pytest.mark.parametrize(("space", "side", "scale"), [("dinov2", 4, 4), ("siglip", 4, 8)])
def test_rae(space: str, side: int, scale: int, tmp_path: Path) -> None:
    """The samplers' own forms: a trajectory of grids from RAE, tokens behind a class token from Scale-RAE."""
    channels = {"dinov2": 768, "siglip": 1152}[space]
    generator = torch.Generator().manual_seed(0)
    cells = torch.randn(3, channels, side, side, generator=generator)
    out, file = tmp_path / "out.png", tmp_path / "sample.pt"
    own = [space, str(file), "--out", str(out), "--decoder", decoder_on_disk(tmp_path, space)]
    if space == "dinov2":
        torch.save(cells, file)
        own += ["--step", "1", "--sigma", "0.25"]
    else:
        tokens = cells[1:2].flatten(2).transpose(1, 2)
        torch.save(torch.cat([torch.zeros(1, 1, channels), tokens], dim=1), file)
    main_of("rae")([*own, "--seed", "5"])
    image = Image.open(out)
    assert image.size == (16 * scale * side,) * 2
    latent = Latent(cells[1:2], space, sigma=0.25 if space == "dinov2" else 0.0)
    wanted = PixelDecoder.from_pretrained(tmp_path / "decoder.safetensors").decode(latent, seed=5)  # in its own dtype
    assert to_tensor(image).equal(to_tensor(wanted.image))


@pytest.mark.slow
@pytest.mark.parametrize("space", ["dinov2", "siglip"])
def test_rae_at_its_own_size(space: str) -> None:
    """A whole image of the RAE spaces: 2048 pixels from 512 (4x) and from 256 (8x)."""
    channels, side = {"dinov2": (768, 32), "siglip": (1152, 16)}[space]
    tensor = torch.randn(1, channels, side, side, generator=torch.Generator().manual_seed(0))
    image = tiny.decoder_for(space).decode(Latent(tensor, space), num_steps=1).image
    assert image.size == (2048, 2048)
