# SPDX-License-Identifier: Apache-2.0
"""Checkpoints: everything a run needs to resume exactly, in safetensors and JSON, written completely or not at all.

`checkpoints/step-00000100/` holds `tensors.safetensors`, `state.json` and `SHA256SUMS`, which `sha256sum -c` reads too.
It is written under a temporary name and then renamed, so a run killed at any moment finds the last complete one.
Sharded tensors are gathered, so a run may resume with another number of processes.
"""

from __future__ import annotations

import contextlib
import json
import re
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.optim import Optimizer

from pidecode.errors import CheckpointError, FileError, TrainingError
from pidecode.files import atomic_folder, read_small, remove_folder, writable_folder
from pidecode.strict_json import read_json
from pidecode.training.distributed import DistEnv, barrier, copy_full_, full_tensors, unwrap
from pidecode.training.ema import ExponentialMovingAverage
from pidecode.units import format_bytes
from pidecode.weights.safetensors import read_safetensors, sha256

_NAME = re.compile(r"step-(\d{8})")
_TENSORS, _STATE, _CHECKSUMS = "tensors.safetensors", "state.json", "SHA256SUMS"


@dataclass(frozen=True, slots=True)
class TrainState:
    """The parts of a run that a checkpoint stores and restores in place."""

    modules: Mapping[str, nn.Module]
    optimizers: Mapping[str, Optimizer]
    emas: Mapping[str, ExponentialMovingAverage]
    device: torch.device


def _parameters(state: TrainState) -> dict[str, Tensor]:
    stored = {f"weights.{name}": unwrap(module).state_dict() for name, module in state.modules.items()}
    stored |= {f"ema.{name}": average.tensors for name, average in state.emas.items()}
    return {f"{prefix}.{key}": value for prefix, tensors in stored.items() for key, value in tensors.items()}


def _optimized(state: TrainState) -> dict[str, tuple[Optimizer, nn.Parameter]]:
    """Parameters by the beginning of their moments' names, each with its optimizer."""
    return {
        f"optimizer.{name}.{key}": (optimizer, parameter)
        for name, optimizer in state.optimizers.items()
        for key, parameter in unwrap(state.modules[name]).named_parameters()
    }


def save_checkpoint(
    folder: Path, step: int, state: TrainState, metadata: Mapping[str, Any], env: DistEnv, keep: int
) -> None:
    """Store the state after `step` steps; every process must call this, the first one writes.

    Older checkpoints beyond `keep` are removed afterwards.

    Raises:
        TrainingError: The disk is full or cannot be written. What was saved before stays.
    """
    named = _parameters(state)
    for key, (optimizer, parameter) in _optimized(state).items():
        named |= {f"{key}/{moment}": value for moment, value in optimizer.state.get(parameter, {}).items()}
    tensors = full_tensors(named.items(), env)
    if env.is_first:
        # A step's own random numbers do not use torch's global generators, but a layer might.
        tensors["rng.cpu"] = torch.get_rng_state()
        if state.device.type != "cpu":
            tensors["rng.device"] = torch.get_device_module(state.device).get_rng_state()
        _write(folder, step, tensors, {"format": 1, "step": step, **metadata})
        for old in _found(folder)[:-keep]:
            with contextlib.suppress(OSError):  # the new one is complete; an old one too many is no reason to stop
                remove_folder(old)
    barrier(env)


def _write(folder: Path, step: int, tensors: dict[str, Tensor], state: Mapping[str, Any]) -> None:
    writable_folder(folder)
    needed = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise TrainingError(
            f"A checkpoint takes {format_bytes(needed)} and {format_bytes(free)} are free at {folder}; "
            "make room, then start again with --resume. Earlier checkpoints are complete."
        )
    try:
        with atomic_folder(folder / f"step-{step:08d}") as part:
            save_file(tensors, part / _TENSORS)
            (part / _STATE).write_text(json.dumps(state, indent=1, default=str), encoding="utf-8")
            digests = "".join(f"{sha256(part / name)}  {name}\n" for name in (_TENSORS, _STATE))
            (part / _CHECKSUMS).write_text(digests, encoding="ascii")
    except (OSError, SafetensorError) as fault:
        raise TrainingError(
            f"The checkpoint of step {step} could not be written to {folder}: {fault}. Earlier checkpoints are "
            "complete; free or repair the disk, then start again with --resume."
        ) from fault


