"""Uneven steps: when it is said, with which figures and which remedy; and how many threads a process has."""

import pytest

from experiments.engine.pace import Pace, uneven_text
from experiments.runtime import choose_num_threads

MACHINE = (2, 13.25, 2)  # usable CPUs, load, threads


def test_steps_that_differ_tenfold_are_told_once(caplog: pytest.LogCaptureFixture) -> None:
    pace = Pace(lambda: MACHINE)
    for seconds in (60.0, 60.0, 0.2, 0.25, 0.2, 1.9, 0.2):  # the first two are the start
        pace.add(seconds)
    assert pace.close() == pytest.approx(9.5)
    assert not caplog.records
    for _ in range(2):
        for seconds in (0.125, 0.2, 2.0, 0.2, 0.2):
            pace.add(seconds)
        assert pace.close() == pytest.approx(16)
    (record,) = caplog.records
    assert record.getMessage() == (
        "steps take unequally long: 0.125 s the fastest, 2 s the slowest of the last 5 (16 times); load 13.2 on 2 "
        "usable CPUs, runtime.num_threads 2: other programs use these CPUs, and a step waits for its slowest thread: "
        "end them, or try runtime.num_threads=1"
    )


def test_few_steps_say_nothing() -> None:
    pace = Pace(lambda: MACHINE)
    for seconds in (1.0, 1.0, 0.1, 9.0, 0.1, 0.1):
        pace.add(seconds)
    assert pace.close() is None


def test_the_remedy_is_that_of_the_cause(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_WAIT_POLICY", "passive")
    assert uneven_text(0.1, 2, 9, 2, 9.0, 64).endswith("more threads than CPUs: set runtime.num_threads=2")
    assert uneven_text(0.1, 2, 9, 2, 9.0, 1).endswith("slowest thread: end them")
    assert "limits of CPU time (cgroup quota)" in uneven_text(0.1, 2, 9, 2, 2.2, 2)
    monkeypatch.setenv("OMP_WAIT_POLICY", "ACTIVE")
    assert uneven_text(0.1, 2, 9, 2, 2.2, 2).endswith("keep their CPUs busy (OMP_WAIT_POLICY=ACTIVE): unset it")


def test_threads_are_those_of_the_usable_cpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    monkeypatch.setattr("experiments.runtime.usable_cpus", lambda: 6)
    assert choose_num_threads(0, 64) == 6
    assert choose_num_threads(0, 4) == 4  # cores of which each has two threads
    assert choose_num_threads(9, 64) == 9
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert choose_num_threads(0, 64) == 1
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    assert choose_num_threads(0, 3) == 3
