"""Digests of bits: what differs shows, and ranks and tensors are named."""

import pytest
import torch

from experiments.engine.replica_check import bit_digest, difference


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64, torch.int64, torch.bool])
def test_one_bit_anywhere_changes_the_digest(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    tensor = (torch.randn(3, 5, 2) * 100).to(dtype)
    first = bit_digest(tensor)
    assert first.dtype == torch.int64
    assert torch.equal(first, bit_digest(tensor.clone()))
    digests = set()
    raw = tensor.untyped_storage()
    for position in range(raw.nbytes()):
        for bit in range(8):
            raw[position] = raw[position] ^ (1 << bit)
            digests.add(bit_digest(tensor).item())
            raw[position] = raw[position] ^ (1 << bit)
    assert first.item() not in digests
    assert torch.equal(first, bit_digest(tensor))


def test_sums_that_cancel_signs_of_zero_and_changed_places_show() -> None:
    a = torch.tensor([1.0, 2.0, 3.0, 0.0])
    others = [[2.0, 1.0, 3.0, 0.0], [1.0, 2.0, 3.0, -0.0], [0.5, 2.5, 3.0, 0.0]]
    assert len({bit_digest(torch.tensor(x)).item() for x in [a.tolist(), *others]}) == 4


def test_strides_do_not_count() -> None:
    x = torch.randn(2, 3, 4, 5, 6)
    assert torch.equal(bit_digest(x), bit_digest(x.contiguous(memory_format=torch.channels_last_3d)))


def test_the_ranks_that_differ_from_most_are_named() -> None:
    names = ["a", "b", "c", "d", "e"]
    digests = torch.arange(5).repeat(4, 1)
    assert difference(digests, names) == ""
    digests[2, 1:] += 1
    named = "in 4 of 5 tensors (b, c, d and 1 more)"
    assert difference(digests, names) == f"not those of rank 0 and 2 more are rank 2 {named}"
    digests[0] = digests[2]
    assert difference(digests, names) == (f"not those of rank 0 and 1 more are rank 1 {named}, rank 3 {named}")
    two = torch.tensor([[1, 2], [1, 3]])
    assert difference(two, ["a", "b"]) == "not those of rank 0 are rank 1 in 1 of 2 tensors (b)"
