"""Classes of a clip: those of its sample, or of the moment in training with timed labels."""

import numpy as np
import pytest

from pipeline.clip import ClipPlan, CropWindow
from pipeline.collate import active_labels
from pipeline.config import DataConfig
from pipeline.dataset import Ragged, SampleTable

# Of a clip from 2 s (first frame) to 4 s (last frame).
ACTIONS = (
    (0, 0.0, 1.999, False),  # over before it
    (1, 0.0, 2.0, True),  # ends with the first frame
    (2, 2.5, 3.0, True),  # inside
    (3, 1.0, 5.0, True),  # all the time
    (4, 4.0, 6.0, True),  # begins with the last frame
    (5, 4.001, 6.0, False),  # after it
    (2, 3.5, 3.6, True),  # again
)
CLIP = ClipPlan(0, 0, 1, 0, 2.0, 4.0, (60, 120), 0, (CropWindow(0, 0, 8, 8),), (8, 8))


def table(labels: tuple[int, ...] | None, *actions: tuple[int, float, float, bool]) -> SampleTable:
    """Two samples, the second with these labels and timed labels, the first with others."""

    def ragged(values: list[int] | list[float], dtype: type) -> Ragged:
        return Ragged(np.array([9, *values], dtype), np.array([0, 1, 1 + len(values)], np.int32))

    numbers = ragged([action[0] for action in actions], np.int32)
    times = [ragged([action[which] for action in actions], np.float64) for which in (1, 2)]
    sets = {} if labels is None else {"action": ragged(list(labels), np.int32)}
    seconds = np.array([0.0, 0.0])
    return SampleTable(["a", "b"], np.zeros(2, np.int64), seconds, seconds + 6, seconds, sets, (numbers, *times))


def config(kind: str) -> DataConfig:
    return DataConfig(label_kind=kind)


def test_training_takes_the_timed_labels_between_first_and_last_frame() -> None:
    found = active_labels(CLIP, table((0, 1, 2, 3, 4, 5), *ACTIONS), config("timed"), training=True)
    assert found.tolist() == [1, 2, 3, 4]


@pytest.mark.parametrize("action", ACTIONS)
def test_each_edge(action: tuple[int, float, float, bool]) -> None:
    found = active_labels(CLIP, table(None, action), config("timed"), training=True)
    assert found.tolist() == ([action[0]] if action[3] else [])


def test_an_evaluation_takes_all_labels_of_the_sample() -> None:
    """Class 7 has no time inside the file, which is shorter than its annotation."""
    assert active_labels(CLIP, table((2, 7), *ACTIONS), config("timed"), training=False).tolist() == [
        *(0, 1, 2, 3, 4, 5, 7)
    ]
    assert active_labels(CLIP, table(None, *ACTIONS), config("timed"), training=False).tolist() == [0, 1, 2, 3, 4, 5]
    for training in (False, True):
        assert active_labels(CLIP, table((2, 7), *ACTIONS), config("multi_hot"), training).tolist() == [2, 7]
