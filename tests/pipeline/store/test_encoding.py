"""A store says how its media were encoded; stores of version 1, which do not, are read as before."""

import errno
import hashlib
import json
import os
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest

from pipeline.clip import ClipSpec
from pipeline.config import DataConfig, ViewConfig
from pipeline.media.fragments import encode_fragments
from pipeline.plan import EvalPlan
from pipeline.source import FreshMemory, Unreadable, Wanted, read_clip
from pipeline.store.format import INFO_NAME, Encoding, StoreError, StoreInfo, parse_info
from pipeline.store.reader import Store
from pipeline.store.rows import SampleRow
from pipeline.store.verify import verify_store
from pipeline.store.writer import StoreWriter


def make(path: Path, encoding: Encoding | None, codec: str = "h264", count: int = 30) -> Path:
    """A store of one video whose pictures brighten frame by frame."""
    ramp = np.linspace(0, 120, 64)[None, :, None] + np.zeros((48, 1, 3))
    frames = [np.uint8(ramp + 4 * number) for number in range(count)]
    video = encode_fragments(frames, fps=Fraction(30), width=64, height=48, codec=codec, quality=10)
    with StoreWriter(
        path, video_codec=codec, gop=12, short_side_px=48, dataset="x", classes={}, encoding=encoding
    ) as writer:
        media = writer.add_media("a", writer.add_video(video))
        writer.add_samples("train", [SampleRow("a", media, 0.0, 1.0)])
    return path


def test_a_store_says_how_it_was_made(tmp_path: Path) -> None:
    asked = Encoding(quality=26, fastdecode=False, max_fps="15", copied_if_fit=False)
    path = make(tmp_path / "s", asked)
    document = json.loads((path / INFO_NAME).read_text())
    assert document["version"] == 2
    assert document["encoding"] == {"quality": 26, "fastdecode": False, "max_fps": "15", "copied_if_fit": False}
    assert Store.open(path).info.encoding == asked
    assert verify_store(path) == []


def test_a_store_of_version_1_has_the_bytes_it_always_had(tmp_path: Path) -> None:
    info = StoreInfo("h264", 12, 256, "x", {"action": ("a",)}, files={})
    document = json.loads(info.to_bytes())
    assert "encoding" not in document
    assert document["version"] == 1
    assert hashlib.sha256(info.to_bytes()).hexdigest() == (
        "7c337260e269d4892e0a2d1679c0336ea614440e653417799fe6c7b06ce863f8"
    )
    path = make(tmp_path / "s", None)
    assert Store.open(path).info.encoding is None
    assert verify_store(path) == []


def test_how_it_was_made_is_part_of_what_a_store_is(tmp_path: Path) -> None:
    one, other = (make(tmp_path / str(quality), Encoding(quality)) for quality in (20, 23))
    assert Store.open(one).split("train").fingerprint != Store.open(other).split("train").fingerprint


@pytest.mark.parametrize(
    "encoding",
    [
        {"quality": 23},  # all but one are missing: as good as their defaults, but not the canonical bytes
        {"quality": "23", "fastdecode": True, "max_fps": "", "copied_if_fit": True},
        {"quality": 23, "fastdecode": 1, "max_fps": "", "copied_if_fit": True},
        {"quality": 23, "fastdecode": True, "max_fps": "", "copied_if_fit": True, "more": 1},
        [23],
        None,
    ],
)
def test_encoding_is_read_strictly(tmp_path: Path, encoding: object) -> None:
    path = make(tmp_path / "s", Encoding(23)) / INFO_NAME
    document = json.loads(path.read_text())
    del document["sha256"]
    document["encoding"] = encoding
    digest = hashlib.sha256((json.dumps(document, indent=1, sort_keys=True) + "\n").encode()).hexdigest()
    raw = (json.dumps(document | {"sha256": digest}, indent=1, sort_keys=True) + "\n").encode()
    with pytest.raises(StoreError, match=r"must be there with its right type|must match its contents"):
        parse_info(raw, path)


