"""Windows on a long video: overlapping chunks, and wider ones where a sample needs them, so that any clip is one cut.

A window is a run of fragments of one stored stream: windows share its bytes, nothing is encoded or stored twice.
"""

from __future__ import annotations

import zlib
from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, replace
from fractions import Fraction

import numpy as np
from numpy.typing import NDArray

from pipeline.ingest.item import check_windows
from pipeline.media.audio_track import SAMPLE_RATE_HZ
from pipeline.store.format import AUDIO_BLOCK_SAMPLES
from pipeline.store.rows import AudioRef, VideoRef


@dataclass(frozen=True)
class Span:
    """A sample in the time of the whole video, seconds."""

    start_s: float
    end_s: float


@dataclass(frozen=True, order=True)
class Window:
    """Fragments `first` to `last - 1` of a video, which hold the frames `first_frame` to `end_frame - 1`."""

    first: int
    last: int
    first_frame: int
    end_frame: int

    def start_s(self, fps: Fraction) -> float:
        """Its first second in the whole video."""
        return float(self.first_frame / fps)

    def end_s(self, fps: Fraction) -> float:
        """Its end in the whole video."""
        return float(self.end_frame / fps)


def plan_windows(
    first_frames: Sequence[int],
    num_frames: int,
    fps: Fraction,
    spans: Sequence[Span],
    chunk_s: float,
    overlap_s: float,
    clip_s: float = 0.0,
) -> tuple[list[Window], list[int]]:
    """Choose the windows that the samples of one video need.

    A video no longer than `chunk_s + overlap_s` is one window. Otherwise chunks of `chunk_s` start every
    `chunk_s - overlap_s`; a sample takes the chunk that holds it with the widest margin on its narrower side (ends of
    the video count as wide), and one that no chunk holds with `overlap_s / 2` and `clip_s` to spare gets a window of
    its own, with that much around it.

    Args:
        first_frames: first frame of each fragment. spans: the samples. chunk_s: 0 = one window always.
        clip_s: length of a clip, which may reach that far out of a shorter sample.

    Returns:
        The windows in use, ascending, and the window of each span. Without spans: all chunks.

    Raises:
        ValueError: an overlap that is not shorter than the chunks.
    """
    check_windows(chunk_s, overlap_s)
    duration = float(num_frames / fps)
    whole = Window(0, len(first_frames), 0, num_frames)
    if not chunk_s or duration <= chunk_s + overlap_s:
        return [whole], [0] * len(spans)

    def window(start_s: float, end_s: float) -> Window:
        first = max(bisect_right(first_frames, int(start_s * fps)) - 1, 0)
        last = max(bisect_left(first_frames, min(float(end_s * fps), num_frames)), first + 1)
        end = first_frames[last] if last < len(first_frames) else num_frames
        return Window(first, last, first_frames[first], end)

    step = chunk_s - overlap_s
    grid = [window(n * step, n * step + chunk_s) for n in range(int(-(-(duration - overlap_s) // step)))]
    if not spans:
        return grid, []
    margin_s = max(overlap_s / 2, clip_s)
    chosen = [
        _holder(grid, span, fps, duration, margin_s) or window(*_widened(span, duration, margin_s)) for span in spans
    ]
    used = sorted(set(chosen))
    number = {value: place for place, value in enumerate(used)}
    return used, [number[value] for value in chosen]


def _widened(span: Span, duration_s: float, margin_s: float) -> tuple[float, float]:
    return max(span.start_s - margin_s, 0.0), min(span.end_s + margin_s, duration_s)


def _holder(grid: Sequence[Window], span: Span, fps: Fraction, duration_s: float, margin_s: float) -> Window | None:
    def margin(window: Window) -> float:
        left = np.inf if window.first_frame == 0 else span.start_s - window.start_s(fps)
        right = np.inf if window.end_s(fps) >= duration_s - 1e-9 else window.end_s(fps) - span.end_s
        return float(min(left, right))

    best = max(grid, key=margin)
    return best if margin(best) >= margin_s else None


def video_window(video: VideoRef, window: Window) -> VideoRef:
    """Refer to a window's fragments of stored bytes."""
    part = slice(window.first, window.last)
    return replace(
        video,
        fragment_offset=video.fragment_offset[part],
        fragment_bytes=video.fragment_bytes[part],
        fragment_first_frame=tuple(frame - window.first_frame for frame in video.fragment_first_frame[part]),
        fragment_crc32=video.fragment_crc32[part],
        num_frames=window.end_frame - window.first_frame,
    )


def audio_range(window: Window, fps: Fraction, num_samples: int, first_sample: int = 0) -> tuple[int, int]:
    """Samples of a track that belong to a window: first and end, inside 0..num_samples.

    Args:
        first_sample: the track is silence that was put in before it; a window that holds nothing else gets (0, 0).
    """
    first, end = (
        min(round(frame / fps * SAMPLE_RATE_HZ), num_samples) for frame in (window.first_frame, window.end_frame)
    )
    return (first, end) if first < end and end > first_sample else (0, 0)


def audio_window(
    audio: AudioRef, samples: NDArray[np.int16], window: Window, fps: Fraction, first_sample: int = 0
) -> AudioRef:
    """Refer to a window's part of stored samples.

    Args:
        audio: where `samples` (all of the track, int16) are stored. first_sample: as in `audio_range`.
    """
    first, end = audio_range(window, fps, len(samples), first_sample)
    if first >= end:
        return AudioRef(0, 0, 0, ())
    part = samples[first:end]
    blocks = range(0, len(part), AUDIO_BLOCK_SAMPLES)
    crc32 = tuple(zlib.crc32(part[begin : begin + AUDIO_BLOCK_SAMPLES].tobytes()) for begin in blocks)
    return AudioRef(audio.shard, audio.offset + 2 * first, end - first, crc32)
