# SPDX-License-Identifier: Apache-2.0
"""Writing files whole or not at all."""

from __future__ import annotations

import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from pidecode.errors import FileError


def check_writable(path: str | os.PathLike[str], *, overwrite: bool = False) -> Path:
    """The real path a file may be written to; worth asking before the work whose result goes there.

    Raises FileError if something is there already (unless `overwrite`), if it is no regular file, or if its
    folder does not exist.
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
def atomic_write(path: str | os.PathLike[str], *, overwrite: bool = False) -> Iterator[BinaryIO]:
    """A binary file that appears at `path` only when the block ends well; otherwise nothing is left behind.

    It is written beside its place under another name and then moved there. Raises FileError if the place is
    taken and `overwrite` is False, also if it was taken meanwhile, or if the system refuses to write.
    """
    target = check_writable(path, overwrite=overwrite)
    part = target.with_name(f".{target.name[:64]}.{secrets.token_hex(4)}.part")
    try:
        with open(part, "xb") as file:
            yield file
        _move(part, target, overwrite)
    except FileExistsError as error:
        raise FileError(f"{path} was created by someone else meanwhile; it was left as it is.") from error
    except OSError as error:
        raise FileError(f"{path} could not be written: {error.strerror or error}.") from error
    finally:
        part.unlink(missing_ok=True)


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
