"""Calls of a function in child processes with a deadline and a memory limit: for files of unknown origin.

`describe_files` looks at plain videos that way: what crashes, hangs or eats memory costs that one file.
"""

import contextlib
import os
import pickle
import select
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.media.reading import START_DESCRIPTORS, check_descriptors
from pipeline.workers.machine import child_environment, hold_signals

CALLER_MODULE = f"{__package__}.caller"
START_DEADLINE_S = 60.0
MOST_TRIES = 2
_HEADER_BYTES = 8


class ConfinedError(ValueError):
    """A call that crashed, took too long or too much memory."""


@dataclass(frozen=True)
class Confinement:
    """What one call may take.

    Args:
        memory_bytes: Beside what Python and its libraries have.
        deadline_s: Seconds.
        bytes_per_second: Slowest reading of a file that is waited for beyond the deadline.
    """

    memory_bytes: int = 1 << 30
    deadline_s: float = 60.0
    bytes_per_second: float = 20e6


class _Child:
    """One process that makes calls."""

    def __init__(self, function: Callable[[Any], Any], limits: Confinement) -> None:
        check_descriptors(START_DESCRIPTORS, "looking at files in a child process")
        self.process = subprocess.Popen(
            [sys.executable, "-P", "-m", CALLER_MODULE, str(os.getpid()), str(limits.memory_bytes)],
            env=child_environment(),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )
        self.send(function)
        if self.receive(START_DEADLINE_S) is None:
            raise ConfinedError(f"child process ({self.end()}) must start; see what it wrote above")

    def send(self, value: Any) -> None:
        """Send a value; a child that has ended is found by its missing answer."""
        data = pickle.dumps(value)
        with contextlib.suppress(BrokenPipeError):
            assert self.process.stdin is not None
            self.process.stdin.write(len(data).to_bytes(_HEADER_BYTES, "little") + data)
            self.process.stdin.flush()

    def receive(self, timeout_s: float) -> tuple[bool, Any] | None:
        """Wait for an answer: whether the call returned, and the value or the error; None when there is none."""
        end = time.monotonic() + timeout_s
        header = self._read(_HEADER_BYTES, end)
        data = None if header is None else self._read(int.from_bytes(header, "little"), end)
        if data is None:
            return None
        answer: tuple[bool, Any] = pickle.loads(data)  # of our own child, through its own pipe
        return answer

    def _read(self, size: int, end: float) -> bytes | None:
        assert self.process.stdout is not None
        data, descriptor = b"", self.process.stdout.fileno()
        answer = select.poll()  # takes any descriptor; select only those below 1024
        answer.register(descriptor, select.POLLIN)
        while len(data) < size:
            ready = answer.poll(1000.0 * max(0.0, end - time.monotonic()))
            piece = os.read(descriptor, size - len(data)) if ready else b""
            if not piece:
                return None
            data += piece
        return data

    def end(self) -> str:
        """Kill the process; returns how it had ended, "" if it had not."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(0.2)  # a crash closes the pipe a little before it can be waited for
        code = self.process.poll()
        self.process.kill()
        self.process.wait()
        for pipe in (self.process.stdin, self.process.stdout):
            with contextlib.suppress(OSError):
                assert pipe is not None
                pipe.close()
        if code is None:
            return ""
        return f"signal {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"


class _Caller(threading.local):
    """The child of one thread."""

    child: _Child | None = None


def call_confined(
    function: Callable[[Path], Any], paths: Sequence[Path], limits: Confinement, num_processes: int
) -> Iterator[Any]:
    """Call a function for files in child processes.

    Args:
        function: Of a module, called with a path; what it returns and raises must survive pickling.
        paths: Files.
        limits: Of one call.
        num_processes: At once, at most.

    Yields:
        In the order of the files what was returned, or the exception: the function's own, or ConfinedError.
    """
    caller, children, is_over = _Caller(), list[_Child](), threading.Event()

    def one(path: Path) -> Any:
        """Call for one file; a crash is tried once more."""
        deadline_s = limits.deadline_s + _size(path) / limits.bytes_per_second
        for tries in range(1, MOST_TRIES + 1):
            if caller.child is None:
                caller.child = _Child(function, limits)
                children.append(caller.child)
            if is_over.is_set():
                return None  # a child that started meanwhile is ended below
            caller.child.send(path)
            answer = caller.child.receive(deadline_s)
            if answer is not None:
                return answer[1]
            how = caller.child.end()
            children.remove(caller.child)
            caller.child = None
            if not how:
                return ConfinedError(
                    f"decoding took longer than {deadline_s:.0f} s (data.clip_deadline_s); transcode it"
                )
            if tries == MOST_TRIES or is_over.is_set():  # killed below: nobody waits for a second try
                return ConfinedError(f"its decoder crashed ({how}), twice; transcode it")
        raise AssertionError

    with ThreadPoolExecutor(max(1, min(num_processes, len(paths))), initializer=hold_signals) as pool:
        try:
            yield from pool.map(one, paths)
        finally:
            is_over.set()
            pool.shutdown(wait=False, cancel_futures=True)
            for child in list(children):
                child.process.kill()
            pool.shutdown(wait=True)
            for child in children:
                child.end()


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:
        return 0  # the function says what is wrong with it
