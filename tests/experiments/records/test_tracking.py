"""Nothing is lost or doubled on the way to MLflow, whatever the server does."""

import re
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from experiments.config import TrackingConfig
from experiments.records.shipping import Shipper, _refusal, parent_run
from experiments.records.spool import Spool, read_events, read_metrics
from experiments.records.tracking import MLflowTracker, NullTracker, make_tracker, resolve_uri, sync_run


class FakeServer:
    """Keeps what MLflow would keep: metrics by (name, step, time, value), so that sending twice changes nothing."""

    def __init__(self) -> None:
        self.points: set[tuple[str, int, int, float]] = set()
        self.params: dict[str, str] = {}
        self.tags: dict[str, str] = {}
        self.artifacts: list[str] = []
        self.status: list[str] = []
        self.runs = 0
        self.fail_after = 10**9

    def _call(self) -> None:
        self.fail_after -= 1
        if self.fail_after < 0:
            raise ConnectionError("connection refused")

    def get_experiment_by_name(self, name: str) -> None:
        self._call()

    def create_experiment(self, name: str, artifact_location: str | None, tags: Any = None) -> str:
        self._call()
        return "1"

    def create_run(self, experiment_id: str, start_time: int, run_name: str, tags: Any) -> Any:
        self._call()
        self.runs += 1
        return type("Run", (), {"info": type("Info", (), {"run_id": "r1"})})

    def get_run(self, run_id: str) -> Any:
        self._call()
        info = type("Info", (), {"lifecycle_stage": "active"})
        return type("Run", (), {"data": type("Data", (), {"params": self.params}), "info": info})

    def log_batch(self, run_id: str, metrics: Any = (), params: Any = ()) -> None:
        for metric in metrics:
            self._call()
            self.points.add((metric.key, metric.step, metric.timestamp, metric.value))
        self.params.update({p.key: p.value for p in params})

    def get_metric_history(self, run_id: str, name: str) -> list[Any]:
        return [type("Point", (), {"step": step}) for key, step, _, _ in self.points if key == name]

    def set_tag(self, run_id: str, key: str, value: str) -> None:
        self._call()
        self.tags[key] = value

    def update_run(self, run_id: str, status: str) -> None:
        self.status.append(status)

    def log_artifact(self, run_id: str, path: str, folder: str | None) -> None:
        self._call()
        self.artifacts.append(Path(path).name)

    def set_terminated(self, run_id: str, status: str, end_time: int) -> None:
        self._call()
        self.status.append(status)


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> FakeServer:
    fake = FakeServer()
    monkeypatch.setattr("experiments.records.shipping._client", lambda uri: fake)
    return fake


def make(tmp_path: Path, **changes: Any) -> MLflowTracker:
    return MLflowTracker(TrackingConfig(uri="http://x", flush_timeout_s=120.0, **changes), tmp_path, "run")