def test_mjpeg_needs_version_2(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="must be 2 for mjpeg"):
        make(tmp_path / "s", None, "mjpeg")


@pytest.fixture
def mjpeg(tmp_path: Path) -> Path:
    return make(tmp_path / "mjpeg", Encoding(2), "mjpeg")


def test_mjpeg_gives_the_frames_that_were_asked_for_in_limited_range(mjpeg: Path, tmp_path: Path) -> None:
    numbers = np.array([3, 9, 9, 4, 29])
    exact = Store.open(make(tmp_path / "h264", Encoding(1))).read_frames(0, numbers)
    found = Store.open(mjpeg).read_frames(0, numbers)
    for one, other in zip(found, exact, strict=True):
        assert one.shape == other.shape
        error = one.astype(int) - other
        assert np.abs(error).mean() < 1.5
        assert abs(error.mean()) < 0.5  # a range that was mistaken is 16 and 8 % away
    levels = found[0][..., 0].mean((1, 2))
    assert np.diff(levels[[0, 3, 1, 4]]) == pytest.approx(np.array([1, 5, 20]) * 4 * 219 / 255, abs=0.6)


def test_mjpeg_reads_the_wanted_pictures_alone(mjpeg: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = Store.open(mjpeg)
    rows = store.index_columns()
    read = []
    whole = store._shards.read
    monkeypatch.setattr(store._shards, "read", lambda m, what, s, offset, view: (
        read.append((int(offset), len(view))), whole(m, what, s, offset, view)))  # fmt: skip
    store.read_frames(0, np.array([2, 4, 5]))
    offsets, sizes = (rows[f"fragment_{name}"].row(0).tolist() for name in ("offset", "bytes"))
    expected = [(int(rows["video_offset"][0]), int(rows["init_bytes"][0])), (offsets[2], sizes[2])]
    assert read == [*expected, (offsets[4], sizes[4] + sizes[5])]


def test_damage_of_a_picture_is_found_by_its_checksum_and_others_are_read(mjpeg: Path) -> None:
    store = Store.open(mjpeg)
    offset = int(store.index_columns()["fragment_offset"].row(0)[7]) + 200
    with (mjpeg / "shards" / "00000.bin").open("r+b") as file:
        file.seek(offset)
        byte = file.read(1)[0]
        file.seek(offset)
        file.write(bytes([byte ^ 1]))
    damaged = Store.open(mjpeg)
    assert damaged.read_frames(0, np.array([6, 8]))[0].shape == (2, 48, 64, 1)
    with pytest.raises(ValueError, match="crc32"):
        damaged.read_frames(0, np.array([6, 7]))


def test_mjpeg_is_tried_again_as_often_as_any_store(mjpeg: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where its bytes are read, and not once more around that, as plain files are."""
    tries = []

    def fail(descriptor: int, buffers: list[memoryview], offset: int) -> int:
        tries.append(offset)
        raise OSError(errno.EIO, "Input/output error")

    split = Store.open(mjpeg).split("train")
    plan = EvalPlan(split, ClipSpec(4, 1), DataConfig(), ViewConfig(1, 1, 48)).clip(0)
    monkeypatch.setattr(os, "preadv", fail)
    monkeypatch.setattr("pipeline.media.reading.DELAYS_S", (0.0, 0.0))
    found = read_clip(split, plan, Wanted(512, "cpu"), FreshMemory())
    assert isinstance(found, Unreadable)
    assert "Input/output error" in found.reason
    assert len(tries) == 3


def test_mjpeg_frames_outside_the_video_are_refused(mjpeg: Path) -> None:
    with pytest.raises(StoreError, match=r"must lie within 0\.\.29"):
        Store.open(mjpeg).read_frames(0, np.array([28, 30]))


def test_mjpeg_is_left_to_cpus(mjpeg: Path) -> None:
    assert Store.open(mjpeg).split("train").decoders == ("cpu",)
