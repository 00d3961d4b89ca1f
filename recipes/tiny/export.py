# SPDX-License-Identifier: Apache-2.0
"""Weights files of a run's newest checkpoint: moving averages to `tiny.safetensors` and `tiny_encoder.safetensors`.

    python recipes/tiny/export.py runs/tiny --out weights

`--average OTHER 0.4` averages them with 0.4 of the files in the folder OTHER: the ends of a few runs averaged are worth
more than another thousand steps.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor
from train import PHASES

from pidecode.errors import PidecodeError, TrainingError
from pidecode.files import writable_folder
from pidecode.models.tiny import TinyDecoder, TinyEncoder
from pidecode.registry.checkpoints import APACHE_2
from pidecode.training.checkpoint import newest_checkpoint
from pidecode.weights.metadata import CheckpointMetadata
from pidecode.weights.safetensors import write_safetensors

CREDITS = (
    "Trained on CC0, public-domain, CC-BY and CC-BY-SA images; the credits in ATTRIBUTION.md travel with these weights."
)
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


def mixed(tensors: dict[str, Tensor], file_name: str, average: Mapping[Path, float]) -> dict[str, Tensor]:
    """The weighted mean of tensors, whose share is what is left of 1, and those of a file in each of some folders.

    Raises:
        TrainingError: The shares are out of range, or a file holds other tensors.
    """
    own = 1 - sum(average.values())
    if not 0 <= own <= 1 or any(not 0 <= share <= 1 for share in average.values()):
        raise TrainingError(f"The shares are {list(average.values())}; each and their sum must be from 0 to 1.")
    result = {name: own * tensor.float() for name, tensor in tensors.items()}
    for folder, share in average.items():
        path = folder / file_name
        if not path.is_file():
            raise TrainingError(f"{folder} holds no {file_name} to average with.")
        other = load_file(path)
        shapes = {name: tensor.shape for name, tensor in other.items()}
        if shapes != {name: tensor.shape for name, tensor in tensors.items()}:
            raise TrainingError(f"{path} is of another shape than the run's, so they have no mean.")
        for name, tensor in other.items():
            result[name] += share * tensor.float()
    return result


def export_weights(
    run: Path, out: Path, dtype: torch.dtype = torch.float16, average: Mapping[Path, float] | None = None
) -> list[Path]:
    """Write the weights files of a run, as far as it trained them, averaged with shares of those in other folders.

    Raises:
        TrainingError: The run holds no checkpoint, or the average cannot be taken.
    """
    shapes = json.loads((run / "models.json").read_text(encoding="utf-8")) if (run / "models.json").is_file() else {}
    written: list[Path] = []
    for name, file_name in FILES.items():
        found = averaged_tensors(run, name)
        if found is None:
            continue
        tensors, trained = found
        tensors = mixed(tensors, file_name, average or {})
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
    parser.add_argument("--average", nargs=2, action="append", default=[], metavar=("FOLDER", "SHARE"),
                        help="average with this share of the weights files in a folder; repeatable")  # fmt: skip
    given = parser.parse_args()
    try:
        try:
            average = {Path(folder): float(share) for folder, share in given.average}
        except ValueError as fault:
            parser.error(f"--average takes a folder and a share from 0 to 1: {fault}")
        for path in export_weights(given.run, given.out, average=average):
            print(path)
    except PidecodeError as fault:
        sys.exit(str(fault))


if __name__ == "__main__":
    main()
