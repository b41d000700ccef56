"""Hostile stores: whatever the bytes, reading ends in a result or in a ValueError, and the process lives.

Two kinds: damage under the store's own digests must always be found; a store with valid digests over broken tables
(written by an enemy) may be read or refused, but never crashes, hangs or reads outside its folder.
"""

import os
import shutil
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest

from pipeline.fragments import encode_fragments
from pipeline.store import Store
from pipeline.store_format import INDEX_NAME, INFO_NAME, FileDigest, StoreError, digest_file, parse_info
from pipeline.store_rows import SampleRow
from pipeline.store_verify import verify_store
from pipeline.store_writer import StoreWriter
from tests.pipeline.stores import noise

TABLES = (INDEX_NAME, "samples-train.arrow")


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("fuzz") / "s"
    frames = [np.full((16, 16, 3), 9 * i, np.uint8) for i in range(25)]
    video = encode_fragments(frames, fps=Fraction(10), width=16, height=16)
    with StoreWriter(
        path, video_codec="vp9", gop=12, short_side_px=16, dataset="t", classes={"action": ["a", "b"]}
    ) as writer:
        for i in range(3):
            media = writer.add_media(f"m{i}", writer.add_video(video), writer.add_audio(noise(1.5, i)))
            writer.add_samples("train", [SampleRow(f"s{i}", media, 0, 1, {"action": (i % 2,)})])
    return path


def mutated(data: bytes, rng: np.random.Generator) -> bytes:
    """Flip bits, overwrite numbers, cut, repeat or insert."""
    out = bytearray(data)
    for _ in range(int(rng.integers(1, 4))):
        place = int(rng.integers(len(out)))
        kind = int(rng.integers(6))
        if kind <= 1:
            out[place] ^= 1 << int(rng.integers(8))
        elif kind == 2:
            value = int(rng.choice([0, -1, 1, 2**31 - 1, -(2**31), 2**40, 2**62]))
            size = 8 if abs(value) >= 2**31 else 4
            out[place : place + size] = (value % 2 ** (8 * size)).to_bytes(size, "little")
        elif kind == 3:
            del out[place : place + int(rng.integers(1, 64))]
        elif kind == 4:
            out[place:place] = out[place : place + int(rng.integers(1, 64))]
        else:
            out[place : place + 8] = rng.bytes(8)
    return bytes(out) or b"\0"


def read_everything(path: Path) -> None:
    """Open and read as training would; only ValueError (StoreError, MediaError) may come out."""
    try:
        store = Store.open(path)
        split = store.split("train")
        for i in range(min(len(split.samples), 4)):
            media = int(split.samples.media[i])
            split.samples.id(i), split.samples.boxes(i), split.samples.actions(i), store.media.id(media)
            split.samples.labels("action").row(i)
            split.read_video(media, 0, min(20, int(store.media.num_frames[media]) - 1))
            split.read_audio(media, -5, 20_000)
    except ValueError:
        pass  # what a broken store must give


def attack(path: Path, rounds: int, seed: int) -> None:
    """Break tables, sign them anew, read; leaves by _exit so that only a crash gives another status."""
    rng = np.random.default_rng(seed)
    good = {name: (path / name).read_bytes() for name in TABLES}
    info = parse_info((path / INFO_NAME).read_bytes(), path)
    for _ in range(rounds):
        name = TABLES[int(rng.integers(2))]
        data = mutated(good[name], rng)
        (path / name).write_bytes(data)
        info.files[name] = digest_file(path / name)
        (path / INFO_NAME).write_bytes(info.to_bytes())
        read_everything(path)
        if rng.integers(8) == 0:
            verify_store(path)
        (path / name).write_bytes(good[name])
        info.files[name] = digest_file(path / name)


def in_child(path: Path, rounds: int, seed: int) -> int:
    """Exit status of a forked child that attacks a store: 0, 1 for an exception, negative for a signal."""
    child = os.fork()
    if child == 0:
        status = 1
        try:
            attack(path, rounds, seed)
            status = 0
        finally:
            os._exit(status)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


@pytest.mark.integration
@pytest.mark.parametrize("rounds", [150, pytest.param(100_000, marks=pytest.mark.slow)])
def test_signed_but_broken_tables_never_crash(original: Path, tmp_path: Path, rounds: int) -> None:
    path = Path(shutil.copytree(original, tmp_path / "s"))
    assert in_child(path, rounds, seed=rounds) == 0


@pytest.mark.parametrize("rounds", [150, pytest.param(100_000, marks=pytest.mark.slow)])
def test_unsigned_damage_is_always_found(original: Path, tmp_path: Path, rounds: int) -> None:
    path = Path(shutil.copytree(original, tmp_path / "s"))
    rng = np.random.default_rng(rounds)
    for _ in range(rounds):
        name = TABLES[int(rng.integers(2))]
        good = (path / name).read_bytes()
        bad = mutated(good, rng)
        (path / name).write_bytes(bad)
        if bad != good:
            with pytest.raises(StoreError, match=name):
                Store.open(path).split("train")
        (path / name).write_bytes(good)
    assert verify_store(path) == []


@pytest.mark.parametrize("rounds", [500, pytest.param(100_000, marks=pytest.mark.slow)])
def test_store_json_never_does_anything_but_parse(original: Path, rounds: int) -> None:
    good = (original / INFO_NAME).read_bytes()
    rng = np.random.default_rng(rounds)
    for _ in range(rounds):
        bad = mutated(good, rng)
        if bad != good:
            with pytest.raises(StoreError, match=r"store\.json"):
                parse_info(bad, Path("store.json"))


def test_deep_json_is_an_error_and_no_crash() -> None:
    with pytest.raises(StoreError, match=r"store\.json"):
        parse_info(b"[" * 200_000, Path("store.json"))


def test_huge_numbers_in_store_json_are_an_error(original: Path) -> None:
    info = parse_info((original / INFO_NAME).read_bytes(), original)
    info.files[INDEX_NAME] = FileDigest(10**30, "0" * 64)
    with pytest.raises(StoreError, match=r"number \(10{30}\)' must be there|field number"):
        parse_info(info.to_bytes(), Path("store.json"))
    info.files[INDEX_NAME] = FileDigest(11, "0" * 64)
    for wrong in (b"1e400", b"1.5", b"true", b'"11"', b"-11"):
        with pytest.raises(StoreError, match=r"store\.json: field number"):
            parse_info(info.to_bytes().replace(b'"bytes": 11,', b'"bytes": ' + wrong + b","), Path("store.json"))
