"""Damage is found: every flipped bit by verify, most at open, all media damage when it is read."""

import json
import shutil
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from pipeline.dataset import MediaError
from pipeline.media.fragments import encode_fragments
from pipeline.store.format import INDEX_NAME, INFO_NAME, StoreError, StoreInfo, digest_file, parse_info
from pipeline.store.reader import Store
from pipeline.store.rows import SampleRow
from pipeline.store.schemas import write_arrow
from pipeline.store.verify import verify_store
from pipeline.store.writer import StoreWriter
from tests.pipeline.support.stores import noise

NAMES = (INFO_NAME, INDEX_NAME, "samples-train.arrow", "shards/00000.bin", "shards/00001.bin")


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("damage") / "s"
    rng = np.random.default_rng(0)
    frames = [rng.integers(0, 255, (32, 32, 3)).astype(np.uint8) for _ in range(30)]
    video = encode_fragments(frames, fps=Fraction(10), width=32, height=32)
    classes = {"action": ["é", "b"]}
    with StoreWriter(
        path, video_codec="vp9", gop=12, short_side_px=32, dataset="t", classes=classes, shard_bytes=100_000
    ) as writer:
        for i in range(3):
            media = writer.add_media(f"m{i}", writer.add_video(video), writer.add_audio(noise(1.5, i)))
            writer.add_samples("train", [SampleRow(f"s{i}", media, 0, 1, {"action": (i % 2,)})])
    assert {p.relative_to(path).as_posix() for p in path.rglob("*") if p.is_file()} >= set(NAMES)
    return path


@pytest.fixture
def store(original: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(original, tmp_path / "s"))


