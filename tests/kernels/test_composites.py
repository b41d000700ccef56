"""Whole nodes (`norm_act`, `norm_pool`, `lateral_fuse`, their backwards) against float64, in shapes small enough for
compute-sanitizer: batch and given statistics, all groups at once and group by group, wide and single accesses, slices.
"""

import itertools

import pytest
import torch
from torch import Tensor

from kernels import definition
from kernels.library import fused_devices
from tests.kernels.support.cases import DTYPES, assert_close, draw

pytestmark = [
    pytest.mark.integration,  # seconds on the CPU, where test_ops.py tests the parts
    pytest.mark.skipif(not fused_devices(), reason="the library of fused operations is not built"),
]
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.needs_cuda)]
# (N, C, T, H, W) and groups: 128-bit accesses, a tail of channels, one position, more rows than one chunk of one block.
SHAPES = [((16, 16, 2, 3, 4), 2), ((4, 5, 2, 3, 3), 2), ((8, 8, 1, 1, 1), 1), ((2, 8, 3, 33, 32), 1)]
FORMS = ["plain", "relu", "residual", "residual_relu", "projected"]
EPS = 1e-3
avsf = torch.ops.avsf


def parameters(channels: int, seed: int, device: str, given: bool) -> tuple[Tensor | None, ...]:
    """Weight, bias, and running mean and variance or none."""
    generator = torch.Generator().manual_seed(seed)
    weight, bias, mean = torch.randn(3, channels, generator=generator).to(device).unbind()
    variance = (torch.rand(channels, generator=generator) + 0.5).to(device)
    return (weight, bias, mean, variance) if given else (weight, bias, None, None)


def exact_coefficients(x: Tensor, groups: int, values: tuple[Tensor | None, ...]) -> Tensor:
    """(5, G, C), or (5, 1, C) for given statistics, in float64."""
    weight, bias, mean, variance = (v if v is None else v.double() for v in values)
    if mean is None or variance is None:
        return definition.bn_finalize(definition.bn_stats(x.double(), groups), weight, bias, EPS)
    return definition.given_coefficients(mean, variance, weight, bias, EPS)


def assert_coefficients(coef: Tensor, exact: Tensor) -> None:
    """Scale, shift, mean and invstd of data with deviation 1; 1/count exactly: 0 says that statistics were given."""
    assert coef.shape == exact.shape
    for row in range(4):  # a mean near zero is as exact as the deviation is large
        assert (coef[row] - exact[row]).abs().max().item() < 5e-6 * max(1.0, exact[row].abs().max().item())
    assert torch.equal(coef[4], exact[4].float())


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("given", [False, True])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_norm_act_and_its_backward(dtype: torch.dtype, form: str, given: bool, device: str) -> None:
    relu, project = form not in ("plain", "residual"), form == "projected"
    for (shape, groups), sliced, blocked in itertools.product(SHAPES, (False, True), (False, True)):
        x, residual, dy = (draw(shape, dtype, seed, device, sliced) for seed in (1, 2, 3))
        other = residual if form in ("residual", "residual_relu", "projected") else None
        own = parameters(shape[1], 4, device, given)
        own_other = parameters(shape[1], 5, device, not given) if project else (None,) * 4  # one of each kind
        y, mask, stats, coef, _, other_coef = avsf.norm_act(
            x, *own, EPS, other, *own_other, EPS, project, groups, relu, blocked
        )
        assert_coefficients(coef, exact_coefficients(x, groups, own))
        assert stats.shape == (0 if given else groups, 3, shape[1])
        if project:
            assert_coefficients(other_coef, exact_coefficients(residual, groups, own_other))
        used = other_coef if project else None
        wide = [t if t is None else t.double() for t in (x, coef, other, used)]
        expected, _ = definition.bn_act(*wide, None, None, relu)
        assert_close(y, expected, f"y {shape} sliced {sliced} blocked {blocked}")
        kept = residual if project else None
        for second in (None, draw(shape, dtype, 6, device, sliced)):
            want = other is not None and (project or relu or second is not None)
            got = avsf.norm_act_backward(dy, second, x, kept, mask, coef, used, groups, relu, want, blocked)
            total = dy if second is None else (dy.float() + second.float()).to(dtype)  # rounded once
            wide_kept = None if kept is None else kept.double()
            exact = definition.norm_act_backward(
                total.double(), None, x.double(), wide_kept, mask, wide[1], wide[3], groups, relu, want
            )
            scale = (dy.numel() / shape[1]) ** 0.5 * max(1.0, exact[2].abs().max().item() / 50)
            assert ((got[2].double() - exact[2]).abs().max() / scale).item() < 1e-5
            what = f"{shape} sliced {sliced} blocked {blocked} second {second is not None}"
            assert_close(got[0], exact[0], f"dx {what}", 4e-6)
            if want:
                assert_close(got[1], exact[1], f"dresidual {what}", 4e-6)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("given", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_norm_pool_and_its_backward(dtype: torch.dtype, given: bool, device: str) -> None:
    for (shape, groups), sliced in itertools.product(SHAPES, (False, True)):
        x, own = draw(shape, dtype, 1, device, sliced), parameters(shape[1], 4, device, given)
        y, value, tap, _, coef = avsf.norm_pool(x, *own, EPS, groups, True)
        assert_coefficients(coef, exact_coefficients(x, groups, own))
        expected, _, _ = definition.bn_relu_maxpool(x.double(), coef.double(), True)
        assert_close(y, expected, f"y {shape} sliced {sliced}")
        plain, none, no_tap, _, _ = avsf.norm_pool(x, *own, EPS, groups, False)
        assert torch.equal(plain, y)
        assert none.numel() == no_tap.numel() == 0
        dy = draw(tuple(y.shape), dtype, 2, device, sliced)
        dx, rows = avsf.norm_pool_backward(dy, x, value, tap, coef, groups)
        sums = avsf.bn_act_bwd_reduce(dy, value, None, tap.new_empty(0), coef, None, groups, True)
        torch.testing.assert_close(rows[:2], sums.sum(0)[:2], rtol=1e-5, atol=1e-5)
        exact_dx = definition.bn_relu_maxpool_bwd_apply(dy.double(), x.double(), tap, coef.double(), sums.double())
        assert_close(dx, exact_dx, f"dx {shape} sliced {sliced}", 4e-6)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("given", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_lateral_fuse_with_audio_and_keep(dtype: torch.dtype, given: bool, device: str) -> None:
    for (shape, groups), channels in itertools.product(SHAPES, (8, 3)):
        slow, lateral = draw(shape, dtype, 1, device), draw((shape[0], channels, *shape[2:]), dtype, 2, device)
        audio = torch.randn(shape[0], shape[1] + channels, shape[2], generator=torch.Generator().manual_seed(3))
        audio = audio.to(device, dtype)
        keep = torch.arange(shape[0], device=device) % 2 == 1
        audio[::2] = torch.nan  # of dropped clips: selected away, never multiplied by zero
        own = parameters(channels, 4, device, given)
        for sound, kept in ((audio, keep), (torch.nan_to_num(audio), None), (None, None)):
            out, _, coef = avsf.lateral_fuse(slow, lateral, *own, EPS, sound, kept, groups)
            assert_coefficients(coef, exact_coefficients(lateral, groups, own))
            exact = [t if t is None else t.double() for t in (slow, None, None, None, lateral, coef, sound)]
            expected, _, _ = definition.lateral_cat(*exact, kept)
            assert_close(out, expected, f"out {shape} {channels}")
            assert out.is_contiguous(memory_format=torch.channels_last_3d)
