"""A silent audio stream that is used beside one with sound is said, in the report of an ingest and of plain folders."""

from pathlib import Path

import pytest

from pipeline.folder.describe import describe
from pipeline.ingest.item import TranscodeSettings
from pipeline.ingest.report import IngestReport
from pipeline.ingest.transcode import transcode
from pipeline.media.packets import look
from pipeline.media.silence import SILENT_PEAK, sounds
from tests.pipeline.support.odd_media import write_tracks

WORDS = (
    "silent audio stream: 1 is used and silent, 2 has sound; to have that: ffmpeg -i IN -map 0:0 -map 0:2 -c copy OUT"
)


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
    path = write_tracks(tmp_path / name, codec, peaks)
    item = transcode(path, tmp_path / "payload", TranscodeSettings())
    assert (item.refused, item.warnings) == ("", (WORDS,) if warned else ())
    assert describe(path).warning == (WORDS if warned else "")


def test_a_stream_sounds_where_any_part_of_it_does(tmp_path: Path) -> None:
    info, scan = look(write_tracks(tmp_path / "a.mkv", "flac", (0, 9000)))
    assert scan.heard == (1, 2)
    assert [sounds(info, index) for index in scan.heard] == [False, True]


def test_the_report_prints_warnings_with_the_files(tmp_path: Path) -> None:
    report = IngestReport("folder")
    for name, peaks in (("a.mkv", (0, 9000)), ("b.mkv", (0, 9000)), ("c.mkv", (9000, 0))):
        report.inputs[name] = transcode(
            write_tracks(tmp_path / name, "flac", peaks), tmp_path / "out", TranscodeSettings()
        )
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

    write_tracks(tmp_path / "a.mkv", "flac", (0, 9000))
    write_tracks(tmp_path / "b.mkv", "flac", (9000, 9000))
    for _ in range(2):
        folder = open_source(tmp_path, num_threads=1)
    assert [record.getMessage() for record in caplog.records if "silent" in record.getMessage()] == [f"a.mkv: {WORDS}"]
    assert folder.splits[0] == "all"
