"""What tests of the fused operations change of the process is taken back."""

from collections.abc import Iterator

import pytest
import torch

from kernels.modules import set_backend


@pytest.fixture
def auto_backend() -> Iterator[None]:
    """Backend and threads are as before after the test."""
    yield
    set_backend("auto")
    torch.set_num_threads(1)
