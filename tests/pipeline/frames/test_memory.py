"""The fused operation under AddressSanitizer and UndefinedBehaviorSanitizer, in buffers of exactly the right size."""

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from pipeline.frames import build

pytestmark = [
    pytest.mark.integration,
    pytest.mark.skipif(shutil.which(build.cxx()[0]) is None, reason="needs a C++ compiler"),
]
DRIVER = Path(__file__).parents[1] / "support" / "frames_fuzz.cpp"


@pytest.fixture(scope="module")
def driver(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The driver, built with sanitizers; skips where the compiler has none."""
    program = tmp_path_factory.mktemp("sanitized") / "fuzz"
    optimised = [flag for flag in build.FLAGS if flag not in ("-shared", "-O3", "-fno-exceptions", "-fno-rtti")]
    flags = [*optimised, "-O2", "-g", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
    command = [*build.cxx(), *flags, f"-I{build.SOURCES}", str(DRIVER), "-o", str(program)]
    done = subprocess.run(command, capture_output=True, text=True)
    if "asan" in done.stderr and "cannot find" in done.stderr:
        pytest.skip("the compiler has no sanitizers")
    assert done.returncode == 0, done.stderr
    return program


def run(driver: Path, *words: str) -> subprocess.CompletedProcess[str]:
    """Run the driver."""
    environment = os.environ | {"ASAN_OPTIONS": "detect_leaks=0:abort_on_error=0"}
    return subprocess.run([str(driver), *words], capture_output=True, text=True, env=environment, timeout=250)


@pytest.mark.parametrize("seed", [1, 2])
def test_nothing_outside_the_buffers_is_touched(driver: Path, seed: int) -> None:
    done = run(driver, str(seed), "2500")
    assert done.returncode == 0, done.stderr
    made, refused = map(int, re.findall(r"\d+", done.stdout))
    assert made + refused == 2500
    assert made > 1500
    assert refused > 100


def test_a_byte_too_few_is_seen(driver: Path) -> None:
    done = run(driver, "1", "200", "short")
    assert done.returncode != 0
    assert "heap-buffer-overflow" in done.stderr
