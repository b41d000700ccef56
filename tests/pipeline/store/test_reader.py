"""Reading and writing a store: bytes, numbers and tables come back as they went in."""

import multiprocessing
import os
import pickle
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import numpy as np
import pyarrow.feather as feather
import pytest
from numpy.typing import NDArray

from pipeline.dataset import FLAG_REPAIRED, FLAG_SILENT, MediaError, sample_shards
from pipeline.media.fragments import FragmentedVideo, encode_fragments
from pipeline.store.format import StoreError, shard_file
from pipeline.store.reader import Store, StoreSplit
from pipeline.store.rows import SampleRow
from pipeline.store.schemas import index_schema
from pipeline.store.writer import StoreWriter
from tests.pipeline.support.stores import cut_of, noise, numbered_frames, read_number

NUM_FRAMES, WIDTH, HEIGHT = 40, 96, 64


@dataclass(frozen=True)
class Timed:
    label: int
    start_s: float
    end_s: float


@dataclass(frozen=True)
class Box:
    x1: float
    y1: float
    x2: float
    y2: float
    labels: tuple[int, ...]
    score: float = 1.0


@pytest.fixture(scope="module")
def video() -> FragmentedVideo:
    frames = numbered_frames(NUM_FRAMES, WIDTH, HEIGHT)
    return encode_fragments(frames, fps=Fraction(30000, 1001), width=WIDTH, height=HEIGHT)


def writer_at(path: Path, **changes: object) -> StoreWriter:
    settings = {
        "video_codec": "vp9",
        "gop": 12,
        "short_side_px": 64,
        "dataset": "toy",
        "classes": {"action": list("abcd")},
    }
    return StoreWriter(path, **{**settings, **changes})  # type: ignore[arg-type]


SHARDS = [0, 0, 0]
TRACKS = [noise(2.5, seed=1), np.empty(0, np.int16), noise(1.0, seed=2)]


def fill(writer: StoreWriter, video: FragmentedVideo) -> None:
    for number, track in enumerate(TRACKS):
        reference = writer.add_video(video)
        row = writer.add_media(
            f"clip/{number}", reference, writer.add_audio(track), display_width=113, flags=FLAG_REPAIRED, note="n"
        )
        assert row == number
    writer.add_samples("train", [SampleRow(f"s{i}", i, 0.0, 1.0 + i, {"action": (i,)}) for i in range(3)])
    boxes = (Box(0.1, 0.2, 0.3, 0.4, (1, 3), 0.9), Box(0, 0, 1, 1, ()))
    actions = (Timed(2, 0.25, 0.75), Timed(0, 0.5, 1.5))
    detailed = SampleRow("d", 2, 0.5, 1.5, {"action": (0, 3)}, actions=actions, key_time_s=1.0, boxes=boxes)
    writer.add_samples("val", [detailed, SampleRow("bare", 0, 0.0, 0.5)])


@pytest.fixture(scope="module")
def store_path(tmp_path_factory: pytest.TempPathFactory, video: FragmentedVideo) -> Path:
    path = tmp_path_factory.mktemp("stores") / "toy"
    with writer_at(path, shard_bytes=100_000) as writer:
        fill(writer, video)
    return path


@pytest.fixture(scope="module")
def split(store_path: Path) -> StoreSplit:
    return Store.open(store_path).split("train")


def test_every_cut_is_init_plus_covering_fragments(split: StoreSplit, video: FragmentedVideo) -> None:
    ends = [*video.first_frames[1:], video.num_frames]
    for first in range(NUM_FRAMES):
        for last in range(first, NUM_FRAMES, 5):
            cut = split.read_video(1, first, last)
            data, first_frame = cut_of(video, first, last)
            assert cut.data.tobytes() == data
            assert cut.first_frame == first_frame <= first
            end = cut.first_frame + cut.num_frames
            assert end == min(end_of for end_of in ends if end_of > last)


