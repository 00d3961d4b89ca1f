# SPDX-License-Identifier: Apache-2.0
"""Atomic and durable writes, and locks: a file or folder appears complete under its name, or not at all.

What is written is flushed to the disk before it gets its name, and its folder after that, so that a power cut leaves
the old or the new content, never a part of it.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import re
import secrets
import shutil
import socket
import stat
import threading
import time
import unicodedata
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from pidecode.errors import FileError

PathLike = str | os.PathLike[str]  # A path as users give it

PART = ".pidecode.part"  # ending of the temporary files and folders that are not yet complete
_PART_NAME = re.compile(r"\..*\.[0-9a-f]{8}" + re.escape(PART), re.DOTALL)
LOCK_NAME = ".pidecode.lock"  # name of the lock file in a folder that one process alone writes into
LOCK_REFRESH, LOCK_EXPIRY = 20.0, 120.0
"""Seconds between refreshes of a lock, and without one after which another machine takes it over."""
_NAME_BYTES = 200  # bytes of a file's name that its temporary name keeps; file systems allow 255 in all


def require_file(path: PathLike) -> None:
    """Check that there is a regular file; unlike `Path.is_file`, no name makes it raise anything else.

    Raises:
        FileError: There is none, it is something else, or the system does not tell.
    """
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
    """The content of a small file that another program may have put in the place of ours.

    Raises:
        OSError: It cannot be read, is larger, or is a device or pipe, which might never end.
    """
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


def check_writable(path: str | os.PathLike[str], *, overwrite: bool = False) -> Path:
    """The path with links resolved, if a file may be written there; call it before the work that makes it.

    Permissions alone do not tell of read-only file systems: a file is written beside it and removed.

    Raises:
        FileError: A file exists there and `overwrite` is False, it is not a regular file, or its folder does not exist
            or cannot be written to.
    """
    target = _checked_target(path, overwrite=overwrite)
    _probe(target.parent)
    return target


def writable_folder(path: str | os.PathLike[str]) -> Path:
    """Create a folder with its parents, if it does not exist, and check by writing that files can be created in it.

    Raises:
        FileError: The folder cannot be created or written to.
    """
    folder = Path(path)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except FileExistsError as error:
        raise FileError(f"{path} is a file; give the name of a folder.") from error
    except (OSError, ValueError) as error:
        raise FileError(f"The folder {path} cannot be created: {_reason(error)}. Choose another one.") from error
    _probe(folder)
    return folder


def _checked_target(path: str | os.PathLike[str], *, overwrite: bool) -> Path:
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
    """Raise FileError if no file can be created in a folder."""
    part = _part_of(folder / "probe")
    try:
        with open(part, "xb"):
            pass
        part.unlink()
    except OSError as error:
        raise FileError(
            f"The folder {folder} cannot be written to: {_reason(error)}. Choose another one, or allow writing."
        ) from error


def _reason(error: OSError | ValueError) -> str:
    return str(getattr(error, "strerror", None) or error)


@contextmanager
def atomic_path(path: str | os.PathLike[str], *, overwrite: bool = False) -> Iterator[Path]:
    """A path beside `path` for libraries that write to paths; what is there at the end moves to `path`.

    The file and its folder are flushed to the disk.

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
        with contextlib.suppress(OSError):  # where nothing can be written, nothing is left; the first error counts
            part.unlink(missing_ok=True)


@contextmanager
def atomic_write(path: str | os.PathLike[str], *, overwrite: bool = False) -> Iterator[BinaryIO]:
    """A binary file that appears at `path` only when the block ends without an error.

    Yields:
        The open file; errors are those of `atomic_path`.
    """
    with atomic_path(path, overwrite=overwrite) as part, open(part, "xb") as file:
        yield file


