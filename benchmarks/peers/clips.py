"""Videos whose frames and sound say what they are, and the check that a loader's output is right.

A strip in the middle, inside of every training crop, shows the number of the frame in twelve cells (red 0, blue 1):
nine bits and three check bits. It has colours that the rest of the picture has not, so a crop, a resize, a mirror and
any loss of a codec leave it to be found. Clicks in the sound come at unequal distances. Legend: F frames, H W pixels.
"""

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
from numpy.typing import NDArray

FPS, WIDTH_PX, HEIGHT_PX, NUM_FRAMES = 30, 340, 256, 300
RATE_HZ, AAC_RATE_HZ = 16_000, 48_000
CLIP_FRAMES, FRAME_STEP, MEL_FRAMES, MEL_BINS = 32, 2, 128, 80
CLIP_SAMPLES = (MEL_FRAMES - 1) * 256 + 512
SPAN_FRAMES = CLIP_FRAMES * FRAME_STEP
CELLS, CELL_PX, STRIP_LEFT_PX, STRIP_TOP_PX = 12, 8, 162, 80
RED, BLUE = (200, 30, 40), (30, 40, 200)
CLICK_GAPS_S = (0.31, 0.47, 0.37, 0.59, 0.43, 0.53, 0.41)
GOPS = (250, 12)
RATE_FACTOR = 21  # gives about 450 kbit/s at a GOP of 250


def audio_offset() -> int:
    """Samples from a clip's first frame to its sound, which is centred on it."""
    return round((SPAN_FRAMES * RATE_HZ / FPS - CLIP_SAMPLES) / 2)


def cells_of(number: int) -> NDArray[np.bool_]:
    """Cells of a frame number, (12,), the highest bit on top."""
    code = number << 3 | bin(number).count("1") & 7
    return np.array([code >> bit & 1 for bit in reversed(range(CELLS))], bool)


