"""Look at tracked runs, and send what a dead server missed.

python -m experiments.track ui [--port 5000]      MLflow's page over the sqlite file, on this machine only
python -m experiments.track sync RUN [RUN ...]    replay run folders into their server; sending twice does no harm
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import sqlite3
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from urllib.parse import quote

from experiments.cli.command_line import run_command
from experiments.cli.parser import Parser
from experiments.records.shipping import is_unreachable
from experiments.records.spool import SPOOL_NAME
from experiments.records.tracking import resolve_uri, sync_run

MAX_PORT = 65535


def open_ui(output_dir: Path, uri: str, port: int) -> int:
    """Serve MLflow's page on 127.0.0.1 until Ctrl-C or SIGTERM.

    Args:
        output_dir: folder of the runs.
        uri: store, empty = MLFLOW_TRACKING_URI, or the sqlite file there.
        port: TCP.

    Returns:
        An exit code.

    Raises:
        ValueError: if there is no sqlite file yet, or the port is taken; the next free one is named.
    """
    if not 1 <= port <= MAX_PORT:
        raise ValueError(f"--port ({port}) must be 1 to {MAX_PORT}; leave it out for 5000")
    database = (output_dir / "mlflow.db").resolve()
    if not (uri or os.environ.get("MLFLOW_TRACKING_URI") or database.exists()):
        raise ValueError(f"output_dir ({output_dir}) must hold mlflow.db; train with tracking.backend=mlflow first")
    store = resolve_uri(uri, output_dir)
    if is_taken(port):
        free = next((other for other in range(port + 1, min(port + 100, MAX_PORT + 1)) if not is_taken(other)), 0)
        raise ValueError(f"--port ({port}) must be free and another program listens there; use --port {free}")
    artifacts = (output_dir / "mlartifacts").resolve().as_uri()
    command = [
        sys.executable,
        "-m",
        "mlflow",
        "server",
        "--backend-store-uri",
        store,
        "--default-artifact-root",
        artifacts,
    ]
    # One process: several take long to start, and a busy machine ends those that do not answer in time.
    command += ["--host", "127.0.0.1", "--port", str(port), "--workers", "1"]
    sys.stderr.write(f"MLflow at http://127.0.0.1:{port}/{runs_page(store)} (Ctrl-C ends it)\n")
    environment = {**os.environ, "MLFLOW_DISABLE_TELEMETRY": "true", "DO_NOT_TRACK": "true"}
    # MLflow's jobs judge texts of language models; their seven processes take 1.7 GB and half of the start.
    environment.setdefault("MLFLOW_SERVER_ENABLE_JOB_EXECUTION", "false")
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)  # the server would live on, and keep the port
    try:
        with subprocess.Popen(command, env=environment) as server:
            try:
                return server.wait()
            except KeyboardInterrupt:
                server.terminate()
                return 0
    finally:
        signal.signal(signal.SIGTERM, before)


def is_taken(port: int) -> bool:
    """Return whether a program listens on a TCP port of this machine."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return True
    return False


def runs_page(store: str) -> str:
    """Return MLflow's page with the runs of the newest experiment of a sqlite store; empty where none is known.

    It is told that models are trained: it opens on its pages for language models otherwise.

    Args:
        store: `sqlite:///path`, or the address of a server, which is not asked.
    """
    path = store.removeprefix("sqlite:///")
    if path == store:
        return ""
    query = "SELECT experiment_id FROM experiments WHERE lifecycle_stage = 'active' ORDER BY creation_time DESC"
    try:
        with contextlib.closing(sqlite3.connect(f"file:{quote(path)}?mode=ro", uri=True)) as database:
            found = database.execute(query).fetchone()
    except sqlite3.Error:
        return ""
    return f"#/experiments/{found[0]}/runs?workflowType=machine_learning" if found else ""


def main(arguments: Sequence[str]) -> int:
    """Run the command line; returns the exit code."""
    parser = Parser.of_command("track", __doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    ui = commands.add_parser("ui", help="open MLflow's page over the local runs")
    ui.add_argument("--output-dir", type=Path, default=Path("runs"), help="folder of the runs (default: runs)")
    ui.add_argument("--uri", default="", help="another MLflow store")
    ui.add_argument("--port", type=int, default=5000, help="TCP port on 127.0.0.1 (default: 5000)")
    sync = commands.add_parser("sync", help="send what was not sent yet")
    sync.add_argument("runs", type=Path, nargs="+", help="run folders")
    options = parser.parse_args(list(arguments))
    if options.command == "ui":
        return open_ui(options.output_dir, options.uri, options.port)
    for run_dir in options.runs:
        try:
            sent = sync_run(run_dir)
        except ValueError:
            raise
        except Exception as error:  # a server that is still down, in whatever words the client has for it
            reason = (str(error).splitlines() or [type(error).__name__])[0][:400]
            wanted = (
                f"must answer and does not ({reason}); start it and try again"
                if is_unreachable(error)
                else f"must take the run and fails ({type(error).__name__}: {reason}); nothing is lost, all is in "
                f"{run_dir / SPOOL_NAME}"
            )
            raise ValueError(f"tracking server of {run_dir} {wanted}") from error
        sys.stdout.write(f"{run_dir}: {sent} events sent\n")
    return 0


if __name__ == "__main__":
    sys.exit(run_command(main))
