# SPDX-License-Identifier: Apache-2.0
"""One of several training processes, for tests: computes one pass's gradients and lets the first process store them."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors.torch import save_file

from pidecode.training.config import Recipe, Spread
from pidecode.training.dataloader import Feed, make_helpers
from pidecode.training.dataset import find_images
from pidecode.training.distributed import DistEnv, bare, finish_gradients, gradients_stay_here, whole, world
from pidecode.training.methods import build_method
from pidecode.training.overrides import apply_settings
from pidecode.training.recipes import get_recipe

CPU = torch.device("cpu")


def gradients(recipe: Recipe, here: DistEnv, step: int = 0) -> dict[str, torch.Tensor]:
    """Loss and gradients of every module that iteration `step` trains, whole."""
    method = build_method(recipe, here)
    for module in (*method.trained.values(), *method.frozen.values()):
        disturb(module)
    feed = Feed(recipe, find_images(recipe.data.source), make_helpers(recipe, CPU), CPU, here.place, here.places)
    modules = [method.trained[name] for name in method.turn(step)]
    for index in range(recipe.optimize.accumulate):
        example, draws, _ = feed.batch(index)
        with gradients_stay_here(modules, index < recipe.optimize.accumulate - 1):
            (method.outcome(step, example, draws).loss / recipe.optimize.accumulate).backward()
    feed.close()
    finish_gradients(modules, here)
    found = {}
    for name in method.turn(step):
        for key, parameter in bare(method.trained[name]).named_parameters():
            if parameter.grad is not None:
                found[f"{name}.{key}"] = whole(parameter.grad).clone()
    return found


def disturb(module: torch.nn.Module) -> None:
    """Move every parameter off its start value, which for many is zero: the same way however it is sharded."""
    for index, parameter in enumerate(module.parameters()):
        with torch.no_grad():
            parameter.mul_(1.0 + 0.01 * (index % 7)).add_(0.01 * (index % 5 - 2))


def main() -> None:
    """`training_worker.py OUT RECIPE STEP SETTING... -- RECIPE STEP SETTING...`: one file per case."""
    out, *rest = sys.argv[1:]
    cases: list[list[str]] = [[]]
    for word in rest:
        if word == "--":
            cases.append([])
        else:
            cases[-1].append(word)
    torch.set_num_threads(1)
    recipes = [(int(step), apply_settings(get_recipe(name), settings)) for name, step, *settings in cases]
    with world(Spread(patience=300), CPU) as here:
        for index, (step, recipe) in enumerate(recipes):
            across = recipe.spread.across
            shared = replace(here, across=across, band_group=dist.group.WORLD if across > 1 else None)
            found = gradients(recipe, shared, step)
            if here.is_first:
                save_file({key: value.contiguous() for key, value in found.items()}, Path(out) / f"{index}.safetensors")


if __name__ == "__main__":
    main()
