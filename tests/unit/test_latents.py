# SPDX-License-Identifier: Apache-2.0
"""Latents: noise and normalization agree with the reference, conversions invert, files say what they hold."""

from __future__ import annotations

import json
import warnings
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, safe_open
from torch.nn.functional import pixel_unshuffle

from pidecode.errors import FileError, LatentError, SettingError
from pidecode.latents import layout
from pidecode.latents.latent import Latent, LatentStatistics, NormalizationWarning
from pidecode.latents.layout import packed_grid, unpack
from pidecode.registry.spaces import SPACES, get_space

GOLDEN = Path(__file__).parents[1] / "data" / "golden" / "inference_misc.safetensors"


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def statistics_for(space: str, grid: tuple[int, int]) -> LatentStatistics | None:
    row = get_space(space)
    if row.statistics not in ("batch_norm", "per_position"):
        return None
    shape = (row.channels, *grid) if row.statistics == "per_position" else (row.channels,)
    return LatentStatistics(mean=draw(*shape, seed=5) * 0.3, variance=draw(*shape, seed=6).abs() * 0.2 + 3.0)


# Noise and normalization against the reference


def golden_args() -> dict[str, list[float]]:
    with safe_open(GOLDEN, "pt") as file:
        blocks = json.loads(file.metadata()["config"])["blocks"]
    return {block["name"]: block["args"].get("sigmas", []) for block in blocks}


def test_add_noise_agrees_with_the_reference() -> None:
    golden = load_file(GOLDEN)
    clean, noise = golden["inputs.add_noise.latent"], golden["inputs.add_noise.noise"]
    for name in ("flux", "sdxl"):
        for index, sigma in enumerate(golden_args()["add_noise"]):
            ours = layout.add_noise(clean, noise, sigma, get_space(name))
            torch.testing.assert_close(ours, golden[f"outputs.add_noise.{name}_{index}"], rtol=0, atol=1e-6)


def test_euler_latents_agree_with_the_reference() -> None:
    golden = load_file(GOLDEN)
    for index, sigma in enumerate(golden_args()["sdxl_frame"]):
        latent, level = layout.euler_to_variance_preserving(golden["inputs.sdxl_frame.latent"], sigma)
        expected = golden[f"outputs.sdxl_frame.sdxl_{index}.latent"]
        torch.testing.assert_close(latent, expected, rtol=0, atol=1e-6)
        torch.testing.assert_close(level[0], golden[f"outputs.sdxl_frame.sdxl_{index}.sigma"], rtol=0, atol=1e-6)


# Conversions


@pytest.mark.parametrize("name", [name for name in SPACES if name != "siglip"])
def test_raw_and_back(name: str) -> None:
    latent = Latent(draw(2, get_space(name).channels, 4, 6), name)
    given = statistics_for(name, (4, 6))
    raw = latent.to_raw(given)
    again = Latent.from_raw(raw, name, statistics=given)
    torch.testing.assert_close(again.tensor, latent.tensor, rtol=0, atol=1e-5)


def test_raw_shapes_are_those_of_the_own_decoders() -> None:
    assert Latent(draw(1, 16, 4, 6), "qwenimage").to_raw().shape == (1, 16, 1, 4, 6)
    assert Latent(draw(1, 128, 2, 3), "flux2").to_raw(statistics_for("flux2", (2, 3))).shape == (1, 32, 4, 6)


@pytest.mark.parametrize(("name", "scale", "shift"), [("flux", 0.3611, 0.1159), ("sd3", 1.5305, 0.0609)])
def test_raw_constants(name: str, scale: float, shift: float) -> None:
    raw = draw(1, 16, 4, 4) / scale
    torch.testing.assert_close(Latent.from_raw(raw, name).tensor, (raw - shift) * scale)


def test_raw_flux2_is_patchified_channel_major_then_normalized() -> None:
    raw = draw(1, 32, 4, 6) * 1.8
    given = statistics_for("flux2", (2, 3))
    assert given is not None
    latent = Latent.from_raw(raw, "flux2", statistics=given).tensor
    channel, row, column = 4 * 7 + 2 * 1 + 0, 1, 2  # raw channel 7, second row of the patch, first column
    expected = (raw[0, 7, 2 * row + 1, 2 * column] - given.mean[channel]) / (given.variance[channel] + 1e-4).sqrt()
    torch.testing.assert_close(latent[0, channel, row, column], expected)


