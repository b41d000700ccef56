"""A function that describes files, and crashes, hangs or leaks on files with such names; called in child processes."""

import ctypes
import os
import signal
import time
from pathlib import Path

from pipeline.folder.describe import PlainFile, describe


def odd_describe(path: Path) -> PlainFile:
    """Describe a file, or do what its name says."""
    name = path.stem.partition("-")[0]
    if name == "segv":
        ctypes.string_at(0)
    elif name == "hang":
        time.sleep(3600)
    elif name == "wait":  # and leave an x for each try
        with path.with_suffix(".begun").open("a") as file:
            file.write("x")
        time.sleep(3600)
    elif name == "leak":
        raise AssertionError(len([bytearray(64 << 20) for _ in range(10_000)]))
    elif name == "bug":
        raise KeyError("of our own")
    elif name == "once":
        mark = path.with_suffix(".mark")
        if not mark.exists():
            mark.touch()
            os.kill(os.getpid(), signal.SIGKILL)
    return describe(path)
