"""Media and annotations -> a store: transcode each file once in child processes, then fill shards in manifest order.

A killed run goes on where it was: finished files lie in `STORE.work` with a journal. The finished store depends on the
inputs and settings alone, not on the number of workers, the order of completion or interruptions.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import av

from pipeline.annotations.rows import Annotations
from pipeline.ingest.fill import assemble
from pipeline.ingest.item import IngestError, Item, StoreShape, TranscodeSettings
from pipeline.ingest.journal import Journal
from pipeline.ingest.pool import MIN_MEMORY_BYTES, Job, Pool
from pipeline.ingest.report import IngestReport
from pipeline.ingest.spans import Span, annotated_spans
from pipeline.ingest.target import check_free, inputs_digest, is_own, tidy, work_folder, write_claim
from pipeline.store.durable import BusyError, move_folder, remove_folder, take_lock

DEADLINE_S_PER_MIB = 10.0
MAX_MEMORY_GIB, MAX_WORKERS = 4096, 4096
ITEM_VERSION = 7  # part of the key of finished items: raise it when the same file gives another payload


@dataclass(frozen=True)
class IngestOptions:
    """How a run works; nothing here changes what comes out.

    Args:
        workers: child processes, 0 = one per core. memory_gib: address space of each child.
        deadline_s: wall clock per file, plus 10 s per MiB of it.
        retry_refused: try all files again that an interrupted run refused. Those refused for lack of time or memory, or
            after a crash, are tried again always.
    """

    workers: int = 0
    memory_gib: float = 2.0
    deadline_s: float = 120.0
    retry_refused: bool = False

    def __post_init__(self) -> None:
        if not 0 <= self.workers <= MAX_WORKERS:
            raise ValueError(f"workers ({self.workers}) must be 0 to {MAX_WORKERS}; 0 uses every core")
        if not MIN_MEMORY_BYTES <= self.memory_gib * 2**30 <= MAX_MEMORY_GIB * 2**30:
            low = MIN_MEMORY_BYTES / 2**30
            raise ValueError(f"memory_gib ({self.memory_gib:g}) must be {low:g} to {MAX_MEMORY_GIB}; 2 suits 4K video")
        if not 0 < self.deadline_s < math.inf:
            raise ValueError(f"deadline_s ({self.deadline_s:g}) must be seconds above 0; the default is 120")


@dataclass(frozen=True)
class Progress:
    """Passed to the callback after each file: how many are done (resumed ones too), of how many, and the file."""

    done: int
    total: int
    resumed: int
    video: str
    item: Item
    wall_s: float


def ingest(
    annotations: Annotations,
    videos: Path,
    out: Path,
    settings: TranscodeSettings | None = None,
    shape: StoreShape | None = None,
    options: IngestOptions | None = None,
    progress: Callable[[Progress], None] | None = None,
) -> IngestReport:
    """Make a store of all videos that the annotations name.

    Args:
        annotations: rows, classes and the reader's report. videos: folder that the rows' paths are relative to.
        out: store to make. settings: of the media in it. shape: of the store. progress: called after each file.

    Returns:
        The report, also written beside the store as `<out>.report.json`.

    Raises:
        IngestError: no rows, the target exists, another run works on it, or the disk is full.
        StoreError: something that is no store stands at `out`.
    """
    settings, shape, options = settings or TranscodeSettings(), shape or StoreShape(), options or IngestOptions()
    out, videos = Path(os.path.abspath(out)), Path(os.path.abspath(videos))
    if not annotations.rows:
        raise IngestError("annotations must have at least one row whose video is there; see their report")
    work = work_folder(out)
    with _locked(work):
        remove_folder(_done_folder(out))
        tidy(out)
        margin_s = max(shape.overlap_s / 2, settings.clip_s)  # what plan_windows leaves around a sample
        spans = annotated_spans(annotations.rows, margin_s)
        keys = _keys(annotations.videos, videos, settings, spans)
        inputs = inputs_digest(annotations, keys, settings, shape)
        shape = replace(shape, overwrite=shape.overwrite or is_own(out, work, inputs))
        check_free(out, work, shape.overwrite)
        with Journal(work) as journal:
            journal.forget([key for key in keys.values() if _is_tried_again(journal.items.get(key), options)])
            _transcode_all(keys, spans, videos, journal, settings, options, progress)
            report = assemble(
                annotations, keys, journal, out, settings, shape, lambda digest: write_claim(work, digest, inputs)
            )
        done = _done_folder(out)
        move_folder(work, done)  # at once: a run killed while it deletes must not look like one to go on with
        remove_folder(done)
    return report


def _is_tried_again(item: Item | None, options: IngestOptions) -> bool:
    """Whether an item that an earlier run left is done again: the limits may have been raised since."""
    return item is not None and bool(item.refused) and (item.for_resources or options.retry_refused)


def _done_folder(out: Path) -> Path:
    return out.with_name(f".{out.name}.work.done")


@contextmanager
def _locked(work: Path) -> Iterator[None]:
    """Hold the lock of a work folder; the lock goes with the process, however it ends.

    A folder with nothing but the lock in it goes at the end: anything more belongs to a run that can go on.
    """
    try:
        work.mkdir(parents=True, exist_ok=True)
        lock = take_lock(work / "lock")
    except BusyError as error:
        raise IngestError(f"{work}: must be used by one run at a time; wait for the other one") from error
    except OSError as error:
        raise IngestError(
            f"{work}: the folder beside the target must be writable ({error.strerror}); choose another target"
        ) from error
    with lock:
        try:
            yield
        finally:
            if work.exists() and [path.name for path in work.iterdir()] == ["lock"]:
                shutil.rmtree(work)


def _keys(
    names: Sequence[str], videos: Path, settings: TranscodeSettings, spans: Mapping[str, Span | None]
) -> dict[str, str]:
    """Key of each video: a digest of its name, size, time of change, span, the settings and the libraries' versions."""
    settings = replace(settings, clip_s=TranscodeSettings.clip_s)  # what is called short changes no payload
    base = json.dumps([ITEM_VERSION, settings.to_json(), av.__version__, sorted(av.library_versions.items())])
    keys = {}
    for name in names:
        try:
            status = os.stat(videos / name)
            state = [status.st_size, status.st_mtime_ns]
        except OSError:
            state = []
        keys[name] = hashlib.sha256(json.dumps([base, name, state, spans[name]]).encode()).hexdigest()[:40]
    return keys


def _transcode_all(
    keys: Mapping[str, str],
    spans: Mapping[str, Span | None],
    videos: Path,
    journal: Journal,
    settings: TranscodeSettings,
    options: IngestOptions,
    progress: Callable[[Progress], None] | None,
) -> None:
    names = list(keys)
    open_numbers = [number for number, name in enumerate(names) if keys[name] not in journal.items]
    resumed = done = len(names) - len(open_numbers)

    def jobs() -> Iterator[Job]:
        """Yield the files that are not done, in manifest order, each with its deadline."""
        for number in open_numbers:
            path = videos / names[number]
            size = path.stat().st_size if path.is_file() else 0
            yield Job(
                number,
                path,
                journal.payload(keys[names[number]]),
                options.deadline_s + DEADLINE_S_PER_MIB * size / 2**20,
                spans[names[number]],
            )

    if not open_numbers:
        return
    workers = min(options.workers or len(os.sched_getaffinity(0)), len(open_numbers))
    for result in Pool(workers, settings, int(options.memory_gib * 2**30)).run(jobs()):
        name = names[result.job.number]
        journal.add(keys[name], result.item)
        done += 1
        if progress is not None:
            progress(Progress(done, len(names), resumed, name, result.item, result.wall_s))
