"""A few threads, each with decoders that live on. A failing decoder is replaced, a hanging one ends the pool.

Whoever submits has another way to decode a clip; so the pool never repeats one. It says that it is no longer usable
when a clip misses its deadline, when the first clips fail, or when most clips of late did: a few bad videos in a row
are no reason to have the CPU decode the rest of a long run.
"""

import contextlib
import logging
import queue
import threading
import time
from collections import OrderedDict, deque
from collections.abc import Callable
from concurrent.futures import CancelledError, Future
from concurrent.futures import TimeoutError as FutureTimeoutError
from typing import Any, TypeVar

from numpy.typing import NDArray

from pipeline.media.annexb import AnnexB
from pipeline.nvdec.decoder import ClipPlanes, DecodeError, StreamDecoder, StreamKind

T = TypeVar("T")
MakeDecoder = Callable[[StreamKind], StreamDecoder]
KINDS_KEPT = 8  # decoders of one thread, by codec and size; making one takes 0.2 s
MOST_FAILURES = 3  # clips, before any was decoded
RECENT_CLIPS = 64  # of which half may fail
JOIN_S = 5.0  # for all threads together
AFTER_END_S = 1.0  # wait for a clip that is still in work when the pool has ended

log = logging.getLogger(__name__)


class Decoders:
    """The decoders of one thread, the least used one dropped first."""

    def __init__(self, make: MakeDecoder) -> None:
        self._make = make
        self._kept: OrderedDict[StreamKind, StreamDecoder] = OrderedDict()

    def decode(self, kind: StreamKind, stream: AnnexB, wanted: NDArray[Any]) -> ClipPlanes:
        """Decode a clip of any kind; see StreamDecoder. A decoder that fails is closed and forgotten."""
        decoder = self._kept.pop(kind, None)
        if decoder is None:
            while len(self._kept) >= KINDS_KEPT:
                self._kept.popitem(last=False)[1].close()
            decoder = self._make(kind)
        try:
            planes = decoder.decode(stream, wanted)
        except BaseException:
            with contextlib.suppress(Exception):  # it has failed already; what is raised is why
                decoder.close()
            raise
        self._kept[kind] = decoder
        return planes

    def close(self) -> None:
        """Close every decoder."""
        while self._kept:
            self._kept.popitem()[1].close()


class DecoderPool:
    """Runs jobs in threads that have decoders.

    Args:
        make: Makes a decoder, in the thread that uses it.
        num_threads: Threads, at least 1.
        deadline_s: Longest wait for one job.

    Attributes:
        deadline_s: As given.
    """

    def __init__(self, make: MakeDecoder, num_threads: int, *, deadline_s: float = 60.0) -> None:
        self._make, self.deadline_s = make, deadline_s
        self._jobs: queue.SimpleQueue[tuple[Future[Any], Callable[[Decoders], Any]] | None] = queue.SimpleQueue()
        self._has_failed: deque[bool] = deque(maxlen=RECENT_CLIPS)  # of the last clips, in the order of their ends
        self._why_not = ""
        self._lock = threading.Lock()
        # Daemons: a thread that hangs in the driver must not keep the process alive.
        self._threads = [
            threading.Thread(target=self._serve, name=f"nvdec-{number}", daemon=True) for number in range(num_threads)
        ]
        for thread in self._threads:
            thread.start()

    @property
    def is_usable(self) -> bool:
        """Whether jobs may be submitted."""
        return not self._why_not

    def submit(self, job: Callable[[Decoders], T]) -> "Future[T]":
        """Have a job run in one of the threads; its DecodeError counts as a failure of the pool."""
        future: Future[T] = Future()
        if self._why_not:
            future.set_exception(DecodeError(self._why_not))
        else:
            self._jobs.put((future, job))
        return future

    def result(self, future: "Future[T]") -> T:
        """Wait for a job.

        Raises:
            DecodeError: the decoder failed, the job missed the deadline, or the pool ended before it began.
        """
        try:
            return future.result(self.deadline_s if self.is_usable else min(AFTER_END_S, self.deadline_s))
        except FutureTimeoutError:
            if future.done():
                return future.result()  # just now, or the error is the job's own: storage that timed out
            self._end(f"no answer within {self.deadline_s:g} s")
            raise DecodeError(self._why_not) from None
        except CancelledError:
            raise DecodeError(self._why_not or "the pool was closed") from None

    def close(self) -> None:
        """Drop what is queued and end the threads; one that hangs is left behind."""
        self._why_not = self._why_not or "the pool was closed"
        self._drop_queued()
        for _ in self._threads:
            self._jobs.put(None)
        end = time.monotonic() + JOIN_S
        for thread in self._threads:
            thread.join(max(0.0, end - time.monotonic()))
        self._threads = []

    def _end(self, why: str) -> None:
        with self._lock:
            if self._why_not:
                return
            self._why_not = why
        log.warning("NVDEC is not used any more: %s; the CPU decodes all clips from here on", why)
        self._drop_queued()

    def _drop_queued(self) -> None:
        while True:
            try:
                item = self._jobs.get_nowait()
            except queue.Empty:
                return
            if item is not None:
                item[0].cancel()

    def _serve(self) -> None:
        decoders = Decoders(self._make)
        try:
            while (item := self._jobs.get()) is not None:
                future, job = item
                if not future.set_running_or_notify_cancel():
                    continue
                try:
                    result = job(decoders)
                except DecodeError as error:
                    self._count(error)
                    future.set_exception(error)
                except BaseException as error:
                    future.set_exception(error)
                else:
                    self._count(None)
                    future.set_result(result)
                del item, future, job
        finally:
            decoders.close()

    def _count(self, error: DecodeError | None) -> None:
        """Count a clip that was decoded (None) or failed; ends the pool where too many did."""
        with self._lock:
            self._has_failed.append(error is not None)
            clips, failures = len(self._has_failed), sum(self._has_failed)
        if error is None:
            return
        if failures == clips >= MOST_FAILURES and clips < RECENT_CLIPS:
            self._end(f"the first {failures} clips failed, the last one: {error}")
        elif 2 * failures > RECENT_CLIPS:
            self._end(f"{failures} of the last {clips} clips failed, the last one: {error}")
