"""What a folder of plain videos knows about one file: which streams, which rate, where its time line starts.

The time line of a file starts at 0 with its first shown video frame (after edit lists): earlier sound is left out,
where sound begins later there are zeros. Frames lie on a constant grid at the rate that the time stamps suggest; a
file of variable rate shows, at each grid time, the nearest frame, as a store of it does.
"""

import hashlib
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np

from pipeline.dataset import FLAG_REPAIRED, FLAG_SILENT, SAMPLE_RATE_HZ
from pipeline.media.packets import PacketScan, check_order, look
from pipeline.media.picture import Turn, turn_of
from pipeline.media.probe import Limits, MediaInfo, RefusedError
from pipeline.media.retime import choose_rate, num_slots
from pipeline.media.silence import silent_choice
from pipeline.media.yuv import even_size, open_video

_DIGEST_BYTES = 1 << 16
_TAIL_S = 5
_TIMING = {"avi": "count", "mpeg": "start"}


@dataclass(frozen=True)
class PlainFile:
    """One playable file.

    Args:
        path: absolute. size_bytes, mtime_ns: of it. digest: sha256 (hex) of size, first and last 64 KiB.
        video_stream, audio_stream: index in the file, audio -1 = none.
        timing: "seek" (time stamps hold after a seek), "start" (only when read from the start: MPEG program streams),
            or "count" (AVI has decoding times only: the n-th frame out has the time of the n-th packet).
        time_base, start_ticks: of the video stream; the ticks of its first shown frame.
        tolerance_ticks: how much too late a time stamp may be (rounding to the container's clock).
        fps, num_frames: of the constant grid. is_constant: each source frame is one frame of the grid.
        width, height: px as delivered: upright and even. display_width, display_height: px with the true aspect.
        quarters, mirror: how a decoded picture is turned upright.
        audio_start_s: time stamp of the first sample. audio_first_samples: of its frame. num_samples: at 16 kHz.
        has_whole_index: whether the container knows every packet once it is open (MP4 that is not in fragments), and
            each packet of the video is a whole picture.
        note: what was chosen or repaired. warning: what may not be what was wanted: high dynamic range, a silent audio
            stream beside one with sound.
    """

    path: str
    size_bytes: int
    mtime_ns: int
    digest: str
    video_stream: int
    audio_stream: int
    timing: str
    time_base: Fraction
    start_ticks: int
    tolerance_ticks: Fraction
    fps: Fraction
    num_frames: int
    is_constant: bool
    width: int
    height: int
    display_width: int
    display_height: int
    quarters: int
    mirror: bool
    audio_start_s: Fraction
    audio_first_samples: int
    num_samples: int
    has_whole_index: bool
    note: str
    warning: str

    @property
    def start_s(self) -> Fraction:
        """Time stamp of the first shown video frame in seconds: 0 of the time line."""
        return self.start_ticks * self.time_base

    @property
    def flags(self) -> int:
        """FLAG_* bits."""
        return (0 if self.num_samples else FLAG_SILENT) | (0 if self.is_constant else FLAG_REPAIRED)


def content_digest(path: Path) -> str:
    """sha256 (hex) of a file's size, first and last 64 KiB: names the contents without reading a whole data set."""
    size = path.stat().st_size
    with path.open("rb") as file:
        head = file.read(_DIGEST_BYTES)
        file.seek(max(0, size - _DIGEST_BYTES))
        return hashlib.sha256(b"%d\n%b%b" % (size, head, file.read(_DIGEST_BYTES))).hexdigest()


