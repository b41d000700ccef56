"""Which backend runs: what a model asks for, what a process asks for, and what is said about it."""

import logging
from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch

from kernels import backend
from kernels.layout import KernelInputError
from model.avslowfast import build_model
from model.variants import VARIANTS

TINY = replace(VARIANTS["small"], num_frames=2, width=8, num_mel_bins=16)
X = torch.zeros(1, 2, 1, 1, 1)


@pytest.fixture(autouse=True)
def _fresh(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A library that holds the CPU part, whatever is built here; nothing said yet."""
    monkeypatch.setattr(backend, "fused_devices", lambda: frozenset({"cpu"}))
    monkeypatch.setattr(backend, "library_text", lambda: "built CPU")
    monkeypatch.setattr(backend, "_said", set())
    backend.set_backend("auto")
    yield
    monkeypatch.undo()
    backend.set_backend("auto")


def test_an_auto_model_ends_what_an_earlier_model_chose() -> None:
    build_model(replace(TINY, backend="reference"))
    assert backend.backend_in_use() == "reference"
    assert not backend.use_fused(X)
    build_model(TINY)
    assert backend.backend_in_use() == "fused"
    assert backend.use_fused(X)


def test_an_auto_model_leaves_what_the_process_chose() -> None:
    backend.set_backend("reference")
    backend.set_model_backend("auto")
    assert backend.backend_in_use() == "reference"
    backend.set_model_backend("fused")
    assert backend.backend_in_use() == "fused"
    backend.set_backend("reference")  # the last word
    assert not backend.use_fused(X)


def test_choice_and_reason_are_said_once(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    backend._said.clear()
    with caplog.at_level(logging.INFO, "avslowfast.kernels"):
        for name in ("auto", "reference", "auto", "reference"):
            backend.set_model_backend(name)
        monkeypatch.setattr(backend, "fused_devices", frozenset)
        monkeypatch.setattr(backend, "library_text", lambda: "no library; run `python -m kernels.build`")
        backend.set_model_backend("auto")
    assert caplog.messages == [
        "kernels: fused operations (on cpu tensors, backend auto; built CPU)",
        "kernels: reference operations (backend reference)",
        "kernels: reference operations (backend auto; no library; run `python -m kernels.build`)",
    ]


def test_device_that_the_library_lacks(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr(backend, "fused_devices", lambda: frozenset({"cuda"}))
    with caplog.at_level(logging.WARNING, "avslowfast.kernels"):
        assert [backend.use_fused(X), backend.use_fused(X)] == [False, False]
        backend.set_backend("fused")
        with pytest.raises(KernelInputError, match="'fused' got a cpu tensor but the library holds cuda only"):
            backend.use_fused(X)
        assert not backend.use_fused(X.to("meta"))
    (message,) = caplog.messages
    assert message.startswith("kernels: reference operations on cpu tensors, the library holds cuda only")


def test_wrong_names_and_fused_without_a_library(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(KernelInputError, match="backend 'triton' must be one of"):
        backend.set_model_backend("triton")
    monkeypatch.setattr(backend, "fused_devices", frozenset)
    with pytest.raises(KernelInputError, match="needs the built library"):
        backend.set_model_backend("fused")
    assert backend.backend_in_use() == "reference"
