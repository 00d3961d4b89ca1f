# SPDX-License-Identifier: Apache-2.0
"""Teach the small encoder to give the latents that a frozen teacher gave, level by level and then as a whole."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional

from pidecode.models.tiny import EncoderConfig, TinyEncoder
from pidecode.training.tiny.augment import varied
from pidecode.training.tiny.cache import SCALE, LatentCache
from pidecode.training.tiny.muon import Muon, muon_groups
from pidecode.training.tiny.stage import Draws, Learner, Parts, Report, Stage, StageRecipe, resume
from pidecode.training.tiny.teacher import TeacherAutoencoder


@dataclass(frozen=True, slots=True, kw_only=True)
class EncoderRecipe(StageRecipe):
    """How long and how fast to imitate."""

    apart: float = 0.5
    """Share of the budget until which the three levels learn apart, each fed its teacher's features."""
    learning_rate: float = 1e-3
    joined_rate: float = 4e-4
    """Learning rate once the levels are joined."""
    side: int = 96
    """Side of a crop of the small image."""
    crops: int = 4
    hint_weight: float = 0.3
    """Weight of the inner levels' distances from the teacher's features once the levels are joined."""
    image_weight: float = 2.0
    """Weight, then, of the squared difference between the images that the teacher decodes from both latents of one
    of the crops."""

    def rate(self, progress: float) -> float:
        """The learning rate before warm-up and fall."""
        return self.learning_rate if progress < self.apart else self.joined_rate


def by_levels(model: TinyEncoder, image: Tensor, given: Sequence[Tensor] | None = None) -> tuple[Tensor, ...]:
    """What a teacher has features of: those at half and at a quarter of the image's side, and the cells.

    given: the teacher's features. With them every level is fed what the teacher had there instead of what the level
    before it made: shallow parts learn many times faster than the whole, and all at once.
    """
    half = model.half_features(image)
    quarter = model.quarter_features(half if given is None else given[0])
    return half, quarter, model.cells_from(quarter if given is None else given[1])


def imitation_loss(
    model: TinyEncoder, teacher: TeacherAutoencoder, image: Tensor, recipe: EncoderRecipe, *, apart: bool
) -> tuple[Tensor, Parts]:
    """The loss of one batch of crops, and the distances it consists of, in units of the teacher's variances.

    Both encoders see the crop as if it were a whole image: the teacher normalizes over what it sees.
    """
    with torch.no_grad():
        hints = teacher.encoder_features(image)
    made = by_levels(model, image, hints if apart else None)
    distances = [functional.mse_loss(ours, theirs) / theirs.var() for ours, theirs in zip(made, hints, strict=True)]
    parts = {name: one.item() for name, one in zip(("half", "quarter", "latent"), distances, strict=True)}
    if apart:
        return torch.stack(distances).sum(), parts
    with torch.no_grad():
        wanted = teacher.decoder_image(hints[-1][:1])
    shown = functional.mse_loss(teacher.decoder_image(made[-1][:1]), wanted)
    loss = distances[-1] + recipe.hint_weight * (distances[0] + distances[1]) + recipe.image_weight * shown
    return loss, {**parts, "image": shown.item()}


def run_encoder(
    cache: LatentCache, folder: Path, recipe: EncoderRecipe, teacher: TeacherAutoencoder, *,
    config: EncoderConfig | None = None, report: Report = lambda line: None,
) -> TinyEncoder:  # fmt: skip
    """Train until the budget is used; resumes from `folder` and returns the averaged encoder."""
    torch.manual_seed(recipe.seed)
    model, path = TinyEncoder(config), folder / "encoder.pt"
    state = resume(path, model)
    model.to(recipe.device)

    def loss_of(progress: float, draws: Draws) -> tuple[Tensor, Parts]:
        target = cache.crops(recipe.crops, recipe.side * SCALE, draws.crops).target.to(recipe.device)
        small = varied(target, draws.noise, recolored=recipe.recolored, joined=recipe.joined)[1]
        return imitation_loss(model, teacher, small, recipe, apart=progress < recipe.apart)

    learner = Learner(model, encoder_optimizer(model), recipe.rate)
    note = {"config": model.config.to_dict()}
    stage = Stage(name="encoder", recipe=recipe, path=path, note=note, report=report)
    return stage.learn(model, [learner], loss_of, state)


def encoder_optimizer(model: nn.Module) -> Muon:
    """For an encoder or its parts: Muon for the inner convolutions, Adam for the first and the last."""
    return Muon(muon_groups(model.named_parameters(), adam_names=("stem", "head")), lr=0.0)
