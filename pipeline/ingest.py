"""Media and annotations -> a store: transcode every file once in child processes, then fill the shards in manifest order.

A killed run goes on where it was: finished files lie in `STORE.work` with a journal. The finished store depends on the
inputs and settings alone, not on the number of workers, the order of completion or interruptions.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np

from pipeline.annotations.rows import Annotations, Row
from pipeline.chunks import Span, Window, audio_range, audio_window, plan_windows, video_window
from pipeline.dataset import FLAG_REPAIRED, FLAG_SHORT, FLAG_SILENT
from pipeline.fragments import FragmentedVideo, parse_fragments
from pipeline.ingest_journal import Journal
from pipeline.ingest_pool import IngestError, Job, Pool
from pipeline.ingest_report import IngestReport
from pipeline.store_rows import AudioRef, SampleRow, VideoRef
from pipeline.store_writer import StoreWriter
from pipeline.transcode import Item, TranscodeSettings

DEADLINE_S_PER_MIB = 10.0
REPORT_NAME = "report.json"


@dataclass(frozen=True)
class IngestOptions:
    """How a run works.

    Args:
        workers: child processes, 0 = one per core. memory_gib: address space of each child.
        deadline_s: wall clock per file, plus 10 s per MiB of it.
        chunk_s, overlap_s: windows of long videos (`plan_windows`); 0 = never.
        shard_bytes: upper bound of a shard. overwrite: replace a finished store.
        retry_refused: try files again that an interrupted run refused.
    """

    workers: int = 0
    memory_gib: float = 2.0
    deadline_s: float = 120.0
    chunk_s: float = 60.0
    overlap_s: float = 12.0
    shard_bytes: int = 256 << 20
    overwrite: bool = False
    retry_refused: bool = False


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
    settings: TranscodeSettings,
    options: IngestOptions | None = None,
    progress: Callable[[Progress], None] | None = None,
) -> IngestReport:
    """Make a store of all videos that the annotations name.

    Args:
        annotations: rows, classes and the reader's report. videos: folder that the rows' paths are relative to.
        out: store to make. settings: what the store holds. progress: called after each file.

    Returns:
        The report, also written beside the store as `<out>.report.json`.

    Raises:
        IngestError: no rows, the target exists, another run works on it, or the disk is full.
    """
    options = options or IngestOptions()
    out = Path(os.path.abspath(out))
    if not annotations.rows:
        raise IngestError("annotations must have at least one row whose video is there; see their report")
    work = out.with_name(out.name + ".work")
    with _locked(work):
        if out.exists() and not (options.overwrite or (work / REPORT_NAME).exists()):
            raise IngestError(f"{out}: target must not exist; choose another path or pass --overwrite")
        with Journal(work) as journal:
            keys = _keys(annotations.videos, videos, settings)
            if options.retry_refused:
                journal.forget([key for key in keys.values() if key in journal.items and journal.items[key].refused])
            _transcode_all(keys, videos, journal, settings, options, progress)
            report = _assemble(annotations, keys, journal, out, settings, options)
        shutil.rmtree(work)
    return report


@contextmanager
def _locked(work: Path) -> Iterator[None]:
    """Hold the lock of a work folder; the lock goes with the process, however it ends."""
    work.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(work / "lock", os.O_CREAT | os.O_RDWR, 0o644)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise IngestError(f"{work}: must be used by one run at a time; wait for the other one") from error
        yield
    finally:
        os.close(descriptor)


def _keys(names: Sequence[str], videos: Path, settings: TranscodeSettings) -> dict[str, str]:
    """Key of each video: a digest of its name, size, time of change, the settings and the libraries' versions."""
    base = json.dumps([settings.to_json(), av.__version__, sorted(av.library_versions.items())])
    keys = {}
    for name in names:
        try:
            status = os.stat(videos / name)
            state = [status.st_size, status.st_mtime_ns]
        except OSError:
            state = []
        keys[name] = hashlib.sha256(json.dumps([base, name, state]).encode()).hexdigest()[:40]
    return keys


