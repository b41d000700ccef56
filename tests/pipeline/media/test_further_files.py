"""Kinds of files that public bug reports taught, each with more inputs: a store and a plain folder say the same."""

import shutil
import subprocess
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest

from pipeline.folder.describe import describe
from pipeline.ingest.item import TranscodeSettings
from pipeline.ingest.report import class_of
from pipeline.ingest.transcode import transcode
from tests.pipeline.support import media_zoo as zoo
from tests.pipeline.support import odd_media as odd
from tests.pipeline.support.both_ways import check_both, check_refused, from_folder, from_store
from tests.pipeline.support.plain_videos import write_video
from tests.pipeline.support.stores import numbered_frames, read_number

pytestmark = pytest.mark.integration
WANDERING = {"times_s": zoo._vfr(), "fps": Fraction(1000), "size": odd.SIZE}
NTSC, FILM = Fraction(30000, 1001), Fraction(24000, 1001)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("a.webm", {"video": "libvpx", "audio": "libopus", "rate_hz": 48_000}),
        ("b.webm", {"video": "libvpx-vp9", "audio": "libopus", "rate_hz": 48_000}),
        ("a.mkv", {}),
        ("a.flv", {}),
        ("a.ts", {"format": "mpegts"}),
        ("a.mov", {}),
        ("a.nut", {}),
    ],
)
def test_a_claim_of_1000_fps_is_not_believed(name: str, options: dict[str, Any], tmp_path: Path) -> None:
    zoo.make(tmp_path / name, **WANDERING, **options)
    item = check_both(tmp_path / name, frames=73, fps=24, within_s=1 / 24)  # mostly 40 ms, between 20 and 60
    assert any("variable frame rate" in repair for repair in item.repairs)


@pytest.mark.parametrize(
    ("name", "codec", "fps", "most"),
    [
        ("a.mkv", "libx264", 60, "25"),
        ("b.mp4", "libx264", 120, "30"),
        ("c.avi", "mpeg4", 50, "30"),
        ("d.ts", "mpeg2video", 60, "24000/1001"),
        ("e.webm", "libvpx", 90, "25"),
        ("f.mov", "mjpeg", 25, "10"),
    ],
)
def test_a_reduced_rate_shows_the_nearest_picture(name: str, codec: str, fps: int, most: str, tmp_path: Path) -> None:
    path = tmp_path / name
    pixels = "yuvj420p" if codec == "mjpeg" else "yuv420p"
    write_video(path, codec=codec, fps=fps, frames=numbered_frames(fps), audio_codec=None, pix_fmt=pixels)
    item = transcode(path, tmp_path / "payload", TranscodeSettings(max_fps=most, quality=10))
    assert (item.refused, Fraction(item.fps_num, item.fps_den)) == ("", Fraction(most))
    (tmp_path / "video.mp4").write_bytes((tmp_path / "payload").read_bytes()[: item.mp4_bytes])
    with av.open(str(tmp_path / "video.mp4")) as container:
        shown = [read_number(frame.to_ndarray()[:64].astype(float)) for frame in container.decode(video=0)]
    for slot, number in enumerate(shown):
        at = slot * fps / Fraction(most)
        assert abs(number - at) == min(abs(other - at) for other in range(fps))
    assert len(shown) == pytest.approx(float(Fraction(most)), abs=1)


@pytest.mark.parametrize(
    ("video", "audio", "fps", "options"),
    [
        ("mpeg4", "pcm_s16le", FILM, {"bf": "2"}),
        ("mpeg4", "pcm_s16le", NTSC, {"bf": "1"}),
        ("libx264", "pcm_s16le", Fraction(15), {"bf": "2"}),
        ("libx264", "pcm_s16le", Fraction(60), {"bf": "7", "b-adapt": "0"}),
        ("mpeg2video", "pcm_s16le", Fraction(25), {"bf": "2"}),
    ],
)
def test_avi_shows_picture_n_with_chunk_n(
    video: str, audio: str, fps: Fraction, options: dict[str, str], tmp_path: Path
) -> None:
    """Flashes and clicks are written at the same times, so no reading of ours is needed to know where they belong."""
    path = tmp_path / "a.avi"
    zoo.make(path, video=video, audio=audio, fps=fps, size=odd.SIZE, video_options=options)
    assert check_both(path, frames=round(3 * fps), fps=fps, within_s=1 / float(fps)).repairs == ()


