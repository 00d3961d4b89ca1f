# SPDX-License-Identifier: Apache-2.0
"""Atomic and durable writes, and locks: a file or folder appears complete under its name, or not at all.

What is written is flushed to the disk before it gets its name, so that a power cut leaves the old or the new content.
"""

from __future__ import annotations

import errno
import os
import re
import secrets
import shutil
import socket
import stat
import time
import unicodedata
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from pidecode.errors import FileError, SettingError

PathLike = str | os.PathLike[str]  # A path as users give it

PART = ".pidecode.part"  # ending of the temporary files and folders that are not yet complete
_PART_NAME = re.compile(r"\..*\.[0-9a-f]{8}" + re.escape(PART), re.DOTALL)
LOCK_NAME = ".pidecode.lock"  # name of the lock file in a folder that one process alone writes into
_NAME_BYTES = 200  # bytes of a file's name that its temporary name keeps; file systems allow 255 in all


def require_file(path: PathLike) -> None:
    """Raise FileError if there is no regular file; unlike with `Path.is_file`, no name raises anything else."""
    try:
        mode = os.stat(path).st_mode
    except (FileNotFoundError, NotADirectoryError) as error:
        name = os.fspath(path)
        if re.match("https?:/", name):
            raise FileError(f"{name[:200]} is an address, and nothing is fetched here; download it.") from error
        raise FileError(f"There is no file {name}.") from error
    except (OSError, ValueError) as error:
        raise FileError(f"{os.fspath(path)} cannot be read: {_reason(error)}.") from error
    if not stat.S_ISREG(mode):
        raise FileError(f"{os.fspath(path)} is {'a folder' if stat.S_ISDIR(mode) else 'not a regular file'}.")


BASE64 = (b"iVBORw0KGgo", b"/9j/", b"R0lGOD", b"UklGR")  # how PNG, JPEG, GIF and WebP files begin in base64


def why_no_file(name: str) -> str:
    """What is wrong with the name of an image, for the end of a sentence."""
    if not name:
        return "is no file; name one"
    if os.path.exists(name):
        return "is a folder" if os.path.isdir(name) else "is not a file"
    if name.startswith("data:"):
        return "is a data URL; give its bytes: base64.b64decode(url.partition(',')[2])"
    if len(name) > 40 and name.startswith(tuple(map(bytes.decode, BASE64))):
        return "is base64 text; give its bytes: base64.b64decode(text)"
    if name.startswith(("http://", "https://", "file://")):
        return "is an address, and nothing is fetched here; download it, and give the file or its bytes"
    return "does not exist" + (" (~ stands as it is; write os.path.expanduser(name))" if name.startswith("~") else "")


def read_small(path: PathLike, max_bytes: int = 1 << 20) -> bytes:
    """The content of a small file; OSError for what is larger, or a device or pipe, which might never end."""
    with open(os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0)), "rb") as file:
        if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
            raise OSError(errno.EINVAL, "it is not a regular file", os.fspath(path))
        data = file.read(max_bytes + 1)
    if len(data) > max_bytes:
        raise OSError(errno.EFBIG, f"it is larger than {max_bytes:,} bytes", os.fspath(path))
    return data


def cache_folder() -> Path:
    """Below which pidecode keeps what can be computed again: $PIDECODE_CACHE, else in the user's cache folder."""
    own = os.environ.get("PIDECODE_CACHE")
    base = Path(own) if own else Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "pidecode"
    return Path(os.path.expanduser(base))


def same_name(path: PathLike) -> str:
    """A text that is equal for paths that some file systems take for one: by case, and by how accents are written."""
    return unicodedata.normalize("NFC", unicodedata.normalize("NFC", os.path.abspath(path)).lower())


HEAD_BYTES = 1 << 16  # bytes at the start of a file that tell what it is


def may_hold_frames(start: bytes) -> bool:
    """Whether an image file of which this is the start may hold several frames or pages."""
    several = start.startswith((b"GIF8", b"II*\0", b"MM\0*"))
    return several or any(name in start for name in (b"acTL", b"ANIM", b"avis"))


def cut_name(stem: str, ending: str) -> str:
    """The name `stem + ending`, its stem cut so that file systems take it: 255 bytes."""
    raw, left = os.fsencode(stem), 255 - len(os.fsencode(ending))
    return (stem if len(raw) <= left else raw[:left].decode(errors="ignore")) + ending


def numbered(path: Path, count: int) -> list[Path]:
    """So many paths, with -1, -2, ... before the suffix."""
    return [path.with_name(cut_name(path.stem, f"-{number}{path.suffix}")) for number in range(1, count + 1)]


