"""PCM on the time line of the video: where samples land, gaps, overlaps, the down-mix."""

from fractions import Fraction

import av
import numpy as np
import pytest

from pipeline.audio_track import AudioTrack


def frame(samples: np.ndarray, start_s: Fraction, rate_hz: int = 16000, layout: str = "mono") -> av.AudioFrame:
    out = av.AudioFrame.from_ndarray(np.ascontiguousarray(np.atleast_2d(samples)), format="fltp", layout=layout)
    out.sample_rate, out.time_base = rate_hz, Fraction(1, 90000)
    out.pts = round(start_s * 90000)
    return out


def tone(count: int) -> np.ndarray:
    return (0.5 * np.sin(np.arange(count) / 7)).astype(np.float32)


def test_samples_before_the_video_are_cut_and_silence_fills_the_rest() -> None:
    track = AudioTrack(10**6)
    track.push(frame(tone(8000), Fraction(1)))
    samples, begin, end = track.finish(Fraction(5, 4), 16000)
    assert (begin, end) == (Fraction(-1, 4), Fraction(1, 4))
    expected = np.round(tone(8000)[4000:] * 32768)
    assert np.abs(samples[:4000] - expected).max() <= 1
    assert not samples[4000:].any()


def test_late_audio_starts_after_silence() -> None:
    track = AudioTrack(10**6)
    track.push(frame(tone(4000), Fraction(3, 10)))
    samples, _, _ = track.finish(Fraction(0), 16000)
    assert not samples[:4800].any()
    assert np.abs(samples[4800:8800] - np.round(tone(4000) * 32768)).max() <= 1


def test_gap_is_placed_by_its_time_stamp_and_jitter_is_not() -> None:
    track = AudioTrack(10**6)
    signal = tone(16000)
    jitter = [0, Fraction(4, 1000), Fraction(-3, 1000), 0]
    for n, wander in enumerate(jitter):
        track.push(frame(signal[1000 * n : 1000 * n + 1000], Fraction(n, 16) + wander))
    track.push(frame(signal[8000:9000], Fraction(1, 2)))
    samples, _, _ = track.finish(Fraction(0), 16000)
    assert track.jumps == 1
    assert np.abs(samples[:4000] - np.round(signal[:4000] * 32768)).max() <= 1
    assert not samples[4000:8000].any()
    assert np.abs(samples[8000:9000] - np.round(signal[8000:9000] * 32768)).max() <= 1


@pytest.mark.parametrize("rate_hz", [8000, 11025, 22050, 32000, 44100, 48000, 96000])
def test_resampling_keeps_the_time(rate_hz: int) -> None:
    times = np.arange(2 * rate_hz) / rate_hz
    pulse = np.exp(-(((times - 1.0) / 0.002) ** 2)).astype(np.float32)
    track = AudioTrack(10**6)
    for begin in range(0, len(pulse), 1024):
        track.push(frame(pulse[begin : begin + 1024], Fraction(begin, rate_hz), rate_hz))
    samples, _, _ = track.finish(Fraction(0), 32000)
    power = samples.astype(np.float64) ** 2
    centre_s = (np.arange(32000) * power).sum() / power.sum() / 16000
    assert abs(centre_s - 1.0) < 0.1 / 16000
    assert abs(samples.max() / 32767 - 1) < 0.02


@pytest.mark.parametrize(
    ("layout", "weights"),
    [
        ("stereo", (0.5, 0.5)),
        ("5.1", (0.207, 0.207, 0.293, 0.0, 0.146, 0.146)),
    ],
)
def test_down_mix_weights_are_the_documented_ones(layout: str, weights: tuple[float, ...]) -> None:
    for channel, weight in enumerate(weights):
        planes = np.zeros((len(weights), 4000), np.float32)
        planes[channel] = 0.5
        track = AudioTrack(10**6)
        track.push(frame(planes, Fraction(0), 16000, layout))
        samples, _, _ = track.finish(Fraction(0), 4000)
        assert samples[2000] / 16384 == pytest.approx(weight, abs=0.002)


def test_format_change_starts_a_new_run() -> None:
    track = AudioTrack(10**6)
    track.push(frame(tone(1600), Fraction(0)))
    track.push(frame(np.zeros((2, 4800), np.float32), Fraction(1, 10), 48000, "stereo"))
    samples, _, end = track.finish(Fraction(0), 3200)
    assert track.jumps == 1
    assert end == Fraction(1, 5)
    assert np.abs(samples[:1600] - np.round(tone(1600) * 32768)).max() <= 1


def test_no_audio_is_empty() -> None:
    assert len(AudioTrack(100).finish(Fraction(0), 1000)[0]) == 0
