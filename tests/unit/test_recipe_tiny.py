# SPDX-License-Identifier: Apache-2.0
"""The recipe of `tiny` at debug size: its phases run, resume bit for bit after an interruption, and export."""

from __future__ import annotations

import hashlib
import io
import json
import subprocess
from dataclasses import replace
from importlib.resources import files
from pathlib import Path

import numpy as np
import pytest
import targets
import torch
import train as recipe
from discriminator import contrast_normalized
from export import export_weights
from losses import contrast_distance, dists_distance, lpips_distance
from photographs import FREE, LIST, attribution, from_repository, licenses
from PIL import Image
from safetensors.torch import load_file, save_file
from synthetic import KINDS, synthetic_image
from taef2 import TinyAutoencoder
from torch import Tensor, nn

from data import CropLoader, TinyDataConfig, augment, held_out, quarter, smooth_fields, to_signed
from pidecode.errors import CheckpointError, FileError, SettingError, TrainingError
from pidecode.files import FolderLock
from pidecode.models.tiny import TinyDecoder
from pidecode.registry.configs import TinyDecoderConfig
from pidecode.training.noise import LatentNoiseConfig, PerSampleRNG

CPU = torch.device("cpu")
COPYRIGHT = """\
Format: https://www.debian.org/doc/packaging-manuals/copyright-format/1.0/

Files: *
Copyright: 2020, everybody
License: CC-BY-SA-3.0
 Text.

Files: art/a.jpg
Copyright: 2020, A. Uthor
License: CC-BY-4.0
 Text.

Files: art/b?.png
Copyright: 2020, B. Uthor
License: GPL-2+
 Text.

Files: debian/*
Copyright: 2020, a packager
License: GPL-2+
 Text.
"""


class RandomFeatures(nn.Module):
    """In place of EfficientNet-Lite0: fixed random convolutions."""

    channels = (8, 8, 8, 8, 8)

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.layers = nn.ModuleList(nn.Conv2d(3 if i == 0 else 8, 8, 3, stride=2, padding=1) for i in range(5))
        self.requires_grad_(False)

    def forward(self, image: Tensor) -> list[Tensor]:
        features, x = [], image
        for layer in self.layers:
            x = torch.relu(layer(x))
            features.append(x)
        return features


@pytest.fixture(autouse=True)
def random_features(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recipe, "PerceptualFeatures", RandomFeatures)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A folder of images, and one of the autoencoder's two files."""
    root = tmp_path_factory.mktemp("recipe")
    data, weights = root / "data", root / "taef2"
    data.mkdir()
    weights.mkdir()
    for name in ("a", "b", "c"):
        Image.fromarray(synthetic_image("line_art", 128, ord(name))).save(data / f"{name}.png")
    torch.manual_seed(0)
    autoencoder = TinyAutoencoder()
    for part in ("encoder", "decoder"):
        save_file(getattr(autoencoder, part).state_dict(), weights / f"taef2_{part}.safetensors")
    return data, weights


def debug_recipe(data: Path, *settings: str) -> recipe.TinyRecipe:
    fast = []
    for phase in recipe.PHASES:
        fast += [
            f"{phase}.run.steps=4", f"{phase}.run.checkpoint_every=2", f"{phase}.run.log_every=1",
            f"{phase}.run.sample_every=4", f"{phase}.run.num_samples=1", f"{phase}.run.checkpoint_minutes=0",
            f"{phase}.run.precision=float32",  # which no CPU emulates
            f"{phase}.data.crops=((64, 2, 1.0),)", f"{phase}.data.synthetic_images=5",
        ]  # fmt: skip
    fast += ["perception.loss.gan_start=1", "perception.loss.gan_warmup=1", "perception.loss.r1_every=2",
             "perception.upscale_share=0.5", "perception.loss.taef2=1", "perception.loss.chroma=1"]  # fmt: skip
    made = recipe.parse_recipe(str(data), [*fast, *settings])
    encoder = {
        field: value for field, value in made.encoder.to_dict().items() if not field.endswith(("blocks", "width"))
    }
    encoder |= {field: 1 for field in made.encoder.to_dict() if field.endswith("blocks")}
    encoder |= {field: 8 for field in made.encoder.to_dict() if field.endswith("width")}
    return replace(
        made, decoder=replace(made.decoder, width=8, blocks=(1, 1, 1, 1), base_blocks=(1, 1, 1, 1)),
        encoder=replace(made.encoder, **encoder),
    )  # fmt: skip


