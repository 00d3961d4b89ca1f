# SPDX-License-Identifier: Apache-2.0
"""Encoder and decoder of `tiny` together: the encoder stays near its teacher, the decoder reads both their latents.

Alone, each makes errors that the other has never seen. Here the decoder's loss also reaches the encoder. How far it may
lead it away is bounded by what the teacher's own decoder would show of it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from pidecode.models.regressor import Regressor, shrunk
from pidecode.models.tiny import TinyEncoder
from pidecode.training.tiny.augment import varied
from pidecode.training.tiny.cache import SCALE, LatentCache
from pidecode.training.tiny.decoder_stage import decoder_optimizer, draw_crops, noised, tempered
from pidecode.training.tiny.encoder_stage import encoder_optimizer
from pidecode.training.tiny.stage import Draws, Learner, Parts, Report, Stage, StageRecipe, resume, share_work
from pidecode.training.tiny.teacher import TeacherAutoencoder


@dataclass(frozen=True, slots=True, kw_only=True)
class PairRecipe(StageRecipe):
    """How encoder and decoder learn together, in whichever stage."""

    finest_rate: float = 2e-4
    """Rate of the decoder's finest level and of what reads it."""
    decoder_rate: float = 1.5e-4
    """That of the rest of the decoder; 0 leaves it as it is."""
    encoder_rate: float = 1.5e-4
    """That of the encoder's first guess."""
    corrector_rate: float = 3e-4
    """That of the encoder's corrections, if it has any."""
    decay_from: float = 0.0
    """Share of the budget after which the rates fall linearly to a fiftieth."""
    crops: tuple[tuple[int, int, float], ...] = ((256, 4, 0.5), (384, 2, 0.25), (512, 1, 0.25))
    """Crop side in pixels, crops a step, share of the steps."""
    allowed_difference: float = 0.0025
    """Mean squared difference, in images of [-1, 1], of what the teacher decodes from its own latents and the
    encoder's, that costs nothing (32 dB): within it the encoder is free to tell the decoder more."""
    imitation_weight: float = 1.0
    """Weight of what goes beyond it, a decibel as much as one of an image."""
    latent_weight: float = 0.05
    """Weight of the encoder's squared distance from its teacher's latents."""
    coarse: tuple[tuple[int, float], ...] = ((16, 4.0), (64, 4.0))
    """Sides in pixels of squares, and the weight of the squared differences of their mean colors, beside that of the
    pixels: hardly a tenth of the error, and what is seen first of it."""
    teacher_weight: float = 0.25
    """Weight of the crops that are decoded from the teacher's latent."""
    noisy_share: float = 0.1
    largest_sigma: float = 0.8
    workers: int = 2
    """Processes that update the same shared weights, each with its own crops and momentum, without waiting; one where
    the device is not the processor."""
    seed: int = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class JointRecipe(PairRecipe):
    """How both learn together. The first of a step's crops is also decoded from the teacher's latent, and holds the
    encoder to it."""

    first_share: float = 0.2
    """Share of the steps that train the encoder's first guess; the others train its corrections, where it has any."""


class Pair(nn.Module):
    """The two networks that are trained together."""

    def __init__(self, decoder: Regressor, encoder: TinyEncoder) -> None:
        super().__init__()
        self.decoder, self.encoder = decoder, encoder


TYPICAL = 0.015
"""Mean squared error of an image in [-1, 1]."""
TINIEST = 0.0005
"""Error below which there is little left to gain."""


def levelled(error: Tensor) -> Tensor:
    """Squared errors of images [B] as a loss to which a decibel is worth the same in each of them.

    The mean itself is made by the few images nobody can predict, and its gradient by their noise.
    """
    return TYPICAL * torch.log((error + TINIEST) / TYPICAL)


