# SPDX-License-Identifier: Apache-2.0
"""From trained networks to others, without training: deeper ones, one between two, an encoder with corrections."""

from __future__ import annotations

import copy
from dataclasses import replace

import torch
from torch import Tensor, nn

from pidecode.errors import SettingError
from pidecode.models.regressor import Regressor
from pidecode.models.tiny import EncoderConfig, TinyEncoder
from pidecode.registry.configs import PiDConfig

GAIN = 0.3
"""How much of an error an encoder's corrections first add to the image: more helps more at once, but swings."""


@torch.no_grad()
def grown(regressor: Regressor, config: PiDConfig) -> Regressor:
    """A regressor of `config`: at least as many blocks at each level, and as many levels or one finer one more.

    New blocks come last at each level and are the identity. A finer level starts by handing on what comes from below
    it, and each of its cells gives the pixels a quarter of what the cell below gave them. Raises SettingError where
    another size differs or shrinks.
    """
    old, deeper = regressor.config.adapter_stages, Regressor(config)
    levels = config.adapter_stages
    if len(levels) - len(old) not in (0, 1) or any(now < before for now, before in zip(levels, old, strict=False)):
        raise SettingError(f"A regressor of adapter_stages {old} does not grow to {levels}: none may shrink.")
    wanted = deeper.state_dict()
    for name, value in regressor.state_dict().items():
        if len(levels) > len(old):
            if "output_heads" in name:  # not a part of what a regressor computes
                continue
            value = _spread(value, round(regressor.config.adapter_fold)) if name == "adapter.pit_head.weight" else value
        if name not in wanted or wanted[name].shape != value.shape:
            raise SettingError(f"{name} does not fit: a regressor grows in adapter_stages only.")
        wanted[name] = value
    if len(levels) > len(old):
        start = f"adapter.latent_proj.levels.{len(old)}.0."
        nn.init.dirac_(wanted[start + "weight"])
        nn.init.zeros_(wanted[start + "bias"])
    deeper.load_state_dict(wanted)
    return deeper


def _spread(weight: Tensor, fold: int) -> Tensor:
    """Weights [out, channels fold^2] that read a grid's cells, for its doubled grid in nearest enlargement."""
    cells = weight.unflatten(1, (-1, fold, fold)) / 4
    spread: Tensor = cells.repeat_interleave(2, dim=-1).repeat_interleave(2, dim=-2).flatten(1)
    return spread


def between(first: Regressor, second: Regressor, share: float) -> Regressor:
    """A regressor that is `share` of the way from the weights of `first` to those of `second`, which has its shape.

    Where one was trained from the other it is often better than both.
    """
    mixed, theirs = copy.deepcopy(first), second.state_dict()
    mixed.load_state_dict({name: torch.lerp(value, theirs[name], share) for name, value in first.state_dict().items()})
    return mixed


def grown_encoder(encoder: TinyEncoder, config: EncoderConfig) -> TinyEncoder:
    """An encoder of `config`: as wide and with as many rounds, and at least as many blocks at each level.

    New blocks come last at each level, in both of its parts, and are the identity. Raises SettingError where another
    size differs or shrinks.
    """
    deeper = TinyEncoder(config)
    wanted = deeper.state_dict()
    for name, value in encoder.state_dict().items():
        if name not in wanted or wanted[name].shape != value.shape:
            raise SettingError(f"{name} does not fit: an encoder grows in blocks only, and none may shrink.")
        wanted[name] = value
    kinds = ("width", "channels", "rounds")
    if any(getattr(config, name) != value for name, value in encoder.config.to_dict().items() if name.endswith(kinds)):
        raise SettingError(f"An encoder of {encoder.config} does not grow to {config}: only its blocks may differ.")
    deeper.load_state_dict(wanted)
    return deeper


def with_corrections(encoder: TinyEncoder, rounds: int) -> TinyEncoder:
    """`encoder` with a corrector that starts as itself, reading GAIN of an error as if it were part of the image.

    That already helps: what is added to the image before it is encoded comes back in what is decoded.
    """
    corrected = TinyEncoder(replace(encoder.config, rounds=rounds))
    own = encoder.state_dict()
    tensors = own | {f"corrector.{name}": value for name, value in own.items()}
    tensors["corrector.stem.weight"] = torch.cat((own["stem.weight"], GAIN * own["stem.weight"]), dim=1)
    corrected.load_state_dict(tensors)
    return corrected


def with_rounds(encoder: TinyEncoder, rounds: int) -> TinyEncoder:
    """The same encoder, set to correct its latent so often. Raises SettingError for one that has no corrections."""
    if not encoder.config.rounds:
        raise SettingError("This encoder corrects nothing; give it corrections first.")
    again = TinyEncoder(replace(encoder.config, rounds=rounds))
    again.load_state_dict(encoder.state_dict())
    return again
