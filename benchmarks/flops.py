# SPDX-License-Identifier: Apache-2.0
"""FLOP of a decode, from shapes alone, without what the engine does not compute."""

from __future__ import annotations

from pidecode.registry.configs import PiDConfig


def step_flops(config: PiDConfig, size: tuple[int, int]) -> int:
    """FLOP of one denoising step of width x height pixels, without the adapter and the timestep embedding."""
    D, F, P = config.hidden_size, config.mlp_width, config.patch_size**2
    L = size[0] * size[1] // P
    N = config.text_length if config.has_text else 0
    linears, depth = 4 * D * D + 3 * D * F, config.patch_depth
    total = 2 * L * 3 * P * D + depth * 2 * (L + N) * linears + depth * 4 * (L + N) ** 2 * D
    if N:  # the last block's prompt gives keys and values only
        total -= 2 * N * (linears - 2 * D * D) + 4 * N * (L + N) * D
    gate = D if config.gate == "per_channel" else 1
    total += (config.num_injections + int(config.inject_pixels)) * 2 * L * D * gate
    C, A = config.pixel_hidden_size, config.pixel_attn_hidden_size
    block = 2 * L * (6 * D * P * C + 2 * P * C * A + 4 * A * A + P * 8 * C * C) + 4 * L * L * A
    return total + config.pixel_depth * block + 2 * L * P * 6 * C


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
