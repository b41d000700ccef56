"""When decoded frames are shown: their time stamps, checked as they come, on the constant grid of the output."""

from __future__ import annotations

from fractions import Fraction
from typing import Any

from pipeline.ingest.findings import Tally
from pipeline.ingest.source import Source
from pipeline.media.packets import FAR_BEHIND_S
from pipeline.media.probe import RefusedError
from pipeline.media.retime import Retimer, last_frame_ticks


class Timeline:
    """The time line of one pass over a source.

    Args:
        max_gap_s: between two frames. tally: counts the time stamps that do not rise.
    """

    def __init__(self, source: Source, max_gap_s: float, tally: Tally) -> None:
        self._source, self._max_gap_s, self._tally = source, max_gap_s, tally
        self._retimer: Retimer[Any] = Retimer(source.rate, source.scan.video_time_base)
        self._last_ticks = self._latest_ticks = 0
        self._count = 0

    @property
    def has_begun(self) -> bool:
        """Whether a frame has come."""
        return self._retimer.first_ticks is not None

    @property
    def origin_s(self) -> Fraction:
        """Time stamp of the first frame in seconds."""
        return Fraction(self._retimer.first_ticks or 0) * self._source.scan.video_time_base

    @property
    def num_frames(self) -> int:
        """Frames of the output so far."""
        return self._retimer.slots

    def ticks(self, frame: Any) -> int:
        """Time stamp of the next frame; AVI has none of its own, there the n-th frame has that of the n-th packet."""
        time_base, times = self._source.scan.video_time_base, self._source.scan.video_times
        self._count += 1
        if self._source.info.container == "avi" and self._count <= len(times):
            return int(times[self._count - 1])
        ticks = frame.dts if frame.pts is None else frame.pts
        if ticks is None:
            return self._last_ticks + round(self._source.frame_ticks) if self.has_begun else 0
        if frame.time_base and frame.time_base != time_base:
            return round(ticks * Fraction(frame.time_base) / time_base)
        return int(ticks)

    def skip(self) -> None:
        """Take note of a packet that gave an error instead of a frame."""
        self._count += 1

    def push(self, frame: Any, ticks: int) -> tuple[Any, int] | None:
        """Take the next frame in display order; returns the frame before it and how often that is shown, if at all.

        Raises:
            RefusedError: a gap that is too long.
        """
        if self.has_begun:
            behind = self._latest_ticks - ticks
            self._tally.not_rising += behind >= 0
            self._tally.far_behind += behind * self._source.scan.video_time_base >= FAR_BEHIND_S
            gap_s = self._retimer.gap_s(ticks)
            if gap_s > self._max_gap_s:
                raise RefusedError(f"video time stamps jump by {gap_s:.1f} s, more than {self._max_gap_s:g} s")
        self._latest_ticks = max(ticks, self._latest_ticks) if self.has_begun else ticks
        self._last_ticks = ticks
        return self._retimer.push(frame, ticks)

    def finish(self) -> tuple[Any, int] | None:
        """Close the last frame, and count what was repeated and dropped; returns it and how often it is shown."""
        source, scan = self._source, self._source.scan
        last = last_frame_ticks(scan.video_times, scan.video_time_base, scan.last_ticks) or source.frame_ticks
        shown = self._retimer.finish(source.frame_ticks if source.rate.is_constant else last)
        self._tally.repeated, self._tally.dropped = self._retimer.repeated, self._retimer.dropped
        return shown
