"""Signs of what binds, with clocks that are set by hand."""

from typing import Any

import pytest
import torch

from experiments.engine.stage_clock import StageClock
from experiments.engine.step_signs import StepSigns
from experiments.runtime import Runtime

ALONE = Runtime(rank=0, world_size=1, local_rank=0, device=torch.device("cpu"))


class Hands:
    """A clock, and marks in a stream that run `lag` seconds behind it."""

    def __init__(self) -> None:
        self.time, self.reads = 0.0, 0
        self.marks: list[float] = []

    def __call__(self) -> float:
        return self.time


class Mark:
    def __init__(self, hands: Hands, device: list[float]) -> None:
        self.hands, self.device, self.at = hands, device, -1.0

    def record(self) -> None:
        self.at = self.device.pop(0)

    def elapsed_time(self, other: Any) -> float:
        return 1e3 * (other.at - self.at)


def one_step(host_s: float, device_s: float) -> dict[str, float]:
    """Figures of one timed step that the host launches and the device computes for so long."""
    hands, clock, device = Hands(), None, [0.0, device_s]
    clock = StageClock(hands)
    signs = StepSigns(ALONE, clock, lambda: 2, lambda: Mark(hands, device), hands)
    signs.before_data()
    signs.before_step(timed=True)
    hands.time += host_s
    signs.after_step()
    clock.seconds["data"], clock.seconds["step"] = 1.0, 3.0
    return signs.close()


def test_a_step_that_the_host_binds_is_told_from_one_of_the_device() -> None:
    bound = one_step(host_s=0.095, device_s=0.1)
    assert bound["train/host_launch_ms"] == pytest.approx(95.0)
    assert bound["train/device_step_ms"] == pytest.approx(100.0)
    assert bound["train/host_bound"] == 1.0
    assert one_step(host_s=0.02, device_s=0.1)["train/host_bound"] == 0.0


def test_without_a_device_and_untimed_nothing_is_said_of_it() -> None:
    hands = Hands()
    clock = StageClock(hands)
    depths = iter([0, 3])
    signs = StepSigns(ALONE, clock, lambda: next(depths), now=hands)
    for timed in (False, True):
        signs.before_data()
        signs.before_step(timed=timed)
        signs.after_step()
    clock.seconds["data"] = 1.0
    assert signs.close() == {"data/batches_ready": 1.5, "train/signs_share": 0.0}


@pytest.mark.parametrize(
    ("host_wait_s", "idle", "wait"),
    [(0.8, 0.1, 0.1), (0.05, 0.1, 0.05)],  # the host waits while the device works; the host binds, not the data
)
def test_data_wait_is_at_most_the_time_without_work_on_the_device(host_wait_s: float, idle: float, wait: float) -> None:
    hands, gap = Hands(), idle / 3
    ends = [0.0]
    device = []
    for _ in range(4):  # four steps, of 1 s together with what lies between them
        device += [ends[-1], ends[-1] + (1 - idle) / 4]
        ends.append(device[-1] + gap)
    clock = StageClock(hands)
    signs = StepSigns(ALONE, clock, lambda: 2, lambda: Mark(hands, device), hands)
    clock.count_step(1)
    for interval in range(2):  # what lies between two reports counts for neither
        device[:0] = [] if interval == 0 else [100.0, 101.0]
        for _ in range(4 if interval == 0 else 1):
            signs.before_data()
            signs.before_step(timed=False)
            signs.after_step()
        clock.seconds["data"] += host_wait_s
        clock.seconds["step"] += 1 - host_wait_s
        found = signs.close()
        assert found["train/device_idle_share"] == pytest.approx(idle if interval == 0 else 0.0)
        assert "train/device_step_ms" not in found
        assert clock.interval()[1] == pytest.approx(wait if interval == 0 else 0.0)
    assert clock.seconds["data"] + clock.seconds["step"] == pytest.approx(2.0)


