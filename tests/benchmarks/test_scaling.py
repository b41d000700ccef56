"""The scaling model on fixed inputs: what binds, what it costs, what to buy; published figures; runs over gloo."""

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.cluster.inputs import (
    PUBLISHED,
    PUBLISHED_ERROR,
    Input,
    Inputs,
    cited,
    gather,
    nvdec_beside_cpu,
    step_times,
)
from benchmarks.cluster.model import (
    ARITHMETIC,
    DECODING,
    FIXED,
    LAUNCHES,
    NODE_STORAGE,
    REDUCE,
    SHARED_STORAGE,
    STEP,
    Cluster,
    Load,
    RankCost,
    all_reduce_ms,
    estimate,
    lone_rate,
    lost_share,
    predicted_eight,
    purchases,
    rank_step_ms,
)
from benchmarks.cluster.report import draw, load_of, make_plan, plan_text, published_rows, runs_text, size_table
from benchmarks.cluster.runs import Costs, Job, compared, config_of, judged_error, measure, part, rank_main
from benchmarks.report import all_rows
from benchmarks.scaling import GOAL, RECIPE, main
from experiments.cli.command_line import run_command
from experiments.config import load_config
from experiments.engine.data import random_batch
from experiments.runtime import Runtime

LARGEST_DIFFERENCE = 1e-3  # of a weight after some steps: sums in another order


def measured(value: float) -> Input:
    return Input(value, "", "fixed", 0.0, True)


FIXED_INPUTS = Inputs(
    step_fixed_ms=measured(8.0),
    step_clip_ms=measured(1.0),
    launch_ms=measured(1.0),
    graph_s=measured(20.0),
    restart_s=measured(40.0),
    decode_cpu_ms=measured(10.0),
    clip_kib=measured(1e9 / 1024 / 1e4),  # 10 000 clips are 1 GB
    nvdec_clips_per_s=measured(0.0),
    checkpoint_gb_per_s=measured(0.5),
    **cited(),
)
LOAD = Load(clips_per_gpu=32, parameters=40e6)
NODE = Cluster(1)


def with_values(**values: float) -> Inputs:
    return replace(FIXED_INPUTS, **{name: measured(value) for name, value in values.items()})


def test_all_reduce_is_latency_and_bytes_at_the_slowest_link() -> None:
    size = 160e6
    assert all_reduce_ms(FIXED_INPUTS, Cluster(1, 1, 4), size) == 0.0
    inside = (4.4 + 2 * 7 * 1.2) / 1e3 + 1.75 * size / 370.8e6
    assert all_reduce_ms(FIXED_INPUTS, NODE, size) == pytest.approx(inside)
    few = Cluster(4, nics_per_node=2)  # 94 GB/s between nodes
    between = (4.4 + 2 * (7 * 1.2 + 2 * 8.5)) / 1e3 + 2 * 31 / 32 * size / 94e6
    assert all_reduce_ms(FIXED_INPUTS, few, size) == pytest.approx(between)
    twice = replace(few, network_factor=2.0)
    assert all_reduce_ms(FIXED_INPUTS, twice, size) < 0.55 * all_reduce_ms(FIXED_INPUTS, few, size)


def test_links_agree_with_second_sources_within_what_is_stated() -> None:
    """A DGX A100's eight 200 Gb/s NICs gave 192 GB/s (nccl issue 1576); two nodes took 46 us (nccl issue 1244)."""
    links = cited()
    assert abs(8 * links["nic_gb_per_s"].value / 2 / 192 - 1) < links["nic_gb_per_s"].error
    latency = 1e3 * all_reduce_ms(FIXED_INPUTS, Cluster(2), 0.0)
    assert abs(latency / 46 - 1) < links["net_hop_us"].error
    assert abs(links["nvlink_gb_per_s"].value / 480 - 1) < links["nvlink_gb_per_s"].error


