"""Writing a store: all or nothing, and each rule has an error that says what to do."""

from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from pipeline.annotations.rows import TimedLabel
from pipeline.media.fragments import FragmentedVideo, encode_fragments
from pipeline.store.format import StoreError
from pipeline.store.reader import Store
from pipeline.store.rows import AudioRef, SampleRow
from pipeline.store.writer import StoreWriter

NAN, INF = float("nan"), float("inf")


def box(**changes: Any) -> Any:
    return SimpleNamespace(**{"x1": 0.0, "y1": 0.0, "x2": 1.0, "y2": 1.0, "labels": (0,), "score": 1.0} | changes)


@pytest.fixture(scope="module")
def video() -> FragmentedVideo:
    frames = [np.full((16, 16, 3), 9 * i, np.uint8) for i in range(20)]
    return encode_fragments(frames, fps=Fraction(10), width=16, height=16)


def writer_at(path: Path, **changes: object) -> StoreWriter:
    settings = {
        "video_codec": "vp9",
        "gop": 12,
        "short_side_px": 16,
        "dataset": "toy",
        "classes": {"action": ["a", "b"]},
    }
    return StoreWriter(path, **{**settings, **changes})  # type: ignore[arg-type]


def write(path: Path, video: FragmentedVideo, name: str = "m", **changes: object) -> None:
    with writer_at(path, **changes) as writer:
        writer.add_samples("train", [SampleRow(name, writer.add_media(name, writer.add_video(video)), 0, 1)])


def test_nothing_is_there_before_the_end(tmp_path: Path, video: FragmentedVideo) -> None:
    writer = writer_at(tmp_path / "s")
    writer.add_media("m", writer.add_video(video))
    assert not (tmp_path / "s").exists()
    assert writer.close() == tmp_path / "s"
    assert [path.name for path in tmp_path.iterdir()] == ["s"]


def test_an_exception_leaves_nothing(tmp_path: Path, video: FragmentedVideo) -> None:
    def broken() -> None:
        with writer_at(tmp_path / "s") as writer:
            writer.add_video(video)
            raise KeyError("ours")

    with pytest.raises(KeyError, match="ours"):
        broken()
    assert list(tmp_path.iterdir()) == []


def test_an_empty_store_is_an_error_and_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match=r"media \(0\) must be at least one"), writer_at(tmp_path / "s"):
        pass
    assert list(tmp_path.iterdir()) == []


def test_overwriting_must_be_asked_for(tmp_path: Path, video: FragmentedVideo) -> None:
    write(tmp_path / "s", video, "old")
    with pytest.raises(StoreError, match=r"target \(a store\) must not exist; pass overwrite=True"):
        writer_at(tmp_path / "s")
    assert Store.open(tmp_path / "s").media.id(0) == "old"
    write(tmp_path / "s", video, "new", overwrite=True)
    assert Store.open(tmp_path / "s").media.id(0) == "new"
    assert [path.name for path in tmp_path.iterdir()] == ["s"]


def test_something_else_is_never_overwritten(tmp_path: Path) -> None:
    (tmp_path / "s").mkdir()
    (tmp_path / "s" / "thesis.tex").write_text("years")
    with pytest.raises(StoreError, match=r"target \(no store\) must not exist; choose another path"):
        writer_at(tmp_path / "s", overwrite=True)
    assert (tmp_path / "s" / "thesis.tex").read_text() == "years"


def test_a_target_that_appears_meanwhile_is_kept(tmp_path: Path, video: FragmentedVideo) -> None:
    writer = writer_at(tmp_path / "s")
    writer.add_media("m", writer.add_video(video))
    write(tmp_path / "s", video, "first")
    with pytest.raises(StoreError, match="must not exist"):
        writer.close()
    writer.abort()
    assert Store.open(tmp_path / "s").media.id(0) == "first"
    assert [path.name for path in tmp_path.iterdir()] == ["s"]


