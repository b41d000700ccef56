"""torchcodec: as its documentation shows it in DataLoader processes, tuned, and with threads in place of processes."""

import random
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import torch
from torch import Tensor

from benchmarks.peers.clips import FRAME_STEP, RATE_HZ, SPAN_FRAMES
from benchmarks.peers.common import (
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


def sound_of(path: str, first: int) -> Tensor:
    """(samples,) of a clip's sound in [-1, 1]."""
    from torchcodec.decoders import AudioDecoder

    begin, end = audio_span_s(first)
    decoder = AudioDecoder(path, sample_rate=RATE_HZ, num_channels=1)
    samples = decoder.get_samples_played_in_range(begin, end)
    skip = max(round((begin - samples.pts_seconds) * RATE_HZ), 0)
    return samples.data[0, skip:]


def _basic(drawn: Draw) -> Clip:
    from torchcodec.decoders import VideoDecoder

    decoder = VideoDecoder(drawn.path)
    batch = decoder.get_frames_in_range(drawn.first, drawn.first + SPAN_FRAMES, FRAME_STEP)
    return whole_frames(batch.data.permute(0, 2, 3, 1), drawn), log_mel(sound_of(drawn.path, drawn.first))


def _tuned(drawn: Draw) -> Clip:
    from torchcodec.decoders import VideoDecoder

    decoder = VideoDecoder(drawn.path, seek_mode="approximate", num_ffmpeg_threads=1)
    batch = decoder.get_frames_in_range(drawn.first, drawn.first + SPAN_FRAMES, FRAME_STEP)
    return crop_first(batch.data, drawn), log_mel(sound_of(drawn.path, drawn.first))


def basic(videos: Sequence[str], settings: Settings) -> Iterator[Clip]:
    """torchcodec and DataLoader as documented."""
    return data_loader(videos, settings, _basic)


def tuned(videos: Sequence[str], settings: Settings) -> Iterator[Clip]:
    """torchcodec and DataLoader: approximate seeks, one FFmpeg thread, crop first."""
    return data_loader(videos, settings, _tuned)


def threads(videos: Sequence[str], settings: Settings) -> Iterator[Clip]:
    """The same in threads of one process, two batches ahead."""
    torch.set_num_threads(1)
    rng = random.Random(settings.seed)
    with ThreadPoolExecutor(settings.workers) as pool:
        waiting: deque[list[Future[Clip]]] = deque()
        while True:
            while len(waiting) < 3:
                waiting.append([pool.submit(_tuned, draw(videos, rng)) for _ in range(settings.clips)])
            yield collate([future.result() for future in waiting.popleft()])
