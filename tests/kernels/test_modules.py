"""GhostBatchNorm and LateralFusion: both backends, groups, running statistics, checkpointing, errors."""

import contextlib
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from kernels import backend, modules
from kernels.layout import KernelInputError
from kernels.library import fused_devices
from kernels.modules import (
    GhostBatchNorm,
    LateralFusion,
    joint_statistics_update,
    no_statistics_update,
    precise_bn,
    set_backend,
)
from tests.kernels.cases import DTYPES, assert_close, channels_last, draw, norm_error, relative

fused = pytest.mark.skipif(not fused_devices(), reason="the library of fused operations is not built")
BACKENDS = ["reference", pytest.param("fused", marks=fused)]
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.needs_cuda)]


@pytest.fixture(autouse=True)
def _auto_backend() -> Iterator[None]:
    yield
    set_backend("auto")
    torch.set_num_threads(1)


def norm(channels: int, seed: int = 0, device: str = "cpu") -> GhostBatchNorm:
    module = GhostBatchNorm(channels)
    generator = torch.Generator().manual_seed(seed)
    nn.init.normal_(module.weight, generator=generator)
    nn.init.normal_(module.bias, generator=generator)
    return module.to(device)


def exact_norm(x: Tensor, module: GhostBatchNorm, groups: int) -> Tensor:
    parts = [
        nn.functional.batch_norm(part, None, None, module.weight.double(), module.bias.double(), True, 0.1, module.eps)
        for part in x.chunk(groups)
    ]
    return torch.cat(parts)


