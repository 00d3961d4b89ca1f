# SPDX-License-Identifier: Apache-2.0
"""The decoder of `tiny` on its teacher's latents: its shape, and how its adapter learns level by level."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import cast

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from pidecode.models.regressor import Regressor
from pidecode.registry.configs import PiDConfig
from pidecode.training.tiny.augment import Chance, varied
from pidecode.training.tiny.cache import CropBatch, LatentCache
from pidecode.training.tiny.muon import Muon, muon_groups
from pidecode.training.tiny.stage import Draws, Learner, Parts, Report, Stage, StageRecipe, resume
from pidecode.training.tiny.teacher import TeacherAutoencoder


def tiny_config() -> PiDConfig:
    """The shape of `tiny`: an adapter that climbs to the small image's own grid, one patch block, one pixel block."""
    return PiDConfig(
        hidden_size=256, num_heads=4, patch_depth=1, patch_size=16,
        pixel_hidden_size=4, pixel_depth=1, pixel_attn_hidden_size=32, pixel_num_heads=2,
        text_dim=0, latent_channels=128, latent_down=16, latent_unpatchify=2,
        adapter_width=1024, adapter_stages=(16, 8, 12, 6), adapter_padding="replicate", gate="per_token",
        inject_pixels=True, rope_reference=(1024, 1024), prediction="x0",
    )  # fmt: skip


def small_config() -> PiDConfig:
    """The shape of `small`: that of `tiny` with ten more blocks at the finest level."""
    return replace(tiny_config(), adapter_stages=(16, 8, 12, 16))


@dataclass(frozen=True, slots=True, kw_only=True)
class DecoderRecipe(StageRecipe):
    """How the adapter of `tiny` learns."""

    coarse: float = 0.1
    """Share of the budget in which the coarsest level learns alone, on many latents at once."""
    coarse_crops: tuple[tuple[int, int, float], ...] = ((512, 16, 1.0),)
    apart: float = 0.4
    """Share of the budget until which the adapter's levels learn apart, each fed its teacher's features."""
    hinted: float = 0.7
    """Share of the budget until which the joined levels are still held to their teacher's features."""
    hint_weight: float = 0.3
    """Weight of each level's distance from its teacher's features while apart, in units of their variance."""
    later_hint_weight: float = 0.1
    """The same once they are joined."""
    learning_rate: float = 1.2e-3
    joined_rate: float = 4e-4
    """Learning rate once the levels are joined."""
    crops: tuple[tuple[int, int, float], ...] = ((256, 8, 0.6), (384, 4, 0.25), (512, 2, 0.15))
    """Crop side in pixels, crops a step, share of the steps."""
    noisy_from: float = 0.7
    """Share of the budget after which latents are noised as well."""
    noisy_share: float = 0.1
    largest_sigma: float = 0.8

    def rate(self, progress: float) -> float:
        """The learning rate before warm-up and fall."""
        return self.learning_rate if progress < self.apart else self.joined_rate


def noised(latent: Tensor, share: float, largest: float, generator: torch.Generator | None) -> tuple[Tensor, Tensor]:
    """A `share` of the samples with flow noise of sigma ~ U[0, largest] (SPEC.md section 7); and each sigma [B]."""
    chance = Chance(len(latent), latent.device, generator)
    sigma = chance.happens(share) * chance.uniform(0, largest, 1, 1, 1)
    return torch.lerp(latent, chance.normal(*latent.shape[1:]).to(latent), sigma.to(latent)), sigma.flatten()


def tempered(sigma: Tensor) -> Tensor:
    """Weights of samples by the noise in their latents: what nobody can see must not outweigh what can be learned."""
    return 1 / (1 + (sigma / 0.2) ** 2)


