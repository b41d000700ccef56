"""Tracking behind a small interface: a file first, from which a thread sends to MLflow; training never waits.

The only file that imports mlflow, and only inside the thread or command that needs it.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import threading
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal, Protocol

from experiments.config import TrackingConfig
from experiments.records.spool import SPOOL_NAME, Spool, read_events
from pipeline.store.durable import take_lock, write_file

Status = Literal["FINISHED", "KILLED", "FAILED"]
STATE_NAME, LOCK_NAME = "tracking.json", ".tracking.lock"
_REQUEST_TIMEOUT_S, _MAX_BACKOFF_S, _POLL_S = 5, 30.0, 1.0
_MAX_BATCH = 900  # MLflow's log_batch takes 1000 metrics
log = logging.getLogger(__name__)


class Tracker(Protocol):
    """What the training loop reports."""

    def start(self, params: Mapping[str, Any], tags: Mapping[str, str]) -> None:
        """Begin or continue the run.

        Args:
            params: settings by dotted key.
            tags: labels.
        """

    def metrics(self, step: int, values: Mapping[str, float]) -> None:
        """Report values.

        Args:
            step: steps done.
            values: name -> value.
        """

    def artifact(self, path: Path, folder: str = "") -> None:
        """Report a file or folder.

        Args:
            path: in the run folder.
            folder: where the server puts it; empty = at the top.
        """

    def finish(self, status: Status) -> None:
        """End the run; waits a bounded time for what is still to be sent.

        Args:
            status: how it ended.
        """

    def flush(self) -> None:
        """Flush what was reported to the disk."""

    def recreate(self) -> None:
        """Write what was reported again, into a run folder that was deleted and made again; raises OSError."""

    @property
    def lost(self) -> bool:
        """Whether the file of what was reported was deleted or moved."""

    @property
    def failure(self) -> str:
        """Why what was reported last is not on the disk; empty if it is."""


class NullTracker:
    """Same calls, no effect: for every rank but 0."""

    lost, failure = False, ""

    def start(self, params: Mapping[str, Any], tags: Mapping[str, str]) -> None:
        """Do nothing."""

    def metrics(self, step: int, values: Mapping[str, float]) -> None:
        """Do nothing."""

    def artifact(self, path: Path, folder: str = "") -> None:
        """Do nothing."""

    def finish(self, status: Status) -> None:
        """Do nothing."""

    def flush(self) -> None:
        """Do nothing."""

    def recreate(self) -> None:
        """Do nothing."""


class SpoolTracker:
    """Writes metrics.jsonl and nothing else (tracking.backend: none).

    Args:
        run_dir: folder of the run.
    """

    def __init__(self, run_dir: Path) -> None:
        self.run_dir = run_dir
        self.spool = Spool(run_dir / SPOOL_NAME)

    def start(self, params: Mapping[str, Any], tags: Mapping[str, str]) -> None:
        """Record settings and labels."""
        self.spool.event(params=dict(params))
        self.spool.event(tags=dict(tags))

    def metrics(self, step: int, values: Mapping[str, float]) -> None:
        """Record metrics."""
        self.spool.metrics(step, values)

    def artifact(self, path: Path, folder: str = "") -> None:
        """Record a path relative to the run folder."""
        self.spool.event(artifact=str(path.relative_to(self.run_dir)), folder=folder)

    def finish(self, status: Status) -> None:
        """Record the end and close the file."""
        self.spool.event(end=status)
        self.spool.close()

    def flush(self) -> None:
        """Flush metrics.jsonl to the disk."""
        self.spool.flush()

    def recreate(self) -> None:
        """Write metrics.jsonl again, with all that it held."""
        self.spool.recreate()

    @property
    def lost(self) -> bool:
        """Whether metrics.jsonl was deleted or moved."""
        return self.spool.lost

    @property
    def failure(self) -> str:
        """Why the latest lines of metrics.jsonl are not on the disk; empty if they are."""
        return self.spool.failure


class MLflowTracker(SpoolTracker):
    """SpoolTracker whose file a daemon thread sends to MLflow; what a dead server misses is sent later.

    Args:
        config: address, experiment, longest wait at the end.
        run_dir: folder of the run.
        name: of the run.
    """

    def __init__(self, config: TrackingConfig, run_dir: Path, name: str) -> None:
        super().__init__(run_dir)
        self._flush_timeout_s = config.flush_timeout_s
        self._shipper = Shipper(run_dir, resolve_uri(config.uri, run_dir.parent), config.experiment, name)
        self._stop = threading.Event()
        self._wake = threading.Event()
        self._thread = threading.Thread(target=self._run, name="mlflow", daemon=True)

    def start(self, params: Mapping[str, Any], tags: Mapping[str, str]) -> None:
        """Record settings and labels, then start sending."""
        super().start(params, tags)
        self._thread.start()

    def _run(self) -> None:
        backoff, reported = 1.0, False
        while True:
            last_round = self._stop.is_set()
            try:
                self._shipper.ship()
                if reported:
                    log.info("tracking server %s answers again; everything was sent", self._shipper.uri)
                backoff, reported = 1.0, False
                if last_round:
                    return
                self._wake.wait(_POLL_S)
            except Exception as error:  # whatever a server or client library does, training goes on
                if not reported:
                    reason = (str(error).splitlines() or [""])[0][:160]
                    log.warning(
                        "tracking server %s fails (%s: %s); training goes on, metrics wait in %s",
                        self._shipper.uri, type(error).__name__, reason, self.spool.path,
                    )  # fmt: skip
                reported = True
                self._wake.wait(min(backoff, 2.0) if self._stop.is_set() else backoff)
                backoff = min(2 * backoff, _MAX_BACKOFF_S)
            self._wake.clear()

    def finish(self, status: Status) -> None:
        """Record the end and wait up to `flush_timeout_s` until everything is sent."""
        super().finish(status)
        self._stop.set()
        self._wake.set()
        if self._thread.is_alive():
            self._thread.join(self._flush_timeout_s)
        if self._thread.is_alive():
            log.warning(
                "tracking server %s did not take everything; send the rest with: python -m experiments.track sync %s",
                self._shipper.uri, self.run_dir,
            )  # fmt: skip


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
        if not self._read():
            self._save()

    def _read(self) -> bool:
        """Take over the state in the folder, if it is of this server."""
        if not self._state_path.exists():
            return False
        old = json.loads(self._state_path.read_text(encoding="utf-8"))
        if old.get("uri") != self.uri:
            return False
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
            Exception: whatever the server or client raises.
        """
        with self._alone():
            return self._ship()

    def _ship(self) -> int:
        client = self._connect()
        sent = 0
        pending: list[Any] = []
        for offset, event in read_events(self.run_dir / SPOOL_NAME, self._state["offset"]):
            if "metrics" in event:
                pending += _as_metrics(event)
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
        return sent

    def _mark(self, offset: int) -> None:
        self._state["offset"] = offset
        self._save()

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
        path = self.run_dir / str(event.get("artifact", ""))
        if "artifact" in event and path.is_dir():
            client.log_artifacts(run_id, str(path), event["folder"] or None)
        elif "artifact" in event and path.is_file():
            client.log_artifact(run_id, str(path), event["folder"] or None)
        if "end" in event:
            client.set_terminated(run_id, status=event["end"], end_time=event["time_ms"])

    def _send_params(self, params: Mapping[str, Any]) -> None:
        from mlflow.entities import Param

        have = self._client.get_run(self._state["run_id"]).data.params  # a resumed run cannot change a parameter
        new = [Param(k, str(v)[:6000]) for k, v in params.items() if k not in have]
        for start in range(0, len(new), 100):
            self._client.log_batch(self._state["run_id"], params=new[start : start + 100])

    def _connect(self) -> Any:
        if self._client is not None:
            return self._client
        client = _client(self.uri)
        if not self._state["run_id"]:
            found = client.get_experiment_by_name(self.experiment)
            if found is None:
                location = (self.run_dir.parent / "mlartifacts").resolve().as_uri() if _is_sqlite(self.uri) else None
                experiment_id = client.create_experiment(self.experiment, artifact_location=location)
            else:
                experiment_id = found.experiment_id
            start = next((e["time_ms"] for _, e in read_events(self.run_dir / SPOOL_NAME)), int(time.time() * 1000))
            run = client.create_run(experiment_id, start_time=start, run_name=self.name)
            self._state["run_id"] = run.info.run_id
            self._save()
        self._client = client
        return client


