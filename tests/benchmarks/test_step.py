"""The training-step benchmark runs every eager way here and changes nothing but speed."""

import pytest
import torch

from benchmarks import step
from kernels.library import fused_devices
from model.avslowfast import build_model
from model.variants import VARIANTS

pytestmark = pytest.mark.integration


def test_every_eager_way_is_timed() -> None:
    ways = ("eager 5-D", "eager 4-D view", "fused")
    recorded: list[tuple[str, ...]] = []
    result = step.measure(
        "small",
        "cpu",
        clips=2,
        pixels=64,
        dtype=torch.float32,
        repeats=1,
        ways=ways,
        record=lambda result: recorded.append(tuple(result["ms_per_step"])),
    )
    expected = ways if "cpu" in fused_devices() else ways[:2]
    assert tuple(result["ms_per_step"]) == expected
    assert recorded == [expected[:count] for count in range(1, len(expected) + 1)]  # a killed run keeps what it had
    assert all(result["clips_per_s"][way] > 0 for way in expected)


def test_eager_norms_give_the_models_result() -> None:
    config = VARIANTS["small"]
    torch.manual_seed(0)
    frames, log_mel, _ = step.synthetic_batch(config, 2, 64, "cpu")
    outputs = []
    for flat in (None, True, False):
        torch.manual_seed(0)
        model = build_model(config).eval()
        if flat is not None:
            step.make_eager(model, flat=flat)
        with torch.no_grad():
            outputs.append(model(frames, log_mel))
    torch.testing.assert_close(outputs[1], outputs[0], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(outputs[2], outputs[0], rtol=1e-4, atol=1e-5)
