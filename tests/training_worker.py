# SPDX-License-Identifier: Apache-2.0
"""One of several training processes, for tests: computes one pass's gradients and lets the first process store them."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors.torch import save_file

from pidecode.training.config import ParallelConfig, TrainConfig, apply_settings
from pidecode.training.dataloader import DataLoader, make_encoders
from pidecode.training.dataset import find_images
from pidecode.training.distributed import (
    DistEnv,
    full_tensor,
    init_distributed,
    reduce_unsharded_gradients,
    set_gradient_sync,
    unwrap,
)
from pidecode.training.recipes import get_recipe
from pidecode.training.tasks import build_task

CPU = torch.device("cpu")


def gradients(recipe: TrainConfig, env: DistEnv, step: int = 0) -> dict[str, torch.Tensor]:
    """Loss and gradients of every module that iteration `step` trains, whole."""
    task = build_task(recipe, env)
    for module in (*task.modules.values(), *task.frozen.values()):
        disturb(module)
    loader = DataLoader(recipe, find_images(recipe.data.source), make_encoders(recipe, CPU), env)
    modules = [task.modules[name] for name in task.trained_at(step)]
    for index in range(recipe.optimizer.grad_accumulation):
        batch, rng, _ = loader.batch(index)
        set_gradient_sync(modules, index == recipe.optimizer.grad_accumulation - 1)
        (task.loss(step, batch, rng).loss / recipe.optimizer.grad_accumulation).backward()
    loader.close()
    reduce_unsharded_gradients(modules, env)
    found = {}
    for name in task.trained_at(step):
        for key, parameter in unwrap(task.modules[name]).named_parameters():
            if parameter.grad is not None:
                found[f"{name}.{key}"] = full_tensor(parameter.grad).clone()
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
    with init_distributed(ParallelConfig(timeout=300), CPU) as env:
        for index, (step, recipe) in enumerate(recipes):
            count = recipe.parallel.context_parallel
            shared = replace(env, context_parallel=count, context_group=dist.group.WORLD if count > 1 else None)
            found = gradients(recipe, shared, step)
            if env.is_first:
                save_file({key: value.contiguous() for key, value in found.items()}, Path(out) / f"{index}.safetensors")


if __name__ == "__main__":
    main()
