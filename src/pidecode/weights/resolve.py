# SPDX-License-Identifier: Apache-2.0
"""Resolving a name, path or hub id to a weights file on this machine, and the Hugging Face hub cache.

The cache is huggingface_hub's, shared with `hf download` and other programs. Downloads go into a partial file that is
kept when a run is interrupted, because newer versions of the library start over.
"""

from __future__ import annotations

import errno
import hashlib
import inspect
import json
import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from pidecode.errors import CheckpointError, DownloadError, PidecodeError, SettingError
from pidecode.files import atomic_write, sync
from pidecode.registry.checkpoints import (
    CHECKPOINTS,
    ENCODERS,
    REPOSITORY,
    TINY_ENCODER,
    Checkpoint,
    NetworkKind,
    get_checkpoint,
)
from pidecode.registry.spaces import ALIASES, SPACES, get_space
from pidecode.strict_json import JSONError, read_json
from pidecode.weights.safetensors import sha256

if TYPE_CHECKING:
    from tqdm import tqdm

_SHA256_DIGITS = 64
_COMMIT = re.compile(r"[0-9a-f]{40}")
_ETAG = re.compile(r"\w[\w.-]{0,127}")  # A hub's name of a file's content, which becomes a file's name here


@dataclass(frozen=True, slots=True)
class DownloadProgress:
    """Progress of the download of one file, in bytes; `total` is None until it is known."""

    file: str
    done: int
    total: int | None


