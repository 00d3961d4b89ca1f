# SPDX-License-Identifier: Apache-2.0
"""The table of latent spaces says what docs/architecture.md, Latent spaces, says."""

from __future__ import annotations

import inspect

import pytest

from pidecode.errors import SettingError
from pidecode.registry.spaces import ALIASES, IMAGE_MODELS, SPACES, get_image_model, get_space

EXPECTED = {  # channels, down, scale, noise parametrization, token channels, raw channels
    "flux": (16, 8, 4, "flow", 64, 16),
    "sd3": (16, 8, 4, "flow", None, 16),
    "sdxl": (4, 8, 4, "variance_preserving", None, 4),
    "flux2": (128, 16, 4, "flow", 128, 32),
    "qwenimage": (16, 8, 4, "flow", 64, 16),
    "dinov2": (768, 16, 4, "flow", None, 768),
    "siglip": (1152, 16, 8, "flow", None, 1152),
}


@pytest.mark.parametrize("name", EXPECTED)
def test_rows(name: str) -> None:
    row = get_space(name)
    assert (
        row.channels, row.down, row.scale, row.noise_parametrization, row.token_channels, row.raw_channels
    ) == EXPECTED[name]  # fmt: skip
    assert row.pixels_per_cell == row.down * row.scale


def test_all_rows_are_expected() -> None:
    assert set(SPACES) == set(EXPECTED)


def test_constants() -> None:
    assert (get_space("flux").scaling_factor, get_space("flux").shift_factor) == (0.3611, 0.1159)
    assert (get_space("sd3").scaling_factor, get_space("sd3").shift_factor) == (1.5305, 0.0609)
    assert (get_space("sdxl").scaling_factor, get_space("sdxl").shift_factor) == (0.13025, 0.0)
    assert get_space("flux2").epsilon == 1e-4
    assert get_space("dinov2").epsilon == 1e-5
    assert get_space("siglip").epsilon == 1e-6


def test_raw_std_follows_from_the_constants() -> None:
    for name in ("flux", "sd3", "sdxl"):
        row = get_space(name)
        assert row.raw_std == pytest.approx(1 / row.scaling_factor, rel=0.01)
    qwen = get_space("qwenimage")
    assert qwen.raw_std == pytest.approx((sum(std**2 for std in qwen.std) / 16) ** 0.5, rel=0.01)


@pytest.mark.slow
def test_qwen_constants_are_those_of_diffusers() -> None:
    autoencoder = pytest.importorskip("diffusers").AutoencoderKLQwenImage
    defaults = inspect.signature(autoencoder.__init__).parameters
    assert list(get_space("qwenimage").mean) == defaults["latents_mean"].default
    assert list(get_space("qwenimage").std) == defaults["latents_std"].default


def test_aliases_point_at_rows() -> None:
    assert dict(ALIASES) == {
        "zimage": "flux", "zimage-turbo": "flux", "flux2-klein-4b": "flux2", "flux2-klein-9b": "flux2",
        "qwenimage-2512": "qwenimage", "ideogram-4": "flux2", "anima": "qwenimage", "krea-2": "qwenimage",
        "ernie-image": "flux2", "boogu": "flux", "chroma": "flux", "hidream": "flux", "lumina-2": "flux",
        "kolors": "sdxl", "kandinsky-5-image": "flux", "longcat-image": "flux", "omnigen-2": "flux", "auraflow": "sdxl",
        "hunyuan-dit": "sdxl", "pixart-sigma": "sdxl", "lens": "flux2", "mage-flow": "flux2", "joyimage": "qwenimage",
    }  # fmt: skip
    assert get_space("ZImage") is SPACES["flux"]
    assert get_space("flux2-klein-9b") is SPACES["flux2"]


@pytest.mark.parametrize(
    ("wrong", "hint"),
    [("flx", "flux"), ("qwen-image", "qwenimage"), ("sd-xl", "sdxl"), ("flux2-klein", "flux2-klein-4b")],
)
def test_unknown_space_suggests(wrong: str, hint: str) -> None:
    with pytest.raises(SettingError, match=rf"Did you mean.*{hint}"):
        get_space(wrong)


def test_unknown_space_without_a_near_one_lists_all() -> None:
    with pytest.raises(SettingError, match="Known are .*siglip"):
        get_space("???")


def test_recommended_captures() -> None:
    captures = {name: (model.stop_step, model.num_steps) for name, model in IMAGE_MODELS.items()}
    assert captures["flux"] == captures["sd3"] == (24, 28)
    assert captures["sdxl"] == (26, 30)
    assert captures["flux2"] == captures["zimage"] == (46, 50)
    assert captures["qwenimage"] == captures["qwenimage-2512"] == (44, 50)
    for final in ("zimage-turbo", "flux2-klein-4b", "flux2-klein-9b"):
        assert get_image_model(final).recommended_stop(9) == 9
    assert all(model.space in SPACES for model in IMAGE_MODELS.values())


def test_unknown_image_model() -> None:
    with pytest.raises(SettingError, match="Did you mean.*zimage"):
        get_image_model("z-image")