def claim(places: dict[str, tuple[object, Path]], path: Path, source: object, *, otherwise: str) -> None:
    """Note that `source` is written to `path`; SettingError if another one is, with what helps `otherwise`."""
    other, place = places.setdefault(same_name(path), (source, path))
    if place is not path:
        also = "" if place == path else f", which some file systems take for {place}"
        raise SettingError(
            f"{other} and {source} would both be written to {path}{also}. Keep their suffixes in the names "
            f"(keep_suffix=True), rename one, or {otherwise}."
        )


def check_writable(path: PathLike, *, overwrite: bool = False) -> Path:
    """The path with links resolved, if a file may be written there; call it before the work that makes it.

    Raises:
        FileError: A file exists there and `overwrite` is False, it is not a regular file, or its folder does not exist
            or cannot be written to.
    """
    target = _checked_target(path, overwrite=overwrite)
    _probe(target.parent)
    return target


def writable_folder(path: PathLike) -> Path:
    """Create a folder with its parents, if it does not exist; FileError if it cannot be created or written to."""
    folder = Path(path)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except FileExistsError as error:
        raise FileError(f"{path} is a file; give the name of a folder.") from error
    except (OSError, ValueError) as error:
        raise FileError(f"The folder {path} cannot be created: {_reason(error)}. Choose another one.") from error
    _probe(folder)
    return folder


def _checked_target(path: PathLike, *, overwrite: bool) -> Path:
    try:
        target = Path(os.path.realpath(path))
        if target.is_dir():
            raise FileError(f"{path} is a folder; give the name of a file in it.")
        if os.path.lexists(target) and not target.is_file():
            raise FileError(f"{path} is not a regular file; give the name of one.")
        if target.exists() and not overwrite:
            raise FileError(f"{path} exists already. Choose another name, or allow overwriting with overwrite=True.")
        if not target.parent.is_dir():
            raise FileError(f"The folder {target.parent} does not exist; create it first.")
    except (OSError, ValueError) as error:  # a name that is too long or has a null byte, a folder that may not be read
        raise FileError(f"{path} cannot be written: {_reason(error)}. Choose another name.") from error
    return target


def _probe(folder: Path) -> None:
    """Raise FileError if no file can be created in a folder; permissions do not tell of read-only file systems."""
    part = _part_of(folder / "probe")
    try:
        try:
            part.touch(exist_ok=False)
        finally:
            part.unlink(missing_ok=True)
    except OSError as error:
        why = f"cannot be written to: {_reason(error)}. Choose another one, or allow writing."
        raise FileError(f"The folder {folder} {why}") from error


def _reason(error: OSError | ValueError) -> str:
    return str(getattr(error, "strerror", None) or error)


@contextmanager
def atomic_path(path: PathLike, *, overwrite: bool = False) -> Iterator[Path]:
    """A path beside `path` for libraries that write to paths; what is there at the end moves to `path`.

    Yields:
        A path that does not exist yet. If the block raises, what was written there is removed.

    Raises:
        FileError: `path` may not be written, was created by another process meanwhile, or the system refused to write.
    """
    target = _checked_target(path, overwrite=overwrite)
    part = _part_of(target)
    try:
        yield part
        sync(part)
        _move(part, target, overwrite)
        sync(target.parent)
    except FileExistsError as error:
        raise FileError(f"{path} was created by another process meanwhile; it was left as it is.") from error
    except OSError as error:
        raise FileError(f"{path} could not be written: {_reason(error)}.") from error
    finally:
        with suppress(OSError):  # where nothing can be written, nothing is left; the first error counts
            part.unlink(missing_ok=True)


@contextmanager
def atomic_write(path: PathLike, *, overwrite: bool = False) -> Iterator[BinaryIO]:
    """A binary file that appears at `path` only when the block ends without an error.

    Yields:
        The open file; errors are those of `atomic_path`.
    """
    with atomic_path(path, overwrite=overwrite) as part, open(part, "xb") as file:
        yield file


@contextmanager
def atomic_folder(path: PathLike) -> Iterator[Path]:
    """A new empty folder that appears at `path`, in place of one that is there, when the block ends without an error.

    Yields:
        The temporary folder to write into.

    Raises:
        OSError: The system refused to write; nothing is left behind.
    """
    target = Path(path)
    part = _part_of(target)
    part.mkdir()
    try:
        yield part
        for written in (*part.rglob("*"), part):
            sync(written)
        remove_folder(target)
        os.replace(part, target)
        sync(target.parent)
    finally:
        shutil.rmtree(part, ignore_errors=True)


