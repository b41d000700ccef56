"""Who holds up the others: heartbeats of all ranks, so that a rank that stopped, hangs or ended is named, by all.

Each rank's thread tells a store once a second that it lives, and where its main thread is: step, work, clips. Rank 0
looks at all of them, the others at rank 0 and at its verdict. Nothing here waits for a device.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import select
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch.distributed as dist

from experiments.engine.loss_window import TrainingFailure
from experiments.runtime import Runtime

_ECHOES = ("closed by peer", "reset by peer", "refused", "broken pipe", "gloo", "nccl", "timed out", "socket", "store")
_FIRST_STEP_FACTOR = 5.0  # longest first step of a process (compilation, choice of algorithms), in timeouts
_GRACE_S = 5.0  # for the main thread to end in order once the verdict is there
log = logging.getLogger(__name__)


@dataclass
class _Seen:
    """What is known of a rank, and when it changed last."""

    beats: int = -1
    moves: int = -1
    place: str = "at the start"
    step: int = -1
    working: bool = False  # at something that does not wait for others
    first: bool = True
    done: bool = False
    beat_at: float = 0.0
    moved_at: float = 0.0


class Watch:
    """Watches over the ranks of a training; alone it only remembers where the training is.

    Args:
        runtime: of this process.
        timeout_s: longest silence of a rank, and longest time in which no rank gets on.
        at_end: called before this process is ended from outside its main thread, which hangs.
    """

    def __init__(self, runtime: Runtime, timeout_s: float, at_end: Callable[[], None]) -> None:
        self._runtime, self._timeout_s, self._at_end = runtime, timeout_s, at_end
        self.step, self.ids, self._work, self._moves, self._first = -1, [""][:0], "at the start", 0, True
        self.verdict = ""
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, name="watch", daemon=True)
        self._seen = [_Seen() for _ in range(runtime.world_size)]
        self._pids: dict[int, tuple[int, int]] = {}  # of the other ranks on this machine: pid, descriptor
        self._store: Any = None
        self._heard = 0.0  # when the store answered last

    def at(self, step: int, work: str, ids: Sequence[str] | None = None) -> None:
        """Remember where the main thread is.

        Args:
            step: steps done.
            work: in words, such as "waits for data".
            ids: clips at hand; None = those of before.
        """
        self._first = self._first and self.step in (-1, step)
        self.step, self._work = step, work
        if ids is not None:
            self.ids = list(ids)
        self._moves += 1

    def start(self) -> None:
        """Join the other ranks and begin to watch; all ranks call it."""
        runtime = self._runtime
        if runtime.world_size == 1:
            return
        own = (socket.gethostname(), os.readlink("/proc/self/ns/pid") if sys.platform == "linux" else "", os.getpid())
        everybody: list[Any] = [None] * runtime.world_size
        dist.all_gather_object(everybody, own, group=runtime.control)
        for rank, (host, space, pid) in enumerate(everybody):
            if rank != runtime.rank and (host, space) == own[:2] and hasattr(os, "pidfd_open"):
                with contextlib.suppress(OSError):
                    self._pids[rank] = (pid, os.pidfd_open(pid))
        self._store = _connect(self._timeout_s)
        if runtime.is_main:
            self._store.set("verdict", "")
            self._store.set("failure", "-")
        self._tell()
        dist.barrier(group=runtime.control)
        self._thread.start()

    def close(self) -> None:
        """End watching; the others do not wait for this rank any more."""
        self._ended.set()
        if self._thread.is_alive():
            self._thread.join(1.0)
            if not self.verdict:
                with contextlib.suppress(Exception):  # rank 0 is gone already
                    self._tell(done=True)

    # Failures of the main thread ----------------------------------------------------------------------------------

    def explain(self, failure: BaseException) -> BaseException:
        """Return the failure that ends this rank: its own, which it tells the others, or theirs where it is an echo.

        Args:
            failure: what the main thread met.
        """
        if not isinstance(failure, Exception) or self._store is None:
            return failure
        if not self.verdict and not _is_echo(failure):
            with contextlib.suppress(Exception):  # the others learn it from the broken connection then
                self._store.compare_set(
                    "failure", "-", describe_failure(self._runtime.rank, self.step, self.ids, failure)
                )
            return failure
        deadline = time.monotonic() + min(3.0, self._timeout_s)
        while not self.verdict and time.monotonic() < deadline:
            cause = self._failure_of_others() or self._ended_peer()
            if cause:
                return TrainingFailure(cause)
            time.sleep(0.1)
        first_line = (str(failure).splitlines() or [type(failure).__name__])[0][:160]
        return TrainingFailure(
            self.verdict or f"the connection to another rank broke at step {self.step} ({first_line})"
        )

    def _failure_of_others(self) -> str:
        if time.monotonic() - self._heard > 2.0 and not self._runtime.is_main:
            return ""  # the store may not answer at all
        try:
            text = self._store.get("failure").decode()
        except Exception:  # rank 0, which keeps the store, is gone
            return ""
        return "" if text == "-" else text

    def _ended_peer(self) -> str:
        for rank, (pid, descriptor) in self._pids.items():
            poll = select.poll()  # takes any descriptor; select only those below 1024
            poll.register(descriptor, select.POLLIN)
            if poll.poll(0):
                place = self._last_place(rank)
                return f"rank {rank} (process {pid}) ended without a word{place}: killed, or out of memory?"
        return ""

    def _last_place(self, rank: int) -> str:
        return f"; {self._seen[rank].place}" if self._seen[rank].beats >= 0 else ""

    # The thread ---------------------------------------------------------------------------------------------------

    def _run(self) -> None:
        """Wait for a verdict; talk to the store in another thread, which a stopped rank 0 may hold up for ever."""
        interval_s = min(1.0, self._timeout_s / 8)
        self._heard = time.monotonic()
        threading.Thread(target=self._talk, args=(interval_s,), name="watch-talk", daemon=True).start()
        while not self._ended.wait(interval_s):
            if not self.verdict and time.monotonic() - self._heard > self._timeout_s:
                self._silent(0)
            if self.verdict:
                self._end()
                return

    def _talk(self, interval_s: float) -> None:
        with contextlib.suppress(Exception):  # rank 0, which keeps the store, is gone: `_run` hears nothing any more
            while not self._ended.wait(interval_s) and not self.verdict:
                self._tell()
                self._look()
                self._heard = time.monotonic()

    def _tell(self, *, done: bool = False) -> None:
        seen = [self._moves, self.step, self._work, self.ids[:8], self._first, done]
        self._seen[self._runtime.rank].beats += 1
        self._store.set(f"beat/{self._runtime.rank}", json.dumps([self._seen[self._runtime.rank].beats, *seen]))

    def _look(self) -> None:
        """Take in what the others tell; rank 0 judges, the others hear the verdict."""
        ranks = range(self._runtime.world_size) if self._runtime.is_main else [0]
        *beats, verdict = self._store.multi_get([*(f"beat/{rank}" for rank in ranks), "verdict"])
        now = time.monotonic()
        for rank, beat in zip(ranks, beats, strict=True):
            self._take_in(self._seen[rank], json.loads(beat), now)
        if verdict:
            rank, text, silent = json.loads(verdict)
            self._decide(rank, text, silent)
        elif self._runtime.is_main:
            self._judge(now)
        elif now - self._seen[0].beat_at > self._timeout_s:
            self._silent(0)

    def _take_in(self, seen: _Seen, beat: list[Any], now: float) -> None:
        beats, moves, step, work, ids, first, seen.done = beat
        if beats != seen.beats or not seen.beat_at:
            seen.beats, seen.beat_at = beats, now
        if moves != seen.moves or not seen.moved_at:
            seen.moves, seen.moved_at = moves, now
        clips = f" with the clips {', '.join(ids)}" if ids else ""
        seen.place, seen.step, seen.first = f"its last place: step {step}, {work}{clips}", step, first
        seen.working = not work.startswith("in its step")

    def _judge(self, now: float) -> None:
        """On rank 0: name a rank that is silent, or the one that the others wait for."""
        for rank, seen in enumerate(self._seen):
            if rank and not seen.done and now - seen.beat_at > self._timeout_s:
                self._silent(rank)
                return
        factor = _FIRST_STEP_FACTOR if any(seen.first for seen in self._seen) else 1.0
        if any(seen.done or now - seen.moved_at < factor * self._timeout_s for seen in self._seen):
            return
        behind = min(seen.step for seen in self._seen)
        suspects = [r for r, seen in enumerate(self._seen) if seen.step == behind]
        suspects = [r for r in suspects if self._seen[r].working] or suspects
        if len(suspects) == self._runtime.world_size:
            text = f"no rank got on for {factor * self._timeout_s:g} s, all at step {behind}{self._last_place(0)}"
        else:
            named = "; ".join(f"rank {r}{self._last_place(r).replace(';', ',')}" for r in suspects[:4])
            text = f"the others wait {factor * self._timeout_s:g} s for {named}"
        self._decide(suspects[0], f"{text} (runtime.collective_timeout_s)", False)

    def _silent(self, rank: int) -> None:
        text = f"rank {rank} gave no sign of life for {self._timeout_s:g} s (runtime.collective_timeout_s)"
        self._decide(rank, f"{text}{self._last_place(rank)}; stopped, swapped out, or held by a debugger?", True)

    def _decide(self, rank: int, text: str, silent: bool) -> None:
        """Tell the verdict to the others, and end a silent rank on this machine, for which the launcher would wait."""
        self.verdict = text
        log.error("%s", text)
        if self._runtime.is_main:
            with contextlib.suppress(Exception):
                self._store.set("verdict", json.dumps([rank, text, silent]))
        if silent and rank in self._pids:
            with contextlib.suppress(OSError):
                signal.pidfd_send_signal(self._pids[rank][1], signal.SIGKILL)

    def _end(self) -> None:
        """End this process if its main thread cannot."""
        if self._ended.wait(_GRACE_S):
            return
        prefix = f"[rank {self._runtime.rank}] " if self._runtime.rank else ""
        os.write(2, f"{prefix}error: {self.verdict}\n".encode())
        last = threading.Thread(target=self._at_end, daemon=True)
        last.start()
        last.join(_GRACE_S)
        os._exit(1)


def describe_failure(rank: int, step: int, ids: Sequence[str], failure: BaseException) -> str:
    """Return one line about a failure: rank, step, clips, and what it was."""
    first_line = (str(failure).splitlines() or [""])[0][:300]
    clips = f" with the clips {', '.join(ids[:16])}" if ids else ""
    return f"rank {rank} failed at step {step}{clips}: {type(failure).__name__}: {first_line}"


def _is_echo(failure: Exception) -> bool:
    """Whether a failure is what a rank meets when another one has ended."""
    if isinstance(failure, (dist.DistBackendError, dist.DistNetworkError, dist.DistStoreError)):
        return True
    return type(failure) is RuntimeError and any(word in str(failure).lower() for word in _ECHOES)


def _connect(timeout_s: float) -> Any:
    """Return a connection of its own to the store of the ranks: one thread uses it, whatever the others do."""
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    store = dist.TCPStore(address, port, is_master=False, wait_for_workers=False, timeout=timedelta(seconds=timeout_s))
    return dist.PrefixStore(f"watch/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)
