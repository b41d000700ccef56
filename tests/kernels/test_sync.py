"""SyncBN form and precise BN over two gloo processes equal one process with the whole batch."""

import copy
import os
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import Tensor

from kernels.layout import KernelInputError
from kernels.modules import GhostBatchNorm, set_backend
from kernels.precise_bn import precise_bn
from tests.experiments.support.forked import call_on_ranks
from tests.kernels.support.cases import draw, relative

pytestmark = pytest.mark.integration
SHAPE = (8, 12, 2, 4, 3)


def _train(module: GhostBatchNorm, x: Tensor, residual: Tensor, dy: Tensor) -> list[Tensor]:
    leaves = [x.clone().requires_grad_(), residual.clone().requires_grad_()]
    y = module(leaves[0], residual=leaves[1], relu=True)
    z = module(leaves[0], relu=True)
    torch.autograd.backward([y, z], [dy, dy])
    return [y.detach(), z.detach(), leaves[0].grad, leaves[1].grad, module.weight.grad, module.bias.grad]


def _join(rank: int, folder: str) -> None:
    os.environ.update(MASTER_ADDR="127.0.0.1", OMP_NUM_THREADS="1")
    torch.distributed.init_process_group("gloo", rank=rank, world_size=2, init_method=f"file://{folder}/rendezvous")


def _rank(rank: int, folder: str, backend: str) -> None:
    _join(rank, folder)
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
    call_on_ranks(partial(_rank, backend=backend), str(tmp_path))
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


def _rank_of_groups(rank: int, folder: str) -> None:
    """Two groups of two clips on each rank; then a step where rank 1 holds one group only; then as before."""
    _join(rank, folder)
    module = GhostBatchNorm(12, clips_per_group=2)
    module.process_group = torch.distributed.group.WORLD
    module = copy.deepcopy(module)
    x = draw(SHAPE, torch.float32, 1)[rank * 4 : rank * 4 + 4]
    y = module(x)
    try:
        module(x if rank == 0 else x[:2])
        said = "nothing"
    except KernelInputError as error:
        said = str(error)
    again = module(x)  # the ranks still meet
    shares = module.process_group is torch.distributed.group.WORLD
    torch.save([y.detach(), again.detach(), said, shares], f"{folder}/{rank}.pt")
    torch.distributed.destroy_process_group()


def test_groups_are_pooled_by_number_and_unequal_ones_are_an_error_on_every_rank(tmp_path: Path) -> None:
    call_on_ranks(_rank_of_groups, str(tmp_path))
    x = draw(SHAPE, torch.float32, 1)
    for rank in range(2):
        y, again, said, shares = torch.load(tmp_path / f"{rank}.pt")
        assert said.startswith("statistics groups by rank [2, 1] must be equal under SyncBN")
        assert "give every rank the same number of clips" in said
        assert shares
        assert torch.equal(y, again)
        for group in range(2):  # clips 0, 1 of both ranks together, then clips 2, 3
            rows = torch.cat([x[r * 4 + group * 2 : r * 4 + group * 2 + 2] for r in range(2)])
            expected = torch.nn.functional.batch_norm(rows, None, None, None, None, True)
            own = y[group * 2 : group * 2 + 2]
            assert relative(own, expected[rank * 2 : rank * 2 + 2]) < 3e-6
