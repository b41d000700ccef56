"""Which backend runs: what a module asks for, what a process asks for, and what is said about it."""

import logging
from collections.abc import Iterator
from dataclasses import replace
from typing import Any, ClassVar

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from kernels import backend
from kernels.layout import KernelInputError
from kernels.library import fused_devices
from kernels.modules import GhostBatchNorm, LateralFusion, choose_backend
from model.avslowfast import build_model
from model.variants import VARIANTS

TINY = replace(VARIANTS["small"], num_frames=2, width=8, num_mel_bins=16)
X = torch.zeros(1, 2, 1, 1, 1)


@pytest.fixture(autouse=True)
def _fresh(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A library that holds the CPU part, whatever is built here; nothing said yet."""
    monkeypatch.setattr(backend, "fused_devices", lambda: frozenset({"cpu"}))
    monkeypatch.setattr(backend, "library_text", lambda: "built CPU")
    monkeypatch.setattr(backend._settings, "said", set())
    backend.set_backend("auto")
    yield
    monkeypatch.undo()
    backend.set_backend("auto")


def backends(model: nn.Module) -> set[str]:
    """The backends of all norms and fusions of a model."""
    return {m.backend for m in model.modules() if isinstance(m, GhostBatchNorm | LateralFusion)}


def test_a_model_switches_its_own_modules_alone() -> None:
    auto, reference = build_model(TINY), build_model(replace(TINY, backend="reference"))
    fused = build_model(replace(TINY, backend="fused"))
    assert [backends(model) for model in (auto, reference, fused)] == [{"auto"}, {"reference"}, {"fused"}]
    assert backend.backend_in_use() == "fused"
    backend.set_backend("reference")
    assert not backend.use_fused(X)
    assert not backend.use_fused(X, "reference")
    assert backend.use_fused(X, "fused")  # the process's choice is that of "auto" modules
    choose_backend(auto.slow, "fused")
    assert backends(auto.slow) == {"fused"}
    assert backends(auto.fast) == {"auto"}


def ops_of(model: nn.Module) -> set[str]:
    """Names of the library's operations in one training forward of a TINY model."""
    frames = torch.randn(2, 3, 8, 32, 32).to(memory_format=torch.channels_last_3d)

    class Names(TorchDispatchMode):
        found: ClassVar[set[str]] = set()

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            Names.found.add(str(func))
            return func(*args, **(kwargs or {}))

    with Names():
        model(frames, torch.randn(2, 1, 32, 16))
    return {name for name in Names.found if name.startswith("avsf.")}


@pytest.mark.skipif("cpu" not in fused_devices(), reason="needs the built library; run `python -m kernels.build`")
def test_models_of_both_backends_run_side_by_side(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    fused, reference = build_model(replace(TINY, backend="fused")), build_model(replace(TINY, backend="reference"))
    assert {"avsf.norm_act.default", "avsf.lateral_fuse.default"} <= ops_of(fused)
    assert not ops_of(reference)


def test_choice_and_reason_are_said_once(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    backend._settings.said.clear()
    with caplog.at_level(logging.INFO, "avslowfast.kernels"):
        for name in ("auto", "reference", "auto", "reference"):
            backend.announce_backend(name)
        monkeypatch.setattr(backend, "fused_devices", frozenset)
        monkeypatch.setattr(backend, "library_text", lambda: "no library; run `python -m kernels.build`")
        backend.announce_backend("auto")
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
        backend.announce_backend("triton")
    monkeypatch.setattr(backend, "fused_devices", frozenset)
    norm = GhostBatchNorm(2)
    with pytest.raises(KernelInputError, match="needs the built library"):
        choose_backend(norm, "fused")
    assert norm.backend == "auto"
    assert backend.backend_in_use() == "reference"
