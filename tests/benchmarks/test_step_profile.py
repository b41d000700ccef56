"""Kernels are told apart by the operation that launched them; a replay takes the kinds of its launches."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import step
from benchmarks.steps.measure import Job
from benchmarks.steps.profile import Kernel, by_kind, kind_of, lay_beside, profile_job, read_trace

FAST_STEM = [[32, 4, 32, 224, 112], [32, 8, 5, 7, 7]]


@pytest.mark.parametrize(
    ("kernel", "operation", "shapes", "kind"),
    [
        ("sm90_xmma_fprop", "aten::cudnn_convolution", [*FAST_STEM, []], "stems"),
        ("sm90_xmma_wgrad", "aten::convolution_backward", [[1], *FAST_STEM], "stems"),
        ("nhwcToNchw", "aten::convolution_backward", [[1], [1], [64, 64, 3, 3]], "convolutions"),
        ("bn_act_kernel", "avsf::norm_act", [], "BN family and laterals"),
        ("stem_forward", "avsf::stem_conv", [], "stems"),
        ("cast_kernel", "avsf::cast_weights", [], "casts and copies"),
        ("CatArrayBatchedCopy", "aten::cat", [], "BN family and laterals"),
        ("vectorized_elementwise", "aten::add_", [], "additions"),
        ("vectorized_elementwise", "aten::copy_", [], "casts and copies"),
        ("FusedSgd", "aten::_fused_sgd_", [], "optimizer"),
        ("Memset (Device)", None, [], "memset"),
        ("Memcpy DtoD (Device -> Device)", None, [], "casts and copies"),
        ("void at::native::reduce_kernel<512>", None, [], "small reductions"),
        ("sm90_xmma_dgrad_implicit_gemm", None, [], "convolutions"),
        ("something", None, [], "other"),
    ],
)
def test_kinds(kernel: str, operation: str | None, shapes: list[Any], kind: str) -> None:
    assert kind_of(kernel, operation, shapes) == kind


def trace(path: Path) -> Path:
    def event(cat: str, name: str, ts: float, dur: float, **args: Any) -> dict[str, Any]:
        return {"ph": "X", "cat": cat, "name": name, "ts": ts, "dur": dur, "args": args}

    events = [
        event("cpu_op", "aten::cudnn_convolution", 0, 5, **{"External id": 1, "Input Dims": [*FAST_STEM, []]}),
        event("cpu_op", "avsf::norm_act", 6, 5, **{"External id": 2, "Input Dims": []}),
        event("kernel", "bn", 130, 20, **{"External id": 2}),
        event("kernel", "xmma", 100, 20, **{"External id": 1}),
        event("gpu_memset", "Memset (Device)", 140, 20),
        {"ph": "M", "name": "process_name"},
    ]
    path.write_text(json.dumps({"traceEvents": events}))
    return path


def test_a_trace_is_read_and_added_up(tmp_path: Path) -> None:
    kernels = read_trace(trace(tmp_path / "trace.json"))
    assert [k.kind for k in kernels] == ["stems", "BN family and laterals", "memset"]
    found = by_kind(kernels)
    assert found["stems"] == {"launches": 1, "ms": 0.02}
    assert found["idle"] == {"launches": 0, "ms": 0.01}  # 120 to 130; the last two overlap
    assert list(found) == ["stems", "BN family and laterals", "memset", "idle"]


def test_a_replay_takes_the_kinds_of_its_launches() -> None:
    launched = [Kernel("a", 0, 1, "stems"), Kernel("x", 1, 1, "other"), Kernel("a", 2, 1, "convolutions")]
    replayed = [Kernel("Memcpy", 0, 1, "casts and copies"), Kernel("a", 1, 2, "other"), Kernel("a", 3, 2, "other")]
    found = lay_beside(replayed, launched)
    assert [k.length_us for k in found] == [1, 2, 2]
    assert found[0].kind == "casts and copies"
    same = lay_beside([Kernel(k.name, 0, 9, "other") for k in launched], launched)
    assert [k.kind for k in same] == ["stems", "other", "convolutions"]


@pytest.mark.integration
def test_profile_on_the_cpu(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    row = profile_job(Job("small", 2, "pyslowfast", 32, "float32", "cpu"))
    kinds = row["kinds"]
    assert kinds["stems"]["launches"] > 2
    assert kinds["convolutions"]["ms"] > 5 * kinds["small reductions"]["ms"]
    assert sum(k["ms"] for k in kinds.values()) == pytest.approx(row["span_ms"], rel=0.05)
    assert "BN family and laterals" in row["text"]
    out = tmp_path / "rows.json"
    options = ["--profile", "--device", "cpu", "--variants", "small", "--clips", "2", "--pixels", "32"]
    assert step.main([*options, "--ways", "eager 4-D", "--audio", "dropped", "--out", str(out)]) == 0
    assert json.loads(out.read_text())["rows"][0]["audio"] == "dropped"
    assert "optimizer" in capsys.readouterr().out
    assert not torch.is_autocast_enabled("cpu")
