# SPDX-License-Identifier: Apache-2.0
"""The shape of `tiny` as a PiD configuration, for tests of the networks that still read it."""

from __future__ import annotations

from pidecode.registry.configs import PiDConfig


def tiny_config() -> PiDConfig:
    """A multi-scale adapter up to the small image's own grid, one patch block, one pixel block."""
    return PiDConfig(
        hidden_size=256, num_heads=4, patch_depth=1, patch_size=16,
        pixel_hidden_size=4, pixel_depth=1, pixel_attn_hidden_size=32, pixel_num_heads=2,
        text_dim=0, latent_channels=128, latent_down=16, latent_unpatchify=2,
        adapter_width=1024, adapter_stages=(16, 8, 12, 6), adapter_padding="replicate", gate="per_token",
        inject_pixels=True, rope_reference=(1024, 1024), prediction="x0",
    )  # fmt: skip
