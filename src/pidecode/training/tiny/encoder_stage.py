# SPDX-License-Identifier: Apache-2.0
"""Teach the small encoder to give the latents that a frozen teacher gave, from a cache of whole pictures."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from pidecode.model.encoder import EncoderConfig, ImageEncoder
from pidecode.training.tiny.cache import SCALE, LatentCache
from pidecode.training.tiny.muon import Muon, muon_groups
from pidecode.training.tiny.state import Budget, load_state, save_state
from pidecode.training.tiny.teacher import TeacherAutoencoder


@dataclass(frozen=True, slots=True, kw_only=True)
class EncoderRecipe(Budget):
    """How long and how fast to imitate; the budget counts all resumed parts."""

    apart: float = 0.45
    """Share of the budget in which the three levels learn apart, each fed its teacher's features."""
    learning_rate: float = 2e-3
    warmup_steps: int = 20
    side: int = 96
    """Side of a crop of the small picture."""
    crops: int = 4
    hint_weight: float = 0.3
    """Weight of the inner levels' distances from the teacher's features once the levels are joined."""
    picture_weight: float = 2.0
    """Weight, then, of the squared difference between the pictures that the teacher decodes from both latents of one
    of the crops."""
    ema: float = 0.998
    device: str = "cpu"
    seed: int = 0
    save_every: float = 120.0
    log_every: float = 30.0


def by_levels(model: ImageEncoder, picture: Tensor, given: Sequence[Tensor] | None = None) -> tuple[Tensor, ...]:
    """What a teacher has features of: those at half and at a quarter of the picture's side, and the cells.

    given: the teacher's features. With them every level is fed what the teacher had there instead of what the level
    before it made: shallow parts learn many times faster than the whole, and all at once.
    """
    half = model.half_features(picture)
    quarter = model.quarter_features(half if given is None else given[0])
    return half, quarter, model.cells_from(quarter if given is None else given[1])


def imitation_loss(
    model: ImageEncoder, teacher: TeacherAutoencoder, picture: Tensor, recipe: EncoderRecipe, *, apart: bool
) -> tuple[Tensor, list[float]]:
    """The loss of one batch of crops, and the distances it consists of, in units of the teacher's variances.

    Both encoders see the crop as if it were a whole picture: the teacher normalises over what it sees.
    """
    with torch.no_grad():
        hints = teacher.encoder_features(picture)
    made = by_levels(model, picture, hints if apart else None)
    distances = [functional.mse_loss(ours, theirs) / theirs.var() for ours, theirs in zip(made, hints, strict=True)]
    if apart:
        return torch.stack(distances).sum(), [distance.item() for distance in distances]
    with torch.no_grad():
        wanted = teacher.decoder_picture(hints[-1][:1])
    shown = functional.mse_loss(teacher.decoder_picture(made[-1][:1]), wanted)
    loss = distances[-1] + recipe.hint_weight * (distances[0] + distances[1]) + recipe.picture_weight * shown
    return loss, [part.item() for part in (*distances, shown)]


def run_encoder(
    cache: LatentCache, folder: Path, recipe: EncoderRecipe, teacher: TeacherAutoencoder, *,
    config: EncoderConfig | None = None, report: Callable[[str], None] = lambda line: None,
) -> ImageEncoder:  # fmt: skip
    """Train until the budget is used; resumes from `folder` and returns the averaged encoder."""
    torch.manual_seed(recipe.seed)
    model = ImageEncoder(config).to(recipe.device)
    average = ImageEncoder(config).requires_grad_(False).to(recipe.device)
    average.load_state_dict(model.state_dict())
    optimizer = Muon(muon_groups(model.named_parameters(), adam_names=("stem", "head")), lr=recipe.learning_rate)
    state = load_state(folder / "encoder.pt")
    step, used = 0, 0.0
    if state is not None:
        model.load_state_dict(state["model"])
        average.load_state_dict(state["average"])
        optimizer.load_state_dict(state["optimizer"])
        step, used = state["step"], state["used"]
    random = np.random.default_rng([recipe.seed, step])
    started, saved, logged, losses = time.monotonic() - used, used, used, list[list[float]]()
    while (progress := recipe.progress(step, used)) < 1:
        rate, apart = rate_at(progress, step, recipe), progress < recipe.apart
        for group in optimizer.param_groups:
            group["lr"] = rate
        picture = cache.crops(recipe.crops, recipe.side * SCALE, random).small.to(recipe.device)
        optimizer.zero_grad(set_to_none=True)
        loss, parts = imitation_loss(model, teacher, picture, recipe, apart=apart)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        step += 1
        update_average(average, model, min(recipe.ema, (1 + step) / (10 + step)))
        losses.append(parts)
        used = time.monotonic() - started
        if used - logged > recipe.log_every:
            values = " ".join(
                f"{value:.4f}" for value in np.mean([row for row in losses if len(row) == len(parts)], axis=0)
            )
            report(f"encoder step {step} {used:.0f}s {'apart' if apart else 'whole'} {values} rate {rate:.1e}")
            logged, losses = used, []
        if used - saved > recipe.save_every or recipe.progress(step, used) >= 1:
            save_state(
                folder / "encoder.pt",
                {"model": model.state_dict(), "average": average.state_dict(), "optimizer": optimizer.state_dict(),
                 "step": step, "used": used, "config": model.config.to_dict()},
            )  # fmt: skip
            saved = used
    return average


@torch.no_grad()
def rate_at(progress: float, step: int, recipe: EncoderRecipe) -> float:
    """The learning rate: a linear warm-up, and a linear fall to a fiftieth over the budget's second half."""
    warm = min(1.0, (step + 1) / recipe.warmup_steps)
    return recipe.learning_rate * warm * (0.02 + 0.98 * min(1.0, 2 * (1 - progress)))


def update_average(average: nn.Module, model: nn.Module, keep: float) -> None:
    """Exponential moving average of the weights, in place."""
    for mean, value in zip(average.parameters(), model.parameters(), strict=True):
        mean.lerp_(value, 1 - keep)
