"""From metrics.jsonl to MLflow: what was not sent yet, in order; sending twice does no harm.

The only file that imports mlflow, and only inside the thread or command that needs it.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import re
import time
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from experiments.cli.files import read_json_file
from experiments.records.local_artifacts import link_folder
from experiments.records.spool import SPOOL_NAME, read_events
from pipeline.store.durable import take_lock, write_file

STATE_NAME, LOCK_NAME = "tracking.json", ".tracking.lock"
FOLDER_TAG = "run_folder"  # by which the run is found again where tracking.json was torn
_REQUEST_TIMEOUT_S = 5
_MAX_BATCH = 900  # MLflow's log_batch takes 1000 metrics
_TAIL_BYTES = 256
log = logging.getLogger(__name__)


PARENT_VARIABLE = "AVSF_PARENT_RUN"  # the MLflow run that a run of this process belongs below; set by experiments.sweep
PARENT_TAG, SWEEP_TAG = "mlflow.parentRunId", "avslowfast.sweep"


class TrackingRefusal(ValueError):
    """A server that answers and will not take the run until somebody acts; the message says what to do."""


class Shipper:
    """Sends a run folder's spool to MLflow from where it stopped last (tracking.json); sending twice does no harm.

    Args:
        run_dir: folder of the run.
        uri: address of the server, or a sqlite file.
        experiment: MLflow experiment.
        name: of the run.
    """

    def __init__(self, run_dir: Path, uri: str, experiment: str, name: str) -> None:
        self.run_dir, self.uri, self.experiment, self.name = run_dir, uri, experiment, name
        self._state_path = run_dir / STATE_NAME
        self._state: dict[str, Any] = {"uri": uri, "experiment": experiment, "name": name, "run_id": "", "offset": 0}
        self._client: Any = None
        self._known: dict[str, set[int]] = {}  # steps that the server has, by metric; read while replaying
        self._database: tuple[int, int] | None = None
        if not self._read():
            self._save()

    def _read(self) -> bool:
        """Take over the state in the folder, if it is of this server."""
        old = read_state(self.run_dir)
        if old is None or old.get("uri") != self.uri:
            self._state.update(old if old is not None and old.get("torn") else {})
            return False
        if self._state["run_id"] and not old.get("run_id"):
            return False  # ours could not be written
        self._state.update(old)
        return True

    @contextlib.contextmanager
    def _alone(self) -> Iterator[None]:
        """Hold the lock, with the state as its last holder left it: a run may still send while `track sync` starts."""
        with take_lock(self.run_dir / LOCK_NAME, wait=True):
            self._read()
            yield

    def _save(self) -> None:
        write_file(self._state_path, json.dumps(self._state, indent=1))

    def ship(self) -> int:
        """Send all events that were not sent yet; return their number.

        Raises:
            TrackingRefusal: the server answers, and somebody must act.
            Exception: whatever the server or client raises.
        """
        with self._alone():
            try:
                return self._ship()
            except Exception as error:
                self._client = None  # a run or experiment that was deleted meanwhile is found out by connecting again
                refusal = _refusal(error, self.uri)
                if refusal is not None:
                    raise refusal from error
                raise

    def _ship(self) -> int:
        self._require_same_database()
        client = self._connect()
        self._check_offset()
        sent = 0
        pending: list[Any] = []
        for offset, event in read_events(self.run_dir / SPOOL_NAME, self._state["offset"]):
            if "metrics" in event:
                pending += self._as_metrics(event)
            if pending and ("metrics" not in event or len(pending) > _MAX_BATCH):
                self._send_metrics(pending)
            self._send_event(client, event)
            sent += 1
            if not pending:
                self._mark(offset)
            last = offset
        if pending:
            self._send_metrics(pending)
            self._mark(last)
        if self._state.pop("replaying", False):
            self._save()
        return sent

    def send(self, events: Iterable[Mapping[str, Any]]) -> None:
        """Send events that the disk refused; where this process stands in the file stays as it is."""
        for event in events:
            if "metrics" in event:
                self._send_metrics(self._as_metrics(event))
            self._send_event(self._client, event)

    def _check_offset(self) -> None:
        """Begin again where the file is not the one, up to here, that was sent: a restored copy, or cut by a crash."""
        offset, path = self._state["offset"], self.run_dir / SPOOL_NAME
        if not offset:
            return
        size = path.stat().st_size if path.exists() else 0
        if size < offset or self._state.get("tail", _tail(path, offset)) != _tail(path, offset):
            log.warning(
                "%s (%d bytes) is not the file of which %d bytes were sent: it is sent again from its beginning, "
                "without the steps that the server has", path, size, offset,
            )  # fmt: skip
            self._state.update(offset=0, replaying=True)
            self._state.pop("tail", None)
            self._save()

    def _mark(self, offset: int) -> None:
        self._state.update(offset=offset, tail=_tail(self.run_dir / SPOOL_NAME, offset))
        self._save()

    def _as_metrics(self, event: Mapping[str, Any]) -> list[Any]:
        """Return MLflow's metrics of an event; while replaying, without those that the server has."""
        from mlflow.entities import Metric

        step, time_ms, values = int(event["step"]), int(event["time_ms"]), event["metrics"]
        if self._state.get("replaying"):
            values = {k: v for k, v in values.items() if step not in self._steps_of(k)}
        return [Metric(k, float(v), time_ms, step) for k, v in values.items()]

    def _steps_of(self, name: str) -> set[int]:
        if name not in self._known:
            history = self._client.get_metric_history(self._state["run_id"], name)
            self._known[name] = {metric.step for metric in history}
        return self._known[name]

    def _send_metrics(self, pending: list[Any]) -> None:
        while pending:
            self._client.log_batch(self._state["run_id"], metrics=pending[:_MAX_BATCH])
            del pending[:_MAX_BATCH]

    def _send_event(self, client: Any, event: Mapping[str, Any]) -> None:
        run_id = self._state["run_id"]
        if "params" in event:
            self._send_params(event["params"])
        for key, value in event.get("tags", {}).items():
            client.set_tag(run_id, key, str(value))
        if "tags" in event:
            client.update_run(run_id, status="RUNNING")
        if "data_set" in event:
            self._send_data_set(event["data_set"])
        path = self.run_dir / str(event.get("artifact", ""))
        if "artifact" in event and path.is_dir():
            if not link_folder(path, client.get_run(run_id).info.artifact_uri, event["folder"]):
                client.log_artifacts(run_id, str(path), event["folder"] or None)
        elif "artifact" in event and path.is_file():
            client.log_artifact(run_id, str(path), event["folder"] or None)
        if "end" in event:
            client.set_terminated(run_id, status=event["end"], end_time=event["time_ms"])

    def _send_data_set(self, known: Mapping[str, str]) -> None:
        """Name the data on the page of the run; a run that is continued has it already."""
        from mlflow.entities import Dataset, DatasetInput, InputTag

        run = self._client.get_run(self._state["run_id"])
        if any(given.dataset.digest == known["digest"] for given in run.inputs.dataset_inputs):
            return
        data_set = Dataset(known["name"], known["digest"], "local", known["source"])
        tags = [InputTag("mlflow.data.context", "training")]
        self._client.log_inputs(self._state["run_id"], [DatasetInput(data_set, tags)])

    def _send_params(self, params: Mapping[str, Any]) -> None:
        from mlflow.entities import Param

        have = self._client.get_run(self._state["run_id"]).data.params  # a resumed run cannot change a parameter
        new = [Param(k, str(v)[:6000]) for k, v in params.items() if k not in have]
        for start in range(0, len(new), 100):
            self._client.log_batch(self._state["run_id"], params=new[start : start + 100])

    # Finding or making the run ------------------------------------------------------------------------------------

    def _connect(self) -> Any:
        if self._client is not None:
            return self._client
        client = _client(self.uri)
        found = client.get_experiment_by_name(self.experiment)
        _require_active(found, self.uri)
        if self._state["run_id"] and not _is_there(client, self._state["run_id"]):
            log.warning(
                "MLflow run %s is deleted, or not known at %s any more: a new run takes its place, and everything in "
                "%s is sent to it", self._state["run_id"], self.uri, self.run_dir / SPOOL_NAME,
            )  # fmt: skip
            self._state.update(run_id="", offset=0)
            self._state.pop("tail", None)
        if not self._state["run_id"]:
            self._make_run(client, found)
        self._client, self._database = client, self._database_file()
        return client

    def _make_run(self, client: Any, experiment: Any) -> None:
        experiment_id = _experiment_id(client, experiment, self.experiment, self.uri, self.run_dir.parent)
        start = next((e["time_ms"] for _, e in read_events(self.run_dir / SPOOL_NAME)), int(time.time() * 1000))
        folder = str(self.run_dir.resolve())
        if experiment is not None and self._state.get("torn"):
            quote = '"' if "'" in folder else "'"  # MLflow takes both, and has no way to write one inside itself
            same = client.search_runs([experiment_id], filter_string=f"tags.{FOLDER_TAG} = {quote}{folder}{quote}")
            self._state["run_id"] = next((r.info.run_id for r in same if r.info.start_time == start), "")
        if not self._state["run_id"]:
            parent = os.environ.get(PARENT_VARIABLE, "")
            tags = {FOLDER_TAG: folder, **({PARENT_TAG: parent} if parent else {})}
            run = client.create_run(experiment_id, start_time=start, run_name=self.name, tags=tags)
            self._state["run_id"] = run.info.run_id
        self._state.pop("torn", None)
        self._save()

    def _database_file(self) -> tuple[int, int] | None:
        """Return what identifies the file of a sqlite store, None for servers and for a file that is not there."""
        if not _is_sqlite(self.uri):
            return None
        try:
            found = os.stat(self.uri.removeprefix("sqlite:///"))
        except OSError:
            return None
        return found.st_dev, found.st_ino

    def _require_same_database(self) -> None:
        """Notice a sqlite file that was deleted under the open connection, into which everything would vanish."""
        if self._database is not None and self._database_file() != self._database:
            self._state.update(run_id="", offset=0)
            self._state.pop("tail", None)
            self._save()
            raise TrackingRefusal(
                f"database {self.uri} was deleted or replaced while the run wrote to it; a new one takes everything "
                f"when the run has ended: python -m experiments.track sync {self.run_dir}"
            )


