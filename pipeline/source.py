"""Plans to host buffers: cut bytes or decoded frames, and PCM. The only code that touches files while training.

`read_clip` reads one clip, in a thread of this process (`ThreadSource`) or in a worker process (`pipeline/workers`).
Whoever reads is told positions, not plans: a plan is a pure function of (position, attempt).
"""

import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from itertools import takewhile
from typing import Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from pipeline.clip import ClipPlan
from pipeline.dataset import Dataset, Decoder, MediaError
from pipeline.media.reading import OPEN_READS, ReadStalled, few_descriptors, lacks_descriptors, patiently

UInt8 = NDArray[np.uint8]
Int16 = NDArray[np.int16]
MIB = 1 << 20
STOPPED_S = 1.0  # a wait that lasts so much longer than it was to last: this process was stopped meanwhile
_READ_DESCRIPTORS = 4  # a container, its sound, and what a decoder opens


@dataclass(frozen=True)
class HostClip:
    """One clip in host memory.

    Args:
        plan: What it is.
        encoded: (bytes,) uint8 encoded cut, or None where frames were decoded here or no video is wanted.
        frames: (T,) int32 numbers of the model's frames, counted from the first one that `encoded` decodes to.
        luma: (T, H, W, 1) uint8, or None.
        chroma: (T, H/2, W/2, 2) uint8, or None.
        audio: (samples,) int16, zeros where there is none.
        has_audio: Whether any of the window lies inside the medium's sound.
        negative: (samples,) int16 out-of-sync audio, or None.
    """

    plan: ClipPlan
    encoded: NDArray[np.uint8] | None
    frames: NDArray[np.int32]
    luma: NDArray[np.uint8] | None
    chroma: NDArray[np.uint8] | None
    audio: NDArray[np.int16]
    has_audio: bool
    negative: NDArray[np.int16] | None


@dataclass(frozen=True)
class Unreadable:
    """A clip whose bytes or frames are not available."""

    plan: ClipPlan
    reason: str


class Planner(Protocol):
    """Plans clips, always the same one for the same arguments."""

    def at(self, position: int, attempt: int) -> ClipPlan:
        """Return the clip at a position: the planned one (attempt 0), or its substitute number `attempt`."""
        ...


@dataclass(frozen=True)
class Wanted:
    """What is read of every clip.

    Args:
        num_audio_samples: Length of the audio window.
        decoder: "cpu": decode frames here; "dali": hand encoded cuts to the graph.
        video: Whether the model takes frames.
        audio: Whether it takes sound.
        max_clip_bytes: Most that the decoded pictures of a clip may take; a clip with more is unreadable.
    """

    num_audio_samples: int
    decoder: Decoder
    video: bool = True
    audio: bool = True
    max_clip_bytes: int = 1024 * MIB


class ClipMemory(Protocol):
    """Where the arrays of one clip lie, but for an encoded cut, which is where it was read to."""

    def planes(self, count: int, height: int, width: int) -> tuple[UInt8, UInt8]:
        """Memory of y (count, height, width, 1) and uv (count, height / 2, width / 2, 2)."""
        ...

    def audio(self, samples: Int16) -> Int16:
        """Sound (samples,), put there."""
        ...

    def negative(self, samples: Int16) -> Int16:
        """Out-of-sync sound (samples,), put there."""
        ...


class FreshMemory:
    """New memory for every array."""

    def planes(self, count: int, height: int, width: int) -> tuple[UInt8, UInt8]:
        """See ClipMemory."""
        return planes_of(np.empty(plane_bytes(count, height, width), np.uint8), count, height, width)

    def audio(self, samples: Int16) -> Int16:
        """See ClipMemory."""
        return samples

    negative = audio


def plane_bytes(count: int, height: int, width: int) -> int:
    """Bytes of the planes of `count` pictures, 4:2:0."""
    return count * height * width * 3 // 2


