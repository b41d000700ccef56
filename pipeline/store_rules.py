"""What the numbers in a store's tables must be, checked at open: a table that digests call intact may still be wrong.

Everything is vectorised: a million rows take well under a second. Legend: N rows, V values of a list column.
"""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.dataset import MediaTable, Ragged, SampleTable
from pipeline.store_format import AUDIO_BLOCK_SAMPLES, MAX_FPS, MAX_SIDE_PX, StoreError

Bad = NDArray[np.bool_]
Rule = tuple[str, NDArray[Any], Bad, str]  # column, what it holds (N or V), where that breaks the rule, the rule
SIDE_MULTIPLE_PX = 16
LABEL_PREFIX = "labels_"


def check_media(path: Path, media: MediaTable, lists: Mapping[str, Ragged], num_shards: int) -> None:
    """Check the index.

    Args:
        path: of index.arrow. media: its columns. lists: its list columns. num_shards: shards of the store.

    Raises:
        StoreError: file, row, value, rule and remedy of the first value that breaks its rule.
    """
    for name, column in lists.items():
        _check_offsets(path, name, column, media.ids)
    for name, values, bad, rule in _media_rules(media, num_shards):
        _raise_first(path, name, values, bad, rule, media.ids)
    fragments = [name for name in lists if name.startswith("fragment_")]
    _check_equal(path, media.ids, {name: np.diff(lists[name].offsets) for name in fragments})
    blocks = -(-media.num_samples // AUDIO_BLOCK_SAMPLES)
    found = np.diff(lists["audio_crc32"].offsets)
    _raise_first(
        path, "length of audio_crc32", found, found != blocks, "must be one a second of num_samples", media.ids
    )


def _media_rules(media: MediaTable, num_shards: int) -> Iterator[Rule]:
    yield "num_frames", media.num_frames, media.num_frames < 1, "must be >= 1"
    yield "num_samples", media.num_samples, media.num_samples < 0, "must be >= 0"
    for name in ("width", "height"):
        side = getattr(media, name)
        bad = (side < SIDE_MULTIPLE_PX) | (side > MAX_SIDE_PX) | (side % SIDE_MULTIPLE_PX != 0)
        yield name, side, bad, f"must be a multiple of {SIDE_MULTIPLE_PX} in {SIDE_MULTIPLE_PX}..{MAX_SIDE_PX} px"
    for name in ("display_width", "display_height"):
        side = getattr(media, name)
        yield name, side, (side < 1) | (side > MAX_SIDE_PX), f"must be in 1..{MAX_SIDE_PX} px"
    for name in ("fps_num", "fps_den"):
        yield name, getattr(media, name), getattr(media, name) < 1, "must be >= 1"
    fps = media.fps_num / np.maximum(media.fps_den, 1)
    yield "fps_num / fps_den", fps, fps > MAX_FPS, f"must be at most {MAX_FPS} fps"
    yield "video_shard", media.shard, (media.shard < 0) | (media.shard >= num_shards), f"must be in 0..{num_shards - 1}"


def check_samples(path: Path, samples: SampleTable, num_media: int, classes: Mapping[str, Sequence[str]]) -> None:
    """Check the sample table of a split; arguments and errors as in `check_media`, classes: label set -> names."""
    ids = samples.ids
    lists = {f"{LABEL_PREFIX}{name}": column for name, column in samples.label_sets.items()}
    assert samples.action_columns is not None
    assert samples.box_columns is not None
    names = (
        "actions_label",
        "actions_start_s",
        "actions_end_s",
        "boxes",
        "box_label_counts",
        "box_labels",
        "box_scores",
    )
    lists |= dict(zip(names, (*samples.action_columns, *samples.box_columns), strict=True))
    for name, column in lists.items():
        _check_offsets(path, name, column, ids)
    for name, values, bad, rule in _sample_rules(samples, num_media):
        _raise_first(path, name, values, bad, rule, ids)
    _check_equal(path, ids, {name: np.diff(lists[name].offsets) for name in names[:3]})
    box_counts = np.diff(lists["box_label_counts"].offsets)
    counts = {"boxes / 4": np.diff(lists["boxes"].offsets) / 4, "box_scores": np.diff(lists["box_scores"].offsets)}
    _check_equal(path, ids, {"box_label_counts": box_counts} | counts)
    for name, values, bad, rule in _list_rules(lists, classes):
        _raise_first(path, name, values, bad, rule, ids, lists[name].offsets)
    labels = _sums(lists["box_label_counts"])
    _check_equal(path, ids, {"box_labels": np.diff(lists["box_labels"].offsets), "sum of box_label_counts": labels})


def _sample_rules(samples: SampleTable, num_media: int) -> Iterator[Rule]:
    media, start, end, key = samples.media, samples.start_s, samples.end_s, samples.key_time_s
    yield "media", media, (media < 0) | (media >= num_media), f"must be in 0..{num_media - 1}"
    yield "start_s", start, ~((start >= 0) & (start < np.inf)), "must be finite and >= 0"
    yield "end_s", end, ~((end >= start) & (end < np.inf)), "must be finite and >= start_s"
    yield "key_time_s", key, ~(np.isnan(key) | ((key >= 0) & (key < np.inf))), "must be NaN, or finite and >= 0"


def _list_rules(lists: Mapping[str, Ragged], classes: Mapping[str, Sequence[str]]) -> Iterator[Rule]:
    sets = {name: name.removeprefix(LABEL_PREFIX) for name in lists if name.startswith(LABEL_PREFIX)}
    for name, label_set in (sets | {"actions_label": "action", "box_labels": "action"}).items():
        values, known = lists[name].values, len(classes.get(label_set, ()))
        rule = f"must be in the {known} classes of {label_set!r}"
        yield name, values, (values < 0) | (values >= known), rule
    start, end = lists["actions_start_s"].values, lists["actions_end_s"].values
    yield "actions_start_s", start, ~((start >= 0) & (start < np.inf)), "must be finite and >= 0"
    yield "actions_end_s", end, ~((end >= start) & (end < np.inf)), "must be finite and >= actions_start_s"
    boxes, counts, scores = (lists[name].values for name in ("boxes", "box_label_counts", "box_scores"))
    yield "boxes", boxes, ~((boxes >= 0) & (boxes <= 1)), "must be in 0..1"
    yield "box_label_counts", counts, counts < 0, "must be >= 0"
    yield "box_scores", scores, ~np.isfinite(scores), "must be finite"


def _sums(column: Ragged) -> NDArray[np.int64]:
    """Sum of each row of a list column."""
    total = np.concatenate([[0], np.cumsum(column.values, dtype=np.int64)])
    return np.asarray(total[column.offsets[1:]] - total[column.offsets[:-1]])


def _check_offsets(path: Path, name: str, column: Ragged, ids: Sequence[str]) -> None:
    """Rows of a list column must follow each other from 0 and fill it, or views of them mean nothing."""
    offsets, count = column.offsets, len(column.values)
    _raise_first(path, f"length of {name}", np.diff(offsets), np.diff(offsets) < 0, "must be >= 0", ids)
    if len(offsets) and (offsets[0] != 0 or offsets[-1] != count):
        raise StoreError(
            f"{path}: rows of {name} ({offsets[0]}..{offsets[-1]}) must fill its {count} values; make the store again"
        )


def _check_equal(path: Path, ids: Sequence[str], lengths: Mapping[str, NDArray[Any]]) -> None:
    (first, wanted), *others = lengths.items()
    for name, found in others:
        _raise_first(path, f"length of {name}", found, found != wanted, f"must be that of {first}", ids)


def _raise_first(
    path: Path,
    name: str,
    values: NDArray[Any],
    bad: Bad,
    rule: str,
    ids: Sequence[str],
    offsets: NDArray[Any] | None = None,
) -> None:
    if not bad.any():
        return
    place = int(np.argmax(bad))
    row = place if offsets is None else int(np.searchsorted(offsets, place, side="right")) - 1
    raise StoreError(f"{path}: row {row} ({ids[row]}): {name} ({values[place]}) {rule}; make the store again")
