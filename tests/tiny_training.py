# SPDX-License-Identifier: Apache-2.0
"""The networks of `tiny` at debug_config size, what their training reports, and folders to train from."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors.torch import save_file

from pidecode.models.regressor import Regressor
from pidecode.models.tiny import EncoderConfig
from pidecode.training.tiny.cache import LatentCache
from pidecode.training.tiny.decoder_stage import tiny_config
from pidecode.training.tiny.procedural import procedural_image
from pidecode.training.tiny.teacher import TeacherAutoencoder

# As narrow as the teacher's features allow.
SMALL = replace(tiny_config(), adapter_stages=(1, 1, 1, 1), pixel_attn_hidden_size=16)
ENCODER = EncoderConfig(half_blocks=1, quarter_blocks=1, eighth_width=16, eighth_blocks=1)


def parts(line: str) -> dict[str, float]:
    """The named numbers of a progress line."""
    words = line.split("s ", 1)[1].split(" rate ")[0].split()
    return dict(zip(words[::2], map(float, words[1::2]), strict=True))


def started(cache: LatentCache) -> Regressor:
    """A regressor at its start values, with blocks that do something."""
    torch.manual_seed(0)
    regressor = Regressor(SMALL)
    regressor.start_from_patches(cache.crops(16, 128, np.random.default_rng(0)).target)
    for name, parameter in regressor.named_parameters():
        if ".block.5." in name:
            torch.nn.init.normal_(parameter, std=0.02)
    return regressor


def folders(tmp_path: Path, teacher: TeacherAutoencoder, side: int) -> tuple[Path, Path]:
    """A folder of three images, and one of the teacher's two files."""
    data, weights = tmp_path / "data", tmp_path / "teacher"
    data.mkdir()
    weights.mkdir()
    for name in ("a.png", "b.png", "c.png"):
        Image.fromarray(procedural_image("line_art", side, ord(name[0]))).save(data / name)
    for part in ("encoder", "decoder"):
        save_file(getattr(teacher, part).state_dict(), weights / f"taef2_{part}.safetensors")
    return data, weights
