"""Results to read: lines for a terminal, and a CSV file."""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Mapping
from pathlib import Path

from experiments.tasks import Report
from pipeline.store.durable import write_file

_ALWAYS = ("manifest", "scored")
_COUNT_WORDS = {
    "quarantined": "unreadable",
    "partly_read": "read in part",
    "silent": "without sound",
    "unlabelled": "without a label",
}


def counts_line(counts: Mapping[str, int]) -> str:
    """Return the counts of an evaluation in words; what is 0 is left out, but for what was scored.

    Args:
        counts: by the names that report.json has.
    """
    scored = f"{counts['scored']} of " if "scored" in counts else ""
    shown = [f"{scored}{counts.get('manifest', 0)} samples{' scored' if scored else ''}"]
    words = {name: _COUNT_WORDS.get(name, name.replace("_", " ")) for name in counts}
    shown += [f"{n} {words[name]}" for name, n in counts.items() if n and name not in _ALWAYS]
    return ", ".join(shown)


def result_lines(report: Report, rows: int = 10) -> list[str]:
    """Return the lines that the command line prints: metrics, counts, notes and the weakest classes.

    Args:
        report: of an evaluation.
        rows: classes to show.
    """
    lines = ["  ".join(f"{name} {100 * value:.2f} %" for name, value in report.metrics.items())]
    lines.append(counts_line(report.counts))
    lines += [f"note: {note}" for note in report.notes]
    if report.table:
        value = len(report.header) - 1 if report.primary == "mean_ap" else 2
        ordered = sorted(report.table, key=lambda row: (row[value] == "nan", row[value]))
        shown = [report.header, *((row[0], *map(_percent, row[1:])) for row in ordered[:rows])]
        widths = [max(len(row[i]) for row in shown) for i in range(len(report.header))]
        lines += [
            "  ".join(text.ljust(width) for text, width in zip(row, widths, strict=True)).rstrip() for row in shown
        ]
        if len(ordered) > rows:
            lines.append(f"... and {len(ordered) - rows} more classes, weakest first; all are in per_class.csv")
    return lines


def _percent(cell: str) -> str:
    """Return a share (0.5000) as the metrics above the table are printed (50.00 %), and any other cell as it is."""
    return f"{100 * float(cell):.2f} %" if re.fullmatch(r"[01]\.\d{4}", cell) else cell


def write_table(report: Report, path: Path) -> None:
    """Write the per-class table as CSV.

    Args:
        report: of an evaluation.
        path: file, replaced if there.
    """
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerows([report.header, *report.table])
    write_file(path, buffer.getvalue())
