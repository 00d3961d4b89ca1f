# SPDX-License-Identifier: Apache-2.0
"""The pages of the latent spaces: current with the registry, and their Python parses."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

from pidecode.registry.spaces import SPACES

ROOT = Path(__file__).resolve().parent.parent
PAGES = sorted((ROOT / "docs" / "spaces").glob("*.md"))


def test_every_space_has_its_page_and_its_tables_are_current() -> None:
    assert {page.stem for page in PAGES} == {*SPACES, "README"}
    done = subprocess.run(
        [sys.executable, "tools/make_space_pages.py", "--check"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_snippets_parse_and_links_lead_somewhere(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    for snippet in re.findall(r"```python\n(.*?)```", text, flags=re.S):
        ast.parse(snippet)
    for target in re.findall(r"\]\(([\w.]+)\)", text):
        assert (page.parent / target).is_file()
    for script in re.findall(r"`(examples/\w+\.py)", text):
        assert (ROOT / script).is_file()
