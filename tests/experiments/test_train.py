"""Training as a user starts it: continue after a kill, stop on a signal, bad input, several processes."""

import json
import math
import random
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from experiments.cli.command_line import run_command
from experiments.config import Config, load_config
from experiments.engine.data import DataSetupError, require_samples
from experiments.evaluate import main as evaluate_main
from experiments.records.checkpoint import newest_valid, read_checkpoint
from experiments.records.run_folder import read_evaluations, read_summary, record_evaluations, write_summary
from experiments.records.spool import read_metrics
from experiments.train import main
from pipeline.synthetic import SyntheticSpec, make_store
from tests.experiments.support.forked import run_ranks
from tests.experiments.support.processes import digest, final_state, start, start_python, wait_for_step

WRITE = Callable[..., Path]
SUMMARY_KEYS = {"config_digest", "data_fingerprint", "steps", "clips_per_second", "data_wait_share", "wall_time_s"}
SUMMARY_KEYS |= {"top1", "top5", "versions"}


def run_in_process(config: Path, *overrides: str) -> int:
    return run_command(main, [str(config), *overrides])


@pytest.mark.integration
@pytest.mark.pictures
def test_run_folder_is_complete_and_a_finished_run_is_left_alone(write_config: WRITE, tmp_path: Path) -> None:
    config, overrides = write_config(), ["eval.interval_steps=3", "data.num_workers=-1"]
    assert run_in_process(config, *overrides) == 0
    run_dir = tmp_path / "runs" / "tiny"
    summary = json.loads((run_dir / "summary.json").read_text())
    assert summary.keys() >= SUMMARY_KEYS
    assert summary["steps"] == 6
    assert summary["finished"] is True
    assert summary["versions"].keys() >= {"python", "torch", "dali", "cuda", "git_commit"}
    assert load_config(run_dir / "config.yaml") == load_config(config, overrides)
    assert sorted(read_evaluations(run_dir)) == [3, 6]
    assert summary["top1"] == read_evaluations(run_dir)[6]["top1"]
    for name in ("plots/curves.png", "plots/confusion.png"):
        assert (run_dir / name).read_bytes().startswith(b"\x89PNG")
    for name in ("per_class.csv", "plots/curves.png", "plots/confusion.png", "log.txt", "environment.txt"):
        assert (run_dir / name).stat().st_size > 0
    best = max(read_evaluations(run_dir).items(), key=lambda item: (item[1]["top1"], -item[0]))
    assert read_checkpoint(run_dir / "checkpoints" / "best").step == best[0]
    before = digest(final_state(run_dir))
    assert run_in_process(config, *overrides) == 0
    assert json.loads((run_dir / "summary.json").read_text()) == summary
    assert f"nothing was due: top1 {100 * summary['top1']:.2f} %" in (run_dir / "log.txt").read_text()
    assert digest(final_state(run_dir)) == before


@pytest.mark.integration
def test_evaluate_command_repeats_the_score_of_the_run(write_config: WRITE, tmp_path: Path, capsys: Any) -> None:
    assert run_in_process(write_config()) == 0
    run_dir = tmp_path / "runs" / "tiny"
    assert run_command(evaluate_main, [str(run_dir), "--checkpoint", "last"]) == 0
    report = json.loads((run_dir / "evaluations" / "val-step6-1x1x32px" / "report.json").read_text())
    assert report["metrics"] == read_evaluations(run_dir)[6]
    assert report["samples"]["scored"] + report["samples"]["quarantined"] == report["samples"]["manifest"] == 16
    assert run_command(evaluate_main, [str(run_dir), "views.num_clips=2", "views.num_crops=3"]) == 0
    capsys.readouterr()
    assert run_command(evaluate_main, [str(run_dir), "model.width=16"]) == 2
    assert "is of another model" in capsys.readouterr().err


