"""What a model hears: its score with the sound as it is, muted, taken from other videos, and shifted in time."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
import torch.distributed as dist

from experiments.config import Config
from experiments.runtime import Runtime
from experiments.tasks import Report
from pipeline.batch import Batch
from pipeline.plan import Pretext

SHIFTS_S = (0.5, 1.0, 2.0)
AS_IT_IS = "as it is"


class NoSoundError(ValueError):
    """A model that hears nothing."""


@dataclass
class Heard:
    """What clips that have sound are heard with; those without stay without. A draw depends on the position alone.

    Args:
        name: for tables.
        pretext: what the loader is asked for besides.
        lost: views whose other sound does not exist (one video only, too short for the shift): they are heard muted.
    """

    name: str
    pretext: Pretext = field(default_factory=Pretext)
    lost: int = 0

    def change(self, batch: Batch) -> Batch:
        """Return a batch as it is heard."""
        assert batch.log_mel is not None, "require_audio looks at the model"
        other = batch.negative_log_mel
        if other is None:  # muted
            return dataclasses.replace(
                batch, log_mel=torch.zeros_like(batch.log_mel), has_audio=torch.zeros_like(batch.has_audio)
            )
        heard = batch.has_audio & batch.has_negative
        self.lost += int((batch.has_audio & ~batch.has_negative).sum())
        log_mel = torch.where(heard[:, None, None, None], other, torch.zeros_like(other))
        return dataclasses.replace(batch, log_mel=log_mel, has_audio=heard, negative_log_mel=None)

    def gather(self, runtime: Runtime) -> None:
        """Add up `lost` over the ranks, each of which has its share of the views; all of them call it."""
        if runtime.world_size > 1:
            lost = torch.tensor(self.lost)
            dist.all_reduce(lost, group=runtime.control)
            self.lost = int(lost)


def conditions() -> list[Heard]:
    """Return all conditions but the sound as it is."""
    shifted = [Heard(f"shifted by {s:g} s", Pretext(negatives="shifted", shift_s=s)) for s in SHIFTS_S]
    return [Heard("muted"), Heard("of another video", Pretext(negatives="easy")), *shifted]


def require_audio(config: Config) -> None:
    """Raise NoSoundError unless a run's model hears something and scores classes."""
    if not config.model.has_audio or config.train.task == "self_supervision":
        found = f"train.task={config.train.task}, model.pathways={','.join(config.model.pathways)}"
        raise NoSoundError(f"--robustness must be given for a model of classes with an audio pathway, not {found}")


@dataclass(frozen=True)
class Row:
    """The result of one condition: its name, the report's metrics and counts, and views that lost their sound."""

    sound: str
    metrics: dict[str, float]
    samples: dict[str, int]
    lost: int = 0


def robustness_rows(as_it_is: Report, score: Callable[[Heard], Report]) -> list[Row]:
    """Score every condition.

    Args:
        as_it_is: the report with the sound as it is.
        score: scores the split as it is heard.
    """
    rows = [Row(AS_IT_IS, dict(as_it_is.metrics), dict(as_it_is.counts))]
    for heard in conditions():
        report = score(heard)
        rows.append(Row(heard.name, dict(report.metrics), dict(report.counts), heard.lost))
    return rows


def table_lines(rows: Sequence[Row], primary: str) -> list[str]:
    """Return the rows as lines for a terminal.

    Args:
        rows: the first one with the sound as it is.
        primary: the metric whose change is told.
    """
    names = list(rows[0].metrics)
    lines = [["sound", *names, f"change of {primary}", ""]]
    for row in rows:
        change = 100 * (row.metrics[primary] - rows[0].metrics[primary])
        note = f"{row.lost} views are muted: there is no such sound" if row.lost else ""
        shown = [f"{100 * row.metrics[name]:.2f} %" for name in names]
        lines.append([row.sound, *shown, f"{change:+.2f}" if row is not rows[0] else "", note])
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    return ["  ".join(text.ljust(width) for text, width in zip(line, widths, strict=True)).rstrip() for line in lines]
