"""A split of a store of which some media crash, hang or leak where they are read; opened by worker processes."""

import contextlib
import ctypes
import os
import signal
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

from pipeline.dataset import MediaError
from pipeline.media.yuv import Planes
from pipeline.store.reader import Store, StoreSplit


class OddSplit(StoreSplit):
    """A split with faults.

    Args:
        store: What is read. split: Its split. faults: Medium -> what happens when its frames are read. folder: Where
            faults that happen once leave a mark.
    """

    def __init__(self, store: Store, split: str, faults: Mapping[int, str], folder: Path) -> None:
        super().__init__(store, split)
        self.faults, self.folder = dict(faults), folder

    def __reduce__(self) -> tuple[Any, ...]:
        return OddSplit, (self.store, self.split, self.faults, self.folder)

    def read_frames(self, media: int, frames: NDArray[Any], out: Planes | None = None) -> Planes:
        """Read frames, or do what the fault says."""
        fault = self.faults.get(media, "")
        name, _, once = fault.partition(" ")
        mark = self.folder / f"{media}-{name}"
        if not once or not mark.exists():
            mark.touch()
            _do(name, self.media.id(media))
            if name == "read":
                with slow_file():
                    return super().read_frames(media, frames, out)
        return super().read_frames(media, frames, out)


@contextlib.contextmanager
def slow_file() -> Iterator[None]:
    """Files whose reads do not return."""
    read = os.preadv
    os.preadv = lambda *_: time.sleep(3600) or 0
    try:
        yield
    finally:
        os.preadv = read


def _do(fault: str, name: str) -> None:
    if fault == "segv":
        ctypes.string_at(0)
    elif fault == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    elif fault == "hang":
        time.sleep(3600)
    elif fault == "stop":
        os.kill(os.getpid(), signal.SIGSTOP)
    elif fault == "leak":
        kept = [bytearray(64 << 20) for _ in range(10_000)]
        raise AssertionError(len(kept))
    elif fault == "bug":
        raise KeyError("of our own")
    elif fault == "bad":
        raise MediaError(name, "video", "damaged")
