"""Audio frames with time stamps -> 16 kHz mono PCM on the time line of the video, sample by sample."""

from __future__ import annotations

from fractions import Fraction
from typing import Any

import av
import numpy as np
from numpy.typing import NDArray

SAMPLE_RATE_HZ = 16_000
MAX_DRIFT_S = Fraction(10, 1000)  # time stamps may wander by this before the track is set anew


class AudioTrack:
    """Collects decoded frames; `finish` places them.

    Consecutive frames form a run, resampled as one piece (libswresample, its default filter and its default down-mix:
    stereo is 0.5 L + 0.5 R; 5.1 is 0.207 (L + R) + 0.293 C + 0.146 (SL + SR), LFE left out). A run
    begins where its first time stamp says; it ends where the stamps leave it by more than 10 ms or the format changes.

    Args:
        max_samples: more than this is an error of the file, and is dropped.
    """

    def __init__(self, max_samples: int) -> None:
        self._max_samples = max_samples
        self._resampler: av.AudioResampler | None = None
        self._setup: tuple[str, str, int] | None = None
        self._runs: list[tuple[Fraction, list[NDArray[np.int16]]]] = []
        self._next_s = Fraction(0)
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
        start = self._next_s if frame.pts is None else frame.pts * Fraction(frame.time_base)
        setup = (frame.format.name, frame.layout.name, frame.sample_rate)
        if setup != self._setup or abs(start - self._next_s) > MAX_DRIFT_S:
            self._begin(start, setup)
        frame.pts = None  # the run's own clock counts: jitter of the container's must not reach the resampler
        self._take(frame)
        self._next_s += Fraction(frame.samples, frame.sample_rate)

    def _begin(self, start: Fraction, setup: tuple[str, str, int]) -> None:
        self._flush()
        if self._runs:
            self.jumps += 1
        self._resampler = av.AudioResampler(format="s16", layout="mono", rate=SAMPLE_RATE_HZ)
        self._setup, self._next_s = setup, start
        self._runs.append((start, []))

    def _take(self, frame: Any | None) -> None:
        assert self._resampler is not None
        for out in self._resampler.resample(frame):
            piece = out.to_ndarray().reshape(-1).astype(np.int16)
            self._samples += len(piece)
            self._runs[-1][1].append(piece)

    def _flush(self) -> None:
        if self._resampler is not None:
            self._take(None)
            self._resampler = None

    def finish(self, origin_s: Fraction, num_samples: int) -> tuple[NDArray[np.int16], Fraction, Fraction]:
        """Place the runs; later runs overwrite earlier ones where time stamps overlap.

        Args:
            origin_s: time stamp of the first video frame, which becomes sample 0.
            num_samples: length of the result.

        Returns:
            (num_samples,) int16 and the first and last second that the source covers, relative to `origin_s`;
            empty if there was no audio.
        """
        self._flush()
        runs = [(start, np.concatenate(pieces)) for start, pieces in self._runs if pieces]
        if not runs:
            return np.empty(0, np.int16), Fraction(0), Fraction(0)
        track = np.zeros(num_samples, np.int16)
        begin, end = runs[0][0], runs[0][0]
        for start, samples in runs:
            begin, end = min(begin, start), max(end, start + Fraction(len(samples), SAMPLE_RATE_HZ))
            first = round((start - origin_s) * SAMPLE_RATE_HZ)
            low, high = max(first, 0), min(first + len(samples), num_samples)
            if low < high:
                track[low:high] = samples[low - first : high - first]
        return track, begin - origin_s, end - origin_s
