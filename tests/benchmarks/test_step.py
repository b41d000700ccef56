"""The training-step benchmark: every way that runs here, limits that are kept, rows that add up."""

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from benchmarks import step
from benchmarks.ops.roofline import step_floor
from benchmarks.steps import measure as step_measure
from benchmarks.steps.measure import Job
from benchmarks.steps.ways import WAYS, synthetic_batch, trainee, ways_here
from experiments.engine.graphs import WARM_UP_STEPS
from kernels.library import fused_devices
from model.flops import count
from model.variants import VARIANTS

pytestmark = pytest.mark.integration  # starts processes or trains

EAGER = ("fused", "eager 4-D", "pyslowfast", "eager 5-D")


def job(way: str, **changes: Any) -> Job:
    settings = {"variant": "small", "clips": 2, "pixels": 32, "dtype": "float32", "device": "cpu", "repeats": 3}
    return Job(**{**settings, "way": way, **changes})


@pytest.mark.integration
def test_every_eager_way_is_timed_with_and_without_audio() -> None:
    for way in ways_here("cpu", "cpu" in fused_devices(), EAGER):
        kept, dropped = step_measure.measure(job(way))
        assert (kept["audio"], dropped["audio"]) == ("kept", "dropped")
        assert kept["tflop"] > dropped["tflop"] > 0
        for row in (kept, dropped):
            assert row["clips_per_s"] == pytest.approx(2e3 / row["ms"], rel=1e-2)
            assert row["tflop_per_s"] == pytest.approx(1e3 * row["tflop"] / row["ms"], abs=6e-4)
            assert row["floor_ms"] > 0
            assert row["timed_steps"] >= 3


@pytest.mark.parametrize("way", EAGER)
def test_a_step_trains_every_weight_once_and_a_dropped_one_leaves_the_audio_alone(way: str) -> None:
    if not ways_here("cpu", "cpu" in fused_devices(), (way,)):
        pytest.skip("the fused operations are not built")
    config = VARIANTS["small"]
    inputs = synthetic_batch(config, 2, 32, "cpu")
    with trainee(way, config, inputs, torch.float32) as made:
        before = {name: p.detach().clone() for name, p in made.model.named_parameters()}

        def changed() -> set[str]:
            """Parts whose weights moved."""
            now = made.model.named_parameters()
            names = {name.removeprefix("plain.") for name, p in now if not torch.equal(p, before[name])}
            return {name.partition(".")[0] for name in names}

        momentum = [made.optimizer.state[p]["momentum_buffer"] for p in made.model.parameters()]
        assert all(not m.any() for m in momentum)  # there from the start: a capture can make none
        made.step(audio=False)
        assert {"slow", "fast", "head"} <= changed()
        assert "audio" not in changed()
        made.step(audio=True)
        assert "audio" in changed()
        assert all(p.grad is None for p in made.model.parameters())


def test_operations_are_those_of_the_flop_count() -> None:
    """Forward of the floor against model/flops.py, to the last multiply-add."""
    for variant, pixels in (("small", 64), ("avslowfast_r50_4x16", 224), ("slowfast_r50_4x16", 224)):
        floor = step_floor(VARIANTS[variant], 2, pixels)
        counted = count(VARIANTS[variant], pixels, pixels)
        expected = sum(v for (pathway, _), v in counted.multiply_adds.items() if pathway != "synchronization")
        assert sum(layer.forward for layer in floor.layers) == 2 * 2 * expected
    assert 2.85 < floor.tflop * 1e12 / (4 * expected) < 3.0  # the stems have no gradient of their input


def test_floor_takes_the_longer_of_operations_and_bytes() -> None:
    floor = step_floor(VARIANTS["avslowfast_r50_4x16"], 32, 224)
    slow_memory, fast_memory = floor.milliseconds(1000.0, 1e9), floor.milliseconds(1e12, 1e9)
    assert slow_memory == pytest.approx(floor.gigabytes, rel=1e-3)
    assert fast_memory < 1e-3 * slow_memory
    assert floor.milliseconds(1e12, 500.0) == pytest.approx(floor.tflop / 500 * 1e3, rel=1e-3)
    assert 20 < floor.milliseconds(4178.0, 790.0) < 50


