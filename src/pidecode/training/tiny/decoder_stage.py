# SPDX-License-Identifier: Apache-2.0
"""The recipe of `tiny`: shape, schedule, and a loop that survives being killed."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import cast

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from pidecode.facts.architecture import NetConfig
from pidecode.training.tiny.cache import CropBatch, LatentCache
from pidecode.training.tiny.encoder_stage import update_average
from pidecode.training.tiny.muon import Muon, muon_groups
from pidecode.training.tiny.regressor import Regressor
from pidecode.training.tiny.state import Budget, load_state, save_state
from pidecode.training.tiny.teacher import TeacherAutoencoder


def tiny_config() -> NetConfig:
    """The shape of `tiny`: an adapter that climbs to 8-pixel cells, one patch block, one pixel block."""
    return NetConfig(
        hidden_size=256, num_heads=4, patch_depth=1, patch_size=16,
        pixel_hidden_size=4, pixel_depth=1, pixel_attn_hidden_size=32, pixel_num_heads=2,
        text_dim=0, latent_channels=128, latent_down=16, latent_unpatchify=2,
        adapter_width=256, adapter_blocks=3, adapter_climb=2, adapter_padding="replicate", gate="per_token",
        inject_pixels=True, rope_reference=(1024, 1024), prediction="x0",
    )  # fmt: skip


def small_config() -> NetConfig:
    """The shape of `small`: that of `tiny` with an adapter of twice the depth."""
    return replace(tiny_config(), adapter_blocks=6)


@dataclass(frozen=True, slots=True, kw_only=True)
class DecoderRecipe(Budget):
    """How the adapter of `tiny` learns; the schedule follows the budget, which counts all resumed parts."""

    coarse: float = 0.06
    """Share of the budget in which the coarsest level learns alone, on many latents at once."""
    coarse_crops: tuple[tuple[int, int, float], ...] = ((512, 16, 1.0),)
    apart: float = 0.35
    """Share of the budget in which the adapter's levels learn apart, each fed its teacher's features."""
    hinted: float = 0.7
    """Share of the budget in which the joined levels are still held to their teacher's features."""
    hint_weight: float = 0.3
    """Weight of each level's distance from its teacher's features while apart, in units of their variance."""
    later_hint_weight: float = 0.1
    """The same once they are joined."""
    learning_rate: float = 2e-3
    warmup_steps: int = 40
    decay_from: float = 0.6
    """Share of the budget after which the rate falls linearly to a fiftieth."""
    crops: tuple[tuple[int, int, float], ...] = ((256, 8, 0.6), (384, 4, 0.25), (512, 2, 0.15))
    """Crop side in pixels, crops a step, share of the steps."""
    noisy_from: float = 0.7
    """Share of the budget after which latents are noised as well."""
    noisy_share: float = 0.2
    largest_sigma: float = 0.8
    absolute_weight: float = 0.0
    """Weight of the mean absolute error beside the mean squared error."""
    ema: float = 0.995
    clip: float = 1.0
    device: str = "cpu"
    seed: int = 0
    save_every: float = 120.0
    log_every: float = 30.0


