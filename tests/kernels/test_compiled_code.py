"""Gates on the compiled CUDA code, where nvcc is: no spills, bounded registers, 128-bit accesses in the hot kernels.

What is looked at is the built library itself: machine code for sm_80 and sm_90, and the PTX for what comes after.
Where it has no CUDA part although nvcc is here, the objects of the build's own commands are compiled and looked at.
"""

import re
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec
from pathlib import Path

import pytest

from kernels import build
from tests.kernels.support.shared import alone, shared_folder

NVCC = build.find_nvcc()
USAGE = re.compile(r"Function (\S+):\s+REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)")
ARCHITECTURES = {"sm_80", "sm_90"}
HOT = ("stats_kernel", "norm_kernel", "apply_kernel", "norm_grad_kernel", "input_grad_kernel", "frame_sum_kernel")
WRITERS = HOT[1:-1]
# Registers that leave room for so many blocks of 256 threads on a multiprocessor (65536 registers): 2, 3 or 4. Only
# some kernels ask the compiler for theirs (__launch_bounds__); for those the gate on spills is what can fail.
REGISTERS = {
    "combine_": 64,
    "totals_": 64,
    "stats_kernel": 80,
    "frame_sum_kernel": 64,
    "finalize_": 64,
    "given_": 64,
    "update_": 64,
}
# A spilled register lies on the stack, which is empty but for an array that a kernel indexes.
STACK_BYTES = {"combine_sums_kernel": 32}
# The first convolutions: two blocks a multiprocessor, of 224 threads, Fast's forward of 128.
REGISTERS |= {"slow_stem_kernel": 146, "stem_grad_kernel": 146, "stem_kernel": 255}
# Matrix loads of four and products in the machine code of each; True: for each tile of a block, else in all.
STEM = {
    "slow_stem_kernel": ("LDSM.16.M88.4", 8, 32, False),
    "slow_stem_grad_kernel": ("LDSM.16.MT88.4", 6, 16, False),
    "stem_kernel": ("LDSM.16.M88.4", 2, 10, True),
    "stem_grad_kernel": ("LDSM.16.MT88.4", 4, 10, True),
}


def cuobjdump() -> str | None:
    """The disassembler on the path, beside nvcc, or in triton's package."""
    spec = find_spec("triton")
    places = spec.submodule_search_locations or [] if spec else []
    packages = [Path(place) / "backends" / "nvidia" / "bin" for place in places]
    beside = [NVCC.resolve().parent] if NVCC else []
    tools = [shutil.which("cuobjdump"), *(shutil.which(str(folder / "cuobjdump")) for folder in beside + packages)]
    return next((tool for tool in tools if tool), None)


pytestmark = [
    pytest.mark.integration,
    pytest.mark.skipif(NVCC is None, reason="no nvcc here"),
    pytest.mark.skipif(cuobjdump() is None, reason="no cuobjdump here"),
]


