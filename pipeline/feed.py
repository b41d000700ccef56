"""From readers to the graph: which batches are read ahead, fed, and done with.

A batch's memory belongs to its readers and is handed to DALI without a copy, so it is given back only when the graph
has finished with it: on a CPU with the batch that comes out, on a GPU with an event behind that batch.
"""

import contextlib
import dataclasses
import functools
import logging
import os
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pipeline.config import DataConfig
from pipeline.dataset import Dataset
from pipeline.frames.maker import Maker, Pending
from pipeline.graph import GraphSpec, host_inputs
from pipeline.nvdec.choice import Chosen
from pipeline.nvdec.hardware import NUM_THREADS, open_pool
from pipeline.nvdec.share import Share
from pipeline.nvdec.source import SplitSource, nvdec_decodes_all
from pipeline.source import ClipSource, HostClip, Planner, TakenBatch, ThreadSource, Wanted
from pipeline.workers.machine import choose_num_workers, few_threads, lacks_threads, local_ranks, usable_cpus
from pipeline.workers.pool import PoolOptions, WorkerSource
from pipeline.workers.slots import SlotSpec, picture_bytes

MORE_BATCHES = 2  # beside those that are kept ahead: one in the graph, one just handed out

MOST_BEHIND = 2  # batches that the device has not reached yet: it works on the step before the first of them

MOST_PINNED_BYTES = 8 << 30  # of plain videos in large pictures there may be more

log = logging.getLogger(__name__)


def open_source(
    dataset: Dataset, planner: Planner, wanted: Wanted, spec: GraphSpec, config: DataConfig, decoder: Chosen
) -> ClipSource:
    """Start the threads or processes that read, and NVDEC's decoders where they decode.

    Args:
        dataset: Where the bytes are.
        planner: What the clips are.
        wanted: What is read of each.
        spec: Of the graph that takes them.
        config: How many, how far ahead, deadline.
        decoder: Who decodes.

    Raises:
        RingMemoryError: no memory for the workers' slots.
    """
    nvdec = decoder in ("nvdec", "both") and wanted.video
    if decoder == "nvdec" and nvdec_decodes_all(dataset):  # threads are started where NVDEC comes to its end
        config = dataclasses.replace(config, num_workers=0)
    cpu = _cpu_source(dataset, planner, wanted, spec, config)
    if not nvdec and (spec.device_id is None or decoder != "cpu" or not wanted.video):
        return cpu
    with contextlib.ExitStack() as failed:
        failed.callback(cpu.close)
        pool = open_pool(spec.device_id or 0, NUM_THREADS, config.clip_deadline_s) if nvdec else None
        failed.callback(lambda: None if pool is None else pool.close())
        source = SplitSource(
            dataset,
            planner,
            wanted,
            cpu,
            pool,
            num_batches=config.prefetch_batches + MORE_BATCHES,
            share=Share(1.0) if decoder == "nvdec" else None,
            device_id=spec.device_id,
            key=(spec.clip, config.num_workers, config.num_threads),
        )
        failed.pop_all()
    return source


@contextlib.contextmanager
def threads_told() -> Iterator[None]:
    """Say with limit and remedy that no thread or process can be started.

    Raises:
        OSError: so it is.
    """
    try:
        yield
    except (RuntimeError, BlockingIOError) as error:
        if lacks_threads(error):
            raise few_threads() from error
        raise


def check_process(began: int) -> None:
    """Check that batches are taken where their threads are.

    Args:
        began: Id of the process that took the first one.

    Raises:
        RuntimeError: this is another one.
    """
    if os.getpid() != began:
        raise RuntimeError(
            f"batches that process {began} began to take must not be taken in its fork ({os.getpid()}), which has "
            "none of the threads that read ahead; begin anew there: loader.batches(start_step)"
        )


def planes_stream(source: ClipSource) -> torch.cuda.Stream | None:
    """Return the CUDA stream in whose order a source puts planes into device memory; None where it does not."""
    return source.stream if isinstance(source, SplitSource) else None


