# SPDX-License-Identifier: Apache-2.0
"""Training images: where they are, which bucket size each gets, and in which order they are seen.

A folder of images and a folder of WebDataset shards both give a list of entries, each a range of bytes in a file. The
order is a function of the seed and the step alone, so a resumed run needs no other state.
"""

from __future__ import annotations

import hashlib
import io
import math
import os
import tarfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from pidecode.errors import TrainingError
from pidecode.files import walk
from pidecode.strict_json import JSONError, parse_json
from pidecode.training.noise import seed_of
from pidecode.units import decode_text

IMAGES = frozenset({".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff", ".avif"})
_CAPTIONS = (".txt", ".caption", ".json")
_EXIF_ORIENTATION, _SIDEWAYS = 274, {5, 6, 7, 8}


@dataclass(frozen=True, slots=True)
class FileSlice:
    """A range of bytes in a file."""

    path: Path
    offset: int = 0
    length: int = -1

    def read(self) -> bytes:
        """The bytes themselves."""
        with open(self.path, "rb") as file:
            file.seek(self.offset)
            return file.read(self.length)


@dataclass(frozen=True, slots=True)
class ImageEntry:
    """One image: its name, its bytes and those of its caption, and its size after EXIF rotation."""

    name: str
    image: FileSlice
    caption: FileSlice | None
    height: int
    width: int

    def read_caption(self) -> str:
        """The caption, or the empty one: text beside the image, or "caption" (or "text") of a JSON file."""
        if self.caption is None:
            return ""
        text = decode_text(self.caption.read(), f"The caption {self.caption.path}").strip()
        if not text.startswith("{"):
            return text
        try:
            fields = parse_json(text)
        except JSONError:
            return text
        return str(fields.get("caption", fields.get("text", "")))


@dataclass(frozen=True, slots=True)
class ImageDataset:
    """All readable entries, and unreadable files with the reason."""

    entries: tuple[ImageEntry, ...]
    skipped: dict[str, str]

    @property
    def fingerprint(self) -> str:
        """Changes when images are added, removed or resized."""
        text = "\n".join(f"{entry.name} {entry.height} {entry.width}" for entry in self.entries)
        return hashlib.sha256(text.encode()).hexdigest()[:16]


def find_images(source: str | Path) -> ImageDataset:
    """Every image below a folder (or in one shard), loose or in .tar shards, in a fixed order.

    Files whose header is no image's are skipped, and listed with the reason.

    Raises:
        TrainingError: There is no readable image.
    """
    skipped: dict[str, str] = {}
    try:
        root = Path(os.path.expanduser(source))
        if not str(source) or not os.path.exists(root):
            raise TrainingError(f"There are no images at {str(source)!r}; set data.source to a folder or a .tar shard.")
        files = [root] if os.path.isfile(root) else sorted(_walk(root, skipped))
    except (OSError, ValueError, RuntimeError) as fault:  # a name too long, a null byte, ~ of an unknown user
        raise TrainingError(f"data.source={str(source)[:200]!r} cannot be read: {fault}.") from fault
    found: list[tuple[str, FileSlice, FileSlice | None]] = []
    base = root.parent if os.path.isfile(root) else root
    present = set(files)
    for path in files:
        name = _name(path.relative_to(base))
        if path.suffix.lower() == ".tar":
            found += _in_shard(path, name, skipped)
        elif path.suffix.lower() in IMAGES:
            beside = next((path.with_suffix(end) for end in _CAPTIONS if path.with_suffix(end) in present), None)
            found.append((name, FileSlice(path), None if beside is None else FileSlice(beside)))
    entries: list[ImageEntry] = []
    for name, image, caption in found:
        try:
            entries.append(ImageEntry(name, image, caption, *_size_of(image)))
        except Exception as fault:  # a hostile file can make a decoder raise nearly anything
            skipped[name] = str(fault) or type(fault).__name__
    if not entries:
        first = next(iter(skipped.values()), None)
        why = f" {len(skipped)} files were skipped, the first because: {first}." if skipped else ""
        raise TrainingError(f"{root} holds no readable image.{why}")
    return ImageDataset(tuple(entries), skipped)


