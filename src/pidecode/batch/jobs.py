# SPDX-License-Identifier: Apache-2.0
"""What a batch has to do: folders, globs and manifests as an ordered list of jobs with fixed output names."""

from __future__ import annotations

import glob
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from pidecode.errors import FileError, SettingError
from pidecode.registry.spaces import did_you_mean

Kind = Literal["latent", "image"]

LATENTS = (".safetensors",)
IMAGES = (
    ".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff", ".gif", ".ppm", ".avif", ".jp2", ".tga",
)  # fmt: skip
OUTPUTS = (".png", ".webp", ".jpg")
PER_JOB = ("prompt", "seed", "num_steps", "sigma", "sampler", "size")
"""Settings that a line of a manifest may give for its own job."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """One source file and the image it becomes.

    name: the source as people know it: its path within the folder, or as the manifest writes it.
    out: where its image goes; the images of a latent batch get -1, -2, ... before the ending.
    own: settings of this job alone, by the names in `PER_JOB`.
    """

    name: str
    source: Path
    kind: Kind
    out: Path
    own: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class Naming:
    """How results are named: in the folder `out`, with this `ending`, after the source.

    keep_ending: cat.jpg becomes cat.jpg.png instead of cat.png, for folders where both cat.jpg and cat.webp lie.
    """

    out: Path
    ending: str = ".png"
    keep_ending: bool = False

    def place(self, name: str | Path) -> Path:
        """Where the result of the source of that (relative) name goes."""
        path = self.out / name
        return path.with_name(path.name + self.ending) if self.keep_ending else path.with_suffix(self.ending)


def collect(source: str | os.PathLike[str], naming: Naming) -> list[Job]:
    """Every job of `source`, in order of their names (a manifest's in its own order).

    source: a folder (searched to the bottom; hidden files and the results' own folder are passed over), a glob
        pattern, a .jsonl manifest, or one file. A folder's structure is kept in the results.

    Raises FileError for what is not there or holds nothing, SettingError when two sources would be written to
    one place or a manifest is wrong, naming the line.
    """
    text = os.fspath(source)
    path = Path(text).expanduser()
    if path.is_dir():
        jobs = _of_files(_walk(path, naming.out), path, naming)
    elif path.suffix.lower() == ".jsonl" and path.is_file():
        jobs = _of_manifest(path, naming)
    elif path.is_file():
        jobs = _of_files([path], path.parent, naming, chosen=True)
    elif glob.has_magic(text):
        jobs = _of_files(_globbed(text), _fixed_part(text), naming)
    else:
        raise FileError(f"There is no {text}. Give a folder, a file, a .jsonl manifest, or a pattern in quotes.")
    if not jobs:
        raise FileError(f"{text} holds no image and no latent (.safetensors); {', '.join(IMAGES)} are images.")
    _refuse_twins(jobs)
    return jobs


def _walk(folder: Path, out: Path) -> list[Path]:
    found: list[Path] = []
    results = out.resolve()
    if folder.resolve() == results:
        raise SettingError(f"Results in {out}, beside their sources, would be sources of the next run; choose another.")
    for here, folders, files in os.walk(folder):
        inside = Path(here)
        folders[:] = sorted(
            name for name in folders if not name.startswith(".") and (inside / name).resolve() != results
        )
        found += [inside / name for name in files if not name.startswith(".")]
    return found


def _globbed(pattern: str) -> list[Path]:
    found = glob.glob(os.path.expanduser(pattern), recursive=True)
    return [path for path in map(Path, found) if path.is_file() and not path.name.startswith(".")]


def _fixed_part(pattern: str) -> Path:
    """The folders of a pattern before its first wildcard."""
    fixed: list[str] = []
    for part in Path(os.path.expanduser(pattern)).parts[:-1]:
        if glob.has_magic(part):
            break
        fixed.append(part)
    return Path(*fixed)


def kind_of(path: Path) -> Kind | None:
    """Whether a file's ending says latent, image, or neither."""
    ending = path.suffix.lower()
    return "latent" if ending in LATENTS else "image" if ending in IMAGES else None


def _of_files(paths: Sequence[Path], base: Path, naming: Naming, *, chosen: bool = False) -> list[Job]:
    jobs = []
    for path in sorted(paths, key=lambda path: path.relative_to(base).parts):
        kind = kind_of(path)
        if kind is None and chosen:
            raise FileError(f"{path} is neither an image ({', '.join(IMAGES)}) nor a latent (.safetensors).")
        if kind is not None:
            name = path.relative_to(base)
            jobs.append(Job(name=name.as_posix(), source=path, kind=kind, out=naming.place(name)))
    return jobs


def _of_manifest(path: Path, naming: Naming) -> list[Job]:
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise FileError(f"{path} could not be read as UTF-8 text: {error}.") from error
    return [
        _of_line(line, f"Line {number} of {path.name}", path.parent, naming)
        for number, line in enumerate(lines, start=1)
        if line.strip()
    ]


def _of_line(line: str, where: str, base: Path, naming: Naming) -> Job:
    try:
        entry = json.loads(line)
    except (json.JSONDecodeError, RecursionError) as error:
        raise SettingError(f"{where} is not JSON: {error}.") from error
    if not isinstance(entry, dict):
        raise SettingError(f'{where} is not a table; write {{"source": "cat.png"}}.')
    known = ("source", "out", *PER_JOB)
    for name in entry:
        if name not in known:
            raise SettingError(f"{where} has an entry {name!r}.{did_you_mean(name, known)}")
    name = _text(entry, "source", where)
    source = base / Path(name).expanduser()
    kind = kind_of(source)
    if kind is None:
        raise SettingError(f"{where}: {name} is neither an image ({', '.join(IMAGES)}) nor a latent (.safetensors).")
    if "out" in entry:
        out = naming.out / _inside(_text(entry, "out", where), where)
        if out.suffix.lower() not in OUTPUTS:
            raise SettingError(f"{where}: {entry['out']} is no kind of image written here: {', '.join(OUTPUTS)}.")
    else:
        # A source from elsewhere is named after its last part alone, so that results stay in their folder.
        relative = Path(name)
        loose = relative.is_absolute() or ".." in relative.parts or name.startswith("~")
        out = naming.place(relative.name if loose else relative)
    return Job(name=name, source=source, kind=kind, out=out, own=dict(_settings(entry, where)))


def _text(entry: Mapping[str, Any], name: str, where: str) -> str:
    value = entry.get(name)
    if not isinstance(value, str) or not value:
        raise SettingError(f"{where} needs {name!r} as text; got {value!r}.")
    return value


def _inside(name: str, where: str) -> Path:
    path = Path(name)
    if path.is_absolute() or ".." in path.parts:
        raise SettingError(f"{where}: {name} lies outside the folder of the results; name a place in it.")
    return path


def _settings(entry: Mapping[str, Any], where: str) -> Iterator[tuple[str, Any]]:
    """The settings of a manifest's line, each of the type it must be."""
    types: dict[str, tuple[type, ...]] = {
        "prompt": (str,), "sampler": (str,), "seed": (int,), "num_steps": (int,), "sigma": (int, float),
        "size": (list,),
    }  # fmt: skip
    for name in PER_JOB:
        value = entry.get(name)
        if value is None:
            continue
        if not isinstance(value, types[name]) or isinstance(value, bool):
            raise SettingError(f"{where}: {name} is {value!r}; it must be {types[name][-1].__name__}.")
        yield name, _size(value, where) if isinstance(value, list) else value


def _size(value: list[Any], where: str) -> tuple[int, int]:
    if len(value) != 2 or not all(type(side) is int and side > 0 for side in value):
        raise SettingError(f"{where}: size is {value!r}; write width and height, as in [2048, 1536].")
    return value[0], value[1]


def _refuse_twins(jobs: Sequence[Job]) -> None:
    seen: dict[Path, str] = {}
    for job in jobs:
        if job.out in seen:
            raise SettingError(
                f"{seen[job.out]} and {job.name} would both be written to {job.out}. Keep their endings in the names "
                "(--keep-ending), or name the results in a manifest."
            )
        seen[job.out] = job.name
