"""Tracks that are not used, announced but empty, or default ones, and pictures in fields: what is there counts."""

import shutil
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest

from pipeline.folder.describe import describe
from pipeline.folder.read import read_planes
from pipeline.folder.sound import read_samples
from pipeline.ingest.item import Item, TranscodeSettings
from pipeline.ingest.report import class_of
from pipeline.ingest.transcode import transcode
from pipeline.media.packets import look
from pipeline.media.probe import RefusedError
from tests.pipeline.support import media_zoo as zoo
from tests.pipeline.support.cases import CASES, needs_cases


def write(path: Path, tracks: Sequence[tuple[int, str, float, bool]], seconds: float = 2.0) -> None:
    """Video of 25 fps and tracks (rate in Hz, layout, seconds, whether it is the default); 0 s: announced only."""
    with av.open(str(path), "w") as container:
        video: Any = container.add_stream("libx264", rate=25)
        video.width, video.height, video.pix_fmt = 64, 48, "yuv420p"
        sounds: list[Any] = []
        for rate, layout, _, is_default in tracks:
            sounds.append(container.add_stream("aac", rate=rate, layout=layout))
            sounds[-1].disposition = av.stream.Disposition.default if is_default else av.stream.Disposition(0)
        packets = []
        for number in range(round(25 * seconds)):
            frame = av.VideoFrame.from_ndarray(np.full((48, 64, 3), 2 * number, np.uint8), format="rgb24")
            frame.pts, frame.time_base = number, Fraction(1, 25)
            packets += video.encode(frame)
        packets += video.encode(None)
        for stream, (rate, layout, length_s, _) in zip(sounds, tracks, strict=True):
            packets += zoo._encode_audio(stream, length_s, rate, layout, 0.0) if length_s else []
        for packet in sorted(packets, key=lambda p: float((p.dts or 0) * p.time_base)):
            container.mux(packet)


def stored(path: Path, tmp_path: Path) -> Item:
    return transcode(path, tmp_path / "payload", TranscodeSettings(codec="h264"))


@pytest.mark.parametrize("suffix", ["mp4", "mkv", "mov", "ts"])
def test_a_longer_track_that_is_not_used_truncates_nothing(suffix: str, tmp_path: Path) -> None:
    write(tmp_path / f"a.{suffix}", [(44100, "stereo", 2.0, True), (44100, "mono", 9.0, False)])
    item = stored(tmp_path / f"a.{suffix}", tmp_path)
    assert (item.refused, item.num_frames) == ("", 50)
    assert not any("truncated" in repair for repair in item.repairs)
    assert describe(tmp_path / f"a.{suffix}").num_frames == 50


@pytest.mark.parametrize("suffix", ["mp4", "mkv", "mov"])
def test_a_track_without_packets_is_absent(suffix: str, tmp_path: Path) -> None:
    write(tmp_path / f"a.{suffix}", [(44100, "stereo", 0.0, True)])
    item = stored(tmp_path / f"a.{suffix}", tmp_path)
    assert (item.refused, item.num_frames, item.num_samples) == ("", 50, 0)
    assert item.silent
    assert describe(tmp_path / f"a.{suffix}").num_samples == 0


@pytest.mark.parametrize("suffix", ["mp4", "mkv", "mov"])
def test_the_track_with_sound_is_taken_where_the_better_one_is_empty(suffix: str, tmp_path: Path) -> None:
    write(tmp_path / f"a.{suffix}", [(44100, "stereo", 0.0, True), (44100, "mono", 2.0, False)])
    info, scan = look(tmp_path / f"a.{suffix}")
    assert info.audio is not None
    assert info.audio.channels == 1
    assert scan.audio_packets > 50
    file = describe(tmp_path / f"a.{suffix}")
    assert file.num_samples == 32_000
    assert np.abs(read_samples(file, 0, file.num_samples)).max() > 10_000


@pytest.mark.parametrize("suffix", ["mkv", "mp4"])
@pytest.mark.parametrize(("first_is_default", "channels"), [(True, 1), (False, 2)])
def test_the_default_track_comes_before_the_wider_one(
    suffix: str, first_is_default: bool, channels: int, tmp_path: Path
) -> None:
    write(
        tmp_path / f"a.{suffix}",
        [(44100, "mono", 2.0, first_is_default), (44100, "stereo", 2.0, not first_is_default)],
    )
    info, _ = look(tmp_path / f"a.{suffix}")
    assert info.audio is not None
    assert info.audio.channels == channels


