# SPDX-License-Identifier: Apache-2.0
"""The small encoder that ships with `tiny`, loaded through the door every encoder comes through."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import tiny_models
from pidecode.encoders.base import load_encoder
from pidecode.errors import CheckpointError, SettingError
from pidecode.models.tiny import EncoderConfig, TinyEncoder


def test_the_small_encoder_that_ships_with_tiny(tmp_path: Path) -> None:
    config = EncoderConfig(half_width=4, quarter_width=4, eighth_width=8, half_blocks=1, quarter_blocks=1)
    model = tiny_models.shake(TinyEncoder(config))
    note = {"format": 1, "kind": "encoder", "space": "flux2", "config": config.to_dict()}
    save_file(dict(model.state_dict()), tmp_path / "tiny_encoder.safetensors", {"pidecode": json.dumps(note)})
    encoder = load_encoder("flux2", tmp_path / "tiny_encoder.safetensors")
    x = torch.rand(2, 3, 32, 48, generator=torch.Generator().manual_seed(4)) * 2 - 1
    with torch.no_grad():
        assert torch.equal(encoder(x), model(x))
    assert not encoder.can_decode
    with pytest.raises(SettingError, match="came without the space's own decoder"):
        encoder.decode_native(encoder(x))
    with pytest.raises(CheckpointError, match="into space flux2, not sdxl"):
        load_encoder("sdxl", tmp_path / "tiny_encoder.safetensors")
