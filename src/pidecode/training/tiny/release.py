# SPDX-License-Identifier: Apache-2.0
"""From a joint training state to weights files."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from pidecode.encoders.tiny import load_tiny_encoder
from pidecode.errors import SettingError, TrainingError
from pidecode.models.regressor import Regressor, into_pixelnet, out_of_pixelnet
from pidecode.models.tiny import EncoderConfig, TinyEncoder
from pidecode.registry.checkpoints import APACHE_2, STUDENT_TIMES, TINY_ENCODER
from pidecode.registry.configs import PiDConfig
from pidecode.registry.spaces import get_space
from pidecode.training.tiny.joint_stage import Pair
from pidecode.training.tiny.state import load_state
from pidecode.weights.detect import detect
from pidecode.weights.load import build_network
from pidecode.weights.metadata import CheckpointMetadata
from pidecode.weights.read import read_weights
from pidecode.weights.safetensors import write_safetensors

CREDITS = "Trained on CC0, public-domain and CC-BY images; the credits in ATTRIBUTION.md travel with these weights."


def load_pair(state_path: Path) -> Pair:
    """The averaged networks of a joint state. Raises TrainingError without one."""
    return _pair(_state(state_path))


def released_pair(decoder: Path, encoder: Path) -> Pair:
    """The networks behind two released files. Raises CheckpointError or SettingError where they are none of these."""
    file = read_weights(decoder)
    config = detect(file).config
    if config is None:
        raise SettingError(f"{decoder} holds no decoder; name a released tiny.safetensors.")
    net = build_network(file.tensors, config, dtype=torch.float32, device="cpu", source=str(decoder))
    own = load_tiny_encoder(encoder, get_space("flux2"), torch.float32).model
    return Pair(out_of_pixelnet(net), own.requires_grad_(True).train())


def release_decoder(state_path: Path, folder: Path, *, variant: str) -> Path:
    """Write the averaged decoder of a joint state as a whole student network, float16, named after the variant.

    Raises TrainingError without a state.
    """
    state = _state(state_path)
    net = into_pixelnet(_pair(state).decoder)
    student = CheckpointMetadata(
        kind="student", config=net.config, space="flux2", variant=variant, license=APACHE_2.name,
        times=STUDENT_TIMES, extra=_extra(state),
    )  # fmt: skip
    path = folder / f"{variant}.safetensors"
    write_safetensors(path, net.state_dict(), student.to_metadata(), dtype=torch.float16, overwrite=True)
    return path


def release_encoder(state_path: Path, folder: Path, *, rounds: int | None = None) -> Path:
    """Write the averaged encoder of a joint state, float16. Raises TrainingError without a state.

    rounds: how often it shall correct its latent, where that is not as often as it was trained to.
    """
    state = _state(state_path)
    model = _pair(state).encoder
    config = model.config if rounds is None else replace(model.config, rounds=rounds)
    encoder = CheckpointMetadata(
        kind="encoder", config=None, space="flux2", variant="tiny", license=APACHE_2.name,
        extra={**_extra(state), "config": config.to_dict()},
    )  # fmt: skip
    path = folder / TINY_ENCODER
    write_safetensors(path, model.state_dict(), encoder.to_metadata(), dtype=torch.float16, overwrite=True)
    return path


def _extra(state: dict[str, Any]) -> dict[str, Any]:
    return {"credits": CREDITS, "trained": {"joint_steps": state["step"], "joint_seconds": round(state["used"])}}


def _state(path: Path) -> dict[str, Any]:
    state = load_state(path)
    if state is None:
        raise TrainingError(f"{path} does not exist; run the joint stage first.")
    return state


def _pair(state: dict[str, Any]) -> Pair:
    decoder = Regressor(PiDConfig.from_dict(state["decoder_config"]))
    pair = Pair(decoder, TinyEncoder(EncoderConfig.from_dict(state["encoder_config"])))
    pair.load_state_dict(state["average"])
    return pair