class Enlarger:
    """In place of Real-ESRGAN, which needs ncnn and its files: each pixel four times, too bright by a quarter."""

    def __init__(self, *given: object) -> None:
        pass

    def __call__(self, image: Tensor) -> Tensor:
        return image.repeat_interleave(4, 2).repeat_interleave(4, 3) + 0.25


def test_targets_fill_a_folder_that_training_reads(
    folders: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data, taef2 = folders
    monkeypatch.setattr(targets, "RealESRGAN", Enlarger)
    out, config = tmp_path / "run" / "targets", replace(targets.CROPS, crops=((64, 4, 1.0),), synthetic_images=5)
    monkeypatch.setattr(targets, "CROPS", config)
    line = ["--data", str(data), "--taef2", str(taef2), "--models", "unused", "--out", str(out), "--crops", "12"]
    targets.main([*line, "--part", "2/2"])
    assert sorted(path.stem for path in out.iterdir()) == ["000004", "000005", "000006", "000007"]
    kept = (out / "000004.npz").stat().st_mtime_ns
    targets.main(line)
    assert len(list(out.glob("*.npz"))) == 12 and (out / "000004.npz").stat().st_mtime_ns == kept
    with np.load(out / "000009.npz") as arrays:
        image, target = to_signed(arrays["image"])[None], to_signed(arrays["target"])[None]
    autoencoder = TinyAutoencoder.from_folder(taef2)
    reduced = torch.nn.functional.interpolate(image, scale_factor=0.25, mode="bicubic", antialias=True)
    small = autoencoder.decode(autoencoder.encode(reduced))
    assert float((torch.nn.functional.avg_pool2d(target, 4) - small).abs().mean()) < 0.03
    settings = ["phases=('perception',)", "perception.upscale_share=0", f"perception.data.targets={str(out)!r}",
                "perception.data.targets_share=1", "perception.data.targets_batch=2"]  # fmt: skip
    recipe.train_tiny(debug_recipe(data, *settings), tmp_path / "run", taef2, CPU)
    rows = [json.loads(row) for row in (tmp_path / "run" / "perception" / "metrics.jsonl").read_text().splitlines()]
    assert len(rows) == 4 and all(row["real_esrgan"] > 0 for row in rows)
    alone = [*settings, "perception.loss.real_esrgan_features=0", "perception.run.steps=1"]
    recipe.train_tiny(debug_recipe(data, *alone), tmp_path / "alone", taef2, CPU)
    first = json.loads((tmp_path / "alone" / "perception" / "metrics.jsonl").read_text().splitlines()[0])
    assert first["pixel"] == rows[0]["pixel"] and first["lpips"] != rows[0]["lpips"]  # taken to the target in part
    with pytest.raises(SettingError, match=r"real_esrgan_features is 2.0; it must be from 0 to 1"):
        debug_recipe(data, "perception.loss.real_esrgan_features=2")
    with pytest.raises(SettingError, match=r"noise\.sigma_max is 1\.0; it must be below 1"):
        debug_recipe(data, "perception.noise.sigma_max=1.0")
    with pytest.raises(SettingError, match=r"data\.targets acts on the decoder by loss\.real_esrgan"):
        debug_recipe(data, *settings, "perception.loss.real_esrgan=0")
    for wrong in ("targets_batch=0", "reduction=1"):
        with pytest.raises(SettingError, match=r"data\.targets needs data\.reduction=4"):
            debug_recipe(data, *settings, f"perception.data.{wrong}")
    made = debug_recipe(data, *settings[:2], f"perception.data.targets={str(tmp_path)!r}")
    with pytest.raises(TrainingError, match="holds no crops; fill it with targets.py"):
        recipe.train_tiny(made, tmp_path / "none", taef2, CPU)
    for path in out.iterdir():
        path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(TrainingError, match="is no file of targets.py; delete it"):
        recipe.train_tiny(debug_recipe(data, *settings), tmp_path / "damaged", taef2, CPU)
    for part in ("2/1", "0/1", "half"):
        with pytest.raises(SystemExit, match="give a part of a whole"):
            targets.main([*line, "--part", part])


class Interrupt:
    """Stops a run once it reports a step of a phase."""

    def __init__(self, phase: str, step: int) -> None:
        self.phase, self.step, self.current = phase, step, ""

    def __call__(self, text: str) -> None:
        if text.startswith("Phase "):
            self.current = text.removeprefix("Phase ").removesuffix(".")
        if self.current == self.phase and text.startswith(f"step {self.step}/"):
            raise KeyboardInterrupt


def test_all_phases_resume_bit_for_bit_and_export(folders: tuple[Path, Path], tmp_path: Path) -> None:
    data, taef2 = folders
    made = debug_recipe(data)
    whole = recipe.train_tiny(made, tmp_path / "whole", taef2, CPU)
    for phase in recipe.PHASES:
        with pytest.raises(KeyboardInterrupt):
            recipe.train_tiny(made, tmp_path / "broken", taef2, CPU, Interrupt(phase, 3))
    said: list[str] = []
    resumed = recipe.train_tiny(made, tmp_path / "broken", taef2, CPU, said.append)
    assert "Resuming from step 2." in said
    assert whole.name == "decoder.safetensors" and whole.parent.name == "perception"
    first, second = load_file(whole), load_file(resumed)
    assert first.keys() == second.keys()
    assert all(torch.equal(first[key], second[key]) for key in first)
    started = load_file(tmp_path / "whole" / "fidelity" / "decoder.safetensors")
    assert any(not torch.equal(first[key], started[key]) for key in first)
    with Image.open(tmp_path / "whole" / "perception" / "samples" / "step-00000004.png") as grid:
        assert grid.height > 64
    base = load_file(tmp_path / "whole" / "distillation" / "base.safetensors")
    assert base and all(torch.equal(started[f"base.{key}"], base[key]) for key in base)  # fidelity leaves it as it is
    decoder, encoder = export_weights(tmp_path / "whole", tmp_path / "weights", torch.float32)
    exported = load_file(decoder)
    assert all(torch.equal(exported[key], first[key]) for key in first)
    assert encoder.name == "tiny_encoder.safetensors"
    zeros = tmp_path / "zeros"
    zeros.mkdir()
    for file in (decoder, encoder):
        save_file({key: torch.zeros_like(value) for key, value in load_file(file).items()}, zeros / file.name)
    export_weights(tmp_path / "whole", tmp_path / "weights", torch.float32, {zeros: 0.25})
    averaged = load_file(decoder)
    assert all(torch.equal(averaged[key], 0.75 * first[key]) for key in first)
    for average, said in (({zeros: 1.5}, "from 0 to 1"), ({tmp_path: 0.5}, "holds no tiny.safetensors")):
        with pytest.raises(TrainingError, match=said):
            export_weights(tmp_path / "whole", tmp_path / "weights", average=average)
    save_file({"x": torch.zeros(1)}, zeros / "tiny.safetensors")
    with pytest.raises(TrainingError, match="of another shape"):
        export_weights(tmp_path / "whole", tmp_path / "weights", average={zeros: 0.5})


def test_upscaled_samples_show_the_small_image_and_reach_the_decoder(
    folders: tuple[Path, Path], tmp_path: Path
) -> None:
    generated = torch.rand(2, 3, 128, 128) * 2 - 1
    low = torch.nn.functional.interpolate(generated.roll(9, -1), scale_factor=0.25, mode="bicubic", antialias=True)
    for rounds, most in ((0, 1.0), (2, 0.05)):
        reduced = torch.nn.functional.interpolate(
            recipe.back_projected(generated, low, rounds), scale_factor=0.25, mode="bicubic", antialias=True
        )
        assert (float((reduced - low).abs().mean()) < most) is True
    data, taef2 = folders
    weights = [
        load_file(
            recipe.train_tiny(debug_recipe(data, f"perception.upscale_share={share}"), tmp_path / share, taef2, CPU)
        )
        for share in ("0", "1")
    ]
    assert any(not torch.equal(weights[0][key], weights[1][key]) for key in weights[0])
    alone = debug_recipe(data, "phases=('perception',)")
    with pytest.raises(CheckpointError, match="needs a trained encoder; set init_from"):
        recipe.train_tiny(alone, tmp_path / "alone", taef2, CPU)
    with pytest.raises(SettingError, match="for a finished encoder"):
        debug_recipe(data, "distillation.upscale_share=1")


def test_distillation_brings_encoder_and_base_nearer_to_taef2(folders: tuple[Path, Path], tmp_path: Path) -> None:
    data, taef2 = folders
    settings = ["phases=('distillation',)", "distillation.run.steps=60", "distillation.optimizer.lr=0.003",
                "distillation.run.sample_every=20", "distillation.ema.decay=0.9"]  # fmt: skip
    recipe.train_tiny(debug_recipe(data, *settings), tmp_path, taef2, CPU)
    first, *_, last = map(json.loads, (tmp_path / "distillation/samples/metrics.jsonl").read_text().splitlines())
    assert last["encoder_psnr"] > first["encoder_psnr"] and last["encoder_error"] < 0.9 * first["encoder_error"]
    assert last["base_psnr"] > first["base_psnr"] + 1
    (encoder,) = export_weights(tmp_path, tmp_path / "weights", torch.float32)
    assert encoder.name == "tiny_encoder.safetensors"


def test_what_the_base_imitates_is_as_configured(folders: tuple[Path, Path], tmp_path: Path) -> None:
    data, taef2 = folders
    common = ["phases=('distillation',)", "distillation.models=('base',)", "distillation.run.steps=1"]

    def loss(name: str, *settings: str) -> float:
        recipe.train_tiny(debug_recipe(data, *common, *settings), tmp_path / name, taef2, CPU)
        lines = (tmp_path / name / "distillation" / "metrics.jsonl").read_text().splitlines()
        return float(json.loads(lines[0])["base"])

    crops = [loss(f"crops{share}", f"distillation.loss.base_low_res={share}", "distillation.loss.base_unevenness=0",
                  "distillation.data.smooth=0") for share in (0, 0.5, 1)]  # fmt: skip
    assert crops[0] != pytest.approx(crops[2], rel=0.01) and 2 * crops[1] < crops[0] + crops[2]  # the mean is nearer
    smooth = [loss(f"smooth{weight}", f"distillation.loss.base_unevenness={weight}", "distillation.data.smooth=1")
              for weight in (0, 1, 3)]  # fmt: skip
    assert smooth[1] > smooth[0] > 0
    assert smooth[2] - smooth[0] == pytest.approx(3 * (smooth[1] - smooth[0]), rel=1e-3)


def test_a_base_learns_from_latents_of_the_encoder(folders: tuple[Path, Path], tmp_path: Path) -> None:
    data, taef2 = folders
    made = debug_recipe(data, "phases=('distillation',)")
    recipe.train_tiny(made, tmp_path / "first", taef2, CPU)
    export_weights(tmp_path / "first", tmp_path / "weights", torch.float32)
    save_file(TinyDecoder(made.decoder).state_dict(), tmp_path / "weights" / "tiny.safetensors")
    start = ["phases=('distillation',)", "distillation.models=('base',)", f"init_from={tmp_path / 'weights'}"]
    weights = [
        load_file(recipe.train_tiny(
            debug_recipe(data, *start, f"distillation.encoder_share={share}"), tmp_path / share, taef2, CPU
        ))
        for share in ("0", "1")
    ]  # fmt: skip
    assert any(not torch.equal(weights[0][key], weights[1][key]) for key in weights[0])
    alone = debug_recipe(data, *start[:2], "distillation.encoder_share=1")
    with pytest.raises(CheckpointError, match="needs a trained encoder; set init_from"):
        recipe.train_tiny(alone, tmp_path / "alone", taef2, CPU)


def test_the_loss_taef2_holds_low_frequencies(folders: tuple[Path, Path], tmp_path: Path) -> None:
    data, taef2 = folders
    autoencoder, differences = TinyAutoencoder.from_folder(taef2), []
    for weight in ("0", "1000"):
        settings = [f"perception.loss.taef2={weight}", "perception.upscale_share=0", "perception.optimizer.lr=0.02"]
        settings += ["perception.base_with_decoder=False"]  # it has none
        settings += [
            "phases=('fidelity', 'perception')",
            "perception.run.steps=20",
            "perception.optimizer.warmup_steps=1",
        ]
        made = debug_recipe(data, *settings)
        made = replace(made, decoder=replace(made.decoder, base_blocks=()))
        decoder = TinyDecoder(made.decoder)
        decoder.load_state_dict(load_file(recipe.train_tiny(made, tmp_path / weight, taef2, CPU)))
        images = torch.rand(4, 3, 1, 1, generator=torch.Generator().manual_seed(1)).expand(4, 3, 16, 16)
        with torch.no_grad():
            latent = autoencoder.encode(images)
            small = torch.nn.functional.avg_pool2d(decoder(torch.nn.functional.pixel_unshuffle(latent, 2)), 4)
            differences.append(float((small - autoencoder.decoder_image(latent)).mean((2, 3)).abs().mean()))
    assert differences[1] < 0.7 * differences[0]


def test_a_base_trained_with_the_decoder_learns_from_both_their_losses(
    folders: tuple[Path, Path], tmp_path: Path
) -> None:
    data, taef2 = folders

    def exported(name: str, *settings: str) -> dict[str, Tensor]:
        made = debug_recipe(data, "phases=('fidelity', 'perception')", "perception.upscale_share=0", *settings)
        return load_file(recipe.train_tiny(made, tmp_path / name, taef2, CPU))

    frozen, trained = exported("frozen", "perception.base_with_decoder=False"), exported("trained")
    by_decoder = exported("by_decoder", "perception.loss.base=0")
    initial = load_file(tmp_path / "trained" / "fidelity" / "decoder.safetensors")
    weights = [key for key in initial if key.startswith("base.") and key.endswith("weight")]
    assert all(torch.equal(frozen[key], initial[key]) for key in weights)
    assert any(not torch.equal(by_decoder[key], initial[key]) for key in weights)
    assert any(not torch.equal(by_decoder[key], trained[key]) for key in weights)
    (metrics,) = map(json.loads, (tmp_path / "trained/perception/samples/metrics.jsonl").read_text().splitlines())
    assert metrics["base_psnr"] > 0


def test_a_discriminator_can_be_trained_before_the_decoder(folders: tuple[Path, Path], tmp_path: Path) -> None:
    data, taef2 = folders
    settings = ["perception.loss.discriminator_steps=3", "perception.upscale_share=0", "perception.run.keep=9"]
    made = debug_recipe(data, "phases=('fidelity', 'perception')", *settings, "perception.run.checkpoint_every=1")
    recipe.train_tiny(made, tmp_path, taef2, CPU)
    steps = [
        load_file(tmp_path / f"perception/checkpoints/step-{step:08d}/tensors.safetensors") for step in (1, 2, 3, 4)
    ]

    def changed(module: str, before: int) -> bool:
        pairs = (
            (steps[before][key], steps[before + 1][key]) for key in steps[0] if key.startswith(f"weights.{module}.")
        )
        return any(not torch.equal(*pair) for pair in pairs)

    assert [changed("discriminator", before) for before in range(3)] == [True, True, True]
    assert [changed("decoder", before) for before in range(3)] == [False, False, True]


def test_smooth_crops_count_less_as_configured(folders: tuple[Path, Path], tmp_path: Path) -> None:
    data, taef2 = folders
    losses = []
    for weight in ("1", "0.5", "0"):
        settings = [f"perception.loss.smooth_weight={weight}", "perception.data.smooth=1", "perception.run.steps=1"]
        recipe.train_tiny(debug_recipe(data, *settings), tmp_path / weight, taef2, CPU)
        lines = (tmp_path / weight / "perception" / "metrics.jsonl").read_text().splitlines()
        losses.append(json.loads(lines[0])["pixel"])
    assert losses[0] > 0
    assert losses[1:] == pytest.approx([losses[0] / 2, 0], rel=1e-5)


def test_initial_weights_of_another_shape_are_refused(folders: tuple[Path, Path], tmp_path: Path) -> None:
    data, taef2 = folders
    (tmp_path / "start").mkdir()
    save_file({"x": torch.zeros(1)}, tmp_path / "start" / "tiny.safetensors")
    for phase, name in (("distillation", "base"), ("fidelity", "decoder")):
        made = replace(debug_recipe(data, f"phases=({phase!r},)"), init_from=str(tmp_path / "start"))
        with pytest.raises(CheckpointError, match=rf"does not fit the {name} .* set decoder\.\*"):
            recipe.train_tiny(made, tmp_path / "run", taef2, CPU)


def test_settings_that_cannot_act_are_refused() -> None:
    with pytest.raises(SettingError, match=r"multiples of 64"):
        TinyDataConfig(crops=((100, 1, 1.0),))
    with pytest.raises(SettingError, match=r"acts on the decoder"):
        recipe.PhaseConfig(models=("encoder",), loss=recipe.TinyLossConfig(gan=0.1))
    with pytest.raises(SettingError, match=r"models is \('painter',\); it must name decoder, base, encoder"):
        recipe.PhaseConfig(models=("painter",))
    with pytest.raises(SettingError, match=r"discriminator_steps is 5, and loss\.gan is 0"):
        recipe.PhaseConfig(loss=recipe.TinyLossConfig(discriminator_steps=5))
    with pytest.raises(SettingError, match=r"discriminator_steps is 9000; it must be from 0 to below run\.steps=1000"):
        recipe.PhaseConfig(loss=recipe.TinyLossConfig(gan=1.0, discriminator_steps=9000))
    for models in (("encoder",), ("decoder", "base")):
        with pytest.raises(SettingError, match=r"name decoder there and not base"):
            recipe.PhaseConfig(models=models, base_with_decoder=True)
    for values, said in (
        ({"encoder_share": 0.5}, r"encoder_share trains the base .*\('decoder',\)"),
        ({"encoder_share": 2.0, "models": ("base",)}, "encoder_share is 2.0; it must be from 0 to 1"),
        ({"loss": recipe.TinyLossConfig(base_low_res=1.5)}, "base_low_res is 1.5; it must be from 0 to 1"),
        ({"loss": recipe.TinyLossConfig(base_low_res=0.5)}, "base_low_res acts on the base, which this phase"),
        ({"loss": recipe.TinyLossConfig(base_unevenness=1.0), "models": ("base",)}, "smooth crops, of which there"),
    ):
        with pytest.raises(SettingError, match=said):
            recipe.PhaseConfig(**values)
    bare = replace(recipe.TinyRecipe(), decoder=TinyDecoderConfig(base_blocks=()))
    with pytest.raises(SettingError, match=r"base_with_decoder is set, and the decoder has no base"):
        recipe.build_models(bare, recipe.PhaseConfig(base_with_decoder=True), [])
    with pytest.raises(SettingError, match=r"names base, and the decoder has none"):
        recipe.build_models(bare, bare.distillation, [])
    with pytest.raises(SettingError, match=r"Did you mean perception"):
        recipe.parse_recipe("x", ["perceptio.loss.gan=0"])


def test_distances_are_zero_for_equal_images_and_grow() -> None:
    features = RandomFeatures()
    image = torch.rand(2, 3, 64, 64) * 2 - 1
    same, near, far = (features((image + s * torch.randn_like(image)).clamp(-1, 1)) for s in (0.0, 0.1, 0.5))
    for distance in (lpips_distance, dists_distance):
        values = [distance(x, features(image)) for x in (same, near, far)]
        assert values[0].abs().max() < 1e-5
        assert (values[0] < values[1]).all() and (values[1] < values[2]).all()


def test_contrast_is_compared_octave_by_octave() -> None:
    noise = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(1))
    image = 0.3 * torch.nn.functional.interpolate(noise[..., ::4, ::4], scale_factor=4, mode="bilinear")
    values = [contrast_distance(share * image, image) for share in (1.0, 0.8, 0.4)]
    assert not values[0].any() and (values[1] < values[2]).all()
    torch.testing.assert_close(values[1], torch.full((2,), -np.log(0.8)), rtol=0.1, atol=0, check_dtype=False)
    assert (contrast_distance(image + 0.1, image) < 1e-5).all()  # brightness is left to others
    grain = 0.004 * (torch.arange(64) % 2 * 2 - 1.0)  # of 2 pixels, which no octave holds
    assert (contrast_distance(image + grain, image) < 0.1 * values[1]).all()


