"""PyAV in DataLoader processes: as the published PySlowFast code decodes, and as one tunes it."""

from collections.abc import Iterator, Sequence
from typing import Any

import av
import numpy as np
import torch
from torch import Tensor

from benchmarks.peers.clips import CLIP_FRAMES, FPS, FRAME_STEP, RATE_HZ, SPAN_FRAMES
from benchmarks.peers.common import (
    Clip,
    Draw,
    Settings,
    audio_span_s,
    crop_first,
    data_loader,
    log_mel,
    whole_frames,
)

MARGIN_TICKS, BUFFER_FRAMES = 1024, 5  # what the published decoder reads before and behind the clip


def sound_of(container: Any, first: int) -> Tensor:
    """(samples,) of a clip's sound in [-1, 1]: seek, decode, resample to 16 kHz mono, cut by time stamps."""
    begin, end = audio_span_s(first)
    stream = container.streams.audio[0]
    container.seek(max(int((begin - 0.2) / stream.time_base), 0), stream=stream, backward=True)
    resampler = av.AudioResampler(format="s16", layout="mono", rate=RATE_HZ)
    pieces, start_s = [], None
    for frame in container.decode(stream):
        if frame.time > end + 0.05:
            break
        start_s = frame.time if start_s is None else start_s
        pieces += [piece.to_ndarray()[0] for piece in resampler.resample(frame)]
    pieces += [piece.to_ndarray()[0] for piece in resampler.resample(None)]
    samples = np.concatenate(pieces)
    skip = round((begin - (start_s or 0.0)) * RATE_HZ)
    return torch.from_numpy(samples[skip:]).float() / 32768


def _pyslowfast(drawn: Draw) -> Clip:
    """Decode everything from the key frame on into RGB, choose 32 frames by linspace, augment whole frames in float."""
    with av.open(drawn.path) as container:
        container.streams.video[0].thread_type = "AUTO"
        stream = container.streams.video[0]
        ticks = 1 / (FPS * stream.time_base)
        start, end = drawn.first * ticks, (drawn.first + SPAN_FRAMES - 1) * ticks
        container.seek(max(int(start) - MARGIN_TICKS, 0), any_frame=False, backward=True, stream=stream)
        found, behind = {}, 0
        for frame in container.decode(stream):
            if frame.pts < start:
                continue
            if frame.pts > end:
                behind += 1
                if behind >= BUFFER_FRAMES:
                    break
            found[frame.pts] = frame
        pictures = [found[pts].to_rgb().to_ndarray() for pts in sorted(found)]
        video = torch.as_tensor(np.stack(pictures))
        places = torch.linspace(0, SPAN_FRAMES - 1, SPAN_FRAMES).long()[::FRAME_STEP]
        frames = whole_frames(torch.index_select(video, 0, places), drawn)
        return frames, log_mel(sound_of(container, drawn.first))


def _tuned(drawn: Draw) -> Clip:
    """Convert wanted frames only, crop first, resize bytes."""
    with av.open(drawn.path) as container:
        stream = container.streams.video[0]
        stream.codec_context.thread_count, stream.codec_context.thread_type = 1, "SLICE"
        ticks = 1 / (FPS * stream.time_base)
        wanted = {round((drawn.first + FRAME_STEP * i) * ticks): i for i in range(CLIP_FRAMES)}
        last = max(wanted)
        container.seek(int(drawn.first * ticks), backward=True, stream=stream)
        frames = None
        for frame in container.decode(stream):
            place = wanted.get(frame.pts)
            if place is not None:
                picture = torch.from_numpy(frame.to_ndarray(format="rgb24"))
                if frames is None:
                    frames = torch.empty((CLIP_FRAMES, *picture.shape), dtype=torch.uint8)
                frames[place] = picture
                if frame.pts == last:
                    break
        assert frames is not None
        return crop_first(frames.permute(0, 3, 1, 2), drawn), log_mel(sound_of(container, drawn.first))


def pyslowfast(videos: Sequence[str], settings: Settings) -> Iterator[Clip]:
    """PyAV and DataLoader as PySlowFast has them."""
    return data_loader(videos, settings, _pyslowfast)


def tuned(videos: Sequence[str], settings: Settings) -> Iterator[Clip]:
    """PyAV and DataLoader, tuned."""
    return data_loader(videos, settings, _tuned)


def decoded_by_pyslowfast(first: int, gop: int) -> int:
    """Frames that the published decoder decodes for a clip: from the key frame before its margin to its buffer."""
    margin = MARGIN_TICKS * FPS // 15360  # PyAV's time base for 30 fps
    seek = max(first - margin, 0)
    return first + SPAN_FRAMES - 1 + BUFFER_FRAMES - seek // gop * gop + 1


def decoded_to_last(first: int, gop: int) -> int:
    """Frames from the key frame before a clip to its last frame."""
    return first + FRAME_STEP * (CLIP_FRAMES - 1) - first // gop * gop + 1