@pytest.mark.integration
def test_report_goes_beside_its_checkpoint_and_replaces_reports_only(
    write_config: WRITE, tmp_path: Path, capsys: Any
) -> None:
    assert run_in_process(write_config(), "train.steps=2") == 0
    run_dir, copy = tmp_path / "runs" / "tiny", tmp_path / "copy"
    shutil.copytree(run_dir, copy)
    for _ in range(2):
        assert run_command(evaluate_main, [str(copy)]) == 0
    assert (copy / "evaluations" / "val-step2-1x1x32px" / "report.json").exists()
    assert not (run_dir / "evaluations").exists()
    capsys.readouterr()
    assert run_command(evaluate_main, [str(copy), "--output", str(run_dir)]) == 2
    assert "must be absent, empty or an earlier report, but holds .launch" in capsys.readouterr().err
    assert (run_dir / "config.yaml").exists()


def interrupted_equals_uninterrupted(write_config: WRITE, tmp_path: Path, trials: int) -> None:
    """Kill at random steps, continue, compare with the run that was left alone."""
    overrides = ["train.steps=24", "checkpoint.interval_steps=5", "model.dropout_rate=0.5", "eval.precise_bn_batches=2"]
    overrides += ["data.num_workers=1"]
    assert run_in_process(write_config("whole"), *overrides, "eval.interval_steps=12") == 0
    expected = final_state(tmp_path / "runs" / "whole")
    steps = random.Random(7).sample(range(1, 23), trials)
    for step in steps:
        config = write_config(f"killed{step}")
        command = ["-m", "experiments.train", str(config), *overrides, "eval.interval_steps=12"]
        process = start(command)
        run_dir = tmp_path / "runs" / f"killed{step}"
        wait_for_step(process, run_dir, step)
        process.send_signal(signal.SIGKILL)
        process.communicate()
        assert process.returncode == -signal.SIGKILL
        assert run_in_process(config, *overrides, "eval.interval_steps=12") == 0
        got = final_state(run_dir)
        assert digest(got) == digest(expected), f"killed after step {step}"
        assert read_evaluations(run_dir) == read_evaluations(tmp_path / "runs" / "whole")
        metrics, wanted = (read_metrics(d / "metrics.jsonl") for d in (run_dir, tmp_path / "runs" / "whole"))
        for name in ("train/loss", "train_eval/loss", "train_eval/top1"):
            assert metrics[name] == wanted[name]


@pytest.mark.integration
def test_sigkill_then_continue_is_bitwise_equal(write_config: WRITE, tmp_path: Path) -> None:
    interrupted_equals_uninterrupted(write_config, tmp_path, trials=1)


@pytest.mark.slow
def test_sigkill_then_continue_is_bitwise_equal_five_times(write_config: WRITE, tmp_path: Path) -> None:
    interrupted_equals_uninterrupted(write_config, tmp_path, trials=5)


@pytest.mark.integration
@pytest.mark.parametrize("number", [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.slow)])
def test_stop_signal_saves_and_says_so(write_config: WRITE, tmp_path: Path, number: signal.Signals) -> None:
    whole, config = write_config("whole"), write_config("stopped")
    overrides = ["train.steps=40", "checkpoint.interval_steps=0", "data.num_workers=-1"]
    process = start_python(["-m", "experiments.train", str(config), *overrides])  # as a user does
    run_dir = tmp_path / "runs" / "stopped"
    wait_for_step(process, run_dir, 4)
    process.send_signal(number)
    output = process.communicate(timeout=60)[0]
    assert process.returncode == 75, output[-2000:]
    stopped = final_state(run_dir)
    events = (run_dir / "metrics.jsonl").read_text()
    assert '"end": "KILLED"' in events
    summary = json.loads((run_dir / "summary.json").read_text())
    assert summary["finished"] is False
    assert f"saved step {stopped['step']} of 40; the same command continues" in output
    assert summary["steps"] == stopped["step"] >= 4
    # The state is the one an uninterrupted run has at that step.
    assert run_in_process(whole, *overrides, f"checkpoint.interval_steps={stopped['step']}",
                          "checkpoint.keep=40") == 0  # fmt: skip
    at_step = read_checkpoint(tmp_path / "runs" / "whole" / "checkpoints" / f"step-{stopped['step']:08d}").load()
    assert digest(at_step) == digest(stopped)


