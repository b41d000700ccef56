"""The benchmark of fused operations runs here, at small shapes, and its arithmetic is right."""

import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import fusion
from benchmarks.ops.sites import LATERALS, NORMS, Site, opponents
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
    stems = {"stem_conv", "stem_conv_weight_grad"}  # benchmarks.stem times them
    assert {name.split()[0] for name in operations} == schemas - whole_nodes - stems


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
    result = json.loads(out.read_text())
    assert [row["site"] for row in result["rows"]] == ["fusion", "norm"]  # laterals, the most telling, come first
    assert result["finished"] is True
    assert list(tmp_path.iterdir()) == [out]


def test_rows_come_in_the_order_of_interest_and_are_told_as_they_come(monkeypatch: pytest.MonkeyPatch) -> None:
    """All sites at N = 8 in each dtype before more clips; torch.compile where it is asked for."""
    modes: list[tuple[int, str, tuple[str, ...]]] = []

    def compare(site: Site, n: int, dtype: torch.dtype, device: str, **options: Any) -> dict[str, Any]:
        modes.append((n, str(dtype).removeprefix("torch."), options["compiled"]))
        return {"site": site.name, "us": {}}

    monkeypatch.setattr(fusion, "compare", compare)
    monkeypatch.setattr(fusion, "single_operations", lambda site, *_: {"at": len(modes)})
    told: list[tuple[int, int, bool]] = []
    result = fusion.measure(
        "cpu", clips=(8, 32), dtypes=("bfloat16", "float16"), compiled=("default",), compiled_clips=(8,),
        compiled_dtypes=("bfloat16",), repeats=1, sites=SMALL[:2],
        record=lambda so_far: told.append((len(so_far["rows"]), len(so_far["operations"]), so_far["finished"])),
    )  # fmt: skip
    assert modes[::2] == [(8, "bfloat16", ("default",)), (8, "float16", ()), (32, "bfloat16", ()), (32, "float16", ())]
    assert modes[::2] == modes[1::2]
    assert [entry["operations"]["at"] for entry in result["operations"]] == [2, 2, 4, 4]  # not left for the end
    assert [rows for rows, _, _ in told] == [1, 2, 2, 2, 3, 4, 4, 4, 5, 6, 7, 8, 8]
    assert [finished for _, _, finished in told] == [False] * 12 + [True]


def test_an_opponent_that_fails_costs_its_own_figure_only(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail() -> None:
        raise RuntimeError("no such compiler")

    calls = {"eager 5-D": lambda: None, "compile default": fail, "fused": lambda: None}
    monkeypatch.setattr(fusion, "opponents", lambda *_, **__: dict(calls))
    row = fusion.compare(SMALL[0], 8, torch.float32, "cpu", repeats=1, compiled=("default",), copy_gbps=1.0)
    assert set(row["us"]) == set(row["over_fused"]) == {"eager 5-D", "fused"}
    assert row["failed"] == {"compile default": "RuntimeError: no such compiler"}
    calls["fused"] = fail
    with pytest.raises(RuntimeError, match="no such compiler"):
        fusion.compare(SMALL[0], 8, torch.float32, "cpu", repeats=1, compiled=(), copy_gbps=1.0)


HANGS_IN_THE_SECOND_ROW = """
import sys, time
from benchmarks import fusion
real, sites = fusion.compare, []
def compare(site, *args, **options):
    sites.append(site)
    return real(site, *args, **options) if len(sites) == 1 else time.sleep(300)
fusion.compare = compare
fusion.main(sys.argv[1:])
"""


@pytest.mark.integration
def test_a_run_killed_in_the_middle_leaves_the_rows_so_far(tmp_path: Path) -> None:
    out = tmp_path / "fusion.json"
    options = ["--device", "cpu", "--clips", "1", "--compiled", "--dtypes", "bfloat16", "--repeats", "1"]
    command = [sys.executable, "-c", HANGS_IN_THE_SECOND_ROW, *options, "--out", str(out)]
    process = subprocess.Popen(command, env=os.environ | {"OMP_NUM_THREADS": "1"}, stderr=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + 120
        while not out.is_file() and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.02)
    finally:
        process.kill()
        process.wait()
    result = json.loads(out.read_text())
    assert [row["site"] for row in result["rows"]] == ["pool1"]
    assert set(result["rows"][0]["us"]) == {"eager 5-D", "eager 4-D view", "fused"}
    assert result["finished"] is False


def test_ways_are_named_and_a_device_without_library_is_refused() -> None:
    torch.manual_seed(0)
    runs = opponents(SMALL[0], 8, torch.float32, "cpu", compiled=())
    assert sorted(runs) == ["eager 4-D view", "eager 5-D", "fused"]
    with pytest.raises(ValueError, match="no fused operations"):
        fusion.measure("xpu")


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (["--sites", "nosuch"], "sites .nosuch. must be of: pool1, res2"),
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
