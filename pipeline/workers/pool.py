"""The worker processes as a `ClipSource`: jobs go out through the ring, dead and late workers are replaced.

A worker that dies or is late with a clip in hand costs nothing the first time: the clip is read again, so that a killed
process changes no batch. The second time the clip is unreadable, with the reason. But a worker that is late because a
read does not return says nothing about its clip: the second time in a row that ends the run (`ReadStalled`), so that
storage decides over no batch.
"""

import contextlib
import logging
import os
import pickle
import select
import signal
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np

from pipeline.dataset import Dataset
from pipeline.media.reading import START_DESCRIPTORS, ReadStalled, check_descriptors, few_descriptors, lacks_descriptors
from pipeline.source import STOPPED_S, HostClip, Planner, TakenBatch, Unreadable, Wanted
from pipeline.workers.child import Setup
from pipeline.workers.machine import beyond_standard, child_environment, hold_signals, waits_in_kernel
from pipeline.workers.ring import DONE, FREE, TAKEN, WANTED, Ring
from pipeline.workers.slots import SlotSpec

CHILD_MODULE = f"{__package__}.child"
START_DEADLINE_S = 120.0
MOST_TRIES = 2
KILL_WAIT_S = 5.0  # for a killed process to end; one that waits in the kernel for its storage does not
MOST_FAILED_STARTS = 3
DESCRIPTORS_A_WORKER = 2  # its input and its output
OWN_DESCRIPTORS = 5 + START_DESCRIPTORS  # ring and its map, set-up, jobs, done

log = logging.getLogger(__name__)


class WorkerError(RuntimeError):
    """Worker processes that cannot start or do not answer; the message is for the user."""

    is_for_user = True  # a command says it in one line


@dataclass(frozen=True)
class PoolOptions:
    """How a pool works.

    Args:
        num_workers: Processes, at least 1.
        num_batches: Batches in memory at once.
        clips_per_batch: Most clips of a batch.
        deadline_s: Longest that one clip may take.
    """

    num_workers: int
    num_batches: int
    clips_per_batch: int
    deadline_s: float


class _Worker:
    """One process; its output pipe ends when it does."""

    def __init__(self, number: int, descriptors: tuple[int, ...]) -> None:
        arguments = [str(value) for value in (number, os.getpid(), *descriptors)]
        self.number, self.began_s = number, time.monotonic()
        self.late_s, self.read = 0.0, ""  # when it was killed for being late; the read that it waited for then
        self.process = subprocess.Popen(
            [sys.executable, "-P", "-m", CHILD_MODULE, *arguments],
            env=child_environment(),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            pass_fds=descriptors,
        )
        assert self.process.stdout is not None
        self.output = self.process.stdout.fileno()

    def end(self) -> tuple[str, bytes]:
        """Wait for a process that has ended; returns how, and what it said."""
        assert self.process.stdout is not None
        said = self.process.stdout.read()
        self.kill()
        code = self.process.returncode
        return f"signal {signal.Signals(-code).name}" if code < 0 else f"exit code {code}", said

    def kill(self) -> None:
        """End the process and close its pipes."""
        self.process.kill()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(KILL_WAIT_S)
        for pipe in (self.process.stdin, self.process.stdout):
            with contextlib.suppress(OSError):
                assert pipe is not None
                pipe.close()


