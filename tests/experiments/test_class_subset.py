"""eval.class_subset: only the classes of a list can be predicted, exactly as with logits of -inf."""

import contextlib
import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from experiments.cli.command_line import run_command
from experiments.cli.strict_yaml import ConfigError
from experiments.config import Config, load_config
from experiments.engine.data import DataSetupError, class_subset
from experiments.engine.scoring import ClassSubset, evaluate
from experiments.evaluate import main as evaluate_main
from experiments.records.run_folder import read_evaluations
from experiments.runtime import Runtime
from experiments.tasks import make_task
from experiments.tasks.consistency import check_consistency
from experiments.train import main
from model.config import ModelConfig
from model.heads import PooledHead
from model.output import ModelOutput

CLASSES = {"action": ("a", "b", "c"), "few": ("a", "c"), "other": ("x",)}


def with_subset(name: str) -> Config:
    """The defaults with one key."""
    return Config(eval=type(Config().eval)(class_subset=name))


def test_lists_of_the_data_only() -> None:
    data: Any = SimpleNamespace(classes=CLASSES)
    assert class_subset(with_subset(""), data) is None
    assert class_subset(with_subset("few"), data) == ClassSubset("few", (True, False, True))
    with pytest.raises(DataSetupError, match=r"eval.class_subset \(none\) must be one of the class lists action, few"):
        class_subset(with_subset("none"), data)
    with pytest.raises(DataSetupError, match="1 are none, the first is 'x'"):
        class_subset(with_subset("other"), data)


class OneHead(nn.Module):
    """A classifier with several positions, as in the model."""

    def __init__(self) -> None:
        super().__init__()
        config = ModelConfig(pathways=("slow", "fast"), fusion="none", num_classes=3, width=16, pool_window=1)
        self.head = PooledHead(config, 3)

    def forward(self, frames: torch.Tensor, log_mel: torch.Tensor | None) -> ModelOutput:
        return ModelOutput(self.head([frames], None, None), "logits" if self.training else "scores")


def test_scores_are_the_softmax_over_the_subset() -> None:
    torch.manual_seed(3)
    model = OneHead()
    channels = model.head.classifier.visual.in_features  # type: ignore[union-attr]
    frames = 4 * torch.randn(6, channels, 2, 3, 3)
    labels = torch.tensor([0, 1, 2, 0, 1, 2])
    batch = SimpleNamespace(
        frames=frames, log_mel=None, sample=torch.arange(6), labels=labels, has_audio=torch.ones(6, dtype=torch.bool),
        ids=list("abcdef"), view=torch.zeros(6, dtype=torch.int64),
    )  # fmt: skip
    loader: Any = SimpleNamespace(
        plan=SimpleNamespace(num_positions=6),
        stats=SimpleNamespace(yielded=6, quarantined=0),
        quarantine=[],
        batches=lambda: iter([batch]),
    )
    accumulator: Any = make_task("classification", CLASSES["action"]).accumulator(6, 1)
    runtime = Runtime(0, 1, 0, torch.device("cpu"))
    subset = ClassSubset("few", (True, False, True))
    report = evaluate(model, accumulator, loader, runtime, contextlib.nullcontext(), subset=subset)
    assert report is not None
    assert "only the 2 classes of few could be predicted" in report.notes
    with torch.no_grad():
        logits = model.head.classifier.eval()(frames.mean(2).permute(0, 2, 3, 1), None)
        expected = torch.zeros(6, 3)
        expected[:, [0, 2]] = logits[..., [0, 2]].softmax(-1).mean((1, 2))
        assert torch.allclose(accumulator.sums.scores.float(), expected, atol=1e-6)
        assert float(model.eval()(frames, None).scores[:, 1].min()) > 0  # nothing is left behind
    right = (expected.argmax(1) == labels) & (labels != 1)
    assert report.metrics["top1"] == pytest.approx(float(right.float().mean()))


def test_only_for_single_labels(write_config: Callable[..., Path]) -> None:
    config = load_config(
        write_config(),
        ["train.task=multilabel", "data.label_kind=timed", "model.head=sigmoid", "eval.class_subset=action"],
    )
    with pytest.raises(ConfigError, match=r"eval.class_subset \(action\) must be empty for train.task=multilabel"):
        check_consistency(config)


@pytest.mark.integration
def test_evaluate_command(write_config: Callable[..., Path], tmp_path: Path, capsys: Any) -> None:
    assert run_command(main, [str(write_config()), "train.steps=2"]) == 0
    run_dir = tmp_path / "runs" / "tiny"
    assert run_command(evaluate_main, [str(run_dir), "eval.class_subset=action"]) == 0
    assert "note: only the 4 classes of action could be predicted" in capsys.readouterr().out
    report = json.loads((run_dir / "evaluations" / "val-step2-1x1x32px-action" / "report.json").read_text())
    assert report["metrics"] == read_evaluations(run_dir)[2]
    assert report["class_subset"] == "action"
    assert run_command(evaluate_main, [str(run_dir), "eval.class_subset=sounds"]) == 2
    assert "eval.class_subset (sounds) must be one of the class lists action" in capsys.readouterr().err