@pytest.mark.parametrize("suffix", ["mp4", "mkv", "mov"])
@pytest.mark.parametrize(("times_s", "frames"), [((0,), 1), ((0, 5), 2), ((0, 0.04, 0.08, 59), 1476), ((0, 61), 0)])
def test_a_picture_is_held_alike_by_both_ways_or_refused_by_both(
    suffix: str, times_s: tuple[float, ...], frames: int, tmp_path: Path
) -> None:
    path = tmp_path / f"a.{suffix}"
    with av.open(str(path), "w") as container:
        video: Any = container.add_stream("libx264", rate=25)
        video.width, video.height, video.pix_fmt, video.options = 64, 48, "yuv420p", {"bf": "0"}
        for number, time_s in enumerate(times_s):
            frame = av.VideoFrame.from_ndarray(np.full((48, 64, 3), 40 * number, np.uint8), format="rgb24")
            frame.pts, frame.time_base = round(25 * time_s), Fraction(1, 25)
            container.mux(video.encode(frame))
        container.mux(video.encode(None))
    item = stored(path, tmp_path)
    if not frames:
        assert item.refused == "video time stamps jump by 61.0 s, more than 60 s"
        with pytest.raises(RefusedError, match=item.refused):
            describe(path)
        return
    file = describe(path)
    assert (item.refused, item.num_frames, file.num_frames) == ("", frames, frames)
    assert Fraction(item.fps_num, item.fps_den) == file.fps


@needs_cases
@pytest.mark.parametrize("lost", [None, 40, 41, 300])
def test_pictures_in_fields_are_counted_as_frames(lost: int | None, tmp_path: Path) -> None:
    data = (CASES / "paff-field-packets" / "paff_field.ts").read_bytes()
    (tmp_path / "a.ts").write_bytes(data if lost is None else data[: 188 * lost] + data[188 * (lost + 1) :])
    item = stored(tmp_path / "a.ts", tmp_path)
    file = describe(tmp_path / "a.ts")
    assert item.refused == ""
    assert {item.num_frames, file.num_frames} <= ({60} if lost is None else {59, 60})
    assert Fraction(item.fps_num, item.fps_den) == file.fps == 25
    if lost is None:
        assert class_of(item) == "fine"
        luma, _ = read_planes(file, np.arange(60))
        assert luma.shape[0] == 60


@needs_cases
@pytest.mark.parametrize(
    ("name", "frames", "silent", "wanted"),
    [
        ("webm-claims-1000fps/recorder.webm", 150, False, "repaired"),
        ("longer-unselected-track/long_second_audio.mp4", 150, False, "fine"),
        ("announced-but-empty-audio/ghost_audio.ts", 150, True, "silent"),
        ("avi-bframes-av-offset/bframes_xvid_3s.avi", 75, False, "fine"),
    ],
)
def test_files_of_public_bug_reports(name: str, frames: int, silent: bool, wanted: str, tmp_path: Path) -> None:
    path = shutil.copy(CASES / name, tmp_path)
    item, file = stored(Path(path), tmp_path), describe(Path(path))
    assert (item.refused, item.num_frames, file.num_frames) == ("", frames, frames)
    assert item.fps_num / item.fps_den == file.fps == 25
    assert bool(item.silent) == silent == (file.num_samples == 0)
    assert class_of(item) == wanted
    if not silent:
        with (tmp_path / "payload").open("rb") as payload:
            payload.seek(item.mp4_bytes)
            heard = np.frombuffer(payload.read(2 * item.num_samples), "<i2")
        for samples in (heard, read_samples(file, 0, file.num_samples)):
            assert abs(int(np.abs(samples[:8000].astype(int)).argmax()) / 16_000 - 0.25) <= 0.002


@needs_cases
def test_reduced_rate_takes_the_nearest_of_240_frames(tmp_path: Path) -> None:
    path = CASES / "max-fps-not-nearest" / "fps240.mp4"
    item = transcode(path, tmp_path / "payload", TranscodeSettings(codec="vp9", max_fps="30"))
    assert item.refused == ""
    (tmp_path / "video.mp4").write_bytes((tmp_path / "payload").read_bytes()[: item.mp4_bytes])
    with av.open(str(tmp_path / "video.mp4")) as container:
        pictures = [frame.to_ndarray(format="gray") for frame in container.decode(video=0)]
    edge = pictures[0].shape[1] / 10
    centres = [int((bit + 0.5) * edge) for bit in range(10)]
    numbers = [sum(int(picture[:, x].mean() > 128) << bit for bit, x in enumerate(centres)) for picture in pictures]
    assert numbers == list(range(0, 8 * len(pictures), 8))
