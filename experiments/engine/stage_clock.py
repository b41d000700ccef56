"""Where the wall time of a run goes: waiting for data, steps, evaluation, checkpoints."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Literal

Stage = Literal["startup", "data", "step", "eval", "checkpoint"]


class StageClock:
    """Adds up seconds per stage; clips/s counts data + step only, so evaluation and checkpoints do not dilute it.

    The first step of a process is booked as start-up (pipeline build, allocation, autotuning), and so are the steps
    during which `warming_up` is set (convolution algorithms chosen, CUDA graphs captured).
    """

    def __init__(self, now: Callable[[], float] = time.perf_counter) -> None:
        self._now = now
        self._start = now()
        self._started = False
        self.warming_up = False
        self.seconds: dict[Stage, float] = dict.fromkeys(("startup", "data", "step", "eval", "checkpoint"), 0.0)
        self.clips = 0
        self.steps = 0
        self._mark = (0.0, 0.0, 0)

    @contextmanager
    def stage(self, name: Stage) -> Iterator[None]:
        """Book the time of the block on a stage."""
        start = self._now()
        try:
            yield
        finally:
            starting = not self._started or (self.warming_up and name == "step")
            booked: Stage = "startup" if name in ("data", "step") and starting else name
            self.seconds[booked] += self._now() - start

    def rebook(self, seconds: float) -> None:
        """Book seconds that were booked on data on the step: of them the device was at work on earlier steps."""
        if self._started:
            self.seconds["data"] -= seconds
            self.seconds["step"] += seconds

    def count_step(self, clips: int) -> None:
        """Count one finished step of `clips` clips (all ranks), unless it belongs to the start-up."""
        if self._started and not self.warming_up:
            self.clips += clips
            self.steps += 1
        self._started, self.warming_up = True, False

    def interval(self) -> tuple[float, float]:
        """Return (clips/s, share of data + step time waiting for data) since the last call; 0, 0 without steps."""
        data, step, clips = self.seconds["data"], self.seconds["step"], self.clips
        old_data, old_step, old_clips = self._mark
        self._mark = (data, step, clips)
        return _rates(data - old_data, step - old_step, clips - old_clips)

    @property
    def clips_per_second(self) -> float:
        """Clips per second of data + step time over the whole run, all ranks together."""
        return _rates(self.seconds["data"], self.seconds["step"], self.clips)[0]

    @property
    def data_wait_share(self) -> float:
        """Share of data + step time spent waiting for data, in [0, 1]."""
        return _rates(self.seconds["data"], self.seconds["step"], self.clips)[1]

    @property
    def wall_time_s(self) -> float:
        """Seconds since the clock was made."""
        return self._now() - self._start

    def ledger(self) -> dict[str, float]:
        """Return seconds per stage plus `other`; they sum to the wall time."""
        wall = self.wall_time_s
        booked: dict[str, float] = {str(stage): seconds for stage, seconds in self.seconds.items()}
        return booked | {"other": wall - sum(booked.values())}


def _rates(data_s: float, step_s: float, clips: int) -> tuple[float, float]:
    total = data_s + step_s
    return (clips / total, data_s / total) if total > 0 else (0.0, 0.0)
