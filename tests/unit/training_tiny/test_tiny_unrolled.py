# SPDX-License-Identifier: Apache-2.0
"""The whole way at once, at debug_config size: images in memory, fixed matrices, stages that learn, stop and go on."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from PIL import Image

from pidecode.errors import SettingError, TrainingError
from pidecode.metrics import ssim
from pidecode.models.regressor import shrunk
from pidecode.models.tiny import TinyEncoder
from pidecode.training.tiny.accelerated import Matrices, Recorded, compiling, edged, keep_exact, pad_by_joining
from pidecode.training.tiny.cache import LatentCache
from pidecode.training.tiny.critic import Critics
from pidecode.training.tiny.grow import between, grown_encoder, with_corrections, with_rounds
from pidecode.training.tiny.joint_stage import Pair
from pidecode.training.tiny.muon import Muon, orthogonalised
from pidecode.training.tiny.procedural import procedural_image
from pidecode.training.tiny.release import load_pair
from pidecode.training.tiny.resident import ResidentImages, resident_images
from pidecode.training.tiny.state import load_state
from pidecode.training.tiny.teacher import TeacherAutoencoder
from pidecode.training.tiny.unrolled_stage import Step, UnrolledRecipe, run_unrolled
from tiny_training import ENCODER, parts, started

BRIEF = UnrolledRecipe(
    device="cpu", workers=1, crops=((128, 2, 1.0),), log_every=0.0, warmup_steps=2, decay_from=0.9,
    recolored=0.0, joined=0.0, teacher_share=0.5, noisy_share=0.0,
)  # fmt: skip


@pytest.fixture(scope="module")
def images() -> ResidentImages:
    drawn = [torch.from_numpy(procedural_image("dead_leaves", 256, seed)) for seed in range(2)]
    return ResidentImages(drawn, torch.device("cpu"))


def correcting(cache: LatentCache) -> Pair:
    return Pair(started(cache), with_corrections(TinyEncoder(ENCODER), 2))


def test_crops_are_cut_from_the_images_in_proportion_to_their_area() -> None:
    rows, columns = torch.arange(600).view(-1, 1, 1), torch.arange(520).view(1, -1, 1)
    large = torch.cat((rows % 256 + 0 * columns, 0 * rows + columns % 256, 0 * rows + 0 * columns + 200), dim=2).byte()
    small = large[:300].clone()
    small[..., 2] = 10
    resident = ResidentImages([small, large, torch.zeros(64, 900, 3).byte()], torch.device("cpu"))
    assert len(resident) == 2  # the third is too narrow for any crop
    crops = ((resident.crops(600, 256, torch.Generator().manual_seed(0)) + 1) * 127.5).round()
    assert crops.shape == (600, 3, 256, 256)
    share = (crops[:, 2, 0, 0] == 200).float().mean()
    assert 0.6 < share < 0.73  # two thirds of the area
    for crop in crops[:20]:
        assert torch.equal(crop[0, 1:, 0], (crop[0, :-1, 0] + 1) % 256)
        assert torch.equal(crop[1, 0, 1:], (crop[1, 0, :-1] + 1) % 256)
        assert len(crop[2].unique()) == 1
    assert (resident.crops(40, 512)[:, 2] > 0).all()  # only the larger one is so wide
    with pytest.raises(TrainingError, match="No image is 1024 pixels"):
        resident.crops(1, 1024)
    with pytest.raises(TrainingError, match="at least 256"):
        ResidentImages([torch.zeros(64, 64, 3).byte()], torch.device("cpu"))


def test_photographs_come_in_all_sizes_with_drawn_ones(tmp_path: Path) -> None:
    Image.new("RGB", (600, 560), (255, 0, 0)).save(tmp_path / "a.png")
    resident = resident_images(
        [tmp_path / "a.png"], torch.device("cpu"), shrinks=(1.0, 0.5), procedural_seeds=1, procedural_side=256
    )
    photographs = [(560, 600), (280, 300)]
    sizes = list(zip(resident.heights.tolist(), resident.widths.tolist(), strict=True))
    assert sizes == [*photographs, *[(256, 256)] * 5]
    assert torch.equal(resident.crops(1, 512)[0, :, 0, 0], torch.tensor([1.0, -1.0, -1.0]))


def test_matrices_shrink_and_compare_as_the_originals_do() -> None:
    torch.manual_seed(0)
    made, wanted = torch.rand(2, 3, 128, 128) * 2.4 - 1.2, torch.rand(2, 3, 128, 128) * 2 - 1
    matrices = Matrices(128, torch.device("cpu"))
    torch.testing.assert_close(matrices.shrunk(made), shrunk(made, 4), atol=1e-5, rtol=1e-4)
    near = wanted + 0.1 * torch.randn_like(wanted)
    clamped = near.clamp(-1, 1)
    torch.testing.assert_close(matrices.similarity(clamped, wanted), ssim(near, wanted).float(), atol=1e-4, rtol=1e-4)


def test_edges_are_repeated_as_the_framework_does(cache: LatentCache) -> None:
    x = torch.rand(2, 4, 5, 7)
    assert torch.equal(edged(x), F.pad(x, (1, 1, 1, 1), mode="replicate"))
    regressor, latent = started(cache), torch.rand(1, 128, 2, 2)
    with torch.no_grad():
        before = regressor(latent)
        pad_by_joining(regressor)
        torch.testing.assert_close(regressor(latent), before, atol=1e-5, rtol=1e-4)


def test_exact_layers_stay_exact_in_half_precision() -> None:
    layer, x = torch.nn.Linear(64, 64), torch.rand(3, 64)
    wanted = layer(x)
    keep_exact(layer)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(layer(x), wanted)


def test_matrices_of_one_shape_learn_as_each_would_alone() -> None:
    torch.manual_seed(0)
    together = torch.randn(3, 16, 40)
    torch.testing.assert_close(orthogonalised(together), torch.stack([orthogonalised(one) for one in together]))
    weights = [torch.nn.Parameter(torch.randn(16, 40)) for _ in range(2)] + [torch.nn.Parameter(torch.randn(5))]
    gradients = [torch.randn_like(weight) for weight in weights]
    rate = torch.tensor(0.01)

    def learned(groups: list[list[torch.nn.Parameter]], lr: float | torch.Tensor) -> list[torch.Tensor]:
        optimizers = [Muon([{"params": group, "muon": group[0].ndim == 2}], lr=lr) for group in groups]
        for _ in range(3):
            for group in groups:
                for weight in group:
                    weight.grad = gradients[[weight is other for other in flat].index(True)].clone()
            for optimizer in optimizers:
                optimizer.step()
        return [weight.detach() for weight in flat]

    flat = [torch.nn.Parameter(weight.detach().clone()) for weight in weights]
    alone = learned([[weight] for weight in flat], 0.01)
    flat = [torch.nn.Parameter(weight.detach().clone()) for weight in weights]
    for one, other in zip(alone, learned([flat[:2], flat[2:]], rate), strict=True):
        torch.testing.assert_close(one, other)


def test_a_grown_encoder_gives_the_same_latent() -> None:
    torch.manual_seed(0)
    encoder, image = with_corrections(TinyEncoder(ENCODER), 2), torch.rand(1, 3, 32, 32)
    for parameter in encoder.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    deeper = grown_encoder(encoder, replace(encoder.config, half_blocks=3, eighth_blocks=2))
    error = torch.rand(1, 3, 32, 32)
    with torch.no_grad():
        assert torch.equal(deeper(image), encoder(image))
        assert torch.equal(deeper.correction(image, error), encoder.correction(image, error))
    with pytest.raises(SettingError, match="none may shrink"):
        grown_encoder(deeper, encoder.config)
    with pytest.raises(SettingError, match="only its blocks may differ"):
        grown_encoder(encoder, replace(encoder.config, rounds=3))
    assert with_rounds(encoder, 5).config.rounds == 5
    with pytest.raises(SettingError, match="corrects nothing"):
        with_rounds(TinyEncoder(ENCODER), 2)


def test_a_regressor_between_two_has_a_share_of_either(cache: LatentCache) -> None:
    first, second = started(cache), started(cache)
    for parameter in second.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    before, mixed = copy.deepcopy(first.state_dict()), between(first, second, 0.25)
    for name, value in mixed.state_dict().items():
        torch.testing.assert_close(value, 0.75 * before[name] + 0.25 * second.state_dict()[name])
        assert torch.equal(first.state_dict()[name], before[name])


def test_the_whole_way_learns_and_goes_on_where_it_stopped(
    cache: LatentCache, images: ResidentImages, teacher: TeacherAutoencoder, tmp_path: Path
) -> None:
    pair, lines = correcting(cache), list[str]()
    recipe = replace(BRIEF, steps=30, rounds=(0.2, 0.3, 0.5), finest_rate=2e-3, decoder_rate=2e-3)
    run_unrolled(pair, images, tmp_path, recipe, teacher, lines.append)
    own = [parts(line)["own"] for line in lines]
    assert len(own) == 30
    assert sum(own[-6:]) < sum(own[:6])
    assert all(parts(line)["imitation"] > 0 and parts(line)["critic"] == 0 for line in lines)
    averaged = load_pair(tmp_path / "joint.pt").state_dict()
    again = run_unrolled(correcting(cache), images, tmp_path, replace(recipe, steps=31), teacher)
    state = load_state(tmp_path / "joint.pt")
    assert state is not None
    assert state["step"] == 31
    for name, value in again.state_dict().items():
        assert (value - averaged[name]).abs().max() < 1e-3  # one step further on, not from the start


def test_an_encoder_whose_rates_are_nought_stays_and_a_critic_judges(
    cache: LatentCache, images: ResidentImages, teacher: TeacherAutoencoder, tmp_path: Path
) -> None:
    pair, lines = correcting(cache), list[str]()
    before = {name: value.clone() for name, value in pair.named_parameters()}
    recipe = replace(BRIEF, steps=12, rounds=(0.0, 1.0), encoder_rate=0.0, corrector_rate=0.0, critic_share=0.3)
    run_unrolled(pair, images, tmp_path, replace(recipe, critic_rate=2e-3), teacher, lines.append)
    judged = [parts(line)["critic"] for line in lines]
    assert judged[0] == pytest.approx(2.0, abs=0.2)  # it begins without an opinion
    assert sum(judged[-3:]) < sum(judged[:3])
    changed = {name for name, value in pair.named_parameters() if not torch.equal(value, before[name])}
    assert changed
    assert all(name.startswith("decoder.") for name in changed)


@pytest.mark.parametrize("encoder_learns", [False, True])
@pytest.mark.parametrize("which", ["fine", "coarse"])
def test_each_critics_say_has_the_length_it_was_given(
    cache: LatentCache, images: ResidentImages, teacher: TeacherAutoencoder, which: str, encoder_learns: bool
) -> None:
    def slopes(share: float) -> list[torch.Tensor]:
        pair = correcting(cache).requires_grad_(True)
        pair.encoder.requires_grad_(encoder_learns)
        torch.manual_seed(3)
        critics = Critics(*((share, 0.0) if which == "fine" else (0.0, share))) if share else None
        torch.manual_seed(4)
        recipe = replace(BRIEF, crops=((128, 1, 1.0),), teacher_share=0.0)
        assert torch.isfinite(Step(pair, teacher, images, recipe, critics)(128, 1, 0)).all()
        learning = [pair.decoder.to_pixels.bias, *([pair.encoder.stem.weight] if encoder_learns else [])]
        assert all(weight.grad is not None for weight in learning)
        assert critics is None or all(weight.grad is not None for weight in critics.parameters())
        return [weight.grad for weight in learning if weight.grad is not None]

    for plain, little, some, much in zip(*map(slopes, (0.0, 1e-9, 0.1, 0.5)), strict=True):
        torch.testing.assert_close(little, plain, atol=1e-7, rtol=1e-3)
        assert not torch.allclose(much, plain, rtol=1e-2)
        say = (much - plain).norm()  # five times as long, and the same way
        assert (much - plain - 5 * (some - plain)).norm() < 0.01 * say


def test_what_the_stage_before_compiled_is_forgotten() -> None:
    times: list[int] = []

    def backend(graph: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> torch.fx.GraphModule:
        times.append(1)
        return graph

    double = torch.compile(lambda x: 2 * x, backend=backend)
    for expected in (1, 1):
        double(torch.ones(2))
        assert len(times) == expected
    with compiling():
        double(torch.ones(2))
    assert len(times) == 2


def test_critics_see_the_image_and_a_quarter_of_it_and_go_on_in_the_next_stage(
    cache: LatentCache, images: ResidentImages, teacher: TeacherAutoencoder, tmp_path: Path
) -> None:
    image, matrices = torch.rand(1, 3, 128, 128) * 2 - 1, Matrices(128, torch.device("cpu"))
    (fine, whole, _), (coarse, quarter, share) = Critics(0.1, 0.2).views(image, matrices.shrunk)
    assert (fine(whole).shape, coarse(quarter).shape, share) == ((1, 1, 8, 8), (1, 1, 4, 4), 0.2)
    torch.testing.assert_close(quarter, shrunk(image, 4), atol=1e-5, rtol=1e-5)
    recipe = replace(BRIEF, steps=2, rounds=(1.0,), encoder_rate=0.0, corrector_rate=0.0, critic_share=0.3)
    run_unrolled(correcting(cache), images, tmp_path / "first", recipe, teacher)
    second = replace(recipe, coarse_critic_share=0.3, critic_rate=0.0)
    run_unrolled(correcting(cache), images, tmp_path / "second", second, teacher, after=tmp_path / "first")
    states = [load_state(tmp_path / name / "joint.pt") for name in ("first", "second")]
    before, after = [state["critics"] for state in states if state]
    assert {name.split(".")[0] for name in after} == {"fine", "coarse"}
    weights = [name for name in before if name.endswith("weight.original")]
    assert len(weights) == 9
    assert all(torch.equal(after[name], before[name]) for name in weights)


def test_looks_carry_gradients_where_they_are_asked_to(
    cache: LatentCache, images: ResidentImages, teacher: TeacherAutoencoder
) -> None:
    def slope(through_looks: bool, rounds: int) -> torch.Tensor:
        torch.manual_seed(0)
        pair = correcting(cache)
        torch.manual_seed(1)
        recipe = replace(BRIEF, crops=((128, 1, 1.0),), teacher_share=0.0, through_looks=through_looks)
        Step(pair, teacher, images, recipe, None)(128, 1, rounds)
        assert pair.decoder.to_pixels.bias.grad is not None
        return pair.decoder.to_pixels.bias.grad

    assert torch.equal(slope(True, 0), slope(False, 0))
    assert not torch.equal(slope(True, 1), slope(False, 1))


def test_an_encoder_without_corrections_is_refused(
    cache: LatentCache, images: ResidentImages, teacher: TeacherAutoencoder, tmp_path: Path
) -> None:
    with pytest.raises(SettingError, match="trains corrections"):
        run_unrolled(Pair(started(cache), TinyEncoder(ENCODER)), images, tmp_path, BRIEF, teacher)


def test_workers_share_the_weights(
    cache: LatentCache, images: ResidentImages, teacher: TeacherAutoencoder, tmp_path: Path
) -> None:
    pair = correcting(cache)
    before = pair.decoder.to_pixels.weight.detach().clone()
    run_unrolled(pair, images, tmp_path, replace(BRIEF, steps=2, workers=2, rounds=(0.0, 1.0)), teacher)
    assert not torch.equal(before, pair.decoder.to_pixels.weight)
    assert not torch.equal(before, load_pair(tmp_path / "joint.pt").decoder.to_pixels.weight)


@pytest.mark.gpu
def test_a_recorded_stage_learns_on_a_card(
    cache: LatentCache, images: ResidentImages, teacher: TeacherAutoencoder, tmp_path: Path
) -> None:
    resident = ResidentImages([image.view(256, 256, 3) for image in images.pixels.split(256 * 256)],
                                torch.device("cuda"))  # fmt: skip
    lines: list[str] = []
    recipe = replace(BRIEF, device="cuda", steps=40, rounds=(0.2, 0.3, 0.5), finest_rate=2e-3, decoder_rate=2e-3)
    run_unrolled(correcting(cache), resident, tmp_path, recipe, teacher, lines.append)
    own = [parts(line)["own"] for line in lines]
    assert sum(own[-8:]) < sum(own[:8])


@pytest.mark.gpu
def test_a_record_runs_as_often_as_it_is_asked_and_once_more_for_none() -> None:
    total = torch.zeros((), device="cuda")

    def step(much: int) -> torch.Tensor:
        total.add_(much)
        return total + 0

    recorded = Recorded(step)
    results = [recorded(much).item() for much in (1, 1, 1, 1, 1, 5, 1)]
    assert results == [1, 2, 3, 4, 5, 10, 11]