def _found(folder: Path) -> list[Path]:
    """Checkpoints, oldest first."""
    try:
        return sorted(path for path in folder.glob("step-*") if _NAME.fullmatch(path.name))
    except (OSError, ValueError) as fault:
        raise FileError(f"{folder} cannot be read: {fault}.") from fault


@dataclass(frozen=True, slots=True)
class StoredCheckpoint:
    """A checkpoint read from disk."""

    path: Path
    step: int
    tensors: dict[str, Tensor]
    metadata: dict[str, Any]


def newest_checkpoint(folder: Path, progress: Callable[[str], None] | None = None) -> StoredCheckpoint | None:
    """The newest complete checkpoint, or None if there is none; damaged ones are skipped and named to `progress`.

    Raises:
        CheckpointError: There are checkpoints and all of them are damaged.
    """  # noqa: DOC501 (a FileError means one damaged checkpoint)
    reason = ""
    for path in reversed(_found(folder)):
        try:
            digests = read_small(path / _CHECKSUMS).decode("ascii", "replace").splitlines()
            for name in (_TENSORS, _STATE):
                if f"{sha256(path / name)}  {name}" not in digests:
                    raise FileError(f"{name} has changed since it was written, or {_CHECKSUMS} has")
            metadata = read_json(path / _STATE)
            if not isinstance(metadata, dict) or not isinstance(metadata.get("step"), int):
                raise FileError(f"{_STATE} does not hold the number of steps")
            return StoredCheckpoint(path, metadata["step"], read_safetensors(path / _TENSORS)[1], metadata)
        except (OSError, ValueError, FileError) as fault:
            reason = f"{path} is damaged and skipped: {fault}"
            if progress is not None:
                progress(reason)
    if reason:
        raise CheckpointError(
            f"No checkpoint in {folder} is complete ({reason}). Restore one from a copy, or start again in another "
            "folder."
        )
    return None


def restore(stored: StoredCheckpoint, state: TrainState) -> None:
    """Put a checkpoint's values into a run that was just built."""
    wanted = _parameters(state)
    have = {name for name in stored.tensors if name.startswith(("weights.", "ema."))}
    if set(wanted) != have or any(stored.tensors[name].shape != value.shape for name, value in wanted.items()):
        odd = sorted(set(wanted) ^ have)[:3]
        raise CheckpointError(
            f"{stored.path} is of another network or method ({', '.join(odd) or 'shapes differ'}); "
            "resume with the configuration it was made with, or choose another folder."
        )
    if "rng.cpu" not in stored.tensors:
        raise CheckpointError(f"{stored.path} lacks the tensor rng.cpu; move it away to resume from an earlier one.")
    for name, value in wanted.items():
        copy_full_(value, stored.tensors[name])
    optimized = _optimized(state)
    for full_key in (key for key in stored.tensors if key.startswith("optimizer.")):
        key, _, moment = full_key.rpartition("/")
        if key not in optimized:
            raise CheckpointError(
                f"{stored.path} has an optimizer state of {key.removeprefix('optimizer.')}, which this run does not "
                "train; resume with the configuration it was made with."
            )
        optimizer, parameter = optimized[key]
        restored = stored.tensors[full_key].clone()
        if moment != "step":
            restored = torch.zeros_like(parameter, requires_grad=False)
            copy_full_(restored, stored.tensors[full_key])
        optimizer.state[parameter][moment] = restored
    torch.set_rng_state(stored.tensors["rng.cpu"])
    if "rng.device" in stored.tensors and state.device.type != "cpu":
        torch.get_device_module(state.device).set_rng_state(stored.tensors["rng.device"])
