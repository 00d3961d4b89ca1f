# SPDX-License-Identifier: Apache-2.0
"""Rewrite the parts of README.md that are facts elsewhere: the tree of files, latent spaces, weights.

    python tools/make_docs.py            # rewrite
    python tools/make_docs.py --check    # only say, by the exit code, whether it is current

A generated part stands between `<!-- generated: NAME -->` and `<!-- end of NAME -->`.
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Callable
from pathlib import Path

from pidecode.facts.checkpoints import CHECKPOINTS, Checkpoint
from pidecode.facts.spaces import ALIASES, SPACES, LatentSpace

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "src" / "pidecode"
WORDS_AT = 25
FOLDERS = {
    "assets": "what ships inside the wheel: our own small weights, and the prompts",
    "static": "the page itself: one HTML file, its style, two scripts, no build step",
}
"""Folders without modules, and what stands in them."""


def first_sentence(path: Path) -> str:
    """First line of a file's docstring, without its full stop."""
    docstring = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
    return docstring.splitlines()[0].rstrip(".") if docstring else ""


def tree() -> str:
    """The package as a tree, each file with the sentence it opens with."""

    def line(depth: int, name: str, words: str) -> str:
        return f"{'  ' * depth}{name}".ljust(WORDS_AT) + words

    def walk(folder: Path, depth: int) -> list[str]:
        lines = []
        paths = [path for path in folder.iterdir() if path.name != "__pycache__"]
        for path in sorted(paths, key=lambda path: (path.is_dir(), path.name)):
            if path.name in FOLDERS:
                lines.append(line(depth, f"{path.name}/", FOLDERS[path.name]))
            elif path.is_dir():
                lines.append(line(depth, f"{path.name}/", first_sentence(path / "__init__.py")))
                lines += walk(path, depth + 1)
            elif path.suffix == ".py" and not (depth > 1 and path.name == "__init__.py"):
                lines.append(line(depth, path.name, first_sentence(path)))
        return lines

    return "\n".join(["```", "src/pidecode/", *walk(PACKAGE, 1), "```"])


def _row(space: LatentSpace) -> str:
    models = [f"`{name}`" for name, target in ALIASES.items() if target == space.name]
    sizes = "any" if space.fixed_input is None else f"{space.fixed_input} px"
    cells = [
        f"`{space.name}`",
        space.title,
        ", ".join(models) or "–",
        f"{space.channels} at 1/{space.down}",
        sizes,
        f"{space.scale}x",
    ]
    return f"| {' | '.join(cells)} |"


def spaces() -> str:
    """Every latent space, one row each."""
    head = ["space", "whose", "also called", "latent", "input", "enlarges"]
    return "\n".join([f"| {' | '.join(head)} |", "|---" * len(head) + "|", *(_row(row) for row in SPACES.values())])


def _checkpoint_row(row: Checkpoint) -> str:
    size = "in the package" if row.bundled else f"{(row.about_bytes or 0) / 1e9:.1f} GB"
    if row.trained_area is not None:
        trained = "2048 to 4096 px"
    elif row.trained_sizes:
        trained = "2048 px, five shapes" if len(row.trained_sizes) > 1 else "2048 px square"
    else:
        trained = "any"
    kind = {"student": "decoder", "teacher": "teacher", "backbone": "text to image"}[row.kind]
    terms = f"{row.licence.name}, {'free' if row.licence.commercial else 'non-commercial'}"
    cells = [f"`{row.space}`", f"`{row.variant}`", kind, str(row.steps), trained, size, terms]
    return f"| {' | '.join(cells)} |"


def variants() -> str:
    """Every file of weights, one row each."""
    head = ["space", "variant", "what", "steps", "trained for", "size", "licence"]
    rows = [_checkpoint_row(row) for row in CHECKPOINTS.values()]
    return "\n".join([f"| {' | '.join(head)} |", "|---" * len(head) + "|", *rows])


PARTS: dict[str, Callable[[], str]] = {"tree": tree, "spaces": spaces, "variants": variants}


def filled(text: str) -> str:
    """`text` with every generated part written anew."""
    for name, write in PARTS.items():
        opening, closing = f"<!-- generated: {name} -->", f"<!-- end of {name} -->"
        before, found, rest = text.partition(opening)
        _, ended, after = rest.partition(closing)
        if not found or not ended:
            sys.exit(f"README.md has no part between {opening} and {closing}.")
        text = f"{before}{opening}\n{write()}\n{closing}{after}"
    return text


def main() -> None:
    readme = ROOT / "README.md"
    old = readme.read_text(encoding="utf-8")
    new = filled(old)
    if new == old:
        return
    if "--check" in sys.argv[1:]:
        sys.exit("README.md is not current: run `make docs`.")
    readme.write_text(new, encoding="utf-8")
    print("README.md rewritten.")


if __name__ == "__main__":
    main()
