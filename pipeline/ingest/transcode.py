"""One media file -> one item of a store: every frame decoded once, CFR fragments and PCM on one time line.

Runs in a child process (`pipeline/ingest/worker.py`); imports neither torch nor DALI.
"""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Iterator
from dataclasses import asdict
from fractions import Fraction
from pathlib import Path
from typing import Any

import av

from pipeline.ingest import findings
from pipeline.ingest.encoder import CopySink, EncodeSink, closed_gop_check, why_not_copied
from pipeline.ingest.item import DEFAULT_QUALITY, Item, TranscodeSettings
from pipeline.ingest.spans import AUDIO_LEAD_S, Part, Span, part_of
from pipeline.media.audio_track import SAMPLE_RATE_HZ, AudioTrack, drift_limit
from pipeline.media.picture import PictureConverter, Size, stored_size, turn_of
from pipeline.media.probe import MediaInfo, PacketScan, RefusedError, open_media, probe, scan_packets
from pipeline.media.retime import Rate, Retimer, choose_rate
from pipeline.store.durable import put_file
from pipeline.store.format import MAX_SIDE_PX

_AVERROR = av.error.FFmpegError


class _NotFitError(Exception):
    """The stream looked fit for copying, or a part of it for reading alone, but is not."""


def transcode(path: str | Path, out: str | Path, settings: TranscodeSettings, span: Span | None = None) -> Item:
    """Turn one media file into a payload file; `out` exists afterwards only if the file was not refused.

    Args:
        path: media file. out: payload to write; whole and flushed when this returns.
        span: seconds of the source, as annotations count them, that are needed; None = all. Ignored where the stream is
            copied as it is, and where little would be left out.

    Returns:
        The item; `refused` says why a file cannot be used.
    """
    partial = Path(f"{out}.partial")
    try:
        item = _transcode(str(path), partial, settings, span)
        if not item.refused:
            put_file(partial, Path(out))
        return item
    except RefusedError as error:
        return Item(refused=str(error))
    except MemoryError:
        return Item(refused="decoding needs more memory than the limit allows", for_resources=True)
    finally:
        partial.unlink(missing_ok=True)


def _transcode(path: str, partial: Path, settings: TranscodeSettings, span: Span | None) -> Item:
    info = probe(path, settings.limits)
    scan = scan_packets(info, settings.limits)
    max_fps = None if settings.max_fps is None else Fraction(settings.max_fps)
    rate = choose_rate(scan.video_times, scan.video_time_base, info.video.rates, max_fps)
    side = settings.short_side_px
    if settings.copy_fit_streams and not why_not_copied(info, scan, rate, codec=settings.codec, short_side_px=side):
        try:
            return _Pass(info, scan, rate, partial, settings, copy=True).run()
        except _NotFitError:
            partial.unlink(missing_ok=True)
    part = part_of(info, scan, span)
    if part is not None:
        try:
            return _Pass(info, scan, rate, partial, settings, copy=False, part=part).run()
        except _NotFitError:
            partial.unlink(missing_ok=True)
    return _Pass(info, scan, rate, partial, settings, copy=False).run()


