"""Events that are seen and heard: at the same times, equally strong, and neither alone tells what belongs together."""

from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from pipeline.store.reader import Store
from pipeline.store.verify import verify_store
from pipeline.synthetic import resolve
from pipeline.synthetic.events import (
    OFF_S,
    ON_S,
    SLANTS,
    EventSpec,
    ensure_event_store,
    event_pictures,
    event_sound,
    events,
    lit,
)

SMALL = EventSpec(train_videos=8, val_videos=4, num_frames=48)
APART = replace(SMALL, together=False)


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    """A small set."""
    return Store.open(ensure_event_store(tmp_path_factory.mktemp("data"), SMALL))


def seen(spec: EventSpec, video: int) -> np.ndarray:
    """Brightness of each frame above the darkest one."""
    light = event_pictures(spec, video).astype(float).mean((1, 2, 3))
    return np.asarray(light - light.min())


def heard(spec: EventSpec, video: int) -> np.ndarray:
    """Energy of the sound in the time of each frame."""
    sound = event_sound(spec, video).astype(float)
    edges = np.arange(spec.num_frames + 1) * 16_000 // spec.fps
    return np.array([np.square(sound[a:b]).mean() for a, b in pairwise(edges)])


def test_light_and_sound_come_together_or_apart() -> None:
    def likeness(spec: EventSpec) -> float:
        found = [np.corrcoef(seen(spec, video), np.log(heard(spec, video)))[0, 1] for video in range(12)]
        return float(np.mean(found))

    assert likeness(SMALL) > 0.9
    assert abs(likeness(APART)) < 0.3


def test_events_are_off_the_frames_grid_and_differ_within_a_video() -> None:
    """Phases of beginnings within a frame are uniform, and two windows of a video have different shares of light."""
    spec = EventSpec()
    phases, differences = [], []
    for video in range(200):
        spans = events(spec, video)
        on, off = spans[:, 1] - spans[:, 0], spans[1:, 0] - spans[:-1, 1]
        assert on.min() >= ON_S[0]
        assert on.max() <= ON_S[1]
        assert off.min() >= OFF_S[0] - 1e-9
        assert off.max() <= OFF_S[1] + 1e-9
        assert spans[0, 0] < 0
        assert spans[-1, 1] + OFF_S[1] > spec.duration_s
        phases += (spans[:, 0] * spec.fps % 1).tolist()
        light = lit(np.arange(3.0), 1.0, spans)
        differences += np.abs(np.diff(light)).tolist()
    quarters = np.histogram(phases, 4, (0, 1))[0] / len(phases)
    assert np.abs(quarters - 0.25).max() < 0.04
    assert np.median(differences) > 0.15


def test_labels_are_the_slant_of_the_fall(store: Store) -> None:
    samples = store.split("val").samples
    assert [samples.label_of(i, "action") for i in range(len(samples))] == [0, 1, 0, 1]
    assert store.split("val").classes["action"] == SLANTS
    for video in range(8):  # over 24 frames: 11 to 18 px down, 4 to 7 px aside
        frames = event_pictures(SMALL, video).astype(float).mean(-1)
        first, last = (frame - frame.mean() for frame in (frames[0], frames[24]))
        shifts = [(down, right) for down in range(8, 20) for right in range(-9, 10)]
        found = min(shifts, key=lambda shift: np.abs(np.roll(first, shift, (0, 1)) - last).mean())
        assert (found[1] > 0) == bool(video % 2), (video, found)
        assert abs(found[1]) < found[0] / 2


def test_made_again_it_is_the_same_and_the_splits_share_nothing(tmp_path: Path, store: Store) -> None:
    again = Store.open(ensure_event_store(tmp_path, SMALL))
    assert again.digest == store.digest
    assert verify_store(store.path) == []
    cuts = [
        store.split(split).read_video(int(media), 0, 47).data.tobytes()
        for split in ("train", "val")
        for media in store.split(split).samples.media
    ]
    assert len(set(cuts)) == 12


def test_bad_specs_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"videos \(5\) must be a positive multiple of the 2 labels"):
        ensure_event_store(tmp_path, EventSpec(val_videos=5))
    with pytest.raises(ValueError, match="synthetic:events-apart"):
        resolve("synthetic:event")
