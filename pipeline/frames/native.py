"""Frames of a clip in one pass over its decoded planes: resize of crop windows, RGB, mirror, normalise; on a CPU.

What the CPU graph's resize, colour and normalise operators do, in the same arithmetic, at a fraction of their cost (see
csrc/frames.cpp). The call holds no interpreter lock, and needs neither torch nor DALI.

Legend: S crops, T frames, H W pixels, C channels.
"""

import ctypes
import functools
import logging
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.clip import PIXEL_MEAN, PIXEL_STD
from pipeline.frames.build import library_path, library_problem

_log = logging.getLogger(__name__)
MEAN, SCALE = np.float32(PIXEL_MEAN * 255), np.float32(1) / np.float32(PIXEL_STD * 255)
_HALVES = ((np.arange(256, dtype=np.float32) - MEAN) * SCALE).astype(np.float16)
_PROBLEMS = {
    1: "sizes must be 1..32768 px",
    2: "every crop window must be finite, not empty and inside the picture",
    3: "no such instruction set on this machine",
    4: "no memory for the rows of a picture",
}
LEVELS = ("base", "AVX2", "AVX-512")  # instruction sets that the loops are compiled for


class _Job(ctypes.Structure):
    """`avsf_frames_job` of csrc/frames.cpp."""

    _fields_ = (
        [("luma", ctypes.c_void_p), ("chroma", ctypes.c_void_p)]
        + [(name, ctypes.c_int64) for name in ("luma_frame", "luma_row", "chroma_frame", "chroma_row")]
        + [(n, ctypes.c_int32) for n in ("frames", "height", "width", "crops", "out_height", "out_width")]
        + [("windows", ctypes.c_void_p)]
        + [(name, ctypes.c_int32) for name in ("mirror", "channels", "level")]
        + [("mean", ctypes.c_float), ("scale", ctypes.c_float)]
        + [("halves", ctypes.c_void_p), ("out", ctypes.c_void_p)]
    )


@functools.cache
def library_text() -> str:
    """Why the library is not used, with what to run; empty where it is. Says so once in the log."""
    problem = library_problem(library_path())
    if not problem:
        try:
            ctypes.CDLL(str(library_path()))
        except OSError as error:
            problem = f"it does not load: {error}"
    if problem:
        _log.warning("frames are made by DALI's CPU operators, ten times slower: no library of them (%s)", problem)
    return problem


@functools.cache
def _library() -> Any:
    if library_text():
        raise RuntimeError(f"frames need their library ({library_text()})")
    library = ctypes.CDLL(str(library_path()))
    library.avsf_frames.argtypes, library.avsf_frames.restype = (ctypes.POINTER(_Job),), ctypes.c_int32
    library.avsf_frames_level.argtypes, library.avsf_frames_level.restype = (), ctypes.c_int32
    return library


def best_level() -> int:
    """Number in `LEVELS` of the instruction set that is used here."""
    return int(_library().avsf_frames_level())


def make_frames(
    luma: NDArray[np.uint8],
    chroma: NDArray[np.uint8],
    windows: NDArray[np.float32],
    mirror: bool,
    out: NDArray[Any],
    *,
    level: int = -1,
) -> None:
    """Write the normalised crops of a clip; the result depends on the arguments only, not on machine or `level`.

    Args:
        luma: (T, H, W, 1) uint8, rows and frames may be apart; BT.601 limited range.
        chroma: (T, ceil(H/2), ceil(W/2), 2) uint8 Cb, Cr, sited in the middle of four luma pixels.
        windows: (S, 4) float32 top, left, bottom, right in luma pixels; inside the picture to 0.01 px.
        mirror: Whether left and right are exchanged.
        out: (S, T, out H, out W, C = 3 or 4) float32 or float16, dense: (level of 0..255 / 255 - mean) / std; a fourth
            channel is zero.
        level: Instruction set, a number in `LEVELS` up to `best_level()`; -1: the best one.

    Raises:
        ValueError: arguments of another shape, type or layout, or a window that leaves the picture.
        RuntimeError: there is no library.
        MemoryError: no memory for a few rows of the picture.
    """
    _check(luma, chroma, windows, out)
    library = _library()
    half = out.dtype == np.float16
    job = _Job(
        luma.ctypes.data, chroma.ctypes.data, luma.strides[0], luma.strides[1], chroma.strides[0], chroma.strides[1],
        *luma.shape[:3], out.shape[0], *out.shape[2:4], windows.ctypes.data, mirror, out.shape[4], level,
        MEAN, SCALE, _HALVES.ctypes.data if half else None, out.ctypes.data,
    )  # fmt: skip
    problem = library.avsf_frames(ctypes.byref(job))
    if problem:
        kind = MemoryError if problem == 4 else ValueError
        sizes = f"picture {luma.shape[1]}x{luma.shape[2]}, output {out.shape[2]}x{out.shape[3]}, level {level}"
        raise kind(f"frames ({sizes}, windows {windows.tolist()}): {_PROBLEMS[problem]}")


def _check(luma: NDArray[Any], chroma: NDArray[Any], windows: NDArray[Any], out: NDArray[Any]) -> None:
    t, h, w = luma.shape[:3] if luma.ndim == 4 else (0, 0, 0)
    rules = {
        "luma must be (T, H, W, 1) uint8 with dense rows": (
            luma.ndim == 4 and luma.shape[3] == 1 and luma.dtype == np.uint8 and has_rows(luma.shape, luma.strides)
        ),
        "chroma must be (T, H/2, W/2, 2) uint8 with dense rows": (
            chroma.shape == (t, (h + 1) // 2, (w + 1) // 2, 2) and chroma.dtype == np.uint8
            and has_rows(chroma.shape, chroma.strides)
        ),
        "windows must be (S, 4) float32, dense": (
            windows.ndim == 2 and windows.shape[1] == 4 and len(windows) > 0 and windows.dtype == np.float32
            and windows.flags.c_contiguous
        ),
        "out must be (S, T, H, W, 3 or 4) float32 or float16, dense and writable": (
            out.ndim == 5 and out.shape[:2] == (len(windows), t) and out.shape[4] in (3, 4)
            and out.dtype in (np.float32, np.float16) and out.flags.c_contiguous and out.flags.writeable
        ),
    }  # fmt: skip
    for rule, holds in rules.items():
        if not holds:
            given = ", ".join(
                f"{name} {array.shape} {array.dtype} strides {array.strides}"
                for name, array in (("luma", luma), ("chroma", chroma), ("windows", windows), ("out", out))
            )
            raise ValueError(f"{rule}; given: {given}")


def has_rows(shape: Sequence[int], strides: Sequence[int]) -> bool:
    """Whether the samples of a row lie side by side, and rows one after another.

    Args:
        shape: (T, H, W, C) of a plane of bytes.
        strides: Bytes from one to the next, of each dimension.
    """
    width, channels = shape[2:]
    dense = strides[3] == 1 or channels == 1
    return dense and (strides[2] == channels or width == 1) and strides[1] >= width * channels
