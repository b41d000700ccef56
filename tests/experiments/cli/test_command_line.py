"""How commands end."""

import re
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pytest

from experiments.cli.command_line import run_command
from pipeline.workers.pool import WorkerError
from pipeline.workers.ring import RingMemoryError


def test_interrupt_while_importing_shows_no_traceback(tmp_path: Path) -> None:
    output = f"output_dir={tmp_path}"
    command = [sys.executable, "-m", "experiments.train", "experiments/configs/quickstart.yaml", output]
    # A shell's background jobs, and what they start, ignore Ctrl-C.
    heeding = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, preexec_fn=heeding) as process:
        maps = Path(f"/proc/{process.pid}/maps")
        while process.poll() is None and "libtorch" not in maps.read_text():
            time.sleep(0.002)
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=60)
    assert process.returncode == -signal.SIGINT
    assert errors == ""


def test_interrupt_of_a_command_is_one_word(capsys: pytest.CaptureFixture[str]) -> None:
    def interrupted(_: object) -> int:
        signal.raise_signal(signal.SIGINT)
        return 0

    before = signal.signal(signal.SIGINT, signal.SIG_DFL)  # as experiments/__init__.py leaves it
    try:
        assert run_command(interrupted, []) == 130
    finally:
        signal.signal(signal.SIGINT, before)
    assert capsys.readouterr().err == "interrupted\n"


@pytest.mark.parametrize("kind", [WorkerError, RingMemoryError])
def test_what_workers_say_is_one_line(kind: type[Exception], capsys: pytest.CaptureFixture[str]) -> None:
    def failing(_: object) -> int:
        raise kind("worker processes must\nstart")

    assert run_command(failing, []) == 1
    assert capsys.readouterr().err == "error: worker processes must start\n"


def test_a_bug_keeps_its_traceback() -> None:
    def failing(_: object) -> int:
        raise RuntimeError("no words for a user")

    with pytest.raises(RuntimeError, match="no words"):
        run_command(failing, [])


def test_a_python_without_the_packages_says_which_one_has_them() -> None:
    command = [sys.executable, "-S", "-m", "experiments.train", "--help"]  # -S: without site-packages
    ran = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert ran.returncode == 2
    assert re.fullmatch(
        r"error: \S*python\S* must have the packages yaml, numpy, torch and has not; "
        r"(use \S+/\.venv/bin/python, or first: source \S+/\.venv/bin/activate|first: make install)\n",
        ran.stderr,
    )
