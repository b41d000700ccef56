"""Random clips in planes, what DALI's CPU graph makes of them, and a plain reference in float64."""

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.clip import PIXEL_STD, ClipPlan, ClipSpec, CropWindow
from pipeline.frames.native import make_frames
from pipeline.frames.table import crop_corners
from pipeline.graph import GraphSpec, build_graph, host_inputs
from pipeline.source import HostClip

LEVEL = 1 / (PIXEL_STD * 255)  # one level of 0..255 in normalised units


@dataclass(frozen=True)
class Case:
    """A clip and what is wanted of it."""

    clip: HostClip
    half: bool = False
    channels: int = 3

    def fused(self, level: int = -1) -> NDArray[Any]:
        """(S, T, H, W, C) by the fused operation."""
        plan, luma, chroma = self.clip.plan, self.clip.luma, self.clip.chroma
        assert luma is not None
        assert chroma is not None
        dtype = np.float16 if self.half else np.float32
        out = np.full((len(plan.crops), len(luma), *plan.size_px, self.channels), np.nan, dtype)
        make_frames(luma, chroma, crop_corners(plan), plan.flip, out, level=level)
        return out

    def by_graph(self) -> NDArray[Any]:
        """The same by DALI's operators."""
        plan = self.clip.plan
        crops, frames = len(plan.crops), len(plan.frames)
        spec = GraphSpec(
            ClipSpec(frames, 1), max_clips=1, num_crops=crops, decoder="cpu", half=self.half,
            pad_channels=self.channels == 4, want_audio=False, num_threads=1, prefetch=1,
        )  # fmt: skip
        pipe = build_graph(spec, lambda: host_inputs(spec, [self.clip]))
        return np.array(pipe.run()[0][0]).reshape(crops, frames, *plan.size_px, self.channels)


def clip_of(
    luma: NDArray[np.uint8],
    chroma: NDArray[np.uint8],
    crops: tuple[CropWindow, ...],
    size_px: tuple[int, int],
    flip: bool = False,
) -> HostClip:
    """A clip without sound, all of whose frames are wanted."""
    numbers = tuple(range(len(luma)))
    plan = ClipPlan(0, 0, 0, "", 0, 0.0, 0.0, numbers, 0, crops, size_px, flip)
    return HostClip(plan, None, np.array(numbers, np.int32), luma, chroma, np.zeros(0, np.int16), False, None)


def random_planes(
    rng: np.random.Generator, frames: int, height: int, width: int
) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """White noise: every rounding shows."""
    luma = rng.integers(0, 256, (frames, height, width, 1), dtype=np.uint8)
    chroma = rng.integers(0, 256, (frames, (height + 1) // 2, (width + 1) // 2, 2), dtype=np.uint8)
    return luma, chroma


def random_case(rng: np.random.Generator, smallest: int = 8, largest: int = 260, *, even: bool = True) -> Case:
    """Sizes, windows, mirror, type and channels at random."""
    height, width = (int(n) * 2 if even else int(n) for n in rng.integers(smallest, largest // 2, 2))
    size = tuple(rng.integers(smallest, largest, 2).tolist())
    if rng.random() < 0.6:
        size = (size[0], size[0])
    crops = tuple(_window(rng, height, width) for _ in range(int(rng.choice([1, 3]))))
    clip = clip_of(*random_planes(rng, 2, height, width), crops, size, bool(rng.random() < 0.5))
    return Case(clip, bool(rng.random() < 0.3), int(rng.choice([3, 4])))


def random_batch(rng: np.random.Generator, largest: int) -> list[Case]:
    """Clips of one batch, stored in different and odd sizes; sizes, windows, mirror, type and channels at random."""
    clips, frames, crops = int(rng.integers(1, 4)), int(rng.integers(1, 6)), int(rng.choice([1, 3]))
    half, channels, size = (
        bool(rng.random() < 0.5),
        int(rng.choice([3, 4])),
        tuple(rng.integers(1, largest, 2).tolist()),
    )
    found = []
    for _ in range(clips):
        height, width = rng.integers(1, largest, 2).tolist()
        windows = tuple(_window(rng, height, width) for _ in range(crops))
        planes = random_planes(rng, frames, height, width)
        found.append(Case(clip_of(*planes, windows, size, bool(rng.random() < 0.5)), half, channels))
    return found


def _window(rng: np.random.Generator, height: int, width: int) -> CropWindow:
    h, w = rng.uniform(min(1.0, height), height), rng.uniform(min(1.0, width), width)
    if rng.random() < 0.5:
        h = w = min(h, w)
    h, w = (height if rng.random() < 0.2 else h), (width if rng.random() < 0.2 else w)
    return CropWindow(rng.uniform(0, width - w), rng.uniform(0, height - h), w, h)


def reference(case: Case, *, rounded: bool) -> NDArray[np.float64]:
    """(S, T, H, W, 3) in levels 0..255, in float64; `rounded`: to whole levels after each stage, as the graph does."""
    keep = np.rint if rounded else lambda values: values
    plan, luma, chroma = case.clip.plan, case.clip.luma, case.clip.chroma
    assert luma is not None
    assert chroma is not None
    found = []
    for window in plan.crops:
        box = np.array([window.top, window.left, window.height, window.width])
        y = keep(_sampled(luma.astype(np.float64), box, plan.size_px))[..., 0] - 16
        cb, cr = np.moveaxis(keep(_sampled(chroma.astype(np.float64), box / 2, plan.size_px)) - 128, -1, 0)
        kr, kb = 0.299, 0.114
        kg, y = 1 - kr - kb, y * 255 / 219
        cb, cr = cb * 255 / 224, cr * 255 / 224
        green = y - 2 * kb * (1 - kb) / kg * cb - 2 * kr * (1 - kr) / kg * cr
        rgb = np.stack([y + 2 * (1 - kr) * cr, green, y + 2 * (1 - kb) * cb], -1)
        rgb = keep(rgb).clip(0, 255)
        found.append(rgb[:, :, ::-1] if plan.flip else rgb)
    return np.stack(found)


def _sampled(planes: NDArray[np.float64], box: NDArray[np.float64], size: tuple[int, int]) -> NDArray[np.float64]:
    """(T, H, W, C) at the centres of `size` cells of box (top, left, height, width); linear, clamped to the picture."""
    for axis in (0, 1):
        at = box[axis] + (np.arange(size[axis]) + 0.5) * box[axis + 2] / size[axis] - 0.5
        low = np.floor(at).astype(int)
        part = (at - low).reshape((-1, 1, 1) if axis == 0 else (-1, 1))
        last = planes.shape[axis + 1] - 1
        first, second = (planes.take(i.clip(0, last), axis=axis + 1) for i in (low, low + 1))
        planes = first * (1 - part) + second * part
    return planes
