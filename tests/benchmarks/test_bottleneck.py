"""A stage that is slowed is found by name, through the real loader and a tiny model."""

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import benchmarks.stages.measure as stages_module
import pipeline.loader as loader_module
from benchmarks.bottleneck import analyse, changed, main
from benchmarks.stages.measure import DECODE, LAUNCH, MODEL, Measured, Times
from benchmarks.stages.model import Change
from benchmarks.stages.report import batch_factors, data_change, size_change, summary
from experiments.cli.command_line import run_command
from experiments.config import load_config
from experiments.engine.learner import Learner
from experiments.engine.step import TrainingStep
from experiments.runtime import init_runtime
from pipeline.media.cut_decoder import CutDecoder
from pipeline.store.reader import Store
from pipeline.synthetic import SyntheticSpec, make_store

DELAY_S = 0.2  # a clip: more than a step of this model takes on a busy machine
CONFIG = """\
version: 1
output_dir: {output}
data:
  path: {store}
  crop_size_px: 32
  jitter_min_px: 32
  jitter_max_px: 32
  num_threads: 1
  num_workers: 0
  prefetch_batches: 1
  decoder: cpu
model: {{variant: small, num_classes: 2, width: 8, pool_window: 1, drop_pathway_rate: 0.0}}
train: {{clips_per_step: 2, steps: 100}}
runtime: {{precision: fp32, device: cpu, num_threads: 1}}
tracking: {{backend: none, system_metrics_interval_s: 0}}
"""


