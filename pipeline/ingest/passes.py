"""The two streams of one pass over a source: packets are decoded, checked and counted, and handed on."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import av

from pipeline.ingest.encoder import VideoOutput
from pipeline.ingest.findings import Tally
from pipeline.ingest.item import TranscodeSettings
from pipeline.ingest.source import Source
from pipeline.ingest.spans import AUDIO_LEAD_S, Part
from pipeline.ingest.timeline import Timeline
from pipeline.media.audio_track import SAMPLE_RATE_HZ, AudioTrack
from pipeline.media.picture import Size, stored_size, turn_of
from pipeline.media.probe import RefusedError
from pipeline.store.format import MAX_SIDE_PX

_AVERROR = av.error.FFmpegError


class FrameSizes:
    """Sizes of decoded frames, checked against the limits; the first one decides how the stored picture looks."""

    def __init__(self, source: Source, settings: TranscodeSettings, tally: Tally) -> None:
        self._aspect, self._settings, self._tally = source.info.video.pixel_aspect, settings, tally
        self._last: tuple[int, int] | None = None
        self.stored = Size(0, 0, 0, 0)

    def check(self, frame: Any) -> bool:
        """Check a frame and count changes; returns whether it is the first one. Raises RefusedError."""
        size, limits = (frame.width, frame.height), self._settings.limits
        if max(size) > limits.max_side_px or size[0] * size[1] > limits.max_pixels:
            raise RefusedError(f"decoded size ({size[0]}x{size[1]}) must be at most {limits.max_pixels} px")
        is_first = self._last is None
        if is_first:
            self._tally.turn = turn_of(frame)
            self.stored = stored_size(*size, self._aspect, self._tally.turn, self._settings.short_side_px)
            wide, high = self.stored.display_width, self.stored.display_height
            if max(wide, high) > MAX_SIDE_PX:
                raise RefusedError(f"display size ({wide}x{high}) must be at most {MAX_SIDE_PX} px a side")
        elif size != self._last:
            self._tally.size_changes += 1
        self._last = size
        return is_first


class VideoPass:
    """Decodes the video stream and hands frames and packets to an output.

    Args:
        part: decode only this part; None = all. output: takes them. tally: counts what is wrong with them.
    """

    def __init__(
        self, source: Source, settings: TranscodeSettings, part: Part | None, output: VideoOutput, tally: Tally
    ) -> None:
        self._source, self._part, self._output, self._tally = source, part, output, tally
        self._waits_for_key = part is not None and part.first_key is not None
        self.timeline = Timeline(source, settings.limits.max_gap_s, tally)
        self.sizes = FrameSizes(source, settings, tally)

    def take(self, packet: Any) -> bool:
        """Decode one packet; returns False where another pass has to be made, in another way. Raises RefusedError."""
        if self._part is not None and packet.size and not self._is_wanted(packet, self._part):
            return True
        return all(self._take_frame(frame) for frame in self._decode(packet)) and self._output.take(packet, self._tally)

    def finish(self) -> bool:
        """End the stream when all packets are taken; returns False as `take`. Raises RefusedError."""
        self._show(self.timeline.finish())
        if self._tally.decoded == 0:
            why = f" ({self._tally.first_error})" if self._tally.first_error else ""
            raise RefusedError(f"no frame of {len(self._source.scan.video_times)} packets decodes{why}")
        if not self._output.is_fit(self.timeline.num_frames, self._tally):
            return False
        self._output.finish()
        return True

    def _is_wanted(self, packet: Any, part: Part) -> bool:
        if self._waits_for_key and part.first_key is not None:
            ticks = packet.dts if packet.pts is None else packet.pts
            self._waits_for_key = not (packet.is_keyframe and ticks is not None and ticks >= part.first_key)
        return not self._waits_for_key and not part.is_over(packet)

    def _decode(self, packet: Any) -> list[Any]:
        try:
            frames: list[Any] = packet.decode()
        except (_AVERROR, ValueError) as error:
            if isinstance(error, MemoryError):
                raise
            self._tally.video_errors += 1
            self.timeline.skip()
            self._tally.note_error(str(getattr(error, "strerror", None) or error)[:120])
            return []
        return frames

    def _take_frame(self, frame: Any) -> bool:
        ticks = self.timeline.ticks(frame)
        if self._part is not None:
            if not self._part.low <= ticks < self._part.high:
                return True
            if not self.timeline.has_begun and ticks > self._part.low:
                return False  # the decoder withheld its first frames (recovery points): only the whole has them
        if self.sizes.check(frame):
            self._output.begin(self.sizes.stored, self._tally.turn)
        self._tally.corrupt += bool(frame.is_corrupt)
        self._tally.decoded += 1
        self._show(self.timeline.push(frame, ticks))
        return True

    def _show(self, shown: tuple[Any, int] | None) -> None:
        if shown is not None:
            self._output.show(*shown)


class AudioPass:
    """Decodes the audio stream, or what a part of it needs, into a track."""

    def __init__(self, source: Source, settings: TranscodeSettings, part: Part | None, tally: Tally) -> None:
        self._part, self._tally = part, tally
        max_samples = int((settings.limits.max_duration_s + 60) * SAMPLE_RATE_HZ)
        self.track = AudioTrack(max_samples, source.max_drift_s)

    def take(self, packet: Any) -> None:
        """Decode one packet."""
        if self._part is not None and packet.size and not self._part.needs(packet, AUDIO_LEAD_S):
            return
        with self._errors_counted():
            for frame in packet.decode():
                self.track.push(frame)

    def finish(self) -> None:
        """End the track when all packets are taken."""
        with self._errors_counted():
            self.track.flush()

    @contextlib.contextmanager
    def _errors_counted(self) -> Iterator[None]:
        try:
            yield
        except (_AVERROR, ValueError) as error:
            if isinstance(error, MemoryError):
                raise
            self._tally.audio_errors += 1
