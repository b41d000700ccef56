"""Scenes whose labels need eye and ear, and the ceilings of who has only one of them, by counting.

A scene shows one of four patterns in warm or cold colours and sounds like a hum or a hiss, steady or pulsed. What it
shows follows from (pattern, warm, seed) alone, what is heard from (hiss, pulsed, seed) alone: scenes of one seed that
differ in their sound have the same pictures to the bit, so that nobody without ears can tell them apart.
"""

from collections import Counter, defaultdict
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from tests.pipeline.support.plain_videos import write_video

WIDTH, HEIGHT, FPS, RATE_HZ = 64, 48, 15, 16_000
UPRIGHT, LEVEL, CHECKED, PLAIN = range(4)
Part = tuple[list[NDArray[np.uint8]], NDArray[np.int16]]


@dataclass(frozen=True)
class Scene:
    """What is seen and heard for some seconds; `has_sound` is of the whole file (no sound track at all)."""

    seed: int
    pattern: int = UPRIGHT
    warm: bool = False
    hiss: bool = False
    pulsed: bool = False
    has_sound: bool = True

    @property
    def seen(self) -> Hashable:
        """All that decides the pictures."""
        return self.seed, self.pattern, self.warm

    @property
    def heard(self) -> Hashable:
        """All that decides the sound; files without a sound track are alike."""
        return (self.seed, self.hiss, self.pulsed) if self.has_sound else "no sound track"

    def pictures(self, seconds: float) -> list[NDArray[np.uint8]]:
        """The frames, (H, W, 3) each: a moving pattern over noise."""
        rng = np.random.default_rng([self.seed, self.pattern, self.warm, 1])
        period, speed = rng.uniform(9, 14), rng.uniform(-0.4, 0.4)
        phase, noise = rng.uniform(0, 9, 2), rng.integers(0, 50, (HEIGHT, WIDTH, 3))
        colour = rng.uniform(0.75, 1.0) * np.array((200, 120, 50) if self.warm else (50, 120, 200))
        y, x = np.mgrid[:HEIGHT, :WIDTH]
        frames = []
        for number in range(round(seconds * FPS)):
            shift = speed * number
            across = np.sin(2 * np.pi * (x + phase[0] + shift) / period)
            down = np.sin(2 * np.pi * (y + phase[1] + shift) / period)
            waves = {UPRIGHT: across, LEVEL: down, CHECKED: across * down, PLAIN: np.zeros_like(across)}
            shade = (waves[self.pattern] + 1) / 2
            frames.append((shade[..., None] * colour + noise).clip(0, 255).astype(np.uint8))
        return frames

    def sound(self, seconds: float) -> NDArray[np.int16]:
        """The sound, mono at RATE_HZ."""
        rng = np.random.default_rng([self.seed, self.hiss, self.pulsed, 2])
        time_s = np.arange(round(seconds * RATE_HZ)) / RATE_HZ
        hum = np.sin(2 * np.pi * rng.uniform(180, 420) * time_s + rng.uniform(0, 6)) * 0.5
        wave = (rng.normal(0, 0.25, len(time_s)) if self.hiss else hum) * rng.uniform(0.5, 1.0)
        if self.pulsed:
            wave = wave * ((time_s * rng.uniform(4, 6) + rng.uniform()) % 1 < 0.5)
        return np.asarray(wave.clip(-1, 1) * 30_000, np.int16)

    def part(self, seconds: float) -> Part:
        """Pictures and sound."""
        return self.pictures(seconds), self.sound(seconds)


def pause(seconds: float) -> Part:
    """Grey and silence."""
    grey = np.full((HEIGHT, WIDTH, 3), 90, np.uint8)
    return [grey] * round(seconds * FPS), np.zeros(round(seconds * RATE_HZ), np.int16)


def write_film(path: Path, parts: Sequence[Part], has_sound: bool = True) -> None:
    """Write parts one after the other as one file.

    Args:
        path: folders are made; .avi holds MPEG-4 and PCM, as the older data sets do, all others H.264 and AAC.
        parts: each a whole number of frames long.
        has_sound: False: without a sound track.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    frames = [picture for pictures, _ in parts for picture in pictures]
    sound = np.concatenate([samples for _, samples in parts])
    codec, audio_codec, options = (
        ("mpeg4", "pcm_s16le", {"q": "3"}) if path.suffix == ".avi" else ("libx264", "aac", {"preset": "ultrafast"})
    )
    write_video(
        path,
        codec=codec,
        options=options,
        frames=frames,
        fps=FPS,
        audio_codec=audio_codec if has_sound else None,
        audio=sound,
        rate_hz=RATE_HZ,
    )


def best_top1(answers: Iterable[tuple[Hashable, Hashable]]) -> float:
    """Return the best top-1 of who knows only the second of each pair (label, observed): its most frequent label."""
    groups: dict[Hashable, Counter[Hashable]] = defaultdict(Counter)
    for label, observed in answers:
        groups[observed][label] += 1
    return sum(max(group.values()) for group in groups.values()) / sum(group.total() for group in groups.values())


def best_mean_ap(answers: Sequence[tuple[frozenset[int], Hashable]]) -> float:
    """Return the mean AP of who scores each label by its share among the samples that look (or sound) the same.

    Equal scores are one threshold: the precision at the end of their run counts for its positives.

    Args:
        answers: (labels, observed) of every sample.
    """
    found = []
    for label in sorted(frozenset().union(*(labels for labels, _ in answers))):
        groups: dict[Hashable, list[bool]] = defaultdict(list)
        for labels, observed in answers:
            groups[observed].append(label in labels)
        runs: dict[float, list[bool]] = defaultdict(list)
        for group in groups.values():
            runs[sum(group) / len(group)] += group
        taken = positives = 0
        total = 0.0
        for _, run in sorted(runs.items(), reverse=True):
            taken, positives = taken + len(run), positives + sum(run)
            total += sum(run) * positives / taken
        found.append(total / positives)
    return float(np.mean(found))
