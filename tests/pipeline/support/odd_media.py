"""Files as recorders, tuners and converters write them, on top of `media_zoo`: tracks without packets or too long,
packed bitstreams, clocks that wrap, gap or fall back, high dynamic range, pictures that stand."""

from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np

from tests.pipeline.support import media_zoo as zoo

SIZE = (64, 48)
WRAP_S = 2**33 / 90_000  # after which the clock of a transport stream begins anew
_NO_B_FRAMES = {"libx264": {"bf": "0"}, "mpeg4": {"bf": "0"}}


def _video(container: Any, codec: str, fps: Fraction = Fraction(25), size: tuple[int, int] = SIZE) -> Any:
    stream = container.add_stream(codec, rate=fps, options=_NO_B_FRAMES.get(codec, {}))
    stream.width, stream.height = size
    stream.pix_fmt = "yuvj420p" if codec == "mjpeg" else "yuv420p"
    return stream


def _pictures(
    stream: Any, times_s: Sequence[float], base: Fraction, flashes: Sequence[float] = zoo.FLASHES_S
) -> list[Any]:
    packets = []
    for time_s in times_s:
        array = zoo.picture(time_s, stream.width, stream.height, flashes, 0.04)
        frame = av.VideoFrame.from_ndarray(array, format="rgb24").reformat(format=stream.pix_fmt)
        frame.pts, frame.time_base = round(time_s / base), base
        packets += stream.encode(frame)
    return packets + list(stream.encode(None))


def _mux(container: Any, packets: Sequence[Any]) -> None:
    for packet in sorted(packets, key=lambda p: float((p.dts or 0) * p.time_base)):
        container.mux(packet)


def with_tracks(
    path: Path,
    *,
    video: str = "libx264",
    audio: str | None = "aac",
    empty: str | None = None,
    other: str | None = None,
    other_s: float = 9.0,
    format: str | None = None,
) -> None:
    """Write 3 s of video with a track that nobody uses.

    Args:
        audio: the track with clicks; None has none. empty: a track before it that is announced and holds no packet.
        other: "data", "pictures" (a small video), "ass" (subtitles), or the codec of a mono track.
        other_s: where the other track ends.
    """
    with av.open(str(path), "w", format=format) as container:
        pictures = _video(container, video)
        if empty:
            container.add_stream(empty, rate=48_000, layout="stereo")
        sound = container.add_stream(audio, rate=48_000, layout="mono" if empty else "stereo") if audio else None
        packets = _pictures(pictures, [n / 25 for n in range(75)], Fraction(1, 25))
        if sound is not None:
            packets += zoo._encode_audio(sound, 3.0, 48_000, sound.layout.name, 0.0)
        if other == "pictures":
            small = _video(container, "mjpeg", Fraction(1), (32, 32))
            packets += _pictures(small, range(round(other_s) + 1), Fraction(1), ())
        elif other in ("data", "ass"):
            packets += _texts(container, other, other_s)
        elif other:
            mono = container.add_stream(other, rate=48_000, layout="mono")
            mono.disposition = av.stream.Disposition(0)
            packets += zoo._encode_audio(mono, other_s, 48_000, "mono", 0.0)
        _mux(container, packets)


def _texts(container: Any, kind: str, end_s: float) -> list[Any]:
    stream = container.add_data_stream("bin_data") if kind == "data" else container.add_stream("ass")
    packets = []
    for second in (0, round(end_s) - 1):
        packet = av.Packet(b"0,0,Default,,0,0,0,,words")
        packet.stream, packet.pts, packet.dts, packet.duration = stream, second * 1000, second * 1000, 1000
        packet.time_base = Fraction(1, 1000)
        packets.append(packet)
    return packets


