# SPDX-License-Identifier: Apache-2.0
"""Metrics of a run: a line of progress, metrics.jsonl, and trackers that are installed."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from importlib import import_module
from pathlib import Path
from typing import Any

import torch

from pidecode.errors import MissingDependencyError, TrainingError
from pidecode.files import atomic_write
from pidecode.strict_json import JSONError, parse_json
from pidecode.units import format_seconds

ProgressFn = Callable[[str], None]  # receives a line of text about the run's progress


class MetricLogger:
    """Metrics of one run of `steps` steps from `first` on; lines of steps that are run again are dropped."""

    def __init__(
        self, folder: Path, trackers: tuple[str, ...], steps: int, first: int, progress: ProgressFn | None
    ) -> None:
        self._path, self._steps, self._first = folder / "metrics.jsonl", steps, first
        self.message: ProgressFn = progress or (lambda _text: None)  # reports a line of text
        self._began = time.monotonic()
        self._board: Any = None
        self._wandb: Any = None
        if "tensorboard" in trackers:
            board = _tracker("torch.utils.tensorboard", "'pidecode[train]'")
            self._board = board.SummaryWriter(str(folder / "tensorboard"), purge_step=first + 1)
        if "wandb" in trackers:
            self._wandb = _tracker("wandb", "wandb").init(
                project="pidecode", dir=str(folder), mode=os.environ.get("WANDB_MODE", "offline"), resume="allow",
                id=folder.resolve().name,
            )  # fmt: skip
        kept = []
        for line in self._path.read_text(encoding="utf-8").splitlines() if self._path.exists() else ():
            with suppress(JSONError, TypeError, KeyError):  # the line a killed run was writing
                if parse_json(line)["step"] <= first:
                    kept.append(line + "\n")
        with atomic_write(self._path, overwrite=True) as file:
            file.write("".join(kept).encode())

    def log(self, step: int, values: Mapping[str, float], images: int, device: torch.device) -> None:
        """Record the metrics after `step` steps; `images` were seen since this process began."""
        seconds = max(time.monotonic() - self._began, 1e-9)
        record = {"step": step, **values, "images_per_second": images / seconds, "memory_gb": _memory(device)}
        try:
            with open(self._path, "a", encoding="utf-8") as file:
                file.write(json.dumps(record) + "\n")
        except OSError as fault:
            raise TrainingError(
                f"{self._path} could not be written: {fault}. Checkpoints are complete; fix the disk and --resume."
            ) from fault
        if self._board is not None:
            for name, value in record.items():
                self._board.add_scalar(name, value, step)
        if self._wandb is not None:
            self._wandb.log(record, step=step)
        left = seconds / max(step - self._first, 1) * (self._steps - step)
        self.message(
            f"step {step}/{self._steps}  loss {values['loss']:.4g}  {images / seconds:.2f} images/s  "
            f"{format_seconds(left)} left  {record['memory_gb']:.1f} GB"
        )

    def close(self) -> None:
        """Close the trackers."""
        if self._board is not None:
            self._board.close()
        if self._wandb is not None:
            self._wandb.finish()


def _memory(device: torch.device) -> float:
    """Most memory used so far, in GB: the accelerator's, or this process's resident set."""
    if device.type != "cpu":
        return float(getattr(torch.get_device_module(device), "max_memory_allocated", lambda: 0)()) / 1e9
    try:
        import resource
    except ImportError:  # not on Windows
        return 0.0
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6


def _tracker(module: str, package: str) -> Any:
    try:
        return import_module(module)
    except ImportError:
        name = module.rpartition(".")[2]
        raise MissingDependencyError(
            f"run.trackers names {name}, which is not installed: pip install {package}."
        ) from None
