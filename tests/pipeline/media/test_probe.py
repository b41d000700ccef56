"""Headers: what is chosen, what is refused and with which words; packets without decoding."""

from fractions import Fraction
from pathlib import Path

import pytest

from pipeline.media.packets import scan_packets
from pipeline.media.probe import Limits, RefusedError, probe
from tests.pipeline.support import media_zoo as zoo


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("probe") / "clip.mp4"
    zoo.make(path, seconds=1.0, rate_hz=48000, layout="5.1")
    return path


def test_header_is_read(clip: Path) -> None:
    info = probe(clip)
    assert (info.video.codec, info.video.width, info.video.height) == ("h264", 128, 96)
    assert info.video.rates[0] == 25
    assert info.audio is not None
    assert (info.audio.codec, info.audio.sample_rate_hz, info.audio.channels) == ("aac", 48000, 6)


def test_largest_video_stream_is_chosen(tmp_path: Path) -> None:
    zoo.make(tmp_path / "two.mp4", second_size=(64, 48), seconds=0.4)
    info = probe(tmp_path / "two.mp4")
    assert (info.video.index, info.video.width) == (1, 128)
    assert info.notes == ("video stream 1 (128x96) chosen of 2",)


@pytest.mark.parametrize(
    ("limits", "words"),
    [
        (Limits(max_side_px=100), r"video size \(128x96\) must be at most 100 px a side"),
        (Limits(max_pixels=12_000), r"video size \(128x96\) must be at most"),
        (Limits(min_side_px=100), r"video size \(128x96\) must be at least 100 px"),
        (Limits(max_duration_s=0.5), r"duration \(1\.\d+ s\) must be at most 0.5 s"),
        (Limits(max_channels=2), r"audio channels \(6\) must be 1 to 2"),
        (Limits(max_sample_rate_hz=44100), r"audio sample rate \(48000 Hz\) must be 1000 to 44100 Hz"),
        (Limits(max_streams=1), r"streams \(2\) must be at most 1"),
    ],
)
def test_limits_name_value_and_rule(clip: Path, limits: Limits, words: str) -> None:
    with pytest.raises(RefusedError, match=words):
        probe(clip, limits)


def test_rate_is_that_of_the_time_stamps_not_the_claimed_one(clip: Path) -> None:
    info = probe(clip)
    with pytest.raises(RefusedError, match=r"video rate \(25 fps by its time stamps\) must be at most 20"):
        scan_packets(info, Limits(max_fps=20))
    assert probe(clip, Limits(max_fps=20)).video.rates == ()


def test_packets_of_b_frames_come_sorted(clip: Path, tmp_path: Path) -> None:
    zoo.make(tmp_path / "b.mp4", audio=None, seconds=1.0, video_options={"bf": "2"})
    scan = scan_packets(probe(tmp_path / "b.mp4"))
    step = Fraction(1, 25) / scan.video_time_base
    assert scan.video_times.tolist() == [n * step for n in range(25)]
    assert not scan.in_order
    assert scan.keys == (0,)
    assert scan_packets(probe(clip)).audio_packets > 40


def test_edit_list_hides_packets(tmp_path: Path) -> None:
    zoo.make(tmp_path / "edit.mp4", start_s=-0.4, options={"avoid_negative_ts": "disabled"})
    scan = scan_packets(probe(tmp_path / "edit.mp4"))
    assert (scan.cut_before, len(scan.video_times), int(scan.video_times[0])) == (10, 65, 0)


def test_playlist_cannot_reach_other_files(tmp_path: Path) -> None:
    zoo.make(tmp_path / "real.ts", format="mpegts", seconds=0.4)
    for name, text in [
        ("list.mp4", f"#EXTM3U\n#EXT-X-TARGETDURATION:3\n#EXTINF:3,\n{tmp_path}/real.ts\n#EXT-X-ENDLIST\n"),
        ("list.mkv", f"ffconcat version 1.0\nfile {tmp_path}/real.ts\n"),
    ]:
        (tmp_path / name).write_text(text)
        with pytest.raises(RefusedError, match="container does not open"):
            probe(tmp_path / name)


def test_names_with_protocols_are_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("pipe:0", "http://localhost/x.mp4", "concat:a|b", "fd:0"):
        with pytest.raises(RefusedError, match="not a regular file"):
            probe(name)
    zoo.make(Path("in.mp4"), audio=None, seconds=0.2)
    Path("in.mp4").rename("pipe:0")
    assert probe("pipe:0").video.width == 128
