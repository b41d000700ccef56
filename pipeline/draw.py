"""Counter-based random numbers: what is drawn depends on (seed, purpose, epoch, position) and on nothing else."""

from enum import IntEnum
from typing import Any

import numpy as np
from numpy.typing import NDArray


class Purpose(IntEnum):
    """What a number is drawn for; keeps the streams of one position apart."""

    ORDER = 1
    CLIP = 2
    NEGATIVE = 3
    SUBSTITUTE = 4


class _NoSeed(np.random.SeedSequence):
    """Spares a generator whose state is set anyway the entropy of the system: two thirds of what making it takes."""

    def generate_state(self, n_words: int, dtype: Any = np.uint32) -> NDArray[Any]:
        """Zeros."""
        return np.zeros(n_words, dtype)


_NO_SEED = _NoSeed(0)


def generator(seed: int, purpose: Purpose, *counter: int) -> np.random.Generator:
    """Return a Philox generator for one place of one stream.

    Args:
        seed: Seed of the run, 0..2**64 - 1.
        purpose: Stream.
        counter: Up to three numbers that say where in the stream, such as epoch and position.
    """
    assert len(counter) <= 3
    # The lowest counter word is left to the generator: it counts the numbers drawn here.
    words = [0, *counter, *([0] * (3 - len(counter)))]
    philox = np.random.Philox(_NO_SEED)
    philox.state = {
        "bit_generator": "Philox",
        "state": {"counter": np.array(words, np.uint64), "key": np.array([seed, int(purpose)], np.uint64)},
        "buffer": np.zeros(4, np.uint64),
        "buffer_pos": 4,  # used up
        "has_uint32": 0,
        "uinteger": 0,
    }
    return np.random.Generator(philox)
