# SPDX-License-Identifier: Apache-2.0
"""`pidecode generate`, from a pipeline and a decoder on disk to images and a contact sheet; and resuming it."""

from __future__ import annotations

import json
from pathlib import Path
from types import MappingProxyType
from typing import Any

import pytest
import torch
from click.testing import CliRunner, Result
from PIL import Image
from safetensors.torch import save_file

import tiny_models
import tiny_pipelines as tiny
from comfyui_kit import network
from pidecode.cli.app import cli
from pidecode.errors import SettingError, SizeError
from pidecode.images import read_metadata
from pidecode.integrations.text_to_image import JOB_FILE, GenerationJob, PixelDiT, _unfinished
from pidecode.latents.latent import Latent, NormalizationWarning
from pidecode.registry.configs import debug_config
from pidecode.registry.spaces import diffusion_size

pytestmark = [
    pytest.mark.filterwarnings(f"ignore::{NormalizationWarning.__module__}.NormalizationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning"),
]


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    tiny.build("sdxl").save_pretrained(folder / "pipeline")
    decoder = tiny.decoder_for("sdxl")
    tensors = {name: tensor.clone() for name, tensor in decoder.net.state_dict().items()}
    save_file(tensors, folder / "decoder.safetensors", decoder.metadata.to_metadata())
    return folder


def run(files: Path, out: Path, *more: str) -> Result:
    common = [
        "generate",
        "--space",
        "sdxl",
        "--size",
        "256x128",
        "--num-inference-steps",
        "4",
        "-o",
        str(out),
        "--device",
        "cpu",
    ]
    own = ["--pipeline", str(files / "pipeline"), "-m", str(files / "decoder.safetensors")]
    return CliRunner().invoke(cli, [*common, *own, "--arguments", '{"guidance_scale": 1.0}', *more])


def test_prompts_and_seeds_become_images_with_metadata_and_a_contact_sheet(files: Path, tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_text("# animals\na dog\n\n")
    out = tmp_path / "out"
    more = ["a cat", "--prompts", str(tmp_path / "prompts.txt"), "--seed", "1", "--seed", "2", "--compare", "vae"]
    done = run(files, out, *more, "--stop-after", "3", "--save-latents", "--json")
    assert done.exit_code == 0, done.output
    rows: list[dict[str, Any]] = json.loads(done.stdout)
    names = [Path(row["image"]).name for row in rows]
    assert names == ["0001-a-cat-s1.png", "0001-a-cat-s2.png", "0002-a-dog-s1.png", "0002-a-dog-s2.png"]
    metadata = read_metadata(out / names[0])
    assert metadata is not None
    assert (metadata["prompt"], metadata["seed"], metadata["image_model"]) == ("a cat", 1, "sdxl")
    assert 0 < metadata["sigma"] < 0.8
    assert "PSNR" in metadata["drift"]
    assert metadata["drift"] == rows[0]["drift"]
    assert Image.open(out / names[0]).size == (256, 128)
    assert Image.open(rows[0]["comparison"]).size == (512, 128)
    assert (out / "contact-sheet.jpg").is_file()
    assert Latent.load(rows[3]["latent"]).prompts == ("a dog",)

    # The same command resumes: only what is missing is generated, and it comes out the same.
    before = (out / names[2]).read_bytes()
    kept = (out / names[0]).stat().st_mtime_ns
    (out / names[2]).unlink()
    again = run(files, out, *more, "--stop-after", "3", "--save-latents")
    assert again.exit_code == 0, again.output
    assert (out / names[2]).read_bytes() == before
    assert (out / names[0]).stat().st_mtime_ns == kept
    other = run(files, out, "a cat")
    assert other.exit_code == 2
    assert "holds another run (it differs in" in other.output

    # A kept latent is an image again at any time.
    decoded = CliRunner().invoke(
        cli,
        ["decode", str(rows[0]["latent"]), "-m", str(files / "decoder.safetensors"), "-o", str(tmp_path / "x.png"),
         "--seed", "1", "--device", "cpu"],
    )  # fmt: skip
    assert decoded.exit_code == 0, decoded.output
    assert list(Image.open(tmp_path / "x.png").getdata()) == list(Image.open(out / names[0]).getdata())


def test_latents_are_not_kept_unasked(files: Path, tmp_path: Path) -> None:
    done = run(files, tmp_path / "out", "a cat")
    assert done.exit_code == 0, done.output
    assert list((tmp_path / "out" / "latents").iterdir()) == []
    assert not (tmp_path / "out" / "contact-sheet.jpg").exists()


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["--size", "250x128"], "The nearest size that fits is 256x128"),
        (["--size", "big"], "it must be WIDTHxHEIGHT"),
        (["--stop-after", "late"], "counted from 1, or `recommended`"),
        (["--arguments", "[]"], "must be a JSON object"),
        (["--pipeline", "/nowhere/at/all"], "hf download stabilityai/stable-diffusion-xl-base-1.0"),
    ],
)
def test_impossible_arguments_are_refused(files: Path, tmp_path: Path, more: list[str], said: str) -> None:
    done = run(files, tmp_path / "out", "a cat", *more)
    assert done.exit_code in (2, 5)
    assert said in done.output.replace("\n", " ")