def draw_crops(
    cache: LatentCache, choices: tuple[tuple[int, int, float], ...], random: np.random.Generator
) -> CropBatch:
    """One step's crops: one of the `choices` of crop side, crops a step and share of the steps."""
    shares = np.array([share for _, _, share in choices])
    side, count, _ = choices[int(random.choice(len(shares), p=shares / shares.sum()))]
    return cache.crops(count, side, random)


def coarse_loss(model: Regressor, teacher: TeacherAutoencoder, cells: Tensor) -> Tensor:
    """The coarsest level's distance from its teacher's features, in units of their variance.

    That level has one position for a thousand pixels and decides over the whole image, colors first.
    """
    with torch.no_grad():
        hint: Tensor = teacher.decoder[:6](cells)
    made: Tensor = cast(nn.Sequential, model.tower.levels[0])(cells)
    return F.mse_loss(made, hint) / hint.var()


def hint_loss(
    model: Regressor, teacher: TeacherAutoencoder, cells: Tensor, target: Tensor, recipe: DecoderRecipe, *, apart: bool
) -> tuple[Tensor, Parts]:
    """The loss, and in it the image's squared error and the levels' mean distance from their teacher's features."""
    with torch.no_grad():
        hints = teacher.decoder_features(cells)
    made, image = model.by_levels(cells, hints if apart else None)
    error = F.mse_loss(image, target)
    distances = [F.mse_loss(ours, theirs) / theirs.var() for ours, theirs in zip(made, hints, strict=True)]
    weight = recipe.hint_weight if apart else recipe.later_hint_weight
    loss = error + weight * torch.stack(distances).sum()
    return loss, {"error": error.item(), "distance": torch.stack(distances).mean().item()}


def run_regressor(
    cache: LatentCache, folder: Path, recipe: DecoderRecipe, teacher: TeacherAutoencoder, *,
    config: PiDConfig | None = None, report: Report = lambda line: None,
) -> Regressor:  # fmt: skip
    """Train the adapter with a linear head until the budget is used; resumes from `folder`, returns the average."""
    torch.manual_seed(recipe.seed)
    model, path = Regressor(config or tiny_config()), folder / "regressor.pt"
    state = resume(path, model)
    if state is None:
        model.start_from_patches(cache.crops(64, recipe.crops[0][0], np.random.default_rng(recipe.seed)).target)
    model.to(recipe.device)

    def loss_of(progress: float, draws: Draws) -> tuple[Tensor, Parts]:
        coarse = progress < recipe.coarse
        batch = draw_crops(cache, recipe.coarse_crops if coarse else recipe.crops, draws.crops).to(recipe.device)
        if coarse:
            loss = coarse_loss(model, teacher, F.pixel_shuffle(batch.latent, 2))
            return loss, {"distance": loss.item()}
        target, small = varied(batch.target, draws.noise, recolored=recipe.recolored, joined=recipe.joined)
        with torch.no_grad():  # as a whole image: a cut-out of a larger one's latent would not know its own colors
            cells = teacher.encode(small)
        if progress < recipe.hinted:
            return hint_loss(model, teacher, cells, target, recipe, apart=progress < recipe.apart)
        share = recipe.noisy_share if progress >= recipe.noisy_from else 0.0
        latent, sigma = noised(F.pixel_unshuffle(cells, 2), share, recipe.largest_sigma, draws.noise)
        error = (model(latent) - target).square().mean((1, 2, 3))
        loss = (error * tempered(sigma).to(error)).mean()
        return loss, {"error": loss.item()}

    learner = Learner(model, decoder_optimizer(model), recipe.rate)
    note = {"config": model.config.to_dict()}
    stage = Stage(name="decoder", recipe=recipe, path=path, note=note, report=report)
    return stage.learn(model, [learner], loss_of, state)


def decoder_optimizer(model: nn.Module) -> Muon:
    """For a regressor or a part of one: Muon for every matrix.

    Adam's steps all point the same way where a wide layer reads features that are alike, and add up; the way to pixels
    is such a layer.
    """
    return Muon(muon_groups(model.named_parameters()), lr=0.0)
