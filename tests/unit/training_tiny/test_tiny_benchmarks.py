# SPDX-License-Identifier: Apache-2.0
"""The benchmarks of the tiny training as commands, on a few made-up images."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from pidecode.training.tiny.teacher import TeacherAutoencoder
from tiny_training import folders


def benchmark(root: Path, name: str, *arguments: object) -> str:
    command = [sys.executable, str(root / "benchmarks" / name), *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.slow
def test_every_objective_is_trained_and_measured_once(root: Path, tmp_path: Path, teacher: TeacherAutoencoder) -> None:
    data, weights = folders(tmp_path, teacher, 320)
    arguments = ("--data", data, "--teacher", weights, "--folder", tmp_path / "out", "--seconds", 1)
    assert len(benchmark(root, "objectives.py", *arguments).splitlines()) == 6
    for way in ("direct", "flow", "dmd2"):
        for prediction in ("x0", "velocity"):
            found = json.loads((tmp_path / "out" / f"{way}-{prediction}.json").read_text())
            assert found["steps"] > 0
            assert {*found["four steps"], *found["25 steps"]} == {"psnr", "ssim", "sharpness"}
    assert benchmark(root, "objectives.py", *arguments) == ""  # nothing is left to do


@pytest.mark.slow
@pytest.mark.parametrize("more", [(), ("--noise",)], ids=["rivals", "noise"])
def test_a_sheet_has_a_row_for_each_image(
    root: Path, tmp_path: Path, teacher: TeacherAutoencoder, more: tuple[str, ...]
) -> None:
    data, weights = folders(tmp_path, teacher, 192)
    out = tmp_path / "sheet.png"
    benchmark(root, "sheet.py", "--data", data, "--teacher", weights, "--window", 128, "--out", out, *more)
    with Image.open(out) as sheet:
        assert sheet.size == (5 * 128, 18 + 128)  # one of the three images is held out
