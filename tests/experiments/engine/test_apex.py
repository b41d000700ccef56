"""optim.backend=apex: what reaches NVIDIA apex's FusedSGD, how it continues, and every way in which it is refused.

The package below stands in for NVIDIA's: like its CUDA kernel it works on raw memory, whatever the strides, asks the
last parameter of a group whether this is the first step of all, and has a `zero_grad` without arguments.
"""

import functools
import re
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from experiments.cli.command_line import run_command
from experiments.config import OptimConfig, load_config, resolved_yaml
from experiments.engine import learner
from experiments.engine.optim import OptimizerError, build_optimizer, optimizer_text, set_learning_rate
from experiments.engine.precision import channels_last
from experiments.train import main
from kernels.modules import GhostBatchNorm
from tests.experiments.test_train import digest, final_state

FUSED_SGD = """
import torch

class FusedSGD(torch.optim.Optimizer):
    made = []

    def __init__(self, params, lr, momentum=0.0, dampening=0.0, weight_decay=0.0, nesterov=False,
                 wd_after_momentum=False, materialize_master_grads=True, set_grad_none=False):
        FusedSGD.made.append(self)
        defaults = dict(lr=lr, momentum=momentum, dampening=dampening, weight_decay=weight_decay, nesterov=nesterov)
        super().__init__(params, defaults)

    def zero_grad(self):
        raise AssertionError("it leaves zeros, where a dropped pathway must have no gradient")

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            used = [p for p in group["params"] if p.grad is not None]
            for p in used:
                first = "momentum_buffer" not in self.state[p]
                if first:
                    self.state[p]["momentum_buffer"] = torch.zeros_like(p)
            for p in used:
                w, g, m = (x.as_strided((x.numel(),), (1,)) for x in (p, p.grad, self.state[p]["momentum_buffer"]))
                g = g.add(w, alpha=group["weight_decay"])
                m.copy_(g) if first else m.mul_(group["momentum"]).add_(g, alpha=1 - group["dampening"])
                w.add_(g.add(m, alpha=group["momentum"]) if group["nesterov"] else m, alpha=-group["lr"])
"""


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., None]]:
    """Return a function that puts a package `apex` in front of all others: file name -> text."""
    folder = tmp_path / "site"
    for name in [n for n in sys.modules if n.split(".")[0] == "apex"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.syspath_prepend(str(folder))

    def write(**files: str) -> None:
        for name, text in {"__init__": "", **files}.items():
            path = folder / "apex" / f"{name}.py"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)

    yield write
    for name in [n for n in sys.modules if n.split(".")[0] == "apex"]:
        del sys.modules[name]


def nvidia(install: Callable[..., None], optimizers: str = FUSED_SGD) -> None:
    install(**{"optimizers/__init__": optimizers})


def test_groups_rates_momentum_and_decay_reach_it(install: Callable[..., None]) -> None:
    nvidia(install)
    model = nn.Sequential(nn.Conv3d(2, 2, 3, bias=False), GhostBatchNorm(2))
    config = OptimConfig(lr=0.3, momentum=0.8, weight_decay=0.01, nesterov=True, backend="apex")
    optimizer = build_optimizer(model, config, fused=True)
    assert type(optimizer).__module__ == "apex.optimizers"
    assert optimizer_text(config, fused=True).startswith("apex.optimizers.FusedSGD (NVIDIA apex")
    set_learning_rate(optimizer, 0.2)
    assert [[g[k] for k in ("lr", "momentum", "nesterov", "dampening")] for g in optimizer.param_groups] == [
        [0.2, 0.8, True, 0.0]
    ] * 2
    assert [g["weight_decay"] for g in optimizer.param_groups] == [0.01, 0.0]
    assert [len(g["params"]) for g in optimizer.param_groups] == [1, 2]


@pytest.mark.parametrize("nesterov", [False, True])
def test_its_steps_are_torchs_where_a_dropped_pathway_comes_in_late(
    install: Callable[..., None], nesterov: bool
) -> None:
    """The second layer, the last of its group, has no gradient in the first two steps, as under DropPathway."""
    nvidia(install)
    torch.manual_seed(0)
    start = channels_last(nn.Sequential(nn.Conv3d(2, 3, 3, bias=False), nn.Conv3d(3, 4, 3, bias=False)))
    weights = []
    for backend in ("torch", "apex"):
        model = channels_last(nn.Sequential(nn.Conv3d(2, 3, 3, bias=False), nn.Conv3d(3, 4, 3, bias=False)))
        model.load_state_dict(start.state_dict())
        config = OptimConfig(momentum=0.9, weight_decay=0.1, nesterov=nesterov, backend=backend)  # type: ignore[arg-type]
        optimizer = build_optimizer(model, config, fused=backend == "apex")
        for step in range(4):
            for layer, parameter in enumerate(model.parameters()):
                noise = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(10 * step + layer))
                noise = noise.contiguous(memory_format=torch.channels_last_3d)
                parameter.grad = noise if layer == 0 or step >= 2 else None
            optimizer.step()
        weights.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
    assert float((weights[0] - weights[1]).abs().max()) < 1e-6
    assert float((weights[0] - torch.cat([p.detach().flatten() for p in start.parameters()])).abs().max()) > 0.1


