"""Arrays and tensors in a pickle, read by a machine of our own: no unpickler runs, no name of a file is looked up.

It knows the opcodes that protocols 2 to 5 use for numbers, text and containers, keeps its memo in a dict, and turns
arrays into records of type, shape and bytes, checked when a tensor is made of them. Anything else is refused.
Opcode arguments are decoded by `pickletools`. Text of errors never shows a container of the file: printing nested ones
may take for ever.
"""

import math
import pickletools
import re
from collections.abc import Callable
from dataclasses import dataclass
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
_PUSH_ARGUMENT = {
    "BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT",
    "BINSTRING", "SHORT_BINSTRING", "BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8",
    "BINBYTES", "SHORT_BINBYTES", "BINBYTES8", "BYTEARRAY8",
}  # fmt: skip
_PUSH_NEW: dict[str, Callable[[], Any]] = {
    "NONE": lambda: None, "NEWTRUE": lambda: True, "NEWFALSE": lambda: False,
    "EMPTY_DICT": dict, "EMPTY_LIST": list, "EMPTY_TUPLE": tuple,
}  # fmt: skip


class PickleRefusedError(ValueError):
    """A pickle that is damaged or holds more than numbers, text, containers and arrays."""


def _rule(holds: bool, message: str) -> None:
    if not holds:
        raise PickleRefusedError(message)


@dataclass(frozen=True)
class Name:
    """A global that the pickle names, for instance numpy.dtype: text, never looked up."""

    text: str


@dataclass
class ItemType:
    """Stands in for `numpy.dtype`."""

    code: str  # kind and bytes: "f4"
    order: str = "="


@dataclass
class RawArray:
    """Stands in for `numpy.ndarray`; filled by BUILD."""

    item: ItemType | None = None
    shape: tuple[int, ...] = ()
    order: str = "C"
    data: str | bytes | bytearray = b""  # str: one character a byte, as protocol 2 has it

    @property
    def num_bytes(self) -> int:
        """Bytes of its own data."""
        return len(self.data)

    def tensor(self) -> Tensor:
        """A copy in native byte order."""
        _rule(self.item is not None, "an array has no data")
        assert self.item is not None
        dtype = np.dtype(self.item.order + self.item.code)
        shape = _shape(self.shape)
        wanted = math.prod(shape) * dtype.itemsize
        _rule(wanted == self.num_bytes, f"an array of shape {shape} has {self.num_bytes} bytes, not {wanted}")
        try:
            data = self.data.encode("latin-1") if isinstance(self.data, str) else self.data
        except UnicodeEncodeError as error:
            raise PickleRefusedError("an array's bytes are text") from error
        values = np.frombuffer(data, dtype).astype(dtype.newbyteorder("="))
        values = values.reshape(shape[::-1]).transpose() if self.order == "F" else values.reshape(shape)
        return torch.from_numpy(values)


@dataclass(frozen=True)
class Storage:
    """Stands in for a torch storage, whose bytes lie outside the pickle."""

    dtype: torch.dtype
    key: str
    count: int

    def tensor(self, data: bytes) -> Tensor:
        """All elements, (count,), as a copy of little-endian bytes."""
        wanted = self.count * self.dtype.itemsize
        _rule(0 < len(data) == wanted, f"storage {self.key[:80]} has {len(data)} bytes, not {wanted}")
        return torch.frombuffer(bytearray(data), dtype=self.dtype)


@dataclass(frozen=True)
class RawTensor:
    """Stands in for a `torch.Tensor`: a view of a storage."""

    storage: Storage
    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]

    def view(self, elements: Tensor) -> Tensor:
        """The view of its storage's elements (count,)."""
        shape, limit = _shape(self.shape), self.storage.count
        good = len(self.stride) == len(shape) and all(_is_count(n, limit) for n in (self.offset, *self.stride))
        _rule(good, "a tensor's offset or strides are no numbers inside its storage")
        _rule(math.prod(shape) <= limit, f"a tensor of shape {shape} is larger than its storage of {limit} elements")
        last = self.offset + sum((size - 1) * step for size, step in zip(shape, self.stride, strict=True))
        _rule(last < limit, f"a tensor of shape {shape} leaves its storage of {limit} elements")
        return elements.as_strided(shape, self.stride, self.offset)


def _is_count(value: object, limit: int) -> bool:
    return type(value) is int and 0 <= value <= limit


def _shape(value: object) -> tuple[int, ...]:
    good = isinstance(value, tuple) and len(value) <= _MAX_DIMS and all(_is_count(n, 1 << 40) and n for n in value)
    _rule(good, f"a shape must be at most {_MAX_DIMS} positive numbers")
    return value  # type: ignore[return-value]


def _text(value: object) -> str:
    _rule(isinstance(value, str), "text is missing where a name belongs")
    return value  # type: ignore[return-value]


