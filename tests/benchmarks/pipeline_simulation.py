"""A discrete simulation of sites, servers, queues and shared cores: the truth for the model of stage times."""

import heapq
from collections import deque
from collections.abc import Generator
from typing import Any

from benchmarks.stages.model import Pipeline, Stage

SLICE_MS = 1.0  # a core changes hands after it
CREDIT_MS = 3.0  # head start, at most, of one that has slept


def simulate(pipeline: Pipeline, *, clips: int = 300, queue: int = 16) -> float:
    """Clips per second over the second half of `clips`, with `queue` places between sites and behind the last."""
    return _World(pipeline, queue).run(clips)


class _World:
    def __init__(self, pipeline: Pipeline, queue: int) -> None:
        self.sites = list(dict.fromkeys(stage.site for stage in pipeline.stages))
        self.stages = [[s for s in pipeline.stages if s.site == site] for site in self.sites]
        self.queue, self.free_cores = queue, int(pipeline.cores)
        self.waiting_core: list[tuple[float, int, Any, float]] = []
        self.had_ms: dict[Any, float] = {}  # CPU time of each server, as Linux counts it for fairness
        self.held = [0] * (len(self.sites) + 1)  # clips in front of each site
        self.getters: list[deque[Any]] = [deque() for _ in self.held]
        self.putters: list[deque[Any]] = [deque() for _ in self.held]
        self.heap: list[tuple[float, int, Any, bool]] = []
        self.now, self.count, self.least_ms = 0.0, 0, 0.0
        self.done: list[float] = []
        for number, site in enumerate(self.sites):
            for _ in range(pipeline.servers[site]):
                self._step(self._server(number))

    def run(self, clips: int) -> float:
        while len(self.done) < clips:
            self.now, _, process, had_core = heapq.heappop(self.heap)
            self.free_cores += had_core
            self._step(process)  # it may ask for its core again
            self._hand_out_cores()
        half = clips // 2
        return (clips - 1 - half) * 1e3 / (self.done[clips - 1] - self.done[half])

    def _server(self, number: int) -> Generator[tuple[str, float], None, None]:
        while True:
            if number > 0:
                yield "get", number
            for stage in self.stages[number]:
                yield from _work(stage)
            yield "put", number + 1

    def _step(self, process: Any) -> None:
        what, value = next(process)
        if what == "wait":
            self._later(process, value, False)
        elif what == "core":
            self._ask_for_core(process, value)
        elif what == "get":
            self.getters[int(value)].append(process)
            self._match(int(value))
        else:
            self.putters[int(value)].append(process)
            self._match(int(value))

    def _match(self, place: int) -> None:
        last = place == len(self.sites)
        while True:
            if self.putters[place] and (last or self.held[place] < self.queue):
                if last:
                    self.done.append(self.now)
                else:
                    self.held[place] += 1
                self._later(self.putters[place].popleft(), 0.0, False)
            elif not last and self.getters[place] and self.held[place]:
                self.held[place] -= 1
                self._later(self.getters[place].popleft(), 0.0, False)
            else:
                return

    def _ask_for_core(self, process: Any, value: float) -> None:
        self.least_ms = max(self.least_ms, self.waiting_core[0][0] if self.waiting_core else 0.0)
        had = max(self.had_ms.get(process, 0.0), self.least_ms - CREDIT_MS)
        self.had_ms[process] = had + value
        self.count += 1
        heapq.heappush(self.waiting_core, (had, self.count, process, value))
        self._hand_out_cores()

    def _hand_out_cores(self) -> None:
        """The one that had least comes first, as in Linux's fair scheduler."""
        while self.free_cores and self.waiting_core:
            had, _, process, value = heapq.heappop(self.waiting_core)
            self.least_ms = max(self.least_ms, had)
            self.free_cores -= 1
            self._later(process, value, True)

    def _later(self, process: Any, after_ms: float, has_core: bool) -> None:
        self.count += 1
        heapq.heappush(self.heap, (self.now + after_ms, self.count, process, has_core))


def _work(stage: Stage) -> Generator[tuple[str, float], None, None]:
    """CPU milliseconds in slices on a core; the rest of the stage's time needs none."""
    if stage.ms > stage.cpu_ms:
        yield "wait", stage.ms - stage.cpu_ms
    left = stage.cpu_ms
    while left > 0:
        yield "core", min(left, SLICE_MS)
        left -= SLICE_MS
