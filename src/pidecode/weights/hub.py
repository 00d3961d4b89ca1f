# SPDX-License-Identifier: Apache-2.0
"""Files of hub repositories: found in the shared cache, or fetched into it, resumed where they stopped, and verified.

The cache is huggingface_hub's own, so `hf download` and other programs share it. The bytes are fetched by that
library too, but into a partial file that outlives a broken run: newer versions of it start over otherwise.
"""

from __future__ import annotations

import errno
import importlib
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from tqdm import tqdm

from pidecode.errors import DownloadError, MissingDependencyError, PidecodeError
from pidecode.weights.header import sha256

_SHA256_DIGITS = 64


@dataclass(frozen=True, slots=True)
class Progress:
    """How far the fetching of one file has come, in bytes; `total` is None until it is known."""

    file: str
    done: int
    total: int | None


OnProgress = Callable[[Progress], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Hub:
    """Where files are fetched from and kept; None takes huggingface_hub's own setting (HF_HOME, HF_ENDPOINT, ...)."""

    cache_dir: str | Path | None = None
    endpoint: str | None = None
    token: str | None = None

    @property
    def folder(self) -> Path:
        """The cache folder."""
        return Path(self.cache_dir or _library(".constants").HF_HUB_CACHE).expanduser()

    def cached(self, repository: str, path: str) -> Path | None:
        """The file, if it is in the cache; never asks the network."""
        found = _library().try_to_load_from_cache(repository, path, cache_dir=self.folder)
        return Path(found) if isinstance(found, (str, Path)) and Path(found).is_file() else None

    def snapshot(self, repository: str) -> Path | None:
        """The folder of a repository's main revision, as far as it is in the cache; never asks the network."""
        home = self.folder / f"models--{repository.replace('/', '--')}"
        try:
            folder = home / "snapshots" / (home / "refs" / "main").read_text(encoding="utf-8").strip()
        except OSError:
            return None
        return folder if folder.is_dir() else None

    def files(self, repository: str) -> list[str]:
        """Names of all files of a repository, asked of the hub. Raises DownloadError."""
        with _explained(repository, None):
            info = _library().HfApi(endpoint=self.endpoint, token=self.token).model_info(repository)
            return [sibling.rfilename for sibling in info.siblings or ()]

    def fetch(self, repository: str, path: str, on_progress: OnProgress | None = None) -> Path:
        """The file in the cache, fetched if it is not there; size and SHA-256 are checked against the hub's.

        A fetch that breaks off leaves its bytes, and the next one goes on from them.
        Raises DownloadError, in one line, with the command that does the same by hand.
        """
        if found := self.cached(repository, path):
            return found
        with _explained(repository, path):
            library = _library()
            url = library.hf_hub_url(repository, path, endpoint=self.endpoint)
            about = library.get_hf_file_metadata(url, token=self.token)
            if about.etag is None or about.size is None:
                raise DownloadError(f"{repository}: the hub does not say how large {path} is; try again later.")
            blob = self.folder / f"models--{repository.replace('/', '--')}" / "blobs" / about.etag
            if not blob.exists():
                self._fetch_blob(url, about, blob, _reporter(path, on_progress))
            done = library.hf_hub_download(
                repository, path, cache_dir=self.folder, endpoint=self.endpoint, token=self.token
            )
            return Path(done)

    def _fetch_blob(self, url: str, about: Any, blob: Path, bar: type[tqdm[Any]]) -> None:
        from filelock import FileLock, Timeout
        from huggingface_hub.file_download import http_get

        headers: dict[str, str] = _library(".utils").build_hf_headers(token=self.token)
        if urlsplit(about.location).netloc != urlsplit(url).netloc:  # storage elsewhere must not see the token
            headers.pop("authorization", None)
        blob.parent.mkdir(parents=True, exist_ok=True)
        part = blob.with_name(f"{blob.name}.pidecode.part")
        try:
            with FileLock(f"{part}.lock", timeout=0), open(part, "ab") as file:
                if file.tell() > about.size:
                    file.truncate(0)
                have = file.tell() if file.tell() <= about.size else 0
                http_get(
                    about.location, file, resume_size=have, headers=headers, expected_size=about.size, tqdm_class=bar
                )
                file.flush()
                os.fsync(file.fileno())
                _verify(part, about)
                os.replace(part, blob)
        except Timeout:
            raise DownloadError(f"Another program is fetching {blob.name} now; wait for it.") from None
        Path(f"{part}.lock").unlink(missing_ok=True)


def _library(part: str = "") -> Any:
    try:
        return importlib.import_module(f"huggingface_hub{part}")
    except ImportError as fault:
        raise MissingDependencyError(
            "Hub files need huggingface_hub; install it with `pip install huggingface-hub`."
        ) from fault


def _verify(part: Path, about: Any) -> None:
    """The hub names large files by their SHA-256; small ones have only a size to check."""
    size = part.stat().st_size
    wrong = size != about.size or (len(about.etag) == _SHA256_DIGITS and sha256(part) != about.etag)
    if wrong:
        part.unlink()
        raise DownloadError("The file arrived damaged and was thrown away; run the same command again.")


def _reporter(path: str, on_progress: OnProgress | None) -> type[tqdm[Any]]:
    class Reporter(tqdm):  # type: ignore[type-arg]
        """A silent progress bar that tells the caller."""

        def __init__(self, *args: Any, **settings: Any) -> None:
            settings.pop("name", None)
            super().__init__(*args, **{**settings, "disable": True})
            self.seen = int(settings.get("initial") or 0)
            self.whole = settings.get("total")

        def update(self, n: float | None = 1) -> bool | None:
            self.seen += int(n or 0)
            if on_progress:
                on_progress(Progress(path, self.seen, self.whole))
            return None

    return Reporter


def command(repository: str, path: str | None) -> str:
    """What to type to fetch the same by hand."""
    if path is None or not path.endswith("/"):
        return f"`hf download {repository}{f' {path}' if path else ''}`"
    return f'`hf download {repository} --include "{path}*"`'


@contextmanager
def _explained(repository: str, path: str | None) -> Iterator[None]:
    """Turn whatever the library raises into one DownloadError; our own errors and cancelling pass."""
    try:
        yield
    except PidecodeError:
        raise
    except Exception as fault:  # the library's HTTP client, and with it the exceptions, changed between versions
        raise DownloadError(_explanation(fault, repository, path)) from fault


def _explanation(fault: Exception, repository: str, path: str | None) -> str:
    errors = _library(".errors")
    what = f"{repository}: {path}" if path else repository
    by_hand = f"On a machine that can, run {command(repository, path)}; a copy of its cache folder works here too."
    if isinstance(fault, errors.GatedRepoError):
        return (
            f"{what} is gated: accept its terms at https://huggingface.co/{repository}, then run `hf auth login` "
            "and the same command again."
        )
    if isinstance(fault, errors.RepositoryNotFoundError):
        return f"{what} was not found: it does not exist, or it is private (`hf auth login`)."
    if isinstance(fault, errors.EntryNotFoundError) and not isinstance(fault, FileNotFoundError):
        return f"{what} is not in the repository any more; see https://huggingface.co/{repository}."
    if isinstance(fault, errors.OfflineModeIsEnabled):
        return f"{what} is not on this machine, and offline mode is on (HF_HUB_OFFLINE). {by_hand}"
    if isinstance(fault, OSError) and fault.errno == errno.ENOSPC:
        return f"{what} does not fit: the disk is full. Free some space and run the same command again."
    reason = (str(fault).strip().splitlines() or [type(fault).__name__])[0][:160]
    return f"{what} could not be fetched ({type(fault).__name__}: {reason}). What arrived is kept. {by_hand}"
