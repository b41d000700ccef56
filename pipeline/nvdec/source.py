"""NVDEC and the CPU as one source of clips: each batch is dealt out, and put together again in its order.

A clip for NVDEC is read, turned into Annex-B bytes and handed over in one thread of the pool. All planes of a batch
then lie in device memory: those of CPU clips are copied there from the workers' slots, so that the graph has one input
for planes wherever they come from. Who decodes a clip changes nothing of it: H.264 leaves a decoder no choice.

The CPU has the last word: a clip that NVDEC failed with is decoded by the CPU, which alone calls clips unreadable.
"""

import functools
import logging
from collections import deque
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from pipeline.clip import ClipPlan
from pipeline.dataset import Dataset
from pipeline.media.annexb import to_annex_b
from pipeline.nvdec.decoder import ClipPlanes, DecodeError, StreamKind
from pipeline.nvdec.hardware import CODECS, MIN_PX
from pipeline.nvdec.pool import DecoderPool, Decoders
from pipeline.nvdec.share import Rates, Share
from pipeline.nvdec.trial import Trial
from pipeline.source import (
    ClipSource,
    FreshMemory,
    HostClip,
    Planner,
    SingleReader,
    TakenBatch,
    Unreadable,
    Wanted,
    plane_bytes,
    read_clip,
)

log = logging.getLogger(__name__)


@dataclass
class Counts:
    """Clips by who decoded them; `again` of those that NVDEC failed with."""

    nvdec: int = 0
    cpu: int = 0
    again: int = 0


@dataclass(frozen=True)
class _Job:
    """A clip that NVDEC has in hand. `future` gives None where the cut is no H.264 that can be converted."""

    plan: ClipPlan
    future: "Future[tuple[HostClip, ClipPlanes | None] | Unreadable | None]"


@dataclass(frozen=True)
class _Batch:
    """A posted batch: its positions, the clips of NVDEC by place, the places of the others, in the CPU's order."""

    number: int
    positions: Sequence[int]
    jobs: dict[int, _Job]
    others: list[int]
    taken: list[TakenBatch] = field(default_factory=list)  # the CPU's part
    uploading: list[HostClip] = field(default_factory=list)  # whose planes copies to the device may still read


def nvdec_media(dataset: Dataset) -> NDArray[np.bool_]:
    """(N,) of each medium: whether NVDEC takes its cuts in one call (codec, at least 128 px in both dimensions)."""
    table = dataset.media
    small = np.minimum(np.asarray(table.width), np.asarray(table.height)) < MIN_PX
    return ~small & (dataset.video_codec in CODECS)


def nvdec_decodes_all(dataset: Dataset) -> bool:
    """Whether NVDEC takes every clip of a split."""
    return bool(nvdec_media(dataset)[np.asarray(dataset.samples.media)].all())


@functools.cache
def upload_stream(device: torch.device) -> torch.cuda.Stream:
    """The stream of a device that brings planes, one for all sources: memory that one has left serves the next."""
    return torch.cuda.Stream(device)


