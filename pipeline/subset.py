"""A share of a split, itself a `Dataset`: which samples are drawn for it, and their tables.

Legend: S samples of the split, n of them chosen.
"""

import dataclasses
import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.dataset import Dataset, Decoder, Lists, MediaTable, Ragged, SampleTable, UInt8, VideoCut
from pipeline.draw import Purpose, generator


def drawn_rows(num_samples: int, count: int, seed: int) -> NDArray[np.int64]:
    """Return which samples of a split are drawn: a function of these three numbers alone.

    Args:
        num_samples: S of the split.
        count: how many, at most S.
        seed: of the run.

    Returns:
        (n,) rising rows, each once.
    """
    rng = generator(seed, Purpose.SCORED)
    return np.sort(rng.choice(num_samples, count, replace=False)).astype(np.int64)


class Subset:
    """Chosen samples of a split, a `Dataset` with all media of the split: only the table of samples is shorter.

    Such as a training split's share that is scored like a validation split.

    Args:
        base: the split.
        rows: (n,) rows of its sample table, rising.
    """

    def __init__(self, base: Dataset, rows: NDArray[np.int64]) -> None:
        self._base = base
        self.samples = take_samples(base.samples, rows)
        digest = hashlib.sha256(base.fingerprint.encode())
        digest.update(np.asarray(rows, np.int64).tobytes())
        self.fingerprint = digest.hexdigest()

    @property
    def media(self) -> MediaTable:
        """All media of the split."""
        return self._base.media

    @property
    def classes(self) -> Mapping[str, Sequence[str]]:
        """Label set -> class names."""
        return self._base.classes

    @property
    def split(self) -> str:
        """Name of the whole split."""
        return self._base.split

    @property
    def decoders(self) -> tuple[Decoder, ...]:
        """See Dataset.decoders."""
        return self._base.decoders

    @property
    def video_codec(self) -> str:
        """See Dataset.video_codec."""
        return self._base.video_codec

    def same_video(self, media: int, other: int) -> bool:
        """See Dataset.same_video."""
        return self._base.same_video(media, other)

    def sound_range(self, media: int) -> tuple[int, int]:
        """See Dataset.sound_range."""
        return self._base.sound_range(media)

    def read_video(self, media: int, first: int, last: int) -> VideoCut:
        """See Dataset.read_video."""
        return self._base.read_video(media, first, last)

    def read_frames(
        self, media: int, frames: NDArray[Any], out: tuple[UInt8, UInt8] | None = None
    ) -> tuple[UInt8, UInt8]:
        """See Dataset.read_frames."""
        return self._base.read_frames(media, frames, out)

    def read_audio(self, media: int, start: int, count: int) -> NDArray[np.int16]:
        """See Dataset.read_audio."""
        return self._base.read_audio(media, start, count)


def take_samples(table: SampleTable, rows: NDArray[np.int64]) -> SampleTable:
    """Return some rows of a sample table, in memory.

    Args:
        table: of S samples; may stay in its file.
        rows: (n,) of them.
    """
    chosen = [int(row) for row in rows]

    def numbers(column: Any) -> NDArray[Any]:
        return np.array([column[row] for row in chosen])

    def lists(columns: Any) -> Any:
        return None if columns is None else tuple(take_lists(column, chosen) for column in columns)

    return dataclasses.replace(
        table,
        ids=[table.id(row) for row in chosen],
        media=numbers(table.media).astype(np.int64),
        start_s=numbers(table.start_s).astype(np.float64),
        end_s=numbers(table.end_s).astype(np.float64),
        key_time_s=numbers(table.key_time_s).astype(np.float64),
        label_sets={name: take_lists(column, chosen) for name, column in table.label_sets.items()},
        action_columns=lists(table.action_columns),
        box_columns=lists(table.box_columns),
    )


def take_lists(column: Lists, rows: Sequence[int]) -> Ragged:
    """Return some rows of a column of lists, in memory.

    Args:
        column: lists.
        rows: of them.
    """
    parts = [np.asarray(column.row(row)) for row in rows]
    offsets = np.concatenate([[0], np.cumsum([len(part) for part in parts])]).astype(np.int64)
    empty = np.asarray(column.values)[:0]
    return Ragged(np.concatenate([*parts, empty]).astype(empty.dtype), offsets)
