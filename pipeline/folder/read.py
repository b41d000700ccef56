"""Frames of a plain file by number: seek to a key frame before, decode, choose by time stamps."""

from collections.abc import Callable, Iterator, Sequence
from fractions import Fraction
from functools import partial
from math import floor
from typing import Any

import av
import numpy as np
from numpy.typing import NDArray

from pipeline.dataset import MediaError
from pipeline.folder.describe import PlainFile
from pipeline.folder.opened import check_unchanged, frames_from
from pipeline.folder.unwanted import LeftOut, LeftOutError
from pipeline.media.retime import change_of
from pipeline.media.yuv import Planes, PlaneWriter, open_video

Ticks = int | Fraction
ToldPackets = Callable[[Iterator[Any], Any], Iterator[Any]]  # `LeftOut.told`
_MAX_HOLE_FRAMES = 2.5  # decoded frames of a constant-rate file may be at most this far apart


def read_planes(file: PlainFile, numbers: NDArray[np.int64], out: Planes | None = None) -> Planes:
    """Decode frames by number.

    Args:
        numbers: (F,) rising, without repeats, in 0..num_frames - 1.
        out: memory for the result; None takes new memory.

    Returns:
        y (F, H, W, 1), uv (F, H/2, W/2, 2) uint8, BT.601 limited range, upright; `out` where it was given.

    Raises:
        MediaError: frames are missing or cannot be decoded.
    """
    step = 1 / (file.fps * file.time_base)  # ticks per frame
    late = file.tolerance_ticks if file.is_constant else Fraction(0)
    targets = [file.start_ticks + int(n) * step + late for n in numbers]
    writer = PlaneWriter(
        len(numbers), file.width, file.height, quarter_turns=file.quarters, mirror=file.mirror, out=out
    )
    check_unchanged(file, "video", float(int(numbers[0]) / file.fps))
    try:
        if file.is_constant:
            _fill_constant(file, writer, targets, float(step) * _MAX_HOLE_FRAMES)
        else:
            _Slots(writer, targets, float("inf")).fill(_nearest(_frames(file, targets[0]), step))
    except (av.error.FFmpegError, OSError, ValueError) as error:
        time_s = float(int(numbers[0]) / file.fps)
        raise MediaError(file.path, "video", f"{error}; transcode or remove it", time_s=time_s) from error
    return writer.y, writer.uv


def shown_frames(file: PlainFile) -> Iterator[tuple[Fraction, Any]]:
    """All decoded frames, one after another, as they lie in the file (not turned, any pixel format).

    Yields:
        seconds on the file's time line (0 is the first shown frame), and the frame of PyAV.

    Raises:
        MediaError: what cannot be decoded, with the time up to which it could.
    """
    seconds = Fraction(0)
    check_unchanged(file, "video", 0.0)
    try:
        for ticks, frame in _frames(file, file.start_ticks):
            if ticks >= file.start_ticks:
                seconds = (ticks - file.start_ticks) * file.time_base
                yield seconds, frame
    except (av.error.FFmpegError, OSError, ValueError) as error:
        raise MediaError(file.path, "video", f"{error}; transcode or remove it", time_s=float(seconds)) from error


def _frames(file: PlainFile, target: Ticks, told: ToldPackets | None = None) -> Iterator[tuple[int, Any]]:
    """Decoded frames with ticks, the first one not later than `target` if the stream has such a frame."""
    if file.timing == "count":
        return _counted(file)
    return frames_from(file, file.video_stream, lambda _: floor(target), partial(_decoded, told=told))


def _fill_constant(file: PlainFile, out: PlaneWriter, targets: Sequence[Fraction], hole: float) -> None:
    """Give each target its frame, without decoding pictures that nobody asked for where that can be helped."""
    if file.has_whole_index:  # each of its packets is a whole picture
        left_out = LeftOut([floor(target) for target in targets])
        try:
            _Slots(out, targets, hole, left_out).fill(_frames(file, targets[0], left_out.told))
            return
        except LeftOutError:  # a picture in whose place another was left out cannot be decoded
            pass
    _Slots(out, targets, hole).fill(_frames(file, targets[0]))


