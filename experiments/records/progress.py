"""What a waiting person sees: a line at each log step, and on a terminal a live line that says what goes on."""

from __future__ import annotations

import logging
import shutil
import sys
import time
from collections.abc import Mapping, Sequence

log = logging.getLogger(__name__)

_SHARES = ("top1", "sync_accuracy", "rotation_accuracy")
LOG_INTERVAL_S = 60.0  # between lines of the log about work that takes long
_CLOCK = len("12:34:56 ")  # before a line on a terminal


def format_duration(seconds: float) -> str:
    """Return a duration as 12s, 3m05s or 2h07m.

    Args:
        seconds: a negative one counts as 0.
    """
    whole = max(0, round(seconds))
    if whole < 60:
        return f"{whole}s"
    if whole < 3600:
        return f"{whole // 60}m{whole % 60:02d}s"
    return f"{whole // 3600}h{whole % 3600 // 60:02d}m"


def fit(parts: Sequence[tuple[int, str]], width: int) -> str:
    """Join texts with two blanks; those of the highest number are left out until the line fits.

    Args:
        parts: (rank, text) in order; rank 0 stays.
        width: columns.
    """
    kept = list(parts)
    while len("  ".join(text for _, text in kept)) > width:
        worst = max(kept, key=lambda part: part[0])
        if worst[0] == 0:
            break
        kept.remove(worst)
    return "  ".join(text for _, text in kept)


class LiveLine:
    """A line that is replaced by the next, on a terminal; elsewhere nothing.

    Args:
        text: to begin with.
        visible: rank 0 only.
    """

    def __init__(self, text: str, *, visible: bool = True) -> None:
        self._status = None
        if visible and sys.stderr.isatty():
            from rich.console import Console

            self._status = Console(stderr=True).status(text, spinner="dots")
            self._status.start()

    @property
    def is_live(self) -> bool:
        """Whether somebody sees it."""
        return self._status is not None

    def say(self, text: str) -> None:
        """Show a text instead of the one before."""
        if self._status is not None:
            self._status.update(text)

    def close(self) -> None:
        """Leave the terminal as it was."""
        if self._status is not None:
            self._status.stop()


class BatchProgress:
    """How far work on batches is: on a live line, else as a line of the log a minute.

    Args:
        what: is done, such as "evaluating".
        line: of this process.
        visible: rank 0 only.
    """

    def __init__(self, what: str, line: LiveLine, *, visible: bool = True) -> None:
        self._what, self._line, self._visible = what, line, visible
        self._began_s, self._next_s = 0.0, LOG_INTERVAL_S

    def __call__(self, done: int, total: int) -> None:
        """Say it after a batch; the first one, with the start in it, gives no rate.

        Args:
            done: batches, at least 1. total: batches in all.
        """
        now_s = time.monotonic()
        if done == 1:
            self._began_s = now_s
        elif self._visible:
            seconds = now_s - self._began_s
            left = format_duration(seconds / (done - 1) * (total - done))
            text = f"{self._what}: {done} of {total} batches, left {left}"
            self._line.say(text)
            if not self._line.is_live and seconds >= self._next_s:
                self._next_s = seconds + LOG_INTERVAL_S
                log.info("%s", text)


class Progress:
    """Shows step, loss, learning rate, clips/s, data wait and the time left.

    Args:
        total_steps: of the training.
        start_step: where this process began.
        visible: rank 0 only.
    """

    def __init__(self, total_steps: int, start_step: int, *, visible: bool) -> None:
        self._total, self._visible = total_steps, visible
        self._begin = (time.monotonic(), start_step)
        self.live = LiveLine("starting", visible=visible)

    def line(
        self,
        step: int,
        values: Mapping[str, float],
        clips_per_second: float,
        data_wait_share: float,
        width: int = 1000,
    ) -> str:
        """Return the text for a state of the run.

        Args:
            step: steps done.
            values: name -> value, such as the loss; accuracies are shown as percent.
            clips_per_second: rate over all ranks; 0 as long as none is known, rate and time left are then left out.
            data_wait_share: share of the time spent waiting for data, 0..1.
            width: columns; what matters least is left out.
        """
        began, first = self._begin
        left_s = (time.monotonic() - began) / max(1, step - first) * (self._total - step)
        parts = [(0, f"step {step}/{self._total}")]
        for name, value in values.items():
            text = f"{name} {100 * value:.1f} %" if name in _SHARES else f"{name} {value:.4g}"
            parts.append(({"loss": 0, "top1": 1, "lr": 3}.get(name, 4), text))
        if clips_per_second > 0:
            parts += [
                (0, f"{clips_per_second:.1f} clips/s"),
                (2, f"data wait {100 * data_wait_share:.0f} %"),
                (0, f"left {format_duration(left_s)}"),
            ]
        return fit(parts, width)

    def show(self, step: int, values: Mapping[str, float], clips_per_second: float, data_wait_share: float) -> None:
        """Show the state after `step` steps; arguments as for `line`."""
        if not self._visible:
            return
        width = shutil.get_terminal_size().columns - _CLOCK
        state = (step, values, clips_per_second, data_wait_share)
        log.info("%s", self.line(*state), extra={"short": self.line(*state, width=width)})
        self.say("training")

    def say(self, what: str) -> None:
        """Say below the lines, on a terminal, what goes on now.

        Args:
            what: in a word or two.
        """
        self.live.say(what)

    def close(self) -> None:
        """Leave the terminal as it was."""
        self.live.close()