def coarse_error(made: Tensor, small: Tensor, weights: Sequence[tuple[int, float]]) -> Tensor:
    """Weighted squared differences [B] of squares' mean colors: images [B,3,H,W], their quarters [B,3,H/4,W/4].

    weights: sides of the squares in the images' pixels, and what each counts.
    """
    differences = F.avg_pool2d(made, SCALE) - small
    terms = [weight * F.avg_pool2d(differences, side // SCALE).square().mean((1, 2, 3)) for side, weight in weights]
    return torch.stack(terms).sum(0)


def joint_loss(
    pair: Pair, teacher: TeacherAutoencoder, cache: LatentCache, recipe: JointRecipe, draws: Draws
) -> tuple[Tensor, Parts]:
    """The loss of one batch, and its parts: squared errors of the images from both encoders' latents, and of their
    coarse colors; where the encoder learns too, the differences of what the teacher decodes, and of the latents.
    The teacher's own latent is that of the first crop alone.

    From the teacher's latents the coarse colors shall be what the teacher decodes: that follows from the latents.
    """
    drawn = draw_crops(cache, recipe.crops, draws.crops).to(recipe.device).target
    images, small = varied(drawn, draws.noise, recolored=recipe.recolored, joined=recipe.joined)
    with torch.no_grad():  # as a whole image: a cut-out of a larger one's latent would not know its own colors
        wanted = teacher.encode(small[:1])
        decoded = teacher.decode(wanted)
    cells = encoded(pair, small, recipe, draws)
    latents, target, shown = cells, images, small
    if recipe.teacher_weight:
        latents, target = torch.cat((cells, wanted)), torch.cat((images, images[:1]))
        shown = torch.cat((small, decoded))
    given, sigma = noised(F.pixel_unshuffle(latents, 2), recipe.noisy_share, recipe.largest_sigma, draws.noise)
    made = pair.decoder(given)
    error = (made - target).square().mean((1, 2, 3))
    off = coarse_error(made, shown, recipe.coarse)
    lost = levelled(error + off) * tempered(sigma).to(error)
    count = len(small)
    loss = lost[:count].mean()
    parts = {"own": error[:count].mean().item(), "coarse": off.mean().item()}
    if recipe.teacher_weight:
        loss = loss + recipe.teacher_weight * lost[-1]
        parts |= {"teacher": error[-1].item()}
    if not cells.requires_grad:
        return loss, parts
    imitation = F.mse_loss(teacher.decode(cells[:1]), decoded)  # one is dear enough
    distance = F.mse_loss(cells[:1], wanted)
    beyond = F.relu(levelled(imitation) - levelled(torch.tensor(recipe.allowed_difference)))
    loss = loss + recipe.imitation_weight * beyond + recipe.latent_weight * distance
    return loss, parts | {"imitation": imitation.item(), "latent": distance.item()}


def encoded(pair: Pair, small: Tensor, recipe: JointRecipe, draws: Draws) -> Tensor:
    """Cells after a random number of rounds of correction, with the gradient of the last one alone.

    Each round then learns to make the best of what the ones before it left, at the cost of one.
    """
    rounds = pair.encoder.config.rounds
    last = int(draws.crops.integers(1, rounds + 1)) if rounds and draws.crops.random() >= recipe.first_share else 0
    with torch.set_grad_enabled(last == 0):
        cells = pair.encoder.cells(small)
    for index in range(1, last + 1):
        with torch.no_grad():
            error = small - shrunk(pair.decoder(F.pixel_unshuffle(cells, 2)), SCALE)
        with torch.set_grad_enabled(index == last):
            cells = cells + pair.encoder.correction(small, error)
    return cells


def halves(decoder: Regressor) -> tuple[nn.Module, nn.Module]:
    """The finest level of a decoder's tower with what reads it, and everything before and after these."""
    *coarser, finest = decoder.tower.levels
    before_and_after = {"coarser": nn.ModuleList(coarser), "to_pixels": decoder.to_pixels}
    return nn.ModuleDict({"finest": finest, "pit_head": decoder.adapter.pit_head}), nn.ModuleDict(before_and_after)


def learners_of(pair: Pair, recipe: PairRecipe) -> list[Learner]:
    """The parts that learn, each at its rate; one whose rate is 0 stays as it is."""

    def constant(rate: float) -> Callable[[float], float]:
        return lambda progress: rate

    finest, rest = halves(pair.decoder)
    first = nn.ModuleDict({name: part for name, part in pair.encoder.named_children() if name != "corrector"})
    learners = [
        Learner(finest, decoder_optimizer(finest), constant(recipe.finest_rate)),
        Learner(rest, decoder_optimizer(rest), constant(recipe.decoder_rate)),
        Learner(first, encoder_optimizer(first), constant(recipe.encoder_rate)),
    ]
    if pair.encoder.config.rounds:
        corrector = pair.encoder.corrector
        learners.append(Learner(corrector, encoder_optimizer(corrector), constant(recipe.corrector_rate)))
    return learners


def run_joint(
    pair: Pair, cache: LatentCache, folder: Path, recipe: JointRecipe, teacher: TeacherAutoencoder,
    report: Report = lambda line: None,
) -> None:  # fmt: skip
    """Train `pair` until the budget is used; the result, averaged, is in `folder/joint.pt`, from which it resumes.

    With several workers a run is not repeatable to the bit: who updates first is up to the machine.
    """
    state = resume(folder / "joint.pt", pair)
    pair.to(recipe.device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    for learner in learners_of(pair, recipe):
        learner.network.requires_grad_(learner.rate(0.0) > 0)
    note = {"decoder_config": pair.decoder.config.to_dict(), "encoder_config": pair.encoder.config.to_dict()}

    def work(rank: int) -> None:
        stage = Stage(name="joint", recipe=recipe, path=folder / "joint.pt", note=note, report=report, rank=rank)
        learners = learners_of(pair, recipe)
        stage.learn(pair, learners, lambda progress, draws: joint_loss(pair, teacher, cache, recipe, draws), state)

    share_work(work, (pair,), recipe.workers if recipe.device == "cpu" else 1)
