# SPDX-License-Identifier: Apache-2.0
"""`pidecode info`: what a file is: a picture and its recipe, a latent, or weights."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import click

from pidecode.cli.shared import emit, json_option, readable_size
from pidecode.errors import CheckpointError, FileError
from pidecode.weights.header import Header, check_file, looks_like_safetensors, read_header, read_start

PICTURES = (b"\x89PNG\r\n", b"\xff\xd8\xff", b"RIFF", b"GIF8", b"BM", b"II*\x00", b"MM\x00*")
PICKLES = (b"PK\x03\x04", b"\x80")


def describe(path: Path) -> dict[str, Any]:
    """What the file is, as plain values. Raises FileError for a file that is nothing we know."""
    size = check_file(path)
    start = read_start(path)
    known: dict[str, Any] = {"file": str(path), "bytes": size}
    if looks_like_safetensors(start):
        return known | _safetensors(read_header(path), path)
    if start.startswith(PICTURES):
        return known | _picture(path)
    if start.startswith(PICKLES):
        from pidecode.weights.read import read_weights

        shapes = read_weights(path, check_values=False).shapes
        return known | {"what": "weights", "format": "pickle, tensors only"} | _foreign(shapes, path)
    raise FileError(f"{path} is no picture, latent or weights file that pidecode knows.")


def _picture(path: Path) -> dict[str, Any]:
    from PIL import Image

    from pidecode.images import load_image, read_recipe

    picture = load_image(path)  # with all its checks, before anything else opens it
    with Image.open(path) as opened:
        kind = opened.format
    recipe = read_recipe(path)
    return {"what": "picture", "format": kind, "width": picture.width, "height": picture.height, "recipe": recipe}


def _safetensors(header: Header, path: Path) -> dict[str, Any]:
    if "pidecode_latent" in header.metadata:
        shapes = [list(entry.shape) for entry in header.tensors.values()]
        return {"what": "latent", "shape": shapes[0]} | _record(header.metadata["pidecode_latent"], path)
    formats = sorted({entry.dtype for entry in header.tensors.values()})
    known = {"what": "weights", "format": "safetensors", "dtypes": formats}
    if "pidecode" in header.metadata:
        return known | _counts(header.shapes) | {"record": _record(header.metadata["pidecode"], path)}
    return known | _foreign(header.shapes, path)


def _record(text: str, path: Path) -> dict[str, Any]:
    try:
        record = json.loads(text)
    except (ValueError, RecursionError):
        record = None
    if not isinstance(record, dict):
        raise CheckpointError(f"What {path} says of itself is not a table; the file is damaged.")
    return record


def _counts(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Any]:
    return {"tensors": len(shapes), "parameters": sum(math.prod(shape) for shape in shapes.values())}


def _foreign(shapes: Mapping[str, tuple[int, ...]], path: Path) -> dict[str, Any]:
    """What names and shapes show of weights that say nothing of themselves."""
    from pidecode.weights.shapes import read_structure

    counts = _counts(shapes)
    try:
        structure = read_structure(shapes, str(path))
    except CheckpointError:
        return counts | {"network": "none of PiD's: an autoencoder, a text encoder, or something else"}
    seen = dict(structure.seen)
    return counts | {"network": f"PiD, {structure.generation or 'of no released design'}", "seen": seen}


def _lines(values: Mapping[str, Any], depth: int = 0) -> Iterator[str]:
    """Nested values, a line each, indented."""
    for name, value in values.items():
        if isinstance(value, Mapping) and value:
            yield f"{'  ' * depth}{name}"
            yield from _lines(value, depth + 1)
        else:
            shown = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)
            yield f"{'  ' * depth}{name:14s} {shown}"


def _report(found: dict[str, Any]) -> str:
    shown = {name: value for name, value in found.items() if name != "bytes"}
    shown["size"] = readable_size(found["bytes"])
    if "recipe" in shown and shown["recipe"] is None:
        shown["recipe"] = "none: this picture was not made by pidecode, or its metadata were removed"
    return "\n".join(_lines(shown))


@click.command()
@click.argument("file", type=click.Path(path_type=Path))
@json_option
def info(file: Path, as_json: bool) -> None:
    """Say what FILE is: a picture and its recipe, a latent, or weights."""
    found = describe(file)
    emit(found, lambda: _report(found), as_json=as_json)
