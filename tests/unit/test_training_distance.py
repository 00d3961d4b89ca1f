# SPDX-License-Identifier: Apache-2.0
"""The whole way in debug_config: a teacher is trained and distilled, and four steps come near its twenty-five."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from pidecode.training.config import TrainConfig, apply_settings
from pidecode.training.dataloader import DataLoader, make_encoders
from pidecode.training.dataset import find_images
from pidecode.training.denoiser import Denoiser
from pidecode.training.distributed import DistEnv
from pidecode.training.models import initial_weights, load_initial_weights, new_network
from pidecode.training.recipes import get_recipe
from pidecode.training.tasks import sample, train

CPU = torch.device("cpu")


def generated(weights: Path, recipe: TrainConfig) -> tuple[Tensor, Tensor]:
    """What a decoder paints of both images with two seeds each, and the images."""
    net = new_network(recipe.net, 0)
    load_initial_weights(net, initial_weights(str(weights)), str(weights))
    denoiser = Denoiser(net.eval().requires_grad_(False))
    loader = DataLoader(recipe, find_images(recipe.data.source), make_encoders(recipe, CPU), DistEnv(CPU))
    batches = [(batch, seed) for batch in loader.sample_batches(2) for seed in range(2)]
    loader.close()
    images = [sample(denoiser, batch, recipe, seed=seed) for batch, seed in batches]
    return torch.cat(images), torch.cat([batch.image for batch, _ in batches])


def distance(first: Tensor, second: Tensor) -> float:
    """Root-mean-square difference of images in [-1, 1]."""
    return float((first - second).square().mean().sqrt())


@pytest.mark.slow
def test_the_four_step_student_comes_near_the_teacher(tmp_path: Path) -> None:
    rows, columns = np.mgrid[0:64, 0:64] / 64
    (tmp_path / "images").mkdir()
    for index, (first, second) in enumerate(((rows, columns), (columns * rows, 1 - rows))):
        pixels = np.stack((first, second, np.hypot(rows - 0.5, columns - 0.5)), axis=-1)
        Image.fromarray((255 * pixels).astype(np.uint8)).save(tmp_path / "images" / f"{index}.png")
        (tmp_path / "images" / f"{index}.txt").write_text(f"image {index}")
    common = [
        f"data.source={str(tmp_path / 'images')!r}", "data.sizes=((32, 32),)", "data.latent_dropout=0",
        "noise.probability=0", "run.sample_every=0", "run.checkpoint_every=1000",
    ]  # fmt: skip
    teacher = apply_settings(
        get_recipe("debug_teacher"),
        [*common, "run.steps=400", "optimizer.lr=5e-3", "optimizer.lr_schedule=cosine", "run.sample_steps=25",
         "run.sample_guidance=1.5"],
    )  # fmt: skip
    teacher_file = train(teacher, tmp_path / "teacher", device=CPU)
    by_teacher, real = generated(teacher_file, teacher)
    student = apply_settings(get_recipe("debug_student"), [*common, "run.steps=150", "distillation.fake_score_lr=1e-3"])
    student = apply_settings(student, [f"init_from={str(teacher_file)!r}"])
    student_file = train(student, tmp_path / "student", device=CPU)
    by_student, _ = generated(student_file, student)
    # Seen: teacher to image 0.24, student to teacher 0.26, student to image 0.14; two seeds' noise alone is 1.4.
    assert distance(by_teacher, real) < 0.35
    assert distance(by_student, by_teacher) < 0.35
    assert distance(by_student, real) < 0.25
