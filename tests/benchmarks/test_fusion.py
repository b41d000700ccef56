"""The benchmark of fused operations runs here, at small shapes, and its arithmetic is right."""

import json
import re
from pathlib import Path

import pytest
import torch

from benchmarks import fusion
from benchmarks.kernel_sites import LATERALS, NORMS, Site, opponents
from kernels.backend import set_backend, set_blocked_groups
from kernels.library import fused_devices

pytestmark = pytest.mark.skipif("cpu" not in fused_devices(), reason="the library of fused operations is not built")
SMALL = (Site("norm", 16, 2, 6), Site("end", 16, 2, 6, residual=True), Site("fusion", 16, 2, 6, lateral=8))


@pytest.fixture(autouse=True)
def _restore() -> None:
    yield
    set_backend("auto")
    set_blocked_groups(None)


def test_rows_and_operations() -> None:
    result = fusion.measure("cpu", clips=(8, 16), dtypes=("float32",), compiled=(), repeats=2, sites=SMALL)
    assert len(result["rows"]) == 6
    assert result["copy_gb_per_s"] > 0
    for row in result["rows"]:
        expected = {"eager 5-D", "eager 4-D view", "fused"}
        if row["shape"][0] == 16 and row["kind"] == "norm":
            expected.add("fused, all groups at once")  # on the CPU group by group is what "fused" does
        assert set(row["us"]) == expected
        assert row["over_fused"]["fused"] == 1.0
        assert min(row["us"].values()) > 0
    assert [entry["site"] for entry in result["operations"]] == ["norm", "end"]
    operations = result["operations"][0]["operations"]
    assert operations["bn_act"]["bytes"] == 2 * 8 * 16 * 2 * 36 * 4
    assert operations["lateral_cat"]["bytes"] == 2 * 8 * 20 * 2 * 36 * 4
    schemas = {s.name.removeprefix("avsf::") for s in torch._C._jit_get_all_schemas() if s.name.startswith("avsf::")}
    # rows time the whole nodes
    whole_nodes = {
        "norm_act",
        "norm_act_backward",
        "norm_pool",
        "norm_pool_backward",
        "lateral_fuse",
    }
    assert {name.split()[0] for name in operations} == schemas - whole_nodes


def test_bytes_of_a_site() -> None:
    positions = 8 * 2 * 36
    assert SMALL[0].bytes_moved(8, 2) == positions * 16 * 2 * 8
    assert SMALL[1].bytes_moved(8, 2) == positions * 16 * 2 * 10 + 3 * positions * 2
    assert SMALL[2].bytes_moved(8, 2) == positions * 2 * (8 + 2 * 24 + 5 * 8 + 24)


def test_real_shapes_are_those_of_the_model() -> None:
    assert [(s.channels, s.lateral, s.pixels) for s in LATERALS] == [
        (64, 16, 56),
        (256, 64, 56),
        (512, 128, 28),
        (1024, 256, 14),
    ]
    assert len(NORMS) == 8


def test_command_line_writes_json(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fusion, "LATERALS", SMALL[2:])
    monkeypatch.setattr(fusion, "NORMS", SMALL[:1])
    out = tmp_path / "fusion.json"
    fusion.main(["--device", "cpu", "--repeats", "1", "--dtypes", "bfloat16", "--compiled", "--out", str(out)])
    assert [row["site"] for row in json.loads(out.read_text())["rows"]] == ["norm", "fusion"]


def test_ways_are_named_and_a_device_without_library_is_refused() -> None:
    torch.manual_seed(0)
    runs = opponents(SMALL[0], 8, torch.float32, "cpu", compiled=())
    assert sorted(runs) == ["eager 4-D view", "eager 5-D", "fused"]
    with pytest.raises(ValueError, match="no fused operations"):
        fusion.measure("xpu")


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (["--sites", "nosuch"], "sites .nosuch. must be of: slow conv1"),
        (["--repeats", "0"], "repeats .0. must be at least 1"),
        (["--clips", "12"], "clips .12. must be 1 to 8 or a multiple of 8"),
        (["--clips", "8", "0"], "clips .0. must be"),
        (["--compiled", "foo"], "invalid choice: 'foo'"),
    ],
)
def test_wrong_arguments_end_in_one_sentence(
    wrong: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stopped:
        fusion.main(["--device", "cpu", *wrong])
    assert stopped.value.code == 2
    assert re.search(message, capsys.readouterr().err)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_cuda_without_a_gpu_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        fusion.main(["--device", "cuda"])
    assert re.search("needs a GPU|no fused operations", capsys.readouterr().err)
