"""Imported before trainings are forked: the cost of the tiny models that most of them have is counted once."""

from dataclasses import replace

from experiments.config import Config
from experiments.engine.run_lines import cost_of
from model.variants import VARIANTS
from tests.experiments.support import pictures  # noqa: F401

for changes in ({}, {"dropout_rate": 0.0}):
    tiny = replace(VARIANTS["small"], num_classes=4, width=8, pool_window=1, **changes)
    cost_of(replace(Config(), model=tiny), 32)
