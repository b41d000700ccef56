"""What only a CUDA device can show of the model: no host sync, one CUDA graph for a step, the CPU's numbers.

A rectifier near zero may be decided otherwise by another rounding, which moves the gradients of this small model by up
to a few percent (docs/kernels_numerics.md): gradients are compared on several batches, most of which must
agree closely.
"""

import contextlib
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from kernels.library import fused_devices
from kernels.modules import GhostBatchNorm, set_backend
from model.avslowfast import AVSlowFast
from model.folding import fold
from tests.model.support.cases import built, inputs, tiny

fused = pytest.mark.skipif(not fused_devices(), reason="the library of fused operations is not built")
BACKENDS = ["reference", pytest.param("fused", marks=fused)]
DEVICES = [pytest.param("cpu", marks=pytest.mark.integration), pytest.param("cuda", marks=pytest.mark.needs_cuda)]
FORMS: list[dict[str, Any]] = [
    {},
    {"drop_pathway_mode": "running_average"},
    {"fusion": "a_f_s", "sync_loss": "contrastive"},
    {"fusion": "av_nonlocal", "sync_loss": "classification"},
]
SEEDS = range(5)


@pytest.fixture(autouse=True)
def _exact_arithmetic() -> Iterator[None]:
    """No TF32, the same convolution algorithm every time."""
    with torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True, allow_tf32=False):
        before, torch.backends.cuda.matmul.allow_tf32 = torch.backends.cuda.matmul.allow_tf32, False
        yield
        torch.backends.cuda.matmul.allow_tf32 = before
    set_backend("auto")


@contextlib.contextmanager
def host_sync_is_an_error() -> Iterator[None]:
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode(before)


def step(
    model: AVSlowFast, frames: Tensor, log_mel: Tensor, dtype: torch.dtype = torch.float32, **options: Any
) -> tuple[Tensor, Tensor]:
    """Forward and backward; logits and loss, on the device."""
    negative = None if model.config.sync_loss == "none" else log_mel.flip(0)
    with torch.autocast(frames.device.type, dtype, enabled=dtype != torch.float32):
        out = model(frames, log_mel, negative_log_mel=negative, **options)
        loss = out.logits.square().sum()
        if out.sync_loss is not None:
            loss = loss + out.sync_loss
    loss.backward()
    return out.logits.detach(), loss.detach()


def gradient(model: AVSlowFast) -> Tensor:
    """All gradients in a row, zeros where there is none, float64 on the CPU."""
    parts = [torch.zeros_like(p) if p.grad is None else p.grad for p in model.parameters()]
    return torch.cat([part.double().flatten().cpu() for part in parts])


def error(value: Tensor, exact: Tensor) -> float:
    """Norm of the difference over the norm."""
    return ((value.cpu().double() - exact.cpu().double()).norm() / exact.double().norm().cpu()).item()


