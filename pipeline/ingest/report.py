"""What ingest made of every input: one class each, the counts, and the samples that went into the store."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pipeline.annotations.report import Report
from pipeline.ingest.item import Item
from pipeline.store.durable import new_file

CLASSES = ("fine", "repaired", "short", "silent", "refused")
EXAMPLES = 5


def class_of(item: Item) -> str:
    """The one class of an input: refused before repaired before short before silent before fine."""
    if item.refused:
        return "refused"
    if item.repairs:
        return "repaired"
    if item.short:
        return "short"
    return "silent" if item.silent else "fine"


def reason_of(item: Item) -> str:
    """Why an input is in its class, in words."""
    return {
        "refused": item.refused,
        "repaired": "; ".join(item.repairs),
        "short": f"{item.num_frames * item.fps_den / max(item.fps_num, 1):.2f} s",
        "silent": item.silent,
        "fine": "",
    }[class_of(item)]


@dataclass
class IngestReport:
    """Accounting: the classes sum to the inputs; listed samples = stored + dropped (+ those without a video).

    Args:
        dataset: name. inputs: video -> item, in manifest order. samples: split -> rows in the store.
        dropped: reason -> samples left out. shortened: samples whose end lay behind the video's end.
        labels_outside: timed labels of which nothing lies in the video; an evaluation counts them, training cannot.
        media: rows of the index. annotations: the reader's report.
    """

    dataset: str
    inputs: dict[str, Item] = field(default_factory=dict)
    samples: Counter[str] = field(default_factory=Counter)
    dropped: Counter[str] = field(default_factory=Counter)
    shortened: int = 0
    labels_outside: int = 0
    media: int = 0
    annotations: Report | None = None

    @property
    def counts(self) -> dict[str, int]:
        """Inputs of each class."""
        found = Counter(class_of(item) for item in self.inputs.values())
        return {name: found[name] for name in CLASSES}

    def head(self) -> dict[str, Any]:
        """Counts as plain values; the same inputs give the same values (no times of day, no speeds)."""
        items = self.inputs.values()
        return {
            "dataset": self.dataset,
            "inputs": len(self.inputs),
            "classes": self.counts,
            "silent_in_all": sum(bool(item.silent) for item in items),
            "refused_for_resources": sum(item.for_resources for item in items),
            "short_in_all": sum(item.short for item in items),
            "with_warnings": sum(bool(item.warnings) for item in items),
            "copied_without_encoding": sum(item.copied for item in items),
            "read_in_part": sum(item.left_out_s > 0 for item in items),
            "left_out_s": round(sum(item.left_out_s for item in items), 2),
            "frames_decoded": sum(item.decoded_frames for item in items),
            "media": self.media,
            "samples": dict(self.samples),
            "samples_dropped": dict(self.dropped),
            "samples_shortened": self.shortened,
            "timed_labels_outside_their_video": self.labels_outside,
            "annotations": None if self.annotations is None else self.annotations.to_json(),
        }

    def write(self, path: Path) -> None:
        """Write the JSON, one line a file in "files", whole or not at all."""
        with new_file(path) as file:
            file.write((json.dumps(self.head(), indent=1, ensure_ascii=False)[:-2] + ',\n "files": [').encode())
            for number, (video, item) in enumerate(self.inputs.items()):
                comma = "," if number else ""
                file.write(f"{comma}\n  {json.dumps(_entry(video, item), ensure_ascii=False)}".encode())
            file.write(b"\n ]\n}\n")

    def lines(self) -> list[str]:
        """The report as text: a line a class with the most frequent reasons and examples."""
        text = [f"{len(self.inputs):,} inputs, {self.media:,} media in the store"]
        for name, count in self.counts.items():
            text.append(f"  {name:<9}{count:>8,}")
            if count and name != "fine":
                text += self._examples(name)
        again = sum(item.for_resources for item in self.inputs.values())
        if again:
            text.append(
                f"refused for lack of time or memory, or after a crash: {again:,}; raise --deadline-seconds or "
                "--memory-gib (an interrupted run tries these again, a finished store needs --overwrite)"
            )
        text += self._warnings()
        parts = [item.left_out_s for item in self.inputs.values() if item.left_out_s]
        if parts:
            text.append(f"read only where annotated: {len(parts):,} inputs, {sum(parts) / 3600:,.2f} h left out")
        for split, rows in self.samples.items():
            text.append(f"samples of {split}: {rows:,}")
        text += [f"samples left out: {count:,} ({reason})" for reason, count in self.dropped.items()]
        if self.shortened:
            text.append(f"samples whose end was moved to the video's end: {self.shortened:,}")
        if self.labels_outside:
            text.append(f"timed labels outside their video, for evaluations only: {self.labels_outside:,}")
        return text

    def _examples(self, name: str) -> list[str]:
        reasons = ((video, reason_of(item)) for video, item in self.inputs.items() if class_of(item) == name)
        return _grouped(reasons, "shorter than a clip" if name == "short" else "")

    def _warnings(self) -> list[str]:
        found = [(video, words) for video, item in self.inputs.items() for words in item.warnings]
        if not found:
            return []
        return [f"warnings about {len({video for video, _ in found}):,} inputs", *_grouped(found)]


def _grouped(reasons: Iterable[tuple[str, str]], name: str = "") -> list[str]:
    """Lines for reasons of videos, by their first words (or one name for all), the most frequent first."""
    groups: dict[str, list[str]] = {}
    for video, reason in reasons:
        groups.setdefault(name or reason.split(":")[0], []).append(f"{video}: {reason}")
    text = []
    for kind, files in sorted(groups.items(), key=lambda entry: -len(entry[1])):
        text.append(f"    {len(files):,} {kind}")
        text += [f"      {file}" for file in files[:EXAMPLES]]
    return text


def _entry(video: str, item: Item) -> dict[str, Any]:
    return {
        "video": video,
        "class": class_of(item),
        "reason": reason_of(item),
        "for_resources": item.for_resources,
        "repairs": list(item.repairs),
        "notes": list(item.notes),
        "warnings": list(item.warnings),
        "silent": item.silent,
        "short": item.short,
        "frames": item.num_frames,
        "fps": [item.fps_num, item.fps_den],
        "size_px": [item.width, item.height],
        "display_px": [item.display_width, item.display_height],
        "samples": item.num_samples,
        "bytes": item.bytes,
    }
