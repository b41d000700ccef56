"""One file at a time: its class and reason, its pictures, its sound, and the offset between them."""

import io
import re
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest

from pipeline.ingest.item import Item, TranscodeSettings
from pipeline.ingest.report import class_of, reason_of
from pipeline.ingest.transcode import transcode
from pipeline.media.fragments import parse_fragments
from pipeline.media.packets import scan_packets
from pipeline.media.probe import Limits, probe
from pipeline.store.format import Encoding
from tests.pipeline.support import media_zoo as zoo
from tests.pipeline.support.stores import cut_of

QUICK = {"h264_bframes_aac48.mp4", "edit_list.mp4", "vfr.mkv", "truncated.mkv", "garbage.mp4"}
SETTINGS = TranscodeSettings()


def run(path: Path, settings: TranscodeSettings = SETTINGS) -> tuple[Item, bytes]:
    out = path.with_suffix(".item")
    out.unlink(missing_ok=True)
    item = transcode(path, out, settings)
    assert out.exists() == (not item.refused)
    assert not list(path.parent.glob("*.partial"))
    data = out.read_bytes() if out.exists() else b""
    assert len(data) == item.bytes
    return item, data


def frames_of(item: Item, data: bytes) -> list[np.ndarray]:
    """Luma planes as stored."""
    with av.open(io.BytesIO(data[: item.mp4_bytes])) as container:
        return [frame.to_ndarray()[: frame.height] for frame in container.decode(video=0)]


def sound_of(item: Item, data: bytes) -> np.ndarray:
    return np.frombuffer(data, "<i2", item.num_samples, item.mp4_bytes)


@pytest.mark.parametrize(
    "sample",
    [pytest.param(s, id=s.name, marks=() if s.name in QUICK else pytest.mark.integration) for s in zoo.ZOO],
)
@pytest.mark.parametrize("codec", ["h264", "vp9"])
def test_zoo(sample: zoo.Sample, codec: str, tmp_path: Path) -> None:
    path = tmp_path / sample.name
    sample.make(path)
    item, data = run(path, TranscodeSettings(codec=codec))
    assert (class_of(item), sample.reason in reason_of(item)) == (sample.expected, True), reason_of(item)
    if item.refused:
        return
    video = parse_fragments(data[: item.mp4_bytes], fps=Fraction(item.fps_num, item.fps_den), width=1, height=1)
    assert video.num_frames == item.num_frames
    lengths = np.diff([*video.first_frames, video.num_frames])
    assert lengths.max() <= 16
    assert (item.width % 16, item.height % 16) == (0, 0)
    frames = frames_of(item, data)
    assert len(frames) == item.num_frames
    if item.num_samples:
        assert 0 <= item.first_sample < item.num_samples
        assert item.num_samples <= round(item.num_frames * Fraction(item.fps_den, item.fps_num) * 16000)
    if sample.has_both:
        check_offsets(path, item, [float(frame.mean()) for frame in frames], sound_of(item, data))


def check_offsets(path: Path, item: Item, luma: list[float], sound: np.ndarray) -> None:
    """Offset between flash and click is that of the source, to half a frame (of the wider grid) and one sample."""
    info = probe(path)
    assert info.audio is not None
    flashes, clicks = zoo.measure_source(path, info.video.index, info.audio.index)
    step = item.fps_den / item.fps_num
    stored_flashes = zoo.bright_at(luma, [n * step for n in range(len(luma))])
    stored_clicks = zoo.loud_at(sound, 16000)
    assert len(stored_flashes) == len(flashes) == 3
    assert len(stored_clicks) == len(clicks) >= 1
    source = np.subtract(clicks, flashes[: len(clicks)])
    stored = np.subtract(stored_clicks, stored_flashes[: len(clicks)])
    if any("variable frame rate" in repair for repair in item.repairs):  # the nearest frame: half the source's step
        scan = scan_packets(info)
        step = max(step, float(np.diff(scan.video_times).max() * scan.video_time_base))
    assert np.abs(stored - source).max() <= step / 2 + 1 / 16000
    if "variable" not in reason_of(item):
        assert np.abs(stored - source).max() <= 0.0008  # one tick of a millisecond clock at most, whole frames never


def test_pictures_stand_upright(tmp_path: Path) -> None:
    for degrees in (0, 90, 180, 270):
        path = tmp_path / f"turned{degrees}.mp4"
        zoo.make(path, audio=None, seconds=0.2, rotation=degrees, size=(192, 96))
        item, data = run(path)
        picture = frames_of(item, data)[0].astype(np.float64)
        assert picture.shape == ((192, 96) if degrees in (90, 270) else (96, 192))
        across, down = picture[:, -8:].mean() - picture[:, :8].mean(), picture[-8:].mean() - picture[:8].mean()
        expected = {0: (1, 0), 90: (0, -1), 180: (-1, 0), 270: (0, 1)}[degrees]  # the ramp rises to the right at 0
        assert (round(across / 60), round(down / 60)) == expected


