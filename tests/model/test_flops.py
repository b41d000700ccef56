"""Counts of multiply-adds and parameters; every cell of the paper is in tests/benchmarks/test_views.py."""

from dataclasses import replace

import pytest

from model.config import ModelConfig
from model.flops import count, table
from model.variants import VARIANTS


def test_r50_4x16_per_pathway() -> None:
    cost = count(VARIANTS["avslowfast_r50_4x16"])
    assert sum(cost.multiply_adds.values()) == cost.by_torch == 39_782_973_440
    assert cost.sync_gmacs == pytest.approx(0.1763, abs=5e-5)
    assert cost.params_m == pytest.approx(41.82, abs=0.005)
    assert sum(cost.parameters.values()) / 1e6 == pytest.approx(44.20, abs=0.005)
    audio = sum(v for (p, _), v in cost.multiply_adds.items() if p == "audio") / 1e9
    assert audio == pytest.approx(4.02, abs=0.005)
    assert {(p, s) for p, s, _, _ in table(cost)} == set(cost.parameters) | set(cost.multiply_adds)


@pytest.mark.integration
def test_synchronization_costs_what_it_uses() -> None:
    whole = count(VARIANTS["avslowfast_r50_4x16"])
    cost = count(VARIANTS["avslowfast_r50_4x16_a_f_s"])
    f_to_s, reduce, expand = 4 * 8 * 8 * 512 * 256 * 5, 16 * 5 * 1024 * 64, 4 * 5 * 64 * 2560
    assert whole.multiply_adds["synchronization", "res5"] == f_to_s + reduce + expand
    assert cost.multiply_adds["synchronization", "res5"] == reduce + 16 * 5 * 64 * 256
    assert cost.gmacs == pytest.approx(39.6062, abs=5e-5)
    nonlocal_cost = count(VARIANTS["avslowfast_r50_4x16_av_nonlocal"])
    assert nonlocal_cost.multiply_adds["synchronization", "res5"] == f_to_s + 16 * 1024 * 64
    assert nonlocal_cost.parameters["synchronization", "res5"] == 512 * 256 * 5 + 2 * 512 + 1024 * 64


@pytest.mark.integration
def test_stem_by_arithmetic() -> None:
    cost = count(VARIANTS["slowfast_r50_4x16"])
    slow = 4 * 128 * 128 * 64 * 3 * 49
    fast = 32 * 128 * 128 * 8 * 3 * 5 * 49
    assert (cost.multiply_adds["slow", "pool1"], cost.multiply_adds["fast", "pool1"]) == (slow, fast)
    assert cost.multiply_adds["head", "pool5"] == 2 * 2 * 2304 * 400
    assert cost.parameters["head", "pool5"] == 2304 * 400 + 400


@pytest.mark.integration
def test_effect_of_the_readings_of_the_text() -> None:
    base = VARIANTS["avslowfast_r50_4x16"]
    gmacs = {
        name: count(config).gmacs + 0.1763
        for name, config in {
            "table1": replace(base, audio_block="table1", sync_loss="none"),
            "res2": replace(base, audio_res2_stride=2, sync_loss="none"),
            "mels": replace(base, num_mel_bins=40, sync_loss="none"),
        }.items()
    }
    percent = {name: 100 * (value / 39.8 - 1) for name, value in gmacs.items()}
    assert percent["table1"] == pytest.approx(-2.5, abs=0.2)
    assert percent["res2"] == pytest.approx(-7.6, abs=0.2)
    assert percent["mels"] == pytest.approx(-5.1, abs=0.2)


def test_small_is_small() -> None:
    cost = count(VARIANTS["small"], 64, 64)
    assert cost.gmacs < 0.15
    assert cost.params_m < 1.1
    assert sum(cost.multiply_adds.values()) == cost.by_torch


@pytest.mark.integration
def test_nonlocal_matmuls_are_counted() -> None:
    config = ModelConfig(depth=14, width=16, num_mel_bins=16, nonlocal_blocks=(0,), fusion="av_nonlocal")
    cost = count(config, 64, 64)
    assert sum(cost.multiply_adds.values()) == cost.by_torch
