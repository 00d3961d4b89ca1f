# SPDX-License-Identifier: Apache-2.0
"""Durable writes, checks of a destination, and folder locks that outlive a killed owner."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from pidecode import files
from pidecode.errors import FileError
from pidecode.files import (
    FolderLock,
    atomic_folder,
    atomic_path,
    atomic_write,
    check_writable,
    read_small,
    writable_folder,
)

POSIX = pytest.mark.skipif(os.name == "nt", reason="permissions and process numbers of POSIX")


@pytest.fixture
def read_only() -> Iterator[Path]:
    """A folder nobody may write into, seen without the rights of root."""
    with tempfile.TemporaryDirectory() as name:
        folder, user = Path(name, "folder"), os.geteuid()
        folder.mkdir()
        (folder / "old").write_text("old")
        folder.chmod(0o555)
        Path(name).chmod(0o755)
        try:
            if user == 0:
                os.seteuid(65534)
            yield folder
        finally:
            os.seteuid(user)
            folder.chmod(0o755)


def test_a_file_and_its_folder_are_synced_in_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target, seen = tmp_path / "file", []

    def fsync(handle: int) -> None:
        seen.append(("folder" if os.path.isdir(f"/proc/self/fd/{handle}") else "file", target.exists()))

    if not Path("/proc/self/fd").is_dir():
        pytest.skip("needs /proc")
    monkeypatch.setattr("os.fsync", fsync)
    with atomic_write(target) as file:
        file.write(b"content")
    assert seen == [("file", False), ("folder", True)]
    seen.clear()
    with atomic_folder(tmp_path / "folder") as part:
        (part / "inner").mkdir()
        (part / "inner" / "file").write_text("content")
    assert sorted(kind for kind, _ in seen[:-1]) == ["file", "folder", "folder"] and seen[-1][0] == "folder"


@POSIX
def test_a_read_only_folder_is_noticed_before_the_work(read_only: Path) -> None:
    for path, overwrite in (("new", False), ("old", True)):
        with pytest.raises(FileError, match=r"cannot be written to: Permission denied\. Choose another one"):
            check_writable(read_only / path, overwrite=overwrite)
    with pytest.raises(FileError, match="cannot be written to"):
        writable_folder(read_only)
    with pytest.raises(FileError, match=r"cannot be created: Permission denied"):
        writable_folder(read_only / "a" / "b")
    assert [path.name for path in read_only.iterdir()] == ["old"]


def test_the_first_error_is_not_hidden_by_cleaning_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def unlink(self: Path, missing_ok: bool = False) -> None:
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr(Path, "unlink", unlink)
    with pytest.raises(ValueError, match="the work failed"), atomic_path(tmp_path / "file"):
        raise ValueError("the work failed")


@POSIX
@pytest.mark.parametrize("name", ["x" * 300, "a\0b", "\N{PILE OF POO}" * 64 + ".png", "loop", "\udcff.png"])
def test_odd_names_are_written_or_refused(name: str, tmp_path: Path) -> None:
    (tmp_path / "loop").symlink_to("loop")
    if name in ("\udcff.png",):
        with atomic_write(tmp_path / name):
            pass
        assert (tmp_path / name).exists()
        return
    with pytest.raises(FileError):
        check_writable(tmp_path / name)
    with pytest.raises(FileError), atomic_write(tmp_path / name):
        pass
    assert [path.name for path in tmp_path.iterdir()] == ["loop"]


def test_a_long_name_that_fits_is_written(tmp_path: Path) -> None:
    name = "\N{PILE OF POO}" * 62 + ".png"  # 252 bytes, so that a longer temporary name would not fit
    with atomic_write(tmp_path / name) as file:
        file.write(b"content")
    assert [path.name for path in tmp_path.iterdir()] == [name]


def test_a_file_in_place_of_a_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(FileError, match="is a file; give the name of a folder"):
        writable_folder(tmp_path / "file")
    with pytest.raises(FileError, match="cannot be created"):
        writable_folder(tmp_path / "file" / "below")


def test_a_lock_is_one_owner_s_and_ends_with_its_release(tmp_path: Path) -> None:
    with (
        FolderLock(tmp_path / "run", "training"),
        pytest.raises(FileError, match=rf"is in use by a training: process {os.getpid()} on .* Wait .* delete "),
    ):
        FolderLock(tmp_path / "run", "batch")
    assert list((tmp_path / "run").iterdir()) == []
    lock = FolderLock(tmp_path / "run", "batch")
    ending = threading.Thread(target=lock.release)  # as a finalizer does, in whatever thread it runs
    ending.start()
    ending.join()
    FolderLock(tmp_path / "run", "batch").release()


@POSIX
def test_what_stands_in_the_place_of_a_lock_never_hangs(tmp_path: Path) -> None:
    lock = tmp_path / files.LOCK_NAME
    for target in ("nothing", files.LOCK_NAME, "/dev/zero", tmp_path):
        lock.symlink_to(target)
        with pytest.raises(FileError, match="could not be locked: .* Delete it if"):
            FolderLock(tmp_path, "batch")
        lock.unlink()
    os.mkfifo(lock)
    with FolderLock(tmp_path, "batch"), pytest.raises(FileError, match="is in use by another process"):
        FolderLock(tmp_path, "batch")
    lock.write_bytes(b"\xff" * 100_000)
    FolderLock(tmp_path, "batch").release()
    assert not lock.exists()
    with open(lock, "wb") as file:
        file.truncate(1 << 40)
    with pytest.raises(OSError, match="larger than 1,048,576 bytes"):
        read_small(lock)


HOLD = """
import sys, time
from pidecode.files import FolderLock
lock = FolderLock(sys.argv[1], "training")
print("held", flush=True)
time.sleep(60)
"""


@POSIX
def test_a_lock_holds_between_processes_and_not_after_kill_9(tmp_path: Path) -> None:
    owner = subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    try:
        assert owner.stdout is not None and owner.stdout.readline() == "held\n"
        with pytest.raises(FileError, match=f"is in use by a training: process {owner.pid} on "):
            FolderLock(tmp_path, "training")
    finally:
        owner.send_signal(signal.SIGKILL)
        owner.wait()
        owner.stdout.close()
    assert (tmp_path / files.LOCK_NAME).exists()
    FolderLock(tmp_path, "training").release()
    assert list(tmp_path.iterdir()) == []
