"""Tracking behind a small interface: a file first, from which a thread sends to MLflow; training never waits."""

from __future__ import annotations

import logging
import os
import shlex
import sys
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, Protocol

from experiments.config import TrackingConfig
from experiments.records.shipping import STATE_NAME, Shipper, TrackingRefusal, read_state
from experiments.records.spool import SPOOL_NAME, Spool

Status = Literal["FINISHED", "KILLED", "FAILED"]
_MAX_BACKOFF_S, _POLL_S = 30.0, 1.0
_MAX_NOTE = 4900  # characters of a tag that every server takes
log = logging.getLogger(__name__)


class Tracker(Protocol):
    """What the training loop reports."""

    def start(
        self, params: Mapping[str, Any], tags: Mapping[str, str], data_set: Mapping[str, str] | None = None
    ) -> None:
        """Begin or continue the run.

        Args:
            params: settings by dotted key.
            tags: labels.
            data_set: name, digest and source of the data; None: not said.
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

    def start(
        self, params: Mapping[str, Any], tags: Mapping[str, str], data_set: Mapping[str, str] | None = None
    ) -> None:
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

    def start(
        self, params: Mapping[str, Any], tags: Mapping[str, str], data_set: Mapping[str, str] | None = None
    ) -> None:
        """Record settings and labels."""
        self.spool.event(params=dict(params))
        self.spool.event(tags=dict(tags))
        if data_set is not None:
            self.spool.event(data_set=dict(data_set))

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
        self._refused = False  # by a server that answers: waiting for it changes nothing
        self._stop = threading.Event()
        self._wake = threading.Event()
        self._thread = threading.Thread(target=self._run, name="mlflow", daemon=True)

    def start(
        self, params: Mapping[str, Any], tags: Mapping[str, str], data_set: Mapping[str, str] | None = None
    ) -> None:
        """Record settings and labels, then start sending."""
        super().start(params, tags, data_set)
        self._thread.start()

    def _run(self) -> None:
        backoff, reported = 1.0, False
        while True:
            last_round = self._stop.is_set()
            try:
                self._shipper.ship()
                if last_round:
                    self._shipper.send(self.spool.unwritten())
                if reported:
                    log.info("tracking server %s answers again; everything was sent", self._shipper.uri)
                backoff, reported, self._refused = 1.0, False, False
                if last_round:
                    return
                self._wake.wait(_POLL_S)
            except Exception as error:  # whatever a server or client library does, training goes on
                self._refused = isinstance(error, TrackingRefusal)
                if not reported:
                    self._report(error)
                reported = True
                if self._refused and last_round:
                    return  # waiting changes nothing: somebody must act
                self._wake.wait(min(backoff, 2.0) if self._stop.is_set() else backoff)
                backoff = min(2 * backoff, _MAX_BACKOFF_S)
            self._wake.clear()

    def _report(self, error: Exception) -> None:
        if self._refused:
            log.warning("%s; training goes on, metrics wait in %s", error, self.spool.path)
            return
        reason = (str(error).splitlines() or [""])[0][:400]
        log.warning(
            "tracking server %s fails (%s: %s); training goes on, metrics wait in %s",
            self._shipper.uri, type(error).__name__, reason, self.spool.path,
        )  # fmt: skip

    def finish(self, status: Status) -> None:
        """Record the end and wait up to `flush_timeout_s` until everything is sent."""
        super().finish(status)
        self._stop.set()
        self._wake.set()
        if self._thread.is_alive():
            self._thread.join(self._flush_timeout_s)
        if self._thread.is_alive() or self._refused:
            log.warning(
                "tracking server %s did not take everything; send the rest with: python -m experiments.track sync %s",
                self._shipper.uri, self.run_dir,
            )  # fmt: skip


def page_tags(description: Sequence[str], git_commit: str, task: str, device: str) -> dict[str, str]:
    """Return the tags from which MLflow fills the page of a run: description, source and what runs are told apart by.

    Args:
        description: lines about the run, shown as they are.
        git_commit: of the code.
        task: of the training.
        device: cpu or cuda.
    """
    command = f"{Path(sys.argv[0]).stem}: {shlex.join(sys.argv[1:])}"
    text = "\n".join(["```", *description, "```", "", f"`{command}`"])
    return {
        "mlflow.note.content": text[:_MAX_NOTE],
        "mlflow.source.name": "experiments.train",
        "mlflow.source.type": "LOCAL",
        "mlflow.source.git.commit": git_commit.removesuffix("+changes"),
        "task": task,
        "device": device,
    }


def resolve_uri(uri: str, output_dir: Path) -> str:
    """Return the address of MLflow: the given one, else MLFLOW_TRACKING_URI, else a sqlite file in the runs' folder.

    Args:
        uri: `tracking.uri`, may be empty.
        output_dir: folder of all runs.

    Raises:
        ValueError: MLFLOW_TRACKING_URI is no address that `tracking.uri` takes.
    """
    from_environment = os.environ.get("MLFLOW_TRACKING_URI", "")
    if not uri and from_environment:
        try:
            TrackingConfig(uri=from_environment).validate()
        except ValueError as error:
            raise ValueError(f"MLFLOW_TRACKING_URI, which stands in for tracking.uri: {error}") from None
    return uri or from_environment or f"sqlite:///{(output_dir / 'mlflow.db').resolve()}"


def sync_run(run_dir: Path) -> int:
    """Send what a finished or interrupted run could not send (an outage).

    Args:
        run_dir: a run folder with tracking.json.

    Returns:
        The number of events sent.

    Raises:
        ValueError: the folder was not tracked by MLflow, or the server answers and somebody must act.
    """
    state = read_state(run_dir)
    if state is None:
        raise ValueError(
            f"run folder ({run_dir}) must hold {STATE_NAME}; only runs with tracking.backend=mlflow have it"
        )
    if state.get("torn"):
        from experiments.records.run_folder import CONFIG_NAME, recorded_config  # imports torch; the page needs none

        config = recorded_config(run_dir)
        if config is None:
            raise ValueError(f"run folder ({run_dir}) must hold {STATE_NAME} or {CONFIG_NAME}; both are torn")
        uri = resolve_uri(config.tracking.uri, run_dir.resolve().parent)
        return Shipper(run_dir, uri, config.tracking.experiment, config.name).ship()
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
