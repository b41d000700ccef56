"""What a pass over a file found, in words: the repairs and notes of the ingest report, and what is too bad to keep."""

from __future__ import annotations

from dataclasses import dataclass, field
from fractions import Fraction

from pipeline.ingest.item import TranscodeSettings
from pipeline.media.audio_track import AudioTrack
from pipeline.media.packets import PacketScan, check_order
from pipeline.media.picture import Turn
from pipeline.media.probe import MediaInfo, RefusedError
from pipeline.media.retime import Rate

AUDIBLE_OFFSET_S = 0.05  # starts that differ by more are reported as repaired


@dataclass
class Tally:
    """Counters of one pass: frames decoded, errors, frames marked bad, time stamps that do not rise, and so on."""

    decoded: int = 0
    corrupt: int = 0
    video_errors: int = 0
    audio_errors: int = 0
    not_rising: int = 0
    far_behind: int = 0
    size_changes: int = 0
    repeated: int = 0
    dropped: int = 0
    first_error: str = ""
    turn: Turn = field(default_factory=Turn)

    def note_error(self, text: str) -> None:
        """Keep the first error that is told."""
        self.first_error = self.first_error or text


def video_repairs(
    info: MediaInfo, scan: PacketScan, settings: TranscodeSettings, rate: Rate, tally: Tally, origin_s: Fraction
) -> list[str]:
    """Say what was changed about the pictures and their times.

    Raises:
        RefusedError: less than `settings.min_decodable` of the frames decode, or their time stamps start again.
    """
    found = []
    if tally.turn:
        mirrored = ", mirrored" if tally.turn.mirror else ""
        found.append(f"rotation: turned by {90 * tally.turn.quarters} degrees counter-clockwise{mirrored}")
    if (late_s := origin_s - info.start_s) > AUDIBLE_OFFSET_S:
        found.append(f"start: video began {float(late_s):.3f} s after the file's first time stamp, now at 0")
    if scan.cut_before:
        found.append(f"edit list: {_frames(scan.cut_before)} outside it left out")
    if (tally.repeated or tally.dropped) and not is_reduced(settings, rate):
        kind = "frames missing" if rate.is_constant or rate.has_holes else "variable frame rate"
        changes = f"{_frames(tally.repeated)} repeated, {tally.dropped} dropped"
        found.append(f"{kind}: now {float(rate.fps):.6g} fps, {changes}")
    check_order(tally.far_behind, tally.decoded)
    if tally.not_rising:
        found.append(f"time stamps: {_frames(tally.not_rising)} not later than one before")
    found += _damage(len(scan.video_times), settings, tally)
    if tally.size_changes:
        found.append(f"size: changes {tally.size_changes} times, all scaled to the first")
    return found


def _frames(count: int) -> str:
    return f"{count} frame" if count == 1 else f"{count} frames"


def _damage(expected: int, settings: TranscodeSettings, tally: Tally) -> list[str]:
    missing = max(expected - tally.decoded, 0)
    if not missing and not tally.video_errors and not tally.corrupt:
        return []
    good = tally.decoded - tally.corrupt
    if good < settings.min_decodable * expected:
        why = tally.first_error or "no error told"
        raise RefusedError(f"damaged: only {good} of {expected} frames decode without fault ({why})")
    why = f": {tally.first_error}" if tally.first_error else ""
    return [f"damaged: {missing} of {expected} frames do not decode, {tally.corrupt} are marked bad{why}"]


def truncation(info: MediaInfo, scan: PacketScan, settings: TranscodeSettings, duration_s: Fraction) -> list[str]:
    """Compare what is there with what the header claims.

    Raises:
        RefusedError: less than `settings.min_decodable` of it is there.
    """
    claimed = info.duration_s or 0.0
    there = max(scan.end_s - min(float(info.start_s), 0.0), float(duration_s))  # Matroska claims an end, not a length
    if claimed - there <= max(0.5, 0.05 * claimed):
        return [f"damaged: {scan.error}"] if scan.error else []
    text = f"truncated: {there:.2f} of {claimed:.2f} s are there"
    if there < settings.min_decodable * claimed:
        raise RefusedError(text)
    return [text]


def audio_repairs(
    audio: AudioTrack, tally: Tally, begin_s: Fraction, end_s: Fraction, duration_s: Fraction
) -> list[str]:
    """Say what was changed about the audio; `begin_s` and `end_s` are its extent relative to the first frame."""
    found = []
    if begin_s > AUDIBLE_OFFSET_S:
        found.append(f"audio start: {float(begin_s):.3f} s after the video, silence put before it")
    if begin_s < -AUDIBLE_OFFSET_S:
        found.append(f"audio start: {float(-begin_s):.3f} s before the video, cut")
    if duration_s - end_s > max(0.5, 0.05 * float(duration_s)):
        found.append(f"audio end: {float(duration_s - end_s):.2f} s before the video's, nothing after it")
    if audio.jumps:
        found.append(f"audio time stamps: {audio.jumps} jumps or format changes, each part placed by its own")
    if audio.overflowed:
        found.append("audio: longer than any limit, the rest left out")
    if tally.audio_errors:
        found.append(f"damaged audio: {tally.audio_errors} packets do not decode")
    return found


def notes(info: MediaInfo, settings: TranscodeSettings, rate: Rate, *, copied: bool) -> list[str]:
    """Say what else is worth knowing: chosen streams, a clock that begins late, a reduced rate, a copied stream, the
    source's pixel format."""
    found = list(info.notes)
    if abs(info.start_s) > AUDIBLE_OFFSET_S:
        found.append(f"time stamps begin at {float(info.start_s):.3f} s")
    if is_reduced(settings, rate):
        found.append(f"reduced to at most {settings.max_fps} fps")
    if copied:
        found.append("video copied without encoding")
    if info.video.pixel_format not in ("yuv420p", "None"):
        found.append(f"pixel format {info.video.pixel_format} to yuv420p")
    return found


def is_reduced(settings: TranscodeSettings, rate: Rate) -> bool:
    """Whether `max_fps` set the rate."""
    return settings.max_fps is not None and rate.fps == Fraction(settings.max_fps) and not rate.is_constant
