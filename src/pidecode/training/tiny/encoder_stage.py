# SPDX-License-Identifier: Apache-2.0
"""Teach the small encoder to give the latents that a frozen teacher gave, from a cache of whole pictures."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from pidecode.model.encoder import EncoderConfig, ImageEncoder
from pidecode.training.tiny.cache import LatentCache, to_signed
from pidecode.training.tiny.muon import Muon, muon_groups
from pidecode.training.tiny.state import Budget, load_state, save_state


@dataclass(frozen=True, slots=True, kw_only=True)
class EncoderRecipe(Budget):
    """How long and how fast to imitate; the budget counts all resumed parts."""

    learning_rate: float = 1e-3
    warmup_steps: int = 20
    pictures_per_step: int = 2
    ema: float = 0.998
    device: str = "cpu"
    seed: int = 0
    latent_weight: float = 0.1
    """Weight of the latent's mean squared error where a decoder's picture counts too."""
    save_every: float = 120.0
    log_every: float = 30.0


def whole_picture(cache: LatentCache, random: np.random.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """One whole picture at output size and at low resolution, [1,3,..] in [-1,1], and its teacher's cells.

    Mirrored half of the time.
    """
    index = int(random.choice(len(cache.names), p=cache.weights))
    mirrored = int(random.integers(0, 2))
    small = to_signed(np.array(cache.smalls[index]))[None]
    latent = torch.from_numpy(np.array(cache.latents[index][0][mirrored])).float()[None]
    target = to_signed(np.array(cache.pictures[index]))[None]
    return (target.flip(-1), small.flip(-1), latent) if mirrored else (target, small, latent)


def run_encoder(
    cache: LatentCache, folder: Path, recipe: EncoderRecipe, *, config: EncoderConfig | None = None,
    decode: Callable[[Tensor], Tensor] | None = None, report: Callable[[str], None] = lambda line: None,
) -> ImageEncoder:  # fmt: skip
    """Train until the budget is used; resumes from `folder` and returns the averaged encoder.

    decode: a decoder of packed latents that is not trained here; with it, the encoder also learns to give latents
    whose decoded picture is near the original, so that the two small networks do not add up their errors.
    """
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
    started, saved, logged, losses, distances = time.monotonic() - used, used, used, list[float](), list[float]()
    while (progress := recipe.progress(step, used)) < 1:
        rate = rate_at(progress, step, recipe)
        for group in optimizer.param_groups:
            group["lr"] = rate
        optimizer.zero_grad(set_to_none=True)
        for _ in range(recipe.pictures_per_step):
            target, small, latent = (part.to(recipe.device) for part in whole_picture(cache, random))
            cells = model.cells(small)
            loss = functional.mse_loss(cells, latent)
            distances.append(loss.item())
            if decode is not None:
                picture = decode(functional.pixel_unshuffle(cells, 2))
                loss = recipe.latent_weight * loss + functional.mse_loss(picture, target)
            (loss / recipe.pictures_per_step).backward()
            losses.append(loss.item())
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        step += 1
        update_average(average, model, min(recipe.ema, (1 + step) / (10 + step)))
        used = time.monotonic() - started
        if used - logged > recipe.log_every:
            report(
                f"encoder step {step} {used:.0f}s loss {np.mean(losses):.4f} "
                f"latent {np.mean(distances):.4f} rate {rate:.1e}"
            )
            logged, losses, distances = used, [], []
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
