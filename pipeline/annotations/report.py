"""The report of a reader: counts against the published ones, missing videos, and every oddity with file:line."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

EXAMPLES_PER_KIND = 20
UNUSED_FILE = "video file that no row of the lists takes"


@dataclass(frozen=True, slots=True)
class Count:
    """A number that was found, beside the published one.

    Args:
        what: what is counted, for example ``rows of train``.
        found: the number in these files.
        expected: the published number, or None where none is known.
    """

    what: str
    found: int
    expected: int | None = None

    @property
    def differs(self) -> bool:
        """Whether a published number is known and another one was found."""
        return self.expected is not None and self.expected != self.found

    def __str__(self) -> str:
        if self.expected is None:
            return f"{self.what}: {self.found:,}"
        if self.differs:
            return f"{self.what}: {self.found:,} (published: {self.expected:,}; {self.found - self.expected:+,})"
        return f"{self.what}: {self.found:,} (as published)"


@dataclass(frozen=True)
class Report:
    """What a reader found; identity: listed = rows + without video + dropped.

    Args:
        dataset: name of the data set.
        layout: which layouts were taken, in words, for example ``official CSV; CVDF folders``.
        listed: samples that the annotation files list.
        rows: samples whose video is present.
        without_video: samples whose video is missing (several may share one video).
        dropped: reason -> samples left out for it (excluded time stamps, unused by the split, ...).
        counts: numbers beside the published ones.
        missing: names of the missing videos, each once, as the annotation files give them.
        oddities: kind -> number of times.
        examples: kind -> the first places, as ``file:line: what``; at most 20 a kind.
    """

    dataset: str
    layout: str = ""
    listed: int = 0
    rows: int = 0
    without_video: int = 0
    dropped: Mapping[str, int] = field(default_factory=dict)
    counts: tuple[Count, ...] = ()
    missing: tuple[str, ...] = ()
    oddities: Mapping[str, int] = field(default_factory=dict)
    examples: Mapping[str, tuple[str, ...]] = field(default_factory=dict)

    @property
    def differences(self) -> tuple[Count, ...]:
        """The counts that are not the published ones."""
        return tuple(count for count in self.counts if count.differs)

    def to_json(self) -> dict[str, object]:
        """Return the report as plain lists, dicts, strings and integers, ready for ``json.dump``."""
        return {
            "dataset": self.dataset,
            "layout": self.layout,
            "listed": self.listed,
            "rows": self.rows,
            "without_video": self.without_video,
            "dropped": dict(self.dropped),
            "counts": [{"what": c.what, "found": c.found, "expected": c.expected} for c in self.counts],
            "missing": list(self.missing),
            "oddities": dict(self.oddities),
            "examples": {kind: list(places) for kind, places in self.examples.items()},
        }

    def lines(self) -> list[str]:
        """Return the report as text, one line a fact, the missing videos shortened to ten."""
        text = [f"{self.dataset}: {self.layout}", f"listed {self.listed:,}, usable {self.rows:,}"]
        if self.without_video:
            text.append(f"without video {self.without_video:,} ({len(self.missing):,} files missing)")
            text += [f"  missing: {name}" for name in self.missing[:10]]
            if len(self.missing) > 10:
                text.append(f"  ... and {len(self.missing) - 10:,} more")
        text += [f"dropped {number:,}: {reason}" for reason, number in self.dropped.items()]
        text += [str(count) for count in self.counts]
        for kind, number in self.oddities.items():
            text.append(f"oddity, {number:,} times: {kind}")
            text += [f"  {place}" for place in self.examples.get(kind, ())[: 10 if kind == UNUSED_FILE else 3]]
        return text


class ReportBuilder:
    """Collects a report while a reader runs."""

    def __init__(self, dataset: str) -> None:
        """Start an empty report for a data set of this name."""
        self.dataset = dataset
        self.listed = 0
        self._layout: list[str] = []
        self._counts: list[Count] = []
        self._dropped: dict[str, int] = {}
        self._missing: dict[str, int] = {}
        self._oddities: dict[str, int] = {}
        self._examples: dict[str, list[str]] = {}

    def layout(self, words: str) -> None:
        """Say which layout was taken; the same words count once."""
        if words not in self._layout:
            self._layout.append(words)

    def count(self, what: str, found: int, expected: int | None = None) -> None:
        """Put a number beside the published one."""
        self._counts.append(Count(what, found, expected))

    def drop(self, reason: str, samples: int = 1) -> None:
        """Count samples left out for a reason."""
        self._dropped[reason] = self._dropped.get(reason, 0) + samples

    def missing(self, video: str) -> None:
        """Count one sample without its video."""
        self._missing[video] = self._missing.get(video, 0) + 1

    def oddity(self, kind: str, place: str) -> None:
        """Note something unusual that was handled; ``place`` is ``file:line: what``."""
        self._oddities[kind] = self._oddities.get(kind, 0) + 1
        examples = self._examples.setdefault(kind, [])
        if len(examples) < EXAMPLES_PER_KIND:
            examples.append(place)

    def build(self, rows: int) -> Report:
        """Return the finished report.

        Args:
            rows: samples that the reader returns.
        """
        without = sum(self._missing.values())
        dropped = sum(self._dropped.values())
        assert self.listed == rows + without + dropped, (self.listed, rows, without, dropped)
        return Report(
            dataset=self.dataset,
            layout="; ".join(self._layout),
            listed=self.listed,
            rows=rows,
            without_video=without,
            dropped=dict(self._dropped),
            counts=tuple(self._counts),
            missing=tuple(self._missing),
            oddities=dict(self._oddities),
            examples={kind: tuple(places) for kind, places in self._examples.items()},
        )


def note_partial_classes(report: ReportBuilder, names: Sequence[str], published: int, remedy: str) -> None:
    """Note that labels count only the classes that are there, so that they are not those of the whole data set.

    Args:
        report: where to note it.
        names: the classes found, none where nothing has a label.
        published: how many there should be.
        remedy: what gives the labels of the whole data set.
    """
    if 0 < len(names) < published:
        kind = f"labels are those of {len(names)} classes, not of the {published} published ones; {remedy}"
        report.oddity(kind, f"label 0 is {names[0]!r}")
