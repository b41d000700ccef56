"""Finished items -> a store: bytes in manifest order, windows on long videos, samples in the time of their medium."""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from fractions import Fraction
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from pipeline.annotations.rows import Annotations, Row
from pipeline.dataset import FLAG_REPAIRED, FLAG_SHORT, FLAG_SILENT
from pipeline.ingest.chunks import Span, Window, audio_range, audio_window, plan_windows, video_window
from pipeline.ingest.item import IngestError, Item, StoreShape, TranscodeSettings
from pipeline.ingest.journal import Journal
from pipeline.ingest.report import IngestReport
from pipeline.ingest.target import check_room
from pipeline.media.fragments import FragmentedVideo, parse_fragments
from pipeline.store.rows import AudioRef, SampleRow, VideoRef
from pipeline.store.writer import StoreWriter

REPORT_NAME = "report.json"
REFUSED = "video refused"  # why samples were left out


def assemble(
    annotations: Annotations,
    keys: Mapping[str, str],
    journal: Journal,
    out: Path,
    settings: TranscodeSettings,
    shape: StoreShape,
    announce: Callable[[str], None] | None = None,
) -> IngestReport:
    """Write the store and its report.

    Args:
        annotations: rows and classes. keys: video -> key of its item in the journal, in manifest order.
        announce: called with the SHA-256 (hex) of store.json just before the store gets its name.

    Raises:
        IngestError: every video was refused, a payload changed on the disk, or the store does not fit on the disk.
    """
    check_room(out, sum(journal.items[key].bytes for key in keys.values()), journal.folder)
    report = IngestReport(annotations.dataset, annotations=annotations.report)
    try:
        writer = StoreWriter(
            out,
            video_codec=settings.codec,
            gop=settings.frames_per_fragment,
            short_side_px=settings.short_side_px,
            dataset=annotations.dataset,
            classes=annotations.classes,
            encoding=settings.encoding,
            shard_bytes=shape.shard_bytes,
            overwrite=shape.overwrite,
        )
        try:
            _Assembly(writer, journal, shape, report, settings.clip_s).fill(annotations, keys)
            report.write(journal.folder / REPORT_NAME)
            writer.close(announce)
        except BaseException:
            writer.abort()
            raise
        report.write(out.with_name(f"{out.name}.{REPORT_NAME}"))
    except OSError as error:
        raise IngestError(
            f"{out}: store must be writable to its end ({error.strerror}); make room and give write permission there, "
            f"then run the same command again: finished files stay in {journal.folder}"
        ) from error
    return report


