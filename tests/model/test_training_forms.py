"""Activation checkpointing, torch.compile, autocast and several processes: the same training, another way."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from tests.experiments.support.forked import call_on_ranks
from tests.model.support.cases import audio_names, built, inputs, tiny


def step(model: nn.Module, frames: Tensor, log_mel: Tensor, **options: Any) -> Tensor:
    out: Any = model(frames, log_mel, **options)
    loss = F.cross_entropy(out.logits, torch.arange(len(frames)) % 5) + out.sync_loss
    loss.backward()
    return loss.detach()


@pytest.mark.parametrize("drop_audio", [False, True])
def test_checkpointing_changes_neither_gradients_nor_statistics(drop_audio: bool) -> None:
    frames, log_mel = inputs(tiny())
    results = []
    for checkpointed in (False, True):
        config = tiny(sync_loss="contrastive", activation_checkpointing=checkpointed, nonlocal_blocks=(0,))
        model = built(config, settled=True)
        loss = step(model, frames, log_mel, negative_log_mel=log_mel.flip(0), drop_audio=drop_audio)
        gradients = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
        results.append((loss, gradients, dict(model.named_buffers())))
    (loss, gradients, buffers), (loss_2, gradients_2, buffers_2) = results
    assert torch.equal(loss, loss_2)
    assert gradients.keys() == gradients_2.keys()
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradients_2[name], gradient, rtol=1e-5, atol=1e-7)
    for name, buffer in buffers.items():
        assert torch.equal(buffers_2[name], buffer), name
    tracked = {int(b) for n, b in buffers_2.items() if n.startswith("slow") and n.endswith("tracked")}
    assert tracked == {1}


def test_checkpointing_keeps_less() -> None:
    config = tiny(depth=26)
    frames, log_mel = inputs(config)
    kept = []
    for checkpointed in (False, True):
        model = built(tiny(depth=26, activation_checkpointing=checkpointed))
        sizes: dict[int, int] = {}

        def pack(x: Tensor, sizes: dict[int, int] = sizes) -> Tensor:
            sizes[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
            return x

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
            out = model(frames, log_mel).logits
        assert out.requires_grad
        kept.append(sum(sizes.values()))
    assert kept[1] < 0.5 * kept[0]


def compiled_against_eager(backend: Any, **changes: Any) -> None:
    config = tiny(sync_loss="contrastive", **changes)
    frames, log_mel = inputs(config)
    plain, model = built(config, settled=True), built(config, settled=True)
    compiled: Any = torch.compile(model, fullgraph=True, backend=backend, dynamic=False)
    for drop_audio in (False, True):
        options = {"negative_log_mel": log_mel.flip(0), "drop_audio": drop_audio}
        for which in (plain, model):
            which.train()
            which.zero_grad()
        expected, found = step(plain, frames, log_mel, **options), step(compiled, frames, log_mel, **options)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
        expected_gradients = {n: p.grad for n, p in plain.named_parameters()}
        for name, parameter in model.named_parameters():
            wanted = expected_gradients[name]
            assert (parameter.grad is None) == (wanted is None), name
            if wanted is not None and parameter.grad is not None:
                error = (parameter.grad - wanted).norm() / (wanted.norm() + 1e-6)
                assert error < 1e-3, f"{name}: {error:.1e}"
        for (name, buffer), other in zip(model.named_buffers(), plain.buffers(), strict=True):
            if "audio" not in name:  # under torch.compile each of the two audio passes moves its statistics by itself
                torch.testing.assert_close(buffer, other, rtol=1e-4, atol=1e-5, msg=name)
        for buffer, other in zip(model.buffers(), plain.buffers(), strict=True):
            buffer.copy_(other)
        plain.eval()
        model.eval()
        with torch.no_grad():
            scores = compiled(frames, log_mel, drop_audio=drop_audio).scores
            expected = plain(frames, log_mel, drop_audio=drop_audio).scores
            torch.testing.assert_close(scores, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.integration
def test_compiles_to_one_graph_kept_and_one_dropped() -> None:
    from torch._dynamo.testing import CompileCounterWithBackend

    torch._dynamo.reset()
    counter = CompileCounterWithBackend("eager")
    compiled_against_eager(counter)
    assert counter.frame_count == 4  # train and evaluation, kept and dropped
    torch._dynamo.reset()


@pytest.mark.slow
@pytest.mark.parametrize(
    "changes", [{"fusion": "a_fs", "activation_checkpointing": True}, {"fusion": "a_f_s"}, {"fusion": "av_nonlocal"}]
)
def test_compiled_by_inductor(changes: dict[str, Any]) -> None:
    # With an empty cache nearly all of the time goes into g++, 2.7 s a kernel however small it is: one fused stage.
    stages = {"fusion_stages": ("res3",), "lateral_stages": ("res3",), "sync_levels": ("res3",)}
    torch._dynamo.reset()
    compiled_against_eager("inductor", **stages, **changes)
    torch._dynamo.reset()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_is_near_float32(dtype: torch.dtype) -> None:
    config = tiny(sync_loss="contrastive")
    model = built(config, settled=True).eval()
    frames, log_mel = inputs(config)
    with torch.no_grad():
        exact: Any = model(frames, log_mel, negative_log_mel=log_mel.flip(0))
        with torch.autocast("cpu", dtype):
            half: Any = model(frames.to(dtype), log_mel, negative_log_mel=log_mel.flip(0))
    assert half.scores.dtype == half.sync_loss.dtype == torch.float32
    bound = 0.03 if dtype == torch.bfloat16 else 0.005
    assert (half.scores - exact.scores).norm() / exact.scores.norm() < bound
    assert abs(half.sync_loss - exact.sync_loss) < bound


def test_half_precision_frames_without_autocast() -> None:
    config = tiny()
    model = built(config, settled=True).eval()
    frames, log_mel = inputs(config)
    half, wide = model(frames.half(), log_mel).scores, model(frames.half().float(), log_mel).scores
    torch.testing.assert_close(half, wide, rtol=0, atol=0)


def worker(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", store=dist.FileStore(f"{folder}/store", 2), rank=rank, world_size=2)
    config = tiny()
    model = built(config)
    # A dropped step leaves audio out on every rank: DDP has to be told that parameters may be unused.
    parallel = nn.parallel.DistributedDataParallel(model, find_unused_parameters=True)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, weight_decay=0.1)
    names = audio_names(model)
    frozen: list[bool] = []
    for number, drop_audio in enumerate((False, True, True, False, True)):
        frames, log_mel = inputs(config, clips=2, seed=10 * number + rank)
        optimizer.zero_grad(set_to_none=True)
        before = {n: p.detach().clone() for n, p in model.named_parameters()}
        F.cross_entropy(parallel(frames, log_mel, drop_audio=drop_audio).logits, torch.tensor([0, 1])).backward()
        without = {n for n, p in model.named_parameters() if p.grad is None}
        assert without == (names if drop_audio else set())
        optimizer.step()
        frozen.append(all(torch.equal(p, before[n]) for n, p in model.named_parameters() if n in names))
    assert frozen == [False, True, True, False, True]
    torch.save({n: p.detach() for n, p in model.named_parameters()}, Path(folder) / f"{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.integration
def test_two_processes_with_dropped_steps(tmp_path: Path) -> None:
    call_on_ranks(worker, str(tmp_path))
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    assert all(torch.equal(value, second[name]) for name, value in first.items())


@pytest.mark.parametrize("changes", [{"nonlocal_blocks": (0,)}, {"fusion": "av_nonlocal"}])
def test_attention_stays_finite_in_float16(changes: dict[str, Any]) -> None:
    config = tiny(**changes)
    model = built(config, settled=True).eval()
    for name, parameter in model.named_parameters():
        if any(part in name for part in ("query.weight", "key.weight", "value.weight")):
            parameter.data.mul_(60)  # their product leaves float16's range; the norm after them brings it back
    for name, buffer in model.named_buffers():
        if name.endswith(("nonlocal0.norm.running_var", "out.norm.running_var")):
            buffer.fill_(1e12 if "nonlocal" in name else 1e13)
    frames, log_mel = inputs(config)
    with torch.no_grad():
        exact = model(frames, log_mel).scores
        with torch.autocast("cpu", torch.float16):
            half = model(frames.half(), log_mel).scores
    assert (half - exact).norm() / exact.norm() < 0.01


def test_attention_divides_before_float16_overflows() -> None:
    from model.nonlocal_block import attend

    query, key = torch.full((1, 4, 512), 16.0), torch.full((1, 64, 512), 16.0)
    value = torch.full((1, 64, 512), 0.01)
    out = attend(query.half(), key.half(), value.half())  # 16 * 16 * 512 = 131072 > 65504
    torch.testing.assert_close(out.float(), attend(query, key, value), rtol=2e-3, atol=0)
    expected = (query @ key.transpose(1, 2)) / 64 @ value
    torch.testing.assert_close(attend(query, key, value), expected, rtol=1e-5, atol=0)
