"""Classes of a clip: those of its sample, or of the moment in training with timed labels."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from pipeline.clip import ClipBox
from pipeline.collate import BatchSpec, _boxes
from pipeline.config import DataConfig
from pipeline.dataset import Ragged, SampleTable
from pipeline.labels import clip_labels

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
MOMENT = (2.0, 4.0)


def table(labels: tuple[int, ...] | None, *actions: tuple[int, float, float, bool]) -> SampleTable:
    """Two samples, the second with these labels and timed labels, the first with others."""

    def ragged(values: list[int] | list[float], dtype: type) -> Ragged:
        return Ragged(np.array([9, *values], dtype), np.array([0, 1, 1 + len(values)], np.int32))

    numbers = ragged([action[0] for action in actions], np.int32)
    times = [ragged([action[which] for action in actions], np.float64) for which in (1, 2)]
    sets = {} if labels is None else {"action": ragged(list(labels), np.int32)}
    seconds = np.array([0.0, 0.0])
    return SampleTable(["a", "b"], np.zeros(2, np.int64), seconds, seconds + 6, seconds, sets, (numbers, *times))


def labels(table: SampleTable, kind: str, moment: tuple[float, float] | None) -> tuple[int, ...]:
    """Classes of a clip of the second sample."""
    return clip_labels(table, 1, DataConfig(label_kind=kind), moment)  # type: ignore[arg-type]


def test_training_takes_the_timed_labels_between_first_and_last_frame() -> None:
    assert labels(table((0, 1, 2, 3, 4, 5), *ACTIONS), "timed", MOMENT) == (1, 2, 3, 4)


@pytest.mark.parametrize("action", ACTIONS)
def test_each_edge(action: tuple[int, float, float, bool]) -> None:
    assert labels(table(None, action), "timed", MOMENT) == ((action[0],) if action[3] else ())


def test_an_evaluation_takes_all_labels_of_the_sample() -> None:
    """Class 7 has no time inside the file, which is shorter than its annotation."""
    assert labels(table((2, 7), *ACTIONS), "timed", None) == (0, 1, 2, 3, 4, 5, 7)
    assert labels(table(None, *ACTIONS), "timed", None) == (0, 1, 2, 3, 4, 5)
    for moment in (None, MOMENT):
        assert labels(table((2, 7), *ACTIONS), "multi_hot", moment) == (2, 7)


def test_one_label_or_none_where_one_is_wanted() -> None:
    assert labels(table((5,)), "single", None) == (5,)
    assert labels(table(()), "single", None) == labels(table(None), "single", None) == ()
    assert labels(table((5, 6)), "boxes", None) == ()
    with pytest.raises(ValueError, match=r"labels in action \(\[5, 6\]\) must be exactly one"):
        labels(table((5, 6)), "single", None)


def test_boxes_are_told_by_entry_and_their_labels_checked() -> None:
    spec = BatchSpec(torch.device("cpu"), "boxes", num_classes=4, rotation=False)
    corners = (0.0, 1.5, 8.0, 9.0)
    found = ((ClipBox(0, 2, corners, (1, 3)), ClipBox(1, 0, corners, ())), ())
    boxes, multi_hot, index = _boxes(found, 2, spec)
    assert boxes is not None
    assert multi_hot is not None
    assert index is not None
    assert boxes.tolist() == [[0, *corners], [1, *corners]]
    assert multi_hot.tolist() == [[0, 1, 0, 1], [0, 0, 0, 0]]
    assert index.tolist() == [2, 0]
    assert [None if t is None else t.shape for t in _boxes(((), ()), 2, spec)] == [(0, 5), (0, 4), (0,)]
    assert _boxes((None, None), 2, spec) == (None, None, None)
    with pytest.raises(ValueError, match=r"box labels \(1\.\.3\) must be in 0\.\.2"):
        _boxes(found, 2, replace(spec, num_classes=3))
