"""Read a whole store and name everything that is not as it was written."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from pipeline.dataset import Ragged
from pipeline.store.format import (
    AUDIO_BLOCK_SAMPLES,
    INDEX_NAME,
    INFO_NAME,
    SHARD_FOLDER,
    FileDigest,
    StoreError,
    digest_file,
    parse_info,
    shard_file,
)
from pipeline.store.reader import Store


def verify_store(path: str | Path, progress: Callable[[int, int], None] | None = None) -> list[str]:
    """Compare every byte of a store with its digests, then its tables with each other.

    Args:
        path: folder of the store. progress: called with (bytes done, bytes in all).

    Returns:
        One line a problem (path, value, rule, remedy); [] = the store is as it was written.
    """
    path = Path(path).absolute()
    try:
        info = parse_info((path / INFO_NAME).read_bytes(), path / INFO_NAME)
    except FileNotFoundError:
        return [f"{path / INFO_NAME}: file (missing) must exist; {path} is no store, or its writing never ended"]
    except StoreError as error:
        return [str(error)]
    listed = {INFO_NAME, *info.files}
    inside = list(path.rglob("*"))
    found = {p.relative_to(path).as_posix() for p in inside if not p.is_dir()}
    problems = [f"{path / name}: file must be listed in {INFO_NAME}; delete it" for name in sorted(found - listed)]
    folders = sorted(p for p in inside if p.is_dir() and p != path / SHARD_FOLDER)
    problems += [f"{p}: folder must not be there, a store has {SHARD_FOLDER} alone; delete it" for p in folders]
    done, total = 0, sum(d.bytes for d in info.files.values())

    def count(piece: int) -> None:
        nonlocal done
        done += piece
        if progress is not None:
            progress(done, total)

    for name, expected in info.files.items():
        file = path / name
        if not file.is_file():
            problems.append(f"{file}: file (missing) must exist; copy it again")
            continue
        digest = digest_file(file, count)
        if digest.bytes != expected.bytes:
            problems.append(f"{file}: size ({digest.bytes} bytes) must be {expected.bytes}; copy it again")
        elif digest.sha256 != expected.sha256:
            problems.append(f"{file}: sha256 ({digest.sha256}) must be {expected.sha256}; copy it again")
    return problems or _check_contents(path)


def _check_contents(path: Path) -> list[str]:
    """Structural rules that digests cannot see: a store that was written wrongly."""
    try:
        store = Store(path, check_tables=False)
        splits = [store.split(name) for name in store.splits]
    except StoreError as error:
        return [str(error)]
    problems = [
        f"{path / INDEX_NAME}: {rule}, it is not for {np.count_nonzero(bad)} of {len(bad)} media, "
        f"the first is {store.media.id(int(np.argmax(bad)))}; make the store again"
        for rule, bad in _index_rules(store)
        if bad.any()
    ]
    for name, ids in [("index", store.media.ids), *((split.split, split.samples.ids) for split in splits)]:
        unique = len(set(ids))
        if unique != len(ids):
            problems.append(
                f"{path}: ids of {name} ({unique} different ones of {len(ids)}) must be unique; make it again"
            )
    return problems


def _index_rules(store: Store) -> list[tuple[str, NDArray[np.bool_]]]:
    """Rules of the index and the media that break them, (N,) bool each."""
    columns = store.index_columns()
    num_frames, num_samples = np.asarray(store.media.num_frames), np.asarray(store.media.num_samples)
    for name, column in columns.items():
        if isinstance(column, Ragged):
            falling = np.diff(column.offsets) < 0
            if column.offsets[0] != 0 or column.offsets[-1] != len(column.values) or falling.any():
                return [(f"rows of {name} must follow each other and fill the column", falling | (not falling.any()))]
    starts, ends = columns["fragment_offset"].offsets[:-1], columns["fragment_offset"].offsets[1:]
    unequal = ends <= starts
    for name in ("fragment_bytes", "fragment_first_frame", "fragment_crc32"):
        unequal |= np.diff(columns[name].offsets) != ends - starts
    if unequal.any():
        return [("fragment lists must be of one length, at least 1", unequal)]
    owner = np.repeat(np.arange(len(starts)), ends - starts)
    first, offset, size = (columns[f"fragment_{name}"].values for name in ("first_frame", "offset", "bytes"))
    outside = (offset < 0) | (offset + size > _shard_sizes(store, columns["video_shard"])[owner]) | (size < 1)
    falling = np.append(np.diff(first) <= 0, False)
    falling[ends - 1] = first[ends - 1] >= num_frames
    falling[starts] |= first[starts] != 0
    init_end = columns["video_offset"] + columns["init_bytes"]
    bad_init = (columns["video_offset"] < 0) | (columns["init_bytes"] < 1)
    bad_init |= init_end > _shard_sizes(store, columns["video_shard"])
    sound = num_samples > 0
    audio_end = columns["audio_offset"] + 2 * num_samples
    lost = (columns["audio_offset"] < 0) | (audio_end > _shard_sizes(store, columns["audio_shard"]))
    blocks = np.diff(columns["audio_crc32"].offsets) != -(-num_samples // AUDIO_BLOCK_SAMPLES)
    return [
        ("the init segment must lie in its shard", bad_init),
        ("fragments must lie in their shard", np.bincount(owner, outside, len(starts)) > 0),
        ("fragment_first_frame must rise from 0 to below num_frames", np.bincount(owner, falling, len(starts)) > 0),
        ("audio must lie in its shard", sound & lost),
        ("audio_crc32 must have one entry a second", blocks),
    ]


def _shard_sizes(store: Store, shards: NDArray[np.int32]) -> NDArray[np.int64]:
    """Size in bytes of the shard in each row, -1 for one that does not exist."""
    count = sum(name.startswith(f"{SHARD_FOLDER}/") for name in store.info.files)
    missing = FileDigest(-1, "")
    sizes = np.array([store.info.files.get(shard_file(n), missing).bytes for n in range(count)] + [-1], np.int64)
    return sizes[np.where((shards >= 0) & (shards < count), shards, count)]
