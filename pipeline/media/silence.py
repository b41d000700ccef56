"""A silent audio stream beside one with sound: streams are chosen by the header, and this tells where that failed."""

from __future__ import annotations

from collections.abc import Iterable

import av
import numpy as np

from pipeline.media.probe import AVERROR, MediaInfo, open_media

SILENT_PEAK = 32  # of 32767: -60 dB; what is louder nowhere is no sound
LISTENED_S = 600  # of a stream, at most


def silent_choice(info: MediaInfo, heard: Iterable[int], peak: int | None = None) -> str:
    """Return a sentence where the chosen audio stream is silent and another one is not; empty where all is well.

    At most `LISTENED_S` seconds of a stream are decoded, and none where there is one stream only.

    Args:
        info: of the file.
        heard: streams that have packets.
        peak: of the chosen stream, 0 to 32768, where it is known; None: it is decoded until there is sound.
    """
    others = [index for index in info.other_audio if index in set(heard)]
    if info.audio is None or not others:
        return ""
    if sounds(info, info.audio.index) if peak is None else peak > SILENT_PEAK:
        return ""
    other = next((index for index in others if sounds(info, index)), None)
    if other is None:
        return ""
    return (
        f"silent audio stream: {info.audio.index} is used and silent, {other} has sound; to have that: "
        f"ffmpeg -i IN -map 0:{info.video.index} -map 0:{other} -c copy OUT"
    )


def sounds(info: MediaInfo, index: int) -> bool:
    """Whether an audio stream has a sample above `SILENT_PEAK` in its first `LISTENED_S` seconds; damage is passed."""
    listened = 0.0
    to_mono = av.AudioResampler(format="s16", layout="mono")
    with open_media(info.path) as container:
        stream = container.streams[index]
        stream.codec_context.thread_count = 1
        try:
            for packet in container.demux(stream):
                try:
                    pieces = [piece for frame in packet.decode() for piece in to_mono.resample(frame)]
                except (AVERROR, ValueError) as problem:
                    if isinstance(problem, MemoryError):
                        raise
                    to_mono = av.AudioResampler(format="s16", layout="mono")  # it takes one format only
                    continue
                if any(np.abs(piece.to_ndarray().astype(np.int32)).max(initial=0) > SILENT_PEAK for piece in pieces):
                    return True
                listened += sum(piece.samples / piece.sample_rate for piece in pieces)
                if listened > LISTENED_S:
                    break
        except (AVERROR, OSError) as problem:
            if isinstance(problem, MemoryError):
                raise
    return False