def _encode(text: object, encoding: object) -> str:
    """How Python 3 stores bytes in protocol 2; encoded when the array is made."""
    _rule(isinstance(text, str) and encoding == "latin1", "bytes must be stored as latin1")
    return text  # type: ignore[return-value]


def _item_type(code: object, *_flags: object) -> ItemType:
    _rule(isinstance(code, str) and _ITEM_TYPES.fullmatch(code) is not None, "an array's type must be a plain number")
    return ItemType(_text(code).replace("b", "u"))  # any byte is a valid u1


def _array(item: object, shape: object, order: object, data: object) -> RawArray:
    _rule(isinstance(item, ItemType) and isinstance(data, str | bytes | bytearray), "an array has no type or no bytes")
    _rule(isinstance(shape, tuple), "an array has no shape")
    return RawArray(item, shape, "F" if order == "F" else "C", data)  # type: ignore[arg-type]


def _tensor(storage: object, offset: object, shape: object, stride: object, *_rest: object) -> RawTensor:
    good = isinstance(storage, Storage) and isinstance(shape, tuple) and isinstance(stride, tuple)
    _rule(good, "a tensor has no storage or no shape")
    return RawTensor(storage, offset, shape, stride)  # type: ignore[arg-type]


def _parameter(tensor: object, *_rest: object) -> RawTensor:
    _rule(isinstance(tensor, RawTensor), "a parameter is not a tensor")
    return tensor  # type: ignore[return-value]


_CALLS: dict[str, tuple[int, Callable[..., Any]]] = {  # name -> fewest arguments, what takes its place
    "collections.OrderedDict": (0, dict),
    "_codecs.encode": (2, _encode),
    "numpy.dtype": (1, _item_type),
    "numpy.core.multiarray._reconstruct": (3, lambda *_: RawArray()),
    "numpy.core.multiarray.scalar": (2, lambda item, data: _array(item, (), "C", data)),
    "numpy.core.numeric._frombuffer": (4, lambda data, item, shape, order: _array(item, shape, order, data)),
    "torch._utils._rebuild_tensor_v2": (4, _tensor),
    "torch._utils._rebuild_parameter": (1, _parameter),
}
_MOST = {"collections.OrderedDict": 0, "_codecs.encode": 2, "numpy.core.multiarray.scalar": 2,
         "numpy.core.numeric._frombuffer": 4}  # fmt: skip
_NAMES = {*_CALLS, "numpy.ndarray", *(f"torch.{kind}Storage" for kind in _STORAGES)}


