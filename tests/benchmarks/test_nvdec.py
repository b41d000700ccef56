"""The questions to NVDEC, rehearsed with the CPU twin: what they would find, they find."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from benchmarks import loader, nvdec
from benchmarks.decoder_load import DecoderLoad
from benchmarks.gpu_parts import NVDEC_S, NVDEC_STORE, VISITS, chosen_parts, parts
from benchmarks.result_rows import read_rows
from pipeline.media.annexb import AnnexB
from pipeline.nvdec.decoder import ClipPlanes, FFmpegDecoder
from pipeline.nvdec.hardware import why_not
from pipeline.synthetic import SyntheticSpec

SMALL = ["--device", "cpu", "--pixels", "64", "--repeats", "2", "--clips", "4", "--seconds", "0.1"]


def run(tmp_path: Path, *words: str) -> tuple[int, list[dict[str, Any]]]:
    """Exit code and rows of one call."""
    out = tmp_path / "rows.json"
    code = nvdec.main([*words, *SMALL, "--out", str(out)])
    return code, read_rows(out)


def test_planes_are_compared_to_the_last_bit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    code, rows = run(tmp_path, "exact")
    assert code == 0
    assert [row["streams"] for row in rows] == ["no B-frames", "B-frames", "two sizes in turn"]
    assert [(row["clips"], row["different"], row["largest_difference"]) for row in rows] == [(4, 0, 0)] * 3

    class OffByOne(FFmpegDecoder):
        def decode(self, stream: AnnexB, wanted: NDArray[Any]) -> ClipPlanes:
            planes = super().decode(stream, wanted)
            planes.chroma[-1, -1, -1, -1] ^= 1
            return planes

    monkeypatch.setattr(nvdec, "FFmpegDecoder", OffByOne)
    code, rows = run(tmp_path, "exact")
    assert code == 1
    assert [(row["different"], row["largest_difference"]) for row in rows[3:]] == [(4, 1)] * 3


def test_calls_and_what_python_can_do_meanwhile(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nvdec, "SPIN_S", 0.05)
    code, rows = run(tmp_path, "calls")
    assert code == 0
    assert [(row["bframes"], row["pictures"]) for row in rows] == [(0, 72), (3, 72)]
    assert all(row["annex_b_ms"] > 0 and row["clip_ms"] > 0 for row in rows)
    assert all(row["python_left_beside_decoding"] > 0 for row in rows)


def test_rates_by_threads(tmp_path: Path) -> None:
    code, rows = run(tmp_path, "rates", "--threads", "1", "2", "--processes", "1")
    assert code == 0
    assert [(row["processes"], row["threads"]) for row in rows] == [(1, 1), (1, 2)]
    assert all(row["clips_per_second"] > 0 for row in rows)


@pytest.mark.integration
def test_rates_of_two_processes(tmp_path: Path) -> None:
    code, rows = run(tmp_path, "rates", "--threads", "1", "--processes", "2")
    assert code == 0
    assert rows[0]["clips_per_second"] > 0


def test_without_nvdec_it_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    if why_not(0):
        assert nvdec.main(["exact"]) == 2
        assert f"NVDEC cannot be used: {why_not(0)}; --device cpu rehearses" in capsys.readouterr().err


def test_a_machine_without_a_gpu_has_no_decoder_load() -> None:
    with DecoderLoad("cpu") as load:
        assert load.percent == []
    assert load.row() == {}
    load.percent.extend([10.0, 30.0])
    assert json.dumps(load.row()) == '{"nvdec_percent_mean": 20.0, "nvdec_percent_max": 30.0}'


def test_parts_are_at_most_a_minute() -> None:
    own = [part for part in parts() if part.name.startswith(("nvdec-", "loader-"))]
    asked = {"calls", "exact", "rates", "processes", "graph", "loader", "loader-workers", "recipe", "quickstart"}
    assert {part.name for part in own} >= {*(f"nvdec-{name}" for name in asked), "loader-h264", "loader-vp9"}
    assert {"nvdec-exact", "nvdec-loader"} <= set(VISITS["short"])  # make gpu-report
    assert all(part.limit_s <= NVDEC_S == 60 for part in own)
    assert {part.name for part in chosen_parts(None, "nvdec")[1:]} <= {part.name for part in own}
    spec = SyntheticSpec(train_streams=4, val_streams=2, num_frames=150, size_px=256, codec="h264", gop=12)
    assert spec.name == NVDEC_STORE
    recipe = next(part for part in own if part.name == "nvdec-recipe")
    assert f"data.path={{runs}}/stores/{NVDEC_STORE}" in recipe.cuda
    assert "train.steps=200" in recipe.cuda
    assert VISITS["nvdec"][1] == "nvdec-exact"  # correctness first
    for part in own:
        if part.command[1] == "benchmarks.loader":
            assert loader._parser().parse_args([*part.command[2:], *part.cuda]).device == "cuda:0"
        if part.command[1] == "benchmarks.nvdec":
            options = nvdec._parser().parse_args([*part.command[2:], *part.cuda])
            assert options.device == "cuda"
    assert np.array_equal(nvdec.WANTED, np.arange(0, 64, 2))
