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

CONTAINERS = "mov,matroska,avi,mpegts,mpeg,flv,asf,ogg,gif,ivf,nut,mxf,wav,mp3,flac,aac"
AVERROR = av.error.FFmpegError
_HDR = {16: "PQ", 18: "HLG"}  # transfer characteristics of ISO 23091-2


class RefusedError(ValueError):
    """A media file that cannot become part of a store; the text is the reason that the report gives."""


@dataclass(frozen=True)
class Limits:
    """What a header may claim; anything beyond is refused before memory is taken for it.

    Args:
        max_side_px: longer side. max_pixels: width x height. min_side_px: shorter side.
        max_fps: mean rate by the time stamps. max_duration_s: of any stream and of what comes out.
        max_gap_s: between two frames.
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

    `colour_matrix` and `transfer` are tags of ISO 23091-2 (matrix 1 = BT.709, 2 = none, 5 and 6 = BT.601; transfer
    16 = PQ, 18 = HLG: high dynamic range).
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
    transfer: int = 2


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

    `warnings` say what is not shown as it should be: high dynamic range. `other_audio` are the audio streams that were
    not chosen, best first. `start_s` is the earliest time stamp of the container: what players show as 0, and what
    annotations count from.
    """

    path: str
    container: str
    start_s: Fraction
    duration_s: float | None
    video: VideoInfo
    audio: AudioInfo | None
    notes: tuple[str, ...] = ()
    other_audio: tuple[int, ...] = ()
    warnings: tuple[str, ...] = ()


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
    except (AVERROR, OSError, ValueError) as error:
        raise RefusedError(f"container does not open: {words_of(error)}") from error
    try:
        yield container
    finally:
        container.close()


def probe(path: str | Path, limits: Limits | None = None, audio_index: int | None = None) -> MediaInfo:
    """Read the header, choose the streams and check everything against the limits.

    The largest video stream that is not a cover picture is taken, then the one with more frames; the audio stream that
    the file calls its default, then the one with the most channels, then the highest rate. An announced audio stream
    without rate or channels is absent.

    Args:
        path: the file. limits: the defaults, if None. audio_index: the audio stream to take; None = as above.

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
        audios = sorted(filter(_is_there, container.streams.audio), key=_audio_rank)
        audio = next((s for s in audios if audio_index in (None, s.index)), None)
        notes = []
        if len(videos) > 1:
            notes.append(f"video stream {video.index} ({video.width}x{video.height}) chosen of {len(videos)}")
        if len(audios) > 1 and audio is not None:
            notes.append(f"audio stream {audio.index} chosen of {len(audios)}")
        transfer = _HDR.get(int(video.codec_context.color_trc))
        warnings = [f"high dynamic range ({transfer}): shown without tone mapping"] if transfer else []
        duration = None if container.duration is None else container.duration / 1_000_000
        if duration is not None and not 0 <= duration <= limits.max_duration_s:
            raise RefusedError(f"duration ({duration:.3f} s) must be at most {limits.max_duration_s:g} s")
        return MediaInfo(
            path=str(path),
            container=container.format.name,
            start_s=Fraction(container.start_time or 0, 1_000_000),
            duration_s=duration,
            video=_video_info(video, limits),
            audio=None if audio is None else _audio_info(audio, limits),
            notes=tuple(notes),
            other_audio=tuple(s.index for s in audios if s is not audio),
            warnings=tuple(warnings),
        )


def _video_info(stream: Any, limits: Limits) -> VideoInfo:
    width, height, context = stream.width, stream.height, stream.codec_context
    if min(width, height) < limits.min_side_px:
        raise RefusedError(f"video size ({width}x{height}) must be at least {limits.min_side_px} px on each side")
    if max(width, height) > limits.max_side_px or width * height > limits.max_pixels:
        raise RefusedError(
            f"video size ({width}x{height}) must be at most {limits.max_side_px} px a side, {limits.max_pixels} in all"
        )
    duration = None if stream.duration is None else float(stream.duration * stream.time_base)
    if duration is not None and duration > limits.max_duration_s:
        raise RefusedError(f"video duration ({duration:.3f} s) must be at most {limits.max_duration_s:g} s")
    claimed = [Fraction(r) for r in (stream.average_rate, stream.guessed_rate, stream.base_rate) if r]
    rates = tuple(dict.fromkeys(r for r in claimed if 0 < r <= limits.max_fps))
    aspect = stream.sample_aspect_ratio
    aspect = Fraction(aspect) if aspect else Fraction(1)
    if not Fraction(1, 10) <= aspect <= 10:
        aspect = Fraction(1)
    tags = int(context.colorspace), int(context.color_trc)
    return VideoInfo(stream.index, context.name, width, height, str(context.pix_fmt), aspect, rates, duration, *tags)


def _is_there(stream: Any) -> bool:
    """Whether a programme map or header says more of an audio stream than that it exists."""
    context = stream.codec_context
    return context is not None and context.sample_rate > 0 and context.channels > 0


def _audio_rank(stream: Any) -> tuple[bool, int, int, int]:
    """Rank of an audio stream, the lowest is taken."""
    is_default = bool(stream.disposition & av.stream.Disposition.default)
    return not is_default, -stream.codec_context.channels, -stream.codec_context.sample_rate, stream.index


def _audio_info(stream: Any, limits: Limits) -> AudioInfo:
    context = stream.codec_context
    rate, channels = context.sample_rate, context.channels
    if not limits.min_sample_rate_hz <= rate <= limits.max_sample_rate_hz:
        low, high = limits.min_sample_rate_hz, limits.max_sample_rate_hz
        raise RefusedError(f"audio sample rate ({rate} Hz) must be {low} to {high} Hz")
    if not 1 <= channels <= limits.max_channels:
        raise RefusedError(f"audio channels ({channels}) must be 1 to {limits.max_channels}")
    return AudioInfo(stream.index, context.name, rate, channels, context.layout.name)


def words_of(error: BaseException) -> str:
    """An error as words without the path of the file."""
    text = getattr(error, "strerror", None) or str(error)
    return str(text)[:200]
