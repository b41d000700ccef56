"""A stand-in for CUDA graphs on the CPU: it records the operations of a piece of work and runs them again.

Like a capture it runs the Python code once, and whatever the code decides there is decided for good: a learning rate
that is a number, a branch, a tensor that is made anew. Like a capture it leaves every tensor that existed before as it
was, and refuses to read a value on the host.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten

from experiments.engine.graphs import CaptureError

_READS = ("aten._local_scalar_dense", "aten.nonzero", "aten.is_nonzero", "aten.equal")
_MEMORY = ("aten.empty", "aten.new_empty", "aten.empty_like", "aten.empty_strided", "aten.new_empty_strided")
Call = tuple[Any, tuple[Any, ...], dict[str, Any], Any]


def tensors_in(tree: Any) -> list[Tensor]:
    """The tensors of nested lists and mappings."""
    return [leaf for leaf in tree_flatten(tree)[0] if isinstance(leaf, Tensor)]


class Recording(TorchDispatchMode):
    """Runs operations while keeping them, and what they overwrite."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[Call] = []
        self.saved: dict[int, tuple[Tensor, Tensor]] = {}  # by storage: a view of all of it, and its contents before
        self.own: set[int] = set()  # storages that were made inside
        self.kept: list[Tensor] = []  # so that no address is used twice

    def __torch_dispatch__(
        self, operation: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run one operation and remember it."""
        name, given = str(operation), kwargs or {}
        if name.rpartition(".")[0] in _READS:
            raise RuntimeError(f"{name}: operation not permitted when stream is capturing")
        if operation._schema.is_mutable:
            values = dict(zip((a.name for a in operation._schema.arguments), args, strict=False)) | given
            for argument in operation._schema.arguments:
                if argument.alias_info is not None and argument.alias_info.is_write:
                    for tensor in tensors_in(values.get(argument.name)):
                        self.save(tensor)
        result = operation(*args, **given)
        known = {t.untyped_storage().data_ptr() for t in tensors_in((args, given))}
        for tensor in tensors_in(result):
            self.kept.append(tensor)
            if tensor.untyped_storage().data_ptr() not in known:
                self.own.add(tensor.untyped_storage().data_ptr())
        self.kept += tensors_in((args, given))
        self.calls.append((operation, args, given, result))
        return result

    def save(self, tensor: Tensor) -> None:
        """Keep what is in a tensor that existed before."""
        address = tensor.untyped_storage().data_ptr()
        if address not in self.own and address not in self.saved:
            whole = tensor.detach().as_strided((tensor.untyped_storage().nbytes() // tensor.element_size(),), (1,), 0)
            self.saved[address] = (whole, whole.clone())


class RecordingCapturer:
    """Captures by recording; `captures` counts, `fail` makes the next capture fail in its middle."""

    def __init__(self) -> None:
        self.captures = self.replays = 0
        self.fail = False

    def on_stream(self) -> AbstractContextManager[Any]:
        """There are no streams."""
        return nullcontext()

    def memory_bytes(self) -> int:
        """Nothing is measured."""
        return 0

    def capture(self, work: Callable[[], None]) -> Callable[[], None]:
        """Run the work under a recording, then put back what it changed."""
        generator = torch.get_rng_state()
        recording = Recording()
        try:
            with recording:
                work()
                if self.fail:
                    raise RuntimeError("operation failed due to a previous error during capture")
        except RuntimeError as error:
            raise CaptureError(str(error)) from error
        finally:
            with torch.no_grad():
                for whole, before in recording.saved.values():
                    whole.copy_(before)
            torch.set_rng_state(generator)
        self.captures += 1
        calls = recording.calls

        def replay() -> None:
            """Run the recorded operations on the recorded tensors."""
            self.replays += 1
            with torch.no_grad():
                for call in calls:
                    again(*call)

        return replay


def again(operation: Any, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> None:
    """Run an operation and put what it gives where it lay the first time."""
    if str(operation).rpartition(".")[0] in _MEMORY:
        return
    if not operation._schema.is_mutable and all(a.alias_info for a in operation._schema.returns):
        return  # a view: the recorded one sees the new contents
    known = {t.untyped_storage().data_ptr() for t in tensors_in((args, kwargs))}
    for old, new in zip(tensors_in(result), tensors_in(operation(*args, **kwargs)), strict=True):
        if old.untyped_storage().data_ptr() not in known:
            old.detach().copy_(new.detach())
