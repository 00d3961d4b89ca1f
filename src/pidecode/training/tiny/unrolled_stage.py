# SPDX-License-Identifier: Apache-2.0
"""The whole way trained as it is used: encode, look and correct some rounds, decode; the last error teaches all of it.

The joint stage teaches each round by itself, with what a processor can afford. Here the last image's error reaches
every round, on many crops at once: work for an accelerator, where one step is recorded as a CUDA graph for each number
of rounds and replayed.
"""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from pidecode.devices import records_graphs, require_compiler, trains_in_half
from pidecode.errors import SettingError
from pidecode.training.tiny.accelerated import Matrices, Recorded, compile_blocks, compiling, keep_exact, pad_by_joining
from pidecode.training.tiny.augment import varied
from pidecode.training.tiny.critic import Critics, critic_loss
from pidecode.training.tiny.decoder_stage import noised, tempered
from pidecode.training.tiny.joint_stage import TINIEST, TYPICAL, Pair, PairRecipe, coarse_error, learners_of, levelled
from pidecode.training.tiny.muon import Muon
from pidecode.training.tiny.resident import ResidentImages
from pidecode.training.tiny.stage import Learner, Report, resume, share_work, update_average
from pidecode.training.tiny.state import load_state, save_state
from pidecode.training.tiny.teacher import TeacherAutoencoder

MEASURES = ("own", "similarity", "teacher", "imitation", "latent", "critic")
"""What a step notes for the log, in this order."""


@dataclass(frozen=True, slots=True, kw_only=True)
class UnrolledRecipe(PairRecipe):
    """How long, how fast, and on what the whole way learns; an encoder whose rates are 0 costs no gradient."""

    seconds: float = 340.0
    warmup_steps: int = 100
    decay_from: float = 0.15
    """Share of the budget after which the rates fall, as half a cosine wave does, to a hundredth."""
    finest_rate: float = 4e-4
    decoder_rate: float = 4e-4
    encoder_rate: float = 4e-4
    corrector_rate: float = 4e-4
    rounds: tuple[float, ...] = (0.1, 0.15, 0.45, 0.3)
    """Shares of the steps with so many corrections, from none on."""
    through_looks: bool = False
    """Whether the gradient also goes back through the looks: nearly twice the work, and steadier at high rates."""
    crops: tuple[tuple[int, int, float], ...] = ((256, 32, 0.6), (512, 8, 0.4))
    similarity_weight: float = 0.15
    """Weight of what is missing to a structural similarity of 1."""
    teacher_share: float = 0.25
    """Share of a step's crops that are decoded from the teacher's latent too."""
    teacher_weight: float = 0.4
    imitation_weight: float = 1.5
    allowed_difference: float = 0.0022
    """As in the joint stage, but of all crops, and for each by itself."""
    latent_weight: float = 0.01
    critic_share: float = 0.0
    """Length of the fine critic's gradient on an image as a share of that of all else; 0 trains without it."""
    coarse_critic_share: float = 0.0
    """The same of the critic that sees images at a quarter of their size."""
    critic_rate: float = 2e-4
    ema: float = 0.998
    record: bool = True
    """Whether steps are compiled block by block, and recorded and replayed; where the device can do so."""
    seed: int = 21

    @property
    def judged(self) -> bool:
        """Whether a critic has a say."""
        return self.critic_share > 0 or self.coarse_critic_share > 0

    def factor(self, progress: float, step: int) -> float:
        """What rates are multiplied by: a warm-up by steps, flat, then a falling half wave."""
        fallen = min(1.0, max(0.0, progress - self.decay_from) / (1 - self.decay_from))
        return min(1.0, (step + 1) / self.warmup_steps) * (0.01 + 0.99 * (1 + math.cos(math.pi * fallen)) / 2)


