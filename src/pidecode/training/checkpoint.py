# SPDX-License-Identifier: Apache-2.0
"""Checkpoints that are whole or not there: everything a run needs to go on exactly, without a pickle in it.

`checkpoints/step-00000100/` holds `tensors.safetensors` and `state.json`. It is written under another name and then
renamed, so a run killed at any moment finds the last whole one. Sharded tensors are gathered, so a run may go on with
another number of processes.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.optim import Optimizer

from pidecode.errors import CheckpointError, TrainingError
from pidecode.files import atomic_folder
from pidecode.training.distributed import DistEnv, bare, fill, wait_for_all, whole
from pidecode.training.ema import ExponentialMovingAverage
from pidecode.units import format_bytes

_NAME = re.compile(r"step-(\d{8})")
_TENSORS, _STATE = "tensors.safetensors", "state.json"


@dataclass(frozen=True, slots=True)
class Live:
    """The parts of a run that a checkpoint stores and restores in place."""

    modules: Mapping[str, nn.Module]
    optimizers: Mapping[str, Optimizer]
    average: ExponentialMovingAverage | None
    device: torch.device


def _parameters(live: Live) -> Iterator[tuple[str, Tensor]]:
    for name, module in live.modules.items():
        for key, value in bare(module).state_dict(keep_vars=True).items():
            yield f"weights.{name}.{key}", value.detach()
    if live.average is not None:
        for key, value in live.average.tensors.items():
            yield f"average.{key}", value


def _moments(live: Live) -> Iterator[tuple[str, Tensor]]:
    for name, optimizer in live.optimizers.items():
        for key, parameter in bare(live.modules[name]).named_parameters():
            for moment, value in optimizer.state.get(parameter, {}).items():
                yield f"optimizer.{name}.{key}/{moment}", value


def _chance(device: torch.device) -> dict[str, Tensor]:
    """States of torch's own generators; the run's draws do not use them, but a layer might."""
    states = {"chance.processor": torch.get_rng_state()}
    if device.type != "cpu":
        states["chance.device"] = torch.get_device_module(device).get_rng_state()
    return states


def save_checkpoint(folder: Path, step: int, live: Live, facts: Mapping[str, Any], here: DistEnv, keep: int) -> None:
    """Store the state after `step` steps; every process must call this, the first one writes.

    Older checkpoints beyond `keep` are removed afterwards. Raises TrainingError when the disk is full or refuses;
    what was saved before stays.
    """
    tensors: dict[str, Tensor] = {}
    for source in (_parameters, _moments):
        for name, value in source(live):
            full = whole(value)
            if here.is_first:
                tensors[name] = full.detach().to("cpu", copy=True).contiguous()
    if here.is_first:
        tensors |= _chance(live.device)
        _write(folder, step, tensors, {"format": 1, "step": step, **facts})
        for old in _found(folder)[:-keep]:
            shutil.rmtree(old, ignore_errors=True)
    wait_for_all(here)


def _write(folder: Path, step: int, tensors: dict[str, Tensor], state: Mapping[str, Any]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    needed = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise TrainingError(
            f"A checkpoint takes {format_bytes(needed)} and {format_bytes(free)} are free at {folder}; "
            "make room, then start again with --resume. Earlier checkpoints are whole."
        )
    try:
        with atomic_folder(folder / f"step-{step:08d}") as part:
            save_file(tensors, part / _TENSORS)
            (part / _STATE).write_text(json.dumps(state, indent=1, default=str), encoding="utf-8")
    except (OSError, SafetensorError) as fault:
        raise TrainingError(
            f"The checkpoint of step {step} could not be written to {folder}: {fault}. Earlier checkpoints are "
            "whole; free or repair the disk, then start again with --resume."
        ) from fault


def _found(folder: Path) -> list[Path]:
    """Checkpoints, oldest first."""
    return sorted(path for path in folder.glob("step-*") if _NAME.fullmatch(path.name))


@dataclass(frozen=True, slots=True)
class Stored:
    """A checkpoint read from disk."""

    path: Path
    step: int
    tensors: dict[str, Tensor]
    facts: dict[str, Any]


def newest_checkpoint(folder: Path, say: Callable[[str], None] | None = None) -> Stored | None:
    """The newest whole checkpoint; damaged ones are passed over and named. None when there is none."""
    for path in reversed(_found(folder)):
        try:
            facts = json.loads((path / _STATE).read_text(encoding="utf-8"))
            return Stored(path, int(facts["step"]), load_file(path / _TENSORS), facts)
        except (OSError, ValueError, KeyError, TypeError, SafetensorError) as fault:
            if say is not None:
                say(f"{path} is damaged and passed over: {fault}")
    return None


def restore(stored: Stored, live: Live) -> None:
    """Put a checkpoint's values into a run just built. Raises CheckpointError when it is another run's."""
    wanted = dict(_parameters(live))
    have = {name for name in stored.tensors if name.startswith(("weights.", "average."))}
    if set(wanted) != have or any(stored.tensors[name].shape != value.shape for name, value in wanted.items()):
        odd = sorted(set(wanted) ^ have)[:3]
        raise CheckpointError(
            f"{stored.path} is of another network or method ({', '.join(odd) or 'shapes differ'}); "
            "resume with the recipe it was made with, or choose another folder."
        )
    for name, value in wanted.items():
        fill(value, stored.tensors[name])
    _restore_moments(stored, live)
    torch.set_rng_state(stored.tensors["chance.processor"])
    if "chance.device" in stored.tensors and live.device.type != "cpu":
        torch.get_device_module(live.device).set_rng_state(stored.tensors["chance.device"])


def _restore_moments(stored: Stored, live: Live) -> None:
    for name, optimizer in live.optimizers.items():
        parameters = dict(bare(live.modules[name]).named_parameters())
        prefix = f"optimizer.{name}."
        for full_key in [key for key in stored.tensors if key.startswith(prefix)]:
            key, _, moment = full_key.removeprefix(prefix).rpartition("/")
            parameter, value = parameters[key], stored.tensors[full_key]
            if moment == "step":
                optimizer.state[parameter][moment] = value.clone()
                continue
            place = torch.zeros_like(parameter, requires_grad=False)
            fill(place, value)
            optimizer.state[parameter][moment] = place