DownloadCallback = Callable[[DownloadProgress], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class HubCache:
    """The hub cache; None takes huggingface_hub's own setting (HF_HOME, HF_ENDPOINT, ...)."""

    cache_dir: str | Path | None = None
    endpoint: str | None = None

    @property
    def folder(self) -> Path:
        """The cache folder."""
        from huggingface_hub.constants import HF_HUB_CACHE

        return Path(os.path.expanduser(self.cache_dir or HF_HUB_CACHE))

    def cached(self, repository: str, path: str, revision: str | None = None) -> Path | None:
        """The file, if it is in the cache; never asks the network.

        Without a revision, it is the main revision's; where that came later for other files, the one it was fetched at.
        """
        from huggingface_hub import try_to_load_from_cache

        for one in (revision,) if revision else (None, self._recorded(repository, path)):
            found = try_to_load_from_cache(repository, path, cache_dir=self.folder, revision=one)
            if isinstance(found, str) and os.path.isfile(found):
                return Path(found)
        return None

    def snapshot(self, repository: str, folder: str = "") -> Path | None:
        """The folder of a repository, as far as it is in the cache, or a folder in it; never asks the network.

        The revision is that of `cached`.
        """
        home = self.folder / f"models--{repository.replace('/', '--')}"
        main = ""
        with suppress(OSError):
            main = (home / "refs" / "main").read_text(encoding="utf-8").strip()
        for revision in filter(None, (main, self._recorded(repository, folder))):
            if (found := home / "snapshots" / revision / folder).is_dir():
                return found
        return None

    def listing(self, repository: str, path: str | None = None) -> tuple[str, list[str]]:
        """Commit of a repository's main branch and the names of its files, asked of the hub.

        Raises:
            DownloadError: The hub does not answer; the message names the command that downloads `path`.
        """
        from huggingface_hub import HfApi

        with _explained(repository, path):
            info = HfApi(endpoint=self.endpoint).model_info(repository)
        if not info.sha or not _COMMIT.fullmatch(info.sha):
            raise DownloadError(f"{repository}: the hub does not say which commit is its newest; try again later.")
        return info.sha, [sibling.rfilename for sibling in info.siblings or ()]

    def set_main(self, repository: str, commit: str) -> None:
        """Let a commit, whose files are here, be the main revision for every program that reads the cache."""
        file = self.folder / f"models--{repository.replace('/', '--')}" / "refs" / "main"
        file.parent.mkdir(parents=True, exist_ok=True)
        with atomic_write(file, overwrite=True) as written:
            written.write(commit.encode())

    def fetch(
        self,
        repository: str,
        path: str,
        on_progress: DownloadCallback | None = None,
        *,
        revision: str | None = None,
        expected: str | None = None,
    ) -> Path:
        """A file of a repository in the cache, downloaded if it is not there; size and hash are checked.

        An interrupted download is resumed by the next call. What was fetched is recorded below the cache's folder
        `pidecode`, with its commit and SHA-256. Without a `revision`, a commit, it comes from the main branch; a file
        of another SHA-256 than the `expected` one is refused.

        Raises:
            DownloadError: The download failed; the message names the command that does the same.
        """
        if found := self.cached(repository, path, revision):
            return found
        import huggingface_hub

        with _explained(repository, path):
            url = huggingface_hub.hf_hub_url(repository, path, revision=revision, endpoint=self.endpoint)
            about = huggingface_hub.get_hf_file_metadata(url)
            if about.etag is None or about.size is None or not _ETAG.fullmatch(about.etag):
                raise DownloadError(f"{repository}: the hub does not say how large {path} is; try again later.")
            _check_known(repository, path, about.etag, expected)
            blob = self.folder / f"models--{repository.replace('/', '--')}" / "blobs" / about.etag
            if not blob.exists():
                self._fetch_blob(url, about, blob, _reporter(path, on_progress))
            done = huggingface_hub.hf_hub_download(
                repository, path, revision=revision, cache_dir=self.folder, endpoint=self.endpoint
            )
            digest = about.etag if len(about.etag) == _SHA256_DIGITS else sha256(done)
            _check_known(repository, path, digest, expected)
            self.record(repository, path, about.commit_hash, sha256=digest)
            return Path(done)

    def record(self, repository: str, path: str, revision: str | None, **details: Any) -> None:
        """Note where a file or folder came from, so that the same one can be found and asked for again."""
        file = self._record_file(repository, path)
        file.parent.mkdir(parents=True, exist_ok=True)
        record = {"repository": repository, "path": path, "revision": revision, **details}
        with atomic_write(file, overwrite=True) as written:
            written.write(json.dumps(record, indent=1).encode())

    def recorded(self, repository: str, path: str) -> dict[str, Any]:
        """What was noted of a file or folder; empty if nothing was, or it cannot be read."""
        try:
            record = read_json(self._record_file(repository, path))
        except (OSError, JSONError):
            return {}
        return record if isinstance(record, dict) else {}

    def _recorded(self, repository: str, path: str) -> str | None:
        revision = self.recorded(repository, path).get("revision")
        return revision if isinstance(revision, str) and _COMMIT.fullmatch(revision) else None

    def _record_file(self, repository: str, path: str) -> Path:
        return self.folder / "pidecode" / f"{repository}--{path.rstrip('/')}.json".replace("/", "--")

    def _fetch_blob(self, url: str, about: Any, blob: Path, bar: type[tqdm[Any]]) -> None:
        from filelock import FileLock, Timeout
        from huggingface_hub.file_download import http_get
        from huggingface_hub.utils import build_hf_headers  # type: ignore[attr-defined]

        headers = build_hf_headers()
        if urlsplit(about.location).netloc != urlsplit(url).netloc:  # storage elsewhere must not see the token
            headers.pop("authorization", None)
        blob.parent.mkdir(parents=True, exist_ok=True)
        part = blob.with_name(f"{blob.name}.pidecode.part")
        try:
            with FileLock(f"{part}.lock", timeout=0), open(part, "ab") as file:
                if file.tell() > about.size:
                    file.truncate(0)
                have = file.tell() if file.tell() <= about.size else 0
                newer = "tqdm_class" in inspect.signature(http_get).parameters  # before 1.3 it takes a bar itself
                shown = {"tqdm_class": bar} if newer else {"_tqdm_bar": bar(initial=have, total=about.size)}
                http_get(about.location, file, resume_size=have, headers=headers, expected_size=about.size, **shown)
                file.flush()
                os.fsync(file.fileno())
                _verify(part, about)
                os.replace(part, blob)
                sync(blob.parent)
        except Timeout:
            raise DownloadError(f"Another program is fetching {blob.name} now; wait for it.") from None
        Path(f"{part}.lock").unlink(missing_ok=True)


def _check_known(repository: str, path: str, digest: str, expected: str | None) -> None:
    """Compare a SHA-256 with the registry's, where it has one; a hub's name of another kind is no SHA-256."""
    if expected is not None and len(digest) == _SHA256_DIGITS and digest != expected:
        raise DownloadError(
            f"{path} of {repository} is not the file that this version of pidecode knows: its SHA-256 is {digest}, not "
            f"{expected}. Update pidecode, or fetch the file by hand if you trust it."
        )


def _verify(part: Path, about: Any) -> None:
    """The hub names large files by their SHA-256, small ones by git's SHA-1."""
    size, etag = part.stat().st_size, about.etag
    right = size == about.size
    if right and len(etag) == _SHA256_DIGITS:
        right = sha256(part) == etag
    elif right and re.fullmatch(r"[0-9a-f]{40}", etag):
        right = hashlib.sha1(b"blob %d\0" % size + part.read_bytes(), usedforsecurity=False).hexdigest() == etag
    if not right:
        part.unlink()
        raise DownloadError("The file arrived damaged and was deleted; run the same command again.")


def _reporter(path: str, on_progress: DownloadCallback | None) -> type[tqdm[Any]]:
    from tqdm import tqdm

    class Reporter(tqdm):  # type: ignore[type-arg]
        """A progress bar that prints nothing and calls `on_progress`."""

        def __init__(self, *args: Any, **settings: Any) -> None:
            settings.pop("name", None)
            super().__init__(*args, **{**settings, "disable": True})
            self.seen, self.whole = int(settings.get("initial") or 0), settings.get("total")

        def update(self, n: float | None = 1) -> bool | None:
            self.seen += int(n or 0)
            if on_progress:
                on_progress(DownloadProgress(path, self.seen, self.whole))
            return None

    return Reporter


def command(repository: str, path: str | None) -> str:
    """The shell command that downloads the same."""
    if path is None or not path.endswith("/"):
        return f"`hf download {repository}{f' {path}' if path else ''}`"
    return f'`hf download {repository} --include "{path}*"`'


@contextmanager
def _explained(repository: str, path: str | None) -> Iterator[None]:
    """Turn whatever the library raises into one DownloadError; our own errors and cancelling pass."""
    from huggingface_hub import errors

    what = f"{repository}: {path}" if path else repository
    by_hand = f"On a machine that can, run {command(repository, path)}; a copy of its cache folder works here too."
    try:
        yield
    except PidecodeError:
        raise
    except Exception as fault:  # the library's HTTP client, and with it the exceptions, changed between versions
        if isinstance(fault, errors.GatedRepoError):
            why = (
                f"is gated: accept its terms at https://huggingface.co/{repository}, then run `hf auth login` "
                "and the same command again."
            )
        elif isinstance(fault, errors.RepositoryNotFoundError):
            why = "was not found: it does not exist, or it is private (`hf auth login`)."
        elif isinstance(fault, errors.EntryNotFoundError) and not isinstance(fault, FileNotFoundError):
            why = f"is not in the repository any more; see https://huggingface.co/{repository}."
        elif isinstance(fault, errors.OfflineModeIsEnabled):
            why = f"is not on this machine, and offline mode is on (HF_HUB_OFFLINE). {by_hand}"
        elif isinstance(fault, OSError) and fault.errno == errno.ENOSPC:
            why = "does not fit: the disk is full. Free some space and run the same command again."
        else:
            reason = (str(fault).strip().splitlines() or [type(fault).__name__])[0][:160]
            why = f"could not be fetched ({type(fault).__name__}: {reason}). What arrived is kept. {by_hand}"
        raise DownloadError(f"{what} {why}") from fault


_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
_SUFFIXES = (".safetensors", ".pth", ".pt", ".ckpt", ".bin")


@dataclass(frozen=True, slots=True, kw_only=True)
class ResolvedCheckpoint:
    """A weights file, what its name says about it, and the image encoder of its space if it is on this machine."""

    path: Path
    name: str
    space: str | None = None
    variant: str | None = None
    kind: NetworkKind | None = None
    encoder: Path | None = None


def resolve_checkpoint(
    name: str | Path,
    *,
    space: str | None = None,
    variant: str | None = None,
    kind: NetworkKind | None = None,
    hub: HubCache | None = None,
) -> ResolvedCheckpoint:
    """Find the weights file of a name; nothing is downloaded.

    Args:
        name: "tiny" (ships with the package), a space or a name that `pidecode models` lists, a file, a folder with
            one weights file or with the official folders, or a hub id. A file or folder of that name comes first.
        space: Latent space; chooses the file of the official repository or folder.
        variant: Likewise; None for the space's default.
        kind: Likewise; None for the distilled student.
        hub: The hub cache.

    Raises:
        SettingError: The name is unknown, or `space` must be given.
        CheckpointError: A folder holds no weights file, or several.
        DownloadError: The file is not on this machine; the message names the command that downloads it.
    """
    hub = hub or HubCache()
    path = Path(os.path.expanduser(name))
    bundled = [row.variant for row in CHECKPOINTS.values() if row.bundled]
    # os.path has no errors where a name is too long or a folder may not be read.
    if str(name) in bundled or not os.path.exists(path):
        row = _listed(str(name), variant, kind)
        if row is not None:
            return _released(row, space, hub)
    if not (os.path.lexists(path) or path.suffix in _SUFFIXES):
        if not _HUB_ID.fullmatch(str(name)):
            raise SettingError(
                f"{str(name)!r} is no file or folder here and no known decoder. Give a path, "
                f"{' or '.join(map(repr, bundled))}, or {REPOSITORY!r} with space=; `pidecode models` lists them."
            )
        if str(name).lower() == REPOSITORY.lower():
            return _released(_row(space, variant, kind, REPOSITORY), space, hub)
        found = hub.snapshot(str(name))
        if found is None:
            raise DownloadError(f"{name} is not on this machine; fetch it with {command(str(name), None)}.")
        path = found
    if os.path.isdir(path):
        path = _in_folder(path, space, variant, kind)
    encoder = cached_encoder_path(get_space(space).name, hub) if space in {*SPACES, *ALIASES} else None
    return ResolvedCheckpoint(path=path, name=path.stem, space=space, variant=variant, kind=kind, encoder=encoder)


def _listed(name: str, variant: str | None, kind: NetworkKind | None) -> Checkpoint | None:
    """The row of a name as `pidecode models` prints it, of one that ships, or of a space; None for other names."""
    rows = {each: row for row in CHECKPOINTS.values() for each in (row.name, row.variant if row.bundled else row.name)}
    row = rows.get(name)
    if row is None:
        return get_checkpoint(name, variant, kind) if name in SPACES or name in ALIASES else None
    if variant not in (None, row.variant) or kind not in (None, row.kind):
        others = [other.variant for other in rows.values() if other.space == row.space and not other.bundled]
        raise SettingError(
            f"{name} is variant {row.variant} and a {row.kind}; leave variant and kind out, or name the space alone: "
            f"{row.space} has {', '.join(dict.fromkeys(filter(None, others)))}."
        )
    return row


def _released(row: Checkpoint, space: str | None, hub: HubCache) -> ResolvedCheckpoint:
    if space is not None and row.latent_space and get_space(space).name != row.space:
        raise SettingError(f"{row.variant} decodes latents of space {row.space}, not of {get_space(space).name}.")
    path = asset(row.path) if row.bundled else _in_cache(row, hub)
    encoder = asset(TINY_ENCODER) if row.bundled else cached_encoder_path(row.space, hub)
    name = row.variant if row.bundled else row.name
    return ResolvedCheckpoint(
        path=path, name=name, space=row.space, variant=row.variant, kind=row.kind, encoder=encoder
    )


def asset(name: str) -> Path:
    """A file that ships with the package; reading it says so if this installation lacks it."""
    return Path(str(resources.files("pidecode"))) / "assets" / name


def cached_encoder_path(space: str, hub: HubCache | None = None) -> Path | None:
    """The official encoder of a space where `pidecode pull` puts it, a file or a folder; None if it is not there."""
    row, hub = ENCODERS.get(space), hub or HubCache()
    if row is None:
        return None
    return (hub.snapshot if row.path.endswith("/") else hub.cached)(row.repository, row.path)


def default_encoder_path(space: str | None) -> Path | None:
    """The encoder of a file's own space: the pulled one, else for FLUX.2 the small one that ships with the package."""
    if space is None:
        return None
    name = get_space(space).name
    return cached_encoder_path(name) or (asset(TINY_ENCODER) if name == "flux2" else None)


def _row(space: str | None, variant: str | None, kind: NetworkKind | None, where: str) -> Checkpoint:
    if space is None:
        names = sorted({row.space for row in CHECKPOINTS.values() if not row.bundled})
        raise SettingError(f"{where} holds networks for several latent spaces; say space= one of {', '.join(names)}.")
    return get_checkpoint(space, variant, kind)


def _in_folder(folder: Path, space: str | None, variant: str | None, kind: NetworkKind | None) -> Path:
    weights = sorted(path for path in folder.iterdir() if path.suffix in _SUFFIXES and not path.name.startswith("."))
    if len(weights) == 1:
        return weights[0]
    official = {row.path: row for row in CHECKPOINTS.values() if not row.bundled}
    here = [row for path, row in official.items() if _official(folder, path)]
    if here:
        row = _row(space, variant, kind, str(folder))
        if found := _official(folder, row.path):
            return found
        names = ", ".join(other.name for other in here)
        raise CheckpointError(f"{folder} has no {row.name} ({row.path}); it has {names}.")
    if not weights:
        raise CheckpointError(f"{folder} holds no weights file ({', '.join(_SUFFIXES)}); name the file.")
    names = ", ".join(path.name for path in weights[:6])
    raise CheckpointError(f"{folder} holds {len(weights)} weights files ({names}); name the one you mean.")


def _official(folder: Path, path: str) -> Path | None:
    """The official file below a copy of the repository, or of its `checkpoints` folder."""
    places = (place for moved in _official_paths(path) for place in (folder / moved, folder / moved.partition("/")[2]))
    return next((place for place in places if place.is_file()), None)


def _official_paths(path: str) -> list[str]:
    """Where a file was released, and where it may lie since: dated when trained anew, deprecated when replaced."""
    folder, _, rest = path.partition("/")
    name, slash, file = rest.partition("/")
    return [path, *([f"{folder}/{name}_2606/{file}"] if slash else []), f"{folder}_deprecated/{rest}"]


def _in_cache(row: Checkpoint, hub: HubCache) -> Path:
    repository = row.repository or REPOSITORY
    for path, revision in ((row.path, row.revision), *((path, None) for path in _official_paths(row.path))):
        if found := hub.cached(repository, path, revision):
            return found
    teacher = f" --kind {row.kind}" if row.kind == "teacher" else ""
    raise DownloadError(
        f"{row.name} of {repository} is not on this machine. Fetch it with `pidecode pull {row.space} "
        f"--variant {row.variant}{teacher}`, which first shows its license ({row.license.name}), or with "
        f"{command(repository, row.path)}."
    )
