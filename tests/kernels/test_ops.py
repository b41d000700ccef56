"""Every compiled operation against its plain-torch definition in float64, on the same inputs."""

import json
import shutil
import subprocess
import sys

import pytest
import torch
from torch import Tensor

from kernels import definition
from kernels.layout import KernelInputError
from kernels.library import fused_devices
from tests.kernels.support.cases import DTYPES, SHAPES, assert_close, draw, relative

pytestmark = pytest.mark.skipif(not fused_devices(), reason="the library of fused operations is not built")
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.needs_cuda)]
avsf = torch.ops.avsf


def coefficients(x: Tensor, groups: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    weight, bias = torch.randn(2, x.shape[1], generator=generator).to(x.device).unbind()
    return avsf.bn_finalize(avsf.bn_stats(x, groups), weight.contiguous(), bias.contiguous(), 1e-5)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("shape", "groups"), SHAPES)
def test_stats_and_finalize(shape: tuple[int, ...], groups: int, dtype: torch.dtype, device: str) -> None:
    for sliced in (False, True):
        x = draw(shape, dtype, 1, device, sliced)
        stats, exact = avsf.bn_stats(x, groups), definition.bn_stats(x.double(), groups)
        assert torch.equal(stats[:, 0].double(), exact[:, 0])
        deviation = (exact[:, 2] / exact[:, 0]).sqrt().max().item() + 1e-3
        assert (stats[:, 1] - exact[:, 1]).abs().max().item() < 1e-6 * deviation
        assert relative(stats[:, 2], exact[:, 2]) < 2e-6
        coef = avsf.bn_finalize(stats, None, None, 1e-5)
        assert relative(coef[3], definition.bn_finalize(exact, None, None, 1e-5)[3]) < 2e-6


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("form", ["plain", "relu", "residual", "residual_relu", "projected"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("shape", "groups"), SHAPES)
def test_forward_and_backward(shape: tuple[int, ...], groups: int, dtype: torch.dtype, form: str, device: str) -> None:
    relu = form not in ("plain", "residual")
    for sliced in (False, True):
        x, dy = draw(shape, dtype, 1, device, sliced), draw(shape, dtype, 2, device, sliced)
        residual = draw(shape, dtype, 3, device, sliced) if "residual" in form or form == "projected" else None
        coef = coefficients(x, groups, 4)
        other = coefficients(residual, groups, 5) if form == "projected" and residual is not None else None
        y, mask = avsf.bn_act(x, coef, residual, other, None, None, relu)
        exact = [t if t is None else t.double() for t in (x, coef, residual, other)]
        expected, expected_mask = definition.bn_act(*exact, None, None, relu)
        assert_close(y, expected, "y")
        assert mask.shape == expected_mask.shape
        args = (residual if form == "projected" else None, mask, coef, other)
        wide = [t.double() if t is not None and t.is_floating_point() else t for t in args]
        sums = avsf.bn_act_bwd_reduce(dy, x, *args, groups, relu)
        same_sign = definition.bn_act_bwd_reduce(dy.double(), x.double(), *wide, groups, relu)
        scale = (dy.numel() / shape[1]) ** 0.5
        assert ((sums.double() - same_sign).abs().max() / scale).item() < 5e-6
        want = residual is not None
        dx, dres = avsf.bn_act_bwd_apply(dy, x, *args, sums, relu, want)
        exact_dx, exact_dres = definition.bn_act_bwd_apply(dy.double(), x.double(), *wide, sums.double(), relu, want)
        assert_close(dx, exact_dx, "dx", 4e-6)
        if want:
            assert_close(dres, exact_dres, "dresidual", 4e-6)


def test_gradient_of_a_rectified_residual_needs_the_mask() -> None:
    x, dy = draw((8, 16, 2, 3, 3), torch.float32, 1), draw((8, 16, 2, 3, 3), torch.float32, 2)
    coef, none, sums = coefficients(x, 1, 3), torch.empty(0, 2, dtype=torch.uint8), torch.zeros(1, 3, 16)
    with pytest.raises(RuntimeError, match="forward's mask"):
        avsf.bn_act_bwd_apply(dy, x, None, none, coef, None, sums, True, True)
    with pytest.raises(RuntimeError, match="forward's mask"):
        avsf.norm_act_backward(dy, None, x, None, none, coef, None, 1, True, True, False)
    with pytest.raises(KernelInputError, match="forward's mask"):
        definition.bn_act_bwd_apply(dy, x, None, none, coef, None, sums, True, True)
    _, dresidual = avsf.bn_act_bwd_apply(dy, x, None, none, coef, None, sums, False, True)
    assert torch.equal(dresidual, dy)


@pytest.mark.parametrize("device", DEVICES)
def test_errors_reach_python_and_end_no_process(device: str) -> None:
    """Refusals in a child, so that one that ends the process costs this test only, and shows where it was."""
    command = [sys.executable, "-X", "faulthandler", "-m", "tests.kernels.support.refusals", device]
    debugger = shutil.which("gdb")
    child = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
    if child.returncode and debugger:  # again, for the C++ stack
        again = [debugger, "-batch", "-ex", "run", "-ex", "bt 40", "--args", *command]
        child.stderr += subprocess.run(again, capture_output=True, text=True, check=False, timeout=300).stdout[-4000:]
    assert child.returncode == 0, f"exit status {child.returncode} after {child.stderr[-6000:]}"
    assert json.loads(child.stdout) == {"device": device, "refused": 40}


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("channels", [(16, 8), (10, 3), (256, 64)])
def test_lateral_cat(channels: tuple[int, int], dtype: torch.dtype, device: str) -> None:
    slow, residual = (draw((8, channels[0], 2, 4, 3), dtype, seed, device) for seed in (1, 2))
    lateral = draw((8, channels[1], 2, 4, 3), dtype, 3, device)
    audio = torch.randn(8, sum(channels), 2, generator=torch.Generator().manual_seed(4)).to(device, dtype)
    keep = torch.tensor([1, 0, 1, 1, 0, 1, 1, 1], device=device) == 1
    audio[1] = torch.inf
    audio[4] = torch.nan
    coef, own, other = coefficients(lateral, 1, 5), coefficients(slow, 1, 6), coefficients(residual, 1, 7)
    for head in ((None, None, None), (own, None, None), (own, residual, None), (own, residual, other)):
        for sound in ((None, None), (audio, keep), (torch.nan_to_num(audio, 0, 0), None)):
            out, mask, _ = avsf.lateral_cat(slow, *head, lateral, coef, *sound)
            args = [t if t is None else t.double() for t in (slow, *head, lateral, coef, sound[0])]
            expected, expected_mask, _ = definition.lateral_cat(*args, sound[1])
            assert_close(out, expected, "out")
            assert mask.shape == expected_mask.shape
            assert out.is_contiguous(memory_format=torch.channels_last_3d)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_frame_sum(dtype: torch.dtype, device: str) -> None:
    dy = draw((8, 24, 3, 5, 7), dtype, 1, device, sliced=True)
    keep = torch.tensor([1, 0, 1, 0, 1, 1, 1, 1], device=device) == 1
    assert_close(avsf.frame_sum(dy, None), definition.frame_sum(dy.double(), None), "sum")
    total = avsf.frame_sum(dy, keep)
    assert_close(total, definition.frame_sum(dy.double(), keep), "kept sum")
    assert not total[1].any()


@pytest.mark.parametrize("device", DEVICES)
def test_running_statistics(device: str) -> None:
    layers = [draw((16, c, 2, 3, 3), torch.float32, c, device) * 3 + 1 for c in (5, 64, 96)] * 30
    stats = [avsf.bn_stats(x, 2) for x in layers]
    state = [[torch.full((x.shape[1],), start, device=device) for x in layers] for start in (0.0, 1.0)]
    counters = [torch.zeros((), dtype=torch.long, device=device) for _ in layers]
    avsf.running_stats_update_(*state, counters, stats, 0.1)
    for x, mean, variance, counter in zip(layers, *state, counters, strict=True):
        dims = (0, 2, 3, 4)
        assert relative(mean, 0.1 * x.double().mean(dims)) < 1e-6
        assert relative(variance, 0.9 + 0.1 * x.double().var(dims)) < 1e-6
        assert counter.item() == 1


def _wrong_updates() -> list[tuple[str, list[list[Tensor]], str]]:
    one, two = torch.zeros(1, dtype=torch.long), torch.zeros(2, dtype=torch.long)
    mean, stats = torch.zeros(16), torch.ones(2, 3, 16)
    return [
        ("no counter", [[mean], [mean], [one[:0]], [stats]], "counter must be one int64 value"),
        ("two counters", [[mean], [mean], [two], [stats]], "counter must be one int64 value"),
        ("second counter", [[mean] * 2, [mean] * 2, [one, one[:0]], [stats] * 2], "counter must be one int64 value"),
        ("float counter", [[mean], [mean], [one.float()], [stats]], "counter must be one int64 value"),
        ("no mean", [[], [mean], [one], [stats]], "one mean, variance and counter"),
        ("no statistics", [[mean], [mean], [one], []], "one mean, variance and counter"),
        ("more counters", [[mean], [mean], [one, one], [stats]], "one mean, variance and counter"),
        ("short mean", [[mean[:15]], [mean], [one], [stats]], "running mean must be 16"),
        ("wide variance", [[mean], [mean.double()], [one], [stats]], "running variance must be 16 contiguous float32"),
        ("no group", [[mean], [mean], [one], [stats[:0]]], r"stats must be \(G, 3, C\)"),
        ("two rows", [[mean], [mean], [one], [stats[:, :2]]], r"stats must be \(G, 3, C\)"),
    ]


@pytest.mark.parametrize("case", _wrong_updates(), ids=lambda case: case[0])
def test_wrong_running_statistics_are_named_and_change_nothing(case: tuple[str, list[list[Tensor]], str]) -> None:
    _, lists, message = case
    before = [[t.clone() for t in values] for values in lists]
    with pytest.raises(RuntimeError, match=message):
        avsf.running_stats_update_(*lists, 0.1)
    assert all(torch.equal(a, b) for old, new in zip(before, lists, strict=True) for a, b in zip(old, new, strict=True))


def test_empty_data_is_refused() -> None:
    """Each of these operations divides by the number of clips before it looks at the layout."""
    x = draw((8, 16, 2, 3, 3), torch.float32)
    coef, none, sums = coefficients(x, 1, 1), (None,) * 4, torch.zeros(1, 3, 16)
    empty_mask = torch.empty(0, 2, dtype=torch.uint8)
    for nothing in (x[:0], x[:, :0], x[:, :, :0], x[..., :0], torch.zeros(()), torch.zeros(0)):
        for name, args in (
            ("bn_stats", (nothing, 1)),
            ("norm_act", (nothing, *none, 1e-5, None, *none, 1e-5, False, 1, True, False)),
            ("norm_act_backward", (nothing, None, nothing, None, empty_mask, coef, None, 1, True, False, False)),
            ("bn_act_bwd_apply", (nothing, nothing, None, empty_mask, coef, None, sums, True, False)),
            ("lateral_fuse", (x, nothing, *none, 1e-5, None, None, 1)),
            ("norm_pool", (nothing, *none, 1e-5, 1, True)),
            ("bn_relu_maxpool_bwd_apply", (nothing, nothing, empty_mask, coef, sums)),
        ):
            with pytest.raises(RuntimeError, match=r"avsf: .*non-empty"):
                getattr(avsf, name)(*args)


@pytest.mark.parametrize(
    "calls", [pytest.param(2000, marks=pytest.mark.integration), pytest.param(100_000, marks=pytest.mark.slow)]
)
def test_no_wrong_call_crashes(calls: int) -> None:
    """Random wrong arguments in a child: refused, or computed without a read outside what was given."""
    command = [sys.executable, "-m", "tests.kernels.support.fuzz_ops", "0", str(calls)]
    child = subprocess.run(command, capture_output=True, text=True, check=False, timeout=1200)
    assert child.returncode == 0, f"exit status {child.returncode} after {child.stderr[-2000:]}"
    counts = json.loads(child.stdout)
    assert sum(sum(count.values()) for count in counts.values()) == calls
    for name, count in counts.items():  # every operation was reached, refuses by itself, and takes what fits
        assert count["refused by the operation"] > calls / 200, name
        assert count["accepted"] > 0, name
