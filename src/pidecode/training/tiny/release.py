# SPDX-License-Identifier: Apache-2.0
"""From the joint training state to the two files that ship in the package."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from pidecode.errors import TrainingError
from pidecode.facts.architecture import NetConfig
from pidecode.facts.checkpoints import APACHE_2, STUDENT_TIMES
from pidecode.model.encoder import EncoderConfig, ImageEncoder
from pidecode.training.tiny.joint_stage import Pair
from pidecode.training.tiny.regressor import Regressor, into_pixelnet
from pidecode.training.tiny.state import load_state
from pidecode.weights.identity import Identity
from pidecode.weights.write import write_safetensors

CREDITS = "Trained on CC0, public-domain and CC-BY pictures; the credits in ATTRIBUTION.md travel with these weights."


def load_pair(state_path: Path) -> Pair:
    """The averaged networks of a joint state. Raises TrainingError without one."""
    return _pair(_state(state_path))


def release(state_path: Path, folder: Path, *, variant: str) -> tuple[Path, Path]:
    """Write the averaged weights of a joint state as a whole student network and its encoder, float16.

    The files are named after the variant. Raises TrainingError without a state.
    """
    state = _state(state_path)
    pair = _pair(state)
    net = into_pixelnet(pair.decoder)
    trained = {"joint_steps": state["step"], "joint_seconds": round(state["used"])}
    extra = {"credits": CREDITS, "trained": trained}
    student = Identity(
        kind="student", config=net.config, space="flux2", variant=variant, licence=APACHE_2.name,
        times=STUDENT_TIMES, extra=extra,
    )  # fmt: skip
    encoder = Identity(
        kind="encoder", config=None, space="flux2", variant=variant, licence=APACHE_2.name,
        extra={**extra, "config": pair.encoder.config.to_dict()},
    )  # fmt: skip
    paths = folder / f"{variant}.safetensors", folder / f"{variant}_encoder.safetensors"
    write_safetensors(paths[0], net.state_dict(), student.to_metadata(), dtype=torch.float16, overwrite=True)
    write_safetensors(paths[1], pair.encoder.state_dict(), encoder.to_metadata(), dtype=torch.float16, overwrite=True)
    return paths


def _state(path: Path) -> dict[str, Any]:
    state = load_state(path)
    if state is None:
        raise TrainingError(f"{path} does not exist; run the joint stage first.")
    return state


def _pair(state: dict[str, Any]) -> Pair:
    decoder = Regressor(NetConfig.from_dict(state["decoder_config"]))
    pair = Pair(decoder, ImageEncoder(EncoderConfig.from_dict(state["encoder_config"])))
    pair.load_state_dict(state["average"])
    return pair
