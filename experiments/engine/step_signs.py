"""Signs of what binds a running training: batches ready ahead, the host against the device, the slowest rank.

Nothing here waits for the device: events are recorded around the steps and read where the losses are read, which waits
for them anyway. On a GPU the host runs ahead, so that its own wait for a batch costs nothing while the device is at
work: data wait is then at most the share of time between steps in which the device had none (`device_idle_share`).
"""

from __future__ import annotations

import logging
import statistics
import time
from collections.abc import Callable
from typing import Any, Protocol

import torch
import torch.distributed as dist

from experiments.engine.pace import Pace
from experiments.engine.stage_clock import StageClock
from experiments.runtime import Runtime

HOST_BOUND = 0.9  # share of a step's time on the device that the host takes to launch it, from which the host binds
SLOW_RANK = 0.1  # how much more of its time than the median rank a rank waits for data that is named
SLOW_FORWARD = 0.25  # the same of forward passes, which other programs of the machine disturb more
log = logging.getLogger(__name__)


class Event(Protocol):
    """A mark in the device's stream."""

    def record(self) -> None:
        """Set it behind what was launched so far."""
        ...

    def elapsed_time(self, other: Any) -> float:
        """Milliseconds to another mark; both must have been reached."""
        ...


class StepSigns:
    """Collects the signs of one rank; `close` joins those of all ranks, at a report.

    Args:
        runtime: of this process.
        clock: of the run.
        batches_ready: batches that the readers have ready.
        events: makes an event; None where host and device are one.
        now: seconds.
        forward_s: seconds so far in what a rank does of a step before it waits for others; none in CUDA graphs.
    """

    def __init__(
        self,
        runtime: Runtime,
        clock: StageClock,
        batches_ready: Callable[[], int],
        events: Callable[[], Event] | None = None,
        now: Callable[[], float] = time.perf_counter,
        forward_s: Callable[[], float] = lambda: 0.0,
    ) -> None:
        self._runtime, self._clock, self._ready, self._now = runtime, clock, batches_ready, now
        self._make_event = events
        if events is None and runtime.device.type == "cuda":
            self._make_event = lambda: torch.cuda.Event(enable_timing=True)
        self._depths: list[int] = []
        self._events: tuple[Event, Event] | None = None  # of the step that is looked at
        self._ended: Event | None = None  # behind the last step
        self._steps: list[tuple[Event | None, Event, Event]] = []  # end of the one before, begin, end
        self._timed = False
        self._began_s = self._host_ms = self._cost_s = 0.0
        self._mark, self._forward_s, self._forward_mark = (0.0, 0.0), forward_s, 0.0
        self._pace = Pace() if runtime.device.type == "cpu" else None  # a GPU's steps are not those of the host
        self._startup, self._named = clock.seconds["startup"], set[int]()

    def before_data(self) -> None:
        """Look how many batches are ready, before one is taken."""
        began = self._now()
        self._depths.append(self._ready())
        self._cost_s += self._now() - began

    def before_step(self, *, timed: bool) -> None:
        """Begin a step.

        Args:
            timed: whether this is the step of the interval that is looked at: its last one.
        """
        self._timed = timed
        if self._make_event is not None:
            began = self._now()
            self._events = self._make_event(), self._make_event()
            self._events[0].record()
            self._cost_s += self._now() - began
        self._began_s = self._now()

    def after_step(self) -> None:
        """End a step: everything of it is launched."""
        if self._pace is not None:
            self._pace.add(self._now() - self._began_s)
        if self._events is not None:
            ended = self._now()
            self._host_ms = 1e3 * (ended - self._began_s)
            self._events[1].record()
            self._steps.append((self._ended, *self._events))
            self._ended = self._events[1]
            self._cost_s += self._now() - ended

    def close(self) -> dict[str, float]:
        """Return the figures since the last call, by metric name; after the losses were read.

        With several ranks all must call it. Rank 0 names, once, a rank that waits for data, or computes, longer.
        """
        began = self._now()
        data, step = self._clock.seconds["data"], self._clock.seconds["step"]
        spent = data - self._mark[0], step - self._mark[1]
        forward = self._forward_of_interval()
        found: dict[str, float] = {}
        if self._steps:
            idle_s, found["train/device_idle_share"] = self._device_idle()
            over = max(0.0, spent[0] - idle_s)  # seconds, not shares: steps of the start-up are in no booked second
            self._clock.rebook(over)
            spent = spent[0] - over, spent[1] + over
        self._mark = self._clock.seconds["data"], self._clock.seconds["step"]
        wait, own = (part / sum(spent) if sum(spent) > 0 else 0.0 for part in (spent[0], forward))
        if self._depths:
            found["data/batches_ready"] = statistics.fmean(self._depths)
            self._depths.clear()
        if self._events is not None and self._timed:
            device_ms = self._events[0].elapsed_time(self._events[1])
            found |= {"train/host_launch_ms": self._host_ms, "train/device_step_ms": device_ms}
            found["train/host_bound"] = float(self._host_ms >= HOST_BOUND * device_ms)
        self._events = None
        ratio = self._pace.close() if self._pace is not None else None
        if ratio is not None:
            found["train/slowest_over_fastest_step"] = ratio
        if self._runtime.world_size > 1:
            found |= self._over_ranks(wait, own)
        self._cost_s += self._now() - began
        if sum(spent) > 0:
            found["train/signs_share"] = self._cost_s / sum(spent)
        self._cost_s = 0.0
        return found

    def _device_idle(self) -> tuple[float, float]:
        """Seconds since the last report between two steps on the device, and their share; forgets those steps."""
        steps, self._steps, self._ended = self._steps, [], None  # what comes between intervals is not data's
        idle_ms = sum(max(0.0, ended.elapsed_time(begun)) for ended, begun, _ in steps if ended is not None)
        whole_ms = steps[0][1].elapsed_time(steps[-1][2])
        return idle_ms / 1e3, min(1.0, idle_ms / whole_ms) if whole_ms > 0.0 else 0.0

    def _forward_of_interval(self) -> float:
        """Seconds in forward passes since the last report; 0 where its steps were start-up, which no share counts."""
        startup, forward = self._clock.seconds["startup"], self._forward_s() - self._forward_mark
        self._forward_mark += forward
        if startup != self._startup:
            self._startup, forward = startup, 0.0
        return forward

    def _over_ranks(self, wait: float, forward: float) -> dict[str, float]:
        own = torch.zeros(2, self._runtime.world_size)
        own[:, self._runtime.rank] = torch.tensor([wait, forward])
        dist.all_reduce(own, group=self._runtime.control)
        waits, forwards = own.tolist()
        of_data, slowest = _furthest(waits), _furthest(forwards)
        if of_data[1] > SLOW_RANK or of_data[1] >= slowest[1]:  # who waits for data makes others seem busy
            slowest = of_data
            self._name(*slowest, SLOW_RANK, waits, "it waits for data", "the storage and the CPUs of its machine")
        else:
            look = "clocks, temperature and other programs of its machine"
            self._name(*slowest, SLOW_FORWARD, forwards, "its forward passes take", look)
        return {
            "train/data_wait_share_max": max(waits),
            "train/forward_share_max": max(forwards),
            "train/slowest_rank": float(slowest[0]),
        }

    def _name(self, rank: int, excess: float, limit: float, shares: list[float], what: str, look: str) -> None:
        """Say once, on rank 0, that a rank holds up the others, if it does, and by what."""
        if excess <= limit or rank in self._named or not self._runtime.is_main:
            return
        self._named.add(rank)
        log.warning(
            "rank %d holds up the others: %s %.0f %% of its time, the median rank %.0f %%; look at %s",
            rank, what, 100 * shares[rank], 100 * (shares[rank] - excess), look,
        )  # fmt: skip


def _furthest(shares: list[float]) -> tuple[int, float]:
    """Return the rank furthest above the median, and by how much."""
    rank = max(range(len(shares)), key=shares.__getitem__)
    return rank, shares[rank] - statistics.median_low(shares)
