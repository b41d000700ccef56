"""Nothing re-lays out a tensor: every convolution and norm sees channels-last data, forward and backward."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from kernels.layout import is_channels_last
from kernels.modules import GhostBatchNorm, set_backend
from model.convolutions import set_grouping
from model.inputs import ModelInputError
from tests.model.support.cases import BACKENDS, built, inputs, tiny

CASES: list[dict[str, Any]] = [
    {"sync_loss": "contrastive"},
    {"fusion": "a_f_s", "sync_loss": "contrastive", "sync_levels": ("res3", "res4")},
    {"fusion": "av_nonlocal", "sync_loss": "classification"},
    {"depth": 26, "nonlocal_blocks": (0,), "drop_pathway_mode": "running_average"},
    {"audio_block": "table1", "slow_frame_sampling": "linspace", "activation_checkpointing": True},
]
GROUPED: dict[str, Any] = {"grouping": "always"}
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.needs_cuda)]
LATERAL_ENDS = ("audio.expand.norm", "res3.out.norm", "res4.out.norm")


@pytest.fixture(autouse=True)
def _auto_backend() -> Iterator[None]:
    yield
    set_backend("auto")


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("changes", [*CASES, GROUPED | CASES[0], GROUPED | CASES[4]])
@pytest.mark.parametrize("backend", BACKENDS)
def test_every_convolution_sees_channels_last(backend: str, changes: dict[str, Any], device: str) -> None:
    set_backend(backend)
    changes = dict(changes)
    grouping = changes.pop("grouping", "auto")
    config = tiny(**changes)
    model = built(config).to(device)
    set_grouping(model, grouping)
    wrong: list[str] = []
    seen = {"forward": 0, "backward": 0}

    def watch(name: str) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...], out: Any) -> None:
            outs = out if isinstance(out, tuple) else (out,)  # a fork has two readers, and a gradient from each
            for kind, x in (("input", args[0]), ("output", outs[0])):
                seen["forward"] += 1
                if not is_channels_last(x):
                    wrong.append(f"{name} {kind} {tuple(x.shape)} {x.stride()}")
            for one in outs:
                if one.requires_grad:
                    one.register_hook(lambda grad: backward(name, grad))

        return hook

    def backward(name: str, grad: Tensor) -> None:
        seen["backward"] += 1
        # An audio lateral's own gradient (N, C, T) is a few kB that the broadcast's sum lays out as it likes.
        if not is_channels_last(grad) and not name.endswith(LATERAL_ENDS):
            wrong.append(f"{name} gradient {tuple(grad.shape)} {grad.stride()}")

    for name, module in model.named_modules():
        if isinstance(module, nn.Conv2d | nn.Conv3d | GhostBatchNorm):
            module.register_forward_hook(watch(name))
    frames, log_mel = (x.to(device) for x in inputs(config))
    out = model(frames, log_mel, negative_log_mel=None if config.sync_loss == "none" else log_mel.flip(0))
    loss = out.logits.sum() + (0 if out.sync_loss is None else out.sync_loss)
    loss.backward()
    assert not wrong, "\n".join(wrong)
    assert seen["forward"] > 100
    assert seen["backward"] > 50


@pytest.mark.parametrize("device", DEVICES)
def test_weights_are_channels_last(device: str) -> None:
    model = built(tiny()).to(device)
    for module in model.modules():
        if isinstance(module, nn.Conv3d):
            assert module.weight.is_contiguous(memory_format=torch.channels_last_3d)
        elif isinstance(module, nn.Conv2d):
            assert module.weight.is_contiguous(memory_format=torch.channels_last)


def test_inputs_of_another_layout_or_shape_are_refused() -> None:
    config = tiny()
    model = built(config)
    frames, log_mel = inputs(config)
    with pytest.raises(ModelInputError, match="channels_last_3d"):
        model(frames.contiguous(), log_mel)
    with pytest.raises(ModelInputError, match=r"alpha_fast \(4\) x num_frames \(4\)"):
        model(frames[:, :, :12], log_mel)
    with pytest.raises(ModelInputError, match="= 64 frames"):
        model(frames, log_mel[:, :, :32])
    with pytest.raises(ModelInputError, match=r"\(B, 1, M, F\)"):
        model(frames, log_mel[:, 0])
    with pytest.raises(ModelInputError, match="visual pathways"):
        model(None, log_mel)


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("kernel", [(1, 1, 1), (1, 3, 3), (3, 1, 1), (5, 1, 1), (5, 7, 7)])
def test_factored_convolution_is_conv3d(kernel: tuple[int, int, int], stride: int) -> None:
    from model.blocks import conv

    torch.manual_seed(0)
    strides = (1, stride, stride) if kernel[0] == 1 else (stride, 1, 1)
    layer: Any = conv(6, 8, kernel, strides).double()
    x = torch.randn(2, 6, 5, 8, 8, dtype=torch.float64).to(memory_format=torch.channels_last_3d)
    expected = nn.functional.conv3d(x, layer.weight, None, layer.stride, layer.padding)
    torch.testing.assert_close(layer(x), expected, rtol=1e-12, atol=1e-12)


def test_slow_frames_options() -> None:
    from model.frames import slow_frames

    config = tiny()
    frames = torch.arange(16.0).view(1, 1, 16, 1, 1).expand(2, 3, 16, 4, 4)
    frames = frames.contiguous(memory_format=torch.channels_last_3d)
    assert slow_frames(frames, config)[0, 0, :, 0, 0].tolist() == [0, 4, 8, 12]
    linspace = slow_frames(frames, tiny(slow_frame_sampling="linspace"))
    assert linspace[0, 0, :, 0, 0].tolist() == torch.linspace(0, 15, 4).long().tolist() == [0, 5, 10, 15]
    assert linspace.is_contiguous(memory_format=torch.channels_last_3d)
