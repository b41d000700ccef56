"""What may be replaced at the target, what stays in the work folder, and what killed runs leave beside it."""

import errno
import hashlib
import os
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest

from pipeline.annotations.report import Report
from pipeline.annotations.rows import Annotations, Row
from pipeline.ingest.item import IngestError, Item, StoreShape, TranscodeSettings
from pipeline.ingest.journal import Journal
from pipeline.ingest.report import IngestReport
from pipeline.ingest.run import IngestOptions, _keys, ingest
from pipeline.ingest.target import (
    check_free,
    check_room,
    inputs_digest,
    is_own,
    tidy,
    unwritable_parent,
    work_folder,
    write_claim,
)
from pipeline.store.format import StoreError
from pipeline.store.reader import Store
from pipeline.store.verify import verify_store
from tests.pipeline.support import media_zoo as zoo


def annotations(*names: str, key_time_s: float | None = None) -> Annotations:
    rows = tuple(Row(name, "train", name, labels={"action": (0,)}, key_time_s=key_time_s) for name in names)
    return Annotations("test", rows, {"action": ("a",)}, Report("test", listed=len(rows), rows=len(rows)))


def store_folder(path: Path, text: str = "store") -> Path:
    path.mkdir()
    (path / "store.json").write_text(text)
    return path


def test_a_claim_holds_for_that_store_of_those_inputs_only(tmp_path: Path) -> None:
    out, work = store_folder(tmp_path / "s"), tmp_path / "s.work"
    work.mkdir()
    assert not is_own(out, work, "inputs")
    write_claim(work, hashlib.sha256(b"store").hexdigest(), "inputs")
    assert is_own(out, work, "inputs")
    assert not is_own(out, work, "other inputs")
    (out / "store.json").write_text("another store")
    assert not is_own(out, work, "inputs")
    shutil.rmtree(out)
    assert not is_own(out, work, "inputs")


def test_inputs_digest_covers_all_that_a_store_is_made_of() -> None:
    rows, settings, shape = annotations("a.mp4"), TranscodeSettings(), StoreShape()
    digests = [
        inputs_digest(rows, {"a.mp4": "k"}, settings, shape),
        inputs_digest(annotations("a.mp4", key_time_s=1.0), {"a.mp4": "k"}, settings, shape),
        inputs_digest(rows, {"a.mp4": "l"}, settings, shape),
        inputs_digest(rows, {"a.mp4": "k"}, TranscodeSettings(gop=8), shape),
        inputs_digest(rows, {"a.mp4": "k"}, settings, StoreShape(chunk_s=30)),
    ]
    assert len(set(digests)) == 5
    assert inputs_digest(rows, {"a.mp4": "k"}, settings, StoreShape(overwrite=True)) == digests[0]


def test_tidy_takes_leftovers_of_this_store_only(tmp_path: Path) -> None:
    out = tmp_path / "s+"
    for name in (".s+.12-0.partial", ".s+.val.12-0.partial", ".s+.12-x.partial", ".sss.12-0.partial"):
        (tmp_path / name).mkdir()
    (tmp_path / ".s+.13-0.partial").write_text("a file")
    (tmp_path / ".s+.report.json.partial").write_text("half a report")
    tidy(out)
    left = sorted(path.name for path in tmp_path.iterdir())
    assert left == [".s+.12-x.partial", ".s+.13-0.partial", ".s+.val.12-0.partial", ".sss.12-0.partial"]


def test_a_store_that_was_moved_aside_comes_back(tmp_path: Path) -> None:
    out = tmp_path / "s"
    store_folder(tmp_path / ".s.7-0.old", "first")
    tidy(out)
    assert (out / "store.json").read_text() == "first"
    store_folder(tmp_path / ".s.8-0.old", "replaced")
    tidy(out)
    assert (out / "store.json").read_text() == "first"
    assert [path.name for path in tmp_path.iterdir()] == ["s"]


def test_a_folder_that_is_no_store_is_refused_before_any_work(tmp_path: Path) -> None:
    (tmp_path / "s").mkdir()
    (tmp_path / "s" / "thesis.tex").write_text("years")
    for overwrite in (False, True):
        with pytest.raises(StoreError, match=r"target \(no store\) must not exist; choose another path"):
            ingest(annotations("a.mp4"), tmp_path, tmp_path / "s", shape=StoreShape(overwrite=overwrite))
    assert [path.name for path in tmp_path.iterdir()] == ["s"]
    store_folder(tmp_path / "t")
    check_free(tmp_path / "t", tmp_path / "t.work", True)


