"""One clip from the middle of a video, as an exported model wants it. Needs torch, torchaudio and PyAV, nothing else.

`experiments.export` copies this file beside a model as clip.py. It follows inputs.json and shares no code with the
pipeline: pictures are resized by torch here and by the pipeline's own operation there, which differ by rounding.
"""

import math
from pathlib import Path
from typing import Any

import av
import numpy as np
import torch
import torchaudio
from torch import Tensor

RATE_HZ, WINDOW, HOP = 16_000, 512, 256


def clip_of(video: str | Path, inputs: dict[str, Any]) -> dict[str, Tensor]:
    """Read the clip in the middle of a short video, all of which is decoded into memory.

    Args:
        video: of any format that PyAV reads.
        inputs: "inputs" of inputs.json.

    Returns:
        frames (1, 3, T, S, S) and log_mel (1, 1, M, F), float32; those that the model has.
    """
    covers = av.stream.Disposition.attached_pic
    with av.open(str(video)) as file:
        moving = [one for one in file.streams.video if not one.disposition & covers]
        stream = max(moving, key=lambda one: one.width * one.height)
        shown = list(file.decode(stream))
        times = [frame.time for frame in shown]
        fps = float(stream.average_rate or 25)
        is_avi = file.format.name == "avi"  # whose frame times are those of decoding; frame n is shown at n / rate
    begin_s = 0.0 if is_avi else times[0] or 0.0
    if len(times) > 1 and times[-1] and times[-1] > begin_s and not is_avi:
        fps = (len(times) - 1) / (times[-1] - begin_s)
    span_s = next(iter(inputs.values()))["clip_s"]
    first = max(0, (len(shown) - math.ceil(span_s * fps - 1e-6)) // 2)
    found = {}
    if "frames" in inputs:
        wanted = inputs["frames"]
        step = fps / wanted["frames_per_second"]
        numbers = [min(first + int(i * step + 1e-6), len(shown) - 1) for i in range(wanted["shape"][2])]
        if not is_avi:
            numbers = [_nearest(times, begin_s + number / fps, number) for number in numbers]
        found["frames"] = _frames([shown[number] for number in numbers], wanted)
    if "log_mel" in inputs:
        middle_s = begin_s + first / fps + span_s / 2
        found["log_mel"] = _log_mel(_sound(video, middle_s, inputs["log_mel"]["shape"][2]), inputs["log_mel"])
    return found


def _nearest(times: list[float | None], wanted_s: float, number: int) -> int:
    """Number of the frame nearest to a time, as rates vary; `number` where frames have no times."""
    if any(time is None for time in times):
        return number
    return int(np.abs(np.array(times, np.float64) - wanted_s).argmin())


def _frames(shown: list[Any], wanted: dict[str, Any]) -> Tensor:
    """(1, 3, T, S, S) of decoded frames: the square in their middle, resized to S, normalised."""
    size, pictures = wanted["shape"][3], []
    for frame in shown:
        upright = np.rot90(frame.to_ndarray(format="rgb24"), round(frame.rotation / 90) % 4)  # telephones turn them
        picture = torch.from_numpy(np.ascontiguousarray(upright)).permute(2, 0, 1)[None] / 255
        height, width = picture.shape[2:]
        side = min(height, width)
        top, left = (height - side) // 2, (width - side) // 2
        square = picture[:, :, top : top + side, left : left + side]
        pictures.append(torch.nn.functional.interpolate(square, (size, size), mode="bilinear")[0])
    mean, std = (torch.tensor(wanted[name]).view(3, 1, 1, 1) for name in ("mean", "std"))
    return ((torch.stack(pictures, 1) - mean) / std)[None]


def _sound(video: str | Path, middle_s: float, columns: int) -> Tensor:
    """(samples,) of the window around the middle, 16 kHz mono in -1..1; zeros where there is no sound."""
    samples = (columns - 1) * HOP + WINDOW
    wave = np.zeros(samples, np.float32)
    heard: list[Any] = []
    start_s: float | None = None
    with av.open(str(video)) as file:
        known = [one for one in file.streams.audio if one.codec_context is not None]
        tracks = [(one.disposition & 1, one.channels, one.sample_rate, -one.index) for one in known]
    for *_, channels, rate, number in sorted(tracks, reverse=True):
        if channels and rate and not heard:  # a track may be announced and have nothing
            heard, start_s = _heard(video, -number)
    sound = np.concatenate([np.zeros(0, np.int16), *heard])
    first = round((middle_s - (start_s or 0.0)) * RATE_HZ - samples / 2)
    part = sound[max(0, first) : max(0, first + samples)]
    wave[max(0, -first) : max(0, -first) + len(part)] = part.astype(np.float32) / 32768
    return torch.from_numpy(wave)


def _heard(video: str | Path, number: int) -> tuple[list[Any], float | None]:
    """Samples of a stream by its number, 16 kHz mono int16 in pieces, and the time of the first one in seconds."""
    to_mono = av.AudioResampler("s16", "mono", RATE_HZ)
    heard: list[Any] = []
    start_s: float | None = None
    with av.open(str(video)) as file:
        for frame in file.decode(file.streams[number]):
            start_s = float(frame.time or 0) if start_s is None else start_s
            heard += [part.to_ndarray()[0] for part in to_mono.resample(frame)]
    return heard + ([part.to_ndarray()[0] for part in to_mono.resample(None)] if heard else []), start_s


def _log_mel(wave: Tensor, wanted: dict[str, Any]) -> Tensor:
    """(1, 1, M, F): ln(mel power + 1e-8), normalised; zeros for a wave of nothing but zeros."""
    columns, bins = wanted["shape"][2:]
    mel = torchaudio.transforms.MelSpectrogram(
        RATE_HZ, n_fft=WINDOW, win_length=WINDOW, hop_length=HOP, n_mels=bins, center=False, norm="slaney"
    )
    if not wave.any():
        return torch.zeros(1, 1, columns, bins)
    log_mel: Tensor = ((mel(wave).T + 1e-8).log() - wanted["mean"]) / wanted["std"]
    return log_mel[None, None]