def test_pictures_are_the_source_s(tmp_path: Path) -> None:
    zoo.make(tmp_path / "a.mp4", audio=None, seconds=1.0)
    item, data = run(tmp_path / "a.mp4", TranscodeSettings(quality=10))
    with av.open(str(tmp_path / "a.mp4")) as container:
        source = [frame.to_ndarray()[:96].astype(int) for frame in container.decode(video=0)]
    stored = frames_of(item, data)
    assert max(np.abs(a - b).mean() for a, b in zip(source, stored, strict=True)) < 1.0


def test_full_range_becomes_limited(tmp_path: Path) -> None:
    zoo.make(tmp_path / "full.avi", video="mjpeg", audio=None, pixel_format="yuvj420p", seconds=1.0)
    item, data = run(tmp_path / "full.avi")
    flash = frames_of(item, data)[15]
    assert 233 <= flash.mean() <= 236  # white is 235 in limited range, 255 in the source
    assert item.notes == ("pixel format yuvj420p to yuv420p",)


@pytest.mark.parametrize(
    ("size", "aspect", "side", "stored", "display"),
    [
        ((340, 256), None, 256, (352, 256), (340, 256)),
        ((640, 360), None, 256, (464, 256), (455, 256)),
        ((360, 640), None, 256, (256, 464), (256, 455)),
        ((160, 120), None, 256, (160, 128), (160, 120)),
        ((128, 96), Fraction(4, 3), 256, (128, 96), (171, 96)),
        ((720, 576), Fraction(16, 15), 256, (352, 256), (341, 256)),
    ],
)
def test_sizes(
    size: tuple[int, int],
    aspect: Fraction | None,
    side: int,
    stored: tuple[int, int],
    display: tuple[int, int],
    tmp_path: Path,
) -> None:
    zoo.make(tmp_path / "s.mp4", audio=None, seconds=0.08, size=size, aspect=aspect)
    item, _ = run(tmp_path / "s.mp4", TranscodeSettings(short_side_px=side))
    assert (item.width, item.height) == stored
    assert (item.display_width, item.display_height) == display


def test_same_bytes_every_time(tmp_path: Path) -> None:
    zoo.make(tmp_path / "a.mp4", seconds=1.0)
    for codec in ("h264", "vp9"):
        first, second = (run(tmp_path / "a.mp4", TranscodeSettings(codec=codec)) for _ in range(2))
        assert first[0].sha256 == second[0].sha256
        assert first[1] == second[1]


@pytest.mark.parametrize(("codec", "encoder"), [("h264", "libx264"), ("vp9", "libvpx-vp9")])
def test_fit_stream_is_copied(codec: str, encoder: str, tmp_path: Path) -> None:
    options = {
        "h264": {"x264-params": "keyint=12:min-keyint=12:scenecut=0:bframes=0"},
        "vp9": {"g": "12", "keyint_min": "12", "lag-in-frames": "0", "auto-alt-ref": "0"},
    }[codec]
    zoo.make(tmp_path / "fit.mp4", video=encoder, video_options=options)
    item, data = run(tmp_path / "fit.mp4", TranscodeSettings(codec=codec))
    assert (item.copied, item.notes) == (True, ("video copied without encoding",))
    with av.open(str(tmp_path / "fit.mp4")) as container:
        source = [frame.to_ndarray()[: frame.height] for frame in container.decode(video=0)]
    assert all((a == b).all() for a, b in zip(source, frames_of(item, data), strict=True))
    luma = [float(frame.mean()) for frame in source]
    check_offsets(tmp_path / "fit.mp4", item, luma, sound_of(item, data))
    video = parse_fragments(data[: item.mp4_bytes], fps=Fraction(25), width=128, height=96)
    assert video.first_frames == (0, 12, 24, 36, 48, 60, 72)
    for number in (0, 30, 74):  # any cut decodes by itself to the frames that it says
        piece, first = cut_of(video, number, number)
        with av.open(io.BytesIO(piece)) as container:
            cut = [frame.to_ndarray()[:96] for frame in container.decode(video=0)]
        assert (cut[number - first] == source[number]).all()
    again, _ = run(tmp_path / "fit.mp4", TranscodeSettings(codec=codec, copy_fit_streams=False))
    assert not again.copied


@pytest.mark.parametrize(
    "unfit",
    [
        {"x264-params": "keyint=12:scenecut=0:bframes=2"},
        {"x264-params": "keyint=50:scenecut=0:bframes=0"},
        {"x264-params": "keyint=12:min-keyint=12:scenecut=0:bframes=0:open-gop=1:intra-refresh=1"},
    ],
)
def test_unfit_stream_is_encoded(unfit: dict[str, str], tmp_path: Path) -> None:
    zoo.make(tmp_path / "unfit.mp4", video_options=unfit, audio=None)
    item, _ = run(tmp_path / "unfit.mp4")
    assert (item.copied, class_of(item)) == (False, "silent")


