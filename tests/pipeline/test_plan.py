"""Plans: each epoch holds every sample once, nothing depends on rank or history, windows obey their rules."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from fractions import Fraction
from itertools import islice
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.clip import ClipPlan, ClipSpec, CropWindow
from pipeline.config import DataConfig, ViewConfig
from pipeline.dataset import MediaTable, SampleTable, source_video
from pipeline.labels import to_input_pixels
from pipeline.loader import LoaderOptions, TrainLoader
from pipeline.plan import EvalPlan, NegativeSchedule, TrainPlan
from pipeline.windows import clip_frames, start_range, view_starts, view_windows
from tests.pipeline.support.stores import noise, numbered_frames, write_store

SPEC = ClipSpec(num_frames=8, frame_stride=2, num_mel_frames=32, num_mel_bins=40)
CONFIG = DataConfig(crop_size_px=64, jitter_min_px=64, jitter_max_px=96)
TIMES = SPEC.at(CONFIG.target_fps)


def fake_dataset(
    num_media: int,
    *,
    frames: int = 150,
    per_medium: int = 1,
    fps: Fraction = Fraction(30),
    sound_begins: int = 0,
    sound_ends: int | None = None,
    sounds: Sequence[tuple[int, int]] = (),
) -> Any:
    """Tables without bytes: `per_medium` samples on each of `num_media` media, three media a source video.

    The sound of medium i is from sample `sounds[i][0]` to `sounds[i][1]`; without them all have the same.
    """
    num_samples = round(frames / fps * 16_000) if sound_ends is None else sound_ends
    sounds = sounds or [(sound_begins, num_samples)] * num_media
    full = np.full(num_media, 1, np.int32)
    media = MediaTable(
        ids=[f"m{i}" for i in range(num_media)],
        num_frames=full * frames,
        fps_num=full * fps.numerator,
        fps_den=full * fps.denominator,
        width=full * 128,
        height=full * 64,
        display_width=full * 120,
        display_height=full * 64,
        num_samples=np.array([end for _, end in sounds], np.int64),
        flags=np.zeros(num_media, np.uint32),
        shard=np.arange(num_media, dtype=np.int32) // 4,
    )
    total = num_media * per_medium
    samples = SampleTable(
        ids=[f"s{i}" for i in range(total)],
        media=np.repeat(np.arange(num_media, dtype=np.int64), per_medium),
        start_s=np.zeros(total),
        end_s=np.full(total, float(frames / fps)),
        key_time_s=np.full(total, np.nan),
        label_sets={},
    )
    return SimpleNamespace(
        media=media,
        samples=samples,
        split="train",
        decoders=("cpu", "dali"),
        video_codec="vp9",
        same_video=lambda a, b: a // 3 == b // 3,
        sound_range=lambda media: sounds[media] if sounds[media][0] < sounds[media][1] else (0, 0),
    )


@settings(max_examples=25, deadline=None)
@given(
    samples=st.integers(1, 60),
    clips=st.integers(1, 7),
    world=st.integers(1, 5),
    shuffle=st.sampled_from(["full", "shard"]),
    seed=st.integers(0, 2**32),
)
def test_every_epoch_yields_each_sample_once_for_any_world_size(
    samples: int, clips: int, world: int, shuffle: str, seed: int
) -> None:
    dataset, config = fake_dataset(samples), replace(CONFIG, shuffle=shuffle, shuffle_shards=2)
    steps = -(-2 * samples // (clips * world))  # two epochs, the last step may reach into the third

    def plans(
        _: TrainLoader, batches: Iterator[range], planner: TrainPlan, **kinds: object
    ) -> Iterator[list[ClipPlan]]:
        return ([planner.clip(position) for position in batch] for batch in batches)

    with patch.object(TrainLoader, "_run", plans):  # what the loader plans, without reading it
        ranks = [
            islice(TrainLoader(dataset, SPEC, config, options, seed=seed).batches(), steps)
            for options in (LoaderOptions(clips, rank=rank, world_size=world) for rank in range(world))
        ]
        stream = [clip.sample for step in zip(*ranks, strict=True) for part in step for clip in part]
    assert sorted(stream[:samples]) == list(range(samples))
    assert sorted(stream[samples : 2 * samples]) == list(range(samples))


@settings(max_examples=12, deadline=None)
@given(samples=st.integers(2, 40), start=st.integers(0, 60), seed=st.integers(0, 2**32))
def test_a_plan_depends_on_position_alone(samples: int, start: int, seed: int) -> None:
    negatives = NegativeSchedule(enabled=True, hard_from_position=20, hard_share=0.5)
    walked = TrainPlan(fake_dataset(samples), SPEC, CONFIG, seed, negatives)
    jumped = TrainPlan(fake_dataset(samples), SPEC, CONFIG, seed, negatives)
    history = [walked.clip(position) for position in range(start + 5)]
    assert [jumped.clip(position) for position in range(start, start + 5)] == history[start:]
    assert jumped.substitute(start, 1) == walked.substitute(start, 1)
    assert jumped.substitute(start, 0).substitute_for == history[start].sample


def test_shard_shuffle_reads_a_few_shards_at_a_time() -> None:
    plan = TrainPlan(fake_dataset(64), SPEC, replace(CONFIG, shuffle="shard", shuffle_shards=2), seed=0)
    shards = plan.order(0) // 4  # 16 shards of 4 samples, two mixed at a time
    for begin in range(0, 64, 8):
        assert len(set(shards[begin : begin + 8].tolist())) == 2
    assert not np.array_equal(plan.order(0), plan.order(1))


@settings(max_examples=60, deadline=None)
@given(
    frames=st.integers(20, 400),
    begins=st.integers(0, 120_000),
    ends=st.one_of(st.none(), st.integers(0, 200_000)),
    seed=st.integers(0, 2**32),
    hard=st.booleans(),
)
def test_negatives_keep_their_distance_and_are_sound(
    frames: int, begins: int, ends: int | None, seed: int, hard: bool
) -> None:
    negatives = NegativeSchedule(enabled=True, hard_from_position=0, hard_share=1.0 if hard else 0.0)
    data = fake_dataset(9, frames=frames, sound_begins=begins, sound_ends=ends)
    plan = TrainPlan(data, SPEC, CONFIG, seed, negatives)
    first, end = data.sound_range(0)
    for position in range(9):
        clip = plan.clip(position)
        begin, stop = clip.negative_start, clip.negative_start + SPEC.num_audio_samples
        if clip.negative_media == clip.media:
            assert hard
            assert abs(begin - clip.audio_start) >= 8000
            assert first <= begin < stop <= end
        elif clip.negative_media >= 0:
            assert not data.same_video(clip.negative_media, clip.media)
            if end - first >= SPEC.num_audio_samples:
                assert first <= begin < stop <= end
            else:
                assert begin <= first < end <= stop
        else:
            assert first == end == 0


COUNT = SPEC.num_audio_samples
LAST = 80_000
TRACKS = [(0, 0), (0, 1), (0, COUNT // 2), (500, COUNT + 400), (0, COUNT), (9000, LAST), (0, LAST), (79_000, LAST)]


@settings(max_examples=60, deadline=None)
@given(
    sounds=st.lists(st.sampled_from(TRACKS), min_size=9, max_size=9),
    seed=st.integers(0, 2**32),
    share=st.sampled_from([0.0, 0.5, 1.0]),
)
def test_negatives_among_silent_short_and_full_tracks(sounds: list[tuple[int, int]], seed: int, share: float) -> None:
    data = fake_dataset(9, sounds=sounds)
    plan = TrainPlan(data, SPEC, CONFIG, seed, NegativeSchedule(enabled=True, hard_share=share))
    for position in range(9):
        clip = plan.clip(position)
        if clip.negative_media < 0:  # 32 draws among 9 media find one of three
            assert sum(data.sound_range(i)[1] > 0 for i in range(9) if not data.same_video(i, clip.media)) < 3
            continue
        first, end = sounds[clip.negative_media]
        begin, stop = clip.negative_start, clip.negative_start + COUNT
        assert first < end
        assert first <= begin < stop <= end if end - first >= COUNT else begin <= first < end <= stop
        assert clip.negative_media >= 0
        if clip.negative_media == clip.media:
            assert abs(begin - clip.audio_start) >= 8000
            assert end - first >= COUNT
        else:
            assert not data.same_video(clip.negative_media, clip.media)


def test_a_video_with_little_late_sound_gives_that() -> None:
    sound = (32_000, 32_000 + SPEC.num_audio_samples + 10)
    data = fake_dataset(9, frames=3000, sound_begins=sound[0], sound_ends=sound[1])
    plan = TrainPlan(data, SPEC, CONFIG, 0, NegativeSchedule(enabled=True))
    assert {plan.clip(position).negative_start for position in range(90)} == set(range(32_000, 32_011))


def test_easy_negatives_come_from_their_samples_segment() -> None:
    data = fake_dataset(9, frames=3000, per_medium=2)
    count = SPEC.num_audio_samples
    data.samples.start_s[:], data.samples.end_s[:] = 20.0, 30.0
    plan = TrainPlan(data, SPEC, CONFIG, 0, NegativeSchedule(enabled=True))
    starts = [plan.clip(position).negative_start for position in range(180)]
    assert 320_000 <= min(starts) < 330_000
    assert 480_000 - count >= max(starts) > 470_000 - count
    data.samples.end_s[:] = 20.1  # shorter than the window, which is centred on it
    plan = TrainPlan(data, SPEC, CONFIG, 0, NegativeSchedule(enabled=True))
    assert {plan.clip(position).negative_start for position in range(20)} == {(320_000 + 321_600 - count) // 2}


def test_curriculum_turns_hard_at_its_position() -> None:
    negatives = NegativeSchedule(enabled=True, hard_from_position=400, hard_share=0.25)
    plan = TrainPlan(fake_dataset(30, frames=300), SPEC, CONFIG, 0, negatives)
    clips = [plan.clip(position) for position in range(1300)]
    hard = [clip.negative_media == clip.media for clip in clips]
    assert sum(hard[:400]) == 0
    assert 0.2 <= np.mean(hard[400:]) <= 0.3


def test_an_easy_negative_needs_another_video() -> None:
    plan = TrainPlan(fake_dataset(3), SPEC, CONFIG, 0, NegativeSchedule(enabled=True))
    assert plan.clip(0).negative_media == -1


@settings(max_examples=100, deadline=None)
@given(
    frames=st.integers(1, 300),
    begin=st.floats(0, 8),
    length=st.floats(0.01, 8),
    fps=st.sampled_from([Fraction(10), Fraction(25), Fraction(30000, 1001), Fraction(60)]),
)
def test_clips_stay_inside_their_segment_or_are_centred_on_it(
    frames: int, begin: float, length: float, fps: Fraction
) -> None:
    table = fake_dataset(1, frames=frames, fps=fps).media
    low, high = start_range(table, 0, (begin, begin + length), TIMES)
    span = math.ceil(TIMES.span_s * float(fps) - 1e-6)
    first, stop = math.floor(begin * float(fps) + 1e-6), math.ceil((begin + length) * float(fps) - 1e-6)
    assert 0 <= low <= high
    if high > low:
        assert first <= low
        assert high + span <= min(stop, frames)
    numbers = clip_frames(table, 0, low, TIMES)
    assert len(numbers) == SPEC.num_frames
    assert list(numbers) == sorted(numbers)
    assert numbers[0] >= 0
    assert numbers[-1] < frames
    if frames >= span:  # a segment shorter than the clip borrows context evenly, unless the medium ends
        middle, wanted = low + span / 2, (min(first, frames - 1) + min(max(stop, first + 1), frames)) / 2
        if stop - first < span and 0 < low < frames - span:
            assert abs(middle - wanted) <= 1


@pytest.mark.parametrize(
    ("rule", "expected"),
    [("ends", [0, 11, 22, 33, 44, 56, 67, 78, 89, 100]), ("pyslowfast", list(range(0, 100, 10))),
     ("offset", list(range(0, 100, 11)))],
)  # fmt: skip
def test_clip_start_rules(rule: str, expected: list[int]) -> None:
    assert view_starts(0, 100, 10, rule) == expected
    assert view_starts(40, 50, 1, rule) == [45]


def test_three_crops_cover_the_longer_side() -> None:
    table = fake_dataset(1).media  # stored 128 x 64, shown 120 x 64
    windows, size = view_windows(table, 0, 3, 32)
    assert size == (32, 32)
    assert [round(w.left, 6) for w in windows] == [0.0, round((60 - 32) / 2 * 128 / 60, 6), round(28 * 128 / 60, 6)]
    assert all(w.top == 0.0 and w.height == 64.0 for w in windows)
    assert windows[2].left + windows[2].width == pytest.approx(128)
    whole, size = view_windows(table, 0, 0, 256)
    assert size == (256, 480)
    assert (whole[0].width, whole[0].height) == (128.0, 64.0)


def test_evaluation_covers_every_view_once_and_is_the_same_every_time() -> None:
    data = fake_dataset(5, per_medium=2)
    plan = EvalPlan(data, SPEC, CONFIG, ViewConfig(num_clips=4, num_crops=3, crop_size_px=64))
    clips = [plan.clip(position) for position in range(plan.num_positions)]
    assert [(clip.sample, clip.view) for clip in clips] == [(s, v) for s in range(10) for v in range(4)]
    assert all(len(clip.crops) == 3 and not clip.flip and clip.substitute_for == -1 for clip in clips)
    assert [plan.clip(position) for position in range(plan.num_positions)] == clips


def test_key_frames_lie_in_the_middle_of_their_clip() -> None:
    data = fake_dataset(1, frames=150)
    data.samples.key_time_s[:] = 2.5
    clip = TrainPlan(data, SPEC, CONFIG, 0).clip(0)
    assert clip.start_s + TIMES.span_s / 2 == pytest.approx(2.5, abs=0.5 / 30)
    middle = clip.audio_start / 16_000 + SPEC.num_audio_samples / 32_000
    assert middle == pytest.approx(clip.start_s + TIMES.span_s / 2, abs=1 / 16_000)


@settings(max_examples=100, deadline=None)
@given(st.integers(0, 2**32))
def test_boxes_follow_crop_resize_and_flip(seed: int) -> None:
    rng = np.random.default_rng(seed)
    window = CropWindow(*(rng.uniform(0, 40, 2)), *(rng.uniform(20, 60, 2)))
    corners = np.sort(rng.uniform(0, 1, (6, 2, 2)), axis=1).reshape(6, 4).astype(np.float32)
    plain, keep = to_input_pixels(corners, window, (64, 96), (32, 48), flip=False)
    flipped, _ = to_input_pixels(corners, window, (64, 96), (32, 48), flip=True)
    for box, out, visible in zip(corners, plain, keep, strict=True):
        x1 = (box[0] * 96 - window.left) * 48 / window.width
        y2 = (box[3] * 64 - window.top) * 32 / window.height
        assert out[0] == pytest.approx(min(max(x1, 0), 48), abs=1e-3)
        assert out[3] == pytest.approx(min(max(y2, 0), 32), abs=1e-3)
        assert visible == (out[2] - out[0] >= 1 and out[3] - out[1] >= 1)
    assert np.allclose(flipped[:, [0, 2]], 48 - plain[:, [2, 0]], atol=1e-3)


def test_media_of_one_video_are_no_easy_negatives(tmp_path: Path) -> None:
    sources = ["one", "one", "a/--0edUL8zmA_000005_000015.mp4", "b/--0edUL8zmA_000090_000100.mkv"]
    media = [(f"m{i}", numbered_frames(2), noise(0.1, seed=i)) for i in range(4)]
    split = write_store(tmp_path / "s", media, sources=sources)
    assert [(a, b) for a in range(4) for b in range(a) if split.same_video(a, b)] == [(1, 0), (3, 2)]


def test_clips_are_told_from_other_files_by_their_names() -> None:
    assert source_video("/k400/yoga/AAAAAAAAA_1_000001_000011.mp4") == "AAAAAAAAA_1"
    for other in ("cam_000001_000011.mp4", "AAAAAAAAAA1_1_11.mp4", "AAAAAAAAAA1_000001_000011/x.mp4"):
        assert source_video(other) == other
