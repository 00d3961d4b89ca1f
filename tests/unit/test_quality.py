# SPDX-License-Identifier: Apache-2.0
"""The quality benchmark on made-up images: judges that order what they must, every row of the table, the sheet."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from PIL import Image
from safetensors.torch import save_file
from synthetic import synthetic_image
from taef2 import TinyAutoencoder
from torch import Tensor, nn

from benchmarks import judges, quality
from benchmarks.judges import FeatureJudge, Niqe, block_statistics, fit_asymmetric_gaussian
from data import to_signed


class FixedFeatures(nn.Module):
    """In place of EfficientNet-Lite0: fixed random convolutions."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.kernels = [torch.randn(8, 3 if i == 0 else 8, 3, 3, generator=generator) / 5 for i in range(4)]

    def forward(self, image: Tensor, *, stem: bool = False) -> list[Tensor]:
        features = [image]
        for kernel in self.kernels:
            features.append(torch.relu(F.conv2d(features[-1], kernel, stride=2, padding=1)))
        return features[1 if stem else 2 :]


@pytest.fixture(autouse=True)
def fixed_features(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(judges, "PerceptualFeatures", FixedFeatures)


def texture(seed: int, side: int = 192) -> Tensor:
    """Noise with a natural image's spectrum, in [-1, 1]."""
    spectrum = torch.fft.rfft2(torch.randn(1, 3, side, side, generator=torch.Generator().manual_seed(seed)))
    rows, columns = torch.fft.fftfreq(side)[:, None], torch.fft.rfftfreq(side)[None]
    image = torch.fft.irfft2(spectrum / torch.hypot(rows, columns).clamp(min=1 / side), s=(side, side))
    return (image / image.abs().amax()).clamp(-1, 1)


def blurred(image: Tensor) -> Tensor:
    return F.interpolate(F.avg_pool2d(image, 4), scale_factor=4, mode="bilinear")


def test_distances_are_zero_of_an_image_itself_and_grow_with_damage() -> None:
    judge, image = FeatureJudge(), texture(1)
    noise = torch.randn(image.shape, generator=torch.Generator().manual_seed(2))
    same, little, much = (judge.distances(image + level * noise, image) for level in (0.0, 0.05, 0.3))
    for name in ("dists", "lpips"):
        assert same[name] == pytest.approx(0, abs=1e-5)
        assert same[name] < little[name] < much[name]


def test_niqe_prefers_what_is_like_the_pristine() -> None:
    model = Niqe.fit(texture(seed, 288) for seed in range(6))
    image = texture(10, 288)
    noisy = image + 0.3 * torch.randn(image.shape, generator=torch.Generator().manual_seed(2))
    assert model(image) < min(model(blurred(image)), model(noisy.clamp(-1, 1)))
    assert np.isnan(model(texture(1, 96)))


@pytest.mark.parametrize("shape", [0.8, 1.0, 2.0, 4.0])
def test_a_generalized_gaussian_is_found_again(shape: float) -> None:
    generator = np.random.default_rng(0)
    values = generator.gamma(1 / shape, size=200_000) ** (1 / shape)
    values = torch.from_numpy(np.where(generator.random(values.size) < 0.5, -values, values))
    found, mean, left, right = fit_asymmetric_gaussian(values[None])
    assert found.item() == pytest.approx(shape, rel=0.05)
    assert mean.item() == pytest.approx(0, abs=0.03)
    assert left.item() == pytest.approx(1, rel=0.05) and right.item() == pytest.approx(1, rel=0.05)


def test_statistics_are_of_whole_blocks() -> None:
    statistics, contrast = block_statistics(texture(1, 200))
    assert statistics.shape == (4, 36) and contrast.shape == (4,)
    assert statistics.isfinite().all()


class FakeNcnn:
    """The calls of ncnn that the benchmark makes; its network repeats each pixel four times along each side."""

    @staticmethod
    def Mat(values: np.ndarray) -> Any:  # noqa: N802 - ncnn's name
        return SimpleNamespace(clone=lambda: values)

    class Net:
        def __init__(self) -> None:
            self.opt = SimpleNamespace()

        def load_param(self, path: str) -> int:
            return 0

        load_model = load_param

        def create_extractor(self) -> Any:
            given: dict[str, np.ndarray] = {}

            def extract(name: str) -> tuple[int, np.ndarray]:
                return 0, given["data"].repeat(4, axis=1).repeat(4, axis=2)

            return SimpleNamespace(input=given.__setitem__, extract=extract)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Images, taef2's two files with random weights, and what passes for Real-ESRGAN's files."""
    root = tmp_path_factory.mktemp("quality")
    for name in ("data", "taef2", "models"):
        (root / name).mkdir()
    for index, kind in enumerate(("text_page", "dead_leaves", "gradients")):
        Image.fromarray(synthetic_image(kind, 192, index)).save(root / "data" / f"{kind}.png")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = TinyAutoencoder()
    for name, part in (("encoder", model.encoder), ("decoder", model.decoder)):
        save_file(part.state_dict(), root / "taef2" / f"taef2_{name}.safetensors")
    for name in quality.ENLARGERS.values():
        for ending in ("param", "bin"):
            (root / "models" / f"{name}.{ending}").touch()
    return root


def test_the_table_has_every_row_and_the_sheet_every_column(
    folders: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "ncnn", FakeNcnn)
    columns = ["original", "new, taef2's latent", "new, sigma 0.4"]
    quality.main(
        ["--data", str(folders / "data"), "--taef2", str(folders / "taef2"), "--models", str(folders / "models"),
         "--decoder", "new=tiny", "--images", "1", "--sigma", "0.4", "--json", str(tmp_path / "numbers.json"),
         "--sheet", str(tmp_path / "sheet.png"), "--window", "64", "--columns", *columns]
    )  # fmt: skip
    said = capsys.readouterr().out
    ((_, numbers),) = json.loads((tmp_path / "numbers.json").read_text()).items()
    assert list(numbers) == [
        "original", "new, taef2's latent", "new, its encoder's latent", "taef2, Lanczos", "taef2, Real-ESRGAN x4plus",
        "taef2, realesr-animevideov3", "new upscale", "Real-ESRGAN x4plus", "realesr-animevideov3", "Lanczos",
        "new, sigma 0.4", "new's encoder",
    ]  # fmt: skip
    for name in list(numbers)[1:-1]:
        assert numbers[name].keys() == {"sharpness", "niqe", "psnr", "ssim", "dists", "lpips", "color"}
        assert f"| {name} | {numbers[name]['psnr']:.2f} | " in said
    assert numbers["new upscale"]["psnr"] > numbers["new, taef2's latent"]["psnr"]
    above = numbers["new, sigma 0.4"]["dists"] - numbers["new, taef2's latent"]["dists"]
    assert f"new at sigma 0.4: DISTS-like {above:+.3f} above the clean latent's; color " in said
    with Image.open(tmp_path / "sheet.png") as sheet:
        assert sheet.size == (3 * 64, quality.TITLE + 64)
        assert np.asarray(sheet)[quality.TITLE :, :64].std() > 0


def test_a_wrong_column_or_folder_is_said(folders: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ncnn", FakeNcnn)
    line = ["--data", str(folders / "data"), "--taef2", str(folders / "taef2"), "--images", "1", "--sigma"]
    with pytest.raises(SystemExit, match=r"realesrgan-x4plus\.param is no file of ncnn"):
        quality.main([*line, "--models", str(folders / "data")])
    sheet = quality.Sheet(32, ["nobody"])
    with pytest.raises(quality.SettingError, match="names 'nobody'; there are original"):
        sheet.add({"original": to_signed(synthetic_image("gradients", 64, 0))[None]})
