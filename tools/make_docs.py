# SPDX-License-Identifier: Apache-2.0
"""Rewrite the generated parts of documents: files, latent spaces, weights, error messages, pages.

    python tools/make_docs.py            # rewrite
    python tools/make_docs.py --check    # only say, by the exit code, whether it is current

A generated part of README.md, CONTRIBUTING.md or a page in docs/ stands between `<!-- generated: NAME -->` and
`<!-- end of NAME -->`, the site's list of pages in zensical.toml between the same words as comments. The words of the
tree of files are written by hand, in CONTRIBUTING.md itself.
"""

from __future__ import annotations

import ast
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from pidecode import errors
from pidecode.registry.checkpoints import CHECKPOINTS, Checkpoint
from pidecode.registry.spaces import ALIASES, SPACES, LatentSpace

ROOT = Path(__file__).resolve().parent.parent
DOCS = ROOT / "docs"
PACKAGE = ROOT / "src" / "pidecode"
WORDS_AT = 25
FEWEST_LETTERS = 12
VARIES = "…"
MOST_WORDS = 7
OPAQUE = {"assets", "static"}
"""Folders without modules, shown as one line."""


def _words_in_tree() -> dict[str, str]:
    """Words of each file and folder, by its path in the package, as CONTRIBUTING.md has them now."""
    _, _, rest = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8").partition("<!-- generated: tree -->")
    words: dict[str, str] = {}
    folders: list[str] = []
    for line in rest.partition("<!-- end of tree -->")[0].splitlines():
        depth, (name, *about) = (len(line) - len(line.lstrip())) // 2, line.split() or [""]
        if depth:
            folders = [*folders[: depth - 1], name]
            words["".join(folders)] = " ".join(about)
    return words


def tree() -> str:
    """The package as a tree, each file with its words from CONTRIBUTING.md; exits where these do not fit."""
    words = _words_in_tree()

    def line(path: Path, depth: int) -> str:
        key = path.relative_to(PACKAGE).as_posix() + ("/" if path.is_dir() else "")
        about = words.get(key, "")
        if not 1 <= len(about.split()) <= MOST_WORDS:
            sys.exit(f"{key} needs one to {MOST_WORDS} words in the tree of CONTRIBUTING.md; it has {about!r}.")
        return f"{'  ' * depth}{path.name}{'/' if path.is_dir() else ''}".ljust(WORDS_AT) + about

    def walk(folder: Path, depth: int) -> list[str]:
        lines = []
        paths = [path for path in folder.iterdir() if path.name != "__pycache__"]
        for path in sorted(paths, key=lambda path: (path.is_dir(), path.name)):
            if path.is_dir():
                lines += [line(path, depth), *(walk(path, depth + 1) if path.name not in OPAQUE else [])]
            elif path.suffix == ".py" and not (depth > 1 and path.name == "__init__.py"):
                lines.append(line(path, depth))
        return lines

    return "\n".join(["```text", "src/pidecode/", *walk(PACKAGE, 1), "```"])


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
    size = "in the package" if row.bundled else f"{(row.approximate_bytes or 0) / 1e9:.1f} GB"
    if row.trained_area is not None:
        trained = "2048 to 4096 px"
    elif row.trained_sizes:
        trained = "2048 px, five shapes" if len(row.trained_sizes) > 1 else "2048 px square"
    else:
        trained = "any"
    kind = "text to image" if row.kind == "backbone" else row.kind
    steps = "1" if row.kind == "feed-forward" else str(row.num_steps)
    terms = f"{row.license.name}, {'free' if row.license.commercial else 'non-commercial'}"
    cells = [f"`{row.space}`", f"`{row.variant}`", kind, steps, trained, size, terms]
    return f"| {' | '.join(cells)} |"


def variants() -> str:
    """Every file of weights, one row each."""
    head = ["space", "variant", "kind", "steps", "trained for", "size", "license"]
    rows = [_checkpoint_row(row) for row in CHECKPOINTS.values()]
    return "\n".join([f"| {' | '.join(head)} |", "|---" * len(head) + "|", *rows])


class Page(NamedTuple):
    """A page of the site: its file in docs/, its title, and who it is for."""

    path: str
    title: str
    reader: str = ""


# In reading order. A page enters the site when its file is there.
PAGES = (
    Page("index.md", "Start here"),
    Page("architecture.md", "Architecture", "a question about the method"),
    Page("spaces", "Latent spaces", "a latent of your own"),
    Page("diffusers.md", "diffusers", "a diffusers pipeline"),
    Page("comfyui.md", "ComfyUI", "ComfyUI"),
    Page("page.md", "Web page", "an image, and a browser"),
    Page("server.md", "Server", "another program"),
    Page("cli.md", "Command line", "a file, and a terminal"),
    Page("batch.md", "Batch", "a folder of thousands"),
    Page("training.md", "Training", "images to train on"),
    Page("performance.md", "Performance", "a small GPU, or little time"),
    Page("benchmarks.md", "Benchmarks", "a question about speed"),
    Page("model_card.md", "Model card", "a question about `tiny`"),
    Page("licenses.md", "Licenses", "a question about use"),
    Page("troubleshooting.md", "Troubleshooting", "an error message"),
    Page("messages.md", "Error messages"),
)
MESSAGES = DOCS / "messages.md"
"""Written for the site at every build, and never committed: it would be stale after every other change."""


def _pages() -> list[tuple[Page, list[Path]]]:
    """The pages that exist, each with its files: one, or those of its folder."""
    found = []
    for page in PAGES:
        path = DOCS / page.path
        files = (
            sorted(path.glob("*.md"), key=lambda file: (file.name != "index.md", file.name)) if path.is_dir() else []
        )
        if path.is_file() or files or path == MESSAGES:
            found.append((page, files or [path]))
    return found