@pytest.mark.parametrize(("b_frames", "fps"), [(1, Fraction(25)), (2, Fraction(25)), (1, FILM)])
def test_packed_bitstreams_show_picture_n_with_chunk_n(b_frames: int, fps: Fraction, tmp_path: Path) -> None:
    odd.packed_avi(tmp_path / "a.avi", b_frames=b_frames, fps=fps)
    check_both(tmp_path / "a.avi", frames=round(3 * fps), fps=fps, within_s=1 / float(fps))


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("a.mkv", {"other": "ass", "other_s": 29.0}),
        ("b.mkv", {"other": "ass", "other_s": 8.0}),
        ("a.ts", {"other": "data", "other_s": 29.0, "format": "mpegts"}),
        ("a.mp4", {"other": "pictures", "other_s": 30.0}),
        ("a.mov", {"other": "pcm_s16le", "audio": "pcm_s16le"}),
        ("a.nut", {"other": "flac"}),
        ("a.avi", {"other": "ac3", "audio": "pcm_s16le", "video": "mpeg4"}),
    ],
)
def test_a_longer_track_that_is_not_used_says_nothing_of_the_video(
    name: str, options: dict[str, Any], tmp_path: Path
) -> None:
    odd.with_tracks(tmp_path / name, **options)
    assert class_of(check_both(tmp_path / name)) == "fine"


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("a.ts", {"empty": "mp2", "format": "mpegts"}),
        ("b.ts", {"empty": "ac3", "format": "mpegts"}),
        ("c.ts", {"empty": "libopus", "format": "mpegts"}),
        ("a.flv", {"empty": "aac"}),
        ("a.avi", {"empty": "libmp3lame", "video": "mpeg4"}),
        ("a.webm", {"empty": "libopus", "video": "libvpx"}),
        ("a.mpg", {"empty": "mp2", "video": "mpeg2video", "format": "mpeg"}),
    ],
)
@pytest.mark.parametrize("beside", [None, "sound"])
def test_a_track_without_packets_is_absent(
    name: str, options: dict[str, Any], beside: str | None, tmp_path: Path
) -> None:
    if beside and name.endswith(("webm", "mpg")):
        pytest.skip("one audio track is enough for these")
    sound = {"flv": "aac", "avi": "pcm_s16le", "ts": "aac"}.get(name.split(".")[1]) if beside else None
    odd.with_tracks(tmp_path / name, audio=sound, **options)
    frames, flashes = (76, None) if name.endswith("mpg") else (75, zoo.FLASHES_S)  # its muxer leaves a time stamp out
    item = check_both(tmp_path / name, frames=frames, flashes=flashes, clicks=zoo.FLASHES_S if beside else ())
    assert bool(item.silent) == (beside is None)


@pytest.mark.parametrize(("audio", "clicks"), [("pcm_s16le", ()), ("flac", zoo.FLASHES_S), ("aac", zoo.FLASHES_S)])
def test_a_rate_of_0_hz_is_the_stream_s_own_or_the_track_is_absent(
    audio: str, clicks: tuple[float, ...], tmp_path: Path
) -> None:
    zoo.make(tmp_path / "a.mkv", audio=audio, size=odd.SIZE)
    zoo.patch(tmp_path / "a.mkv", b"\xb5\x88", 0, bytes(8))  # Matroska SamplingFrequency
    check_both(tmp_path / "a.mkv", clicks=clicks)


