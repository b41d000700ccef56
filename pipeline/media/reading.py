"""Reads that may fail for a moment, and reads that never return: tried again, and named with file and offset.

And what a read fails with that is not its file's fault: too few descriptors, a folder that is gone.
"""

import contextlib
import errno
import logging
import os
import resource
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeVar

# What storage says when it is away for a moment: a network file system above all.
TRANSIENT = frozenset({errno.EIO, errno.ETIMEDOUT, errno.ESTALE, errno.EAGAIN, errno.ENETDOWN, errno.ENETUNREACH,
                       errno.EHOSTUNREACH, errno.ECONNRESET, errno.ENOTCONN})  # fmt: skip
DELAYS_S = (0.05, 0.3, 1.0, 3.0)  # before the second to the fifth try
START_DESCRIPTORS = 8  # while a child process is started: both ends of its pipes, a pipe for errors
T = TypeVar("T")
log = logging.getLogger(__name__)


class ReadStalled(RuntimeError):
    """A read that did not return in time; the thread that waits for it cannot be ended, only the process can."""

    ends_process = True  # for whoever reports it: do not wait for threads at the exit


def is_transient(error: BaseException | None) -> bool:
    """Whether an error, or one that it comes from, is of storage that may be back in a moment."""
    while error is not None:
        if isinstance(error, OSError) and error.errno in TRANSIENT:
            return True
        error = error.__cause__
    return False


def lacks_descriptors(error: BaseException | None) -> bool:
    """Whether an error, or one that it comes from, is of this process, which has no descriptor left."""
    while error is not None:
        if isinstance(error, OSError) and error.errno == errno.EMFILE:
            return True
        error = error.__cause__
    return False


def open_descriptors() -> int:
    """How many of the descriptors that this process may have are open; the limit bounds their numbers."""
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    try:
        return sum(int(name) < limit for name in os.listdir("/proc/self/fd")) - 1  # one is of the listing
    except OSError:
        return limit  # none is left for the listing


def check_descriptors(needed: int, what_for: str) -> None:
    """Check that this process may open so many more files.

    Raises:
        OSError: it may not; with the limit, what is needed and the remedy.
    """
    if open_descriptors() + needed > resource.getrlimit(resource.RLIMIT_NOFILE)[0]:
        raise few_descriptors(needed, what_for)


def few_descriptors(needed: int, what_for: str) -> OSError:
    """Return the error of a process that needs `needed` more descriptors than it has open."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    now = open_descriptors()
    most = "" if hard == resource.RLIM_INFINITY else f" (up to {hard} without the administrator)"
    return OSError(
        f"limit of open files ({soft}) must be at least {now + needed}: {now} are open, {what_for} needs {needed} "
        f"more; raise it before the start, as with: ulimit -n {max(4096, 2 * (now + needed))}{most}"
    )


def folder_problem(folder: Path) -> str:
    """Return that a folder of data is gone, in words; empty where it is there.

    A folder over which a file system was mounted is empty without it.
    """
    try:
        how = "" if any(folder.iterdir()) else "empty"
    except OSError as error:
        how = "" if lacks_descriptors(error) else error.strerror or "unreadable"
    return (
        f"{folder}: folder ({how}) must be there while it is read; mount it or put it back, and resume" if how else ""
    )


def patiently(read: Callable[[], T]) -> T:
    """Return what `read` does, tried again after transient errors of storage, which are told.

    Raises:
        Exception: what the last try raised.
    """
    for delay_s in DELAYS_S:
        try:
            return read()
        except Exception as error:
            if not is_transient(error):
                raise
            log.warning("%s; tried again in %g s", error, delay_s)
        time.sleep(delay_s)
    return read()


class OpenReads:
    """The reads that threads of this process wait for, with file, offset and when they began.

    Attributes:
        observer: Called with file and offset when a read begins, with None and 0 when it ends; a worker process, whose
            reads one thread does, tells its parent so.
    """

    def __init__(self) -> None:
        self._reads: dict[int, tuple[Path, int, float]] = {}
        self.observer: Callable[[Path | None, int], object] | None = None

    @contextlib.contextmanager
    def of(self, path: Path, offset: int) -> Iterator[None]:
        """Count a read of this thread as waiting for as long as the context lasts."""
        thread = threading.get_ident()
        self._reads[thread] = (path, offset, time.monotonic())
        observer = self.observer
        if observer is not None:
            observer(path, offset)
        try:
            yield
        finally:
            self._reads.pop(thread, None)
            if observer is not None:
                observer(None, 0)

    def oldest(self) -> tuple[Path, int, float] | None:
        """File, offset and age in seconds of the read that waits longest; None where none does."""
        waiting = min(list(self._reads.values()), key=lambda read: read[2], default=None)
        return None if waiting is None else (waiting[0], waiting[1], time.monotonic() - waiting[2])

    def stalled(self, limit_s: float) -> str:
        """Return a line about a read that has waited longer than a limit, empty where none has."""
        found = self.oldest()
        if found is None or found[2] <= limit_s:
            return ""
        return f"read of {found[0]} at byte {found[1]} has not returned for {found[2]:.0f} s; is its storage there?"


OPEN_READS = OpenReads()


def watch_reads(limit_s: float) -> None:
    """Start a thread of this process that writes a line to stderr once for each read that takes longer than a limit."""

    def run() -> None:
        """Look four times in a limit; a read is told once."""
        told = None
        while True:
            time.sleep(limit_s / 4)
            found = OPEN_READS.oldest()
            if found is not None and found[2] > limit_s and told != found[:2]:
                told = found[:2]
                os.write(2, f"WARNING {OPEN_READS.stalled(limit_s)}\n".encode())

    threading.Thread(target=run, name="reads", daemon=True).start()
