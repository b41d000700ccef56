"""Frames of whole batches on a CPU: threads run the fused operation on decoded planes, straight into a batch's memory.

Legend: B clips, S crops, T frames, H W pixels, C channels in memory.
"""

import weakref
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pipeline.clip import ClipPlan
from pipeline.frames.native import library_text, make_frames
from pipeline.source import HostClip


def choose_frames(wanted: str, decoder: str, device: str) -> str:
    """Return who makes the frames: "fused" (this module) or "graph" (DALI's operators).

    Args:
        wanted: `data.frames`: auto, fused or graph.
        decoder: `data.decoder`.
        device: Where the batches go.

    Raises:
        ValueError: fused where it cannot be: on a GPU, where the graph itself decodes, or without a library.
    """
    if wanted == "graph":
        return "graph"
    obstacle = ""
    if torch.device(device).type != "cpu":
        obstacle = f"frames on {device} are made by the graph there"
    elif decoder not in ("auto", "cpu"):
        obstacle = f"data.decoder ({decoder}) hands no planes to the CPU; set data.decoder=cpu"
    elif library_text():
        obstacle = f"no library: {library_text()}"
    if obstacle and wanted == "fused":
        raise ValueError(f"data.frames (fused) cannot be used: {obstacle}, or use data.frames=auto")
    return "graph" if obstacle else "fused"


class FrameMaker:
    """Makes the frames of batches ahead of their use.

    Args:
        half: float16 instead of float32.
        channels: C, 3 or 4.
        num_threads: Threads that work at a time.
    """

    def __init__(self, *, half: bool, channels: int, num_threads: int) -> None:
        self._dtype: Any = np.float16 if half else np.float32
        self._channels = channels
        self._pool = ThreadPoolExecutor(num_threads, thread_name_prefix="frames")
        self._memory = _Memory()

    def begin(self, clips: Sequence[HostClip]) -> "PendingFrames":
        """Start on the frames of one batch; its clips have pictures of one output size and equally many crops."""
        first = clips[0].plan
        shape = (len(clips), len(first.crops), len(first.frames), *first.size_px, self._channels)
        memory = self._memory.take(shape, self._dtype)
        return PendingFrames(memory, [self._pool.submit(_make, clip, memory, i) for i, clip in enumerate(clips)])

    def close(self) -> None:
        """Drop what is waiting and end the threads."""
        self._pool.shutdown(wait=True, cancel_futures=True)


class PendingFrames:
    """Frames that are being made."""

    def __init__(self, memory: NDArray[Any], parts: list[Future[None]]) -> None:
        self._memory, self._parts = memory, parts

    def result(self) -> Tensor:
        """Wait; returns (B, S, T, H, W, C), which nothing else writes to as long as anything refers to it.

        Raises:
            ValueError: a clip whose planes or windows the operation refuses.
        """
        for part in self._parts:
            part.result()
        return torch.from_numpy(self._memory)


def crop_corners(plan: ClipPlan) -> NDArray[np.float32]:
    """(S, 4): top, left, bottom, right of each crop in stored pixels."""
    corners = [(w.top, w.left, w.top + w.height, w.left + w.width) for w in plan.crops]
    return np.array(corners, np.float32)


def _make(clip: HostClip, memory: NDArray[Any], place: int) -> None:
    """Holds the whole memory, not a slice of it: the memory lives as long as the work."""
    assert clip.luma is not None
    assert clip.chroma is not None
    make_frames(clip.luma, clip.chroma, crop_corners(clip.plan), clip.plan.flip, memory[place])


class _Memory:
    """Memory of batches, used again once nobody refers to a batch any more: fresh pages are a good part of the cost."""

    def __init__(self) -> None:
        self._free: list[NDArray[np.uint8]] = []  # appended to by whichever thread drops the last reference

    def take(self, shape: tuple[int, ...], dtype: Any) -> NDArray[Any]:
        """Return uninitialised memory that is given back when the array, which any tensor made of it holds, ends."""
        size = int(np.prod(shape)) * np.dtype(dtype).itemsize
        block = None
        while self._free and block is None:
            block = self._free.pop()
            block = block if block.nbytes == size else None  # of a smaller last batch
        block = np.empty(size, np.uint8) if block is None else block
        array = block.view(dtype).reshape(shape)
        weakref.finalize(array, self._free.append, block).atexit = False
        return array
