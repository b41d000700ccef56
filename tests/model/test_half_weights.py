"""Weights cast together give autocast's numbers bit for bit, by few operations, in every way to train."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from model.avslowfast import AVSlowFast
from model.convolutions import Convolution, set_grouping
from model.half_weights import _Cast, convolutions_of, half_weights
from tests.experiments.support.forked import call_on_ranks
from tests.model.support.cases import built, inputs, tiny
from tests.model.support.operations import Operations

pytestmark = pytest.mark.integration  # whole models or pipelines run

PX = 64  # the maps of res5 are wider than a kernel: smaller ones are convolved in float32, see convolutions.py
CASES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "plain": ({}, {}),
    "dropped": ({}, {"drop_audio": True}),
    "synchronization": ({"sync_loss": "contrastive"}, {}),
    "synchronization, dropped": ({"sync_loss": "contrastive"}, {"drop_audio": True}),
    "checkpointed": ({"activation_checkpointing": True, "nonlocal_blocks": (0,)}, {}),
    "frozen norms": ({"freeze": "bn"}, {}),
    "linear probe": ({"freeze": "backbone"}, {}),
    "other fusion": ({"fusion": "av_nonlocal", "sync_loss": "classification"}, {}),
    "kept on the device": ({}, {"audio_keep": torch.tensor([True, False, True, False])}),
    "vision": ({"pathways": ("slow", "fast"), "fusion": "none"}, {}),
    "sound": ({"pathways": ("audio",), "fusion": "none"}, {}),
}


def trained(config: Any, casts: Any, **options: Any) -> tuple[AVSlowFast, Tensor]:
    """A model after forward and backward of one batch in bfloat16, and its logits."""
    model = built(config, settled=True)
    model.weight_casts = casts
    set_grouping(model, "off")
    frames, log_mel = inputs(config, px=PX)
    if config.sync_loss != "none":
        options["negative_log_mel"] = log_mel.flip(0)
    with torch.autocast("cpu", torch.bfloat16):
        out: Any = model(frames if config.has_visual else None, log_mel if config.has_audio else None, **options)
    loss = F.cross_entropy(out.logits, torch.arange(len(out.logits)) % 5)
    (loss if out.sync_loss is None else loss + out.sync_loss).backward()
    return model, out.logits.detach()


@pytest.mark.parametrize("case", CASES)
def test_same_bits_as_autocast(case: str) -> None:
    changes, options = CASES[case]
    config = tiny(**changes)
    (plain, expected), (model, found) = (trained(config, casts, **options) for casts in ("off", "always"))
    assert torch.equal(found, expected)
    wanted = {name: p.grad for name, p in plain.named_parameters()}
    for name, parameter in model.named_parameters():
        other = wanted[name]
        assert (parameter.grad is None) == (other is None), name
        if other is not None:
            assert parameter.grad is not None
            assert torch.equal(parameter.grad, other), name
            assert parameter.grad.stride() == other.stride(), name
    for (name, buffer), before in zip(model.named_buffers(), plain.buffers(), strict=True):
        assert torch.equal(buffer, before), name
    if case == "linear probe":
        assert sum(p.grad is not None for p in model.parameters()) == 3
    if "dropped" in case and "synchronization" not in case:
        assert all(p.grad is None for p in model.audio.parameters())  # type: ignore[union-attr]


def test_few_launches() -> None:
    config = tiny()
    model = built(config, settled=True)
    set_grouping(model, "off")
    frames, log_mel = inputs(config, px=PX)
    copies: dict[str, list[int]] = {}
    together: dict[str, list[int]] = {}
    for casts in ("off", "always"):
        model.weight_casts = casts  # type: ignore[assignment]
        with torch.autocast("cpu", torch.bfloat16), Operations() as forward:
            loss = model(frames, log_mel).logits.square().sum()
        with Operations() as backward:
            loss.backward()
        copies[casts] = [o.names().count("_to_copy") for o in (forward, backward)]
        together[casts] = [o.names().count("_foreach_copy_") for o in (forward, backward)]
    number = len(convolutions_of([model]))
    assert number > 50
    assert [a - b for a, b in zip(copies["off"], copies["always"], strict=True)] == [number, number]
    assert together == {"off": [0, 0], "always": [10, 10]}  # 5 stages of vision, 5 of sound
    assert all(c.half_weight is None for c in convolutions_of([model]))


def test_gradients_of_a_late_stage_do_not_wait_for_an_early_one() -> None:
    config = tiny()
    model = built(config, settled=True)
    model.weight_casts = "always"
    order: list[str] = []
    for name, parameter in model.named_parameters():
        parameter.register_post_accumulate_grad_hook(lambda _, name=name: order.append(name))
    frames, log_mel = inputs(config, px=PX)
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(frames, log_mel).logits.square().sum()
    loss.backward()
    place = {name: number for number, name in enumerate(order)}
    for pathway in ("slow", "fast", "audio"):
        last = [max(place[n] for n in order if n.startswith(f"{pathway}.stages.res{s}.")) for s in (5, 4, 3, 2)]
        assert last == sorted(last)
        convolutions = [n for n in order if "conv" in n and n.startswith(f"{pathway}.stages.res2.")]
        assert last[0] < min(place[n] for n in convolutions)


@pytest.mark.parametrize("autocast", [None, torch.bfloat16])
def test_nothing_is_cast_where_autocast_would_not(autocast: torch.dtype | None) -> None:
    model = built(tiny())
    groups = [convolutions_of([model])]
    with torch.autocast("cpu", autocast or torch.bfloat16, enabled=autocast is not None):
        for casts in ("auto", "off") if autocast else ("auto", "off", "always"):
            with half_weights(groups, casts):  # type: ignore[arg-type]
                assert all(c.half_weight is None for c in groups[0])
    doubled = [convolutions_of([built(tiny()).double()])]
    with torch.autocast("cpu", torch.bfloat16), half_weights(doubled, "always"):
        assert all(c.half_weight is None for c in doubled[0])


def test_a_copy_is_used_inside_autocast_and_gone_after_an_error() -> None:
    groups = [convolutions_of([built(tiny())])]
    first = groups[0][0]

    def inside() -> None:
        with torch.autocast("cpu", torch.bfloat16), half_weights(groups, "always"):
            for convolution in groups[0]:
                half = convolution.half_weight
                assert half is not None
                assert half is convolution.used_weight
                assert torch.equal(half, convolution.weight.bfloat16())
                assert half.stride() == convolution.weight.stride()
            with torch.autocast("cpu", enabled=False):
                assert first.used_weight is first.weight
            with torch.autocast("cpu", torch.float16):
                assert first.used_weight is first.weight
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        inside()
    assert all(c.half_weight is None for c in groups[0])
    assert first.used_weight is first.weight


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_casts_of_any_layout(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    shapes = ((4, 3, 5, 7, 7), (8, 16, 1, 1), (6,))
    weights = [torch.randn(shape).requires_grad_() for shape in shapes]
    weights[0].data = weights[0].data.contiguous(memory_format=torch.channels_last_3d)
    frozen = torch.randn(3, 3)
    halves = _Cast.apply(dtype, *weights, frozen)
    assert [h.requires_grad for h in halves] == [True, True, True, False]
    cotangent = torch.randn(shapes[0]).to(dtype)
    found = torch.autograd.grad(halves[0], weights, cotangent, allow_unused=True)
    assert torch.equal(found[0], cotangent.float())
    assert found[1:] == (None, None)
    for half, weight in zip(halves, (*weights, frozen), strict=True):
        assert torch.equal(half, weight.to(dtype))
        assert half.stride() == weight.stride()


def worker(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", store=dist.FileStore(f"{folder}/store", 2), rank=rank, world_size=2)
    config = tiny(depth=14)
    results = []
    for casts in ("off", "always"):
        model = built(config)
        set_grouping(model, "off")
        model.weight_casts = casts  # type: ignore[assignment]
        parallel = nn.parallel.DistributedDataParallel(model, find_unused_parameters=True)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, weight_decay=0.1)
        missing: list[list[str]] = []
        for number, drop_audio in enumerate((False, True, False)):
            frames, log_mel = inputs(config, clips=2, px=PX, seed=10 * number + rank)
            optimizer.zero_grad(set_to_none=True)
            with torch.autocast("cpu", torch.bfloat16):
                logits = parallel(frames, log_mel, drop_audio=drop_audio).logits
            F.cross_entropy(logits, torch.tensor([0, 1])).backward()
            optimizer.step()
            missing.append([name for name, p in model.named_parameters() if p.grad is None])
        results.append({"weights": model.state_dict(), "missing": missing})
    torch.save(results, Path(folder) / f"{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.integration
def test_several_processes(tmp_path: Path) -> None:
    call_on_ranks(worker, str(tmp_path))
    results = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2)]
    (plain, cast), (_, other) = results
    assert cast["missing"] == plain["missing"]
    assert [bool(names) for names in cast["missing"]] == [False, True, False]
    for name, value in plain["weights"].items():
        assert torch.equal(cast["weights"][name], value), name
        if "running" not in name:
            assert torch.equal(other["weights"][name], value), name


@pytest.mark.needs_cuda
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_same_bits_on_cuda(dtype: torch.dtype) -> None:
    config = tiny()
    frames, log_mel = (x.cuda() for x in inputs(config, px=PX))
    found: dict[str, list[Tensor]] = {}
    torch.backends.cudnn.deterministic = True
    try:
        for casts in ("off", "auto"):
            model = built(config, settled=True).cuda()
            model.weight_casts = casts  # type: ignore[assignment]
            with torch.autocast("cuda", dtype):
                out = model(frames, log_mel).logits
            out.float().square().sum().backward()
            convolutions = [m for m in model.modules() if isinstance(m, Convolution)]
            found[casts] = [out.detach(), *(c.weight.grad for c in convolutions if c.weight.grad is not None)]
    finally:
        torch.backends.cudnn.deterministic = False
    assert len(found["off"]) == len(found["auto"]) > 50
    assert torch.equal(found["auto"][0], found["off"][0])
    for a, b in zip(found["auto"][1:], found["off"][1:], strict=True):
        # A grouped weight's gradient is summed in 16 bits' float32 and rounded once more.
        torch.testing.assert_close(a, b, rtol=1e-2, atol=1e-2 * float(b.abs().max()))