def test_duplicate_ids_are_named(tmp_path: Path, video: FragmentedVideo) -> None:
    writer = writer_at(tmp_path / "s")
    reference = writer.add_video(video)
    writer.add_media("x", reference)
    writer.add_media("twice", reference)
    with pytest.raises(StoreError, match=r"media id \('twice'\) must be unique and not empty; it is row 1 already"):
        writer.add_media("twice", reference)
    with pytest.raises(StoreError, match=r"split train, sample 'q': id must be unique"):
        writer.add_samples("train", [SampleRow("q", 0, 0, 1), SampleRow("q", 1, 0, 1)])
    writer.abort()


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (SampleRow("q", 1, 0, 1), r"media \(1\) must be in 0\.\.0"),
        (SampleRow("q", -1, 0, 1), r"media \(-1\) must be"),
        (SampleRow("q", 2**63, 0, 1), r"sample 'q': .*too.*; numbers must fit in their columns"),
        (SampleRow("q", 0, 2, 1), r"end_s \(1\.0\) must be finite and >= start_s; correct what is added"),
        (SampleRow("q", 0, -0.1, 1), r"start_s \(-0\.1\) must be"),
        (SampleRow("q", 0, 0, NAN), r"end_s \(nan\) must be"),
        (SampleRow("q", 0, 0, 1, key_time_s=-1), r"key_time_s \(-1\.0\) must be NaN, or finite and >= 0"),
        (SampleRow("q", 0, 0, 1, {"action": (2,)}), r"labels_action \(2\) must be in the 2 classes"),
        (SampleRow("q", 0, 0, 1, {"verb": ()}), r"label sets \(\['verb'\]\) must be in \['action'\]; pass all"),
        (SampleRow("q", 0, 0, 1, actions=[TimedLabel(2, 0, 1)]), r"actions_label \(2\) must be in the 2 classes"),
        (SampleRow("q", 0, 0, 1, actions=[SimpleNamespace(label=1, start_s=NAN, end_s=1)]), r"actions_start_s \(nan\)"),
        (SampleRow("q", 0, 0, 1, actions=[SimpleNamespace(label=1, start_s=0, end_s=INF)]), r"actions_end_s \(inf\)"),
        (SampleRow("q", 0, 0, 1, boxes=[box(x2=1.5)]), r"boxes \(1\.5\) must be in 0\.\.1"),
        (SampleRow("q", 0, 0, 1, boxes=[box(labels=(7,))]), r"box_labels \(7\) must be in the 2 classes"),
        (SampleRow("q", 0, 0, 1, boxes=[box(score=INF)]), r"box_scores \(inf\) must be finite"),
        (SampleRow("", 0, 0, 1), "id must be unique in its split and not empty"),
    ],
)
def test_bad_samples_are_named(tmp_path: Path, video: FragmentedVideo, row: SampleRow, message: str) -> None:
    writer = writer_at(tmp_path / "s")
    writer.add_media("m", writer.add_video(video))
    assert writer.add_samples("train", [SampleRow("first", 0, 0, 1)]) == 1
    with pytest.raises(StoreError, match=message):
        writer.add_samples("train", [SampleRow("fine", 0, 0, 1), row])
    assert writer.add_samples("train", [SampleRow("fine", 0, 0, 1)]) == 2
    writer.close()
    samples = Store.open(tmp_path / "s").split("train").samples
    assert [samples.id(i) for i in range(len(samples))] == ["first", "fine"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_frames": 0}, r"index: row 1 \(bad\): num_frames \(0\) must be >= 1; correct what is added"),
        ({"width": 24}, r"width \(24\) must be a multiple of 16"),
        ({"height": 8208}, r"height \(8208\) must be a multiple of 16 in 16\.\.8192 px"),
        ({"fps_num": 30_000, "fps_den": 1}, r"fps_num / fps_den \(30000\.0\) must be at most 1000 fps"),
        ({"fps_num": 2**31}, r"media 'bad': .*; numbers must fit in their columns"),
        ({"fps_den": -1}, r"fps_den \(-1\) must be >= 1"),
        ({"shard": 1}, r"video_shard \(1\) must be in 0\.\.0"),
        ({"fragment_crc32": ()}, r"length of fragment_crc32 \(0\) must be that of fragment_offset"),
    ],
)
def test_media_that_no_reader_takes_are_not_added(
    tmp_path: Path, video: FragmentedVideo, changes: dict[str, Any], message: str
) -> None:
    with writer_at(tmp_path / "s") as writer:
        good = writer.add_video(video)
        writer.add_media("m", good)
        with pytest.raises(StoreError, match=message):
            writer.add_media("bad", replace(good, **changes))
        with pytest.raises(StoreError, match=r"row 1 \(bad\): display_width \(8193\) must be in 1\.\.8192 px"):
            writer.add_media("bad", good, display_width=8193)
        with pytest.raises(StoreError, match=r"length of audio_crc32 \(1\) must be one a second of num_samples"):
            writer.add_media("bad", good, AudioRef(0, 0, 20_000, (5,)))
    assert len(Store.open(tmp_path / "s").media) == 1


