"""The model of stage times against a simulation: what binds, what binds next, what a change brings."""

import math
import random

import pytest

from benchmarks.stages.model import (
    CORES,
    Change,
    Pipeline,
    Stage,
    ceiling,
    crowded,
    frames_decoded,
    limits,
    predictions,
    rate,
    verdict,
)
from tests.benchmarks.pipeline_simulation import simulate


def side_by_side(*times_ms: float) -> Pipeline:
    """Each stage at a site of its own, with one server and no CPU."""
    stages = tuple(Stage(f"stage {i}", f"site {i}", ms) for i, ms in enumerate(times_ms))
    return Pipeline(stages, {stage.site: 1 for stage in stages}, cores=64)


def drawn(seed: int) -> Pipeline:
    """Three to seven sites, some with several servers and stages, that wait rather than compute."""
    draw = random.Random(seed)
    stages, servers = [], {}
    for site in range(draw.randint(3, 7)):
        servers[f"site {site}"] = draw.choice([1, 1, 2, 4])
        for part in range(draw.choice([1, 1, 2, 3])):
            stages.append(Stage(f"stage {site}.{part}", f"site {site}", draw.uniform(2.0, 40.0)))
    return Pipeline(tuple(stages), servers, cores=64)


def computing(seed: int) -> Pipeline:
    """Workers, a graph and a training thread that share two to eight cores."""
    draw = random.Random(seed)
    stages = []
    for name, site in (("read", "workers"), ("decode", "workers"), ("resize", "graph"), ("model", "thread")):
        ms = draw.uniform(2.0, 30.0)
        stages.append(Stage(name, site, ms, ms * draw.choice([0.1, 0.5, 1.0])))
    return Pipeline(
        tuple(stages), {"workers": draw.randint(1, 6), "graph": 1, "thread": 1}, cores=draw.choice([2, 3, 4, 8])
    )


def by_simulation(pipeline: Pipeline) -> dict[str, float]:
    """Clips per second with each stage taken away, measured."""
    return {stage.name: simulate(pipeline.scaled({stage.name: 0.0}), clips=160) for stage in pipeline.stages}


def slowest(pipeline: Pipeline, without: dict[str, float]) -> str:
    """The stage whose removal gained most; where any of a site's stages frees it, the longest of them."""
    most = max(without.values())
    return max((s for s in pipeline.stages if without[s.name] > 0.995 * most), key=lambda stage: stage.ms).name


def clear_cases(count: int) -> list[int]:
    """Seeds of pipelines whose first two removals are 5 % apart, twice: with all stages, and without the first."""
    found: list[int] = []
    for seed in range(10_000):
        pipeline = drawn(seed)
        said = verdict(pipeline)
        rest = pipeline.scaled({said.binding: 0.0})
        if not said.tie and not verdict(rest).tie:
            found.append(seed)
        if len(found) == count:
            break
    return found


def test_subtraction_misleads_and_the_model_does_not() -> None:
    """28, 30 and 20 ms: without the second stage only 2 ms are gained, because the first binds next."""
    pipeline = side_by_side(28.0, 30.0, 20.0)
    said = verdict(pipeline)
    assert (said.binding, said.next, said.tie) == ("stage 1", "stage 0", False)
    assert said.rate == pytest.approx(1e3 / 30)
    assert said.rate_without == pytest.approx(1e3 / 28)
    assert simulate(pipeline) == pytest.approx(said.rate, rel=0.01)
    assert simulate(pipeline.scaled({"stage 1": 0.0})) == pytest.approx(said.rate_without, rel=0.01)


def test_binding_and_next_stage_are_those_of_the_simulation_in_all_of_50_random_cases() -> None:
    seeds = clear_cases(50)
    assert len(seeds) == 50
    for seed in seeds:
        pipeline = drawn(seed)
        said = verdict(pipeline)
        measured = by_simulation(pipeline)
        assert said.binding == slowest(pipeline, measured), seed
        assert measured[said.binding] == pytest.approx(said.rate_without, rel=0.05), seed
        rest = pipeline.scaled({said.binding: 0.0})
        assert said.next == slowest(rest, by_simulation(rest)), seed


