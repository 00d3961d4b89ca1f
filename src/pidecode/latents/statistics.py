# SPDX-License-Identifier: Apache-2.0
"""Does a latent look like the frame it claims? Evidence from its spread, never proof."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from pidecode.facts.spaces import LatentSpace
from pidecode.latents.frames import noise_weights

# Below this many cells a spread says too little.
_FEWEST_CELLS = 16
# Image models leave their schedule by some per cent; the bounds give way by as much.
_SLACK = 1.15
# A latent at noise level s holds that noise: a spread this far below s contradicts it.
_LEAST_NOISE = 0.75
# Unit deviation is what "normalized" means: it is never counted against a latent, whatever its sigma.
_UNIT = 1.1


class FrameWarning(UserWarning):
    """A latent whose statistics do not look like the normalized frame at its sigma."""


def frame_evidence(tensor: Tensor, space: LatentSpace, sigmas: Tensor) -> str | None:
    """What speaks against `tensor` `[B, C, h, w]` being a normalized latent of `space` at noise levels `[B]`.

    None when nothing does. Judged by the spread (each channel's standard deviation over its cells,
    root-mean-square over channels), which for flat pictures is small whatever the frame and so never
    counts against a clean latent; noise adds its own known share. Raw sd3 latents are narrower than
    normalized ones and cannot be told from flat pictures, unless noise is in them.
    """
    cells = tensor.shape[-2] * tensor.shape[-1]
    if cells < _FEWEST_CELLS:
        return None
    wide = tensor.detach().float()
    spreads = wide.var(dim=(2, 3)).mean(dim=1).sqrt()
    sigma = sigmas.to(spreads)
    signal, noise = noise_weights(space, sigma)
    doubt = 1.0 + 4.0 / math.sqrt(2.0 * cells * tensor.shape[1])  # four standard errors of a deviation
    most = (((signal * space.spread_limit) ** 2 + noise**2).sqrt() * _SLACK).clamp_min(_UNIT) * doubt
    least = noise * _LEAST_NOISE / doubt
    for index, (spread, high, low, level) in enumerate(torch.stack([spreads, most, least, sigma], dim=1).tolist()):
        which = f"Sample {index} of this" if tensor.shape[0] > 1 else "This"
        if spread > high:
            return (
                f"{which} {space.name} latent has a spread of {spread:.2f} within its channels; a normalized one "
                f"at sigma {level:g} stays below {high:.2f} (photographs: 0.6 to 1 when clean). {_wider(space)}"
            )
        if spread < low:
            return (
                f"{which} {space.name} latent has a spread of {spread:.2f} within its channels, less than the noise "
                f"of sigma {level:g} alone gives. Check sigma, and that the latent was not scaled: a raw latent "
                "belongs in Latent.from_raw()."
            )
    return _token_evidence(wide, space, sigma)


def _wider(space: LatentSpace) -> str:
    mends = []
    if space.raw_std is not None and space.raw_std > 1:
        mends.append(
            f"A raw {space.name} latent is {space.raw_std:g} times wider than a normalized one: "
            "if it is raw, build it with Latent.from_raw()."
        )
    if space.noise_frame == "variance_preserving":
        mends.append("If it comes from an Euler scheduler before its last step, use Latent.from_euler().")
    else:
        mends.append("If noise is still in it, pass its sigma.")
    return " ".join(mends)


def _token_evidence(wide: Tensor, space: LatentSpace, sigma: Tensor) -> str | None:
    """Clean RAE features betray a missing or a superfluous step by their mean and deviation over channels."""
    if space.statistics not in ("per_position", "layer_norm") or bool((sigma > 0).any()):
        return None
    variance, mean = torch.var_mean(wide, dim=1, correction=0)
    off = torch.maximum(mean.abs(), (variance.sqrt() - 1).abs())
    if space.statistics == "per_position" and float(off.max()) < 0.01:
        return (
            f"Every cell of this {space.name} latent has mean 0 and deviation 1 over its channels: it is the "
            "output of the LayerNorm, before the statistics per position. Build it with Latent.from_raw(), giving "
            "those."
        )
    if space.statistics == "layer_norm" and float(off.median()) > 0.3:
        return (
            f"The cells of this {space.name} latent are {float(off.median()):.2f} away from mean 0 and "
            "deviation 1 over "
            "channels, which its LayerNorm gives. Build it with Latent.from_raw() if it is the encoder's hidden state."
        )
    return None