def test_published_figures_on_eight_gpus_are_met_within_the_stated_error() -> None:
    rows = published_rows(FIXED_INPUTS)
    assert len(rows) == len(PUBLISHED) == 6
    assert all(0 < row["error"] <= PUBLISHED_ERROR for row in rows), rows  # it knows of no losses: never too low
    assert max(row["error"] for row in rows) > PUBLISHED_ERROR - 0.05  # what is stated is no more than it must be
    slow = replace(PUBLISHED[0], bus_gb_per_s=1.0)
    assert predicted_eight(slow, FIXED_INPUTS) < 0.7 * PUBLISHED[0].eight  # links enter


BINDING = {
    ARITHMETIC: (FIXED_INPUTS, NODE, LOAD),
    FIXED: (FIXED_INPUTS, NODE, replace(LOAD, clips_per_gpu=2)),
    LAUNCHES: (with_values(launch_ms=90.0), NODE, LOAD),
    REDUCE: (FIXED_INPUTS, Cluster(2, nics_per_node=1, network_factor=0.5), replace(LOAD, clips_per_gpu=1)),
    DECODING: (FIXED_INPUTS, replace(NODE, cores_per_node=16), LOAD),
    NODE_STORAGE: (FIXED_INPUTS, replace(NODE, storage_node_gb_per_s=0.1), LOAD),
    SHARED_STORAGE: (FIXED_INPUTS, Cluster(64, storage_total_gb_per_s=10), LOAD),
}


@pytest.mark.parametrize("name", BINDING)
def test_what_is_scarce_is_named_and_is_what_to_buy(name: str) -> None:
    inputs, cluster, load = BINDING[name]
    found = estimate(inputs, cluster, load)
    assert found.binding == name
    assert list(found.limits.values()) == sorted(found.limits.values())
    buys = {
        DECODING: "twice the CPU cores in each node",
        REDUCE: "twice the network between nodes",
        NODE_STORAGE: "twice the storage",
        SHARED_STORAGE: "twice the storage",
    }
    gains = {one.what: one.gain for one in purchases(inputs, cluster, load, fixed_total=False)}
    for what, gain in gains.items():
        if what == buys.get(name):
            assert gain > 1.3
        elif what != "twice the nodes":
            assert gain == pytest.approx(1.0, abs=0.02)


def test_rates_of_a_node_in_figures() -> None:
    found = estimate(FIXED_INPUTS, NODE, replace(LOAD, checkpoint_steps=0))
    reduce_ms = all_reduce_ms(FIXED_INPUTS, NODE, 160e6)
    assert found.step_ms == pytest.approx(40 + reduce_ms)
    assert found.limits[STEP] == pytest.approx(256e3 / (40 + reduce_ms))
    assert found.limits[DECODING] == pytest.approx(10_400)  # 104 of 112 cores
    assert found.limits[NODE_STORAGE] == pytest.approx(400_000)
    assert lone_rate(FIXED_INPUTS, LOAD) == pytest.approx(800)
    assert found.efficiency == pytest.approx(found.clips_per_s / 6400)
    beside = estimate(with_values(nvdec_clips_per_s=300.0), NODE, LOAD)
    assert beside.limits[DECODING] == pytest.approx(10_400 + 8 * 300)


def test_time_is_lost_to_checkpoints_and_failures() -> None:
    """0.32 GB at 0.5 GB/s every 100 s; each failure 180 + 40 + 20 s and half of 100.64 s."""
    lost = lost_share(FIXED_INPUTS, LOAD, 0.1, failures_per_day=2.0)
    assert lost == pytest.approx(0.64 / 100.64 + 2 * (240 + 50.32) / 86400)
    with pytest.raises(ValueError, match="no time to train"):
        lost_share(FIXED_INPUTS, LOAD, 0.1, failures_per_day=1000.0)
    many = estimate(FIXED_INPUTS, Cluster(128), LOAD)
    assert many.failures_per_day == pytest.approx(1024 * 419 / (54 * 16384))


