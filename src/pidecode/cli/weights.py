# SPDX-License-Identifier: Apache-2.0
"""`pidecode pull` and `pidecode convert`: weights onto this disk, and into one self-describing file."""

from __future__ import annotations

from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import click

from pidecode.cli.shared import (
    SHORT_DTYPES,
    emit,
    json_option,
    overwrite_option,
    progress,
    readable_size,
    space_option,
)
from pidecode.facts.checkpoints import CHECKPOINTS
from pidecode.facts.spaces import ALIASES, SPACES

KINDS = click.Choice(["student", "teacher", "backbone"])
PULLABLE = [*SPACES, *ALIASES, *dict.fromkeys(name for name, _, _ in CHECKPOINTS if name not in SPACES), "tiny"]


class _Bars:
    """One bar per file, drawn as the pieces come in."""

    def __init__(self) -> None:
        self._bar: Any = None
        self._file: str | None = None

    def __call__(self, step: Any) -> None:
        if step.file != self._file:
            self.close()
            self._file = step.file
            self._bar = progress(step.total or 0, step.file.rpartition("/")[2], unit="B")
        self._bar.total = step.total
        self._bar.update(step.done - self._bar.n)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()


@click.command()
@click.argument("model", type=click.Choice(PULLABLE), metavar="MODEL")
@click.option("--variant", metavar="NAME", help="Variant of the decoder: 2k, 2kto4k, 2kto4k_v1pt5.")
@click.option("--kind", type=KINDS, help="A teacher, or the bare backbone.")
@click.option("--no-encoder", is_flag=True, help="Leave out the encoder: latents decode, pictures cannot be upscaled.")
@click.option("--no-text", is_flag=True, help="Leave out the text encoder (about 5 GB).")
@click.option("--accept-license", is_flag=True, help="You have read the license and keep to it.")
@json_option
def pull(model: str, as_json: bool, accept_license: bool, **asked: Any) -> None:
    """Download the decoder for MODEL, its encoder and the text encoder.

    MODEL is a latent space or an image model that uses one: flux, flux2-klein-4b, sdxl, ... The license is shown
    first. A broken download goes on where it stopped. Afterwards everything works offline.
    """
    from pidecode.weights.pull import parts_of
    from pidecode.weights.pull import pull as fetch

    parts = partial(parts_of, encoder=not asked["no_encoder"], text=not asked["no_text"])
    bars = _Bars()
    try:
        pulled = fetch(
            model,
            asked["variant"],
            kind=asked["kind"],
            accept_license=accept_license,
            parts=parts,
            on_progress=bars,
        )
    finally:
        bars.close()
    places = {name: value for name, value in asdict(pulled).items() if value}
    emit(
        places,
        lambda: "\n".join(f"{name.replace('_', ' '):13s} {path}" for name, path in places.items()),
        as_json=as_json,
    )


@click.command()
@click.argument("source", type=click.Path(path_type=Path))
@click.argument("target", type=click.Path(path_type=Path))
@space_option
@click.option("--variant", metavar="NAME", help="Release it belongs to: 2k, 2kto4k, 2kto4k_v1pt5.")
@click.option("--kind", type=KINDS, help="What it is, where the file does not tell.")
@click.option("--dtype", type=click.Choice(SHORT_DTYPES), help="Number format to write; the source's if not given.")
@overwrite_option
@json_option
def convert(source: Path, target: Path, **asked: Any) -> None:
    """Write the weights SOURCE as one TARGET.safetensors that says what it is.

    SOURCE is an official .pth, a ComfyUI repackaging, or any PiD .safetensors. The result carries configuration,
    space, variant and license, and loads with no further argument.
    """
    from pidecode.weights.convert import convert as write
    from pidecode.weights.detect import Hints

    hints = Hints(space=asked["space"], variant=asked["variant"], kind=asked["kind"])
    identity = write(source, target, hints=hints, dtype=asked["dtype"], overwrite=asked["overwrite"])
    said: dict[str, Any] = {
        "file": str(target),
        "bytes": target.stat().st_size,
        "kind": identity.kind,
        "space": identity.space,
        "variant": identity.variant,
        "license": identity.license,
    }
    words = f"{target}  {identity.kind} for {identity.space}, {readable_size(said['bytes'])}, {identity.license}"
    emit(said, words, as_json=asked["as_json"])