@pytest.mark.slow
def test_stop_of_torchrun_saves_the_same_step_on_all_ranks(write_config: WRITE, tmp_path: Path) -> None:
    overrides = ["train.steps=300", "train.clips_per_step=16", "checkpoint.interval_steps=0"]
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m", "experiments.train"]
    process = start([*torchrun, str(write_config()), *overrides])
    run_dir = tmp_path / "runs" / "tiny"
    wait_for_step(process, run_dir, 3)
    process.send_signal(signal.SIGTERM)
    output = process.communicate(timeout=120)[0]
    assert "exitcode  : 75" in output or process.returncode in (1, 75, -15), output[-2000:]
    assert final_state(run_dir)["step"] >= 3
    assert '"end": "KILLED"' in (run_dir / "metrics.jsonl").read_text()


@pytest.mark.slow
def test_stop_in_an_evaluation_is_made_up_for(write_config: WRITE, tmp_path: Path) -> None:
    process = start(["-m", "experiments.train", str(write_config()), "train.steps=3", "views.num_clips=400"])
    run_dir = tmp_path / "runs" / "tiny"
    wait_for_step(process, run_dir, 3)  # now it evaluates
    process.send_signal(signal.SIGSTOP)
    process.send_signal(signal.SIGINT)
    time.sleep(0.1)
    process.send_signal(signal.SIGCONT)
    process.communicate(timeout=120)
    assert process.returncode == 75  # the first one ends the evaluation, too
    assert read_evaluations(run_dir) == {}
    assert run_in_process(tmp_path / "tiny.yaml", "train.steps=3", "views.num_clips=400") == 0
    assert sorted(read_evaluations(run_dir)) == [3]  # made up for


@pytest.mark.integration
@pytest.mark.parametrize(
    ("steps", "extra"),
    # With the synchronization loss, rounding is amplified by this tiny model after a few steps: its first steps count.
    [
        (12, ()),
        pytest.param(4, ("model.sync_loss=contrastive", "data.negatives=easy"), marks=pytest.mark.slow),
    ],
    ids=["plain", "synchronization"],
)
def test_two_processes_train_as_one_with_twice_the_batch(
    write_config: WRITE, tmp_path: Path, steps: int, extra: tuple[str, ...]
) -> None:
    overrides = [f"train.steps={steps}", "train.clips_per_step=16", "model.dropout_rate=0.0", "optim.warmup_steps=0"]
    overrides += ["views.num_clips=2", *extra]
    assert run_in_process(write_config("one"), *overrides) == 0
    arguments = [str(write_config("two")), *overrides, "data.num_workers=1"]
    code, output = run_ranks("experiments.train", arguments, 2, timeout_s=240)
    assert code == 0, output[-3000:]
    runs = [tmp_path / "runs" / name for name in ("one", "two")]
    for name in ("train/loss", *(["train/sync_loss"] if extra else [])):
        one, two = (read_metrics(run / "metrics.jsonl")[name][1] for run in runs)
        assert len(one) == len(two) == steps
        assert max(abs(a - b) for a, b in zip(one, two, strict=True)) < 1e-4, name
    states = [final_state(run)["model"] for run in runs]
    for name, value in states[0].items():
        if name.endswith("running_var"):  # unbiased by each rank's own number of values: 1/n apart
            torch.testing.assert_close(states[1][name], value, atol=0.05, rtol=0.02)
        elif value.is_floating_point():
            torch.testing.assert_close(states[1][name], value, atol=1e-4, rtol=1e-3)
    assert read_evaluations(runs[0]).keys() == read_evaluations(runs[1]).keys() == {steps}
    assert run_in_process(tmp_path / "two.yaml", *overrides) == 0  # another number of ranks reads the same run


def test_results_that_are_not_finite_are_null(tmp_path: Path) -> None:
    record_evaluations(tmp_path, {3: {"mean_ap": math.nan}})
    assert math.isnan(read_evaluations(tmp_path)[3]["mean_ap"])
    write_summary(tmp_path, {"mean_ap": math.nan, "seconds": {"eval": math.inf}})
    assert read_summary(tmp_path) == {"mean_ap": None, "seconds": {"eval": None}}