def test_decoded_frames_are_those_asked_for(split: StoreSplit) -> None:
    numbers = np.array([13, 14, 30, 30, 39, 2])
    y, uv = split.read_frames(0, numbers)
    assert y.shape == (6, HEIGHT, WIDTH, 1)
    assert uv.shape == (6, HEIGHT // 2, WIDTH // 2, 2)
    assert [read_number(picture.astype(float)) for picture in y] == numbers.tolist()


@pytest.mark.parametrize(("first", "last"), [(-1, 3), (5, 4), (0, NUM_FRAMES), (NUM_FRAMES, NUM_FRAMES)])
def test_frames_outside_are_refused(split: StoreSplit, first: int, last: int) -> None:
    with pytest.raises(ValueError, match=rf"frames \({first}\.\.{last}\) must rise within 0\.\.39"):
        split.read_video(0, first, last)


@pytest.mark.parametrize(
    ("start", "count"),
    [(0, 40_000), (15_999, 2), (16_000, 16_000), (-7, 20), (39_990, 50), (50_000, 10), (-50, 20), (5, 0)],
)
def test_audio_is_exact_and_zero_outside(split: StoreSplit, start: int, count: int) -> None:
    padded = np.concatenate([np.zeros(100, np.int16), TRACKS[0], np.zeros(20_000, np.int16)])
    expected = padded[start + 100 : start + 100 + count]
    assert np.array_equal(split.read_audio(0, start, count), expected)
    assert not split.read_audio(1, start, count).any()


def test_range_of_the_sound_leaves_silent_seconds_out(tmp_path: Path, video: FragmentedVideo) -> None:
    quiet, loud = np.zeros(16_000, np.int16), np.full(16_000, 7, np.int16)
    tracks = {
        (32_000, 56_000): [quiet, quiet, loud, loud[:8000]],
        (0, 48_000): [loud, quiet, loud],
        (16_000, 32_000): [quiet, loud, quiet[:100]],
        (0, 5): [loud[:5]],
        (0, 0): [quiet, quiet[:9]],
    }
    with writer_at(tmp_path / "s") as writer:
        reference = writer.add_video(video)
        for number, pieces in enumerate(tracks.values()):
            writer.add_media(f"m{number}", reference, writer.add_audio(np.concatenate(pieces)))
        writer.add_samples("train", [SampleRow("a", writer.add_media("silent", reference), 0, 1)])
    split = Store.open(tmp_path / "s").split("train")
    assert [split.sound_range(media) for media in range(6)] == [*tracks, (0, 0)]


def test_media_table(split: StoreSplit) -> None:
    media = split.media
    assert len(media) == 3
    assert [media.id(i) for i in range(3)] == ["clip/0", "clip/1", "clip/2"]
    assert list(media.num_frames) == [NUM_FRAMES] * 3
    assert media.duration_s(0) == pytest.approx(NUM_FRAMES * 1001 / 30000)
    assert list(media.num_samples) == [40_000, 0, 16_000]
    assert list(media.flags) == [FLAG_REPAIRED, FLAG_REPAIRED | FLAG_SILENT, FLAG_REPAIRED]
    assert list(media.width) == [WIDTH] * 3
    assert list(media.display_width) == [113] * 3
    assert list(media.display_height) == [HEIGHT] * 3


def test_samples_labels_actions_and_boxes(store_path: Path, split: StoreSplit) -> None:
    assert split.samples.labels("action").values.tolist() == [0, 1, 2]
    assert [split.samples.label_of(i, "action") for i in range(3)] == [0, 1, 2]
    assert split.samples.has("action")
    assert not split.samples.has("verb")
    with pytest.raises(ValueError, match=r"label set \(verb\) must be one of \['action'\]"):
        split.samples.labels("verb")
    val = Store.open(store_path).split("val").samples
    assert [val.id(0), val.id(1)] == ["d", "bare"]
    assert val.labels("action").row(0).tolist() == [0, 3]
    with pytest.raises(ValueError, match=r"sample d: labels in action \(\[0, 3\]\) must be exactly one"):
        val.label_of(0, "action")
    assert val.actions(0).label.tolist() == [2, 0]
    assert val.actions(0).end_s.tolist() == [0.75, 1.5]
    boxes = val.boxes(0)
    assert boxes.boxes.tolist() == np.array([[0.1, 0.2, 0.3, 0.4], [0, 0, 1, 1]], np.float32).tolist()
    assert boxes.classes() == [(1, 3), ()]
    assert boxes.scores.tolist() == pytest.approx([0.9, 1.0])
    assert val.key_time_s[0] == 1.0
    assert np.isnan(val.key_time_s[1])
    assert len(val.boxes(1).boxes) == len(val.actions(1).label) == len(val.labels("action").row(1)) == 0


def test_shards_are_bounded_and_exposed(store_path: Path, split: StoreSplit) -> None:
    sizes = [path.stat().st_size for path in sorted((store_path / "shards").iterdir())]
    assert len(sizes) == 2
    assert max(sizes) <= 100_000
    assert sum(sizes) == split.store.info.files[shard_file(0)].bytes + split.store.info.files[shard_file(1)].bytes
    begins = [split.read_video(i, 0, 0).data[4:8].tobytes() for i in range(3)]
    assert begins == [b"ftyp"] * 3
    assert sample_shards(split).tolist() == [split.media.shard[media] for media in split.samples.media] == SHARDS


def test_same_calls_give_the_same_bytes(tmp_path: Path, video: FragmentedVideo, store_path: Path) -> None:
    with writer_at(tmp_path / "again", shard_bytes=100_000) as writer:
        fill(writer, video)
    for name in [*Store.open(store_path).info.files, "store.json"]:
        assert (tmp_path / "again" / name).read_bytes() == (store_path / name).read_bytes(), name


def test_several_media_share_bytes(tmp_path: Path, video: FragmentedVideo) -> None:
    with writer_at(tmp_path / "s") as writer:
        reference, sound = writer.add_video(video), writer.add_audio(noise(1.0))
        for name in ("a", "b"):
            writer.add_media(name, reference, sound)
        writer.add_media("c", writer.add_video(video), None, source="x.mp4")
        writer.add_media("d", writer.add_video(video), None, source="x.mp4")
        writer.add_samples("train", [SampleRow("a", 1, 0, 1)])
    split = Store.open(tmp_path / "s").split("train")
    assert split.read_video(0, 3, 20).data.tobytes() == split.read_video(1, 3, 20).data.tobytes()
    assert (split.same_video(0, 1), split.same_video(0, 2), split.same_video(2, 3)) == (True, False, True)


def test_fingerprint_names_split_and_contents(tmp_path: Path, video: FragmentedVideo, store_path: Path) -> None:
    store = Store.open(store_path)
    assert store.split("train").fingerprint == Store.open(store_path).split("train").fingerprint
    assert store.split("train").fingerprint != store.split("val").fingerprint
    with writer_at(tmp_path / "other", shard_bytes=100_000, dataset="toy2") as writer:
        fill(writer, video)
    assert Store.open(tmp_path / "other").split("train").fingerprint != store.split("train").fingerprint


def digest_of_reads(split: StoreSplit) -> list[int]:
    return [int(split.read_video(m, 5, 30).data.sum()) + int(split.read_audio(m, 3, 999).sum()) for m in (0, 1, 2)]


def test_pickled_split_opens_itself(split: StoreSplit) -> None:
    other = pickle.loads(pickle.dumps(split))
    assert other.fingerprint == split.fingerprint
    assert digest_of_reads(other) == digest_of_reads(split)


def test_threads_share_a_store(split: StoreSplit) -> None:
    expected = digest_of_reads(split)
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(lambda _: digest_of_reads(split), range(64))) == [expected] * 64


