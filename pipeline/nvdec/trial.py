"""How many clips a second NVDEC and the CPU decode here: measured with the run's own clips, before its first batch."""

import contextlib
import logging
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import replace
from typing import Any

from pipeline.nvdec.decoder import DecodeError
from pipeline.nvdec.pool import DecoderPool
from pipeline.nvdec.share import Rates
from pipeline.source import ClipSource

LOOK_AHEAD = 4096  # clips that are looked through for some to measure NVDEC with, 0.2 ms each
MEASURED_S = 0.4  # of each side
_MEASURED: dict[tuple[object, ...], Rates] = {}  # of this process; an evaluation begins anew again and again

log = logging.getLogger(__name__)


class Trial:
    """Has both sides decode a batch over and over.

    Args:
        cpu: The CPU's source, in which nothing is posted.
        pool: Decoders of NVDEC.
        submit: Has the clip at a position decoded by NVDEC.
        can_decode: Returns for each position whether NVDEC takes its clip.
        num_batches: Batches in memory at once.
    """

    def __init__(
        self,
        cpu: ClipSource,
        pool: DecoderPool,
        *,
        submit: Callable[[int], "Future[Any]"],
        can_decode: Callable[[Sequence[int]], list[bool]],
        num_batches: int,
    ) -> None:
        self._cpu, self._pool, self._num_batches = cpu, pool, num_batches
        self._submit, self._can_decode = submit, can_decode

    def rates(self, key: tuple[object, ...], positions: Sequence[int]) -> Rates | None:
        """Return what was measured, now or in this process before; None where there is nothing to measure with.

        Args:
            key: What rates depend on: measured once for each.
            positions: Of the first batch.
        """
        if key in _MEASURED:
            return _MEASURED[key]
        measurable = self._measurable(positions)
        if not measurable:
            log.info("decoding: none of the next %d clips is for NVDEC; if some are later, half of them", LOOK_AHEAD)
            return None
        found = self._measure(measurable)
        if self._pool.is_usable:
            _MEASURED[key] = found
        return found

    def _measurable(self, positions: Sequence[int]) -> list[int]:
        """Return as many positions as a batch has, or fewer, whose clips NVDEC takes: of this batch or of those after.

        One that it does not take would count as a failure of its decoders.
        """
        found = [position for position, can in zip(positions, self._can_decode(positions), strict=True) if can]
        for position in range(max(positions) + 1, max(positions) + 1 + LOOK_AHEAD):
            if len(found) >= len(positions):
                break
            try:
                found += [position] if self._can_decode([position])[0] else []
            except IndexError:  # an evaluation ends there
                break
        return found

    def _measure(self, positions: Sequence[int]) -> Rates:
        """Have each side decode a batch over and over, alone, then both: feeding NVDEC costs CPU time as well."""

        def rate(run: Callable[[Sequence[int]], int]) -> float:
            """Clips per second, after a round that makes decoders and fills caches."""
            run(positions)
            clips, began = 0, time.perf_counter()
            while (seconds := time.perf_counter() - began) < MEASURED_S:
                clips += run(positions)
            return clips / seconds

        nvdec, cpu = rate(self._run_nvdec), rate(self._run_cpu)
        if not self._pool.is_usable:
            return Rates(0.0, cpu)
        alone = Rates(nvdec, cpu)
        count = round(alone.nvdec_share * len(positions))
        both = rate(lambda own: self._run_nvdec(own[:count], own[count:])) if 0 < count < len(positions) else 0.0
        found = replace(alone, both_per_s=both) if self._pool.is_usable else Rates(0.0, cpu)
        log.info(
            "decoding: NVDEC %.0f clips/s, CPU %.0f, both at once %.0f; %.0f %% of each batch go to NVDEC",
            *(found.nvdec_per_s, found.cpu_per_s, found.both_per_s, 100 * found.nvdec_share),
        )
        return found

    def _run_nvdec(self, positions: Sequence[int], of_cpu: Sequence[int] = ()) -> int:
        """Decode as many batches as there may be at once; the CPU has its part meanwhile. Returns clips."""
        jobs = [self._submit(position) for position in positions for _ in range(self._num_batches)]
        done = self._run_cpu(of_cpu) if of_cpu else 0
        for job in jobs:
            with contextlib.suppress(DecodeError):
                self._pool.result(job)
        return done + len(jobs)

    def _run_cpu(self, positions: Sequence[int]) -> int:
        """Have the CPU decode as many batches as it has room for. Returns clips."""
        posted = 0
        while self._cpu.has_room():
            self._cpu.post(positions)
            posted += 1
        for _ in range(posted):
            taken = self._cpu.take()
            assert taken is not None
            self._cpu.release(taken.number)
        return posted * len(positions)