def test_a_target_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(IngestError, match=r"file/s\.work: the folder .* must be writable \(Not a directory\); choose"):
        ingest(annotations("a.mp4"), tmp_path, tmp_path / "file" / "s")
    for out in ("file/s", "file/below/s"):  # what the command asks before it begins
        with pytest.raises(IngestError, match=r"s\.work: the folder .* must be writable, /.*/file is not; choose"):
            check_free(tmp_path / out, tmp_path / f"{out}.work", False)
    check_free(tmp_path / "new" / "below" / "s", tmp_path / "new" / "below" / "s.work", False)
    for name in ("/", ".."):
        with pytest.raises(IngestError, match=r"target \(/\) must be a folder that can be made; name a new one"):
            work_folder(Path(os.path.abspath(Path("/") / name)))
    assert unwritable_parent(Path("/")) == (None if os.access("/", os.W_OK) else Path("/"))


def test_room_is_checked_before_the_store_is_written(tmp_path: Path) -> None:
    check_room(tmp_path / "s", 1, tmp_path / "s.work")
    with pytest.raises(IngestError, match=r"free space \(.* MiB\) must be at least 1,099,511,627,776 MiB.*s\.work"):
        check_room(tmp_path / "s", 2**60, tmp_path / "s.work")


@pytest.mark.integration
def test_a_full_disk_keeps_what_is_finished(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "v").mkdir()
    zoo.make(tmp_path / "v" / "a.mp4", seconds=1.0, audio=None)

    def run(clip_s: float, files: list[str]) -> IngestReport:
        where = (tmp_path / "v", tmp_path / "s")
        how = (TranscodeSettings(clip_s=clip_s), None, IngestOptions(workers=1))
        return ingest(annotations("a.mp4"), *where, *how, lambda state: files.append(state.video))

    def no_room(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    done: list[str] = []
    with monkeypatch.context() as patch:
        patch.setattr("pipeline.store.writer.StoreWriter.add_video", no_room)
        with pytest.raises(IngestError, match=r"/s: store must be writable to its end \(No space left on device\)"):
            run(2.13, done)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["s.work", "v"]
    with monkeypatch.context() as patch:
        patch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(free=100))
        with pytest.raises(IngestError, match="free space"):
            run(2.13, done)
    assert run(0.5, done).counts["short"] == 0
    assert done == ["a.mp4"]  # what counts as short is no reason to encode again
    assert verify_store(tmp_path / "s") == []


def test_finished_work_survives_a_forgotten_overwrite(tmp_path: Path) -> None:
    store_folder(tmp_path / "s")
    with Journal(tmp_path / "s.work") as journal:
        journal.add("key", Item(refused="x"))
    with pytest.raises(IngestError, match=r"pass --overwrite; what is finished stays in .*s\.work"):
        ingest(annotations("a.mp4"), tmp_path, tmp_path / "s")
    with Journal(tmp_path / "s.work") as journal:
        assert list(journal.items) == ["key"]


