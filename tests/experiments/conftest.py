"""A tiny store and a tiny configuration that train in seconds.

Threads read: worker processes cost a second of processor time a run; tests that are about them ask for them.
"""

from collections.abc import Callable
from pathlib import Path

import pytest

from experiments.cli.command_line import run_command
from experiments.train import main as train
from pipeline.synthetic import SyntheticSpec, make_store
from tests.experiments.support.pictures import VARIABLE, leave_out

CONFIG = """\
version: 1
output_dir: {output}
data:
  path: {store}
  crop_size_px: 32
  jitter_min_px: 32
  jitter_max_px: 32
  flip: false
  num_threads: 1
  num_workers: 0
views: {{num_clips: 1, num_crops: 1, crop_size_px: 32}}
model: {{variant: small, num_classes: 4, width: 8, pool_window: 1, drop_pathway_rate: 0.5}}
optim: {{lr: 0.02, warmup_steps: 2}}
train: {{clips_per_step: 8, steps: 6, log_interval_steps: 1}}
eval: {{train_samples: 4}}
runtime: {{precision: fp32, device: cpu, num_threads: 1}}
checkpoint: {{interval_steps: 2}}
tracking: {{backend: none, system_metrics_interval_s: 0}}
"""


@pytest.fixture(autouse=True)
def quick_pictures(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs in this process and forked ones leave their pictures out; tests marked `pictures` have them."""
    if request.node.get_closest_marker("pictures") is None:
        leave_out(monkeypatch.setattr)
        monkeypatch.setenv(VARIABLE, "1")


@pytest.fixture(scope="session")
def tiny_store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """16 training and 16 validation clips of 32 px."""
    path = tmp_path_factory.mktemp("data") / "store"
    make_store(path, SyntheticSpec(num_classes=4, train_streams=4, val_streams=4, size_px=32))
    return path


@pytest.fixture
def write_config(tiny_store: Path, tmp_path: Path) -> Callable[..., Path]:
    """Return a function that writes the tiny configuration, with texts replaced, and returns its path."""

    def write(name: str = "tiny", **replacements: str) -> Path:
        text = CONFIG.format(output=tmp_path / "runs", store=tiny_store)
        for old, new in replacements.items():
            assert old in text, old
            text = text.replace(old, new)
        path = tmp_path / f"{name}.yaml"
        path.write_text(text, encoding="utf-8")
        return path

    return write


@pytest.fixture(scope="session")
def tiny_run(tiny_store: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run of two steps; read only."""
    folder = tmp_path_factory.mktemp("trained")
    path = folder / "tiny.yaml"
    path.write_text(CONFIG.format(output=folder / "runs", store=tiny_store), encoding="utf-8")
    assert run_command(train, [str(path), "train.steps=2"]) == 0
    return folder / "runs" / "tiny"
