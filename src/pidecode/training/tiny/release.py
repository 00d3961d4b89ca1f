# SPDX-License-Identifier: Apache-2.0
"""From the joint training state to the two files that ship in the package."""

from __future__ import annotations

from pathlib import Path

import torch

from pidecode.errors import TrainingError
from pidecode.facts.architecture import NetConfig
from pidecode.facts.checkpoints import APACHE_2, STUDENT_TIMES, TINY_ENCODER
from pidecode.model.encoder import EncoderConfig
from pidecode.training.tiny.joint_stage import Pair
from pidecode.training.tiny.regressor import into_pixelnet
from pidecode.training.tiny.state import load_state
from pidecode.weights.identity import Identity
from pidecode.weights.write import write_safetensors

CREDITS = "Trained on CC0, public-domain and CC-BY pictures; the credits in ATTRIBUTION.md travel with these weights."


def release_pair(state_path: Path, folder: Path) -> tuple[Path, Path]:
    """Write the averaged weights of a joint state as a whole student network and its encoder, float16.

    Raises TrainingError without a state.
    """
    state = load_state(state_path)
    if state is None:
        raise TrainingError(f"{state_path} does not exist; run the joint stage first.")
    pair = Pair(NetConfig.from_dict(state["decoder_config"]), EncoderConfig.from_dict(state["encoder_config"]))
    pair.load_state_dict(state["average"])
    net = into_pixelnet(pair.decoder)
    trained = {"joint_steps": state["step"], "joint_seconds": round(state["used"])}
    extra = {"credits": CREDITS, "trained": trained}
    student = Identity(
        kind="student", config=net.config, space="flux2", variant="tiny", licence=APACHE_2.name,
        times=STUDENT_TIMES, extra=extra,
    )  # fmt: skip
    encoder = Identity(
        kind="encoder", config=None, space="flux2", variant="tiny", licence=APACHE_2.name,
        extra={**extra, "config": pair.encoder.config.to_dict()},
    )  # fmt: skip
    paths = folder / "tiny.safetensors", folder / TINY_ENCODER
    write_safetensors(paths[0], net.state_dict(), student.to_metadata(), dtype=torch.float16, overwrite=True)
    write_safetensors(paths[1], pair.encoder.state_dict(), encoder.to_metadata(), dtype=torch.float16, overwrite=True)
    return paths
