"""One media file -> one item of a store: every frame decoded once, CFR fragments and PCM on one time line.

Runs in a child process (`pipeline/ingest/worker.py`); imports neither torch nor DALI.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import asdict, dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

from pipeline.ingest import findings
from pipeline.ingest.encoder import CopiedVideo, EncodedVideo, VideoOutput, why_not_copied
from pipeline.ingest.findings import Tally
from pipeline.ingest.item import Item, TranscodeSettings
from pipeline.ingest.passes import AudioPass, VideoPass
from pipeline.ingest.source import Source, packets
from pipeline.ingest.spans import Part, Span, part_of
from pipeline.media.audio_track import SAMPLE_RATE_HZ, PlacedAudio
from pipeline.media.probe import RefusedError, open_media
from pipeline.media.silence import SILENT_PEAK, silent_choice
from pipeline.store.durable import put_file


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
        item = _transcode(Source.of(str(path), settings), partial, settings, span)
        put_file(partial, Path(out))
        return item
    except RefusedError as error:
        return Item(refused=str(error))
    except MemoryError:
        return Item(refused="decoding needs more memory than the limit allows", for_resources=True)
    finally:
        partial.unlink(missing_ok=True)


def _transcode(source: Source, out: Path, settings: TranscodeSettings, span: Span | None) -> Item:
    """Copy the stream if it is fit, else encode the part that is needed, else all: some are found unfit on the way."""

    def copied(video: Any) -> VideoOutput:
        return CopiedVideo(out, source.rate.fps, settings.codec, video)

    def encoded(video: Any) -> VideoOutput:
        return EncodedVideo(out, source.rate.fps, settings)

    ways: list[tuple[Callable[[Any], VideoOutput], Part | None]] = [(encoded, None)]
    if (part := part_of(source.info, source.scan, span)) is not None:
        ways.insert(0, (encoded, part))
    why_not = why_not_copied(
        source.info, source.scan, source.rate, codec=settings.codec, short_side_px=settings.short_side_px
    )
    if settings.copy_fit_streams and not why_not:
        ways.insert(0, (copied, None))
    for make_output, way_part in ways:
        done = _pass(source, settings, way_part, make_output)
        if done is not None:
            return _item(source, settings, done, out)
        out.unlink(missing_ok=True)
    raise AssertionError("to encode all of a source ends with an item or a refusal")


@dataclass(frozen=True)
class _Done:
    """A pass that went to its end."""

    part: Part | None
    output: VideoOutput
    video: VideoPass
    audio: AudioPass
    tally: Tally


def _pass(
    source: Source, settings: TranscodeSettings, part: Part | None, make_output: Callable[[Any], VideoOutput]
) -> _Done | None:
    """Go once over a source, or a part of it; None where that turns out not to be possible this way.

    Args:
        make_output: called with the video stream.
    Raises:
        RefusedError: the file cannot be used in any way.
    """
    tally = Tally()
    with open_media(source.info.path) as container:
        streams = source.streams(container, settings)
        with make_output(streams[0]) as output:
            video = VideoPass(source, settings, part, output, tally)
            audio = AudioPass(source, settings, part, tally)
            for packet in packets(container, streams, part, tally):
                if packet.stream.index != source.info.video.index:
                    audio.take(packet)
                elif not video.take(packet):
                    return None
            if not video.finish():
                return None
    audio.finish()
    return _Done(part, output, video, audio, tally)


def _item(source: Source, settings: TranscodeSettings, done: _Done, out: Path) -> Item:
    """Say what became of a source, and put its sound behind the video in the payload; raises RefusedError."""
    fps, origin = source.rate.fps, done.video.timeline.origin_s
    duration = done.output.num_frames / fps
    audio = done.audio.track.place(origin, round(duration * SAMPLE_RATE_HZ))
    repairs = _repairs(source, settings, done, audio, duration)
    notes = findings.notes(source.info, settings, source.rate, copied=done.output.is_copied)
    left_out_s = 0.0
    if done.part is not None:
        start_s, times = float(origin - source.info.start_s), source.scan.video_times
        whole_s = int(times[-1] - times[0]) * source.scan.video_time_base + 1 / fps
        left_out_s = max(float(whole_s - duration), 0.0)
        notes.append(f"only {start_s:.2f} to {start_s + float(duration):.2f} s read, the rest is not annotated")
    mp4_bytes = out.stat().st_size
    with out.open("r+b") as file:
        audio.write(file, mp4_bytes)
    with out.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return Item(
        repairs=tuple(repairs),
        notes=tuple(notes),
        warnings=_warnings(source, audio, done.part),
        silent=_why_silent(source, audio, done.part),
        short=duration < settings.clip_s,
        num_frames=done.output.num_frames,
        fps_num=fps.numerator,
        fps_den=fps.denominator,
        **asdict(done.video.sizes.stored),
        num_samples=audio.num_samples,
        first_sample=audio.first_sample,
        origin_s=float(origin - source.info.start_s),
        mp4_bytes=mp4_bytes,
        bytes=out.stat().st_size,
        sha256=digest,
        copied=done.output.is_copied,
        decoded_frames=done.tally.decoded,
        left_out_s=left_out_s,
    )


def _repairs(
    source: Source, settings: TranscodeSettings, done: _Done, audio: PlacedAudio, duration: Fraction
) -> list[str]:
    scan, begun_at, heard_from = source.scan, done.video.timeline.origin_s, audio.begin_s
    if done.part is not None:  # what lies outside the part is no fault of the source
        scan, begun_at = done.part.of(scan), Fraction(int(scan.video_times[0])) * scan.video_time_base
        heard_from = max(heard_from, Fraction(0))
    repairs = findings.video_repairs(source.info, scan, settings, source.rate, done.tally, begun_at)
    repairs += findings.truncation(source.info, source.scan, settings, duration)
    if audio.num_samples:
        repairs += findings.audio_repairs(done.audio.track, done.tally, heard_from, audio.end_s, duration)
    return repairs


def _warnings(source: Source, audio: PlacedAudio, part: Part | None) -> tuple[str, ...]:
    is_part_of_silence = part is not None and audio.peak <= SILENT_PEAK  # the rest of the stream may have sound
    words = silent_choice(source.info, source.scan.heard, None if is_part_of_silence else audio.peak)
    return (*source.info.warnings, words) if words else source.info.warnings


def _why_silent(source: Source, audio: PlacedAudio, part: Part | None) -> str:
    has_samples = audio.begin_s < audio.end_s
    if source.info.audio is None:
        return "no audio stream"
    if not has_samples and part is not None:
        return "no sound in the annotated part"
    if not has_samples:
        return f"audio stream ({source.info.audio.codec}) holds no sample that decodes"
    return "" if audio.num_samples > 0 else "audio lies outside the video's time"
