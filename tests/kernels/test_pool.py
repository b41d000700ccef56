"""BN + ReLU + max pooling in one operation: definition, ties, NaN, gradients, bitwise rules."""

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn

from kernels import definition, eager
from kernels.layout import KernelInputError
from kernels.library import fused_devices
from kernels.modules import GhostBatchNorm, set_backend
from tests.kernels.support.cases import DTYPES, assert_close, draw, norm_error, relative

fused = pytest.mark.skipif(not fused_devices(), reason="the library of fused operations is not built")
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.needs_cuda)]
# Odd and even sizes, one row, one column, eight channels (two positions a vector), a tail of channels, groups, 4-D.
SHAPES = [
    ((8, 64, 2, 8, 10), 1),
    ((16, 8, 3, 9, 7), 2),
    ((8, 8, 2, 12, 12), 1),
    ((3, 5, 2, 5, 4), 1),
    ((1, 24, 1, 1, 6), 1),
    ((2, 8, 1, 5, 1), 1),
    ((8, 72, 1, 2, 2), 1),
    ((16, 20, 7, 6), 2),
    ((4, 4, 2, 6, 9), 1),
]
avsf = torch.ops.avsf


@pytest.fixture(autouse=True)
def _auto_backend() -> Iterator[None]:
    yield
    set_backend("auto")
    torch.set_num_threads(1)


def coefficients(x: Tensor, groups: int) -> Tensor:
    generator = torch.Generator().manual_seed(5)
    weight, bias = torch.randn(2, x.shape[1], generator=generator).to(x.device).unbind()
    return avsf.bn_finalize(avsf.bn_stats(x, groups), weight.contiguous(), bias.contiguous(), 1e-5)


@fused
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("shape", "groups"), SHAPES)
def test_against_the_definition(shape: tuple[int, ...], groups: int, dtype: torch.dtype, device: str) -> None:
    for sliced in (False, True):
        x = draw(shape, dtype, 1, device, sliced)
        coef = coefficients(x, groups)
        y, value, tap = avsf.bn_relu_maxpool(x, coef, True)
        expected, expected_value, expected_tap = definition.bn_relu_maxpool(x.double(), coef.double(), True)
        assert_close(y, expected, "y")
        assert y.stride() == expected.to(memory_format=definition.memory_format(x)).stride()
        assert (tap == expected_tap).double().mean() > 0.999  # float32 may tie where float64 does not
        assert (value.double() == expected_value).double().mean() > 0.999
        plain, none, no_tap = avsf.bn_relu_maxpool(x, coef, False)
        assert torch.equal(plain, y)
        assert none.numel() == no_tap.numel() == 0
        dy = draw(tuple(y.shape), dtype, 2, device, sliced)
        sums = avsf.bn_act_bwd_reduce(dy, value, None, tap.new_empty(0), coef, None, groups, True)
        exact = definition.bn_act_bwd_reduce(
            dy.double(), value.double(), None, tap.new_empty(0), coef.double(), None, groups, True
        )
        assert ((sums - exact).abs().max() / (dy.numel() / shape[1]) ** 0.5).item() < 5e-6
        dx = avsf.bn_relu_maxpool_bwd_apply(dy, x, tap, coef, sums)
        exact_dx = definition.bn_relu_maxpool_bwd_apply(dy.double(), x.double(), tap, coef.double(), sums.double())
        assert_close(dx, exact_dx, "dx", 4e-6)


@fused
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("channels", [3, 8, 16])
def test_ties_and_nan_as_pytorch(channels: int, dtype: torch.dtype, device: str) -> None:
    """Small whole numbers tie often; with scale 1 and shift 0 nothing is rounded."""
    generator = torch.Generator().manual_seed(0)
    values = torch.randint(-2, 3, (4, channels, 2, 9, 12), generator=generator)
    for poison in (False, True):
        x = values.to(device, dtype).to(memory_format=torch.channels_last_3d).clone()
        if poison:
            x[torch.rand(x.shape, generator=generator).to(device) < 0.1] = torch.nan
        leaf = x.clone().requires_grad_()
        expected = eager.max_pool(leaf.relu())
        dy = draw(tuple(expected.shape), dtype, 1, device)
        expected.backward(dy)
        coef = torch.zeros(5, 1, channels, device=device)
        coef[0] = coef[3] = 1  # no statistics: dx is dz
        y, _, tap = avsf.bn_relu_maxpool(x, coef, True)
        assert torch.equal(torch.nan_to_num(y, 9.0), torch.nan_to_num(expected, 9.0))
        zeros = torch.zeros(1, 3, channels, device=device)
        dx = avsf.bn_relu_maxpool_bwd_apply(dy, torch.nan_to_num(x), tap, coef, zeros)
        torch.testing.assert_close(dx, leaf.grad, rtol=2 * torch.finfo(dtype).eps, atol=4 * torch.finfo(dtype).eps)
        assert torch.equal(dx == 0, leaf.grad == 0)


