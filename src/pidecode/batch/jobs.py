# SPDX-License-Identifier: Apache-2.0
"""Jobs of a batch: folders, glob patterns and manifests as an ordered list of sources and output files."""

from __future__ import annotations

import glob
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from pidecode.errors import FileError, SettingError
from pidecode.options import Command, DecodeOptions, option_infos
from pidecode.registry.spaces import did_you_mean
from pidecode.strict_json import JSONError, parse_json

SourceKind = Literal["latent", "image"]

LATENT_SUFFIXES = (".safetensors",)
IMAGE_SUFFIXES = (
    ".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff", ".gif", ".ppm", ".avif", ".jp2", ".tga",
)  # fmt: skip
OUTPUT_SUFFIXES = (".png", ".webp", ".jpg")
MANIFEST_OPTIONS = tuple(option_infos(interface="batch"))
"""Decode options that a line of a manifest may set for its own job."""


@dataclass(frozen=True, slots=True, kw_only=True)
class BatchJob:
    """One source file and the image it becomes."""

    name: str  # the source as the user wrote it: its path in the folder, or as in the manifest
    source: Path  # path of the source
    kind: SourceKind  # "latent" to decode or "image" to upscale
    out: Path  # the image to write; the images of a file with several latents get -1, -2, ... before the suffix.
    options: Mapping[str, Any] = field(default_factory=dict)  # decode options of this job alone; see `MANIFEST_OPTIONS`

    @property
    def command(self) -> Command:
        """What the decoder is to do with the source."""
        return "decode" if self.kind == "latent" else "upscale"


@dataclass(frozen=True, slots=True, kw_only=True)
class OutputNaming:
    """How output files are named."""

    out: Path  # folder to write to
    suffix: str = ".png"  # suffix of the images, which selects their format
    # Name the output of cat.jpg cat.jpg.png instead of cat.png, for folders with cat.jpg and cat.webp.
    keep_suffix: bool = False

    def output_path(self, name: str | Path) -> Path:
        """The output file of the source with this relative name."""
        path = self.out / name
        return path.with_name(path.name + self.suffix) if self.keep_suffix else path.with_suffix(self.suffix)


def collect_jobs(source: str | os.PathLike[str], naming: OutputNaming) -> list[BatchJob]:
    """List the jobs of a source.

    Args:
        source: A folder (searched recursively, without hidden files and the output folder), a glob pattern, a
            .jsonl manifest, or one file. The outputs keep the structure of a folder.
        naming: Where and how to write the images.

    Returns:
        The jobs sorted by name; those of a manifest in its order.

    Raises:
        FileError: The source does not exist or holds no image and no latent.
        SettingError: Two sources would be written to one file, or a line of the manifest is wrong.
    """
    text = os.fspath(source)
    path = Path(text).expanduser()
    if path.is_dir():
        jobs = _from_files(_walk(path, naming.out), path, naming)
    elif path.suffix.lower() == ".jsonl" and path.is_file():
        jobs = _from_manifest(path, naming)
    elif path.is_file():
        _require_kind(path, str(path), FileError)
        jobs = _from_files([path], path.parent, naming)
    elif glob.has_magic(text):
        jobs = _from_files(_glob(text), _folder_of_pattern(text), naming)
    else:
        raise FileError(f"There is no {text}. Give a folder, a file, a .jsonl manifest, or a pattern in quotes.")
    if not jobs:
        raise FileError(f"{text} holds no image ({', '.join(IMAGE_SUFFIXES)}) and no latent (.safetensors).")
    _check_unique_outputs(jobs)
    return jobs


def _walk(folder: Path, out: Path) -> list[Path]:
    found: list[Path] = []
    outputs = out.resolve()
    if folder.resolve() == outputs:
        raise SettingError(
            f"The output folder {out} is the source folder, so the next run would read its images; choose another."
        )
    for here, folders, files in os.walk(folder):
        inside = Path(here)
        folders[:] = sorted(
            name for name in folders if not name.startswith(".") and (inside / name).resolve() != outputs
        )
        found += [inside / name for name in files if not name.startswith(".")]
    return found


def _glob(pattern: str) -> list[Path]:
    found = glob.glob(os.path.expanduser(pattern), recursive=True)
    return [path for path in map(Path, found) if path.is_file() and not path.name.startswith(".")]


