# SPDX-License-Identifier: Apache-2.0
"""Jobs of a batch: folders, glob patterns and manifests as an ordered list of sources and output files."""

from __future__ import annotations

import codecs
import glob
import os
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import takewhile
from pathlib import Path
from typing import Any, Literal

from pidecode import files
from pidecode.batch.report import describe_left_out
from pidecode.errors import FileError, PidecodeError, SettingError
from pidecode.errors import naming as beginning_with
from pidecode.images import Frames, frames_in
from pidecode.latents.storage import count_latents
from pidecode.options import Command, DecodeOptions, SaveOptions, option_infos
from pidecode.registry.spaces import did_you_mean
from pidecode.strict_json import JSONError, parse_json
from pidecode.units import LARGEST_PIXELS

SourceKind = Literal["latent", "image"]

LATENT_SUFFIXES = (".safetensors", ".latent", ".npy", ".npz", ".pt")
# Endings of the image formats that `pidecode.images` reads.
IMAGE_SUFFIXES = (
    ".png", ".apng", ".jpg", ".jpeg", ".jpe", ".jfif", ".mpo", ".webp", ".bmp", ".dib", ".tif", ".tiff", ".gif", ".ppm",
    ".pgm", ".pbm", ".pnm", ".avif", ".jp2", ".j2k", ".jpc", ".jpf", ".jpx", ".j2c", ".tga",
)  # fmt: skip
_READ = f"image ({', '.join(IMAGE_SUFFIXES)}) {{}} latent ({', '.join(LATENT_SUFFIXES)})"
OUTPUT_SUFFIXES = tuple(f".{choice}" for choice in option_infos(SaveOptions)["format"].choices)
REPORT_NAME = "pidecode-batch.json"  # name of the report in the output folder
MANIFEST_OPTIONS = tuple(option_infos(interface="batch"))  # that a line of a manifest may set for its own job


@dataclass(frozen=True, slots=True, kw_only=True)
class BatchJob:
    """One source file and the image it becomes."""

    name: str  # the source as the user wrote it: its path in the folder, or as in the manifest
    source: Path  # path of the source
    kind: SourceKind  # "latent" to decode or "image" to upscale
    out: Path  # the image to write; those of several latents or pages in a file get -1, -2, ... before the suffix.
    options: Mapping[str, Any] = field(default_factory=dict)  # decode options of this job alone; see `MANIFEST_OPTIONS`
    error: PidecodeError | None = None  # why it cannot be processed, where listing showed that; it will only fail

    @property
    def command(self) -> Command:
        """What the decoder is to do with the source."""
        return "decode" if self.kind == "latent" else "upscale"

    def outputs(self) -> list[Path]:
        """The files the job writes: one, or one per latent of a file with several."""
        files.require_file(self.source)
        if self.kind == "latent":
            count = count_latents(self.source)
        else:
            frames = find_frames(self.source)
            count = len(frames) if frames and not frames.durations else 1
        return [self.out] if count == 1 else files.numbered(self.out, count)


@dataclass(frozen=True, slots=True, kw_only=True)
class OutputNaming:
    """How output files are named."""

    out: Path  # folder to write to
    suffix: str | None = None  # suffix of the images, which selects their format; .png, or that of an animation
    # Name the output of cat.jpg cat.jpg.png instead of cat.png, for folders with cat.jpg and cat.webp.
    keep_suffix: bool = False

    def output_path(self, name: str | Path, source: Path) -> Path:
        """The output file of a source with this relative name."""
        path, suffix = self.out / name, self.suffix
        if suffix is None:
            frames = find_frames(source) if source_kind(source) == "image" else None
            suffix = frames.suffix if frames else ".png"
        return path.with_name(files.cut_name(path.name if self.keep_suffix else path.stem, suffix))


def find_frames(source: Path) -> Frames | None:
    """The frames or pages of an image file; None if it holds one, or none that can be read, which its job will say."""
    with suppress(OSError, PidecodeError), open(source, "rb") as file:
        if files.may_hold_frames(file.read(files.HEAD_BYTES)):
            return frames_in(file, max_pixels=LARGEST_PIXELS)
    return None


class JobList(list[BatchJob]):
    """The jobs of a source, and the number of files that are none by their ending (in lower case, "" without one)."""

    def __init__(self, jobs: Iterable[BatchJob] = (), left_out: Mapping[str, int] | None = None) -> None:
        super().__init__(jobs)
        self.left_out = dict(left_out or {})


