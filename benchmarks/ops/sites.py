"""The places of an R50 4x16 model at 224^2 where normalisation and fusion happen, and every way to compute them.

Legend: N clips, C channels, Cs Slow channels, Cl lateral channels, T frames, H = W pixels. The opponents normalise the
whole batch as one group (cheaper than what the paper trains); the fused operations keep groups of 8 clips.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from kernels.apex_support import apex_status
from kernels.backend import blocked_groups, set_blocked_groups
from kernels.eager import max_pool
from kernels.modules import GhostBatchNorm, LateralFusion, set_backend

Run = Callable[[], Any]


@dataclass(frozen=True)
class Site:
    """One place: channels, frames, pixels; `residual`: a block end, `lateral` channels: a fusion, `pool`: a stem."""

    name: str
    channels: int
    frames: int
    pixels: int
    residual: bool = False
    lateral: int = 0
    pool: bool = False

    def shape(self, clips: int) -> tuple[int, ...]:
        """(N, C, T, H, W) of the normalised or Slow tensor."""
        return (clips, self.channels, self.frames, self.pixels, self.pixels)

    def bytes_moved(self, clips: int, element: int) -> int:
        """Bytes that the two-pass fused forward and backward must move, masks included, parameters left out."""
        size = clips * self.frames * self.pixels**2
        if self.lateral:  # forward: lat, slow + lat -> out; backward: sums and dlat from (dout, lat), daudio from dout
            return size * element * (self.lateral + 2 * (self.channels + self.lateral)) + size * element * (
                5 * self.lateral + self.channels + self.lateral
            )
        if self.pool:  # forward x twice -> y, value, tap; backward dy, value; then dy, tap, x -> dx. Pooled: a quarter
            pooled = size * self.channels // 4
            return size * self.channels * element * 4 + pooled * (5 * element + 2)
        reads = 2 + 2 + 2  # forward x twice; backward dy and x twice
        moved = size * self.channels * element * (reads + 2 + (2 if self.residual else 0))
        return moved + (3 * size * self.channels // 8 if self.residual else 0)


LATERALS = (
    Site("pool1", 64, 4, 56, lateral=16),
    Site("res2", 256, 4, 56, lateral=64),
    Site("res3", 512, 4, 28, lateral=128),
    Site("res4", 1024, 4, 14, lateral=256),
)
NORMS = (
    Site("slow conv1", 64, 4, 112),
    Site("slow res2 end", 256, 4, 56, residual=True),
    Site("slow res3 inner", 128, 4, 28),
    Site("slow res4 end", 1024, 4, 14, residual=True),
    Site("fast conv1", 8, 32, 112),
    Site("slow stem", 64, 4, 112, pool=True),
    Site("fast stem", 8, 32, 112, pool=True),
    Site("fast res2 end", 32, 32, 56, residual=True),
)


def draw(shape: tuple[int, ...], dtype: torch.dtype, device: str) -> Tensor:
    """Normal values in channels_last_3d, a leaf that requires a gradient."""
    x = torch.randn(shape, device=device).to(dtype).to(memory_format=torch.channels_last_3d)
    return x.requires_grad_()


def _training_call(forward: Callable[[], Tensor], leaves: list[Tensor], like: tuple[int, ...]) -> Run:
    """Forward and backward with a fixed upstream gradient; gradients are handed over, not accumulated into leaves."""
    grad = draw(like, leaves[0].dtype, leaves[0].device.type).detach()

    def run() -> None:
        torch.autograd.grad(forward(), leaves, grad)

    return run


def _eager(norm: nn.Module, flat: bool, pool: bool = False) -> Callable[[Tensor, Tensor | None], Tensor]:
    def forward(x: Tensor, residual: Tensor | None) -> Tensor:
        y = norm(x.flatten(2, 3)).view(x.shape) if flat else norm(x)
        y = functional.relu(y if residual is None else y + residual)
        return max_pool(y) if pool else y

    return forward


def _join(normalize: Callable[[Tensor, Tensor | None], Tensor]) -> Callable[..., Tensor]:
    def forward(slow: Tensor, lateral: Tensor, audio: Tensor, keep: Tensor) -> Tensor:
        sound = torch.where(keep[:, None, None], audio, 0)[..., None, None]
        return torch.cat([slow, normalize(lateral, None)], 1) + sound

    return forward


def _fused_forward(site: Site, channels: int, device: str, blocked: bool | None) -> Callable[..., Tensor]:
    norm = GhostBatchNorm(channels).to(device)
    fusion = LateralFusion(norm)

    def forward(x: Tensor, other: Tensor | None, *more: Tensor) -> Tensor:
        """Run the site with the fused operations; other is the residual or the lateral map, more audio and keep."""
        set_backend("fused")
        set_blocked_groups(blocked)
        if site.lateral:
            assert other is not None
            return fusion(x, other, audio=more[0], keep=more[1])
        return norm(x, residual=other, relu=True, pool=site.pool)

    return forward


def _apex_forward(channels: int, device: str) -> Callable[[Tensor, Tensor | None], Tensor] | None:
    """apex groupbn (BN + add + ReLU, NHWC): float16 on CUDA where NVIDIA apex was built with it."""
    if device != "cuda" or not apex_status().usable:
        return None
    try:
        from apex.contrib.groupbn import BatchNorm2d_NHWC
    except ImportError:
        return None
    norm = BatchNorm2d_NHWC(channels, fuse_relu=True).to(device)

    def forward(x: Tensor, residual: Tensor | None) -> Tensor:
        nhwc = [None if t is None else t.flatten(2, 3).permute(0, 2, 3, 1) for t in (x, residual)]
        return norm(*nhwc).permute(0, 3, 1, 2).view(x.shape)

    return forward


def opponents(site: Site, clips: int, dtype: torch.dtype, device: str, *, compiled: tuple[str, ...]) -> dict[str, Run]:
    """Every way to run forward and backward of a site, by name; all on equal inputs.

    Args:
        site: the place.
        clips: N.
        dtype: of the activations.
        device: "cpu" or "cuda".
        compiled: torch.compile modes to include: "default", "max-autotune".

    Returns:
        name -> function without arguments; "fused" as a model runs it on this device, with more than 8 clips also the
        other order of passes (group by group, or all groups at once).
    """
    channels = site.lateral or site.channels
    x = draw(site.shape(clips), dtype, device)
    inputs: list[Any] = [x]
    out_shape = site.shape(clips)
    if site.pool:
        out_shape = (*out_shape[:3], (site.pixels + 1) // 2, (site.pixels + 1) // 2)
    if site.lateral:
        out_shape = (clips, site.channels + site.lateral, *out_shape[2:])
        audio = torch.randn(clips, out_shape[1], site.frames, device=device).to(dtype).requires_grad_()
        inputs += [
            draw((clips, site.lateral, *out_shape[2:]), dtype, device),
            audio,
            torch.ones(clips, dtype=torch.bool, device=device),
        ]
    else:
        inputs.append(draw(site.shape(clips), dtype, device) if site.residual else None)
    leaves = [t for t in inputs if isinstance(t, Tensor) and t.requires_grad]
    forwards: dict[str, Callable[..., Tensor]] = {
        "eager 5-D": _eager(nn.BatchNorm3d(channels).to(device), False, site.pool),
        "eager 4-D view": _eager(nn.BatchNorm2d(channels).to(device), True, site.pool),
    }
    for mode in compiled:
        forwards[f"compile {mode}"] = _eager(nn.BatchNorm2d(channels).to(device), True, site.pool)
    apex = _apex_forward(channels, device) if dtype == torch.float16 and not site.pool else None
    if apex is not None:
        forwards["apex groupbn"] = apex
    if site.lateral:
        forwards = {name: _join(forward) for name, forward in forwards.items()}
    for mode in compiled:
        forwards[f"compile {mode}"] = torch.compile(forwards[f"compile {mode}"], mode=mode, dynamic=False)
    forwards["fused"] = _fused_forward(site, channels, device, None)
    if clips > 8 and not site.lateral and not site.pool:
        set_blocked_groups(None)
        other = not blocked_groups(device)
        name = "fused, group by group" if other else "fused, all groups at once"
        forwards[name] = _fused_forward(site, channels, device, other)
    return {
        name: _training_call(lambda f=forward: f(*inputs), leaves, out_shape)  # type: ignore[misc]
        for name, forward in forwards.items()
    }
