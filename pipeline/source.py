"""Plans to host buffers: cut bytes or decoded frames, and PCM. The only code that touches files while training."""

from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from pipeline.clip import ClipPlan
from pipeline.dataset import Dataset, Decoder, MediaError


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


class ClipSource:
    """Reads clips of a split with a pool of threads, a bounded number of batches ahead.

    Args:
        dataset: Where the bytes are.
        num_audio_samples: Length of the audio window.
        decoder: "cpu": decode frames here; "dali": hand encoded cuts to the graph.
        want_video: Whether the model takes frames.
        want_audio: Whether it takes sound.
        num_threads: Reading threads.
    """

    def __init__(
        self,
        dataset: Dataset,
        *,
        num_audio_samples: int,
        decoder: Decoder,
        want_video: bool = True,
        want_audio: bool = True,
        num_threads: int = 4,
    ) -> None:
        self.dataset, self.num_audio_samples = dataset, num_audio_samples
        self.decoder, self.want_video, self.want_audio = decoder, want_video, want_audio
        self._pool = ThreadPoolExecutor(num_threads, thread_name_prefix="clip-source")

    def read(self, plan: ClipPlan) -> HostClip | Unreadable:
        """Read one clip; media that cannot be read come back as `Unreadable`, other errors are raised."""
        try:
            encoded, frames, luma, chroma = self._video(plan)
            audio, has_audio = self._audio(plan.media, plan.audio_start)
        except MediaError as error:
            return Unreadable(plan, str(error))
        return HostClip(plan, encoded, frames, luma, chroma, audio, has_audio, self._negative(plan))

    def _negative(self, plan: ClipPlan) -> NDArray[np.int16] | None:
        """Return the out-of-sync audio; None where there is none, it is silent, or it cannot be read.

        Silence is out of sync with nothing. A medium that cannot be read is quarantined where it is the clip itself,
        not where it is the negative of another clip, which is itself in order.
        """
        if plan.negative_media < 0 or not self.want_audio:
            return None
        try:
            audio, has_audio = self._audio(plan.negative_media, plan.negative_start)
        except MediaError:
            return None
        return audio if has_audio else None

    def read_ahead(
        self, batches: Iterable[list[ClipPlan]], num_batches_ahead: int
    ) -> Iterator[list[HostClip | Unreadable]]:
        """Yield the clips of each batch in order while the pool reads the following batches."""
        waiting: deque[list[Future[HostClip | Unreadable]]] = deque()
        for plans in batches:
            waiting.append([self._pool.submit(self.read, plan) for plan in plans])
            if len(waiting) > num_batches_ahead:
                yield [future.result() for future in waiting.popleft()]
        while waiting:
            yield [future.result() for future in waiting.popleft()]

    def close(self) -> None:
        """Drop what is queued and end the threads."""
        self._pool.shutdown(wait=True, cancel_futures=True)

    def _video(
        self, plan: ClipPlan
    ) -> tuple[NDArray[np.uint8] | None, NDArray[np.int32], NDArray[np.uint8] | None, NDArray[np.uint8] | None]:
        numbers = np.asarray(plan.frames, np.int32)
        if not self.want_video:
            return None, numbers, None, None
        if self.decoder == "cpu":
            luma, chroma = self.dataset.read_frames(plan.media, numbers)
            return None, numbers, luma, chroma
        cut = self.dataset.read_video(plan.media, int(numbers[0]), int(numbers[-1]))
        return cut.data, (numbers - cut.first_frame).astype(np.int32), None, None

    def _audio(self, media: int, start: int) -> tuple[NDArray[np.int16], bool]:
        count = self.num_audio_samples
        total = int(self.dataset.media.num_samples[media])
        if not self.want_audio or start >= total or start + count <= 0:
            return np.zeros(count, np.int16), False
        samples = self.dataset.read_audio(media, start, count)
        return samples, bool(samples.any())  # nothing but zeros: put in before late sound, or a gap
