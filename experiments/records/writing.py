"""Writes of a run that may fail (disk full, quota, read-only, input/output error): told, kept, tried again, named."""

from __future__ import annotations

import logging
import os
import shutil
from collections.abc import Callable
from pathlib import Path

_MIB = 2**20
log = logging.getLogger(__name__)


class Writes:
    """Writes files on behalf of a run that must go on; what fails is kept and tried again.

    A write is told once when it fails and once when it succeeds after all. Writes of the same path replace each other.
    """

    def __init__(self) -> None:
        self._waiting: dict[Path, Callable[[], object]] = {}
        self._reasons: dict[Path, str] = {}

    def attempt(self, path: Path, write: Callable[[], object], *, need_bytes: int | None = None) -> bool:
        """Call `write`; where that fails with an OSError, warn with path, reason and need, and keep it for `retry`.

        Args:
            path: what is written, for messages.
            write: writes it whole or not at all, at any time until the run ends.
            need_bytes: how much it takes, where that is known.

        Returns:
            Whether it was written.
        """
        try:
            write()
        except OSError as error:
            reason = write_failure(error, path, need_bytes)
            if path not in self._waiting:
                log.warning("%s; training goes on and it is tried again", reason)
            self._waiting[path], self._reasons[path] = write, reason
            return False
        if self._waiting.pop(path, None) is not None:
            log.info("%s was written after all", path)
        self._reasons.pop(path, None)
        return True

    def retry(self) -> None:
        """Try again what failed before."""
        for path, write in list(self._waiting.items()):
            self.attempt(path, write)

    def forget(self, path: Path) -> None:
        """Give up a write that a later one makes needless."""
        self._waiting.pop(path, None)
        self._reasons.pop(path, None)

    @property
    def missing(self) -> list[str]:
        """What is not written, with reasons."""
        return [self._reasons[path] for path in self._waiting]


def write_failure(error: OSError, path: Path, need_bytes: int | None = None) -> str:
    """Return one line about a failed write: path, reason, what it needs and what is free.

    Args:
        error: what the system said.
        path: of the file or folder.
        need_bytes: how much it takes, where that is known.
    """
    reason = error.strerror or os.strerror(error.errno) if error.errno else str(error)
    parts = [reason]
    if need_bytes is not None:
        parts.append(f"needs {need_bytes / _MIB:.2f} MiB")
    free = free_bytes(path)
    if free is not None:
        parts.append(f"{free / _MIB:.2f} MiB free")
    return f"{path} could not be written ({', '.join(parts)})"


def free_bytes(path: Path) -> int | None:
    """Return the free bytes of the file system of a path, or of the nearest folder above it; None if unknown."""
    for folder in (path, *path.parents):
        try:
            return shutil.disk_usage(folder).free
        except OSError:
            continue
    return None


def do_all(*parts: Callable[[], object]) -> list[Exception]:
    """Call every part, whatever the ones before it do; return their exceptions in order."""
    failures = []
    for part in parts:
        try:
            part()
        except Exception as error:  # the caller decides; the parts after it must run
            failures.append(error)
    return failures
