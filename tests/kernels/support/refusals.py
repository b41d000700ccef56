"""Calls that operations must refuse, in a process of their own: `python -m tests.kernels.support.refusals DEVICE`."""

import json
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch

from kernels import ops  # noqa: F401  loads the library
from tests.kernels.support.cases import draw


def calls(device: str) -> list[tuple[str, Callable[[], Any]]]:
    """What the message must say, and a call: tensors on another device, of another size, dtype and layout."""
    avsf = torch.ops.avsf
    x, dy = (draw((8, 16, 2, 3, 3), torch.float32, seed, device) for seed in (1, 2))
    coef = avsf.bn_finalize(avsf.bn_stats(x, 1), None, None, 1e-5)
    _, mask = avsf.bn_act(x, coef, dy, None, None, None, True)
    _, value, tap, _, _ = avsf.norm_pool(x, None, None, None, None, 1e-5, 1, True)
    other = {"cpu": "meta", "cuda": "cpu"}[device]
    found = [
        ("mask must come", lambda: avsf.bn_act_bwd_reduce(dy, x, None, mask[1:], coef, None, 1, True)),
        ("taps must come", lambda: avsf.norm_pool_backward(value, x, value, tap[1:], coef, 1)),
        ("dy must have", lambda: avsf.bn_act_bwd_reduce(dy.half(), x, None, mask, coef, None, 1, True)),
        ("non-empty", lambda: avsf.bn_stats(x.contiguous().transpose(3, 4), 1)),
        ("multiple of 3", lambda: avsf.bn_stats(x, 3)),
    ]
    if other == "cpu":
        found += [
            ("on its device", lambda: avsf.bn_act_bwd_reduce(dy, x, None, mask.cpu(), coef, None, 1, True)),
            ("on its device", lambda: avsf.norm_pool_backward(value, x, value, tap.cpu(), coef, 1)),
            ("device of the data", lambda: avsf.bn_act(x, coef.cpu(), None, None, None, None, True)),
        ]
    return found


def main(device: str) -> None:
    """Forty refusals, each with the message that it must have."""
    refused, known = 0, calls(device)
    for turn in range(40):
        message, call = known[turn % len(known)]
        sys.stderr.write(f"{message}\n")
        sys.stderr.flush()
        with pytest.raises(RuntimeError, match=message):
            call()
        refused += 1
    sys.stdout.write(json.dumps({"device": device, "refused": refused}) + "\n")


if __name__ == "__main__":
    main(sys.argv[1])