@pytest.mark.parametrize(
    ("name", "transfer", "options"),
    [
        ("a.mp4", 16, {}),
        ("a.mkv", 18, {}),
        ("a.ts", 16, {"format": "mpegts"}),
        ("a.mov", 18, {"codec": "libx264"}),
    ],
)
def test_high_dynamic_range_is_named(name: str, transfer: int, options: dict[str, Any], tmp_path: Path) -> None:
    odd.high_dynamic_range(tmp_path / name, transfer, **options)
    item = check_both(tmp_path / name, frames=30, flashes=(0.6,), clicks=())
    kind = {16: "PQ", 18: "HLG"}[transfer]
    assert item.warnings == (f"high dynamic range ({kind}): shown without tone mapping",)
    assert describe(tmp_path / name).warning == item.warnings[0]


@pytest.mark.parametrize(
    ("name", "options", "times_s", "end_s", "frames", "fps"),
    [
        ("a.mp4", {}, [0], 10.0, 1, Fraction(1, 10)),
        ("a.mkv", {}, [0], 10.0, 1, Fraction(1, 10)),
        ("a.webm", {"video": "libvpx", "audio": "libopus"}, [0], 70.0, 1, Fraction(1, 70)),
        ("b.mkv", {}, [0, 5], 10.0, 2, Fraction(1, 5)),
        ("b.mp4", {}, [0, 1, 2, 3, 4], 5.0, 5, Fraction(1)),
        ("c.mkv", {}, [0, 1, 2, 3, 5], 9.0, 9, Fraction(1)),
    ],
)
def test_pictures_that_stand_are_shown_with_all_their_sound(
    name: str, options: dict[str, Any], times_s: list[float], end_s: float, frames: int, fps: Fraction, tmp_path: Path
) -> None:
    odd.stills(tmp_path / name, times_s, end_s, **options)
    item = check_both(tmp_path / name, frames=frames, fps=fps, flashes=())
    assert item.num_samples == pytest.approx(end_s * 16_000, abs=400)


@pytest.mark.parametrize("name", ["a.mkv", "b.mp4", "c.avi"])
def test_25_fps_with_dropped_pictures_stays_25(name: str, tmp_path: Path) -> None:
    times_s = [n / 25 for n in range(75) if n % 7 != 3]
    codecs = {"video": "mpeg4", "audio": "pcm_s16le"} if name.endswith("avi") else {}
    zoo.make(tmp_path / name, times_s=times_s, size=odd.SIZE, **codecs)
    item = check_both(tmp_path / name)
    assert item.repairs == ("frames missing: now 25 fps, 11 frames repeated, 0 dropped",)


@pytest.mark.parametrize("before_end_s", [0.01, 2.5, 4.2])
@pytest.mark.parametrize("audio", ["aac", "mp2"])
def test_the_clock_of_a_transport_stream_may_begin_anew(before_end_s: float, audio: str, tmp_path: Path) -> None:
    odd.shifted_ts(tmp_path / "a.ts", odd.WRAP_S - before_end_s, audio=audio)
    assert class_of(check_both(tmp_path / "a.ts")) == "fine"


def test_a_gap_in_a_transport_stream_is_held_or_refused(tmp_path: Path) -> None:
    odd.shifted_ts(tmp_path / "a.ts", jump_at_s=1.0, jump_s=5.0)
    flash, *later = zoo.FLASHES_S
    moved = (flash, *(time_s + 5.0 for time_s in later))
    item = check_both(tmp_path / "a.ts", frames=200, flashes=moved, clicks=moved)
    assert "frames missing: now 25 fps, 125 frames repeated, 0 dropped" in item.repairs
    odd.shifted_ts(tmp_path / "b.ts", jump_at_s=1.0, jump_s=70.0)
    check_refused(tmp_path / "b.ts", "video time stamps jump by 70.0 s, more than 60 s")
    odd.shifted_ts(tmp_path / "c.ts", 20.0, jump_at_s=1.0, jump_s=-10.0)
    check_refused(tmp_path / "c.ts", r"video time stamps start again: \d+ of 75 frames lie 1 s or more before earlier")


