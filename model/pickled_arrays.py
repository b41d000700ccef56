"""Arrays and tensors in a pickle: Python's own unpickler with lists of what it may do, and stand-ins for what it makes.

Of the opcodes it has those of numbers, text and containers; of names those of arrays and tensors, each of which is a
stand-in from this file: nothing of numpy or torch runs before sizes are checked. It is the machine of `pickle` that is
written in Python, because the one in C, `torch.load(weights_only=True)` included, hashes any key (nested tuples never
end); torch's also knows protocol 2 only. Text of errors never shows a container of the file, for the same reason.
"""

import math
import pickle
import pickletools
import re
from collections.abc import Callable
from dataclasses import dataclass
from types import FunctionType
from typing import Any, BinaryIO

import numpy as np
import torch
from torch import Tensor

MAX_OPCODES = 200_000  # SlowFast R101 with its optimizer state needs 61 000
_MAX_DIMS = 8
_ITEM_TYPES = re.compile(r"b1|[iu][1248]|f[248]")
_STORAGES = {
    "Float": torch.float32, "Double": torch.float64, "Half": torch.float16, "BFloat16": torch.bfloat16,
    "Long": torch.int64, "Int": torch.int32, "Short": torch.int16, "Char": torch.int8, "Byte": torch.uint8,
    "Bool": torch.uint8,  # any byte is a valid one
}  # fmt: skip
_OPCODES = {
    "PROTO", "FRAME", "STOP", "NONE", "NEWTRUE", "NEWFALSE", "BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT",
    "BINSTRING", "SHORT_BINSTRING", "BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8", "BINBYTES", "SHORT_BINBYTES",
    "BINBYTES8", "BYTEARRAY8", "EMPTY_DICT", "EMPTY_LIST", "EMPTY_TUPLE", "MARK", "TUPLE", "TUPLE1", "TUPLE2",
    "TUPLE3", "APPEND", "APPENDS", "SETITEM", "SETITEMS", "BINPUT", "LONG_BINPUT", "MEMOIZE", "BINGET", "LONG_BINGET",
    "GLOBAL", "STACK_GLOBAL", "REDUCE", "BUILD", "BINPERSID",
}  # fmt: skip
_OPCODE_NAMES = {ord(opcode.code): opcode.name for opcode in pickletools.opcodes}


class PickleRefusedError(ValueError):
    """A pickle that is damaged or holds more than numbers, text, containers and arrays."""


def _rule(holds: bool, message: str) -> None:
    if not holds:
        raise PickleRefusedError(message)


def _is_count(value: object, limit: int) -> bool:
    return type(value) is int and 0 <= value <= limit


def _shape(value: object) -> tuple[int, ...]:
    good = isinstance(value, tuple) and len(value) <= _MAX_DIMS and all(_is_count(n, 1 << 40) and n for n in value)
    _rule(good, f"a shape must be at most {_MAX_DIMS} positive numbers")
    return value  # type: ignore[return-value]


# Stand-ins ------------------------------------------------------------------------------------------------------------


class ItemType:
    """Of `numpy.dtype`: a plain number."""

    def __init__(self, code: object, *_flags: object) -> None:
        good = isinstance(code, str) and _ITEM_TYPES.fullmatch(code) is not None
        _rule(good, "an array's type must be a plain number")
        self.code, self.order = str(code).replace("b", "u"), "="  # any byte is a valid u1

    def set_state(self, state: object) -> None:
        """(version, byte order, subarray, names, fields, ...)."""
        fields: Any = state if isinstance(state, tuple) else ()
        plain = len(fields) >= 5 and all(part is None for part in fields[2:5]) and fields[1] in ("<", ">", "=", "|")
        _rule(plain, "an array's type must be a plain number")
        self.order = fields[1]


