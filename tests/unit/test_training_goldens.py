# SPDX-License-Identifier: Apache-2.0
"""Every loss, gradient and training step against the recorded tensors of the reference."""

from __future__ import annotations

from pathlib import Path

import pytest

from parity_kit import manifests, training
from parity_kit.files import Case, read_cases

GOLDEN = Path(__file__).parent.parent / "data" / "golden"
FILES = ("losses", "discriminator", "latent_noiser", "repa", "net_t2i", "net_v1", "net_v1pt5")
CASES = [case for name in FILES for case in read_cases(GOLDEN / f"{name}.safetensors") if hasattr(training, case.kind)]


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.file.removesuffix('.safetensors')}-{case.name}")
def test_training_agrees_with_the_reference(case: Case) -> None:
    compared = list(getattr(training, case.kind)(case))
    assert compared
    assert [(c.name, c.errors) for c in compared if not c.agrees] == []


def test_every_kind_of_training_case_is_checked() -> None:
    kinds = {case.kind for case in CASES}
    assert kinds == {
        "vsd", "dsm", "gan", "r1", "align", "fm", "disc", "noiser", "repa", "dino_resize",
        "t2i_train_step", "teacher_train_step", "distill_student_step", "distill_fake_step",
    }  # fmt: skip


def test_the_discriminator_has_the_released_ones_tensors() -> None:
    path = GOLDEN / "manifest_discriminator_v1pt5.json"
    assert all(comparison.agrees for comparison in manifests.discriminator(path))
