"""Fixtures and switches that every test shares."""

import os
import signal
from pathlib import Path

import pytest

os.environ.setdefault("ONEDNN_MAX_CPU_ISA", "AVX512_CORE_BF16")  # as experiments/__init__.py, before torch computes

import torch

# A shell without job control starts background jobs with Ctrl-C ignored, and processes that tests start would inherit
# that: they are interrupted by tests, wherever the suite runs.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip `needs_cuda` tests without a device, unless AVSF_REQUIRE_CUDA=1 says that this machine has one."""
    if torch.cuda.is_available() or os.environ.get("AVSF_REQUIRE_CUDA") == "1":
        return
    skip = pytest.mark.skip(reason="no CUDA device here; set AVSF_REQUIRE_CUDA=1 to fail instead")
    for item in items:
        if "needs_cuda" in item.keywords:
            item.add_marker(skip)


@pytest.fixture(scope="session")
def real_media() -> Path:
    """The folder of real clips that AVSF_TEST_MEDIA names; skips where there is none."""
    folder = os.environ.get("AVSF_TEST_MEDIA")
    if not folder:
        pytest.skip("AVSF_TEST_MEDIA names no folder of real clips")
    path = Path(folder)
    assert path.is_dir(), f"AVSF_TEST_MEDIA is {folder}: not a folder"
    return path
