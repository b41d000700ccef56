"""Where the time goes, with a clock that is set by hand."""

import pytest

from experiments.engine.stage_clock import StageClock


class Hands:
    def __init__(self) -> None:
        self.time = 100.0

    def __call__(self) -> float:
        return self.time


def spend(clock: StageClock, hands: Hands, stage: str, seconds: float) -> None:
    with clock.stage(stage):  # type: ignore[arg-type]
        hands.time += seconds


def test_clips_per_second_leaves_out_start_up_evaluation_and_checkpoints() -> None:
    hands = Hands()
    clock = StageClock(hands)
    for data, step in ((50.0, 70.0), (1.0, 3.0), (1.0, 3.0)):
        spend(clock, hands, "data", data)
        spend(clock, hands, "step", step)
        clock.count_step(16)
    spend(clock, hands, "eval", 500.0)
    spend(clock, hands, "checkpoint", 20.0)
    hands.time += 7.0
    assert clock.clips_per_second == pytest.approx(32 / 8)
    assert clock.data_wait_share == pytest.approx(0.25)
    assert clock.seconds == {"startup": 120.0, "data": 2.0, "step": 6.0, "eval": 500.0, "checkpoint": 20.0}
    assert clock.ledger()["other"] == pytest.approx(7.0)
    assert sum(clock.ledger().values()) == pytest.approx(clock.wall_time_s)


def test_interval_counts_since_the_last_call() -> None:
    hands = Hands()
    clock = StageClock(hands)
    clock.count_step(8)
    assert clock.interval() == (0.0, 0.0)
    spend(clock, hands, "step", 2.0)
    clock.count_step(8)
    assert clock.interval() == (4.0, 0.0)
    spend(clock, hands, "data", 1.0)
    spend(clock, hands, "step", 1.0)
    clock.count_step(8)
    assert clock.interval() == (4.0, 0.5)


def test_steps_that_warm_up_are_start_up() -> None:
    hands = Hands()
    clock = StageClock(hands)
    clock.count_step(8)
    for seconds, warming_up in ((14.0, True), (2.0, False), (20.0, True), (2.0, False)):
        with clock.stage("step"):
            hands.time += seconds
            clock.warming_up = warming_up
        clock.count_step(8)
    assert clock.clips_per_second == pytest.approx(16 / 4)
    assert clock.steps == 2
    assert clock.seconds["startup"] == pytest.approx(34.0)
