"""Audio frames with time stamps -> 16 kHz mono PCM on the time line of the video, sample by sample."""

from __future__ import annotations

from array import array
from dataclasses import dataclass
from fractions import Fraction
from math import lcm
from typing import Any, BinaryIO

import av
import numpy as np
from numpy.typing import NDArray

SAMPLE_RATE_HZ = 16_000
MAX_DRIFT_S = Fraction(10, 1000)  # the most that time stamps may wander before the track is set anew


def drift_limit(fps: Fraction, moved_s: Fraction) -> Fraction:
    """Return by how many seconds sound may leave its time stamps: with what pictures move, half a frame; at most 10 ms.

    A quarter of a frame is left to it always, as sound that is cut at every jitter of its stamps is worse than late.

    Args:
        fps: of the pictures. moved_s: how far a picture may be shown from its own time stamp.
    """
    return min(MAX_DRIFT_S, max(1 / (2 * fps) - moved_s, 1 / (4 * fps)))


@dataclass(frozen=True)
class PlacedAudio:
    """A track on the time line of the video, in parts.

    Args:
        parts: (first sample, (n,) int16) each, in the order of writing; where they overlap, later ones count.
        num_samples: samples up to the end of the last part. first_sample: the earliest that any part holds.
        begin_s, end_s: what the source covers, relative to sample 0; both 0 if it has no audio.
    """

    parts: tuple[tuple[int, NDArray[np.int16]], ...]
    num_samples: int
    first_sample: int
    begin_s: Fraction
    end_s: Fraction

    @property
    def peak(self) -> int:
        """The loudest sample, 0 to 32768."""
        bounds = [int(bound) for _, samples in self.parts for bound in (samples.max(), samples.min())]
        return max(map(abs, bounds), default=0)

    def write(self, file: BinaryIO, offset: int) -> None:
        """Write the samples, little endian, from byte `offset` on (its end before); nothing is copied in memory."""
        for first, samples in self.parts:
            file.seek(offset + 2 * first)  # what is left out reads as zeros
            file.write(samples.astype("<i2", copy=False).data)

    def samples(self) -> NDArray[np.int16]:
        """All samples, (num_samples,) int16."""
        track = np.zeros(self.num_samples, np.int16)
        for first, samples in self.parts:
            track[first : first + len(samples)] = samples
        return track


