# SPDX-License-Identifier: Apache-2.0
"""Where the command line writes, how it reads sizes, and how it says numbers."""

from __future__ import annotations

from pathlib import Path

import pytest

from pidecode.cli.common import table
from pidecode.cli.decode import target_paths
from pidecode.errors import FileError, SettingError


def test_beside_the_source_by_default() -> None:
    sources = [Path("a/cat.jpg"), Path("b/dog.png")]
    assert target_paths(sources, None, "-upscaled") == [Path("a/cat-upscaled.png"), Path("b/dog-upscaled.png")]


def test_into_a_folder_or_a_named_file(tmp_path: Path) -> None:
    assert target_paths([Path("cat.jpg")], tmp_path / "new", "") == [tmp_path / "new" / "cat.png"]
    assert target_paths([Path("cat.jpg")], tmp_path / "x.webp", "") == [tmp_path / "x.webp"]
    (tmp_path / "v1.5").mkdir()
    assert target_paths([Path("cat.jpg")], tmp_path / "v1.5", "") == [tmp_path / "v1.5" / "cat.png"]


def test_what_cannot_be_is_refused() -> None:
    with pytest.raises(FileError, match=r"x\.tiff is not a format written here; its name must end in \.png"):
        target_paths([Path("cat.jpg")], Path("x.tiff"), "")
    with pytest.raises(SettingError, match="2 images cannot all be written to x.png; name a folder"):
        target_paths([Path("cat.jpg"), Path("dog.jpg")], Path("x.png"), "")
    with pytest.raises(SettingError, match="Several sources would be written to out/cat.png"):
        target_paths([Path("a/cat.jpg"), Path("b/cat.png")], Path("out"), "")


def test_a_table_lines_up() -> None:
    assert table([{"name": "a", "size": "10 MB"}, {"name": "long", "size": "1"}]) == (
        "name  size\na     10 MB\nlong  1"
    )
    assert table([]) == "(none)"
