"""Wrong calls of the compiled operations, in a child process: see test_ops.py.

Run as `python -m tests.kernels.support.fuzz_ops FIRST_SEED END_SEED`: prints the counts as JSON; a crash leaves the
seed on stderr. Every tensor ends where an unreadable page begins, so that a read past its end is a crash, not luck.
"""

import ctypes
import json
import mmap
import random
import sys
from collections import Counter
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from kernels import ops  # noqa: F401  loads the library
from tests.kernels.support.cases import channels_last, samples

SIZES = (-(1 << 63), -1, 0, 1, 2, 3, 5, 17, 1 << 31, 1 << 40, (1 << 63) - 1)
REALS = (float("nan"), float("inf"), -1.0, 0.0)
TYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.int64, torch.uint8, torch.bool)
_libc = ctypes.CDLL(None, use_errno=True)


def guarded(t: Tensor) -> Tensor:
    """t with its strides, in memory of its own whose last byte is followed by an unreadable page."""
    if t.device.type != "cpu" or t.numel() == 0:
        return t
    span = 1 + sum((size - 1) * step for size, step in zip(t.shape, t.stride(), strict=True))
    used = span * t.element_size()
    whole = -(-used // mmap.PAGESIZE) * mmap.PAGESIZE
    memory = mmap.mmap(-1, whole + mmap.PAGESIZE)
    address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    if _libc.mprotect(ctypes.c_void_p(address + whole), mmap.PAGESIZE, 0):
        raise OSError(ctypes.get_errno(), "mprotect failed")
    flat = torch.frombuffer(memory, dtype=t.dtype, count=span, offset=whole - used)
    flat.copy_(t.detach().as_strided((span,), (1,), t.storage_offset()))
    return flat.as_strided(t.shape, t.stride())


def filled(shape: Sequence[int], like: Tensor) -> Tensor:
    """Random values, channels-last where the shape has room for it."""
    values = torch.randint(0, 9, tuple(shape)).to(like.dtype)
    return channels_last(values) if values.dim() >= 4 else values


def wrong_tensor(t: Tensor, pick: random.Random) -> Tensor:
    """A tensor that t's place may not be able to take."""
    shape, axis = list(t.shape), pick.randrange(max(1, t.dim()))
    kind = pick.choice(("size", "size", "size", "rank", "few", "type", "layout", "stride", "device"))
    if kind == "size" and shape:
        shape[axis] = pick.choice((0, 1, 2, shape[axis] - 1, shape[axis] + 1, 2 * shape[axis], 3 * shape[axis]))
        return filled([max(0, size) for size in shape], t)
    if kind == "rank":
        return filled(shape[:axis] + shape[axis + 1 :] if pick.random() < 0.5 else [*shape, pick.randrange(3)], t)
    if kind == "type":
        return t.to(pick.choice(TYPES))
    if kind == "layout" and shape:
        return pick.choice((t.contiguous(), t.transpose(0, axis), t.transpose(axis, -1)))
    if kind == "stride" and shape:
        return pick.choice(
            (t.narrow(axis, 0, min(1, shape[axis])).expand(t.shape), t.movedim(axis, 0)[::2].movedim(0, axis))
        )
    if kind == "device":
        return t.to("meta")
    return filled(pick.choice(([], [0], [1], [2], [0, 3], [t.numel()])), t)


def wrong(value: Any, others: Sequence[Any], pick: random.Random) -> Any:
    """Another value for an argument; sometimes none, or that of another argument."""
    if isinstance(value, list):
        changed = [wrong(item, others, pick) if pick.random() < 0.5 else item for item in value]
        return pick.choice((changed, changed, value[:-1], value * 2, [*value, filled([3], value[0])]))
    if isinstance(value, bool):
        return not value
    if isinstance(value, int | float):
        return pick.choice(SIZES if isinstance(value, int) else REALS)
    found = [o for o in others if isinstance(o, Tensor)]
    if value is None or pick.random() < 0.1:
        return pick.choice([None, *found])
    return wrong_tensor(value, pick)


def placed(value: Any) -> Any:
    if isinstance(value, list):
        return [placed(item) for item in value]
    return guarded(value) if isinstance(value, Tensor) else value


def feed(first: int, end: int) -> dict[str, dict[str, int]]:
    """Wrong calls of seeds [first, end): how many each operation accepted (or had nothing against) and refused."""
    torch.manual_seed(0)
    known = samples("cpu")
    counts: dict[str, Counter[str]] = {name: Counter() for name in known}
    for seed in range(first, end):
        pick = random.Random(seed)
        name = pick.choice(list(known))
        args = list(pick.choice(known[name]))
        original = list(args)
        for at in pick.sample(range(len(args)), pick.choice((1, 1, 1, 2))):
            args[at] = wrong(args[at], original, pick)
        print(seed, name, file=sys.stderr, flush=True)
        try:
            getattr(torch.ops.avsf, name)(*(placed(arg) for arg in args))
            counts[name]["accepted"] += 1
        except (RuntimeError, TypeError, ValueError, LookupError, AttributeError, ArithmeticError) as error:
            counts[name]["refused by the operation" if "avsf: " in str(error) else "refused elsewhere"] += 1
    return {name: dict(count) for name, count in counts.items()}


if __name__ == "__main__":
    print(json.dumps(feed(int(sys.argv[1]), int(sys.argv[2]))))
