"""With the real MLflow: a server that is killed in mid-run, and the default sqlite store."""

import json
import os
import signal
import socket
import sqlite3
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from experiments.cli.command_line import run_command
from experiments.records.shipping import Shipper, TrackingRefusal
from experiments.records.spool import Spool, read_metrics
from experiments.track import main as track
from experiments.train import main

pytestmark = pytest.mark.integration


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def start_server(folder: Path, port: int) -> subprocess.Popen[bytes]:
    """Start an MLflow server and wait until it answers."""
    command = [sys.executable, "-m", "mlflow", "server", "--backend-store-uri", f"sqlite:///{folder}/server.db"]
    command += ["--artifacts-destination", str(folder / "artifacts"), "--host", "127.0.0.1", "--port", str(port)]
    command += ["--workers", "1"]
    env = {**os.environ, "MLFLOW_DISABLE_TELEMETRY": "true", "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
    server = subprocess.Popen(
        command, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True
    )
    deadline = time.monotonic() + 90
    while time.monotonic() < deadline:
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=1):
                return server
        except (urllib.error.URLError, OSError):
            assert server.poll() is None, "the server ended"
            time.sleep(0.2)
    kill(server)
    raise AssertionError("the server did not answer")


def kill(server: subprocess.Popen[bytes]) -> None:
    os.killpg(server.pid, signal.SIGKILL)
    server.wait()


def only_run(uri: str) -> Any:
    from mlflow.tracking import MlflowClient

    client = MlflowClient(tracking_uri=uri)
    experiment = client.get_experiment_by_name("avslowfast")
    assert experiment is not None
    runs = client.search_runs([experiment.experiment_id])
    assert len(runs) == 1
    return client, runs[0]


def test_sqlite_is_the_default_and_a_continued_run_is_one_run(
    write_config: Callable[..., Path], tmp_path: Path
) -> None:
    config = write_config()
    overrides = ["tracking.backend=mlflow", "tracking.flush_timeout_s=120"]
    assert run_command(main, [str(config), *overrides]) == 0
    assert run_command(main, [str(config), *overrides]) == 0  # finished already; touches the same run
    client, run = only_run(f"sqlite:///{tmp_path / 'runs' / 'mlflow.db'}")
    assert run.info.status == "FINISHED"
    assert run.data.params["optim.lr"] == "0.02"
    assert run.data.tags["data_fingerprint"]
    assert run.data.tags["git_commit"]
    assert "4 classes of 'action'" in run.data.tags["mlflow.note.content"]
    assert run.data.tags["mlflow.source.name"] == "experiments.train"
    (data_set,) = run.inputs.dataset_inputs  # one, although the run was started twice
    assert (data_set.dataset.name, data_set.dataset.digest) == ("store", run.data.tags["data_fingerprint"])
    plots = {f.path for f in client.list_artifacts(run.info.run_id, "plots")}
    assert plots >= {"plots/samples.png", "plots/curves.png", "plots/confusion.png"}
    recorded = read_metrics(tmp_path / "runs" / "tiny" / "metrics.jsonl")
    for name in ("train/loss", "val/top1"):
        history = client.get_metric_history(run.info.run_id, name)
        assert sorted((m.step, m.value) for m in history) == sorted(zip(*recorded[name], strict=True))
    artifacts = tmp_path / "runs" / "mlartifacts" / run.info.run_id / "artifacts" / "checkpoints" / "best"
    for name in ("state.pt", "config.yaml", "manifest.json"):  # on the disk once
        assert (artifacts / name).samefile(tmp_path / "runs" / "tiny" / "checkpoints" / "best" / name)
    names = {f.path for f in client.list_artifacts(run.info.run_id)}
    assert names >= {"config.yaml", "environment.txt", "summary.json", "per_class.csv", "plots", "checkpoints"}


