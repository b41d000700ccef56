"""MLflow's page: a taken port is an error with the next free one, the address opens on the runs."""

import signal
import socket
import sqlite3
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from experiments import track
from experiments.track import is_taken, open_ui, runs_page


def test_a_taken_port_is_named_with_a_free_one(tmp_path: Path) -> None:
    (tmp_path / "mlflow.db").touch()
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        assert is_taken(port)
        with pytest.raises(ValueError, match=rf"--port \({port}\) must be free .*; use --port (\d+)") as caught:
            open_ui(tmp_path, "", port)
    free = int(str(caught.value).rsplit(" ", 1)[1])
    assert free > port
    assert not is_taken(free)


def test_the_page_is_that_of_the_newest_experiment(tmp_path: Path) -> None:
    with sqlite3.connect(tmp_path / "mlflow.db") as database:
        database.execute(
            "CREATE TABLE experiments (experiment_id INTEGER, lifecycle_stage TEXT, creation_time INTEGER)"
        )
        rows = [(0, "active", 1), (7, "active", 5), (8, "deleted", 9)]
        database.executemany("INSERT INTO experiments VALUES (?, ?, ?)", rows)
    assert runs_page(f"sqlite:///{tmp_path / 'mlflow.db'}") == "#/experiments/7/runs?workflowType=machine_learning"
    assert runs_page(f"sqlite:///{tmp_path / 'missing.db'}") == ""
    assert runs_page("http://somewhere:5000") == ""


class Server:
    """What `subprocess.Popen` gives; ends at once with 3."""

    def __init__(self, command: list[str], env: dict[str, str]) -> None:
        pass

    def __enter__(self) -> Any:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def wait(self) -> int:
        return 3


def test_sigterm_ends_the_server_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "mlflow.db").touch()
    ended = []

    class Waiting(Server):
        """Runs until it is ended."""

        def wait(self) -> int:
            signal.raise_signal(signal.SIGTERM)
            return 3

        def terminate(self) -> None:
            ended.append(True)

    monkeypatch.setattr(track.subprocess, "Popen", Waiting)
    monkeypatch.setattr(track, "is_taken", lambda port: False)
    before = signal.getsignal(signal.SIGTERM)
    assert open_ui(tmp_path, "", 5000) == 0
    assert ended == [True]
    assert signal.getsignal(signal.SIGTERM) == before


def test_the_page_comes_without_jobs_for_language_models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "mlflow.db").touch()
    switch = "MLFLOW_SERVER_ENABLE_JOB_EXECUTION"
    seen = []

    class Noted(Server):
        """Ends at once."""

        def __init__(self, command: list[str], env: dict[str, str]) -> None:
            seen.append(env[switch])

    monkeypatch.setattr(track.subprocess, "Popen", Noted)
    monkeypatch.setattr(track, "is_taken", lambda port: False)
    for value in ("", "true"):
        monkeypatch.setenv(switch, value) if value else monkeypatch.delenv(switch, raising=False)
        assert open_ui(tmp_path, "", 5000) == 3
    assert seen == ["false", "true"]


def test_the_page_imports_no_torch() -> None:
    code = "import sys, experiments.track; print([name for name in ('torch', 'mlflow', 'av') if name in sys.modules])"
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert ran.stdout.strip() == "[]"
