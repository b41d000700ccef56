"""Constant rate from time stamps: the nearest frame is shown, constant sources pass one to one."""

from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.media.retime import COMMON_RATES, Rate, Retimer, choose_rate

MS = Fraction(1, 1000)


def shown(times: list[int], rate: Rate, time_base: Fraction, last: int = 0) -> list[int]:
    """Number of the source frame in every slot."""
    retimer: Retimer[int] = Retimer(rate, time_base)
    slots = []
    for number, ticks in enumerate(times):
        out = retimer.push(number, ticks)
        slots += [out[0]] * out[1] if out else []
    out = retimer.finish(Fraction(last))
    slots += [out[0]] * out[1] if out else []
    assert len(slots) == retimer.slots == len(times) + retimer.repeated - retimer.dropped
    return slots


@pytest.mark.parametrize("fps", [rate for rate in COMMON_RATES if 12 <= rate <= 120])
@pytest.mark.parametrize("time_base", [MS, Fraction(1, 90000)])
def test_constant_rate_rounded_to_the_clock_passes_one_to_one(fps: Fraction, time_base: Fraction) -> None:
    times = [round((n / fps + Fraction(7, 3)) / time_base) for n in range(200)]
    rate = choose_rate(np.array(times), time_base, [fps])
    assert (rate.fps, rate.is_constant) == (fps, True)
    assert shown(times, rate, time_base, round(1 / fps / time_base)) == list(range(200))


def test_claimed_rate_that_is_wrong_is_not_believed() -> None:
    times = np.array([round(n / Fraction(30000, 1001) / MS) for n in range(400)])
    assert choose_rate(times, MS, [Fraction(1000), Fraction(25)]) == Rate(Fraction(30000, 1001), True)


def test_unusual_constant_rate_is_measured() -> None:
    times = np.arange(100) * 14336 // 28
    assert choose_rate(times, Fraction(1, 14336), []).fps == 28
    assert choose_rate(np.arange(50) * 7, Fraction(1, 119), []) == Rate(Fraction(17), True)


def test_holes_are_held() -> None:
    times = [0, 40, 80, 200, 240, 280, 320, 360, 400]
    rate = choose_rate(np.array(times), MS, [Fraction(25)])
    assert (rate.fps, rate.is_constant, rate.has_holes) == (25, False, True)
    assert shown(times, rate, MS, 40) == [0, 1, 2, 2, 2, 3, 4, 5, 6, 7, 8]


@pytest.mark.parametrize("hole_s", [0.4, 5, 15, 600])
def test_one_long_hole_does_not_change_the_rate(hole_s: float) -> None:
    times = [n * 40 + (n >= 50) * round(1000 * hole_s) for n in range(100)]
    rate = choose_rate(np.array(times), MS, [])
    assert (rate.fps, rate.has_holes) == (25, True)
    slots = shown(times, rate, MS, 40)
    assert sorted(set(slots)) == list(range(100))
    assert len(slots) == 100 + round(25 * hole_s)


@pytest.mark.parametrize(("source", "most"), [("240", "30"), ("60000/1001", "30"), ("25", "10"), ("120000/1001", "25")])
def test_reduced_rate_shows_the_nearest_frame(source: str, most: str) -> None:
    fps, base = Fraction(source), Fraction(1, 90_000)
    times = [round(n / fps / base) for n in range(300)]
    rate = choose_rate(np.array(times), base, [fps], Fraction(most))
    assert rate.fps == Fraction(most)
    for slot, number in enumerate(shown(times, rate, base, round(1 / fps / base))):
        at = slot / rate.fps / base
        assert abs(times[number] - at) == min(abs(time - at) for time in times)


@pytest.mark.parametrize(
    ("steps_ms", "fps"), [([46, 28, 46, 41, 43, 39, 40, 120], 25), ([16, 17, 17, 2000], 5), ([33, 34, 50], 30)]
)
def test_variable_rate_is_what_it_mostly_is(steps_ms: list[int], fps: int) -> None:
    times = np.cumsum([0, *steps_ms * 12, 7])
    rate = choose_rate(times, MS, [Fraction(1000), Fraction(25)])
    assert not rate.is_constant
    assert rate.fps == fps


def test_variable_rate_takes_the_nearest_common_rate() -> None:
    times = np.cumsum([0, 33, 47, 21, 36, 29, 40, 25, 34, 41, 27])
    rate = choose_rate(times, MS, [Fraction(1000)])
    assert (rate.fps, rate.is_constant) == (30, False)


@pytest.mark.parametrize(("source", "most", "kept"), [(60, 30, 2), (120, 30, 4), (90, 30, 3), (50, 25, 2)])
def test_reduced_rate_keeps_every_nth_frame_also_with_jitter(source: int, most: int, kept: int) -> None:
    times = [round(n * 1000 / source) for n in range(240)]
    rate = choose_rate(np.array(times), MS, [Fraction(source)], Fraction(most))
    slots = shown(times, rate, MS, round(1000 / source))
    assert rate.fps == most
    assert slots == list(range(0, 240, kept))


def test_time_stamps_that_do_not_rise_replace_the_frame() -> None:
    assert shown([0, 40, 40, 80, 60, 120], Rate(Fraction(25), False), MS, 40) == [0, 2, 4, 5]


def test_single_frame_is_one_slot() -> None:
    assert shown([977], Rate(Fraction(25), True), MS, 0) == [0]


@settings(max_examples=80, deadline=None)
@given(
    gaps=st.lists(st.integers(1, 300), min_size=1, max_size=60),
    fps=st.sampled_from([Fraction(24), Fraction(30000, 1001), Fraction(30), Fraction(60)]),
)
def test_nearest_frame_is_shown_and_none_half_a_frame_early(gaps: list[int], fps: Fraction) -> None:
    times = np.cumsum([0, *gaps]).tolist()
    slots = shown(times, Rate(fps, False), MS, gaps[-1])
    for slot, number in enumerate(slots):
        at = slot / fps * 1000
        begun = [time for time in times if time <= at + 500 / fps]
        assert times[number] in begun
        assert abs(times[number] - at) == min(abs(time - at) for time in begun)
    if len(slots) > 1:
        assert -500 / fps <= len(slots) / fps * 1000 - times[-1] - gaps[-1] <= 1000 / fps
