"""Batches that no memory holds are refused with numbers before the start."""

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from experiments.cli.command_line import run_command
from experiments.engine import memory
from experiments.engine.memory import BatchMemoryError, available_bytes, batch_bytes, require_memory
from experiments.train import main
from pipeline.clip import ClipSpec
from pipeline.config import DataConfig
from pipeline.loader import LoaderOptions

SPEC = ClipSpec(
    num_frames=32, frame_stride=2, num_mel_frames=128, num_mel_bins=80
)  # one clip: 3 * 32 * 224 * 224 numbers and 128 * 80 of log-mel
FRAMES, LOG_MEL = 4_816_896, 10_240


def test_bytes_by_hand() -> None:
    half = LoaderOptions(clips_per_batch=8, dtype=torch.float16)
    assert batch_bytes(SPEC, 224, half, with_negative=False) == 8 * (2 * FRAMES + 4 * LOG_MEL)
    assert batch_bytes(SPEC, 224, half, with_negative=True) == 8 * (2 * FRAMES + 8 * LOG_MEL)
    assert batch_bytes(SPEC, 224, LoaderOptions(clips_per_batch=1), with_negative=False) == 4 * FRAMES + 4 * LOG_MEL
    padded = LoaderOptions(clips_per_batch=1, pad_channels=True)
    assert batch_bytes(SPEC, 224, padded, with_negative=False) == 4 * 4 * FRAMES // 3 + 4 * LOG_MEL
    only_audio = LoaderOptions(clips_per_batch=2, want_video=False)
    assert batch_bytes(SPEC, 224, only_audio, with_negative=False) == 8 * LOG_MEL


def test_batch_in_use_and_those_ahead_must_be_less(monkeypatch: pytest.MonkeyPatch) -> None:
    options, config = LoaderOptions(clips_per_batch=2), DataConfig(prefetch_batches=4)
    whole = 5 * batch_bytes(SPEC, 224, options, with_negative=False)
    monkeypatch.setattr(memory, "available_bytes", lambda device: whole + 1)
    require_memory("k", SPEC, 224, config, options)
    monkeypatch.setattr(memory, "available_bytes", lambda device: whole)
    message = r"batches of k \(2 clips a process, 0.04 GiB\) x 5 .* = 0.18 GiB must be less than .*; lower k"
    with pytest.raises(BatchMemoryError, match=message):
        require_memory("k", SPEC, 224, config, options)


@pytest.mark.parametrize(
    ("own", "folder", "name"),
    [
        ("4:memory:/job/7\n1:cpu:/\n", "memory/job", "memory.limit_in_bytes"),
        ("4:cpu,memory:/job\n", "memory", "memory.limit_in_bytes"),
        ("0::/job/7\n", "job/7", "memory.max"),
        ("0::/elsewhere\n", "", "memory.max"),
    ],
)
def test_limit_of_the_control_group_counts(
    own: str, folder: str, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    monkeypatch.setattr(memory, "CGROUPS", tmp_path)
    monkeypatch.setattr(memory, "OWN_CGROUP", tmp_path / "cgroup")
    host = available_bytes(torch.device("cpu"))
    assert host > 2**28
    (tmp_path / "cgroup").write_text(own)
    (tmp_path / folder).mkdir(parents=True, exist_ok=True)
    (tmp_path / folder / name).write_text("max\n")
    assert available_bytes(torch.device("cpu")) == host
    (tmp_path / folder / name).write_text("1000000\n")
    assert available_bytes(torch.device("cpu")) == 1_000_000
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert available_bytes(torch.device("cpu")) == 250_000


def test_gpu_counts_its_own_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(total_memory=device.index))
    assert available_bytes(torch.device("cuda", 3)) == 3


@pytest.mark.integration
@pytest.mark.parametrize("key", ["train.clips_per_step", "eval.clips_per_batch"])
def test_run_is_refused_before_it_begins(
    key: str, write_config: Callable[..., Path], tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(memory, "available_bytes", lambda device: 2**23)  # 3 x 8 clips take less, 3 x 16 more
    given = "train.clips_per_step=1000000" if key.startswith("train") else "eval.clips_per_batch=1000000"
    assert run_command(main, [str(write_config()), given]) == 2
    clips = 1_000_000 if key.startswith("train") else 16  # an evaluation has no more
    assert f"error: batches of {key} ({clips} clips a process, " in capsys.readouterr().err
    assert not (tmp_path / "runs").exists()
