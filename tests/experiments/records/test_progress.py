"""Lines of a training: they fit a terminal, colour and live lines are for terminals only, words are everyday ones."""

import io
import logging
import sys
from pathlib import Path

import pytest

from experiments.config import load_config
from experiments.engine.run_lines import aligned, end_lines, next_commands
from experiments.records import progress as progress_module
from experiments.records.progress import BatchProgress, LiveLine, Progress, fit
from experiments.records.reporting import counts_line, result_lines
from experiments.runtime import TerminalFormatter
from experiments.tasks import Report

VALUES = {"loss": 1.9622, "sync_accuracy": 0.4345, "sync_loss": 0.8342, "top1": 0.125, "lr": 0.000625}


class Terminal(io.StringIO):
    """A stream that calls itself a terminal."""

    def isatty(self) -> bool:
        return True


def test_parts_of_the_highest_rank_go_first() -> None:
    parts = [(0, "step 1/9"), (3, "lr 0.1"), (1, "top1 50 %"), (0, "left 3s")]
    assert fit(parts, 100) == "step 1/9  lr 0.1  top1 50 %  left 3s"
    assert fit(parts, 30) == "step 1/9  top1 50 %  left 3s"
    assert fit(parts, 5) == "step 1/9  left 3s"  # what must be said is said


@pytest.mark.parametrize("total", [9, 300_000])
def test_a_step_line_fits_80_columns(total: int) -> None:
    progress = Progress(total, 0, visible=True)
    whole = progress.line(total, VALUES, 1234.5, 0.02)
    assert f"step {total}/{total}  loss 1.962  sync_accuracy 43.5 %  sync_loss 0.8342  top1 12.5 %" in whole
    short = progress.line(total, VALUES, 1234.5, 0.02, width=71)
    assert len(short) <= 71
    assert short.startswith(f"step {total}/{total}  loss 1.962  top1 12.5 %")
    assert "1234.5 clips/s" in short
    assert short.endswith("left 0s")


def test_work_on_batches_is_told_by_the_minute_or_on_a_live_line(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    now, told = [0.0], []
    monkeypatch.setattr(progress_module.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    caplog.set_level(logging.INFO)
    line = LiveLine("evaluating")
    monkeypatch.setattr(line, "say", told.append)
    for show in (BatchProgress("evaluating", line), BatchProgress("evaluating", line, visible=False)):
        for done in range(1, 8):
            now[0] += 25.0
            show(done, 10)
    assert [record.message for record in caplog.records] == [
        "evaluating: 4 of 10 batches, left 2m30s",  # 75 s for three batches: the first has the start in it
        "evaluating: 7 of 10 batches, left 1m15s",
    ]
    assert len(told) == 6
    assert told[-1] == "evaluating: 7 of 10 batches, left 1m15s"


def record(level: int, message: str, **extra: str) -> logging.LogRecord:
    """A log record with attributes of its own."""
    made = logging.LogRecord("x", level, __file__, 1, message, (), None)
    vars(made).update(extra)
    return made


def test_short_forms_and_colours_are_for_terminals(monkeypatch: pytest.MonkeyPatch) -> None:
    formatter = TerminalFormatter("%(asctime)s %(levelname)s %(message)s", "%H:%M:%S")
    step, warning = record(logging.INFO, "step 1 and more", short="step 1"), record(logging.WARNING, "odd")
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    assert formatter.format(step)[9:] == "INFO step 1 and more"
    assert formatter.format(warning)[9:] == "WARNING odd"
    monkeypatch.setattr(sys, "stderr", Terminal())
    monkeypatch.delenv("NO_COLOR", raising=False)
    assert formatter.format(step)[9:] == "step 1"
    assert formatter.format(warning).startswith("\x1b[33m")
    monkeypatch.setenv("NO_COLOR", "1")
    assert "\x1b" not in formatter.format(warning)


def test_counts_are_in_words_without_the_zeros() -> None:
    counts = {"manifest": 9, "scored": 8, "quarantined": 1, "partly_read": 0, "silent": 3, "unlabelled": 0}
    assert counts_line(counts) == "8 of 9 samples scored, 1 unreadable, 3 without sound"
    assert counts_line({"manifest": 9, "rotation_answers": 27}) == "9 samples, 27 rotation answers"


def test_the_end_names_score_place_and_three_next_commands(tmp_path: Path) -> None:
    path = tmp_path / "my run.yaml"
    path.write_text(f"name: mine\noutput_dir: {tmp_path / 'my runs'}\nmodel: {{variant: small}}\ntrain: {{steps: 9}}\n")
    config = load_config(path)
    (config.run_dir / "checkpoints" / "best").mkdir(parents=True)
    lines = end_lines(config, {"top1": 0.875}, "top1", 130.0)
    assert lines[0] == "finished    top1 87.50 %, 2m10s"
    assert lines[1].startswith(f"results     {config.run_dir}: summary.json")
    assert lines[2] == f"checkpoint  {config.run_dir / 'checkpoints' / 'best'}"
    commands = next_commands(config)
    assert [line.strip().removeprefix("next").strip() for line in lines[3:]] == commands
    assert [command.split(" -m ")[1].split()[0] for command in commands] == [
        "experiments.evaluate",
        "experiments.predict",
        "experiments.export",
    ]
    assert all(f"'{config.run_dir}'" in command for command in commands)  # a blank in the path is quoted
    assert aligned([("a", "x"), ("", "y")]) == ["a  x", "   y"]


def test_shares_of_the_classes_are_percent_as_those_of_all_are() -> None:
    table = (("0.5000", "4", "0.2500", "1.0000", "slide"), ("slide", "12", "0.0000", "0.6667", ""))
    header = ("class", "samples", "top1", "top5", "most_confused_with")
    lines = result_lines(Report({"top1": 0.0625}, "top1", header, table, {"manifest": 16, "scored": 16}))
    assert lines[0] == "top1 6.25 %"
    assert lines[-2:] == ["slide   12       0.00 %   66.67 %", "0.5000  4        25.00 %  100.00 %  slide"]
