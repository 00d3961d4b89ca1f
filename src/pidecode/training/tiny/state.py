# SPDX-License-Identifier: Apache-2.0
"""Training states on disk, written so that a killed run finds the last whole one."""

from __future__ import annotations

import os
import pickle
from pathlib import Path
from typing import Any

import torch

from pidecode.errors import TrainingError


def save_state(path: Path, state: dict[str, Any]) -> None:
    """Write beside, flush to the disk, then rename: `path` is always a complete state or absent."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".part")
    with part.open("wb") as handle:
        torch.save(state, handle)
        handle.flush()
        os.fsync(handle.fileno())
    os.replace(part, path)


def load_state(path: Path) -> dict[str, Any] | None:
    """The state at `path`, or None when there is none. Raises TrainingError when the file is no training state."""
    if not path.exists():
        return None
    try:
        state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
    except (RuntimeError, pickle.UnpicklingError, EOFError, OSError) as error:
        raise TrainingError(f"{path} is not a training state ({error}); remove it to start again.") from error
    return state
