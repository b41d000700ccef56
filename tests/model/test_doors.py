"""What `from model import ...` and `from kernels import ...` offer, and what importing them alone costs."""

import importlib
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
NAMES = {
    "model": {"AVSlowFast", "ModelConfig", "ModelOutput", "VARIANTS", "build_model", "fold"},
    "kernels": {"GhostBatchNorm", "LateralFusion", "choose_backend", "set_backend"},
}


@pytest.mark.parametrize("package", sorted(NAMES))
def test_every_public_name_is_what_its_module_defines(package: str) -> None:
    module = importlib.import_module(package)
    assert set(module.__all__) == NAMES[package]
    assert set(dir(module)) >= NAMES[package]
    for name in NAMES[package]:
        value = getattr(module, name)
        place = importlib.import_module(f"{package}.{module._PLACES[name]}")
        assert getattr(place, name) is value
    with pytest.raises(AttributeError, match=rf"module '{package}' has no attribute 'biuld'; it offers "):
        _ = module.biuld


def test_importing_the_packages_loads_neither_torch_nor_numpy() -> None:
    program = "import sys, model, kernels; print(sorted({'torch', 'numpy', 'nvidia'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout) == (0, "[]\n"), done.stderr[-500:]


def test_the_doors_are_enough_for_scores() -> None:
    import torch

    from kernels import GhostBatchNorm, LateralFusion
    from model import VARIANTS, ModelOutput, build_model, fold

    model = build_model(VARIANTS["small"])
    kinds = {type(module) for module in model.modules()}
    assert {GhostBatchNorm, LateralFusion} <= kinds
    frames = torch.randn(1, 3, 16, 32, 32).to(memory_format=torch.channels_last_3d)
    with torch.no_grad():
        output = fold(model)(frames, torch.randn(1, 1, 64, 40))
    assert isinstance(output, ModelOutput)
    assert output.scores.shape == (1, 8)
