"""Events that are seen and heard: at the same times, equally strong, and neither alone tells what belongs together."""

from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from pipeline.store.reader import Store
from pipeline.store.verify import verify_store
from pipeline.synthetic import resolve
from pipeline.synthetic.events import GAP_S, SLANTS, EventSpec, ensure_event_store, event_pictures, event_sound, events

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


def rises(values: np.ndarray) -> np.ndarray:
    """By how much each value is above the one before."""
    return np.maximum(np.diff(values, prepend=values[:1]), 0)


def test_flashes_and_clicks_come_together_or_apart() -> None:
    def likeness(spec: EventSpec) -> float:
        found = []
        for video in range(12):  # a flash shows on the first frame at or after its event, a click sounds from it on
            light, sound = rises(seen(spec, video)), np.sqrt(rises(heard(spec, video)))
            found.append(np.corrcoef(light[1:], sound[:-1] + sound[1:])[0, 1])
        return float(np.mean(found))

    assert likeness(SMALL) > 0.6
    assert abs(likeness(APART)) < 0.2


def test_events_are_off_the_frames_grid_and_differ_within_a_video() -> None:
    """Phases of clicks within a frame are uniform, and numbers of events of two windows differ."""
    spec = EventSpec()
    phases, differ = [], 0
    for video in range(200):
        times, strengths = events(spec, video)
        assert (np.diff(times) >= 0.8 * GAP_S[0]).all()
        assert (strengths > 0.2).all()
        assert times[0] < 0 < spec.duration_s - times[-1]
        phases += (times * spec.fps % 1).tolist()
        counts = [int(((times >= start) & (times < start + 1)).sum()) for start in (0.0, 1.0, 2.0)]
        differ += len(set(counts)) > 1
    quarters = np.histogram(phases, 4, (0, 1))[0] / len(phases)
    assert np.abs(quarters - 0.25).max() < 0.04
    assert differ > 150


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
