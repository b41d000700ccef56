"""From a folder to a verified store: accounting, samples, windows, determinism, kills at random times."""

import contextlib
import hashlib
import json
import os
import random
import re
import shutil
import signal
import sqlite3
import subprocess
import sys
import tempfile
import time
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest

from pipeline.annotations import read
from pipeline.annotations.report import Report
from pipeline.annotations.rows import Annotations, Row, TimedLabel
from pipeline.dataset import FLAG_REPAIRED, FLAG_SHORT, FLAG_SILENT
from pipeline.ingest.item import IngestError, StoreShape, TranscodeSettings
from pipeline.ingest.run import IngestOptions, Progress, ingest
from pipeline.store.reader import Store
from pipeline.store.verify import verify_store
from tests.pipeline.support import media_zoo as zoo

pytestmark = pytest.mark.integration
ROOT = Path(__file__).resolve().parents[3]
MIX = (
    *("h264_aac.mp4", "vp9_opus.webm", "mpeg4_mp3.avi", "vfr.mkv", "rotated.mp4", "video_only.mp4", "short.mp4"),
    *("truncated.mkv", "garbage.mp4", "empty.mp4", "huge_rate.avi", "h264_aac.ts", "two_video_streams.mp4"),
)


@pytest.fixture(scope="module")
def mix(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with two classes of odd files."""
    folder = tmp_path_factory.mktemp("mix")
    for sample in zoo.ZOO:
        if sample.name in MIX:
            target = folder / ("even" if MIX.index(sample.name) % 2 == 0 else "odd") / sample.name
            target.parent.mkdir(exist_ok=True)
            sample.make(target)
    return folder


def digest(store: Path) -> dict[str, str]:
    files = sorted(path for path in store.rglob("*") if path.is_file())
    return {str(path.relative_to(store)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def rows(*rows: Row, classes: tuple[str, ...] = ("a", "b", "c")) -> Annotations:
    return Annotations("test", rows, {"action": classes}, Report("test", listed=len(rows), rows=len(rows)))


def test_mixed_folder(mix: Path, tmp_path: Path) -> None:
    seen: list[Progress] = []
    annotations = read("folder", None, mix)
    report = ingest(annotations, mix, tmp_path / "store", options=IngestOptions(workers=2), progress=seen.append)
    assert report.counts == {"fine": 4, "repaired": 4, "short": 1, "silent": 1, "refused": 3}
    assert sum(report.counts.values()) == len(report.inputs) == len(MIX)
    assert [state.done for state in seen] == list(range(1, len(MIX) + 1))
    assert sum(report.samples.values()) + sum(report.dropped.values()) == len(annotations.rows)
    expected = {s.name: (s.expected, s.reason) for s in zoo.ZOO}
    written = json.loads((tmp_path / "store.report.json").read_text())
    assert written["classes"] == report.counts
    for entry in written["files"]:
        kind, reason = expected[Path(entry["video"]).name]
        assert entry["class"] == kind
        assert reason in entry["reason"]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["store", "store.report.json"]
    store = Store.open(tmp_path / "store")
    assert verify_store(store.path) == []
    media = store.media
    flags = {Path(media.id(i)).name: int(media.flags[i]) for i in range(len(media.num_frames))}
    assert flags["video_only.mp4"] == FLAG_SILENT
    assert flags["short.mp4"] == FLAG_SHORT
    assert flags["vfr.mkv"] == FLAG_REPAIRED
    assert flags["h264_aac.mp4"] == 0
    train = store.split("train")
    labels = {train.samples.id(i): train.samples.label_of(i, "action") for i in range(len(train.samples))}
    assert all(label == (0 if name.startswith("even/") else 1) for name, label in labels.items())


def test_offset_survives_the_whole_way(mix: Path, tmp_path: Path) -> None:
    ingest(read("folder", None, mix, {"val_fraction": "0"}), mix, tmp_path / "store", TranscodeSettings(codec="vp9"))
    data = Store.open(tmp_path / "store").split("train")
    for i in range(len(data.media.num_frames)):
        name = Path(data.media.id(i)).name
        if name in ("video_only.mp4", "short.mp4", "truncated.mkv"):
            continue
        count = int(data.media.num_frames[i])
        luma = [float(plane.mean()) for plane in data.read_frames(i, np.arange(count))[0]]
        flashes = zoo.bright_at(luma, [n / data.media.fps(i) for n in range(count)])
        clicks = zoo.loud_at(data.read_audio(i, 0, int(data.media.num_samples[i])), 16000)
        assert len(flashes) == len(clicks) == 3
        source = {"mpeg4_mp3.avi": -0.014943}.get(name, 0.0)  # the delay that this MP3 encoder leaves in AVI
        step = max(1 / data.media.fps(i), 0.06 if name.startswith(("vfr", "claims")) else 0)  # its longest step
        assert np.abs(np.subtract(clicks, flashes) - source).max() <= step / 2 + 1 / 16000


def test_windows_on_a_long_video(tmp_path: Path) -> None:
    (tmp_path / "videos").mkdir()
    zoo.make(tmp_path / "videos" / "long.mp4", seconds=60.0, start_s=0.0)
    timed = (TimedLabel(1, 0.0, 12.0), TimedLabel(2, 50, 55))
    annotations = rows(
        Row("first", "train", "long.mp4", 1.0, 3.0, {"action": (0,)}),
        Row("middle", "train", "long.mp4", 31.0, 33.5, {"action": (1,)}, key_time_s=32.0),
        Row("wide", "val", "long.mp4", 10.0, 35.0, {"action": (2,)}, timed),
        Row("late", "val", "long.mp4", 58.0, 64.0, {"action": (2,)}),
        Row("outside", "val", "long.mp4", 61.0, 64.0, {"action": (2,)}),
    )  # fmt: skip
    report = ingest(annotations, tmp_path / "videos", tmp_path / "store", shape=StoreShape(chunk_s=10, overlap_s=4))
    assert report.dropped == {"lies outside its video": 1}
    assert (report.shortened, report.media) == (1, 4)
    store = Store.open(tmp_path / "store")
    assert verify_store(store.path) == []
    train, val, media = store.split("train"), store.split("val"), store.media
    size = sum(path.stat().st_size for path in (tmp_path / "store" / "shards").iterdir())
    cuts = sum(len(train.read_video(i, 0, int(media.num_frames[i]) - 1).data) for i in range(4))
    assert cuts > 0.6 * (size - 2 * 16000 * 60)  # four windows: about 55 of 60 s
    at = {data.samples.id(i): (data, i) for data in (train, val) for i in range(len(data.samples))}
    index = {media.id(i): i for i in range(4)}
    assert sorted(index)[0] == "long.mp4#0000000-0000252"
    sources = dict(zip(index, _source_starts(tmp_path / "store"), strict=True))
    for name, begin, end in [("first", 1.0, 3.0), ("middle", 31.0, 33.5), ("wide", 10.0, 35.0), ("late", 58.0, 60.0)]:
        data, i = at[name]
        start = sources[media.id(int(data.samples.media[i]))]
        assert start + data.samples.start_s[i] == pytest.approx(begin)
        assert start + data.samples.end_s[i] == pytest.approx(end)
    data, i = at["middle"]
    assert sources[media.id(int(data.samples.media[i]))] + data.samples.key_time_s[i] == pytest.approx(32.0)
    data, i = at["wide"]
    actions = data.samples.actions(i)
    start = sources[media.id(int(data.samples.media[i]))]
    assert actions.label.tolist() == [1]
    assert (actions.start_s[0], actions.end_s[0] + start) == (0.0, pytest.approx(12.0))
    _same_as_source(tmp_path / "videos" / "long.mp4", store, sources)


def test_a_video_too_long_for_a_shard_costs_that_one(tmp_path: Path) -> None:
    """And its samples are counted once, whether they lie in the video or not."""
    videos = tmp_path / "videos"
    videos.mkdir()
    zoo.make(videos / "a.mp4", seconds=2.0)
    zoo.make(videos / "long.mp4", seconds=40.0)
    annotations = rows(
        Row("a", "train", "a.mp4", labels={"action": (0,)}),
        Row("whole", "train", "long.mp4", labels={"action": (0,)}),
        Row("longer", "train", "long.mp4", 1.0, 90.0, {"action": (1,)}),
        Row("outside", "train", "long.mp4", 70.0, 80.0, {"action": (1,)}),
    )
    shape = StoreShape(shard_bytes=1 << 20)  # 40 s of sound are 1.22 MiB
    report = ingest(annotations, videos, tmp_path / "store", shape=shape)
    assert report.counts["refused"] == 1
    assert report.inputs["long.mp4"].refused == (
        "too long for a shard: 1.2 MiB in one piece, more than 1 MiB; raise --shard-mib, or cut the video or its "
        "samples"
    )
    assert report.dropped == {"video refused": 2, "lies outside its video": 1}
    assert (report.samples, report.shortened, report.media) == ({"train": 1}, 0, 1)
    assert verify_store(tmp_path / "store") == []
    shape = StoreShape(shard_bytes=1 << 20, chunk_s=10, overlap_s=4)
    part = rows(Row("part", "train", "long.mp4", 1.0, 8.0, {"action": (1,)}))
    assert ingest(part, videos, tmp_path / "parts", shape=shape).samples == {"train": 1}  # windows need no whole piece


def test_timed_labels_outside_their_video_are_counted(tmp_path: Path) -> None:
    (tmp_path / "videos").mkdir()
    zoo.make(tmp_path / "videos" / "a.mp4", seconds=3.0)
    timed = (TimedLabel(0, 0.5, 1.0), TimedLabel(1, 2.5, 9.0), TimedLabel(2, 6.4, 9.6))
    annotations = rows(Row("a", "train", "a.mp4", labels={"action": (0, 1, 2)}, actions=timed))
    report = ingest(annotations, tmp_path / "videos", tmp_path / "store")
    samples = Store.open(tmp_path / "store").split("train").samples
    assert samples.actions(0).label.tolist() == [0, 1]
    assert samples.labels("action").row(0).tolist() == [0, 1, 2]
    assert report.head()["timed_labels_outside_their_video"] == 1
    assert "timed labels outside their video, for evaluations only: 1" in report.lines()


def test_recordings_joined_without_new_time_stamps_are_refused(tmp_path: Path) -> None:
    """The second half of a transport stream whose clock starts again would be lost."""
    videos = tmp_path / "videos"
    videos.mkdir()
    zoo.make(videos / "once.ts", seconds=3.0)
    (videos / "twice.ts").write_bytes(2 * (videos / "once.ts").read_bytes())
    os.symlink("loop.mp4", videos / "loop.mp4")
    report = ingest(read("folder", None, videos, {"val_fraction": "0"}), videos, tmp_path / "store")
    assert report.inputs["once.ts"].refused == ""
    assert re.match(
        r"video time stamps start again: (\d+) of \d+ frames lie 1 s or more before earlier ones; give joined",
        report.inputs["twice.ts"].refused,
    )
    assert report.inputs["loop.mp4"].refused.startswith("not a regular file")


def _source_starts(store: Path) -> list[float]:
    import pyarrow as pa

    with pa.ipc.open_file(str(store / "index.arrow")) as file:
        return list(file.read_all().column("source_start_s").to_pylist())


def _same_as_source(path: Path, store: Store, sources: dict[str, float]) -> None:
    """Frames and samples of each window are those of the source at its time."""
    with av.open(str(path)) as container:
        luma = [frame.reformat(format="gray").to_ndarray().mean() for frame in container.decode(video=0)]
    click = zoo.clicks(60.0, 16000, zoo.FLASHES_S)
    data = store.split("train")
    for i in range(len(store.media.num_frames)):
        start = sources[store.media.id(i)]
        frames = np.array([0, 5, int(store.media.num_frames[i]) - 1])
        stored = data.read_frames(i, frames)[0].reshape(3, -1).mean(1)
        wanted = [luma[round(start * 25) + n] for n in frames]
        assert np.abs(stored - [16 + w * 219 / 255 for w in wanted]).max() < 3
        sound = data.read_audio(i, 0, int(store.media.num_samples[i])) / 32768
        truth = click[round(start * 16000) :][: len(sound)]
        assert np.abs(sound - truth).max() < 0.15


def test_workers_and_order_do_not_matter(mix: Path, tmp_path: Path) -> None:
    annotations = read("folder", None, mix)
    for workers in (1, 3):
        ingest(annotations, mix, tmp_path / f"store{workers}", options=IngestOptions(workers=workers))
    assert digest(tmp_path / "store1") == digest(tmp_path / "store3")
    assert (tmp_path / "store1.report.json").read_bytes() == (tmp_path / "store3.report.json").read_bytes()


def test_shards_are_bounded(mix: Path, tmp_path: Path) -> None:
    ingest(read("folder", None, mix), mix, tmp_path / "store", shape=StoreShape(shard_bytes=120_000))
    sizes = [path.stat().st_size for path in sorted((tmp_path / "store" / "shards").iterdir())]
    assert len(sizes) > 5
    assert max(sizes) <= 120_000
    assert verify_store(tmp_path / "store") == []


def test_video_larger_than_a_shard_is_stored_window_by_window(tmp_path: Path) -> None:
    (tmp_path / "v").mkdir()
    zoo.make(tmp_path / "v" / "long.mp4", seconds=60.0)
    annotations = rows(
        *(Row(f"{t}", "train", "long.mp4", t, t + 1.0, {"action": (0,)}) for t in (3.0, 20.0, 40.0, 57.0))
    )
    for name, limit in (("whole", 256 << 20), ("pieces", 500_000)):
        ingest(annotations, tmp_path / "v", tmp_path / name, shape=StoreShape(limit, 10, 4))
    whole, pieces = (Store.open(tmp_path / name).split("train") for name in ("whole", "pieces"))
    assert list(whole.media.num_frames) == list(pieces.media.num_frames)
    for i in range(len(whole.media.num_frames)):
        last = int(whole.media.num_frames[i]) - 1
        assert (whole.read_video(i, 0, last).data == pieces.read_video(i, 0, last).data).all()
        count = int(whole.media.num_samples[i])
        assert (whole.read_audio(i, 0, count) == pieces.read_audio(i, 0, count)).all()


def test_target_work_folder_and_empty_input_are_checked(mix: Path, tmp_path: Path) -> None:
    with pytest.raises(IngestError, match="at least one row"):
        ingest(rows(), mix, tmp_path / "store")
    annotations = rows(Row("x", "train", "even/nothing.mp4", labels={"action": (0,)}))
    with pytest.raises(IngestError, match=r"(?s)samples \(0\) must be at least one.*not a regular file"):
        ingest(annotations, mix, tmp_path / "store")
    assert not (tmp_path / "store").exists()
    annotations = read("folder", None, mix)
    ingest(annotations, mix, tmp_path / "store")
    with pytest.raises(IngestError, match="target must not exist"):
        ingest(annotations, mix, tmp_path / "store")
    before = digest(tmp_path / "store")
    ingest(annotations, mix, tmp_path / "store", shape=StoreShape(overwrite=True))
    assert digest(tmp_path / "store") == before


def test_changed_payload_is_found_and_done_again(mix: Path, tmp_path: Path) -> None:
    annotations = read("folder", None, mix)
    ingest(annotations, mix, tmp_path / "whole")
    process = start(mix, tmp_path / "store")
    work = tmp_path / "store.work"
    while len(journal_keys(work)) < 4:
        time.sleep(0.02)
    process.kill()
    process.wait()
    noted = [work / "items" / key[:2] / key for key in journal_keys(work)]  # others are done again anyway
    victim = max((path for path in noted if path.is_file()), key=lambda path: path.stat().st_size)
    content = bytearray(victim.read_bytes())
    content[len(content) // 2] ^= 1
    victim.write_bytes(content)
    with pytest.raises(IngestError, match="run again to redo it"):
        ingest(annotations, mix, tmp_path / "store")
    ingest(annotations, mix, tmp_path / "store")
    assert digest(tmp_path / "store") == digest(tmp_path / "whole")


def start(videos: Path, out: Path) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "experiments.prepare", "folder", "--videos", str(videos), "--out", str(out)]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def journal_keys(work: Path) -> list[str]:
    """Keys in the order of their rows, of a copy, as a kill would leave it: the run holds the journal alone."""
    with tempfile.TemporaryDirectory() as folder:
        for path in work.glob("journal.sqlite*"):
            with contextlib.suppress(FileNotFoundError):  # the run ended in the meantime
                shutil.copy(path, folder)
        copy = Path(folder) / "journal.sqlite"
        if not copy.exists():
            return []
        with contextlib.closing(sqlite3.connect(copy)) as database:
            if not database.execute("SELECT 1 FROM sqlite_master WHERE name = 'items'").fetchall():
                return []
            return [key for (key,) in database.execute("SELECT key FROM items ORDER BY rowid")]


def kill_at(videos: Path, out: Path, finished: int, pause_s: float) -> bool:
    """Run until that many files are finished, wait a little, kill; False when the run had ended before."""
    process = start(videos, out)
    work = out.with_name(out.name + ".work")
    while process.poll() is None and len(journal_keys(work)) < finished:
        time.sleep(0.01)
    time.sleep(pause_s)
    if process.poll() is not None:
        assert process.returncode == 0
        return False
    process.send_signal(signal.SIGKILL)
    process.wait()
    return True


@pytest.mark.parametrize("trials", [2, pytest.param(10, marks=pytest.mark.slow)])
def test_sigkill_at_random_times(trials: int, mix: Path, tmp_path: Path) -> None:
    """Kills fall on the start, on files in flight, on the assembly and on the clean-up; some runs meet two of them."""
    videos = tmp_path / "videos"
    shutil.copytree(mix, videos / "part0")
    shutil.copytree(mix, videos / "part1")
    assert start(videos, tmp_path / "whole").wait() == 0
    expected, chance = digest(tmp_path / "whole"), random.Random(5)
    files, kills = 2 * len(MIX), 0
    out, work = tmp_path / "store", tmp_path / "store.work"
    while kills < trials:
        finished: list[str] = []
        while True:
            target = chance.choice([0, files, chance.randint(0, files)])
            last = chance.random() < 0.5
            if not kill_at(videos, out, 10**9 if last else target, chance.uniform(0, 0.15)):
                break
            kills += 1
            if out.exists() and not work.exists():
                break  # killed while it deleted its work folder
            assert not out.exists() or (out / "store.json").exists()
            now = journal_keys(work)
            assert now[: len(finished)] == finished
            finished = now
        assert digest(out) == expected
        assert (tmp_path / "store.report.json").read_bytes() == (tmp_path / "whole.report.json").read_bytes()
        assert sorted(path.name for path in tmp_path.glob("store*")) == ["store", "store.report.json"]
        shutil.rmtree(out)


def test_interrupt_keeps_finished_files(mix: Path, tmp_path: Path) -> None:
    process = start(mix, tmp_path / "store")
    while len(journal_keys(tmp_path / "store.work")) < 3:
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    assert process.wait(30) == 130
    kept = journal_keys(tmp_path / "store.work")
    assert len(kept) >= 3
    assert not list((tmp_path / "store.work").rglob("*.partial"))
    states: list[Progress] = []
    ingest(read("folder", None, mix), mix, tmp_path / "store", progress=states.append)
    assert states[0].resumed == len(kept)
    assert len(states) == len(MIX) - len(kept)


def test_children_die_with_a_killed_parent(mix: Path, tmp_path: Path) -> None:
    process = start(mix, tmp_path / "store")
    deadline = time.monotonic() + 60
    children: list[int] = []
    while not children and time.monotonic() < deadline:
        children = _children_of(process.pid)
        time.sleep(0.02)
    process.kill()
    process.wait()
    assert children
    while any(os.path.exists(f"/proc/{child}") for child in children) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert not any(os.path.exists(f"/proc/{child}") for child in children)


def _children_of(parent: int) -> list[int]:
    try:
        tasks = os.listdir(f"/proc/{parent}/task")
        return [int(c) for t in tasks for c in Path(f"/proc/{parent}/task/{t}/children").read_text().split()]
    except FileNotFoundError:
        return []


def test_real_media(real_media: Path, tmp_path: Path) -> None:
    """The four public clips: sizes, rates, choice of streams, classes."""
    annotations = read("folder", None, real_media, {"val_fraction": "0"})
    report = ingest(annotations, real_media, tmp_path / "store")
    data = Store.open(tmp_path / "store").split("train")
    media = data.media
    found = {
        media.id(i): (
            int(media.num_frames[i]),
            Fraction(int(media.fps_num[i]), int(media.fps_den[i])),
            (int(media.width[i]), int(media.height[i])),
            (int(media.display_width[i]), int(media.display_height[i])),
            int(media.num_samples[i]),
        )
        for i in range(len(media.num_frames))
    }
    assert found == {
        "hevc_10fps_silent.mp4": (10, Fraction(10), (128, 128), (128, 128), 0),
        "kinetics_silent_28fps.mp4": (280, Fraction(28), (352, 256), (427, 256), 0),
        # its sound ends at 6.5567 s; it has B-frames, and its first chunk is at 0
        "mpeg4_mp3_25fps.avi": (164, Fraction(25), (320, 240), (320, 240), 104908),
        "nasa_two_video_streams_aac.mp4": (390, Fraction(30000, 1001), (464, 256), (455, 256), 208208),
    }
    assert report.counts == {"fine": 2, "repaired": 0, "short": 1, "silent": 1, "refused": 0}
    for i in range(len(media.num_frames)):
        luma, _ = data.read_frames(i, np.arange(int(media.num_frames[i])))
        reference = _luma_means(real_media / media.id(i), 3 if "nasa" in media.id(i) else 0)
        assert np.abs(luma.reshape(len(luma), -1).mean(1) - reference).max() < 2.0


def _luma_means(path: Path, stream: int) -> list[float]:
    with av.open(str(path)) as container:
        return [float(f.to_ndarray()[: f.height].mean()) for f in container.decode(container.streams[stream])]
