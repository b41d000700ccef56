"""What GhostBatchNorm and LateralFusion refuse: wrong inputs, precisions, second derivatives."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from kernels.layout import KernelInputError
from kernels.library import fused_devices
from kernels.modules import (
    LateralFusion,
    set_backend,
)
from tests.kernels.support.cases import channels_last, draw
from tests.kernels.support.norms import BACKENDS, DEVICES, norm

pytestmark = pytest.mark.usefixtures("auto_backend")


def second_derivative(form: str, of: str) -> Tensor:
    """Gradient of the squared gradient of a norm in one of its forms; "plain" has a constant incoming gradient."""
    x, other = (draw((4, 6, 2, 4, 4), torch.float32, seed).requires_grad_() for seed in (1, 2))
    module = norm(6)
    if form == "lateral":
        y = LateralFusion(module)(x, other)
    elif form == "pool":
        y = module(x, relu=True, pool=True)
    else:
        y = module(x, residual=other if form == "residual" else None, relu=form != "plain")
    leaf = other if form == "lateral" else x
    loss = (y * torch.linspace(-1, 1, y.numel()).reshape(y.shape)).sum() if form == "plain" else y.pow(3).sum()
    gradient = torch.autograd.grad(loss, leaf, create_graph=True)[0]
    penalized = loss + gradient.square().sum()  # reaches the leaf in two ways
    return torch.autograd.grad(penalized, leaf if of == "input" else module.weight)[0]


@pytest.mark.parametrize("of", ["input", "weight"])
@pytest.mark.parametrize("form", ["plain", "relu", "residual", "lateral", "pool"])
def test_second_derivative_is_refused(form: str, of: str) -> None:
    set_backend("reference")
    assert second_derivative(form, of).abs().max().item() > 1e-3
    if fused_devices():
        set_backend("fused")
        with pytest.raises(KernelInputError, match="differentiable once only; choose backend 'reference'"):
            second_derivative(form, of)


@pytest.mark.parametrize("name", BACKENDS)
def test_second_derivative_of_a_synchronized_norm_is_refused(name: str, tmp_path: Path) -> None:
    set_backend(name)
    torch.distributed.init_process_group("gloo", rank=0, world_size=1, init_method=f"file://{tmp_path}/meet")
    try:
        module, x = norm(6), draw((4, 6, 2, 4, 4), torch.float32).requires_grad_()
        module.process_group = torch.distributed.group.WORLD
        gradient = torch.autograd.grad(module(x, relu=True).pow(3).sum(), x, create_graph=True)[0]
        with pytest.raises(KernelInputError, match="SyncBN"):
            gradient.square().sum().backward()
    finally:
        torch.distributed.destroy_process_group()


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


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("case", _wrong_inputs(), ids=lambda case: case[0])
def test_wrong_input_is_named(case: tuple[str, Tensor, dict[str, Tensor], str], name: str, device: str) -> None:
    set_backend(name)
    what, x, more, message = case
    if what != "device":
        x, more = x.to(device), {key: value.to(device) for key, value in more.items()}
    with pytest.raises(KernelInputError, match=message):
        norm(16, device=device)(x, **more)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", BACKENDS)
def test_wrong_lateral_is_named(name: str, device: str) -> None:
    set_backend(name)
    slow, lateral = (draw((8, c, 2, 3, 3), torch.float32, device=device) for c in (16, 8))
    fusion = LateralFusion(norm(8, device=device))
    with pytest.raises(KernelInputError, match="audio"):
        fusion(slow, lateral, audio=torch.ones(8, 16, 2, device=device))
    with pytest.raises(KernelInputError, match="keep"):
        fusion(slow, lateral, keep=torch.ones(4, device=device))
    with pytest.raises(KernelInputError, match="agree"):
        fusion(slow[:, :, :1], lateral)
    with pytest.raises(KernelInputError, match="equal"):
        fusion(slow.bfloat16(), lateral)


@pytest.mark.parametrize("name", BACKENDS)
def test_wrong_precision_and_flat_lateral_are_named(name: str) -> None:
    set_backend(name)
    x = draw((8, 16, 2, 3, 3), torch.float32)
    for module, given in (
        (norm(16).bfloat16(), x.bfloat16()),
        (norm(16).half(), x.half()),
        (norm(16).half(), x),
        (norm(16), x.double()),
        (norm(16).double(), x),
    ):
        with pytest.raises(KernelInputError, match=r"parameters are .* but must be torch\.float(32|64)"):
            module(given, relu=True)
        with pytest.raises(KernelInputError, match="parameters are"):
            module(given, relu=True, pool=True)
    with pytest.raises(KernelInputError, match=r"torch.float64 but must be torch.float32 for residual"):
        norm(16)(x, residual=x, residual_norm=norm(16).double())
    with pytest.raises(KernelInputError, match="float8"):
        norm(16)(x.to(torch.float8_e4m3fn))
    flat = draw((8, 16, 3, 3), torch.float32)
    for sound in (None, torch.ones(8, 32, 3)):
        with pytest.raises(KernelInputError, match=r"\(N, Cs, T, H, W\)"):
            LateralFusion(norm(16))(flat, flat, audio=sound)