@pytest.fixture(scope="module")
def config_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store and a configuration that train in seconds, in one process."""
    folder = tmp_path_factory.mktemp("bottleneck")
    make_store(folder / "store", SyntheticSpec(num_classes=2, train_streams=2, val_streams=2, size_px=32))
    path = folder / "tiny.yaml"
    path.write_text(CONFIG.format(output=folder / "runs", store=folder / "store"), encoding="utf-8")
    return path


def slowed(method: Callable[..., Any], seconds: float) -> Callable[..., Any]:
    """The same after a pause."""

    def slow(*arguments: Any, **named: Any) -> Any:
        time.sleep(seconds)
        return method(*arguments, **named)

    return slow


PLACES = {  # stage -> what is slowed, and clips that one call serves
    "storage read": ([(Store, "read_video")], 1),
    "video decode": ([(CutDecoder, "decode")], 1),
    "audio read": ([(Store, "read_audio")], 1),
    "host to device": ([(loader_module, "collate"), (stages_module, "collate")], 2),
    "host launches": ([(Learner, "begin_step")], 2),
    "forward + backward": ([(TrainingStep, "find_gradients")], 2),
}


@pytest.mark.integration
@pytest.mark.parametrize("stage", PLACES)
def test_a_slowed_stage_is_found_by_name(stage: str, config_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    places, clips = PLACES[stage]
    for owner, name in places:
        monkeypatch.setattr(owner, name, slowed(getattr(owner, name), clips * DELAY_S))
    monkeypatch.setattr(stages_module, "WARM_UP_STEPS", 1)
    config = load_config(config_file)
    found = analyse(config, init_runtime(config.runtime), clips=2, steps=2, seconds=0.5)
    assert found["verdict"]["binding"] == stage, found["stages"]
    assert f"BOUND BY {stage}" in summary(found)
    assert "It waits, it does not compute" in summary(found)
    own = next(row for row in found["stages"] if row["name"] == stage)
    assert own["ms"] >= 1e3 * DELAY_S * 0.95
    assert found["end_to_end"]["clips_per_second"] < 1.2 / DELAY_S  # the training feels it


@pytest.mark.integration
def test_command_writes_table_rows_picture_and_metrics(config_file: Path, tmp_path: Path, capsys: Any) -> None:
    out, plot, run = tmp_path / "rows.json", tmp_path / "plot.png", tmp_path / "run"
    run.mkdir()
    short = ["--clips", "4", "--steps", "2", "--seconds", "0.1"]
    given = [str(config_file), *short, "--out", str(out), "--plot", str(plot), "--run", str(run), "--verify", "audio"]
    assert run_command(main, given) == 0
    text = capsys.readouterr().out
    assert "BOUND BY" in text.rsplit("\n\n", 1)[1]  # the last lines
    assert "verified audio" in text
    row = json.loads(out.read_text())["rows"][0]
    names = [stage["name"] for stage in row["stages"]]
    assert names == [
        "storage read", "video decode", "audio read", "log-mel", "resize + normalise", "host to device",
        "host launches", "forward + backward",
    ]  # fmt: skip
    assert {item["name"] for item in row["what_if"]} == {"workers", "gop", "audio", "cached", "batch"}
    assert row["verdict"]["rate"] == pytest.approx(min(row["limits"].values()))
    assert plot.read_bytes()[:4] == b"\x89PNG"
    metrics = json.loads((run / "metrics.jsonl").read_text().splitlines()[0])["metrics"]
    assert metrics["bottleneck/clips_per_second"] == pytest.approx(row["end_to_end"]["clips_per_second"])


def verified(config_file: Path, other: Path, name: str, clips: int, **spec: int) -> dict[str, Any]:
    """The row of a what-if that was measured on another store, whose error is that of its prediction."""
    make_store(other, SyntheticSpec(num_classes=2, train_streams=2, val_streams=2, **spec))
    config = load_config(config_file)
    found = analyse(
        config, init_runtime(config.runtime), clips=clips, steps=2, seconds=0.1, verify=name, other_data=str(other)
    )
    row: dict[str, Any] = next(row for row in found["what_if"] if row["name"] == name)
    assert row["error"] == pytest.approx(row["predicted_clips_per_second"] / row["measured_clips_per_second"] - 1)
    return row


@pytest.mark.integration
def test_another_gop_is_verified_on_a_store_that_has_it(config_file: Path, tmp_path: Path) -> None:
    row = verified(config_file, tmp_path / "other", "gop", clips=6, size_px=32, gop=4)
    assert row["gain"] >= 1.0
    assert row["fix"].endswith(("--gop 3", "--gop 4", "--gop 5"))


@pytest.mark.integration
def test_another_store_is_predicted_from_its_own_stages_and_verified(config_file: Path, tmp_path: Path) -> None:
    row = verified(config_file, tmp_path / "other", "data", clips=4, size_px=128, gop=4)
    assert row["gain"] <= 1.0  # pictures of sixteen times the area; the model may bind
    assert row["fix"] == f"data.path={tmp_path / 'other'}"


def test_another_store_changes_the_stages_of_the_data_alone() -> None:
    now, other = Measured(), Measured()
    for found, decode, model in ((now, 10.0, 30.0), (other, 4.0, 99.0)):
        found.add(DECODE, "readers", Times(decode, decode))
        found.add(MODEL, "thread", Times(model, model))
    assert data_change(now, other, "b").factors == pytest.approx({DECODE: 0.4})
    assert data_change(now, Measured(), "b").factors == {}


def test_smaller_pictures_are_offered_where_stored_ones_exceed_the_crops(config_file: Path) -> None:
    config = load_config(config_file)
    largest = config.data.jitter_max_px
    change = size_change(config, Measured(short_side_px=2.0 * largest))
    assert change is not None
    assert change.factors[DECODE] == pytest.approx(0.25)
    assert change.fix.endswith(f"--short-side {largest}")
    assert size_change(config, Measured(short_side_px=float(largest))) is None


def test_wrong_use_is_refused(config_file: Path, capsys: Any) -> None:
    assert run_command(main, [str(config_file), "--clips", "1"]) == 2
    assert "--clips and --steps must be at least 2" in capsys.readouterr().err
    assert run_command(main, [str(config_file), "--verify", "gop"]) == 2
    assert "--verify gop needs --other-data STORE" in capsys.readouterr().err
    assert run_command(main, [str(config_file), "--verify", "audio", "--other-data", "x"]) == 2
    assert "must come with --verify gop or data" in capsys.readouterr().err
    assert run_command(main, [str(config_file), "--plot", str(config_file.parent / "none" / "x.png")]) == 2
    assert "must be a file in a folder that is there" in capsys.readouterr().err
    assert run_command(main, [str(config_file), "--run", str(config_file)]) == 2
    assert "must be a run folder" in capsys.readouterr().err
    assert run_command(main, [str(config_file), "--other-data", str(config_file.parent / "none")]) == 2
    assert "none) must be the same videos prepared in another way: data.path" in capsys.readouterr().err
    assert run_command(main, [str(config_file), "--plot", str(config_file.parent / "none" / "x.png")]) == 2
    assert "must be a file in a folder that is there" in capsys.readouterr().err
    assert run_command(main, [str(config_file), "--run", str(config_file)]) == 2
    assert "must be a run folder" in capsys.readouterr().err
    assert run_command(main, [str(config_file), "--other-data", str(config_file.parent / "none")]) == 2
    assert "none) must be the same videos prepared in another way: data.path" in capsys.readouterr().err


def test_a_what_if_is_a_difference_of_the_configuration(config_file: Path) -> None:
    config = load_config(config_file)
    assert changed(config, Change("workers", {}, {}, "data.num_threads=3")).data.num_threads == 3
    assert changed(config, Change("batch", {}, {}, "")).train.clips_per_step == 4
    assert changed(config, Change("cuda_graph", {}, {}, "runtime.cuda_graph=auto")).runtime.cuda_graph == "auto"
    assert changed(config, Change("audio", {}, {}, "")) == config
    assert changed(config, Change("gop", {}, {}, ""), "other").data.path == "other"


def test_twice_the_batch_halves_the_fixed_part() -> None:
    """40 ms a step and 5 a clip: 15 ms a clip at 4, 25 at 2, 10 at 8."""
    measured = Measured(clips=4, half_batch_ms={LAUNCH: 0.0, MODEL: 25.0})
    measured.add(LAUNCH, "thread", Times(0.0, 0.0))
    measured.add(MODEL, "thread", Times(15.0, 15.0))
    measured.add(DECODE, "readers", Times(1.0, 1.0))
    assert batch_factors(measured) == pytest.approx({LAUNCH: 1.0, MODEL: 10.0 / 15.0})
    measured.half_batch_ms = {LAUNCH: 0.0, MODEL: 90.0}  # disturbed: at most all of it is fixed
    assert batch_factors(measured) == pytest.approx({LAUNCH: 1.0, MODEL: 0.5})
