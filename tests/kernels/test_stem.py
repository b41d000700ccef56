"""The first convolutions of Fast and Slow: the CUDA kernels, emulated on the CPU and on a device, against float64.

Legend: N clips, T frames, H W pixels. Frames are (N, 4, T, H, W) channels_last_3d, the fourth channel zero.
"""

import ctypes
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.layout import KernelInputError
from kernels.library import fused_devices
from kernels.stem import STEM_WEIGHTS, STRIDE, covers, padding, stem_conv
from tests.kernels.support import emulation
from tests.kernels.support.cases import assert_close, channels_last, relative
from tests.kernels.support.shared import shared_folder

fused = pytest.mark.skipif(not fused_devices(), reason="the library of fused operations is not built")
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.needs_cuda)]
HALF = (torch.bfloat16, torch.float16)
# (N, T, H, W): one pixel, odd and even sizes, one frame, blocks of 4, 7 and 8 tiles, several blocks along H, W and T.
SHAPES = [(1, 1, 1, 1), (1, 3, 9, 10), (2, 2, 5, 7), (1, 9, 12, 33), (1, 2, 3, 224), (1, 1, 4, 256), (1, 1, 2, 260)]
KINDS = ("fast", "slow")
TYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}


def draw_frames(shape: tuple[int, int, int, int], dtype: torch.dtype, clips: int = 1) -> Tensor:
    """Frames of normal values; every `clips`-th clip of a longer batch."""
    n, t, h, w = shape
    frames = torch.randn(n * clips, t, h, w, 4, generator=torch.Generator().manual_seed(1))
    frames[..., 3] = 0
    return frames.to(dtype)[::clips].movedim(-1, 1)


def draw_weight(kind: str, dtype: torch.dtype = torch.float32) -> Tensor:
    weight = torch.randn(STEM_WEIGHTS[KINDS.index(kind)], generator=torch.Generator().manual_seed(2)) * 0.05
    return weight.to(dtype) if dtype == torch.float32 else channels_last(weight).to(dtype)