def describe(path: Path) -> PlainFile:
    """Read headers and packets, decode the first frame and the first sound.

    Raises:
        RefusedError: the file cannot be trained on; the text says why.
    """
    limits = Limits()
    state = path.stat()  # before it is looked at: a change meanwhile shows at the first read
    info, scan = look(path, limits)
    check_order(scan.far_behind, len(scan.video_times))
    try:
        first, turn, entries = _first_frame(path, info)
        timing = _TIMING.get(info.container, "seek")
        timing = "start" if timing == "count" and scan.has_fields else timing  # counted packets are no frames
        start = int(scan.video_times[0]) if timing == "count" or first.pts is None else first.pts
        times = scan.video_times[scan.video_times >= start]
        if not len(times):
            raise RefusedError(f"video time stamps must reach the first decoded frame ({start} ticks); transcode it")
        gap_s = float(np.diff(np.sort(times)).max(initial=0) * scan.video_time_base)
        if gap_s > limits.max_gap_s:  # as an ingest of it
            raise RefusedError(f"video time stamps jump by {gap_s:.1f} s, more than {limits.max_gap_s:g} s")
        sound = _first_sound(path, info, scan, (start * scan.video_time_base))
    except (av.error.FFmpegError, OSError) as error:
        raise RefusedError(f"does not decode: {error}") from error
    rate = choose_rate(times, scan.video_time_base, info.video.rates, last_ticks=scan.last_ticks)
    num_frames = num_slots(times, scan.video_time_base, rate, scan.last_ticks)
    width, height = (first.height, first.width) if turn.quarters % 2 else (first.width, first.height)
    aspect = 1 / info.video.pixel_aspect if turn.quarters % 2 else info.video.pixel_aspect
    width, height = even_size(width, height)
    wide = max(1, round(width * aspect)) if aspect >= 1 else width
    high = height if aspect >= 1 else max(1, round(height / aspect))
    notes = (*info.notes, f"reading ended: {scan.error}" * bool(scan.error), "variable rate" * (not rate.is_constant))
    audio_start, first_samples, audio_end = sound
    samples = min(audio_end - start * scan.video_time_base, num_frames / rate.fps) * SAMPLE_RATE_HZ
    return PlainFile(
        path=str(path),
        size_bytes=state.st_size,
        mtime_ns=state.st_mtime_ns,
        digest=content_digest(path),
        video_stream=info.video.index,
        audio_stream=info.audio.index if info.audio is not None and samples >= 1 else -1,
        timing=timing,
        time_base=scan.video_time_base,
        start_ticks=start,
        tolerance_ticks=min(Fraction(101, 100), 1 / (4 * rate.fps * scan.video_time_base)),
        fps=rate.fps,
        num_frames=num_frames,
        is_constant=rate.is_constant,
        width=width,
        height=height,
        display_width=wide,
        display_height=high,
        quarters=turn.quarters,
        mirror=turn.mirror,
        audio_start_s=audio_start,
        audio_first_samples=first_samples,
        num_samples=max(0, int(samples)),
        has_whole_index=_has_whole_index(info, scan, entries),
        note="; ".join(note for note in notes if note),
        warning="; ".join(filter(None, (*info.warnings, silent_choice(info, scan.heard)))),
    )


def _has_whole_index(info: MediaInfo, scan: PacketScan, entries: dict[int, int]) -> bool:
    packets = {info.video.index: len(scan.video_times) + scan.cut_before}
    packets |= {info.audio.index: scan.audio_packets} if info.audio is not None else {}
    whole = all(entries[number] >= count for number, count in packets.items())
    return whole and info.container.startswith("mov,") and not scan.error and not scan.has_fields


def _first_frame(path: Path, info: MediaInfo) -> tuple[Any, Turn, dict[int, int]]:
    """First frame, how it is turned, and the packets of each stream that the container knows of once it is open."""
    with open_video(path, info.video.index) as (container, stream):
        entries = {one.index: len(one.index_entries) for one in container.streams}
        for frame in container.decode(stream):
            return frame, turn_of(frame), entries
    raise RefusedError("no video frame can be decoded; transcode it")


def _first_sound(path: Path, info: MediaInfo, scan: PacketScan, default_s: Fraction) -> tuple[Fraction, int, Fraction]:
    """Time stamp and length of the first audio frame, and the time stamp where the audio ends."""
    if info.audio is None or not scan.audio_packets:
        return Fraction(0), 0, default_s
    with open_video(path, info.audio.index) as (container, stream):
        try:
            frame = next((f for f in container.decode(stream) if f.samples), None)
        except av.error.InvalidDataError:
            frame = None
        if frame is None:
            return Fraction(0), 0, default_s
        start_s = Fraction(0) if frame.pts is None else frame.pts * Fraction(frame.time_base)
        end_s = start_s
        for back_s in (_TAIL_S, None):
            target_s = float(start_s) if back_s is None else max(float(start_s), scan.end_s - back_s)
            container.seek(int(target_s / stream.time_base), stream=stream, backward=True)
            for packet in container.demux(stream):
                if packet.size and packet.pts is not None:
                    end_s = max(end_s, (packet.pts + (packet.duration or 0)) * Fraction(packet.time_base))
            if end_s > start_s:
                break
        return start_s, frame.samples, end_s