class _Pass:
    """One pass over a file: decode all, encode or copy the video, collect the audio."""

    def __init__(
        self,
        info: MediaInfo,
        scan: PacketScan,
        rate: Rate,
        out: Path,
        settings: TranscodeSettings,
        *,
        copy: bool,
        part: Part | None = None,
    ) -> None:
        self.part, self.begun = part, part is None or part.first_key is None
        self.info, self.scan, self.rate, self.out, self.settings, self.copy = info, scan, rate, out, settings, copy
        self.retimer: Retimer[Any] = Retimer(rate, scan.video_time_base)
        moved_s = scan.video_time_base if rate.is_constant or rate.has_holes else 1 / (2 * rate.fps)
        max_samples = int((settings.limits.max_duration_s + 60) * SAMPLE_RATE_HZ)
        self.audio = AudioTrack(max_samples, drift_limit(rate.fps, moved_s))
        self.size = Size(0, 0, 0, 0)
        self.converter: PictureConverter | None = None
        self.sink: Any = None
        self.source_size: tuple[int, int] | None = None
        self.last_duration: Fraction = Fraction(0)
        self.last_ticks = self.latest_ticks = 0
        self.tally = findings.Tally()

    def run(self) -> Item:
        """Do the pass; raises RefusedError."""
        with open_media(self.info.path) as container:
            streams = self._streams(container)
            try:
                for packet in self._packets(container, streams):
                    if packet.stream.index == self.info.video.index:
                        self._video(packet)
                    else:
                        self._audio(packet)
                self._finish_video()
            finally:
                if self.sink is not None:
                    self.sink.__exit__(RuntimeError, None, None)
        return self._item()

    def _streams(self, container: Any) -> list[Any]:
        video = container.streams[self.info.video.index]
        video.codec_context.thread_count = 1
        video.codec_context.options = {"max_pixels": str(self.settings.limits.max_pixels)}
        if self.copy:
            self.sink = CopySink(self.out, source=video, fps=self.rate.fps)
            self.is_closed = closed_gop_check(self.settings.codec, video.codec_context.extradata)
        if self.info.audio is None:
            return [video]
        audio = container.streams[self.info.audio.index]
        audio.codec_context.thread_count = 1
        return [video, audio]

    def _packets(self, container: Any, streams: list[Any]) -> Iterator[Any]:
        over: set[int] = set()
        try:
            for packet in container.demux(streams):
                yield packet
                if self.part is not None and self.part.is_over(packet):
                    over.add(packet.stream_index)
                    if len(over) == len(streams):
                        break
            else:
                return
        except (_AVERROR, OSError) as error:
            if isinstance(error, MemoryError):
                raise
            self.tally.first_error = self.tally.first_error or f"file ends early: {error.strerror}"
        for stream in streams:  # what the decoders still hold
            packet = av.Packet()
            packet.stream = stream
            yield packet

    def _video(self, packet: Any) -> None:
        if self.part is not None and packet.size:
            if not self.begun:
                ticks = packet.dts if packet.pts is None else packet.pts
                assert self.part.first_key is not None
                self.begun = packet.is_keyframe and ticks is not None and ticks >= self.part.first_key
            if not self.begun or self.part.is_over(packet):
                return
        try:
            frames = packet.decode()
        except (_AVERROR, ValueError) as error:
            if isinstance(error, MemoryError):
                raise
            self.tally.video_errors += 1
            self.tally.first_error = self.tally.first_error or str(getattr(error, "strerror", None) or error)[:120]
            frames = []
        for frame in frames:
            self._frame(frame)
        if self.copy:
            if self.tally.video_errors or self.tally.corrupt or self.tally.turn:
                raise _NotFitError
            if packet.size:
                if packet.is_keyframe and not self.is_closed(bytes(packet)):
                    raise _NotFitError
                self.sink.push(packet)

    def _frame(self, frame: Any) -> None:
        if self.part is not None and not self.part.low <= self._ticks(frame) < self.part.high:
            return
        if self.part is not None and self.tally.decoded == 0 and self._ticks(frame) > self.part.low:
            raise _NotFitError  # the decoder withheld its first frames (recovery points): only the whole has them
        self._check_size(frame)
        self.tally.corrupt += bool(frame.is_corrupt)
        self.tally.decoded += 1
        ticks = self._ticks(frame)
        if self.retimer.first_ticks is not None:
            behind = self.latest_ticks - ticks
            self.tally.not_rising += behind >= 0
            self.tally.far_behind += behind * self.scan.video_time_base >= findings.FAR_BEHIND_S
            gap = self.retimer.gap_s(ticks)
            if gap > self.settings.limits.max_gap_s:
                raise RefusedError(
                    f"video time stamps jump by {gap:.1f} s, more than {self.settings.limits.max_gap_s:g} s"
                )
        self.last_ticks = ticks
        self.latest_ticks = ticks if self.tally.decoded == 1 else max(ticks, self.latest_ticks)
        self._show(self.retimer.push(frame, ticks))
        self.last_duration = Fraction(frame.duration or 0)

    def _ticks(self, frame: Any) -> int:
        """Time stamp of a frame; AVI has none of its own, there the order of the packets counts."""
        ticks = frame.dts if self.info.container == "avi" or frame.pts is None else frame.pts
        if ticks is None:
            return (
                self.last_ticks + round(1 / (self.rate.fps * self.scan.video_time_base))
                if self.tally.decoded > 1
                else 0
            )
        if frame.time_base and frame.time_base != self.scan.video_time_base:
            return round(ticks * Fraction(frame.time_base) / self.scan.video_time_base)
        return int(ticks)

    def _check_size(self, frame: Any) -> None:
        size = (frame.width, frame.height)
        limits = self.settings.limits
        if max(size) > limits.max_side_px or size[0] * size[1] > limits.max_pixels:
            raise RefusedError(f"decoded size ({size[0]}x{size[1]}) must be at most {limits.max_pixels} px")
        if self.source_size is None:
            self.tally.turn = turn_of(frame)
            self.size = stored_size(*size, self.info.video.pixel_aspect, self.tally.turn, self.settings.short_side_px)
            if max(self.size.display_width, self.size.display_height) > MAX_SIDE_PX:
                shown = f"{self.size.display_width}x{self.size.display_height}"
                raise RefusedError(f"display size ({shown}) must be at most {MAX_SIDE_PX} px a side")
            self.converter = PictureConverter(self.size, self.tally.turn)
        elif size != self.source_size:
            self.tally.size_changes += 1
        self.source_size = size

    def _show(self, shown: tuple[Any, int] | None) -> None:
        if shown is None or self.copy:
            return
        if self.retimer.slots > self.settings.limits.max_duration_s * self.rate.fps:
            raise RefusedError(f"video is longer than {self.settings.limits.max_duration_s:g} s")
        if self.sink is None:
            settings = self.settings
            quality = DEFAULT_QUALITY[settings.codec] if settings.quality is None else settings.quality
            self.sink = EncodeSink(
                self.out, size=self.size, fps=self.rate.fps, codec=settings.codec, gop=settings.gop, quality=quality
            )
        assert self.converter is not None
        frame, times = shown
        self.sink.push(self.converter.convert(frame), times)

    def _audio(self, packet: Any) -> None:
        if self.part is not None and packet.size and not self.part.needs(packet, AUDIO_LEAD_S):
            return
        with self._audio_errors_counted():
            for frame in packet.decode():
                self.audio.push(frame)

    @contextlib.contextmanager
    def _audio_errors_counted(self) -> Iterator[None]:
        try:
            yield
        except (_AVERROR, ValueError) as error:
            if isinstance(error, MemoryError):
                raise
            self.tally.audio_errors += 1

    def _finish_video(self) -> None:
        step = 1 / (self.rate.fps * self.scan.video_time_base)
        self._show(self.retimer.finish(step if self.rate.is_constant else self.last_duration or step))
        if self.tally.decoded == 0:
            why = f" ({self.tally.first_error})" if self.tally.first_error else ""
            raise RefusedError(f"no frame of {len(self.scan.video_times)} packets decodes{why}")
        if self.copy and (
            self.tally.decoded != self.sink.num_frames
            or self.retimer.slots != self.tally.decoded
            or self.tally.not_rising
        ):
            raise _NotFitError
        self.sink.finish()
        self.num_frames = self.sink.num_frames
        self.tally.repeated, self.tally.dropped = self.retimer.repeated, self.retimer.dropped
        self.sink = None

    def _item(self) -> Item:
        fps, origin = self.rate.fps, Fraction(self.retimer.first_ticks or 0) * self.scan.video_time_base
        duration = self.num_frames / fps
        with self._audio_errors_counted():
            self.audio.flush()
        audio = self.audio.place(origin, round(duration * SAMPLE_RATE_HZ))
        silent = self._why_silent(audio.begin_s < audio.end_s, audio.num_samples > 0)
        scan, begun_at, heard_from = self.scan, origin, audio.begin_s
        if self.part is not None:  # what lies outside the part is no fault of the source
            scan, begun_at = self.part.of(scan), Fraction(int(scan.video_times[0])) * scan.video_time_base
            heard_from = max(heard_from, Fraction(0))
        repairs = findings.video_repairs(self.info, scan, self.settings, self.rate, self.tally, begun_at)
        repairs += findings.truncation(self.info, self.scan, self.settings, duration)
        if audio.num_samples:
            repairs += findings.audio_repairs(self.audio, self.tally, heard_from, audio.end_s, duration)
        notes = findings.notes(self.info, self.settings, self.rate, copied=self.copy)
        left_out_s = 0.0
        if self.part is not None:
            start_s, times = float(origin - self.info.start_s), self.scan.video_times
            whole_s = int(times[-1] - times[0]) * self.scan.video_time_base + 1 / fps
            left_out_s = max(float(whole_s - duration), 0.0)
            notes.append(f"only {start_s:.2f} to {start_s + float(duration):.2f} s read, the rest is not annotated")
        mp4_bytes = self.out.stat().st_size
        with self.out.open("r+b") as file:
            audio.write(file, mp4_bytes)
        with self.out.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        return Item(
            repairs=tuple(repairs),
            notes=tuple(notes),
            silent=silent,
            short=duration < self.settings.clip_s,
            num_frames=self.num_frames,
            fps_num=fps.numerator,
            fps_den=fps.denominator,
            **asdict(self.size),
            num_samples=audio.num_samples,
            first_sample=audio.first_sample,
            origin_s=float(origin - self.info.start_s),
            mp4_bytes=mp4_bytes,
            bytes=self.out.stat().st_size,
            sha256=digest,
            copied=self.copy,
            decoded_frames=self.tally.decoded,
            left_out_s=left_out_s,
        )

    def _why_silent(self, has_samples: bool, overlaps: bool) -> str:
        if self.info.audio is None:
            return "no audio stream"
        if not has_samples and self.part is not None:
            return "no sound in the annotated part"
        if not has_samples:
            return f"audio stream ({self.info.audio.codec}) holds no sample that decodes"
        return "" if overlaps else "audio lies outside the video's time"