def test_more_gpus_at_the_same_clips_a_step_gain_less_and_less() -> None:
    text = size_table(FIXED_INPUTS, LOAD, 1024, NODE).splitlines()
    assert [line.split()[0] for line in text[1:]] == [str(2**n) for n in range(3, 11)]
    rates = [estimate(FIXED_INPUTS, Cluster(n), replace(LOAD, clips_per_gpu=128 // n)) for n in (1, 8, 128)]
    assert rates[0].clips_per_s < rates[1].clips_per_s < rates[2].clips_per_s
    assert rates[0].efficiency > rates[1].efficiency > 3 * rates[2].efficiency


def test_plan_of_the_recipe() -> None:
    config = load_config(RECIPE)
    plan = make_plan(config, Cluster(16), FIXED_INPUTS, 0)
    assert plan.load.clips_per_gpu == 8
    assert (plan.load.step_factor, plan.load.depth_factor, plan.scaled) == (1.0, 1.0, False)
    assert plan.clips == pytest.approx(256 * 240_258, rel=1e-4)
    assert plan.days == pytest.approx(plan.clips / plan.found.clips_per_s / 86400)
    assert plan.kwh == pytest.approx(16 * 10.2 * 24 * plan.days)
    text = plan_text(plan)
    assert f"BOUND BY {plan.found.binding}" in text.splitlines()[-2]
    assert text.splitlines()[-1].startswith("Buy next: twice the nodes")
    assert "checkpoint.interval_steps=10000" in text
    assert f"clips/s: {plan.days * 24 * 60:.0f} minutes, {plan.kwh:.0f} kWh at most" in text
    assert "clips/s: 12.0 hours, 4.0 kWh" in plan_text(replace(plan, days=0.5, kwh=4.0))
    with pytest.raises(ValueError, match="must be a multiple of the world size"):
        make_plan(config, Cluster(3), FIXED_INPUTS, 0)
    with pytest.raises(ValueError, match="--samples"):
        make_plan(load_config(RECIPE, ["data.path=data/mine"]), NODE, FIXED_INPUTS, 0)


def test_classes_of_data_that_nobody_looked_at_are_those_of_kinetics() -> None:
    config = load_config(RECIPE, ["model.num_classes=0"])
    assert load_of(config, 8).parameters == load_of(load_config(RECIPE), 8).parameters


@pytest.mark.slow
def test_a_larger_model_takes_steps_by_its_arithmetic_and_depth() -> None:
    larger = load_of(load_config(RECIPE, ["model.variant=avslowfast_r101_8x8"]), 8)
    assert 3.0 < larger.step_factor < 3.5  # 128.7 / 39.8 GFLOPs
    assert larger.depth_factor == pytest.approx(33 / 16)


def test_picture(tmp_path: Path) -> None:
    draw(FIXED_INPUTS, LOAD, 1024, replace(NODE, storage_total_gb_per_s=40), tmp_path / "scaling.png")
    assert (tmp_path / "scaling.png").read_bytes()[:4] == b"\x89PNG"


def step_row(clips: int, audio: str, ms: float, commit: str = "new") -> dict[str, Any]:
    return {
        "benchmark": "step", "device": "cuda", "variant": "avslowfast_r50_4x16", "way": "fused graph", "clips": clips,
        "audio": audio, "pixels": 224, "ms": ms, "host_ms": 1.0, "setup_s": 20.0, "commit": commit, "file": "gpu.json",
        "machine": {"gpu": "H200"},
    }  # fmt: skip


def test_a_step_is_read_from_the_newest_rows() -> None:
    rows = [step_row(8, "kept", 99.0, "old"), step_row(8, "kept", 22.0), step_row(8, "dropped", 16.0)]
    with pytest.raises(ValueError, match="32 clips, audio kept"):
        step_times(rows, 0.5)
    rows += [step_row(32, "kept", 48.0), step_row(32, "dropped", 38.0), step_row(32, "kept", 1.0) | {"way": "fused"}]
    fixed, slope, launch, setup, source = step_times(rows, 0.5)
    assert (fixed, slope, launch, setup) == pytest.approx((11.0, 1.0, 1.0, 20.0))
    assert source == "gpu.json, H200, N=8 at new, N=32 at new"


def test_nvdec_adds_what_the_loader_gains_by_it() -> None:
    row = {"benchmark": "loader", "what": "all", "machine": {"gpu": "H200"}, "commit": "new", "file": "gpu.json"}
    alone = row | {"decoder": "cpu", "clips_per_second": 1480.0}
    assert nvdec_beside_cpu([alone]).value == 0.0
    assert "unmeasured" in nvdec_beside_cpu([alone, row | {"decoder": "auto", "commit": "old"}]).source
    both = nvdec_beside_cpu([alone, row | {"decoder": "auto", "clips_per_second": 1516.0}])
    assert (both.value, both.measured) == (pytest.approx(36.0), True)
    slower = nvdec_beside_cpu([alone, row | {"decoder": "auto", "clips_per_second": 857.0}])
    assert slower.value == 0.0


def test_committed_results_are_enough_and_every_input_names_its_source() -> None:
    found = gather(all_rows())
    assert 5 < found.step_fixed_ms.value < 20
    assert 0.5 < found.step_clip_ms.value < 2
    lines = found.lines()
    assert len(lines) == 16
    assert all(("measured " in line) != ("cited " in line) for line in lines)


def test_processes_share_cores() -> None:
    cost = RankCost(fixed_ms=20.0, clip_ms=10.0, exchange_fixed_ms=2.0, exchange_byte_ms=1e-6, size_bytes=4e6)
    assert rank_step_ms(cost, 1, 8, cores=2) == pytest.approx(100)
    assert rank_step_ms(cost, 2, 8, cores=2) == pytest.approx(100 + 2 + 4)
    assert rank_step_ms(cost, 4, 8, cores=2) == pytest.approx(2 * (100 + 6 + 6))
    assert rank_step_ms(cost, 4, 8, cores=4) == pytest.approx(112)
    assert rank_step_ms(cost, 1, 8, cores=0.5) == pytest.approx(200)  # others work beside it


def test_costs_come_from_processes_that_train_for_themselves_and_from_exchanges(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    alone = {8: {"cpu_ms": 100.0}, 32: {"cpu_ms": 340.0}}
    beside = {8: {"cpu_ms": 120.0, "slowest_ms": 130.0}, 32: {"cpu_ms": 408.0, "slowest_ms": 442.0}}
    exchanged = {
        "small_ms": 0.5, "large_ms": 4.5, "small_wall_ms": 1.0, "large_wall_ms": 9.0, "gradient_bytes": 4e6
    }  # fmt: skip
    costs = Costs.of(alone, beside, exchanged)
    assert (costs.alone.fixed_ms, costs.alone.clip_ms) == pytest.approx((20.0, 10.0))
    assert (costs.cpu.fixed_ms, costs.cpu.clip_ms) == pytest.approx((24.0, 12.0))
    assert (costs.wall.fixed_ms, costs.wall.clip_ms) == pytest.approx((26.0, 13.0))
    assert (costs.cpu.exchange_fixed_ms, costs.cpu.exchange_byte_ms * 4e6) == pytest.approx((2.0, 4.0))
    assert (costs.wall.exchange_fixed_ms, costs.wall.exchange_byte_ms * 4e6) == pytest.approx((4.0, 8.0))
    monkeypatch.setattr("benchmarks.cluster.runs.usable_cpus", lambda: 2)
    idle = {"foreign_cores": 0.0, "ranks_equal": True}
    row = compared(costs, 4, 8, {"mean_ms": 308.0, "cpu_ms": 132.0, **idle})  # 2 x (130 + 3 x 4 + 1.5 x 8)
    assert (row["predicted_ms"], row["clips_per_s"]) == pytest.approx((308.0, 103.9))
    assert (row["error"], row["cpu_error"]) == pytest.approx((0.0, 0.0))  # 120 + 3 x 2 + 1.5 x 4
    lone = compared(costs, 1, 8, {"mean_ms": 100.0, "cpu_ms": 100.0, **idle})
    assert (lone["error"], lone["cpu_error"]) == pytest.approx((0.0, 0.0))
    assert judged_error(row | {"error": 0.5}) == 0.5
    assert judged_error(row | {"error": 0.5, "foreign_cores": 1.0}) == pytest.approx(0.0)
    assert "+0.0%" in runs_text([row])
    assert "RANKS DIFFER" in runs_text([row | {"ranks_equal": False}])


def test_one_process_takes_the_steps_of_a_part_of_the_batch() -> None:
    config, alone = config_of(Job(2, 8, 1, 32)), Runtime(0, 1, 0, torch.device("cpu"))
    whole = random_batch(config, alone, 16)
    second = part(whole, 8, 8)
    assert whole.frames is not None
    assert second.frames is not None
    assert torch.equal(second.frames, whole.frames[8:])
    assert second.ids == whole.ids[8:]
    row = rank_main(Job(1, 8, 2, 32))
    assert row["cpu_ms"] > 0
    assert row["gradient_bytes"] > 1e6
    assert not math.isnan(row["median_ms"])


@pytest.mark.slow
def test_two_real_processes_end_with_the_weights_of_one() -> None:
    rows = [*measure(2, 32, ((1, 8), (1, 16), (2, 8)))]
    (both,) = [row for row in rows if row["ranks"] == 2]
    assert both["ranks_equal"] is True
    assert both["weights_difference"] < LARGEST_DIFFERENCE


def test_committed_runs_are_correct_and_within_the_goal() -> None:
    rows = [row for row in all_rows() if row["benchmark"] == "scaling"]
    if not rows:
        pytest.skip("no runs over gloo are committed yet: python -m benchmarks.scaling --measure")
    latest = {(row["ranks"], row["clips"]): row for row in rows}
    assert set(latest) == {(1, 8), (1, 16), (1, 32), (2, 8), (2, 16), (4, 8)}
    several = [row for key, row in latest.items() if key[0] > 1]
    assert all(row["ranks_equal"] and row["weights_difference"] < LARGEST_DIFFERENCE for row in several)
    assert all(abs(judged_error(row)) <= GOAL for row in latest.values()), latest


def test_command_line(tmp_path: Path, capsys: Any) -> None:
    plot = tmp_path / "plot.png"
    assert run_command(main, ["--plan", str(RECIPE), "--nodes", "16", "--gpus-per-node", "8", "--plot", str(plot)]) == 0
    assert "BOUND BY" in capsys.readouterr().out
    assert plot.stat().st_size > 10_000
    assert run_command(main, []) == 0
    text = capsys.readouterr().out
    assert "failures_per_gpu_day" in text
    assert "DGX A100 80GB, mixed" in text
    assert run_command(main, ["--out", str(tmp_path / "rows.json")]) == 2
    assert "must come with --measure" in capsys.readouterr().err
    assert run_command(main, ["--nodes", "0"]) == 2
    assert run_command(main, ["--cores-per-node", "8"]) == 2
    assert "give --cores-per-node" in capsys.readouterr().err


def planned(name: str, **changes: Any) -> str:
    """The plan of a recipe on two nodes."""
    config = load_config(
        RECIPE.parents[1] / name, [f"{key.replace('__', '.')}={value}" for key, value in changes.items()]
    )
    return plan_text(make_plan(config, Cluster(2), gather(all_rows()), 100_000))


def test_what_a_plan_cannot_know_is_said() -> None:
    text = planned("audio/kinetics400_audio_r50.yaml")
    assert "the data limit nothing here" in text
    assert "decoding" not in text.split("allowed, clips/s: ")[1].splitlines()[0]
    assert "model.freeze leaves most" in planned("ssl/ucf101_probe_avslowfast_r50_4x16.yaml")
    assert "are 2 times those measured" in planned("kinetics/kinetics400_avslowfast_r101_nl_16x8.yaml")
    assert "note: decoding" not in planned("kinetics/kinetics400_avslowfast_r50_4x16.yaml")


def test_wrong_numbers_and_options_are_refused(capsys: Any) -> None:
    assert run_command(main, ["--plan", str(RECIPE), "--storage-node", "nan"]) == 2
    assert "--storage-node (nan) must be a number" in capsys.readouterr().err
    assert run_command(main, ["--nodes", "4"]) == 2
    assert "--nodes must come with --plan RECIPE" in capsys.readouterr().err
