"""Time stamps of a source -> a constant frame rate: at time t the nearest frame is shown, by its time stamp.

A frame never comes more than half a frame of the output before its time: in a hole the frame before it is held.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from math import ceil
from typing import Generic, TypeVar

import numpy as np
from numpy.typing import NDArray

COMMON_RATES = tuple(
    Fraction(r) if isinstance(r, int) else Fraction(*r)
    for r in (
        *(5, 6, 8, 10, 12, (12500, 1001), (14985, 1001), 15, 16, 18, 20, (24000, 1001), 24, 25, (30000, 1001), 30),
        *((48000, 1001), 48, 50, (60000, 1001), 60, 90, 100, (120000, 1001), 120, 240),
    )
)
_MOST_OVER_MEAN = 1.5
MOST_HELD_S = 60  # a last picture whose packet claims more
Item = TypeVar("Item")


@dataclass(frozen=True)
class Rate:
    """The rate of the output.

    Args:
        fps: frames per second. is_constant: whether every source frame becomes exactly one frame.
        has_holes: whether the frames lie on a constant grid of which places are empty.
    """

    fps: Fraction
    is_constant: bool
    has_holes: bool = False


def choose_rate(
    times: NDArray[np.int64],
    time_base: Fraction,
    claimed: Sequence[Fraction],
    max_fps: Fraction | None = None,
    last_ticks: int = 0,
) -> Rate:
    """Choose the rate that the time stamps lie on.

    First a rate on which every frame has its own slot, taken from those the file claims, then the common ones, then
    the measured one; then one on which they lie with holes; then, as it varies, the common rate nearest to what it
    mostly is (the median step), a claimed one first, or to the mean where that is far less (a recording that mostly
    stands still).

    Args:
        times: (P,) int64 ticks, ascending.
        time_base: seconds per tick.
        claimed: rates from the header, best first.
        max_fps: sources above it are reduced to it; None keeps all.
        last_ticks: how long the last frame is shown, which is the step of a single one; 0 if nothing says it.
    """
    span = int(times[-1] - times[0]) * time_base if len(times) else Fraction(0)
    if span <= 0:
        fps = claimed[0] if claimed else Fraction(25)
        fps = min(fps, 1 / (last_ticks * time_base)) if last_ticks else fps
        return _limited(Rate(fps, True), max_fps)
    average = (len(times) - 1) / span
    near = [rate for rate in (*claimed, *COMMON_RATES) if abs(rate / average - 1) < Fraction(1, 20)]
    if average > Fraction(1, 1001):
        near.append(average.limit_denominator(1001))
    offsets = (times - times[0]).astype(np.float64)
    for fps in near:
        step = 1 / (fps * time_base)
        if np.abs(offsets - np.arange(len(times)) * float(step)).max() <= _slack(step):
            return _limited(Rate(fps, True), max_fps)
    usual = float(np.median(np.diff(times)) * time_base)  # the mean step says little where there is one long hole
    most = max(3 * average, 1.05 / usual if usual else 0)
    for fps in (*claimed, *COMMON_RATES):
        step = 1 / (fps * time_base)
        if not average <= fps <= most or (step < 8 and step.denominator > 1):
            continue
        slots = np.round(offsets / float(step))
        if np.abs(offsets - slots * float(step)).max() <= _slack(step) and (np.diff(slots) > 0).all():
            return _limited(Rate(fps, False, True), max_fps)
    is_bursts = not usual or 1 / usual > _MOST_OVER_MEAN * average
    typical = float(average) if is_bursts else 1 / usual
    told = [rate for rate in claimed if abs(float(rate) / typical - 1) < 0.05]
    return _limited(Rate(told[0] if told else _common_near(typical), False), max_fps)


def _common_near(fps: float) -> Fraction:
    """Return the common rate nearest to a measured one; of 30 and 29.97, which no measure tells apart, the former."""
    return min(COMMON_RATES, key=lambda rate: (round(abs(float(np.log(float(rate) / fps))), 2), rate.denominator))


def _slack(step: Fraction) -> float:
    """Ticks by which a time stamp may miss its slot: rounding of it and of the first one, at most a quarter frame."""
    return min(1.01, float(step) / 4)


def _limited(rate: Rate, max_fps: Fraction | None) -> Rate:
    return rate if max_fps is None or rate.fps <= max_fps else Rate(max_fps, False)


def change_of(before: int | Fraction, after: int | Fraction, step: Fraction) -> Fraction:
    """Return the time from which on the later of two neighbouring frames is shown: where it is the nearer one.

    Args:
        before, after: time stamps, ticks. step: length of a frame of the output, ticks.
    """
    return max(Fraction(before + after) / 2, after - step / 2)


def last_frame_ticks(times: NDArray[np.int64], time_base: Fraction, told: int) -> Fraction:
    """Return how long the last frame of a variable rate is shown: as its packet says, at least as long as most are.

    Args:
        times: (P,) int64 ticks, ascending.
        time_base: seconds per tick.
        told: ticks; more than `MOST_HELD_S` seconds are that many.
    """
    usual = Fraction(float(np.median(np.diff(times)))) if len(times) > 1 else Fraction(0)
    return min(max(Fraction(told), usual), MOST_HELD_S / time_base)


def num_slots(times: NDArray[np.int64], time_base: Fraction, rate: Rate, told: int) -> int:
    """Return how many frames of the output a `Retimer` makes of time stamps; arguments as `last_frame_ticks`."""
    if rate.is_constant:
        return len(times)
    reach = (int(times[-1] - times[0]) + last_frame_ticks(times, time_base, told)) * time_base * rate.fps
    return max(ceil(reach - Fraction(1, 2)), 1)


class Retimer(Generic[Item]):
    """Hands out how often each frame is shown on a constant grid that starts at the first frame.

    Args:
        rate: of the output. time_base: seconds per tick of the time stamps.
    """

    def __init__(self, rate: Rate, time_base: Fraction) -> None:
        self._fps = rate.fps
        self._scale = time_base * rate.fps  # slots per tick
        self._current: Item | None = None
        self._last_ticks = 0
        self.first_ticks: int | None = None
        self.slots = 0
        self.repeated = 0
        self.dropped = 0

    def push(self, item: Item, ticks: int) -> tuple[Item, int] | None:
        """Take the next frame in display order; returns the frame before it and how often that is shown, if at all.

        A time stamp that does not rise replaces the frame before it.
        """
        if self.first_ticks is None:
            self.first_ticks = self._last_ticks = ticks
            self._current = item
            return None
        before, self._last_ticks = self._last_ticks, max(ticks, self._last_ticks)
        shown = self._emit(change_of(before, self._last_ticks, 1 / self._scale))
        self._current = item
        return shown

    def finish(self, duration_ticks: Fraction) -> tuple[Item, int] | None:
        """Close the last frame, which lasts `duration_ticks`; at least one slot comes out over all."""
        if self.first_ticks is None:
            return None
        end = self._last_ticks + max(duration_ticks, Fraction(0))
        shown = self._emit(end - 1 / (2 * self._scale))
        if self.slots == 0 and self._current is not None:
            self.slots = 1
            self.dropped -= 1
            return self._current, 1
        return shown

    def gap_s(self, ticks: int) -> float:
        """Seconds between the last time stamp and this one."""
        return 0.0 if self.first_ticks is None else float((ticks - self._last_ticks) * self._scale / self._fps)

    def _emit(self, end_ticks: Fraction) -> tuple[Item, int] | None:
        """Show the current frame in all free slots before a time."""
        assert self.first_ticks is not None
        reach = (end_ticks - self.first_ticks) * self._scale
        slots = max(-(-reach.numerator // reach.denominator), self.slots)  # slots n with n < reach
        count, self.slots = slots - self.slots, slots
        if count == 0:
            self.dropped += 1
            return None
        self.repeated += count - 1
        assert self._current is not None
        return self._current, count
