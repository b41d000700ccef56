"""No operation of a step re-lays out a map: neither an explicit copy nor the result of any other operation.

What cannot be helped is named in INHERENT: gradients that PyTorch's own operations hand out in row-major order, whose
maps are laid out again once each. The sum over a broadcast audio signal (N, C, T) is a few kB. `roi_align` computes on
row-major images, forward and backward; the detection head gives it maps that are averaged over time.
"""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from kernels.modules import set_backend
from model.folding import fold
from tests.model.support.cases import BACKENDS, built, inputs, tiny

INHERENT = ("res3.audio.expand", "res4.audio.expand", "res3.out", "res4.out")
INHERENT_DETECTION = ("slow.stages.res5", "fast.stages.res5")
FORMS: list[dict[str, Any]] = [
    {},
    {"fusion": "av_nonlocal", "sync_loss": "contrastive", "activation_checkpointing": True},
    {"head": "detection", "drop_pathway_mode": "running_average", "nonlocal_blocks": (0,)},
]


@pytest.fixture(autouse=True)
def _auto_backend() -> Iterator[None]:
    yield
    set_backend("auto")


def nesting(x: Tensor) -> list[int]:
    """Axes with more than one entry, outermost first."""
    return sorted((axis for axis in range(x.dim()) if x.shape[axis] > 1), key=lambda axis: (-x.stride(axis), axis))


def tensors(values: Any) -> list[Tensor]:
    parts = values if isinstance(values, list | tuple) else [values]
    return [t for p in parts for t in (tensors(p) if isinstance(p, list | tuple) else [p]) if isinstance(t, Tensor)]


class Relayouts(TorchDispatchMode):
    """Operations whose result is a map of an input's shape, in other memory and with its axes nested otherwise."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[tuple[str, tuple[int, ...]]] = []
        self.operations = 0

    def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = op(*args, **(kwargs or {}))
        name = op.overloadpacket.__name__
        made, given = ([args[0]], [args[1]]) if name == "copy_" else (tensors(out), tensors(args))
        self.operations += 1
        for new in made if not name.startswith(("empty", "new_empty")) else []:
            for old in given:
                same = new.untyped_storage().data_ptr() == old.untyped_storage().data_ptr()
                if same or new.dim() not in (4, 5) or new.shape != old.shape or 0 in old.stride():
                    continue
                if nesting(new) != nesting(old):
                    self.found.append((name, tuple(new.shape)))
        return out


def run(model: nn.Module, config: Any, *, train: bool, drop_audio: bool = False) -> Relayouts:
    """Forward of one batch, and backward with `train`."""
    frames, log_mel = inputs(config)
    more: dict[str, Any] = {"drop_audio": drop_audio}
    if config.head == "detection":
        more["boxes"] = torch.tensor([[0.0, 1, 1, 20, 20], [3, 0, 2, 31, 30]])
    if config.sync_loss != "none":
        more["negative_log_mel"] = log_mel.flip(0)
    with Relayouts() as seen, torch.set_grad_enabled(train):
        out = model.train(train)(frames, log_mel, **more)
        if train:
            loss = out.logits.square().sum() + (0 if out.sync_loss is None else out.sync_loss)
            loss.backward()
    return seen


def test_a_relayout_is_seen() -> None:
    """Rectifying a view in place does this in its gradient; so does a sum with a row-major map."""
    x = torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last).requires_grad_()
    with Relayouts() as seen:
        (x * 2).reshape(x.shape).relu_().sum().backward()
        assert seen.found
        seen.found.clear()
        torch.add(torch.randn(2, 3, 4, 5), x)
        x.detach().contiguous()
    assert seen.found == [("add", (2, 3, 4, 5)), ("clone", (2, 3, 4, 5))]


@pytest.mark.parametrize("dropped", [False, True])
@pytest.mark.parametrize("changes", FORMS)
@pytest.mark.parametrize("name", BACKENDS)
def test_no_map_is_laid_out_again_in_training(name: str, changes: dict[str, Any], dropped: bool) -> None:
    set_backend(name)
    config = tiny(**changes)
    model = built(config, settled=True)
    allowed: list[tuple[int, ...]] = []
    ends = INHERENT if config.head != "detection" else INHERENT + INHERENT_DETECTION
    for part, module in model.named_modules():
        if part.endswith(ends):
            module.register_forward_hook(lambda _module, _args, out: allowed.append(tuple(out.shape)))
    seen = run(model, config, train=True, drop_audio=dropped)
    assert seen.operations > 300
    for operation, shape in seen.found:
        assert shape in allowed, f"{operation} lays out {shape} again"
        allowed.remove(shape)
    assert not (changes == {} and dropped and seen.found)


@pytest.mark.parametrize("changes", FORMS)
@pytest.mark.parametrize("name", BACKENDS)
def test_no_map_is_laid_out_again_in_evaluation(name: str, changes: dict[str, Any]) -> None:
    set_backend(name)
    config = tiny(**changes)
    model = built(config, settled=True)
    for form in (model, fold(model)):
        seen = run(form, config, train=False)
        assert seen.operations > 100
        assert not seen.found
