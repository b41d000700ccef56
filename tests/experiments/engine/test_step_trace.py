"""A trace of a training as a user asks for it, and that nothing of it is left behind."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from experiments.cli.command_line import run_command
from experiments.records.spool import read_metrics
from experiments.train import main
from tests.experiments.support.processes import digest, final_state


@pytest.mark.integration
def test_steps_are_traced_by_stage_and_the_weights_are_the_same(
    write_config: Callable[..., Path], tmp_path: Path
) -> None:
    plain, traced = write_config("plain"), write_config("traced")
    assert run_command(main, [str(plain)]) == 0
    assert run_command(main, [str(traced), "debug.profile_steps=2"]) == 0
    folder = tmp_path / "runs" / "traced" / "profile"
    assert sorted(path.name for path in folder.iterdir()) == ["steps-3-4.json", "steps-3-4.txt"]
    events = json.loads((folder / "steps-3-4.json").read_text())["traceEvents"]
    names = [event["name"] for event in events if str(event.get("name")).startswith("avsf: ")]
    for name in ("data", "step", "forward", "backward", "optimizer"):
        assert names.count(f"avsf: {name}") == 2, name
    for name in ("slow", "fast", "fusion", "head"):
        assert f"avsf: forward: {name}" in names
    text = (folder / "steps-3-4.txt").read_text()
    rows = {line[:22].strip(): line[22:].split() for line in text.split("\n\n")[0].splitlines()[1:]}
    assert float(rows["step"][0]) == 1.0
    assert float(rows["step"][1]) >= float(rows["forward"][1]) + float(rows["backward"][1])
    assert "Self CPU" in text  # the operations, too
    assert digest(final_state(tmp_path / "runs" / "traced")) == digest(final_state(tmp_path / "runs" / "plain"))
    assert not (tmp_path / "runs" / "plain" / "profile").exists()
    steps, ready = read_metrics(tmp_path / "runs" / "plain" / "metrics.jsonl")["data/batches_ready"]
    assert steps == [1, 2, 3, 4, 5, 6]
    assert all(0 <= value <= 4 for value in ready)
