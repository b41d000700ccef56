"""Errors against float64 beside PyTorch's own; gradcheck of the reference; properties on random shapes."""

from collections.abc import Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.autograd import gradcheck
from torch.nn.functional import batch_norm

from kernels import definition, eager
from kernels.library import fused_devices
from kernels.modules import GhostBatchNorm, LateralFusion, set_backend
from tests.kernels.support.cases import DTYPES, assert_close, channels_last, draw, ulps

fused = pytest.mark.skipif(not fused_devices(), reason="the library of fused operations is not built")
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.needs_cuda)]


@pytest.fixture(autouse=True)
def _auto_backend() -> Iterator[None]:
    yield
    set_backend("auto")


def test_gradcheck_of_the_reference() -> None:
    set_backend("reference")
    torch.manual_seed(0)
    x, r = (channels_last(torch.randn(4, 3, 2, 2, 2, dtype=torch.float64)).requires_grad_() for _ in range(2))
    first, second = (GhostBatchNorm(3, clips_per_group=2).double() for _ in range(2))
    assert gradcheck(lambda a, b: first(a, residual=b, residual_norm=second), (x, r))
    fusion = LateralFusion(GhostBatchNorm(3, clips_per_group=2).double())
    audio = torch.randn(4, 6, 2, dtype=torch.float64, requires_grad=True)
    keep = torch.tensor([True, False, True, True])
    assert gradcheck(lambda a, b, c: fusion(a, b, audio=c, keep=keep), (x, r, audio))


def test_definition_of_the_backward_is_the_gradient_of_the_forward() -> None:
    torch.manual_seed(0)
    x, r, dy = (channels_last(torch.randn(4, 5, 2, 3, 3, dtype=torch.float64)) for _ in range(3))
    w, b = torch.randn(2, 5, dtype=torch.float64).unbind()
    leaves = [t.clone().requires_grad_() for t in (x, r, w, b)]
    coefs = [definition.bn_finalize(definition.bn_stats(t, 2), *leaves[2:], 1e-5) for t in leaves[:2]]
    y, mask = definition.bn_act(leaves[0], coefs[0], leaves[1], coefs[1], None, None, True)
    y.backward(dy)
    fixed = [c.detach() for c in coefs]
    sums = definition.bn_act_bwd_reduce(dy, x, r, mask, *fixed, 2, True)
    dx, dr = definition.bn_act_bwd_apply(dy, x, r, mask, *fixed, sums, True, True)
    total = sums.sum(0)
    for got, leaf in zip((dx, dr, total[1] + total[2], 2 * total[0]), leaves, strict=True):
        torch.testing.assert_close(got, leaf.grad, rtol=1e-10, atol=1e-12)


@fused
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("offset", [0.0, 100.0])
@pytest.mark.parametrize("dtype", DTYPES)
def test_error_at_most_twice_pytorchs(dtype: torch.dtype, offset: float, device: str) -> None:
    """Forward and backward of BN + ReLU; both against float64 on the same inputs."""
    x = (draw((8, 48, 4, 11, 9), torch.float32, 1, device) + offset).to(dtype)
    dy = draw((8, 48, 4, 11, 9), dtype, 2, device)
    w = torch.rand(48, generator=torch.Generator().manual_seed(3)).to(device) + 0.5

    def pytorch(leaf: Tensor, weight: Tensor) -> Tensor:
        view = leaf.flatten(2, 3)
        return batch_norm(view, None, None, weight, torch.zeros_like(weight), True, 0.1, 1e-5).relu().view(leaf.shape)

    set_backend("fused")
    module = GhostBatchNorm(48).to(device)
    module.weight.data.copy_(w)
    results = []
    for forward, leaf in (
        (lambda t: pytorch(t, w.double()), x.double()),
        (lambda t: pytorch(t, w), x.clone()),
        (lambda t: module(t, relu=True), x.clone()),
    ):
        leaf.requires_grad_()
        y = forward(leaf)
        y.backward(dy.to(y.dtype))
        results.append((y.detach(), leaf.grad))
    for exact, theirs, ours in zip(*results, strict=True):
        # 1 ulp of a 16-bit value near the top, or of float32 at the magnitude of the mean that is subtracted
        one_ulp = torch.finfo(dtype).eps * (
            exact.abs().max() if dtype != torch.float32 else exact.abs().max() + offset / 8
        )
        limit = max(2 * (theirs.double() - exact).abs().max().item(), one_ulp.item())
        assert (ours.double() - exact).abs().max().item() <= limit


