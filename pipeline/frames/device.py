"""Frames of whole batches on a GPU: one kernel a batch, behind the copies that bring the planes; the host never waits.

Legend: B clips, S crops, T frames, H W pixels, C channels in memory.
"""

import contextlib
import functools
import importlib.util
import os
import shutil
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from pipeline.frames.native import has_rows
from pipeline.frames.table import Plane, crop_table
from pipeline.source import HostClip


@functools.cache
def triton_problem() -> str:
    """Why Triton cannot build the kernel here, with what to do; empty where it can."""
    if importlib.util.find_spec("triton") is None:
        return "package triton (missing) must be installed, as torch's builds for CUDA do; pip install triton"
    if not (os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang")):
        return "no C compiler (gcc, clang) found, which Triton builds its launcher with; install one or set CC"
    return ""


class DeviceFrameMaker:
    """Makes the frames of batches ahead of their use, on a GPU: a `Maker`.

    Args:
        half: float16 instead of float32.
        channels: C, 3 or 4.
        device: Where frames are made.
        stream: In whose order planes lie in that memory; None: one of its own on a GPU. A device "cpu" has none: that
            is the rehearsal with Triton's interpreter.
    """

    def __init__(self, *, half: bool, channels: int, device: torch.device, stream: Any = None) -> None:
        self._channels, self._device = channels, device
        self._dtype = torch.float16 if half else torch.float32
        self._stream = torch.cuda.Stream(device) if stream is None and device.type == "cuda" else stream

    def begin(self, clips: Sequence[HostClip]) -> "DeviceFrames":
        """Begin the frames of one batch; its clips have pictures of one output size and equally many crops.

        Raises:
            ValueError: a clip whose planes or windows the operation refuses.
        """
        from pipeline.frames.triton_frames import launch  # the first batch builds the kernel, or finds it in a cache

        plans = [clip.plan for clip in clips]
        shape = (len(clips), len(plans[0].crops), len(plans[0].frames), *plans[0].size_px, self._channels)
        with contextlib.nullcontext() if self._stream is None else torch.cuda.stream(self._stream):
            planes = [(self._here(clip.luma), self._here(clip.chroma)) for clip in clips]
            fields = [_checked(clip, *both) for clip, both in zip(clips, planes, strict=True)]
            table = torch.from_numpy(crop_table(plans, fields))
            if self._device.type == "cuda":  # from pageable memory the host would wait
                table = table.pin_memory().to(self._device, non_blocking=True)
            frames = torch.empty(shape, dtype=self._dtype, device=self._device)
            launch(table, frames)
        if self._stream is None:
            return DeviceFrames(frames, None)
        for plane in (plane for both in planes for plane in both):
            plane.record_stream(self._stream)  # NVDEC's lie in memory of another stream
        return DeviceFrames(frames, self._stream.record_event())

    def close(self) -> None:
        """Nothing: what is in the making is memory of the stream, which goes on in its order."""

    def _here(self, plane: Any) -> Tensor:
        """A plane in the device's memory; where it lies there already, itself."""
        return torch.as_tensor(plane).to(self._device, non_blocking=True)


class DeviceFrames:
    """Frames that are being made: a `Pending`."""

    def __init__(self, frames: Tensor, made: Any) -> None:
        self._frames: Tensor | None = frames
        self._made = made

    def result(self) -> Tensor:
        """Return (B, S, T, H, W, C), once, for the current stream, which waits for it; the host does not.

        Whoever works on it in another stream says so to its memory (`Tensor.record_stream`), as with any tensor.
        """
        frames, self._frames = self._frames, None
        assert frames is not None, "frames are handed out once: whoever keeps their inputs must not keep them as well"
        if self._made is not None:
            current = torch.cuda.current_stream(frames.device)
            current.wait_event(self._made)
            frames.record_stream(current)
        return frames


def _checked(clip: HostClip, luma: Tensor, chroma: Tensor) -> tuple[Plane, Plane]:
    """Where the planes of a clip lie."""
    count, height, width = len(clip.plan.frames), luma.shape[1], luma.shape[2]
    for name, plane, shape in (
        ("luma", luma, (count, height, width, 1)),
        ("chroma", chroma, (count, (height + 1) // 2, (width + 1) // 2, 2)),
    ):
        dense = not plane.numel() or (plane.ndim == 4 and has_rows(plane.shape, plane.stride()))
        if plane.shape != shape or plane.dtype != torch.uint8 or not dense:
            raise ValueError(
                f"{name} of {clip.plan.id} ({tuple(plane.shape)} {plane.dtype} strides {plane.stride()}) must be "
                f"{shape} torch.uint8 with dense rows; hand out planes as a source does"
            )
    first, second = (Plane(p.data_ptr(), p.stride(0), p.stride(1), p.shape[1], p.shape[2]) for p in (luma, chroma))
    return first, second