def flip(path: Path, bit: int) -> None:
    with path.open("r+b") as file:
        file.seek(bit // 8)
        byte = file.read(1)[0]
        file.seek(bit // 8)
        file.write(bytes([byte ^ 1 << bit % 8]))


def resign(path: Path, change: Callable[[StoreInfo], None] = lambda info: None) -> None:
    """Give a changed store valid digests: a store that was written wrongly."""
    info = parse_info((path / INFO_NAME).read_bytes(), path)
    for name in info.files:
        info.files[name] = digest_file(path / name)
    change(info)
    (path / INFO_NAME).write_bytes(info.to_bytes())


def test_an_intact_store_has_no_problem(store: Path) -> None:
    seen: list[tuple[int, int]] = []
    assert verify_store(store, lambda done, total: seen.append((done, total))) == []
    total = sum((store / name).stat().st_size for name in parse_info((store / INFO_NAME).read_bytes(), store).files)
    assert seen[-1] == (total, total)
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)


@pytest.mark.parametrize("name", NAMES)
def test_verify_finds_every_flipped_bit(store: Path, name: str) -> None:
    rng = np.random.default_rng(len(name))
    for bit in rng.integers(0, 8 * (store / name).stat().st_size, 40).tolist():
        flip(store / name, bit)
        problems = verify_store(store)
        assert len(problems) == 1, (name, bit)
        assert str(store / name) in problems[0]
        flip(store / name, bit)
    assert verify_store(store) == []


def test_bits_of_store_json_count(store: Path) -> None:
    for bit in range(0, 8 * (store / INFO_NAME).stat().st_size, 13):
        flip(store / INFO_NAME, bit)
        with pytest.raises(StoreError, match=r"store\.json"):
            parse_info((store / INFO_NAME).read_bytes(), store / INFO_NAME)
        flip(store / INFO_NAME, bit)


@pytest.mark.parametrize("name", [INFO_NAME, INDEX_NAME])
def test_open_finds_a_flipped_bit_in_the_index(store: Path, name: str) -> None:
    flip(store / name, 4 * (store / name).stat().st_size)
    with pytest.raises(StoreError, match=r"sha256|JSON|format|version|field"):
        Store.open(store)


def test_split_finds_a_flipped_bit_in_its_table(store: Path) -> None:
    flip(store / "samples-train.arrow", 3001)
    with pytest.raises(StoreError, match=r"samples-train\.arrow: sha256 \(\w+\) must be \w+; copy the file again"):
        Store.open(store).split("train")


def test_a_large_table_is_checked_beside(store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipeline.store.tables._CHECK_AT_ONCE_BYTES", 0)
    Store.open(store).wait_for_checks()
    names = (store / INDEX_NAME).read_bytes()
    flip(store / INDEX_NAME, 8 * names.index(b"m0m1m2"))
    opened = Store.open(store)
    with pytest.raises(StoreError, match=r"index\.arrow: sha256"):
        opened.wait_for_checks()
    with pytest.raises(StoreError, match=r"index\.arrow: sha256"):
        opened.read_video(0, 0, 5)


def test_every_flipped_bit_of_a_video_is_found_when_read(store: Path, original: Path) -> None:
    split = Store.open(store).split("train")
    columns = split.store.index_columns()
    shard = store / "shards" / f"{int(split.media.shard[0]):05d}.bin"
    begin, init = int(columns["video_offset"][0]), int(columns["init_bytes"][0])
    offsets, sizes = columns["fragment_offset"].row(0), columns["fragment_bytes"].row(0)
    rng = np.random.default_rng(1)
    for place in [
        begin + int(rng.integers(init)),
        *(int(o + rng.integers(s)) for o, s in zip(offsets, sizes, strict=True)),
    ]:
        flip(shard, 8 * place + int(rng.integers(8)))
        with pytest.raises(MediaError, match=r"m0 in .*: video at [\d.]+ s: .*crc32 \(\w{8}\) must be \w{8}"):
            split.read_video(0, 0, 29)
        shutil.copy(original / "shards" / shard.name, shard)


def test_the_error_names_the_time_of_the_damage(store: Path) -> None:
    split = Store.open(store).split("train")
    columns = split.store.index_columns()
    flip(store / "shards" / f"{int(split.media.shard[1]):05d}.bin", 8 * int(columns["fragment_offset"].row(1)[1]) + 800)
    with pytest.raises(MediaError, match=r"m1 in .*: video at 1\.200 s: fragment from frame 12: crc32"):
        split.read_video(1, 0, 20)
    assert split.read_video(1, 0, 11).num_frames == 12
    with pytest.raises(MediaError) as caught:
        split.read_frames(1, np.array([13, 14]))
    assert (caught.value.stream, caught.value.time_s) == ("video", 1.2)


def test_audio_damage_is_found_in_its_second(store: Path) -> None:
    split = Store.open(store).split("train")
    columns = split.store.index_columns()
    shard = store / "shards" / f"{int(columns['audio_shard'][2]):05d}.bin"
    flip(shard, 8 * (int(columns["audio_offset"][2]) + 2 * 16_000 + 5))
    assert len(split.read_audio(2, 0, 16_000)) == 16_000
    with pytest.raises(MediaError, match=r"m2 in .*: audio at 1\.000 s: crc32 of second 1 must match"):
        split.read_audio(2, 15_999, 10)
    assert len(Store.open(store, check_crc=False).read_audio(2, 15_999, 10)) == 10


@pytest.mark.parametrize("name", [INDEX_NAME, "samples-train.arrow", "shards/00001.bin"])
def test_truncated_and_missing_files_are_found_at_open(store: Path, name: str) -> None:
    size = (store / name).stat().st_size
    with (store / name).open("r+b") as file:
        file.truncate(size - 1)
    with pytest.raises(StoreError, match=rf"{name}: size \({size - 1} bytes\) must be {size}; copy the file again"):
        Store.open(store)
    assert any("size" in problem for problem in verify_store(store))
    (store / name).unlink()
    with pytest.raises(StoreError, match=rf"{name}: file \(missing\) must exist"):
        Store.open(store)
    assert any("missing" in problem for problem in verify_store(store))


def test_a_shard_truncated_while_open_is_a_media_error(store: Path) -> None:
    split = Store.open(store).split("train")
    shard = store / "shards" / f"{int(split.media.shard[0]):05d}.bin"
    with shard.open("r+b") as file:
        file.truncate(10)
    with pytest.raises(MediaError, match=r"bytes \(10\) at 0 must be \d+; it was cut"):
        split.read_video(0, 0, 3)


@pytest.mark.parametrize("lost", ["", "shards"])
def test_a_store_that_goes_is_named_and_not_its_media(store: Path, lost: str) -> None:
    split = Store.open(store).split("train")
    (store / lost).rename(store.parent / "elsewhere")
    words = rf"^{store / lost}: folder \(No such file or directory\) must be there while it is read; mount it or put"
    with pytest.raises(StoreError, match=words):
        split.read_video(0, 0, 3)


def test_no_store(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match=r"store\.json: file \(missing\) must exist; .* is no store"):
        Store.open(tmp_path)
    assert "missing" in verify_store(tmp_path)[0]


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("version", 3, r"version \(3\) must be 1 or 2"),
        ("version", True, r"version \(True\) must be 1 or 2"),
        ("version", 2, "field 'encoding' must be there with its right type"),
        ("format", "wds", r"format \('wds'\) must be 'avsf-store'"),
        ("classes", 5, "field .* must be there with its right type"),
        ("gop", None, "field .* must be there with its right type"),
        ("dataset", "other", r"sha256 \('\w+'\) must match its contents"),
    ],
)
def test_store_json_is_read_strictly(store: Path, key: str, value: object, message: str) -> None:
    document = json.loads((store / INFO_NAME).read_text())
    document[key] = value
    (store / INFO_NAME).write_text(json.dumps(document, indent=1, sort_keys=True, ensure_ascii=False) + "\n")
    with pytest.raises(StoreError, match=message):
        Store.open(store)