def read_state(run_dir: Path) -> dict[str, Any] | None:
    """Return what tracking.json holds, None where there is none.

    A torn one is named; what can be known of it is in the run's configuration, and the run is found by its tag.
    """
    path = run_dir / STATE_NAME
    try:
        found = read_json_file(path)
        if _is_state(found):
            return dict(found)
        reason = "it must hold uri, experiment, name, run_id and offset"
    except FileNotFoundError:
        return None
    except ValueError as error:
        reason = str(error)
    log.warning(
        "%s is torn (%s; a power cut?): the run is looked for on the server, and everything is sent again", path, reason
    )
    return {"torn": True, "replaying": True}


def _is_state(found: object) -> bool:
    """Whether this is what a shipper saves."""
    return (
        isinstance(found, dict)
        and all(isinstance(found.get(name), str) for name in ("uri", "experiment", "name", "run_id"))
        and isinstance(found.get("tail", ""), str)
        and type(found.get("offset")) is int
        and found["offset"] >= 0
    )


def is_unreachable(error: BaseException) -> bool:
    """Whether a failure of the client means that no server answers, rather than that it answers with an error."""
    text = str(error)
    return isinstance(error, ConnectionError) or ("API request" in text and "failed with exception" in text)


def _refusal(error: Exception, uri: str) -> TrackingRefusal | None:
    """Return what somebody has to do about an error, None where nothing is known of it."""
    if isinstance(error, TrackingRefusal):
        return error
    if "out-of-date database schema" not in str(error):
        return None
    detail = str(error).split("(", 1)[-1].split(")", 1)[0]
    version = re.search(r"found version (\w+)", str(error))
    if version and not _knows_schema(version.group(1)):  # what MLflow calls out of date is ahead of it
        return TrackingRefusal(
            f"database {uri} is of a newer MLflow than this one ({detail}); update this one (python -m pip install -U "
            "mlflow), or continue the run with another tracking.uri=..."
        )
    return TrackingRefusal(
        f"database {uri} is of an older MLflow ({detail}); copy it to a safe place and run: "
        f"python -m mlflow db upgrade {uri}"
    )


