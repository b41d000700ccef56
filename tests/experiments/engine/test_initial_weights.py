"""Trainings that start from weights, and what is exported from them."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from experiments.cli.command_line import run_command
from experiments.cli.strict_yaml import ConfigError
from experiments.config import load_config
from experiments.engine.initial_weights import copy_weights, load_initial_weights
from experiments.engine.trained_model import load_model as load_trained
from experiments.engine.trained_model import load_target
from experiments.export import main as export
from experiments.records.state import CheckpointError
from experiments.tasks.consistency import check_consistency
from experiments.train import main as train
from kernels.modules import GhostBatchNorm
from model.avslowfast import AVSlowFast, build_model
from model.config import ModelConfig
from model.export import load_model, save_model
from model.variants import VARIANTS

CLASSIFIER = [f"head.classifier.{name}" for name in ("audio.weight", "visual.bias", "visual.weight")]


def small(**changes: Any) -> AVSlowFast:
    """A model whose weights differ from call to call of the seed."""
    config = VARIANTS["small"].to_dict() | {"width": 8, "num_classes": 4} | changes
    return build_model(ModelConfig.from_dict(config))


def test_another_classifier_stays_as_initialised() -> None:
    torch.manual_seed(1)
    source, target = small(), small(num_classes=7)
    before = {k: v.clone() for k, v in target.state_dict().items()}
    lines = copy_weights(target, source.state_dict(), "x")
    assert lines[1:] == [f"  as initialised: {name}" for name in CLASSIFIER]
    for name, value in target.state_dict().items():
        expected = before[name] if name.startswith("head.classifier") else source.state_dict()[name]
        assert torch.equal(value, expected), name


def test_parts_that_only_the_source_has_are_named() -> None:
    source, target = small(sync_loss="contrastive"), small()
    lines = copy_weights(target, source.state_dict(), "x")
    assert lines[0].startswith("starting from x: ")
    assert "not used" in lines[-1]
    assert "synchronization" in lines[-1]


def test_classifier_of_other_classes_is_not_taken_over(tmp_path: Path) -> None:
    torch.manual_seed(1)
    source, target = small(), small()
    before = {k: v.clone() for k, v in target.state_dict().items()}
    save_model(source, tmp_path)
    facts = tmp_path / "inputs.json"
    facts.write_text('{"class_names": ["a", "b", "c", "d"]}')
    lines = load_initial_weights(target, tmp_path, ("a", "b", "c", "e"))
    assert lines[1:] == [
        "  the classifier starts afresh, the classes are others: 1 of 4 differ: class 3 is 'e', not 'd'",
        *[f"  as initialised: {name}" for name in CLASSIFIER],
    ]
    for name, value in target.state_dict().items():
        assert torch.equal(value, before[name] if name in CLASSIFIER else source.state_dict()[name]), name
    assert len(load_initial_weights(target, tmp_path, ("a", "b", "c", "d"))) == 1
    facts.unlink()  # unknown classes: the shape decides
    assert len(load_initial_weights(target, tmp_path, ("a", "b", "c", "e"))) == 1


@pytest.mark.parametrize("changes", [{"width": 16}, {"depth": 26}, {"pathways": ["slow", "fast"], "fusion": "none"}])
def test_another_model_is_refused_and_nothing_changes(changes: dict[str, Any]) -> None:
    target = small()
    before = {k: v.clone() for k, v in target.state_dict().items()}
    if "pathways" in changes:
        source = small(**changes, lateral_stages=[], fusion_stages=[])  # lacks what the target needs
    else:
        source = small(**changes)
        if changes == {"depth": 26}:
            source, target = target, source
            before = {k: v.clone() for k, v in target.state_dict().items()}
    with pytest.raises(CheckpointError, match=r"train.init_from \(x\) is of another model"):
        copy_weights(target, source.state_dict(), "x")
    assert all(torch.equal(v, before[k]) for k, v in target.state_dict().items())


def test_exported_folder_and_wrong_paths(tmp_path: Path) -> None:
    source, target = small(), small()
    save_model(source, tmp_path / "m")
    load_initial_weights(target, tmp_path / "m")
    assert all(torch.equal(v, source.state_dict()[k]) for k, v in target.state_dict().items())
    for path in (tmp_path / "none", tmp_path / "m" / "config.json"):
        with pytest.raises(CheckpointError, match="must be a run folder"):
            load_initial_weights(target, path)


def test_weights_of_an_export_do_not_choose_the_backend(tmp_path: Path) -> None:
    save_model(small(), tmp_path)
    target = small(backend="reference")
    load_initial_weights(target, tmp_path)
    assert {m.backend for m in target.modules() if isinstance(m, GhostBatchNorm)} == {"reference"}


def test_linear_probe_must_start_from_weights(write_config: Callable[..., Path]) -> None:
    config = load_config(write_config(), ["model.freeze=backbone"])
    with pytest.raises(ConfigError, match=r"train.init_from \(''\) must name trained weights"):
        check_consistency(config)
    check_consistency(load_config(write_config(), ["model.freeze=backbone", "train.init_from=x"]))


@pytest.mark.integration
def test_probe_trains_the_classifier_only_and_continues_without_its_source(
    write_config: Callable[..., Path], tmp_path: Path, capsys: Any
) -> None:
    assert run_command(train, [str(write_config()), "train.steps=2"]) == 0
    source = tmp_path / "runs" / "tiny"
    probe = [str(write_config("probe")), "model.freeze=backbone", f"train.init_from={source}"]
    assert run_command(train, probe) == 0
    assert "tensors loaded" in (tmp_path / "runs" / "probe" / "log.txt").read_text()
    old, new = (load_trained(*load_target(p, "best", []), torch.device("cpu")).state_dict() for p in (
        source, tmp_path / "runs" / "probe"
    ))  # fmt: skip
    changed = sorted(k for k in old if not torch.equal(old[k], new[k]))
    assert changed == CLASSIFIER
    source.rename(tmp_path / "runs" / "gone")
    assert run_command(train, probe) == 0  # finished: nothing to load
    assert run_command(train, [*probe, "name=again"]) == 2
    assert "must be a run folder, a checkpoint folder" in capsys.readouterr().err
    assert not (tmp_path / "runs" / "again").exists()


@pytest.mark.integration
def test_export_command(
    write_config: Callable[..., Path], tmp_path: Path, capsys: Any, recwarn: pytest.WarningsRecorder
) -> None:
    assert run_command(train, [str(write_config()), "train.steps=2"]) == 0
    run, weights, program = tmp_path / "runs" / "tiny", tmp_path / "w", tmp_path / "p"
    assert run_command(export, [str(run), "--out", str(weights)]) == 0
    trained = load_trained(*load_target(run, "best", []), torch.device("cpu"))
    loaded = load_model(weights)
    assert {path.stat().st_mode for path in weights.iterdir()} == {(tmp_path / "tiny.yaml").stat().st_mode}
    facts = json.loads((weights / "inputs.json").read_text())
    assert facts["class_names"] == [f"class_{i}" for i in range(4)]
    shapes = [[2 if n == "batch" else n for n in facts["inputs"][name]["shape"]] for name in ("frames", "log_mel")]
    frames, log_mel = (torch.randn(shape) for shape in shapes)
    frames = frames.contiguous(memory_format=torch.channels_last_3d)
    assert run_command(export, [str(run), "--out", str(program), "--format", "program"]) == 0
    assert not [w for w in recwarn if "complete tensor" in str(w.message)]
    exported = torch.export.load(program / "model.pt2").module()
    with torch.inference_mode():
        expected = trained(frames, log_mel).scores
        assert torch.equal(loaded(frames, log_mel).scores, expected)
        torch.testing.assert_close(exported(frames, log_mel), expected, rtol=1e-4, atol=1e-5)
    capsys.readouterr()
    assert run_command(export, [str(run), "--out", str(weights)]) == 2
    assert "must be absent or an empty folder" in capsys.readouterr().err


def test_a_folder_without_weights_is_named_with_what_it_holds(tmp_path: Path) -> None:
    def said() -> str:
        with pytest.raises(CheckpointError) as caught:
            load_initial_weights(None, tmp_path)  # type: ignore[arg-type]
        return str(caught.value)

    expected = (
        f"train.init_from ({tmp_path}) must be a run folder (with checkpoints/), a checkpoint folder (with "
        "manifest.json) or a folder that experiments.export wrote (with config.json), but "
    )
    assert said() == expected + "is empty; train first, or name a checkpoint folder"
    for name in "abcdefg":
        (tmp_path / f"{name}.mp4").touch()
    assert said().startswith(expected + "holds a.mp4, b.mp4, c.mp4, d.mp4, e.mp4 and 2 more; train first")
    (tmp_path / "x.pkl").touch()
    assert said().endswith(f". For released weights name the file: {tmp_path / 'x.pkl'}")
    (tmp_path / "checkpoints").mkdir()
    assert said().endswith(". It is a run that has saved no checkpoint: continue it first, or name another one")