def collect_jobs(source: str | os.PathLike[str], naming: OutputNaming) -> JobList:
    """List the jobs of a source.

    Args:
        source: A folder (searched recursively, without hidden files and the output folder), a glob pattern, a
            .jsonl manifest, or one file. The outputs keep the structure of a folder.
        naming: Where and how to write the images.

    Returns:
        The jobs sorted by name; those of a manifest in its order. What cannot be read (a line of a manifest, a folder)
        is a job with an error, so that it does not stop the others.

    Raises:
        FileError: The source does not exist or holds no image and no latent.
        SettingError: Two sources would be written to one file, or a source would be overwritten.
    """
    text = os.fspath(source)
    path = Path(os.path.expanduser(text))
    if os.path.isdir(path):
        jobs = _from_files(*_files_below(path, naming.out), path, naming)
    elif path.suffix.lower() == ".jsonl" and os.path.isfile(path):
        jobs = JobList(_from_manifest(path, naming))
    elif os.path.lexists(path) or not glob.has_magic(text):
        try:
            files.require_file(path)
        except FileError as error:
            raise FileError(f"{error} Give a folder, a file, a .jsonl manifest, or a pattern in quotes.") from None
        _require_kind(path, str(path))
        jobs = _from_files([path], [], path.parent, naming)
    else:
        jobs = _from_files(*_glob(text), _folder_of_pattern(text), naming)
    if not jobs:
        found = f"; it has {describe_left_out(jobs.left_out)}" if jobs.left_out else ""
        raise FileError(f"{text} holds no {_READ.format('and no')}{found}.")
    _check_outputs(jobs)
    return jobs


def _failure(name: str, message: str) -> BatchJob:
    return BatchJob(name=name, source=Path(), kind="image", out=Path(), error=FileError(message))


def _unreadable(error: OSError, base: Path | None = None) -> BatchJob:
    """The job that fails in place of a folder that cannot be read, with its name below `base`."""
    place = Path(error.filename or base or "")
    name = place.relative_to(base).as_posix() if base else str(place)
    return _failure(name, f"The folder {place} cannot be read: {error.strerror}.")


def _files_below(folder: Path, out: Path) -> tuple[list[Path], list[BatchJob]]:
    """The files below a folder, and the folders below it that are not read as jobs that fail."""
    try:
        outputs = os.path.realpath(out)
    except ValueError as error:  # a null byte
        raise FileError(f"The folder {out} cannot be created: {error}. Choose another one.") from error
    if os.path.realpath(folder) == outputs:
        raise SettingError(
            f"The output folder {out} is the source folder, so the next run would read its images; choose another."
        )
    found: list[Path] = []
    unread: list[BatchJob] = []
    for here, folders, names in files.walk(folder, lambda error: unread.append(_unreadable(error, folder))):
        inside = Path(here)
        folders[:] = [name for name in folders if not name.startswith(".")]
        for name in list(folders):
            place = inside / name
            is_link = os.path.islink(place)
            if (is_link or name == os.path.basename(outputs)) and os.path.realpath(place) == outputs:
                folders.remove(name)
            elif is_link:
                why = "is a link to a folder, and links to folders are not followed; give the folder itself as a batch"
                unread.append(_failure(place.relative_to(folder).as_posix(), f"{place} {why} of its own."))
        found += [inside / name for name in names if not name.startswith(".")]
    return found, unread


def _glob(pattern: str) -> tuple[list[Path], list[BatchJob]]:
    """The files of a pattern, each once although links may lead to it in a circle, and the folders not read."""
    try:
        found = glob.glob(os.path.expanduser(pattern), recursive=True)
    except RecursionError:
        raise SettingError(f"{pattern} leads too deep into folders; give the folder in place of a pattern.") from None
    paths = [Path(name) for name in found if os.path.isfile(name) and not os.path.basename(name).startswith(".")]
    shortest_last = sorted(paths, key=lambda path: len(path.parts), reverse=True)
    once = {(os.path.realpath(path.parent), path.name): path for path in shortest_last}
    unread: list[BatchJob] = []
    if "**" in pattern:
        for _ in files.walk(_folder_of_pattern(pattern), lambda error: unread.append(_unreadable(error))):
            pass
    return list(once.values()), unread


def _folder_of_pattern(pattern: str) -> Path:
    """The folders of a pattern before its first wildcard."""
    return Path(*takewhile(lambda part: not glob.has_magic(part), Path(os.path.expanduser(pattern)).parts[:-1]))


def source_kind(path: Path) -> SourceKind | None:
    """Whether a file is a latent or an image by its suffix; None if neither."""
    suffix = path.suffix.lower()
    return "latent" if suffix in LATENT_SUFFIXES else "image" if suffix in IMAGE_SUFFIXES else None


def _require_kind(path: Path, name: str) -> SourceKind:
    kind = source_kind(path)
    if kind is None:
        raise FileError(f"{name} is neither an {_READ.format('nor a')}.")
    return kind


