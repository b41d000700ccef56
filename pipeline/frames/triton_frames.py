"""The kernel that makes frames of decoded planes on a GPU: one launch a batch, a tile of output pixels a program.

The arithmetic, its order and its roundings are those of csrc/frames.cpp: single precision, no fused multiply-add,
halves to even, IEEE division. Triton's interpreter (TRITON_INTERPRET=1 before triton is imported) runs it on a CPU.

Legend: N = clips x crops, B clips, S crops, T frames, H W pixels, C channels in memory.
"""

import triton
import triton.language as tl
from torch import Tensor

from pipeline.frames import native, table

_PLANE, _FIELDS = tl.constexpr(table.PLANE_FIELDS), tl.constexpr(table.FIELDS)
_MEAN, _SCALE = tl.constexpr(float(native.MEAN)), tl.constexpr(float(native.SCALE))
_BIG = tl.constexpr(12582912.0)  # 1.5 * 2^23
_LUMA, _RED, _BLUE = tl.constexpr(255.0 / 219), tl.constexpr(1.402 * 255 / 224), tl.constexpr(1.772 * 255 / 224)
_GREEN_RED, _GREEN_BLUE = tl.constexpr(0.71413629 * 255 / 224), tl.constexpr(0.34413629 * 255 / 224)
ROWS, COLUMNS, FRAMES = 8, 32, 4  # of a program: pixels, and frames that share their taps


def launch(crops: Tensor, out: Tensor) -> None:
    """Begin to make the frames of a batch on the current stream of `out`'s device; nothing waits.

    Args:
        crops: (N, FIELDS) int64 on that device, of `crop_table`; the planes in it must live until the kernel is done.
        out: (B, S, T, H, W, C) float16 or float32, contiguous; C is 3 or 4, a fourth channel becomes zero.
    """
    clips, views, frames, height, width, channels = out.shape
    tiles = triton.cdiv(height, ROWS) * triton.cdiv(width, COLUMNS)
    programs = clips * views * triton.cdiv(frames, FRAMES) * tiles
    if programs:
        _make[(programs,)](
            crops, out, frames, height, width, channels, ROWS, COLUMNS, FRAMES, enable_fp_fusion=False, num_warps=4
        )