@pytest.mark.parametrize(("times", "tie"), [((30.0, 29.5, 10.0), True), ((30.0, 28.0, 27.9), False)])
def test_nearer_than_five_percent_is_a_tie(times: tuple[float, ...], tie: bool) -> None:
    said = verdict(side_by_side(*times))
    assert (said.binding, said.next, said.tie) == ("stage 0", "stage 1", tie)


def test_stages_of_one_site_add_up_and_tie_by_their_own_times() -> None:
    stages = (Stage("decode", "workers", 42.0), Stage("resize", "workers", 41.0), Stage("sound", "workers", 1.0))
    said = verdict(Pipeline(stages, {"workers": 1}, cores=8))
    assert (said.resource, said.binding, said.next, said.tie) == ("workers", "decode", "resize", True)
    assert said.rate == pytest.approx(1e3 / 84)


@pytest.mark.parametrize("seed", range(0, 60, 2))
def test_what_ifs_are_within_five_percent_of_the_simulation(seed: int) -> None:
    pipeline = computing(seed)
    changes = [
        Change("nothing", {}, {}, ""),
        Change("two more workers", {}, {"workers": 2}, ""),
        Change("half the GOP", {"decode": 0.6}, {}, ""),
        Change("half cached", {"read": 0.5, "decode": 0.5}, {}, ""),
        Change("faster model", {"model": 0.4}, {}, ""),
    ]
    for found in predictions(pipeline, changes):
        changed = found.change.apply(pipeline)
        measured = simulate(changed)
        if crowded(changed):
            assert 0.78 * found.rate < measured < 1.01 * found.rate, found.change.name
        else:
            assert measured == pytest.approx(found.rate, rel=0.05), found.change.name


def test_few_pipelines_are_crowded() -> None:
    assert sum(crowded(computing(seed)) for seed in range(100)) < 30
    assert not any(crowded(drawn(seed)) for seed in range(20))


def test_cores_bind_where_all_compute() -> None:
    stages = (Stage("decode", "workers", 40.0, 40.0), Stage("resize", "graph", 10.0, 20.0), Stage("gpu", "gpu", 5.0))
    pipeline = Pipeline(stages, {"workers": 8, "graph": 1, "gpu": 1}, cores=2)
    assert limits(pipeline) == pytest.approx({CORES: 1e3 / 30, "graph": 100.0, "workers": 200.0, "gpu": 200.0})
    said = verdict(pipeline)
    assert (said.resource, said.binding, said.next) == (CORES, "decode", "resize")
    more = predictions(pipeline, [Change("more workers", {}, {"workers": 8}, "data.num_workers=16")])
    assert more[0].gain == pytest.approx(1.0)  # more processes bring nothing without cores
    assert ceiling(pipeline, "resize") == pytest.approx(100.0)


def test_changes_are_ranked_and_pass_over_stages_that_are_not_there() -> None:
    pipeline = side_by_side(28.0, 30.0, 20.0)
    changes = [
        Change("nothing", {"no such": 0.5}, {"no site": 3}, ""),
        Change("second server", {}, {"site 1": 1}, ""),
    ]
    found = predictions(pipeline, changes)
    assert [item.change.name for item in found] == ["second server", "nothing"]
    assert [item.gain for item in found] == pytest.approx([30 / 28, 1.0])


def test_a_pipeline_without_work_is_endless_and_mistakes_are_named() -> None:
    idle = side_by_side(0.0)
    assert math.isinf(rate(idle))
    assert verdict(idle).binding == ""
    assert math.isinf(ceiling(idle, "stage 0"))
    with pytest.raises(ValueError, match="finite"):
        Stage("decode", "workers", -1.0)
    with pytest.raises(ValueError, match="at least one server"):
        Pipeline((Stage("decode", "workers", 1.0),), {}, cores=1)
    with pytest.raises(ValueError, match="differ"):
        Pipeline((Stage("a", "s", 1.0), Stage("a", "s", 1.0)), {"s": 1}, cores=1)
    with pytest.raises(KeyError, match="no such"):
        idle.scaled({"no such": 1.0})


def test_frames_decoded_counts_the_way_from_the_key_frame() -> None:
    assert frames_decoded(63, 1) == 63
    assert frames_decoded(63, 13) == 69