def _nearest(frames: Iterator[tuple[int, Any]], step: Fraction) -> Iterator[tuple[Fraction, Any]]:
    """Give each frame the time from which on it is shown instead of its time stamp."""
    before: int | None = None
    for ticks, frame in frames:
        yield Fraction(ticks) if before is None else change_of(before, max(before, ticks), step), frame
        before = ticks if before is None else max(before, ticks)


class _Slots:
    """The slots of a writer, filled one after the other: each shows the last frame that is not later than its target.

    Args:
        out: memory of one picture for each target.
        targets: rising, ticks.
        hole: most ticks between a target and its frame; more is an error of the file.
        left_out: what tells which pictures were not decoded; None: all are.
    """

    def __init__(
        self, out: PlaneWriter, targets: Sequence[Ticks], hole: float, left_out: LeftOut | None = None
    ) -> None:
        self._out, self._targets, self._hole, self._left_out = out, targets, hole, left_out
        self._next = 0  # the slot that waits for its frame
        self._shown: tuple[Ticks, Any] | None = None
        self._holder = -1  # the slot that has the frame shown already

    def fill(self, frames: Iterator[tuple[Ticks, Any]]) -> None:
        """Fill all slots, from frames with their ticks.

        Raises:
            LeftOutError: a target wants a picture that was not decoded.
            ValueError: no frame, or none near enough to a target.
        """
        for ticks, frame in frames:
            while self._shown is not None and self._waits_for_less_than(ticks):
                self._write(*self._shown)
            if self._shown is None or ticks != self._shown[0]:
                self._holder = -1
            self._shown = (ticks, frame)
            while self._is_last(ticks):  # without waiting for the next one
                self._write(*self._shown)
            if self._next == len(self._targets):
                return
        if self._shown is None:
            raise ValueError(f"no frame decoded, one must be at {floor(self._targets[0])} ticks")
        while self._next < len(self._targets):
            self._write(*self._shown)

    def _waits_for_less_than(self, ticks: Ticks) -> bool:
        return self._next < len(self._targets) and ticks > self._targets[self._next]

    def _is_last(self, ticks: Ticks) -> bool:
        """Whether the frame of these ticks is known to be the one that the next slot waits for."""
        if self._left_out is None or self._next == len(self._targets):
            return False
        return self._left_out.is_last(ticks, self._targets[self._next])

    def _write(self, ticks: Ticks, frame: Any) -> None:
        """Put a frame into the next slot."""
        target = self._targets[self._next]
        if self._left_out is not None:
            self._left_out.check(ticks, target)
        if target - ticks > self._hole:
            raise ValueError(f"frame at {floor(target)} ticks is missing, the one before it is at {ticks}")
        if self._holder >= 0:
            self._out.copy(self._holder, self._next)
        else:
            self._out.write(self._next, frame)
            self._holder = self._next
        self._next += 1


def _decoded(container: Any, stream: Any, *, told: ToldPackets | None) -> Iterator[tuple[int, Any]]:
    """Frames in display order from the next key frame on; a frame without a time stamp is an error.

    Args:
        container, stream: of PyAV. told: gives the packets on when the decoder was told which are not wanted.
    """
    waiting = True
    packets = container.demux(stream)
    for packet in packets if told is None else told(packets, stream.codec_context):
        waiting = waiting and bool(packet.size) and not packet.is_keyframe
        if waiting:
            continue
        for frame in packet.decode():
            if frame.pts is None:
                raise ValueError("frames must have time stamps")
            yield frame.pts, frame


def _counted(file: PlainFile) -> Iterator[tuple[int, Any]]:
    """All frames from the beginning; the n-th has the decoding time of the n-th packet (AVI has no other)."""
    times: list[int] = []
    count = 0
    with open_video(file.path, file.video_stream) as (container, stream):
        for packet in container.demux(stream):
            if packet.size and packet.dts is not None:
                times.append(packet.dts)
            for frame in packet.decode():
                if count < len(times):
                    yield times[count], frame
                count += 1
