"""MLflow's page: a taken port is an error with the next free one, the address opens on the runs."""

import socket
import sqlite3
from pathlib import Path

import pytest

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
    assert runs_page(f"sqlite:///{tmp_path / 'mlflow.db'}") == "#/experiments/7/runs"
    assert runs_page(f"sqlite:///{tmp_path / 'missing.db'}") == ""
    assert runs_page("http://somewhere:5000") == ""
