"""SPDL's pipeline of threads, decord and PyTorchVideo, each as its documentation shows it."""

import random
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch

from benchmarks.peers.clips import CLIP_FRAMES, FPS, FRAME_STEP, RATE_HZ, SPAN_FRAMES, audio_offset
from benchmarks.peers.common import (
    JITTER_PX,
    Clip,
    Draw,
    Settings,
    audio_span_s,
    collate,
    crop_first,
    data_loader,
    draw,
    log_mel,
    whole_frames,
)


def _spdl(drawn: Draw) -> Clip:
    """Demux the window, keep every second frame in the filter graph, crop first."""
    import spdl.io

    half = 0.5 / FPS
    begin, end = drawn.first / FPS - half, (drawn.first + SPAN_FRAMES) / FPS - half
    packets = spdl.io.demux_video(drawn.path, timestamp=(max(begin, 0.0), end))
    chosen = f"trim=start={max(begin, 0.0)}:end={end},select='not(mod(n,{FRAME_STEP}))',format=rgb24"
    frames = spdl.io.to_torch(spdl.io.convert_frames(spdl.io.decode_packets(packets, filter_desc=chosen)))
    begin, end = audio_span_s(drawn.first)
    sound = spdl.io.demux_audio(drawn.path, timestamp=(begin, end))
    resampled = f"atrim=start={begin}:end={end},aresample={RATE_HZ},aformat=sample_fmts=fltp:channel_layouts=mono"
    wave = spdl.io.to_torch(spdl.io.convert_frames(spdl.io.decode_packets(sound, filter_desc=resampled)))
    return crop_first(frames.permute(0, 3, 1, 2), drawn), log_mel(wave.reshape(-1))


def spdl_threads(videos: Sequence[str], settings: Settings) -> Iterator[Clip]:
    """SPDL: a pipeline of threads."""
    from spdl.pipeline import PipelineBuilder

    torch.set_num_threads(1)
    rng = random.Random(settings.seed)

    def draws() -> Iterator[Draw]:
        """Random clips without end."""
        while True:
            yield draw(videos, rng)

    builder: Any = PipelineBuilder()
    builder = builder.add_source(draws()).pipe(_spdl, concurrency=settings.workers).aggregate(settings.clips)
    pipeline = builder.pipe(collate).add_sink(2).build(num_threads=settings.workers)
    with pipeline.auto_stop():
        yield from pipeline


def _decord(drawn: Draw) -> Clip:
    """Frames by number, whole frames in float; all sound of the file, as its reader gives it."""
    import decord

    reader = decord.VideoReader(drawn.path, num_threads=1)
    numbers = [drawn.first + FRAME_STEP * i for i in range(CLIP_FRAMES)]
    frames = torch.from_numpy(reader.get_batch(numbers).asnumpy())
    sound = decord.AudioReader(drawn.path, sample_rate=RATE_HZ, mono=True)
    begin = round(audio_span_s(drawn.first)[0] * RATE_HZ)
    wave = torch.from_numpy(np.asarray(sound[:].asnumpy(), np.float32)[0, begin:])
    return whole_frames(frames, drawn), log_mel(wave)


def decord_loader(videos: Sequence[str], settings: Settings) -> Iterator[Clip]:
    """decord and DataLoader."""
    return data_loader(videos, settings, _decord)


def _pytorchvideo_transform() -> Callable[[dict[str, Any]], Clip]:
    """The usual chain: subsample, scale, normalise, jitter, crop, mirror; log-mel of the clip's sound."""
    import torchaudio

    def transform(sample: dict[str, Any]) -> Clip:
        """One sample of the data set."""
        video = sample["video"]
        frames = video[:, torch.linspace(0, video.shape[1] - 1, video.shape[1]).long()[::FRAME_STEP][:CLIP_FRAMES]]
        rng = random.Random()
        drawn = Draw("", 0, rng.randint(*JITTER_PX), (rng.random(), rng.random()), rng.random() < 0.5)
        clip = whole_frames(frames.permute(1, 2, 3, 0), drawn)
        sound = sample["audio"] / 32768.0 if sample["audio"].abs().max() > 2 else sample["audio"]
        wave = torchaudio.functional.resample(sound, 48_000, RATE_HZ)
        return clip, log_mel(wave[audio_offset() :])

    return transform


def pytorchvideo_loader(videos: Sequence[str], settings: Settings) -> Iterator[Clip]:
    """PyTorchVideo's LabeledVideoDataset and DataLoader."""
    from pytorchvideo.data import LabeledVideoDataset, make_clip_sampler
    from torch.utils.data import DataLoader, RandomSampler

    data = LabeledVideoDataset(
        [(path, {"label": 0}) for path in videos] * 1000,
        make_clip_sampler("random", SPAN_FRAMES / FPS),
        video_sampler=RandomSampler,
        transform=_pytorchvideo_transform(),
    )
    return iter(DataLoader(data, batch_size=settings.clips, num_workers=settings.workers))
