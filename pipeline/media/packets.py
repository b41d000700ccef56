"""What the packets of a media file say, read without decoding: time stamps, key frames, which streams have any."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.media.h264_fields import FieldFinder
from pipeline.media.probe import AVERROR, Limits, MediaInfo, RefusedError, open_media, probe, words_of

_LEAST_SPAN_S = 0.1  # over which a rate is measured
FAR_BEHIND_S, MAX_FAR_BEHIND = 1, 0.05  # time stamps that fall by so much, and the share of frames that may


@dataclass(frozen=True)
class PacketScan:
    """Time stamps of the chosen streams, read without decoding.

    Args:
        video_times: (P,) int64 ticks of `video_time_base`, in display order, of the packets that become frames; where
            each field of a picture is a packet of its own, of the frames that the decoder gives.
        in_order: whether they came in that order in the file (no B-frames).
        keys: packet numbers of the key frames. cut_before: packets that an edit list hides.
        audio_packets: how many. end_s: where the last packet of any stream ends; error: what ended the scan early.
        key_ticks: time stamps of the key frames. heard: audio streams that have packets.
        last_ticks: how long the last frame is shown, as its packet says; 0 if it does not.
        has_fields: whether each field of some picture is a packet of its own.
        far_behind: packets to be decoded `FAR_BEHIND_S` or more before earlier ones, as in joined recordings.
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
    heard: tuple[int, ...] = ()
    last_ticks: int = 0
    far_behind: int = 0
    has_fields: bool = False


class _VideoPackets:
    """Collects what the packets of the chosen video stream say.

    Args:
        most: packets, more are an error of the file.
    """

    def __init__(self, info: MediaInfo, stream: Any, most: int) -> None:
        self._codec, self._most = info.video.codec, most
        self._fields = FieldFinder(stream.codec_context.extradata or b"") if self._codec == "h264" else None
        self._latest_dts: int | None = None
        self._last = (0, 0)  # time stamp and duration
        self.times: list[int] = []
        self.keys: list[int] = []
        self.key_ticks: list[int] = []
        self.hidden = self.fields = self.far_behind = 0

    @property
    def last_ticks(self) -> int:
        """Duration of the packet with the latest time stamp; 0 where it says none."""
        return self._last[1]

    def take(self, packet: Any, ticks: int | None) -> None:
        """Take the next packet with the time stamp that counts; raises RefusedError where there are too many."""
        if packet.is_discard:
            self.hidden += 1
            return
        if ticks is None or _is_hidden_vp8(self._codec, packet):
            return
        if packet.is_keyframe:
            self.keys.append(len(self.times))
            self.key_ticks.append(ticks)
        self._last = max(self._last, (ticks, packet.duration or 0)) if self.times else (ticks, packet.duration or 0)
        self.times.append(ticks)
        if packet.dts is not None:
            self._latest_dts = packet.dts if self._latest_dts is None else max(self._latest_dts, packet.dts)
            self.far_behind += (self._latest_dts - packet.dts) * packet.time_base >= FAR_BEHIND_S
        if self._fields is not None and self._fields.may_have_fields:
            self.fields += self._fields.is_field(bytes(packet))
        if len(self.times) > self._most:
            raise RefusedError(f"video packets (more than {self._most}) must fit in the limits on rate and duration")


def scan_packets(info: MediaInfo, limits: Limits | None = None) -> PacketScan:
    """Read all packets of a file; nothing is decoded but the pictures of H.264 with a packet for each field.

    Raises:
        RefusedError: no video packet at all, or more packets or time than the limits allow.
    """
    limits = limits or Limits()
    most = int(limits.max_fps * limits.max_duration_s)
    audio_packets: Counter[int] = Counter()
    end_s, error = 0.0, ""
    with open_media(info.path) as container:
        video = container.streams[info.video.index]
        found = _VideoPackets(info, video, most)
        sounds = {stream.index for stream in container.streams.audio}
        by_decode_order = info.container == "avi"
        try:
            for packet in container.demux(*container.streams):
                if packet.size == 0:
                    continue
                is_video = packet.stream_index == video.index
                ticks = packet.dts if (by_decode_order and is_video) or packet.pts is None else packet.pts
                if ticks is not None:
                    end_s = max(end_s, float((ticks + (packet.duration or 0)) * packet.time_base))
                if is_video:
                    found.take(packet, ticks)
                else:
                    audio_packets[packet.stream_index] += packet.stream_index in sounds
        except (AVERROR, OSError) as problem:
            if isinstance(problem, MemoryError):
                raise
            error = words_of(problem)
        time_base = Fraction(video.time_base)
    if not found.times:
        raise RefusedError("video stream has no packet" + (f": {error}" if error else ""))
    times = (_frame_times(info, most) if found.fields else []) or found.times
    ordered = np.asarray(times, np.int64)
    in_order = bool((np.diff(ordered) > 0).all())
    ordered = np.sort(ordered)
    fps = (len(ordered) - 1) / max(float(int(ordered[-1] - ordered[0]) * time_base), _LEAST_SPAN_S)
    if fps > limits.max_fps:
        raise RefusedError(f"video rate ({fps:g} fps by its time stamps) must be at most {limits.max_fps:g}")
    return PacketScan(
        video_times=ordered,
        video_time_base=time_base,
        in_order=in_order,
        keys=tuple(found.keys),
        cut_before=found.hidden,
        audio_packets=audio_packets[info.audio.index] if info.audio else 0,
        end_s=end_s,
        error=error,
        key_ticks=tuple(found.key_ticks),
        heard=tuple(index for index, count in audio_packets.items() if count),
        last_ticks=found.last_ticks,
        far_behind=found.far_behind,
        has_fields=found.fields > 0,
    )


def _frame_times(info: MediaInfo, most: int) -> list[int]:
    """Return the time stamps, ticks, of the frames that the decoder gives; what it cannot decode is left out."""
    times: list[int] = []
    with open_media(info.path) as container:
        video = container.streams[info.video.index]
        for packet in container.demux(video):
            try:
                times += [frame.pts for frame in packet.decode() if frame.pts is not None]
            except AVERROR as problem:
                if isinstance(problem, MemoryError):
                    raise
            if len(times) > most:
                raise RefusedError(f"video frames (more than {most}) must fit in the limits on rate and duration")
    return times


def look(path: str | Path, limits: Limits | None = None) -> tuple[MediaInfo, PacketScan]:
    """Read header and packets; where the chosen audio stream has no packet and another has some, take that one.

    Raises:
        RefusedError: as `probe` and `scan_packets`.
    """
    info = probe(path, limits)
    scan = scan_packets(info, limits)
    heard = next((index for index in info.other_audio if index in scan.heard), None)
    if not scan.audio_packets and heard is not None:
        info = probe(path, limits, heard)
        scan = scan_packets(info, limits)
    return info, scan


def check_order(far_behind: int, frames: int) -> None:
    """Check that time stamps do not start again; raises RefusedError where more than 5 % of the frames fell behind."""
    if far_behind > MAX_FAR_BEHIND * frames:
        raise RefusedError(
            f"video time stamps start again: {far_behind} of {frames} frames lie {FAR_BEHIND_S} s or "
            "more before earlier ones; give joined recordings new time stamps"
        )


def _is_hidden_vp8(codec: str, packet: Any) -> bool:
    """Whether a VP8 packet only updates references (bit 4 of its first byte, `show_frame`, is 0)."""
    return codec in ("vp8", "libvpx") and not bytes(packet)[0] >> 4 & 1
