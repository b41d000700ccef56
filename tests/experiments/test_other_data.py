"""A model on data that is not its own: other classes are refused, other samples get a report of their own."""

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from experiments.cli.command_line import run_command
from experiments.config import Config
from experiments.engine.data import DataSetupError, name_differences, require_same_classes
from experiments.engine.evaluation import OutputError, check_output, report_folder
from experiments.evaluate import main as evaluate_main
from experiments.records.checkpoint import Checkpoint
from experiments.train import main
from pipeline.config import ViewConfig
from pipeline.store.format import parse_info
from pipeline.synthetic import SyntheticSpec, make_store


def test_names_are_compared_in_order() -> None:
    assert name_differences(("a", "b"), ["a", "b"]) == ""
    assert name_differences(("a", "b"), ("a", "b", "c")) == "2 classes, not 3"
    assert name_differences(("b", "a"), ("a", "b")) == "2 of 2 differ: class 0 is 'b', not 'a', class 1 is 'a', not 'b'"
    assert name_differences("abcdef", "ghijkf").endswith("class 2 is 'c', not 'i', ...")
    require_same_classes(Config(), ("a",), ["a"], "x")
    require_same_classes(Config(), ("a",), (), "x")  # a checkpoint that does not say
    with pytest.raises(DataSetupError, match=r"must be those that x was trained with \(1 of 1 differ: class 0 is 'a'"):
        require_same_classes(Config(), ("a",), ["b"], "x")


def test_report_about_other_data_stays(tmp_path: Path) -> None:
    checkpoint = Checkpoint(tmp_path / "checkpoints" / "best", 20, b"", "")
    own = report_folder(checkpoint, "val", ViewConfig())
    assert report_folder(checkpoint, "val", ViewConfig(), foreign="0123456789").name == f"{own.name}-data-01234567"
    own.mkdir(parents=True)
    check_output(own, "aaa")
    (own / "report.json").write_text('{"data_fingerprint": "aaa"}')
    check_output(own, "aaa")
    with pytest.raises(OutputError, match=r"must not hold a report about other data \(fingerprint aaa, now bbb\)"):
        check_output(own, "bbb")
    with pytest.raises(OutputError, match=r"must lie in a writable folder, /.*/report\.json is not; choose another"):
        check_output(own / "report.json" / "r", "aaa")  # said before the scoring, not after it


@pytest.mark.integration
def test_evaluate_command(write_config: Callable[..., Path], tmp_path: Path, capsys: Any) -> None:
    assert run_command(main, [str(write_config()), "train.steps=2"]) == 0
    run_dir, other, renamed = tmp_path / "runs" / "tiny", tmp_path / "other", tmp_path / "renamed"
    for path in (other, renamed):
        make_store(path, SyntheticSpec(num_classes=4, train_streams=4, val_streams=4, size_px=32, seed=5))
    before = (run_dir / "config.yaml").read_text()
    assert run_command(main, [str(write_config()), "train.steps=2", f"data.path={other}"]) == 2
    assert "was trained on other data" in capsys.readouterr().err
    assert (run_dir / "config.yaml").read_text() == before  # an evaluation would take the other data for its own
    assert run_command(main, [str(write_config()), "train.steps=2", "eval.clips_per_batch=3"]) == 0
    assert "clips_per_batch: 3" in (run_dir / "config.yaml").read_text()
    file = renamed / "store.json"
    classes = {"action": ("class_0", "class_1", "cooking", "class_3")}
    file.write_bytes(dataclasses.replace(parse_info(file.read_bytes(), file), classes=classes).to_bytes())
    assert run_command(evaluate_main, [str(run_dir)]) == 0
    own = (run_dir / "evaluations" / "val-step2-1x1x32px" / "report.json").read_text()
    assert run_command(evaluate_main, [str(run_dir), f"data.path={other}"]) == 0
    capsys.readouterr()
    assert run_command(evaluate_main, [str(run_dir), f"data.path={renamed}"]) == 2
    assert "(1 of 4 differ: class 2 is 'cooking', not 'class_2'); evaluate on data" in capsys.readouterr().err
    first, second = sorted((run_dir / "evaluations").iterdir())
    assert (first / "report.json").read_text() == own
    report = json.loads((second / "report.json").read_text())
    assert second.name == f"val-step2-1x1x32px-data-{report['data_fingerprint'][:8]}"
    assert report["data_path"] == str(other)
    assert run_command(evaluate_main, [str(run_dir), "--output", str(second)]) == 2
    assert "must not hold a report about other data" in capsys.readouterr().err
    start = [str(write_config("next")), "train.steps=2", f"train.init_from={run_dir}"]
    for name, path, kept in (("same", other, True), ("others", renamed, False)):
        assert run_command(main, [*start, f"name={name}", f"data.path={path}"]) == 0
        text = (tmp_path / "runs" / name / "log.txt").read_text()
        assert ("the classifier starts afresh" in text, "as initialised: head.classifier" in text) == (not kept,) * 2