def test_contrast_normalization_makes_faint_texture_count_and_leaves_flat_areas_flat() -> None:
    flat = torch.full((1, 3, 32, 32), 0.5)
    assert contrast_normalized(flat).abs().max() < 1e-3
    texture = torch.randn(1, 1, 32, 32, generator=torch.Generator().manual_seed(0)).expand(-1, 3, -1, -1)
    strong, faint = (contrast_normalized(flat + share * texture).std() for share in (0.4, 0.1))
    assert 0.6 < faint < strong < 1.2  # of a quarter of the contrast hardly less is left
    assert contrast_normalized(flat + 1e-3 * texture).std() < 0.1  # an eighth of a step of 255 is no texture
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(contrast_normalized(flat + 0.1 * texture).std(), faint)


def test_augmentation_depends_on_the_seed_alone_and_stays_in_range() -> None:
    image = torch.rand(4, 3, 64, 64) * 2 - 1
    first, again, other = (
        augment(image, PerSampleRNG(seed, 0, range(4), CPU), recolor=1.0, join=1.0) for seed in (1, 1, 2)
    )
    assert torch.equal(first, again) and not torch.equal(first, other)
    assert first.abs().max() <= 1


def test_crops_with_targets_come_flipped_and_turned_together(folders: tuple[Path, Path], tmp_path: Path) -> None:
    data, taef2 = folders
    recipe.prepare_images(TinyDataConfig(source=str(data), synthetic_images=0), tmp_path, 0, lambda text: None)
    corner = np.zeros((64, 64, 3), np.uint8)
    corner[:8, :24] = 255  # tells all eight orientations apart
    np.savez(tmp_path / "0.npz", image=corner, target=corner // 5)
    config = TinyDataConfig(source=str(data), targets=str(tmp_path), targets_share=1, targets_batch=1)
    encode, noise = TinyAutoencoder.from_folder(taef2).encode, LatentNoiseConfig(probability=0)
    loader = CropLoader(config, noise, tmp_path, encode, device=CPU, seed=0)
    batches = [loader.batch(number)[0] for number in range(60)]
    seen = {batch.image.numpy().tobytes() for batch in batches}
    assert len(seen) == 8
    for batch in batches:
        assert batch.target is not None
        torch.testing.assert_close((batch.target + 1) * 5, batch.image + 1)


def test_smooth_fields_have_one_color_or_no_edges() -> None:
    fields = smooth_fields(torch.zeros(40, 3, 64, 64), PerSampleRNG(3, 0, range(40), CPU))
    steps = torch.stack([fields.diff(dim=axis).abs().amax((1, 2, 3)) for axis in (-1, -2)]).amax(0)
    assert steps.max() < 0.1 and 8 < int((steps < 1e-6).sum()) < 32
    assert 4 < int(((fields - fields.mean(1, keepdim=True)).abs().amax((1, 2, 3)) < 1e-6).sum()) < 24
    assert fields.std(0).min() > 0.3
    fields = smooth_fields(torch.zeros(400, 3, 4, 4), PerSampleRNG(4, 0, range(400), CPU))
    pure = (fields.abs() - fields.abs().round()).abs().amax((1, 2, 3)) < 1e-6  # each channel at 0, at half or at full
    flat = (fields - fields[..., :1, :1]).abs().amax((1, 2, 3)) < 1e-6
    assert 60 < int((pure & flat).sum()) < 120
    assert len({tuple(color) for color in fields[pure & flat][:, :, 0, 0].round().int().tolist()}) > 15


def test_features_are_compared_at_every_place_of_their_strides() -> None:
    rows = torch.arange(128.0).view(1, 1, 128, 1).expand(1, 3, 128, 128)
    windows = [rows[recipe.random_window(rows, PerSampleRNG(0, step, [0], CPU))] for step in range(300)]
    assert {int(window[0, 0, 0, 0]) for window in windows} == set(range(32))
    assert all(window.shape == (1, 3, 96, 96) for window in windows)


def test_only_images_under_free_licenses_are_gathered(tmp_path: Path) -> None:
    path = tmp_path / "copyright"
    path.write_text(COPYRIGHT)
    rows = licenses(path)

    def license_of(name: str) -> str | None:
        return next((text for pattern, text, _ in rows if pattern.fullmatch(name)), None)

    assert [license_of(name) for name in ("a.jpg", "b2.png", "c.png")] == ["CC-BY-4.0", "GPL-2+", "CC-BY-SA-3.0"]
    assert [bool(FREE.fullmatch(name)) for name in ("CC-BY-4.0", "CC0-1.0", "CC-BY-NC-4.0", "GPL-2+", "CC-BY-ND")] == [
        True, True, False, False, False,
    ]  # fmt: skip
    path.write_text("The images are by several people.")
    with pytest.raises(ValueError, match="prose"):
        licenses(path)


def test_listed_images_come_from_repositories_at_their_commits(tmp_path: Path) -> None:
    def git(*arguments: str) -> str:
        identity = ["-c", "user.name=A", "-c", "user.email=a@example.org", "-c", "commit.gpgsign=false"]
        command = ["git", "-C", str(work), *identity, *arguments]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()

    work, out = tmp_path / "owner/name", tmp_path / "out"
    work.mkdir(parents=True)
    out.mkdir()
    file, noise = io.BytesIO(), np.random.default_rng(1).integers(0, 255, (600, 1800, 3), np.uint8)
    Image.fromarray(noise).save(file, "PNG")
    git("init", "--quiet")
    (work / "a b.png").write_bytes(file.getvalue())
    git("add", ".")
    git("commit", "--quiet", "-m", "first")
    commit = git("rev-parse", "HEAD")
    (work / "a b.png").write_bytes(b"another")
    git("commit", "--quiet", "-am", "second")
    row = {"file": "x.webp", "commit": commit, "path": "a b.png", "sha256": hashlib.sha256(file.getvalue()).hexdigest()}
    rows = [*from_repository("owner/name", [row], out, f"file://{tmp_path}/")]
    assert rows == [{**row, "category": "photograph", "repository": "owner/name"}]
    with Image.open(out / "x.webp") as image:
        assert image.size == (1200, 600)  # not wider than 2:1
    with pytest.raises(ValueError, match="another file"):
        list(from_repository("owner/name", [{**row, "sha256": "0"}], out, f"file://{tmp_path}/"))


def test_every_listed_image_is_free_and_names_whom_to_credit() -> None:
    rows = [json.loads(line) for line in LIST.read_text(encoding="utf-8").splitlines()]
    assert len(rows) > 1000 and len({row["file"] for row in rows}) == len(rows)
    assert [row["repository"] for row in rows] == sorted(row["repository"] for row in rows)
    for row in rows:
        assert FREE.fullmatch(row["license"]), row
        assert row["author"] or not row["license"].startswith("CC-BY"), row
    shipped = (files("pidecode") / "assets/ATTRIBUTION.md").read_text(encoding="utf-8")
    assert shipped.endswith(attribution(rows))  # so that the credits travel with the weights


@pytest.mark.parametrize("kind", KINDS)
def test_synthetic_images_are_the_same_for_the_same_seed(kind: str) -> None:
    first, again, other = (synthetic_image(kind, 96, seed) for seed in (3, 3, 4))
    assert first.shape == (96, 96, 3) and first.dtype == np.uint8
    assert np.array_equal(first, again) and not np.array_equal(first, other)


def test_held_out_images_depend_on_names_only() -> None:
    names = {"a": [f"{i}.png" for i in range(20)], "b": ["x.png"]}
    chosen = held_out(names)
    assert chosen == held_out({key: list(reversed(group)) for key, group in names.items()})
    assert len(chosen) == 3 and "x.png" in chosen
    assert quarter(np.zeros((64, 128, 3), np.uint8)).shape == (16, 32, 3)


def test_a_second_run_in_the_folder_changes_nothing(folders: tuple[Path, Path], tmp_path: Path) -> None:
    data, weights = folders
    (tmp_path / "run").mkdir()
    with FolderLock(tmp_path / "run", "training"), pytest.raises(FileError, match="is in use by a training"):
        recipe.train_tiny(recipe.parse_recipe(str(data), []), tmp_path / "run", weights, CPU)
    assert not list((tmp_path / "run").iterdir())