def exact_stem(x: Tensor, module: GhostBatchNorm, groups: int) -> Tensor:
    parts = [
        nn.functional.batch_norm(part, None, None, module.weight.double(), module.bias.double(), True, 0.1, module.eps)
        for part in x.chunk(groups)
    ]
    return nn.functional.max_pool3d(torch.cat(parts).relu(), (1, 3, 3), (1, 2, 2), (0, 1, 1))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", ["reference", pytest.param("fused", marks=fused)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_module_and_its_gradients(dtype: torch.dtype, name: str, device: str) -> None:
    set_backend(name)
    module = GhostBatchNorm(8)
    generator = torch.Generator().manual_seed(1)  # of the CPU: the weights are drawn before they move
    nn.init.normal_(module.weight, generator=generator)
    nn.init.normal_(module.bias, generator=generator)
    module.to(device)
    x = draw((16, 8, 2, 10, 9), dtype, 2, device)
    leaf, wide = x.clone().requires_grad_(), x.double().requires_grad_()
    y, exact = module(leaf, relu=True, pool=True), exact_stem(wide, module, 2)
    dy = draw(tuple(y.shape), dtype, 3, device)
    y.backward(dy)
    got = module.weight.grad.clone(), module.bias.grad.clone()
    module.zero_grad()
    exact.backward(dy.double())
    # In 16 bits PyTorch pools rounded values, so that other positions tie; the fused form pools before rounding.
    tolerance = 4e-6 if dtype == torch.float32 else 0.15 if name == "reference" else 1e-2
    assert relative(y, exact.detach()) < max(tolerance, torch.finfo(dtype).eps)
    assert norm_error(leaf.grad, wide.grad) < tolerance
    assert norm_error(got[0], module.weight.grad) < tolerance
    assert norm_error(got[1], module.bias.grad) < tolerance
    assert module.num_batches_tracked.item() == 1
    assert relative(module.running_var, 0.9 + 0.1 * x.double().var((0, 2, 3, 4))) < 1e-6


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", ["reference", pytest.param("fused", marks=fused)])
def test_evaluation_without_gradients_and_wrong_use(name: str, device: str) -> None:
    set_backend(name)
    module, x = GhostBatchNorm(8).eval().to(device), draw((3, 8, 2, 7, 7), torch.float32, device=device)
    module.running_mean.fill_(0.5)
    with torch.no_grad():
        y = module(x, relu=True, pool=True)
    expected = nn.functional.max_pool3d(((x - 0.5) / (1 + 1e-5) ** 0.5).relu(), (1, 3, 3), (1, 2, 2), (0, 1, 1))
    assert relative(y, expected) < 2e-6
    with pytest.raises(KernelInputError, match="relu=True"):
        module(x, pool=True)
    with pytest.raises(KernelInputError, match="residual"):
        module(x, residual=x, relu=True, pool=True)


@fused
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_groups_and_threads_are_bitwise_equal(dtype: torch.dtype, device: str) -> None:
    set_backend("fused")
    x = draw((16, 24, 3, 9, 7), dtype, 1, device)
    dy = draw((16, 24, 3, 5, 4), dtype, 2, device)

    def run(part: slice, threads: int) -> list[Tensor]:
        torch.set_num_threads(threads)
        leaf = x[part].detach().requires_grad_()
        y = GhostBatchNorm(24).to(device)(leaf, relu=True, pool=True)
        y.backward(dy[part])
        return [y.detach(), leaf.grad]

    whole = run(slice(None), 1)
    for again in (run(slice(None), 2), run(slice(None), 1)):
        assert all(torch.equal(a, b) for a, b in zip(whole, again, strict=True))
    for start in (0, 8):
        part = slice(start, start + 8)
        assert all(torch.equal(a[part], b) for a, b in zip(whole, run(part, 1), strict=True))
