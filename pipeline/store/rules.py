"""What the numbers in a store's tables must be, checked as rows are written and again at open: a table that digests
call intact may still be wrong.

Everything is vectorised, slice by slice: a million rows take well under a second and next to no memory. Legend: N rows,
V values of a list column.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from pipeline.dataset import Lists, MediaTable, Numbers, Ragged, SampleTable
from pipeline.store.format import AUDIO_BLOCK_SAMPLES, LABEL_PREFIX, MAX_FPS, MAX_SIDE_PX, StoreError
from pipeline.store.schemas import index_schema

Bad = NDArray[np.bool_]
Rule = tuple[str, NDArray[Any], Bad, str]  # column, what it holds (N or V), where that breaks the rule, the rule
SIDE_MULTIPLE_PX = 16
ACTION_LISTS = ("actions_label", "actions_start_s", "actions_end_s")
BOX_LISTS = ("boxes", "box_label_counts", "box_labels", "box_scores")
SLICE_ROWS = 1 << 15
MEDIA_LISTS = tuple(item.name for item in index_schema() if str(item.type).startswith("list"))


class Columns(Protocol):
    """A table by columns: mapped from a file (`MappedTable`) or about to be written (`GrowingTable`)."""

    @property
    def names(self) -> Sequence[str]: ...
    def column(self, name: str) -> Numbers: ...
    def strings(self, name: str) -> Sequence[str]: ...
    def ragged(self, name: str) -> Lists: ...


def media_table(table: Columns) -> MediaTable:
    """The columns of an index that everybody needs."""
    names = {item.name for item in fields(MediaTable)} - {"ids", "shard"}
    columns = {name: table.column(name) for name in sorted(names)}
    return MediaTable(ids=table.strings("id"), shard=table.column("video_shard"), **columns)


def sample_table(table: Columns) -> SampleTable:
    """The columns of a sample table."""
    actions, boxes = ([table.ragged(name) for name in names] for names in (ACTION_LISTS, BOX_LISTS))
    return SampleTable(
        ids=table.strings("id"),
        media=table.column("media"),
        start_s=table.column("start_s"),
        end_s=table.column("end_s"),
        key_time_s=table.column("key_time_s"),
        label_sets={n.removeprefix(LABEL_PREFIX): table.ragged(n) for n in table.names if n.startswith(LABEL_PREFIX)},
        action_columns=(actions[0], actions[1], actions[2]),
        box_columns=(boxes[0], boxes[1], boxes[2], boxes[3]),
    )


class Checked(NamedTuple):
    """How a table is checked.

    Args:
        where: what messages name first: the file, or what is being written. remedy: what they end with.
        first_row: number of the first row, where these are added to a table.
        after_slice: called after each slice of rows, to give back what it took.
    """

    where: str | Path
    remedy: str = "make the store again"
    first_row: int = 0
    after_slice: Callable[[], Any] = lambda: None


class _Rows(NamedTuple):
    """A slice of rows, for messages: `first` is the place of its first one in `ids`."""

    how: Checked
    ids: Sequence[str]
    first: int


class _Part(NamedTuple):
    """The same rows of every column: numbers (n,), and lists with offsets from 0."""

    numbers: dict[str, NDArray[Any]]
    lists: dict[str, Ragged]


def check_media(media: MediaTable, lists: Mapping[str, Lists], num_shards: int, how: Checked) -> None:
    """Check the index.

    Args:
        media: its columns. lists: its list columns. num_shards: shards of the store.

    Raises:
        StoreError: file, row, value, rule and remedy of the first value that breaks its rule.
    """
    scalars = {item.name: getattr(media, item.name) for item in fields(MediaTable) if item.name != "ids"}
    for rows, part in _slices(media.ids, scalars, lists, how):
        for name, values, bad, rule in _media_rules(part.numbers, num_shards):
            _raise_first(rows, name, values, bad, rule)
        lengths = {name: np.diff(column.offsets) for name, column in part.lists.items()}
        _check_equal(rows, {name: found for name, found in lengths.items() if name.startswith("fragment_")})
        found, blocks = lengths["audio_crc32"], -(-part.numbers["num_samples"] // AUDIO_BLOCK_SAMPLES)
        _raise_first(rows, "length of audio_crc32", found, found != blocks, "must be one a second of num_samples")


def _media_rules(media: Mapping[str, NDArray[Any]], num_shards: int) -> Iterator[Rule]:
    yield "num_frames", media["num_frames"], media["num_frames"] < 1, "must be >= 1"
    yield "num_samples", media["num_samples"], media["num_samples"] < 0, "must be >= 0"
    for name in ("width", "height"):
        side = media[name]
        bad = (side < SIDE_MULTIPLE_PX) | (side > MAX_SIDE_PX) | (side % SIDE_MULTIPLE_PX != 0)
        yield name, side, bad, f"must be a multiple of {SIDE_MULTIPLE_PX} in {SIDE_MULTIPLE_PX}..{MAX_SIDE_PX} px"
    for name in ("display_width", "display_height"):
        side = media[name]
        yield name, side, (side < 1) | (side > MAX_SIDE_PX), f"must be in 1..{MAX_SIDE_PX} px"
    for name in ("fps_num", "fps_den"):
        yield name, media[name], media[name] < 1, "must be >= 1"
    fps = media["fps_num"] / np.maximum(media["fps_den"], 1)
    yield "fps_num / fps_den", fps, fps > MAX_FPS, f"must be at most {MAX_FPS} fps"
    shard = media["shard"]
    yield "video_shard", shard, (shard < 0) | (shard >= num_shards), f"must be in 0..{num_shards - 1}"


def check_samples(samples: SampleTable, num_media: int, classes: Mapping[str, Sequence[str]], how: Checked) -> None:
    """Check the sample table of a split; errors as in `check_media`, classes: label set -> names."""
    assert samples.action_columns is not None
    assert samples.box_columns is not None
    lists = {f"{LABEL_PREFIX}{name}": column for name, column in samples.label_sets.items()}
    lists |= dict(zip(ACTION_LISTS + BOX_LISTS, (*samples.action_columns, *samples.box_columns), strict=True))
    scalars = {name: getattr(samples, name) for name in ("media", "start_s", "end_s", "key_time_s")}
    for rows, part in _slices(samples.ids, scalars, lists, how):
        for name, values, bad, rule in _sample_rules(part.numbers, num_media):
            _raise_first(rows, name, values, bad, rule)
        lengths = {name: np.diff(column.offsets) for name, column in part.lists.items()}
        _check_equal(rows, {name: lengths[name] for name in ACTION_LISTS})
        counts = {name: lengths[name] for name in ("box_label_counts", "box_scores")}
        _check_equal(rows, {"box_label_counts": counts["box_label_counts"], "boxes / 4": lengths["boxes"] / 4} | counts)
        for name, values, bad, rule in _list_rules(part.lists, classes):
            _raise_first(rows, name, values, bad, rule, part.lists[name].offsets)
        labels = _sums(part.lists["box_label_counts"])
        _check_equal(rows, {"box_labels": lengths["box_labels"], "sum of box_label_counts": labels})


def _slices(
    ids: Sequence[str], numbers: Mapping[str, Numbers], lists: Mapping[str, Lists], how: Checked
) -> Iterator[tuple[_Rows, _Part]]:
    """Slices of rows. Rows of lists follow each other and fill their values."""
    whole = {name: np.asarray(column) for name, column in numbers.items()}
    arrays = {name: (column.values, column.offsets) for name, column in lists.items()}
    for name, (values, offsets) in arrays.items():
        if len(offsets) and (offsets[0] != 0 or offsets[-1] != len(values)):
            span = f"{offsets[0]}..{offsets[-1]}"
            raise StoreError(f"{how.where}: rows of {name} ({span}) must fill its {len(values)} values; {how.remedy}")
    for first in range(0, len(ids), SLICE_ROWS):
        stop = min(first + SLICE_ROWS, len(ids))
        rows = _Rows(how, ids, first)
        part = _Part({name: column[first:stop] for name, column in whole.items()}, {})
        for name, (values, offsets) in arrays.items():
            ends = offsets[first : stop + 1]
            lengths = np.diff(ends)
            bad = (lengths < 0) | (ends[1:] > len(values))
            _raise_first(rows, f"length of {name}", lengths, bad, "must be >= 0 and inside its values")
            part.lists[name] = Ragged(values[ends[0] : ends[-1]], ends - ends[0])
        yield rows, part
        how.after_slice()


def _sample_rules(samples: Mapping[str, NDArray[Any]], num_media: int) -> Iterator[Rule]:
    media, start, end, key = (samples[name] for name in ("media", "start_s", "end_s", "key_time_s"))
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


def _check_equal(rows: _Rows, lengths: Mapping[str, NDArray[Any]]) -> None:
    (first, wanted), *others = lengths.items()
    for name, found in others:
        _raise_first(rows, f"length of {name}", found, found != wanted, f"must be that of {first}")


def _raise_first(
    rows: _Rows, name: str, values: NDArray[Any], bad: Bad, rule: str, offsets: NDArray[Any] | None = None
) -> None:
    if not bad.any():
        return
    place = int(np.argmax(bad))
    row = place if offsets is None else int(np.searchsorted(offsets, place, side="right")) - 1
    row += rows.first
    how = rows.how
    raise StoreError(
        f"{how.where}: row {how.first_row + row} ({rows.ids[row]}): {name} ({values[place]}) {rule}; {how.remedy}"
    )
