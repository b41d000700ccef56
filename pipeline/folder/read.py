"""Frames and sound of a plain file by number: seek to a key frame before, decode, choose by time stamps."""

import os
from collections.abc import Callable, Iterator, Sequence
from fractions import Fraction
from functools import partial
from math import floor, gcd
from typing import Any

import av
import numpy as np
from numpy.typing import NDArray

from pipeline.dataset import SAMPLE_RATE_HZ, MediaError
from pipeline.folder.describe import PlainFile
from pipeline.media.audio_track import AudioTrack, drift_limit
from pipeline.media.retime import change_of
from pipeline.media.yuv import Planes, PlaneWriter, open_video

_PREROLL_S = Fraction(1, 2)  # sound decoders (MP3, AAC, Opus) need some packets to settle after a seek
_SEEK_BACK_S = (Fraction(0), Fraction(2), Fraction(10), None)  # None: decode from the start
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
    _check_unchanged(file, "video", float(int(numbers[0]) / file.fps))
    try:
        frames = (
            _counted(file) if file.timing == "count" else _from(file, file.video_stream, floor(targets[0]), _decoded)
        )
        if file.is_constant:
            _fill(writer, targets, frames, float(step) * _MAX_HOLE_FRAMES)
        else:
            _fill(writer, targets, _nearest(frames, step), float("inf"))
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
    _check_unchanged(file, "video", 0.0)
    try:
        frames = (
            _counted(file) if file.timing == "count" else _from(file, file.video_stream, file.start_ticks, _decoded)
        )
        for ticks, frame in frames:
            if ticks >= file.start_ticks:
                seconds = (ticks - file.start_ticks) * file.time_base
                yield seconds, frame
    except (av.error.FFmpegError, OSError, ValueError) as error:
        raise MediaError(file.path, "video", f"{error}; transcode or remove it", time_s=float(seconds)) from error


def _check_unchanged(file: PlainFile, stream: str, time_s: float) -> None:
    """Numbers of frames and samples are those of the file that was looked at, not of one that took its place."""
    try:
        found = os.stat(file.path)
    except OSError as error:
        raise MediaError(
            file.path, stream, f"{error}; put it back, or start again without it", time_s=time_s
        ) from error
    if (found.st_size, found.st_mtime_ns) != (file.size_bytes, file.mtime_ns):
        reason = (
            f"file ({found.st_size} bytes, mtime {found.st_mtime_ns} ns) must be the one that was there when the run "
            f"began ({file.size_bytes} bytes, mtime {file.mtime_ns} ns); put it back, or start again"
        )
        raise MediaError(file.path, stream, reason, time_s=time_s)


def _nearest(frames: Iterator[tuple[int, Any]], step: Fraction) -> Iterator[tuple[Fraction, Any]]:
    """Give each frame the time from which on it is shown instead of its time stamp."""
    before: int | None = None
    for ticks, frame in frames:
        yield Fraction(ticks) if before is None else change_of(before, max(before, ticks), step), frame
        before = ticks if before is None else max(before, ticks)


def _fill(out: PlaneWriter, targets: Sequence[Ticks], frames: Iterator[tuple[Ticks, Any]], hole: float) -> None:
    """Give each target the last frame with a time <= target."""
    slot, written = 0, -1
    shown: tuple[Ticks, Any] | None = None
    for ticks, frame in frames:
        while shown is not None and slot < len(targets) and ticks > targets[slot]:
            written = _write(out, slot, written, shown, targets[slot], hole)
            slot += 1
        if slot == len(targets):
            return
        if shown is None or ticks != shown[0]:
            written = -1
        shown = (ticks, frame)
    if shown is None:
        raise ValueError(f"no frame decoded, one must be at {floor(targets[0])} ticks")
    for last in range(slot, len(targets)):
        written = _write(out, last, written, shown, targets[last], hole)


def _write(out: PlaneWriter, slot: int, written: int, shown: tuple[Ticks, Any], target: Ticks, hole: float) -> int:
    ticks, frame = shown
    if target - ticks > hole:
        raise ValueError(f"frame at {floor(target)} ticks is missing, the one before it is at {ticks}")
    if written >= 0:
        out.copy(written, slot)
        return written
    out.write(slot, frame)
    return slot


def _from(
    file: PlainFile, stream_number: int, target: int, decode: Callable[[Any, Any], Iterator[tuple[int, Any]]]
) -> Iterator[tuple[int, Any]]:
    """Decoded frames with ticks, the first one not later than `target` if the stream has such a frame.

    A seek may land late (transport streams have no index): then it is tried from further back, at last from the start.
    """
    for back_s in _SEEK_BACK_S if file.timing != "start" else (None,):
        with open_video(file.path, stream_number) as (container, stream):
            if back_s is not None:
                wanted = target - round(back_s / stream.time_base)
                if wanted <= (stream.start_time or 0):
                    continue
                try:
                    container.seek(wanted, stream=stream, backward=True)
                except av.error.FFmpegError:
                    continue
            frames = decode(container, stream)
            first = next(frames, None)
            if first is None or (back_s is not None and first[0] > target):
                continue
            yield first
            yield from frames
            return


