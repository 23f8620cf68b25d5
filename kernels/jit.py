"""Triton where it exists: kernels are defined everywhere and run where `usable` says so.

Triton has wheels for Linux only. Modules with kernels take `tl` and `jit` from here, so that the torch
references beside the kernels can be imported on every machine.
"""

from __future__ import annotations

from contextlib import suppress
from importlib import import_module
from typing import Any

from torch import Tensor

triton: Any = None
tl: Any = None
with suppress(ImportError):
    triton, tl = import_module("triton"), import_module("triton.language")


INTERPRETED = bool(triton and triton.knobs.runtime.interpret)


def jit(function: Any) -> Any:
    """`triton.jit`; without triton the function as it is, which nothing calls."""
    return triton.jit(function) if triton else function


def constexpr(value: Any) -> Any:
    """A global that kernels may read."""
    return tl.constexpr(value) if triton else value


def interpreted() -> bool:
    """Whether kernels run in triton's interpreter (`TRITON_INTERPRET=1`), on tensors of the CPU.

    The interpreter multiplies bfloat16 as if it were integers, so kernels widen their operands there.
    """
    return INTERPRETED


def usable(x: Tensor) -> bool:
    """Whether triton's kernels can run on x."""
    return bool(triton) and (x.is_cuda or interpreted())


CANNOT_RUN: tuple[type[Exception], ...] = (RuntimeError,)
"""What a kernel that this GPU cannot run raises: torch's error, or triton's for too large a tile."""
if triton:
    CANNOT_RUN += (import_module("triton.runtime.errors").OutOfResources,)

ROUND = constexpr(12582912.0)
"""1.5 * 2**23: adding and subtracting it rounds a float32 to the nearest integer, ties to even."""


@jit
def turn(x, cos, sin, ROWS: tl.constexpr, D: tl.constexpr):
    """Rotate interleaved channel pairs of x (ROWS, D); cos and sin broadcast against (ROWS, D / 2)."""
    even, odd = tl.split(tl.reshape(x, (ROWS, D // 2, 2)))
    return tl.reshape(tl.join(even * cos - odd * sin, even * sin + odd * cos), (ROWS, D))