def test_paths_outside_the_store_are_refused(store: Path) -> None:
    def add(info: StoreInfo) -> None:
        info.files["../secret"] = info.files[INDEX_NAME]

    resign(store, add)
    with pytest.raises(StoreError, match=r"files \(\['\.\./secret'\]\) must be the names of version 1"):
        Store.open(store)


def test_extra_files_are_named(store: Path) -> None:
    (store / "shards" / "notes.txt").write_text("x")
    assert verify_store(store) == [f"{store / 'shards/notes.txt'}: file must be listed in store.json; delete it"]


def rewrite(path: Path, change: Callable[[dict[str, pa.Array]], None], name: str = INDEX_NAME) -> None:
    with pa.OSFile(str(path / name)) as source:
        batch = pa.ipc.open_file(source).read_all().combine_chunks().to_batches()[0]
    columns = dict(zip(batch.schema.names, batch.columns, strict=True))
    change(columns)
    kept = [batch.schema.field(n) if n in batch.schema.names else pa.field(n, columns[n].type, False) for n in columns]
    write_arrow(path / name, pa.schema([f.with_type(columns[f.name].type) for f in kept]), list(columns.values()))
    resign(path)


def test_another_schema_is_named(store: Path) -> None:
    rewrite(store, lambda columns: columns.update(num_frames=pa.array([30, 30, 30], pa.int64())))
    with pytest.raises(
        StoreError, match=r"index\.arrow: columns \(\['num_frames'\]\) must be those of the format's version"
    ):
        Store.open(store)


def offset_rows(offset: int) -> Callable[[dict[str, pa.Array]], None]:
    def change(columns: dict[str, pa.Array]) -> None:
        rows = columns["fragment_offset"].to_pylist()
        rows[1] = [value + offset for value in rows[1]]
        columns["fragment_offset"] = pa.array(rows, pa.list_(pa.int64()))

    return change


