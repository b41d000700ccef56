"""Batches are, bit for bit, those that were recorded when the clip path was last rewritten: same seeds, same clips.

The recorded digests hold for the stores whose bytes they were made from, so these digests are checked first: another
build of the VP9 encoder gives other bytes, and then what a plan says is compared and the rest is skipped by name.
"""

from collections.abc import Callable, Iterable
from dataclasses import replace
from itertools import islice
from pathlib import Path

import pytest
import torch

from pipeline.batch import Batch
from pipeline.clip import ClipSpec, CropWindow
from pipeline.config import DataConfig, ViewConfig
from pipeline.loader import EvalLoader, LoaderOptions, TrainLoader
from pipeline.plan import NegativeSchedule, TrainPlan
from pipeline.store.reader import Store, StoreSplit
from tests.pipeline.support.recorded import damage, digest, make_store

pytestmark = pytest.mark.integration  # whole models or pipelines run

SPEC = ClipSpec(num_frames=8, frame_stride=2, num_mel_frames=32, num_mel_bins=40)
# Recorded of the graph: the fused operation is compared with it in frames/test_maker.py.
CONFIG = DataConfig(
    crop_size_px=48, jitter_min_px=56, jitter_max_px=72, num_threads=2, max_quarantined_share=1.0, frames="graph"
)
CURRICULUM = NegativeSchedule(enabled=True, hard_from_position=6, hard_share=0.5)
STORE = "4591343c70bcbb54a89361eabfd28b6b5a385be50652b33c5279d981fdf9544f"
BOXES = "7cb4bfe291e622ab8c3a01d7b371cbd333198f358527c29b3e9dddb6b981a912"


@pytest.fixture(scope="module")
def stores(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Store]:
    """A store, one with boxes, and one with a damaged video."""
    folder = tmp_path_factory.mktemp("recorded")
    found = {name: make_store(folder / name, key_frames=name == "boxes") for name in ("plain", "boxes", "damaged")}
    if (found["plain"].digest, found["boxes"].digest) != (STORE, BOXES):
        pytest.skip("this build of the encoders writes other bytes than those that were recorded")
    damage(folder / "damaged", media=2)
    return found | {"damaged": Store.open(folder / "damaged")}


def train(
    split: StoreSplit,
    config: DataConfig,
    options: LoaderOptions,
    start: int = 0,
    negatives: NegativeSchedule | None = None,
) -> list[Batch]:
    """Three batches of the training split."""
    loader = TrainLoader(split, SPEC, config, options, seed=7, negatives=negatives)
    batches = loader.batches(start)
    found = list(islice(batches, 3))
    batches.close()
    return found


def evaluate(split: StoreSplit, config: DataConfig, clips: int, views: ViewConfig) -> Iterable[Batch]:
    """All batches of an evaluation."""
    return EvalLoader(split, SPEC, config, LoaderOptions(clips), views=views)


def boxes_views(clips: int, crops: int) -> ViewConfig:
    """Views of 64 px with the labelled boxes."""
    return ViewConfig(clips, crops, 64, boxes="ground_truth")


def changed(**keys: object) -> DataConfig:
    """The configuration of these tests with other values."""
    return replace(CONFIG, **keys)  # type: ignore[arg-type]


Case = Callable[[dict[str, StoreSplit]], Iterable[Batch]]
CASES: dict[str, tuple[Case, tuple[str, ...]]] = {
    "train, negatives": (
        lambda s: train(s["plain"], CONFIG, LoaderOptions(6), negatives=CURRICULUM),
        ("f6af031b2386f6c3", "b42c7e667314c63c", "04dcf2f03557eb67"),
    ),
    "train, pyav, by shard": (
        lambda s: train(
            s["plain"], changed(decoder="cpu", shuffle="shard", shuffle_shards=1), LoaderOptions(4), start=5
        ),
        ("ad5221c4dafce353", "54402843e8531a81", "960f950e46f5cbce"),
    ),
    "train, rotation, timed": (
        lambda s: train(s["plain"], changed(rotation=True, label_kind="timed"), LoaderOptions(6, num_classes=5)),
        ("db640028d402d33c", "55d42d9efe2a98b1", "e8fa9e925042a837"),
    ),
    "train, half, multi-hot, second rank": (
        lambda s: train(
            s["plain"],
            changed(label_kind="multi_hot", label_set="verb", target_fps=25.0),
            LoaderOptions(3, dtype=torch.float16, rank=1, world_size=2),
        ),
        ("2e7465c6c80ee383", "a9b3c7c3b2de8014", "a4f469a774aec4c1"),
    ),
    "evaluation, 3 x 3": (
        lambda s: evaluate(s["plain"], CONFIG, 4, ViewConfig(3, 3, 64)),
        ("dc11d2d4b93d6a74", "bae19c9d7e4060be", "da3ccb47ed320a97", "3b350851c92e2299", "792f610dfb9e5a63"),
    ),
    "evaluation, timed": (
        lambda s: evaluate(s["plain"], changed(label_kind="timed"), 4, ViewConfig(2, 1, 64, "pyslowfast")),
        ("05985fca15bb1422", "b19f22f1df9276b4", "07cf683828e7f5f7"),
    ),
    "boxes, train": (
        lambda s: train(s["boxes"], changed(label_kind="boxes", rotation=True), LoaderOptions(6)),
        ("ed90895fc7e3e0e7", "049199361a53527e", "308cdf295d55c673"),
    ),
    "evaluation, boxes, whole frames": (
        lambda s: evaluate(s["boxes"], changed(label_kind="boxes", rotation=True), 4, boxes_views(10, 0)),
        ("ac9db6ce14207a9e", "1b4a9cdf45c4f5e3"),
    ),
    "evaluation, boxes, 3 crops": (
        lambda s: evaluate(s["boxes"], changed(label_kind="boxes", rotation=True), 4, boxes_views(1, 3)),
        ("99160a19b0f60503", "c5de3ad4f91b095b"),
    ),
    "train, one damaged": (
        lambda s: train(s["damaged"], CONFIG, LoaderOptions(6)),
        ("0f932b13957c42ae", "8a71207afdc16616", "907f729d13a9f744"),
    ),
    "evaluation, one damaged": (
        lambda s: evaluate(s["damaged"], CONFIG, 4, ViewConfig(2, 1, 64)),
        ("541306d906d18f4d", "46458b0ee3138d1d", "2c16f80bafeda857"),
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_batches_are_those_recorded(stores: dict[str, Store], name: str) -> None:
    make, recorded = CASES[name]
    splits = {kind: store.split("val" if "evaluation" in name else "train") for kind, store in stores.items()}
    assert tuple(map(digest, make(splits))) == recorded


def test_a_plan_is_the_one_recorded(tmp_path: Path) -> None:
    split = make_store(tmp_path / "s", key_frames=True).split("train")
    clip = TrainPlan(split, SPEC, CONFIG, 7, CURRICULUM).clip(11)
    assert (clip.sample, clip.id, clip.media, clip.epoch) == (5, "s5", 5, 1)
    assert (clip.start_s, clip.end_s) == (1.72, 2.1866666666666665)
    assert clip.frames == (43, 44, 46, 48, 49, 51, 53, 54)
    assert (clip.audio_start, clip.negative_media, clip.negative_start) == (27563, 4, 31255)
    assert clip.crops == (CropWindow(15.858920679933632, 14.192561652313891, 79.44827586206898, 79.44827586206897),)
    assert (clip.size_px, clip.flip, clip.rotation, clip.view, clip.substitute_for) == ((48, 48), True, 0, 0, -1)
