"""Every data set from its official annotation files to training and evaluation batches: ids, labels, views, boxes."""

import shutil
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch

from pipeline.annotations import read
from pipeline.annotations.rows import Annotations, Row
from pipeline.batch import Batch
from pipeline.clip import PIXEL_MEAN, PIXEL_STD, ClipSpec
from pipeline.config import DataConfig, ViewConfig
from pipeline.ingest.item import TranscodeSettings
from pipeline.ingest.run import IngestOptions, ingest
from pipeline.loader import EvalLoader, LoaderOptions, TrainLoader
from pipeline.store.format import INDEX_NAME
from pipeline.store.reader import Store, StoreSplit
from tests.pipeline.support.miniatures import MINIATURES, Miniature
from tests.pipeline.support.plain_videos import write_video

SPEC = ClipSpec(num_frames=4, frame_stride=3, num_mel_frames=32, num_mel_bins=40)
CONFIG = DataConfig(target_fps=10.0, crop_size_px=32, jitter_min_px=32, jitter_max_px=48, num_threads=2)

CASES = dict.fromkeys(MINIATURES, ("action", "single", "train", "val")) | {
    # miniature: label set, kind of labels, training split, evaluation split
    "kinetics_sounds": ("sounds", "single", "train", "val"),
    "epic_kitchens55": ("verb", "single", "train", "val"),
    "epic_kitchens100": ("noun", "single", "train", "val"),
    "charades": ("action", "timed", "train", "val"),
    "ava_v2.1": ("action", "boxes", "train", "val"),
    "ava_v2.2": ("action", "boxes", "train", "val"),
    "ucf101": ("action", "single", "train1", "val1"),
    "hmdb51": ("action", "single", "train2", "val2"),
}
GREYS, STEP = 25, 8  # a picture's grey tells its number, modulo 25


def write_videos(miniature: Miniature, scratch: Path) -> None:
    """A small video with sound (or none) at each path, as long as the miniature says."""
    made: dict[tuple[int, bool], Path] = {}
    for path, seconds in miniature.files.items():
        key = (int(np.ceil(seconds)), path in miniature.silent)
        if key not in made:
            frames = [np.full((48, 64, 3), 16 + STEP * (i % GREYS), np.uint8) for i in range(key[0] * 10)]
            sound = None if key[1] else "aac"
            made[key] = write_video(scratch / f"{key[0]}-{key[1]}.mp4", frames=frames, fps=10, audio_codec=sound)
        target = miniature.videos / path
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(made[key], target)


def expected_labels(row: Row, label_set: str, kind: str) -> set[int]:
    """Labels of an evaluation sample, from the annotation row; -1 stands for none where one is wanted."""
    if kind == "timed":
        return {action.label for action in row.actions}
    return set(row.labels.get(label_set, (-1,)))


def check_pictures(batch: Batch, dataset: StoreSplit, rows: dict[str, Row]) -> None:
    """Each clip lies in its row's span and shows the pictures of its times; `start_s` counts from the stored part."""
    assert batch.frames is not None
    greys = (batch.frames.float().mean((1, 3, 4)) * PIXEL_STD + PIXEL_MEAN) * 255
    index = pa.ipc.open_file(dataset.store.path / INDEX_NAME).read_all()
    for clip, (sample, start_s) in enumerate(zip(batch.sample.tolist(), batch.start_s, strict=True)):
        media = int(dataset.samples.media[sample])
        part, stored = index["source_start_s"][media].as_py(), int(dataset.media.num_frames[media])
        row = rows[batch.ids[clip]]
        if (
            row.end_s is not None and row.end_s - row.start_s > SPEC.at(10.0).span_s
        ):  # shorter ones borrow what lies around
            assert row.start_s - 0.05 <= part + start_s <= row.end_s - 0.9 + 0.05, row
        for t in range(SPEC.num_frames):
            number = min(max(round(start_s * 10) + t * SPEC.frame_stride, 0), stored - 1) + round(part * 10)
            assert abs(float(greys[clip, t]) - (16 + STEP * (number % GREYS))) < STEP / 2, (batch.ids[clip], t)


