"""Both passes of a normalisation in one CUDA launch: the order of its blocks, its counters, what they must not change.

Shapes reach every way the sums are added: few parts at once, by unit and then by group, several tiles of channels.
"""

import pytest
import torch
from torch import Tensor

from kernels.library import fused_devices
from tests.kernels.support.cases import draw, norm_error

pytestmark = [
    pytest.mark.needs_cuda,
    pytest.mark.skipif(not fused_devices(), reason="the library of fused operations is not built"),
]
# (N, C, T, H, W), groups: one group; several, small and large maps; tiles; a narrow one; more counters than a slot has.
CASES = [
    ((8, 64, 4, 28, 28), 1),
    ((32, 64, 4, 56, 56), 4),
    ((16, 512, 4, 14, 14), 2),
    ((24, 8, 8, 28, 28), 3),
    ((16, 19, 2, 15, 15), 2),
    ((512, 264, 1, 2, 2), 64),
]
avsf = torch.ops.avsf


def both(shape: tuple[int, ...], groups: int, blocked: bool, projected: bool = True) -> list[Tensor]:
    """Everything that forward and backward give, two readers and a projection included."""
    x, other, dy, dy2 = (draw(shape, torch.bfloat16, seed, "cuda") for seed in (1, 2, 3, 4))
    w = torch.linspace(0.5, 1.5, shape[1], device="cuda")
    second = (w, w, None, None) if projected else (None,) * 4
    out = avsf.norm_act(x, w, w, None, None, 1e-5, other, *second, 1e-5, projected, groups, True, blocked)
    used, kept = (out[5], other) if projected else (None, None)
    back = avsf.norm_act_backward(dy, dy2, x, kept, out[1], out[3], used, groups, True, True, blocked)
    plain = avsf.norm_act_backward(dy, None, x, kept, out[1], out[3], used, groups, True, True, blocked)
    return [*out, *back, *plain]


def equal(one: list[Tensor], two: list[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one, two, strict=True))


@pytest.mark.parametrize("projected", [True, False])
@pytest.mark.parametrize(("shape", "groups"), CASES)
def test_no_repetition_changes_a_bit(shape: tuple[int, ...], groups: int, projected: bool) -> None:
    walks = [both(shape, groups, blocked, projected) for blocked in (False, True)]
    for _ in range(5):  # counters are back at zero after every launch
        for blocked, first in enumerate(walks):
            assert equal(first, both(shape, groups, bool(blocked), projected))
    for one, other in zip(*walks, strict=True):  # sums are added in another order
        if one.dtype == torch.bfloat16 and one.numel():
            assert norm_error(one, other) < 1e-3


@pytest.mark.parametrize(("shape", "groups"), CASES)
def test_groups_equal_separate_calls(shape: tuple[int, ...], groups: int) -> None:
    x = draw(shape, torch.bfloat16, 1, "cuda")
    stats = avsf.bn_stats(x, groups)
    size = shape[0] // groups
    for group in range(0, groups, max(1, groups // 4)):
        assert torch.equal(stats[group], avsf.bn_stats(x[group * size : (group + 1) * size], 1)[0])


def test_two_streams_at_a_time() -> None:
    shape, groups = CASES[1]
    expected = both(shape, groups, True)
    streams = [torch.cuda.Stream() for _ in range(2)]
    results: list[list[Tensor]] = []
    for _ in range(10):
        for stream in streams:
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                results.append(both(shape, groups, True))
        torch.cuda.synchronize()
    assert all(equal(expected, result) for result in results)


def test_a_captured_launch_replays() -> None:
    shape, groups = CASES[0]
    x, w = draw(shape, torch.bfloat16, 1, "cuda"), torch.ones(shape[1], device="cuda")
    arguments = (w, w, None, None, 1e-5, None, None, None, None, None, 1e-5, False, groups, True, True)
    expected = [avsf.norm_act(t, *arguments)[0] for t in (x, 2 * x + 1)]
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        avsf.norm_act(x, *arguments)
    torch.cuda.current_stream().wait_stream(stream)
    given, graph = x.clone(), torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = avsf.norm_act(given, *arguments)[0]
    for turn in range(6):
        given.copy_(x if turn % 2 == 0 else 2 * x + 1)
        graph.replay()
        assert torch.equal(y, expected[turn % 2])
