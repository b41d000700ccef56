"""Only the annotated part of a source is read: the same pictures, sound and times as from all of it."""

from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest

from pipeline.annotations.report import Report
from pipeline.annotations.rows import Annotations, Row
from pipeline.ingest.item import StoreShape, TranscodeSettings
from pipeline.ingest.report import IngestReport
from pipeline.ingest.run import IngestOptions, ingest
from pipeline.ingest.spans import annotated_spans, part_of
from pipeline.media.packets import scan_packets
from pipeline.media.probe import probe
from pipeline.store.reader import Store
from tests.pipeline.support.plain_videos import FPS, write_video
from tests.pipeline.support.stores import numbered_frames, read_number

NUM_FRAMES = 240
SETTINGS = TranscodeSettings(codec="vp9", clip_s=0.5, copy_fit_streams=False)
SHAPE = StoreShape(overlap_s=2.0, chunk_s=4.0)
FORMS: dict[str, dict[str, Any]] = {
    "open-gop.mp4": {"options": {"g": "25", "bf": "3", "x264-params": "open-gop=1:keyint=25:scenecut=0"}},
    "opus.webm": {"codec": "libvpx-vp9", "audio_codec": "libopus", "options": {"g": "40", "cpu-used": "8"}},
    "late.mkv": {"times": range(10, 10 + NUM_FRAMES), "options": {"g": "30"}},
    "mpeg2.avi": {"codec": "mpeg4", "audio_codec": "mp3", "options": {"g": "15"}},
}


def row(video: str, start_s: float, end_s: float | None, name: str = "clip", **more: Any) -> Row:
    return Row(name, "train", video, start_s, end_s, labels={"action": (0,)}, **more)


def made(
    folder: Path, out: Path, *rows: Row, workers: int = 1, shape: StoreShape = SHAPE
) -> tuple[Store, IngestReport]:
    annotations = Annotations("test", rows, {"action": ("a",)}, Report("test", listed=len(rows), rows=len(rows)))
    report = ingest(annotations, folder, out, SETTINGS, shape, IngestOptions(workers=workers))
    return Store.open(out), report


def test_spans_hold_all_rows_of_a_video_and_what_clips_borrow() -> None:
    key = row("b.mp4", 899.5, 902.5, key_time_s=904.0)
    rows = [
        row("a.mp4", 3, 5),
        row("a.mp4", 20, 21.5),
        row("a.mp4", 0.5, 1),
        key,
        row("c.mp4", 1, 2),
        row("c.mp4", 0, None),
    ]
    assert annotated_spans(rows, 2.0) == {"a.mp4": (0.0, 23.5), "b.mp4": (897.5, 906.0), "c.mp4": None}


@pytest.mark.integration
@pytest.mark.parametrize("name", FORMS)
def test_a_part_is_what_the_whole_has_there(tmp_path: Path, name: str) -> None:
    write_video(tmp_path / name, frames=numbered_frames(NUM_FRAMES), **FORMS[name])
    whole, _ = made(tmp_path, tmp_path / "whole", row(name, 0.0, None), shape=StoreShape(chunk_s=0))
    part, report = made(tmp_path, tmp_path / "part", row(name, 5.0, 5.4))
    again, _ = made(tmp_path, tmp_path / "again", row(name, 5.0, 5.4), workers=2)
    assert part.digest == again.digest
    samples, columns = part.split("train").samples, part._index
    begin_s = float(columns.column("source_start_s")[0])
    assert begin_s + samples.start_s[0] == pytest.approx(5.0, abs=1e-6)
    assert begin_s + samples.end_s[0] == pytest.approx(5.4, abs=1e-6)
    if name.endswith(".avi"):  # its time stamps do not survive: read in full
        assert report.head()["read_in_part"] == 0
        return
    head, item = report.head(), report.inputs[name]
    assert (head["read_in_part"], head["classes"]["refused"], item.num_frames) == (1, 0, 60)
    assert head["left_out_s"] == pytest.approx(180 / FPS, abs=0.05)
    assert "read only where annotated: 1 inputs, 0.00 h left out" in report.lines()
    assert "only 4.00 to 6.40 s read, the rest is not annotated" in item.notes
    assert begin_s == pytest.approx(4.0, abs=0.011)
    ahead_s = begin_s - float(whole._index.column("source_start_s")[0])
    first = round(ahead_s * FPS)
    y, _ = part.read_frames(0, np.arange(60))
    assert [read_number(picture.astype(float)) for picture in y] == list(range(first, first + 60))
    sound = part.read_audio(0, 800, 36_000).astype(float)
    places = [round(ahead_s * 16_000) + 800 + lag for lag in range(-16, 17)]  # Matroska rounds stamps to 1 ms
    alike = [np.corrcoef(sound, whole.read_audio(0, place, 36_000))[0, 1] for place in places]
    assert max(alike) > 0.95  # between two samples
    if name.endswith(".mp4"):
        assert int(np.argmax(alike)) == 16