def noised(latent: Tensor, share: float, largest: float, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """A `share` of the samples with flow noise of sigma ~ U[0, largest] (SPEC.md section 7); and each sigma [B]."""
    count = len(latent)
    chosen = torch.rand(count, generator=generator) < share
    sigma = torch.where(chosen, torch.rand(count, generator=generator) * largest, torch.zeros(count))
    noise = torch.randn(latent.shape, generator=generator)
    scale = sigma.view(-1, 1, 1, 1).to(latent)
    return (1 - scale) * latent + scale * noise.to(latent), sigma


def draw_crops(
    cache: LatentCache, choices: tuple[tuple[int, int, float], ...], random: np.random.Generator
) -> CropBatch:
    """One step's crops: one of the `choices` of crop side, crops a step and share of the steps."""
    shares = np.array([share for _, _, share in choices])
    side, count, _ = choices[int(random.choice(len(shares), p=shares / shares.sum()))]
    return cache.crops(count, side, random)


def picture_loss(output: Tensor, target: Tensor, absolute_weight: float) -> Tensor:
    """Mean squared error, plus `absolute_weight` times the mean absolute error."""
    loss = F.mse_loss(output, target)
    return loss + absolute_weight * F.l1_loss(output, target) if absolute_weight else loss


def rate_at(progress: float, step: int, recipe: DecoderRecipe) -> float:
    """Learning rate: a warm-up by steps, flat, then a fall by the share of the time that is used."""
    falling = max(0.0, progress - recipe.decay_from) / (1 - recipe.decay_from)
    return recipe.learning_rate * min(1.0, (step + 1) / recipe.warmup_steps) * max(0.02, 1 - falling)


def coarse_loss(model: Regressor, teacher: TeacherAutoencoder, cells: Tensor) -> Tensor:
    """The coarsest level's distance from its teacher's features, in units of their variance.

    That level has one position for a thousand pixels and decides over the whole picture, colours first.
    """
    with torch.no_grad():
        hint: Tensor = teacher.decoder[:6](cells)
    made: Tensor = cast(nn.Sequential, model.tower.levels[0])(cells)
    return F.mse_loss(made, hint) / hint.var()


def hint_loss(
    model: Regressor, teacher: TeacherAutoencoder, cells: Tensor, target: Tensor, recipe: DecoderRecipe, *, apart: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """The loss, the picture's squared error, and the levels' mean distance from their teacher's features."""
    with torch.no_grad():
        hints = teacher.decoder_features(cells)
    made, picture = model.by_levels(cells, hints if apart else None)
    error = F.mse_loss(picture, target)
    distances = [F.mse_loss(ours, theirs) / theirs.var() for ours, theirs in zip(made, hints, strict=True)]
    weight = recipe.hint_weight if apart else recipe.later_hint_weight
    return error + weight * torch.stack(distances).sum(), error, torch.stack(distances).mean()


def run_regressor(
    cache: LatentCache, folder: Path, recipe: DecoderRecipe, teacher: TeacherAutoencoder, *,
    config: NetConfig | None = None, report: Callable[[str], None] = lambda line: None,
) -> Regressor:  # fmt: skip
    """Train the adapter with a linear head until the budget is used; resumes from `folder`, returns the average."""
    torch.manual_seed(recipe.seed)
    config = config or tiny_config()
    model, average = Regressor(config), Regressor(config).requires_grad_(False).to(recipe.device)
    state = load_state(folder / "regressor.pt")
    if state is None:
        model.start_from_patches(cache.crops(64, recipe.crops[0][0], np.random.default_rng(recipe.seed)).target)
    model.to(recipe.device)
    optimizer = Muon(
        muon_groups(model.named_parameters(), adam_names=("to_pixels", "pit_head")), lr=recipe.learning_rate
    )
    step, used = 0, 0.0
    if state is None:
        average.load_state_dict(model.state_dict())
    else:
        model.load_state_dict(state["model"])
        average.load_state_dict(state["average"])
        optimizer.load_state_dict(state["optimizer"])
        step, used = state["step"], state["used"]
    random, generator = np.random.default_rng([recipe.seed, step]), torch.Generator().manual_seed(recipe.seed + step)
    started, saved, logged, losses = time.monotonic() - used, used, used, list[list[float]]()
    while (progress := recipe.progress(step, used)) < 1:
        for group in optimizer.param_groups:
            group["lr"] = rate_at(progress, step, recipe)
        coarse = progress < recipe.coarse
        batch = draw_crops(cache, recipe.coarse_crops if coarse else recipe.crops, random).to(recipe.device)
        with torch.no_grad():  # as a whole picture: a cut-out of a larger one's latent would not know its own colours
            cells = F.pixel_shuffle(batch.latent, 2) if coarse else teacher.encode(batch.small)
        optimizer.zero_grad(set_to_none=True)
        if coarse:
            loss = coarse_loss(model, teacher, cells)
            parts = [0.0, loss.item()]
        elif progress < recipe.hinted:
            apart = progress < recipe.apart
            loss, error, distance = hint_loss(model, teacher, cells, batch.target, recipe, apart=apart)
            parts = [error.item(), distance.item()]
        else:
            share = recipe.noisy_share if progress >= recipe.noisy_from else 0.0
            latent, _ = noised(F.pixel_unshuffle(cells, 2), share, recipe.largest_sigma, generator)
            loss = picture_loss(model(latent), batch.target, recipe.absolute_weight)
            parts = [loss.item(), 0.0]
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), recipe.clip)
        optimizer.step()
        step += 1
        update_average(average, model, min(recipe.ema, (1 + step) / (10 + step)))
        losses.append(parts)
        used = time.monotonic() - started
        if used - logged > recipe.log_every:
            values = " ".join(f"{value:.5f}" for value in np.mean(losses, axis=0))
            report(f"step {step} {used:.0f}s error, distance {values} rate {optimizer.param_groups[0]['lr']:.1e}")
            logged, losses = used, []
        if used - saved > recipe.save_every or recipe.progress(step, used) >= 1:
            save_state(
                folder / "regressor.pt",
                {"model": model.state_dict(), "average": average.state_dict(), "optimizer": optimizer.state_dict(),
                 "step": step, "used": used, "config": config.to_dict()},
            )  # fmt: skip
            saved = used
    return average
