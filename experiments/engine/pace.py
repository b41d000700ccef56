"""Whether the steps of a training on a CPU take about equally long; where they do not, others use its CPUs.

A step is parallel work that waits for its slowest thread: beside another program that has one of the CPUs the fast
steps are as fast as ever, and the slow ones take several times as long.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable

import torch

from pipeline.workers.machine import usable_cpus

UNEVEN = 10.0  # slowest over fastest step of a report, from which it is said
LEAST_STEPS = 5  # of a report
START_STEPS = 2  # of a process: kernels are chosen, memory is taken
log = logging.getLogger(__name__)


class Pace:
    """Compares the steps between two reports; says once that they differ.

    Args:
        limits: usable CPUs, load of the last minute, threads of torch; None asks the machine.
    """

    def __init__(self, limits: Callable[[], tuple[int, float, int]] | None = None) -> None:
        self._limits = limits or _of_this_machine
        self._seconds: list[float] = []
        self._seen = 0
        self._told = False

    def add(self, seconds: float) -> None:
        """Count a step: its time without that for data."""
        self._seen += 1
        if self._seen > START_STEPS:
            self._seconds.append(seconds)

    def close(self) -> float | None:
        """End an interval.

        Returns:
            Slowest over fastest step; None for fewer than five.
        """
        seconds, self._seconds = self._seconds, []
        if len(seconds) < LEAST_STEPS:
            return None
        fastest, slowest = max(min(seconds), 1e-9), max(seconds)
        if slowest >= UNEVEN * fastest and not self._told:
            self._told = True
            log.warning("%s", uneven_text(fastest, slowest, len(seconds), *self._limits()))
        return slowest / fastest


def uneven_text(fastest_s: float, slowest_s: float, steps: int, cpus: int, load: float, threads: int) -> str:
    """Return what is said of uneven steps: the figures, the cause, and what to do.

    Args:
        fastest_s: seconds of the fastest step.
        slowest_s: of the slowest one.
        steps: how many were compared.
        cpus: that this process may use.
        load: processes that wanted a CPU, mean of the last minute.
        threads: of torch.
    """
    found = (
        f"steps take unequally long: {fastest_s:.3g} s the fastest, {slowest_s:.3g} s the slowest of the last {steps} "
        f"({slowest_s / fastest_s:.0f} times); load {load:.1f} on {cpus} usable CPUs, runtime.num_threads {threads}"
    )
    policy = os.environ.get("OMP_WAIT_POLICY", "")
    if policy.lower() == "active":
        return f"{found}: threads that wait keep their CPUs busy (OMP_WAIT_POLICY={policy}): unset it"
    if threads > cpus:
        return f"{found}: more threads than CPUs: set runtime.num_threads={cpus}"
    if load > cpus + 0.5:
        fewer = f", or try runtime.num_threads={max(1, threads // 2)}" if threads > 1 else ""
        return f"{found}: other programs use these CPUs, and a step waits for its slowest thread: end them{fewer}"
    return f"{found}: the CPUs are not overloaded; look at limits of CPU time (cgroup quota), clocks, and swapping"


def _of_this_machine() -> tuple[int, float, int]:
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else 0.0
    return usable_cpus(), load, torch.get_num_threads()
