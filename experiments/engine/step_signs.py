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

from experiments.engine.stage_clock import StageClock
from experiments.runtime import Runtime

HOST_BOUND = 0.9  # share of a step's time on the device that the host takes to launch it, from which the host binds
SLOW_RANK = 0.1  # how much more of its time than the median rank a rank waits for data that is named
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
    """

    def __init__(
        self,
        runtime: Runtime,
        clock: StageClock,
        batches_ready: Callable[[], int],
        events: Callable[[], Event] | None = None,
        now: Callable[[], float] = time.perf_counter,
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
        self._mark = (0.0, 0.0)
        self._named: set[int] = set()

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
        if self._events is not None:
            ended = self._now()
            self._host_ms = 1e3 * (ended - self._began_s)
            self._events[1].record()
            self._steps.append((self._ended, *self._events))
            self._ended = self._events[1]
            self._cost_s += self._now() - ended

    def close(self) -> dict[str, float]:
        """Return the figures since the last call, by metric name; after the losses were read.

        With several ranks all must call it. Rank 0 names, once, a rank that waits for data more than the others.
        """
        began = self._now()
        data, step = self._clock.seconds["data"], self._clock.seconds["step"]
        spent = data - self._mark[0], step - self._mark[1]
        found: dict[str, float] = {}
        if self._steps:
            found["train/device_idle_share"] = idle = self._device_idle_share()
            over = max(0.0, spent[0] - idle * sum(spent))
            self._clock.rebook(over)
            spent = spent[0] - over, spent[1] + over
        self._mark = self._clock.seconds["data"], self._clock.seconds["step"]
        wait = spent[0] / sum(spent) if sum(spent) > 0 else 0.0
        if self._depths:
            found["data/batches_ready"] = statistics.fmean(self._depths)
            self._depths.clear()
        if self._events is not None and self._timed:
            device_ms = self._events[0].elapsed_time(self._events[1])
            found |= {"train/host_launch_ms": self._host_ms, "train/device_step_ms": device_ms}
            found["train/host_bound"] = float(self._host_ms >= HOST_BOUND * device_ms)
        self._events = None
        if self._runtime.world_size > 1:
            found |= self._over_ranks(wait)
        self._cost_s += self._now() - began
        if sum(spent) > 0:
            found["train/signs_share"] = self._cost_s / sum(spent)
        self._cost_s = 0.0
        return found

    def _device_idle_share(self) -> float:
        """Share of the time since the last report that lay between two steps on the device; forgets those steps."""
        steps, self._steps, self._ended = self._steps, [], None  # what comes between intervals is not data's
        idle_ms = sum(max(0.0, ended.elapsed_time(begun)) for ended, begun, _ in steps if ended is not None)
        whole_ms = steps[0][1].elapsed_time(steps[-1][2])
        return min(1.0, idle_ms / whole_ms) if whole_ms > 0.0 else 0.0

    def _over_ranks(self, wait: float) -> dict[str, float]:
        own = torch.zeros(self._runtime.world_size)
        own[self._runtime.rank] = wait
        dist.all_reduce(own, group=self._runtime.control)
        waits = own.tolist()
        slowest, usual = max(range(len(waits)), key=waits.__getitem__), statistics.median_low(waits)
        if self._runtime.is_main and waits[slowest] - usual > SLOW_RANK and slowest not in self._named:
            self._named.add(slowest)
            log.warning(
                "rank %d holds up the others: it waits for data %.0f %% of its time, the median rank %.0f %%; look at "
                "the storage and the CPUs of its machine", slowest, 100 * waits[slowest], 100 * usual,
            )  # fmt: skip
        return {"train/data_wait_share_max": waits[slowest], "train/slowest_rank": float(slowest)}