def test_sizes_and_prompts_that_cannot_be() -> None:
    assert diffusion_size("flux", 2048, 1024) == (512, 256)
    with pytest.raises(SizeError, match="nearest size that fits is 2048x1024"):
        diffusion_size("sd3", 2040, 1030)
    with pytest.raises(SettingError, match="There is no prompt"):
        GenerationJob(model="flux", prompts=(), out=Path("x"))
    with pytest.raises(SettingError, match="each once"):
        GenerationJob(model="flux", prompts=("a",), out=Path("x"), seeds=(1, 1))


def test_a_job_takes_any_mapping_of_arguments(tmp_path: Path) -> None:
    job = GenerationJob(model="flux", prompts=("a",), out=tmp_path, arguments=MappingProxyType({"guidance_scale": 1}))
    assert len(_unfinished(job)) == 1
    assert json.loads((tmp_path / JOB_FILE).read_text())["arguments"] == {"guidance_scale": 1}


def test_pixeldits_differ_as_objects_do() -> None:
    net = network(debug_config(latent_channels=0), 0.05)
    one, other = PixelDiT(net, name="one"), PixelDiT(net, name="one")
    assert len({one, other}) == 2


@pytest.fixture(scope="module")
def official(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small Gemma, and small random networks of PixelDiT and of a teacher where the official files lie."""
    folder = tmp_path_factory.mktemp("official")
    tiny_models.save_gemma(folder / "gemma")
    networks = {
        "PixelDiT_finetune_2kto4k": ("core.", {"latent_channels": 0}),
        "PiD_v1pt5_res2kto4k_sr4x_official_flux_undistilled": ("net_ema.", {"latent_channels": 16}),
    }
    for name, (prefix, changes) in networks.items():
        config = debug_config(text_dim=32, text_length=300, **changes)
        net = network(config, 0.05)
        (folder / "checkpoints" / name).mkdir(parents=True)
        tensors = {f"{prefix}{key}": value.bfloat16() for key, value in net.state_dict().items()}
        torch.save(tensors, folder / "checkpoints" / name / "model_ema_bf16.pth")
    return folder


def test_pixeldit_makes_images_of_prompts_alone(official: Path, tmp_path: Path) -> None:
    def make(*more: str) -> Result:
        common = ["generate", "a cat", "--space", "pixeldit", "-m", str(official), "--size", "64x32", "--device", "cpu"]
        own = ["--text-encoder", str(official / "gemma"), "-o", str(tmp_path / "out"), "--num-inference-steps", "2"]
        return CliRunner().invoke(cli, [*common, *own, *more])

    made = make("--seed", "1", "--seed", "2", "--guidance-scale", "3")
    assert made.exit_code == 0, made.output
    file = tmp_path / "out" / "0001-a-cat-s2.png"
    metadata = read_metadata(file)
    assert metadata is not None
    assert (metadata["kind"], metadata["seed"], metadata["num_steps"]) == ("backbone", 2, 2)
    assert (metadata["guidance_scale"], metadata["prompt"], metadata["license"]) == (3.0, "a cat", "NSCLv1")
    assert Image.open(file).size == (64, 32)
    before = file.read_bytes()
    file.unlink()
    again = make("--seed", "1", "--seed", "2", "--guidance-scale", "3")
    assert again.exit_code == 0, again.output
    assert file.read_bytes() == before
    for more, said in (
        (["--color-fix", "fine"], "--color-fix cannot act on PixelDiT"),
        (["--stop-after", "1"], "has no pipeline, latents or VAE"),
        (["--num-steps", "3"], "by --num-inference-steps"),
        (["--seed", "3", "--size", "60x32", "-o", str(tmp_path / "other")], "nearest size that does is 64x32"),
    ):
        refused = make(*more)
        assert refused.exit_code == 2, refused.output
        assert said in refused.output


def test_a_teacher_in_the_official_layout_decodes_with_guidance(official: Path, tmp_path: Path) -> None:
    latent = tmp_path / "latent.safetensors"
    Latent(torch.randn(1, 16, 2, 2), "flux", prompt="a cat").save(latent)
    file = official / "checkpoints" / "PiD_v1pt5_res2kto4k_sr4x_official_flux_undistilled" / "model_ema_bf16.pth"
    options = ["--num-steps", "2", "--guidance-scale", "2", "--text-encoder", str(official / "gemma")]
    made = CliRunner().invoke(
        cli, ["decode", str(latent), "-m", str(file), *options, "-o", str(tmp_path / "x.png"), "--device", "cpu"]
    )
    assert made.exit_code == 0, made.output
    metadata = read_metadata(tmp_path / "x.png")
    assert metadata is not None
    assert (metadata["kind"], metadata["guidance_scale"], metadata["num_steps"]) == ("teacher", 2.0, 2)


def test_a_run_that_made_nothing_does_not_hold_its_folder(files: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    absent = CliRunner().invoke(
        cli, ["generate", "a cat", "--space", "sdxl", "--pipeline", str(tmp_path / "none"), "-o", str(out)]
    )
    assert absent.exit_code != 0
    assert (out / "job.json").is_file()
    done = run(files, out, "a dog")
    assert done.exit_code == 0, done.output