class _Machine:
    """The stack, the marks and the memo of one pickle."""

    def __init__(self) -> None:
        self.stack: list[Any] = []
        self.below: list[list[Any]] = []  # stacks under the marks
        self.memo: dict[int, Any] = {}
        self.storages: dict[str, Storage] = {}

    def pop(self) -> Any:
        _rule(bool(self.stack), "its stack runs empty")
        return self.stack.pop()

    def since_mark(self) -> list[Any]:
        _rule(bool(self.below), "a mark is missing")
        items, self.stack = self.stack, self.below.pop()
        return items

    def fill(self, wanted: type, items: list[Any]) -> None:
        """Add items to the list, or keys and values to the dict, on top of the stack."""
        _rule(bool(self.stack) and isinstance(self.stack[-1], wanted), f"a {wanted.__name__} is missing")
        target = self.stack[-1]
        if wanted is list:
            target.extend(items)
            return
        _rule(len(items) % 2 == 0, "keys and values do not pair up")
        for key, value in zip(items[::2], items[1::2], strict=True):
            # No tuples: hashing nested ones takes for ever.
            plain = type(key) in (str, bytes) or _is_count(key, 1 << 31)
            _rule(plain, f"a key is a {type(key).__name__}, not text or a small number")
            target[key] = value

    def global_name(self, text: str) -> Name:
        text = text.replace("numpy._core", "numpy.core")
        _rule(text in _NAMES, f"{text[:80]!r} is neither an array nor a plain container")
        return Name(text)

    def call(self, function: object, arguments: object) -> Any:
        """Make what a call would have made: an array's stand-in or a plain container."""
        name = function.text if isinstance(function, Name) else ""
        _rule(name in _CALLS and isinstance(arguments, tuple), "it calls something that makes no array")
        assert isinstance(arguments, tuple)
        fewest, stand_in = _CALLS[name]
        _rule(fewest <= len(arguments) <= _MOST.get(name, 8), f"{name} has {len(arguments)} arguments")
        return stand_in(*arguments)

    def build(self, target: object, state: object) -> None:
        """Set the state of a stand-in, as its `__setstate__` would."""
        if isinstance(target, dict):
            return  # attributes of an OrderedDict: torch notes versions of modules there
        fields = state if isinstance(state, tuple) else ()
        if isinstance(target, ItemType):  # (version, byte order, subarray, names, fields, ...)
            plain = len(fields) >= 5 and all(part is None for part in fields[2:5]) and isinstance(fields[1], str)
            _rule(plain and fields[1] in ("<", ">", "=", "|"), "an array's type must be a plain number")
            target.order = fields[1]
            return
        _rule(isinstance(target, RawArray) and len(fields) == 5, "state is set on something that is no array")
        assert isinstance(target, RawArray)
        made = _array(fields[2], fields[1], "F" if fields[3] is True else "C", fields[4])
        target.item, target.shape, target.order, target.data = made.item, made.shape, made.order, made.data

    def persistent(self, reference: object) -> Storage:
        """('storage', type, key, device, number of elements[, view]): how torch refers to bytes outside the pickle."""
        fields = reference if isinstance(reference, tuple) else ()
        plain = len(fields) == 5 or (len(fields) == 6 and fields[5] is None)
        _rule(plain and isinstance(fields[1], Name) and _is_count(fields[4], 1 << 40), "a storage is damaged")
        kind = fields[1].text.removeprefix("torch.").removesuffix("Storage")
        _rule(kind in _STORAGES, "a storage is damaged")
        storage = Storage(_STORAGES[kind], _text(fields[2]), fields[4])
        known = self.storages.setdefault(storage.key, storage)
        _rule(known == storage, "a storage has two types or sizes")
        return known

    def step(self, opcode: str, argument: Any) -> None:
        """One opcode; PickleRefusedError for those outside the list."""
        stack = self.stack  # MARK and what ends at a mark replace it
        if opcode in _PUSH_ARGUMENT:
            stack.append(argument)
        elif opcode in _PUSH_NEW:
            stack.append(_PUSH_NEW[opcode]())
        elif opcode in ("BINPUT", "LONG_BINPUT", "MEMOIZE"):
            _rule(bool(stack), "its stack runs empty")
            self.memo[len(self.memo) if argument is None else argument] = stack[-1]
        elif opcode in ("BINGET", "LONG_BINGET"):
            _rule(argument in self.memo, f"memo {argument} is read before it is written")
            stack.append(self.memo[argument])
        elif opcode == "MARK":
            self.below.append(stack)
            self.stack = []
        elif opcode in ("TUPLE", "TUPLE1", "TUPLE2", "TUPLE3"):
            items = self.since_mark() if opcode == "TUPLE" else [self.pop() for _ in range(int(opcode[-1]))][::-1]
            self.stack.append(tuple(items))
        elif opcode in ("APPEND", "APPENDS", "SETITEM", "SETITEMS"):
            count = {"APPEND": 1, "SETITEM": 2}.get(opcode, 0)
            items = [self.pop() for _ in range(count)][::-1] if count else self.since_mark()
            self.fill(list if opcode.startswith("APPEND") else dict, items)
        elif opcode == "GLOBAL":
            stack.append(self.global_name(".".join(argument.split(" "))))
        elif opcode == "STACK_GLOBAL":
            name, module = _text(self.pop()), _text(self.pop())
            stack.append(self.global_name(f"{module}.{name}"))
        elif opcode == "REDUCE":
            arguments, function = self.pop(), self.pop()
            stack.append(self.call(function, arguments))
        elif opcode == "BUILD":
            state = self.pop()
            _rule(bool(stack), "its stack runs empty")
            self.build(stack[-1], state)
        elif opcode == "BINPERSID":
            stack.append(self.persistent(self.pop()))
        else:
            _rule(opcode in ("PROTO", "FRAME", "STOP"), f"opcode {opcode} makes no array in a plain container")


def read_pickle(file: BinaryIO) -> tuple[Any, dict[str, Storage]]:
    """Read one pickle from where a file stands, and leave the file behind it.

    Args:
        file: in memory (an opcode's length is then bounded by the bytes that are there).
    Returns:
        numbers, text, bytes, tuples, lists, dicts, `RawArray` and `RawTensor`; and by key the storages it refers to.
    Raises:
        PickleRefusedError: damaged, more than `MAX_OPCODES`, or another kind of object.
    """
    machine = _Machine()
    try:
        for number, (opcode, argument, _) in enumerate(pickletools.genops(file)):
            _rule(number < MAX_OPCODES, f"it has more than {MAX_OPCODES} opcodes")
            machine.step(opcode.name, argument)
    except PickleRefusedError:
        raise
    except ValueError as error:  # from decoding opcodes
        raise PickleRefusedError(f"it is damaged: {str(error)[:120]}") from error
    _rule(not machine.below and len(machine.stack) == 1, "its stack holds several objects at the end")
    return machine.stack[0], machine.storages
