"""The synthetic data set: a full factorial in which neither modality says anything about the label."""

from collections import Counter
from dataclasses import replace
from itertools import product
from pathlib import Path

import numpy as np
import pytest

from pipeline.store.reader import Store
from pipeline.store.verify import verify_store
from pipeline.synthetic import SyntheticSpec, ensure_store, resolve
from pipeline.synthetic.factorial import LOOKS, SOUNDS, SOUNDS_A_VIDEO, sound_stream, video_stream

SMALL = SyntheticSpec(train_streams=8, val_streams=4, num_frames=24, size_px=32)


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    """A small set."""
    return Store.open(ensure_store(tmp_path_factory.mktemp("data"), SMALL))


def test_every_video_comes_with_every_sound(store: Store) -> None:
    for split, streams in (("train", 8), ("val", 4)):
        samples = store.split(split).samples
        names = [samples.id(i).split("-") for i in range(len(samples))]
        pairs = Counter((name[1], name[3]) for name in names)
        assert pairs == Counter(product({n[1] for n in names}, {n[3] for n in names}))
        assert len(samples) == streams**2


def test_each_modality_alone_says_nothing(store: Store) -> None:
    """Knowing the stream of one modality, every label is equally frequent; knowing both kinds, there is one."""
    samples = store.split("val").samples
    labels = [samples.label_of(i, "action") for i in range(len(samples))]
    names = [samples.id(i).split("-") for i in range(len(samples))]
    for column in (1, 3):
        for stream in {name[column] for name in names}:
            counts = Counter(label for label, name in zip(labels, names, strict=True) if name[column] == stream)
            assert set(counts.values()) == {2}
            assert set(counts) == {0, 1}
    rule = {(name[2], name[4], label) for label, name in zip(labels, names, strict=True)}
    assert len(rule) == 4
    assert len({(direction, sound) for direction, sound, _ in rule}) == 4


def test_splits_share_no_stream(store: Store) -> None:
    def streams(split: str) -> set[bytes]:
        data = store.split(split)
        return {data.read_video(int(media), 0, 23).data.tobytes() for media in data.samples.media}

    train, val = streams("train"), streams("val")
    assert (len(train), len(val)) == (8, 4)
    assert not train & val


def test_made_again_it_is_the_same(tmp_path: Path, store: Store) -> None:
    again = Store.open(ensure_store(tmp_path, SMALL))
    assert again.digest == store.digest
    assert verify_store(store.path) == []


def test_videos_drift_the_way_their_name_says() -> None:
    for stream, shift in ((0, (0, 1)), (1, (1, 0))):
        frames = video_stream(SMALL, stream).astype(float).mean(-1)
        rolled = [np.roll(frames[0], (shift[0] * d, shift[1] * d), (0, 1)) for d in range(12)]
        assert 3 <= int(np.argmin([np.abs(frame - frames[10]).mean() for frame in rolled])) <= 8


def test_sounds_differ_in_kind_and_have_the_length_of_the_video() -> None:
    hum, clicks = (sound_stream(SMALL, stream).astype(float) for stream in range(2))
    assert len(hum) == len(clicks) == 16_000 * 24 // 30

    def kurtosis(x: np.ndarray) -> float:
        return float(((x - x.mean()) ** 4).mean() / x.var() ** 2)

    assert kurtosis(hum) < 4 < kurtosis(clicks)


def test_sound_is_a_cue_that_misleads_in_a_share_of_the_clips(tmp_path: Path) -> None:
    spec = replace(SMALL, train_streams=24, val_streams=20, rule="sight", agreement=(0.8, 0.5))
    data = Store.open(ensure_store(tmp_path, spec))
    for split, streams, agreeing in (("train", 24, 8), ("val", 20, 5)):
        samples = data.split(split).samples
        names = [samples.id(i).split("-") for i in range(len(samples))]
        assert len(names) == streams * SOUNDS_A_VIDEO
        for stream in {name[1] for name in names}:
            own = [name for name in names if name[1] == stream]
            assert sum(LOOKS.index(name[2]) == SOUNDS.index(name[4]) for name in own) == agreeing
        labels = [samples.label_of(i, "action") for i in range(len(samples))]
        assert labels == [LOOKS.index(name[2]) for name in names]
    assert spec.name.endswith("-sight0.8-0.5")
    for stream in range(6):  # an upright texture changes more sideways
        frame = video_stream(spec, stream)[0].astype(float).mean(-1)
        sideways, down = (np.abs(np.diff(frame, axis=axis)).mean() for axis in (1, 0))
        assert (sideways > down) == (LOOKS[stream % 2] == "upright")
    with pytest.raises(ValueError, match=r"streams \(4\) at least 20 for rule sight"):
        ensure_store(tmp_path, replace(SMALL, rule="sight"))


def test_bad_specs_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="multiple of num_classes"):
        ensure_store(tmp_path, SyntheticSpec(train_streams=7))
    with pytest.raises(ValueError, match="must be 2 to 4"):
        ensure_store(tmp_path, SyntheticSpec(num_classes=5))
    with pytest.raises(ValueError, match="synthetic:nothing"):
        resolve("synthetic:nothing")
    assert resolve("some/store") == "some/store"
