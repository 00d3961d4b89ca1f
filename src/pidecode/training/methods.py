# SPDX-License-Identifier: Apache-2.0
"""The ways of training, each behind the same few questions: what is trained when, and what does it cost."""

from __future__ import annotations

import functools
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from pidecode.models.pid.adapter import ResidualBlock
from pidecode.models.pid.blocks import PatchBlock, PixelBlock
from pidecode.models.pid.network import PiDNet
from pidecode.training.config import Recipe
from pidecode.training.denoiser import Evaluator, Example
from pidecode.training.distributed import DistEnv, bare, spread_module
from pidecode.training.dmd import Cast, Discriminator, critics_loss, paint, student_loss
from pidecode.training.flow_matching import Outcome, teacher_loss
from pidecode.training.losses import clean_image
from pidecode.training.models import choose_parameters, inject, new_network, start_weights, take_weights
from pidecode.training.noise import Draws, seed_of
from pidecode.training.repa import Alignment, dinov2

MAIN = "net"
"""Name of the network that a run is about: averaged, sampled, exported."""


@dataclass
class Method:
    """Networks of a run, spread over the processes, and their losses."""

    recipe: Recipe
    trained: dict[str, nn.Module]
    """By name; each has its own optimizer."""
    frozen: dict[str, nn.Module] = field(default_factory=dict)
    fresh: list[str] = field(default_factory=list)
    """Tensors that started from chance although weights were given."""

    @property
    def main(self) -> Evaluator:
        """The network the run is about, unwrapped."""
        evaluator = bare(self.trained[MAIN])
        assert isinstance(evaluator, Evaluator)
        return evaluator

    def turn(self, step: int) -> tuple[str, ...]:
        """Names of the modules that iteration `step`, counted from 0, trains."""
        if self.recipe.method != "student":
            return tuple(self.trained)
        mine = self.recipe.distil.is_student_turn(step)
        return tuple(name for name in self.trained if (name == MAIN) == mine)

    def outcome(self, step: int, example: Example, draws: Draws) -> Outcome:
        """Loss of one forward pass of iteration `step`."""
        recipe = self.recipe
        if recipe.method == "direct":
            return direct_loss(self.trained[MAIN], example, draws, recipe)
        if recipe.method != "student":
            return teacher_loss(self.trained[MAIN], example, draws, recipe.teacher, self.trained.get("alignment"))
        student, fake, critic = self.trained[MAIN], self.trained["fake"], self.trained.get("critic")
        teacher = self.frozen["teacher"]
        # Modules this iteration does not train are called without DDP's wrapping, which waits for their gradients.
        if recipe.distil.is_student_turn(step):
            cast = Cast(student, teacher, bare(fake), None if critic is None else bare(critic))
            return student_loss(cast, example, draws, recipe.distil, recipe.distil.gan_weight_at(step))[0]
        return critics_loss(Cast(bare(student), teacher, fake, critic), example, draws, recipe.distil)


def direct_loss(net: nn.Module, example: Example, draws: Draws, recipe: Recipe) -> Outcome:
    """The simple recipe for small networks: whatever a student's step paints should be the image itself."""
    painted = paint(net, example, draws, recipe.distil)
    loss, parts = clean_image(painted, example.image.float())
    return Outcome(loss, parts)


def build_method(recipe: Recipe, here: DistEnv) -> Method:
    """Networks with their start values, on this process's device, as the recipe spreads them."""
    build = _build_student if recipe.method == "student" else _build_single
    method = build(recipe, here)
    for name, module in method.trained.items():
        method.trained[name] = spread_module(module, recipe.spread, here)
    for name, module in method.frozen.items():
        method.frozen[name] = spread_module(module, recipe.spread, here)
    return method


def _build_single(recipe: Recipe, here: DistEnv) -> Method:
    net = new_network(recipe.net, seed_of(recipe.run.seed, "weights"))
    fresh: list[str] = []
    if recipe.start_from:
        fresh = take_weights(net, start_weights(recipe.start_from), recipe.start_from)
    color = recipe.method == "teacher" and recipe.teacher.color_weight > 0
    choose_parameters(net, recipe.only, color=color)
    trained: dict[str, nn.Module] = {MAIN: _evaluator(net, recipe, here, adapt=True)}
    if recipe.teacher.align_weight and recipe.method in ("teacher", "backbone"):
        trained["alignment"] = _alignment(recipe).to(here.device)
    return Method(recipe, trained, fresh=fresh)


def _alignment(recipe: Recipe) -> Alignment:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed_of(recipe.run.seed, "alignment"))
        return dinov2(recipe.teacher.align_with, recipe.net.hidden_size)


def _build_student(recipe: Recipe, here: DistEnv) -> Method:
    config = recipe.net.without_color_head()
    given: dict[str, Tensor] | None = start_weights(recipe.start_from) if recipe.start_from else None
    nets: dict[str, PiDNet] = {}
    for name in (MAIN, "fake", "teacher"):
        nets[name] = new_network(config, seed_of(recipe.run.seed, "weights"))
        if given is not None:
            take_weights(nets[name], given, recipe.start_from)
        choose_parameters(nets[name], "all", color=False)
    nets["teacher"].requires_grad_(False)
    trained: dict[str, nn.Module] = {
        MAIN: _evaluator(nets[MAIN], recipe, here, adapt=True),
        "fake": _evaluator(nets["fake"], recipe, here),
    }
    distil = recipe.distil
    if distil.gan_weight > 0:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed_of(recipe.run.seed, "critic"))
            critic = Discriminator(
                config.hidden_size,
                config.patch_depth,
                distil.critic_blocks,
                layers=distil.critic_layers,
                per_patch=distil.critic_per_patch,
            )
        trained["critic"] = critic.to(here.device)
    return Method(recipe, trained, {"teacher": _evaluator(nets["teacher"], recipe, here).eval()})


def _evaluator(net: PiDNet, recipe: Recipe, here: DistEnv, *, adapt: bool = False) -> Evaluator:
    if adapt and recipe.adapt.rank:
        inject(net, recipe.adapt, seed_of(recipe.run.seed, "adapters"))
    if recipe.run.recompute:
        recompute_blocks(net)
    return Evaluator(net.to(here.device).train())


def recompute_blocks(net: PiDNet) -> None:
    """Keep each block's input only, and compute the rest again when gradients need it."""
    for module in net.modules():
        if isinstance(module, (PatchBlock, PixelBlock, ResidualBlock)):
            module.forward = functools.partial(_recomputed, module.forward)  # type: ignore[method-assign]


def _recomputed(forward: Any, *args: Any, **kwargs: Any) -> Any:
    if not torch.is_grad_enabled():
        return forward(*args, **kwargs)
    return checkpoint(forward, *args, use_reentrant=False, **kwargs)