def _cpu_source(dataset: Dataset, planner: Planner, wanted: Wanted, spec: GraphSpec, config: DataConfig) -> ClipSource:
    """Start the threads or processes that read.

    Args:
        dataset: Where the bytes are.
        planner: What the clips are.
        wanted: What is read of each.
        spec: Of the graph that takes them.
        config: How many, how far ahead, deadline.

    Raises:
        RingMemoryError: no memory for the workers' slots.
    """
    num_batches = config.prefetch_batches + MORE_BATCHES
    is_confined = not dataset.video_codec  # plain files
    workers = choose_num_workers(config.num_workers, on_gpu=spec.device_id is not None, is_confined=is_confined)
    if workers == 0 or wanted.decoder == "dali":  # encoded cuts cost no CPU worth a process
        return ThreadSource(
            dataset,
            planner,
            wanted,
            num_threads=config.num_threads,
            num_batches=num_batches,
            deadline_s=config.clip_deadline_s,
        )
    workers = _at_most_slots(workers, num_batches * spec.max_clips)
    _note_more_than_cpus(workers * local_ranks(), usable_cpus())
    slots = SlotSpec(picture_bytes(dataset, spec.clip.num_frames, wanted), wanted.num_audio_samples, spec.want_negative)
    options = PoolOptions(workers, num_batches, spec.max_clips, config.clip_deadline_s)
    source = WorkerSource(dataset, planner, wanted, slots, options)
    if spec.device_id is not None:
        _pin(source, spec.device_id)
    return source


@functools.cache
def _at_most_slots(workers: int, slots: int) -> int:
    """Return how many workers have something to do: each holds a slot; fewer than asked for are told once."""
    if workers <= slots:
        return workers
    log.info(
        "%d worker processes, not %d: there are slots for %d clips (clips of a batch x (data.prefetch_batches + %d))",
        slots, workers, slots, MORE_BATCHES,
    )  # fmt: skip
    return slots


@functools.cache
def _note_more_than_cpus(workers: int, cpus: int) -> None:
    """Say once that there are more workers than CPUs: the system takes turns between them, each with cold caches."""
    if workers > cpus:
        log.info(
            "%d worker processes (data.num_workers, all ranks of this host) share %d CPUs: more than one a CPU help "
            "only where reads wait for storage; else they cost (8 on 2 CPUs: 6 to 20 %% of the speed); batches are the "
            "same", workers, cpus,
        )  # fmt: skip


def _pin(source: WorkerSource, device_id: int) -> None:
    """Register the slots with CUDA, once, so that copies to the device run beside everything else."""
    memory = source.ring.memory
    if memory.nbytes > MOST_PINNED_BYTES:
        log.info("%d MiB of slots for clips are too much to be pinned: copies to the GPU wait", memory.nbytes >> 20)
        return
    runtime = torch.cuda.cudart()
    with torch.cuda.device(device_id):
        error = int(runtime.cudaHostRegister(memory.ctypes.data, memory.nbytes, 0))
    if error:
        with contextlib.suppress(RuntimeError):  # it stays CUDA's last error, which the next kernel would raise
            torch.zeros(1, device=torch.device("cuda", device_id)).add_(1)
        log.warning("slots for clips cannot be pinned (CUDA error %d): copies to the GPU wait", error)
        return
    source.at_close(lambda: runtime.cudaHostUnregister(memory.ctypes.data))


class _Fed(NamedTuple):
    """A batch whose memory is in use: its number, its clips, the arrays that the graph was given, its frames."""

    number: int
    clips: list[HostClip]
    inputs: tuple[list[Any], ...]
    frames: Pending | None