def _walk(root: Path, skipped: dict[str, str]) -> Iterator[Path]:
    """Files below a folder; folders that cannot be read, or are links and could lead in a circle, are skipped."""

    def unreadable(fault: OSError) -> None:
        if Path(fault.filename) == root:
            raise fault
        skipped[_name(Path(fault.filename).relative_to(root))] = f"the folder cannot be read: {fault.strerror}"

    for folder, names, files in walk(root, unreadable):
        for path in (Path(folder, name) for name in names):
            if path.is_symlink():
                skipped[_name(path.relative_to(root))] = "links to folders are not followed"
        yield from (path for path in (Path(folder, name) for name in files) if os.path.isfile(path))


def _in_shard(path: Path, name: str, skipped: dict[str, str]) -> list[tuple[str, FileSlice, FileSlice | None]]:
    """Samples of a WebDataset shard: members that share a name up to its first dot."""
    images: dict[str, FileSlice] = {}
    captions: dict[str, FileSlice] = {}
    try:
        with tarfile.open(path, "r:") as shard:
            for member in shard:
                if not member.isfile():
                    continue
                _, dot, ending = member.name.rpartition("/")[2].partition(".")
                key, suffix = member.name.removesuffix(dot + ending), (dot + ending).lower()
                source = FileSlice(path, member.offset_data, member.size)
                if suffix in IMAGES:
                    images[key] = source
                elif suffix in _CAPTIONS:
                    captions.setdefault(key, source)
    except (tarfile.TarError, OSError, EOFError) as fault:
        # What was read before the damage is complete and is used.
        skipped[name] = f"the shard is damaged: {fault}"
    return [(f"{name}/{_name(Path(key))}", source, captions.get(key)) for key, source in images.items()]


def _name(path: Path) -> str:
    """A file's name as text that checkpoints can hold, also where it is no UTF-8."""
    return os.fsencode(path.as_posix()).decode("utf-8", "backslashreplace")


def _size_of(source: FileSlice) -> tuple[int, int]:
    """Height and width of an image after EXIF rotation, from its header."""
    data = io.BytesIO(source.read()) if source.length >= 0 else source.path
    with Image.open(data) as image:
        # Asking a PNG without this chunk at its beginning would unpack all of it.
        tagged = image.format != "PNG" or "exif" in image.info
        sideways = tagged and image.getexif().get(_EXIF_ORIENTATION) in _SIDEWAYS
        width, height = image.size
    return (width, height) if sideways else (height, width)


@dataclass(frozen=True, slots=True)
class BatchIndices:
    """Entries of one forward pass over all processes, all of one bucket size."""

    size: tuple[int, int]
    entries: tuple[int, ...]


class BucketSampler:
    """Order of entries: every batch is of one bucket size, and each epoch sees every entry at least once.

    The last batch of a size in an epoch is filled up from the beginning of that size.
    """

    def __init__(
        self, entries: Sequence[ImageEntry], sizes: Sequence[tuple[int, int]], batch_size: int, seed: int
    ) -> None:
        self._batch_size, self._seed = batch_size, seed
        self.members: dict[tuple[int, int], list[int]] = {}  # indices of the entries of each bucket size
        for index, entry in enumerate(entries):
            self.members.setdefault(nearest_size(entry, sizes), []).append(index)
        self.batches_per_epoch = sum(math.ceil(len(members) / batch_size) for members in self.members.values())
        self._epoch, self._order = -1, list[BatchIndices]()

    def batch(self, number: int) -> BatchIndices:
        """The batch of that number, counted from 0 over the whole run."""
        epoch, place = divmod(number, self.batches_per_epoch)
        if self._epoch != epoch:
            self._epoch = epoch
            rng = np.random.default_rng(seed_of(self._seed, "order", epoch))
            batches: list[BatchIndices] = []
            for size, members in sorted(self.members.items()):
                shuffled = [members[index] for index in rng.permutation(len(members))]
                for start in range(0, len(shuffled), self._batch_size):
                    chosen = [shuffled[(start + place) % len(shuffled)] for place in range(self._batch_size)]
                    batches.append(BatchIndices(size, tuple(chosen)))
            self._order = [batches[index] for index in rng.permutation(len(batches))]
        return self._order[place]


def nearest_size(entry: ImageEntry, sizes: Sequence[tuple[int, int]]) -> tuple[int, int]:
    """The size whose aspect ratio is nearest the entry's; of several with that ratio, the nearest in area."""
    own = math.log(entry.height / entry.width)

    def distance(size: tuple[int, int]) -> tuple[float, float]:
        area = abs(math.log(size[0] * size[1] / (entry.height * entry.width)))
        return round(abs(math.log(size[0] / size[1]) - own), 6), area

    return min(sizes, key=distance)
