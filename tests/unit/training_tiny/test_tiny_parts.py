# SPDX-License-Identifier: Apache-2.0
"""What `tiny` is made of, at debug_config size: images, cache, optimizer, networks, stages for one of them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from pidecode.errors import CheckpointError, LatentError, SettingError, TrainingError
from pidecode.models.pid.network import PiDNet
from pidecode.models.regressor import Regressor, into_pixelnet
from pidecode.models.tiny import TinyEncoder
from pidecode.registry.configs import PiDConfig
from pidecode.training.tiny.augment import varied
from pidecode.training.tiny.cache import LatentCache, crop_to_multiple, held_out, quarter, read_manifest
from pidecode.training.tiny.decoder_stage import DecoderRecipe, noised, run_regressor
from pidecode.training.tiny.encoder_stage import EncoderRecipe, by_levels, run_encoder
from pidecode.training.tiny.joint_stage import coarse_error
from pidecode.training.tiny.muon import Muon, muon_groups, orthogonalised
from pidecode.training.tiny.procedural import KINDS, procedural_image
from pidecode.training.tiny.state import load_state
from pidecode.training.tiny.teacher import TeacherAutoencoder
from pidecode.weights.detect import read_structure
from tiny_training import ENCODER, SMALL, parts, started


@pytest.mark.parametrize("kind", KINDS)
def test_procedural_images_are_the_same_for_the_same_seed(kind: str) -> None:
    first, again, other = (procedural_image(kind, 96, seed) for seed in (3, 3, 4))
    assert first.shape == (96, 96, 3)
    assert first.dtype == np.uint8
    assert np.array_equal(first, again)
    assert not np.array_equal(first, other)
    assert first.std() > 0


def test_an_unknown_kind_of_image_names_those_there_are() -> None:
    with pytest.raises(SettingError, match="dead_leaves, gradients"):
        procedural_image("clouds", 64, 0)


def test_held_out_images_follow_from_names_alone() -> None:
    names = {"a": [f"a{i}.webp" for i in range(30)], "b": ["b0.webp", "b1.webp"]}
    chosen = held_out(names)
    assert chosen == held_out({key: list(reversed(value)) for key, value in names.items()})
    assert sum(name in chosen for name in names["a"]) == 3
    assert sum(name in chosen for name in names["b"]) == 1


def test_a_folder_without_manifest_is_one_category(tmp_path: Path) -> None:
    for name in ("b.png", "a.webp", "notes.txt"):
        (tmp_path / name).touch()
    assert read_manifest(tmp_path) == {"images": ["a.webp", "b.png"]}
    (tmp_path / "manifest.jsonl").write_text('{"file": "a.webp", "category": "space"}\n')
    assert read_manifest(tmp_path) == {"space": ["a.webp"]}


def test_cached_sides_pack_and_a_quarter_is_a_quarter() -> None:
    image = crop_to_multiple(Image.new("RGB", (300, 150), (10, 200, 30)), 0.9)
    assert image.shape == (128, 256, 3)
    small = quarter(image)
    assert small.shape == (32, 64, 3)
    assert np.array_equal(np.unique(small.reshape(-1, 3), axis=0), [[10, 200, 30]])


def test_crops_are_cut_alike_from_image_quarter_and_latent(cache: LatentCache, teacher: TeacherAutoencoder) -> None:
    batch = cache.crops(6, 192, np.random.default_rng(0))  # the whole image, so that the latent is known
    assert batch.target.shape == (6, 3, 192, 192)
    expected = torch.nn.functional.pixel_unshuffle(teacher.encode(batch.small), 2)
    torch.testing.assert_close(batch.latent, expected, atol=2e-3, rtol=1e-2)
    small = torch.nn.functional.interpolate(batch.target, scale_factor=0.25, mode="bicubic", antialias=True)
    assert (small.clamp(-1, 1) - batch.small).abs().max() < 0.01
    for side in (64, 128):
        part = cache.crops(3, side, np.random.default_rng(1))
        assert part.latent.shape == (3, 128, side // 64, side // 64)


def test_a_cache_refuses_what_it_cannot_cut(cache: LatentCache, tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match="multiple of 64"):
        cache.crops(1, 100, np.random.default_rng(0))
    with pytest.raises(TrainingError, match="smaller crops"):
        cache.crops(1, 256, np.random.default_rng(0))
    with pytest.raises(TrainingError, match="build the cache"):
        LatentCache(tmp_path, {"teacher": 1.0})


def test_a_teacher_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="taef2_encoder"):
        TeacherAutoencoder.from_folder(tmp_path)


@pytest.mark.parametrize("shape", [(16, 144), (40, 20)])
def test_orthogonalised_evens_singular_values(shape: tuple[int, int]) -> None:
    generator = torch.Generator().manual_seed(1)
    values = torch.linalg.svdvals(orthogonalised(torch.randn(shape, generator=generator)))
    assert values.min() > 0.5
    assert values.max() < 1.3


def test_muon_finds_a_linear_map() -> None:
    generator = torch.Generator().manual_seed(0)
    x, wanted = torch.randn(256, 24, generator=generator), torch.randn(24, 24, generator=generator)
    layer = torch.nn.Linear(24, 24)
    optimizer = Muon(muon_groups(layer.named_parameters()), lr=0.3)
    assert [len(group["params"]) for group in optimizer.param_groups] == [1, 1]
    losses = []
    for step in range(60):
        for group in optimizer.param_groups:
            group["lr"] = 0.3 * (1 - step / 60)
        optimizer.zero_grad()
        loss = (layer(x) - x @ wanted).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 2e-2 * losses[0]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"adapter_stages": (), "latent_channels": 0}, None),
        ({"latent_channels": 0}, "nothing climbs"),
        ({"adapter_width": 1020}, "multiple of 4 times its square"),
        ({"adapter_stages": (2,)}, "two or more numbers of blocks"),
        ({"adapter_stages": (2, -1)}, "two or more numbers of blocks"),
        ({"patch_size": 8, "rope_reference": (1024, 1024), "adapter_stages": (1, 1)}, "whole number"),
        ({"color_head": True, "color_head_tap": 1}, "must be -1"),
    ],
)
def test_adapters_that_cannot_climb_say_why(change: dict[str, object], words: str | None) -> None:
    if words is None:
        assert not replace(SMALL, **change).has_adapter  # type: ignore[arg-type]
        return
    with pytest.raises(SettingError, match=words):
        replace(SMALL, **change)  # type: ignore[arg-type]


def test_a_climbing_adapter_is_known_by_its_tensors_and_takes_whole_cells_only() -> None:
    config = replace(SMALL, adapter_stages=(2, 0, 3, 1))
    net = PiDNet(config)
    seen = read_structure({name: tuple(value.shape) for name, value in net.state_dict().items()}).seen
    assert (seen["adapter_stages"], seen["adapter_width"]) == (config.adapter_stages, config.adapter_width)
    assert PiDConfig.from_dict(config.to_dict()) == config
    with pytest.raises(LatentError, match="3x2 patches is no whole number .* multiples of 32 pixels"):
        net.prepare((2, 3), latent=torch.zeros(1, 128, 1, 1), sigma=0.0)


def test_latents_are_noised_in_part() -> None:
    latent = torch.ones(400, 2, 1, 1)
    given, sigma = noised(latent, 0.25, 0.8, torch.Generator().manual_seed(0))
    clean = sigma == 0
    assert 0.65 < clean.float().mean() < 0.85
    assert torch.equal(given[clean], latent[clean])
    assert sigma.max() <= 0.8
    assert not torch.equal(given[~clean], latent[~clean])


def test_rates_warm_up_stay_and_fall() -> None:
    recipe = DecoderRecipe(warmup_steps=10, decay_from=0.5, apart=0.3, learning_rate=2.0, joined_rate=1.0)
    assert recipe.factor(0.0, 0) == pytest.approx(0.1)
    assert recipe.factor(0.4, 100) == 1.0
    assert recipe.factor(0.75, 100) == pytest.approx(0.5)
    assert recipe.factor(1.0, 100) == pytest.approx(0.02)
    assert (recipe.rate(0.2), recipe.rate(0.4)) == (2.0, 1.0)


def test_a_pixelnet_gives_its_regressors_image_at_any_time(cache: LatentCache) -> None:
    regressor = started(cache)
    net = into_pixelnet(regressor).eval()
    batch = cache.crops(2, 128, np.random.default_rng(0))
    with torch.no_grad():
        wanted = regressor(batch.latent)
        for t in (999.0, 342.0):
            given = net(torch.randn(2, 3, 128, 128), torch.full((2,), t), latent=batch.latent, sigma=0.0)
            assert (given - wanted).abs().max() < 5e-3


def test_patches_start_as_their_own_principal_directions(cache: LatentCache) -> None:
    regressor = Regressor(SMALL)
    images = cache.crops(16, 128, np.random.default_rng(0)).target
    regressor.start_from_patches(images)
    shuffle, unshuffle = torch.nn.functional.pixel_shuffle, torch.nn.functional.pixel_unshuffle

    def principal(side: int, most: int) -> tuple[torch.Tensor, ...]:
        patches = unshuffle(images, side)
        values, vectors = torch.linalg.eigh(torch.cov(patches.transpose(0, 1).flatten(1)))
        mean = patches.mean((0, 2, 3), keepdim=True)
        return patches - mean, mean, values.flip(0)[:most].clamp(min=1e-8), vectors.flip(1)[:, :most]

    patches, _, values, basis = principal(4, 48)  # all there are: 4 x 4 pixels of three colors
    features = torch.zeros(len(images), 64, 32, 32)
    features[:, :48] = torch.einsum("bphw,pr->brhw", patches, basis / values**0.25)
    with torch.no_grad():
        given = regressor.image(unshuffle(features, 4))
    patches, mean, _, basis = principal(16, SMALL.hidden_size)
    kept = torch.einsum("bphw,pr,qr->bqhw", patches, basis, basis) + mean
    # The last direction kept may be a mixture of several with the same variance, so not every pixel is the same.
    assert (given - shuffle(kept, 16)).square().mean().sqrt() < 5e-3


def test_parts_that_are_fed_their_own_work_are_the_whole(cache: LatentCache) -> None:
    regressor = started(cache)
    cells = torch.nn.functional.pixel_shuffle(cache.crops(2, 128, np.random.default_rng(0)).latent, 2)
    with torch.no_grad():
        made, image = regressor.by_levels(cells)
        again, same = regressor.by_levels(cells, made)
        whole = regressor(torch.nn.functional.pixel_unshuffle(cells, 2))
        other = regressor.by_levels(cells, [0.5 * part for part in made])[1]
    torch.testing.assert_close(same, image)
    for ours, theirs in zip(made, again, strict=True):
        torch.testing.assert_close(ours, theirs)
    assert not torch.equal(other, image)
    torch.testing.assert_close(image, whole, atol=1e-5, rtol=1e-4)


def test_an_encoders_levels_that_are_fed_their_own_work_are_the_whole() -> None:
    torch.manual_seed(0)
    encoder, image = TinyEncoder(ENCODER), torch.rand(1, 3, 32, 32)
    with torch.no_grad():
        made = by_levels(encoder, image)
        torch.testing.assert_close(made[-1], encoder.cells(image))
        for ours, again in zip(made, by_levels(encoder, image, made), strict=True):
            torch.testing.assert_close(ours, again)
        assert not torch.equal(made[-1], by_levels(encoder, image, [0.5 * part for part in made])[-1])


def test_a_regressor_needs_a_network_it_can_become() -> None:
    with pytest.raises(SettingError, match="inject_pixels"):
        Regressor(PiDConfig())
    with pytest.raises(SettingError, match="adapter_stages"):
        Regressor(replace(SMALL, adapter_stages=()))


def test_the_regressor_learns_and_goes_on_where_it_stopped(
    cache: LatentCache, teacher: TeacherAutoencoder, tmp_path: Path
) -> None:
    crops = ((128, 2, 1.0),)
    recipe = DecoderRecipe(
        steps=32, crops=crops, coarse_crops=crops, warmup_steps=2, log_every=0.0,
        coarse=0.25, apart=0.5, hinted=0.75, noisy_from=1.0,
    )  # fmt: skip
    lines: list[str] = []
    run_regressor(cache, tmp_path, recipe, teacher, config=SMALL, report=lines.append)
    first = load_state(tmp_path / "regressor.pt")
    assert first is not None
    rows = [parts(line) for line in lines]
    assert [sorted(row) for row in rows[7:9]] == [["distance"], ["distance", "error"]]
    assert len(rows) == 32
    distances = [row.get("distance", 0.0) for row in rows]
    assert sum(distances[4:8]) < sum(distances[:4])  # the coarsest level alone
    assert sum(distances[12:16]) < sum(distances[8:12])  # all levels apart
    assert 0 < sum(distances[20:24]) < sum(distances[16:20])  # joined, and held to the teacher
    assert [sorted(row) for row in rows[24:]] == [["error"]] * 8  # on their own
    longer = DecoderRecipe(steps=34, crops=crops, coarse=0.0, apart=0.0, hinted=0.0, noisy_from=0.5)
    run_regressor(cache, tmp_path, longer, teacher, config=SMALL)
    second = load_state(tmp_path / "regressor.pt")
    assert second is not None
    assert (first["step"], second["step"]) == (32, 34)
    assert second["used"] > first["used"]


def test_the_encoder_comes_nearer_to_its_teacher(
    cache: LatentCache, teacher: TeacherAutoencoder, tmp_path: Path
) -> None:
    lines: list[str] = []
    recipe = EncoderRecipe(steps=30, warmup_steps=2, side=32, crops=2, log_every=0.0)
    run_encoder(cache, tmp_path, recipe, teacher, config=ENCODER, report=lines.append)
    rows = [parts(line) for line in lines]
    apart, whole = [row for row in rows if "image" not in row], [row for row in rows if "image" in row]
    assert (len(apart), len(whole)) == (15, 15)
    assert all(apart[-1][level] < apart[0][level] for level in ("half", "quarter", "latent"))
    assert sum(row["latent"] for row in whole[-4:]) < sum(row["latent"] for row in whole[:4])


def test_crops_are_turned_and_some_recolored() -> None:
    random = np.random.default_rng(0)
    target = torch.from_numpy(random.uniform(-1, 1, (24, 3, 64, 64))).float()
    chance = torch.Generator().manual_seed(0)
    turned, small = varied(target, chance, recolored=0.0, joined=0.0)
    assert torch.equal(turned.flatten(2).sort()[0], target.flatten(2).sort()[0])  # the same pixels
    assert len({tuple(image[0, 0, :4].tolist()) for image in varied(target[:1].expand(64, -1, -1, -1), chance,
                recolored=0.0, joined=0.0)[0]}) == 8  # fmt: skip
    wanted = torch.nn.functional.interpolate(turned, scale_factor=0.25, mode="bicubic", antialias=True)
    torch.testing.assert_close(small, wanted.clamp(-1, 1))
    colored, _ = varied(target, chance, recolored=0.5, joined=0.0)
    same = [torch.equal(ours.flatten().sort()[0], theirs.flatten().sort()[0])
            for ours, theirs in zip(colored, target, strict=True)]  # fmt: skip
    assert 0 < sum(same) < len(same)
    assert colored.abs().max() <= 1


def test_some_crops_are_two_images_with_a_clean_edge() -> None:
    chance = torch.Generator().manual_seed(0)
    target = torch.stack((torch.full((3, 64, 64), -0.5), torch.full((3, 64, 64), 0.5))).repeat(20, 1, 1, 1)
    alone, _ = varied(target, chance, recolored=0.0, joined=0.0)
    assert torch.equal(alone, target)
    joined, _ = varied(target, chance, recolored=0.0, joined=1.0)
    beyond = set()
    for image, own in zip(joined, target, strict=True):
        colors, counts = image.flatten(1).T.unique(dim=0, return_counts=True)
        most = counts.argsort(descending=True)[:2]
        assert counts[most].sum() > 0.96 * 64 * 64  # all but one pixel along a line
        found = {tuple(color.tolist()) for color in colors[most]}
        assert tuple(own[:, 0, 0].tolist()) in found
        beyond |= found
    images = {(-0.5,) * 3, (0.5,) * 3}
    assert beyond > images  # some are joined to a single color instead


def test_coarse_colors_count_where_squares_differ() -> None:
    small = torch.rand(2, 3, 32, 32)
    made = torch.nn.functional.interpolate(small, scale_factor=4, mode="nearest")
    assert coarse_error(made, small, ((16, 4.0), (64, 4.0))).max() < 1e-10
    checks = torch.tensor([1.0, -1.0]).repeat(64)  # finer than the squares
    assert coarse_error(made + checks, small, ((16, 4.0), (64, 4.0))).max() < 1e-10
    shifted = coarse_error(made + torch.tensor([0.1, 0.2]).view(2, 1, 1, 1), small, ((16, 4.0), (64, 2.0)))
    torch.testing.assert_close(shifted, torch.tensor([0.06, 0.24]))
