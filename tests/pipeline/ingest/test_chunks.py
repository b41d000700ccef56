"""Windows on long videos: every sample whole in one, with room around it; bytes shared, samples exact."""

import itertools
import zlib
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.ingest.chunks import Span, Window, audio_window, plan_windows, video_window
from pipeline.store.rows import AudioRef, VideoRef

FPS = Fraction(30000, 1001)


def starts(frames: int, gop: int = 12) -> list[int]:
    return list(range(0, frames, gop))


def test_short_video_is_one_window() -> None:
    windows, chosen = plan_windows(starts(300), 300, FPS, [Span(0, 10), Span(2, 3)], 60, 12)
    assert windows == [Window(0, 25, 0, 300)]
    assert chosen == [0, 0]


def test_chunks_overlap_and_only_used_ones_stay() -> None:
    frames = 30 * 300
    windows, _ = plan_windows(starts(frames), frames, Fraction(30), [], 60, 12)
    assert [w.first_frame / 30 for w in windows] == pytest.approx([0, 48, 96, 144, 192, 240], abs=0.4)
    assert windows[-1].end_frame == frames
    assert all(a.end_s(Fraction(30)) - b.start_s(Fraction(30)) >= 12 for a, b in itertools.pairwise(windows))
    used, chosen = plan_windows(
        starts(frames), frames, Fraction(30), [Span(50, 53), Span(200, 210), Span(2, 3)], 60, 12
    )
    assert [round(w.first_frame / 30, 1) for w in used] == [0.0, 192.0]
    assert chosen == [0, 1, 0]


def test_long_sample_gets_a_window_of_its_own() -> None:
    frames = 30 * 600
    spans = [Span(100, 220), Span(0, 600)]
    windows, chosen = plan_windows(starts(frames), frames, Fraction(30), spans, 60, 12)
    own = windows[chosen[0]]
    assert own.start_s(Fraction(30)) == pytest.approx(94, abs=0.4)
    assert own.end_s(Fraction(30)) == pytest.approx(226, abs=0.4)
    assert windows[chosen[1]] == Window(0, len(starts(frames)), 0, frames)


def test_overlap_must_fit() -> None:
    with pytest.raises(ValueError, match=r"overlap \(40 s\) must be at most half of the chunks \(60 s\)"):
        plan_windows(starts(9000), 9000, FPS, [], 60, 40)


@settings(max_examples=60, deadline=None)
@given(
    seconds=st.integers(80, 2000),
    chunk_s=st.sampled_from([20.0, 60.0]),
    overlap_s=st.sampled_from([0.0, 4.0, 10.0]),
    clip_s=st.sampled_from([0.0, 2.7, 8.0]),
    data=st.data(),
)
def test_every_sample_is_whole_with_room_for_a_clip(
    seconds: int, chunk_s: float, overlap_s: float, clip_s: float, data: st.DataObject
) -> None:
    frames = int(seconds * FPS)
    duration = float(frames / FPS)
    times = st.tuples(st.floats(0, duration - 0.1), st.floats(0.05, 100))
    spans = [Span(a, min(a + length, duration)) for a, length in data.draw(st.lists(times, max_size=20))]
    windows, chosen = plan_windows(starts(frames), frames, FPS, spans, chunk_s, overlap_s, clip_s)
    margin_s = max(overlap_s / 2, clip_s)
    assert windows == sorted(set(windows))
    for span, place in zip(spans, chosen, strict=True):
        window = windows[place]
        assert window.first_frame == starts(frames)[window.first]
        assert window.start_s(FPS) <= max(span.start_s - margin_s, 0) + 1e-6
        assert window.end_s(FPS) >= min(span.end_s + margin_s, duration) - 1e-6
    if spans:
        assert set(chosen) == set(range(len(windows)))


def test_references_point_at_the_same_bytes() -> None:
    frames = 3000
    first = starts(frames)
    video = VideoRef(
        3, 100, 50, 7, tuple(150 + 10 * n for n in range(len(first))), (10,) * len(first), tuple(first),
        tuple(range(len(first))), frames, 30, 1, 64, 48,
    )  # fmt: skip
    window = Window(20, 45, 240, 540)
    part = video_window(video, window)
    assert (part.offset, part.init_bytes, part.num_frames) == (100, 50, 300)
    assert part.fragment_offset[0] == 350
    assert part.fragment_first_frame[:2] == (0, 12)
    assert part.fragment_crc32 == tuple(range(20, 45))
    samples = np.arange(100 * 16000, dtype=np.int64).astype(np.int16)
    audio = audio_window(AudioRef(1, 1000, len(samples), ()), samples, window, Fraction(30))
    assert (audio.offset, audio.num_samples) == (1000 + 2 * 8 * 16000, 10 * 16000)
    piece = samples[8 * 16000 : 9 * 16000]
    assert audio.crc32[0] == zlib.crc32(piece.tobytes())
    assert len(audio.crc32) == 10


def test_windows_without_sound_refer_to_none() -> None:
    """Sound from 100 s to 150 s of 300 s: what lies wholly before or after has no audio, not zeros."""
    samples = np.zeros(150 * 16000, np.int16)
    samples[100 * 16000 :] = 1
    audio = AudioRef(1, 1000, len(samples), ())
    spans = {(0, 60): 0, (48, 108): 60, (96, 156): 54, (144, 204): 6, (192, 252): 0}
    for (first_s, end_s), seconds in spans.items():
        window = Window(0, 1, first_s * 30, end_s * 30)
        part = audio_window(audio, samples, window, Fraction(30), 100 * 16000)
        assert part.num_samples == seconds * 16000
        assert (part == AudioRef(0, 0, 0, ())) == (seconds == 0)
