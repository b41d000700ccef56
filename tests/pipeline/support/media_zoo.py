"""Odd media made with PyAV: every codec, container and audio form that can be encoded here, and every kind of damage.

Each file shows a white flash and sounds a short click at the same known times.
Legend: T frames, H W pixels, S audio samples.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
from numpy.typing import NDArray

FLASHES_S = (0.6, 1.4, 2.2)  # on the grid of 25 fps and of 1/1000 s
SECONDS = 3.0


@dataclass(frozen=True)
class Sample:
    """One file of the zoo: how it is made, the class that it must land in and words of the reason."""

    name: str
    make: Callable[[Path], None]
    expected: str
    reason: str = ""
    has_both: bool = True


def picture(number_s: float, width: int, height: int, flashes: Sequence[float], step_s: float) -> NDArray[np.uint8]:
    """A grey ramp, (H, W, 3) uint8, white in the frame that is shown when a flash begins."""
    if any(-1e-6 <= number_s - flash < step_s - 1e-6 for flash in flashes):
        return np.full((height, width, 3), 255, np.uint8)
    ramp = np.linspace(20, 90, width, dtype=np.uint8)
    return np.ascontiguousarray(np.broadcast_to(ramp[None, :, None], (height, width, 3)))


def clicks(seconds: float, rate_hz: int, flashes: Sequence[float]) -> NDArray[np.float32]:
    """(S,) float32: a 2 kHz burst of about 1 ms centred on each time, silence elsewhere."""
    times = np.arange(round(seconds * rate_hz)) / rate_hz
    track = np.zeros(len(times))
    for flash in flashes:
        track += 0.8 * np.exp(-(((times - flash) / 0.0006) ** 2)) * np.cos(2 * np.pi * 2000 * (times - flash))
    return track.astype(np.float32)


def make(
    path: Path,
    *,
    video: str | None = "libx264",
    audio: str | None = "aac",
    fps: Fraction = Fraction(25),
    size: tuple[int, int] = (128, 96),
    pixel_format: str = "yuv420p",
    layout: str = "stereo",
    rate_hz: int = 44100,
    seconds: float = SECONDS,
    times_s: Sequence[float] | None = None,
    start_s: float = 0.0,
    audio_start_s: float | None = None,
    audio_seconds: float | None = None,
    rotation: int = 0,
    aspect: Fraction | None = None,
    second_size: tuple[int, int] | None = None,
    options: dict[str, str] | None = None,
    video_options: dict[str, str] | None = None,
    format: str | None = None,
) -> None:
    """Write one file.

    Args:
        times_s: time stamps of the frames (variable rate); default the grid of `fps`.
        start_s, audio_start_s: added to the time stamps of both or of the audio; the flashes move along.
        second_size: a second, smaller or larger video stream put before the first one.
    """
    frame_times = times_s if times_s is not None else [float(n / fps) for n in range(round(seconds * fps))]
    steps = [*np.diff(frame_times), float(1 / fps)] if len(frame_times) > 1 else [float(1 / fps)]
    with av.open(str(path), "w", format=format, options=options or {}) as container:
        streams = []
        for dimensions in ([second_size] if second_size else []) + ([size] if video else []):
            stream: Any = container.add_stream(video, rate=fps, options=video_options or {})
            stream.width, stream.height, stream.pix_fmt = *dimensions, pixel_format
            base = Fraction(1, 1000) if times_s is not None or start_s else 1 / fps
            stream.codec_context.time_base = base
            if aspect is not None:
                stream.codec_context.sample_aspect_ratio = aspect
            if rotation:
                stream.set_display_rotation(rotation)
            streams.append((stream, base))
        sound: Any = (
            container.add_stream(audio, rate=rate_hz, layout=layout, options={"strict": "experimental"})
            if audio
            else None
        )
        packets = []
        for stream, base in streams:
            for time_s, step_s in zip(frame_times, steps, strict=True):
                array = picture(time_s, stream.width, stream.height, FLASHES_S, step_s)
                frame = av.VideoFrame.from_ndarray(array, format="rgb24").reformat(format=pixel_format)
                frame.pts, frame.time_base = round((time_s + start_s) / base), base
                packets += stream.encode(frame)
            packets += stream.encode(None)
        if sound is not None:
            offset = start_s if audio_start_s is None else audio_start_s
            packets += _encode_audio(sound, audio_seconds or seconds, rate_hz, layout, offset)
        for packet in sorted(packets, key=lambda p: float((p.dts or 0) * p.time_base)):
            container.mux(packet)


def _encode_audio(stream: Any, seconds: float, rate_hz: int, layout: str, offset_s: float) -> list[Any]:
    track = clicks(seconds, rate_hz, FLASHES_S)
    channels = av.AudioLayout(layout).nb_channels
    planes = np.ascontiguousarray(np.broadcast_to(track, (channels, len(track))))
    frame = av.AudioFrame.from_ndarray(planes, format="fltp", layout=layout)
    frame.sample_rate, frame.pts, frame.time_base = rate_hz, round(offset_s * rate_hz), Fraction(1, rate_hz)
    resampler = av.AudioResampler(format=stream.codec_context.format.name, layout=layout, rate=rate_hz)
    packets = []
    for piece in [*resampler.resample(frame), *resampler.resample(None)]:
        packets += stream.encode(piece)
    return packets + list(stream.encode(None))


def bright_at(luma: Sequence[float], times_s: Sequence[float]) -> list[float]:
    """Times at which a flash begins."""
    bright = np.asarray(luma) > 170
    return [times_s[n] for n in range(len(bright)) if bright[n] and (n == 0 or not bright[n - 1])]


def loud_at(samples: NDArray[Any], rate_hz: int, start_s: float = 0.0) -> list[float]:
    """Times of the clicks: centre of energy of the 12 ms around each peak."""
    energy = np.asarray(samples, np.float64) ** 2
    found = []
    half, strongest = round(0.006 * rate_hz), 0.0
    while energy.max(initial=0.0) > 0 and len(found) < 8:
        peak = int(energy.argmax())
        if found and energy[peak] < 0.2 * strongest:
            break
        strongest = max(strongest, float(energy[peak]))
        low, high = max(peak - half, 0), min(peak + half + 1, len(energy))
        weights = energy[low:high]
        found.append(start_s + float((np.arange(low, high) * weights).sum() / weights.sum()) / rate_hz)
        energy[max(peak - 10 * half, 0) : peak + 10 * half] = 0
    return sorted(found)


def measure_source(path: Path, video_index: int, audio_index: int) -> tuple[list[float], list[float]]:
    """Flash and click times of a file by the time stamps that PyAV gives to its frames, without any of our code."""
    luma, times, pieces, start, rate, chunks = [], [], [], None, 0, []
    with av.open(str(path)) as container:
        by_order = container.format.name == "avi"
        for packet in container.demux(container.streams[video_index], container.streams[audio_index]):
            if by_order and packet.stream_index == video_index and packet.size:
                chunks.append(float(packet.dts * packet.time_base))  # AVI: chunk n is the time of picture n
            for frame in packet.decode():
                if isinstance(frame, av.VideoFrame):
                    luma.append(float(frame.reformat(format="gray").to_ndarray().mean()))
                    times.append(0.0 if by_order else float(frame.pts * frame.time_base))
                else:
                    rate = frame.sample_rate
                    start = float(frame.pts * frame.time_base) if start is None else start
                    array = frame.to_ndarray().astype(np.float64)
                    array = array.reshape(-1, len(frame.layout.channels)).T if not frame.format.is_planar else array
                    pieces.append(array.mean(0))
    return bright_at(luma, chunks[: len(luma)] if by_order else times), loud_at(
        np.concatenate(pieces), rate, start or 0.0
    )


def patch(path: Path, box: bytes, offset: int, data: bytes) -> None:
    """Overwrite bytes at an offset behind the name of the first box `box` of an MP4 file."""
    content = bytearray(path.read_bytes())
    place = content.index(box) + len(box) + offset
    content[place : place + len(data)] = data
    path.write_bytes(bytes(content))


def cut(path: Path, share: float) -> None:
    """Keep the first part of a file."""
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * share)])


def flip(path: Path, seed: int, flips: int, begin: float = 0.2) -> None:
    """Change single bits behind `begin` of the file."""
    generator = np.random.Generator(np.random.Philox(seed))
    content = bytearray(path.read_bytes())
    for _ in range(flips):
        place = int(generator.integers(int(begin * len(content)), len(content)))
        content[place] ^= 1 << int(generator.integers(8))
    path.write_bytes(bytes(content))


def _made(**options: Any) -> Callable[[Path], None]:
    return lambda path: make(path, **options)


def _written(data: bytes) -> Callable[[Path], None]:
    return lambda path: path.write_bytes(data) and None


def _after(change: Callable[[Path], None], **options: Any) -> Callable[[Path], None]:
    def build(path: Path) -> None:
        make(path, **options)
        change(path)

    return build


def _huge_duration(path: Path) -> None:
    patch(path, b"\x44\x89\x88", 0, struct.pack(">d", 1e12))  # Matroska Duration


def _huge_sample_rate(path: Path) -> None:
    patch(path, b"\xb5\x88", 0, struct.pack(">d", 5e6))  # Matroska SamplingFrequency


def _huge_rate(path: Path) -> None:
    patch(path, b"vids", 16, struct.pack("<II", 1, 1_000_000))  # AVI stream header: scale, rate


def _vfr() -> list[float]:
    """Time stamps that wander between 20 and 60 ms, with every flash on one of them."""
    generator = np.random.Generator(np.random.Philox(3))
    times, now = [], 0.0
    while now < SECONDS:
        times.append(round(now, 3))
        now += float(generator.integers(20, 61)) / 1000
    return sorted({*times, *FLASHES_S})


_CLAIMS_1000 = {"times_s": _vfr(), "fps": Fraction(1000)}  # recorders write the clock's rate for the pictures'

CODECS = (
    Sample("h264_aac.mp4", _made(), "fine"),
    Sample("h264_bframes_aac48.mp4", _made(rate_hz=48000, video_options={"bf": "2"}), "fine"),
    Sample("hevc_aac_mono8k.mp4", _made(video="libx265", layout="mono", rate_hz=8000), "fine"),
    Sample(
        "hevc_10bit_51.mkv", _made(video="libx265", pixel_format="yuv420p10le", layout="5.1", rate_hz=48000), "fine"
    ),
    Sample("h264_10bit.mp4", _made(pixel_format="yuv420p10le"), "fine"),
    Sample("vp8_vorbis.webm", _made(video="libvpx", audio="vorbis"), "fine"),
    Sample("vp9_opus.webm", _made(video="libvpx-vp9", audio="libopus", rate_hz=48000), "fine"),
    Sample("vp9_odd_size.webm", _made(video="libvpx-vp9", audio="libopus", rate_hz=48000, size=(175, 131)), "fine"),
    Sample("mpeg4_mp3.avi", _made(video="mpeg4", audio="libmp3lame"), "repaired", "frames missing"),
    Sample("mpeg4_bframes_pcm.avi", _made(video="mpeg4", audio="pcm_s16le", video_options={"bf": "2"}), "fine"),
    Sample("h264_bframes_pcm.avi", _made(audio="pcm_s16le", video_options={"bf": "2"}), "fine"),
    Sample("h264_bframes_mp3.avi", _made(audio="libmp3lame", video_options={"bf": "3", "b-pyramid": "none"}), "fine"),
    Sample("mpeg4_mp3_22k.mp4", _made(video="mpeg4", audio="libmp3lame", rate_hz=22050), "fine"),
    Sample("mjpeg_pcm.avi", _made(video="mjpeg", audio="pcm_s16le", pixel_format="yuvj420p"), "fine"),
    Sample(
        "mjpeg_pcm_mono11k.mov",
        _made(video="mjpeg", audio="pcm_s16le", pixel_format="yuvj420p", layout="mono", rate_hz=11025),
        "fine",
    ),
    Sample("h264_pcm32k.mov", _made(audio="pcm_s16le", rate_hz=32000), "fine"),
    Sample("h264_opus.mkv", _made(audio="libopus", rate_hz=48000), "fine"),
    Sample("h264_flac.mkv", _made(audio="flac"), "fine"),
    Sample("h264_ntsc.mkv", _made(fps=Fraction(30000, 1001)), "fine"),
    Sample("h264_aac.flv", _made(), "fine"),
    Sample("h264_aac.ts", _made(format="mpegts"), "fine"),
    Sample("mpeg2_mp2.mpg", _made(video="mpeg2video", audio="mp2", format="mpeg"), "fine"),
    Sample("av1_opus.mp4", _made(video="libsvtav1", audio="libopus", rate_hz=48000), "fine"),
)
ODD = (
    Sample("two_video_streams.mp4", _made(second_size=(64, 48)), "fine"),
    Sample("anamorphic.mp4", _made(aspect=Fraction(4, 3)), "fine"),
    Sample("rotated.mp4", _made(rotation=90), "repaired", "rotation"),
    Sample("vfr.mkv", _made(times_s=_vfr()), "repaired", "variable frame rate"),
    Sample("vfr.mp4", _made(times_s=_vfr()), "repaired", "variable frame rate"),
    Sample("claims_1000fps.webm", _made(video="libvpx", audio="vorbis", **_CLAIMS_1000), "repaired", "variable"),
    Sample("claims_1000fps.mkv", _made(**_CLAIMS_1000), "repaired", "variable frame rate"),
    Sample("claims_1000fps.mov", _made(**_CLAIMS_1000), "repaired", "variable frame rate"),
    Sample("start_5s.mkv", _made(start_s=5.0), "fine"),
    Sample("audio_late.mp4", _made(audio_start_s=0.3), "repaired", "audio start"),
    Sample("audio_early.mkv", _made(start_s=0.4, audio_start_s=0.0), "repaired", "start"),
    Sample("edit_list.mp4", _made(start_s=-0.4, options={"avoid_negative_ts": "disabled"}), "repaired", "edit list"),
    Sample("audio_short.mp4", _made(audio_seconds=1.0), "repaired", "audio end"),
    Sample("video_only.mp4", _made(audio=None), "silent", "no audio stream", False),
    Sample("short.mp4", _made(seconds=1.0), "short", "1.00 s", False),
    Sample("one_frame.mp4", _made(seconds=0.04, audio=None), "short", "0.04 s", False),
)
DAMAGED = (
    Sample("truncated.mkv", _after(lambda p: cut(p, 0.7)), "repaired", "truncated", False),
    Sample("truncated_early.mkv", _after(lambda p: cut(p, 0.3)), "refused", "", False),
    Sample(
        "truncated_faststart.mp4",
        _after(lambda p: cut(p, 0.8), options={"movflags": "faststart"}),
        "repaired",
        "",
        False,
    ),
    Sample("truncated.mp4", _after(lambda p: cut(p, 0.3)), "refused", "container does not open", False),
    Sample("garbage.mp4", _written(np.random.Generator(np.random.Philox(1)).bytes(50_000)), "refused", "", False),
    Sample("text.avi", _written(b"this is not a video\n" * 100), "refused", "container does not open", False),
    Sample("empty.mp4", _written(b""), "refused", "empty file", False),
    Sample("audio_only.m4a", _made(video=None, format="mp4"), "refused", "no video stream, audio only", False),
    Sample("audio_only.wav", _made(video=None, audio="pcm_s16le"), "refused", "no video stream, audio only", False),
    Sample(
        "playlist.mp4",
        _written(b"#EXTM3U\n#EXTINF:3,\nfile:///etc/passwd\n#EXT-X-ENDLIST\n"),
        "refused",
        "container",
        False,
    ),
    Sample(
        "concat.mp4", _written(b"ffconcat version 1.0\nfile /etc/passwd\n"), "refused", "container does not open", False
    ),
    Sample("huge_size.mp4", _made(size=(8208, 32), seconds=0.2, audio=None), "refused", "video size", False),
    Sample("huge_duration.mkv", _after(_huge_duration), "refused", "duration", False),
    Sample("huge_rate.avi", _after(_huge_rate, video="mpeg4", audio=None), "refused", "video rate", False),
    Sample("huge_sample_rate.mkv", _after(_huge_sample_rate, audio="pcm_s16le"), "refused", "sample rate", False),
    Sample(
        "bit_flips.mp4",
        _after(lambda p: flip(p, 1, 6, 0.75), video="mpeg4", options={"movflags": "faststart"}),
        "repaired",
        "damaged",
        False,
    ),
)
ZOO = CODECS + ODD + DAMAGED
