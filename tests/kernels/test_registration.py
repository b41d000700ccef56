"""What PyTorch must know of the operations: schemas, fake tensors, autograd, compilation, and what importing costs."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from kernels.library import fused_devices
from kernels.modules import GhostBatchNorm, LateralFusion, joint_statistics_update, set_backend
from tests.kernels.support.cases import draw, samples

pytestmark = pytest.mark.skipif(not fused_devices(), reason="the library of fused operations is not built")
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.needs_cuda)]


@pytest.fixture(autouse=True)
def _fused() -> Iterator[None]:
    set_backend("fused")
    yield
    set_backend("auto")
    torch._dynamo.reset()


DIFFERENTIABLE = {"norm_act": (0, 1, 2, 6, 7, 8), "lateral_fuse": (0, 1, 2, 3, 7), "norm_pool": (0, 1, 2)}


@pytest.mark.integration
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", list(samples("cpu")) if fused_devices() else ["bn_stats"])
def test_opcheck(name: str, device: str) -> None:
    for args in samples(device)[name]:
        ready = [
            a.detach().clone().requires_grad_() if isinstance(a, Tensor) and i in DIFFERENTIABLE.get(name, ()) else a
            for i, a in enumerate(args)
        ]
        results = torch.library.opcheck(getattr(torch.ops.avsf, name).default, tuple(ready))
        assert set(results.values()) == {"SUCCESS"}


class Stage(nn.Module):
    """The end of a Slow block and the lateral fusion after it."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv3d(16, 24, (1, 3, 3), padding=(0, 1, 1), bias=False), GhostBatchNorm(24)
        self.fusion = LateralFusion(GhostBatchNorm(8))

    def forward(self, x: Tensor, residual: Tensor, lateral: Tensor, audio: Tensor | None) -> Tensor:
        with joint_statistics_update():
            y = self.norm(self.conv(x), residual=residual, relu=True)
            return self.fusion(y, lateral, audio=audio)


@pytest.fixture
def one_algorithm() -> Iterator[None]:
    """cuDNN's convolutions sum in one order."""
    with torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True):
        yield


@pytest.mark.integration
@pytest.mark.usefixtures("one_algorithm")
@pytest.mark.parametrize("device", DEVICES)
def test_compiled_stage_has_two_graphs_and_the_eager_result(device: str) -> None:
    from torch._dynamo.testing import CompileCounterWithBackend

    eager, compiled = Stage().to(device), Stage().to(device)
    eager.to(memory_format=torch.channels_last_3d)
    compiled.load_state_dict(eager.state_dict())
    counter = CompileCounterWithBackend("aot_eager")
    run = torch.compile(compiled, fullgraph=True, backend=counter, dynamic=False)
    audio = torch.randn(8, 32, 2, device=device)
    for step, sound in enumerate((audio, None, audio, None)):
        inputs = [draw((8, c, 2, 4, 4), torch.float32, 10 * step + c, device) for c in (16, 24, 8)]
        outputs = []
        for function in (eager, run):
            leaves = [t.clone().requires_grad_() for t in inputs]
            out = function(*leaves, sound)
            out.square().sum().backward()
            outputs.append([out.detach(), *(t.grad for t in leaves)])
        for a, b in zip(*outputs, strict=True):
            assert a.stride() == b.stride()
            assert torch.equal(a, b)
    assert counter.frame_count == 2
    for key, value in eager.state_dict().items():
        assert torch.equal(value, compiled.state_dict()[key])
    assert eager.fusion.norm.num_batches_tracked.item() == 4


IMPORT = """
import json, sys, time, torch, torch.library
before, events, calls = set(sys.modules), [], [0]
sys.addaudithook(lambda event, _: events.append(event))
def count(frame, event, argument):
    calls[0] += event in ("call", "c_call")
    if argument is time.sleep:
        events.append("time.sleep")
sys.setprofile(count)
import kernels.modules
sys.setprofile(None)
print(json.dumps([sorted(set(sys.modules) - before), sorted(set(events)), calls[0]]))
"""
STARTS = ("subprocess.", "os.exec", "os.fork", "os.posix_spawn", "os.spawn", "os.system", "socket.", "time.sleep")


@pytest.mark.integration
def test_import_brings_in_and_starts_nothing() -> None:
    """What keeps it within 50 ms (33 to 38 ms of processor time, 5 of them the library's digest): nothing but
    this package, no process, no wait. The time: `python -X importtime -c "import torch.library, kernels.modules"`."""
    root = Path(__file__).resolve().parents[2]
    command = [sys.executable, "-c", IMPORT]
    done = subprocess.run(command, cwd=root, env=os.environ, capture_output=True, text=True, check=True)
    modules, events, calls = json.loads(done.stdout)
    assert "kernels.modules" in modules
    # No torch._dynamo, torch._inductor, torch.utils.cpp_extension, triton: torch itself had everything that is used.
    light = {"kernels", *sys.stdlib_module_names}
    assert [name for name in modules if name.split(".")[0] not in light] == []
    assert "ctypes.dlopen" in events
    assert [event for event in events if event.startswith(STARTS)] == []
    assert calls < 40_000  # of functions; 17 000 with torch 2.14
