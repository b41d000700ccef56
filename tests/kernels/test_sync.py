"""SyncBN form and precise BN over two gloo processes equal one process with the whole batch."""

import os
from pathlib import Path

import pytest
import torch
import torch.multiprocessing as mp
from torch import Tensor

from kernels.modules import GhostBatchNorm, precise_bn, set_backend
from tests.kernels.cases import draw, relative

pytestmark = pytest.mark.integration
SHAPE = (8, 12, 2, 4, 3)


def _train(module: GhostBatchNorm, x: Tensor, residual: Tensor, dy: Tensor) -> list[Tensor]:
    leaves = [x.clone().requires_grad_(), residual.clone().requires_grad_()]
    y = module(leaves[0], residual=leaves[1], relu=True)
    z = module(leaves[0], relu=True)
    torch.autograd.backward([y, z], [dy, dy])
    return [y.detach(), z.detach(), leaves[0].grad, leaves[1].grad, module.weight.grad, module.bias.grad]


def _rank(rank: int, folder: str, backend: str) -> None:
    os.environ.update(MASTER_ADDR="127.0.0.1", OMP_NUM_THREADS="1")
    torch.distributed.init_process_group("gloo", rank=rank, world_size=2, init_method=f"file://{folder}/rendezvous")
    set_backend(backend)
    module = GhostBatchNorm(12)
    module.process_group = torch.distributed.group.WORLD
    x, residual, dy = (draw(SHAPE, torch.float32, seed)[rank * 4 : rank * 4 + 4] for seed in (1, 2, 3))
    results = _train(module, x, residual, dy)
    exact = GhostBatchNorm(12)
    precise_bn(exact, [(x, None)], lambda frames, _: exact(frames))
    buffers = [module.running_mean, module.running_var, exact.running_mean, exact.running_var]
    torch.save([*results, *buffers], f"{folder}/{rank}.pt")
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("backend", ["reference", "auto"])
def test_two_ranks_equal_one(backend: str, tmp_path: Path) -> None:
    mp.spawn(_rank, args=(str(tmp_path), backend), nprocs=2)
    parts = [torch.load(tmp_path / f"{rank}.pt") for rank in range(2)]
    module = GhostBatchNorm(12)
    x, residual, dy = (draw(SHAPE, torch.float32, seed) for seed in (1, 2, 3))
    whole = _train(module, x, residual, dy)
    for index in range(4):
        assert relative(torch.cat([p[index] for p in parts]), whole[index]) < 3e-6
    for index in (4, 5):
        assert relative(parts[0][index] + parts[1][index], whole[index]) < 3e-6
    for part in parts:
        assert relative(part[6], module.running_mean) < 1e-5
        assert relative(part[7], module.running_var) < 1e-6
        assert relative(part[8], x.mean((0, 2, 3, 4))) < 1e-5
        assert relative(part[9], x.var((0, 2, 3, 4))) < 1e-6
