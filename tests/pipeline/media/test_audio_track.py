"""PCM on the time line of the video: where samples land, gaps, overlaps, the down-mix."""

import io
import subprocess
import sys
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest

from pipeline.ingest.item import TranscodeSettings
from pipeline.ingest.transcode import transcode
from pipeline.media.audio_track import AudioTrack, drift_limit
from tests.pipeline.support import media_zoo as zoo

ROOT = Path(__file__).resolve().parents[3]


def frame(samples: np.ndarray, start_s: Fraction, rate_hz: int = 16000, layout: str = "mono") -> av.AudioFrame:
    out = av.AudioFrame.from_ndarray(np.ascontiguousarray(np.atleast_2d(samples)), format="fltp", layout=layout)
    out.sample_rate, out.time_base = rate_hz, Fraction(1, 90000)
    out.pts = round(start_s * 90000)
    return out


def tone(count: int) -> np.ndarray:
    return (0.5 * np.sin(np.arange(count) / 7)).astype(np.float32)


def test_samples_before_the_video_are_cut_and_the_track_ends_with_the_audio() -> None:
    track = AudioTrack(10**6)
    track.push(frame(tone(8000), Fraction(1)))
    placed = track.place(Fraction(5, 4), 16000)
    samples = placed.samples()
    assert (placed.begin_s, placed.end_s) == (Fraction(-1, 4), Fraction(1, 4))
    expected = np.round(tone(8000)[4000:] * 32768)
    assert (placed.num_samples, placed.first_sample) == (4000, 0)
    assert np.abs(samples - expected).max() <= 1


def test_late_audio_starts_after_silence() -> None:
    track = AudioTrack(10**6)
    track.push(frame(tone(4000), Fraction(3, 10)))
    placed = track.place(Fraction(0), 16000)
    assert (placed.first_sample, placed.num_samples) == (4800, 8800)
    samples = placed.samples()
    assert not samples[:4800].any()
    assert np.abs(samples[4800:8800] - np.round(tone(4000) * 32768)).max() <= 1


def test_gap_is_placed_by_its_time_stamp_and_jitter_is_not() -> None:
    track = AudioTrack(10**6)
    signal = tone(16000)
    jitter = [0, Fraction(4, 1000), Fraction(-3, 1000), 0]
    for n, wander in enumerate(jitter):
        track.push(frame(signal[1000 * n : 1000 * n + 1000], Fraction(n, 16) + wander))
    track.push(frame(signal[8000:9000], Fraction(1, 2)))
    samples = track.place(Fraction(0), 16000).samples()
    assert track.jumps == 1
    assert np.abs(samples[:4000] - np.round(signal[:4000] * 32768)).max() <= 1
    assert not samples[4000:8000].any()
    assert np.abs(samples[8000:9000] - np.round(signal[8000:9000] * 32768)).max() <= 1


@pytest.mark.parametrize(
    ("fps", "moved_ms", "limit_ms"), [(25, 0, 10), (50, 0, 10), (60, 0, 8.333), (120, 1, 3.167), (60, 8.333, 4.167)]
)
def test_sound_stays_within_half_a_frame_of_its_stamps(fps: int, moved_ms: float, limit_ms: float) -> None:
    limit = drift_limit(Fraction(fps), Fraction(moved_ms) / 1000)
    assert float(limit) * 1000 == pytest.approx(limit_ms, abs=0.001)
    track, signal, lag = AudioTrack(10**6, limit), tone(32000), Fraction(1, 100)  # stamps run 1 % slow: 10 ms a second
    for begin in range(0, 32000, 160):
        track.push(frame(signal[begin : begin + 160], Fraction(begin, 16000) * (1 + lag)))
    assert track.jumps == int(Fraction(31840, 16000) * lag / limit)
    placed = track.place(Fraction(0), 40000)
    begins = [first for first, _ in placed.parts]
    late = [first - round(first / 1.01) for first in begins]  # samples that a run begins later than its signal
    assert begins[0] == 0
    assert max(np.diff([*late, 320])) <= limit * 16000 + 3


@pytest.mark.parametrize("rate_hz", [8000, 11025, 22050, 32000, 44100, 48000, 96000])
def test_resampling_keeps_the_time(rate_hz: int) -> None:
    times = np.arange(2 * rate_hz) / rate_hz
    pulse = np.exp(-(((times - 1.0) / 0.002) ** 2)).astype(np.float32)
    track = AudioTrack(10**6)
    for begin in range(0, len(pulse), 1024):
        track.push(frame(pulse[begin : begin + 1024], Fraction(begin, rate_hz), rate_hz))
    samples = track.place(Fraction(0), 32000).samples()
    power = samples.astype(np.float64) ** 2
    centre_s = (np.arange(len(samples)) * power).sum() / power.sum() / 16000
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
        samples = track.place(Fraction(0), 4000).samples()
        assert samples[2000] / 16384 == pytest.approx(weight, abs=0.002)


def test_format_change_starts_a_new_run() -> None:
    track = AudioTrack(10**6)
    track.push(frame(tone(1600), Fraction(0)))
    track.push(frame(np.zeros((2, 4800), np.float32), Fraction(1, 10), 48000, "stereo"))
    placed = track.place(Fraction(0), 3200)
    samples, end = placed.samples(), placed.end_s
    assert track.jumps == 1
    assert end == Fraction(1, 5)
    assert np.abs(samples[:1600] - np.round(tone(1600) * 32768)).max() <= 1