def _knows_schema(version: str) -> bool:
    """Whether the installed MLflow has the step of migrations that leads to a schema."""
    import mlflow

    steps = Path(mlflow.__file__).parent / "store" / "db_migrations" / "versions"
    return not steps.is_dir() or any(steps.glob(f"{version}_*.py"))


def _require_active(experiment: Any, uri: str) -> None:
    """Raise TrackingRefusal for an experiment in MLflow's bin."""
    if experiment is not None and experiment.lifecycle_stage == "deleted":
        raise TrackingRefusal(
            f"MLflow experiment {experiment.name!r} at {uri} must be active and is deleted; restore it "
            f"(MLFLOW_TRACKING_URI={uri} python -m mlflow experiments restore -x {experiment.experiment_id}), or "
            "continue the run with another tracking.experiment=..."
        )


def _experiment_id(client: Any, found: Any, name: str, uri: str, output_dir: Path) -> str:
    """Return the id of an experiment, which is made where the server has none of the name.

    Args:
        client: of MLflow. found: what it has of that name, None for nothing. name: of the experiment.
        uri: of the server; beside a sqlite file artifacts lie below `output_dir`, the folder of all runs.
    """
    if found is not None:
        return str(found.experiment_id)
    location = (output_dir / "mlartifacts").resolve().as_uri() if _is_sqlite(uri) else None
    kind = {"mlflow.experimentKind": "custom_model_development"}  # its page is that of trainings
    return str(client.create_experiment(name, artifact_location=location, tags=kind))