class SplitSource:
    """Reads clips with NVDEC and the CPU at once; a `ClipSource`.

    On a GPU it is also the CPU's way alone (`pool` None): clips lie in the CPU's memory only until their copies to the
    device are done, so that the readers get it back while the graph and the training step are still at work.

    Args:
        dataset: Where the bytes are.
        planner: What the clips are.
        wanted: What is read of each, decoded by the CPU.
        cpu: The CPU's source, of as many batches.
        pool: Decoders; None: the CPU decodes all.
        num_batches: Batches in memory at once.
        share: How clips are dealt out; None measures both sides at the first batch.
        device_id: CUDA device where planes shall lie; None leaves them in host memory (the CPU twin).
        key: What rates depend on beside data and clips, such as the number of workers: measured once for each.

    Attributes:
        stream: Stream in whose order planes lie in device memory; None without a device.
        counts: Clips so far.
        rates: What was measured, None before or without.
    """

    def __init__(
        self,
        dataset: Dataset,
        planner: Planner,
        wanted: Wanted,
        cpu: ClipSource,
        pool: DecoderPool | None,
        *,
        num_batches: int,
        share: Share | None = None,
        device_id: int | None = None,
        key: tuple[object, ...] = (),
    ) -> None:
        self._dataset, self._planner, self._cpu, self._pool = dataset, planner, cpu, pool
        self._wanted, self._wanted_cut = replace(wanted, decoder="cpu"), replace(wanted, decoder="dali")
        self._num_batches, self._share = num_batches, share
        self._key = (dataset.fingerprint, device_id, self._wanted, *key)
        self._can, self._all_can = nvdec_media(dataset), nvdec_decodes_all(dataset)
        self._device = None if device_id is None else torch.device("cuda", device_id)
        self.stream = None if self._device is None else upload_stream(self._device)
        self._reader = SingleReader(60.0 if pool is None else pool.deadline_s)
        self._waiting: deque[_Batch] = deque()
        self._in_use: dict[int, _Batch] = {}  # taken and not released
        self._posted = 0
        self.counts = Counts()
        self.rates: Rates | None = None

    def has_room(self) -> bool:
        """See ClipSource."""
        return len(self._waiting) + len(self._in_use) < self._num_batches

    def post(self, positions: Sequence[int]) -> None:
        """See ClipSource."""
        if self._share is None and self._pool is not None:
            self._share = Share(self._known_or_measured(positions).nvdec_share)
        jobs: dict[int, _Job] = {}
        if self._can_submit and self._share is not None and self._share.nvdec_share > 0.0:
            chosen = self._share.deal(self._decodable(positions))
            for place, position in enumerate(positions):
                if chosen[place]:
                    jobs[place] = self._submit(position)
        others = [place for place in range(len(positions)) if place not in jobs]
        if others:
            self._cpu.post([positions[place] for place in others])
        self._waiting.append(_Batch(self._posted, positions, jobs, others))
        self._posted += 1

    def ready(self) -> int:
        """See ClipSource."""
        count, of_cpu = 0, self._cpu.ready()
        for batch in list(self._waiting):
            of_cpu -= bool(batch.others)
            if of_cpu < 0 or not all(job.future.done() for job in batch.jobs.values()):
                break
            count += 1
        return count

    def take(self) -> TakenBatch | None:
        """See ClipSource."""
        if not self._waiting:
            return None
        batch = self._waiting.popleft()
        self._in_use[batch.number] = batch
        clips: list[HostClip | Unreadable | None] = [None] * len(batch.positions)
        if batch.others:
            taken = self._cpu.take()
            assert taken is not None
            batch.taken.append(taken)
            for place, clip in zip(batch.others, taken.clips, strict=True):
                clips[place] = self._uploaded(clip, batch)
            self.counts.cpu += len(batch.others)
        for place, job in batch.jobs.items():
            clips[place] = self._finished(job, batch)
        return TakenBatch(batch.number, [clip for clip in clips if clip is not None])

    def again(self, batch: TakenBatch, place: int, attempt: int) -> HostClip | Unreadable:
        """See ClipSource. A substitute is decoded by the CPU, whoever had the clip in whose place it comes."""
        own = self._in_use[batch.number]
        if place in own.others:
            return self._uploaded(self._cpu.again(own.taken[0], own.others.index(place), attempt), own)
        return self._uploaded(self._read(self._planner.at(own.positions[place], attempt)), own)

    def release(self, number: int) -> None:
        """See ClipSource."""
        for taken in self._in_use.pop(number).taken:
            self._cpu.release(taken.number)

    def close(self) -> None:
        """See ClipSource."""
        if self._pool is not None:
            self._pool.close()
        self._reader.close()
        try:
            if self.stream is not None:
                self.stream.synchronize()  # copies from the memory that goes now
        finally:  # a device that has failed raises: the worker processes must end all the same
            self._cpu.close()

    @property
    def splits(self) -> bool:
        """Whether NVDEC has a part."""
        return self._pool is not None

    @property
    def _can_submit(self) -> bool:
        return self._pool is not None and self._pool.is_usable

    def _decodable(self, positions: Sequence[int]) -> list[bool]:
        """For each clip whether NVDEC takes it."""
        if self._all_can:
            return [True] * len(positions)
        return [bool(self._can[self._planner.at(position, 0).media]) for position in positions]

    def _submit(self, position: int) -> _Job:
        plan = self._planner.at(position, 0)  # here: a planner is for one thread
        assert self._pool is not None
        return _Job(plan, self._pool.submit(lambda decoders: self._decode(plan, decoders)))

    def _decode(self, plan: ClipPlan, decoders: Decoders) -> tuple[HostClip, ClipPlanes | None] | Unreadable | None:
        """Read and decode a clip, in a thread of the pool."""
        clip = read_clip(self._dataset, plan, self._wanted_cut, FreshMemory())
        if isinstance(clip, Unreadable):
            return clip
        if clip.encoded is None:
            return clip, None
        table, media = self._dataset.media, plan.media
        kind = StreamKind(self._dataset.video_codec, int(table.width[media]), int(table.height[media]))
        if plane_bytes(len(plan.frames), kind.height, kind.width) > self._wanted.max_clip_bytes:
            return None  # the CPU refuses it: so it is unreadable whoever has it
        try:
            stream = to_annex_b(clip.encoded)
        except ValueError:
            return None  # the CPU says what is wrong with it
        planes = decoders.decode(kind, stream, clip.frames)
        frames = np.asarray(plan.frames, np.int32)
        return replace(clip, encoded=None, frames=frames, luma=planes.luma, chroma=planes.chroma), planes

    def _finished(self, job: _Job, batch: _Batch) -> HostClip | Unreadable:
        """Wait for a clip of NVDEC's; what it failed with is read by the CPU, here."""
        assert self._pool is not None
        try:
            found = self._pool.result(job.future)
        except DecodeError as error:
            log.warning("clip %s: NVDEC: %s; decoded by the CPU", job.plan.id, error)
            found = None
        if found is None:
            self.counts.again += 1
            return self._uploaded(self._read(job.plan), batch)
        self.counts.nvdec += 1
        if isinstance(found, Unreadable):
            return found
        clip, planes = found
        if planes is not None and planes.ready is not None and self.stream is not None:
            self.stream.wait_event(planes.ready)
        return clip

    def _read(self, plan: ClipPlan) -> HostClip | Unreadable:
        """Read a clip by the CPU, now; NVDEC's thread may have been late because storage does not answer."""
        return self._reader.read(lambda: read_clip(self._dataset, plan, self._wanted, FreshMemory()))

    def _uploaded(self, clip: HostClip | Unreadable, batch: _Batch) -> HostClip | Unreadable:
        """Copy planes to the device, in the order of `stream`, and sound aside: the rest of a slot is then free.

        Its memory is released behind an event on `stream`, which knows nothing of the graph's copies of the sound.
        Until then the batch holds it: CUDA may read memory that is not pinned after the call as well.
        """
        if self.stream is None or isinstance(clip, Unreadable) or clip.luma is None:
            return clip
        batch.uploading.append(clip)

        def upload(plane: Any) -> Any:
            return torch.from_numpy(plane).to(self._device, non_blocking=True)

        with torch.cuda.stream(self.stream):
            negative = None if clip.negative is None else clip.negative.copy()
            planes = upload(clip.luma), upload(clip.chroma)
            return replace(clip, luma=planes[0], chroma=planes[1], audio=clip.audio.copy(), negative=negative)

    def _known_or_measured(self, positions: Sequence[int]) -> Rates:
        """Return the rates: of this process, or measured now; half and half where none of the clips is for NVDEC."""
        if self._pool is None or not self._can[np.asarray(self._dataset.samples.media)].any() or not self._can_submit:
            return Rates(0.0, 1.0)
        trial = Trial(
            self._cpu,
            self._pool,
            submit=lambda position: self._submit(position).future,
            can_decode=self._decodable,
            num_batches=self._num_batches,
        )
        self.rates = trial.rates(self._key, positions)
        return self.rates or Rates(1.0, 1.0)