def test_empty_split_is_refused() -> None:
    full, empty = (SimpleNamespace(split=name, samples=[0] * n) for name, n in (("train", 3), ("val", 0)))
    with pytest.raises(DataSetupError, match=r"split 'val' of .* must hold at least one; .* data.val_split="):
        require_samples(Config(), full, empty)  # type: ignore[arg-type]


BAD_INPUT = [
    (["train.stepz=3"], "unknown key 'train.stepz'; did you mean 'steps'?"),
    (["train.steps=many"], "train.steps (many) must be a whole number"),
    (["data.path=/nowhere/store"], "data.path (/nowhere/store) must exist"),
    (["data.path="], "data.path (nothing) must be a text"),
    (["data.train_split=training"], "training"),
    (["data.rotation=true"], "data.rotation (true) must have model.head=ssl"),
    (["data.label_set=verb"], "data.label_set (verb) must be one of action"),
    (["model.num_classes=5"], "model.num_classes (5) must be 4"),
    (["train.clips_per_step=12"], "clips per rank (12 / 1 = 12) must be at most model.clips_per_bn_group (8)"),
    (["optim.warmup_share=0.7"], "optim.warmup_share (0.7) must be at most 0.5"),
    (["runtime.device=cuda"], "must find a CUDA device"),
    (["runtime.precision=fp16"], "runtime.precision (fp16) must have a CUDA device"),
    (["model.frame_stride=6"], "model.frame_stride (6) must be a multiple of model.alpha_fast (4)"),
    (["data.decoder=dali", "data.path=synthetic:unknown"], "synthetic:unknown"),
]


@pytest.mark.integration
@pytest.mark.parametrize(("overrides", "message"), BAD_INPUT, ids=[o[0][0] for o in BAD_INPUT])
def test_bad_input_is_one_line_and_leaves_nothing(
    write_config: WRITE, tmp_path: Path, capsys: Any, overrides: list[str], message: str
) -> None:
    if "runtime.device=cuda" in overrides and torch.cuda.is_available():
        pytest.skip("this machine has a CUDA device")
    assert run_in_process(write_config(), *overrides) == 2
    error = capsys.readouterr().err.strip().splitlines()
    assert error[-1].startswith("error: ")
    assert message in error[-1]
    assert "Traceback" not in "".join(error)
    assert not (tmp_path / "runs").exists()


