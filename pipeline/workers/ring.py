"""Slots in shared memory that parent and workers map, and the table of jobs in front of them.

The memory is an anonymous file (memfd): no name, not bounded by /dev/shm, gone with the last process that has it.
A job is a slot: the parent sets it WANTED, a worker TAKEN and DONE, the parent FREE. Only workers compete, and they
claim under a record lock, which the kernel takes back when its holder dies.
"""

import errno
import fcntl
import mmap
import os
import time
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.workers.machine import available_memory, beyond_standard
from pipeline.workers.slots import Slot, SlotSpec

FREE, WANTED, TAKEN, DONE = range(4)
JOB = np.dtype(
    [("state", "<i4"), ("owner", "<i4"), ("attempt", "<i4"), ("reply_bytes", "<i4"), ("position", "<i8"),
     ("sequence", "<i8"), ("started_s", "<f8"), ("read_s", "<f8"), ("offset", "<i8"), ("file", "S512")]
)  # fmt: skip


class RingMemoryError(MemoryError):
    """There is no memory for the slots; the message is for the user."""

    is_for_user = True  # a command says it in one line


class Ring:
    """The slots and their jobs.

    Args:
        spec: Sizes of a slot.
        num_slots: How many.
        descriptor: Of the memory, in a worker; None makes it.

    Raises:
        RingMemoryError: there is no memory for the slots.
        ValueError: in a worker: the memory is of other slots.

    Attributes:
        jobs: (num_slots,) of `JOB`. slots: their memory.
    """

    def __init__(self, spec: SlotSpec, num_slots: int, descriptor: int | None = None) -> None:
        table = -(-num_slots * JOB.itemsize // mmap.PAGESIZE) * mmap.PAGESIZE
        size = table + num_slots * spec.slot_bytes
        if descriptor is not None:
            _check_size(descriptor, size)
        self.descriptor = _new_memory(size) if descriptor is None else descriptor
        try:
            self.memory: NDArray[np.uint8] = np.frombuffer(mmap.mmap(self.descriptor, size), np.uint8)
        except (OSError, OverflowError) as error:
            if descriptor is None:
                os.close(self.descriptor)
            raise _no_memory(size, error) from error
        self.jobs: NDArray[Any] = self.memory[: num_slots * JOB.itemsize].view(JOB)
        begins = [table + i * spec.slot_bytes for i in range(num_slots)]
        self.slots = [Slot(spec, self.memory[begin : begin + spec.slot_bytes]) for begin in begins]

    def claim(self, worker: int) -> int | None:
        """Take the wanted job with the lowest sequence for a worker; returns its slot, None where there is none."""
        fcntl.lockf(self.descriptor, fcntl.LOCK_EX)
        try:
            jobs = self.jobs
            wanted = np.flatnonzero(jobs["state"] == WANTED)
            if not len(wanted):
                return None
            slot = int(wanted[jobs["sequence"][wanted].argmin()])
            jobs["owner"][slot], jobs["started_s"][slot], jobs["read_s"][slot] = worker, time.monotonic(), 0.0
            jobs["state"][slot] = TAKEN
            return slot
        finally:
            fcntl.lockf(self.descriptor, fcntl.LOCK_UN)

    def note_read(self, slot: int, path: Path | None, offset: int) -> None:
        """Leave word in a job that its worker waits for a read of a file; None: it does not any more."""
        job = self.jobs[slot]
        if path is not None:
            job["offset"], job["file"] = offset, os.fsencode(path)[-JOB["file"].itemsize :]
        job["read_s"] = 0.0 if path is None else time.monotonic()

    def open_read(self, slot: int) -> str:
        """Return file and byte of the read that the worker of a job waits for; empty where it waits for none."""
        job = self.jobs[slot]
        return f"{os.fsdecode(bytes(job['file']))} at byte {job['offset']}" if job["read_s"] else ""

    def close(self) -> None:
        """Close the descriptor; the memory goes when the last view of it does."""
        os.close(self.descriptor)
        self.memory, self.jobs, self.slots = np.empty(0, np.uint8), np.empty(0, JOB), []


def _new_memory(size: int) -> int:
    available = available_memory()
    if size > available:  # pages are taken when they are written to: there would be no error, but a killed process
        raise _no_memory(size, f"{available / 2**20:.0f} MiB are free")
    try:
        descriptor = beyond_standard(os.memfd_create("clips", os.MFD_CLOEXEC))
    except OSError as error:
        raise _no_memory(size, error) from error
    try:
        os.ftruncate(descriptor, size)
    except OSError as error:
        os.close(descriptor)
        raise _no_memory(size, error) from error
    return descriptor


def _check_size(descriptor: int, size: int) -> None:
    """Check that a worker means the same slots as its parent, which has the code of its start in memory."""
    made = os.fstat(descriptor).st_size
    if made != size:
        raise ValueError(
            f"slots for clips ({size} bytes) must be those of the training process ({made} bytes): the code was "
            "changed while a run uses it; resume the run, and run from a copy that stays as it is"
        )


def _no_memory(size: int, error: Exception | str) -> Exception:
    if isinstance(error, OSError) and error.errno == errno.EMFILE:  # a map has a descriptor of its own
        return error
    return RingMemoryError(
        f"shared memory for clips ({size / 2**20:.0f} MiB) cannot be had: {error}; lower data.prefetch_batches, the "
        "clips of a batch or data.clip_memory_mib, or set data.num_workers=0"
    )
