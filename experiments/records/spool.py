"""metrics.jsonl: everything a run reports, one JSON line an event, written before anything else sees it.

Kinds of line: metrics {step, metrics}, params {params}, tags {tags}, artifact {path, folder}, end {status}; each with
time_ms. A step that is computed again after a resume is not written twice.
"""

from __future__ import annotations

import contextlib
import errno
import json
import logging
import math
import os
import threading
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from experiments.cli.files import read_json
from experiments.records.writing import write_failure

SPOOL_NAME = "metrics.jsonl"
log = logging.getLogger(__name__)


class Spool:
    """Appends events to a file; safe from several threads; a last line that is cut off is dropped on opening.

    What the disk refuses stays in memory, is told once and is written with the next event that it takes; an event that
    is on the way when the file is deleted is not lost either (`lost`, `recreate`).

    Args:
        path: metrics.jsonl of the run, made if absent.

    Raises:
        OSError: the file cannot be opened or read.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._lock = threading.Lock()
        self._last_step: dict[str, int] = {}
        self._waiting: list[bytes] = []
        self.failure = ""  # why the latest event is not on the disk
        self._repair()
        for _, event in read_events(path):
            for key in event.get("metrics", {}):
                self._last_step[key] = max(self._last_step.get(key, -1), int(event["step"]))
        self._descriptor = _open(path)
        self._size = os.fstat(self._descriptor).st_size

    def _repair(self) -> None:
        if not self.path.exists():
            return
        _require_file(self.path)
        data = self.path.read_bytes()
        if data and not data.endswith(b"\n"):
            with open(self.path, "r+b") as file:
                file.truncate(data.rfind(b"\n") + 1)

    def metrics(self, step: int, values: Mapping[str, float]) -> None:
        """Record metrics of a step; a name already recorded for this or a later step is left as it is.

        Args:
            step: steps done.
            values: name -> value; one that is not finite is written as text.
        """
        with self._lock:
            new = {k: float(v) for k, v in values.items() if step > self._last_step.get(k, -1)}
            self._last_step.update(dict.fromkeys(new, step))
            if new:
                self._append({"step": step, "metrics": {k: v if math.isfinite(v) else str(v) for k, v in new.items()}})

    def event(self, **fields: Any) -> None:
        """Record any other event.

        Args:
            fields: what JSON can hold, by kind of line.
        """
        with self._lock:
            self._append(fields)

    def _append(self, fields: Mapping[str, Any]) -> None:
        if self._descriptor < 0:
            return
        self._waiting.append(json.dumps({"time_ms": int(time.time() * 1000), **fields}).encode() + b"\n")
        self._write()

    def _write(self) -> None:
        """Write what is waiting, all or nothing."""
        data = b"".join(self._waiting)
        try:
            done = 0
            while done < len(data):
                done += os.write(self._descriptor, data[done:])
        except OSError as error:
            with contextlib.suppress(OSError):
                os.ftruncate(self._descriptor, self._size)  # no torn line in the middle of the file
            if not self.failure:
                log.warning("%s; training goes on, metrics wait in memory", write_failure(error, self.path, len(data)))
            self.failure = write_failure(error, self.path, len(data))
            return
        if self.failure:
            log.info("%s was written after all", self.path)
        self._size += len(data)
        self._waiting, self.failure = [], ""

    def flush(self) -> None:
        """Write what is waiting and flush the file to the disk, so that a power cut takes no metric before it."""
        with self._lock:
            if self._descriptor < 0:
                return
            self._write()
            try:
                os.fsync(self._descriptor)
            except OSError as error:
                self.failure = write_failure(error, self.path)

    @property
    def lost(self) -> bool:
        """Whether the file was deleted, moved or replaced since it was opened."""
        try:
            found = os.stat(self.path)
            return self._descriptor >= 0 and not os.path.samestat(found, os.fstat(self._descriptor))
        except OSError:
            return self._descriptor >= 0

    def recreate(self) -> None:
        """Make a file that was deleted again, with all that it held (open files are there until they are closed).

        Raises:
            OSError: its folder is not there or cannot be written.
        """
        with self._lock:
            held = b"".join(iter_descriptor(self._descriptor))
            descriptor = _open(self.path)
            os.close(self._descriptor)
            self._descriptor, self._size = descriptor, os.fstat(descriptor).st_size
            self._waiting.insert(0, held)
            self._write()

    def close(self) -> None:
        """Close the file, flushed to the disk; later events are dropped. `failure` says what the disk refused."""
        self.flush()
        with self._lock:
            if self._descriptor >= 0:
                os.close(self._descriptor)
                self._descriptor = -1

    def unwritten(self) -> list[dict[str, Any]]:
        """Return the events that the disk refused."""
        with self._lock:
            return [json.loads(line) for block in self._waiting for line in block.splitlines()]


def _open(path: Path) -> int:
    return os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o666)


def _require_file(path: Path) -> None:
    """Raise OSError for a FIFO, which would be waited for, or a device."""
    if not path.is_file():
        raise OSError(errno.EINVAL, "it must be a regular file", str(path))


def _is_well_formed(event: Any) -> bool:
    """Whether an event is one that a spool writes: a mapping; metrics with their step, numbers all."""
    if not isinstance(event, dict):
        return False
    try:
        if "metrics" in event:
            int(event["step"])
            [float(value) for value in event["metrics"].values()]
    except (KeyError, ValueError, TypeError, AttributeError, OverflowError):
        return False
    return True


def iter_descriptor(descriptor: int) -> Iterator[bytes]:
    """Yield what an open file holds, from its start."""
    offset = 0
    while block := os.pread(descriptor, 1 << 20, offset):
        yield block
        offset += len(block)


def read_events(path: Path, offset: int = 0) -> Iterator[tuple[int, dict[str, Any]]]:
    """Read the complete lines of a spool; damaged ones are skipped.

    Args:
        path: metrics.jsonl; may be absent.
        offset: byte to begin at, the start of a line.

    Yields:
        Byte offset after the line, and its event.
    """
    if not path.exists():
        return
    _require_file(path)
    with open(path, "rb") as file:
        file.seek(offset)
        for line in file:
            if not line.endswith(b"\n"):
                return
            offset += len(line)
            try:
                event = read_json(line)
            except ValueError:
                continue
            if _is_well_formed(event):
                yield offset, event


def read_metrics(path: Path) -> dict[str, tuple[list[int], list[float]]]:
    """Return every metric of a spool.

    Args:
        path: metrics.jsonl; may be absent.

    Returns:
        Name -> (steps, values), in the order of the file.
    """
    series: dict[str, tuple[list[int], list[float]]] = {}
    for _, event in read_events(path):
        for name, value in event.get("metrics", {}).items():
            steps, values = series.setdefault(name, ([], []))
            steps.append(int(event["step"]))
            values.append(float(value))
    return series
