"""Random numbers by place: the same numbers for ever, and no two places share a stream."""

import numpy as np
import pytest

from pipeline.draw import Purpose, generator

PLACES = ((0,), (3,), (1, 2), (1, 2, 3), (2**40, 2**62, 7))


@pytest.mark.parametrize(
    ("seed", "purpose", "place", "integers", "uniform", "order", "small"),
    [
        (0, Purpose.ORDER, (3,), [351106531887263829, 1129116122432820146], 0.24568051289935633, [3, 1, 2, 0, 5, 4], 3),
        (5, Purpose.CLIP, (1, 2), [694341618432905415, 1012747000553404784], 0.7501706417342254, [4, 5, 2, 0, 1, 3], 1),
        (
            *(2**62, Purpose.NEGATIVE, (1, 2, 3)),
            *([264719944202046320, 141323528264645321], 0.03684006536304851, [4, 2, 5, 3, 1, 0], 1),
        ),
        (
            *(2**64 - 1, Purpose.SUBSTITUTE, (2**40, 2**62, 7)),
            *([622946908234683524, 1029291047811426093], 0.9353124181940765, [1, 2, 0, 4, 5, 3], 1),
        ),
    ],
)
def test_numbers_are_those_of_the_runs_so_far(
    seed: int,
    purpose: Purpose,
    place: tuple[int, ...],
    integers: list[int],
    uniform: float,
    order: list[int],
    small: int,
) -> None:
    found = generator(seed, purpose, *place)
    assert found.integers(1 << 60, size=2).tolist() == integers
    assert found.random() == uniform
    assert found.permutation(6).tolist() == order
    assert found.integers(4, dtype=np.int32) == small


def test_places_differ_up_to_the_largest_seed() -> None:
    firsts = {
        generator(seed, purpose, *place).integers(1 << 62)
        for seed in (0, 1, 2**63, 2**63 + 1, 2**64 - 2, 2**64 - 1)
        for purpose in Purpose
        for place in PLACES
    }
    assert len(firsts) == 6 * len(Purpose) * len(PLACES)


def test_generators_are_independent() -> None:
    first, second = generator(1, Purpose.CLIP, 2), generator(1, Purpose.CLIP, 2)
    drawn = first.random(3).tolist()
    assert second.random(3).tolist() == drawn