def _as_metrics(event: Mapping[str, Any]) -> list[Any]:
    from mlflow.entities import Metric

    return [Metric(k, float(v), int(event["time_ms"]), int(event["step"])) for k, v in event["metrics"].items()]


def _is_sqlite(uri: str) -> bool:
    return uri.startswith("sqlite:")


def resolve_uri(uri: str, output_dir: Path) -> str:
    """Return the address of MLflow: the given one, or a sqlite file in the folder of all runs.

    Args:
        uri: `tracking.uri`, may be empty.
        output_dir: folder of all runs.
    """
    return uri or f"sqlite:///{(output_dir / 'mlflow.db').resolve()}"


def _client(uri: str) -> Any:
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    os.environ.setdefault("DO_NOT_TRACK", "true")
    os.environ.setdefault("MLFLOW_CONFIGURE_LOGGING", "false")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", str(_REQUEST_TIMEOUT_S))
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    os.environ.setdefault("MLFLOW_ARTIFACT_UPLOAD_DOWNLOAD_TIMEOUT", "60")
    from mlflow.tracking import MlflowClient

    return MlflowClient(tracking_uri=uri)


def sync_run(run_dir: Path) -> int:
    """Send what a finished or interrupted run could not send (an outage).

    Args:
        run_dir: a run folder with tracking.json.

    Returns:
        The number of events sent.

    Raises:
        ValueError: if the folder was not tracked by MLflow.
    """
    try:
        state = json.loads((run_dir / STATE_NAME).read_text(encoding="utf-8"))
    except OSError:
        raise ValueError(
            f"run folder ({run_dir}) must hold {STATE_NAME}; only runs with tracking.backend=mlflow have it"
        ) from None
    return Shipper(run_dir, state["uri"], state["experiment"], state["name"]).ship()


def make_tracker(config: TrackingConfig, run_dir: Path, name: str, *, is_main: bool) -> Tracker:
    """Return the tracker of this rank: one without effect everywhere but on rank 0.

    Args:
        config: which backend, and its settings.
        run_dir: folder of the run.
        name: of the run.
        is_main: whether this is rank 0.
    """
    if not is_main:
        return NullTracker()
    return MLflowTracker(config, run_dir, name) if config.backend == "mlflow" else SpoolTracker(run_dir)
