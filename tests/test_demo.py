# SPDX-License-Identifier: Apache-2.0
"""The README's first command, short of the installing: a real photograph in, before and after out."""

from __future__ import annotations

import subprocess
import sys
from importlib import resources
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

ASSETS = resources.files("pidecode") / "assets"


@pytest.mark.skipif(not (ASSETS / "tiny.safetensors").is_file(), reason="this checkout carries no trained weights yet")
def test_a_photograph_is_quartered_encoded_and_decoded(root: Path, tmp_path: Path) -> None:
    pytest.importorskip("skimage")
    command = [sys.executable, str(root / "tools" / "make_image.py"), "chelsea", "--out", "shown"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    sheet = tmp_path / "shown" / "chelsea-before-after.png"
    assert done.stdout.splitlines()[-1] == f"Before and after, side by side: {sheet}"
    sizes = {}
    for path in sheet.parent.iterdir():
        with Image.open(path) as image:
            sizes[path.name] = image.size
    assert sizes["chelsea-before.png"] == (112, 64)
    assert sizes["chelsea-after.png"] == (448, 256)
    assert sizes["chelsea-before-after.png"] == (4 * (448 + 12) + 12, 256 + 28 + 24)


@pytest.mark.slow
def test_closeups_show_what_a_latent_alone_does_not_tell(root: Path, tmp_path: Path) -> None:
    pytest.importorskip("skimage")
    command = [sys.executable, str(root / "tools" / "make_closeups.py"), "--out", "shown"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    with Image.open(tmp_path / "shown" / "latent-alone.webp") as image:
        sheet = np.asarray(image.convert("RGB"), dtype=float)
    assert sheet.shape == (2 * (28 + 24) + 240 + 144, 3 * (360 + 12) + 12, 3)
    for top, height in ((40, 240), (40 + 240 + 12 + 40, 144)):
        original, decoded, enlarged = (sheet[top : top + height, left : left + 360] for left in (12, 384, 756))
        assert np.abs(enlarged - original).mean() < np.abs(decoded - original).mean()


def test_what_is_no_image_is_one_line(root: Path, tmp_path: Path) -> None:
    (tmp_path / "words.jpg").write_text("not an image")
    command = [sys.executable, str(root / "tools" / "make_image.py"), "words.jpg"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr.startswith("Error: ")
    assert "Traceback" not in done.stderr
