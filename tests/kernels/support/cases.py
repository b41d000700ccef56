"""Shapes, inputs and error measures that the kernel tests share. Legend: N clips, C channels, T frames, H W pixels."""

import torch
from torch import Tensor

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# (N, C, T, H, W) or (N, C, H, W), G groups: odd channels, T = 1, one position, one clip, several groups, audio.
SHAPES = [
    ((8, 64, 2, 7, 7), 1),
    ((16, 16, 4, 5, 5), 2),
    ((8, 8, 4, 9, 9), 1),
    ((3, 5, 2, 3, 4), 1),
    ((1, 12, 1, 1, 6), 1),
    ((8, 72, 1, 1, 1), 1),
    ((1, 24, 3, 4, 4), 1),
    ((24, 3, 2, 3, 3), 3),
    ((8, 520, 1, 3, 3), 1),
    ((8, 32, 16, 10), 1),
    ((16, 7, 6, 5), 2),
    ((4, 1, 2, 6, 6), 1),
]


def channels_last(x: Tensor) -> Tensor:
    """x with channels innermost, also where PyTorch calls the strides ambiguous."""
    order = [0, *range(2, x.dim()), 1]
    return x.permute(order).contiguous().movedim(-1, 1)


def draw(
    shape: tuple[int, ...], dtype: torch.dtype, seed: int = 0, device: str = "cpu", sliced: bool = False
) -> Tensor:
    """Normal values, channels-last; sliced: the middle channels of a wider tensor."""
    generator = torch.Generator().manual_seed(seed)
    wide = (shape[0], shape[1] + 16, *shape[2:]) if sliced else shape
    x = channels_last(torch.randn(wide, generator=generator)).to(device=device, dtype=dtype)
    return x[:, 8 : 8 + shape[1]] if sliced else x


def ulps(value: Tensor, exact: Tensor) -> Tensor:
    """Distance of 16-bit values from the rounded float64 ones, in units of the last place."""
    info = torch.finfo(value.dtype)
    exponent = torch.floor(torch.log2(exact.abs().clamp(min=info.tiny)))
    return (value.double() - exact.to(value.dtype).double()).abs() / (torch.exp2(exponent) * info.eps)


def relative(value: Tensor, exact: Tensor) -> float:
    """Largest error over the largest magnitude of the exact values."""
    return ((value.double() - exact.double()).abs().max() / exact.double().abs().max().clamp(min=1e-30)).item()


def norm_error(value: Tensor, exact: Tensor) -> float:
    """Norm of the error over the norm: for rounded rectifiers, where single signs may differ."""
    return ((value.double() - exact.double()).norm() / exact.double().norm().clamp(min=1e-30)).item()


def assert_close(value: Tensor, exact: Tensor, what: str, tolerance: float = 2e-6) -> None:
    """float32: within `tolerance` of the largest magnitude; 16 bits: 99.9 % within 1 ulp, all within 2, or that."""
    assert value.shape == exact.shape, what
    assert torch.isfinite(value).all(), what
    if value.dtype in (torch.float32, torch.float64):
        assert relative(value, exact) <= tolerance, f"{what}: {relative(value, exact):.2e} > {tolerance}"
        return
    absolute = (value.double() - exact).abs() <= tolerance * exact.abs().max()  # near zero an ulp is smaller than that
    distance = torch.where(absolute, 0.0, ulps(value, exact))
    share = (distance <= 1).double().mean().item()
    assert share >= 0.999, f"{what}: {share:.5f} within 1 ulp"
    assert distance.max() <= 2, f"{what}: {distance.max():.1f} ulp"


def samples(device: str) -> dict[str, list[tuple[object, ...]]]:
    """Arguments for every operation, odd and even channels, with and without the optional ones."""
    x, r, dy = (draw((16, 24, 2, 3, 4), torch.bfloat16, seed, device) for seed in (1, 2, 3))
    lateral = draw((16, 5, 2, 3, 4), torch.bfloat16, 4, device)
    audio = torch.randn(16, 29, 2, device=device).bfloat16()
    keep, w, b = (
        torch.ones(16, dtype=torch.bool, device=device),
        torch.randn(24, device=device),
        torch.randn(24, device=device),
    )
    avsf = torch.ops.avsf
    stats = avsf.bn_stats(x, 2)
    coef, tail = avsf.bn_finalize(stats, w, b, 1e-5), avsf.bn_finalize(avsf.bn_stats(lateral, 2), None, None, 1e-5)
    _, mask = avsf.bn_act(x, coef, r, None, None, None, True)
    sums = avsf.bn_act_bwd_reduce(dy, x, None, mask, coef, None, 2, True)
    running = [torch.zeros(24, device=device)], [torch.ones(24, device=device)]
    counter = [torch.zeros((), dtype=torch.long, device=device)]
    given = (torch.zeros(24, device=device), torch.ones(24, device=device))
    none4 = (None,) * 4
    _, value, tap = avsf.bn_relu_maxpool(x, coef, True)
    small = draw((16, 24, 2, 2, 2), torch.bfloat16, 5, device)
    return {
        "bn_stats": [(x, 2), (lateral, 1)],
        "bn_finalize": [(stats, w, b, 1e-5), (stats, None, None, 1e-3)],
        "bn_act": [(x, coef, r, coef, audio[:, :24], keep, True), (x, coef, None, None, None, None, False)],
        "lateral_cat": [
            (x, None, None, None, lateral, tail, audio, keep),
            (x, coef, r, coef, lateral, tail, None, None),
        ],
        "bn_act_bwd_reduce": [(dy, x, r, mask, coef, coef, 2, True), (dy, x, None, mask[:0], coef, None, 2, True)],
        "bn_act_bwd_apply": [
            (dy, x, None, mask, coef, None, sums, True, True),
            (dy, x, None, mask[:0], coef, None, sums, False, False),
        ],
        "frame_sum": [(dy, keep), (dy, None)],
        "running_stats_update_": [(*running, counter, [stats], 0.1)],
        "norm_act": [
            (x, w, b, None, None, 1e-5, r, w, b, None, None, 1e-5, True, 2, True, False),
            (x, w, b, None, None, 1e-5, r, *none4, 1e-5, False, 2, True, True),
            (x, w, b, *given, 1e-5, None, *none4, 1e-5, False, 1, True, False),
        ],
        "norm_act_backward": [
            (dy, None, x, None, mask, coef, None, 2, True, True, False),
            (dy, r, x, r, mask, coef, coef, 2, True, True, True),
        ],
        "lateral_fuse": [
            (x, lateral, w[:5], b[:5], None, None, 1e-5, audio, keep, 2),
            (x, lateral, w[:5], b[:5], *(g[:5] for g in given), 1e-5, None, None, 1),
        ],
        "bn_relu_maxpool": [(x, coef, True), (lateral, tail, False)],
        "bn_relu_maxpool_bwd_apply": [(small, x, tap, coef, sums)],
        "norm_pool": [(x, w, b, None, None, 1e-5, 2, True), (x, w, b, *given, 1e-5, 1, True)],
        "norm_pool_backward": [(small, x, value, tap, coef, 2)],
    }