def assert_gradients(errors: list[float]) -> None:
    """Median over batches; the worst one may have rectifiers that were decided otherwise."""
    assert sorted(errors)[len(errors) // 2] < 2e-4, errors
    assert max(errors) < 5e-2, errors


def assert_states(model: AVSlowFast, exact: AVSlowFast, tolerance: float) -> None:
    """Counters are equal, running statistics close: a mean in units of its channels' deviation, as it is rounded."""
    found, state = model.state_dict(), exact.state_dict()
    for key, value in state.items():
        if not value.is_floating_point():
            assert torch.equal(found[key].cpu(), value.cpu()), key
            continue
        scale = value.abs().max().item()
        if key.endswith("running_mean"):
            scale = max(scale, state[key.replace("_mean", "_var")].max().item() ** 0.5)
        assert (found[key].cpu() - value.cpu()).abs().max().item() <= tolerance * max(scale, 1e-3), key


def calm(model: AVSlowFast, frames: Tensor, log_mel: Tensor) -> float:
    """The deviation of a settled model's logits, with running statistics: beyond 1, its scores are 0 or 1."""
    norms = [module for module in model.modules() if isinstance(module, GhostBatchNorm)]
    for norm in norms:
        norm.frozen = True
    with torch.no_grad():
        out = model.train()(frames, log_mel)
    for norm in norms:
        norm.frozen = False
    model.eval()
    return float(out.logits.std())


@pytest.mark.needs_cuda
def test_the_check_itself_sees_a_host_sync() -> None:
    x = torch.ones(1, device="cuda")
    with host_sync_is_an_error(), pytest.raises(RuntimeError, match="synchroniz"):
        x.item()


@pytest.mark.needs_cuda
@pytest.mark.parametrize("changes", FORMS)
@pytest.mark.parametrize("audio", ["kept", "dropped", "device-side"])
@pytest.mark.parametrize("name", BACKENDS)
def test_no_host_sync_in_forward_and_backward(name: str, audio: str, changes: dict[str, Any]) -> None:
    set_backend(name)
    config = tiny(**changes)
    model = built(config).cuda()
    frames, log_mel = (x.cuda() for x in inputs(config))
    options: dict[str, Any] = {"drop_audio": audio == "dropped"}
    if audio == "device-side":
        options["audio_keep"] = torch.tensor([True, False, True, False], device="cuda")
    for _ in range(2):
        step(model, frames, log_mel, torch.bfloat16, **options)
    model.zero_grad()
    torch.cuda.synchronize()
    with host_sync_is_an_error():
        logits, _ = step(model, frames, log_mel, torch.bfloat16, **options)
    assert torch.isfinite(logits).all()
    assert gradient(model).norm() > 0
    assert model.slow.stem.norm.num_batches_tracked.item() == 3


@pytest.mark.needs_cuda
def test_no_host_sync_in_a_checkpointed_detector() -> None:
    config = tiny(head="detection", activation_checkpointing=True)
    model = built(config).cuda()
    frames, log_mel = (x.cuda() for x in inputs(config))
    boxes = torch.tensor([[0.0, 0, 0, 32, 32], [3, 4, 4, 20, 30]], device="cuda")
    step(model, frames, log_mel, torch.bfloat16, boxes=boxes)
    model.zero_grad()
    torch.cuda.synchronize()
    with host_sync_is_an_error():
        logits, _ = step(model, frames, log_mel, torch.bfloat16, boxes=boxes)
    assert logits.shape == (2, config.num_classes)
    assert gradient(model).norm() > 0


@pytest.mark.needs_cuda
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("changes", FORMS)
@pytest.mark.parametrize("name", BACKENDS)
def test_a_captured_step_replays_as_eager(name: str, changes: dict[str, Any], dtype: torch.dtype) -> None:
    """One graph holds every step, whichever clips keep their audio: logits, gradients and running statistics."""
    set_backend(name)
    config = tiny(**changes)
    model, twin = built(config, settled=True).cuda(), built(config, settled=True).cuda()
    frames, log_mel = (x.cuda() for x in inputs(config))
    keep = torch.ones(4, dtype=torch.bool, device="cuda")
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            step(model, frames, log_mel, dtype, audio_keep=keep)
    torch.cuda.current_stream().wait_stream(side)
    model.zero_grad(set_to_none=True)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        logits, loss = step(model, frames, log_mel, dtype, audio_keep=keep)
    close = 1e-5 if dtype == torch.float32 else 1e-2
    before = None
    for seed, kept in ((1, [1, 1, 1, 1]), (2, [1, 0, 1, 0]), (3, [0, 0, 0, 0])):
        for static, fresh in zip(
            (frames, log_mel, keep), (*inputs(config, seed=seed), torch.tensor(kept)), strict=True
        ):
            static.copy_(fresh)
        twin.load_state_dict(model.state_dict())
        graph.replay()
        twin.zero_grad()
        expected_logits, expected_loss = step(twin, frames, log_mel, dtype, audio_keep=keep)
        assert error(logits, expected_logits) < close
        assert error(loss, expected_loss) < close
        got = gradient(model)
        assert error(got, gradient(twin)) < close
        assert_states(model, twin, close)
        assert before is None or error(got, before) > 0.1  # the new inputs were seen
        before = got
    assert model.slow.stem.norm.num_batches_tracked.item() == 3 + 3
    assert model.audio is not None
    if config.sync_loss == "none":  # else the Audio pathway runs in dropped steps too, and for the negatives
        assert model.audio.stem.norm.num_batches_tracked.item() == 3 + 2  # the last step kept no clip's audio


@pytest.mark.needs_cuda
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("changes", FORMS[1:3])
def test_gpu_gives_the_numbers_of_the_cpu(changes: dict[str, Any], training: bool) -> None:
    config = tiny(**changes)
    host, device = built(config, settled=True), built(config, settled=True).cuda()
    errors = []
    for seed in SEEDS:
        frames, log_mel = inputs(config, seed=seed)
        device.load_state_dict(host.state_dict())
        results = []
        for model, place in ((host, "cpu"), (device, "cuda")):
            for module in model.modules():  # not eval(): its scores leave small gradients only
                if hasattr(module, "frozen"):
                    module.frozen = not training
            model.zero_grad()
            results.append(step(model, frames.to(place), log_mel.to(place)))
        (expected, expected_loss), (logits, loss) = results
        assert error(logits, expected) < 5e-5
        assert error(loss, expected_loss) < 5e-5
        errors.append(error(gradient(device), gradient(host)))
        assert_states(device, host, 1e-4)
    assert_gradients(errors)


@fused
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("changes", FORMS)
def test_fused_model_is_the_reference_model(changes: dict[str, Any], device: str) -> None:
    config = tiny(**changes)
    ours, plain = (built(config, settled=True).to(device) for _ in range(2))
    keep = torch.tensor([True, False, True, True], device=device)
    errors = []
    for seed in SEEDS:
        frames, log_mel = (x.to(device) for x in inputs(config, seed=seed))
        ours.load_state_dict(plain.state_dict())
        results = []
        for model, name in ((ours, "fused"), (plain, "reference")):
            set_backend(name)
            model.zero_grad()
            results.append(step(model, frames, log_mel, audio_keep=keep))
        (logits, loss), (expected, expected_loss) = results
        assert error(logits, expected) < 5e-5
        assert error(loss, expected_loss) < 5e-5
        errors.append(error(gradient(ours), gradient(plain)))
        assert_states(ours, plain, 1e-4)
    assert_gradients(errors)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("changes", [*FORMS, {"head": "sigmoid", "depth": 26, "nonlocal_blocks": (0,)}])
@pytest.mark.parametrize("name", BACKENDS)
def test_evaluation_and_folded_forms(name: str, changes: dict[str, Any], device: str) -> None:
    """Scores of the device are the CPU's reference ones; folding changes rounding only; nothing is learned."""
    config = tiny(**changes)
    host, model = built(config, settled=True).eval(), built(config, settled=True).eval()
    frames, log_mel = inputs(config, clips=3)
    with torch.no_grad():
        size = calm(host, frames, log_mel)
        for parameter in (*host.head.parameters(), *model.head.parameters()):
            parameter.div_(size)
        model.load_state_dict(host.state_dict())  # an average of audio may have moved
        model.to(device)
        before = {key: value.clone() for key, value in model.state_dict().items()}
        set_backend("reference")
        expected = [host(frames, log_mel).scores, host(frames).scores]
        set_backend(name)
        folded, there = fold(model), (frames.to(device), log_mel.to(device))
        for form in (model, folded):
            for scores, exact in zip((form(*there).scores, form(there[0]).scores), expected, strict=True):
                assert error(scores, exact) < 2e-5
            with torch.autocast(device, torch.bfloat16):
                assert error(form(*there).scores, expected[0]) < 0.1
    assert error(expected[0], expected[1]) > 1e-4
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