@pytest.mark.integration
@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_processes_share_a_store(split: StoreSplit, method: str) -> None:
    with multiprocessing.get_context(method).Pool(2) as pool:
        assert pool.map(digest_of_reads, [split] * 4) == [digest_of_reads(split)] * 4


def test_few_descriptors_are_kept_open(tmp_path: Path, video: FragmentedVideo, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipeline.store.shards._MAX_OPEN_SHARDS", 3)
    size = len(video.init) + sum(map(len, video.fragments))
    with writer_at(tmp_path / "s", shard_bytes=size) as writer:
        rows = [writer.add_media(f"m{i}", writer.add_video(video)) for i in range(12)]
        writer.add_samples("train", [SampleRow(f"m{i}", i, 0, 1) for i in rows])
    split = Store.open(tmp_path / "s").split("train")
    before = len(os.listdir("/proc/self/fd"))
    for media in [*rows, *rows]:
        assert split.read_video(media, 0, 39).num_frames == NUM_FRAMES
    assert len(os.listdir("/proc/self/fd")) - before == 3
    assert list(split.media.shard) == rows


def test_other_tools_read_the_tables_as_they_are(store_path: Path) -> None:
    index = feather.read_table(store_path / "index.arrow")
    assert index.column("id").to_pylist() == ["clip/0", "clip/1", "clip/2"]
    assert index.column_names == index_schema().names
    assert feather.read_table(store_path / "samples-val.arrow").num_rows == len(Store.open(store_path).split("val"))


def test_unknown_split_lists_the_splits(store_path: Path) -> None:
    with pytest.raises(StoreError, match=r"split \(test\) must be one of \['train', 'val'\]"):
        Store.open(store_path).split("test")


def test_error_survives_a_process_boundary() -> None:
    error = pickle.loads(pickle.dumps(MediaError("a.mp4", "video", "gone", time_s=1.5)))
    assert str(error) == "a.mp4: video at 1.500 s: gone"
    assert (error.where, error.stream, error.reason, error.time_s) == ("a.mp4", "video", "gone", 1.5)


def frames_of(values: NDArray[np.uint8]) -> list[int]:
    return [read_number(picture.astype(float)) for picture in values]


def test_h264_store_decodes_on_the_cpu(tmp_path: Path) -> None:
    frames = numbered_frames(NUM_FRAMES, WIDTH, HEIGHT)
    video = encode_fragments(frames, fps=Fraction(25), width=WIDTH, height=HEIGHT, codec="h264")
    with writer_at(tmp_path / "s", video_codec="h264") as writer:
        writer.add_media("a", writer.add_video(video))
        writer.add_samples("train", [SampleRow("a", 0, 0, 1)])
    y, _ = Store.open(tmp_path / "s").split("train").read_frames(0, np.arange(11, 38, 3))
    assert frames_of(y) == list(range(11, 38, 3))
