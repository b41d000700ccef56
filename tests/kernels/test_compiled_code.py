"""Gates on the compiled CUDA code, where nvcc is: no spills, bounded registers, 128-bit accesses in the hot kernels."""

import re
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from kernels import build

NVCC = build.find_nvcc()
pytestmark = [pytest.mark.integration, pytest.mark.skipif(NVCC is None, reason="no nvcc here")]
ENTRY = re.compile(r"Compiling entry function '(\S+)'.*?(\d+) bytes spill stores.*?Used (\d+) registers", re.S)
HOT = (
    "stats_kernel",
    "apply_kernel",
    "reduce_kernel",
    "input_grad_kernel",
    "frame_sum_kernel",
    "maxpool_kernel",
    "maxpool_grad_kernel",
)


def _compile(source: Path, folder: Path) -> tuple[str, str]:
    """ptxas report and PTX of one source for sm_90."""
    kept = folder / source.stem
    kept.mkdir()
    command = [str(NVCC), *build.CUDA_FLAGS, "-arch=sm_90", "-cubin", "--keep", "--keep-dir", str(kept), str(source)]
    command += ["-o", str(kept / "out.cubin")]
    report = subprocess.run(command, check=True, capture_output=True, text=True).stderr
    return report, "".join(path.read_text() for path in kept.glob("*.ptx"))


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    """All reports and all PTX."""
    folder = tmp_path_factory.mktemp("cuda")
    with ThreadPoolExecutor(2) as pool:
        results = list(pool.map(lambda source: _compile(source, folder), sorted(build.SOURCES.glob("*.cu"))))
    return "".join(report for report, _ in results), "".join(ptx for _, ptx in results)


def test_no_spills_and_bounded_registers(compiled: tuple[str, str]) -> None:
    entries = ENTRY.findall(compiled[0])
    assert len(entries) >= 100
    for name, spilled, registers in entries:
        assert int(spilled) == 0, name
        assert int(registers) <= 128, name  # two blocks of 256 threads on a multiprocessor


def test_wide_kernels_move_128_bits(compiled: tuple[str, str]) -> None:
    bodies = re.split(r"\.entry ", compiled[1])[1:]
    seen = set()
    for body in bodies:
        name = body.split("(")[0]
        kind = next((hot for hot in HOT if hot in name), None)
        if kind is None or "Li8E" not in name:  # eight channels per thread
            continue
        seen.add(kind)
        assert re.search(r"ld\.global(\.nc)?\.v4\.", body), name
        if kind in ("apply_kernel", "input_grad_kernel", "maxpool_kernel", "maxpool_grad_kernel"):
            assert re.search(r"st\.global\.v4\.", body), name
    assert seen == set(HOT)