def _from_files(paths: Sequence[Path], unread: Sequence[BatchJob], base: Path, naming: OutputNaming) -> JobList:
    jobs = JobList(unread, Counter(path.suffix.lower() for path in paths if source_kind(path) is None))
    for name, path in sorted(((path.relative_to(base), path) for path in paths), key=lambda pair: pair[0].parts):
        out, kind = naming.output_path(name, path), source_kind(path)
        if kind is not None:
            error = _reserved(out, naming.out)
            jobs.append(BatchJob(name=name.as_posix(), source=path, kind=kind, out=out, error=error))
    return jobs


def _reserved(out: Path, folder: Path) -> SettingError | None:
    """The error of an output whose place the batch itself needs."""
    first = out.relative_to(folder).parts[0]
    if files.same_name(first) not in (files.same_name(REPORT_NAME), files.same_name(files.LOCK_NAME)):
        return None
    return SettingError(f"{first} in the output folder is a name that the batch needs itself; name another output.")


def _from_manifest(path: Path, naming: OutputNaming) -> Iterator[BatchJob]:
    try:
        data = path.read_bytes()
        if data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
            data = data.decode("utf-16").encode("utf-8", errors="replace")
    except (OSError, UnicodeDecodeError) as error:
        raise FileError(f"{path} could not be read as text: {error}.") from error
    for number, line in enumerate(data.splitlines(), start=1):
        if not line.strip():
            continue
        where = f"Line {number} of {path.name}"
        try:
            with beginning_with(where):
                yield _from_line(line, path.parent, naming)
        except PidecodeError as error:
            yield _failure(where, str(error))


def _from_line(line: bytes, base: Path, naming: OutputNaming) -> BatchJob:
    try:
        entry = parse_json(line)
    except JSONError as error:
        raise SettingError(f"It is not JSON that is accepted: {error}.") from None
    if not isinstance(entry, dict):
        raise SettingError('It is not a JSON object; write {"source": "cat.png"}.')
    known = ("source", "out", *MANIFEST_OPTIONS)
    for name in entry:
        if name not in known:
            raise SettingError(f"It has an entry {name!r}.{did_you_mean(name, known)}")
    name = _text(entry, "source")
    source = base / os.path.expanduser(name)
    kind = _require_kind(source, name)
    if "out" in entry:
        given = Path(_text(entry, "out"))
        if given.is_absolute() or ".." in given.parts:
            raise SettingError(f"{given} is outside the output folder; give a path inside it.")
        out = naming.out / given
        if out.suffix.lower() not in OUTPUT_SUFFIXES:
            raise SettingError(f"{given} must end in {', '.join(OUTPUT_SUFFIXES)}.")
    else:
        # A source outside the manifest's folder is named after its last part alone, so outputs stay in their folder.
        relative = Path(name)
        outside = relative.is_absolute() or ".." in relative.parts or name.startswith("~")
        out = naming.output_path(relative.name if outside else relative, source)
    real = Path(os.path.realpath(out))
    if Path(os.path.realpath(naming.out)) not in real.parents:
        raise SettingError(f"A link leads {out} out of the output folder, to {real}; name another output.")
    if reserved := _reserved(out, naming.out):
        raise reserved
    return BatchJob(name=name, source=source, kind=kind, out=out, options=_options(entry))


def _text(entry: Mapping[str, Any], name: str) -> str:
    value = entry.get(name)
    if not isinstance(value, str) or not value or "\0" in value:
        raise SettingError(f"It needs {name!r} as text without null characters; got {str(value)[:80]!r}.")
    return value


def _options(entry: Mapping[str, Any]) -> dict[str, Any]:
    """The decode options of a manifest's line, checked."""
    given = {name: entry[name] for name in MANIFEST_OPTIONS if entry.get(name) is not None}
    for name in ("seed", "prompt"):
        if isinstance(given.get(name), list):
            raise SettingError(f"{name} is a list; a line of a manifest is one job and takes one value.")
    if isinstance(given.get("size"), list):
        given["size"] = tuple(given["size"])
    DecodeOptions(**given)
    return given


def _check_outputs(jobs: Sequence[BatchJob]) -> None:
    """Refuse two outputs that some file system takes for one place, or that are written over a source."""
    runnable = [job for job in jobs if job.error is None]
    sources = {os.path.realpath(job.source): job.name for job in runnable}
    owners: dict[str, tuple[object, Path]] = {}
    for job in runnable:
        try:
            places = job.outputs()
        except PidecodeError:  # the job will fail by itself
            places = [job.out]
        for place in places:
            overwritten = sources.get(os.path.realpath(place))
            if overwritten is not None:
                raise SettingError(f"{job.name} would be written over the source {overwritten}; choose another folder.")
            files.claim(owners, place, job.name, otherwise="name the outputs in a manifest")
    for parent in {parent for _, place in owners.values() for parent in place.parents}:
        if owner := owners.get(files.same_name(parent)):
            why = "must be a folder for the image of another source. Rename one, or name the outputs in a manifest."
            raise SettingError(f"{owner[0]} would be written to {parent}, which {why}")
