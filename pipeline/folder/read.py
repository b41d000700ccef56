"""Frames of a plain file by number: seek to a key frame before, decode, choose by time stamps."""

from collections.abc import Iterator, Sequence
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
            _fill(writer, targets, _nearest(_frames(file, targets[0]), step), float("inf"))
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


def _frames(file: PlainFile, target: Ticks, left_out: LeftOut | None = None) -> Iterator[tuple[int, Any]]:
    """Decoded frames with ticks, the first one not later than `target` if the stream has such a frame."""
    if file.timing == "count":
        return _counted(file)
    return frames_from(file, file.video_stream, lambda _: floor(target), partial(_decoded, left_out=left_out))


def _fill_constant(file: PlainFile, out: PlaneWriter, targets: Sequence[Fraction], hole: float) -> None:
    """Give each target its frame, without decoding pictures that nobody asked for where that can be helped."""
    if file.has_whole_index:  # each of its packets is a whole picture
        left_out = LeftOut([floor(target) for target in targets])
        try:
            _fill(out, targets, _frames(file, targets[0], left_out), hole, left_out)
            return
        except LeftOutError:  # a picture in whose place another was left out cannot be decoded
            pass
    _fill(out, targets, _frames(file, targets[0]), hole)


def _nearest(frames: Iterator[tuple[int, Any]], step: Fraction) -> Iterator[tuple[Fraction, Any]]:
    """Give each frame the time from which on it is shown instead of its time stamp."""
    before: int | None = None
    for ticks, frame in frames:
        yield Fraction(ticks) if before is None else change_of(before, max(before, ticks), step), frame
        before = ticks if before is None else max(before, ticks)


def _fill(
    out: PlaneWriter,
    targets: Sequence[Ticks],
    frames: Iterator[tuple[Ticks, Any]],
    hole: float,
    left_out: LeftOut | None = None,
) -> None:
    """Give each target the last frame with a time <= target; raises LeftOutError where that was not decoded."""
    slot, written = 0, -1
    shown: tuple[Ticks, Any] | None = None
    for ticks, frame in frames:
        while shown is not None and slot < len(targets) and ticks > targets[slot]:
            written = _write(out, slot, written, shown, targets[slot], hole, left_out)
            slot += 1
        if shown is None or ticks != shown[0]:
            written = -1
        shown = (ticks, frame)
        while left_out is not None and slot < len(targets) and left_out.is_last(ticks, targets[slot]):
            written = _write(out, slot, written, shown, targets[slot], hole)  # without waiting for the next one
            slot += 1
        if slot == len(targets):
            return
    if shown is None:
        raise ValueError(f"no frame decoded, one must be at {floor(targets[0])} ticks")
    for last in range(slot, len(targets)):
        written = _write(out, last, written, shown, targets[last], hole, left_out)


def _write(
    out: PlaneWriter,
    slot: int,
    written: int,
    shown: tuple[Ticks, Any],
    target: Ticks,
    hole: float,
    left_out: LeftOut | None = None,
) -> int:
    ticks, frame = shown
    if left_out is not None:
        left_out.check(ticks, target)
    if target - ticks > hole:
        raise ValueError(f"frame at {floor(target)} ticks is missing, the one before it is at {ticks}")
    if written >= 0:
        out.copy(written, slot)
        return written
    out.write(slot, frame)
    return slot


def _decoded(container: Any, stream: Any, *, left_out: LeftOut | None) -> Iterator[tuple[int, Any]]:
    """Frames in display order from the next key frame on; a frame without a time stamp is an error."""
    waiting = True
    packets = container.demux(stream)
    for packet in packets if left_out is None else left_out.told(packets, stream.codec_context):
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