def draw_gradient(shape: tuple[int, int, int, int], dtype: torch.dtype, weight: Tensor, sliced: bool = False) -> Tensor:
    n, t, h, w = shape
    channels = weight.shape[0]
    size = (n, t, (h + 1) // 2, (w + 1) // 2, channels + 16 if sliced else channels)
    gradient = torch.randn(size, generator=torch.Generator().manual_seed(3)).to(dtype)
    return gradient[..., 8 : 8 + channels].movedim(-1, 1) if sliced else gradient.movedim(-1, 1)


def exact(frames: Tensor, weight: Tensor, dy: Tensor) -> tuple[Tensor, Tensor]:
    """Output and weight gradient in float64 on the CPU, of the weight as rounded to the frames' dtype."""
    leaf = weight.detach().cpu().to(frames.dtype).double().requires_grad_()
    y = F.conv3d(frames.cpu()[:, :3].double(), leaf, None, STRIDE, padding(leaf))
    (grad,) = torch.autograd.grad(y, leaf, dy.cpu().double())
    return y.detach(), grad


class Emulated:
    """The emulated kernels; `order` 1 runs the warps of a block from the last to the first."""

    def __init__(self, folder: Path) -> None:
        entry = emulation.HERE / "stem_entry.cpp"
        self.library = emulation.load(emulation.compile_sources(["cuda_stem.cu", "cuda_stem_slow.cu"], folder, [entry]))
        self.library.stem_scratch.restype = ctypes.c_int64

    def run(self, gradient: bool, x: Tensor, y: Tensor, weight: Tensor, order: int) -> None:
        n, _, t, h, w = x.shape
        sizes = (ctypes.c_int64 * 4)(n, t, h, w)
        pixel = [v.stride(4) if v.shape[4] > 1 else v.shape[1] for v in (x, y)]
        slow = int(weight.shape[0] == 64)
        strides = (ctypes.c_int64 * 9)(x.stride(0), pixel[0], y.stride(0), pixel[1], *weight.stride())
        work = torch.full((self.library.stem_scratch(slow, sizes, int(gradient)),), 255, dtype=torch.uint8)
        x_at, y_at, weight_at, work_at = (ctypes.c_void_p(v.data_ptr()) for v in (x, y, weight, work))
        self.library.emulation_order(order)
        types = TYPES[x.dtype], TYPES[weight.dtype]
        done = self.library.stem_run(
            slow, int(gradient), types[0], sizes, x_at, y_at, weight_at, strides, types[1], work_at
        )
        assert done == 0

    def forward(self, x: Tensor, weight: Tensor, order: int = 0) -> Tensor:
        y = torch.full_like(draw_gradient((x.shape[0], *x.shape[2:]), x.dtype, weight), torch.nan)  # type: ignore[arg-type]
        self.run(False, x, y, weight, order)
        return y

    def weight_grad(self, dy: Tensor, x: Tensor, weight: Tensor, order: int = 0) -> Tensor:
        grad = torch.full_like(weight, torch.nan)
        self.run(True, x, dy, grad, order)
        return grad


@pytest.fixture(scope="module")
def emulated(tmp_path_factory: pytest.TempPathFactory) -> Emulated:
    if not emulation.available():
        pytest.skip("emulation needs a C++ compiler and CUDA's headers")
    return Emulated(shared_folder(tmp_path_factory, "emulated"))


@pytest.mark.integration
@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("kind", KINDS)
def test_emulated_kernels(kind: str, shape: tuple[int, int, int, int], dtype: torch.dtype, emulated: Emulated) -> None:
    weight = draw_weight(kind)
    x, dy = draw_frames(shape, dtype), draw_gradient(shape, dtype, weight)
    y, grad = emulated.forward(x, weight), emulated.weight_grad(dy, x, weight)
    exact_y, exact_grad = exact(x, weight, dy)
    assert_close(y, exact_y, "y")
    assert relative(grad, exact_grad) < 1e-6
    assert torch.equal(emulated.forward(x, weight, order=1), y)  # no warp depends on another's turn
    assert torch.equal(emulated.weight_grad(dy, x, weight, order=1), grad)


@pytest.mark.integration
@pytest.mark.parametrize("kind", KINDS)
def test_emulated_strides_and_weight_types(kind: str, emulated: Emulated) -> None:
    """Every second clip of a batch; a 16-bit weight in channels-last memory; a gradient that is a slice of channels."""
    shape = (2, 3, 7, 12)
    for dtype in HALF:
        x, weight = draw_frames(shape, dtype, 2), draw_weight(kind, dtype)
        dy = draw_gradient(shape, dtype, weight, sliced=True)
        exact_y, exact_grad = exact(x, weight, dy)
        assert_close(emulated.forward(x, weight), exact_y, "y")
        grad = emulated.weight_grad(dy, x, weight)
        assert grad.stride() == weight.stride()
        assert_close(grad, exact_grad, "grad")


@pytest.mark.integration
@pytest.mark.parametrize("kind", KINDS)
def test_emulated_garbage_outside_does_not_leak(kind: str, emulated: Emulated) -> None:
    """What lies before and behind the frames in memory is never read into a sum."""
    for w in (9, 10):
        around = torch.full((3, 2, 5, w, 4), torch.nan, dtype=torch.bfloat16)
        shape = (1, 2, 5, w)
        around[1] = draw_frames(shape, torch.bfloat16)[0].movedim(0, -1)
        x, weight = around[1:2].movedim(-1, 1), draw_weight(kind)
        dy = draw_gradient(shape, torch.bfloat16, weight)
        exact_y, exact_grad = exact(x, weight, dy)
        assert_close(emulated.forward(x, weight), exact_y, "y")
        assert relative(emulated.weight_grad(dy, x, weight), exact_grad) < 1e-6


@fused
@pytest.mark.integration
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("kind", KINDS)
def test_opcheck(kind: str, device: str) -> None:
    shape = (2, 2, 6, 9)
    for dtype in HALF:
        for weight in (draw_weight(kind).to(device), draw_weight(kind, dtype).to(device)):
            x, dy = draw_frames(shape, dtype).to(device), draw_gradient(shape, dtype, weight).to(device)
            avsf = torch.ops.avsf
            arguments = (x, weight.clone().requires_grad_())
            assert set(torch.library.opcheck(avsf.stem_conv.default, arguments).values()) == {"SUCCESS"}
            arguments = (dy, x, weight)
            assert set(torch.library.opcheck(avsf.stem_conv_weight_grad.default, arguments).values()) == {"SUCCESS"}


@fused
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("shape", [*SHAPES, (2, 8, 36, 70)])
@pytest.mark.parametrize("kind", KINDS)
def test_operations_against_float64(
    kind: str, shape: tuple[int, int, int, int], dtype: torch.dtype, device: str
) -> None:
    """Error at most max(twice PyTorch's own, 1 ulp): `assert_close` holds what is stricter, 99.9 % within 1 ulp."""
    weight = draw_weight(kind).to(device)
    x, dy = draw_frames(shape, dtype).to(device), draw_gradient(shape, dtype, weight).to(device)
    exact_y, exact_grad = exact(x, weight, dy)
    y = torch.ops.avsf.stem_conv(x, weight)
    grad = torch.ops.avsf.stem_conv_weight_grad(dy, x, weight)
    assert_close(y.cpu(), exact_y, "y")
    assert y.stride() == dy.stride() or shape == SHAPES[0]
    assert relative(grad.cpu(), exact_grad) < 2e-5
    assert grad.dtype == torch.float32


@pytest.mark.parametrize("kind", KINDS)
def test_wrapper_without_the_kernels(kind: str) -> None:
    shape = (1, 2, 5, 6)
    x, weight = draw_frames(shape, torch.float32), draw_weight(kind).requires_grad_()
    assert not covers(x, weight)
    y = stem_conv(x, weight)
    dy = draw_gradient(shape, torch.float32, weight)
    (grad,) = torch.autograd.grad(y, weight, dy)
    exact_y, exact_grad = exact(x, weight, dy)
    assert_close(y, exact_y, "y")
    assert_close(grad, exact_grad, "grad", 4e-6)
    assert y.stride() == dy.stride()


def test_wrong_shapes_are_refused() -> None:
    with pytest.raises(KernelInputError, match=r"must be \(N, 4, T, H, W\)"):
        stem_conv(torch.zeros(1, 3, 1, 4, 4), draw_weight("fast"))
    with pytest.raises(KernelInputError, match=r"must be one of \(\(8, 3, 5, 7, 7\), \(64"):
        stem_conv(torch.zeros(1, 4, 1, 4, 4), torch.zeros(64, 3, 5, 7, 7))


@fused
def test_gradient_of_frames_is_refused() -> None:
    x, weight = draw_frames((1, 2, 5, 6), torch.bfloat16).requires_grad_(), draw_weight("fast").requires_grad_()
    with pytest.raises(KernelInputError, match="no gradient for its frames"):
        torch.ops.avsf.stem_conv(x, weight).float().sum().backward()


@fused
@pytest.mark.needs_cuda
@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("shape", [(2, 8, 64, 224), (1, 5, 33, 255), (1, 6, 40, 256)])
@pytest.mark.parametrize("kind", KINDS)
def test_cuda_is_as_exact_as_torch(kind: str, shape: tuple[int, int, int, int], dtype: torch.dtype) -> None:
    x, weight = draw_frames(shape, dtype).cuda(), draw_weight(kind).cuda().requires_grad_()
    assert covers(x, weight)
    dy = draw_gradient(shape, dtype, weight).cuda()
    exact_y, exact_grad = exact(x, weight, dy)
    other = weight.detach().to(dtype).requires_grad_()
    torch_y = F.conv3d(x[:, :3], other, None, STRIDE, padding(other))
    (torch_grad,) = torch.autograd.grad(torch_y, other, dy)
    y = stem_conv(x, weight)
    (grad,) = torch.autograd.grad(y, weight, dy)
    ulp = torch.finfo(dtype).eps
    for own, theirs, true in ((y, torch_y, exact_y), (grad, torch_grad, exact_grad)):
        error, allowed = relative(own.detach().cpu(), true), relative(theirs.detach().cpu(), true)
        assert error <= max(2 * allowed, ulp)
    assert relative(grad.cpu(), exact_grad) < 1e-4  # float32: far below what a 16-bit gradient holds


@fused
@pytest.mark.needs_cuda
@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("kind", KINDS)
def test_cuda_gives_the_same_bits_and_can_be_captured(kind: str, dtype: torch.dtype) -> None:
    shape = (3, 8, 64, 112)
    x, weight = draw_frames(shape, dtype).cuda(), draw_weight(kind).cuda()
    dy = draw_gradient(shape, dtype, weight).cuda()
    avsf = torch.ops.avsf
    first = avsf.stem_conv(x, weight), avsf.stem_conv_weight_grad(dy, x, weight)
    for _ in range(3):
        again = avsf.stem_conv(x, weight), avsf.stem_conv_weight_grad(dy, x, weight)
        assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert torch.equal(avsf.stem_conv(x[1:], weight), first[0][1:])  # a clip depends on no other
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = avsf.stem_conv(x, weight), avsf.stem_conv_weight_grad(dy, x, weight)
    for value in captured:
        value.fill_(torch.nan)
    graph.replay()
    torch.cuda.synchronize()
    assert all(torch.equal(a, b) for a, b in zip(first, captured, strict=True))


@fused
@pytest.mark.needs_cuda
@pytest.mark.parametrize("kind", KINDS)
def test_cuda_gradients_in_other_layouts(kind: str) -> None:
    """A gradient that autograd expands or hands out in row-major order, or as a slice of channels."""
    shape = (2, 3, 9, 14)
    x, weight = draw_frames(shape, torch.bfloat16).cuda(), draw_weight(kind).cuda().requires_grad_()
    rows = draw_gradient(shape, torch.bfloat16, weight).cuda()
    (expected,) = torch.autograd.grad(stem_conv(x, weight), weight, rows)
    wide = torch.zeros(*rows.movedim(1, -1).shape[:-1], weight.shape[0] + 5, dtype=rows.dtype, device="cuda").movedim(
        -1, 1
    )
    wide[:, 3:-2] = rows
    for gradient in (rows.contiguous(), wide[:, 3:-2]):
        (grad,) = torch.autograd.grad(stem_conv(x, weight), weight, gradient)
        assert torch.equal(grad, expected)
    (grad,) = torch.autograd.grad(stem_conv(x, weight).sum(), weight)
    assert relative(grad.cpu(), exact(x, weight, torch.ones_like(rows))[1]) < 2e-5