def test_a_long_first_step_hides_no_wait_for_data() -> None:
    """The device takes 50 s to choose algorithms in the first step; then 0.5 s of every second it has nothing to do."""
    hands, device = Hands(), [0.0, 50.0, 50.5, 51.0, 51.5, 52.0]
    clock = StageClock(hands)
    signs = StepSigns(ALONE, clock, lambda: 0, lambda: Mark(hands, device), hands)
    for number in range(3):
        signs.before_data()
        signs.before_step(timed=False)
        signs.after_step()
        if number:
            clock.seconds["data"] += 0.6
            clock.seconds["step"] += 0.4
        clock.count_step(1)
    signs.close()
    assert clock.interval() == (pytest.approx(1.0), pytest.approx(0.5))


def test_own_cost_is_counted() -> None:
    hands = Hands()
    clock = StageClock(hands)

    def slow() -> int:
        hands.time += 0.5
        return 1

    signs = StepSigns(ALONE, clock, slow, now=hands)
    signs.before_data()
    clock.seconds["step"] = 10.0
    assert signs.close()["train/signs_share"] == pytest.approx(0.05)
    assert signs.close() == {}


def test_the_rank_that_waits_most_is_named_once(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Ranks 0, 1 and 3 wait 2 % of their time, rank 2 waits 40 %."""
    runtime = Runtime(rank=0, world_size=4, local_rank=0, device=torch.device("cpu"))

    def others(own: torch.Tensor, group: Any) -> None:
        assert own.flatten().tolist() == pytest.approx([0.02, 0, 0, 0] + [0.3, 0, 0, 0])
        own += torch.tensor([[0.0, 0.02, 0.4, 0.02], [0.0, 0.3, 0.3, 0.3]])

    monkeypatch.setattr("experiments.engine.step_signs.dist.all_reduce", others)
    clock, forward = StageClock(), [0.0]
    signs = StepSigns(runtime, clock, lambda: 1, forward_s=lambda: forward[0])
    for _ in range(2):
        forward[0] += 30.0
        clock.seconds["data"] += 2.0
        clock.seconds["step"] += 98.0
        found = signs.close()
        assert found["train/slowest_rank"] == 2.0
        assert found["train/data_wait_share_max"] == pytest.approx(0.4)
    assert len(caplog.records) == 1
    assert "rank 2 holds up the others: it waits for data 40 % of its time, the median rank 2 %" in caplog.text


def test_a_rank_that_computes_slowly_is_named_by_what_it_does_before_the_others_wait(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Rank 1's forward passes take 65 % of the time, those of ranks 0 and 2 take 30 and 35 %: they wait afterwards."""
    runtime = Runtime(rank=0, world_size=3, local_rank=0, device=torch.device("cpu"))

    own: list[float] = []

    def others(shares: torch.Tensor, group: Any) -> None:
        own.append(float(shares[1, 0]))
        shares += torch.tensor([[0.0, 0.0, 0.05], [0.0, 0.65, 0.35]])

    monkeypatch.setattr("experiments.engine.step_signs.dist.all_reduce", others)
    clock = StageClock()
    signs = StepSigns(runtime, clock, lambda: 1, forward_s=lambda: 3.0)
    clock.seconds["startup"] = 5.0  # its forward passes are in none of the shares
    assert signs.close()["train/forward_share_max"] == pytest.approx(0.65)
    assert own[-1] == 0.0
    caplog.clear()
    signs = StepSigns(runtime, clock, lambda: 1, forward_s=lambda: 3.0)
    clock.seconds["step"] = 10.0
    found = signs.close()
    assert own[-1] == pytest.approx(0.3)
    assert (found["train/slowest_rank"], found["train/forward_share_max"]) == (1.0, pytest.approx(0.65))
    assert "rank 1 holds up the others: its forward passes take 65 % of its time, the median rank 35 %" in caplog.text
