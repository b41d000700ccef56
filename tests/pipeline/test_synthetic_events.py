"""Events seen and heard in step: how much of synchronization can be answered, and that nothing else tells it."""

from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from pipeline.graph import LOG_MEL_STD
from pipeline.store.reader import Store
from pipeline.store.verify import verify_store
from pipeline.synthetic import resolve
from pipeline.synthetic.events import (
    HOLD_S,
    RAMP_S,
    TILTS,
    EventSpec,
    ensure_event_store,
    event_pictures,
    event_sound,
    levels,
)

SMALL = EventSpec(train_videos=8, val_videos=4, num_frames=48)
APART = replace(SMALL, together=False)
CLIP_FRAMES, AWAY_FRAMES = 32, 15  # of experiments/configs/events_ssl.yaml; 0.5 s


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    """A small set."""
    return Store.open(ensure_event_store(tmp_path_factory.mktemp("data"), SMALL))


def seen(spec: EventSpec, video: int) -> NDArray[np.float64]:
    """Brightness of each frame."""
    return np.asarray(event_pictures(spec, video).astype(float).mean((1, 2, 3)))


def heard(spec: EventSpec, video: int) -> NDArray[np.float64]:
    """Logarithm of the sound's energy in the time of each frame."""
    sound = event_sound(spec, video).astype(float)
    edges = np.arange(spec.num_frames + 1) * 16_000 // spec.fps
    return np.log([np.square(sound[a:b]).mean() for a, b in pairwise(edges)])


def told_by_amount(spec: EventSpec, videos: int) -> float:
    """Share of hard negatives that one line from the loudness to the brightness of a window tells apart."""
    rng = np.random.default_rng(0)
    light, right, wrong = [], [], []
    for video in range(videos):
        brightness, loudness = seen(spec, video), heard(spec, video)
        for start in (0, spec.num_frames - CLIP_FRAMES):
            others = [s for s in range(spec.num_frames - CLIP_FRAMES + 1) if abs(s - start) >= AWAY_FRAMES]
            light.append(brightness[start : start + CLIP_FRAMES].mean())
            right.append(loudness[start : start + CLIP_FRAMES].mean())
            wrong.append(loudness[(other := int(rng.choice(others))) : other + CLIP_FRAMES].mean())
    line = np.polyfit(right, light, 1)
    near, far = (np.abs(np.polyval(line, sound) - light) for sound in (right, wrong))
    return float((near < far).mean())


def test_the_amount_of_light_tells_hard_negatives_together_and_not_apart() -> None:
    """97.8 % of the 320 questions of an evaluation; here 96 of them, and a coin's deviation is 5 points."""
    assert told_by_amount(EventSpec(), 48) > 0.93
    assert 0.35 < told_by_amount(EventSpec(together=False), 48) < 0.65


def test_a_constant_level_is_not_taken_for_silence() -> None:
    """The loss leaves out log-mels whose variance is 0.01 or less; the hiss has more over its frequencies alone."""
    sound = event_sound(SMALL, 0)[:8192].astype(float) / 32768
    power = np.square(np.abs(np.fft.rfft(sound.reshape(16, 512) * np.hanning(512)))).mean(0)
    bands = np.log([band.mean() for band in np.array_split(power, 16)]) / LOG_MEL_STD
    assert bands.var() > 0.02


def test_lamp_and_sound_are_in_step_or_apart() -> None:
    def likeness(spec: EventSpec) -> float:
        return float(np.mean([np.corrcoef(seen(spec, video), heard(spec, video))[0, 1] for video in range(40)]))

    assert likeness(SMALL) > 0.97
    assert abs(likeness(APART)) < 0.3


def test_levels_change_at_times_of_their_own() -> None:
    """All levels are there at any time of a video, and changes lie anywhere between two frames."""
    spec, time_s = EventSpec(), np.arange(0, 3.2, 0.001)
    found = np.array([levels(spec, video, time_s) for video in range(400)])
    assert found.min() >= 0
    assert found.max() <= 1
    for moment in (0, 1600, 3199):  # as likely at the beginning as at the end
        assert np.histogram(found[:, moment], 4, (0, 1))[0].min() > 50
        assert abs(found[:, moment].mean() - 0.5) < 0.06
    changing = np.abs(np.diff(found, axis=1)) > 1e-9
    assert changing.mean() == pytest.approx(RAMP_S / np.mean(HOLD_S), rel=0.1)
    begins = (np.nonzero(changing[:, 1:] & ~changing[:, :-1])[1] + 1) * 0.001 * spec.fps % 1
    assert np.abs(np.histogram(begins, 4, (0, 1))[0] / len(begins) - 0.25).max() < 0.05


def test_the_label_is_the_tilt_of_a_horizon_over_rough_ground(store: Store) -> None:
    samples = store.split("val").samples
    assert [samples.label_of(i, "action") for i in range(len(samples))] == [0, 1, 2, 3]
    assert store.split("val").classes["action"] == tuple(TILTS)
    down, right = np.mgrid[0:32, 0:32] - 15.5
    found, up = [], []
    for video in range(40):
        picture = event_pictures(SMALL, video)[0].astype(float).mean(-1)
        rough = np.abs(np.diff(picture, axis=1))[:, 1:]
        fits = []
        for degrees in TILTS.values():
            below = (down * np.cos(np.radians(degrees)) - right * np.sin(np.radians(degrees)) > 0)[:, 2:]
            fits.append(rough[below].mean() - rough[~below].mean())
        found.append(int(np.argmax(fits)) == video % 4)
        up.append(rough[16:].mean() > 2 * rough[:16].mean())
    assert np.mean(up) > 0.95
    assert np.mean(found) > 0.6  # chance: 0.25; the horizon is not in the middle


def test_no_mean_tells_which_way_is_up() -> None:
    """Sky and ground, and the four sides, are equally bright on average."""
    pictures = np.stack([event_pictures(SMALL, video)[0] for video in range(200)]).astype(float)
    centred = pictures.mean(-1) - pictures.mean((1, 2, 3))[:, None, None]
    sides = [centred[:, :16], centred[:, 16:], centred[:, :, :16], centred[:, :, 16:]]
    assert np.abs([side.mean() for side in sides]).max() < 0.7  # of 110 that the lamp adds


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
    with pytest.raises(ValueError, match=r"videos \(6\) must be a positive multiple of the 4 labels"):
        ensure_event_store(tmp_path, EventSpec(val_videos=6))
    with pytest.raises(ValueError, match="synthetic:events-apart"):
        resolve("synthetic:event")
