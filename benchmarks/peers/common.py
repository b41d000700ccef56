"""What the ways share: the clip that is drawn, the augmentation as users write it, log-mel, and torch's DataLoader.

Legend: B clips, C = 3, T frames, H W pixels, M audio frames, F mel bins.
"""

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from benchmarks.peers.clips import CLIP_SAMPLES, FPS, NUM_FRAMES, RATE_HZ, SPAN_FRAMES, audio_offset

CROP_PX, JITTER_PX = 224, (256, 320)
MEAN, STD = 0.45, 0.225
Clip = tuple[Tensor, Tensor]
Way = Callable[[Sequence[str], "Settings"], Iterator[Clip]]


@dataclass(frozen=True)
class Settings:
    """What every way is asked for.

    Args:
        clips: of a batch. workers: processes or threads that decode. seed: of the draws.
    """

    clips: int = 8
    workers: int = 2
    seed: int = 0


@dataclass(frozen=True)
class Draw:
    """One random clip: its file, its first frame, the short side of the jitter, place of the crop, and the mirror."""

    path: str
    first: int
    side: int
    at: tuple[float, float]
    flip: bool


def draw(videos: Sequence[str], rng: random.Random) -> Draw:
    """Draw a clip."""
    return Draw(
        rng.choice(videos),
        rng.randint(0, NUM_FRAMES - SPAN_FRAMES),
        rng.randint(*JITTER_PX),
        (rng.random(), rng.random()),
        rng.random() < 0.5,
    )


def audio_span_s(first: int) -> tuple[float, float]:
    """Seconds of a clip's sound."""
    begin = first / FPS + audio_offset() / RATE_HZ
    return begin, begin + CLIP_SAMPLES / RATE_HZ


def fit(wave: Tensor) -> Tensor:
    """Cut or fill (samples,) to the length of a clip's sound."""
    missing = CLIP_SAMPLES - len(wave)
    return torch.nn.functional.pad(wave, (0, missing)) if missing > 0 else wave[:CLIP_SAMPLES]


@cache
def _mel() -> Any:
    import torchaudio

    return torchaudio.transforms.MelSpectrogram(
        sample_rate=RATE_HZ, n_fft=512, hop_length=256, n_mels=80, power=2.0, center=False, norm="slaney",
        mel_scale="htk",
    )  # fmt: skip


def log_mel(wave: Tensor) -> Tensor:
    """(1, M, F) of (samples,) in [-1, 1]."""
    return ((torch.log(_mel()(fit(wave)) + 1e-8) + 7.03) / 4.66).T[None].contiguous()


def whole_frames(frames: Tensor, drawn: Draw) -> Tensor:
    """The augmentation of the published code: normalise, resize and crop whole frames in float.

    Args:
        frames: (T, H, W, C) uint8.

    Returns:
        (C, T, 224, 224) float32.
    """
    video = ((frames.float() / 255.0 - MEAN) / STD).permute(3, 0, 1, 2)
    height, width = _scaled(video.shape[-2], video.shape[-1], drawn.side)
    video = torch.nn.functional.interpolate(video, size=(height, width), mode="bilinear", align_corners=False)
    top, left = (round(room * at) for room, at in zip((height - CROP_PX, width - CROP_PX), drawn.at, strict=True))
    video = video[:, :, top : top + CROP_PX, left : left + CROP_PX]
    return video.flip(-1) if drawn.flip else video


def crop_first(frames: Tensor, drawn: Draw) -> Tensor:
    """The same, tuned: crop the source, resize bytes, normalise what is left.

    Args:
        frames: (T, C, H, W) uint8.

    Returns:
        (C, T, 224, 224) float32.
    """
    top, left, size = source_window(frames.shape[-2], frames.shape[-1], drawn)
    cut = frames[:, :, top : top + size, left : left + size]
    small = torch.nn.functional.interpolate(cut, size=(CROP_PX, CROP_PX), mode="bilinear", align_corners=False)
    if drawn.flip:
        small = small.flip(-1)
    return small.float().sub_(MEAN * 255).div_(STD * 255).permute(1, 0, 2, 3)


def source_window(height: int, width: int, drawn: Draw) -> tuple[int, int, int]:
    """Top, left and side of the square of the source that becomes the crop, px."""
    size = round(CROP_PX * min(height, width) / drawn.side)
    return round((height - size) * drawn.at[0]), round((width - size) * drawn.at[1]), size


def _scaled(height: int, width: int, side: int) -> tuple[int, int]:
    if width < height:
        return int(height / width * side), side
    return side, int(width / height * side)


class Clips(Dataset[Clip]):
    """Random clips, made by `load` in DataLoader's processes."""

    def __init__(self, videos: Sequence[str], settings: Settings, load: Callable[[Draw], Clip]) -> None:
        self._videos, self._settings, self._load = list(videos), settings, load

    def __len__(self) -> int:
        return 1_000_000

    def __getitem__(self, index: int) -> Clip:
        torch.set_num_threads(1)
        return self._load(draw(self._videos, random.Random(self._settings.seed * 1_000_003 + index)))


def data_loader(videos: Sequence[str], settings: Settings, load: Callable[[Draw], Clip]) -> Iterator[Clip]:
    """Yield batches of torch's DataLoader with worker processes."""
    return iter(
        DataLoader(Clips(videos, settings, load), batch_size=settings.clips, num_workers=settings.workers, shuffle=True)
    )


def collate(clips: Sequence[Clip]) -> Clip:
    """Stack clips."""
    return torch.stack([frames for frames, _ in clips]), torch.stack([mel for _, mel in clips])
