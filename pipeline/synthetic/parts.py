"""What the synthetic data sets share: making a store once, smooth textures, 16-bit sound."""

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from pipeline.store.format import StoreError

Progress = Callable[[int, int], None]


class Ticks:
    """Counts streams that are done.

    Args:
        total: Streams in all.
        progress: Called with streams done and streams in all; None: nobody is told.
    """

    def __init__(self, total: int, progress: Progress | None) -> None:
        self._total, self._progress, self._done = total, progress, 0

    def tick(self) -> None:
        """Count one more."""
        self._done += 1
        if self._progress:
            self._progress(self._done, self._total)


def ensure(path: Path, make: Callable[[], None]) -> Path:
    """Make the store at `path` unless it is there already, and return `path`."""
    if not (path / "store.json").is_file():
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            make()
        except StoreError:
            if not (path / "store.json").is_file():  # else another process made it in the meantime
                raise
    return path


def numbers_of(splits: Mapping[str, int]) -> Iterator[tuple[str, range]]:
    """Yield each split with the numbers of its streams, whose draws share nothing with those of another split.

    Args:
        splits: Split -> its streams.
    """
    for number, (split, count) in enumerate(splits.items()):
        yield split, range(number << 20, (number << 20) + count)


def texture(
    rng: np.random.Generator, size: int, finest: int = 6, axis: int | None = None, coarsest: int = 2
) -> NDArray[np.float64]:
    """Return periodic band-limited noise in [0, 1], (H, W), with `coarsest` to `finest` waves across the picture.

    Args:
        rng: Of the draw.
        size: H and W.
        finest: Waves across the picture, at most.
        axis: 0: its shades change sideways more than downwards (upright); 1: the other way (level); None: alike.
        coarsest: Waves across the picture, at least.
    """
    sideways, down = np.meshgrid(np.fft.fftfreq(size, 1 / size), np.fft.fftfreq(size, 1 / size))
    frequency = np.hypot(sideways, down)
    kept = (frequency >= coarsest) & (frequency <= finest)
    if axis is not None:
        kept &= np.abs(sideways) > np.abs(down) if axis == 0 else np.abs(down) > np.abs(sideways)
    spectrum = np.fft.fft2(rng.normal(size=(size, size))) * kept
    field = np.fft.ifft2(spectrum).real
    return ((field - field.min()) / (field.max() - field.min())).astype(np.float64)


def pcm(wave: NDArray[np.float64]) -> NDArray[np.int16]:
    """Return sound of -1 to 1 as 16-bit samples, louder parts cut off."""
    return (wave * 32767).clip(-32768, 32767).astype(np.int16)