def test_ways_of_a_device() -> None:
    names = tuple(WAYS)
    assert ways_here("cuda", True, names) == names
    assert all(not WAYS[name].ours for name in ways_here("cuda", False, names))
    assert not any("graph" in name or "overhead" in name for name in ways_here("cpu", True, names))
    assert WAYS["fused graph"].ours
    assert not WAYS["pyslowfast"].channels_last


@pytest.mark.needs_cuda
def test_a_graph_takes_the_steps_of_its_launches() -> None:
    """Six replayed steps and six launched ones, audio kept and dropped in turn, from the same weights."""
    config = replace(VARIANTS["small"], dropout_rate=0.0)
    inputs = synthetic_batch(config, 8, 64, "cuda", torch.float16)
    found = []
    for way in ("fused", "fused graph"):
        with trainee(way, config, inputs, torch.bfloat16) as made:
            kept, dropped = (lambda made=made: made.step(True)), (lambda made=made: made.step(False))
            if way == "fused":
                for one in (kept, dropped):
                    for _ in range(WARM_UP_STEPS + 1):
                        one()
            else:
                kept, dropped = made.stepper(True), made.stepper(False)
            for _ in range(3):
                kept()
                dropped()
            found.append(torch.cat([p.detach().flatten() for p in made.model.parameters()]))
    torch.testing.assert_close(found[1], found[0], rtol=1e-2, atol=1e-3)


def test_pyslowfast_runs_nothing_of_ours() -> None:
    inputs = synthetic_batch(VARIANTS["small"], 2, 32, "cpu")
    with trainee("pyslowfast", VARIANTS["small"], inputs, torch.float32) as made:
        modules = list(made.model.modules())
        assert made.inputs.frames.is_contiguous()
        assert sum(type(m) is nn.Conv3d for m in modules) > 10
        assert sum(type(m) is nn.BatchNorm3d for m in modules) > 10
        assert not any(type(m).__module__.startswith(("kernels", "model.")) for m in modules)


FAKE_WORKER = """
import json, sys, time
say = lambda m: (sys.stdout.write("noise of a library\\n" + json.dumps(m) + "\\n"), sys.stdout.flush())
for job in json.loads(sys.argv[-1]):
    say({"begin": job})
    if job["way"] == "compile eager": time.sleep(60)
    if job["way"] == "eager 5-D": sys.exit(7)
    if job["way"] == "pyslowfast": say({"failed": "RuntimeError: no"})
    else: say({"row": {"way": job["way"], "clips": job["clips"]}})
say({"end": True})
"""


def test_a_way_without_end_costs_its_own_row(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    script = tmp_path / "worker"
    script.write_text(f'#!/bin/sh\nexec {sys.executable} {tmp_path / "worker.py"} "$@"\n')
    (tmp_path / "worker.py").write_text(FAKE_WORKER)
    script.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(script))
    told: list[dict[str, Any]] = []
    ways = ("fused", "compile eager", "pyslowfast", "eager 5-D", "eager 4-D")
    rows = step.measure_all([job(way) for way in ways], limit_s=2.0, record=told.append)
    assert told == rows
    assert [row["way"] for row in rows] == list(ways)
    reasons = [row.get("failed") for row in rows]
    assert reasons == [None, "not finished within 2 s", "RuntimeError: no", "the process ended with exit code 7", None]


@pytest.mark.integration
def test_command_line_appends_rows(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "rows.json"
    arguments = ["--device", "cpu", "--variants", "small", "--clips", "2", "--pixels", "32", "--repeats", "1"]
    for way in ("pyslowfast", "eager 4-D"):
        assert step.main([*arguments, "--ways", way, "--audio", "kept", "--out", str(out)]) == 0
    rows = json.loads(out.read_text())["rows"]
    assert [row["way"] for row in rows] == ["pyslowfast", "eager 4-D"]
    assert {"machine", "commit", "command"} <= rows[0].keys()
    assert "--ways pyslowfast" in rows[0]["command"]
    assert "pyslowfast" in capsys.readouterr().out