def block_end(form: str, x: Tensor, other: Tensor, first: GhostBatchNorm, second: GhostBatchNorm) -> Tensor:
    if form == "relu":
        return first(x, relu=True)
    if form == "residual":
        return first(x, residual=other, relu=True)
    return first(x, residual=other, residual_norm=second, relu=True)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("form", ["relu", "residual", "projected"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", BACKENDS)
def test_block_end_and_its_gradients(name: str, dtype: torch.dtype, form: str, device: str) -> None:
    set_backend(name)
    x, other, dy = (draw((16, 24, 2, 5, 4), dtype, seed, device) for seed in (1, 2, 3))
    first, second = norm(24, 4, device), norm(24, 5, device)
    leaves = [x.clone().requires_grad_(), other.clone().requires_grad_()]
    y = block_end(form, leaves[0], leaves[1], first, second)
    y.backward(dy)
    wide = [t.double().requires_grad_() for t in (x, other)]
    z = exact_norm(wide[0], first, 2)
    if form != "relu":
        z = z + (wide[1] if form == "residual" else exact_norm(wide[1], second, 2))
    expected = z.relu()
    got = {p: getattr(first, p).grad for p in ("weight", "bias")}
    first.zero_grad()
    expected.backward(dy.double())
    assert y.stride() == x.stride()
    tolerance = {torch.float32: 3e-6, torch.bfloat16: 2e-2, torch.float16: 3e-3}[dtype]
    assert relative(y, expected.detach()) < tolerance
    if name == "reference" and dtype != torch.float32:
        tolerance = 0.05  # it rounds between its steps, so that a few rectifiers near zero decide otherwise
    assert norm_error(leaves[0].grad, wide[0].grad) < tolerance
    if form != "relu":
        assert norm_error(leaves[1].grad, wide[1].grad) < tolerance
    for parameter, value in got.items():
        assert norm_error(value, getattr(first, parameter).grad) < tolerance


@pytest.mark.parametrize("name", BACKENDS)
def test_running_statistics_as_batchnorm3d(name: str) -> None:
    set_backend(name)
    ours, theirs = GhostBatchNorm(12, clips_per_group=8), nn.BatchNorm3d(12)
    assert list(ours.state_dict()) == list(theirs.state_dict())
    for seed in range(3):
        x = draw((8, 12, 2, 3, 3), torch.float32, seed) * 2 + 3
        assert relative(ours(x), theirs(x).detach()) < 3e-6
    for key, value in theirs.state_dict().items():
        assert relative(ours.state_dict()[key], value) < 1e-6
    theirs.load_state_dict(ours.state_dict())
    x = draw((3, 12, 2, 3, 3), torch.float32, 9)
    assert relative(ours.eval()(x), theirs.eval()(x).detach()) < 2e-6


@pytest.mark.parametrize("name", BACKENDS)
def test_groups_use_total_variance_and_precise_bn_is_exact(name: str) -> None:
    set_backend(name)
    module = GhostBatchNorm(6, momentum=1.0)
    x = draw((24, 6, 2, 3, 3), torch.float32, 1) + torch.arange(24.0)[:, None, None, None, None]
    module(channels_last(x))
    assert relative(module.running_mean, x.mean((0, 2, 3, 4))) < 1e-6
    assert relative(module.running_var, x.var((0, 2, 3, 4))) < 1e-5
    module.running_mean.zero_()
    module.eval()
    batches = [(channels_last(part), None) for part in x.split([8, 16])]
    assert precise_bn(module, batches, lambda frames, _: module(frames)) == 2
    assert not module.training
    assert relative(module.running_var, x.double().var((0, 2, 3, 4))) < 1e-6
    assert module.num_batches_tracked.item() == 1


@pytest.mark.parametrize("name", BACKENDS)
def test_frozen_uses_running_statistics_and_keeps_them(name: str) -> None:
    set_backend(name)
    module = norm(16, 1)
    module(draw((8, 16, 2, 4, 4), torch.float32, 1))
    module.frozen = True
    before = {key: value.clone() for key, value in module.state_dict().items()}
    x = draw((11, 16, 2, 4, 4), torch.float32, 2).requires_grad_()
    y = module(x)
    y.square().sum().backward()
    got = x.grad.clone(), module.weight.grad.clone()
    x.grad = None
    module.zero_grad()
    scale = module.weight * (module.running_var + module.eps).rsqrt()
    shaped = [v[:, None, None, None] for v in (module.running_mean, scale, module.bias)]
    expected = (x - shaped[0]) * shaped[1] + shaped[2]
    expected.square().sum().backward()
    assert relative(y, expected.detach()) < 2e-6
    assert relative(got[0], x.grad) < 4e-6
    assert relative(got[1], module.weight.grad) < 1e-5
    assert all(torch.equal(before[key], value) for key, value in module.state_dict().items())


@fused
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_groups_threads_and_repeats_are_bitwise_equal(dtype: torch.dtype, device: str) -> None:
    set_backend("fused")
    x, residual, dy = (draw((24, 40, 3, 9, 7), dtype, seed, device) for seed in (1, 2, 3))

    def run(part: slice, blocked: bool, threads: int) -> list[Tensor]:
        torch.set_num_threads(threads)
        backend.set_blocked_groups(blocked)
        module = norm(40, 4, device)
        leaves = [t[part].detach().requires_grad_() for t in (x, residual)]
        y = module(leaves[0], residual=leaves[1], relu=True)
        y.backward(dy[part])
        return [y.detach(), leaves[0].grad, leaves[1].grad]

    whole = run(slice(None), False, 1)
    for blocked, threads in ((False, 2), (True, 1), (True, 2), (False, 1)):
        for a, b in zip(whole, run(slice(None), blocked, threads), strict=True):
            assert torch.equal(a, b)
    for start in (0, 8, 16):
        part = slice(start, start + 8)
        for a, b in zip(whole, run(part, False, 1), strict=True):
            assert torch.equal(a[part], b)


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("name", BACKENDS)
def test_recomputed_forward_updates_once(name: str, reentrant: bool) -> None:
    set_backend(name)
    module = GhostBatchNorm(8)
    x = draw((8, 8, 2, 3, 3), torch.float32).requires_grad_()
    checkpoint(module, x, use_reentrant=reentrant).sum().backward()
    assert module.num_batches_tracked.item() == 1
    with no_statistics_update():
        module(x)
    assert module.num_batches_tracked.item() == 1


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", BACKENDS)
def test_lateral_fusion_and_its_gradients(name: str, dtype: torch.dtype, device: str) -> None:
    set_backend(name)
    slow, lateral = draw((16, 24, 2, 5, 4), dtype, 1, device), draw((16, 8, 2, 5, 4), dtype, 2, device)
    dy = draw((16, 32, 2, 5, 4), dtype, 3, device)
    audio = torch.randn(16, 32, 2, generator=torch.Generator().manual_seed(4)).to(device, dtype)
    keep = (torch.arange(16, device=device) % 3 != 1).float()
    fusion = LateralFusion(norm(8, 5, device))
    leaves = [t.clone().requires_grad_() for t in (slow, lateral, audio)]
    out = fusion(leaves[0], leaves[1], audio=leaves[2], keep=keep)
    out.backward(dy)
    wide = [t.double().requires_grad_() for t in (slow, lateral, audio)]
    sound = wide[2] * keep[:, None, None]
    expected = torch.cat([wide[0], exact_norm(wide[1], fusion.norm, 2).relu()], 1) + sound[..., None, None]
    expected.backward(dy.double())
    assert out.is_contiguous(memory_format=torch.channels_last_3d)
    tolerance = {torch.float32: 3e-6, torch.bfloat16: 2e-2, torch.float16: 3e-3}[dtype]
    assert relative(out, expected.detach()) < tolerance
    for got, exact in zip(leaves, wide, strict=True):
        assert relative(got.grad, exact.grad) < tolerance
    dropped = fusion(slow, lateral, audio=torch.full_like(audio, torch.nan), keep=torch.zeros(16, device=device))
    assert torch.equal(dropped, fusion(slow, lateral))


@pytest.mark.parametrize("name", BACKENDS)
def test_autocast_gives_the_inputs_dtype(name: str) -> None:
    set_backend(name)
    x = draw((8, 16, 2, 4, 4), torch.bfloat16).requires_grad_()
    module = norm(16)
    with torch.autocast("cpu", torch.bfloat16):
        y = module(x, relu=True)
    assert y.dtype == torch.bfloat16
    y.sum().backward()
    assert module.weight.grad.dtype == torch.float32


@fused
def test_expanded_gradient_and_large_mean() -> None:
    set_backend("fused")
    x = (draw((8, 16, 4, 9, 9), torch.float32) + 100).requires_grad_()
    module = norm(16)
    y = module(x)
    exact = exact_norm(x.detach().double(), module, 1)
    assert relative(y, exact.detach()) < 2e-6
    y.mean().backward()
    assert torch.isfinite(x.grad).all()
    stats = torch.ops.avsf.bn_stats(x.detach(), 1)
    variance = stats[0, 2] / stats[0, 0]
    assert relative(variance, x.detach().double().var((0, 2, 3, 4), correction=0)) <= 5e-6


def _wrong_inputs() -> list[tuple[str, Tensor, dict[str, Tensor], str]]:
    good = draw((8, 16, 2, 3, 3), torch.float32)
    return [
        ("layout", torch.randn(8, 16, 2, 3, 3), {}, "channels_last_3d"),
        ("shape", torch.randn(8, 16), {}, "must be"),
        ("channels", draw((8, 12, 2, 3, 3), torch.float32), {}, "12 channels"),
        ("dtype", channels_last(torch.ones(8, 16, 2, 3, 3)).int(), {}, "int32"),
        ("groups", draw((12, 16, 2, 3, 3), torch.float32), {}, "multiple"),
        ("device", good.to("meta"), {}, "meta"),
        ("residual", good, {"residual": draw((8, 16, 2, 3, 4), torch.float32)}, "must equal"),
        ("residual dtype", good, {"residual": good.bfloat16()}, "must equal"),
    ]


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("case", _wrong_inputs(), ids=lambda case: case[0])
def test_wrong_input_is_named(case: tuple[str, Tensor, dict[str, Tensor], str], name: str) -> None:
    set_backend(name)
    _, x, more, message = case
    with pytest.raises(KernelInputError, match=message):
        norm(16)(x, **more)


@pytest.mark.parametrize("name", BACKENDS)
def test_wrong_lateral_is_named(name: str) -> None:
    set_backend(name)
    slow, lateral = draw((8, 16, 2, 3, 3), torch.float32), draw((8, 8, 2, 3, 3), torch.float32)
    fusion = LateralFusion(norm(8))
    with pytest.raises(KernelInputError, match="audio"):
        fusion(slow, lateral, audio=torch.ones(8, 16, 2))
    with pytest.raises(KernelInputError, match="keep"):
        fusion(slow, lateral, keep=torch.ones(4))
    with pytest.raises(KernelInputError, match="agree"):
        fusion(slow[:, :, :1], lateral)
    with pytest.raises(KernelInputError, match="equal"):
        fusion(slow.bfloat16(), lateral)


def test_set_backend() -> None:
    with pytest.raises(KernelInputError, match="backend 'triton'"):
        set_backend("triton")
    assert set_backend("reference") == "reference"
    assert set_backend("auto") == ("fused" if fused_devices() else "reference")
    if not fused_devices():
        with pytest.raises(KernelInputError, match="build"):
            set_backend("fused")


def test_reference_close_to_definition_in_bfloat16() -> None:
    set_backend("reference")
    x = draw((8, 16, 2, 4, 4), torch.bfloat16)
    module = norm(16)
    assert_close(module(x).float(), exact_norm(x.double(), module, 1).detach(), "y", 1e-2)


class Twice(nn.Module):
    """Two norms, one of which runs twice with different inputs, one under activation checkpointing."""

    def __init__(self, joint: bool) -> None:
        super().__init__()
        self.joint, self.first, self.second = joint, GhostBatchNorm(6), GhostBatchNorm(6, momentum=0.3)

    def forward(self, x: Tensor) -> Tensor:
        with joint_statistics_update() if self.joint else contextlib.nullcontext():
            y = checkpoint(self.first, x, use_reentrant=False)
            with joint_statistics_update():  # a model inside a model leaves it to the outer one
                return self.second(self.first(y * 2 + 1))


@pytest.mark.parametrize("name", BACKENDS)
def test_joint_update_equals_one_by_one(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    set_backend(name)
    calls: list[int] = []
    fold = modules._fold
    monkeypatch.setattr(modules, "_fold", lambda norms, stats: (calls.append(len(norms)), fold(norms, stats)))
    states = []
    for joint in (False, True):
        model = Twice(joint)
        for seed in range(2):
            model(draw((8, 6, 2, 3, 3), torch.float32, seed).requires_grad_()).sum().backward()
        states.append(model.state_dict())
    assert calls == [1, 1, 1] * 2 + [1, 1, 1] * 2  # joint: first runs by momentum (0.1, 0.3), then the second run
    assert states[0]["first.num_batches_tracked"].item() == 4
    assert all(torch.equal(a, states[1][key]) for key, a in states[0].items())


def test_joint_update_is_one_call_and_an_error_drops_it(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []
    fold = modules._fold
    monkeypatch.setattr(modules, "_fold", lambda norms, stats: (calls.append(len(norms)), fold(norms, stats)))
    layers, x = nn.Sequential(*(GhostBatchNorm(4) for _ in range(5))), draw((8, 4, 2, 3, 3), torch.float32)
    with joint_statistics_update():
        layers(x)
        assert not calls
    assert calls == [5]
    wrong = nn.Sequential(layers, GhostBatchNorm(2))  # fails after five norms

    def run() -> None:
        with joint_statistics_update():
            wrong(x)

    with pytest.raises(KernelInputError):
        run()
    assert calls == [5]
    assert {layer.num_batches_tracked.item() for layer in layers} == {1}
    layers(x)
    assert calls == [5, 1, 1, 1, 1, 1]
