# SPDX-License-Identifier: Apache-2.0
"""The whole way trained as it is used: encode, look and correct some rounds, decode; the last error teaches all of it.

The joint stage teaches each round by itself, with what a processor can afford. Here the gradient goes back through
every round and every look, on many crops at once: work for an accelerator, where one step is recorded as a CUDA graph
for each number of rounds and replayed.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.fx.experimental._config
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from pidecode.measure.metrics import WINDOW, similarity, window_line
from pidecode.model import adapter, encoder
from pidecode.training.tiny.augment import varied
from pidecode.training.tiny.cache import SCALE
from pidecode.training.tiny.critic import PatchCritic, critic_loss
from pidecode.training.tiny.decoder_stage import noised, tempered
from pidecode.training.tiny.joint_stage import TINIEST, TYPICAL, Pair, coarse_error, learners_of, levelled
from pidecode.training.tiny.muon import Muon
from pidecode.training.tiny.recorded import Recorded
from pidecode.training.tiny.resident import ResidentPictures
from pidecode.training.tiny.stage import Learner, Report, resume, update_average
from pidecode.training.tiny.state import save_state
from pidecode.training.tiny.teacher import TeacherAutoencoder

MEASURES = ("own", "similarity", "teacher", "imitation", "latent", "critic")
"""What a step notes for the log, in this order."""


@dataclass(frozen=True, slots=True, kw_only=True)
class UnrolledRecipe:
    """How long, how fast, and on what the whole way learns."""

    seconds: float = 300.0
    """Budget of wall time, all resumed parts together."""
    steps: int = 0
    """Budget of steps, where it is not 0; then time does not count."""
    warmup_steps: int = 100
    decay_from: float = 0.3
    """Share of the budget after which the rates fall, as a quarter of a cosine wave does, to a hundredth."""
    finest_rate: float = 5e-4
    decoder_rate: float = 5e-4
    encoder_rate: float = 4e-4
    corrector_rate: float = 5e-4
    """Rates as in the joint stage; those of an encoder whose rates are 0 leave it as it is, and cost no gradient."""
    rounds: tuple[float, ...] = (0.1, 0.15, 0.45, 0.3)
    """Shares of the steps with so many corrections, from none on."""
    crops: tuple[tuple[int, int, float], ...] = ((256, 64, 0.6), (512, 16, 0.4))
    """Crop side in pixels, crops a step, share of the steps."""
    recoloured: float = 0.5
    joined: float = 0.25
    coarse: tuple[tuple[int, float], ...] = ((16, 4.0), (64, 4.0))
    similarity_weight: float = 0.1
    """Weight of what is missing to a structural similarity of 1."""
    teacher_share: float = 0.25
    """Share of a step's crops that are decoded from the teacher's latent too, and hold the encoder to it."""
    teacher_weight: float = 0.4
    imitation_weight: float = 1.5
    allowed_difference: float = 0.0022
    """As in the joint stage, for each crop by itself."""
    latent_weight: float = 0.01
    noisy_share: float = 0.1
    largest_sigma: float = 0.8
    critic_share: float = 0.0
    """Length of the critic's gradient on a picture as a share of that of all else; 0 trains without one."""
    critic_rate: float = 2e-4
    clip: float = 1.0
    ema: float = 0.998
    device: str = "cuda"
    record: bool = True
    """Whether steps are compiled block by block, and recorded and replayed; where the device can do so."""
    seed: int = 21
    save_every: float = 60.0
    log_every: float = 10.0

    def progress(self, step: int, used: float) -> float:
        """Share of the budget that is used; 1 and more means done."""
        return step / self.steps if self.steps else used / self.seconds

    def factor(self, progress: float, step: int) -> float:
        """What rates are multiplied by: a warm-up by steps, flat, then a falling half wave."""
        fallen = min(1.0, max(0.0, progress - self.decay_from) / (1 - self.decay_from))
        return min(1.0, (step + 1) / self.warmup_steps) * (0.01 + 0.99 * (1 + float(np.cos(np.pi * fallen))) / 2)


