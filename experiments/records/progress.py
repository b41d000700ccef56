"""What a waiting person sees: one live line on a terminal, plain lines elsewhere."""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Mapping

log = logging.getLogger(__name__)


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
        self._status = None
        if visible and sys.stderr.isatty():
            from rich.console import Console

            self._status = Console(stderr=True).status("starting", spinner="dots")
            self._status.start()

    def line(self, step: int, values: Mapping[str, float], clips_per_second: float, data_wait_share: float) -> str:
        """Return the text for a state of the run.

        Args:
            step: steps done.
            values: name -> value, such as the loss.
            clips_per_second: rate over all ranks; 0 as long as none is known, rate and time left are then left out.
            data_wait_share: share of the time spent waiting for data, 0..1.
        """
        began, first = self._begin
        left_s = (time.monotonic() - began) / max(1, step - first) * (self._total - step)
        parts = [f"step {step}/{self._total}"]
        parts += [f"{k} {v:.4g}" for k, v in values.items()]
        if clips_per_second > 0:
            parts += [
                f"{clips_per_second:.1f} clips/s",
                f"data wait {100 * data_wait_share:.0f} %",
                f"left {format_duration(left_s)}",
            ]
        return "  ".join(parts)

    def show(self, step: int, values: Mapping[str, float], clips_per_second: float, data_wait_share: float) -> None:
        """Show the state after `step` steps; arguments as for `line`."""
        if not self._visible:
            return
        text = self.line(step, values, clips_per_second, data_wait_share)
        log.info("%s", text, extra={"live": self._status is not None})
        if self._status is not None:
            self._status.update(text)

    def close(self) -> None:
        """Leave the terminal as it was."""
        if self._status is not None:
            self._status.stop()