@contextmanager
def atomic_folder(path: str | os.PathLike[str]) -> Iterator[Path]:
    """A new empty folder that appears at `path`, in place of one that is there, when the block ends without an error.

    Its files, it and its parent are flushed to the disk.

    Yields:
        The temporary folder to write into.

    Raises:
        OSError: The system refused to write; nothing is left behind, and an earlier folder at `path` is kept unless
            it was already being replaced.
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


def remove_folder(path: str | os.PathLike[str]) -> None:
    """Remove a folder if it exists; a process killed meanwhile leaves all of it or a temporary folder.

    Raises:
        OSError: The folder cannot be renamed.
    """
    part = _part_of(Path(path))
    with contextlib.suppress(FileNotFoundError):
        os.replace(path, part)
        shutil.rmtree(part, ignore_errors=True)


def sync(path: str | os.PathLike[str]) -> None:
    """Flush a file, or the names in a folder, to the disk.

    Raises:
        OSError: The disk reports an error of a file, for instance that it is full.
    """
    folder = os.path.isdir(path)
    with contextlib.suppress(*(OSError,) if folder else ()):  # Windows and some network file systems sync no folders
        handle = os.open(path, os.O_RDWR if os.name == "nt" else os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


class FolderLock:
    """The right of one process to write into a folder, as a file in it; it survives a killed owner.

    The file names the owner's machine and process. On the same machine the lock of a process that has ended is taken
    over at once; that of another machine, or of another container, once it was not refreshed for LOCK_EXPIRY seconds.

    Args:
        folder: The folder; created if it does not exist.
        activity: What goes on there, for the error of others: "training", "batch".

    Raises:
        FileError: Another process holds the lock, or the folder cannot be written to.
    """

    def __init__(self, folder: str | os.PathLike[str], activity: str) -> None:
        self.path = writable_folder(folder) / LOCK_NAME
        self._content = json.dumps(
            {"activity": activity, "machine": _machine(), "host": socket.gethostname(), "pid": os.getpid(),
             "began": _process_began(os.getpid()), "key": secrets.token_hex(8)}
        ).encode()  # fmt: skip
        part = _part_of(self.path)
        try:
            while True:
                part.write_bytes(self._content)
                try:
                    _move(part, self.path, overwrite=False)
                    break
                except FileExistsError:
                    self._take_over(part)
        except OSError as error:
            raise FileError(f"{self.path} could not be written: {_reason(error)}.") from error
        finally:
            with contextlib.suppress(OSError):
                part.unlink(missing_ok=True)
        self._released = threading.Event()
        threading.Thread(target=self._refresh, name="folder-lock", daemon=True).start()

    def _take_over(self, part: Path) -> None:
        """Remove the lock of an owner that has ended; `part` was just written and tells the file system's time."""
        try:
            content, changed = read_small(self.path), self.path.stat().st_mtime
        except FileNotFoundError:
            if self.path.is_symlink():
                raise OSError(errno.ELOOP, "it is a link to nothing, and a lock is a file; delete it") from None
            return
        idle = part.stat().st_mtime - changed
        owner = _owner(content)
        if owner.get("machine") == _machine() and os.name != "nt":
            began = _process_began(owner.get("pid"))
            alive = began is not None and began == owner.get("began")
        else:
            alive = idle < LOCK_EXPIRY
        if alive:
            raise FileError(
                f"{self.path.parent} is in use by a {owner.get('activity', 'process')}: process {owner.get('pid', '?')}"
                f" on {owner.get('host', 'an unknown host')}, seen {max(0, idle):.0f} s ago. Wait until it ends, or "
                f"choose another folder; if it ended long ago, delete {self.path}."
            )
        old = _part_of(self.path)
        with contextlib.suppress(FileNotFoundError):
            os.rename(self.path, old)
            if read_small(old) != content:  # another process took the old lock over first, and this is its own
                with contextlib.suppress(FileExistsError):
                    os.link(old, self.path)
            old.unlink()

    def _refresh(self) -> None:
        while not self._released.wait(LOCK_REFRESH):
            with contextlib.suppress(OSError):
                os.utime(self.path)

    def release(self) -> None:
        """Give the folder back; a second call does nothing."""
        if self._released.is_set() or _owner(self._content)["pid"] != os.getpid():  # a fork does not own it
            return
        self._released.set()
        with contextlib.suppress(OSError):
            if read_small(self.path) == self._content:
                self.path.unlink()

    def __enter__(self) -> FolderLock:
        return self

    def __exit__(self, *error: object) -> None:
        self.release()


def _owner(content: bytes) -> dict[str, object]:
    try:
        owner = json.loads(content)
    except (ValueError, RecursionError):
        return {}
    return owner if isinstance(owner, dict) else {}


def _machine() -> str:
    """What a process number belongs to: a start of the system, and on Linux a container in it."""
    parts = [socket.gethostname()]
    with contextlib.suppress(OSError):
        parts.append(Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip())
        parts.append(os.readlink("/proc/self/ns/pid"))
    return " ".join(parts)


def _process_began(pid: object) -> str | None:
    """When a process of this machine began, on Linux; elsewhere "running". None if there is none of that number."""
    if not isinstance(pid, int) or not 0 < pid < 2**31:
        return None
    if os.path.isdir("/proc/self"):
        try:
            fields = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()
        except OSError:
            return None
        return None if fields[0] == "Z" else fields[19]  # a killed process whose parent has not asked for its result
    try:
        if os.name != "nt":
            os.kill(pid, 0)
    except ProcessLookupError:
        return None
    except OSError:  # another user's
        pass
    return "running"


def walk(
    folder: str | os.PathLike[str], onerror: Callable[[OSError], object] | None = None
) -> Iterator[tuple[str, list[str], list[str]]]:
    """As `os.walk`, sorted and to any depth; up to Python 3.11 that one calls itself for each level."""
    waiting = [os.fspath(folder)]
    while waiting:
        here = waiting.pop()
        try:
            with os.scandir(here) as entries:
                found = sorted((entry.name, _leads_to_folder(entry)) for entry in entries)
        except OSError as error:
            if onerror is not None:
                onerror(error)
            continue
        folders = [name for name, is_folder in found if is_folder]
        yield here, folders, [name for name, is_folder in found if not is_folder]
        inside = [os.path.join(here, name) for name in reversed(folders)]
        waiting += [path for path in inside if not os.path.islink(path)]


def _leads_to_folder(entry: os.DirEntry[str]) -> bool:
    return os.path.isdir(entry.path) if entry.is_symlink() else entry.is_dir(follow_symlinks=False)


def remove_partial(folder: str | os.PathLike[str], *, older_than: float = 0.0) -> int:
    """Remove temporary files and folders that a killed process left in `folder` and below; returns how many.

    Only names that this module gives count. Those changed within the last `older_than` seconds stay, as they may belong
    to a running process.
    """
    count = 0
    for here, folders, files in walk(folder):
        parts = [name for name in (*folders, *files) if _PART_NAME.fullmatch(name)]
        folders[:] = [name for name in folders if name not in parts]
        for part in (Path(here, name) for name in parts):
            try:
                if older_than and time.time() - part.lstat().st_mtime <= older_than:
                    continue
                if part.is_dir() and not part.is_symlink():
                    shutil.rmtree(part)
                else:
                    part.unlink()
                count += 1
            except OSError:  # gone meanwhile, or not ours to remove
                continue
    return count


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
    except FileExistsError:
        raise
    except OSError:  # a file system without hard links
        if target.exists():
            raise FileExistsError(target) from None
        os.replace(part, target)