def ways_in() -> str:
    """Which page is for whom."""
    rows = [
        f"| {page.reader} | [{page.title}]({files[0].relative_to(DOCS).as_posix()}) |"
        for page, files in _pages()
        if page.reader
    ]
    return "\n".join(["| you have | go to |", "|---|---|", *rows])


def nav() -> str:
    """The site's list of pages, as zensical.toml writes it."""

    def entry(title: str, path: Path) -> str:
        return f"{{ {json.dumps(title, ensure_ascii=False)} = {json.dumps(path.relative_to(DOCS).as_posix())} }}"

    lines = []
    for page, files in _pages():
        if page.path.endswith(".md"):
            lines.append(f"  {entry(page.title, files[0])},")
        else:
            inside = ", ".join(entry(_title(file), file) for file in files)
            lines.append(f"  {{ {json.dumps(page.title)} = [{inside}] }},")
    return "\n".join(["nav = [", *lines, "]"])


def _title(page: Path) -> str:
    """A page's own heading."""
    headings = [line for line in page.read_text(encoding="utf-8").splitlines() if line.startswith("# ")]
    return headings[0].removeprefix("# ") if headings else page.stem


def messages() -> str:
    """The page of every error class with its exit code, and every message it is raised with."""
    classes: dict[str, type[errors.PidecodeError]] = {
        name: value
        for name, value in vars(errors).items()
        if isinstance(value, type) and issubclass(value, errors.PidecodeError)
    }
    found: dict[str, dict[str, str]] = {name: {} for name in classes}
    for path in sorted(PACKAGE.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in found and node.args:
                fixes = [word.value for word in node.keywords if word.arg in ("python", "cli", "http")]
                text = " ".join(map(_template, [node.args[0], *fixes]))
                if sum(map(str.isalpha, text)) >= FEWEST_LETTERS:
                    found[node.func.id].setdefault(text, path.relative_to(PACKAGE).as_posix())
    lines = ["# Error messages", "", f"Look for the words that do not vary; {VARIES} stands for what does.", ""]
    for name, texts in found.items():
        if not texts:
            continue
        about = (classes[name].__doc__ or "").splitlines()[0]
        lines += [
            f"## {name}",
            "",
            f"{about} Exit code {classes[name].exit_code}.",
            "",
            "| message | from |",
            "|---|---|",
        ]
        lines += [f"| {_cell(text)} | `{where}` |" for text, where in sorted(texts.items())]
        lines.append("")
    return "\n".join(lines)


def _template(node: ast.expr) -> str:
    """A message as it stands in the source, with VARIES for every inserted value."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return node.value
    if isinstance(node, ast.JoinedStr):
        return "".join(part.value if isinstance(part, ast.Constant) else VARIES for part in node.values)  # type: ignore[misc]
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        return _template(node.left) + _template(node.right)
    return VARIES


def _cell(text: str) -> str:
    """A message as a cell of a table: nothing in it is Markdown but what stands in backquotes."""
    pieces = text.replace("\n", " ").replace("|", "\\|").split("`")
    for index in range(0, len(pieces), 2):
        for sign in "<*_[":
            pieces[index] = pieces[index].replace(sign, "\\" + sign)
    return "`".join(pieces)


PARTS: dict[str, Callable[[], str]] = {"tree": tree, "spaces": spaces, "variants": variants, "ways in": ways_in}
REQUIRED = {
    "README.md": {"spaces"},
    "CONTRIBUTING.md": {"tree"},
    "docs/index.md": {"ways in"},
    "docs/licenses.md": {"variants"},
}


def filled(text: str, required: set[str], name: str) -> str:
    """`text` with every generated part written again; ends the program where a required one is missing."""
    for part, write in PARTS.items():
        opening, closing = f"<!-- generated: {part} -->", f"<!-- end of {part} -->"
        before, found, rest = text.partition(opening)
        _, ended, after = rest.partition(closing)
        if found and ended:
            text = f"{before}{opening}\n{write()}\n{closing}{after}"
        elif found or part in required:
            sys.exit(f"{name} has no part between {opening} and {closing}.")
    return text


def documents() -> dict[Path, str]:
    """Every document with generated parts, as it should be."""
    site = ROOT / "zensical.toml"
    head, _, rest = site.read_text(encoding="utf-8").partition("# generated: nav\n")
    _, _, tail = rest.partition("# end of nav\n")
    wanted = {site: f"{head}# generated: nav\n{nav()}\n# end of nav\n{tail}"}
    for path in [
        ROOT / "README.md",
        ROOT / "CONTRIBUTING.md",
        *(path for path in sorted(DOCS.rglob("*.md")) if path != MESSAGES),
    ]:
        name = path.relative_to(ROOT).as_posix()
        wanted[path] = filled(path.read_text(encoding="utf-8"), REQUIRED.get(name, set()), name)
    return wanted


def main() -> None:
    stale = {path: text for path, text in documents().items() if path.read_text(encoding="utf-8") != text}
    names = ", ".join(path.relative_to(ROOT).as_posix() for path in stale)
    if stale and "--check" in sys.argv[1:]:
        sys.exit(f"{names}: not current; run `make docs`.")
    for path, text in stale.items():
        path.write_text(text, encoding="utf-8")
    if "--check" not in sys.argv[1:]:
        MESSAGES.write_text(messages(), encoding="utf-8")
    if stale:
        print(f"Rewritten: {names}.")


if __name__ == "__main__":
    main()