@pytest.fixture(scope="module")
def binaries(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """The library, or the objects of the build's own commands."""
    if "CUDA" in build.library_state().parts:
        return [build.LIBRARY]
    folder, torch = shared_folder(tmp_path_factory, "compiled"), build.torch_folder()
    assert torch is not None
    with alone(folder):
        if not (folder / "done").exists():
            jobs = [job for job in build.commands(torch, folder, NVCC) if job[0] == str(NVCC)]
            with ThreadPoolExecutor(2) as pool:
                list(pool.map(lambda job: subprocess.run(job, check=True, capture_output=True), jobs))
            (folder / "done").touch()
    return sorted(folder.glob("*.cu.o"))


def dump(binaries: list[Path], what: str, *options: str) -> list[tuple[str, str]]:
    """(target, text) of each part of what cuobjdump says."""
    found = []
    for path in binaries:
        command = [str(cuobjdump()), f"--dump-{what}", *options, str(path)]
        listing = subprocess.run(command, check=True, capture_output=True, text=True).stdout
        for part in re.split(r"\narch = ", listing)[1:]:
            target, text = part.split("\n", 1)
            found.append((target.strip(), text))
    return found


def _bodies(text: str, entry: str) -> list[tuple[str, str]]:
    """(mangled name, code) of every kernel of a listing."""
    parts = re.split(entry, text)[1:]
    return [(re.split(r"[(\s]", part.lstrip(), maxsplit=1)[0], part) for part in parts]


def _wide(name: str) -> str | None:
    """Which hot kernel this is, if it takes eight channels per thread."""
    return next((hot for hot in HOT if hot in name), None) if "Li8E" in name else None


def test_no_spills_and_bounded_registers(binaries: list[Path]) -> None:
    entries = [(target, *found) for target, text in dump(binaries, "resource-usage") for found in USAGE.findall(text)]
    by_target = {target: [e for e in entries if e[0] == target] for target in ARCHITECTURES}
    assert {target for target, *_ in entries} == ARCHITECTURES
    assert all(len(found) >= 100 for found in by_target.values())
    for target, name, registers, stack, local in entries:
        most = next((size for part, size in STACK_BYTES.items() if part in name), 0)
        assert int(stack) <= most, (name, target)
        assert int(local) == 0, (name, target)
        limit = next((bound for part, bound in REGISTERS.items() if part in name), 128)
        assert int(registers) <= limit, (name, target)


def test_wide_kernels_ask_for_128_bits(binaries: list[Path]) -> None:
    seen = set()
    text = "".join(text for _, text in dump(binaries, "ptx"))
    for name, body in _bodies(text, r"\.entry "):
        kind = _wide(name)
        if kind is None:
            continue
        seen.add(kind)
        assert re.search(r"ld\.global(\.nc|\.cs)?\.v4\.", body), name
        if kind in WRITERS:
            assert re.search(r"st\.global\.v4\.", body), name
    assert seen == set(HOT)


def _check_stem(name: str, target: str, body: str, kernel: str) -> None:
    """Tensor cores fed by few matrix loads and by asynchronous 128-bit copies, everything in registers."""
    assert not re.search(r"\b(LDL|STL)\b", body), (name, target)
    load, loads, count, each = STEM[kernel]
    tiles = int(re.search(r"Li(\d)E", name)[1]) if each else 1  # type: ignore[index]
    kind = "BF16" if "bfloat16" in name else ""
    products = re.findall(rf"\bHMMA\.16816\.F32(?:\.{kind})?\s" if kind else r"\bHMMA\.16816\.F32\s", body)
    assert len(products) == count * tiles, (name, target)
    assert len(re.findall(rf"\b{re.escape(load)}\b", body)) == loads * tiles, (name, target)
    if kernel != "stem_kernel":  # eight lanes of which write 128 bytes side by side
        assert re.search(r"\bSTG\.E(\.EF)?\.128\b", body), (name, target)
    assert re.search(r"\bLDGSTS\.E\.BYPASS\.128\b", body), (name, target)


# Seven seconds each, most of them the disassembler; spills and registers of both are held above.
@pytest.mark.parametrize("architecture", [pytest.param("sm_80", marks=pytest.mark.slow), "sm_90"])
def test_machine_code_moves_128_bits_and_keeps_all_in_registers(binaries: list[Path], architecture: str) -> None:
    seen = set()
    for target, part in dump(binaries, "sass", "--gpu-architecture", architecture):
        for name, body in _bodies(part, r"Function : "):
            kind = _wide(name)
            stem = next((part for part in STEM if part in name), None)
            if stem is not None:
                _check_stem(name, target, body, stem)
                seen.add((stem, target))
            if kind is None:
                continue
            assert not re.search(r"\b(LDL|STL)\b", body), (name, target)  # local memory
            seen.add((kind, target))
            assert re.search(r"\bLDG\.E(\.EF)?\.128\b", body), (name, target)
            if kind in WRITERS:
                assert re.search(r"\bSTG\.E(\.EF)?\.128\b", body), (name, target)
    assert seen == {(kind, architecture) for kind in (*HOT, *STEM)}
