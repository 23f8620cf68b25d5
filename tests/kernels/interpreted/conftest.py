"""Kernels on the CPU: these files are for a process of their own, which `test_interpreted.py` starts.

Triton decides when it is imported between its interpreter and a GPU, and with the interpreter every commit
and every read of the whole suite would go through it, slowly.
"""

from __future__ import annotations

import os
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

collect_ignore_glob = [] if os.environ.get("TRITON_INTERPRET") == "1" else ["test_*.py"]


@pytest.fixture
def turn_plainly() -> Callable[[Tensor, Tensor], Tensor]:
    """Turn the last channel pairs of x by phases, float32 inside, every product and sum rounded.

    So does the interpreter. Torch's product of complex numbers keeps some products whole, which of them
    depends on the processor, and its last bit with them.
    """

    def turn(x: Tensor, phases: Tensor) -> Tensor:
        left = x.shape[-1] - 2 * phases.shape[-1]
        even, odd = x[..., left:].float().unflatten(-1, (-1, 2)).unbind(-1)
        pairs = even * phases.real - odd * phases.imag, even * phases.imag + odd * phases.real
        return torch.cat([x[..., :left], torch.stack(pairs, -1).flatten(-2).to(x.dtype)], -1)

    return turn