class Step:
    """Everything of one step but its record: images in, gradients and measures out, no wait for the device."""

    def __init__(
        self, pair: Pair, teacher: TeacherAutoencoder, images: ResidentImages, recipe: UnrolledRecipe,
        critics: Critics | None,
    ) -> None:  # fmt: skip
        self.pair, self.teacher, self.images, self.recipe, self.critics = pair, teacher, images, recipe, critics
        self.device = torch.device(recipe.device)
        self.encoder_learns = any(parameter.requires_grad for parameter in pair.encoder.parameters())
        self.matrices = {side: Matrices(side, self.device) for side, _, _ in recipe.crops}

    def half(self) -> torch.autocast:
        """Products in bfloat16, where the device trains with them."""
        enabled = trains_in_half(self.device)
        return torch.autocast(self.device.type, torch.bfloat16, enabled=enabled, cache_enabled=False)

    def cells(self, small: Tensor, rounds: int, matrices: Matrices) -> Tensor:
        """The corrected cells, with the gradient of every round where the encoder learns."""

        def look(latent: Tensor) -> Tensor:
            with torch.set_grad_enabled(self.encoder_learns and self.recipe.through_looks):
                return matrices.shrunk(self.pair.decoder(latent).float())

        with torch.set_grad_enabled(self.encoder_learns):
            return self.pair.encoder.corrected(small, look, rounds)

    def __call__(self, side: int, count: int, rounds: int) -> Tensor:
        """Leaves gradients in the networks' parameters; returns MEASURES [6]."""
        recipe, matrices = self.recipe, self.matrices[side]
        read = round(recipe.teacher_share * count)
        seen = count if self.encoder_learns else read
        with torch.no_grad():
            target, small = varied(self.images.crops(count, side), recolored=recipe.recolored, joined=recipe.joined)
        with self.half():
            with torch.no_grad():
                wanted = self.teacher.encode(small[:seen]).float()
                decoded = self.teacher.decode(wanted).float()
            cells = self.cells(small, rounds, matrices).float()
            latents = F.pixel_unshuffle(torch.cat((cells, wanted[:read])), 2)
            given, sigma = noised(latents, recipe.noisy_share, recipe.largest_sigma, None)
            made = self.pair.decoder(given).float()
            imitated = self.teacher.decode(cells).float() if self.encoder_learns else decoded
        targets, shown = torch.cat((target, target[:read])), torch.cat((small, decoded[:read]))
        error = (made - targets).square().mean((1, 2, 3))
        likeness = matrices.similarity(made, targets)
        lost = levelled(error + coarse_error(made, shown, recipe.coarse)) + recipe.similarity_weight * (1 - likeness)
        lost = lost * tempered(sigma).to(lost)
        loss = lost[:count].mean() + recipe.teacher_weight * lost[count:].sum() / max(read, 1)
        difference = (imitated - decoded).square().mean((1, 2, 3))
        distance = (cells[:seen] - wanted).square().sum() / max(wanted.numel(), 1)
        beside = torch.zeros((), device=self.device)
        if self.encoder_learns:
            allowed = TYPICAL * math.log((recipe.allowed_difference + TINIEST) / TYPICAL)
            beyond = F.relu(levelled(difference) - allowed)
            beside = recipe.imitation_weight * beyond.mean() + recipe.latent_weight * distance
        judged = torch.zeros((), device=self.device)
        if self.critics is None:
            (loss + beside).backward()
        else:
            judged = self._judged(loss, beside, made, targets, matrices)
        clean = sigma[:count] == 0
        own = (error[:count] * clean).sum() / clean.sum().clamp(min=1)
        return torch.stack(
            (
                own,
                likeness[:count].mean(),
                error[count:].sum() / max(read, 1),
                difference.sum() / max(seen, 1),
                distance,
                judged,
            )
        ).detach()

    def _judged(self, loss: Tensor, beside: Tensor, made: Tensor, targets: Tensor, matrices: Matrices) -> Tensor:
        """Gradients with the critics' say, each scaled to its share for each image; and the critics' own loss.

        loss: what follows from the images `made` alone. beside: what does not; no critic has a say in it.
        """
        assert self.critics is not None
        (slope,) = torch.autograd.grad(loss, made)
        pull = slope
        for critic, seen, share in self.critics.views(made, matrices.shrunk):
            with self.half():
                verdict = -critic(seen).float().mean()
            (say,) = torch.autograd.grad(verdict, made)
            pull = pull + share * _lengths(slope) / _lengths(say).clamp(min=1e-12) * say
        if beside.requires_grad:
            torch.autograd.backward((made, beside), (pull, torch.ones_like(beside)))
        else:
            made.backward(pull)
        own = torch.zeros((), device=self.device)
        both = torch.cat((made.detach(), targets))
        for critic, seen, _ in self.critics.views(both, matrices.shrunk):
            with self.half():
                of_made, of_real = critic(seen).float().chunk(2)
            own = own + critic_loss(of_made, of_real)
        own.backward()
        return own