def _transcode_all(
    keys: Mapping[str, str],
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
        for number in open_numbers:
            path = videos / names[number]
            size = path.stat().st_size if path.is_file() else 0
            yield Job(
                number,
                path,
                journal.payload(keys[names[number]]),
                options.deadline_s + DEADLINE_S_PER_MIB * size / 2**20,
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


def _assemble(
    annotations: Annotations,
    keys: Mapping[str, str],
    journal: Journal,
    out: Path,
    settings: TranscodeSettings,
    options: IngestOptions,
) -> IngestReport:
    for stale in out.parent.glob(f".{out.name}.*.partial"):  # of a killed run; this one holds the lock
        shutil.rmtree(stale)
    report = IngestReport(annotations.dataset, annotations=annotations.report)
    rows_of: dict[str, list[Row]] = defaultdict(list)
    for row in annotations.rows:
        rows_of[row.video].append(row)
    writer = StoreWriter(
        out,
        video_codec=settings.codec,
        gop=settings.gop,
        short_side_px=settings.short_side_px,
        dataset=annotations.dataset,
        classes=annotations.classes,
        shard_bytes=options.shard_bytes,
        overwrite=options.overwrite or out.exists(),
    )
    try:
        placed: dict[tuple[str, str], SampleRow] = {}
        for name, key in keys.items():
            item = journal.items[key]
            report.inputs[name] = item
            if item.refused:
                report.dropped["video refused"] += len(rows_of[name])
            else:
                _add_video(writer, name, item, journal, key, rows_of[name], options, report, placed)
        if not placed:
            raise IngestError(
                "samples (0) must be at least one; every video was refused:\n" + "\n".join(report.lines())
            )
        for split in annotations.splits:
            chosen = [placed[split, r.id] for r in annotations.rows if r.split == split and (split, r.id) in placed]
            report.samples[split] = writer.add_samples(split, chosen)
        report.write(journal.folder / REPORT_NAME)
        writer.close()
    except BaseException:
        writer.abort()
        raise
    os.replace(journal.folder / REPORT_NAME, out.with_name(out.name + ".report.json"))
    return report


def _read_payload(
    name: str, item: Item, journal: Journal, key: str
) -> tuple[FragmentedVideo, np.ndarray[Any, np.dtype[np.int16]]]:
    path = journal.payload(key)
    data = path.read_bytes()
    if hashlib.sha256(data).hexdigest() != item.sha256:
        path.unlink()
        raise IngestError(f"{path}: payload of {name} must be as it was written; it is deleted, run again to redo it")
    fps = Fraction(item.fps_num, item.fps_den)
    video = parse_fragments(data[: item.mp4_bytes], fps=fps, width=item.width, height=item.height)
    if video.num_frames != item.num_frames:
        raise IngestError(f"{name}: fragments hold {video.num_frames} frames, the encoder was given {item.num_frames}")
    return video, np.frombuffer(data, "<i2", item.num_samples, item.mp4_bytes)


def _add_video(
    writer: StoreWriter,
    name: str,
    item: Item,
    journal: Journal,
    key: str,
    rows: Sequence[Row],
    options: IngestOptions,
    report: IngestReport,
    placed: dict[tuple[str, str], SampleRow],
) -> None:
    """Add one video's bytes, its media rows and its samples."""
    video, samples = _read_payload(name, item, journal, key)
    duration = float(video.num_frames / video.fps)
    kept: list[tuple[Row, Span]] = []
    for row in rows:
        start = max(row.start_s - item.origin_s, 0.0)
        end = duration if row.end_s is None else row.end_s - item.origin_s
        if start >= duration or end <= 0:
            report.dropped["lies outside its video"] += 1
            continue
        report.shortened += end > duration + float(1 / video.fps)
        kept.append((row, Span(start, min(end, duration))))
    if not kept:
        return
    windows, chosen = plan_windows(
        video.first_frames, video.num_frames, video.fps, [s for _, s in kept], options.chunk_s, options.overlap_s
    )
    numbers = _add_windows(writer, name, item, video, samples, windows, options.shard_bytes)
    report.media += len(numbers)
    for (row, span), window in zip(kept, chosen, strict=True):
        start = windows[window].start_s(video.fps)
        length = windows[window].end_s(video.fps) - start
        placed[row.split, row.id] = _sample(row, span, numbers[window], start, length, item.origin_s)


def _add_windows(
    writer: StoreWriter,
    name: str,
    item: Item,
    video: FragmentedVideo,
    samples: np.ndarray[Any, np.dtype[np.int16]],
    windows: Sequence[Window],
    shard_bytes: int,
) -> list[int]:
    flags = FLAG_SILENT * bool(item.silent) | FLAG_SHORT * item.short | FLAG_REPAIRED * bool(item.repairs)
    is_whole = len(windows) == 1 and windows[0].end_frame == video.num_frames and windows[0].first == 0
    fits = item.mp4_bytes <= shard_bytes and 2 * len(samples) <= shard_bytes
    whole = (writer.add_video(video), writer.add_audio(samples)) if fits else None
    numbers = []
    for window in windows:
        pair = _window_refs(whole, samples, window, video) if whole else _copied_window(writer, video, samples, window)
        numbers.append(
            writer.add_media(
                name if is_whole else f"{name}#{window.first_frame:07d}",
                *pair,
                display_width=item.display_width,
                display_height=item.display_height,
                source=name,
                source_start_s=item.origin_s + window.start_s(video.fps),
                source_end_s=item.origin_s + window.end_s(video.fps),
                flags=flags,
                note="; ".join((*item.repairs, *item.notes)),
            )
        )
    return numbers


def _window_refs(
    whole: tuple[VideoRef, AudioRef],
    samples: np.ndarray[Any, np.dtype[np.int16]],
    window: Window,
    video: FragmentedVideo,
) -> tuple[VideoRef, AudioRef]:
    return video_window(whole[0], window), audio_window(whole[1], samples, window, video.fps)


def _copied_window(
    writer: StoreWriter, video: FragmentedVideo, samples: np.ndarray[Any, np.dtype[np.int16]], window: Window
) -> tuple[VideoRef, AudioRef]:
    """Store a window by itself: the video does not fit into one shard, so overlaps are stored twice."""
    part = slice(window.first, window.last)
    frames = tuple(frame - window.first_frame for frame in video.first_frames[part])
    count = window.end_frame - window.first_frame
    first, end = audio_range(window, video.fps, len(samples))
    piece = replace(video, fragments=video.fragments[part], first_frames=frames, num_frames=count)
    return writer.add_video(piece), writer.add_audio(samples[first:end])


def _sample(row: Row, span: Span, media: int, start_s: float, length_s: float, origin_s: float) -> SampleRow:
    """A row in the time of its medium; timed labels outside the medium are left to the media that hold them."""
    shift = origin_s + start_s
    actions = []
    for action in row.actions:
        low, high = max(action.start_s - shift, 0.0), min(action.end_s - shift, length_s)
        if low <= high:
            actions.append(replace(action, start_s=low, end_s=high))
    key_time = None if row.key_time_s is None else min(max(row.key_time_s - shift, 0.0), length_s)
    begin = max(span.start_s - start_s, 0.0)
    return SampleRow(
        row.id, media, begin, min(span.end_s - start_s, length_s), row.labels, tuple(actions), key_time, row.boxes
    )