def test_parts_are_taken_where_they_pay_and_can_be_found(tmp_path: Path) -> None:
    write_video(tmp_path / "a.mp4", frames=numbered_frames(100), options={"g": "10"})
    info = probe(tmp_path / "a.mp4")
    scan = scan_packets(info)
    part = part_of(info, scan, (2.0, 3.0))
    assert part is not None
    assert len(part.of(scan).video_times) == FPS
    keys = [ticks * scan.video_time_base for ticks in scan.key_ticks]
    assert part.first_key is not None
    assert part.first_key * scan.video_time_base == max(key for key in keys if key <= 2) > Fraction(3, 2)
    assert part_of(info, scan, None) is None
    assert part_of(info, scan, (0.1, 3.9)) is None  # a twentieth less
    assert part_of(info, scan, (70.0, 80.0)) is None  # the samples are reported as outside


@pytest.mark.integration
def test_what_is_left_out_is_counted_in_seconds_of_the_source(tmp_path: Path) -> None:
    write_video(tmp_path / "a.mp4", frames=numbered_frames(NUM_FRAMES), options={"g": "10"})
    settings = replace(SETTINGS, max_fps="12.5")
    annotations = Annotations("test", (row("a.mp4", 5.0, 5.4),), {"action": ("a",)}, Report("test", listed=1, rows=1))
    report = ingest(annotations, tmp_path, tmp_path / "s", settings, SHAPE, IngestOptions(workers=1))
    item = report.inputs["a.mp4"]
    kept_s = item.num_frames * item.fps_den / item.fps_num
    assert kept_s == pytest.approx(2.4, abs=0.1)
    assert item.left_out_s == pytest.approx(NUM_FRAMES / FPS - kept_s, abs=0.1)


def trimmed(source: Path, target: Path, start_s: int) -> None:
    """Cut a video as tools do that encode nothing: packets before the cut stay, an edit list hides them."""
    with av.open(str(source)) as old, av.open(str(target), "w") as new:
        streams = {stream.index: new.add_stream_from_template(stream) for stream in old.streams}
        for packet in old.demux():
            if not packet.size or packet.pts is None or packet.dts is None:
                continue
            shift = round(start_s / packet.time_base)
            if packet.stream.type == "audio" and packet.pts < shift:
                continue
            packet.pts, packet.dts = packet.pts - shift, packet.dts - shift
            packet.stream = streams[packet.stream.index]
            new.mux(packet)


@pytest.mark.integration
def test_part_in_the_first_group_of_a_trimmed_file(tmp_path: Path) -> None:
    (tmp_path / "v").mkdir()
    write_video(tmp_path / "whole.mp4", frames=numbered_frames(NUM_FRAMES), options={"g": "100", "bf": "3"})
    trimmed(tmp_path / "whole.mp4", tmp_path / "v" / "cut.mp4", 1)
    assert scan_packets(probe(tmp_path / "v" / "cut.mp4")).cut_before > 0
    store, report = made(tmp_path / "v", tmp_path / "s", row("cut.mp4", 0.2, 1.4))
    assert (report.head()["read_in_part"], report.head()["samples_dropped"]) == (1, {})
    begin_s = float(store._index.column("source_start_s")[0])
    y, _ = store.read_frames(0, np.arange(10))
    first = FPS + round(begin_s * FPS)
    assert [read_number(picture.astype(float)) for picture in y] == list(range(first, first + 10))


@pytest.mark.integration
def test_part_begins_with_the_picture_that_is_on_screen(tmp_path: Path) -> None:
    every = {"times": range(0, 240, 8), "time_base": Fraction(1), "audio_codec": None}  # slides of 8 s
    write_video(tmp_path / "slides.mp4", frames=numbered_frames(30), options={"g": "10", "bf": "0"}, **every)
    store, report = made(tmp_path, tmp_path / "s", row("slides.mp4", 22.0, 25.0))
    assert (report.head()["read_in_part"], report.head()["samples_dropped"]) == (1, {})
    begin_s = float(store._index.column("source_start_s")[0])
    samples = store.split("train").samples
    assert [begin_s + float(t) for t in (samples.start_s[0], samples.end_s[0])] == pytest.approx([22.0, 25.0])
    fps = store.media.fps(0)
    y, _ = store.read_frames(0, np.array([int((23.0 - begin_s) * fps), int((24.5 - begin_s) * fps)]))
    assert [read_number(picture.astype(float)) for picture in y] == [2, 3]


@pytest.mark.integration
def test_part_of_a_stream_that_recovers_slowly_is_read_from_the_whole(tmp_path: Path) -> None:
    options = {"g": "150", "bf": "0", "x264-params": "intra-refresh=1:keyint=150"}
    texture = np.random.default_rng(0).integers(0, 255, (64, 400, 3), np.uint8)
    moving = [np.ascontiguousarray(np.roll(texture, 3 * i, 1)[:, :96]) for i in range(2 * NUM_FRAMES)]
    write_video(tmp_path / "refresh.mp4", frames=moving, options=options)
    scan = scan_packets(probe(tmp_path / "refresh.mp4"))
    begin_s = float(scan.key_ticks[2] * scan.video_time_base) + 1  # the margin of 1 s reaches back to a recovery point
    store, report = made(tmp_path, tmp_path / "s", row("refresh.mp4", begin_s, begin_s + 1))
    head = report.head()
    assert (head["classes"]["fine"], head["samples_dropped"], head["read_in_part"]) == (1, {}, 0)
    assert store.media.num_frames[0] > 0
    assert float(store._index.column("source_start_s")[0]) <= begin_s - 1
