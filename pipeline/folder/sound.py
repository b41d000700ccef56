"""Sound of a plain file by sample number: seek to before it, decode, resample, place by time stamps."""

from collections.abc import Iterator
from fractions import Fraction
from functools import partial
from math import floor, gcd
from typing import Any

import av
import numpy as np
from numpy.typing import NDArray

from pipeline.dataset import SAMPLE_RATE_HZ, MediaError
from pipeline.folder.describe import PlainFile
from pipeline.folder.opened import check_unchanged, frames_from
from pipeline.media.audio_track import AudioTrack, drift_limit

_PREROLL_S = Fraction(1, 2)  # sound decoders (MP3, AAC, Opus) need some packets to settle after a seek
_FRAMES_AT_ONCE = 128  # resampled: of AAC at 48 kHz 2.7 s, a clip and what is decoded before it


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
    track = AudioTrack(count + 60 * SAMPLE_RATE_HZ, drift_limit(file.fps, moved_s), _FRAMES_AT_ONCE)
    check_unchanged(file, "audio", start / SAMPLE_RATE_HZ)
    try:
        for frame in _aligned(file, origin, end):
            track.push(frame)
    except (av.error.FFmpegError, OSError, ValueError) as error:
        raise MediaError(file.path, "audio", f"{error}; transcode it", time_s=start / SAMPLE_RATE_HZ) from error
    samples, _, _ = track.finish(origin, count)
    return samples if len(samples) else np.zeros(count, np.int16)


def _aligned(file: PlainFile, origin: Fraction, end: Fraction) -> Iterator[Any]:
    """Audio frames for the window origin..end; the first one begins on the 16 kHz grid of the track."""
    decode = partial(_sound, window=origin, last=end + Fraction(1, 10))
    frames = frames_from(file, file.audio_stream, lambda time_base: floor((origin - _PREROLL_S) / time_base), decode)
    is_aligned = False
    for number, (_, frame) in enumerate(frames):
        if not is_aligned:
            if number == 0 and _time(frame) > file.audio_start_s:
                continue  # decoders may leave out samples at the start of the first frame after a seek (Opus)
            cut = _align(frame, file)
            if cut is None:
                continue
            frame, is_aligned = cut, True
        yield frame


def _sound(container: Any, stream: Any, *, window: Fraction, last: Fraction) -> Iterator[tuple[int, Any]]:
    """Decoded sound with ticks of the stream up to `last` seconds; broken packets before `window` are passed over."""
    time_base = stream.time_base
    base = time_base.numerator, time_base.denominator
    last_ticks = floor(last / time_base)
    for packet in container.demux(stream):
        try:
            frames = packet.decode()
        except av.error.InvalidDataError:
            if packet.pts is None or packet.pts * Fraction(packet.time_base) >= window:
                raise
            continue
        for frame in frames:
            if frame.samples and frame.pts is not None:
                own = frame.time_base
                is_same = (own.numerator, own.denominator) == base  # fractions are slow to compare
                ticks = frame.pts if is_same else floor(_time(frame) / time_base)
                if ticks > last_ticks:
                    return
                yield ticks, frame


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
