"""A folded model converts and expands its weights once, and gives what it gave."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from model.avslowfast import AVSlowFast
from model.convolutions import Conv2d, Convolution, FactoredConv3d, set_grouping
from model.folding import fold
from tests.model.support.cases import built, inputs, tiny
from tests.model.support.operations import Operations

pytestmark = pytest.mark.integration  # whole models or pipelines run

PX = 64


def folded_model(grouping: Any = "always", **changes: Any) -> tuple[AVSlowFast, tuple[Tensor, Tensor]]:
    config = tiny(backend="reference", **changes)
    model = built(config, settled=True).eval()
    set_grouping(model, grouping)
    return fold(model), inputs(config, clips=2, px=PX)


def forget(model: nn.Module) -> nn.Module:
    """The same model without anything kept."""
    model = copy.deepcopy(model)
    for module in model.modules():
        if isinstance(module, Convolution):
            module._kept = None
    return model


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
@pytest.mark.parametrize("grouping", ["off", "auto", "always"])
def test_same_scores_bit_for_bit(grouping: str, dtype: torch.dtype | None) -> None:
    folded, given = folded_model(grouping)
    with torch.no_grad(), torch.autocast("cpu", dtype or torch.bfloat16, enabled=dtype is not None):
        expected = forget(folded)(*given).scores
        assert torch.equal(folded(*given).scores, expected)
        assert torch.equal(folded(*given).scores, expected)
        assert torch.equal(copy.deepcopy(folded)(*given).scores, expected)


def test_grouped_folded_equals_unfolded() -> None:
    config = tiny(backend="reference", lateral_stages=("pool1", "res2", "res3", "res4"))
    model = built(config, settled=True).double().eval()
    frames, log_mel = (x.double() for x in inputs(config, clips=2, px=PX))
    expected = model(frames, log_mel).scores
    folded = fold(model)
    set_grouping(folded, "always")
    torch.testing.assert_close(folded(frames, log_mel).scores, expected, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(folded(frames, log_mel).scores, expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("grouping", ["off", "always"])
def test_what_an_evaluation_kept_serves_a_gradient_of_the_input(grouping: Any) -> None:
    folded, (frames, log_mel) = folded_model(grouping)
    folded.requires_grad_(False)
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        folded(frames, log_mel)
    gradients: list[Tensor] = []
    for model in (folded, forget(folded)):
        sound = log_mel.clone().requires_grad_()
        with torch.autocast("cpu", torch.bfloat16):
            model(frames, sound).scores[:, 0].sum().backward()
        assert sound.grad is not None
        gradients.append(sound.grad)
    assert gradients[0].count_nonzero() > 0
    assert torch.equal(*gradients)


def test_nothing_is_made_twice() -> None:
    folded, given = folded_model()
    weights = sum(isinstance(m, Convolution) for m in folded.modules())
    made: list[dict[str, int]] = []
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        for _ in range(3):
            with Operations() as operations:
                folded(*given)
            made.append({n: operations.names().count(n) for n in ("_to_copy", "index_select", "repeat")})
    first, second, third = made
    assert second == third
    assert first["index_select"] > 20
    assert second["index_select"] == second["repeat"] == 0
    assert first["_to_copy"] - second["_to_copy"] > weights  # and biases


@pytest.mark.parametrize("kind", [Conv2d, FactoredConv3d])
def test_a_changed_weight_is_seen(kind: Any) -> None:
    kernel, form = ((1, 3, 3), torch.channels_last_3d) if kind is FactoredConv3d else ((3, 3), torch.channels_last)
    torch.manual_seed(0)
    layer: Any = kind(8, 8, kernel, padding=tuple(k // 2 for k in kernel)).requires_grad_(False)
    set_grouping(layer, "always")
    layer.keep_weights()
    x = torch.randn(2, 8, *(4,) * (len(kernel) - 1), 16).to(memory_format=form)
    changes = [
        lambda: None,
        lambda: layer.weight.mul_(2),
        lambda: layer.bias.add_(1),
        lambda: layer.load_state_dict({"weight": torch.randn_like(layer.weight), "bias": torch.randn(8)}),
        lambda: setattr(layer.weight, "data", torch.randn_like(layer.weight)),
    ]
    for change in changes:
        change()
        torch.testing.assert_close(layer(x), forget(layer)(x), rtol=0, atol=0)
        layer(x)
    layer.double()
    assert torch.equal(layer(x.double()), forget(layer)(x.double()))
    layer.weight.requires_grad_()
    (gradient,) = torch.autograd.grad(layer(x.double()).sum(), layer.weight)
    assert gradient.any()


@pytest.mark.needs_cuda
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_captured_folded_model_replays(dtype: torch.dtype) -> None:
    config = tiny(width=64, beta_fast=1 / 8)
    model = fold(built(config, settled=True).cuda().eval())
    frames, log_mel = (x.cuda() for x in inputs(config, clips=2, px=PX))
    rows = torch.nn.functional.pad(frames.movedim(1, -1), (0, 1)).to(dtype)
    frames = rows[..., :3].movedim(-1, 1)

    def run() -> Any:
        with torch.no_grad(), torch.autocast("cuda", dtype, cache_enabled=False):
            return model(frames, log_mel).scores

    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for _ in range(2):
            run()
    stream.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        found = run()
    rows.copy_(torch.randn_like(rows[..., :1]))
    rows[..., 3] = 0
    graph.replay()
    torch.cuda.synchronize()
    expected = run()
    assert torch.equal(found, expected)
