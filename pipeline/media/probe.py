"""What a media file says about itself, checked against limits before a decoder allocates anything.

Only the `file:` protocol and a list of containers are allowed, so that a play list named `.mp4` cannot make the reader
open another file or the network.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
from numpy.typing import NDArray

CONTAINERS = "mov,matroska,avi,mpegts,mpeg,flv,asf,ogg,gif,ivf,nut,mxf,wav,mp3,flac,aac"
_AVERROR = av.error.FFmpegError


class RefusedError(ValueError):
    """A media file that cannot become part of a store; the text is the reason that the report gives."""


@dataclass(frozen=True)
class Limits:
    """What a header may claim; anything beyond is refused before memory is taken for it.

    Args:
        max_side_px: longer side. max_pixels: width x height. min_side_px: shorter side.
        max_fps: average rate. max_duration_s: of any stream and of what comes out. max_gap_s: between two frames.
        max_channels, min_sample_rate_hz, max_sample_rate_hz: of the audio. max_streams: of the container.
    """

    max_side_px: int = 8192
    max_pixels: int = 8192 * 4352
    min_side_px: int = 16
    max_fps: float = 480.0
    max_duration_s: float = 6 * 3600.0
    max_gap_s: float = 60.0
    max_channels: int = 24
    min_sample_rate_hz: int = 1000
    max_sample_rate_hz: int = 384_000
    max_streams: int = 64


@dataclass(frozen=True)
class VideoInfo:
    """The chosen video stream: index in the file, codec, coded size in px, shape of a pixel, claimed rates in fps.

    `colour_matrix` is the tag of ISO 23091-2 (1 = BT.709, 2 = none, 5 and 6 = BT.601).
    """

    index: int
    codec: str
    width: int
    height: int
    pixel_format: str
    pixel_aspect: Fraction
    rates: tuple[Fraction, ...]
    duration_s: float | None
    colour_matrix: int = 2


@dataclass(frozen=True)
class AudioInfo:
    """The chosen audio stream: its index in the file, codec, rate and channels."""

    index: int
    codec: str
    sample_rate_hz: int
    channels: int
    layout: str


@dataclass(frozen=True)
class MediaInfo:
    """A file whose header passed the limits. `notes` say what was chosen among several streams.

    `start_s` is the earliest time stamp of the container: what players show as 0, and what annotations count from.
    """

    path: str
    container: str
    size_bytes: int
    start_s: Fraction
    duration_s: float | None
    video: VideoInfo
    audio: AudioInfo | None
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class PacketScan:
    """Time stamps of the chosen streams, read without decoding.

    Args:
        video_times: (P,) int64 ticks of `video_time_base`, in display order, of the packets that become frames.
        in_order: whether they came in that order in the file (no B-frames).
        keys: packet numbers of the key frames. cut_before: packets that an edit list hides.
        audio_packets: how many. end_s: where the last packet of both streams ends; error: what ended the scan early.
        key_ticks: time stamps of the key frames.
    """

    video_times: NDArray[np.int64]
    video_time_base: Fraction
    in_order: bool
    keys: tuple[int, ...]
    cut_before: int
    audio_packets: int
    end_s: float
    error: str = ""
    key_ticks: tuple[int, ...] = ()


@contextmanager
def open_media(path: str | Path) -> Iterator[Any]:
    """Open a local file for demuxing; yields the PyAV container.

    Raises:
        RefusedError: not a regular file, empty, or no allowed container.
    """
    name = os.path.abspath(path)
    if not os.path.isfile(name):
        raise RefusedError("not a regular file")
    if os.path.getsize(name) == 0:
        raise RefusedError("empty file")
    options = {"format_whitelist": CONTAINERS, "protocol_whitelist": "file"}
    try:
        container = av.open("file:" + name, metadata_errors="replace", container_options=options)
    except (_AVERROR, OSError, ValueError) as error:
        raise RefusedError(f"container does not open: {_words(error)}") from error
    try:
        yield container
    finally:
        container.close()


def probe(path: str | Path, limits: Limits | None = None) -> MediaInfo:
    """Read the header, choose the streams and check everything against the limits.

    The largest video stream that is not a cover picture is taken, then the one with more frames; the audio stream with
    the most channels, then the highest rate.

    Raises:
        RefusedError: no video, or a value beyond the limits.
    """
    limits = limits or Limits()
    with open_media(path) as container:
        if len(container.streams) > limits.max_streams:
            raise RefusedError(f"streams ({len(container.streams)}) must be at most {limits.max_streams}")
        videos = [s for s in container.streams.video if not s.disposition & av.stream.Disposition.attached_pic]
        if not videos:
            raise RefusedError("no video stream" + (", audio only" if container.streams.audio else ""))
        videos = [s for s in videos if s.codec_context is not None]
        if not videos:
            raise RefusedError("video stream: no decoder for its codec")
        video = max(videos, key=lambda s: (s.width * s.height, s.frames, -s.index))
        audios = [s for s in container.streams.audio if s.codec_context is not None]
        audio = max(
            audios, key=lambda s: (s.codec_context.channels, s.codec_context.sample_rate, -s.index), default=None
        )
        notes = []
        if len(videos) > 1:
            notes.append(f"video stream {video.index} ({video.width}x{video.height}) chosen of {len(videos)}")
        if len(audios) > 1 and audio is not None:
            notes.append(f"audio stream {audio.index} chosen of {len(audios)}")
        duration = None if container.duration is None else container.duration / 1_000_000
        if duration is not None and not 0 <= duration <= limits.max_duration_s:
            raise RefusedError(f"duration ({duration:.3f} s) must be at most {limits.max_duration_s:g} s")
        return MediaInfo(
            path=str(path),
            container=container.format.name,
            size_bytes=os.path.getsize(path),
            start_s=Fraction(container.start_time or 0, 1_000_000),
            duration_s=duration,
            video=_video_info(video, limits),
            audio=None if audio is None else _audio_info(audio, limits),
            notes=tuple(notes),
        )


def scan_packets(info: MediaInfo, limits: Limits | None = None) -> PacketScan:
    """Read all packets of the chosen streams without decoding them.

    Raises:
        RefusedError: no video packet at all, or more packets or time than the limits allow.
    """
    limits = limits or Limits()
    most = int(limits.max_fps * limits.max_duration_s)
    times: list[int] = []
    keys: list[int] = []
    key_ticks: list[int] = []
    hidden, audio_packets, end_s, error = 0, 0, 0.0, ""
    with open_media(info.path) as container:
        video = container.streams[info.video.index]
        wanted = [video] if info.audio is None else [video, container.streams[info.audio.index]]
        by_decode_order = info.container == "avi"
        try:
            for packet in container.demux(wanted):
                if packet.size == 0:
                    continue
                ticks = packet.dts if by_decode_order or packet.pts is None else packet.pts
                if ticks is not None:
                    end_s = max(end_s, float((ticks + (packet.duration or 0)) * packet.time_base))
                if packet.stream_index != video.index:
                    audio_packets += 1
                elif packet.is_discard:
                    hidden += 1
                elif ticks is not None and not _is_hidden_vp8(info.video.codec, packet):
                    if packet.is_keyframe:
                        keys.append(len(times))
                        key_ticks.append(ticks)
                    times.append(ticks)
                if len(times) > most:
                    raise RefusedError(f"video packets (more than {most}) must fit in the limits on rate and duration")
        except (_AVERROR, OSError) as problem:
            if isinstance(problem, MemoryError):
                raise
            error = _words(problem)
        time_base = Fraction(video.time_base)
    if not times:
        raise RefusedError("video stream has no packet" + (f": {error}" if error else ""))
    ordered = np.asarray(times, np.int64)
    in_order = bool((np.diff(ordered) > 0).all())
    return PacketScan(
        np.sort(ordered), time_base, in_order, tuple(keys), hidden, audio_packets, end_s, error, tuple(key_ticks)
    )


def _video_info(stream: Any, limits: Limits) -> VideoInfo:
    width, height, context = stream.width, stream.height, stream.codec_context
    if min(width, height) < limits.min_side_px:
        raise RefusedError(f"video size ({width}x{height}) must be at least {limits.min_side_px} px on each side")
    if max(width, height) > limits.max_side_px or width * height > limits.max_pixels:
        raise RefusedError(
            f"video size ({width}x{height}) must be at most {limits.max_side_px} px a side, {limits.max_pixels} in all"
        )
    average = stream.average_rate
    if average is not None and average > limits.max_fps:
        raise RefusedError(f"video rate ({float(average):g} fps) must be at most {limits.max_fps:g}")
    duration = None if stream.duration is None else float(stream.duration * stream.time_base)
    if duration is not None and duration > limits.max_duration_s:
        raise RefusedError(f"video duration ({duration:.3f} s) must be at most {limits.max_duration_s:g} s")
    claimed = [Fraction(r) for r in (average, stream.guessed_rate, stream.base_rate) if r]
    rates = tuple(dict.fromkeys(r for r in claimed if 0 < r <= limits.max_fps))
    aspect = stream.sample_aspect_ratio
    aspect = Fraction(aspect) if aspect else Fraction(1)
    if not Fraction(1, 10) <= aspect <= 10:
        aspect = Fraction(1)
    matrix = int(context.colorspace)
    return VideoInfo(stream.index, context.name, width, height, str(context.pix_fmt), aspect, rates, duration, matrix)


def _audio_info(stream: Any, limits: Limits) -> AudioInfo:
    context = stream.codec_context
    rate, channels = context.sample_rate, context.channels
    if not limits.min_sample_rate_hz <= rate <= limits.max_sample_rate_hz:
        low, high = limits.min_sample_rate_hz, limits.max_sample_rate_hz
        raise RefusedError(f"audio sample rate ({rate} Hz) must be {low} to {high} Hz")
    if not 1 <= channels <= limits.max_channels:
        raise RefusedError(f"audio channels ({channels}) must be 1 to {limits.max_channels}")
    return AudioInfo(stream.index, context.name, rate, channels, context.layout.name)


def _is_hidden_vp8(codec: str, packet: Any) -> bool:
    """Whether a VP8 packet only updates references (bit 4 of its first byte, `show_frame`, is 0)."""
    return codec in ("vp8", "libvpx") and not bytes(packet)[0] >> 4 & 1


def _words(error: BaseException) -> str:
    """An error as words without the path of the file."""
    text = getattr(error, "strerror", None) or str(error)
    return str(text)[:200]