def _lengths(x: Tensor) -> Tensor:
    return x.square().sum((1, 2, 3), keepdim=True).sqrt()


class _Loop:
    """Steps, updates and averages until the budget is used."""

    def __init__(
        self, pair: Pair, average: Pair, learners: Sequence[Learner], critics: Critics | None, step: Step,
        recipe: UnrolledRecipe, rank: int,
    ) -> None:  # fmt: skip
        self.pair, self.average, self.critics, self.step, self.recipe = pair, average, critics, step, recipe
        self.rank = rank
        self.learners = list(learners)
        if critics is not None:
            adam = Muon([{"params": list(critics.parameters()), "muon": False}], lr=0.0)
            self.learners.append(Learner(critics, adam, lambda progress: recipe.critic_rate))
        self.rates = [torch.zeros((), device=recipe.device) for _ in self.learners]
        for learner, rate in zip(self.learners, self.rates, strict=True):
            for group in learner.optimizer.param_groups:
                group["lr"] = rate
        self.parameters = [
            [parameter for parameter in learner.network.parameters() if parameter.requires_grad]
            for learner in self.learners
        ]
        self.gradients = [[torch.zeros_like(p) for p in parameters] for parameters in self.parameters]
        for parameters, gradients in zip(self.parameters, self.gradients, strict=True):
            for parameter, gradient in zip(parameters, gradients, strict=True):
                parameter.grad = gradient
        self.count, self.used = 0, 0.0

    def update(self, side: int, count: int, rounds: int) -> Tensor:
        """One step: gradients, updates, averages. Nothing in it waits for the device, so that it can be recorded."""
        for gradients in self.gradients:
            torch._foreach_zero_(gradients)
        measures = self.step(side, count, rounds)
        for learner, parameters in zip(self.learners, self.parameters, strict=True):
            nn.utils.clip_grad_norm_(parameters, self.recipe.clip)
            learner.optimizer.step()
        if not self.rank:
            update_average(self.average, self.pair, self.recipe.ema)
        return measures

    def run(self, path: Path, note: Mapping[str, Any], report: Report) -> None:
        """Until the budget is used; saved every so often, and at the end."""
        recipe, random = self.recipe, np.random.default_rng([self.recipe.seed, self.rank, self.count])
        recording = recipe.record and records_graphs(torch.device(recipe.device))
        update = Recorded(self.update) if recording else self.update
        if recording:
            compile_blocks(self.pair)
        shares = np.array([share for _, _, share in recipe.crops])
        rows = torch.zeros(len(MEASURES), device=recipe.device)
        started, saved, logged, noted = time.monotonic() - self.used, self.used, self.used, 0
        while (progress := recipe.progress(self.count, self.used)) < 1:
            factor = recipe.factor(progress, self.count)
            for learner, rate in zip(self.learners, self.rates, strict=True):
                rate.fill_(learner.rate(progress) * factor)
            side, crops, _ = recipe.crops[int(random.choice(len(shares), p=shares / shares.sum()))]
            rounds = int(random.choice(len(recipe.rounds), p=recipe.rounds))
            rows += update(side, crops, rounds)
            self.count, noted = self.count + 1, noted + 1
            if self.count % 8 == 0:
                rows.cpu()  # the clock shall run with the device, not ahead of it
            self.used = time.monotonic() - started
            if self.rank:
                continue
            if self.used - logged > recipe.log_every:
                means = " ".join(f"{name} {value:.5f}" for name, value in zip(MEASURES, rows / noted, strict=True))
                report(f"unrolled step {self.count} {self.used:.0f}s {means} factor {factor:.3f}")
                logged, noted = self.used, 0
                rows.zero_()
            if self.used - saved > recipe.save_every or recipe.progress(self.count, self.used) >= 1:
                save_state(path, {**self.state(), **note})
                saved = self.used

    def state(self) -> dict[str, Any]:
        """What a later call needs to go on, but for the networks' shapes."""
        kept: dict[str, Any] = {"model": self.pair.state_dict(), "average": self.average.state_dict()}
        if self.critics is not None:
            kept["critics"] = self.critics.state_dict()
        kept["optimizers"] = [learner.optimizer.state_dict() for learner in self.learners]
        return {**kept, "step": self.count, "used": self.used}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on from a state; the networks' weights and their average are back already."""
        if self.critics is not None:
            self.critics.load_state_dict(state["critics"])
        for learner, rate, kept in zip(self.learners, self.rates, state["optimizers"], strict=True):
            learner.optimizer.load_state_dict(kept)
            for group in learner.optimizer.param_groups:
                group["lr"] = rate
        self.count, self.used = state["step"], state["used"]


