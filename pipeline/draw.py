"""Counter-based random numbers: what is drawn depends on (seed, purpose, epoch, position) and on nothing else."""

from enum import IntEnum

import numpy as np


class Purpose(IntEnum):
    """What a number is drawn for; keeps the streams of one position apart."""

    ORDER = 1
    CLIP = 2
    NEGATIVE = 3
    SUBSTITUTE = 4
    ROTATION = 5  # of an evaluation; a training's is drawn with its clip
    SCORED = 6  # which training samples are scored as validation is


def generator(seed: int, purpose: Purpose, *counter: int) -> np.random.Generator:
    """Return a Philox generator for one place of one stream.

    Args:
        seed: Seed of the run, 0..2**64 - 1.
        purpose: Stream.
        counter: Up to three numbers that say where in the stream, such as epoch and position.
    """
    assert len(counter) <= 3
    # The lowest counter word is left to the generator: it counts the numbers drawn here.
    words = np.array([0, *counter, *[0] * (3 - len(counter))], np.uint64)
    return np.random.Generator(np.random.Philox(key=np.array([seed, purpose], np.uint64), counter=words))
