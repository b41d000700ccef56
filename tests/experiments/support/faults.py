"""Trains like experiments.train, with a fault at a chosen step or file operation of a chosen rank.

python -m tests.experiments.support.faults CONFIG [section.key=value ...], with the fault as JSON in AVSF_FAULT: kind
(kill, stop, segv, raise), step or operation (the n-th file operation below `folder`), rank, marker (a file: the fault
happens once, and the file then holds the time) or none (every time). Or of storage: kind hiccup (every n-th read fails
for a moment, `every`) or hang (the read number `read` never returns). Or of the disk: kind refuse (writes below
`folder` fail with `error`, such as EROFS, from step `step` to step `until`). Or none: kind hold waits at the
beginning of the steps in `files` until the file of each is there. Or of speed: kind slow
waits `seconds` at each call of a place, `where`: read (of storage), decode, launch (of a step), forward; worker
processes have no fault, so data.num_workers=0.
"""

import ctypes
import errno
import itertools
import json
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from experiments.cli.command_line import run_command
from experiments.engine.learner import Learner
from experiments.train import main
from model.avslowfast import AVSlowFast
from pipeline.media.cut_decoder import CutDecoder

_EVENTS = ("open", "os.rename", "os.remove", "os.mkdir", "os.truncate", "os.link")


def strike(kind: str, marker: str) -> None:
    """Do what the fault is, unless the marker says that it was done."""
    if marker:
        try:
            descriptor = os.open(marker, os.O_CREAT | os.O_EXCL | os.O_WRONLY)
        except FileExistsError:
            return
        os.write(descriptor, str(time.time()).encode())
        os.close(descriptor)
    if kind == "raise":
        raise RuntimeError("a planted exception")
    if kind == "segv":
        ctypes.string_at(0)
    os.kill(os.getpid(), signal.SIGSTOP if kind == "stop" else signal.SIGKILL)


class Operations:
    """Counts the file operations of this process below a folder; strikes at the n-th."""

    def __init__(self, folder: str, fault: dict[str, Any]) -> None:
        self.folder, self.fault, self.count = folder, fault, 0
        self.inside = threading.local()

    def audit(self, event: str, arguments: tuple[Any, ...]) -> None:
        """Hear of what Python does with files."""
        if event in _EVENTS and isinstance(arguments[0], (str, Path)):
            self.seen(str(arguments[0]))

    def on_descriptor(self, function: Any) -> Any:
        """Wrap a function whose first argument is an open file."""

        def wrapped(descriptor: int, *rest: Any) -> Any:
            self.seen(os.readlink(f"/proc/self/fd/{descriptor}"))
            return function(descriptor, *rest)

        return wrapped

    def seen(self, path: str) -> None:
        """Count an operation."""
        if getattr(self.inside, "now", False) or not path.startswith(self.folder):
            return
        self.count += 1
        if self.count == self.fault["operation"]:
            self.inside.now = True
            try:
                strike(self.fault["kind"], self.fault.get("marker", ""))
            finally:
                self.inside.now = False


class RefusingDisk:
    """A disk that refuses to write below a folder for some steps."""

    def __init__(self, fault: dict[str, Any]) -> None:
        self.fault, self.code, self.refuses = fault, int(getattr(errno, fault["error"])), False

    def at_step(self, step: int) -> None:
        """Begin or end to refuse."""
        self.refuses = self.fault["step"] <= step < self.fault["until"]

    def check(self, path: object) -> None:
        """Refuse a write."""
        if self.refuses and str(path).startswith(self.fault["folder"]):
            raise OSError(self.code, os.strerror(self.code), str(path))

    def audit(self, event: str, arguments: tuple[Any, ...]) -> None:
        """Hear of what Python does with files."""
        if event in ("os.rename", "os.mkdir") or (event == "open" and arguments[2] & (os.O_WRONLY | os.O_RDWR)):
            self.check(arguments[0])

    def write(self, write: Any) -> Any:
        """Wrap os.write."""

        def checked(descriptor: int, data: bytes) -> Any:
            self.check(os.readlink(f"/proc/self/fd/{descriptor}"))
            return write(descriptor, data)

        return checked


def at_steps(act: Callable[[int], None]) -> None:
    """Call a function at the beginning of every step."""
    begin = Learner.begin_step

    def begin_step(self: Learner, step: int) -> bool:
        act(step)
        return begin(self, step)

    Learner.begin_step = begin_step  # type: ignore[method-assign]


def hold(files: dict[str, str], step: int) -> None:
    """Wait until the file of this step is there: a test does something at a step, however slow the machine is."""
    while str(step) in files and not os.path.exists(files[str(step)]):
        time.sleep(0.01)


def bad_storage(fault: dict[str, Any], read: Any) -> Any:
    """Wrap a function that reads so that it fails for a moment, again and again, or hangs once."""
    numbers, errors = itertools.count(1), itertools.cycle((errno.EIO, errno.ESTALE, errno.ETIMEDOUT))

    def bad(*arguments: Any) -> Any:
        number = next(numbers)
        if fault["kind"] == "hiccup" and number % fault["every"] == 0:
            raise OSError(code := next(errors), os.strerror(code))
        if number == fault.get("read"):
            time.sleep(10**6)
        return read(*arguments)

    return bad


SLOW_PLACES: dict[str, tuple[Any, str]] = {
    "read": (os, "preadv"),
    "decode": (CutDecoder, "decode"),
    "launch": (Learner, "begin_step"),
    "forward": (AVSlowFast, "forward"),
}


def slow_down(fault: dict[str, Any]) -> None:
    """Wait before each call of a place."""
    owner, name = SLOW_PLACES[fault["where"]]
    quick = getattr(owner, name)

    def slow(*arguments: Any, **named: Any) -> Any:
        time.sleep(fault["seconds"])
        return quick(*arguments, **named)

    setattr(owner, name, slow)


def plant() -> None:
    """Prepare the fault that the environment names, if it is this rank's."""
    fault = json.loads(os.environ.get("AVSF_FAULT", "{}"))
    if not fault or int(os.environ.get("RANK", "0")) != fault.get("rank", 0):
        return
    if fault["kind"] in ("hiccup", "hang"):
        os.preadv = bad_storage(fault, os.preadv)
    elif fault["kind"] == "hold":
        at_steps(lambda step: hold(fault["files"], step))
    elif fault["kind"] == "slow":
        slow_down(fault)
    elif fault["kind"] == "refuse":
        disk = RefusingDisk(fault)
        at_steps(disk.at_step)
        os.write = disk.write(os.write)
        sys.addaudithook(disk.audit)
    elif "operation" in fault:
        operations = Operations(fault["folder"], fault)
        os.write = operations.on_descriptor(os.write)
        os.fsync = operations.on_descriptor(os.fsync)
        sys.addaudithook(operations.audit)
    else:
        at_steps(lambda step: strike(fault["kind"], fault.get("marker", "")) if step == fault["step"] else None)


if __name__ == "__main__":
    plant()
    sys.exit(run_command(main))
