"""One media file -> one item of a store: every frame decoded once, CFR fragments and PCM on one time line.

Runs in a child process (`pipeline/transcode_worker.py`); imports neither torch nor DALI.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from fractions import Fraction
from pathlib import Path
from typing import Any

import av

from pipeline.audio_track import SAMPLE_RATE_HZ, AudioTrack
from pipeline.picture import PictureConverter, Size, Turn, stored_size, turn_of
from pipeline.probe import Limits, MediaInfo, PacketScan, RefusedError, open_media, probe, scan_packets
from pipeline.retime import Rate, Retimer, choose_rate
from pipeline.store_encoder import CopySink, EncodeSink, closed_gop_check, why_not_copied

AUDIBLE_OFFSET_S = 0.05  # starts that differ by more are reported as repaired
DEFAULT_QUALITY = {"h264": 20, "vp9": 24}
_AVERROR = av.error.FFmpegError


@dataclass(frozen=True)
class TranscodeSettings:
    """What a store holds; part of the key under which finished items are found again.

    Args:
        codec: "h264" (GPU stores) or "vp9" (CPU stores). gop: frames a fragment, 1 to 16.
        short_side_px: upper bound, sources are never scaled up. quality: the encoder's rate factor, None = 20 / 24.
        max_fps: sources above it are reduced, None keeps their rate. clip_s: shorter media are called short.
        copy_fit_streams: copy streams that already have the store's form.
        min_decodable: share of the claimed duration or packets that must decode; less is refused.
        limits: on headers.
    """

    codec: str = "h264"
    gop: int = 12
    short_side_px: int = 256
    quality: int | None = None
    max_fps: str | None = None
    clip_s: float = 2.13
    copy_fit_streams: bool = True
    min_decodable: float = 0.5
    limits: Limits = field(default_factory=Limits)

    def __post_init__(self) -> None:
        if self.codec not in DEFAULT_QUALITY:
            raise ValueError(f"codec ({self.codec!r}) must be one of {sorted(DEFAULT_QUALITY)}")
        if not 1 <= self.gop <= 16:
            raise ValueError(f"gop ({self.gop}) must be 1 to 16 frames; 12 is the default")
        if not 16 <= self.short_side_px <= 4320:
            raise ValueError(f"short_side_px ({self.short_side_px}) must be 16 to 4320; 256 is the default")
        if self.max_fps is not None and not 1 <= Fraction(self.max_fps) <= 1000:
            raise ValueError(f"max_fps ({self.max_fps}) must be 1 to 1000, or none; write 30 or 30000/1001")

    def to_json(self) -> str:
        """Canonical JSON."""
        return json.dumps(asdict(self), sort_keys=True)

    @classmethod
    def from_json(cls, text: str) -> TranscodeSettings:
        """Inverse of `to_json`."""
        values = json.loads(text)
        return cls(**values | {"limits": Limits(**values["limits"])})


@dataclass(frozen=True)
class Item:
    """What became of one input file.

    Args:
        refused: reason, or empty. repairs: what was changed beyond plain transcoding. notes: what else is worth knowing.
        silent: why there is no audio, or empty. short: less than one clip long.
        num_frames, fps_num, fps_den, width, height, display_width, display_height: of the stored video.
        num_samples: of the audio. origin_s: when a player of the source shows the first frame.
        mp4_bytes: the payload file is that many bytes of fragmented MP4, then the PCM. bytes, sha256: of all of it.
        copied: the stream was not encoded again. decoded_frames: of the source.
    """

    refused: str = ""
    repairs: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    silent: str = ""
    short: bool = False
    num_frames: int = 0
    fps_num: int = 0
    fps_den: int = 1
    width: int = 0
    height: int = 0
    display_width: int = 0
    display_height: int = 0
    num_samples: int = 0
    origin_s: float = 0.0
    mp4_bytes: int = 0
    bytes: int = 0
    sha256: str = ""
    copied: bool = False
    decoded_frames: int = 0

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Item:
        """Inverse of `dataclasses.asdict` through JSON."""
        return cls(**values | {"repairs": tuple(values["repairs"]), "notes": tuple(values["notes"])})


class _NotFitError(Exception):
    """The stream looked fit for copying but is not."""


def transcode(path: str | Path, out: str | Path, settings: TranscodeSettings) -> Item:
    """Turn one media file into a payload file; `out` exists afterwards only if the file was not refused.

    Args:
        path: media file. out: payload to write; whole and flushed when this returns.

    Returns:
        The item; `refused` says why a file cannot be used.
    """
    partial = Path(f"{out}.partial")
    try:
        item = _transcode(str(path), partial, settings)
        if not item.refused:
            os.replace(partial, out)
        return item
    except RefusedError as error:
        return Item(refused=str(error))
    except MemoryError:
        return Item(refused="decoding needs more memory than the limit allows")
    finally:
        partial.unlink(missing_ok=True)


def _transcode(path: str, partial: Path, settings: TranscodeSettings) -> Item:
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
    return _Pass(info, scan, rate, partial, settings, copy=False).run()


class _Pass:
    """One pass over a file: decode all, encode or copy the video, collect the audio."""

    def __init__(
        self, info: MediaInfo, scan: PacketScan, rate: Rate, out: Path, settings: TranscodeSettings, *, copy: bool
    ) -> None:
        self.info, self.scan, self.rate, self.out, self.settings, self.copy = info, scan, rate, out, settings, copy
        self.retimer: Retimer[Any] = Retimer(rate, scan.video_time_base)
        self.audio = AudioTrack(int((settings.limits.max_duration_s + 60) * SAMPLE_RATE_HZ))
        self.turn, self.size = Turn(), Size(0, 0, 0, 0)
        self.converter: PictureConverter | None = None
        self.sink: Any = None
        self.source_size: tuple[int, int] | None = None
        self.last_duration: Fraction = Fraction(0)
        self.decoded = self.video_errors = self.audio_errors = self.not_rising = self.corrupt = self.size_changes = 0
        self.first_error = ""

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
        try:
            yield from container.demux(streams)
        except (_AVERROR, OSError) as error:
            self.first_error = self.first_error or f"file ends early: {error.strerror}"
            for stream in streams:  # what the decoders still hold
                packet = av.Packet()
                packet.stream = stream
                yield packet

    def _video(self, packet: Any) -> None:
        try:
            frames = packet.decode()
        except (_AVERROR, ValueError) as error:
            if isinstance(error, MemoryError):
                raise
            self.video_errors += 1
            self.first_error = self.first_error or str(getattr(error, "strerror", None) or error)[:120]
            frames = []
        for frame in frames:
            self._frame(frame)
        if self.copy:
            if self.video_errors or self.corrupt or self.turn:
                raise _NotFitError
            if packet.size:
                if packet.is_keyframe and not self.is_closed(bytes(packet)):
                    raise _NotFitError
                self.sink.push(packet)

    def _frame(self, frame: Any) -> None:
        self._check_size(frame)
        self.corrupt += bool(frame.is_corrupt)
        self.decoded += 1
        ticks = self._ticks(frame)
        if self.retimer.first_ticks is not None:
            if ticks <= self._last_ticks:
                self.not_rising += 1
            gap = self.retimer.gap_s(ticks)
            if gap > self.settings.limits.max_gap_s:
                raise RefusedError(
                    f"video time stamps jump by {gap:.1f} s, more than {self.settings.limits.max_gap_s:g} s"
                )
        self._last_ticks = ticks
        self._show(self.retimer.push(frame, ticks))
        self.last_duration = Fraction(frame.duration or 0)

    def _ticks(self, frame: Any) -> int:
        """Time stamp of a frame; AVI has none of its own, there the order of the packets counts."""
        ticks = frame.dts if self.info.container == "avi" or frame.pts is None else frame.pts
        if ticks is None:
            return self._last_ticks + round(1 / (self.rate.fps * self.scan.video_time_base)) if self.decoded > 1 else 0
        if frame.time_base and frame.time_base != self.scan.video_time_base:
            return round(ticks * Fraction(frame.time_base) / self.scan.video_time_base)
        return int(ticks)

    def _check_size(self, frame: Any) -> None:
        size = (frame.width, frame.height)
        limits = self.settings.limits
        if max(size) > limits.max_side_px or size[0] * size[1] > limits.max_pixels:
            raise RefusedError(f"decoded size ({size[0]}x{size[1]}) must be at most {limits.max_pixels} px")
        if self.source_size is None:
            self.turn = turn_of(frame)
            self.size = stored_size(*size, self.info.video.pixel_aspect, self.turn, self.settings.short_side_px)
            self.converter = PictureConverter(self.size, self.turn)
        elif size != self.source_size:
            self.size_changes += 1
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
        try:
            for frame in packet.decode():
                self.audio.push(frame)
        except (_AVERROR, ValueError) as error:
            if isinstance(error, MemoryError):
                raise
            self.audio_errors += 1

    def _finish_video(self) -> None:
        step = 1 / (self.rate.fps * self.scan.video_time_base)
        self._show(self.retimer.finish(step if self.rate.is_constant else self.last_duration or step))
        if self.decoded == 0:
            why = f" ({self.first_error})" if self.first_error else ""
            raise RefusedError(f"no frame of {len(self.scan.video_times)} packets decodes{why}")
        if self.copy and (
            self.decoded != self.sink.num_frames or self.retimer.slots != self.decoded or self.not_rising
        ):
            raise _NotFitError
        self.sink.finish()
        self.num_frames = self.sink.num_frames
        self.sink = None

    def _item(self) -> Item:
        fps, origin = self.rate.fps, Fraction(self.retimer.first_ticks or 0) * self.scan.video_time_base
        duration = self.num_frames / fps
        samples, begin, end = self.audio.finish(origin, round(duration * SAMPLE_RATE_HZ))
        overlaps = len(samples) > 0 and end > 0 and begin < duration
        silent = self._why_silent(len(samples) > 0, overlaps)
        repairs, notes = self._repairs(origin, duration), list(self.info.notes)
        if overlaps:
            repairs += self._audio_repairs(begin, end, duration)
        mp4_bytes = self.out.stat().st_size
        with self.out.open("ab") as file:
            if overlaps:
                file.write(samples.astype("<i2", copy=False).data)
            file.flush()
            os.fsync(file.fileno())
        with self.out.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        return Item(
            repairs=tuple(repairs),
            notes=tuple(notes + self._notes()),
            silent=silent,
            short=duration < self.settings.clip_s,
            num_frames=self.num_frames,
            fps_num=fps.numerator,
            fps_den=fps.denominator,
            **asdict(self.size),
            num_samples=len(samples) if overlaps else 0,
            origin_s=float(origin - self.info.start_s),
            mp4_bytes=mp4_bytes,
            bytes=self.out.stat().st_size,
            sha256=digest,
            copied=self.copy,
            decoded_frames=self.decoded,
        )

    def _why_silent(self, has_samples: bool, overlaps: bool) -> str:
        if self.info.audio is None:
            return "no audio stream"
        if not has_samples:
            return f"audio stream ({self.info.audio.codec}) holds no sample that decodes"
        return "" if overlaps else "audio lies outside the video's time"

    def _repairs(self, origin: Fraction, duration: Fraction) -> list[str]:
        expected, retimer, found = len(self.scan.video_times), self.retimer, []
        if self.turn:
            mirrored = ", mirrored" if self.turn.mirror else ""
            found.append(f"rotation: turned by {90 * self.turn.quarters} degrees counter-clockwise{mirrored}")
        if abs(origin) > 1 / (2 * self.rate.fps):
            found.append(f"start: video began at {float(origin):.3f} s, now at 0")
        if self.scan.cut_before:
            found.append(f"edit list: {self.scan.cut_before} frames before its start left out")
        if (retimer.repeated or retimer.dropped) and not self._is_reduced():
            changes = f"{retimer.repeated} frames repeated, {retimer.dropped} dropped"
            kind = "frames missing" if self.rate.is_constant else "variable frame rate"
            found.append(f"{kind}: now {float(self.rate.fps):.6g} fps, {changes}")
        if self.not_rising:
            found.append(f"time stamps: {self.not_rising} frames not later than the one before")
        missing = expected - self.decoded
        if missing > 0 or self.video_errors or self.corrupt:
            if self.decoded < self.settings.min_decodable * expected:
                raise RefusedError(
                    f"only {self.decoded} of {expected} frames decode ({self.first_error or 'no error'})"
                )
            why = f": {self.first_error}" if self.first_error else ""
            found.append(
                f"damaged: {max(missing, 0)} of {expected} frames do not decode, {self.corrupt} are marked bad{why}"
            )
        if self.size_changes:
            found.append(f"size: changes {self.size_changes} times, all scaled to the first")
        return found + self._truncation(duration)

    def _truncation(self, duration: Fraction) -> list[str]:
        claimed = self.info.duration_s or 0.0
        lacking = claimed - max(self.scan.end_s, float(duration))
        if lacking <= max(0.5, 0.05 * claimed):
            return [f"damaged: {self.scan.error}"] if self.scan.error else []
        text = f"truncated: {claimed - lacking:.2f} of {claimed:.2f} s are there"
        if claimed - lacking < self.settings.min_decodable * claimed:
            raise RefusedError(text)
        return [text]

    def _audio_repairs(self, begin: Fraction, end: Fraction, duration: Fraction) -> list[str]:
        found = []
        if begin > AUDIBLE_OFFSET_S:
            found.append(f"audio start: {float(begin):.3f} s after the video, silence put before it")
        if begin < -AUDIBLE_OFFSET_S:
            found.append(f"audio start: {float(-begin):.3f} s before the video, cut")
        if duration - end > max(0.5, 0.05 * float(duration)):
            found.append(f"audio end: {float(duration - end):.2f} s before the video's, silence put after it")
        if self.audio.jumps:
            found.append(f"audio time stamps: {self.audio.jumps} jumps or format changes, each part placed by its own")
        if self.audio_errors:
            found.append(f"damaged audio: {self.audio_errors} packets do not decode")
        return found

    def _is_reduced(self) -> bool:
        return self.settings.max_fps is not None and self.rate.fps == Fraction(self.settings.max_fps)

    def _notes(self) -> list[str]:
        video, found = self.info.video, []
        if self._is_reduced():
            found.append(f"reduced to at most {self.settings.max_fps} fps")
        if self.copy:
            found.append("video copied without encoding")
        if video.pixel_format not in ("yuv420p", "None"):
            found.append(f"pixel format {video.pixel_format} to yuv420p")
        return found
