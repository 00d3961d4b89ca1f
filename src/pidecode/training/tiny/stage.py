# SPDX-License-Identifier: Apache-2.0
"""What all stages of training have in common: a recipe's rates; a loop that averages, reports, saves and resumes."""

from __future__ import annotations

import copy
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor, nn

from pidecode.errors import TrainingError
from pidecode.training.tiny.muon import Muon
from pidecode.training.tiny.state import load_state, save_state

Report = Callable[[str], None]
Parts = Mapping[str, float]
"""What a loss consists of, by name, for the log."""
Model = TypeVar("Model", bound=nn.Module)


@dataclass(frozen=True, slots=True, kw_only=True)
class StageRecipe:
    """How long a stage learns and how fast; the schedule follows the budget, which counts all resumed parts."""

    seconds: float = 3600.0
    """Budget of wall time."""
    steps: int = 0
    """Budget of steps, where it is not 0; then time does not count."""
    warmup_steps: int = 30
    decay_from: float = 0.5
    """Share of the budget after which rates fall linearly to a fiftieth."""
    ema: float = 0.995
    """How much of the weights' average each step keeps."""
    clip: float = 1.0
    """Largest norm of each network's gradient."""
    recolored: float = 0.5
    """Share of crops that get other colors."""
    joined: float = 0.25
    """Share of crops of which a part is another image, or a single color."""
    device: str = "cpu"
    seed: int = 0
    save_every: float = 90.0
    log_every: float = 30.0

    def progress(self, step: int, used: float) -> float:
        """Share of the budget that is used; 1 and more means done."""
        return step / self.steps if self.steps else used / self.seconds

    def factor(self, progress: float, step: int) -> float:
        """What rates are multiplied by: a warm-up by steps, flat, then a fall by the share of the budget used."""
        falling = max(0.0, progress - self.decay_from) / (1 - self.decay_from)
        return min(1.0, (step + 1) / self.warmup_steps) * max(0.02, 1 - falling)


@dataclass(frozen=True, slots=True)
class Learner:
    """A network, or a part of one, with its optimizer and its rate as a function of the budget's share that is used."""

    network: nn.Module
    optimizer: Muon
    rate: Callable[[float], float]


@dataclass(frozen=True, slots=True)
class Draws:
    """The sources of chance in a stage: for crops and for noise. Each resumed part draws anew."""

    crops: np.random.Generator
    noise: torch.Generator

    @classmethod
    def at(cls, seed: int, step: int, rank: int = 0) -> Draws:
        """Those of one process of a stage that starts, or goes on, at `step`."""
        noise = torch.Generator().manual_seed((seed * 1000 + rank) * 1_000_003 + step)
        return cls(np.random.default_rng([seed, rank, step]), noise)


LossOf = Callable[[float, Draws], tuple[Tensor, Parts]]
"""The loss of one step, from the share of the budget that is used; and its parts."""


def resume(path: Path, model: nn.Module) -> dict[str, Any] | None:
    """The state at `path`, with the model's weights put back; None where there is none."""
    state = load_state(path)
    if state is not None:
        model.load_state_dict(state["model"])
    return state


@dataclass(frozen=True, slots=True, kw_only=True)
class Stage:
    """A stage as it runs: by which recipe, and where its state lives."""

    name: str
    recipe: StageRecipe
    path: Path
    note: Mapping[str, Any]
    """Saved beside the weights: what they are the weights of."""
    report: Report
    rank: int = 0
    """Which of several processes on the same weights this is; the first one averages, reports and saves."""

    def learn(
        self, model: Model, learners: Sequence[Learner], loss_of: LossOf, state: Mapping[str, Any] | None
    ) -> Model:
        """Train until the budget is used, from `state` on; returns the weights' average."""
        recipe, average = self.recipe, copy.deepcopy(model).requires_grad_(False)
        step, used = 0, 0.0
        if state is not None:
            step, used = state["step"], state["used"]
            average.load_state_dict(state["average"])
            for learner, kept in zip(learners, state["optimizers"], strict=True):
                learner.optimizer.load_state_dict(kept)
        draws = Draws.at(recipe.seed, step, self.rank)
        started, saved, logged, rows = time.monotonic() - used, used, used, list[Parts]()
        while (progress := recipe.progress(step, used)) < 1:
            factor = recipe.factor(progress, step)
            rows.append(_update(learners, loss_of, progress, factor, draws, recipe.clip))
            step += 1
            used = time.monotonic() - started
            if self.rank:
                continue
            update_average(average, model, min(recipe.ema, (1 + step) / (10 + step)))
            if used - logged > recipe.log_every:
                rate = learners[0].rate(progress) * factor
                self.report(f"{self.name} step {step} {used:.0f}s {_means(rows)} rate {rate:.1e}")
                logged, rows = used, []
            if used - saved > recipe.save_every or recipe.progress(step, used) >= 1:
                optimizers = [learner.optimizer.state_dict() for learner in learners]
                kept = {"model": model.state_dict(), "average": average.state_dict(), "optimizers": optimizers}
                save_state(self.path, {**kept, "step": step, "used": used, **self.note})
                saved = used
        return average


def _update(
    learners: Sequence[Learner], loss_of: LossOf, progress: float, factor: float, draws: Draws, clip: float
) -> Parts:
    for learner in learners:
        for group in learner.optimizer.param_groups:
            group["lr"] = learner.rate(progress) * factor
        learner.optimizer.zero_grad(set_to_none=True)
    loss, parts = loss_of(progress, draws)
    loss.backward()
    for learner in learners:
        nn.utils.clip_grad_norm_(learner.network.parameters(), clip)
        learner.optimizer.step()
    return parts


def _means(rows: Sequence[Parts]) -> str:
    """Means by name, of the rows that have the same parts as the last one."""
    alike = [row for row in rows if row.keys() == rows[-1].keys()]
    return " ".join(f"{key} {np.mean([row[key] for row in alike]):.5f}" for key in rows[-1])


@torch.no_grad()
def update_average(average: nn.Module, model: nn.Module, keep: float) -> None:
    """Exponential moving average of the weights, in place."""
    torch._foreach_lerp_(list(average.parameters()), list(model.parameters()), 1 - keep)


def share_work(work: Callable[[int], None], networks: Sequence[nn.Module], workers: int) -> None:
    """`work`, given its rank, in so many processes that update the same weights; in this one if that is one.

    Each has one thread, and a session of its own for a scheduler that shares by session. Raises TrainingError when one
    stopped early.
    """
    if workers == 1:
        work(0)
        return

    def alone(rank: int) -> None:
        os.setsid()
        torch.set_num_threads(1)
        torch.set_flush_denormal(True)
        work(rank)

    for network in networks:
        network.share_memory()
    context = torch.multiprocessing.get_context("fork")
    processes = [context.Process(target=alone, args=(rank,)) for rank in range(workers)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    if any(process.exitcode for process in processes):
        raise TrainingError(
            "A training process stopped early; the last whole state is kept, and the same call goes on."
        )