@pytest.mark.parametrize(
    "changes", [{"gop": -1}, {"gop": 1.5}, {"short_side_px": None}, {"dataset": 3}, {"classes": {"action": [1]}},
                {"dataset": "\ud800"}]
)  # fmt: skip
def test_what_store_json_cannot_say_is_refused_at_once(tmp_path: Path, changes: dict[str, Any]) -> None:
    with pytest.raises(StoreError, match=r"must be whole numbers >= 0 and text in UTF-8; correct them"):
        writer_at(tmp_path / "s", **changes)
    assert list(tmp_path.iterdir()) == []


def test_more_shards_than_names_are_refused(
    tmp_path: Path, video: FragmentedVideo, monkeypatch: pytest.MonkeyPatch
) -> None:
    with writer_at(tmp_path / "s") as writer:
        writer.add_media("m", writer.add_video(video))
        writer._finish_shard()
        monkeypatch.setattr(writer, "_shard_count", 100_000)
        with pytest.raises(StoreError, match=r"shards \(100001\) must be at most 100000; raise shard_bytes"):
            writer.add_video(video)
        monkeypatch.setattr(writer, "_shard_count", 1)
    assert len(Store.open(tmp_path / "s").media) == 1


def test_nothing_that_does_not_open_gets_its_name(
    tmp_path: Path, video: FragmentedVideo, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pipeline.store.writer.check_samples", lambda *_: None)
    writer = writer_at(tmp_path / "s")
    row = SampleRow("q", writer.add_media("m", writer.add_video(video)), 0, NAN)
    writer.add_samples("train", [row])
    with pytest.raises(StoreError, match=r"samples-train\.arrow: row 0 \(q\): end_s \(nan\) must be finite"):
        writer.close()
    writer.abort()
    assert list(tmp_path.iterdir()) == []


def test_label_sets_that_come_late_are_empty_before(tmp_path: Path, video: FragmentedVideo) -> None:
    with writer_at(tmp_path / "s", classes={"verb": ["v"], "noun": ["n", "o"]}) as writer:
        writer.add_media("m", writer.add_video(video))
        writer.add_samples("train", [SampleRow("a", 0, 0, 1, {"verb": (0,)})])
        assert writer.add_samples("train", [SampleRow("b", 0, 0, 1, {"noun": (1, 0)})]) == 2
        assert writer.add_samples("test", []) == 0
    store = Store.open(tmp_path / "s")
    samples = store.split("train").samples
    assert [samples.labels("verb").row(i).tolist() for i in range(2)] == [[0], []]
    assert [samples.labels("noun").row(i).tolist() for i in range(2)] == [[], [1, 0]]
    assert store.splits == ("test", "train")
    assert len(store.split("test").samples) == 0


def test_what_does_not_fit_in_a_shard_is_refused(tmp_path: Path, video: FragmentedVideo) -> None:
    writer = writer_at(tmp_path / "s", shard_bytes=1000)
    with pytest.raises(StoreError, match=r"video \(\d+ bytes\) must fit in a shard of 1000; raise shard_bytes"):
        writer.add_video(video)
    with pytest.raises(StoreError, match=r"audio \(1002 bytes\) must fit"):
        writer.add_audio(np.zeros(501, np.int16))
    writer.abort()


def test_broken_inputs_are_refused(tmp_path: Path, video: FragmentedVideo) -> None:
    writer = writer_at(tmp_path / "s")
    shifted = FragmentedVideo(
        video.init, video.fragments, tuple(f + 1 for f in video.first_frames), video.num_frames + 1, 10, 1, 16, 16
    )
    with pytest.raises(StoreError, match="must start at 0 and rise"):
        writer.add_video(shifted)
    with pytest.raises(StoreError, match=r"audio \(float32, 1-D\) must be int16"):
        writer.add_audio(np.zeros(5, np.float32))  # type: ignore[arg-type]
    with pytest.raises(StoreError, match=r"split \('\.\./up'\) must match"):
        writer.add_samples("../up", [])
    writer.abort()
    with pytest.raises(StoreError, match=r"video_codec \(av1\) must be one of"):
        writer_at(tmp_path / "t", video_codec="av1")
    with pytest.raises(StoreError, match=r"shard_bytes \(0\) must be"):
        writer_at(tmp_path / "t", shard_bytes=0)
    with pytest.raises(StoreError, match=r"label set \('a b'\) must match"):
        writer_at(tmp_path / "t", classes={"a b": []})