def remove_folder(path: PathLike) -> None:
    """Remove a folder if it exists; a process killed meanwhile leaves all of it or a temporary folder."""
    part = _part_of(Path(path))
    with suppress(FileNotFoundError):
        os.replace(path, part)
        shutil.rmtree(part, ignore_errors=True)


def sync(path: PathLike) -> None:
    """Flush a file, or the names in a folder, to the disk; OSError if a file cannot be, as on a full disk."""
    folder = os.path.isdir(path)
    with suppress(*(OSError,) if folder else ()):  # Windows and some network file systems sync no folders
        handle = os.open(path, os.O_RDWR if os.name == "nt" else os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


class FolderLock:
    """The right of one process to write into a folder; the system gives it back when the process ends in any way.

    Args:
        folder: The folder; created if it does not exist.
        activity: What goes on there, for the error of others: "training", "batch".

    Raises:
        FileError: Another process holds the lock, or the folder cannot be written to.
    """

    def __init__(self, folder: PathLike, activity: str) -> None:
        from filelock import FileLock, Timeout

        self.path, self._process = writable_folder(folder) / LOCK_NAME, os.getpid()
        self._lock = FileLock(self.path, timeout=0, thread_local=False)  # any thread may release it
        try:
            self._lock.acquire()
        except Timeout:
            owner = "another process"
            with suppress(OSError):  # Windows lets nobody else read it
                owner = read_small(self.path, 1000).decode(errors="replace") or owner
            raise FileError(
                f"{self.path.parent} is in use by {owner}. Wait until it ends, or choose another folder; if it ended "
                f"long ago, as a disk without locks does not tell, delete {self.path}."
            ) from None
        except OSError as error:
            cure = "Delete it if it is no ordinary file, or choose a folder on another disk."
            raise FileError(f"{self.path} could not be locked: {_reason(error)}. {cure}") from error
        with suppress(OSError):
            self.path.write_text(f"a {activity}: process {self._process} on {socket.gethostname()}", encoding="utf-8")

    def release(self) -> None:
        """Give the folder back; a second call does nothing, nor one in a fork, which does not own it."""
        if self._lock.is_locked and os.getpid() == self._process:
            with suppress(OSError):  # Windows removes no open file; there the lock does
                self.path.unlink()
            self._lock.release()

    def __enter__(self) -> FolderLock:
        return self

    def __exit__(self, *error: object) -> None:
        self.release()


def walk(
    folder: PathLike, onerror: Callable[[OSError], object] | None = None
) -> Iterator[tuple[str, list[str], list[str]]]:
    """As `os.walk`, sorted and to any depth; up to Python 3.11 that one calls itself for each level."""
    waiting = [os.fspath(folder)]
    while waiting:
        here = waiting.pop()
        try:
            with os.scandir(here) as entries:
                found = sorted(
                    (entry.name, os.path.isdir(entry.path) if entry.is_symlink() else entry.is_dir())
                    for entry in entries
                )
        except OSError as error:
            if onerror is not None:
                onerror(error)
            continue
        folders = [name for name, is_folder in found if is_folder]
        yield here, folders, [name for name, is_folder in found if not is_folder]
        inside = [os.path.join(here, name) for name in reversed(folders)]
        waiting += [path for path in inside if not os.path.islink(path)]


def remove_partial(folder: PathLike, *, older_than: float = 0.0) -> None:
    """Remove temporary files and folders that a killed process left in `folder` and below, by this module's names.

    Those changed within the last `older_than` seconds stay, as they may belong to a running process.
    """
    for here, folders, files in walk(folder):
        parts = [name for name in (*folders, *files) if _PART_NAME.fullmatch(name)]
        folders[:] = [name for name in folders if name not in parts]
        for part in (Path(here, name) for name in parts):
            with suppress(OSError):  # gone meanwhile, or not ours to remove
                if older_than and time.time() - part.lstat().st_mtime <= older_than:
                    continue
                if part.is_dir() and not part.is_symlink():
                    shutil.rmtree(part)
                else:
                    part.unlink()


def _part_of(target: Path) -> Path:
    """A new temporary name beside `target`; see `_PART_NAME`."""
    stem = os.fsencode(target.name)[:_NAME_BYTES].decode(errors="ignore")
    return target.with_name(f".{stem}.{secrets.token_hex(4)}{PART}")


def _move(part: Path, target: Path, overwrite: bool) -> None:
    if overwrite:
        os.replace(part, target)
        return
    try:
        os.link(part, target)  # unlike a rename, this fails where a file has appeared meanwhile
    except OSError:  # it has, or the file system has no hard links
        if target.exists():
            raise FileExistsError(target) from None
        os.replace(part, target)