@pytest.fixture
def killed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A run that ended just after its store got its name: the store and the work folder are there."""
    (tmp_path / "v").mkdir()
    for name in ("a.mp4", "b.mp4"):
        zoo.make(tmp_path / "v" / name, seconds=0.2, audio=None)
    with monkeypatch.context() as patch:
        patch.setattr("pipeline.ingest.run._done_folder", _stop)
        with pytest.raises(KeyboardInterrupt):
            ingest(annotations("a.mp4"), tmp_path / "v", tmp_path / "s", options=IngestOptions(workers=1))
    assert (tmp_path / "s" / "store.json").exists()
    return tmp_path


def _stop(out: Path) -> Path:
    if (out / "store.json").exists():
        raise KeyboardInterrupt
    return out.with_name("nothing")


@pytest.mark.integration
def test_a_killed_run_replaces_its_own_store_and_no_other(killed: Path) -> None:
    before = (killed / "s" / "store.json").read_bytes()
    with pytest.raises(IngestError, match="target must not exist"):  # another data set of the same name
        ingest(annotations("b.mp4"), killed / "v", killed / "s")
    with pytest.raises(IngestError, match="target must not exist"):  # other settings
        ingest(annotations("a.mp4"), killed / "v", killed / "s", TranscodeSettings(gop=8))
    assert (killed / "s" / "store.json").read_bytes() == before
    ingest(annotations("a.mp4"), killed / "v", killed / "s", options=IngestOptions(workers=1))
    assert (killed / "s" / "store.json").read_bytes() == before
    assert sorted(path.name for path in killed.iterdir()) == ["s", "s.report.json", "v"]


@pytest.mark.integration
def test_a_store_put_in_the_place_of_a_killed_run_s_stays(killed: Path) -> None:
    shutil.rmtree(killed / "s")
    ingest(annotations("b.mp4"), killed / "v", killed / "t", options=IngestOptions(workers=1))
    (killed / "t").rename(killed / "s")
    with pytest.raises(IngestError, match="target must not exist"):
        ingest(annotations("a.mp4"), killed / "v", killed / "s", options=IngestOptions(workers=1))
    assert Store.open(killed / "s").media.id(0) == "b.mp4"


@pytest.mark.integration
def test_relative_paths_count_from_where_the_caller_stands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "v").mkdir()
    zoo.make(tmp_path / "v" / "a.mp4", seconds=0.2, audio=None)
    monkeypatch.chdir(tmp_path)
    report = ingest(annotations("a.mp4"), Path("v"), Path("s"), options=IngestOptions(workers=1))
    assert report.samples == {"train": 1}
    assert verify_store(tmp_path / "s") == []


@pytest.mark.integration
def test_what_lacked_time_is_tried_again_and_what_is_broken_is_not(tmp_path: Path) -> None:
    (tmp_path / "v").mkdir()
    zoo.make(tmp_path / "v" / "a.mp4", seconds=0.2, audio=None)
    (tmp_path / "v" / "b.mp4").write_bytes(b"no video")
    keys = _keys(("a.mp4", "b.mp4"), tmp_path / "v", TranscodeSettings(), {"a.mp4": None, "b.mp4": None})
    with Journal(tmp_path / "s.work") as journal:
        journal.add(keys["a.mp4"], Item(refused="decoding took longer than the deadline", for_resources=True))
        journal.add(keys["b.mp4"], Item(refused="container does not open"))
    again: list[str] = []
    report = ingest(
        annotations("a.mp4", "b.mp4"),
        tmp_path / "v",
        tmp_path / "s",
        options=IngestOptions(1),
        progress=lambda state: again.append(state.video),
    )
    assert again == ["a.mp4"]
    assert report.counts["refused"] == 1
    assert report.head()["refused_for_resources"] == 0


@pytest.mark.integration
def test_key_frames_outside_their_video_are_left_out(tmp_path: Path) -> None:
    (tmp_path / "v").mkdir()
    zoo.make(tmp_path / "v" / "a.mp4", seconds=2.0, audio=None)
    times = {"in": 1.0, "last": 1.99, "behind": 2.0, "far": 900.0}
    rows = tuple(Row(name, "train", "a.mp4", 0.5, 4.0, {"action": (0,)}, (), t) for name, t in times.items())
    listed = Annotations("test", rows, {"action": ("a",)}, Report("test", listed=4, rows=4))
    report = ingest(listed, tmp_path / "v", tmp_path / "s", options=IngestOptions(workers=1))
    assert report.dropped == {"key frame lies outside its video": 2}
    samples = Store.open(tmp_path / "s").split("train").samples
    assert [(samples.id(i), samples.key_time_s[i]) for i in range(2)] == [("in", 1.0), ("last", 1.99)]


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"deadline_s": float("nan")}, r"deadline_s \(nan\) must be seconds above 0"),
        ({"deadline_s": -1.0}, r"deadline_s \(-1\) must be seconds above 0"),
        ({"memory_gib": float("inf")}, r"memory_gib \(inf\) must be 0\.125 to 4096"),
        ({"memory_gib": float("nan")}, r"memory_gib \(nan\) must be"),
        ({"workers": -2}, r"workers \(-2\) must be 0 to"),
    ],
)
def test_options_are_checked(values: dict[str, float], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        IngestOptions(**values)  # type: ignore[arg-type]


def test_report_names_what_more_time_or_memory_may_save() -> None:
    report = IngestReport("t", {"a": Item(refused="late", for_resources=True), "b": Item(refused="no video")})
    assert sum("or after a crash: 1; raise --deadline-seconds" in line for line in report.lines()) == 1
    assert report.head()["refused_for_resources"] == 1