def _decoded(container: Any, stream: Any) -> Iterator[tuple[int, Any]]:
    """Frames in display order from the next key frame on; a frame without a time stamp is an error."""
    waiting = True
    for packet in container.demux(stream):
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


def read_samples(file: PlainFile, start: int, count: int) -> NDArray[np.int16]:
    """Decode sound by sample number on the file's time line.

    Whatever `start`, a sample has the same value (but for the rounding of time stamps in the container): decoding
    begins half a second early, at a source sample that lies on the 16 kHz grid of the track's first sample.

    Returns:
        (count,) int16 at 16 kHz mono; zeros outside the track.

    Raises:
        MediaError: a packet inside the window cannot be decoded.
    """
    origin = file.start_s + Fraction(start, SAMPLE_RATE_HZ)
    end = origin + Fraction(count, SAMPLE_RATE_HZ)
    moved_s = file.time_base if file.is_constant else 1 / (2 * file.fps)
    track = AudioTrack(count + 60 * SAMPLE_RATE_HZ, drift_limit(file.fps, moved_s))
    _check_unchanged(file, "audio", start / SAMPLE_RATE_HZ)
    try:
        for frame in _aligned(file, origin, end):
            track.push(frame)
    except (av.error.FFmpegError, OSError, ValueError) as error:
        raise MediaError(file.path, "audio", f"{error}; transcode it", time_s=start / SAMPLE_RATE_HZ) from error
    samples, _, _ = track.finish(origin, count)
    return samples if len(samples) else np.zeros(count, np.int16)


def _aligned(file: PlainFile, origin: Fraction, end: Fraction) -> Iterator[Any]:
    """Audio frames for the window origin..end; the first one begins on the 16 kHz grid of the track."""
    with open_video(file.path, file.audio_stream) as (_, stream):
        time_base = Fraction(stream.time_base)
    decode = partial(_sound, window=origin)
    is_aligned = False
    for number, (ticks, frame) in enumerate(
        _from(file, file.audio_stream, floor((origin - _PREROLL_S) / time_base), decode)
    ):
        if ticks * time_base > end + Fraction(1, 10):
            return
        if not is_aligned:
            if number == 0 and ticks * time_base > file.audio_start_s:
                continue  # decoders may leave out samples at the start of the first frame after a seek (Opus)
            cut = _align(frame, file)
            if cut is None:
                continue
            frame, is_aligned = cut, True
        yield frame


def _sound(container: Any, stream: Any, *, window: Fraction) -> Iterator[tuple[int, Any]]:
    """Decoded sound with ticks of the stream; broken packets before `window` seconds are passed over."""
    for packet in container.demux(stream):
        try:
            frames = packet.decode()
        except av.error.InvalidDataError:
            if packet.pts is None or packet.pts * Fraction(packet.time_base) >= window:
                raise
            continue
        for frame in frames:
            if frame.samples and frame.pts is not None:
                yield floor(_time(frame) / stream.time_base), frame


def _time(frame: Any) -> Fraction:
    return frame.pts * Fraction(frame.time_base)


def _align(frame: Any, file: PlainFile) -> Any | None:
    """Cut samples off the front of a frame until it begins on the 16 kHz grid; None if it is too short for that."""
    rate = frame.sample_rate
    position = (_time(frame) - file.audio_start_s) * rate  # in source samples, off by the rounding of the time stamp
    whole = round(position)
    if whole > 0:
        blocks = round((whole - file.audio_first_samples) / frame.samples)
        snapped = file.audio_first_samples + max(blocks, 0) * frame.samples
        if abs(snapped - position) <= Fraction(frame.time_base) * rate + 1:
            whole = snapped
    skip = -whole % (rate // gcd(rate, SAMPLE_RATE_HZ))
    if skip >= frame.samples:
        return None
    data = frame.to_ndarray()
    channels = len(frame.layout.channels)
    data = data[:, skip:] if frame.format.is_planar else data[:, skip * channels :]
    cut = av.AudioFrame.from_ndarray(np.ascontiguousarray(data), format=frame.format.name, layout=frame.layout.name)
    cut.sample_rate, cut.time_base = rate, Fraction(1, rate)
    cut.pts = round(file.audio_start_s * rate) + whole + skip
    return cut
