"""What is said of data that are odd: classes without samples, a validation of one video, one class, other splits."""

import dataclasses
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from experiments.config import Config
from experiments.engine.data import DataSetupError, class_names, resolve_data_path, split_of
from experiments.engine.data_notes import data_notes
from experiments.runtime import Runtime
from pipeline.annotations.layout import empty_class_folders
from pipeline.dataset import Ragged
from pipeline.folder.dataset import PlainFolder
from pipeline.open import DataPathError
from tests.pipeline.support.plain_videos import write_video
from tests.pipeline.support.stores import numbered_frames


class Samples:
    """Samples with one label each."""

    def __init__(self, labels: list[int]) -> None:
        self._labels = Ragged(np.array(labels, np.int32), np.arange(len(labels) + 1, dtype=np.int64))
        self.label_sets = {"action": self._labels}

    def __len__(self) -> int:
        return len(self._labels.values)

    def labels(self, name: str) -> Ragged:
        return self.label_sets[name]


def dataset(split: str, labels: list[int], names: tuple[str, ...] = ("a", "b", "c")) -> Any:
    return SimpleNamespace(split=split, samples=Samples(labels), classes={"action": names})


def test_classes_without_samples_and_a_validation_of_one_are_said() -> None:
    notes = data_notes(Config(), ("a", "b", "c"), dataset("train", [0, 0, 2]), dataset("val", [2]))
    assert notes == [
        "validation has one sample, so a score is 0 or 100 %: add videos to split 'val'",
        "split 'train' has no sample to learn from of 1 classes: 'b'",
        "split 'val' has no sample to be scored on of 2 classes: 'a', 'b'",
    ]
    assert data_notes(Config(), ("a", "b"), dataset("train", [0, 1]), dataset("val", [1, 0])) == []
    many = tuple(f"c{i}" for i in range(9))
    assert data_notes(Config(), many, dataset("train", [0] * 3), dataset("val", list(range(9)))) == [
        "split 'train' has no sample to learn from of 8 classes: 'c1', 'c2', 'c3', 'c4', 'c5' and 3 more"
    ]


def test_one_class_is_nothing_to_learn() -> None:
    config = Config()
    with pytest.raises(DataSetupError, match=r"\(1: a\) must be at least two: of one there is nothing to learn"):
        class_names(config, dataset("train", [0], ("a",)))
    assert class_names(config, dataset("train", [0], ("a", "b"))) == ("a", "b")
    wrong = dataclasses.replace(config, model=dataclasses.replace(config.model, num_classes=3))
    with pytest.raises(DataSetupError, match=r"model.num_classes \(3\) must be 2, .*; leave it out, or set"):
        class_names(wrong, dataset("train", [0], ("a", "b")))


@pytest.mark.parametrize(
    ("name", "said"),
    [("training", "did you mean train?"), ("valid", "did you mean val?"), ("x", "choose one.")],
)
def test_splits_that_are_not_there_are_near_ones(name: str, said: str) -> None:
    source: Any = SimpleNamespace(splits=("test", "train", "val"), path=Path("store"))
    with pytest.raises(DataSetupError) as caught:
        split_of(source, name, "data.val_split")
    assert str(caught.value) == f"data.val_split ({name}) must be one of the splits test, train, val of store; {said}"


def test_few_videos_of_which_none_was_drawn_for_val_are_told_what_to_do(tmp_path: Path) -> None:
    for label in ("a", "b"):
        for number in range(2):
            (tmp_path / label).mkdir(exist_ok=True)
            write_video(tmp_path / label / f"{number}.mp4", frames=numbered_frames(3))
    folder = PlainFolder.open(tmp_path)
    assert folder.splits == ("all", "train")
    with pytest.raises(
        DataSetupError, match=r"splits all, train of .*none may be drawn \(each with a chance of 10%\)"
    ) as it:
        split_of(folder, "val", "data.val_split")
    assert f"put some into {tmp_path}/val/<class>/ and all others into {tmp_path}/train/<class>/" in str(it.value)
    store: Any = SimpleNamespace(splits=("train",), path=Path("store"))
    with pytest.raises(DataSetupError, match=r"prepare it again with --option val_fraction=0\.3$"):
        split_of(store, "val", "data.val_split")


def test_a_data_path_with_a_typo_is_told_the_near_one(tmp_path: Path) -> None:
    (tmp_path / "my_videos" / "train").mkdir(parents=True)
    config, alone = Config(), Runtime(0, 1, 0, None)  # type: ignore[arg-type]
    for typed, near in (("my_video", "my_videos"), ("My_Videos", "my_videos"), ("my_vdeos/train", "my_videos/train")):
        wrong = dataclasses.replace(config, data=dataclasses.replace(config.data, path=str(tmp_path / typed)))
        with pytest.raises(DataPathError) as caught:
            resolve_data_path(wrong, alone)
        assert str(caught.value).endswith(f"did you mean {tmp_path / near}?")


@pytest.mark.parametrize(
    ("paths", "folders", "empty"),
    [
        (["a/1.mp4"], ["", "a", "b"], ["b"]),
        (["a/1.mp4", "b/c/2.mp4"], ["", "a", "b", "b/c", "b/d"], []),  # deeper folders are no classes
        (["train/a/1.mp4"], ["", "train", "train/a", "train/b", "val", "val/a"], ["train/b", "val/a"]),
        (["train/1.mp4"], ["", "train", "train/deep"], []),
        (["1.mp4"], ["", "a"], []),  # videos without classes
    ],
)
def test_empty_class_folders(paths: list[str], folders: list[str], empty: list[str]) -> None:
    assert empty_class_folders(paths, folders) == empty
