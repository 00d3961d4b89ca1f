# SPDX-License-Identifier: Apache-2.0
"""From trained networks to others, without training: deeper ones, an encoder with corrections, a crisper decoder."""

from __future__ import annotations

import copy
from dataclasses import replace

import torch
from torch import Tensor, nn

from pidecode.errors import SettingError
from pidecode.facts.architecture import NetConfig
from pidecode.model.encoder import EncoderConfig, ImageEncoder
from pidecode.model.regressor import Regressor

GAIN = 0.3
"""How much of an error an encoder's corrections first add to the picture: more helps more at once, but swings."""


@torch.no_grad()
def grown(regressor: Regressor, config: NetConfig) -> Regressor:
    """A regressor of `config`: at least as many blocks at each level, and as many levels or one finer one more.

    New blocks come last at each level and are the identity. A finer level starts by handing on what comes from below
    it, and each of its cells gives the pixels a quarter of what the cell below gave them. Raises SettingError where
    another size differs or shrinks.
    """
    old, deeper = regressor.config.adapter_levels, Regressor(config)
    levels = config.adapter_levels
    if len(levels) - len(old) not in (0, 1) or any(now < before for now, before in zip(levels, old, strict=False)):
        raise SettingError(f"A regressor of adapter_levels {old} does not grow to {levels}: none may shrink.")
    wanted = deeper.state_dict()
    for name, value in regressor.state_dict().items():
        if len(levels) > len(old):
            if "output_heads" in name:  # not a part of what a regressor computes
                continue
            value = _spread(value, round(regressor.config.adapter_fold)) if name == "adapter.pit_head.weight" else value
        if name not in wanted or wanted[name].shape != value.shape:
            raise SettingError(f"{name} does not fit: a regressor grows in adapter_levels only.")
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


@torch.no_grad()
def accentuated(regressor: Regressor, accent: float) -> Regressor:
    """The same regressor with the waves within each patch stronger by up to `accent`, which is 0 for no change.

    A squared error makes a picture's waves weaker the less of them is known. What is there is still right, so a tenth
    or two more costs nearly nothing of it. Waves of two patches' length stay as they are, so colours do too; those of
    half a patch and shorter get all of it.
    """
    side = regressor.config.patch_size
    number, place = torch.arange(side, dtype=torch.float64)[:, None], torch.arange(side, dtype=torch.float64)
    waves = (torch.pi * (2 * place + 1) * number / (2 * side)).cos() * (2 / side) ** 0.5
    waves[0] /= 2**0.5
    frequency = (number.square() + number.mT.square()).sqrt()  # in half waves a patch, across and down
    gain = 1 + accent * ((frequency - 1) / 3).clamp(0, 1)
    other = copy.deepcopy(regressor)
    for layer in other.to_pixels.parameters():
        patches = layer.double().view(3, side, side, -1)
        known = torch.einsum("ur,vc,krcf->kuvf", waves, waves, patches) * gain[..., None]
        layer.copy_(torch.einsum("ur,vc,kuvf->krcf", waves, waves, known).reshape(layer.shape))
    return other


def grown_encoder(encoder: ImageEncoder, config: EncoderConfig) -> ImageEncoder:
    """An encoder of `config`: as wide and with as many rounds, and at least as many blocks at each level.

    New blocks come last at each level, in both of its parts, and are the identity. Raises SettingError where another
    size differs or shrinks.
    """
    deeper = ImageEncoder(config)
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


def with_corrections(encoder: ImageEncoder, rounds: int) -> ImageEncoder:
    """`encoder` with a corrector that starts as itself, reading GAIN of an error as if it were part of the picture.

    That already helps: what is added to the picture before it is encoded comes back in what is decoded.
    """
    corrected = ImageEncoder(replace(encoder.config, rounds=rounds))
    own = encoder.state_dict()
    tensors = own | {f"corrector.{name}": value for name, value in own.items()}
    tensors["corrector.stem.weight"] = torch.cat((own["stem.weight"], GAIN * own["stem.weight"]), dim=1)
    corrected.load_state_dict(tensors)
    return corrected


def with_rounds(encoder: ImageEncoder, rounds: int) -> ImageEncoder:
    """The same encoder, set to correct its latent so often. Raises SettingError for one that has no corrections."""
    if not encoder.config.rounds:
        raise SettingError("This encoder corrects nothing; give it corrections first.")
    again = ImageEncoder(replace(encoder.config, rounds=rounds))
    again.load_state_dict(encoder.state_dict())
    return again


def with_first_guess(encoder: ImageEncoder, other: ImageEncoder) -> ImageEncoder:
    """The corrections of `encoder` after the first guess of `other`, an encoder of the same shape."""
    own, guess = encoder.state_dict(), other.state_dict()
    mixed = ImageEncoder(encoder.config)
    mixed.load_state_dict({name: (own if name.startswith("corrector.") else guess)[name] for name in own})
    return mixed