@fused
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_large_mean_small_variance(dtype: torch.dtype, device: str) -> None:
    """|mean| / std = 100: naive sums of squares are 1.7e-3 off here."""
    x = (draw((8, 24, 4, 13, 11), torch.float32, 1, device) + 100).to(dtype)
    stats = torch.ops.avsf.bn_stats(x, 1)
    exact = x.double().var((0, 2, 3, 4), correction=0)
    ours = (stats[0, 2] / stats[0, 0]).double()
    assert ((ours - exact).abs() / exact).max().item() <= 5e-6
    naive = x.float().square().mean((0, 2, 3, 4)) - x.float().mean((0, 2, 3, 4)).square()
    if dtype == torch.float32:
        assert ((naive.double() - exact).abs() / exact).max().item() > 5e-6


def few_zeros(rows: Tensor, where: str) -> None:
    """Set a few of (N, P, C) rows to zero: those from which an implementation may take its centre."""
    _, positions, channels = rows.shape
    if where == "first eight":
        rows[:, :8] = 0
    elif where == "each thread's first":
        rows[:, : 256 // max(1, channels // 8)] = 0
    else:  # "spread": in the middle of each eighth of what the CPU sums at once
        block = min(positions, (1 << 17) // channels // 16 * 16)
        for start in range(0, positions, block):
            step = min(block, positions - start) // 8
            rows[:, start + step // 2 : start + 8 * step : step] = 0


@fused
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("sliced", [False, True])
@pytest.mark.parametrize("channels", [5, 8, 136])
@pytest.mark.parametrize("where", ["first eight", "each thread's first", "spread"])
def test_variance_does_not_depend_on_a_good_centre(where: str, channels: int, sliced: bool, device: str) -> None:
    """Sums around the mean of the first eight positions are up to 5.5e-3 off here, as bad as naive ones."""
    positions = 1 << (17 if channels < 100 else 14)
    wide = draw((2, channels + 8 * sliced, positions // 64, 8, 8), torch.float32, 1, device) + 100
    x = wide[:, :channels]
    few_zeros(x.movedim(1, -1).flatten(1, 3), where)
    assert (x[:, 0] == 0).any()
    stats = torch.ops.avsf.bn_stats(x, 2).double()
    exact = definition.bn_stats(x.double(), 2)
    assert ((stats[:, 2] - exact[:, 2]).abs() / exact[:, 2]).max().item() <= 5e-6
    deviation = (exact[:, 2] / exact[:, 0]).sqrt()
    assert ((stats[:, 1] - exact[:, 1]).abs() / deviation).max().item() <= 1e-5


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ["reference", pytest.param("fused", marks=fused)])
def test_inf_and_nan_go_through_the_statistics(name: str, dtype: torch.dtype, device: str) -> None:
    """An overflow shows in its channel: output, running statistics and gradients; the other channels never see it."""
    set_backend(name)
    for channels in (16, 13):  # 128-bit accesses, single ones
        clean = draw((8, channels, 4, 6, 5), dtype, 1, device)
        x = clean.clone()
        x[0, 2, 0, 0, 0], x[3, 5, 2, 3, 1], x[7, 7, 3, 5, 4] = torch.inf, -torch.inf, torch.nan
        x[0, 9, 0, 0, 0], x[5, 9, 1, 2, 0] = torch.inf, -torch.inf
        bad = torch.zeros(channels, dtype=torch.bool, device=device)
        bad[[2, 5, 7, 9]] = True
        results = []
        for values in (x, clean):
            module, leaf = GhostBatchNorm(channels).to(device), values.clone().requires_grad_()
            y = module(leaf, relu=True)
            y.backward(torch.ones_like(y))
            results.append((y.detach(), leaf.grad, module.running_mean, module.running_var, module.weight.grad))
        for value, expected in zip(*results, strict=True):
            at = 1 if value.dim() == 5 else 0
            found, fine = (t.movedim(at, 0).flatten(1) if at else t[:, None] for t in (value, expected))
            assert not torch.isfinite(found[bad]).any()
            assert torch.equal(found[~bad], fine[~bad])
        assert results[0][0][:, bad].isnan().all()
        assert results[0][3][bad].isnan().all()


@pytest.mark.parametrize("device", DEVICES)
@fused
def test_sixteen_bits_within_one_ulp(device: str) -> None:
    for dtype in (torch.bfloat16, torch.float16):
        x = draw((8, 64, 4, 9, 9), dtype, 1, device)
        coef = torch.ops.avsf.bn_finalize(torch.ops.avsf.bn_stats(x, 1), None, None, 1e-5)
        y, _ = torch.ops.avsf.bn_act(x, coef, None, None, None, None, True)
        exact, _ = definition.bn_act(x.double(), coef.double(), None, None, None, None, True)
        distance = ulps(y, exact)[exact > 1e-3]
        assert (distance <= 1).double().mean() >= 0.999
        assert distance.max() <= 2


@pytest.mark.parametrize("device", DEVICES)
@fused
def test_dropped_audio_is_exactly_zero(device: str) -> None:
    set_backend("fused")
    slow, lateral = (draw((8, c, 2, 4, 4), torch.bfloat16, c, device) for c in (16, 8))
    audio = torch.full((8, 24, 2), torch.inf, dtype=torch.bfloat16, device=device)
    audio[::2] = torch.nan
    keep = torch.zeros(8, dtype=torch.bool, device=device)
    leaf = audio.requires_grad_()
    fusion = LateralFusion(GhostBatchNorm(8)).to(device)
    out = fusion(slow, lateral, audio=leaf, keep=keep)
    assert torch.equal(out, fusion(slow, lateral))
    out.backward(torch.full_like(out, torch.inf))
    assert torch.equal(leaf.grad, torch.zeros_like(leaf))


@pytest.mark.parametrize("device", DEVICES)
@fused
def test_nan_stays_nan_through_the_rectifier(device: str) -> None:
    x = draw((8, 16, 2, 3, 3), torch.float32, device=device)
    coef = torch.ops.avsf.bn_finalize(torch.ops.avsf.bn_stats(x, 1), None, None, 1e-5)
    x[0, 3, 0, 0, 0] = torch.nan
    y, _ = torch.ops.avsf.bn_act(x, coef, None, None, None, None, True)
    assert torch.isnan(y).sum() == 1


def check_stats(x: Tensor, groups: int) -> Tensor:
    """bn_stats and bn_finalize of x against their definitions; the coefficients."""
    stats, exact = torch.ops.avsf.bn_stats(x, groups), definition.bn_stats(x.double(), groups)
    (count, mean, squares), (_, exact_mean, exact_squares) = stats.unbind(1), exact.unbind(1)
    assert torch.equal(count.double(), exact[:, 0])
    # float32 holds a mean to 2^-24 of it; where it is far from zero, so much of it is in each deviation
    rounding = 2.0**-23 * exact_mean.abs()
    deviation = (exact_squares / count).sqrt()
    assert ((mean - exact_mean).abs() <= rounding + 1e-6 * deviation).all()
    assert ((squares - exact_squares).abs() <= 4e-6 * exact_squares + count * rounding * (deviation + rounding)).all()
    weight, bias = draw((2, x.shape[1], 1, 1), torch.float32, 9, str(x.device)).flatten(1).contiguous()
    coef = torch.ops.avsf.bn_finalize(stats, weight, bias, 1e-2)
    expected = definition.bn_finalize(stats.double(), weight.double(), bias.double(), 1e-2)
    size = expected.abs()
    size[1] = bias.abs() + (expected[0] * expected[2]).abs()  # a difference of these two
    assert ((coef - expected).abs() <= 4 * 2.0**-24 * size).all()
    return coef


def assert_within(value: Tensor, exact: Tensor, terms: Tensor, what: str) -> None:
    """A sum 1e-6 of its `terms` off, 16 roundings of float32, and then rounded to the dtype: half of its last place."""
    info = torch.finfo(value.dtype)
    allowed = 1e-6 * terms + info.eps / 2 * exact.abs() + info.tiny * info.eps  # half a place
    assert value.shape == exact.shape, what
    assert ((value - exact).abs() <= allowed).all(), f"{what}: {((value - exact).abs() / allowed).max().item():.2f}"


def check_backward(dy: Tensor, x: Tensor, rest: tuple[Tensor | None, ...], groups: int, relu: bool, want: bool) -> None:
    """bn_act_bwd_reduce and bn_act_bwd_apply against their definitions; rest: residual, mask, coef, its coef."""
    sums = torch.ops.avsf.bn_act_bwd_reduce(dy, x, *rest, groups, relu)
    residual, mask, coef, other = (t.double() if t is not None and t.is_floating_point() else t for t in rest)
    wide = (dy.double(), x.double(), residual, mask, coef, other)
    exact = definition.bn_act_bwd_reduce(*wide, groups, relu)
    got = torch.ops.avsf.bn_act_bwd_apply(dy, x, *rest, sums, relu, want)
    expected = definition.bn_act_bwd_apply(*wide, sums.double(), relu, want)
    dz = definition._wide(wide[0], groups).abs()
    assert_within(sums[:, 0], exact[:, 0], dz.sum(1), "sum dz")
    for row, values, c in ((1, wide[1], coef), (2, residual, other)):
        if values is None or c is None:
            assert not sums[:, row].any()
            continue
        hat = (definition._wide(values, groups).abs() + c[2, :, None].abs()) * c[3, :, None]  # before it cancels
        assert_within(sums[:, row], exact[:, row], (dz * hat).sum(1), f"sum {row}")
        share = sums.double().abs() * c[4, :, None]
        terms = c[0, :, None].abs() * (dz + share[:, :1] + hat * share[:, row, None])
        assert_within(got[row - 1], expected[row - 1], definition._like(terms, wide[1]), f"gradient {row}")
    if want and other is None:
        assert torch.equal(got[1].double(), expected[1])


@pytest.mark.parametrize("device", DEVICES)
@fused
@settings(max_examples=60, deadline=None)
@given(
    shape=st.tuples(st.integers(1, 4), st.integers(1, 150), st.integers(1, 3), st.integers(1, 6), st.integers(1, 6)),
    groups=st.integers(1, 3),
    dtype=st.sampled_from(DTYPES),
    sliced=st.booleans(),
    form=st.sampled_from(["plain", "relu", "residual", "residual_relu", "projected"]),
    seed=st.integers(0, 1000),
)
def test_random_shapes(
    shape: tuple[int, ...], groups: int, dtype: torch.dtype, sliced: bool, form: str, seed: int, device: str
) -> None:
    """Each operation's own result against its definition in float64 on the same inputs."""
    shape, relu = (shape[0] * groups, *shape[1:]), form not in ("plain", "residual")
    x, r, dy = (draw(shape, dtype, seed + i, device, sliced) for i in range(3))
    residual = None if form in ("plain", "relu") else r
    coef = check_stats(x, groups)
    other = check_stats(r, groups) if form == "projected" else None
    y, mask = torch.ops.avsf.bn_act(x, coef, residual, other, None, None, relu)
    args = [t if t is None else t.double() for t in (x, coef, residual, other)]
    exact, exact_mask = definition.bn_act(*args, None, None, relu)
    assert_close(y, exact, "y", 4e-6)
    if relu:  # where z is zero but for rounding, float32 may rectify or not: no gradient there
        z, _ = definition.bn_act(*args, None, None, False)
        undecided = z.abs() <= 4e-6 * z.abs().max()
        dy.masked_fill_(undecided, 0)
        if mask.numel():
            differs = definition.unpack_mask(mask ^ exact_mask, shape[1])
            assert not (differs & ~undecided.movedim(1, -1).reshape(differs.shape)).any()
    kept = residual if other is not None else None
    check_backward(dy, x, (kept, mask, coef, other), groups, relu, residual is not None)


def test_definitions_and_modules_agree() -> None:
    set_backend("reference")
    x = draw((16, 6, 2, 3, 3), torch.float64)
    y, stats = eager.batch_norm(x, None, None, 1e-5, 2)
    torch.testing.assert_close(stats, definition.bn_stats(x, 2), rtol=1e-9, atol=1e-9)
    coef = definition.bn_finalize(stats, None, None, 1e-5)
    torch.testing.assert_close(y, definition.bn_act(x, coef, None, None, None, None, False)[0])
