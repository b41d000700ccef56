"""Weights of convolutions of grouped pixels: gathered as defined, few operations, gradients summed in float32."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from model.pixel_groups import (
    TapIndices,
    expand_by_padding,
    expand_weight,
    fit_groups,
)
from tests.model.support.operations import Operations
from tests.model.support.pixel_groups import SHAPES, groups_of

pytestmark = pytest.mark.integration  # whole models or pipelines run


def test_the_picture_of_the_docstring() -> None:
    groups = fit_groups((4, 4), 16, 3, 1, 1)
    assert groups is not None
    weight = torch.tensor([1.0, 2.0, 3.0]).view(1, 1, 1, 3)
    wide = expand_by_padding(weight, groups, 1)[:, :, 0].movedim(1, -1)  # (q, t, b)
    rows = ["".join(" .123"[int(value) + 1] for value in row) for row in wide.flatten(1)]
    assert rows == ["...123......", "....123.....", ".....123....", "......123..."]


@pytest.mark.parametrize("name", SHAPES)
def test_the_gather_is_the_definition_bit_for_bit(name: str) -> None:
    weight, groups, channels = groups_of(name)
    indices = TapIndices(weight.shape, groups, channels, weight.device)
    for given in (weight, weight.contiguous(), weight.bfloat16()):
        expected = expand_by_padding(given, groups, channels)
        found = expand_weight(given, indices)
        assert torch.equal(found, expected)
        assert found.dtype == given.dtype
        assert found.movedim(1, -1).is_contiguous()
        assert found.count_nonzero() == groups.outputs * given.count_nonzero()


@pytest.mark.parametrize("name", ["fast stem", "slow stem", "fast res3 strided 3x3", "asymmetric"])
def test_gradient_of_the_weight_build(name: str) -> None:
    weight, groups, channels = groups_of(name)
    weight = weight[:2].contiguous(memory_format=torch.channels_last_3d if weight.dim() == 5 else torch.channels_last)
    if weight.dim() == 5:
        weight = weight[:, :, :1, :1]
    indices = TapIndices(weight.shape, groups, channels, weight.device)
    build: Callable[[Tensor], Tensor] = lambda w: expand_weight(w, indices)  # noqa: E731
    assert torch.autograd.gradcheck(build, weight.clone().requires_grad_())


def test_the_weight_build_is_few_operations_and_none_that_adds_atomically() -> None:
    weight, groups, channels = groups_of("fast stem")
    indices = TapIndices(weight.shape, groups, channels, weight.device)
    weight = weight.bfloat16().requires_grad_()
    expand_weight(weight, indices)
    views = {"view", "permute", "_unsafe_view", "detach", "alias", "t", "transpose"}
    with Operations() as operations:
        wide = expand_weight(weight, indices)
    assert [name for name in operations.names() if name not in views] == ["cat", "index_select"]
    with Operations() as operations:
        (gradient,) = torch.autograd.grad(wide, weight, torch.ones_like(wide))
    assert [name for name in operations.names() if name not in views | {"ones_like"}] == ["index_select", "sum"]
    assert torch.equal(gradient, torch.full_like(weight, groups.outputs))


def test_a_16_bit_gradient_is_summed_in_float32() -> None:
    weight, groups, channels = groups_of("fast res2 3x3")
    indices = TapIndices(weight.shape, groups, channels, weight.device)
    half = weight.bfloat16().requires_grad_()
    wide = expand_weight(half, indices)
    cotangent = torch.randn(wide.shape).to(wide)
    (found,) = torch.autograd.grad(wide, half, cotangent)
    exact = weight.double().requires_grad_()
    (expected,) = torch.autograd.grad(expand_weight(exact, indices), exact, cotangent.double())
    assert torch.equal(found, expected.bfloat16())