@pytest.mark.parametrize("offset", [10**9, -(10**9)])
def test_an_index_that_points_outside_is_found(store: Path, offset: int) -> None:
    rewrite(store, offset_rows(offset))
    problems = verify_store(store)
    assert any("fragments must lie in their shard, it is not for 1 of 3 media, the first is m1" in p for p in problems)
    split = Store.open(store).split("train")
    with pytest.raises(MediaError, match="m1 in"):
        split.read_video(1, 0, 20)
    assert split.read_video(0, 0, 20).num_frames == 24


def test_a_sample_of_no_medium_and_a_label_of_no_class_are_found(store: Path) -> None:
    name = "samples-train.arrow"
    rewrite(store, lambda columns: columns.update(media=pa.array([0, 1, 3], pa.int64())), name)
    with pytest.raises(StoreError, match=r"samples-train\.arrow: row 2 \(s2\): media \(3\) must be in 0\.\.2"):
        Store.open(store).split("train")
    rewrite(store, lambda columns: columns.update(media=pa.array([0, 1, 2], pa.int64())), name)
    bad = pa.array([[0], [1], [2]], pa.list_(pa.int32()))
    rewrite(store, lambda columns: columns.update(labels_action=bad), name)
    with pytest.raises(StoreError, match=r"row 2 \(s2\): labels_action \(2\) must be in the 2 classes"):
        Store.open(store).split("train")
    assert "labels_action" in verify_store(store)[0]


def test_duplicate_ids_are_found_by_verify(store: Path) -> None:
    rewrite(store, lambda columns: columns.update(id=pa.array(["m0", "m1", "m1"])))
    assert any("ids of index (2 different ones of 3) must be unique" in problem for problem in verify_store(store))


def test_extra_folders_and_links_to_folders_are_named(store: Path, tmp_path: Path) -> None:
    (store / "shards" / "old").mkdir()
    (tmp_path / "elsewhere").mkdir()
    (store / "link").symlink_to(tmp_path / "elsewhere")
    rule = "folder must not be there, a store has shards alone; delete it"
    assert verify_store(store) == [f"{store / 'link'}: {rule}", f"{store / 'shards/old'}: {rule}"]


INT32_LIST, FLOAT_LIST, TIMES = pa.list_(pa.int32()), pa.list_(pa.float32()), pa.list_(pa.float64())
NAN, INF = float("nan"), float("inf")


