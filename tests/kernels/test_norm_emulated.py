"""The CUDA kernels that normalise in one launch, emulated on the CPU, against the definitions in float64.

Legend: N clips, C channels, R rows (positions) of a clip, G groups.
"""

import ctypes
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor

from kernels import definition
from tests.kernels.support import emulation
from tests.kernels.support.cases import assert_close
from tests.kernels.support.shared import shared_folder

pytestmark = pytest.mark.integration  # half a minute, most of it the compiler
TYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
# (N, C, R), G: one chunk; a tail of channels; several chunks, units added one by one; tiles of channels; many groups.
SHAPES = [
    ((4, 16, 24), 2),
    ((4, 5, 18), 2),
    ((16, 16, 2600), 2),
    ((2, 264, 40), 1),
    ((6, 8, 1200), 3),
    ((2, 35, 300), 2),
]
FORMS = ["plain", "relu", "residual_relu", "projected"]


class Emulated:
    """The emulated kernels; `order` 1 runs the warps of a block from the last to the first."""

    def __init__(self, folder: Path) -> None:
        self.library = emulation.load(emulation.operations_library(folder))

    def call(
        self,
        name: str,
        x: Tensor,
        groups: int,
        relu: bool,
        blocked: bool,
        maps: Sequence[Tensor | None],
        floats: Sequence[Tensor | None],
    ) -> None:
        """Run one entry of norm_entry.cpp; maps are (N, R, C) in memory."""
        shape = (ctypes.c_int64 * 4)(x.shape[0], x.shape[1], x.shape[2], groups)
        pointers = (ctypes.c_void_p * len(maps))(*(None if t is None else t.data_ptr() for t in maps))
        values = (ctypes.c_void_p * len(floats))(*(None if t is None else t.data_ptr() for t in floats))
        function = getattr(self.library, name)
        assert function(TYPES[x.dtype], shape, int(relu), int(blocked), pointers, values) == 0


@pytest.fixture(scope="module")
def emulated(tmp_path_factory: pytest.TempPathFactory) -> Emulated:
    if not emulation.available():
        pytest.skip("no C++ compiler or no CUDA headers here")
    return Emulated(shared_folder(tmp_path_factory, "emulated"))


def rows(shape: tuple[int, int, int], dtype: torch.dtype, seed: int) -> Tensor:
    """(N, R, C) normal values."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape[0], shape[2], shape[1], generator=generator).to(dtype)


def as_map(values: Tensor) -> Tensor:
    """(N, R, C) as (N, C, 1, R) in float64."""
    return values.double().movedim(-1, 1)[:, :, None]


def run(
    kernels: Emulated,
    shape: tuple[int, int, int],
    groups: int,
    form: str,
    dtype: torch.dtype,
    blocked: bool,
    fork: bool,
) -> dict[str, Tensor]:
    """Forward and backward of one form; everything the kernels wrote."""
    channels, relu, projected = shape[1], form != "plain", form == "projected"
    x, r, dy, dy2 = (rows(shape, dtype, seed) for seed in (1, 2, 3, 4))
    ends = form in ("residual_relu", "projected")
    w, b, rw, rb = torch.randn(4, channels, generator=torch.Generator().manual_seed(5)).unbind()
    stats, other_stats = torch.full((2, groups, 3, channels), torch.nan).unbind()
    coef, other_coef = torch.full((2, 5, groups, channels), torch.nan).unbind()
    mask = torch.full((shape[0] * shape[2], (channels + 7) // 8), 255, dtype=torch.uint8)
    y, dx, dr, dz = (torch.full_like(x, torch.nan) for _ in range(4))
    parameters = [t.contiguous() for t in (w, b, stats, coef)]
    others = [t.contiguous() for t in (rw, rb, other_stats, other_coef)] if projected else [None] * 4
    given = [x, r if ends else None, y, mask if ends else None]
    kernels.call("emulate_norm", x, groups, relu, blocked, given, [*parameters, *others])
    sums, totals = torch.full((groups, 3, channels), torch.nan), torch.full((4, channels), torch.nan)
    writes = fork or form == "residual_relu"
    back = [dy, dy2 if fork else None, x, r if projected else None, dx, dr if projected else None]
    target = (dr if form == "residual_relu" else dz) if writes else None
    back += [target, mask if ends else None]
    kernels.call("emulate_norm_grad", x, groups, relu, blocked, back, [parameters[3], others[3], sums, totals])
    found = {"y": y, "stats": parameters[2], "coef": parameters[3], "dx": dx, "sums": sums, "totals": totals}
    if ends:
        found |= {"mask": mask, "dr": dr}
    return found


@pytest.mark.parametrize("blocked", [False, True])
@pytest.mark.parametrize("fork", [False, True])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_both_walks_against_the_definitions(
    emulated: Emulated, dtype: torch.dtype, form: str, fork: bool, blocked: bool
) -> None:
    for shape, groups in SHAPES:
        if shape[2] > 1000 and dtype == torch.float32:
            continue
        channels, relu, ends = shape[1], form != "plain", form in ("residual_relu", "projected")
        found = run(emulated, shape, groups, form, dtype, blocked, fork)
        x, r, dy = (as_map(rows(shape, dtype, seed)) for seed in (1, 2, 3))
        w, b, rw, rb = torch.randn(4, channels, generator=torch.Generator().manual_seed(5)).double().unbind()
        stats = definition.bn_stats(x, groups)
        torch.testing.assert_close(found["stats"].double(), stats, rtol=2e-6, atol=1e-6)
        coef = definition.bn_finalize(stats, w, b, 1e-5)
        other = definition.bn_finalize(definition.bn_stats(r, groups), rw, rb, 1e-5) if form == "projected" else None
        y, _ = definition.bn_act(x, coef, r if ends else None, other, None, None, relu)
        what = f"{shape} {form} {dtype}"
        assert_close(found["y"], y[:, :, 0].movedim(1, -1), f"y {what}", 4e-6)
        grad = as_map((rows(shape, dtype, 3).float() + rows(shape, dtype, 4).float()).to(dtype)) if fork else dy
        residual = r if form == "projected" else None
        mask = found["mask"] if ends else torch.empty(0, (channels + 7) // 8, dtype=torch.uint8)
        if not ends and relu:  # the kernel decides by its own float32 coefficients
            coef = torch.cat([found["coef"][:2].double(), coef[2:]])
        dx, dr, totals = definition.norm_act_backward(grad, None, x, residual, mask, coef, other, groups, relu, ends)
        assert_close(found["dx"], dx[:, :, 0].movedim(1, -1), f"dx {what}", 6e-6)
        if ends:
            assert_close(found["dr"], dr[:, :, 0].movedim(1, -1), f"dr {what}", 6e-6)
        scale = (shape[0] * shape[2]) ** 0.5
        rows_known = 4 if form == "projected" else 2
        assert (found["totals"].double() - totals)[:rows_known].abs().max().item() < 1e-5 * scale, what


@pytest.mark.parametrize("form", FORMS)
def test_neither_order_nor_repetition_changes_a_bit(emulated: Emulated, form: str) -> None:
    for shape, groups in (((6, 8, 1200), 3), ((4, 5, 18), 2)):
        for blocked in (False, True):
            first = run(emulated, shape, groups, form, torch.bfloat16, blocked, True)
            emulated.library.emulation_order(1)
            again = run(emulated, shape, groups, form, torch.bfloat16, blocked, True)
            emulated.library.emulation_order(0)
            assert all(torch.equal(first[name], again[name]) for name in first)
