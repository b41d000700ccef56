"""Both conv1 go to the library's own kernels where they serve, and give what the plain convolution gives."""

import pytest
import torch
from torch import Tensor

from kernels import stem
from kernels.library import fused_devices
from model.convolutions import FactoredConv3d, set_grouping
from model.pixel_groups import with_four_channels
from tests.kernels.support.cases import assert_close, norm_error

pytestmark = pytest.mark.skipif(not fused_devices(), reason="the library of fused operations is not built")
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.needs_cuda)]


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[torch.Size]:
    """Shapes of the frames that went to the operation, which serves the CPU too meanwhile (by its definition)."""
    seen: list[torch.Size] = []

    def recorded(frames: Tensor, weight: Tensor) -> Tensor:
        seen.append(frames.shape)
        out: Tensor = torch.ops.avsf.stem_conv(frames, weight)
        return out

    monkeypatch.setattr(stem, "serves", lambda kind, dtype: dtype in (torch.bfloat16, torch.float16))
    monkeypatch.setattr(stem, "stem_conv", recorded)
    return seen


def conv1(device: str, kind: str = "fast") -> FactoredConv3d:
    torch.manual_seed(0)
    channels, taps = (8, 5) if kind == "fast" else (64, 1)
    module = FactoredConv3d(3, channels, (taps, 7, 7), (1, 2, 2), (taps // 2, 3, 3), bias=False)
    return module.to(device=device, memory_format=torch.channels_last_3d)  # type: ignore[call-overload]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("width", [16, 15])
@pytest.mark.parametrize("kind", ["fast", "slow"])
def test_conv1_under_autocast(kind: str, width: int, device: str, calls: list[torch.Size]) -> None:
    rows = torch.randn(2, 3, 12, width, 4, generator=torch.Generator().manual_seed(1))
    rows[..., 3] = 0
    frames = rows.movedim(-1, 1).to(device=device, dtype=torch.float16)
    reference = conv1("cpu", kind)
    exact = torch.nn.functional.conv3d(
        frames.cpu()[:, :3].bfloat16().double(),
        reference.weight.bfloat16().double(),
        None,
        (1, 2, 2),
        reference.padding,
    )
    grads = []
    for given in (frames[:, :3], with_four_channels(frames[:, :3], torch.bfloat16)):
        module = conv1(device, kind)
        with torch.autocast(device, torch.bfloat16):
            y = module(given)
        assert y.dtype == torch.bfloat16
        assert y.is_contiguous(memory_format=torch.channels_last_3d)
        assert_close(y.detach().cpu(), exact, "y")
        y.float().square().sum().backward()
        assert module.weight.grad is not None
        assert module.weight.grad.stride() == module.weight.stride()
        grads.append(module.weight.grad)
    assert calls == [frames.shape, frames.shape]
    assert torch.equal(*grads)
    plain = conv1(device, kind)
    set_grouping(plain, "off")
    with torch.autocast(device, torch.bfloat16):
        y = plain(frames[:, :3])
    y.float().square().sum().backward()
    assert len(calls) == 2
    assert plain.weight.grad is not None
    assert norm_error(grads[0], plain.weight.grad.double()) < 0.01  # of a gradient in bfloat16


def test_what_the_kernels_do_not_take_is_convolved_as_before(calls: list[torch.Size]) -> None:
    frames = torch.randn(1, 2, 8, 8, 3).movedim(-1, 1).bfloat16()
    wider = FactoredConv3d(3, 16, (5, 7, 7), (1, 2, 2), (2, 3, 3), bias=False).bfloat16()
    biased = FactoredConv3d(3, 8, (5, 7, 7), (1, 2, 2), (2, 3, 3)).bfloat16()
    for module, x in ((wider, frames), (biased, frames), (conv1("cpu").bfloat16(), frames.requires_grad_())):
        assert module(x).shape[2:] == (2, 4, 4)
    assert module(x.detach().float().bfloat16()).shape == (1, 8, 2, 4, 4)
    assert len(calls) == 1