def test_no_audio_is_empty() -> None:
    placed = AudioTrack(100).place(Fraction(0), 1000)
    assert (placed.num_samples, placed.begin_s, placed.end_s) == (0, 0, 0)
    assert len(placed.samples()) == 0


def test_audio_outside_the_video_is_none() -> None:
    for start_s, origin_s in ((0, 2), (3, 0)):
        track = AudioTrack(10**6)
        track.push(frame(tone(8000), Fraction(start_s)))
        placed = track.place(Fraction(origin_s), 16000)
        assert (placed.num_samples, placed.parts) == (0, ())
        assert placed.end_s - placed.begin_s == Fraction(1, 2)


def test_written_samples_are_those_of_the_track_with_zeros_in_gaps() -> None:
    track = AudioTrack(10**6)
    for start_s in (Fraction(1, 4), Fraction(3, 4), Fraction(1, 2)):
        track.push(frame(tone(2000), start_s))
    placed, file = track.place(Fraction(0), 13000), io.BytesIO(b"mp4")
    placed.write(file, 3)
    assert file.getvalue()[:3] == b"mp4"
    assert (np.frombuffer(file.getvalue(), "<i2", offset=3) == placed.samples()).all()
    assert placed.num_samples == 13000
    assert not placed.samples()[6000:8000].any()


@pytest.mark.integration
def test_six_hours_fit_into_the_default_memory(tmp_path: Path) -> None:
    """The limit on durations and the limit on memory go together: 6 h of PCM are held once, beside the decoder."""
    code = f"""
import resource
from fractions import Fraction
import av, numpy as np
from pipeline.media.audio_track import AudioTrack
used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + (950 << 20),) * 2)
track, second = AudioTrack(10**9), np.full((1, 16000 * 30), 8192, np.int16)
for n in range(720):
    frame = av.AudioFrame.from_ndarray(second, format="s16", layout="mono")
    frame.sample_rate, frame.time_base, frame.pts = 16000, Fraction(1, 16000), n * 16000 * 30
    track.push(frame)
placed = track.place(Fraction(0), 10**9)
with open({str(tmp_path / "pcm")!r}, "wb") as file:
    placed.write(file, 0)
print(placed.num_samples, track.jumps)
"""
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.stdout.split() == [str(6 * 3600 * 16000), "0"], result.stderr
    assert (tmp_path / "pcm").stat().st_size == 2 * 6 * 3600 * 16000
    (tmp_path / "pcm").unlink()


def test_a_window_has_its_length_whatever_the_track_covers() -> None:
    track = AudioTrack(10**6)
    track.push(frame(tone(4000), Fraction(1, 4)))
    samples, begin, end = track.finish(Fraction(0), 16000)
    assert (len(samples), begin, end) == (16000, Fraction(1, 4), Fraction(1, 2))
    assert np.flatnonzero(samples)[[0, -1]].tolist() == [4001, 7999]
    assert len(AudioTrack(10).finish(Fraction(0), 16000)[0]) == 0


@pytest.mark.integration
@pytest.mark.parametrize(("fps", "starts_anew"), [(25, False), (60, True)])
def test_how_far_stamps_may_wander_follows_the_frame_rate(fps: int, starts_anew: bool, tmp_path: Path) -> None:
    """Stamps that leap by 9 ms are jitter at 25 fps, and more than half a frame at 60 fps."""
    with av.open(str(tmp_path / "a.mkv"), "w") as container:
        video = container.add_stream("libx264", rate=fps)
        video.width = video.height = 64
        video.pix_fmt = "yuv420p"
        audio = container.add_stream("pcm_s16le", rate=16000, layout="mono")
        for _ in range(2 * fps):
            container.mux(video.encode(av.VideoFrame.from_ndarray(np.full((64, 64, 3), 99, np.uint8), format="rgb24")))
        container.mux(video.encode(None))
        for n in range(200):
            sound = av.AudioFrame.from_ndarray(np.full((1, 160), 9999, np.int16), format="s16", layout="mono")
            sound.sample_rate, sound.time_base = 16000, Fraction(1, 16000)
            sound.pts = 160 * n + 144 * (n >= 100)
            container.mux(audio.encode(sound))
    item = transcode(tmp_path / "a.mkv", tmp_path / "out", TranscodeSettings(short_side_px=64))
    assert any("1 jumps" in repair for repair in item.repairs) == starts_anew


class FailingResampler:
    """Takes frames and fails when it is asked for what it holds: seen with damaged PCM in MOV."""

    def __init__(self, **_: object) -> None:
        pass

    def resample(self, frame: av.AudioFrame | None) -> list[av.AudioFrame]:
        if frame is None:
            raise av.error.ArgumentError(22, "Invalid argument")
        return []


def test_resampler_that_fails_is_given_up_once(monkeypatch: pytest.MonkeyPatch) -> None:
    track = AudioTrack(10**6)
    with monkeypatch.context() as patch:
        patch.setattr(av, "AudioResampler", FailingResampler)
        track.push(frame(tone(1000), Fraction(0)))
        with pytest.raises(av.error.ArgumentError):
            track.flush()
    track.push(frame(tone(1000), Fraction(1, 4)))
    placed = track.place(Fraction(0), 16000)
    assert (placed.first_sample, placed.num_samples) == (4000, 5000)


def test_audio_whose_resampler_fails_is_damaged_not_fatal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    zoo.make(tmp_path / "a.mp4")
    monkeypatch.setattr(av, "AudioResampler", FailingResampler)
    item = transcode(tmp_path / "a.mp4", tmp_path / "out", TranscodeSettings())
    assert not item.refused
    assert "no sample that decodes" in item.silent
    assert item.num_samples == 0
