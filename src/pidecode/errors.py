# SPDX-License-Identifier: Apache-2.0
"""Every error a user can meet, in one tree.

Each message says what came, what was expected and how to fix it.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager


class PidecodeError(Exception):
    """Root of the tree; the command line turns it into a message and an exit code.

    Args:
        problem: What came and what was expected; with the fix, where that is the same everywhere.
        python: How to fix it in Python, as further sentences.
        cli: The same on the command line, if that differs by more than `name=value` and `--name value`.
        http: The same for a client of the server.
    """

    exit_code = 1  # of the command line; a subclass that names none has its parent's

    def __init_subclass__(cls, exit_code: int | None = None) -> None:
        if exit_code is not None:
            cls.exit_code = exit_code

    def __init__(self, problem: object = "", *, python: str = "", cli: str = "", http: str = "") -> None:
        super().__init__(str(problem))
        self.fixes = {"python": python, "cli": cli or python, "http": http or python}

    def __str__(self) -> str:
        return self.message("python")

    def message(self, interface: str) -> str:
        """The whole message for a user of "python", "cli" or "http"."""
        return f"{self.args[0]} {self.fixes[interface]}".rstrip()


class SettingError(PidecodeError, ValueError, exit_code=2):
    """A value the caller gave cannot act."""


class SizeError(SettingError):
    """An image or latent size that fits nothing; the message names the nearest that does."""


class LatentError(PidecodeError, ValueError, exit_code=3):
    """A latent of the wrong space, noise level, shape or content."""


class FileError(PidecodeError, exit_code=4):
    """A file that cannot be read or written as what it claims to be."""


class CheckpointError(FileError):
    """Weights that do not fit the network, or are not weights."""


class ImageError(FileError):
    """An image that is truncated, too large, or no image."""


class DownloadError(PidecodeError, exit_code=5):
    """Weights that could not be fetched."""


class LicenseError(DownloadError):
    """A license that must be accepted before the download."""


class MissingDependencyError(PidecodeError, ImportError, exit_code=6):
    """An optional package that is not installed; the message names the extra that brings it."""


class DoesNotFitError(PidecodeError, exit_code=7):
    """The job needs more memory than there is; the message says what would fit."""


class TrainingError(PidecodeError, exit_code=8):
    """A training run that had to stop; what was saved is intact."""


class BusyError(PidecodeError, exit_code=9):
    """The queue of a server is full, or the server is stopping.

    Attributes:
        retry_after: Seconds after which to ask again.
        stopping: The server takes no more jobs at all.
    """

    def __init__(self, message: str, retry_after: float, *, stopping: bool = False) -> None:
        super().__init__(message)
        self.retry_after, self.stopping = retry_after, stopping


class Cancelled(PidecodeError, exit_code=130):  # noqa: N818 - a result, not an error
    """The caller asked to stop; nothing was written."""


OUT_OF_MEMORY = "There is not enough memory for this. Use a smaller image, or end other programs."
_ALLOCATION_FAILURES = ("can't allocate memory", "out of memory", "not enough memory", "failed to allocate memory")


@contextmanager
def naming(what: str) -> Iterator[None]:
    """Begin the message of an error of this package with what it is about: "Element 1 of the list: ..."."""
    try:
        yield
    except PidecodeError as error:
        error.args = (f"{what}: {error.args[0]}",)
        raise


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an exception of Python, torch or a driver says that memory ran out; a CPU's is a plain RuntimeError."""
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return True
    return isinstance(error, RuntimeError) and any(text in str(error).lower() for text in _ALLOCATION_FAILURES)
