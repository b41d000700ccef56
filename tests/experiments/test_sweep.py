"""Sweeps: their files, two rows at toy size, interrupted and continued, and the table."""

import shlex
import signal
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest
from mlflow.tracking import MlflowClient

from experiments import sweep
from experiments.cli.command_line import run_command
from experiments.cli.strict_yaml import ConfigError
from experiments.config import resolved_yaml
from experiments.records.error_curves import error_curves
from experiments.records.group_gap import paired_gap
from experiments.records.run_folder import read_summary, write_summary
from experiments.records.spool import SPOOL_NAME, Spool
from experiments.tasks.consistency import check_consistency
from tests.experiments.support.processes import digest, final_state, fork, start, wait_for_step

WRITE = Callable[..., Path]
SWEEPS = sorted((Path(__file__).parents[2] / "experiments" / "sweeps").glob("*.yaml"))
TOYS = [path for path in SWEEPS if path.stem.endswith("_toy")]
TEXT = """\
table: toy
metrics: [top1, top5]
rows:
  - {{row: first, config: {config}, set: [name=first], paper: {{top1: 50.0, top5: 90.0, gflops: 1.5}}}}
  - {{row: second, config: {config}, set: [name=second, model.drop_pathway_rate=0.0], paper: {{top1: 60.5}}}}
  - {{row: both, note: an ensemble}}
"""


@pytest.fixture
def toy(write_config: WRITE, tmp_path: Path) -> Path:
    """Two rows of the tiny configuration and one that is not trained."""
    path = tmp_path / "toy_sweep.yaml"
    path.write_text(TEXT.format(config=write_config().name), encoding="utf-8")
    return path


@pytest.mark.parametrize("path", SWEEPS, ids=lambda path: path.stem)
def test_shipped_sweeps_name_recipes_that_load(path: Path) -> None:
    found = sweep.read_sweep(path)
    configs = sweep.configs_of(found, [])
    for config in configs.values():
        check_consistency(config)
    lines = sweep.table_lines(found, configs)
    assert len(lines) == 2 + len(found.rows)
    assert all(len(row.paper) >= 2 for row in found.rows) or path in TOYS


def test_tables_of_the_paper_are_there() -> None:
    found = [path.stem for path in SWEEPS if path not in TOYS]
    assert found == ["fig3", "table3", "table5a", "table5b", "table5c", "table5d", "table6"]


def test_gap_of_two_groups_is_that_of_their_pairs(toy: Path, tmp_path: Path, capsys: Any) -> None:
    gap = paired_gap(("a", "b"), [50.0, 60.0, 70.0], [52.0, 66.0, 71.0])
    assert gap.mean == pytest.approx(3.0)
    assert gap.margin == pytest.approx(4.303 * 7**0.5 / 3**0.5, rel=1e-3)  # differences 2, 6, 1: variance 7
    assert gap.lines("top1")[-1] == "b - a: +3.0 points, 95 % interval -3.6 to +9.6 (3 pairs)"
    text = toy.read_text(encoding="utf-8").replace("row: first,", "row: first, group: A,")
    text = text.replace("row: second,", "row: second, group: B,")
    toy.write_text(text, encoding="utf-8")
    for name, value in (("first", 0.5), ("second", 0.75)):
        (tmp_path / "runs" / name).mkdir(parents=True)
        write_summary(tmp_path / "runs" / name, {"finished": True, "top1": value})
    assert run_command(sweep.main, [str(toy), "--gap", str(tmp_path / "gap.png")]) == 2
    assert "'A' (1 runs) and 'B' (1) must have equally many finished runs" in capsys.readouterr().err
    for name, value, group in (("third", 0.25, "A"), ("fourth", 0.75, "B")):
        text += f"  - {{row: {name}, group: {group}, config: tiny.yaml, set: [name={name}]}}\n"
        (tmp_path / "runs" / name).mkdir(parents=True)
        write_summary(tmp_path / "runs" / name, {"finished": True, "top1": value})
    toy.write_text(text, encoding="utf-8")
    assert run_command(sweep.main, [str(toy), "--gap", str(tmp_path / "gap.png")]) == 0
    out = capsys.readouterr().out
    assert "A: top1 37.5 % on average of 50.0, 25.0" in out
    assert "B - A: +37.5 points" in out
    assert (tmp_path / "gap.png").stat().st_size > 5000