def test_spool_drops_a_torn_line_and_repeated_steps(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    spool = Spool(path)
    for step in (1, 2, 3):
        spool.metrics(step, {"loss": step / 10})
    spool.close()
    with open(path, "a") as file:
        file.write('{"step": 4, "metr')
    again = Spool(path)
    for step in (2, 3, 4):  # a resumed run computes 2 and 3 again
        again.metrics(step, {"loss": 9.0, "new": 1.0})
    again.close()
    assert read_metrics(path) == {"loss": ([1, 2, 3, 4], [0.1, 0.2, 0.3, 9.0]), "new": ([2, 3, 4], [1.0] * 3)}


def test_spool_keeps_values_that_json_cannot(tmp_path: Path) -> None:
    spool = Spool(tmp_path / "m")
    spool.metrics(1, {"a": float("nan"), "b": float("inf")})
    assert [str(v[1][0]) for v in read_metrics(tmp_path / "m").values()] == ["nan", "inf"]


def test_everything_arrives_once(tmp_path: Path, server: FakeServer) -> None:
    (tmp_path / "summary.json").write_text("{}")
    tracker = make(tmp_path)
    tracker.start({"optim.lr": 0.1}, {"git": "abc"})
    for step in range(50):
        tracker.metrics(step, {"loss": float(step), "top1": 0.5})
    tracker.artifact(tmp_path / "summary.json")
    tracker.finish("FINISHED")
    assert len(server.points) == 100
    assert (server.params, server.tags, server.artifacts) == ({"optim.lr": "0.1"}, {"git": "abc"}, ["summary.json"])
    assert server.status == ["RUNNING", "FINISHED"]


@pytest.mark.parametrize("fail_after", [0, 1, 2, 5, 11, 23, 33])
def test_outage_is_replayed_with_the_original_times(tmp_path: Path, server: FakeServer, fail_after: int) -> None:
    spool = Spool(tmp_path / "metrics.jsonl")
    spool.event(params={"a": 1})
    spool.event(tags={"t": "1"})
    for step in range(30):
        spool.metrics(step, {"loss": float(step)})
    spool.event(end="FINISHED")
    expected = {("loss", e["step"], e["time_ms"], float(e["step"])) for _, e in read_events(spool.path) if "step" in e}
    shipper = Shipper(tmp_path, "http://x", "e", "run")
    server.fail_after = fail_after
    with pytest.raises(ConnectionError):
        shipper.ship()
    server.fail_after = 10**9
    assert sync_run(tmp_path) > 0  # another process, later
    assert server.points == expected
    assert server.runs == 1
    assert server.status[-1] == "FINISHED"
    assert sync_run(tmp_path) == 0


def test_dead_server_blocks_neither_metrics_nor_the_end(tmp_path: Path, server: FakeServer, caplog: Any) -> None:
    server.fail_after = 0
    tracker = MLflowTracker(TrackingConfig(uri="http://x", flush_timeout_s=0.2), tmp_path, "run")
    tracker.start({}, {"t": "1"})
    for step in range(200):
        tracker.metrics(step, {"loss": 1.0})
    tracker.finish("FINISHED")
    assert len(read_metrics(tmp_path / "metrics.jsonl")["loss"][0]) == 200
    assert "training goes on" in caplog.text
    assert "python -m experiments.track sync" in caplog.text
    server.fail_after = 10**9
    deadline = time.monotonic() + 10
    while server.status[-1:] != ["FINISHED"] and time.monotonic() < deadline:
        time.sleep(0.05)
    assert len(server.points) == 200  # the thread of a process that lives on sends it all the same


def test_continued_run_is_the_same_mlflow_run(tmp_path: Path, server: FakeServer) -> None:
    for steps, status in (((1, 2, 3), "KILLED"), ((3, 4), "FINISHED")):
        tracker = make(tmp_path)
        tracker.start({"a": 1}, {"t": "1"})
        for step in steps:
            tracker.metrics(step, {"loss": float(step)})
        tracker.finish(status)  # type: ignore[arg-type]
    assert server.runs == 1
    assert sorted(p[1] for p in server.points) == [1, 2, 3, 4]
    assert server.status == ["RUNNING", "KILLED", "RUNNING", "FINISHED"]


def test_defaults(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    assert resolve_uri("", tmp_path) == f"sqlite:///{tmp_path / 'mlflow.db'}"
    assert resolve_uri("http://h:1", tmp_path) == "http://h:1"
    assert isinstance(make_tracker(TrackingConfig(), tmp_path, "r", is_main=False), NullTracker)
    with pytest.raises(ValueError, match=r"must hold tracking\.json"):
        sync_run(tmp_path)


def test_two_that_ship_at_once_make_one_run_and_send_each_event_once(tmp_path: Path, server: FakeServer) -> None:
    spool = Spool(tmp_path / "metrics.jsonl")
    for step in range(40):
        spool.metrics(step, {"loss": float(step)})
    spool.close()
    shippers = [Shipper(tmp_path, "http://x", "e", "run") for _ in range(4)]  # each knows of no run yet
    with ThreadPoolExecutor(4) as pool:
        sent = list(pool.map(lambda shipper: shipper.ship(), shippers))
    assert sorted(sent) == [0, 0, 0, 40]
    assert server.runs == 1
    assert len(server.points) == 40


@pytest.mark.parametrize("uri", ["", "http://h", "https://h:8443/x", "http://[::1]:5000", "sqlite:////tmp/a.db"])
def test_addresses_of_servers(uri: str) -> None:
    TrackingConfig(uri=uri).validate()


@pytest.mark.parametrize(
    "uri", ["foo", "http://", "http:///x", "http://h:x", "http://h:0", "sqlite:///", "ftp://h", "h:1"]
)
def test_what_is_no_address_is_refused_before_the_run(uri: str) -> None:
    with pytest.raises(ValueError, match=rf"uri \({re.escape(uri)}\) must be empty .*; correct it, or set"):
        TrackingConfig(uri=uri).validate()
    TrackingConfig(backend="none", uri=uri).validate()


def test_file_shorter_than_what_was_sent_is_sent_again_without_doubles(tmp_path: Path, server: FakeServer) -> None:
    path = tmp_path / "metrics.jsonl"
    spool = Spool(path)
    for step in range(1, 21):
        spool.metrics(step, {"loss": float(step)})
    spool.close()
    assert Shipper(tmp_path, "http://x", "e", "run").ship() == 20
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join(lines[:8]))  # a power cut; the run continues from a checkpoint at step 8
    again = Spool(path)
    for step in range(9, 31):
        again.metrics(step, {"loss": float(step)})
    again.close()
    assert path.stat().st_size > sum(map(len, lines))  # longer than what was sent, and yet not the same file
    server.fail_after = 7  # the replay is itself cut off
    with pytest.raises(ConnectionError):
        Shipper(tmp_path, "http://x", "e", "run").ship()
    server.fail_after = 10**9
    assert sync_run(tmp_path) > 0
    assert sorted(point[1] for point in server.points) == list(range(1, 31))
    assert sync_run(tmp_path) == 0


def test_torn_state_is_named_and_everything_is_sent(tmp_path: Path, server: FakeServer, caplog: Any) -> None:
    spool = Spool(tmp_path / "metrics.jsonl")
    spool.metrics(1, {"loss": 1.0})
    Shipper(tmp_path, "http://x", "e", "run").ship()
    (tmp_path / "tracking.json").write_bytes(b"")
    spool.metrics(2, {"loss": 2.0})
    assert Shipper(tmp_path, "http://x", "e", "run").ship() == 2
    assert f"{tmp_path / 'tracking.json'} is torn" in caplog.text
    assert sorted(point[1] for point in server.points) == [1, 2]


def test_address_of_the_environment_stands_in_for_an_empty_one(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://tracking:5000")
    assert resolve_uri("", tmp_path) == "http://tracking:5000"
    assert resolve_uri("http://own:1", tmp_path) == "http://own:1"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "databricks")
    with pytest.raises(ValueError, match=r"MLFLOW_TRACKING_URI, which .*: uri \(databricks\) must"):
        resolve_uri("", tmp_path)


@pytest.mark.parametrize(
    ("variable", "uri", "taken"),
    [
        ("sqlite:////data/shared.db", "", "sqlite:////data/shared.db"),
        ("https://h:8443/x", "", "https://h:8443/x"),
        ("https://h:8443/x", "sqlite:////own.db", "sqlite:////own.db"),
        ("", "", "sqlite:///{}/mlflow.db"),
    ],
)
def test_which_address_is_taken(
    variable: str, uri: str, taken: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", variable)
    assert resolve_uri(uri, tmp_path) == taken.format(tmp_path)


@pytest.mark.parametrize(
    ("found", "advice"),
    [
        ("451aebb31d03", "python -m mlflow db upgrade sqlite:////tmp/a.db"),
        ("0a8213491aaa", "python -m mlflow db upgrade sqlite:////tmp/a.db"),
        ("fedcba987654", "python -m pip install -U mlflow"),  # of a release to come: MLflow calls it out of date, too
    ],
)
def test_a_schema_of_another_version_is_told_with_what_helps(found: str, advice: str) -> None:
    words = (
        f"Detected out-of-date database schema (found version {found}, but expected 4465047574b1). Take a backup of "
        "your database, then run 'mlflow db upgrade <database_uri>' to migrate your database to the latest schema."
    )
    refusal = _refusal(RuntimeError(words), "sqlite:////tmp/a.db")
    assert refusal is not None
    assert advice in str(refusal)
    assert f"(found version {found}, but expected 4465047574b1)" in str(refusal)
    assert _refusal(RuntimeError("no such table"), "sqlite:////tmp/a.db") is None


@pytest.mark.parametrize("deleted", [True, False])
def test_the_common_run_of_a_sweep_needs_an_active_experiment(
    deleted: bool, server: FakeServer, tmp_path: Path, caplog: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    stage = {"lifecycle_stage": "deleted" if deleted else "active", "name": "e", "experiment_id": "7"}
    monkeypatch.setattr(server, "get_experiment_by_name", lambda name: type("Experiment", (), stage))
    monkeypatch.setattr(server, "search_runs", lambda ids, filter_string: [], raising=False)
    monkeypatch.setattr(server, "create_run", lambda *a, **b: type("R", (), {"info": type("I", (), {"run_id": "r9"})}))
    monkeypatch.setattr(server, "set_terminated", lambda run_id: None)
    assert parent_run("http://x", "e", "sweep", tmp_path) == ("" if deleted else "r9")
    assert ("mlflow experiments restore -x 7" in caplog.text) == deleted
