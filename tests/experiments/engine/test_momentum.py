"""Momentum exists for every parameter from the start: fused SGD takes no mixture, and DropPathway would make one."""

import copy
import dataclasses
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from experiments.config import OptimConfig
from experiments.engine.optim import build_optimizer, complete_momentum
from experiments.engine.precision import autocast, channels_last
from model.avslowfast import AVSlowFast, build_model
from model.variants import VARIANTS

pytestmark = pytest.mark.integration  # starts processes or trains

CONFIG = OptimConfig(lr=0.05, momentum=0.9, weight_decay=1e-2)
DROPS = (True, False, True, True, False, False)  # the first step with audio comes after one without
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.needs_cuda)]


@pytest.fixture(autouse=True)
def deterministic() -> Iterator[None]:
    """Convolutions on a GPU sum in one order in every run."""
    before = torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark
    torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark = True, False
    yield
    torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark = before


def small_model(device: str) -> AVSlowFast:
    torch.manual_seed(0)
    config = dataclasses.replace(VARIANTS["small"], num_classes=4, width=8, pool_window=1, dropout_rate=0.0)
    return channels_last(build_model(config).to(device))


def clips(model: AVSlowFast, device: str) -> tuple[Tensor, Tensor, Tensor]:
    """Four clips of noise with labels."""
    config, generator = model.config, torch.Generator().manual_seed(1)
    frames = torch.randn(4, config.num_fast_frames, 32, 32, 3, generator=generator).permute(0, 4, 1, 2, 3)
    mel = torch.randn(4, 1, config.num_mel_frames, config.num_mel_bins, generator=generator)
    return frames.to(device), mel.to(device), torch.arange(4, device=device)


def train(model: AVSlowFast, optimizer: torch.optim.Optimizer, precision: str, drops: Iterator[bool]) -> None:
    """Take a step for each decision in `drops`."""
    device = next(model.parameters()).device
    frames, mel, labels = clips(model, str(device))
    scaler = torch.amp.GradScaler(device.type, enabled=precision == "fp16", init_scale=256.0)
    for drop in drops:
        with autocast(device, precision):
            loss = nn.functional.cross_entropy(model(frames, mel, drop_audio=drop).logits, labels)
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        model.zero_grad(set_to_none=True)


def momentum(optimizer: torch.optim.Optimizer) -> list[Any]:
    return [optimizer.state[p].get("momentum_buffer") for g in optimizer.param_groups for p in g["params"]]


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("nesterov", [False, True])
def test_first_steps_are_torchs_bit_for_bit(fused: bool, nesterov: bool) -> None:
    generator = torch.Generator().manual_seed(3)
    start = [torch.randn(5, 3, generator=generator), torch.tensor([0.0, -0.0, 1.0, -2.0])]
    gradients = [[torch.randn(5, 3, generator=generator), torch.tensor([-0.0, 0.0, -0.0, 1e-30])] for _ in range(4)]
    config = OptimConfig(lr=0.25, momentum=0.9, nesterov=nesterov, weight_decay=0.0)
    results = []
    for ours in (True, False):
        module = nn.ParameterList(t.clone() for t in start)
        if ours:
            optimizer = build_optimizer(module, config, fused=fused)
        else:
            optimizer = torch.optim.SGD(module, lr=0.25, momentum=0.9, nesterov=nesterov, fused=fused)
        for step in gradients:
            for parameter, gradient in zip(module, step, strict=True):
                parameter.grad = gradient.clone()
            optimizer.step()
        results.append([t.detach() for t in module] + [optimizer.state[p]["momentum_buffer"] for p in module])
    for a, b in zip(*results, strict=True):
        assert a.numpy().tobytes() == b.numpy().tobytes()  # signs of zeros too


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("precision", ["fp32", "bf16", pytest.param("fp16", marks=pytest.mark.needs_cuda)])
def test_drop_pathway_trains_with_a_fused_optimizer(device: str, precision: str) -> None:
    if precision == "fp16" and device == "cpu":
        pytest.skip("fp16 needs CUDA")
    model = small_model(device)
    optimizer = build_optimizer(model, CONFIG, fused=True)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    train(model, optimizer, precision, iter(DROPS))
    assert all(isinstance(m, Tensor) for m in momentum(optimizer))
    still = [n for n, p in model.named_parameters() if torch.equal(p, before[n])]
    assert not [n for n in still if not n.endswith("norm.weight")]
    assert all(torch.isfinite(p).all() for p in model.parameters())


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("lacking", [(), ("absent",), ("none",)])
def test_resumed_equals_uninterrupted(device: str, precision: str, lacking: tuple[str, ...]) -> None:
    """Also from an older checkpoint, taken before the first step with audio, that has no momentum for some."""
    whole = small_model(device)
    optimizer = build_optimizer(whole, CONFIG, fused=True)
    train(whole, optimizer, precision, iter(DROPS[:1]))
    weights, state = copy.deepcopy(whole.state_dict()), copy.deepcopy(optimizer.state_dict())
    unused = [i for i, s in state["state"].items() if not s["momentum_buffer"].any()]
    assert unused  # the audio pathway's
    for index in unused if lacking else ():
        state["state"].pop(index) if lacking == ("absent",) else state["state"][index].update(momentum_buffer=None)
    train(whole, optimizer, precision, iter(DROPS[1:]))
    resumed = small_model(device)
    resumed.load_state_dict(weights)
    again = build_optimizer(resumed, CONFIG, fused=True)
    again.load_state_dict(state)
    train(resumed, again, precision, iter(DROPS[1:]))
    for (name, a), b in zip(whole.named_parameters(), resumed.parameters(), strict=True):
        assert torch.equal(a, b), name
    for a, b in zip(momentum(optimizer), momentum(again), strict=True):
        assert torch.equal(a, b)


def test_checkpoint_of_a_cpu_leaves_the_optimizer_fused() -> None:
    model = nn.Linear(2, 2)
    optimizer = build_optimizer(model, CONFIG, fused=True)
    optimizer.load_state_dict(build_optimizer(nn.Linear(2, 2), CONFIG, fused=False).state_dict())
    assert [g["fused"] for g in optimizer.param_groups] == [True, True]


def test_without_momentum_there_are_no_buffers() -> None:
    optimizer = build_optimizer(nn.Linear(2, 2), OptimConfig(momentum=0.0))
    complete_momentum(optimizer)
    assert momentum(optimizer) == [None, None]
