# SPDX-License-Identifier: Apache-2.0
"""The rules of the house that no linter knows: how files open, how long they grow, where device names stand."""

from __future__ import annotations

import ast
import io
import re
import subprocess
import sys
import tokenize
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SOURCES = sorted((ROOT / "src").rglob("*.py"))
ALL = [*SOURCES, *sorted((ROOT / "tests").rglob("*.py")), *sorted((ROOT / "tools").rglob("*.py"))]
MOST_LINES = 650
MOST_LINES_OF_A_FUNCTION = 60
# Built from pieces, so that this file does not itself break the rule it states.
UNFINISHED = re.compile("|".join(("TO" + "DO", "FIX" + "ME", "XX" + "X", "raise NotImplemented" + "Error")))


def name_of(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


@pytest.mark.parametrize("path", ALL, ids=name_of)
def test_a_file_opens_with_its_license_and_one_sentence(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    lines = text.splitlines()
    assert lines[0] == "# SPDX-License-Identifier: Apache-2.0"
    assert lines[1].startswith('"""')
    docstring = ast.get_docstring(ast.parse(text))
    assert docstring is not None
    assert docstring.splitlines()[0].endswith((".", ":", "?"))


@pytest.mark.parametrize("path", ALL, ids=name_of)
def test_a_file_is_finished_and_of_a_readable_length(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert len(text.splitlines()) <= MOST_LINES
    assert UNFINISHED.search(text) is None


@pytest.mark.parametrize("path", SOURCES, ids=name_of)
def test_functions_stay_readable(path: Path) -> None:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    functions = [node for node in ast.walk(tree) if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))]
    lengths = {node.name: (node.end_lineno or node.lineno) - node.lineno + 1 for node in functions}
    assert {name: length for name, length in lengths.items() if length > MOST_LINES_OF_A_FUNCTION} == {}


def test_device_names_stand_in_one_place() -> None:
    # devices.py picks the device; sampling.py must know what Metal does not have.
    allowed = {"src/pidecode/devices.py", "src/pidecode/sampling.py"}
    found: dict[str, list[int]] = {}
    for path in SOURCES:
        if name_of(path) in allowed or "facts" in path.parts or "cli" in path.parts:
            continue
        tokens = tokenize.generate_tokens(io.StringIO(path.read_text(encoding="utf-8")).readline)
        lines = [
            token.start[0]
            for token in tokens
            if token.type == tokenize.STRING and token.string.strip("\"'") in {"cuda", "mps", "xpu"}
        ]
        if lines:
            found[name_of(path)] = lines
    assert found == {}


def test_readme_tells_the_tree_and_the_tables_as_they_are() -> None:
    done = subprocess.run(
        [sys.executable, "tools/make_docs.py", "--check"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
