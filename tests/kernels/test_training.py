"""From each state of a reference run, a fused step gives its gradients: ten steps, a hundred in the slow suite.

The reference runs in float64: PyTorch's own float32 normalisation is off by enough to flip rectifiers near zero, and
a flipped rectifier moves a gradient of this small model by percents. A batch that puts a rectifier or the winner of a
pooling window within float32 rounding of another decision is drawn again (about one in ten), so that every step is
compared. A gradient's error is relative to its own norm: all but one in a thousand are within LIMIT (seen: 3 of 17100
beyond it, gammas of two or four channels that cancel to 0.02 to 0.14 % of the largest gradient's norm), all are within
five times as much, and within LIMIT where a norm below FLOOR of the largest one counts as that.
"""

import copy
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from kernels.library import fused_devices
from kernels.modules import GhostBatchNorm, LateralFusion, set_backend
from model.avslowfast import build_model
from model.config import ModelConfig
from model.variants import VARIANTS

pytestmark = pytest.mark.skipif(not fused_devices(), reason="the library of fused operations is not built")


LIMIT, FLOOR = 1e-4, 3e-3
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.needs_cuda)]


@pytest.fixture(autouse=True)
def _auto_backend() -> Iterator[None]:
    """Convolutions in float32, not TF32."""
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        yield
    set_backend("auto")


def batch(config: ModelConfig, step: int) -> tuple[Tensor, Tensor, Tensor]:
    """Frames, log-mel and labels that a model can learn: the label sets the brightness."""
    generator = torch.Generator().manual_seed(step)
    labels = torch.randint(config.num_classes, (8,), generator=generator)
    frames = torch.randn(8, 3, config.num_fast_frames, 32, 32, generator=generator)
    frames = frames + labels[:, None, None, None, None] / config.num_classes
    log_mel = torch.randn(8, 1, config.num_mel_frames, config.num_mel_bins, generator=generator)
    return frames.to(memory_format=torch.channels_last_3d), log_mel, labels


def record_rectifiers(model: nn.Module) -> list[Tensor]:
    """A list that every forward extends by where each rectifier passed, and each maximum of pool1 was."""
    passed: list[Tensor] = []

    def after_norm(module: GhostBatchNorm, args: Any, kwargs: dict[str, Any], y: Tensor) -> None:
        if kwargs.get("pool"):  # which position of each window wins
            with torch.no_grad():
                images = copy.deepcopy(module).forward(args[0], relu=True).transpose(1, 2).flatten(0, 1)
            best, index = nn.functional.max_pool2d(images, 3, stride=2, padding=1, return_indices=True)
            passed.append(torch.where(best > 0, index, -1).cpu())
        elif kwargs.get("relu"):
            first = y[0] if isinstance(y, tuple) else y  # an output for two readers
            passed.append((first.detach() > 0).cpu())

    def after_fusion(module: LateralFusion, args: Any, kwargs: dict[str, Any], y: Tensor) -> None:
        with torch.no_grad():
            passed.append((copy.deepcopy(module.norm).forward(args[1], relu=True) > 0).cpu())

    inner = [module.norm for module in model.modules() if isinstance(module, LateralFusion)]
    for module in model.modules():
        if isinstance(module, GhostBatchNorm) and not any(module is norm for norm in inner):
            module.register_forward_hook(after_norm, with_kwargs=True)
        elif isinstance(module, LateralFusion):
            module.register_forward_hook(after_fusion, with_kwargs=True)
    return passed


def gradients(
    model: nn.Module, backend: str, inputs: tuple[Tensor, Tensor, Tensor]
) -> tuple[Tensor, dict[str, Tensor]]:
    """Loss and gradient of every parameter of one step, computed where the model is; on the CPU."""
    set_backend(backend)
    model.zero_grad(set_to_none=True)
    like = next(model.parameters())
    logits = model(inputs[0].to(like), inputs[1].to(like)).logits
    loss = nn.functional.cross_entropy(logits, inputs[2].to(like.device))
    loss.backward()
    return loss.detach().cpu(), {n: p.grad.cpu() for n, p in model.named_parameters() if p.grad is not None}


def small_model() -> tuple[nn.Module, ModelConfig]:
    torch.manual_seed(0)
    config = replace(VARIANTS["small"], dropout_rate=0.0, pool_window=1, num_frames=2, width=8, num_mel_bins=16)
    model = build_model(config).train()
    for module in model.modules():  # a gamma of zero hides its branch: show every branch's gradient
        if isinstance(module, GhostBatchNorm) and not module.weight.any():
            nn.init.ones_(module.weight)
    return model, config


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(
    "steps", [pytest.param(10, marks=pytest.mark.integration), pytest.param(100, marks=pytest.mark.slow)]
)
def test_fused_steps_from_the_states_of_a_reference_run(steps: int, device: str) -> None:
    model, config = small_model()
    exact = copy.deepcopy(model).double()  # on the CPU: CUDA's float64 convolutions are not channels-last
    model.to(device)
    passed, exactly = record_rectifiers(model), record_rectifiers(exact)
    optimizer = torch.optim.SGD(exact.parameters(), lr=0.02, momentum=0.9)
    losses: list[float] = []
    own: list[float] = []  # error of each gradient over its norm
    worst_loss, worst_floored, worst_whole, draws = 0.0, 0.0, 0.0, 0
    while len(losses) < steps and draws < 1.25 * steps + 2:
        inputs = batch(config, draws)
        draws += 1
        passed.clear()
        exactly.clear()
        loss, ours = gradients(model, "fused", inputs)
        expected, theirs = gradients(exact, "reference", inputs)
        worst_loss = max(worst_loss, ((loss - expected).abs() / expected).item())
        if not all(torch.equal(a, b) for a, b in zip(passed, exactly, strict=True)):
            continue
        assert ours.keys() == theirs.keys()
        names = list(theirs)
        norms = torch.stack([theirs[name].norm() for name in names])
        errors = torch.stack([(ours[name] - theirs[name]).norm() for name in names])
        own += (errors / norms).tolist()
        worst_floored = max(worst_floored, (errors / norms.clamp(min=FLOOR * norms.max().item())).max().item())
        worst_whole = max(worst_whole, (errors.norm() / norms.norm()).item())
        optimizer.step()
        for parameter, rounded in zip(exact.parameters(), model.parameters(), strict=True):
            rounded.data.copy_(parameter.data)
            parameter.data.copy_(rounded.data)
        losses.append(expected.item())
    assert len(losses) == steps
    assert worst_loss <= 1e-5
    beyond = sum(not error <= LIMIT for error in own)
    print(f"worst gradient {max(own):.2e} of its norm, {beyond} of {len(own)} beyond; floored {worst_floored:.2e}")
    assert max(own) <= 5 * LIMIT
    assert beyond <= max(3, len(own) / 1000)
    assert worst_floored <= LIMIT
    assert worst_whole <= 1e-5
    if steps == 100:
        assert sum(losses[-10:]) < sum(losses[:10])