def planes_of(memory: UInt8, count: int, height: int, width: int) -> tuple[UInt8, UInt8]:
    """Views of y (count, height, width, 1) and behind it uv (count, height / 2, width / 2, 2) in (bytes,) memory."""
    luma = count * height * width
    y = memory[:luma].reshape(count, height, width, 1)
    uv = memory[luma : plane_bytes(count, height, width)].reshape(count, height // 2, width // 2, 2)
    return y, uv


def read_clip(dataset: Dataset, plan: ClipPlan, wanted: Wanted, memory: ClipMemory) -> HostClip | Unreadable:
    """Read one clip; media that cannot be read come back as `Unreadable`, other errors are raised.

    What storage fails with for a moment is tried again first: of a store where its bytes are read, of plain files here.
    A process without a descriptor left is not the medium's fault: that is raised.
    """
    attempt: Callable[[Callable[[], Any]], Any] = _at_once if dataset.video_codec else patiently
    try:
        encoded, frames, luma, chroma = attempt(lambda: _video(dataset, plan, wanted, memory))
        audio, has_audio = attempt(lambda: read_sound(dataset, plan.media, plan.audio_start, wanted))
    except MediaError as error:
        if lacks_descriptors(error):
            raise few_descriptors(_READ_DESCRIPTORS, "reading a clip") from error
        return Unreadable(plan, str(error))
    negative = _negative(dataset, plan, wanted, attempt)
    return HostClip(
        plan=plan,
        encoded=encoded,
        frames=frames,
        luma=luma,
        chroma=chroma,
        audio=memory.audio(audio),
        has_audio=has_audio,
        negative=None if negative is None else memory.negative(negative),
    )


def _video(
    dataset: Dataset, plan: ClipPlan, wanted: Wanted, memory: ClipMemory
) -> tuple[UInt8 | None, NDArray[np.int32], UInt8 | None, UInt8 | None]:
    numbers = np.asarray(plan.frames, np.int32)
    if not wanted.video:
        return None, numbers, None, None
    if wanted.decoder == "dali":
        cut = dataset.read_video(plan.media, int(numbers[0]), int(numbers[-1]))
        return cut.data, (numbers - cut.first_frame).astype(np.int32), None, None
    height, width = int(dataset.media.height[plan.media]), int(dataset.media.width[plan.media])
    size = plane_bytes(len(numbers), height, width)
    if size > wanted.max_clip_bytes:
        raise MediaError(
            dataset.media.id(plan.media),
            "video",
            f"a clip ({len(numbers)} frames of {width}x{height} px, {size / MIB:.0f} MiB) must be at most "
            f"data.clip_memory_mib ({wanted.max_clip_bytes / MIB:.0f}); raise it, or prepare smaller pictures",
        )
    luma, chroma = memory.planes(len(numbers), height, width)
    dataset.read_frames(plan.media, numbers, (luma, chroma))
    return None, numbers, luma, chroma


def read_sound(dataset: Dataset, media: int, start: int, wanted: Wanted) -> tuple[Int16, bool]:
    """Return (num_audio_samples,) of a medium's sound, and whether any of them is not zero."""
    count = wanted.num_audio_samples
    total = int(dataset.media.num_samples[media])
    if not wanted.audio or start >= total or start + count <= 0:
        return np.zeros(count, np.int16), False
    samples = dataset.read_audio(media, start, count)
    return samples, bool(samples.any())  # nothing but zeros: put in before late sound, or a gap


def _at_once(read: Callable[[], Any]) -> Any:
    return read()


def _negative(
    dataset: Dataset, plan: ClipPlan, wanted: Wanted, attempt: Callable[[Callable[[], Any]], Any]
) -> Int16 | None:
    """Return the out-of-sync audio; None where there is none, it is silent, or it cannot be read.

    Silence is out of sync with nothing. A medium that cannot be read is quarantined where it is the clip itself,
    not where it is the negative of another clip, which is itself in order.
    """
    if plan.negative_media < 0 or not wanted.audio:
        return None
    try:
        audio, has_audio = attempt(lambda: read_sound(dataset, plan.negative_media, plan.negative_start, wanted))
    except MediaError:
        return None
    return audio if has_audio else None


class TakenBatch(NamedTuple):
    """A batch that was read: its number since the source was made, and its clips in the order of their positions."""

    number: int
    clips: list[HostClip | Unreadable]


class ClipSource(Protocol):
    """Reads batches of clips ahead, in order. Their memory is the source's: `release` gives it back."""

    def has_room(self) -> bool:
        """Whether another batch may be posted."""
        ...

    def post(self, positions: Sequence[int]) -> None:
        """Begin to read a batch."""
        ...

    def ready(self) -> int:
        """Batches that `take` would give without waiting."""
        ...

    def take(self) -> TakenBatch | None:
        """Wait for the oldest posted batch that was not taken yet; None where there is none."""
        ...

    def again(self, batch: TakenBatch, place: int, attempt: int) -> HostClip | Unreadable:
        """Read the substitute number `attempt` into place `place` of a taken batch."""
        ...

    def release(self, number: int) -> None:
        """Say that nobody reads the arrays of a taken batch any more."""
        ...

    def close(self) -> None:
        """Drop what is being read, and end threads or processes."""
        ...


def _all_read(waiting: tuple[Sequence[int], list[Future[Any]]]) -> bool:
    return all(future.done() for future in waiting[1])


def wait_for_clip(future: Future[HostClip | Unreadable], deadline_s: float) -> HostClip | Unreadable:
    """Wait for a clip that a thread reads.

    A process that was stopped and goes on (Ctrl-Z, a suspended job) judges no read by the time that it slept.

    Raises:
        ReadStalled: a read of this process does not return; with file and offset.
    """
    step_s = deadline_s / 4
    began_s = time.monotonic()
    while not wait([future], timeout=step_s).done:
        was_stopped = time.monotonic() - began_s > step_s + STOPPED_S
        stalled = "" if was_stopped else OPEN_READS.stalled(deadline_s)
        if stalled:
            raise ReadStalled(f"{stalled} (data.clip_deadline_s: {deadline_s:g})")
        began_s = time.monotonic()
    return future.result()


class SingleReader:
    """Reads clips out of turn, in a thread of its own, so that a read that never returns is told.

    Args:
        deadline_s: Longest that one read of a file may take.
    """

    def __init__(self, deadline_s: float) -> None:
        self._deadline_s = deadline_s
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="clip-reader")

    def read(self, read: Callable[[], HostClip | Unreadable]) -> HostClip | Unreadable:
        """Return what `read` returns; see `wait_for_clip`."""
        return wait_for_clip(self._pool.submit(read), self._deadline_s)

    def close(self) -> None:
        """End the thread; one whose read does not return is left behind."""
        self._pool.shutdown(wait=not OPEN_READS.stalled(self._deadline_s), cancel_futures=True)