def pictures(seed: int, num_frames: int = NUM_FRAMES) -> Iterator[NDArray[np.uint8]]:
    """A grey-green texture that drifts, a box over it, grain and the strip; (H, W, 3) uint8 each."""
    rng = np.random.default_rng(seed)
    soft = np.kron(rng.integers(20, 200, (HEIGHT_PX // 16, WIDTH_PX // 16 + 1)), np.ones((16, 16)))[:, :WIDTH_PX]
    for axis in (0, 1):
        soft = np.mean([np.roll(soft, shift, axis) for shift in range(8)], 0)
    texture = soft + rng.integers(0, 30, (HEIGHT_PX, WIDTH_PX))
    grain = rng.normal(0, 2.6, (8, HEIGHT_PX, WIDTH_PX))
    tint = np.array([0.95, 1.0, 0.9])
    for number in range(num_frames):
        luma = np.roll(texture, number * 2 // 3, 1) + grain[number % 8]
        y, x = (40 + number) % (HEIGHT_PX - 64), (3 * number) % (WIDTH_PX - 64)
        luma[y : y + 64, x : x + 64] = texture[:64, :64] / 2 + 60
        picture = (luma[..., None] * tint).clip(0, 255).astype(np.uint8)
        for place, bit in enumerate(cells_of(number)):
            top = STRIP_TOP_PX + CELL_PX * place
            picture[top : top + CELL_PX, STRIP_LEFT_PX : STRIP_LEFT_PX + 16] = BLUE if bit else RED
        yield picture


def click_times_s(seconds: float) -> NDArray[np.float64]:
    """Times of the clicks."""
    gaps = np.resize(CLICK_GAPS_S, int(seconds / min(CLICK_GAPS_S)) + 1)
    times = np.cumsum(gaps)
    return np.asarray(times[times < seconds - 0.05])


def sound(seconds: float) -> NDArray[np.int16]:
    """Faint noise with a click of 2 ms at each of `click_times_s`, (samples,) at 48 kHz."""
    rng = np.random.default_rng(0)
    wave = rng.normal(0, 30, int(seconds * AAC_RATE_HZ))
    for time_s in click_times_s(seconds):
        begin = round(time_s * AAC_RATE_HZ)
        wave[begin : begin + 96] += rng.normal(0, 12_000, 96)
    return wave.clip(-32768, 32767).astype(np.int16)


def write_video(path: Path, seed: int, gop: int) -> None:
    """Write one MP4 as people have it: x264's defaults with `gop` frames from key frame to key frame, and AAC."""
    options = {"crf": str(RATE_FACTOR), "g": str(gop), "keyint_min": str(min(gop, 25)), "threads": "1"}
    with av.open(str(path), "w", options={"movflags": "faststart"}) as container:
        video = container.add_stream("libx264", rate=FPS, options=options)
        video.width, video.height, video.pix_fmt = WIDTH_PX, HEIGHT_PX, "yuv420p"
        audio = container.add_stream("aac", rate=AAC_RATE_HZ)
        audio.layout = "mono"
        for picture in pictures(seed):
            container.mux(video.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(video.encode(None))
        frame = av.AudioFrame.from_ndarray(sound(NUM_FRAMES / FPS).reshape(1, -1), format="s16", layout="mono")
        frame.sample_rate, frame.pts, frame.time_base = AAC_RATE_HZ, 0, Fraction(1, AAC_RATE_HZ)
        container.mux(audio.encode(frame))
        container.mux(audio.encode(None))


def make_videos(root: Path, count: int, gops: Sequence[int] = GOPS) -> dict[int, Path]:
    """Write the same `count` videos with each GOP; returns the folders, made only once."""
    jobs = []
    folders = {gop: root / f"gop{gop}" for gop in gops}
    for gop, folder in folders.items():
        folder.mkdir(parents=True, exist_ok=True)
        jobs += [(folder / f"{seed:03d}.mp4", seed, gop) for seed in range(count)]
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(lambda job: write_video(*job), [job for job in jobs if not job[0].exists()]))
    return folders


def kbit_per_s(folder: Path) -> float:
    """Mean rate of the videos of a folder, sound included."""
    sizes = [path.stat().st_size for path in folder.glob("*.mp4")]
    return sum(sizes) * 8 / 1000 / (len(sizes) * NUM_FRAMES / FPS)


def read_number(picture: NDArray[Any]) -> int:
    """Number that a picture shows.

    Args:
        picture: (H, W, 3) RGB in 0..255, cropped, resized, mirrored or not.

    Raises:
        ValueError: no strip, or check bits that do not fit.
    """
    red, green, blue = (picture[..., i].astype(np.float64) for i in range(3))
    colour = np.where(np.maximum(red, blue) - green > 45, blue - red, 0.0)
    columns = np.flatnonzero((colour != 0).sum(0) > 60)
    if not 8 <= len(columns) <= 40:
        raise ValueError(f"columns with the strip's colours ({len(columns)}) must be 8 to 40")
    middle = colour[:, columns[2:-2]].mean(1)
    rows = np.flatnonzero(abs(middle) > 40)
    top, height = float(rows[0]), float(rows[-1] + 1 - rows[0])
    centres = top + (np.arange(CELLS) + 0.5) * height / CELLS
    bits = [int(middle[round(centre - 0.5)] > 0) for centre in centres]
    code = int("".join(map(str, bits)), 2)
    number, check = code >> 3, code & 7
    if bin(number).count("1") & 7 != check:
        raise ValueError(f"check bits ({check}) must fit the number read ({number})")
    return number


def click_errors_ms(log_mel: NDArray[Any], first_frame: int) -> NDArray[np.float64]:
    """Distance of each expected click of a clip to the nearest one heard, in ms; clicks at the edges are left out.

    Args:
        log_mel: (M, F), normalised or not.
        first_frame: number of the clip's first frame.
    """
    loud = log_mel.mean(1)
    heard = np.flatnonzero(loud > (loud.max() + np.median(loud)) / 2)
    groups = np.split(heard, np.flatnonzero(np.diff(heard) > 1) + 1)
    weights = [loud[group] - loud.min() for group in groups]
    found = np.array([np.average(g, weights=w) for g, w in zip(groups, weights, strict=True)]) * 256 + 256
    begin = first_frame * RATE_HZ / FPS + audio_offset()
    expected = click_times_s(NUM_FRAMES / FPS) * RATE_HZ + 16 - begin
    expected = expected[(expected > 600) & (expected < CLIP_SAMPLES - 600)]
    if len(found) < len(expected):
        raise ValueError(f"clicks heard ({len(found)}) must be at least those expected ({len(expected)})")
    return np.asarray(abs(expected[:, None] - found[None, :]).min(1) / RATE_HZ * 1e3)


def check_clip(frames: NDArray[Any], log_mel: NDArray[Any], tolerance_ms: float = 24.0) -> tuple[int, float]:
    """Check one clip of a loader.

    Args:
        frames: (3, F, H, W) normalised with mean 0.45 and deviation 0.225.
        log_mel: (M, F).
        tolerance_ms: of a click's place.

    Returns:
        Number of its first frame, and the largest distance of a click, ms.

    Raises:
        ValueError: the output is not the clip that was asked for.
    """
    if frames.shape != (3, CLIP_FRAMES, 224, 224) or log_mel.shape != (MEL_FRAMES, MEL_BINS):
        raise ValueError(f"shapes ({frames.shape}, {log_mel.shape}) must be (3, 32, 224, 224) and (128, 80)")
    numbers = [read_number((frames[:, i].transpose(1, 2, 0) * 0.225 + 0.45) * 255) for i in range(CLIP_FRAMES)]
    expected = [numbers[0] + FRAME_STEP * i for i in range(CLIP_FRAMES)]
    if numbers != expected:
        raise ValueError(f"frames read back ({numbers}) must be {expected}")
    error_ms = float(click_errors_ms(log_mel, numbers[0]).max(initial=0.0))
    if error_ms > tolerance_ms:
        raise ValueError(f"clicks ({error_ms:.1f} ms from their place) must be within {tolerance_ms:g} ms")
    return numbers[0], error_ms