def packed_avi(path: Path, *, b_frames: int = 1, fps: Fraction = Fraction(25)) -> None:
    """DivX's packed bitstream: a picture and the first B-frame shown before it in one chunk, and later an empty one."""
    source = path.with_name(f"{path.stem}.source.avi")
    options = {"bf": str(b_frames), "b_strategy": "0"}
    zoo.make(source, video="mpeg4", audio="pcm_s16le", fps=fps, size=SIZE, video_options=options)
    with av.open(str(source)) as file, av.open(str(path), "w") as container:
        streams = {stream.index: container.add_stream_from_template(stream) for stream in file.streams}
        data, sound = [], []
        for packet in file.demux(file.streams.video[0], file.streams.audio[0]):
            if packet.size and packet.stream_index == 0:
                data.append(bytes(packet))
            elif packet.size:
                packet.stream = streams[1]
                sound.append(packet)
        for number, (chunk, is_key) in enumerate(_packed(data, (fps.numerator - 1).bit_length())):
            packet = av.Packet(chunk)
            packet.stream, packet.pts, packet.dts, packet.time_base = streams[0], number, number, 1 / fps
            packet.is_keyframe = is_key
            sound.append(packet)
        _mux(container, sound)


def _packed(pictures: Sequence[bytes], time_bits: int) -> list[tuple[bytes, bool]]:
    """Chunks of MPEG-4 pictures (ISO 14496-2); words of DivX in the key frames tell decoders that they are packed."""
    kinds = [data[data.index(b"\0\0\1\xb6") + 4] >> 6 for data in pictures]  # 0 I, 1 P, 2 B
    bits = "0101" + "0" * time_bits + "100"  # a P picture that is not coded
    empty = b"\0\0\1\xb6" + int(bits + "1" * (-len(bits) % 8), 2).to_bytes(-(-len(bits) // 8), "big")
    chunks, number = [], 0
    while number < len(pictures):
        data, behind = pictures[number], number + 1
        if kinds[number] == 0:
            place = data.find(b"\0\0\1\xb2")
            end = data.index(b"\0\0\1", place + 4) if place >= 0 else 0
            data = data[: max(place, 0)] + b"\0\0\1\xb2DivX503b1393p" + data[end:]
        while behind < len(pictures) and kinds[behind] == 2:
            behind += 1
        if behind - number > 1:
            chunks.append((data + pictures[number + 1], kinds[number] == 0))
            chunks += [(pictures[n], False) for n in range(number + 2, behind)] + [(empty, False)]
        else:
            chunks.append((data, kinds[number] == 0))
        number = behind
    return chunks


def shifted_ts(
    path: Path, shift_s: float = 0.0, *, jump_at_s: float = 1e9, jump_s: float = 0.0, audio: str = "aac"
) -> None:
    """A transport stream whose clock begins `shift_s` later and, from a time of it on, `jump_s` later still."""
    zoo.make(path, format="mpegts", audio=audio, rate_hz=48_000, size=SIZE)
    data = bytearray(path.read_bytes())

    def moved(ticks: int) -> int:
        seconds = shift_s + (jump_s if ticks / 90_000 >= jump_at_s else 0.0)
        return (ticks + round(seconds * 90_000)) % 2**33

    for begin in range(0, len(data), 188):
        control, place = data[begin + 3] >> 4 & 3, begin + 4
        if control & 2:
            if data[place] and data[place + 1] & 0x10:  # a clock reference: 33 bits at 90 kHz, then others
                clock = int.from_bytes(data[place + 2 : place + 7], "big")
                data[place + 2 : place + 7] = (moved(clock >> 7) << 7 | clock & 127).to_bytes(5, "big")
            place += 1 + data[place]
        is_start = data[begin + 1] & 0x40 and control & 1
        if is_start and data[place : place + 3] == b"\0\0\1" and data[place + 3] & 0xC0 >= 0x80:
            for at in (place + 9, place + 14)[: (0, 0, 1, 2)[data[place + 7] >> 6]]:
                a, b, c = (
                    data[at],
                    int.from_bytes(data[at + 1 : at + 3], "big"),
                    int.from_bytes(data[at + 3 : at + 5], "big"),
                )
                ticks = moved((a >> 1 & 7) << 30 | b >> 1 << 15 | c >> 1)
                parts = (a & 0xF1 | (ticks >> 30) << 1, (ticks >> 15 & 0x7FFF) << 1 | 1, (ticks & 0x7FFF) << 1 | 1)
                data[at : at + 5] = bytes([parts[0]]) + parts[1].to_bytes(2, "big") + parts[2].to_bytes(2, "big")
    path.write_bytes(bytes(data))


def high_dynamic_range(path: Path, transfer: int, *, codec: str = "libx265", format: str | None = None) -> None:
    """Ten bit pictures tagged BT.2020 with a transfer of ISO 23091-2: 16 PQ, 18 HLG."""
    words = {16: "smpte2084", 18: "arib-std-b67"}[transfer]
    params = f"log-level=none:transfer={words}:colorprim=bt2020:colormatrix=bt2020nc"
    with av.open(str(path), "w", format=format) as container:
        stream = container.add_stream(codec, rate=25, options={"x265-params": params} if codec == "libx265" else {})
        stream.width, stream.height, stream.pix_fmt = *SIZE, "yuv420p10le"
        context = stream.codec_context
        context.color_trc, context.color_primaries, context.colorspace = transfer, 9, 9
        _mux(container, _pictures(stream, [n / 25 for n in range(30)], Fraction(1, 25)))


def stills(
    path: Path, times_s: Sequence[float], end_s: float, *, video: str = "libx264", audio: str | None = "aac"
) -> None:
    """Pictures that stand until the next one, the last one until `end_s`, with sound all the time."""
    with av.open(str(path), "w") as container:
        fps = Fraction(1) if len(times_s) < 2 else Fraction(1, round(times_s[1] - times_s[0]))
        stream = _video(container, video, fps)
        base = Fraction(1, 1000)
        stream.codec_context.time_base = base
        sound = container.add_stream(audio, rate=48_000, layout="stereo") if audio else None
        packets = _pictures(stream, times_s, base, ())
        for packet, begin, end in zip(packets, times_s, [*times_s[1:], end_s], strict=True):
            packet.duration = round((end - begin) / packet.time_base)
        if sound is not None:
            packets += zoo._encode_audio(sound, end_s, 48_000, "stereo", 0.0)
        _mux(container, packets)


def write_tracks(
    path: Path, codec: str, peaks: tuple[int, ...], *, rate_hz: int = 48_000, seconds: float = 1.0
) -> Path:
    """A second with a track a peak (of 32767), the first one stereo and the default where the container knows such."""
    rate_hz, seconds = 48_000, 1
    with av.open(str(path), "w") as container:
        video: Any = container.add_stream("mpeg4", rate=25)
        video.width, video.height, video.pix_fmt = 64, 48, "yuv420p"
        sounding: list[Any] = []
        for number in range(len(peaks)):
            layout = "mono" if number else "stereo"
            sounding.append(container.add_stream(codec, rate=rate_hz, layout=layout))
            sounding[-1].disposition = av.stream.Disposition(0) if number else av.stream.Disposition.default
        packets = []
        for number in range(25 * seconds):
            frame = av.VideoFrame.from_ndarray(np.full((48, 64, 3), 99, np.uint8), format="rgb24")
            frame.pts, frame.time_base = number, Fraction(1, 25)
            packets += video.encode(frame)
        packets += video.encode(None)
        for stream, peak in zip(sounding, peaks, strict=True):
            wave = np.round(peak * np.sin(np.arange(seconds * rate_hz) / 9)).astype(np.int16)
            planes = np.repeat(wave, stream.channels).reshape(1, -1)
            sound = av.AudioFrame.from_ndarray(planes, format="s16", layout=stream.layout.name)
            sound.sample_rate, sound.time_base, sound.pts = rate_hz, Fraction(1, rate_hz), 0
            packets += [*stream.encode(sound), *stream.encode(None)]
        for packet in sorted(packets, key=lambda p: float((p.dts or 0) * p.time_base)):
            container.mux(packet)
    return path
