# SPDX-License-Identifier: Apache-2.0
"""FLOP of a decode, from shapes alone, without what the engine does not compute."""

from __future__ import annotations

from pidecode.registry.configs import PiDConfig


def adapter_flops(config: PiDConfig, size: tuple[int, int]) -> int:
    """FLOP of the adapter, once per image."""
    if not config.has_adapter:
        return 0
    L, D, W = size[0] * size[1] // config.patch_size**2, config.hidden_size, config.adapter_width
    heads = config.num_injections + int(config.inject_pixels)
    gate = D if config.gate == "per_channel" else 1
    heads_and_gates = 2 * L * heads * (W * D + D * gate)
    channels = config.latent_channels // config.latent_unpatchify**2
    return 2 * L * 9 * W * (channels + W * (1 + 2 * config.adapter_blocks)) + heads_and_gates