class _Assembly:
    def __init__(
        self, writer: StoreWriter, journal: Journal, shape: StoreShape, report: IngestReport, clip_s: float
    ) -> None:
        self.writer, self.journal, self.shape, self.report, self.clip_s = writer, journal, shape, report, clip_s
        self.placed: dict[tuple[str, str], SampleRow] = {}

    def fill(self, annotations: Annotations, keys: Mapping[str, str]) -> None:
        """Add every video and its samples, in manifest order. Raises IngestError if no sample is left."""
        rows_of: dict[str, list[Row]] = defaultdict(list)
        for row in annotations.rows:
            rows_of[row.video].append(row)
        for name, key in keys.items():
            item = self.journal.items[key]
            if item.refused:
                self.report.dropped[REFUSED] += len(rows_of[name])
            else:  # what counts as short may have changed since the file was done
                item = replace(item, short=item.num_frames * item.fps_den < self.clip_s * item.fps_num)
                item = self._add(name, key, item, rows_of[name])
            self.report.inputs[name] = item
        if not self.placed:
            text = "\n".join(self.report.lines())
            raise IngestError(f"samples (0) must be at least one; see why every video or sample was left out:\n{text}")
        for split in annotations.splits:
            chosen = [
                self.placed[split, r.id] for r in annotations.rows if (split, r.id) in self.placed and r.split == split
            ]
            self.report.samples[split] = self.writer.add_samples(split, chosen)

    def _add(self, name: str, key: str, item: Item, rows: Sequence[Row]) -> Item:
        """Add one video's bytes, its media rows and its samples; returns the item, refused if it is too large."""
        video, samples = self._payload(name, key, item)
        duration = float(video.num_frames / video.fps)
        kept: list[tuple[Row, Span]] = []
        for row in rows:
            start = max(row.start_s - item.origin_s, 0.0)
            end = duration if row.end_s is None else row.end_s - item.origin_s
            if start >= duration or end <= 0:
                self.report.dropped["lies outside its video"] += 1
                continue
            if row.key_time_s is not None and not _has_frame_at(video, row.key_time_s - item.origin_s):
                self.report.dropped["key frame lies outside its video"] += 1
                continue
            kept.append((row, Span(start, end)))
        if not kept:
            return item
        spans, shape = [Span(span.start_s, min(span.end_s, duration)) for _, span in kept], self.shape
        windows, chosen = plan_windows(
            video.first_frames, video.num_frames, video.fps, spans, shape.chunk_s, shape.overlap_s, self.clip_s
        )
        largest = max(_largest_piece(video, samples, window, item.first_sample) for window in windows)
        if largest > shape.shard_bytes:
            self.report.dropped[REFUSED] += len(kept)
            return replace(
                item,
                refused=f"too long for a shard: {largest / 2**20:.1f} MiB in one piece, more than "
                f"{shape.shard_bytes / 2**20:g} MiB; raise --shard-mib, or cut the video or its samples",
            )
        for row, span in kept:
            self.report.shortened += span.end_s > duration + float(1 / video.fps)
            self.report.labels_outside += sum(
                action.start_s - item.origin_s > duration or action.end_s < item.origin_s for action in row.actions
            )
        numbers = self._add_windows(name, item, video, samples, windows)
        self.report.media += len(numbers)
        for (row, _), span, place in zip(kept, spans, chosen, strict=True):
            start, end = windows[place].start_s(video.fps), windows[place].end_s(video.fps)
            self.placed[row.split, row.id] = _sample(row, span, numbers[place], start, end - start, item.origin_s)
        return item

    def _payload(self, name: str, key: str, item: Item) -> tuple[FragmentedVideo, NDArray[np.int16]]:
        path = self.journal.payload(key)
        data = path.read_bytes()
        if hashlib.sha256(data).hexdigest() != item.sha256:
            path.unlink()
            raise IngestError(f"{path}: payload of {name} must be as written; it is deleted, run again to redo it")
        fps = Fraction(item.fps_num, item.fps_den)
        video = parse_fragments(data[: item.mp4_bytes], fps=fps, width=item.width, height=item.height)
        if video.num_frames != item.num_frames:
            raise IngestError(f"{name}: fragments hold {video.num_frames} frames, {item.num_frames} were encoded")
        return video, np.frombuffer(data, "<i2", item.num_samples, item.mp4_bytes)

    def _add_windows(
        self,
        name: str,
        item: Item,
        video: FragmentedVideo,
        samples: NDArray[np.int16],
        windows: Sequence[Window],
    ) -> list[int]:
        flags = FLAG_SILENT * bool(item.silent) | FLAG_SHORT * item.short | FLAG_REPAIRED * bool(item.repairs)
        fits = item.mp4_bytes <= self.shape.shard_bytes and samples.nbytes <= self.shape.shard_bytes
        whole = (self.writer.add_video(video), self.writer.add_audio(samples)) if fits else None
        numbers = []
        for window in windows:
            if whole:
                refs = (
                    video_window(whole[0], window),
                    audio_window(whole[1], samples, window, video.fps, item.first_sample),
                )
            else:
                refs = self._copied(video, samples, window, item.first_sample)
            is_whole = window.end_frame - window.first_frame == video.num_frames
            numbers.append(
                self.writer.add_media(
                    name if is_whole else f"{name}#{window.first_frame:07d}-{window.end_frame:07d}",
                    *refs,
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

    def _copied(
        self, video: FragmentedVideo, samples: NDArray[np.int16], window: Window, first_sample: int
    ) -> tuple[VideoRef, AudioRef]:
        """Store a window by itself: the video does not fit into one shard, so overlaps are stored twice."""
        part = slice(window.first, window.last)
        frames = tuple(frame - window.first_frame for frame in video.first_frames[part])
        count = window.end_frame - window.first_frame
        first, end = audio_range(window, video.fps, len(samples), first_sample)
        piece = replace(video, fragments=video.fragments[part], first_frames=frames, num_frames=count)
        return self.writer.add_video(piece), self.writer.add_audio(samples[first:end])


def _largest_piece(video: FragmentedVideo, samples: NDArray[np.int16], window: Window, first_sample: int) -> int:
    """Bytes of the larger one of a window's streams, stored by itself."""
    first, end = audio_range(window, video.fps, len(samples), first_sample)
    pictures = len(video.init) + sum(len(piece) for piece in video.fragments[window.first : window.last])
    return max(pictures, (end - first) * samples.itemsize)


def _has_frame_at(video: FragmentedVideo, time_s: float) -> bool:
    """Whether a frame is shown then; half a frame early is the first one (time stamps are rounded)."""
    return -0.5 <= time_s * float(video.fps) < video.num_frames


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
    end = max(min(span.end_s - start_s, length_s), begin)
    return SampleRow(row.id, media, begin, end, row.labels, tuple(actions), key_time, row.boxes)
