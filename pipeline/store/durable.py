"""Files and folders that are whole or absent whatever happens, and locks: the one place that writes so.

What is new is written under a hidden name beside its target, flushed to the disk, renamed, and the renaming is flushed
too. A process that is killed, a disk that is full or a machine that loses power at any point leaves the old content or
the new one under the name, never a part. Uses the standard library alone.
"""

import fcntl
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, BinaryIO


class BusyError(BlockingIOError):
    """A lock that another process holds; `holder` is its process id as text, "unknown" if it left none."""

    def __init__(self, path: Path, holder: str) -> None:
        super().__init__(f"{path} is locked by process {holder}")
        self.holder = holder


def beside(path: Path, kind: str) -> Path:
    """Return the hidden name beside a path for what is not finished yet ("partial") or moved aside ("old")."""
    return path.with_name(f".{path.name}.{kind}")


def sync(path: Path) -> None:
    """Flush a file, or the list of names in a folder, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_tree(folder: Path) -> None:
    """Flush all files and folders below a folder, and the folder."""
    for path in folder.rglob("*"):
        sync(path)
    sync(folder)


def put_file(made: Path, path: Path) -> None:
    """Flush a finished file and give it its name, in place of a file that has it.

    Args:
        made: on the file system of `path`. path: replaced in one step.
    Raises:
        OSError: the disk is full or broken; what was at `path` is there still, and so is `made`.
    """
    sync(made)
    os.replace(made, path)
    sync(path.parent)


@contextmanager
def new_file(path: Path) -> Iterator[BinaryIO]:
    """Give a file to write to; it gets its name when the block ends, and goes if an exception leaves the block.

    Args:
        path: replaced in one step; its folder must be there.
    """
    made = beside(path, "partial")
    try:
        with made.open("wb") as file:
            yield file
        put_file(made, path)
    except BaseException:
        made.unlink(missing_ok=True)
        raise


def write_file(path: Path, content: str | bytes | memoryview) -> None:
    """Write a file so that readers see the old or the new content, never a part; text becomes UTF-8.

    Raises:
        OSError: what was at `path` is there still.
    """
    with new_file(path) as file:
        file.write(content.encode() if isinstance(content, str) else content)


def move_folder(made: Path, path: Path) -> None:
    """Give a folder another name, one that nothing has, and flush the renaming; what is inside is flushed already."""
    os.rename(made, path)
    sync(path.parent)


def put_folder(made: Path, path: Path, old: Path | None = None) -> None:
    """Flush a finished folder and give it its name; one that has the name is moved aside first and deleted at the end.

    Args:
        made: on the file system of `path`. path: its name.
        old: where the former folder is between two renamings: a process killed there leaves it under this name.
            Default: `beside(path, "old")`.
    Raises:
        OSError: the disk is full or broken; `made` is there still if it did not get the name.
    """
    old = beside(path, "old") if old is None else old
    sync_tree(made)
    if path.exists():
        remove_folder(old)
        os.rename(path, old)
    try:
        move_folder(made, path)
    except OSError:
        if old.exists() and not path.exists():
            os.rename(old, path)
        raise
    shutil.rmtree(old, ignore_errors=True)  # what stays of it is no fault of the new one


def remove_folder(folder: Path) -> None:
    """Delete a folder and all in it, or a file in its place, if it is there."""
    if folder.is_dir() and not folder.is_symlink():
        shutil.rmtree(folder)
    elif os.path.lexists(folder):  # no error where the path goes through a file
        folder.unlink(missing_ok=True)


def take_lock(path: Path, *, wait: bool = False) -> IO[str]:
    """Lock a file, which is made if need be, until it is closed or the process ends, however it ends.

    Args:
        path: the lock file; it holds the process id of its holder and stays. wait: for another holder to let it go.
    Returns:
        The open file; keep it, close it to let go.
    Raises:
        BusyError: another process holds it. OSError: it cannot be opened for writing.
    """
    file = open(path, "a+", encoding="utf-8")  # noqa: SIM115 (the caller closes it)
    try:
        fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        file.truncate(0)
        file.write(f"{os.getpid()}\n")
        file.flush()
    except BlockingIOError as error:
        file.seek(0)
        holder = file.read().strip() or "unknown"
        file.close()
        raise BusyError(path, holder) from error
    except BaseException:
        file.close()
        raise
    return file
