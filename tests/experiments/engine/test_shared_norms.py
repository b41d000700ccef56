"""BN groups over ranks: which ranks form them, and that two ranks are one process with all clips."""

from collections.abc import Callable
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from experiments.cli.strict_yaml import ConfigError
from experiments.config import Config, load_config
from experiments.engine import graph_rules
from experiments.engine.data import DataSetupError
from experiments.engine.graph_rules import GraphError, graph_obstacle
from experiments.engine.replicas import SharedStatistics, data_parallel
from experiments.engine.shared_norms import ranks_per_group, share_norms
from experiments.runtime import Runtime
from experiments.tasks.consistency import check_consistency
from kernels.precise_bn import precise_bn
from model.avslowfast import build_model
from tests.experiments.support.forked import call_on_ranks

SYNC = "model.sync_batch_norm=true"
CLIPS = 4
MODEL = [
    "model.sync_loss=contrastive",
    "data.negatives=easy",
    "model.dropout_rate=0.0",
    f"train.clips_per_step={CLIPS}",
]
SOUND = torch.tensor([True, False, True, True])  # rank 0's second clip has none
OTHER = torch.tensor([True, True, True, False])
WRITE = Callable[..., Path]


@pytest.mark.parametrize(
    ("clips", "ranks", "expected"),
    [(8, 8, 8), (16, 8, 4), (32, 16, 4), (8, 1, 1), (64, 8, 1), (128, 8, 1), (6, 3, 3), (24, 3, 1)],
)
def test_neighbours_form_groups_where_a_rank_has_fewer_clips(
    write_config: WRITE, clips: int, ranks: int, expected: int
) -> None:
    config = load_config(write_config(), [SYNC, f"train.clips_per_step={clips}"])
    assert ranks_per_group(config, ranks) == expected
    assert ranks_per_group(load_config(write_config(), [f"train.clips_per_step={clips}"]), ranks) == 1
    assert ranks_per_group(load_config(write_config(), [SYNC, "model.freeze=bn"]), 2) == 1


@pytest.mark.parametrize(("clips", "ranks", "fitting"), [(12, 4, 8), (12, 6, 24)])
def test_ranks_that_make_no_whole_groups_are_refused(write_config: WRITE, clips: int, ranks: int, fitting: int) -> None:
    config = load_config(write_config(), [SYNC, f"train.clips_per_step={clips}"])
    with pytest.raises(DataSetupError, match=rf"{ranks} ranks of {clips // ranks} clips must make .*={fitting}, "):
        ranks_per_group(config, ranks)
    assert ranks_per_group(load_config(write_config(), [SYNC, f"train.clips_per_step={fitting}"]), ranks) > 1


def test_what_cannot_be_is_said(write_config: WRITE, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match="must have runtime"):
        check_consistency(load_config(write_config(), [SYNC, "runtime.compile=true"]))
    gpu = Runtime(0, 2, 0, torch.device("cuda"))
    monkeypatch.setattr(graph_rules.dist, "get_backend", lambda: "nccl")
    assert graph_obstacle(load_config(write_config()), gpu) == ""
    assert "ranks meet inside every normalisation" in graph_obstacle(load_config(write_config(), [SYNC]), gpu)
    with pytest.raises(GraphError, match="ranks meet inside every normalisation"):
        graph_obstacle(load_config(write_config(), [SYNC, "runtime.cuda_graph=on"]), gpu)
    config = load_config(write_config(), [SYNC])
    alone = Runtime(0, 1, 0, torch.device("cpu"))
    assert share_norms(build_model(config.model), config, alone).endswith("changes nothing: there is one process")


def given(config: Config, rows: slice) -> tuple[list[Tensor], dict[str, Tensor]]:
    """Inputs of some of the clips, which differ much from clip to clip."""
    model, rng = config.model, torch.Generator().manual_seed(1)
    scale = torch.arange(1.0, CLIPS + 1)[:, None, None, None]
    shape = (CLIPS, 1, model.num_mel_frames, model.num_mel_bins)
    frames = torch.randn(CLIPS, 3, model.num_fast_frames, 32, 32, generator=rng) * scale[..., None]
    sounds = [torch.randn(shape, generator=rng) * scale + scale for _ in range(2)]
    frames = frames[rows].contiguous(memory_format=torch.channels_last_3d)
    heard, other = (s * there[:, None, None, None] for s, there in zip(sounds, (SOUND, OTHER), strict=True))
    return [frames, heard[rows]], {
        "negative_log_mel": other[rows], "has_audio": SOUND[rows], "has_negative": OTHER[rows],
    }  # fmt: skip


def take_step(module: Any, model: torch.nn.Module, config: Config, rows: slice) -> dict[str, Tensor]:
    """Logits, gradients, running statistics of a step, then exact statistics of the same clips."""
    arguments, options = given(config, rows)
    out = module(*arguments, **options)
    pairs = SOUND & OTHER
    weight = pairs[rows].sum() / pairs.sum() * CLIPS / len(pairs[rows])  # as `weights_by_count` gives it
    (out.logits.square().mean() + weight * out.sync_loss).backward()
    found = {f"gradient {n}": p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    found |= {"logits": out.logits.detach(), **{n: b.clone() for n, b in model.named_buffers()}}
    precise_bn(model, [(*arguments, options["has_audio"])], lambda f, a, s: model(f, a, has_audio=s))
    return found | {f"precise {n}": b.clone() for n, b in model.named_buffers() if "running" in n}


def one_of_two(rank: int, folder: str, path: Path) -> None:
    torch.set_num_threads(1)
    store = dist.FileStore(f"{folder}/store", 2)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=2, timeout=timedelta(seconds=120))
    config, runtime = load_config(path, [SYNC, *MODEL]), Runtime(rank, 2, rank, torch.device("cpu"))
    torch.manual_seed(0)
    model = build_model(config.model)
    said = share_norms(model, config, runtime)
    module = data_parallel(model, runtime, find_unused_parameters=True)
    found = take_step(module, model, config, slice(2 * rank, 2 * rank + 2))
    SharedStatistics(model, runtime).synchronize()
    torch.save({"said": said, **found}, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.integration
def test_two_ranks_are_one_process_with_all_clips(write_config: WRITE, tmp_path: Path) -> None:
    """With clips that have no sound or no negative: their stand-ins come from the other rank."""
    path = write_config()
    call_on_ranks(partial(one_of_two, path=path), str(tmp_path))
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1))
    config = load_config(path, MODEL)
    torch.manual_seed(0)
    model = build_model(config.model)
    whole = take_step(model, model, config, slice(0, CLIPS))
    assert first.pop("said") == second.pop("said") == "SyncBN: 2 ranks of 2 clips form a BN group"
    torch.testing.assert_close(torch.cat([first.pop("logits"), second.pop("logits")]), whole.pop("logits"))
    assert first.keys() == second.keys() == whole.keys()
    for name, value in whole.items():
        assert torch.equal(first[name], second[name]), name
        scale = float(value.float().abs().max())
        torch.testing.assert_close(first[name], value, rtol=1e-3, atol=1e-4 * scale, msg=lambda m, n=name: f"{n}: {m}")