class WorkerSource:
    """Reads clips in worker processes that write into shared memory.

    Slots belong to places of batches: in which order the workers end changes nothing.

    Args:
        dataset: Where the bytes are; opened again by each worker.
        planner: What the clips are.
        wanted: What is read of each.
        spec: Sizes of a slot.
        options: Processes, batches, deadline.

    Attributes:
        ring: The shared memory.

    Raises:
        RingMemoryError: there is no memory for the slots.
        OSError: this process may not open enough files; with the limit and the remedy.
    """

    def __init__(
        self, dataset: Dataset, planner: Planner, wanted: Wanted, spec: SlotSpec, options: PoolOptions
    ) -> None:
        self._planner, self._options = planner, options
        num_slots = options.num_batches * options.clips_per_batch
        setup = Setup(dataset, planner, wanted, spec, num_slots, dataset.fingerprint)
        self._tries, self._stalls, self._problems = [0] * num_slots, [0] * num_slots, dict[int, str]()
        self._positions: dict[int, Sequence[int]] = {}  # of batches that are posted and not released
        self._groups: dict[int, int] = {}  # of those batches, which of the `num_batches` groups of slots they have
        self._free_groups = deque(range(options.num_batches))
        self._posted, self._taken, self._started, self._failed_starts = 0, 0, 0, 0
        self._progress_s, self._has_replaced_all = time.monotonic(), False  # ... since a clip was read
        self._workers: dict[int, _Worker] = {}  # by output
        self._poll = select.poll()
        # The kernel's signal at a parent's death is that of the thread which started the child: one that stays.
        self._keeper = ThreadPoolExecutor(1, thread_name_prefix="clip-workers", initializer=hold_signals)
        self._is_closed, self._held = False, contextlib.ExitStack()  # what is given back at the end, the last first
        try:
            check_descriptors(OWN_DESCRIPTORS + DESCRIPTORS_A_WORKER * options.num_workers, self._name)
            self.ring = Ring(spec, num_slots)
            self._held.callback(self.ring.close)
            self._setup = self._hold(os.memfd_create("setup", os.MFD_CLOEXEC))
            with open(self._setup, "wb", closefd=False) as file:
                pickle.dump(setup, file, protocol=pickle.HIGHEST_PROTOCOL)
            self._jobs = self._hold(os.eventfd(0, os.EFD_CLOEXEC | os.EFD_SEMAPHORE))
            self._done = self._hold(os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK))
            self._poll.register(self._done, select.POLLIN)
            for _ in range(options.num_workers):
                self._start()
        except BaseException:
            self.close()
            raise

    @property
    def _name(self) -> str:
        return f"decoding in {self._options.num_workers} worker processes (data.num_workers)"

    def _hold(self, descriptor: int) -> int:
        """Return a descriptor that a child can be given; it is closed at the end."""
        descriptor = beyond_standard(descriptor)
        self._held.callback(os.close, descriptor)
        return descriptor

    def has_room(self) -> bool:
        """See ClipSource."""
        return bool(self._free_groups)  # in whatever order batches are released

    def post(self, positions: Sequence[int]) -> None:
        """See ClipSource."""
        self._groups[self._posted] = self._free_groups.popleft()
        first, count = self._first(self._posted), len(positions)
        chosen, jobs = slice(first, first + count), self.ring.jobs
        assert (jobs["state"][chosen] == FREE).all()
        jobs["position"][chosen], jobs["attempt"][chosen] = positions, 0
        jobs["sequence"][chosen] = self._posted * self._options.clips_per_batch + np.arange(count)
        jobs["state"][chosen] = WANTED
        self._tries[chosen] = self._stalls[chosen] = [0] * count
        self._positions[self._posted] = positions
        self._posted += 1
        os.eventfd_write(self._jobs, count)

    def ready(self) -> int:
        """See ClipSource."""
        count = 0
        for number in range(self._taken, 0 if self._is_closed else self._posted):
            first = self._first(number)
            if not (self.ring.jobs["state"][first : first + len(self._positions[number])] == DONE).all():
                break
            count += 1
        return count

    def take(self) -> TakenBatch | None:
        """See ClipSource."""
        number = self._taken
        if number == self._posted:
            return None
        first, count = self._first(number), len(self._positions[number])
        self._wait_for(first, count)
        self._taken += 1
        return TakenBatch(number, [self._read(slot) for slot in range(first, first + count)])

    def again(self, batch: TakenBatch, place: int, attempt: int) -> HostClip | Unreadable:
        """See ClipSource."""
        slot, jobs = self._first(batch.number) + place, self.ring.jobs
        jobs["attempt"][slot], jobs["sequence"][slot] = attempt, -1  # before everything else
        self._tries[slot] = self._stalls[slot] = 0
        jobs["state"][slot] = WANTED
        os.eventfd_write(self._jobs, 1)
        self._wait_for(slot, 1)
        return self._read(slot)

    def release(self, number: int) -> None:
        """See ClipSource."""
        first = self._first(number)
        self.ring.jobs["state"][first : first + len(self._positions.pop(number))] = FREE
        self._free_groups.append(self._groups.pop(number))

    def close(self) -> None:
        """See ClipSource. The workers are killed: they hold nothing that could be lost."""
        if self._is_closed:
            return
        self._is_closed = True
        for worker in self._workers.values():
            worker.process.kill()
        for worker in self._workers.values():
            worker.kill()
        self._workers.clear()
        self._keeper.shutdown(wait=True)
        self._held.close()

    def at_close(self, callback: Callable[[], object]) -> None:
        """Have something called when the workers are gone and the memory goes."""
        self._held.callback(callback)

    @property
    def pids(self) -> list[int]:
        """Process ids of the workers."""
        return [worker.process.pid for worker in self._workers.values()]

    def _first(self, batch: int) -> int:
        return self._groups[batch] * self._options.clips_per_batch

    def _start(self) -> None:
        descriptors = (self._setup, self.ring.descriptor, self._jobs, self._done)
        try:
            worker = self._keeper.submit(_Worker, self._started, descriptors).result()
        except OSError as error:
            if lacks_descriptors(error):
                raise few_descriptors(START_DESCRIPTORS, self._name) from error
            raise
        self._started, self._progress_s = self._started + 1, time.monotonic()  # it has its time to import
        self._workers[worker.output] = worker
        self._poll.register(worker.output, select.POLLIN)

    def _read(self, slot: int) -> HostClip | Unreadable:
        job = self.ring.jobs[slot]
        position, attempt = int(job["position"]), int(job["attempt"])
        problem = self._problems.pop(slot, None)
        if problem is not None:
            plan = self._planner.at(position, attempt)
            return Unreadable(plan, f"{plan.id}: {problem}")
        return self.ring.slots[slot].read_reply(int(job["reply_bytes"]), self._planner, position, attempt)

    def _wait_for(self, first: int, count: int) -> None:
        """Wait until jobs are done; meanwhile look after the workers."""
        states = self.ring.jobs["state"][first : first + count]
        self._progress_s = time.monotonic()
        while not (states == DONE).all():
            began_s, most_s = time.monotonic(), min(1.0, self._options.deadline_s / 4)
            events = self._poll.poll(1000.0 * most_s)
            for descriptor, _ in events:
                if descriptor == self._done:
                    os.eventfd_read(self._done)
                    self._progress_s, self._failed_starts, self._has_replaced_all = time.monotonic(), 0, False
                else:
                    self._replace(self._workers[descriptor])
            if not events and time.monotonic() - began_s < most_s + STOPPED_S:  # else all were stopped, and go on
                self._stop_late_ones()

    def _replace(self, worker: _Worker) -> None:
        """Start a fresh worker for one that ended; what it had in hand is read again, or unreadable."""
        self._poll.unregister(worker.output)
        del self._workers[worker.output]
        how, said = worker.end()
        if said:
            raise pickle.loads(said)  # it could not open the data: of our own worker, through its own pipe
        jobs = self.ring.jobs
        held = np.flatnonzero((jobs["state"] == TAKEN) & (jobs["owner"] == worker.number)).tolist()
        for slot in held:
            tries = self._stalls if worker.read else self._tries
            tries[slot] += 1
            if tries[slot] < MOST_TRIES:
                jobs["state"][slot] = WANTED
                continue
            if worker.read:
                raise self._stalled(worker.read, "a second process waits for it in vain")
            late = f"decoding took longer than data.clip_deadline_s ({self._options.deadline_s:g} s)"
            self._problems[slot] = f"{late if worker.late_s else f'its decoder crashed ({how})'}, twice; transcode it"
            jobs["state"][slot] = DONE
        if how != "exit code 0" and not held:
            self._failed_starts += 1
            if self._failed_starts > MOST_FAILED_STARTS * self._options.num_workers:
                raise WorkerError(
                    f"worker processes ({how}) must start and stay: {self._failed_starts} ended in a row before they "
                    "had read a clip; see what they wrote above, or set data.num_workers=0"
                )
        self._start()
        os.eventfd_write(self._jobs, 1 + len(held))  # one more than needed: it may have died on the way to a job

    def _stop_late_ones(self) -> None:
        """Kill workers whose clip takes too long, and all of them where nothing moves at all."""
        now, jobs, deadline_s = time.monotonic(), self.ring.jobs, self._options.deadline_s
        taken = jobs["state"] == TAKEN
        late = np.flatnonzero(taken & (now - jobs["started_s"] > deadline_s))
        os.eventfd_write(self._jobs, 1)  # for the case that a worker was stopped between its token and its job
        if not taken.any() and now - self._progress_s > START_DEADLINE_S:
            self._end_idle_ones()
        for slot in late.tolist():
            worker = next((each for each in self._workers.values() if each.number == jobs["owner"][slot]), None)
            if worker is None:
                continue
            if not worker.late_s:
                worker.late_s, worker.read = now, self._read_waited_for(slot, worker)
            elif now - worker.late_s > deadline_s:
                where = worker.read or self._clip_in(slot)
                raise self._stalled(where, "its process is held by the system and cannot be ended")
            worker.process.kill()  # its pipe ends, and it is replaced

    def _end_idle_ones(self) -> None:
        """Kill workers none of which takes a job: they were stopped, or wait for one that was. Fresh ones get one try.

        Raises:
            WorkerError: fresh ones take none either.
        """
        if self._has_replaced_all:
            raise WorkerError(
                f"worker processes must take a clip within {START_DEADLINE_S:g} s, and fresh ones did not either; is "
                "the storage of data and code there? Set data.num_workers=0 to read without them"
            )
        log.warning("no worker process took a clip for %g s: all are replaced", START_DEADLINE_S)
        self._has_replaced_all = True
        for worker in self._workers.values():
            worker.process.kill()

    def _read_waited_for(self, slot: int, worker: _Worker) -> str:
        """Return the read that a late worker waits for; empty where it does not wait, but decodes."""
        found = self.ring.open_read(slot)
        if not found and waits_in_kernel(worker.process.pid):  # plain files are read by FFmpeg, which tells nobody
            return self._clip_in(slot)
        return found

    def _clip_in(self, slot: int) -> str:
        """Return the name of the clip that a job is about: the planned one or a substitute."""
        job = self.ring.jobs[slot]
        return f"clip {self._planner.at(int(job['position']), int(job['attempt'])).id}"

    def _stalled(self, where: str, detail: str) -> ReadStalled:
        limit = f"data.clip_deadline_s ({self._options.deadline_s:g} s)"
        return ReadStalled(f"read of {where} has not returned within {limit}, and {detail}; is its storage there?")
