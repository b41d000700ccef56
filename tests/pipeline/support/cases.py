"""The folder of cases from public bug reports, beside the one that AVSF_TEST_MEDIA names."""

import os
from pathlib import Path

import pytest

CASES = Path(os.environ.get("AVSF_TEST_MEDIA", "")).absolute().parent / "cases"
needs_cases = pytest.mark.skipif(not CASES.is_dir(), reason="AVSF_TEST_MEDIA names no folder beside one called cases")