@triton.jit(do_not_specialize=["frames", "height", "width"])
def _make(
    crops: tl.tensor, out: tl.tensor, frames: tl.tensor, height: tl.tensor, width: tl.tensor,
    C: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, FRAMES: tl.constexpr,
) -> None:  # fmt: skip
    across, down, groups = tl.cdiv(width, COLUMNS), tl.cdiv(height, ROWS), tl.cdiv(frames, FRAMES)
    tile = tl.program_id(0)
    x = tile % across * COLUMNS + tl.arange(0, COLUMNS)
    y = tile // across % down * ROWS + tl.arange(0, ROWS)
    group = tile // across // down
    crop = (group // groups).to(tl.int64)
    luma = crops + crop * _FIELDS
    chroma = luma + _PLANE
    from_left = tl.where(tl.load(chroma + _PLANE) != 0, width - 1 - x, x)
    ly0, ly1, lv0, lv1 = _taps(luma + 6, y, tl.load(luma + 3))  # beyond the tile too: clamped to the picture
    lx0, lx1, lw0, lw1 = _taps(luma + 9, from_left, tl.load(luma + 4))
    cy0, cy1, cv0, cv1 = _taps(chroma + 6, y, tl.load(chroma + 3))
    cx0, cx1, cw0, cw1 = _taps(chroma + 9, from_left, tl.load(chroma + 4))
    channel = tl.arange(0, 4)[None, None, :]
    inside = ((y < height)[:, None] & (x < width)[None, :])[:, :, None]
    if C == 3:
        inside = inside & (channel < 3)
    frame = group % groups * FRAMES
    end = tl.minimum(frame + FRAMES, frames)
    while frame < end:  # Triton 3.6's interpreter has no range of tensors
        level = _sampled(luma, frame, 0, 1, ly0, ly1, lv0, lv1, lx0, lx1, lw0, lw1)
        blue = _sampled(chroma, frame, 0, 2, cy0, cy1, cv0, cv1, cx0, cx1, cw0, cw1) - 128.0
        red = _sampled(chroma, frame, 1, 2, cy0, cy1, cv0, cv1, cx0, cx1, cw0, cw1) - 128.0
        level = (level - 16.0) * _LUMA
        r = _normal(level + red * _RED)
        g = _normal(level - blue * _GREEN_BLUE - red * _GREEN_RED)
        b = _normal(level + blue * _BLUE)
        four = tl.reshape(tl.join(tl.join(r, b), tl.join(g, tl.zeros_like(r))), (ROWS, COLUMNS, 4))  # r g b 0
        pixel = ((crop * frames + frame) * height + y)[:, None] * width + x[None, :]
        tl.store(out + pixel[:, :, None] * C + channel, four.to(out.dtype.element_ty), mask=inside)
        frame += 1


@triton.jit
def _taps(axis: tl.tensor, number: tl.tensor, length: tl.tensor) -> tl.tensor:
    """Two neighbouring samples of each output row or column, clamped to the picture, and their weights."""
    scale = tl.load(axis).to(tl.int32).to(tl.float32, bitcast=True)
    origin = tl.load(axis + 1).to(tl.int32).to(tl.float32, bitcast=True)
    at = number.to(tl.float32) * scale + origin
    near = _rounded(at)
    up = tl.where(near < at, near + 1.0, near)  # tl.ceil takes numbers below 1e-38 for zero
    a = up - at
    b = 1.0 - ((a + 1.0) - 1.0)
    first = up.to(tl.int32) + tl.load(axis + 2).to(tl.int32)
    last = length.to(tl.int32) - 1
    low, high = tl.minimum(tl.maximum(first, 0), last), tl.minimum(tl.maximum(first + 1, 0), last)
    return low, high, tl.div_rn(a, a + b), tl.div_rn(b, a + b)


@triton.jit
def _sampled(
    plane: tl.tensor, frame: tl.tensor, part: tl.constexpr, STEP: tl.constexpr,
    y0: tl.tensor, y1: tl.tensor, v0: tl.tensor, v1: tl.tensor,
    x0: tl.tensor, x1: tl.tensor, w0: tl.tensor, w1: tl.tensor,
) -> tl.tensor:  # fmt: skip
    """(ROWS, COLUMNS) whole levels of one frame; of `STEP` interleaved values the one numbered `part`."""
    start = tl.load(plane) + frame * tl.load(plane + 1) + part
    row = tl.load(plane + 2)
    upper, lower = (start + y0.to(tl.int64) * row)[:, None], (start + y1.to(tl.int64) * row)[:, None]
    left, right = (x0 * STEP)[None, :], (x1 * STEP)[None, :]
    v0, v1, w0, w1 = v0[:, None], v1[:, None], w0[None, :], w1[None, :]
    p00, p01, p10, p11 = _at(upper + left), _at(upper + right), _at(lower + left), _at(lower + right)
    rows_first = (p00 * v0 + p10 * v1) * w0 + (p01 * v0 + p11 * v1) * w1
    columns_first = (p00 * w0 + p01 * w1) * v0 + (p10 * w0 + p11 * w1) * v1
    return _rounded(tl.where(tl.load(plane + 5) != 0, rows_first, columns_first))


@triton.jit
def _at(address: tl.tensor) -> tl.tensor:
    return tl.load(address.to(tl.pointer_type(tl.uint8))).to(tl.float32)


@triton.jit
def _rounded(x: tl.tensor) -> tl.tensor:
    """Nearest whole number of |x| < 2^22, halves to even."""
    return (x + _BIG) - _BIG


@triton.jit
def _normal(level: tl.tensor) -> tl.tensor:
    return (tl.minimum(tl.maximum(_rounded(level), 0.0), 255.0) - _MEAN) * _SCALE
