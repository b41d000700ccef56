"""NVDEC as a stage of `benchmarks.bottleneck`: its threads and decoders alone, on cuts that are in memory.

A clip is turned into Annex-B bytes and decoded, as in the loader; reading and sound are stages of their own. On a
machine without CUDA this stage is unmeasured; tests put FFmpeg in NVDEC's place.
"""

import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch

from pipeline.dataset import Dataset
from pipeline.media.annexb import to_annex_b
from pipeline.nvdec.decoder import StreamKind
from pipeline.nvdec.hardware import open_pool
from pipeline.nvdec.pool import DecoderPool, Decoders
from pipeline.nvdec.share import Rates
from pipeline.nvdec.source import nvdec_media

NVDEC = "NVDEC"
ROUNDS = 4  # parts of the clips that are timed apart, for an interval
DEADLINE_S = 60.0


@dataclass(frozen=True)
class Cut:
    """A clip in memory.

    Args:
        kind: of its stream.
        data: as the store has it.
        wanted: numbers of the pictures.
    """

    kind: StreamKind
    data: Any
    wanted: Any


def cuts_of(dataset: Dataset, plans: Sequence[Any], cuts: Sequence[Any]) -> list[Cut]:
    """Return plans and what was read for them as NVDEC takes them; clips that it refuses (too small) are left out."""
    table, can = dataset.media, nvdec_media(dataset)
    return [
        Cut(
            StreamKind(dataset.video_codec, int(table.width[plan.media]), int(table.height[plan.media])),
            cut.data,
            np.asarray(plan.frames) - cut.first_frame,
        )
        for plan, cut in zip(plans, cuts, strict=True)
        if can[plan.media]
    ]


def nvdec_rounds(
    cuts: Sequence[Cut],
    threads: int,
    device_id: int | None,
    open_decoders: Callable[[int, int, float], DecoderPool] = open_pool,
) -> tuple[list[float], float]:
    """Milliseconds that one thread takes for a clip, by parts of the clips, and CPU milliseconds of a clip.

    Args:
        cuts: as many as are timed; the first of them also warm up.
        threads: of the pool, as in the loader.
        device_id: CUDA device, None for a stand-in.
        open_decoders: makes the pool.
    """
    pool = open_decoders(device_id or 0, threads, DEADLINE_S)
    try:
        _decode(pool, cuts[: 2 * threads], threads, device_id)
        size = max(1, len(cuts) // ROUNDS)
        walls, cpu = [], time.process_time()
        for first in range(0, len(cuts), size):
            some = cuts[first : first + size]
            walls.append(_decode(pool, some, threads, device_id) * 1e3 * min(threads, len(some)) / len(some))
        return walls, (time.process_time() - cpu) * 1e3 / len(cuts)
    finally:
        pool.close()


def _decode(pool: DecoderPool, cuts: Sequence[Cut], threads: int, device_id: int | None) -> float:
    """Seconds for some clips, twice as many as threads in hand."""
    began, waiting = time.perf_counter(), list[Future[Any]]()
    for cut in cuts:
        if len(waiting) >= 2 * threads:
            pool.result(waiting.pop(0))
        waiting.append(pool.submit(partial(_job, cut)))
    for future in waiting:
        pool.result(future)
    if device_id is not None:
        torch.cuda.synchronize(device_id)
    return time.perf_counter() - began


def _job(cut: Cut, decoders: Decoders) -> object:
    return decoders.decode(cut.kind, to_annex_b(cut.data), cut.wanted)


def share_of(decoder: str, nvdec_ms: float, threads: int, cpu_ms: float, readers: int) -> float:
    """Share of the clips that NVDEC takes: all, or by the rates of both sides, as the loader deals them out."""
    if decoder == "nvdec":
        return 1.0
    return Rates(1e3 * threads / nvdec_ms, 1e3 * readers / cpu_ms).nvdec_share