class ThreadSource:
    """Reads clips with a pool of threads of this process.

    Args:
        dataset: Where the bytes are.
        planner: What the clips are.
        wanted: What is read of each.
        num_threads: Reading threads.
        num_batches: Batches in memory at once.
        deadline_s: Longest that one read of a file may take.
    """

    def __init__(
        self,
        dataset: Dataset,
        planner: Planner,
        wanted: Wanted,
        *,
        num_threads: int,
        num_batches: int,
        deadline_s: float = 60.0,
    ) -> None:
        self._deadline_s = deadline_s
        self._dataset, self._planner, self._wanted, self._num_batches = dataset, planner, wanted, num_batches
        self._pool = ThreadPoolExecutor(num_threads, thread_name_prefix="clip-source")
        self._reader = SingleReader(deadline_s)
        self._waiting: deque[tuple[Sequence[int], list[Future[HostClip | Unreadable]]]] = deque()
        self._positions: dict[int, Sequence[int]] = {}  # of the batches that are taken and not released
        self._taken = 0

    def has_room(self) -> bool:
        """See ClipSource."""
        return len(self._waiting) + len(self._positions) < self._num_batches

    def post(self, positions: Sequence[int]) -> None:
        """See ClipSource."""
        plans = [self._planner.at(position, 0) for position in positions]  # here: a planner is for one thread
        self._waiting.append((positions, [self._pool.submit(self._read, plan) for plan in plans]))

    def ready(self) -> int:
        """See ClipSource."""
        return sum(1 for _ in takewhile(_all_read, list(self._waiting)))

    def take(self) -> TakenBatch | None:
        """See ClipSource."""
        if not self._waiting:
            return None
        positions, futures = self._waiting.popleft()
        clips = [wait_for_clip(future, self._deadline_s) for future in futures]
        self._positions[self._taken] = positions
        self._taken += 1
        return TakenBatch(self._taken - 1, clips)

    def again(self, batch: TakenBatch, place: int, attempt: int) -> HostClip | Unreadable:
        """See ClipSource."""
        plan = self._planner.at(self._positions[batch.number][place], attempt)
        return self._reader.read(lambda: self._read(plan))

    def release(self, number: int) -> None:
        """See ClipSource."""
        del self._positions[number]

    def close(self) -> None:
        """See ClipSource."""
        self._pool.shutdown(wait=not OPEN_READS.stalled(self._deadline_s), cancel_futures=True)
        self._reader.close()

    def _read(self, plan: ClipPlan) -> HostClip | Unreadable:
        return read_clip(self._dataset, plan, self._wanted, FreshMemory())