@pytest.mark.integration
@pytest.mark.parametrize("name", CASES)
def test_from_annotation_files_to_batches(tmp_path: Path, name: str) -> None:
    miniature = MINIATURES[name](tmp_path)
    (tmp_path / "scratch").mkdir()
    write_videos(miniature, tmp_path / "scratch")
    annotations = read(miniature.dataset, miniature.annotations, miniature.videos, miniature.options)
    assert Counter(row.split for row in annotations.rows) == Counter(miniature.rows)
    settings = TranscodeSettings(codec="vp9", short_side_px=48, clip_s=SPEC.at(10.0).span_s)
    report = ingest(annotations, miniature.videos, tmp_path / "store", settings, options=IngestOptions(workers=1))
    assert report.counts["refused"] == 0
    store = Store.open(tmp_path / "store")
    check_training(store, annotations, name)
    check_evaluation(store, annotations, name)


def check_training(store: Store, annotations: Annotations, name: str) -> None:
    """One epoch: each row once, its labels, frames and sound."""
    label_set, kind, split, _ = CASES[name]
    dataset = store.split(split)
    rows = {row.id: row for row in annotations.rows if row.split == split}
    config = replace(CONFIG, label_set=label_set, label_kind=kind)
    batch = next(TrainLoader(dataset, SPEC, config, LoaderOptions(len(rows)), seed=0).batches())
    assert sorted(batch.ids) == sorted(rows)
    assert batch.frames is not None
    assert batch.frames.shape == (len(rows), 3, 4, 32, 32)
    check_pictures(batch, dataset, rows)
    for index, sample in enumerate(batch.ids):
        if kind == "single":
            assert {int(batch.labels[index])} == expected_labels(rows[sample], label_set, kind)
        elif kind == "timed":
            begin, end = batch.start_s[index], batch.start_s[index] + 0.9
            wanted = {a.label for a in rows[sample].actions if a.start_s <= end and a.end_s >= begin}
            assert set(torch.nonzero(batch.labels[index]).flatten().tolist()) == wanted
    if annotations.dataset.startswith("ava"):
        assert batch.boxes is not None
        assert batch.box_labels is not None
        assert len(batch.boxes) == len(batch.box_labels) > 0
        assert float(batch.boxes[:, 1:].min()) >= 0
        assert float(batch.boxes[:, 1:].max()) <= 32


def check_evaluation(store: Store, annotations: Annotations, name: str) -> None:
    """Every view of every row once, with the labels of the whole sample; whole frames and key frames for AVA."""
    label_set, kind, _, split = CASES[name]
    dataset = store.split(split)
    rows = {row.id: row for row in annotations.rows if row.split == split}
    config = replace(CONFIG, label_set=label_set, label_kind=kind)
    ava = annotations.dataset.startswith("ava")
    views = ViewConfig(num_clips=1, num_crops=0, crop_size_px=48) if ava else ViewConfig(2, 3, 32)
    seen: Counter[str] = Counter()
    for batch in EvalLoader(dataset, SPEC, config, LoaderOptions(2), views=views):
        seen.update(batch.ids)
        assert batch.frames is not None
        assert batch.frames.shape[-2:] == ((48, 64) if ava else (32, 32))
        check_pictures(batch, dataset, rows)
        for index, sample in enumerate(batch.ids):
            if kind == "single":
                assert {int(batch.labels[index])} == expected_labels(rows[sample], label_set, kind)
            elif kind == "timed":
                assert set(torch.nonzero(batch.labels[index]).flatten().tolist()) == expected_labels(
                    rows[sample], label_set, kind
                )
        if ava:
            assert batch.boxes is not None
            for clip, x1, y1, x2, y2 in batch.boxes.tolist():
                boxes = [b for b in rows[batch.ids[int(clip)]].boxes if not b.labels]
                wanted = [(b.x1 * 64, b.y1 * 48, b.x2 * 64, b.y2 * 48) for b in boxes]
                assert min(max(abs(a - b) for a, b in zip((x1, y1, x2, y2), box, strict=True)) for box in wanted) < 0.01
    assert seen == Counter(dict.fromkeys(rows, 1 if ava else 6))
