# SPDX-License-Identifier: Apache-2.0
"""Shapes to plan for and to measure: the released ones, and smaller ones. Speed does not depend on the weights."""

from __future__ import annotations

from pidecode.registry.configs import PiDConfig, debug_config, v1, v1pt5

NETWORKS: dict[str, PiDConfig] = {
    "tiny": debug_config(),
    "small": PiDConfig(
        hidden_size=256, num_heads=4, patch_depth=6, pixel_attn_hidden_size=192, pixel_num_heads=4,
        adapter_width=256, adapter_padding="replicate", gate="per_token", inject_pixels=True,
        rope_reference=(2048, 2048),
    ),
    "v1": v1(latent_channels=16, latent_down=8),
    "v1.5": v1pt5(latent_channels=16, latent_down=8),
}  # fmt: skip
"""By name. The released networks of one version differ by less than a hundredth from space to space."""
