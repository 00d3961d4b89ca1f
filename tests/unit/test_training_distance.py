# SPDX-License-Identifier: Apache-2.0
"""The whole way in debug_config: a teacher is trained and distilled, and four steps come near its twenty-five."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from pidecode.training.config import Recipe
from pidecode.training.dataloader import Feed, make_helpers
from pidecode.training.dataset import find_images
from pidecode.training.denoiser import Evaluator
from pidecode.training.models import new_network, start_weights, take_weights
from pidecode.training.overrides import apply_settings
from pidecode.training.recipes import get_recipe
from pidecode.training.trainer import paint_example, train

CPU = torch.device("cpu")


def painted(weights: Path, recipe: Recipe) -> tuple[Tensor, Tensor]:
    """What a decoder paints of both images with two seeds each, and the images."""
    net = new_network(recipe.net, 0)
    take_weights(net, start_weights(str(weights)), str(weights))
    evaluator = Evaluator(net.eval().requires_grad_(False))
    feed = Feed(recipe, find_images(recipe.data.source), make_helpers(recipe, CPU), CPU, 0, 1)
    examples = [(example, seed) for example in feed.preview(2) for seed in range(2)]
    feed.close()
    images = [paint_example(evaluator, example, recipe, seed=seed) for example, seed in examples]
    return torch.cat(images), torch.cat([example.image for example, _ in examples])


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
        f"data.source={str(tmp_path / 'images')!r}", "data.sizes=((32, 32),)", "data.latent_drop=0",
        "noise.probability=0", "run.sample_every=0", "run.save_every=1000",
    ]  # fmt: skip
    teacher = apply_settings(
        get_recipe("miniature_teacher"),
        [*common, "run.steps=400", "optimize.rate=5e-3", "optimize.fall=cosine", "run.sample_steps=25",
         "run.sample_guidance=1.5"],
    )  # fmt: skip
    teacher_file = train(teacher, tmp_path / "teacher", device=CPU)
    by_teacher, real = painted(teacher_file, teacher)
    student = apply_settings(get_recipe("miniature_student"), [*common, "run.steps=150", "optimize.critic_rate=1e-3"])
    student = apply_settings(student, [f"start_from={str(teacher_file)!r}"])
    student_file = train(student, tmp_path / "student", device=CPU)
    by_student, _ = painted(student_file, student)
    # Seen: teacher to image 0.24, student to teacher 0.26, student to image 0.14; two seeds' noise alone is 1.4.
    assert distance(by_teacher, real) < 0.35
    assert distance(by_student, by_teacher) < 0.35
    assert distance(by_student, real) < 0.25