def test_damaged_fit_stream_is_not_copied(tmp_path: Path) -> None:
    options = {"x264-params": "keyint=12:min-keyint=12:scenecut=0:bframes=0"}
    zoo.make(
        tmp_path / "bad.mp4", video_options=options, audio=None, size=(320, 240), options={"movflags": "faststart"}
    )
    zoo.flip(tmp_path / "bad.mp4", 2, 4, 0.6)
    item, _ = run(tmp_path / "bad.mp4")
    assert (item.copied, class_of(item)) == (False, "repaired")
    assert "damaged" in reason_of(item)


def test_rate_is_reduced(tmp_path: Path) -> None:
    zoo.make(tmp_path / "fast.mp4", fps=Fraction(50), seconds=2.4)
    item, data = run(tmp_path / "fast.mp4", TranscodeSettings(max_fps="25"))
    assert (item.fps_num, item.num_frames, class_of(item)) == (25, 60, "fine")
    assert zoo.bright_at([float(f.mean()) for f in frames_of(item, data)], [n / 25 for n in range(60)]) == [
        0.6,
        1.4,
        2.2,
    ]


def test_gap_of_minutes_is_refused_without_filling_it(tmp_path: Path) -> None:
    zoo.make(tmp_path / "gap.mkv", audio=None, times_s=[0.0, 0.04, 0.08, 120.0, 120.04])
    item, _ = run(tmp_path / "gap.mkv")
    assert item.refused == "video time stamps jump by 119.9 s, more than 60 s"
    item, _ = run(tmp_path / "gap.mkv", TranscodeSettings(limits=Limits(max_gap_s=1e9, max_duration_s=130)))
    assert item.num_frames == round(120.08 * item.fps_num / item.fps_den)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"codec": "av1"}, "codec"),
        ({"gop": 40}, r"gop \(40\) must be 1 to 16 frames; 12 is the default"),
        ({"gop": 12, "codec": "mjpeg"}, r"gop \(12\) must be 1 frame for mjpeg"),
        ({"quality": 0, "codec": "mjpeg"}, r"quality \(0\) must be 1 to 31 for mjpeg; 4 is the default"),
        ({"fastdecode": False, "codec": "vp9"}, r"fastdecode \(off\) must be on for codec vp9"),
        ({"short_side_px": 8}, "short_side_px"),
        ({"max_fps": "0"}, "max_fps"),
    ],
)
def test_settings_are_checked(settings: dict[str, object], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        TranscodeSettings(**settings)  # type: ignore[arg-type]
    for right in (TranscodeSettings(max_fps="30"), TranscodeSettings(codec="mjpeg"), TranscodeSettings(gop=8)):
        assert TranscodeSettings.from_json(right.to_json()) == right


def test_defaults_are_those_that_the_table_of_settings_speaks_for() -> None:
    chosen, pictures = TranscodeSettings(), TranscodeSettings(codec="mjpeg")
    assert (chosen.codec, chosen.frames_per_fragment, chosen.rate_factor, chosen.fastdecode) == ("h264", 12, 23, True)
    assert (pictures.frames_per_fragment, pictures.rate_factor) == (1, 4)
    assert TranscodeSettings(quality=20, max_fps="15").encoding == Encoding(20, max_fps="15")


def test_fastdecode_can_be_left_out(tmp_path: Path) -> None:
    zoo.make(tmp_path / "a.mp4", seconds=1.0, audio=None)
    found = {}
    for fastdecode in (True, False):
        settings = TranscodeSettings(fastdecode=fastdecode, copy_fit_streams=False)
        _, data = run(tmp_path / "a.mp4", settings)
        found[fastdecode] = re.search(rb"cabac=(\d) .*deblock=(\d)", data)
    assert [match.groups() if match else None for match in found.values()] == [(b"0", b"0"), (b"1", b"1")]


def test_every_picture_of_mjpeg_is_a_fragment(tmp_path: Path) -> None:
    zoo.make(tmp_path / "a.mp4", seconds=1.0, audio=None)
    item, data = run(tmp_path / "a.mp4", TranscodeSettings(codec="mjpeg"))
    video = parse_fragments(data[: item.mp4_bytes], fps=Fraction(item.fps_num, item.fps_den), width=1, height=1)
    assert video.first_frames == tuple(range(item.num_frames))
    assert all(b"CS=ITU601" in piece for piece in video.fragments)  # limited range


def test_the_track_ends_where_the_source_s_audio_does(tmp_path: Path) -> None:
    zoo.make(tmp_path / "a.mkv", seconds=3.0, audio="pcm_s16le", audio_seconds=1.0, audio_start_s=0.5)
    item, data = run(tmp_path / "a.mkv")
    assert item.num_frames == 75
    assert abs(item.first_sample - 8000) <= 16  # a millisecond clock
    assert abs(item.num_samples - 24000) <= 16
    sound = sound_of(item, data)
    assert len(sound) == item.num_samples
    assert not sound[: item.first_sample].any()


def test_display_sizes_that_a_store_cannot_hold_are_refused(tmp_path: Path) -> None:
    zoo.make(tmp_path / "a.mkv", seconds=0.08, audio=None, size=(4096, 16), aspect=Fraction(4))
    item, _ = run(tmp_path / "a.mkv")
    assert item.refused == "display size (16384x16) must be at most 8192 px a side"
