"""GhostBatchNorm and LateralFusion: both backends, groups, running statistics, checkpointing."""

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from kernels import backend
from kernels.layout import KernelInputError
from kernels.library import fused_devices
from kernels.modules import (
    GhostBatchNorm,
    LateralFusion,
    set_backend,
)
from kernels.precise_bn import precise_bn
from tests.kernels.support.cases import DTYPES, assert_close, channels_last, draw, norm_error, relative
from tests.kernels.support.norms import BACKENDS, DEVICES, fused, norm

pytestmark = pytest.mark.usefixtures("auto_backend")


def slack(name: str, device: str) -> float:
    return 5.0 if (name, device) == ("reference", "cuda") else 1.0  # cuDNN's float32, which may have naive sums


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


def plain_norm(x: Tensor, module: GhostBatchNorm) -> Tensor:
    """What the module must give for x (N, C, T, H, W), in float64, with its own groups, statistics and eps."""
    groups = max(1, x.shape[0] // module.clips_per_group) if module.uses_batch_statistics else 1
    wide, parts = x.double(), []
    for part in wide.chunk(groups):
        given = (module.running_mean.double(), module.running_var.double())
        own = (part.mean((0, 2, 3, 4)), part.var((0, 2, 3, 4), correction=0))
        mean, variance = own if module.uses_batch_statistics else given
        scale = module.weight.double() / (variance + module.eps).sqrt()
        parts.append((part - mean[:, None, None, None]) * scale[:, None, None, None])
    return torch.cat(parts) + module.bias.double()[:, None, None, None]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("forms", ["equal", "groups differ", "first frozen", "projection frozen"])
@pytest.mark.parametrize("name", BACKENDS)
def test_projection_has_its_own_statistics_eps_and_groups(name: str, forms: str, device: str) -> None:
    set_backend(name)
    first = GhostBatchNorm(12, eps=1e-5, momentum=1.0)
    second = GhostBatchNorm(12, eps=0.7, momentum=1.0, clips_per_group=4 if forms == "groups differ" else 8)
    for module, seed in ((first, 1), (second, 2)):
        generator = torch.Generator().manual_seed(seed)
        for value in (module.weight, module.bias, module.running_mean):
            value.data.normal_(generator=generator)
        module.running_var.uniform_(0.5, 2, generator=generator)
        module.to(device)
    first.frozen, second.frozen = forms == "first frozen", forms == "projection frozen"
    ramp = torch.arange(16.0, device=device)[:, None, None, None, None] / 4
    x = channels_last(draw((16, 12, 2, 3, 4), torch.float32, 3, device) * 3 - 2 + ramp)
    other = channels_last(draw((16, 12, 2, 3, 4), torch.float32, 4, device) + 5 - ramp)
    expected = (plain_norm(x, first) + plain_norm(other, second)).relu().detach()
    before = {module: (module.running_mean.clone(), module.running_var.clone()) for module in (first, second)}
    assert relative(first(x, residual=other, residual_norm=second, relu=True), expected) < 3e-6 * slack(name, device)
    for module, values in ((first, x), (second, other)):
        mean, variance = before[module]
        if not module.frozen:
            mean, variance = values.double().mean((0, 2, 3, 4)), values.double().var((0, 2, 3, 4))
        assert relative(module.running_mean, mean) < 2e-6 * slack(name, device)
        assert relative(module.running_var, variance) < 1e-5 * slack(name, device)
        assert module.num_batches_tracked.item() == (0 if module.frozen else 1)


@pytest.mark.parametrize("device", DEVICES)
@fused
def test_first_derivative_with_create_graph(device: str) -> None:
    """What asks for a graph and never differentiates it, e.g. a penalty of another part, gets the gradients."""
    set_backend("fused")
    x, module = draw((8, 16, 2, 3, 3), torch.float32, device=device).requires_grad_(), norm(16, device=device)
    plain = torch.autograd.grad(module(x, relu=True).pow(2).sum(), [x, module.weight])
    graph = torch.autograd.grad(module(x, relu=True).pow(2).sum(), [x, module.weight], create_graph=True)
    assert all(torch.equal(a, b) and b.requires_grad for a, b in zip(plain, graph, strict=True))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", BACKENDS)
def test_running_statistics_as_batchnorm3d(name: str, device: str) -> None:
    set_backend(name)
    ours, theirs = GhostBatchNorm(12, clips_per_group=8).to(device), nn.BatchNorm3d(12).to(device)
    assert list(ours.state_dict()) == list(theirs.state_dict())
    for seed in range(3):
        x = draw((8, 12, 2, 3, 3), torch.float32, seed, device) * 2 + 3
        assert relative(ours(x), theirs(x).detach()) < 3e-6 * slack("reference", device)
    for key, value in theirs.state_dict().items():
        assert relative(ours.state_dict()[key], value) < 1e-6 * slack("reference", device)
    theirs.load_state_dict(ours.state_dict())
    x = draw((3, 12, 2, 3, 3), torch.float32, 9, device)
    assert relative(ours.eval()(x), theirs.eval()(x).detach()) < 2e-6


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", BACKENDS)
def test_groups_use_total_variance_and_precise_bn_is_exact(name: str, device: str) -> None:
    set_backend(name)
    module = GhostBatchNorm(6, momentum=1.0).to(device)
    x = draw((24, 6, 2, 3, 3), torch.float32, 1, device) + torch.arange(24.0, device=device)[:, None, None, None, None]
    module(channels_last(x))
    assert relative(module.running_mean, x.mean((0, 2, 3, 4))) < 1e-6 * slack(name, device)
    assert relative(module.running_var, x.var((0, 2, 3, 4))) < 1e-5 * slack(name, device)
    module.running_mean.zero_()
    module.eval()
    batches = [(channels_last(part), None) for part in x.split([8, 16])]
    assert precise_bn(module, batches, lambda frames, _: module(frames)) == 2
    assert not module.training
    assert relative(module.running_var, x.double().var((0, 2, 3, 4))) < 1e-6 * slack(name, device)
    assert module.num_batches_tracked.item() == 1


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", BACKENDS)
def test_frozen_uses_running_statistics_and_keeps_them(name: str, device: str) -> None:
    set_backend(name)
    module = norm(16, 1, device)
    module(draw((8, 16, 2, 4, 4), torch.float32, 1, device))
    module.frozen = True
    before = {key: value.clone() for key, value in module.state_dict().items()}
    x = draw((11, 16, 2, 4, 4), torch.float32, 2, device).requires_grad_()
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


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("name", BACKENDS)
def test_recomputed_forward_updates_once(name: str, reentrant: bool, device: str) -> None:
    set_backend(name)
    module = GhostBatchNorm(8).to(device)
    x = draw((8, 8, 2, 3, 3), torch.float32, device=device).requires_grad_()
    checkpoint(module, x, use_reentrant=reentrant).sum().backward()
    assert module.num_batches_tracked.item() == 1


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", BACKENDS)
def test_lateral_fusion_and_its_gradients(name: str, dtype: torch.dtype, device: str) -> None:
    set_backend(name)
    slow, lateral = draw((16, 24, 2, 5, 4), dtype, 1, device), draw((16, 8, 2, 5, 4), dtype, 2, device)
    dy = draw((16, 32, 2, 5, 4), dtype, 3, device)
    audio = torch.randn(16, 32, 2, generator=torch.Generator().manual_seed(4)).to(device, dtype)
    keep = torch.arange(16, device=device) % 3 != 1
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
    dropped = fusion(
        slow, lateral, audio=torch.full_like(audio, torch.nan), keep=torch.zeros(16, dtype=torch.bool, device=device)
    )
    assert torch.equal(dropped, fusion(slow, lateral))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", BACKENDS)
def test_autocast_gives_the_inputs_dtype(name: str, device: str) -> None:
    set_backend(name)
    x = draw((8, 16, 2, 4, 4), torch.bfloat16, device=device).requires_grad_()
    module = norm(16, device=device)
    with torch.autocast(device, torch.bfloat16):
        y = module(x, relu=True)
    assert y.dtype == torch.bfloat16
    y.sum().backward()
    assert module.weight.grad.dtype == torch.float32


@pytest.mark.parametrize("device", DEVICES)
@fused
def test_expanded_gradient_and_large_mean(device: str) -> None:
    set_backend("fused")
    x = (draw((8, 16, 4, 9, 9), torch.float32, device=device) + 100).requires_grad_()
    module = norm(16, device=device)
    y = module(x)
    exact = exact_norm(x.detach().double(), module, 1)
    assert relative(y, exact.detach()) < (2e-6 if device == "cpu" else 4e-6)
    y.mean().backward()
    assert torch.isfinite(x.grad).all()
    stats = torch.ops.avsf.bn_stats(x.detach(), 1)
    variance = stats[0, 2] / stats[0, 0]
    assert relative(variance, x.detach().double().var((0, 2, 3, 4), correction=0)) <= 5e-6


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", BACKENDS)
def test_forward_hooks_see_the_caller_s_calls_only(name: str, device: str) -> None:
    set_backend(name)
    first, second, fusion = norm(8, device=device), norm(8, device=device), LateralFusion(norm(8, device=device))
    seen: list[tuple[str, int]] = []
    for key, module in (("first", first), ("second", second), ("inner", fusion.norm), ("fusion", fusion)):
        module.register_forward_hook(lambda _module, _args, y, key=key: seen.append((key, y.shape[-1])))
    x = draw((16, 8, 2, 6, 6), torch.float32, device=device)
    first(x, residual=x, residual_norm=second)
    first(x, relu=True, pool=True)
    second.clips_per_group = 4
    first(x, residual=x, residual_norm=second)
    fusion(x, x)
    assert seen == [("first", 6), ("first", 3), ("first", 6), ("fusion", 6)]


def test_set_backend() -> None:
    with pytest.raises(KernelInputError, match="backend 'triton'"):
        set_backend("triton")
    assert set_backend("reference") == "reference"
    assert set_backend("auto") == ("fused" if fused_devices() else "reference")
    if not fused_devices():
        with pytest.raises(KernelInputError, match="build"):
            set_backend("fused")


@pytest.mark.parametrize("device", DEVICES)
def test_reference_close_to_definition_in_bfloat16(device: str) -> None:
    set_backend("reference")
    x = draw((8, 16, 2, 4, 4), torch.bfloat16, device=device)
    module = norm(16, device=device)
    assert_close(module(x).float(), exact_norm(x.double(), module, 1).detach(), "y", 1e-2)
