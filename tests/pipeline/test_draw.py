"""Random numbers by place: the streams are NumPy's Philox with that key and counter, and no two places share one."""

import numpy as np
import pytest

from pipeline.draw import Purpose, generator

PLACES = ((0,), (3,), (1, 2), (1, 2, 3), (2**40, 2**62, 7))


@pytest.mark.parametrize("seed", [0, 5, 2**62])
def test_streams_are_those_of_the_key_and_counter(seed: int) -> None:
    for purpose in Purpose:
        for place in PLACES:
            words = np.array([0, *place, *[0] * (3 - len(place))], np.uint64)
            key = np.array([seed, purpose], np.uint64)
            expected = np.random.Generator(np.random.Philox(key=key, counter=words))
            found = generator(seed, purpose, *place)
            np.testing.assert_array_equal(found.integers(1 << 60, size=50), expected.integers(1 << 60, size=50))
            np.testing.assert_array_equal(found.permutation(90), expected.permutation(90))
            assert found.random() == expected.random()
            assert [found.integers(4, dtype=np.int32) for _ in range(5)] == [
                expected.integers(4, dtype=np.int32) for _ in range(5)
            ]


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