def run_unrolled(
    pair: Pair, images: ResidentImages, folder: Path, recipe: UnrolledRecipe, teacher: TeacherAutoencoder,
    report: Report = lambda line: None, after: Path | None = None,
) -> Pair:  # fmt: skip
    """Train `pair` until the budget is used; returns the average, also in `folder/joint.pt`, from which it resumes.

    after: the folder of a stage whose critics go on, where it has what the recipe wants; others start new.

    Raises SettingError for an encoder without corrections, TrainingError when a process stopped early.
    """
    if not pair.encoder.config.rounds:
        raise SettingError(
            "This encoder corrects nothing, and this stage trains corrections; use grow.with_corrections."
        )
    if recipe.record and records_graphs(torch.device(recipe.device)):
        require_compiler(torch.device(recipe.device))
    state = resume(folder / "joint.pt", pair)
    pair.to(recipe.device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    average = copy.deepcopy(pair).requires_grad_(False)
    if state is not None:
        average.load_state_dict(state["average"])
    for learner in learners_of(pair, recipe):
        learner.network.requires_grad_(learner.rate(0.0) > 0)
    teacher = copy.deepcopy(teacher).to(recipe.device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    if recipe.device != "cpu":
        pad_by_joining(pair)
        first, corrector, decoder = pair.encoder, pair.encoder.corrector, pair.decoder
        keep_exact(first.head, corrector.head, decoder.to_pixels, decoder.adapter.pit_head)
    note = {"decoder_config": pair.decoder.config.to_dict(), "encoder_config": pair.encoder.config.to_dict()}

    def work(rank: int) -> None:
        torch.manual_seed(recipe.seed * 1000 + rank + (0 if state is None else state["step"]))
        critics = None
        if recipe.judged:
            before = None if after is None else load_state(after / "joint.pt")
            critics = Critics(recipe.critic_share, recipe.coarse_critic_share).taking(before or {}).to(recipe.device)
        learners = [learner for learner in learners_of(pair, recipe) if learner.rate(0.0) > 0]
        step = Step(pair, teacher, images, recipe, critics)
        loop = _Loop(pair, average, learners, critics, step, recipe, rank)
        if state is not None:
            loop.restore(state)
        with compiling():
            loop.run(folder / "joint.pt", note, report)

    alone = recipe.device != "cpu" or recipe.judged  # critics are not shared between processes
    share_work(work, (pair, average), 1 if alone else recipe.workers)
    return average
