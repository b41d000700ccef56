"""Boxes of key frames lie where the picture shows them, in every crop, mirrored and turned; one clip a key frame."""

import dataclasses
from dataclasses import replace
from fractions import Fraction

import numpy as np
import pytest
import torch

from pipeline.annotations.rows import Box
from pipeline.batch import Batch
from pipeline.clip import ClipSpec
from pipeline.config import DataConfig, ViewConfig
from pipeline.loader import EvalLoader, LoaderOptions, TrainLoader
from pipeline.media.fragments import encode_fragments
from pipeline.plan import Pretext
from pipeline.store.reader import Store, StoreSplit
from pipeline.store.rows import SampleRow
from pipeline.store.writer import StoreWriter

SPEC = ClipSpec(num_frames=4, frame_stride=1, num_mel_frames=32, num_mel_bins=40)
CONFIG = DataConfig(
    target_fps=10.0, crop_size_px=64, jitter_min_px=64, jitter_max_px=72, num_threads=1, label_kind="boxes", flip=True
)
WIDTH, HEIGHT = 160, 64
PLACES = [(16, 8, 48, 40), (56, 24, 104, 56), (112, 8, 144, 48), (40, 16, 112, 48)]  # x1, y1, x2, y2 in stored pixels


@pytest.fixture(scope="module")
def split(tmp_path_factory: pytest.TempPathFactory) -> StoreSplit:
    """Four media of one second, each with one bright rectangle and two key frames that have it as their box."""
    path = tmp_path_factory.mktemp("boxes") / "store"
    with StoreWriter(
        path, video_codec="vp9", gop=12, short_side_px=64, dataset="ava", classes={"action": ["a", "b", "c", "d"]}
    ) as writer:
        rows = []
        for number, (x1, y1, x2, y2) in enumerate(PLACES):
            frame = np.full((HEIGHT, WIDTH, 3), 16, np.uint8)
            frame[y1:y2, x1:x2] = 235
            video = encode_fragments([frame] * 10, fps=Fraction(10), width=WIDTH, height=HEIGHT, codec="vp9")
            media = writer.add_media(f"m{number}", writer.add_video(video), None, source=f"m{number}")
            box = Box(x1 / WIDTH, y1 / HEIGHT, x2 / WIDTH, y2 / HEIGHT, (number,))
            rows += [
                SampleRow(f"m{number},{time}", media, 0.0, 1.0, key_time_s=time, boxes=(box,)) for time in (0.4, 0.6)
            ]
        writer.add_samples("train", rows)
        found = Box(0.25, 0.25, 0.75, 0.75, (), 0.9)  # a detector's: without labels
        writer.add_samples("val", [dataclasses.replace(row, boxes=(*row.boxes, found)) for row in rows])
    return Store.open(path).split("train")


def check_boxes(batch: Batch) -> int:
    """Compare each entry's box with the bright rectangle in its picture; returns how many entries show one."""
    assert batch.frames is not None
    assert batch.boxes is not None
    assert batch.box_labels is not None
    seen = 0
    for entry, name in enumerate(batch.ids):
        bright = batch.frames[entry, 0, 0] > 0
        mine = batch.boxes[:, 0] == entry
        if int(bright.sum()) < 64:  # a corner or nothing of it lies in this crop
            continue
        ys, xs = torch.nonzero(bright, as_tuple=True)
        shown = [int(xs.min()), int(ys.min()), int(xs.max()) + 1, int(ys.max()) + 1]
        assert int(mine.sum()) == 1, (entry, name, shown)
        assert batch.boxes[mine, 1:][0].tolist() == pytest.approx(shown, abs=1.5)
        assert batch.box_labels[mine].argmax(1).tolist() == [int(name[1])]
        seen += 1
    return seen


@pytest.mark.parametrize(("num_crops", "shown"), [(0, 8), (1, 4), (3, 16)])
def test_each_crop_has_its_own_boxes(split: StoreSplit, num_crops: int, shown: int) -> None:
    views = ViewConfig(num_crops=num_crops, crop_size_px=64, boxes="ground_truth")
    batches = list(EvalLoader(split, SPEC, CONFIG, LoaderOptions(3), views=views))
    assert sum(len(batch) for batch in batches) == 8 * max(1, num_crops)
    assert sum(map(check_boxes, batches)) == shown
    assert sum(len(batch.boxes) for batch in batches if batch.boxes is not None) == shown


def test_key_frames_are_evaluated_once_whatever_the_number_of_clips(split: StoreSplit) -> None:
    views = ViewConfig(num_clips=10, num_crops=0, crop_size_px=64, boxes="ground_truth")
    loader = EvalLoader(split, SPEC, CONFIG, LoaderOptions(3), views=views)
    plan = loader.plan
    assert (plan.num_positions, plan.clips_per_sample, plan.views_per_sample) == (8, 1, 1)
    ids = [name for batch in loader for name in batch.ids]
    assert ids == [split.samples.id(sample) for sample in range(8)]


def test_boxes_follow_jitter_flip_and_rotation_in_training(split: StoreSplit) -> None:
    config = replace(CONFIG, rotation=True)
    loader = TrainLoader(split, SPEC, config, LoaderOptions(8))
    clips = [loader.plan.clip(position) for position in range(32)]
    assert {(clip.rotation, clip.flip) for clip in clips} == {(turns, flip) for turns in range(4) for flip in (0, 1)}
    batches = loader.batches()
    assert sum(check_boxes(next(batches)) for _ in range(4)) >= 16
    batches.close()


def test_boxes_follow_the_rotation_of_an_evaluation(split: StoreSplit) -> None:
    views = ViewConfig(num_crops=1, crop_size_px=64, boxes="ground_truth")
    loader = EvalLoader(split, SPEC, CONFIG, LoaderOptions(8), views=views, pretext=Pretext(rotation=True))
    turned = {clip.rotation for clip in map(loader.plan.clip, range(8)) if clip.boxes}
    assert len(turned) > 1
    assert sum(map(check_boxes, loader)) == 4


def test_boxes_of_a_detector_are_scored_and_never_trained_on(split: StoreSplit) -> None:
    val = Store.open(split.store.path).split("val")
    for source, index, labels in (("detected", 1, 0), ("ground_truth", 0, 1)):
        views = ViewConfig(num_crops=0, crop_size_px=64, boxes=source)  # type: ignore[arg-type]
        (batch,) = list(EvalLoader(val, SPEC, CONFIG, LoaderOptions(8), views=views))
        assert batch.boxes is not None
        assert batch.box_index is not None
        assert batch.box_labels is not None
        assert batch.boxes[:, 0].tolist() == list(range(8))
        assert batch.box_index.tolist() == [index] * 8
        assert batch.box_labels.sum(1).tolist() == [labels] * 8
    plan = TrainLoader(val, SPEC, CONFIG, LoaderOptions(8)).plan
    assert {box.index for position in range(8) for box in plan.clip(position).boxes or ()} == {0}


def test_boxes_that_a_split_does_not_have_are_asked_for_in_vain(split: StoreSplit) -> None:
    with pytest.raises(ValueError, match=r"split 'train' has no detected boxes .* among its 8 boxes; .*ground_truth"):
        EvalLoader(split, SPEC, CONFIG, LoaderOptions(3), views=ViewConfig(num_crops=0, crop_size_px=64))
