# SPDX-License-Identifier: Apache-2.0
"""A teacher with random weights, and a cache of two images of its latents."""

from __future__ import annotations

import pytest
import torch

from pidecode.training.tiny.cache import LatentCache, add_image
from pidecode.training.tiny.procedural import procedural_image
from pidecode.training.tiny.teacher import TeacherAutoencoder


@pytest.fixture(scope="module")
def teacher() -> TeacherAutoencoder:
    """The real class with random weights."""
    torch.manual_seed(0)
    return TeacherAutoencoder().eval().requires_grad_(False)


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory, teacher: TeacherAutoencoder) -> LatentCache:
    folder = tmp_path_factory.mktemp("cache")
    for seed in range(2):
        image = procedural_image("dead_leaves", 192, seed)
        add_image(folder, f"leaves{seed}", image, {"teacher": teacher.encode})
    return LatentCache(folder, {"teacher": 1.0})
