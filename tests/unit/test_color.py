# SPDX-License-Identifier: Apache-2.0
"""Colors held to a reference: drift goes, detail stays, and the report says by how much."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn import functional

import tiny_models
import tiny_pipelines
from pidecode import PixelDecoder
from pidecode.color_fix import ColorDriftWarning, apply_color_fix, color_drift, corrected
from pidecode.encoders.base import load_encoder
from pidecode.errors import SettingError
from pidecode.latents.latent import Latent


def scene(height: int = 128, width: int = 192) -> tuple[Tensor, Tensor, Tensor]:
    """A smooth reference, the same enlarged with detail on it, and that with brightness and hue gone astray."""
    generator = torch.Generator().manual_seed(0)
    smooth = functional.interpolate(
        torch.rand(1, 3, 4, 6, generator=generator) - 0.5, size=(height, width), mode="bicubic"
    )
    detail = torch.randn(1, 3, height, width, generator=generator) * 0.05
    detail = detail - functional.interpolate(functional.avg_pool2d(detail, 4), scale_factor=4, mode="nearest")
    true = smooth + detail
    return functional.avg_pool2d(true, 4), true, true + torch.tensor([0.08, -0.05, 0.02]).view(1, 3, 1, 1)


@pytest.mark.parametrize("color_fix", ["coarse", "fine", "back-projection"])
def test_drift_goes_and_detail_stays(color_fix: str) -> None:
    reference, true, astray = scene()
    held = apply_color_fix(astray.clone(), reference, color_fix)
    torch.testing.assert_close(held, true, rtol=0, atol=1e-3)
    assert apply_color_fix(astray, reference, "off") is astray


def test_full_follows_drift_that_soft_leaves() -> None:
    reference, true, _ = scene(512, 768)
    waves = 0.1 * torch.sin(torch.arange(768) / 96 * 2 * 3.14159).expand(1, 3, 512, 768)
    left = {
        color_fix: float((apply_color_fix(true + waves, reference, color_fix) - true).std())
        for color_fix in ("coarse", "fine")
    }
    assert left["fine"] < 0.02 < 0.05 < left["coarse"]


def test_detail_of_the_reference_is_held_and_finer_detail_stays() -> None:
    reference, true, _ = scene()
    lost = functional.interpolate(functional.avg_pool2d(reference, 2), size=true.shape[-2:], mode="bicubic")
    fine = true - functional.interpolate(functional.avg_pool2d(true, 4), scale_factor=4, mode="nearest")
    astray = lost + fine
    held = apply_color_fix(astray.clone(), reference, "back-projection")
    psnr = {
        color_fix: color_drift(apply_color_fix(astray.clone(), reference, color_fix), reference)[0].psnr
        for color_fix in ("off", "fine", "back-projection")
    }
    assert psnr["back-projection"] > psnr["fine"] + 10 >= psnr["off"] + 10
    own = held - functional.interpolate(functional.avg_pool2d(held, 4), scale_factor=4, mode="nearest")
    assert functional.cosine_similarity(own.flatten(), fine.flatten(), dim=0) > 0.95


def test_fine_detail_goes_where_the_reference_shows_something_else() -> None:
    generator = torch.Generator().manual_seed(3)
    reference = functional.interpolate(torch.rand(1, 3, 16, 32, generator=generator) - 0.5, scale_factor=2)
    fine = torch.randn(1, 3, 128, 256, generator=generator) * 0.05
    fine = fine - functional.interpolate(functional.avg_pool2d(fine, 4), scale_factor=4, mode="nearest")
    wrong = reference.clone()
    wrong[..., 32:] = wrong[..., 32:].flip(-2)
    made = functional.interpolate(wrong, size=fine.shape[-2:], mode="bicubic") + fine
    held = apply_color_fix(made.clone(), reference, "back-projection")
    kept = held - functional.interpolate(reference, size=fine.shape[-2:], mode="bicubic")

    def share(part: slice) -> float:
        return float((kept[..., part] * fine[..., part]).sum() / fine[..., part].square().sum())

    assert share(slice(0, 112)) > 0.9
    assert share(slice(144, 256)) < 0.1


def test_the_report_says_what_is_off() -> None:
    reference, true, astray = scene()
    (good,), (bad,) = color_drift(true, reference), color_drift(astray, reference)
    assert good.psnr > 90
    assert bad.shift == pytest.approx((10.2, -6.375, 2.55), abs=0.01)
    shift = "mean shift R +10.20 G -6.38 B +2.55"
    assert str(bad) == f"PSNR {bad.psnr:.2f} dB, {shift}, chroma {bad.chroma:.2f} of 255"
    assert color_drift(reference, reference)[0].psnr == float("inf")


def test_references_that_do_not_fit_are_refused() -> None:
    reference, true, _ = scene()
    with pytest.raises(SettingError, match="color_fix is 'hard'"):
        apply_color_fix(true, reference, "hard")
    with pytest.raises(SettingError, match="is not a smaller version"):
        apply_color_fix(true, reference.transpose(2, 3), "fine")
    with pytest.raises(SettingError, match="The reference must be"):
        apply_color_fix(true, reference[0], "fine")


def test_decoding_and_enlarging_with_colors_held(tmp_path: Path) -> None:
    decoder = tiny_pipelines.decoder_for("sdxl")
    image = torch.rand(1, 3, 32, 48, generator=torch.Generator().manual_seed(1)) * 2 - 1
    with pytest.raises(SettingError, match="own decoder as a reference, and it is not loaded"):
        decoder.decode(Latent(torch.zeros(1, 4, 4, 6), "sdxl"), color_fix="fine")
    tiny_models.autoencoder("sdxl").save_pretrained(tmp_path)
    decoder.encoder = load_encoder("sdxl", tmp_path)
    free = decoder.upscale(image).tensor
    held = decoder.upscale(image, color_fix="fine").tensor
    assert color_drift(held, image)[0].psnr > color_drift(free, image)[0].psnr
    latent = decoder.encode(image)
    decoded = decoder.encoder.decode(latent.tensor)
    held = decoder.decode(latent, color_fix="fine", sigma=0.2).tensor
    assert color_drift(held, decoded)[0].psnr > color_drift(decoder.decode(latent, sigma=0.2).tensor, decoded)[0].psnr
    with pytest.raises(SettingError, match="There is noise in this latent"):
        decoder.decode(latent.noised(0.3), color_fix="coarse")
    plain = decoder.decode(latent)  # its own decoder is in memory, so drift is reported against that
    assert plain.metadata == decoder.decode(latent, reference=decoded).metadata
    drift = color_drift(plain.tensor, decoded)[0]
    assert plain.metadata[0]["color_drift"] == drift.to_metadata()
    assert "color_drift" not in decoder.decode(latent.noised(0.3)).metadata[0]
    assert decoder.decode(latent, color_fix="coarse").metadata[0]["color_fix"] == "coarse"


def test_a_small_decoder_holds_the_image_it_enlarges_unless_told_otherwise() -> None:
    decoder = PixelDecoder.from_pretrained("tiny", device="cpu", dtype=torch.float32)
    image = functional.interpolate(
        torch.rand(1, 3, 16, 16, generator=torch.Generator().manual_seed(2)), size=(64, 64), mode="bicubic"
    ).clamp(0, 1)
    image = image * 2 - 1
    made = {color_fix: decoder.upscale(image, color_fix=color_fix).tensor for color_fix in ("off", "back-projection")}
    assert torch.equal(decoder.upscale(image).tensor, made["back-projection"])
    psnr = {color_fix: color_drift(one, image)[0].psnr for color_fix, one in made.items()}
    assert psnr["back-projection"] > psnr["off"] + 10
    assert torch.equal(decoder.decode(decoder.encode(image)).tensor, made["off"])
    assert decoder.upscale(image).metadata[0]["color_fix"] == "back-projection"
    assert "color_fix" not in decoder.upscale(image, sigma=0.2).metadata[0]


def shifted(reference: Tensor, rgb: tuple[float, float, float]) -> Tensor:
    """An image four times as large whose colors are off by so many levels of 255."""
    large = functional.interpolate(reference, scale_factor=4, mode="nearest")
    return large + torch.tensor(rgb).view(1, 3, 1, 1) / 127.5


@pytest.mark.parametrize(
    ("rgb", "chroma", "large"),
    [
        ((2.0, 2.0, 2.0), 0.0, False),  # brightness alone
        ((0.0, 3.5, 0.0), 3.5 * 0.5329, True),  # green, of which (Cb, Cr) has this share
        ((2.9, -2.9, 2.9), 2.9 * 1.0658, False),
        ((40.0, 0.0, -20.0), 27.353, True),
    ],
)
def test_drift_is_measured_by_channel_and_chroma(rgb: tuple[float, float, float], chroma: float, large: bool) -> None:
    reference = scene()[0] / 4
    drift = color_drift(shifted(reference, rgb), reference)[0]
    assert drift.shift == pytest.approx(rgb, abs=1e-3)
    assert drift.chroma == pytest.approx(chroma, abs=0.01)
    assert drift.is_large is large
    assert drift.to_metadata() == pytest.approx(
        dict(zip(("red", "green", "blue", "chroma"), (*rgb, chroma), strict=True)), abs=0.01
    )


def test_auto_acts_on_images_that_drift_far_alone() -> None:
    reference = (scene()[0] / 4).expand(2, -1, -1, -1)
    images = torch.cat([shifted(reference[:1], (1.0, 1.0, 1.0)), shifted(reference[1:], (4.0, 5.0, 0.0))])
    held = apply_color_fix(images.clone(), reference, "auto")
    assert torch.equal(held[0], images[0])
    torch.testing.assert_close(held[1:], apply_color_fix(images[1:].clone(), reference[1:], "coarse"))
    assert color_drift(held, reference)[1].is_large is False
    _, described = corrected(images.clone(), reference, "auto", 1.0)
    assert [one["color_fix"] for one in described] == ["off", "coarse"]
    with pytest.warns(ColorDriftWarning, match=r"green by \+5.0 \(up to 3\) levels of 255. color_fix auto corrects"):
        corrected(images, reference, None, 1.0)


def test_enlarging_reports_drift_and_auto_corrects_it() -> None:
    decoder = PixelDecoder.from_pretrained("tiny", device="cpu", dtype=torch.float32)
    gray = torch.linspace(-0.8, 0.8, 32).expand(1, 3, 32, 32)
    astray = shifted(gray, (0.0, -9.0, 9.0))[..., ::4, ::4]
    metadata = decoder.upscale(gray).metadata[0]
    assert set(metadata["color_drift"]) == {"red", "green", "blue", "chroma"}
    with pytest.warns(ColorDriftWarning, match="color_fix auto corrects this"):
        decoder.upscale(gray, reference=astray, color_fix="off")
    colors = torch.rand(1, 3, 8, 8, generator=torch.Generator().manual_seed(0)) * 2 - 1
    with pytest.warns(ColorDriftWarning, match="after color_fix coarse; try fine"):
        decoder.upscale(gray, reference=colors, color_fix="coarse")
    with pytest.warns(ColorDriftWarning, match="after color_fix fine; try back-projection"):
        decoder.upscale(gray, reference=colors, color_fix="fine")
    fixed = decoder.upscale(gray, reference=astray, color_fix="auto").metadata[0]
    assert fixed["color_fix"] == "coarse" and abs(fixed["color_drift"]["green"]) < 1


def test_gray_needs_no_color_fix() -> None:
    decoder = PixelDecoder.from_pretrained("tiny", device="cpu", dtype=torch.float32)
    ramps = [torch.linspace(-0.8, 0.8, 32), torch.linspace(-0.8, 0.8, 64), torch.linspace(-1, 1, 128)]
    for gray in (*ramps, torch.full((64,), -0.4)):
        image = gray.expand(1, 3, len(gray), len(gray))
        assert decoder.upscale(image, color_fix="auto").metadata[0]["color_fix"] == "off"


def test_fidelity_goes_from_colors_alone_to_all_that_the_reference_shows() -> None:
    image = torch.rand(1, 3, 64, 64) * 2 - 1
    reference = functional.interpolate(image, scale_factor=1 / 4, mode="area")
    painted = (image.roll(3, 2) + 0.1).clamp(-1, 1)
    results = {f: apply_color_fix(painted.clone(), reference, "back-projection", f) for f in (0.0, 0.3, 0.7, 1.0)}
    nearness = [color_drift(one, reference)[0].psnr for one in results.values()]
    assert nearness == sorted(nearness) and nearness[-1] > nearness[0] + 6
    assert torch.equal(results[1.0], apply_color_fix(painted.clone(), reference, "back-projection"))
    # Without the reference's detail, the detail of the image stays, and only colors are corrected.
    assert (results[0.0] - apply_color_fix(painted.clone(), reference, "fine")).abs().mean() < 0.02
    with pytest.raises(SettingError, match="from 0 to 1"):
        apply_color_fix(painted.clone(), reference, "back-projection", 1.5)


def test_fidelity_that_cannot_act_is_refused_before_the_work() -> None:
    tiny = PixelDecoder.from_pretrained("tiny", device="cpu", dtype=torch.float32)
    image = torch.full((1, 3, 64, 64), -1.0)
    with pytest.raises(SettingError, match=r"fidelity acts with color_fix back-projection only, and .* is fine"):
        tiny.upscale(image, fidelity=0.5, color_fix="fine", progress_callback=lambda progress: pytest.fail("begun"))
    assert tiny.upscale(image, fidelity=0.5).metadata[0]["fidelity"] == 0.5
