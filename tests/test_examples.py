# SPDX-License-Identifier: Apache-2.0
"""Every example, run as a reader runs it: pipeline and decoder from disk, at tiny size."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

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


def on_disk(folder: Path, name: str, space: str) -> list[str]:
    """A tiny pipeline and a tiny decoder as files, and the options that name them."""
    tiny.build(name).save_pretrained(folder / "pipeline")
    return ["--pipeline", str(folder / "pipeline"), "--decoder", decoder_on_disk(folder, space)]


def decoder_on_disk(folder: Path, space: str) -> str:
    decoder = tiny.decoder_for(space)
    tensors = {name: tensor.clone() for name, tensor in decoder.net.state_dict().items()}
    save_file(tensors, folder / "decoder.safetensors", decoder.metadata.to_metadata())
    return str(folder / "decoder.safetensors")


def call(name: str, **changes: Any) -> dict[str, Any]:
    small = dict(height=tiny.HEIGHT, width=tiny.WIDTH, num_inference_steps=tiny.STEPS)
    return {**small, **tiny.CALL[name], **changes}


def test_every_example_is_run_here() -> None:
    names = {path.stem for path in EXAMPLES}
    assert names == {"flux", "flux2_klein", "qwenimage", "rae", "sd3", "sdxl", "zimage"}


def test_flux(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out.png"
    main_of("flux")(["a cat", "--out", str(out), *on_disk(tmp_path, "flux", "flux")], **call("flux"), stop_after=3)
    assert Image.open(out).size == (4 * tiny.WIDTH, 4 * tiny.HEIGHT)
    assert "3 steps were run; sigma 0." in capsys.readouterr().out


def test_flux2_klein(tmp_path: Path) -> None:
    out = tmp_path / "out.png"
    main_of("flux2_klein")(["a cat", "--out", str(out), *on_disk(tmp_path, "klein", "flux2")], **call("klein"))
    assert Image.open(out).size == (256, 128)
    assert Image.open(f"{out}-native.png").size == (64, 32)


def test_sd3(tmp_path: Path) -> None:
    tiny_models.autoencoder("sd3").save_pretrained(tmp_path / "vae")
    own = ["a cat", "--out-folder", str(tmp_path / "out"), "--encoder", str(tmp_path / "vae")]
    main_of("sd3")([*own, *on_disk(tmp_path, "sd3", "sd3")], **call("sd3"))
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["1.png", "2.png"]


def test_sdxl(tmp_path: Path) -> None:
    out = tmp_path / "out.png"
    main_of("sdxl")(["a cat", "--out", str(out), *on_disk(tmp_path, "sdxl", "sdxl")], **call("sdxl", stop_after=3))
    assert Image.open(tmp_path / "out-again.png").size == Image.open(out).size == (256, 128)
    assert 0 < float(Latent.load(tmp_path / "out.safetensors").sigma) < 1


def test_qwenimage(tmp_path: Path) -> None:
    own = ["a cat", "--out-folder", str(tmp_path / "out"), "--num-steps", "3", "4"]
    main_of("qwenimage")([*own, *on_disk(tmp_path, "qwenimage", "qwenimage")], **call("qwenimage"))
    assert len(list((tmp_path / "out").iterdir())) == 2
    assert (tmp_path / "out" / "step-4-sigma-0.000.png").is_file()


def test_zimage(tmp_path: Path) -> None:
    out = tmp_path / "out.png"
    main_of("zimage")(["a cat", "--out", str(out), *on_disk(tmp_path, "zimage", "flux")], **call("zimage"))
    assert Image.open(out).size == (256, 128)


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
    main_of("rae")(own, seed=5)
    image = Image.open(out)
    assert image.size == (16 * scale * side,) * 2
    latent = Latent(cells[1:2], space, sigma=0.25 if space == "dinov2" else 0.0)
    wanted = PixelDecoder.from_pretrained(tmp_path / "decoder.safetensors").decode(latent, seed=5)  # in its own dtype
    assert isinstance(wanted, Image.Image)
    assert to_tensor(image).equal(to_tensor(wanted))


@pytest.mark.slow
@pytest.mark.parametrize("space", ["dinov2", "siglip"])
def test_rae_at_its_own_size(space: str) -> None:
    """A whole image of the RAE spaces: 2048 pixels from 512 (4x) and from 256 (8x)."""
    channels, side = {"dinov2": (768, 32), "siglip": (1152, 16)}[space]
    tensor = torch.randn(1, channels, side, side, generator=torch.Generator().manual_seed(0))
    image = tiny.decoder_for(space).decode(Latent(tensor, space), num_steps=1)
    assert isinstance(image, Image.Image)
    assert image.size == (2048, 2048)