def _is_there(client: Any, run_id: str) -> bool:
    """Whether a run exists and is not in MLflow's bin."""
    from mlflow.exceptions import MlflowException

    try:
        return bool(client.get_run(run_id).info.lifecycle_stage != "deleted")
    except MlflowException as error:
        if error.error_code == "RESOURCE_DOES_NOT_EXIST":
            return False
        raise


def _tail(path: Path, offset: int) -> str:
    """Return a digest of the bytes of a file before an offset; empty where it is shorter."""
    try:
        with open(path, "rb") as file:
            start = max(0, offset - _TAIL_BYTES)
            file.seek(start)
            data = file.read(offset - start)
    except OSError:
        return ""
    return hashlib.sha256(data).hexdigest()[:16] if len(data) == offset - start else ""


def parent_run(uri: str, experiment: str, name: str, output_dir: Path) -> str:
    """Return the run that others are put below: the one of this name in the experiment, or a new one.

    Args:
        uri: of MLflow.
        experiment: its name; made where it is not there.
        name: of the run.
        output_dir: folder of all runs.

    Returns:
        Its id; empty, with a warning, where the server does not answer: the runs below are then runs like others.
    """
    try:
        client = _client(uri)
        found = client.get_experiment_by_name(experiment)
        _require_active(found, uri)
        experiment_id = _experiment_id(client, found, experiment, uri, output_dir)
        quoted = name.replace("'", " ")
        same = client.search_runs([experiment_id], filter_string=f"tags.{SWEEP_TAG} = '{quoted}'")
        if same:
            return str(same[0].info.run_id)
        run_id = str(client.create_run(experiment_id, run_name=name, tags={SWEEP_TAG: quoted}).info.run_id)
        client.set_terminated(run_id)  # it holds others, nothing of its own goes on
        return run_id
    except Exception as error:  # whatever a server or client library does, training goes on
        words = _refusal(error, uri) or f"{uri} ({type(error).__name__}: {error})"
        log.warning("no common run: %s; the rows are runs of their own", words)
        return ""


def _is_sqlite(uri: str) -> bool:
    return uri.startswith("sqlite:")


def _client(uri: str) -> Any:
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    os.environ.setdefault("DO_NOT_TRACK", "true")
    os.environ.setdefault("MLFLOW_CONFIGURE_LOGGING", "false")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", str(_REQUEST_TIMEOUT_S))
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    os.environ.setdefault("MLFLOW_ARTIFACT_UPLOAD_DOWNLOAD_TIMEOUT", "60")
    from mlflow.tracking import MlflowClient

    return MlflowClient(tracking_uri=uri)