class AudioTrack:
    """Collects decoded frames; `place` places them.

    Consecutive frames form a run, resampled as one piece (libswresample, its default filter and its default down-mix:
    stereo is 0.5 L + 0.5 R; 5.1 is 0.207 (L + R) + 0.293 C + 0.146 (SL + SR), LFE left out). A run
    begins where its first time stamp says; it ends where the stamps leave it by more than `max_drift_s` or the format
    changes.

    Args:
        max_samples: more than this is an error of the file, and is dropped.
        max_drift_s: how far stamps may wander within a run (`drift_limit`).
        frames_at_once: how many frames the resampler is given in one: fewer calls for the same samples, and what it
            raises comes later.
    """

    def __init__(self, max_samples: int, max_drift_s: Fraction = MAX_DRIFT_S, frames_at_once: int = 1) -> None:
        self._max_samples, self._max_drift_s, self._frames_at_once = max_samples, max_drift_s, frames_at_once
        self._resampler: av.AudioResampler | None = None
        self._setup: tuple[str, str, int] | None = None
        self._runs: list[tuple[Fraction, array[int]]] = []
        self._clock = _RunClock(Fraction(0), 1, max_drift_s)
        self._waiting: list[Any] = []  # frames of the run that are not resampled yet
        self._samples = 0
        self.jumps = 0
        self.overflowed = False

    def push(self, frame: Any) -> None:
        """Take one decoded frame (PyAV AudioFrame) in decoding order; frames without samples are ignored."""
        if not frame.samples or frame.sample_rate < 1:
            return
        if self._samples > self._max_samples:
            self.overflowed = True
            return
        setup = (frame.format.name, frame.layout.name, frame.sample_rate)
        if setup != self._setup or (frame.pts is not None and self._clock.is_left(frame.pts, frame.time_base)):
            start = self._clock.next_s if frame.pts is None else frame.pts * Fraction(frame.time_base)
            self._begin(start, setup)
        frame.pts = None  # the run's own clock counts: jitter of the container's must not reach the resampler
        self._clock.samples += frame.samples
        self._waiting.append(frame)
        if len(self._waiting) >= self._frames_at_once:
            self._take_waiting()

    def _begin(self, start: Fraction, setup: tuple[str, str, int]) -> None:
        self.flush()
        if self._runs:
            self.jumps += 1
        self._resampler = av.AudioResampler(format="s16", layout="mono", rate=SAMPLE_RATE_HZ)
        self._setup, self._clock = setup, _RunClock(start, setup[2], self._max_drift_s)
        self._runs.append((start, array("h")))

    def _take_waiting(self) -> None:
        waiting, self._waiting = self._waiting, []
        if waiting:
            self._take(_joined(waiting))

    def _take(self, frame: Any | None) -> None:
        assert self._resampler is not None
        try:
            pieces = self._resampler.resample(frame)
        except (av.error.FFmpegError, ValueError):  # it is of no use afterwards: the next frame begins a run
            self._resampler = self._setup = None
            raise
        for out in pieces:
            piece = np.ascontiguousarray(out.to_ndarray().reshape(-1), np.int16)
            self._samples += len(piece)
            self._runs[-1][1].frombytes(piece.data.cast("B"))  # grows in place: 6 h are 0.7 GB, held once

    def flush(self) -> None:
        """End the run; raises what the resampler raises, once: what it still held is lost then."""
        self._take_waiting()
        if self._resampler is not None:
            self._take(None)
            self._resampler = None

    def finish(self, origin_s: Fraction, num_samples: int) -> tuple[NDArray[np.int16], Fraction, Fraction]:
        """Place the runs in a window of fixed length; arguments as in `place`.

        Returns:
            (num_samples,) int16 with zeros where there is no audio, empty if there is none at all; `begin_s`, `end_s`.
        """
        placed = self.place(origin_s, num_samples)
        missing = num_samples - placed.num_samples if placed.begin_s < placed.end_s else 0
        return np.pad(placed.samples(), (0, missing)), placed.begin_s, placed.end_s

    def place(self, origin_s: Fraction, num_samples: int) -> PlacedAudio:
        """Place the runs; later runs overwrite earlier ones where time stamps overlap.

        Args:
            origin_s: time stamp of the first video frame, which becomes sample 0.
            num_samples: length of the video; the result ends there, or earlier with the source's audio.
        """
        self.flush()
        runs = [(start, np.frombuffer(samples, np.int16)) for start, samples in self._runs if samples]
        if not runs:
            return PlacedAudio((), 0, 0, Fraction(0), Fraction(0))
        begin = min(start for start, _ in runs) - origin_s
        end = max(start + Fraction(len(samples), SAMPLE_RATE_HZ) for start, samples in runs) - origin_s
        parts = []
        for start, samples in runs:
            first = round((start - origin_s) * SAMPLE_RATE_HZ)
            low, high = max(first, 0), min(first + len(samples), num_samples)
            if low < high:
                parts.append((low, samples[low - first : high - first]))
        stop = max((low + len(samples) for low, samples in parts), default=0)
        return PlacedAudio(tuple(parts), stop, min((low for low, _ in parts), default=0), begin, end)


class _RunClock:
    """Where the next frame of a run is expected, in whole numbers: fractions cost more than decoding AAC.

    Args:
        start_s: of the run. rate_hz: of its samples. max_drift_s: how far a stamp may be from there.
    """

    def __init__(self, start_s: Fraction, rate_hz: int, max_drift_s: Fraction) -> None:
        self._start_s, self._rate_hz, self._max_drift_s = start_s, rate_hz, max_drift_s
        self.samples = 0  # so far
        self._base = (0, 0)  # of the stamps, and what a tick, the start, a sample and the drift are in whole units
        self._tick, self._start, self._sample, self._drift = 0, 0, 0, 0

    @property
    def next_s(self) -> Fraction:
        """Seconds."""
        return self._start_s + Fraction(self.samples, self._rate_hz)

    def is_left(self, pts: int, time_base: Fraction) -> bool:
        """Whether a stamp is further from the expected one than the drift that is allowed."""
        base = time_base.numerator, time_base.denominator
        if base != self._base:
            self._base = base
            parts = Fraction(*base), self._start_s, Fraction(1, self._rate_hz), self._max_drift_s
            unit = lcm(*(part.denominator for part in parts))
            self._tick, self._start, self._sample, self._drift = (int(part * unit) for part in parts)
        return abs(pts * self._tick - self._start - self.samples * self._sample) > self._drift


_TYPES = {"u8": np.uint8, "s16": np.int16, "s32": np.int32, "s64": np.int64, "flt": np.float32, "dbl": np.float64}


def _joined(frames: list[Any]) -> Any:
    """Frames of one format, layout and rate as one."""
    if len(frames) == 1:
        return frames[0]
    first, count = frames[0], sum(frame.samples for frame in frames)
    channels = 1 if first.format.is_planar else first.layout.nb_channels
    planes = len(first.planes)
    out = np.empty((planes, count * channels), _TYPES[first.format.packed.name])
    at = 0
    for frame in frames:
        size = frame.samples * channels
        for number, plane in enumerate(frame.planes):
            out[number, at : at + size] = np.frombuffer(plane, out.dtype, size)
        at += size
    joined = av.AudioFrame.from_ndarray(out, format=first.format.name, layout=first.layout.name)
    joined.sample_rate = first.sample_rate
    return joined
