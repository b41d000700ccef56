"""Precision figures come from layers that count, and results are merged, not overwritten."""

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor

from benchmarks import model_speed
from benchmarks.model_speed import main, merge, settle
from benchmarks.steps.inputs import autocast
from benchmarks.steps.ways import logits_of
from kernels.modules import GhostBatchNorm
from model.modes import apply_freeze
from tests.model.support.cases import PX, built, inputs, tiny


@pytest.mark.integration
@pytest.mark.parametrize("fusion", ["a_fs", "av_nonlocal"])
def test_every_norm_counts_once_settled(fusion: str) -> None:
    config = tiny(fusion=fusion, nonlocal_blocks=(0,))
    model = built(config)
    frames, log_mel = inputs(config, clips=2)

    def forward(x: Tensor | None, y: Tensor | None) -> Tensor:
        return logits_of(model(x, y))

    settle(model, forward, (PX, PX))
    apply_freeze(model, "bn_statistics")
    with torch.no_grad():
        before = forward(frames, log_mel)
        assert torch.equal(forward(frames, log_mel), before)
        for name, norm in model.named_modules():
            if not isinstance(norm, GhostBatchNorm):
                continue
            for changed in (norm.weight, norm.running_mean, norm.running_var):
                kept = changed.clone()
                changed.mul_(2).add_(0.1)
                relative = (forward(frames, log_mel) - before).norm() / before.norm()
                changed.copy_(kept)
                assert relative > 1e-4, name


def test_float16_convolutions_round_as_float16_does() -> None:
    torch.manual_seed(0)
    x, weight = torch.randn(2, 8, 6, 6), torch.randn(4, 8, 3, 3)
    with autocast("fp16"), model_speed.float16_convolutions("fp16"):
        found = torch.nn.functional.conv2d(x, weight, None, (1, 1), (1, 1))
    expected = torch.nn.functional.conv2d(x.half(), weight.half(), None, (1, 1), (1, 1))
    assert found.dtype == torch.float16
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=2e-3)
    assert torch.nn.functional.conv2d(x, weight).dtype == torch.float32


def test_merge_keeps_other_rows_and_sections(tmp_path: Path) -> None:
    path = tmp_path / "results.json"
    merge(path, "layout", {"rows": [{"variant": "a", "ratio": 1}]})
    merge(path, "views", {"rows": [{"variant": "a", "precision": "fp32", "x": 1}]})
    merge(path, "views", {"rows": [{"variant": "a", "precision": "bf16", "x": 2}]})
    merge(path, "views", {"command": "again", "rows": [{"variant": "a", "precision": "fp32", "x": 3}]})
    document = json.loads(path.read_text())
    assert document["layout"]["rows"] == [{"variant": "a", "ratio": 1}]
    assert document["views"]["command"] == "again"
    assert [(row["precision"], row["x"]) for row in document["views"]["rows"]] == [("fp32", 3), ("bf16", 2)]


@pytest.mark.integration
def test_precision_names_its_machine(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "results.json"
    main(["precision", "--px", "32", "--clips", "2", "--variants", "small", "--out", str(out)])
    about, row = (json.loads(line) for line in capsys.readouterr().out.splitlines())
    section = json.loads(out.read_text())["precision"]
    assert section["rows"] == [row]
    assert section["machine"] == about["machine"]
    assert {"cpu", "cpu_cores", "torch", "date"} <= about["machine"].keys()
    assert 1e-4 < row["fp16_relative"] < row["bf16_relative"] < 0.2
