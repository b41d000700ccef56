"""The list that `python -m model` prints is what the models cost."""

import json
import sys
from typing import Any

import pytest

from model.__main__ import COSTS, counted, main
from model.variants import VARIANTS

TABLE = json.loads(COSTS.read_text(encoding="utf-8"))
QUICK = ("small", "avslowfast_r50_4x16", "slowfast_r50_8x8")


@pytest.mark.parametrize(
    "name", [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in VARIANTS]
)
def test_a_variant_costs_what_the_list_says(name: str) -> None:
    assert counted(name) == TABLE[name]


def test_every_variant_is_listed_without_counting(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    assert list(TABLE) == list(VARIANTS)
    monkeypatch.setattr(sys, "argv", ["model"])
    monkeypatch.setattr("model.__main__.counted", lambda name: pytest.fail(f"{name} was counted"))
    assert main() == 0
    lines = capsys.readouterr().out.splitlines()
    assert [text.split()[0] for text in lines[1:]] == list(VARIANTS)
    assert lines[1 + list(VARIANTS).index("avslowfast_r50_4x16")].split()[1:4] == ["39.61", "41.8", "M"]


def test_an_unknown_variant_is_refused(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.setattr(sys, "argv", ["model", "avslowfast_r50"])
    assert main() == 2
    assert "must be variants of model/variants.py: did you mean" in capsys.readouterr().err
    monkeypatch.setattr(sys, "argv", ["model", "--help"])
    assert main() == 0
