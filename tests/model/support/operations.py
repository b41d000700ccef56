"""Which operations run: a list of their names."""

from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode


class Operations(TorchDispatchMode):
    """Names of the operations that run inside, each with the shape of its first tensor, in `seen`."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[str, tuple[int, ...]]] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        first = args[0] if args else None
        shape = tuple(first.shape) if isinstance(first, Tensor) else ()
        self.seen.append((function.overloadpacket.__name__, shape))
        return function(*args, **(kwargs or {}))

    def names(self) -> list[str]:
        """In order."""
        return [name for name, _ in self.seen]
