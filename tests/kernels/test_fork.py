"""An output with two readers: the same memory twice, and gradients that meet in the backward of the norm."""

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from kernels.layout import KernelInputError
from kernels.library import fused_devices
from kernels.modules import GhostBatchNorm
from tests.kernels.support.cases import DTYPES, draw

fused = pytest.mark.skipif(not fused_devices(), reason="the library of fused operations is not built")
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.needs_cuda)]
FORMS = ["plain", "relu", "residual", "residual_relu", "projected"]
SHAPES = [(16, 24, 2, 5, 4), (8, 5, 2, 3, 3), (2, 8, 3, 33, 32)]


def norm(channels: int, seed: int, device: str, backend: str = "fused") -> GhostBatchNorm:
    module = GhostBatchNorm(channels)
    generator = torch.Generator().manual_seed(seed)
    nn.init.normal_(module.weight, generator=generator)
    nn.init.normal_(module.bias, generator=generator)
    module.backend = backend
    return module.to(device)


def run(form: str, inputs: list[Tensor], grads: list[Tensor | None]) -> list[Tensor]:
    """Outputs and all gradients of a block end; two gradients: of a fork."""
    x, other = (t.clone().requires_grad_() for t in inputs)
    first, second = norm(x.shape[1], 4, x.device.type), norm(x.shape[1], 5, x.device.type)
    residual = other if form in ("residual", "residual_relu", "projected") else None
    projection = second if form == "projected" else None
    relu = form not in ("plain", "residual")
    fork = len(grads) == 2
    out = first(x, residual=residual, residual_norm=projection, relu=relu, fork=fork)
    outs = out if fork else (out,)
    if fork:
        assert outs[0].data_ptr() == outs[1].data_ptr()
    used = [(y, grad) for y, grad in zip(outs, grads, strict=True) if grad is not None]
    torch.autograd.backward([y for y, _ in used], [grad for _, grad in used])
    leaves = [x, other, *first.parameters(), *second.parameters()]
    found = [leaf.grad for leaf in leaves if leaf.grad is not None]
    assert len(found) == {"plain": 3, "relu": 3, "residual": 4, "residual_relu": 4, "projected": 6}[form]
    return [outs[0].detach(), first.running_mean, first.num_batches_tracked, *found]


@fused
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_fork_equals_one_reader_with_the_rounded_sum(dtype: torch.dtype, form: str, device: str) -> None:
    for shape in SHAPES:
        x, other, a, b = (draw(shape, dtype, seed, device) for seed in (1, 2, 3, 6))
        total = (a.float() + b.float()).to(dtype)
        forked, single = run(form, [x, other], [a, b]), run(form, [x, other], [total])
        assert all(torch.equal(one, two) for one, two in zip(forked, single, strict=True))
        for unused in (0, 1):  # one reader only sends a gradient
            alone = run(form, [x, other], [None, a] if unused == 0 else [a, None])
            assert all(torch.equal(p, q) for p, q in zip(alone, run(form, [x, other], [a]), strict=True))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("backend", ["reference", pytest.param("fused", marks=fused)])
def test_a_fork_s_gradient_is_that_of_both_readers(backend: str, device: str) -> None:
    x = draw((8, 16, 2, 4, 4), torch.float32, 1, device)
    results = []
    for fork in (True, False):
        module, leaf = norm(16, 1, device, backend), x.clone().requires_grad_()
        first, second = module(leaf, relu=True, fork=True) if fork else [module(leaf, relu=True)] * 2
        (first.square().sum() + (3 * second).sum()).backward()
        results.append([leaf.grad, module.weight.grad, module.bias.grad])
    for got, expected in zip(*results, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)


@fused
@pytest.mark.parametrize("device", DEVICES)
def test_a_fork_pools_checkpoints_and_is_differentiable_once(device: str) -> None:
    x = draw((8, 16, 2, 4, 4), torch.float32, 1, device).requires_grad_()
    module = norm(16, 1, device)
    first, second = module(x, relu=True, pool=True, fork=True)
    assert first is second
    first, second = checkpoint(module, x, use_reentrant=False, relu=True, fork=True)
    (first + 2 * second).sum().backward()
    kept = x.grad.clone()
    x.grad = None
    first, second = module(x, relu=True, fork=True)
    (first + 2 * second).sum().backward()
    assert torch.equal(kept, x.grad)
    first, second = module(x, relu=True, fork=True)
    (grad,) = torch.autograd.grad((first * second).sum(), x, create_graph=True)
    with pytest.raises(KernelInputError, match="differentiable once"):
        grad.sum().backward()


@fused
def test_projection_s_bias_gradients_do_not_share_memory() -> None:
    x = draw((8, 16, 2, 4, 4), torch.float32, 1)
    first, second = norm(16, 1, "cpu"), norm(16, 2, "cpu")
    first(x, residual=x, residual_norm=second, relu=True).sum().backward()
    assert torch.equal(first.bias.grad, second.bias.grad)
    first.bias.grad.zero_()
    assert second.bias.grad.abs().sum() > 0


@fused
def test_a_fork_under_compile_falls_back_to_one_reader() -> None:
    module, x = norm(8, 1, "cpu"), draw((8, 8, 2, 3, 3), torch.float32, 1).requires_grad_()

    @torch.compile(backend="aot_eager", fullgraph=True)
    def step(x: Tensor) -> Tensor:
        first, second = module(x, relu=True, fork=True)
        return (first + 2 * second).sum()

    step(x).backward()
    compiled, x.grad = x.grad, None
    first, second = module(x, relu=True, fork=True)
    (first + 2 * second).sum().backward()
    torch.testing.assert_close(compiled, x.grad)
    torch._dynamo.reset()