class Matrices:
    """Shrinking and blurring as products with fixed matrices: many times faster on an accelerator than as they are."""

    def __init__(self, side: int, device: torch.device) -> None:
        unit = torch.eye(side, device=device)[None, None]
        self.shrinking = F.interpolate(unit, size=(side // SCALE, side), mode="bicubic", antialias=True)[0, 0]
        line = window_line(torch.float32, device)
        self.blurring = torch.zeros(side - WINDOW + 1, side, device=device)
        for offset in range(WINDOW):
            self.blurring.diagonal(offset).fill_(line[offset])

    def shrunk(self, picture: Tensor) -> Tensor:
        """`model.regressor.shrunk` of square pictures."""
        return self.shrinking @ picture.clamp(-1, 1) @ self.shrinking.mT

    def similarity(self, made: Tensor, wanted: Tensor) -> Tensor:
        """`measure.metrics.ssim` in float32; pictures in [-1,1]."""

        def blur(x: Tensor) -> Tensor:
            return self.blurring @ x @ self.blurring.mT

        return similarity((made + 1) / 2, (wanted + 1) / 2, blur)


class Step:
    """Everything of one step but its record: pictures in, gradients and measures out, no wait for the device."""

    def __init__(
        self, pair: Pair, teacher: TeacherAutoencoder, pictures: ResidentPictures, recipe: UnrolledRecipe,
        critic: PatchCritic | None,
    ) -> None:  # fmt: skip
        self.pair, self.teacher, self.pictures, self.recipe, self.critic = pair, teacher, pictures, recipe, critic
        self.device = torch.device(recipe.device)
        self.encoder_learns = any(parameter.requires_grad for parameter in pair.encoder.parameters())
        self.matrices = {side: Matrices(side, self.device) for side, _, _ in recipe.crops}

    def half(self) -> torch.autocast:
        """Products in bfloat16, except on a processor, where that is slow."""
        return torch.autocast(
            self.device.type, torch.bfloat16, enabled=self.device.type != "cpu", cache_enabled=False
        )

    def cells(self, small: Tensor, rounds: int, matrices: Matrices) -> Tensor:
        """The corrected cells, with the gradient of every round where the encoder learns."""

        @torch.no_grad()
        def look(latent: Tensor) -> Tensor:
            return matrices.shrunk(self.pair.decoder(latent).float())

        with torch.set_grad_enabled(self.encoder_learns):
            return self.pair.encoder.corrected(small, look, rounds)

    def __call__(self, side: int, count: int, rounds: int) -> Tensor:
        """Leaves gradients in the networks' parameters; returns MEASURES [6]."""
        recipe, matrices = self.recipe, self.matrices[side]
        held = max(1, round(recipe.teacher_share * count))
        with torch.no_grad():
            target, small = varied(
                self.pictures.crops(count, side), recoloured=recipe.recoloured, joined=recipe.joined
            )
        with self.half():
            with torch.no_grad():
                wanted = self.teacher.encode(small[:held]).float()
                decoded = self.teacher.decode(wanted).float()
            cells = self.cells(small, rounds, matrices).float()
            latents = F.pixel_unshuffle(torch.cat((cells, wanted)), 2)
            given, sigma = noised(latents, recipe.noisy_share, recipe.largest_sigma, None)
            made = self.pair.decoder(given).float()
            imitated = self.teacher.decode(cells[:held]).float() if self.encoder_learns else decoded
        targets, shown = torch.cat((target, target[:held])), torch.cat((small, decoded))
        error = (made - targets).square().mean((1, 2, 3))
        likeness = matrices.similarity(made, targets)
        lost = levelled(error + coarse_error(made, shown, recipe.coarse)) + recipe.similarity_weight * (1 - likeness)
        lost = lost * tempered(sigma).to(lost)
        loss = lost[:count].mean() + recipe.teacher_weight * lost[count:].mean()
        difference = (imitated - decoded).square().mean((1, 2, 3))
        distance = F.mse_loss(cells[:held], wanted)
        judged = torch.zeros((), device=self.device)
        if self.critic is None:
            if self.encoder_learns:
                beyond = F.relu(levelled(difference) - TYPICAL * np.log((recipe.allowed_difference + TINIEST) / TYPICAL))
                loss = loss + recipe.imitation_weight * beyond.mean() + recipe.latent_weight * distance
            loss.backward()
        else:
            judged = self._judged(loss, made, targets)
        clean = sigma[:count] == 0
        own = (error[:count] * clean).sum() / clean.sum().clamp(min=1)
        return torch.stack(
            (own, likeness[:count].mean(), error[count:].mean(), difference.mean(), distance, judged)
        ).detach()

    def _judged(self, loss: Tensor, made: Tensor, targets: Tensor) -> Tensor:
        """Gradients with the critic's say, scaled to its share for each picture; and the critic's own."""
        critic = self.critic
        assert critic is not None
        (slope,) = torch.autograd.grad(loss, made)
        with self.half():
            verdict = -critic(made).float().mean()
        (say,) = torch.autograd.grad(verdict, made)
        share = self.recipe.critic_share * _lengths(slope) / _lengths(say).clamp(min=1e-12)
        made.backward(slope + share * say)
        with self.half():
            own = critic_loss(critic(made.detach()).float(), critic(targets).float())
        own.backward()
        return own


def _lengths(x: Tensor) -> Tensor:
    return x.square().sum((1, 2, 3), keepdim=True).sqrt()


def keep_exact(*modules: nn.Module) -> None:
    """Let these compute in float32 inside bfloat16 surroundings: what they give is a latent, or a picture."""

    def exact(forward: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        with torch.autocast(x.device.type, enabled=False):
            return forward(x.float())

    for module in modules:
        module.forward = lambda x, forward=module.forward: exact(forward, x)


class _Loop:
    """Steps, updates and averages until the budget is used."""

    def __init__(
        self, pair: Pair, average: Pair, learners: Sequence[Learner], critic: PatchCritic | None, step: Step,
        recipe: UnrolledRecipe,
    ) -> None:  # fmt: skip
        self.pair, self.average, self.critic, self.step, self.recipe = pair, average, critic, step, recipe
        self.learners = list(learners)
        if critic is not None:
            adam = Muon([{"params": list(critic.parameters()), "muon": False}], lr=0.0)
            self.learners.append(Learner(critic, adam, lambda progress: recipe.critic_rate))
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
        update_average(self.average, self.pair, self.recipe.ema)
        return measures

    def run(self, path: Path, note: Mapping[str, Any], report: Report) -> None:
        """Until the budget is used; saved every so often, and at the end."""
        recipe, random = self.recipe, np.random.default_rng([self.recipe.seed, self.count])
        recording = recipe.record and recipe.device != "cpu"
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
        if self.critic is not None:
            kept["critic"] = self.critic.state_dict()
        kept["optimizers"] = [learner.optimizer.state_dict() for learner in self.learners]
        return {**kept, "step": self.count, "used": self.used}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on from a state; the pair's own weights are put back by `resume`."""
        self.average.load_state_dict(state["average"])
        if self.critic is not None:
            self.critic.load_state_dict(state["critic"])
        for learner, rate, kept in zip(self.learners, self.rates, state["optimizers"], strict=True):
            learner.optimizer.load_state_dict(kept)
            for group in learner.optimizer.param_groups:
                group["lr"] = rate
        self.count, self.used = state["step"], state["used"]


def edged(x: Tensor) -> Tensor:
    """`x` [B,C,H,W] with its outermost rows and columns once more around it.

    The framework's own padding of this kind adds up its gradient place by place and in another order of memory.
    """
    x = torch.cat((x[:, :, :1], x, x[:, :, -1:]), dim=2)
    return torch.cat((x[..., :1], x, x[..., -1:]), dim=3)


def pad_by_joining(network: nn.Module) -> None:
    """Let every convolution that repeats its input's edges do so by `edged`."""
    for module in network.modules():
        if isinstance(module, nn.Conv2d) and module.padding_mode == "replicate":
            module.forward = lambda x, conv=module: F.conv2d(edged(x), conv.weight, conv.bias)


def compile_blocks(network: nn.Module) -> None:
    """Compile residual blocks one by one and for any size: there are dozens of them, but few kinds."""
    torch._dynamo.config.recompile_limit = 64
    torch.fx.experimental._config.use_duck_shape = False  # as many crops as a crop has pixels is a coincidence
    for module in network.modules():
        if isinstance(module, (adapter.ResidualBlock, encoder.ResidualBlock)):
            module.compile(dynamic=True)


def run_unrolled(
    pair: Pair, pictures: ResidentPictures, folder: Path, recipe: UnrolledRecipe, teacher: TeacherAutoencoder,
    report: Report = lambda line: None,
) -> Pair:  # fmt: skip
    """Train `pair` until the budget is used; returns the average, also in `folder/joint.pt`, from which it resumes."""
    state = resume(folder / "joint.pt", pair)
    torch.manual_seed(recipe.seed + (0 if state is None else state["step"]))
    pair.to(recipe.device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    average = copy.deepcopy(pair).requires_grad_(False)
    learners = learners_of(pair, recipe)
    for learner in learners:
        learner.network.requires_grad_(learner.rate(0.0) > 0)
    learners = [learner for learner in learners if learner.rate(0.0) > 0]
    critic = PatchCritic().to(recipe.device, memory_format=torch.channels_last) if recipe.critic_share else None  # type: ignore[call-overload]
    teacher = copy.deepcopy(teacher).to(recipe.device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    pad_by_joining(pair)
    keep_exact(pair.encoder.head, pair.encoder.corrector.head, pair.decoder.to_pixels, pair.decoder.adapter.pit_head)
    loop = _Loop(pair, average, learners, critic, Step(pair, teacher, pictures, recipe, critic), recipe)
    if state is not None:
        loop.restore(state)
    note = {"decoder_config": pair.decoder.config.to_dict(), "encoder_config": pair.encoder.config.to_dict()}
    loop.run(folder / "joint.pt", note, report)
    return average