OLD = FUSED_SGD.replace("w, g, m =", "assert_contiguous(p)\n                w, g, m =") + (
    "\ndef assert_contiguous(p):\n    if not p.is_contiguous():\n"
    "        raise RuntimeError('A tensor was not contiguous.')\n"
)
UNBUILT = "class FusedSGD:\n    def __init__(self, *a, **k):\n        raise RuntimeError('requires cuda extensions')\n"


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"web": ""}, "pip uninstall apex"),
        ({"optimizers/__init__": "raise ImportError('no amp_C')"}, "no amp_C"),
        ({"optimizers/__init__": "class FusedAdam: pass"}, "no 'FusedSGD'; it has FusedAdam"),
        ({"optimizers/__init__": UNBUILT}, "requires cuda extensions"),
        ({"optimizers/__init__": OLD}, "A tensor was not contiguous"),
        ({"optimizers/__init__": FUSED_SGD.replace("alpha=-group", "alpha=-2 * group")}, "must give SGD's result"),
    ],
)
def test_whatever_does_not_work_is_refused(install: Callable[..., None], files: dict[str, str], message: str) -> None:
    install(**files)
    with pytest.raises(OptimizerError, match=message) as caught:
        build_optimizer(nn.Conv3d(1, 2, 1), OptimConfig(backend="apex"), fused=True)
    assert "use optim.backend=torch" in str(caught.value)


def test_a_run_on_the_cpu_is_refused_before_anything_is_written(
    install: Callable[..., None], write_config: Callable[..., Path], tmp_path: Path, capsys: Any
) -> None:
    nvidia(install)
    assert run_command(main, [str(write_config()), "optim.backend=apex"]) == 2
    assert "optim.backend (apex) must have a CUDA device and this run has none" in capsys.readouterr().err
    assert not (tmp_path / "runs").exists()


def test_a_run_without_apex_is_refused_before_anything_is_written(
    install: Callable[..., None],
    write_config: Callable[..., Path],
    tmp_path: Path,
    capsys: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(learner, "build_optimizer", as_on_cuda)
    assert run_command(main, [str(write_config()), "optim.backend=apex"]) == 2
    assert "github.com/NVIDIA/apex" in capsys.readouterr().err
    assert not (tmp_path / "runs").exists()


def as_on_cuda(model: nn.Module, config: OptimConfig, *, fused: bool) -> torch.optim.Optimizer:
    """Let apex through on this machine; the stand-in takes tensors of the CPU."""
    return build_optimizer(model, config, fused=config.backend == "apex")


@pytest.mark.integration
def test_a_run_trains_continues_and_is_never_mixed_with_torchs(
    install: Callable[..., None],
    write_config: Callable[..., Path],
    tmp_path: Path,
    capsys: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    nvidia(install)
    monkeypatch.setattr(learner, "build_optimizer", as_on_cuda)
    command = functools.partial(run_command, main)
    fused, plain = write_config("fused"), write_config("plain")
    assert command([str(fused), "optim.backend=apex"]) == command([str(plain)]) == 0
    runs = tmp_path / "runs"
    assert "optimizer: apex.optimizers.FusedSGD (NVIDIA apex" in (runs / "fused" / "log.txt").read_text()
    assert "optimizer: torch.optim.SGD\n" in (runs / "plain" / "log.txt").read_text()
    whole, torchs = final_state(runs / "fused"), final_state(runs / "plain")
    for name, tensor in torchs["model"].items():
        assert torch.allclose(whole["model"][name].float(), tensor.float(), rtol=1e-4, atol=1e-5), name
    # Continued from step 4 of 6 it ends in the same bits.
    shutil.rmtree(runs / "fused" / "checkpoints" / "step-00000006")
    assert command([str(fused), "optim.backend=apex"]) == 0
    assert "continuing from step 4 of 6" in (runs / "fused" / "log.txt").read_text()
    assert digest(final_state(runs / "fused")) == digest(whole)
    # The other backend is refused: by the run's configuration, and by the checkpoint's copy where that was edited.
    capsys.readouterr()
    assert command([str(fused)]) == 2
    assert "optim.backend: apex -> torch" in capsys.readouterr().err
    (runs / "fused" / "config.yaml").write_text(resolved_yaml(load_config(fused)))
    assert command([str(fused)]) == 2
    assert re.search(r"config\.yaml must hold what .*optim\.backend", capsys.readouterr().err, re.DOTALL)


@pytest.mark.needs_cuda
def test_a_run_on_cuda_uses_it(install: Callable[..., None], write_config: Callable[..., Path], tmp_path: Path) -> None:
    nvidia(install)
    overrides = ["optim.backend=apex", "runtime.device=cuda", "runtime.precision=fp16", "debug.synthetic_input=true"]
    assert run_command(main, [str(write_config("cuda")), *overrides]) == 0
    assert final_state(tmp_path / "runs" / "cuda")["optimizer_backend"] == "apex"
