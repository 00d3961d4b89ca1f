# SPDX-License-Identifier: Apache-2.0
"""Encoder and decoder of `tiny` together: the encoder stays near its teacher, the decoder reads both their latents.

Alone, each makes errors that the other has never seen. Here the decoder's loss also reaches the encoder, so what the
encoder cannot yet imitate it at least gets wrong in a way that the decoder understands.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from pidecode.errors import TrainingError
from pidecode.facts.architecture import NetConfig
from pidecode.model.encoder import EncoderConfig, ImageEncoder
from pidecode.training.tiny.cache import LatentCache
from pidecode.training.tiny.decoder_stage import noised
from pidecode.training.tiny.encoder_stage import update_average
from pidecode.training.tiny.muon import Muon, muon_groups
from pidecode.training.tiny.regressor import Regressor
from pidecode.training.tiny.state import Budget, load_state, save_state

Report = Callable[[str], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class JointRecipe(Budget):
    """How both learn together; the rates follow the budget, which counts all resumed parts."""

    decoder_rate: float = 1e-3
    encoder_rate: float = 6e-4
    decay_from: float = 0.5
    """Share of the budget after which both rates fall linearly to a fiftieth."""
    side: int = 384
    """Crop side in output pixels."""
    own: int = 4
    """Crops a step that go through the encoder."""
    teacher: int = 2
    """Crops a step whose latent is the teacher's."""
    latent_weight: float = 0.1
    """Weight of the encoder's squared distance from its teacher."""
    noisy_share: float = 0.15
    largest_sigma: float = 0.8
    ema: float = 0.995
    clip: float = 1.0
    workers: int = 2
    """Processes that update the same shared weights, each with its own crops and momentum, without waiting."""
    device: str = "cpu"
    """With another device than the processor there is one worker."""
    seed: int = 1
    save_every: float = 90.0
    log_every: float = 30.0


class Pair(nn.Module):
    """The two networks that are trained together."""

    def __init__(self, decoder: NetConfig, encoder: EncoderConfig) -> None:
        super().__init__()
        self.decoder = Regressor(decoder)
        self.encoder = ImageEncoder(encoder)


def joint_loss(
    pair: Pair, cache: LatentCache, recipe: JointRecipe, random: np.random.Generator, generator: torch.Generator
) -> tuple[Tensor, Tensor, Tensor]:
    """Squared error of pictures from the encoder's latents, from the teacher's, and of the latents themselves.

    A latent's outermost cells are left out of the last one: the encoder sees a crop, the teacher saw the picture.
    """
    batch = cache.crops(recipe.own + recipe.teacher, recipe.side, random).to(recipe.device)
    cells = pair.encoder.cells(batch.small[: recipe.own])
    wanted = F.pixel_shuffle(batch.latent[: recipe.own], 2)
    distance = F.mse_loss(cells[..., 1:-1, 1:-1], wanted[..., 1:-1, 1:-1])
    given, _ = noised(batch.latent[recipe.own :], recipe.noisy_share, recipe.largest_sigma, generator)
    pictures = pair.decoder(torch.cat((F.pixel_unshuffle(cells, 2), given)))
    error = (pictures - batch.target).square().mean((1, 2, 3))
    return error[: recipe.own].mean(), error[recipe.own :].mean(), distance


def _optimizers(pair: Pair, recipe: JointRecipe) -> tuple[tuple[Muon, float], tuple[Muon, float]]:
    decoder = Muon(
        muon_groups(pair.decoder.named_parameters(), adam_names=("to_pixels", "pit_head")), lr=recipe.decoder_rate
    )
    encoder = Muon(muon_groups(pair.encoder.named_parameters(), adam_names=("stem", "head")), lr=recipe.encoder_rate)
    return (decoder, recipe.decoder_rate), (encoder, recipe.encoder_rate)


def _work(rank: int, pair: Pair, cache: LatentCache, folder: Path, recipe: JointRecipe, report: Report) -> None:
    """One process's loop over the shared weights; the first one averages, reports and saves."""
    average = Pair(pair.decoder.config, pair.encoder.config).requires_grad_(False).to(recipe.device)
    average.load_state_dict(pair.state_dict())
    optimizers = _optimizers(pair, recipe)
    state = load_state(folder / "joint.pt")
    step, used = 0, 0.0
    if state is not None:
        step, used = state["step"], state["used"]
        average.load_state_dict(state["average"])
        for (optimizer, _), kept in zip(optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(kept)
    random = np.random.default_rng([recipe.seed, rank, step])
    generator = torch.Generator().manual_seed((recipe.seed * 1000 + rank) * 1_000_003 + step)
    started, saved, logged, losses = time.monotonic() - used, used, used, list[list[float]]()
    while (progress := recipe.progress(step, used)) < 1:
        falling = max(0.0, progress - recipe.decay_from) / (1 - recipe.decay_from)
        factor = max(0.02, 1 - falling) * min(1.0, (step + 1) / 30)
        for optimizer, rate in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = rate * factor
            optimizer.zero_grad(set_to_none=True)
        own, given, distance = joint_loss(pair, cache, recipe, random, generator)
        (own + 0.5 * given + recipe.latent_weight * distance).backward()
        for part in (pair.decoder, pair.encoder):
            nn.utils.clip_grad_norm_(part.parameters(), recipe.clip)
        for optimizer, _ in optimizers:
            optimizer.step()
        step += 1
        losses.append([own.item(), given.item(), distance.item()])
        used = time.monotonic() - started
        if rank:
            continue
        update_average(average, pair, min(recipe.ema, (1 + step) / (10 + step)))
        if used - logged > recipe.log_every:
            values = " ".join(f"{value:.5f}" for value in np.mean(losses, axis=0))
            report(f"joint step {step} {used:.0f}s own, teacher, latent {values} rate x{factor:.2f}")
            logged, losses = used, []
        if used - saved > recipe.save_every or recipe.progress(step, used) >= 1:
            save_state(
                folder / "joint.pt",
                {"model": pair.state_dict(), "average": average.state_dict(), "step": step, "used": used,
                 "optimizers": [optimizer.state_dict() for optimizer, _ in optimizers],
                 "decoder_config": pair.decoder.config.to_dict(), "encoder_config": pair.encoder.config.to_dict()},
            )  # fmt: skip
            saved = used


def run_joint(
    pair: Pair, cache: LatentCache, folder: Path, recipe: JointRecipe, report: Report = lambda line: None
) -> None:
    """Train `pair` until the budget is used; the result, averaged, is in `folder/joint.pt`, from which it resumes.

    With several workers a run is not repeatable to the bit: who updates first is up to the machine.
    """
    state = load_state(folder / "joint.pt")
    if state is not None:
        pair.load_state_dict(state["model"])
    if recipe.workers == 1 or recipe.device != "cpu":
        pair.to(recipe.device)
        _work(0, pair, cache, folder, recipe, report)
        return
    pair.share_memory()
    context = torch.multiprocessing.get_context("fork")
    processes = [
        context.Process(target=_alone, args=(rank, pair, cache, folder, recipe, report))
        for rank in range(recipe.workers)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    if any(process.exitcode for process in processes):
        raise TrainingError(
            "A training process stopped early; the last whole state is kept, and the same call goes on."
        )


def _alone(rank: int, pair: Pair, cache: LatentCache, folder: Path, recipe: JointRecipe, report: Report) -> None:
    """`_work` in a process of its own: one thread, and a session of its own for a scheduler that shares by session."""
    os.setsid()
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)
    _work(rank, pair, cache, folder, recipe, report)
