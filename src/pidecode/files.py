# SPDX-License-Identifier: Apache-2.0
"""Atomic writes: a file or folder appears complete under its name, or not at all."""

from __future__ import annotations

import os
import secrets
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from pidecode.errors import FileError

PathLike = str | os.PathLike[str]
"""A path as users give it."""

PART = ".part"
"""Ending of the temporary files and folders that are not yet complete."""


def check_writable(path: str | os.PathLike[str], *, overwrite: bool = False) -> Path:
    """The path with links resolved, if a file may be written there; worth calling before the work that makes it.

    Raises:
        FileError: A file exists there and `overwrite` is False, it is not a regular file, or its folder does not exist.
    """
    target = Path(os.path.realpath(path))
    if target.is_dir():
        raise FileError(f"{path} is a folder; give the name of a file in it.")
    if target.exists() and not target.is_file():
        raise FileError(f"{path} is not a regular file; give the name of one.")
    if target.exists() and not overwrite:
        raise FileError(
            f"{path} exists already. Choose another name, or allow overwriting "
            "(overwrite=True; --overwrite on the command line)."
        )
    if not target.parent.is_dir():
        raise FileError(f"The folder {target.parent} does not exist; create it first.")
    return target


@contextmanager
def atomic_path(path: str | os.PathLike[str], *, overwrite: bool = False) -> Iterator[Path]:
    """A path beside `path` for libraries that write to paths; what is there at the end moves to `path`.

    Yields:
        A path that does not exist yet. If the block raises, what was written there is removed.

    Raises:
        FileError: `path` may not be written, was created by another process meanwhile, or the system refused to write.
    """
    target = check_writable(path, overwrite=overwrite)
    part = _part_of(target)
    try:
        yield part
        _move(part, target, overwrite)
    except FileExistsError as error:
        raise FileError(f"{path} was created by another process meanwhile; it was left as it is.") from error
    except OSError as error:
        raise FileError(f"{path} could not be written: {error.strerror or error}.") from error
    finally:
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

    The files in it are flushed to the disk before it is renamed, so that no crash leaves half a folder.

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
        for file in part.iterdir():
            with open(file, "rb") as written:
                os.fsync(written.fileno())
        if target.exists():
            shutil.rmtree(target)
        os.replace(part, target)
    finally:
        shutil.rmtree(part, ignore_errors=True)


def remove_partial(folder: str | os.PathLike[str], *, older_than: float = 0.0) -> int:
    """Remove temporary files and folders that a killed process left in `folder` and below; returns how many.

    Those changed within the last `older_than` seconds stay, as they may belong to a running process.
    """
    count = 0
    for part in list(Path(folder).rglob(f".*{PART}")):
        try:
            if older_than and time.time() - part.stat().st_mtime <= older_than:
                continue
            if part.is_dir():
                shutil.rmtree(part)
            else:
                part.unlink()
            count += 1
        except OSError:  # gone meanwhile, or not ours to remove
            continue
    return count


def _part_of(target: Path) -> Path:
    return target.with_name(f".{target.name[:64]}.{secrets.token_hex(4)}{PART}")


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
