"""metrics.jsonl: everything a run reports, one JSON line an event, written before anything else sees it.

Kinds of line: metrics {step, metrics}, params {params}, tags {tags}, artifact {path, folder}, end {status}; each with
time_ms. A step that is computed again after a resume is not written twice.
"""

from __future__ import annotations

import json
import math
import threading
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from pipeline.store.durable import sync

SPOOL_NAME = "metrics.jsonl"


class Spool:
    """Appends events to a file; safe from several threads; a last line that is cut off is dropped on opening.

    Args:
        path: metrics.jsonl of the run, made if absent.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._lock = threading.Lock()
        self._last_step: dict[str, int] = {}
        self._repair()
        for _, event in read_events(path):
            for key in event.get("metrics", {}):
                self._last_step[key] = max(self._last_step.get(key, -1), int(event["step"]))
        self._file = open(path, "a", encoding="utf-8")  # noqa: SIM115 - closed by close()

    def _repair(self) -> None:
        if not self.path.exists():
            return
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
        if not self._file.closed:
            self._file.write(json.dumps({"time_ms": int(time.time() * 1000), **fields}) + "\n")
            self._file.flush()

    def close(self) -> None:
        """Close the file, flushed to the disk; later events are dropped."""
        with self._lock:
            if not self._file.closed:
                self._file.close()
                sync(self.path)


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
    with open(path, "rb") as file:
        file.seek(offset)
        for line in file:
            if not line.endswith(b"\n"):
                return
            offset += len(line)
            try:
                event = json.loads(line)
            except ValueError:
                continue
            if isinstance(event, dict):
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
