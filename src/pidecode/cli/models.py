# SPDX-License-Identifier: Apache-2.0
"""`pidecode models`: what there is, what of it is on this disk, how large, under which license."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

import click

from pidecode.cli.shared import Verdict, emit, json_option, readable_size, table
from pidecode.facts.checkpoints import CHECKPOINTS, ENCODERS, TEXT_ENCODER, TINY_ENCODER, Checkpoint

IN_PACKAGE = "in the package"
READER = "text encoder"


def asset(name: str) -> Path | None:
    """A file that ships with the package, if it is there."""
    path = Path(str(resources.files("pidecode") / "assets" / name))
    return path if path.is_file() else None


def _places(row: Checkpoint) -> dict[str, Path | None]:
    """Where each part a released decoder needs lies on this disk, by the part's title."""
    from pidecode.weights.hub import Hub
    from pidecode.weights.pull import parts_of, present

    hub = Hub()
    return {part.title: present(part, hub) for part in parts_of(row)}


def _size(path: Path | None) -> int | None:
    if path is None:
        return None
    if path.is_file():
        return path.stat().st_size
    return sum(file.stat().st_size for file in path.rglob("*") if file.is_file())


def _row(**known: Any) -> dict[str, Any]:
    path: Path | None = known.pop("path")
    return {"variant": None, "bytes": _size(path), "commercial": None, **known, "path": str(path) if path else None}


def _checkpoint(row: Checkpoint, path: Path | None) -> dict[str, Any]:
    return _row(
        name=row.name,
        kind=row.kind,
        space=row.space,
        variant=row.variant,
        source=row.repository or IN_PACKAGE,
        bytes=_size(path) or row.about_bytes,
        license=row.license.name,
        commercial=row.license.commercial,
        path=path,
    )


def rows() -> list[dict[str, Any]]:
    """Every model, encoder and text encoder, as plain values; `path` is None for what is not on this disk."""
    own: list[dict[str, Any]] = []
    released: list[dict[str, Any]] = []
    encoders: dict[str, dict[str, Any]] = {}
    text: Path | None = None
    for row in CHECKPOINTS.values():
        if row.repository is None:
            own.append(_checkpoint(row, asset(row.path)))
            continue
        places = _places(row)
        released.append(_checkpoint(row, places["decoder"]))
        text = text or places.get("text encoder")
        if row.space in ENCODERS and row.space not in encoders:
            encoder = ENCODERS[row.space]
            encoders[row.space] = _row(
                name=row.space,
                kind="encoder",
                space=row.space,
                source=encoder.repository,
                license="see its model card",
                path=places.get("encoder"),
            )
    tiny = asset(TINY_ENCODER)
    own.append(
        _row(
            name="flux2/tiny",
            kind="encoder",
            space="flux2",
            variant="tiny",
            source=IN_PACKAGE,
            license="Apache-2.0",
            commercial=True,
            path=tiny,
        )
    )
    gemma = TEXT_ENCODER.rpartition("/")[2]
    reader = _row(name=gemma, kind=READER, space=None, source=TEXT_ENCODER, license="Gemma terms", path=text)
    return [*own, *released, *encoders.values(), reader]


def verdicts(known: Sequence[dict[str, Any]]) -> Iterator[Verdict]:
    """What the files on this disk allow, for `pidecode doctor`."""
    there = {(row["kind"], row["name"]) for row in known if row["path"]}
    tiny = {("student", "flux2/tiny"), ("encoder", "flux2/tiny")} <= there
    lost = "its weights are missing from the package; install it again"
    yield Verdict("`tiny`, the model that ships here", tiny, "pictures and FLUX.2 latents" if tiny else lost)
    text = any(kind == READER for kind, _ in there)
    for space in dict.fromkeys(row["space"] for row in known if row["kind"] == "student"):
        students = [
            row
            for row in known
            if row["kind"] == "student" and row["space"] == space and row["license"] != "Apache-2.0"
        ]
        found = [row["variant"] for row in students if row["path"]]
        if not found:
            yield Verdict(f"released decoders for {space}", False, f"not on this disk: pidecode pull {space}")
            continue
        lacking = [] if text else ["the text encoder, so captions must come as ready-made states"]
        if ("encoder", space) not in there:
            lacking.append("the encoder, so latents decode but pictures cannot be upscaled")
        because = ", ".join(found) + (
            f"; without {' and without '.join(lacking)}: pidecode pull {space}" if lacking else ""
        )
        yield Verdict(f"released decoders for {space}", True, because)


def _line(row: dict[str, Any]) -> dict[str, str]:
    free = {True: "", False: ", non-commercial", None: ""}[row["commercial"]]
    return {
        "name": row["name"],
        "kind": row["kind"],
        "on disk": "yes" if row["path"] else "no",
        "size": readable_size(row["bytes"]),
        "license": row["license"] + free,
        "from": row["source"],
    }


@click.command()
@click.option("--on-disk", is_flag=True, help="Only those that are here.")
@json_option
def models(on_disk: bool, as_json: bool) -> None:
    """List the models there are, and which are on this disk."""
    listed = [row for row in rows() if row["path"] or not on_disk]
    emit(listed, lambda: table([_line(row) for row in listed]), as_json=as_json)
