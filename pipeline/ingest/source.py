"""A media file as every pass over it begins: header, time stamps, rate; and its packets, whole or a part of them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import av

from pipeline.ingest.findings import Tally
from pipeline.ingest.item import TranscodeSettings
from pipeline.ingest.spans import Part
from pipeline.media.audio_track import drift_limit
from pipeline.media.packets import PacketScan, look
from pipeline.media.probe import MediaInfo
from pipeline.media.retime import Rate, choose_rate


@dataclass(frozen=True)
class Source:
    """What is known of a file before anything is decoded: header, time stamps of its packets, rate of the output."""

    info: MediaInfo
    scan: PacketScan
    rate: Rate

    @classmethod
    def of(cls, path: str, settings: TranscodeSettings) -> Source:
        """Read header and packets; raises RefusedError."""
        info, scan = look(path, settings.limits)
        max_fps = None if settings.max_fps is None else Fraction(settings.max_fps)
        rate = choose_rate(scan.video_times, scan.video_time_base, info.video.rates, max_fps, scan.last_ticks)
        return cls(info, scan, rate)

    @property
    def frame_ticks(self) -> Fraction:
        """Length of a frame of the output in ticks of the video stream."""
        return 1 / (self.rate.fps * self.scan.video_time_base)

    @property
    def max_drift_s(self) -> Fraction:
        """By how much sound may leave its time stamps."""
        is_on_grid = self.rate.is_constant or self.rate.has_holes
        return drift_limit(self.rate.fps, self.scan.video_time_base if is_on_grid else 1 / (2 * self.rate.fps))

    def streams(self, container: Any, settings: TranscodeSettings) -> list[Any]:
        """The chosen streams of an opened file, video first, with their decoders bounded."""
        video = container.streams[self.info.video.index]
        video.codec_context.thread_count = 1
        video.codec_context.options = {"max_pixels": str(settings.limits.max_pixels)}
        if self.info.audio is None:
            return [video]
        audio = container.streams[self.info.audio.index]
        audio.codec_context.thread_count = 1
        return [video, audio]


def packets(container: Any, streams: list[Any], part: Part | None, tally: Tally) -> Iterator[Any]:
    """Yield the packets of the streams, and at the end an empty one for each, which empties its decoder.

    A file that cannot be read to its end ends early, which `tally` notes; a part ends when all streams are behind it.
    """
    over: set[int] = set()
    try:
        for packet in container.demux(streams):
            yield packet
            if part is not None and part.is_over(packet):
                over.add(packet.stream_index)
                if len(over) == len(streams):
                    break
        else:
            return  # read to the end: the empty packets came from the file
    except (av.error.FFmpegError, OSError) as error:
        if isinstance(error, MemoryError):
            raise
        tally.note_error(f"file ends early: {error.strerror}")
    for stream in streams:
        packet = av.Packet()
        packet.stream = stream
        yield packet
