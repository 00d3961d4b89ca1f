# SPDX-License-Identifier: Apache-2.0
"""Shapes of networks to measure. Speed and memory do not depend on the weights, so these get random ones."""

from __future__ import annotations

from pidecode.registry.configs import PID_CONFIGS, PiDConfig, debug_config

CONFIGS: dict[str, PiDConfig] = {
    "debug": debug_config(),
    "v1.5-narrow": PiDConfig(
        hidden_size=256, num_heads=4, patch_depth=6, pixel_attn_hidden_size=192, pixel_num_heads=4,
        adapter_width=256, adapter_padding="replicate", gate="per_token", inject_pixels=True,
        rope_reference=(2048, 2048),
    ),
    **PID_CONFIGS,
}  # fmt: skip
"""The released shapes by version; "v1.5-narrow" is v1.5's architecture at a size for CPUs, "debug" the tests' model."""