@pytest.mark.integration
def test_damaged_store_and_text_file_are_one_line_each(write_config: WRITE, tmp_path: Path, capsys: Any) -> None:
    store = tmp_path / "store"
    make_store(store, SyntheticSpec(num_classes=4, train_streams=4, val_streams=4, size_px=32))
    shard = next((store / "shards").iterdir())
    shard.write_bytes(shard.read_bytes()[: shard.stat().st_size // 2])
    assert run_in_process(write_config(), f"data.path={store}") == 2
    assert shard.name in capsys.readouterr().err
    folder = tmp_path / "videos" / "train" / "a"
    folder.mkdir(parents=True)
    (folder / "text.mp4").write_text("not a video")
    assert run_in_process(write_config(), f"data.path={tmp_path / 'videos'}") == 2
    error = capsys.readouterr().err
    assert "text.mp4" in error
    assert "Traceback" not in error
    assert not (tmp_path / "runs").exists()


@pytest.mark.integration
def test_another_configuration_is_refused_with_the_keys(write_config: WRITE, tmp_path: Path, capsys: Any) -> None:
    config = write_config()
    assert run_in_process(config, "train.steps=2") == 0
    capsys.readouterr()
    assert run_in_process(config, "train.steps=2", "optim.lr=0.5", "model.width=16") == 2
    error = capsys.readouterr().err
    assert "model.width: 8 -> 16; optim.lr: 0.02 -> 0.5" in error
    assert "train.fresh=true" in error
    assert run_in_process(config, "train.steps=2", "optim.lr=0.5", "train.fresh=true") == 0
    moved = [p.name for p in (tmp_path / "runs").iterdir() if p.name.startswith("tiny.replaced-")]
    assert len(moved) == 1


@pytest.mark.integration
def test_fewer_steps_than_were_trained_are_refused(write_config: WRITE, capsys: Any) -> None:
    assert run_in_process(write_config(), "train.steps=4") == 0
    assert run_in_process(write_config(), "train.steps=2") == 2
    assert "holds a run with another configuration (train.steps: 4 -> 2)" in capsys.readouterr().err


@pytest.mark.integration
def test_folder_in_use_is_refused(write_config: WRITE, tmp_path: Path, capsys: Any) -> None:
    config = write_config()
    process = start(["-m", "experiments.train", str(config), "train.steps=500"])
    try:
        wait_for_step(process, tmp_path / "runs" / "tiny", 1)
        assert run_in_process(config, "train.steps=500") == 2
        assert f"is in use by process {process.pid}" in capsys.readouterr().err
        assert run_in_process(config, "train.steps=500", "train.fresh=true") == 2
        assert f"is in use by process {process.pid}" in capsys.readouterr().err
        assert [p.name for p in (tmp_path / "runs").iterdir()] == ["tiny"]
    finally:
        process.kill()
        process.communicate()


@pytest.mark.integration
def test_loss_that_is_not_finite_names_step_and_clips(
    write_config: WRITE, tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from experiments.engine.run_data import RunData

    original = RunData.batches

    def poisoned(self: RunData, first: int) -> Any:
        for step, batch in enumerate(original(self, first)):
            if step == 3:
                assert batch.frames is not None
                batch.frames[2] = float("nan")
            yield batch

    monkeypatch.setattr(RunData, "batches", poisoned)
    assert run_in_process(write_config(), "train.log_interval_steps=100", "checkpoint.interval_steps=5") == 1
    error = capsys.readouterr().err
    assert "loss at step 3 must be finite" in error
    assert "Traceback" not in error
    assert newest_valid(tmp_path / "runs" / "tiny" / "checkpoints") is None
    assert '"end": "FAILED"' in (tmp_path / "runs" / "tiny" / "metrics.jsonl").read_text()


@pytest.mark.integration
def test_overfitting_one_batch_drives_the_loss_down(write_config: WRITE, tmp_path: Path) -> None:
    overrides = [
        "debug.overfit_one_batch=true",
        "train.steps=20",
        "checkpoint.interval_steps=0",
        "model.dropout_rate=0.0",
        "model.drop_pathway_rate=0.0",
    ]
    assert run_in_process(write_config(), *overrides, "optim.lr=0.05") == 0
    losses = read_metrics(tmp_path / "runs" / "tiny" / "metrics.jsonl")["train/loss"][1]
    assert losses[0] > 1.0
    assert losses[-1] < 0.1


@pytest.mark.integration
@pytest.mark.parametrize("precision", ["bf16", pytest.param("fp16", marks=pytest.mark.needs_cuda)])
def test_half_precision_trains(write_config: WRITE, tmp_path: Path, precision: str) -> None:
    device = "cuda" if precision == "fp16" else "cpu"
    overrides = [
        f"runtime.precision={precision}",
        f"runtime.device={device}",
        "debug.synthetic_input=true",
        "train.steps=30",
        "checkpoint.interval_steps=0",
        "optim.lr=0.05",
    ]
    assert run_in_process(write_config(), *overrides, "model.drop_pathway_rate=0.0", "model.dropout_rate=0.0") == 0
    series = read_metrics(tmp_path / "runs" / "tiny" / "metrics.jsonl")
    assert series["train/loss"][1][-1] < 0.5 * series["train/loss"][1][0]
    assert ("train/grad_scale" in series) == (precision == "fp16")


@pytest.mark.integration
def test_full_disk_costs_a_checkpoint_not_the_run(
    write_config: WRITE, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: Any
) -> None:
    import experiments.engine.run as run_module

    original = run_module.save_checkpoint

    def full(folder: Path, step: int, *arguments: Any, **options: Any) -> Path:
        if step == 4:
            raise OSError(28, "No space left on device")
        return original(folder, step, *arguments, **options)

    monkeypatch.setattr(run_module, "save_checkpoint", full)
    assert run_in_process(write_config()) == 0
    assert (
        "checkpoints could not be written (No space left on device"
        in (tmp_path / "runs" / "tiny" / "log.txt").read_text()
    )
    assert final_state(tmp_path / "runs" / "tiny")["step"] == 6
