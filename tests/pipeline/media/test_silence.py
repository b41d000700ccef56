"""A silent audio stream that is used beside one with sound is said, in the report of an ingest and of plain folders."""

from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest

from pipeline.folder.describe import describe
from pipeline.ingest.item import TranscodeSettings
from pipeline.ingest.report import IngestReport
from pipeline.ingest.transcode import transcode
from pipeline.media.packets import look
from pipeline.media.silence import SILENT_PEAK, sounds

WORDS = (
    "silent audio stream: 1 is used and silent, 2 has sound; to have that: ffmpeg -i IN -map 0:0 -map 0:2 -c copy OUT"
)


def write(path: Path, codec: str, peaks: tuple[int, ...], *, rate_hz: int = 48_000, seconds: float = 1.0) -> Path:
    """Video with a track a peak (of 32767), the first one stereo and the default where the container knows such."""
    with av.open(str(path), "w") as container:
        video: Any = container.add_stream("mpeg4", rate=25)
        video.width, video.height, video.pix_fmt = 64, 48, "yuv420p"
        sounding: list[Any] = []
        for number in range(len(peaks)):
            layout = "mono" if number else "stereo"
            sounding.append(container.add_stream(codec, rate=rate_hz, layout=layout))
            sounding[-1].disposition = av.stream.Disposition(0) if number else av.stream.Disposition.default
        packets = []
        for number in range(round(25 * seconds)):
            frame = av.VideoFrame.from_ndarray(np.full((48, 64, 3), 99, np.uint8), format="rgb24")
            frame.pts, frame.time_base = number, Fraction(1, 25)
            packets += video.encode(frame)
        packets += video.encode(None)
        for stream, peak in zip(sounding, peaks, strict=True):
            wave = np.round(peak * np.sin(np.arange(round(seconds * rate_hz)) / 9)).astype(np.int16)
            planes = np.repeat(wave, stream.channels).reshape(1, -1)
            sound = av.AudioFrame.from_ndarray(planes, format="s16", layout=stream.layout.name)
            sound.sample_rate, sound.time_base, sound.pts = rate_hz, Fraction(1, rate_hz), 0
            packets += [*stream.encode(sound), *stream.encode(None)]
        for packet in sorted(packets, key=lambda p: float((p.dts or 0) * p.time_base)):
            container.mux(packet)
    return path


@pytest.mark.parametrize(
    ("name", "codec", "peaks", "warned"),
    [
        ("a.mp4", "aac", (0, 9000), True),
        ("a.mkv", "flac", (0, 9000), True),
        ("b.mkv", "pcm_s16le", (SILENT_PEAK // 2, 9000), True),  # noise of a converter, below -60 dB
        ("a.avi", "libmp3lame", (0, 9000), True),
        ("c.mkv", "flac", (9000, 0), False),
        ("d.mkv", "flac", (0, 0), False),
        ("e.mkv", "flac", (0,), False),
        ("f.mkv", "flac", (9000, 9000), False),
    ],
)
def test_both_ways_say_it(name: str, codec: str, peaks: tuple[int, ...], warned: bool, tmp_path: Path) -> None:
    path = write(tmp_path / name, codec, peaks)
    item = transcode(path, tmp_path / "payload", TranscodeSettings())
    assert (item.refused, item.warnings) == ("", (WORDS,) if warned else ())
    assert describe(path).warning == (WORDS if warned else "")


def test_a_stream_sounds_where_any_part_of_it_does(tmp_path: Path) -> None:
    info, scan = look(write(tmp_path / "a.mkv", "flac", (0, 9000)))
    assert scan.heard == (1, 2)
    assert [sounds(info, index) for index in scan.heard] == [False, True]


def test_the_report_prints_warnings_with_the_files(tmp_path: Path) -> None:
    report = IngestReport("folder")
    for name, peaks in (("a.mkv", (0, 9000)), ("b.mkv", (0, 9000)), ("c.mkv", (9000, 0))):
        report.inputs[name] = transcode(write(tmp_path / name, "flac", peaks), tmp_path / "out", TranscodeSettings())
    lines = report.lines()
    start = lines.index("warnings about 2 inputs")
    assert lines[start + 1 : start + 4] == [
        "    2 silent audio stream",
        f"      a.mkv: {WORDS}",
        f"      b.mkv: {WORDS}",
    ]
    assert report.head()["with_warnings"] == 2


def test_a_plain_folder_says_it_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    from pipeline.open import open_source

    write(tmp_path / "a.mkv", "flac", (0, 9000))
    write(tmp_path / "b.mkv", "flac", (9000, 9000))
    for _ in range(2):
        folder = open_source(tmp_path, num_threads=1)
    assert [record.getMessage() for record in caplog.records if "silent" in record.getMessage()] == [f"a.mkv: {WORDS}"]
    assert folder.splits[0] == "all"
