# SPDX-License-Identifier: Apache-2.0
"""Rewrite the tables of docs/spaces/*.md from the registry: one page per latent space.

    python tools/make_space_pages.py            # rewrite
    python tools/make_space_pages.py --check    # only say, by the exit code, whether they are current

A generated part stands between `<!-- generated: NAME -->` and `<!-- end of NAME -->`.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

from pidecode.registry.checkpoints import CHECKPOINTS, ENCODERS
from pidecode.registry.spaces import ALIASES, IMAGE_MODELS, SPACES, LatentSpace

FOLDER = Path(__file__).resolve().parent.parent / "docs" / "spaces"


def normalization(space: LatentSpace) -> str:
    """How raw becomes normalized, in one line."""
    match space.statistics:
        case "constants":
            shift = f"(z - {space.shift_factor:g})" if space.shift_factor else "z"
            return f"{shift} * {space.scaling_factor:g}"
        case "per_channel":
            return "(z - mean) / deviation, a pair for each channel"
        case "batch_norm":
            return f"batch norm with the autoencoder's running statistics, epsilon {space.epsilon:g}"
        case "per_position":
            return f"(z - mean) / sqrt(variance + {space.epsilon:g}), a pair for each channel and cell"
        case "layer_norm":
            return f"LayerNorm over channels without weights, epsilon {space.epsilon:g}"


def table(head: list[str], rows: list[list[str]]) -> str:
    """Markdown."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def properties(space: LatentSpace) -> str:
    """What a latent of the space is."""
    noise = {"flow": "(1 - s) z + s e", "variance_preserving": "sqrt(1 - s^2) z + s e"}[space.noise_parametrization]
    packed = {
        "none": "not packed",
        "two_by_two": f"2x2 cells to a token of {space.token_channels} channels",
        "patchified": f"one cell to a token of {space.token_channels} channels",
    }[space.packing]
    seen = f"{space.fixed_input} px square" if space.fixed_input else f"any multiple of {space.input_multiple} px"
    encoder = ENCODERS[space.name]
    rows = [
        ["latent", f"`[B, {space.channels}, H/{space.down}, W/{space.down}]`"],
        ["in pipelines", packed],
        ["raw to normalized", normalization(space)],
        ["noise at level s", noise],
        ["encoder's input", seen],
        ["PiD's image", f"{space.scale} times the encoder's input, {space.pixels_per_cell} px per cell"],
        ["also called", ", ".join(f"`{name}`" for name, target in ALIASES.items() if target == space.name) or "–"],
        ["encoder file", f"`{encoder.path}` of {encoder.repository}"],
    ]
    return table(["", space.title], rows)


def models(space: LatentSpace) -> str:
    """The image models of the space, with the defaults of `pidecode generate`."""
    rows = [
        [
            f"`{name}`",
            f"`{model.pipeline}`",
            model.repository,
            f"{model.stop_step} of {model.num_steps}"
            if model.stop_step < model.num_steps
            else f"the last, {model.num_steps}",
        ]
        for name, model in IMAGE_MODELS.items()
        if model.space == space.name
    ]
    if not rows:
        return "No diffusers pipeline works in this space; its latents come as tensors or files."
    return table(["model", "pipeline", "weights", "stop after step"], rows)


def decoders(space: LatentSpace) -> str:
    """The PiD networks for the space."""
    kinds = {"student": "decoder", "teacher": "teacher"}
    rows = [
        [f"`{row.variant}`", kinds[row.kind], str(row.num_steps), row.license.name]
        for row in CHECKPOINTS.values()
        if row.space == space.name and row.kind in kinds
    ]
    return table(["variant", "what", "steps", "license"], rows)


PARTS: dict[str, Callable[[LatentSpace], str]] = {"table": properties, "models": models, "decoders": decoders}


def filled(text: str, space: LatentSpace) -> str:
    """A page with every generated part written again."""
    for name, write in PARTS.items():
        opening, closing = f"<!-- generated: {name} -->", f"<!-- end of {name} -->"
        before, found, rest = text.partition(opening)
        _, ended, after = rest.partition(closing)
        if not found or not ended:
            sys.exit(f"The page of {space.name} has no part between {opening} and {closing}.")
        text = f"{before}{opening}\n{write(space)}\n{closing}{after}"
    return text


def main() -> None:
    stale = []
    for space in SPACES.values():
        page = FOLDER / f"{space.name}.md"
        old = page.read_text(encoding="utf-8")
        new = filled(old, space)
        if new != old:
            stale.append(page.name)
            if "--check" not in sys.argv[1:]:
                page.write_text(new, encoding="utf-8")
    if stale and "--check" in sys.argv[1:]:
        sys.exit(f"{', '.join(stale)} of docs/spaces are not current: run tools/make_space_pages.py.")


if __name__ == "__main__":
    main()