@pytest.mark.parametrize(
    ("table", "columns", "words"),
    [
        ("index", {"width": pa.array([32, 32, 0], pa.int32())}, r"row 2 \(m2\): width \(0\) must be a multiple"),
        ("index", {"height": pa.array([32, 33, 32], pa.int32())}, r"row 1 \(m1\): height \(33\) must be a multiple"),
        ("index", {"width": pa.array([8208, 32, 32], pa.int32())}, r"width \(8208\) must be .* 16\.\.8192 px"),
        ("index", {"display_width": pa.array([1, 2, -3], pa.int32())}, r"display_width \(-3\) must be in 1\.\.8192"),
        ("index", {"num_frames": pa.array([0, 30, 30], pa.int32())}, r"num_frames \(0\) must be >= 1"),
        ("index", {"num_samples": pa.array([24000, -5, 24000], pa.int64())}, r"num_samples \(-5\) must be >= 0"),
        ("index", {"num_samples": pa.array([24000, 2**62, 24000], pa.int64())}, r"audio_crc32 \(2\) must be one"),
        ("index", {"fps_den": pa.array([1, 0, 1], pa.int32())}, r"fps_den \(0\) must be >= 1"),
        ("index", {"fps_num": pa.array([1001, 1, 1], pa.int32())}, r"fps_den \(1001\.0\) must be at most 1000"),
        ("index", {"video_shard": pa.array([0, 99, 0], pa.int32())}, r"video_shard \(99\) must be in 0\.\.\d"),
        ("index", {"fragment_bytes": pa.array([[1], [1], [1]], INT32_LIST)}, r"fragment_bytes \(1\) must be that"),
        ("train", {"start_s": pa.array([0, NAN, 0])}, r"row 1 \(s1\): start_s \(nan\) must be finite and >= 0"),
        ("train", {"start_s": pa.array([0.0, 2.0, 0.0])}, r"end_s \(1\.0\) must be finite and >= start_s"),
        ("train", {"end_s": pa.array([1, INF, 1])}, r"end_s \(inf\) must be finite"),
        ("train", {"key_time_s": pa.array([NAN, NAN, -1.0])}, r"row 2 \(s2\): key_time_s \(-1\.0\) must be NaN, or"),
        ("train", {"actions_label": pa.array([[], [0], []], INT32_LIST)}, r"actions_start_s \(0\) must be that"),
        (
            "train",
            {
                "actions_label": pa.array([[], [1, 2], []], INT32_LIST),
                "actions_start_s": pa.array([[], [0, 0], []], TIMES),
                "actions_end_s": pa.array([[], [1, 1], []], TIMES),
            },
            r"row 1 \(s1\): actions_label \(2\) must be in the 2 classes of 'action'",
        ),
        (
            "train",
            {
                "actions_label": pa.array([[0], [], []], INT32_LIST),
                "actions_start_s": pa.array([[1], [], []], TIMES),
                "actions_end_s": pa.array([[NAN], [], []], TIMES),
            },
            r"actions_end_s \(nan\) must be finite",
        ),
    ],
)  # fmt: skip
@pytest.mark.parametrize("slice_rows", [1, 1 << 15])
def test_tables_that_were_written_wrongly_are_refused(
    store: Path, monkeypatch: pytest.MonkeyPatch, slice_rows: int, table: str, columns: dict[str, pa.Array], words: str
) -> None:
    monkeypatch.setattr("pipeline.store.rules.SLICE_ROWS", slice_rows)
    name = INDEX_NAME if table == "index" else "samples-train.arrow"
    rewrite(store, lambda found: found.update(columns), name)
    with pytest.raises(StoreError, match=words + r".*; make the store again") as caught:
        Store.open(store).split("train")
    assert str(caught.value).startswith(str(store / name))
    assert verify_store(store) == [str(caught.value)]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"boxes": [0, 0, 1, NAN]}, r"row 1 \(s1\): boxes \(nan\) must be in 0\.\.1"),
        ({"boxes": [0, 0, 1, 1.5]}, r"boxes \(1\.5\) must be in 0\.\.1"),
        ({"boxes": [0, 0, 1]}, r"length of boxes / 4 \(0\.75\) must be that of box_label_counts"),
        ({"box_labels": [7]}, r"box_labels \(7\) must be in the 2 classes"),
        ({"box_labels": [0, 0]}, r"sum of box_label_counts \(1\) must be that of box_labels"),
        ({"box_label_counts": [-1]}, r"box_label_counts \(-1\) must be >= 0"),
        ({"box_scores": []}, r"length of box_scores \(0\) must be that of box_label_counts"),
        ({"box_scores": [INF]}, r"box_scores \(inf\) must be finite"),
    ],
)
def test_boxes_that_were_written_wrongly_are_refused(store: Path, changes: dict[str, list[float]], words: str) -> None:
    good = {"boxes": [0, 0, 1, 1], "box_label_counts": [1], "box_labels": [1], "box_scores": [0.5]}

    def change(columns: dict[str, pa.Array]) -> None:
        for name, values in (good | changes).items():
            kind = FLOAT_LIST if name in ("boxes", "box_scores") else INT32_LIST
            columns[name] = pa.array([[], values, []], kind)

    changes, wrong = {}, changes
    rewrite(store, change, "samples-train.arrow")
    assert Store.open(store).split("train").samples.boxes(1).labels.tolist() == [1]
    changes = wrong
    rewrite(store, change, "samples-train.arrow")
    with pytest.raises(StoreError, match=words):
        Store.open(store).split("train")
