"""Writing a store: all or nothing, and each rule has an error that says what to do."""

from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest

from pipeline.fragments import FragmentedVideo, encode_fragments
from pipeline.store import Store
from pipeline.store_format import StoreError
from pipeline.store_rows import SampleRow
from pipeline.store_writer import StoreWriter


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
        (SampleRow("q", 0, 2, 1), r"times \(2\.\.1 s\) must be finite and rise"),
        (SampleRow("q", 0, -0.1, 1), r"times \(-0\.1\.\.1 s\) must be"),
        (SampleRow("q", 0, 0, float("nan")), r"times \(0\.\.nan s\) must be"),
        (SampleRow("q", 0, 0, 1, {"action": (2,)}), r"labels_action \(\[2\]\) must be in the 2 classes"),
        (SampleRow("q", 0, 0, 1, {"verb": ()}), r"labels_verb \(\[\]\) must be in the 0 classes"),
        (SampleRow("", 0, 0, 1), "id must be unique in its split and not empty"),
    ],
)
def test_bad_samples_are_named(tmp_path: Path, video: FragmentedVideo, row: SampleRow, message: str) -> None:
    writer = writer_at(tmp_path / "s")
    writer.add_media("m", writer.add_video(video))
    with pytest.raises(StoreError, match=message):
        writer.add_samples("train", [row])
    writer.abort()


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