class RawArray:
    """Of `numpy.ndarray`; text as data has one character a byte, as protocol 2 stores it."""

    def __init__(self, item: object = None, shape: object = (), order: object = "C", data: object = b"") -> None:
        self.item, self.shape, self.order, self.data = item, shape, order, data

    def set_state(self, state: object) -> None:
        """(version, shape, type, whether the first index runs fastest, data)."""
        _rule(isinstance(state, tuple) and len(state) == 5, "state is set on something that is no array")
        fields: Any = state
        self.shape, self.item, self.data = fields[1], fields[2], fields[4]
        self.order = "F" if fields[3] is True else "C"

    @property
    def num_bytes(self) -> int:
        """Bytes of its own data."""
        return len(self.data) if isinstance(self.data, str | bytes | bytearray) else 0

    def tensor(self) -> Tensor:
        """A copy in native byte order."""
        item, shape, data = self.item, _shape(self.shape), self.data
        if not isinstance(item, ItemType) or not isinstance(data, str | bytes | bytearray):
            raise PickleRefusedError("an array has no type or no bytes; its type must be a plain number")
        dtype = np.dtype(item.order + item.code)
        wanted = math.prod(shape) * dtype.itemsize
        _rule(wanted == len(data), f"an array of shape {shape} has {len(data)} bytes, not {wanted}")
        try:
            values = np.frombuffer(data.encode("latin-1") if isinstance(data, str) else data, dtype)
        except UnicodeEncodeError as error:
            raise PickleRefusedError("an array's bytes are text") from error
        values = values.astype(dtype.newbyteorder("="))
        return torch.from_numpy(values.reshape(shape, order="F" if self.order == "F" else "C"))


@dataclass(frozen=True)
class Storage:
    """Of a torch storage, whose bytes lie outside the pickle."""

    dtype: torch.dtype
    key: str
    count: int

    def tensor(self, data: bytes) -> Tensor:
        """All elements, (count,), as a copy of little-endian bytes."""
        wanted = self.count * self.dtype.itemsize
        _rule(0 < len(data) == wanted, f"storage {self.key[:80]} has {len(data)} bytes, not {wanted}")
        return torch.frombuffer(bytearray(data), dtype=self.dtype)


class RawTensor:
    """Of a `torch.Tensor`: a view of a storage."""

    def __init__(self, storage: object, offset: object, shape: object, stride: object, *_rest: object) -> None:
        if not isinstance(storage, Storage) or not isinstance(stride, tuple):
            raise PickleRefusedError("a tensor has no storage or no shape")
        self.storage, self.offset, self.shape, self.stride = storage, offset, shape, stride

    def view(self, elements: Tensor) -> Tensor:
        """The view of its storage's elements (count,)."""
        shape, limit = _shape(self.shape), self.storage.count
        good = len(self.stride) == len(shape) and all(_is_count(n, limit) for n in (self.offset, *self.stride))
        _rule(good, "a tensor's offset or strides are no numbers inside its storage")
        _rule(math.prod(shape) <= limit, f"a tensor of shape {shape} is larger than its storage of {limit} elements")
        offset: int = self.offset  # type: ignore[assignment]
        last = offset + sum((size - 1) * step for size, step in zip(shape, self.stride, strict=True))
        _rule(last < limit, f"a tensor of shape {shape} leaves its storage of {limit} elements")
        return elements.as_strided(shape, self.stride, offset)


def _text(text: object, encoding: object) -> str:
    """How Python 3 stores bytes in protocol 2; encoded when the array is made."""
    _rule(isinstance(text, str) and encoding == "latin1", "bytes must be stored as latin1")
    return text  # type: ignore[return-value]


def _ordered() -> dict[Any, Any]:
    """Dicts keep their order."""
    return {}


def _parameter(tensor: object, *_rest: object) -> RawTensor:
    _rule(isinstance(tensor, RawTensor), "a parameter is not a tensor")
    return tensor  # type: ignore[return-value]


_STAND_INS: dict[str, Any] = {  # what a pickle may name; a function may also be called
    "collections.OrderedDict": _ordered,
    "_codecs.encode": _text,
    "numpy.ndarray": None,
    "numpy.dtype": lambda *code: ItemType(*code),
    "numpy.core.multiarray._reconstruct": lambda _kind, _shape, _type: RawArray(),
    "numpy.core.multiarray.scalar": lambda item, data: RawArray(item, (), "C", data),
    "numpy.core.numeric._frombuffer": lambda data, item, shape, order: RawArray(item, shape, order, data),
    "torch._utils._rebuild_tensor_v2": lambda *state: RawTensor(*state),
    "torch._utils._rebuild_parameter": _parameter,
    **{f"torch.{kind}Storage": dtype for kind, dtype in _STORAGES.items()},
}


_Unpickler: Any = pickle._Unpickler