def test_a_row_that_was_trained_with_other_settings_is_not_taken_for_this_one(
    toy: Path, tmp_path: Path, capsys: Any
) -> None:
    old, new = (["model.num_classes=0", f"optim.lr={lr}"] for lr in (0.125, 0.25))
    for name, config in sweep.configs_of(sweep.read_sweep(toy), old).items():
        config.run_dir.mkdir(parents=True)
        seen = replace(config, model=replace(config.model, num_classes=2))  # a run holds the number of the data
        (config.run_dir / "config.yaml").write_text(resolved_yaml(seen), encoding="utf-8")
        write_summary(config.run_dir, {"finished": True, "top1": 0.5, "name": name})
    assert run_command(sweep.main, [str(toy), *old]) == 0
    assert capsys.readouterr().out.count("finished before") == 2
    for arguments in (new, [*new, "--commands"]):
        assert run_command(sweep.main, [str(toy), *arguments]) == 2
        error = capsys.readouterr().err
        assert (
            f"row 'first' is finished in {tmp_path / 'runs' / 'first'} with other settings (optim.lr: 0.125 -> 0.25)"
            in error
        )
        assert "train.fresh=true to move that run aside" in error
    assert run_command(sweep.main, [str(toy), *new, "--table"]) == 0
    (line,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("first")]
    assert line.endswith("trained with other settings (optim.lr: 0.125 -> 0.25)")
    assert run_command(sweep.main, [str(toy), *new, "train.fresh=true", "--commands"]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 2


@pytest.mark.integration
def test_stop_signal_ends_the_row_in_order(toy: Path, tmp_path: Path) -> None:
    process = start(["-m", "experiments.sweep", str(toy), "train.steps=300", "checkpoint.interval_steps=0"])
    wait_for_step(process, tmp_path / "runs" / "first", 1)
    process.send_signal(signal.SIGTERM)
    output = process.communicate(timeout=120)[0]
    assert process.returncode == sweep.EXIT_STOPPED, output[-2000:]
    (line,) = [line for line in output.splitlines() if line.startswith("first")]
    assert "stopped at step" in line
    assert not (tmp_path / "runs" / "second").exists()


def run_forked(command: Sequence[str], environment: dict[str, str]) -> int | None:
    """Run a row as the sweep does, but forked."""
    process = fork(command[2], command[3:], **environment)
    process.communicate(timeout=240)
    return process.returncode


@pytest.mark.integration
def test_sweep_that_was_killed_goes_on_and_prints_the_table(
    toy: Path, tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs = tmp_path / "runs"
    overrides = ["tracking.backend=mlflow"]
    process = start(["-m", "experiments.sweep", str(toy), *overrides])
    wait_for_step(process, runs / "second", 1)  # the first row is finished by then
    both = [psutil.Process(process.pid), *psutil.Process(process.pid).children()]
    for one in both:  # the sweep and its row
        one.kill()
    process.communicate()
    assert psutil.wait_procs(both[1:], timeout=120)[1] == []
    first = digest(final_state(runs / "first"))
    changed = (runs / "first" / "summary.json").stat().st_mtime_ns
    monkeypatch.setattr(sweep, "_run", run_forked)
    assert run_command(sweep.main, [str(toy), *overrides]) == 0
    assert read_summary(runs / "second")["finished"]
    capsys.readouterr()
    assert run_command(sweep.main, [str(toy), *overrides]) == 0
    text = capsys.readouterr().out
    assert text.count("finished before") == 2
    assert digest(final_state(runs / "first")) == first
    assert (runs / "first" / "summary.json").stat().st_mtime_ns == changed
    top1 = f"{100 * read_summary(runs / 'second')['top1']:.1f}"
    (line,) = [line for line in text.splitlines() if line.startswith("second")]
    assert line.split()[1:3] == [top1, "60.5"]
    (line,) = [line for line in text.splitlines() if line.startswith("both")]
    assert line.endswith("not trained; an ensemble")
    client = MlflowClient(f"sqlite:///{(runs / 'mlflow.db').resolve()}")
    experiment = client.get_experiment_by_name("avslowfast")
    assert experiment is not None
    found = {run.info.run_name: run for run in client.search_runs([experiment.experiment_id])}
    assert set(found) == {"sweep toy_sweep", "first", "second"}
    parent = found["sweep toy_sweep"].info.run_id
    assert {found[name].data.tags["mlflow.parentRunId"] for name in ("first", "second")} == {parent}


def test_curves_are_drawn_from_run_folders(toy: Path, tmp_path: Path, capsys: Any) -> None:
    folder = tmp_path / "runs" / "first"
    folder.mkdir(parents=True)
    spool = Spool(folder / SPOOL_NAME)
    for step in (2, 4):
        spool.metrics(step, {"train/epoch": step / 2, "train/top1": step / 10, "val/top1": 0.25})
    spool.close()
    curves = error_curves(folder)
    assert curves["training"][0] == [1.0, 2.0]
    assert curves["training"][1] == pytest.approx([80.0, 60.0])
    assert curves["validation"] == ([1.0, 2.0], [75.0, 75.0])
    spool = Spool(folder / SPOOL_NAME)
    spool.metrics(4, {"train_eval/top1": 0.5})
    spool.close()
    assert error_curves(folder)["training"] == ([2.0], [50.0])  # the mode of validation goes before that of the steps
    assert run_command(sweep.main, [str(toy), "--curves", str(tmp_path / "fig.png")]) == 0
    assert "no metrics of: second" in capsys.readouterr().out
    assert (tmp_path / "fig.png").stat().st_size > 5000


def test_rows_as_commands(toy: Path, capsys: Any) -> None:
    assert run_command(sweep.main, [str(toy), "--commands", "train.steps=3"]) == 0
    lines = [shlex.split(line) for line in capsys.readouterr().out.splitlines()]
    assert [line[:3] for line in lines] == [["python", "-m", "experiments.train"]] * 2
    assert [line[4:] for line in lines] == [
        ["name=first", "train.steps=3"],
        ["name=second", "model.drop_pathway_rate=0.0", "train.steps=3"],
    ]


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("row: second", "row: first", "row 'first' comes twice"),
        ("set: [name=second, ", "set: [name=first, ", "must have run folders of their own"),
        ("paper: {top1: 60.5}", "paper: {top2: 60.5}", "must give numbers for top1, top5 or gflops"),
        ("note: an", "remark: an", "row 3: unknown remark"),
        ("metrics: [top1, top5]", "metrics: []", "metrics must be a list with at least one entry"),
        ("config: tiny.yaml", "config: none.yaml", "config (none.yaml) must be a file"),
        ("table: toy", "table: [", "must be YAML"),
    ],
)
def test_mistakes_are_named(toy: Path, old: str, new: str, message: str) -> None:
    text = toy.read_text(encoding="utf-8")
    assert old in text
    toy.write_text(text.replace(old, new, 1), encoding="utf-8")
    with pytest.raises(ConfigError) as caught:
        sweep.configs_of(sweep.read_sweep(toy), [])
    assert message in str(caught.value)