@pytest.mark.parametrize(
    ("name", "options", "offset_s"),
    [
        ("a.mkv", {"audio_start_s": 0.3}, 0.3),
        ("a.ts", {"audio_start_s": 0.3, "format": "mpegts"}, 0.3),
        ("a.mov", {"audio_start_s": 0.7, "audio": "pcm_s16le"}, 0.7),
        ("b.mp4", {"start_s": 0.5, "audio_start_s": 0.0}, -0.5),
        ("b.ts", {"start_s": 0.5, "audio_start_s": 0.0, "format": "mpegts"}, -0.5),
        ("b.flv", {"start_s": 0.5, "audio_start_s": 0.0}, -0.5),
        ("c.mp4", {"layout": "mono", "rate_hz": 8000}, 0.0),
        ("c.mov", {"layout": "mono", "rate_hz": 8000, "audio": "pcm_alaw"}, 0.0),
        ("c.mkv", {"layout": "5.1", "audio": "flac", "rate_hz": 96_000}, 0.0),
        ("d.mp4", {"audio": "libopus", "rate_hz": 48_000}, 0.0),
        ("d.ts", {"audio": "libopus", "rate_hz": 48_000, "format": "mpegts"}, 0.0),
        ("e.mov", {"video": "prores_ks", "pixel_format": "yuv422p10le", "audio": "pcm_s24le"}, 0.0),
    ],
)
def test_sound_is_where_it_was_written(name: str, options: dict[str, Any], offset_s: float, tmp_path: Path) -> None:
    """Priming of AAC and Opus, edit lists, starts before and after the picture, sample rates and channels."""
    zoo.make(tmp_path / name, size=odd.SIZE, **options)
    clicks = tuple(flash + offset_s for flash in zoo.FLASHES_S if flash + offset_s > 0)
    check_both(tmp_path / name, clicks=clicks, clicks_within_s=0.0008)


@pytest.mark.parametrize("name", ["a.mp4", "a.mov", "a.mkv"])
@pytest.mark.parametrize("degrees", [90, 180, 270])
def test_turned_pictures_stand_alike_both_ways(name: str, degrees: int, tmp_path: Path) -> None:
    zoo.make(tmp_path / name, audio=None, seconds=0.2, rotation=degrees, size=(96, 64))
    item = transcode(tmp_path / name, tmp_path / "payload", TranscodeSettings())
    file = describe(tmp_path / name)
    assert (file.width, file.height) == (item.width, item.height) == ((64, 96) if degrees != 180 else (96, 64))
    assert file.quarters == degrees // 90
    assert np.isclose(file.display_width / file.display_height, item.display_width / item.display_height)


@pytest.mark.skipif(shutil.which("ffmpeg") is None, reason="cut by ffmpeg, which is not here")
@pytest.mark.parametrize(("cut_s", "early_s"), [("0.4", 0.0), ("0.413", 0.027), ("0.427", 0.013)])
@pytest.mark.parametrize("suffix", ["mp4", "mov", "mkv"])
def test_a_copy_that_is_cut_inside_a_frame_is_up_to_a_frame_early(
    suffix: str, cut_s: str, early_s: float, tmp_path: Path
) -> None:
    """What docs/ingest.md says of such files; nothing in them tells where in the frame they were cut."""
    source, part = tmp_path / "a.mp4", tmp_path / f"b.{suffix}"
    zoo.make(source, size=odd.SIZE, rate_hz=48_000, video_options={"x264-params": "keyint=20:scenecut=0:bframes=2"})
    command = ["ffmpeg", "-nostdin", "-v", "error", "-ss", cut_s, "-i", str(source), "-c", "copy", str(part)]
    subprocess.run(command, check=True)
    seen = from_folder(part)
    flash = zoo.FLASHES_S[0] - float(cut_s)
    if suffix == "mkv":  # from the key frame on, which is that of 0 s
        assert seen.flashes[0] == pytest.approx(zoo.FLASHES_S[0], abs=0.001)
    else:
        assert seen.flashes[0] == pytest.approx(flash - early_s, abs=0.001)
        assert seen.clicks[0] == pytest.approx(flash, abs=0.001)
    assert from_store(part)[1].flashes == seen.flashes
