"""Child processes that transcode: one per core, each file under a deadline; a child that dies costs one file."""

from __future__ import annotations

import contextlib
import json
import os
import queue
import select
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.ingest.item import IngestError, Item, TranscodeSettings
from pipeline.ingest.spans import Span

_ROOT = Path(__file__).resolve().parents[2]
WORKER_MODULE = "pipeline.ingest.worker"
MIN_MEMORY_BYTES = 128 << 20
START_DEADLINE_S = 60.0
FILES_PER_CHILD = 500  # then a fresh one: bounds what a leak in a decoder can take


@dataclass(frozen=True)
class Job:
    """One file: its number in the manifest, where it is, where its payload goes, how long that may take, and the span
    of it that is needed (None = all)."""

    number: int
    path: Path
    out: Path
    deadline_s: float
    span: Span | None = None


@dataclass(frozen=True)
class Done:
    """A finished job: the item and the seconds it took."""

    job: Job
    item: Item
    wall_s: float


class _Child:
    """One worker process and the pipe to it."""

    def __init__(self, module: str, memory_bytes: int) -> None:
        environment = os.environ | {"PYTHONPATH": str(_ROOT), "OMP_NUM_THREADS": "1", "PYTHONNOUSERSITE": "1"}
        self._words = tempfile.TemporaryFile()  # noqa: SIM115 (lives as long as the child)
        self.process = subprocess.Popen(
            [sys.executable, "-m", module, str(memory_bytes)],
            cwd=_ROOT,
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._words,
        )
        self.files = 0
        self._pending = b""
        if self.reply(START_DEADLINE_S) is None:
            status = self.stop()
            raise IngestError(
                f"worker process ({status}) must start within {START_DEADLINE_S:g} s under its memory limit; "
                f"raise the limit ({memory_bytes} bytes)"
            )

    def ask(self, job: Job, settings: str) -> None:
        """Send a job."""
        assert self.process.stdin is not None
        paths = {"path": os.path.abspath(job.path), "out": os.path.abspath(job.out)}
        line = json.dumps(paths | {"settings": settings, "span": job.span})
        self.process.stdin.write(line.encode() + b"\n")
        self.process.stdin.flush()
        self.files += 1

    def reply(self, timeout_s: float) -> dict[str, Any] | None:
        """Wait for one line; None when the child ended or the time is over."""
        assert self.process.stdout is not None
        descriptor, end = self.process.stdout.fileno(), time.monotonic() + timeout_s
        answer = select.poll()  # takes any descriptor; select only those below 1024
        answer.register(descriptor, select.POLLIN)
        while b"\n" not in self._pending:
            ready = answer.poll(1000.0 * max(0.0, end - time.monotonic()))
            piece = os.read(descriptor, 1 << 16) if ready else b""
            if not piece:
                return None
            self._pending += piece
        line, self._pending = self._pending.split(b"\n", 1)
        value: dict[str, Any] = json.loads(line)
        return value

    def stop(self) -> str:
        """End the child: an idle one leaves by itself, a busy one is killed; returns its status, or "running"."""
        status = "running"
        if self._words.closed:
            return "ended"
        self._close(self.process.stdin)
        try:
            self.process.wait(1.0)
            code = self.process.returncode
            status = f"signal {signal.Signals(-code).name}" if code < 0 else f"exit code {code}{self._last_words()}"
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        self._close(self.process.stdout)
        self._words.close()
        return status

    def _last_words(self) -> str:
        """The last line that the child wrote: the exception, if it was one."""
        size = self._words.seek(0, os.SEEK_END)
        self._words.seek(max(0, size - 2000))
        lines = self._words.read().decode(errors="replace").split("\n")
        return "".join(f": {line[:200]}" for line in [line for line in lines if line.strip()][-1:])

    @staticmethod
    def _close(pipe: Any) -> None:
        with contextlib.suppress(BrokenPipeError):
            pipe.close()


class Pool:
    """Runs jobs in child processes; results come in the order of completion.

    Args:
        workers: processes. settings: for all jobs. memory_bytes: address space of each. module: what they run.
    """

    def __init__(
        self, workers: int, settings: TranscodeSettings, memory_bytes: int, *, module: str = WORKER_MODULE
    ) -> None:
        if workers < 1:
            raise IngestError(f"workers ({workers}) must be at least 1; leave it out to use every core")
        if memory_bytes < MIN_MEMORY_BYTES:
            raise IngestError(f"memory ({memory_bytes} bytes) must be at least {MIN_MEMORY_BYTES}; 2 GiB suit 4K video")
        self._workers, self._settings, self._memory = workers, settings.to_json(), memory_bytes
        self._module, self._stop = module, threading.Event()

    def run(self, jobs: Iterable[Job]) -> Iterator[Done]:
        """Yield every job's result; close the iterator to stop the children.

        Raises:
            IngestError: a worker cannot start, or the disk is full.
        """
        todo: queue.SimpleQueue[Job] = queue.SimpleQueue()
        for job in jobs:
            todo.put(job)
        results: queue.SimpleQueue[Done | BaseException | None] = queue.SimpleQueue()
        threads = [
            threading.Thread(target=self._serve, args=(todo, results), daemon=True) for _ in range(self._workers)
        ]
        for thread in threads:
            thread.start()
        running = len(threads)
        try:
            while running:
                result = results.get()
                if result is None:
                    running -= 1
                elif isinstance(result, BaseException):
                    raise result
                else:
                    yield result
        finally:
            self._stop.set()
            for thread in threads:
                thread.join()

    def _serve(self, todo: queue.SimpleQueue[Job], results: queue.SimpleQueue[Done | BaseException | None]) -> None:
        child: _Child | None = None
        try:
            while not self._stop.is_set():
                try:
                    job = todo.get_nowait()
                except queue.Empty:
                    break
                if child is None or child.files >= FILES_PER_CHILD:
                    if child is not None:
                        child.stop()
                    child = _Child(self._module, self._memory)
                done, child = self._one(child, job)
                if done is not None:
                    results.put(done)
        except BaseException as error:  # handed to the caller's thread
            results.put(error)
        finally:
            if child is not None:
                child.stop()
            results.put(None)

    def _one(self, child: _Child, job: Job) -> tuple[Done | None, _Child | None]:
        began = time.monotonic()
        end = began + job.deadline_s
        with contextlib.suppress(BrokenPipeError):  # it died: the missing reply says so
            child.ask(job, self._settings)
        reply = None
        while reply is None and time.monotonic() < end and child.process.poll() is None and not self._stop.is_set():
            reply = child.reply(min(0.5, max(0.0, end - time.monotonic())))
        reply = reply or child.reply(0.0)
        took = time.monotonic() - began
        if self._stop.is_set() and reply is None:
            child.process.kill()
            child.stop()
            _remove(job)
            return None, None
        if reply is not None and "fatal" in reply:
            child.stop()
            raise IngestError(str(reply["fatal"]))
        if reply is not None:
            return Done(job, Item.from_dict(reply["item"]), took), child
        is_late = time.monotonic() >= end and child.process.poll() is None
        if is_late:
            child.process.kill()  # at once: it must not finish behind its deadline
        status = child.stop()
        _remove(job)
        late = f"decoding took longer than the deadline of {job.deadline_s:g} s"
        reason = late if is_late else f"decoder crashed ({status})"
        return Done(job, Item(refused=reason, for_resources=True), took), None


def _remove(job: Job) -> None:
    """Delete what a killed child left of its file."""
    for left in (Path(f"{job.out}.partial"), job.out):
        left.unlink(missing_ok=True)
