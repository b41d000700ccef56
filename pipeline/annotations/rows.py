"""What every annotation reader returns: rows of samples with their labels, the class lists, and a report.

Split names follow one rule for all data sets: ``train*`` is trained on, ``val*`` is evaluated on, ``test*`` has no
public labels. Times are seconds of the video file, boxes are fractions of its width and height.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import PurePosixPath

from pipeline.annotations.report import Report

__all__ = ["AnnotationError", "Annotations", "Box", "Report", "Row", "TimedLabel", "confine"]

MAX_PATH_CHARS = 1024
_CONTROL = re.compile(r"[\x00-\x1f\x7f]")
_PROTOCOL = re.compile(r"[A-Za-z][A-Za-z0-9+.,\-]*:")
#: Nearly all paths, recognised in one step: no part starts with a dot or blank, no character has a meaning elsewhere.
_PLAIN = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9_. -]{0,199}(?:/[A-Za-z0-9_-][A-Za-z0-9_. -]{0,199}){0,3}")
_SPLIT = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.\-]{0,63}")
_LABEL_SET = re.compile(r"[a-z][a-z0-9_]{0,31}")


class AnnotationError(ValueError):
    """An annotation file, or a value in one, that breaks a rule; the message names file:line, value, rule, remedy."""


@dataclass(frozen=True, slots=True)
class TimedLabel:
    """One action with its extent in time.

    Args:
        label: index into the class list ``action``, >= 0.
        start_s: first second, >= 0.
        end_s: last second, >= ``start_s``.
    Raises:
        AnnotationError: a value out of range.
    """

    label: int
    start_s: float
    end_s: float

    def __post_init__(self) -> None:
        _check_label(self.label)
        if not (0.0 <= self.start_s <= self.end_s < math.inf):
            raise AnnotationError(
                f"times of a label ({self.start_s} to {self.end_s}) must be 0 <= start <= end, in seconds; "
                "correct them in the annotation file"
            )


@dataclass(frozen=True, slots=True)
class Box:
    """One person box on a key frame.

    Args:
        x1, y1, x2, y2: corners as fractions of width and height, 0 <= x1 < x2 <= 1 and 0 <= y1 < y2 <= 1.
        labels: indices into the class list ``action``; empty for a detector's box that no annotation matches.
        score: detector's confidence in [0, 1]; 1.0 for ground truth.
        person: identity within the video; -1 where unknown (a detector's box).
    Raises:
        AnnotationError: a value out of range.
    """

    x1: float
    y1: float
    x2: float
    y2: float
    labels: tuple[int, ...] = ()
    score: float = 1.0
    person: int = -1

    def __post_init__(self) -> None:
        if not (0.0 <= self.x1 < self.x2 <= 1.0 and 0.0 <= self.y1 < self.y2 <= 1.0):
            raise AnnotationError(
                f"box ({self.x1}, {self.y1}, {self.x2}, {self.y2}) must have 0 <= x1 < x2 <= 1 and 0 <= y1 < y2 <= 1; "
                "divide pixels by width and height"
            )
        if not 0.0 <= self.score <= 1.0:
            raise AnnotationError(f"box score ({self.score}) must lie in [0, 1]; give the detector's confidence")
        for label in self.labels:
            _check_label(label)


@dataclass(frozen=True, slots=True)
class Row:
    """One sample that an annotation file lists: a span of a video with its labels.

    Args:
        id: name of the sample, unique within its split.
        split: ``train``, ``val``, ``test`` or a variant such as ``train1``; letters, digits and ``_.-``.
        video: path of the file relative to the folder of videos, ``/`` between parts, confined to that folder.
        start_s: first second of the sample within the file, >= 0.
        end_s: last second, > ``start_s``; None = the end of the file.
        labels: label set (``action``, ``verb``, ``noun``) -> indices into the class list of that name; several indices
            for a multi-label sample, an empty mapping where labels are not public.
        actions: labels with times (Charades), indices into the class list ``action``.
        key_time_s: second of the key frame that ``boxes`` belong to, or None.
        boxes: person boxes on the key frame.
    Raises:
        AnnotationError: a value that breaks one of these rules.
    """

    id: str
    split: str
    video: str
    start_s: float = 0.0
    end_s: float | None = None
    labels: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    actions: tuple[TimedLabel, ...] = ()
    key_time_s: float | None = None
    boxes: tuple[Box, ...] = ()

    def __post_init__(self) -> None:
        if not self.id or len(self.id) > MAX_PATH_CHARS or _CONTROL.search(self.id) or not _is_unicode(self.id):
            raise AnnotationError(f"id ({self.id[:80]!r}) must be 1 to {MAX_PATH_CHARS} printable characters; rename")
        if not _SPLIT.fullmatch(self.split):
            raise AnnotationError(
                f"split ({self.split[:80]!r}) must be letters, digits and _.- (at most 64); call it train, val or test"
            )
        if confine(self.video) != self.video:
            raise AnnotationError(f"video ({self.video!r}) must be a plain path; write {confine(self.video)!r}")
        if not 0.0 <= self.start_s < math.inf or (self.end_s is not None and not self.start_s < self.end_s < math.inf):
            raise AnnotationError(
                f"span of {self.id!r} ({self.start_s} to {self.end_s}) must be 0 <= start < end, in seconds; correct it"
            )
        if self.key_time_s is not None and not 0.0 <= self.key_time_s < math.inf:
            raise AnnotationError(f"key time of {self.id!r} ({self.key_time_s}) must be >= 0 seconds; correct it")
        if self.boxes and self.key_time_s is None:
            raise AnnotationError(f"boxes of {self.id!r} must belong to a key frame; give key_time_s")
        for name, values in self.labels.items():
            if not _LABEL_SET.fullmatch(name):
                raise AnnotationError(f"label set ({name!r}) must be a lower-case name; call it action, verb or noun")
            for value in values:
                _check_label(value)


@dataclass(frozen=True)
class Annotations:
    """All samples of a data set whose video is present, the class lists, and the report of what was read.

    Args:
        dataset: name of the data set.
        rows: the samples, in the order of the official files; those without a video are in ``report.missing``.
        classes: label set -> names, the position being the label; boxes and timed labels use the set ``action``.
        report: counts against the published ones, missing videos, oddities with file:line.
    Raises:
        AnnotationError: an id twice in one split, or a label outside its class list.
    """

    dataset: str
    rows: tuple[Row, ...]
    classes: Mapping[str, tuple[str, ...]]
    report: Report

    def __post_init__(self) -> None:
        seen: set[tuple[str, str]] = set()
        sizes = {name: len(names) for name, names in self.classes.items()}
        for row in self.rows:
            key = (row.split, row.id)
            if key in seen:
                raise AnnotationError(f"id ({row.id!r}) must be unique in split {row.split!r}; remove one row")
            seen.add(key)
            for name, values in row.labels.items():
                for value in values:
                    self._check(row, name, value, sizes)
            for action in row.actions:
                self._check(row, "action", action.label, sizes)
            for box in row.boxes:
                for value in box.labels:
                    self._check(row, "action", value, sizes)

    @staticmethod
    def _check(row: Row, name: str, value: int, sizes: Mapping[str, int]) -> None:
        if value >= sizes.get(name, 0):
            raise AnnotationError(
                f"label ({name} {value}) of {row.id!r} must be below the {sizes.get(name, 0)} classes of the list; "
                "give the class list that belongs to these annotations"
            )

    @property
    def splits(self) -> tuple[str, ...]:
        """Names of the splits that have rows, in order of first appearance."""
        return tuple(dict.fromkeys(row.split for row in self.rows))

    @property
    def videos(self) -> tuple[str, ...]:
        """Relative paths of the files that the rows need, each once, in order of first appearance."""
        return tuple(dict.fromkeys(row.video for row in self.rows))


def confine(path: str, root: str | os.PathLike[str] | None = None) -> str:
    """Return a path of an annotation file as a plain path relative to the folder of videos, or refuse it.

    The rule is about the text alone: symbolic links inside the folder belong to its owner and are followed.

    Args:
        path: what an annotation file says, ``/`` between parts.
        root: the folder of videos; given, an absolute path that lies inside it is made relative.
    Returns:
        The path without ``.`` parts and double slashes.
    Raises:
        AnnotationError: an empty or absolute path, ``..``, a URL or protocol (``http://``, ``pipe:``), NUL or another
            control character, a backslash, text that is not Unicode, more than 1024 characters.
    """

    def refuse(rule: str) -> AnnotationError:
        shown = ascii(path[:120])
        return AnnotationError(f"path ({shown}) {rule}; write it relative to the folder of videos")

    if _PLAIN.fullmatch(path):
        return path
    if not path.strip():
        raise refuse("must not be empty")
    if len(path) > MAX_PATH_CHARS or any(len(part.encode("utf-8", "replace")) > 255 for part in path.split("/")):
        raise refuse(f"must have at most {MAX_PATH_CHARS} characters and 255 bytes a part")
    if _CONTROL.search(path):
        raise refuse("must not contain NUL or other control characters")
    if not _is_unicode(path):
        raise refuse("must be Unicode text")
    if "\\" in path:
        raise refuse("must not contain a backslash")
    parts = PurePosixPath(path).parts
    if ".." in parts:
        raise refuse("must not contain '..'")
    if _PROTOCOL.match(path):
        raise refuse("must be a file, not a URL or protocol")
    if path.startswith("/"):
        base = PurePosixPath(os.path.abspath(root)).parts if root is not None else ()
        if not base or parts[: len(base)] != base or len(parts) == len(base):
            raise refuse("must not be absolute" if root is None else "must lie inside the folder of videos")
        parts = parts[len(base) :]
    relative = "/".join(parts)
    if not relative.strip():
        raise refuse("must name a file")
    if _PROTOCOL.match(relative):
        raise refuse("must be a file, not a URL or protocol")
    return relative


def _check_label(label: int) -> None:
    if label < 0:
        raise AnnotationError(f"label ({label}) must be >= 0; ids of the official files start at 0 after conversion")


def _is_unicode(text: str) -> bool:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True