def _folder_of_pattern(pattern: str) -> Path:
    """The folders of a pattern before its first wildcard."""
    fixed: list[str] = []
    for part in Path(os.path.expanduser(pattern)).parts[:-1]:
        if glob.has_magic(part):
            break
        fixed.append(part)
    return Path(*fixed)


def source_kind(path: Path) -> SourceKind | None:
    """Whether a file is a latent or an image by its suffix; None if neither."""
    suffix = path.suffix.lower()
    return "latent" if suffix in LATENT_SUFFIXES else "image" if suffix in IMAGE_SUFFIXES else None


def _require_kind(path: Path, name: str, error: type[FileError | SettingError]) -> SourceKind:
    kind = source_kind(path)
    if kind is None:
        raise error(f"{name} is neither an image ({', '.join(IMAGE_SUFFIXES)}) nor a latent (.safetensors).")
    return kind


def _from_files(paths: Sequence[Path], base: Path, naming: OutputNaming) -> list[BatchJob]:
    jobs = []
    for path in sorted(paths, key=lambda path: path.relative_to(base).parts):
        kind = source_kind(path)
        if kind is not None:
            name = path.relative_to(base)
            jobs.append(BatchJob(name=name.as_posix(), source=path, kind=kind, out=naming.output_path(name)))
    return jobs


def _from_manifest(path: Path, naming: OutputNaming) -> list[BatchJob]:
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise FileError(f"{path} could not be read as UTF-8 text: {error}.") from error
    return [
        _from_line(line, f"Line {number} of {path.name}", path.parent, naming)
        for number, line in enumerate(lines, start=1)
        if line.strip()
    ]


def _from_line(line: str, where: str, base: Path, naming: OutputNaming) -> BatchJob:
    try:
        entry = parse_json(line)
    except JSONError as error:
        raise SettingError(f"{where} is not JSON that is accepted: {error}.") from None
    if not isinstance(entry, dict):
        raise SettingError(f'{where} is not a JSON object; write {{"source": "cat.png"}}.')
    known = ("source", "out", *MANIFEST_OPTIONS)
    for name in entry:
        if name not in known:
            raise SettingError(f"{where} has an entry {name!r}.{did_you_mean(name, known)}")
    name = _text(entry, "source", where)
    source = base / Path(name).expanduser()
    kind = _require_kind(source, f"{where}: {name}", SettingError)
    if "out" in entry:
        out = naming.out / _relative_path(_text(entry, "out", where), where)
        if out.suffix.lower() not in OUTPUT_SUFFIXES:
            raise SettingError(f"{where}: {entry['out']} must end in {', '.join(OUTPUT_SUFFIXES)}.")
    else:
        # A source outside the manifest's folder is named after its last part alone, so outputs stay in their folder.
        relative = Path(name)
        outside = relative.is_absolute() or ".." in relative.parts or name.startswith("~")
        out = naming.output_path(relative.name if outside else relative)
    return BatchJob(name=name, source=source, kind=kind, out=out, options=_options(entry, where))


def _text(entry: Mapping[str, Any], name: str, where: str) -> str:
    value = entry.get(name)
    if not isinstance(value, str) or not value:
        raise SettingError(f"{where} needs {name!r} as text; got {value!r}.")
    return value


def _relative_path(name: str, where: str) -> Path:
    path = Path(name)
    if path.is_absolute() or ".." in path.parts:
        raise SettingError(f"{where}: {name} is outside the output folder; give a path inside it.")
    return path


def _options(entry: Mapping[str, Any], where: str) -> dict[str, Any]:
    """The decode options of a manifest's line, checked."""
    given = {name: entry[name] for name in MANIFEST_OPTIONS if entry.get(name) is not None}
    for name in ("seed", "prompt"):
        if isinstance(given.get(name), list):
            raise SettingError(f"{where}: {name} is a list; a line of a manifest is one job and takes one value.")
    if isinstance(given.get("size"), list):
        given["size"] = tuple(given["size"])
    try:
        DecodeOptions(**given)
    except SettingError as error:
        raise SettingError(f"{where}: {error}") from None
    return given


def _check_unique_outputs(jobs: Sequence[BatchJob]) -> None:
    seen: dict[Path, str] = {}
    for job in jobs:
        if job.out in seen:
            raise SettingError(
                f"{seen[job.out]} and {job.name} would both be written to {job.out}. Keep their suffixes in the names "
                "(--keep-suffix), or name the outputs in a manifest."
            )
        seen[job.out] = job.name
