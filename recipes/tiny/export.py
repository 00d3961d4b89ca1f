# SPDX-License-Identifier: Apache-2.0
"""Weights files of a run's newest checkpoint: moving averages to `tiny.safetensors` and `tiny_encoder.safetensors`.

python recipes/tiny/export.py runs/tiny --out weights
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from train import PHASES

from pidecode.errors import PidecodeError, TrainingError
from pidecode.files import writable_folder
from pidecode.models.tiny import TinyDecoder, TinyEncoder
from pidecode.registry.checkpoints import APACHE_2
from pidecode.training.checkpoint import newest_checkpoint
from pidecode.weights.metadata import CheckpointMetadata
from pidecode.weights.safetensors import write_safetensors

CREDITS = "Trained on CC0, public-domain and CC-BY images; the credits in ATTRIBUTION.md travel with these weights."
FILES = {"decoder": "tiny.safetensors", "encoder": "tiny_encoder.safetensors"}


def averaged_tensors(run: Path, name: str) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
    """The newest moving average of a module, and how long it was trained; None if no phase trained it."""
    trained: dict[str, Any] = {}
    tensors: dict[str, Tensor] = {}
    for phase in PHASES:
        stored = newest_checkpoint(run / phase / "checkpoints")
        prefixes = (f"weights.{name}.", f"ema.{name}.")
        if stored is None or not any(key.startswith(prefixes[0]) for key in stored.tensors):
            continue
        tensors = {
            key.removeprefix(prefix): value
            for prefix in prefixes
            for key, value in stored.tensors.items()
            if key.startswith(prefix)
        }
        trained[phase] = stored.step
    return (tensors, trained) if tensors else None


def export_weights(run: Path, out: Path, dtype: torch.dtype = torch.float16) -> list[Path]:
    """Write the weights files of a run, as far as it trained them.

    Raises:
        TrainingError: The run holds no checkpoint.
    """
    shapes = json.loads((run / "models.json").read_text(encoding="utf-8")) if (run / "models.json").is_file() else {}
    written: list[Path] = []
    for name, file_name in FILES.items():
        found = averaged_tensors(run, name)
        if found is None:
            continue
        tensors, trained = found
        extra: dict[str, Any] = {"credits": CREDITS, "trained": trained}
        if name == "decoder":
            config = type(TinyDecoder().config).from_dict(shapes[name])
            TinyDecoder(config).load_state_dict(tensors)
            kind: Any = "feed-forward"
        else:
            TinyEncoder(type(TinyEncoder().config).from_dict(shapes[name])).load_state_dict(tensors)
            config, kind = None, "encoder"
            extra["config"] = shapes[name]
        metadata = CheckpointMetadata(
            kind=kind, config=config, space="flux2", variant="tiny", license=APACHE_2.name, extra=extra
        )
        writable_folder(out)
        write_safetensors(out / file_name, tensors, metadata.to_metadata(), dtype=dtype, overwrite=True)
        written.append(out / file_name)
    if not written:
        raise TrainingError(f"{run} holds no checkpoint of {' or '.join(PHASES)}.")
    return written


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("run", type=Path, help="folder of the run")
    parser.add_argument("--out", type=Path, required=True, help="folder of the weights files")
    given = parser.parse_args()
    try:
        for path in export_weights(given.run, given.out):
            print(path)
    except PidecodeError as fault:
        sys.exit(str(fault))


if __name__ == "__main__":
    main()
