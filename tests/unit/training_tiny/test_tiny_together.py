# SPDX-License-Identifier: Apache-2.0
"""Encoder and decoder of `tiny` together: runs that grow, share, stop and go on; files that load."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from pidecode import PixelDecoder
from pidecode.errors import SettingError, TrainingError
from pidecode.models.regressor import Regressor, into_pixelnet, out_of_pixelnet
from pidecode.models.tiny import TinyEncoder
from pidecode.training.tiny.cache import LatentCache, held_out, quarter, read_manifest
from pidecode.training.tiny.decoder_stage import small_config, tiny_config
from pidecode.training.tiny.grow import GAIN, grown, with_corrections
from pidecode.training.tiny.joint_stage import TINIEST, TYPICAL, JointRecipe, Pair, levelled, run_joint
from pidecode.training.tiny.procedural import procedural_image
from pidecode.training.tiny.release import load_pair, release_decoder, release_encoder, released_pair
from pidecode.training.tiny.run import CORRECTIONS, TinyRun, build_cache, train_small
from pidecode.training.tiny.state import load_state, save_state
from pidecode.training.tiny.teacher import TeacherAutoencoder
from tiny_training import ENCODER, SMALL, folders, parts, started


def test_training_goes_on_from_what_was_released(cache: LatentCache, tmp_path: Path) -> None:
    pair = Pair(started(cache), TinyEncoder(ENCODER))
    state = {
        "average": pair.state_dict(), "step": 1, "used": 1.0,
        "decoder_config": SMALL.to_dict(), "encoder_config": ENCODER.to_dict(),
    }  # fmt: skip
    save_state(tmp_path / "joint.pt", state)
    files = (
        release_decoder(tmp_path / "joint.pt", tmp_path, variant="tiny"),
        release_encoder(tmp_path / "joint.pt", tmp_path),
    )
    again, latent = released_pair(*files), cache.crops(2, 128, np.random.default_rng(0)).latent
    with torch.no_grad():  # float16 in between
        assert (again.decoder(latent) - pair.decoder(latent)).abs().max() < 2e-2
        small = torch.rand(1, 3, 32, 32)
        assert (again.encoder(small) - pair.encoder(small)).abs().max() < 2e-2
    assert all(parameter.requires_grad for parameter in again.parameters())
    net = into_pixelnet(pair.decoder)
    torch.nn.init.normal_(net.final_layer.linear.weight)
    with pytest.raises(SettingError, match="trained since"):
        out_of_pixelnet(net)


def test_a_grown_regressor_gives_the_same_image(cache: LatentCache) -> None:
    regressor = started(cache)
    latent = cache.crops(2, 128, np.random.default_rng(0)).latent
    deeper = grown(regressor, replace(SMALL, adapter_stages=(3, 1, 2, 3)))
    with torch.no_grad():
        assert torch.equal(deeper(latent), regressor(latent))
    with pytest.raises(SettingError, match="none may shrink"):
        grown(deeper, SMALL)
    with pytest.raises(SettingError, match="grows in adapter_stages only"):
        grown(regressor, replace(SMALL, pixel_attn_hidden_size=32, hidden_size=320))


def test_a_regressor_grows_a_finer_level_that_gives_the_same_image(cache: LatentCache) -> None:
    coarser = replace(SMALL, adapter_stages=(1, 1, 1), adapter_width=256)
    torch.manual_seed(0)
    regressor = Regressor(coarser)
    regressor.start_from_patches(cache.crops(16, 128, np.random.default_rng(0)).target)
    latent = cache.crops(2, 128, np.random.default_rng(0)).latent
    with torch.no_grad():
        torch.testing.assert_close(grown(regressor, SMALL)(latent), regressor(latent), atol=1e-4, rtol=1e-4)


def test_encoder_and_decoder_learn_together_and_the_files_load(
    cache: LatentCache, teacher: TeacherAutoencoder, tmp_path: Path
) -> None:
    pair = Pair(started(cache), TinyEncoder(ENCODER))
    lines: list[str] = []
    recipe = JointRecipe(
        steps=40, crops=((128, 2, 1.0),), workers=1, log_every=0.0, decoder_rate=2e-3,
        recolored=0.0, joined=0.0, noisy_share=0.0,
    )  # fmt: skip
    run_joint(pair, cache, tmp_path, recipe, teacher, lines.append)
    own = [parts(line)["own"] for line in lines]
    assert len(own) == 40
    assert sum(own[-8:]) < sum(own[:8])
    state = tmp_path / "joint.pt"
    paths = release_decoder(state, tmp_path, variant="tiny"), release_encoder(state, tmp_path)
    loaded = PixelDecoder.from_pretrained(paths[0], encoder=paths[1], device="cpu")
    image = loaded.upscale(Image.fromarray(quarter(procedural_image("gradients", 256, 0))), seed=0)
    assert image.size == (256, 256)


def test_a_decoder_alone_leaves_the_encoder_as_it_is(
    cache: LatentCache, teacher: TeacherAutoencoder, tmp_path: Path
) -> None:
    pair = Pair(started(cache), TinyEncoder(ENCODER))
    before = {name: value.clone() for name, value in pair.state_dict().items()}
    recipe = JointRecipe(steps=2, crops=((64, 1, 1.0),), workers=1, encoder_rate=0.0)
    run_joint(pair, cache, tmp_path, recipe, teacher)
    after = load_pair(tmp_path / "joint.pt").state_dict()
    for name, value in before.items():
        assert torch.equal(after[name], value) == (
            name.startswith("encoder.") or torch.equal(pair.state_dict()[name], value)
        )


def test_the_finest_level_learns_alone(cache: LatentCache, teacher: TeacherAutoencoder, tmp_path: Path) -> None:
    pair = Pair(started(cache), TinyEncoder(ENCODER))
    before = {name: value.clone() for name, value in pair.decoder.named_parameters()}
    recipe = JointRecipe(steps=3, crops=((64, 1, 1.0),), workers=1, encoder_rate=0.0, decoder_rate=0.0)
    run_joint(pair, cache, tmp_path, recipe, teacher)
    changed = {name for name, value in pair.decoder.named_parameters() if not torch.equal(value, before[name])}
    assert changed
    assert all("levels.3." in name or "pit_head" in name for name in changed)


def test_corrections_start_by_reading_an_error_as_a_part_of_the_image() -> None:
    torch.manual_seed(0)
    encoder, image, error = TinyEncoder(ENCODER), torch.rand(2, 3, 32, 48), 0.1 * torch.randn(2, 3, 32, 48)
    correcting = with_corrections(encoder, 3)
    with torch.no_grad():
        assert torch.equal(correcting(image), encoder(image))
        wanted = encoder.cells(image + GAIN * error) - encoder.cells(image)
        torch.testing.assert_close(correcting.correction(image, error), wanted, atol=1e-5, rtol=1e-4)
        assert not correcting.correction(image, torch.zeros_like(error)).any()


def test_corrections_learn_alone_and_bring_the_image_nearer(
    cache: LatentCache, teacher: TeacherAutoencoder, tmp_path: Path
) -> None:
    pair = Pair(started(cache), with_corrections(TinyEncoder(ENCODER), 2))
    before = {name: value.clone() for name, value in pair.named_parameters()}
    lines: list[str] = []
    recipe = replace(
        CORRECTIONS, seconds=0, steps=40, crops=((128, 2, 1.0),), workers=1, log_every=0.0, recolored=0.0, joined=0.0
    )
    run_joint(pair, cache, tmp_path, replace(recipe, imitation_weight=0.0, corrector_rate=2e-3), teacher, lines.append)
    changed = {name for name, value in pair.named_parameters() if not torch.equal(value, before[name])}
    assert changed
    assert all(name.startswith("encoder.corrector.") for name in changed)
    own = [parts(line)["coarse"] for line in lines]
    assert sum(own[-8:]) < sum(own[:8])


def test_a_decibel_is_worth_the_same_in_every_image() -> None:
    error = torch.tensor([0.004, 0.2], requires_grad=True)
    (slope,) = torch.autograd.grad(levelled(error).sum(), error)
    worth = slope * (error + TINIEST)
    assert torch.allclose(worth[0], worth[1])
    assert torch.allclose(levelled(torch.tensor([TYPICAL - TINIEST])), torch.zeros(1), atol=1e-7)


def test_two_workers_share_the_weights(cache: LatentCache, teacher: TeacherAutoencoder, tmp_path: Path) -> None:
    pair = Pair(started(cache), TinyEncoder(ENCODER))
    before = pair.decoder.to_pixels.weight.detach().clone()
    run_joint(pair, cache, tmp_path, JointRecipe(steps=2, crops=((64, 1, 1.0),), workers=2), teacher)
    state = load_state(tmp_path / "joint.pt")
    assert state is not None
    assert state["step"] > 0
    assert not torch.equal(before, pair.decoder.to_pixels.weight)


def test_a_state_is_whole_or_refused(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "state.pt"
    assert load_state(path) is None
    save_state(path, {"step": 3})
    assert load_state(path) == {"step": 3}
    path.write_bytes(path.read_bytes()[:40])
    with pytest.raises(TrainingError, match="not a training state"):
        load_state(path)
    with pytest.raises(TrainingError, match="run the joint stage"):
        release_decoder(tmp_path / "none.pt", tmp_path, variant="tiny")


@pytest.mark.slow
def test_one_command_makes_all_three_files_and_goes_on(tmp_path: Path, teacher: TeacherAutoencoder) -> None:
    data, weights = folders(tmp_path, teacher, 1024)
    run = TinyRun(
        data=data, teacher=weights, folder=tmp_path / "run", procedural_seeds=0,
        decoder_seconds=2, encoder_seconds=2, joint_seconds=2, corrections_seconds=2, refined_seconds=2,
        finished_seconds=2, small_seconds=2, settled_seconds=2,
    )  # fmt: skip
    lines: list[str] = []
    small, encoder = train_small(run, lines.append)
    assert (small.name, encoder.name) == ("small.safetensors", "tiny_encoder.safetensors")
    depths = [
        PixelDecoder.from_pretrained(path, encoder=encoder, device="cpu").net.config.adapter_stages
        for path in (run.folder / "tiny.safetensors", small)
    ]
    assert depths == [tiny_config().adapter_stages, small_config().adapter_stages]
    states = (
        "regressor.pt",
        "encoder.pt",
        *(f"{part}joint.pt" for part in ("", "corrections/", "refined/", "finished/", "small/", "settled/")),
    )
    steps = [load_state(run.folder / name) for name in states]
    assert train_small(run) == (small, encoder)  # nothing is left to do
    again = [load_state(run.folder / name) for name in states]
    assert [state and state["step"] for state in steps] == [state and state["step"] for state in again]


def test_the_cache_of_a_run_keeps_held_out_images_apart(tmp_path: Path, teacher: TeacherAutoencoder) -> None:
    data, weights = folders(tmp_path, teacher, 128)
    run = TinyRun(data=data, teacher=weights, folder=tmp_path / "run", procedural_seeds=0)
    names = build_cache(run).names
    kept_out = {Path(name).stem for name in held_out(read_manifest(data))}
    assert {name.split(".")[0] for name in names} == {"a", "b", "c"} - kept_out
    assert {path.name.split(".")[0] for path in (run.folder / "held_out").iterdir()} == kept_out
    assert build_cache(run).names == names
