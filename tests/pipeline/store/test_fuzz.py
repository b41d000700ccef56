"""Hostile stores: whatever the bytes, reading ends in a result or in a ValueError, and the process lives.

Two kinds: damage under the store's own digests must always be found; a store with valid digests over broken tables
(written by an enemy) may be read or refused, but never crashes, hangs or reads outside its folder.
"""

import contextlib
import json
import os
import shutil
import traceback
from collections import Counter
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from unittest import mock

import numpy as np
import pytest

from pipeline.media.fragments import encode_fragments
from pipeline.store.format import INDEX_NAME, INFO_NAME, FileDigest, StoreError, StoreInfo, digest_file, parse_info
from pipeline.store.reader import Store, StoreSplit
from pipeline.store.rows import SampleRow
from pipeline.store.verify import verify_store
from pipeline.store.writer import StoreWriter
from tests.pipeline.support.stores import noise

TABLES = (INDEX_NAME, "samples-train.arrow")
ROUNDS_PER_CHILD = 5000


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


def put(path: Path, data: bytes) -> None:
    """Replace a file's contents; not by truncating it to nothing, after which file systems flush at once."""
    with path.open("r+b", buffering=0) as file:
        file.write(data)
        file.truncate(len(data))


def is_accepted(open_split: Callable[[], StoreSplit]) -> bool:
    """Open and read as training would; only ValueError (StoreError, MediaError) may come out."""
    try:
        split = open_split()
    except ValueError:
        return False
    media = split.media
    for i in range(min(len(split.samples), 4)):
        number = int(split.samples.media[i])
        with contextlib.suppress(ValueError):  # what a broken store must give
            split.samples.id(i), split.samples.boxes(i), split.samples.actions(i), media.id(number)
            split.samples.labels("action").row(i), split.sound_range(number), split.same_video(0, number)
            split.read_video(number, 0, min(20, int(media.num_frames[number]) - 1))
        with contextlib.suppress(ValueError):
            split.read_audio(number, -5, 20_000)
    return True


def attack(path: Path, rounds: int, seed: int) -> Counter[str]:
    """Break each table in turn, `rounds` times, and read; counts what was refused and accepted.

    Most rounds leave the digests out, which take most of the time; every 16th signs the table and opens as anybody
    would, every 64th verifies as well.
    """
    rng, counts = np.random.default_rng(seed), Counter[str]()
    signed = (path / INFO_NAME).read_bytes()
    info = parse_info(signed, path)
    for name in TABLES:
        good, digest = (path / name).read_bytes(), info.files[name]
        with mock.patch("pipeline.store.reader.parse_info", return_value=info):
            whole = Store.open(path, check_tables=False)
            for number in range(rounds):
                data = mutated(good, rng)
                put(path / name, data)
                info.files[name] = FileDigest(len(data), "")
                if number % 16:
                    store = whole if name != INDEX_NAME else None
                    found = is_accepted(lambda s=store: (s or Store.open(path, check_tables=False)).split("train"))
                else:
                    found = signed_round(path, name, info, verify=number % 64 == 0)
                counts["accepted" if found else "refused"] += 1
        put(path / name, good)
        info.files[name] = digest
    put(path / INFO_NAME, signed)
    assert verify_store(path) == []
    return counts


def signed_round(path: Path, name: str, info: StoreInfo, *, verify: bool) -> bool:
    """One round with valid digests over the broken table."""
    info.files[name] = digest_file(path / name)
    put(path / INFO_NAME, info.to_bytes())
    with mock.patch("pipeline.store.reader.parse_info", parse_info):
        if verify:
            verify_store(path)
        return is_accepted(lambda: Store.open(path).split("train"))


def in_child(path: Path, rounds: int, seed: int) -> tuple[int, Counter[str]]:
    """Exit status of a forked child that attacks a store: 0, 1 for an exception, negative for a signal; its counts."""
    report = path.parent / "counts.json"
    report.write_text("{}")
    child = os.fork()
    if child == 0:
        status = 1
        try:
            report.write_text(json.dumps(attack(path, rounds, seed)))
            status = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(status)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), Counter(json.loads(report.read_text()))


@pytest.mark.integration
@pytest.mark.parametrize("rounds", [400, pytest.param(100_000, marks=pytest.mark.slow)])
def test_signed_but_broken_tables_never_crash(original: Path, tmp_path: Path, rounds: int) -> None:
    counts: Counter[str] = Counter()
    for seed in range(-(-rounds // ROUNDS_PER_CHILD)):
        path = Path(shutil.copytree(original, tmp_path / f"{seed}" / "s"))
        status, found = in_child(path, min(rounds, ROUNDS_PER_CHILD), seed)
        assert status == 0, f"attack(path, {min(rounds, ROUNDS_PER_CHILD)}, seed={seed})"
        counts += found
        shutil.rmtree(path.parent)
    print(dict(counts))
    assert counts.total() == rounds * len(TABLES)
    assert counts["refused"] > 0.3 * counts.total()
    assert counts["accepted"] > 0.05 * counts.total()


@pytest.mark.parametrize("rounds", [150, pytest.param(100_000, marks=pytest.mark.slow)])
def test_unsigned_damage_is_always_found(original: Path, tmp_path: Path, rounds: int) -> None:
    path = Path(shutil.copytree(original, tmp_path / "s"))
    rng = np.random.default_rng(rounds)
    whole = {name: (path / name).read_bytes() for name in TABLES}
    for _ in range(rounds):
        name = TABLES[int(rng.integers(2))]
        bad = mutated(whole[name], rng)
        put(path / name, bad)
        if bad != whole[name]:
            with pytest.raises(StoreError, match=name):
                Store.open(path).split("train")
        put(path / name, whole[name])
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
