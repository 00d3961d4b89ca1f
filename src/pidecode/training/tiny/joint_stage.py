# SPDX-License-Identifier: Apache-2.0
"""Encoder and decoder of `tiny` together: the encoder stays near its teacher, the decoder reads both their latents.

Alone, each makes errors that the other has never seen. Here the decoder's loss also reaches the encoder. How far it may
lead it away is bounded by what the teacher's own decoder would show of it.
"""

from __future__ import annotations

import copy
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
from pidecode.model.encoder import ImageEncoder
from pidecode.training.tiny.cache import LatentCache
from pidecode.training.tiny.decoder_stage import draw_crops, noised
from pidecode.training.tiny.encoder_stage import update_average
from pidecode.training.tiny.muon import Muon, muon_groups
from pidecode.training.tiny.regressor import Regressor
from pidecode.training.tiny.state import Budget, load_state, save_state
from pidecode.training.tiny.teacher import TeacherAutoencoder

Report = Callable[[str], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class JointRecipe(Budget):
    """How both learn together; the rates follow the budget, which counts all resumed parts."""

    decoder_rate: float = 4e-4
    encoder_rate: float = 4e-4
    """0 leaves the encoder as it is and trains the decoder alone."""
    decay_from: float = 0.35
    """Share of the budget after which both rates fall linearly to a fiftieth."""
    crops: tuple[tuple[int, int, float], ...] = ((256, 6, 0.55), (384, 3, 0.25), (512, 2, 0.2))
    """Crop side in pixels, crops a step, share of the steps. Half of a step's crops are also decoded from the teacher's
    latent, and hold the encoder to it."""
    allowed_difference: float = 0.003
    """Mean squared difference, in pictures of [-1, 1], of what the teacher decodes from its own latents and the
    encoder's, that costs nothing (31.2 dB): within it the encoder is free to tell the decoder more."""
    imitation_weight: float = 0.5
    """Weight of what goes beyond it."""
    latent_weight: float = 0.1
    """Weight of the encoder's squared distance from its teacher's latents."""
    noisy_share: float = 0.1
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

    def __init__(self, decoder: Regressor, encoder: ImageEncoder) -> None:
        super().__init__()
        self.decoder, self.encoder = decoder, encoder


def joint_loss(
    pair: Pair, teacher: TeacherAutoencoder, cache: LatentCache, recipe: JointRecipe, random: np.random.Generator,
    generator: torch.Generator,
) -> tuple[Tensor, list[float]]:  # fmt: skip
    """The loss of one batch, and its parts: squared errors of pictures from the encoder's and the teacher's latents;
    where the encoder learns too, the differences of what the teacher decodes from both, and of the latents themselves.
    """
    batch = draw_crops(cache, recipe.crops, random).to(recipe.device)
    count = len(batch.small)
    both = slice((count + 1) // 2)
    with torch.no_grad():  # as whole pictures: a cut-out of a larger one's latent would not know its own colours
        wanted = teacher.encode(batch.small[both])
    cells = pair.encoder.cells(batch.small)
    latents = F.pixel_unshuffle(torch.cat((cells, wanted)), 2)
    given, _ = noised(latents, recipe.noisy_share, recipe.largest_sigma, generator)
    error = (pair.decoder(given) - torch.cat((batch.target, batch.target[both]))).square().mean((1, 2, 3))
    own, theirs = error[:count].mean(), error[count:].mean()
    loss, parts = own + 0.5 * theirs, [own, theirs]
    if recipe.encoder_rate:
        with torch.no_grad():
            picture = teacher.decoder_picture(wanted[:1])  # one is dear enough
        imitation = F.mse_loss(teacher.decoder_picture(cells[:1]), picture)
        distance = F.mse_loss(cells[both], wanted)
        beyond = F.relu(imitation - recipe.allowed_difference)
        loss = loss + recipe.imitation_weight * beyond + recipe.latent_weight * distance
        parts += [imitation, distance]
    return loss, [part.item() for part in parts]


def _optimizers(pair: Pair, recipe: JointRecipe) -> tuple[tuple[Muon, float], tuple[Muon, float]]:
    decoder = Muon(
        muon_groups(pair.decoder.named_parameters(), adam_names=("to_pixels", "pit_head")), lr=recipe.decoder_rate
    )
    encoder = Muon(muon_groups(pair.encoder.named_parameters(), adam_names=("stem", "head")), lr=recipe.encoder_rate)
    return (decoder, recipe.decoder_rate), (encoder, recipe.encoder_rate)


def _work(
    rank: int, pair: Pair, teacher: TeacherAutoencoder, cache: LatentCache, folder: Path, recipe: JointRecipe,
    report: Report,
) -> None:  # fmt: skip
    """One process's loop over the shared weights; the first one averages, reports and saves."""
    average = copy.deepcopy(pair).requires_grad_(False)
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
        loss, parts = joint_loss(pair, teacher, cache, recipe, random, generator)
        loss.backward()
        for part in (pair.decoder, pair.encoder):
            nn.utils.clip_grad_norm_(part.parameters(), recipe.clip)
        for optimizer, _ in optimizers:
            optimizer.step()
        step += 1
        losses.append(parts)
        used = time.monotonic() - started
        if rank:
            continue
        update_average(average, pair, min(recipe.ema, (1 + step) / (10 + step)))
        if used - logged > recipe.log_every:
            values = " ".join(f"{value:.5f}" for value in np.mean(losses, axis=0))
            report(f"joint step {step} {used:.0f}s own, teacher, imitation, latent {values} rate x{factor:.2f}")
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
    pair: Pair, cache: LatentCache, folder: Path, recipe: JointRecipe, teacher: TeacherAutoencoder,
    report: Report = lambda line: None,
) -> None:  # fmt: skip
    """Train `pair` until the budget is used; the result, averaged, is in `folder/joint.pt`, from which it resumes.

    With several workers a run is not repeatable to the bit: who updates first is up to the machine.
    """
    state = load_state(folder / "joint.pt")
    if state is not None:
        pair.load_state_dict(state["model"])
    pair.requires_grad_(True)
    pair.encoder.requires_grad_(recipe.encoder_rate > 0)
    if recipe.workers == 1 or recipe.device != "cpu":
        pair.to(recipe.device)
        _work(0, pair, teacher, cache, folder, recipe, report)
        return
    pair.share_memory()
    context = torch.multiprocessing.get_context("fork")
    processes = [
        context.Process(target=_alone, args=(rank, pair, teacher, cache, folder, recipe, report))
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


def _alone(
    rank: int, pair: Pair, teacher: TeacherAutoencoder, cache: LatentCache, folder: Path, recipe: JointRecipe,
    report: Report,
) -> None:  # fmt: skip
    """`_work` in a process of its own: one thread, and a session of its own for a scheduler that shares by session."""
    os.setsid()
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)
    _work(rank, pair, teacher, cache, folder, recipe, report)
