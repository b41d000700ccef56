"""Commands whose standard streams are closed or read by nobody: they work, and leave their reason in the folder."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from experiments.cli.command_line import EXIT_NO_READER, run_command
from experiments.engine import run_data
from experiments.engine.loss_window import TrainingFailure
from experiments.records.spool import read_metrics
from experiments.train import main
from tests.experiments.support.processes import ROOT

SHELL = {
    "all closed": '"$@" <&- >&- 2>&-',
    "all to a reader that has gone": '"$@" 2>&1 | head -1 >/dev/null; exit ${PIPESTATUS[0]}',
}
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}


def shell(text: str, *command: str) -> subprocess.CompletedProcess[str]:
    """Run a command of Python as a line of bash says, in which it is "$@"."""
    arguments = ["bash", "-c", text, "bash", sys.executable, *command]
    return subprocess.run(arguments, cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True, timeout=240)


@pytest.mark.integration
@pytest.mark.parametrize("how", SHELL)
def test_training_needs_nobody_who_listens(write_config: Callable[..., Path], tmp_path: Path, how: str) -> None:
    overrides = ["train.steps=2", "data.num_workers=1", "data.decoder=cpu"]
    found = shell(SHELL[how], "-m", "experiments.train", str(write_config()), *overrides)
    assert (found.returncode, found.stdout, found.stderr) == (0, "", "")
    run_dir = tmp_path / "runs" / "tiny"
    assert read_metrics(run_dir / "metrics.jsonl")["train/loss"][0] == [1, 2]
    assert "top1" in (run_dir / "log.txt").read_text()
    assert "Traceback" not in (run_dir / "log.txt").read_text()


@pytest.mark.integration
@pytest.mark.parametrize(
    ("text", "code"),
    [
        ('"$@" | head -1; exit ${PIPESTATUS[0]}', (0, EXIT_NO_READER)),  # by who is faster
        ('"$@" >&-', (0,)),
        ('"$@" 2>&-', (0,)),
    ],
)
def test_output_that_nobody_reads_is_no_error(text: str, code: tuple[int, ...]) -> None:
    found = shell(text, "-m", "experiments.train", "--keys")
    assert found.returncode in code
    assert found.stderr == ""


def test_write_without_reader_ends_quietly(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    read, write = os.pipe()
    os.close(read)

    def chatty(_: object) -> int:
        sys.stdout.write("a line\n")
        sys.stdout.flush()
        return 0

    with os.fdopen(write, "w") as output:
        monkeypatch.setattr(sys, "stdout", output)
        assert run_command(chatty, []) == EXIT_NO_READER
        output.write("led nowhere")
    assert capsys.readouterr().err == ""


def test_broken_pipe_of_something_else_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    def talks_to_a_server(_: object) -> int:
        raise BrokenPipeError(32, "Broken pipe", "a server")

    assert run_command(talks_to_a_server, []) == 2
    assert capsys.readouterr().err == "error: [Errno 32] Broken pipe: 'a server'\n"


@pytest.mark.integration
def test_reason_is_in_the_run_folder_and_once_on_stderr(
    write_config: Callable[..., Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def failing(self: object, first: int) -> object:
        raise TrainingFailure("this is the reason")

    monkeypatch.setattr(run_data.RunData, "batches", failing)
    assert run_command(main, [str(write_config())]) == 1
    assert capsys.readouterr().err.count("this is the reason") == 1
    text = (tmp_path / "runs" / "tiny" / "log.txt").read_text()
    assert text.count("ERROR this is the reason") == 1