class _Reader(_Unpickler):
    """The machine of `pickle`, narrowed to `_OPCODES`, `_STAND_INS` and plain keys."""

    def __init__(self, file: BinaryIO) -> None:
        super().__init__(file, encoding="latin-1")  # 8-bit strings of Python 2
        self.storages: dict[str, Storage] = {}
        self.dispatch = self  # the machine asks it for the method of every opcode
        self.opcodes = 0

    def __getitem__(self, code: int) -> Callable[[Any], None]:
        self.opcodes += 1
        _rule(self.opcodes <= MAX_OPCODES, f"it has more than {MAX_OPCODES} opcodes")
        name = _OPCODE_NAMES.get(code, str(code))
        _rule(name in _OPCODES, f"opcode {name} makes no array in a plain container")
        own: Callable[[Any], None] | None = getattr(_Reader, f"load_{name.lower()}", None)
        return own or _Unpickler.dispatch[code]

    def find_class(self, module: str, name: str) -> Any:
        """The stand-in of a name; the name is not looked up."""
        text = f"{module}.{name}".replace("numpy._core", "numpy.core")
        _rule(text in _STAND_INS, f"{text[:80]!r} is neither an array nor a plain container")
        return _STAND_INS[text]

    def persistent_load(self, pid: object) -> Storage:
        """('storage', type, key, device, number of elements[, view]): how torch refers to bytes outside the pickle."""
        fields = pid if isinstance(pid, tuple) else ()
        plain = len(fields) == 5 or (len(fields) == 6 and fields[5] is None)
        good = plain and isinstance(fields[1], torch.dtype) and isinstance(fields[2], str)
        _rule(good and _is_count(fields[4], 1 << 40), "a storage is damaged")
        storage = Storage(fields[1], fields[2], fields[4])
        known = self.storages.setdefault(storage.key, storage)
        _rule(known == storage, "a storage has two types or sizes")
        return known

    def load_reduce(self) -> None:
        """Call a stand-in."""
        arguments, function = self.stack.pop(), self.stack.pop()
        good = isinstance(function, FunctionType) and isinstance(arguments, tuple)
        _rule(good, "it calls something that makes no array")
        self.stack.append(function(*arguments))

    def load_build(self) -> None:
        """Set the state of a stand-in; torch notes versions of modules in attributes of an OrderedDict."""
        state, target = self.stack.pop(), self.stack[-1]
        if not isinstance(target, dict):
            _rule(isinstance(target, ItemType | RawArray), "state is set on something that is no array")
            target.set_state(state)

    def load_setitem(self) -> None:
        """Fill a dict, whose keys are hashed: that of nested tuples would never end."""
        self._fill([self.stack.pop(), self.stack.pop()][::-1])

    def load_setitems(self) -> None:
        """As `load_setitem`, for pairs up to the mark."""
        self._fill(self.pop_mark())

    def _fill(self, items: list[Any]) -> None:
        _rule(isinstance(self.stack[-1], dict), "a dict is missing")
        for key, value in zip(items[::2], items[1::2], strict=True):
            plain = type(key) in (str, bytes) or _is_count(key, 1 << 31)
            _rule(plain, f"a key is a {type(key).__name__}, not text or a small number")
            self.stack[-1][key] = value

    def load_bytearray8(self) -> None:
        """Bytes that are there; the original would first make room for as many as are announced."""
        self.stack.append(bytearray(self.read(int.from_bytes(self.read(8), "little"))))

    def load_stop(self) -> None:
        """End with the one object that is left."""
        _rule(len(self.stack) == 1 and not self.metastack, "its stack holds several objects at the end")
        super().load_stop()


def read_pickle(file: BinaryIO) -> tuple[Any, dict[str, Storage]]:
    """Read one pickle from where a file stands, and leave the file behind it.

    Args:
        file: in memory (an opcode's length is then bounded by the bytes that are there).
    Returns:
        numbers, text, bytes, tuples, lists, dicts, `RawArray` and `RawTensor`; and by key the storages it refers to.
    Raises:
        PickleRefusedError: damaged, more than `MAX_OPCODES`, or another kind of object.
    """
    reader = _Reader(file)
    try:
        return reader.load(), reader.storages
    except PickleRefusedError:
        raise
    except Exception as error:  # whatever the machine does on damage; its text may show containers
        raise PickleRefusedError(f"it is damaged ({type(error).__name__})") from error