class Feed:
    """Callable that gives DALI the inputs of one batch after the other.

    Args:
        source: Who reads.
        batches: Positions of each batch.
        spec: Of the graph.
        readable: Returns the clips of a read batch that go on, with substitutes.
        maker: Makes their frames, where the graph does not.
    """

    def __init__(
        self,
        source: ClipSource,
        batches: Iterator[Sequence[int]],
        spec: GraphSpec,
        readable: Callable[[TakenBatch], list[HostClip]],
        maker: Maker | None = None,
    ) -> None:
        self._source, self._batches, self._spec, self._readable = source, batches, spec, readable
        self._maker = maker
        self._in_graph: deque[_Fed] = deque()
        self._planes_stream = planes_stream(source)
        self._behind_event: deque[tuple[torch.cuda.Event, int]] = deque()  # batches by number, to be released
        self._behind_step: deque[tuple[torch.cuda.Event, _Fed]] = deque()  # handed out, not reached by the device
        self._device_wait_s = 0.0
        self._reading = 0  # batches
        self._has_ended = False  # there are no more positions

    def __call__(self) -> tuple[list[Any], ...]:
        """Return the arrays of the next batch that has a readable clip; raises StopIteration after the last one."""
        while True:
            self._post()
            batch = self._source.take()
            if batch is None:
                assert self._has_ended, "a source without room must have batches in hand, or their end is taken for it"
                raise StopIteration
            self._reading -= 1
            clips = self._readable(batch)
            if clips:
                inputs = host_inputs(self._spec, clips)
                frames = None if self._maker is None else self._maker.begin(clips)
                self._in_graph.append(_Fed(batch.number, clips, inputs, frames))
                if self._planes_stream is not None:  # copies to the device are all that reads the source's memory
                    self._behind_event.append((self._planes_stream.record_event(), batch.number))
                return inputs
            self._source.release(batch.number)  # a batch of an evaluation may be quarantined as a whole

    def leave(self) -> tuple[list[HostClip], dict[str, Tensor]]:
        """Return the clips of the batch that has just come out of the graph, and "frames" if they are made beside it.

        Frames are (B, S, T, H, W, C).
        """
        fed = self._in_graph.popleft()
        made = {} if fed.frames is None else {"frames": fed.frames.result()}  # it has read the planes after that
        if self._spec.device_id is None:
            self._source.release(fed.number)
        else:  # the graph may still be at work on it
            event = torch.cuda.current_stream(self._spec.device_id).record_event()
            if self._planes_stream is None:
                self._behind_event.append((event, fed.number))
            self._wait_for_device(event, fed)
        return fed.clips, made

    def take_device_wait(self) -> float:
        """Return the seconds that `leave` has waited for the device since the last call."""
        waited, self._device_wait_s = self._device_wait_s, 0.0
        return waited

    def _wait_for_device(self, event: torch.cuda.Event, fed: _Fed) -> None:
        """Keep a batch's inputs until the device has reached it, and the host from running further ahead than that."""
        self._behind_step.append((event, fed))
        began = time.perf_counter()
        while len(self._behind_step) > MOST_BEHIND:
            self._behind_step.popleft()[0].synchronize()
        self._device_wait_s += time.perf_counter() - began

    def close(self) -> None:
        """Close the source and let go of its memory; the graph must have ended."""
        if self._maker is not None:
            self._maker.close()  # its threads read that memory
        self._in_graph.clear()
        self._behind_event.clear()
        self._behind_step.clear()
        self._source.close()
        # DALI's operators hold this object in a circle: files and memory end here, not when circles are collected.
        del self._source, self._batches, self._readable
        self._maker = None

    def _post(self) -> None:
        """Have as many batches read as there is memory for."""
        while self._behind_event and (self._behind_event[0][0].query() or self._must_wait()):
            event, number = self._behind_event.popleft()
            event.synchronize()
            self._source.release(number)
        while self._source.has_room():
            positions = next(self._batches, None)
            if positions is None:
                self._has_ended = True
                return
            self._source.post(positions)
            self._reading += 1

    def _must_wait(self) -> bool:
        """Whether nothing is being read, for lack of memory."""
        return self._reading == 0 and not self._source.has_room()