def test_raw_siglip_is_layer_normed_and_cannot_go_back() -> None:
    hidden = draw(1, 1152, 4, 4) * 9 + 3
    latent = Latent.from_raw(hidden, "siglip")
    expected = torch.nn.functional.layer_norm(hidden.movedim(1, -1), (1152,), eps=1e-6).movedim(-1, 1)
    torch.testing.assert_close(latent.tensor, expected, rtol=0, atol=1e-5)
    with pytest.raises(LatentError, match="cannot be undone"):
        latent.to_raw()


def test_frame_sums_are_done_in_float32() -> None:
    raw = (draw(1, 16, 8, 8) * 2.77).bfloat16()
    latent = Latent.from_raw(raw, "flux")
    assert latent.tensor.dtype == torch.bfloat16
    assert torch.equal(latent.tensor, ((raw.float() - 0.1159) * 0.3611).bfloat16())


@pytest.mark.parametrize("name", ["flux", "qwenimage", "flux2"])
def test_packed_and_back(name: str) -> None:
    row = get_space(name)
    height, width = 64, 96
    rows, columns = packed_grid(row, height, width)
    tokens = draw(2, rows * columns, row.token_channels or 0)
    latent = Latent.from_packed(tokens, name, height=height, width=width, sigma=0.5)
    assert latent.tensor.shape == (2, row.channels, height // row.down, width // row.down)
    cells = pixel_unshuffle(latent.tensor, 1 if name == "flux2" else 2)
    assert torch.equal(cells.flatten(2).transpose(1, 2), tokens)


def test_two_by_two_order() -> None:
    row = get_space("flux")
    latent = torch.arange(16 * 4 * 6, dtype=torch.float32).view(1, 16, 4, 6)
    tokens = pixel_unshuffle(latent, 2).flatten(2).transpose(1, 2)
    # token 4 is row 1, column 1 of a 2x3 token grid; its channel 4 c + 2 dy + dx is cell (2 + dy, 2 + dx)
    assert tokens[0, 4, 4 * 3 + 2 * 1 + 0] == latent[0, 3, 3, 2]
    assert torch.equal(unpack(tokens, row, 32, 48), latent)


def test_packed_sides_are_rounded_down_as_pipelines_do() -> None:
    assert packed_grid(get_space("flux"), 1031, 777) == (64, 48)


@pytest.mark.parametrize(("height", "width"), [(64, 64), (96, 64 * 4)])
def test_packed_of_another_size_is_refused(height: int, width: int) -> None:
    with pytest.raises(LatentError, match="Give the height and width"):
        Latent.from_packed(draw(1, 24, 64), "flux", height=height, width=width)


def test_packed_refuses_the_wrong_form() -> None:
    with pytest.raises(SettingError, match="not packed"):
        Latent.from_packed(draw(1, 24, 64), "sdxl", height=64, width=96)
    with pytest.raises(LatentError, match="pass it to Latent"):
        Latent.from_packed(draw(1, 16, 8, 8), "flux", height=64, width=64)
    with pytest.raises(SettingError, match="smaller than one token"):
        Latent.from_packed(draw(1, 1, 64), "flux", height=8, width=64)


def test_from_euler() -> None:
    latent = Latent.from_euler(draw(2, 4, 8, 8) * 3.0, torch.tensor([2.0, 3.0]), prompt=["a", "b"])
    torch.testing.assert_close(latent.sigmas, torch.tensor([2.0, 3.0]) / torch.tensor([5.0, 10.0]).sqrt())
    assert latent.prompts == ("a", "b")
    with pytest.raises(LatentError, match="flow-matching"):
        Latent.from_euler(draw(1, 16, 8, 8), 0.3, "flux")
    with pytest.raises(LatentError, match="not negative"):
        Latent.from_euler(draw(1, 4, 8, 8), -0.3)


# Noise


@pytest.mark.parametrize("name", ["flux", "sdxl"])
def test_noised_labels_what_it_does(name: str) -> None:
    clean = Latent(draw(2, get_space(name).channels, 8, 8), name, prompt="x")
    noisy = clean.noised(0.4, seed=3)
    noise = draw(*clean.tensor.shape, seed=3)
    torch.testing.assert_close(noisy.tensor, layout.add_noise(clean.tensor, noise, 0.4, get_space(name)))
    assert noisy.sigma == 0.4
    assert noisy.prompt == "x"
    assert torch.equal(clean.noised(0.4, noise=noise).tensor, noisy.tensor)
    with pytest.raises(LatentError, match="Only a clean latent"):
        noisy.noised(0.5)


def test_noised_per_sample_and_by_nothing() -> None:
    clean = Latent(draw(2, 16, 4, 4), "flux")
    noisy = clean.noised(torch.tensor([0.0, 0.5]))
    assert torch.equal(noisy.tensor[0], clean.tensor[0])
    assert noisy.sigmas.tolist() == [0.0, 0.5]
    assert clean.noised(0.0) is clean


@pytest.mark.parametrize(("name", "signal"), [("flux2", [1.0, 0.75]), ("sdxl", [1.0, (1 - 0.25**2) ** 0.5])])
def test_unit_signal_has_the_scale_of_the_clean_latent(name: str, signal: list[float]) -> None:
    clean = Latent(draw(2, get_space(name).channels, 4, 4), name)
    noise = draw(*clean.tensor.shape, seed=3)
    noisy = clean.noised(torch.tensor([0.0, 0.25]), noise=noise)
    added = torch.tensor([0.0, 0.25 / signal[1]]).view(2, 1, 1, 1) * noise
    torch.testing.assert_close(noisy.unit_signal(), clean.tensor + added)


# The statistics check


@pytest.mark.parametrize("name", ["flux", "sdxl", "qwenimage", "flux2"])
def test_raw_latents_warn(name: str) -> None:
    row = get_space(name)
    latent = Latent(draw(1, row.channels, 16, 16) * 0.85, name)
    raw = latent.to_raw(statistics_for(name, (16, 16)))
    raw = raw.squeeze(2) if raw.ndim == 5 else raw
    if row.raw_patch > 1:  # denormalized but still patchified: what some ports feed
        raw = pixel_unshuffle(raw, row.raw_patch)
    with pytest.warns(NormalizationWarning, match=r"Latent\.from_raw"):
        Latent(raw, name)


@pytest.mark.parametrize("sigma", [0.3, 0.6, 0.8])
def test_raw_noisy_latents_warn(sigma: float) -> None:
    noisy = Latent(draw(1, 16, 16, 16) * 0.85, "flux").noised(sigma)
    with pytest.warns(NormalizationWarning):
        Latent(noisy.tensor / 0.3611, "flux", sigma)


@pytest.mark.parametrize("name", list(SPACES))
@pytest.mark.parametrize("sigma", [0.0, 0.2, 0.5, 0.8, 1.0])
@pytest.mark.parametrize("size", [0.0, 0.3, 0.6, 1.0])
def test_honest_latents_do_not_warn(name: str, sigma: float, size: float) -> None:
    """Flat, plain and busy images at any noise level, large and tiny grids."""
    if name == "siglip" and size != 1.0 and sigma == 0.0:
        pytest.skip("its LayerNorm gives every cell deviation 1")
    channels = get_space(name).channels
    with warnings.catch_warnings():
        warnings.simplefilter("error", NormalizationWarning)
        for grid in ((4, 4), (16, 12)):
            level = draw(1, channels, 1, 1, seed=1) * 1.5  # a flat image's channels have any mean
            clean = draw(1, channels, *grid, seed=2) * size + (level if name != "siglip" else 0.0)
            signal, noise = layout.noise_weights(get_space(name), torch.tensor(sigma))
            Latent(signal * clean + noise * draw(1, channels, *grid, seed=3), name, sigma)


def test_noise_that_is_not_there_warns() -> None:
    with pytest.warns(NormalizationWarning, match="less than the noise of sigma 0.8"):
        Latent(draw(1, 16, 16, 16) * 0.3, "sd3", 0.8)


def test_the_sample_that_looks_wrong_is_named() -> None:
    tensor = draw(3, 16, 8, 8)
    tensor[1] *= 2.77
    with pytest.warns(NormalizationWarning, match="Sample 1 of this flux latent"):
        Latent(tensor, "flux")


def test_euler_frame_is_suggested() -> None:
    with pytest.warns(NormalizationWarning, match="from_euler"):
        Latent(draw(1, 4, 8, 8) * 14.6, "sdxl")


def test_dinov2_without_its_statistics_warns() -> None:
    features = torch.nn.functional.layer_norm(draw(1, 8, 8, 768), (768,)).movedim(-1, 1)
    with pytest.warns(NormalizationWarning, match="before the statistics per position"):
        Latent(features, "dinov2")
    Latent.from_raw(features, "dinov2", statistics=statistics_for("dinov2", (8, 8)))


def test_siglip_without_its_layer_norm_warns() -> None:
    with pytest.warns(NormalizationWarning, match="LayerNorm"):
        Latent(draw(1, 1152, 8, 8) * 1.5, "siglip")


# A typed value


def test_aliases_resolve() -> None:
    assert Latent(draw(1, 16, 4, 4), "zimage-turbo").space == "flux"


def test_output_size_and_grid() -> None:
    latent = Latent(draw(1, 1152, 16, 16), "siglip")
    assert (latent.grid, latent.output_size) == ((16, 16), (2048, 2048))


def test_sigma_forms() -> None:
    tensor = draw(2, 16, 4, 4)
    assert Latent(tensor, "flux", 1).sigma == 1.0
    assert Latent(tensor, "flux", torch.tensor([0.5, 0.5])).sigma == 0.5
    differing = Latent(tensor, "flux", torch.tensor([0.25, 0.5]))
    assert isinstance(differing.sigma, torch.Tensor)
    assert Latent(tensor, "flux", 0.5).sigmas.tolist() == [0.5, 0.5]


def test_moves_keep_sigma_in_float32() -> None:
    latent = Latent(draw(2, 16, 4, 4), "flux", torch.tensor([0.1, 0.9])).to(dtype=torch.bfloat16)
    assert latent.tensor.dtype == torch.bfloat16
    assert latent.sigmas.dtype == torch.float32
    with pytest.raises(LatentError, match="float32, bfloat16, float16 or float64"):
        latent.to(dtype=torch.int32)


def test_split_and_cat() -> None:
    latent = Latent(draw(3, 16, 4, 4), "flux", torch.tensor([0.0, 0.2, 0.2]), ("a", "b", "b"), seed=7)
    one, two = latent[:2], latent[2:]
    assert (len(one), len(two)) == (2, 1)
    assert latent[1].sigma == pytest.approx(0.2)
    assert latent[-1].prompt == "b"
    again = Latent.cat([one, two])
    assert torch.equal(again.tensor, latent.tensor)
    assert torch.equal(again.sigmas, latent.sigmas)
    assert again.prompts == ("a", "b", "b")
    assert again.seed == 7
    assert [part.prompts for part in latent] == [("a",), ("b",), ("b",)]
    with pytest.raises(IndexError):
        latent[3]


def test_cat_refuses_what_does_not_belong_together() -> None:
    flux = Latent(draw(1, 16, 4, 4), "flux")
    with pytest.raises(LatentError, match="share their space: flux and sd3"):
        Latent.cat([flux, Latent(draw(1, 16, 4, 4), "sd3")])
    with pytest.raises(LatentError, match="share their grid"):
        Latent.cat([flux, Latent(draw(1, 16, 4, 8), "flux")])
    with pytest.raises(LatentError, match="no latents to concatenate"):
        Latent.cat([])


def test_cat_fills_prompts_and_drops_differing_seeds() -> None:
    parts = [Latent(draw(1, 16, 4, 4), "flux", prompt="a", seed=1), Latent(draw(1, 16, 4, 4), "flux", seed=2)]
    joined = Latent.cat(parts)
    assert joined.prompts == ("a", "")
    assert joined.seed is None


def test_repr_is_short() -> None:
    latent = Latent(draw(1, 16, 4, 4), "flux", 0.5, "a cat", 3)
    assert repr(latent) == "Latent(flux, 1x16x4x4 float32 on cpu, sigma=0.5, prompt='a cat', seed=3)"


# Files


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_save_and_load(tmp_path: Path, dtype: torch.dtype) -> None:
    latent = Latent(draw(2, 16, 4, 6).to(dtype), "flux", torch.tensor([0.0, 0.3]), ("ein Käse", "b"), 11)
    latent.save(tmp_path / "a.safetensors")
    again = Latent.load(tmp_path / "a.safetensors")
    assert torch.equal(again.tensor, latent.tensor)
    assert torch.equal(again.sigmas, latent.sigmas)
    assert (again.space, again.prompt, again.seed) == ("flux", ("ein Käse", "b"), 11)
    assert list(tmp_path.iterdir()) == [tmp_path / "a.safetensors"]


def test_saving_twice_needs_leave(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    Latent(draw(1, 16, 4, 4), "flux").save(path)
    before = path.read_bytes()
    with pytest.raises(FileError, match="overwrite=True"):
        Latent(draw(1, 16, 4, 4, seed=1), "flux").save(path)
    assert path.read_bytes() == before
    Latent(draw(1, 16, 4, 4, seed=1), "flux").save(path, overwrite=True)
    assert path.read_bytes() != before


def test_loading_may_confirm_but_not_contradict(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    Latent(draw(1, 16, 4, 4), "flux", 0.5).save(path)
    assert Latent.load(path, space="zimage", sigma=0.5).space == "flux"
    with pytest.raises(LatentError, match="space flux, not sd3"):
        Latent.load(path, space="sd3")
    with pytest.raises(LatentError, match="leave sigma out"):
        Latent.load(path, sigma=0.0)
