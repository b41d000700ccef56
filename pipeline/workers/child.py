"""One worker process: takes jobs of the ring, plans, reads and decodes each clip into its slot, and answers there.

It bounds its own memory, leaves when its parent is gone, and never imports torch or DALI.
Run as `python -m pipeline.workers.child NUMBER PARENT SETUP RING JOBS DONE`, the last four being descriptors.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import pickle
import resource
import signal
import sys
import threading
from dataclasses import dataclass
from functools import partial

import av

from pipeline.dataset import Dataset
from pipeline.media.reading import OPEN_READS, watch_reads
from pipeline.source import MIB, Planner, Wanted, read_clip
from pipeline.workers.machine import HELD_SIGNALS
from pipeline.workers.ring import DONE, Ring
from pipeline.workers.slots import Reply, SlotSpec, reply_of

PR_SET_PDEATHSIG = 1
SLACK_BYTES = 256 * MIB  # beside the clip: demuxer, cut, sound, Python
CHECK_MEMORY_CLIPS = 32
SLOW_READ_S = 20.0  # a read that takes longer is named; the parent ends the process at data.clip_deadline_s
MEMORY_REASON = "decoding needs more memory than data.clip_memory_mib allows ({:.0f}); raise it, or transcode the video"


@dataclass(frozen=True)
class Setup:
    """What a worker has to know. `fingerprint` is the data set's, as the parent sees it."""

    dataset: Dataset
    planner: Planner
    wanted: Wanted
    spec: SlotSpec
    num_slots: int
    fingerprint: str


def die_with_parent(parent: int) -> None:
    """Have the kernel kill this process with its parent, and leave signals for the parent to decide on."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        sys.exit(0)
    for number in HELD_SIGNALS:  # the parent decides
        signal.signal(number, signal.SIG_IGN)


def _leave_at_end_of_input() -> None:
    """End this process when the pipe that the parent holds open is closed."""
    while os.read(0, 1):
        pass
    os._exit(0)


def limit_memory(clip_bytes: int) -> None:
    """Bound what this process may allocate beyond what it has now; the shared slots do not count."""
    limit = _status_bytes("VmData") + clip_bytes + SLACK_BYTES
    resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def _status_bytes(name: str) -> int:
    with open("/proc/self/status", encoding="ascii") as lines:
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{name}:"))


def serve(setup: Setup, ring: Ring, number: int, jobs: int, done: int) -> None:
    """Answer jobs; returns when the process had better be replaced by a fresh one."""
    most = _status_bytes("RssAnon") + setup.wanted.max_clip_bytes
    clips = 0
    while True:
        os.eventfd_read(jobs)
        slot = ring.claim(number)
        if slot is None:
            continue
        job, OPEN_READS.observer = ring.jobs[slot], partial(ring.note_read, slot)
        reply, is_whole = _answer(setup, ring, slot, int(job["position"]), int(job["attempt"]))
        job["reply_bytes"] = ring.slots[slot].write_reply(reply)
        job["state"] = DONE
        os.eventfd_write(done, 1)
        clips += 1
        if not is_whole or (clips % CHECK_MEMORY_CLIPS == 0 and _status_bytes("RssAnon") > most):
            return


def _answer(setup: Setup, ring: Ring, slot: int, position: int, attempt: int) -> tuple[Reply, bool]:
    """Read a clip into its slot; returns the reply, and whether this process is in order."""
    plan = None
    try:
        plan = setup.planner.at(position, attempt)
        clip = read_clip(setup.dataset, plan, setup.wanted, ring.slots[slot])
        return reply_of(clip), True
    except MemoryError:
        return Reply(plan, reason=MEMORY_REASON.format(setup.wanted.max_clip_bytes / MIB)), False
    except Exception as error:  # a mistake of the program, or of the data set as a whole: the parent raises it
        return Reply(plan, error=portable(error)), True


def whole_of(descriptor: int) -> bytes:
    """Return what a file holds. Its position is that of all processes that have it, and stays where it is."""
    return os.pread(descriptor, os.fstat(descriptor).st_size, 0)


def portable(error: Exception) -> Exception:
    """Return the error itself where it survives pickling, else its words."""
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:
        return RuntimeError(f"{type(error).__name__}: {error}")
    return error


def main() -> None:
    """Confine this process and serve."""
    number, parent, setup_file, memory, jobs, done = map(int, sys.argv[1:7])
    die_with_parent(parent)
    threading.Thread(target=_leave_at_end_of_input, daemon=True).start()
    av.logging.set_level(None)
    parent_pipe = os.dup(1)
    os.dup2(2, 1)  # whatever a library prints must not look like an answer
    try:
        setup: Setup = pickle.loads(whole_of(setup_file))
        found = setup.dataset.fingerprint
        if found != setup.fingerprint:
            raise ValueError(
                f"data ({found[:16]}) changed while it is read (was {setup.fingerprint[:16]}); start again"
            )
        ring = Ring(setup.spec, setup.num_slots, memory)
    except Exception as error:
        os.write(parent_pipe, pickle.dumps(portable(error)))
        sys.exit(1)
    watch_reads(SLOW_READ_S)
    limit_memory(setup.wanted.max_clip_bytes)
    serve(setup, ring, number, jobs, done)


if __name__ == "__main__":
    main()
