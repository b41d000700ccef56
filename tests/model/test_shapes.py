"""Shapes of every stage and pathway against Table 1, on tensors without data."""

import re

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from model import avslowfast
from model.flops import fake_model, run_fake
from model.variants import VARIANTS
from tests.model.support.cases import built, inputs, tiny

Shapes = dict[str, tuple[int, ...]]


def stage_shapes(variant: str, height: int, width: int) -> Shapes:
    found: Shapes = {}
    with FakeTensorMode():
        model = fake_model(VARIANTS[variant])
        named: dict[str, nn.Module] = {"slow.pool1": model.slow, "fast.pool1": model.fast}
        for pathway in ("slow", "fast", "audio"):
            part = getattr(model, pathway)
            if part is None:
                continue
            conv1 = part.stem if pathway == "audio" else part.stem.conv  # a visual stem ends with pool1
            named |= {f"{pathway}.conv1": conv1} | {f"{pathway}.{s}": m for s, m in part.stages.items()}
        named |= {f"fused.{stage}": module for stage, module in model.stages.items()}

        def keep(name: str) -> object:
            def hook(module: nn.Module, args: object, out: object) -> None:
                first = out[0] if isinstance(out, tuple) else out
                assert isinstance(first, torch.Tensor)
                found[name] = tuple(first.shape[1:])

            return hook

        for name, module in named.items():
            module.register_forward_hook(keep(name))
        run_fake(model, height, width)
    return found


@pytest.mark.parametrize(
    ("height", "width"), [(224, 224), pytest.param(256, 256, marks=pytest.mark.integration), (256, 320)]
)
def test_table_1(height: int, width: int) -> None:
    found = stage_shapes("avslowfast_r50_4x16", height, width)
    for pathway, channels, frames in (
        ("slow", (64, 64, 256, 512, 1024, 2048), 4),
        ("fast", (8, 8, 32, 64, 128, 256), 32),
    ):
        for index, stage in enumerate(("conv1", "pool1", "res2", "res3", "res4", "res5")):
            scale = (2, 4, 4, 8, 16, 32)[index]
            expected = (channels[index], frames, height // scale, width // scale)
            assert found[f"{pathway}.{stage}"] == expected, f"{pathway} {stage}"
    audio = {"conv1": (32, 128, 80), "res2": (128, 128, 80), "res3": (256, 64, 40), "res4": (512, 32, 20)}
    audio["res5"] = (1024, 16, 10)
    assert {s: found[f"audio.{s}"] for s in audio} == audio
    assert found["fused.res3"] == (512 + 128, 4, height // 8, width // 8)
    assert found["fused.res4"] == (1024 + 256, 4, height // 16, width // 16)


@pytest.mark.integration
def test_table_1_in_the_code_is_what_runs() -> None:
    found = stage_shapes("avslowfast_r50_4x16", 256, 256)
    table = re.findall(r"^    (conv1|pool1|res[2-5])\b(.*)$", avslowfast.__doc__ or "", re.MULTILINE)
    assert [stage for stage, _ in table] == ["conv1", "pool1", "res2", "res3", "res4", "res5"]
    for stage, row in table:
        printed = [tuple(map(int, shape)) for shape in re.findall(r"(\d+) x (\d+) x (\d+)", row)]
        pathways = ("slow", "fast") if stage == "pool1" else ("slow", "fast", "audio")
        assert printed == [found[f"{pathway}.{stage}"][:3] for pathway in pathways], stage


@pytest.mark.integration
def test_detection_keeps_stride_16() -> None:
    found = stage_shapes("avslowfast_r50_4x16_ava", 256, 320)
    assert found["slow.res5"] == (2048, 4, 16, 20)
    assert found["fast.res5"] == (256, 32, 16, 20)


@pytest.mark.integration
def test_8x8_and_visual_only() -> None:
    found = stage_shapes("slowfast_r50_8x8", 224, 224)
    assert found["slow.res5"] == (2048, 8, 7, 7)
    assert found["fast.res5"] == (256, 32, 7, 7)
    assert found["fused.pool1"] == (64 + 16, 8, 56, 56)
    assert "audio.res2" not in found


@pytest.mark.parametrize("size", [(32, 32), (64, 64), (64, 96)])
def test_fully_convolutional(size: tuple[int, int]) -> None:
    config = tiny()
    model = built(config, settled=True).eval()
    frames = inputs(config, clips=2, px=96)[0][:, :, :, : size[0], : size[1]]
    scores = model(frames.contiguous(memory_format=torch.channels_last_3d), inputs(config, clips=2)[1]).scores
    assert scores.shape == (2, 5)
    torch.testing.assert_close(scores.sum(1), torch.ones(2))
