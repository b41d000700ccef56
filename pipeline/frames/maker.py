"""Who makes frames, and frames of whole batches on a CPU: threads run the fused operation, into a batch's memory.

Legend: B clips, S crops, T frames, H W pixels, C channels in memory.
"""

import weakref
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pipeline.frames.device import triton_problem
from pipeline.frames.native import library_text, make_frames
from pipeline.frames.table import crop_corners
from pipeline.source import HostClip


class Pending(Protocol):
    """Frames that are being made."""

    def result(self) -> Tensor:
        """Return (B, S, T, H, W, C) for the caller and, on a GPU, the current stream."""
        ...


class Maker(Protocol):
    """Makes the frames of batches ahead of their use: `FrameMaker` on a CPU, `DeviceFrameMaker` on a GPU."""

    def begin(self, clips: Sequence[HostClip]) -> Pending:
        """Start on the frames of one batch; its clips have pictures of one output size and equally many crops."""
        ...

    def close(self) -> None:
        """Let go of what is waiting; nothing reads planes in the host's memory after that."""
        ...


def choose_frames(wanted: str, decoder: str, device: str) -> str:
    """Return who makes the frames: "fused" (a `Maker`, beside the graph) or "graph" (DALI's operators).

    "auto" means fused on a CPU where that can be, and on a GPU the graph: what the kernel gains there is unmeasured.

    Args:
        wanted: `data.frames`: auto, fused or graph.
        decoder: `data.decoder`.
        device: Where the batches go.

    Raises:
        ValueError: fused where it cannot be: where the graph itself decodes, or without a library or Triton.
    """
    on_gpu = torch.device(device).type != "cpu"
    if wanted == "graph" or (wanted == "auto" and on_gpu):
        return "graph"
    obstacle = ""
    if on_gpu and decoder == "dali":
        obstacle = "data.decoder (dali) decodes in the graph and hands no planes out; set data.decoder=auto"
    elif on_gpu:
        obstacle = triton_problem()
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