def test_server_killed_in_mid_run_stops_nothing_and_loses_nothing(
    write_config: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from experiments.engine.run import Run

    port = free_port()
    uri = f"http://127.0.0.1:{port}"
    server = start_server(tmp_path, port)
    original, killed = Run.report_progress, []

    def report_and_kill(self: Run) -> None:
        original(self)
        if self.step == 5:
            deadline = time.monotonic() + 60
            while '"run_id": ""' in (self.config.run_dir / "tracking.json").read_text() and time.monotonic() < deadline:
                time.sleep(0.05)  # until the first events have reached the server
            kill(server)
            killed.append(self.step)

    monkeypatch.setattr(Run, "report_progress", report_and_kill)
    overrides = ["tracking.backend=mlflow", f"tracking.uri={uri}", "train.steps=12", "tracking.flush_timeout_s=1"]
    assert run_command(main, [str(write_config()), *overrides]) == 0
    assert killed == [5]
    run_dir = tmp_path / "runs" / "tiny"
    assert run_command(track, ["sync", str(run_dir)]) == 2  # still down: one line, no traceback
    server = start_server(tmp_path, port)
    try:
        for _ in range(2):  # the second time there is nothing left
            assert run_command(track, ["sync", str(run_dir)]) == 0
        client, run = only_run(uri)
        history = client.get_metric_history(run.info.run_id, "train/loss")
        steps, values = read_metrics(run_dir / "metrics.jsonl")["train/loss"]
        assert steps == list(range(1, 13))
        assert [(m.step, m.value) for m in sorted(history, key=lambda m: m.step)] == list(
            zip(steps, values, strict=True)
        )
        assert run.info.status == "FINISHED"
    finally:
        kill(server)


def test_deleted_run_experiment_and_database_are_named_with_a_way_on(tmp_path: Path) -> None:
    from mlflow.tracking import MlflowClient

    database, run_dir = tmp_path / "mlflow.db", tmp_path / "run"
    uri = f"sqlite:///{database}"
    run_dir.mkdir()
    spool = Spool(run_dir / "metrics.jsonl")
    shipper = Shipper(run_dir, uri, "e", "run")
    client = MlflowClient(tracking_uri=uri)

    def report_and_ship(step: int) -> int:
        spool.metrics(step, {"loss": float(step)})
        return shipper.ship()

    def steps() -> list[int]:
        run_id = json.loads((run_dir / "tracking.json").read_text())["run_id"]
        return sorted(metric.step for metric in client.get_metric_history(run_id, "loss"))

    assert report_and_ship(1) == 1
    client.delete_run(json.loads((run_dir / "tracking.json").read_text())["run_id"])
    with pytest.raises(Exception, match="active"):  # found out by the first event that is refused
        report_and_ship(2)
    assert report_and_ship(3) == 3  # a new run, with everything
    assert steps() == [1, 2, 3]
    experiment = client.get_experiment_by_name("e")
    assert experiment is not None
    client.delete_experiment(experiment.experiment_id)
    with pytest.raises(Exception, match=r"active"):
        report_and_ship(4)
    with pytest.raises(TrackingRefusal, match=r"must be active and is deleted; restore it .* experiments restore -x "):
        shipper.ship()
    client.restore_experiment(experiment.experiment_id)
    assert report_and_ship(5) == 2
    assert steps() == [1, 2, 3, 4, 5]
    database.unlink()
    with pytest.raises(TrackingRefusal, match=r"was deleted or replaced while the run wrote to it; .*track sync"):
        report_and_ship(6)
    command = [sys.executable, "-m", "experiments.track", "sync", str(run_dir)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]
    assert f"{run_dir}: 6 events sent" in done.stdout
    with sqlite3.connect(database) as connection:
        connection.execute("update alembic_version set version_num = '451aebb31d03'")
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2
    assert f"python -m mlflow db upgrade {uri}" in done.stderr.splitlines()[-1]


def test_run_in_a_folder_with_an_apostrophe_is_found_again(tmp_path: Path) -> None:
    """Its path is a text in a question to the server."""
    folder, uri = tmp_path / "o'brien", f"sqlite:///{tmp_path}/mlflow.db"
    folder.mkdir()
    spool = Spool(folder / "metrics.jsonl")
    spool.metrics(1, {"train/loss": 2.0})
    spool.close()
    assert Shipper(folder, uri, "x", "run").ship() == 1
    made = json.loads((folder / "tracking.json").read_text())["run_id"]
    (folder / "tracking.json").write_text("{")  # a power cut
    assert Shipper(folder, uri, "x", "run").ship() == 1
    assert json.loads((folder / "tracking.json").read_text())["run_id"] == made
