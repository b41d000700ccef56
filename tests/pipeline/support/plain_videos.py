"""Plain videos with known frames and sound, in the forms that people have them."""

import struct
from collections.abc import Callable, Iterable, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
from numpy.typing import NDArray

from tests.pipeline.support.stores import numbered_frames

FPS, NUM_FRAMES, RATE_HZ = 25, 75, 48_000
FLASHES = (10, 37, 60)  # frames that are white; a click is heard when they appear


def click_track(num_samples: int, rate_hz: int, times_s: Iterable[float]) -> NDArray[np.int16]:
    """Silence with 1 ms bursts that begin at the given times, (num_samples,) int16."""
    track = np.zeros(num_samples, np.int16)
    for time_s in times_s:
        begin = round(time_s * rate_hz)
        track[begin : begin + rate_hz // 1000] = 20_000
    return track


def chirp_track(num_samples: int, rate_hz: int) -> NDArray[np.int16]:
    """A tone that rises from 200 Hz by 300 Hz a second: every moment sounds different."""
    time_s = np.arange(num_samples) / rate_hz
    return np.asarray(12_000 * np.sin(2 * np.pi * (200 * time_s + 150 * time_s**2)), np.int16)


def flash_frames(width: int = 96, height: int = 64) -> list[NDArray[np.uint8]]:
    """Black frames with white ones at FLASHES."""
    return [np.full((height, width, 3), 255 if i in FLASHES else 0, np.uint8) for i in range(NUM_FRAMES)]


def write_video(
    path: Path,
    *,
    codec: str = "libx264",
    options: dict[str, str] | None = None,
    pix_fmt: str = "yuv420p",
    frames: Sequence[NDArray[np.uint8]] | None = None,
    fps: int = FPS,
    times: Sequence[int] | None = None,
    time_base: Fraction | None = None,
    audio_codec: str | None = "aac",
    audio: NDArray[np.int16] | None = None,
    rate_hz: int = RATE_HZ,
    layout: str = "mono",
    audio_start_s: float = 0.0,
    second_size: tuple[int, int] | None = None,
    container_options: dict[str, str] | None = None,
) -> Path:
    """Write one file.

    Args:
        frames: RGB pictures, default numbered ones. times: time stamps in `time_base`, default 0, 1, 2, ...
        audio: mono int16 at rate_hz, default a chirp of the video's length; None codec = no sound.
        second_size: also a second video stream of that size, of grey frames, written first.
    """
    frames = numbered_frames(NUM_FRAMES) if frames is None else frames
    height, width = frames[0].shape[:2]
    base = time_base or Fraction(1, fps)
    stamps = range(len(frames)) if times is None else times
    with av.open(str(path), "w", options=container_options or {}) as container:
        second = _video_stream(container, "libx264", fps, second_size, "yuv420p", {}) if second_size else None
        stream = _video_stream(container, codec, fps, (width, height), pix_fmt, options or {})
        stream.codec_context.time_base = base
        sound = None
        if audio_codec:
            sound = container.add_stream(audio_codec, rate=rate_hz)
            sound.layout = layout
        packets = []
        for picture, stamp in zip(frames, stamps, strict=True):
            frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
            frame.pts, frame.time_base = stamp, base
            packets += stream.encode(frame)
        packets += stream.encode(None)
        if second is not None and second_size is not None:
            for number in range(len(frames)):
                grey = np.full((second_size[1], second_size[0], 3), 128, np.uint8)
                frame = av.VideoFrame.from_ndarray(grey, format="rgb24")
                frame.pts, frame.time_base = number, Fraction(1, fps)
                packets += second.encode(frame)
            packets += second.encode(None)
        if sound is not None:
            length_s = float((stamps[-1] - stamps[0]) * base) + 1 / fps
            track = chirp_track(int(length_s * rate_hz), rate_hz) if audio is None else audio
            packets += _encode_sound(sound, track, layout, rate_hz, audio_start_s)
        packets.sort(key=lambda packet: packet.dts * packet.time_base)
        container.mux(packets)
    return path


def _video_stream(
    container: Any, codec: str, fps: int, size: tuple[int, int], pix_fmt: str, options: dict[str, str]
) -> Any:
    stream = container.add_stream(codec, rate=fps, options=options)
    stream.width, stream.height = size
    stream.pix_fmt = pix_fmt
    stream.codec_context.thread_count = 1
    return stream


def _encode_sound(stream: Any, track: NDArray[np.int16], layout: str, rate_hz: int, start_s: float) -> list[Any]:
    channels = av.AudioLayout(layout).nb_channels
    frame = av.AudioFrame.from_ndarray(np.repeat(track, channels).reshape(1, -1), format="s16", layout=layout)
    frame.sample_rate, frame.time_base = rate_hz, Fraction(1, rate_hz)
    frame.pts = round(start_s * rate_hz)
    return [*stream.encode(frame), *stream.encode(None)]


def turn_in_header(path: Path, degrees: int) -> None:
    """Set the display matrix of an MP4's video track, as telephones do: degrees clockwise to stand upright."""
    data = bytearray(path.read_bytes())
    cos, sin = {0: (1, 0), 90: (0, 1), 180: (-1, 0), 270: (0, -1)}[degrees]
    begin = data.index(b"tkhd")
    matrix = struct.pack(">9i", cos << 16, sin << 16, 0, -sin << 16, cos << 16, 0, 0, 0, 1 << 30)
    data[begin + 44 : begin + 80] = matrix
    path.write_bytes(bytes(data))


def truncated(path: Path, share: float) -> Path:
    """Keep the first part of a file."""
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * share)])
    return path


def onset(samples: NDArray[np.int16], begin: int, end: int) -> int:
    """First sample in a range that is louder than a quarter of the loudest there."""
    level = np.abs(samples[begin:end].astype(np.int64))
    return begin + int(np.argmax(level > level.max() // 4))


Maker = Callable[[Path], Path]
