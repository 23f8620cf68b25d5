"""Gathering by a table: the values of indexing, and its gradient."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.tiny import noise
from vidkv.kernels.gather import Gather


@given(st.lists(st.integers(-1, 4), min_size=1, max_size=12))
def test_values_and_gradient_are_those_of_indexing(table: list[int]) -> None:
    index = torch.tensor(table)
    taken = index >= 0
    x = noise(2, 5, 3, 1, 4, dtype=torch.float64).requires_grad_()
    weight = noise(2, len(table), 3, 1, 4, seed=1, dtype=torch.float64) * taken[:, None, None, None]
    found = Gather(index, frames=5)(x)
    wanted = x[:, index.clamp_min(0)]
    assert torch.equal(found[:, taken], wanted[:, taken])
    gradients = [torch.autograd.grad((y * weight).sum(), x)[0] for y in (found, wanted)]
    torch.testing.assert_close(*gradients, rtol=0, atol=1e-12)


def test_an_identity_copies_nothing() -> None:
    x = noise(1, 4, 2, 1, 4)
    assert Gather(torch.arange(4), frames=4)(x) is x
    assert Gather(torch.arange(3), frames=4)(x).shape[1] == 3
