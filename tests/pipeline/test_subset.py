"""Some samples of a split as a split: the rows drawn, the tables, and what an evaluation sees of them."""

import pickle
from pathlib import Path

import numpy as np
import pytest
import torch

from pipeline.clip import ClipSpec
from pipeline.config import DataConfig, ViewConfig
from pipeline.dataset import Ragged, SampleTable, used_media
from pipeline.loader import EvalLoader, LoaderOptions
from pipeline.store.reader import StoreSplit
from pipeline.subset import Subset, drawn_rows, take_samples
from tests.pipeline.support.stores import noise, numbered_frames, write_store

SPEC = ClipSpec(num_frames=8, frame_stride=2, num_mel_frames=32, num_mel_bins=40)
VIEWS = ViewConfig(num_clips=2, num_crops=1, crop_size_px=64)


@pytest.fixture
def split(tmp_path: Path) -> StoreSplit:
    """Six media, the last one silent."""
    media = [(f"m{i}", numbered_frames(60), noise(2, seed=i) if i < 5 else None) for i in range(6)]
    return write_store(tmp_path / "store", media)


def test_rows_are_a_function_of_the_seed_and_every_row_is_drawn_alike() -> None:
    rows = drawn_rows(1000, 50, 3)
    assert np.array_equal(rows, drawn_rows(1000, 50, 3))
    assert not np.array_equal(rows, drawn_rows(1000, 50, 4))
    assert (np.diff(rows) > 0).all()
    assert 0 <= rows[0] < rows[-1] < 1000
    assert np.array_equal(drawn_rows(7, 7, 0), np.arange(7))
    counts = np.bincount(np.concatenate([drawn_rows(20, 5, seed) for seed in range(400)]), minlength=20)
    assert counts.min() > 60  # of 100 expected, with a standard deviation of 9
    assert counts.max() < 140


def test_all_columns_of_the_chosen_rows_are_taken() -> None:
    def lists(*rows: list[float], kind: type = np.int32) -> Ragged:
        return Ragged(np.concatenate([np.array(row, kind) for row in rows]), np.cumsum([0, *map(len, rows)]))

    boxes = (
        lists([0, 0, 1, 1], [], [0, 0, 0.5, 0.5, 0.5, 0.5, 1, 1], kind=np.float32),
        lists([1], [], [0, 2]),
        lists([7], [], [8, 9]),
        lists([1], [], [0.5, 0.75], kind=np.float32),
    )
    table = SampleTable(
        ["a", "b", "c"], np.array([5, 4, 3]), np.array([0.0, 1.0, 2.0]), np.array([3.0, 4.0, 5.0]),
        np.array([np.nan, 1.5, 2.5]), {"action": lists([2], [], [1, 3])}, (lists([4], [5], []),) * 3, boxes,
    )  # fmt: skip
    taken = take_samples(table, np.array([0, 2]))
    assert [taken.id(i) for i in range(len(taken))] == ["a", "c"]
    assert (list(taken.media), list(taken.start_s), list(taken.end_s)) == ([5, 3], [0.0, 2.0], [3.0, 5.0])
    assert np.isnan(taken.key_time_s[0])
    assert taken.key_time_s[1] == 2.5
    assert [taken.labels("action").row(i).tolist() for i in range(2)] == [[2], [1, 3]]
    assert [taken.actions(i).label.tolist() for i in range(2)] == [[4], []]
    assert taken.boxes(1).boxes.tolist() == [[0, 0, 0.5, 0.5], [0.5, 0.5, 1, 1]]
    assert taken.boxes(1).classes() == [(), (8, 9)]
    assert taken.boxes(0).classes() == [(7,)]


@pytest.mark.parametrize("workers", [0, 1])
def test_an_evaluation_of_a_subset_sees_what_that_of_the_split_sees(split: StoreSplit, workers: int) -> None:
    config = DataConfig(crop_size_px=64, jitter_min_px=64, jitter_max_px=72, num_threads=2, num_workers=workers)
    rows = np.array([1, 4, 5])
    part = Subset(split, rows)

    def views(dataset: StoreSplit | Subset) -> dict[tuple[str, int], tuple[torch.Tensor, torch.Tensor]]:
        found = {}
        for batch in EvalLoader(dataset, SPEC, config, LoaderOptions(clips_per_batch=4), views=VIEWS).batches():
            for i, name in enumerate(batch.ids):
                assert batch.log_mel is not None
                assert batch.frames is not None
                found[name, int(batch.view[i])] = batch.frames[i].clone(), batch.log_mel[i].clone()
        return found

    whole, own = views(split), views(part)
    assert len(own) == 6
    assert {name for name, _ in own} == {split.samples.id(int(row)) for row in rows}
    for key, (frames, log_mel) in own.items():
        assert torch.equal(frames, whole[key][0])
        assert torch.equal(log_mel, whole[key][1])


def test_a_subset_is_pickled_and_has_a_fingerprint_of_its_own(split: StoreSplit) -> None:
    part = Subset(split, np.array([0, 2]))
    again = pickle.loads(pickle.dumps(part))
    assert (again.fingerprint, again.samples.id(1), again.split) == (part.fingerprint, split.samples.id(2), split.split)
    assert len({split.fingerprint, part.fingerprint, Subset(split, np.array([0, 3])).fingerprint}) == 3


def test_media_of_a_subset_are_those_of_its_samples(split: StoreSplit) -> None:
    assert used_media(split).tolist() == [0, 1, 2, 3, 4, 5]
    assert used_media(Subset(split, np.array([1, 4]))).tolist() == [1, 4]
