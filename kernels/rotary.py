"""Three-axis rotary embedding of a chunk's own queries and keys, and the layout that attention wants."""

from __future__ import annotations

import torch
from torch import Tensor

from vidkv.kernels.jit import jit, tl, triton, turn, usable
from vidkv.kernels.pages import HEAD_DIMS
from vidkv.kernels.rope import rotate_full

TOKENS_PER_PROGRAM = 32


def rotate_chunk(x: Tensor, temporal: Tensor, spatial: Tensor) -> Tensor:
    """Turn by frame, row and column, in one launch where the kernel can run.

    Args:
        x: (b, frames, tokens, heads, d).
        temporal, spatial: complex phases (frames, time pairs) and (tokens, other pairs).

    Returns:
        (b, heads, frames * tokens, d).
    """
    if usable(x) and x.shape[-1] in HEAD_DIMS:
        return _rotate(x, torch.view_as_real(temporal), torch.view_as_real(spatial))
    return rotate_chunk_reference(x, temporal, spatial)


def rotate_chunk_reference(x: Tensor, temporal: Tensor, spatial: Tensor) -> Tensor:
    """`rotate_chunk` in plain torch."""
    return rotate_full(x, temporal, spatial).flatten(1, 2).transpose(1, 2)


@torch.library.custom_op("vidkv::rotate_chunk", mutates_args=())
def _rotate(x: Tensor, temporal: Tensor, spatial: Tensor) -> Tensor:
    b, frames, tokens, heads, d = x.shape
    x = x.contiguous()
    out = x.new_empty(b, heads, frames * tokens, d)
    _kernel[(triton.cdiv(frames * tokens, TOKENS_PER_PROGRAM), b * heads)](
        x, temporal, spatial, out, frames * tokens, tokens, heads,
        D=d, TIME=temporal.shape[1], BLOCK=TOKENS_PER_PROGRAM, num_warps=4,
    )  # fmt: skip
    return out


@_rotate.register_fake
def _(x: Tensor, temporal: Tensor, spatial: Tensor) -> Tensor:
    b, frames, tokens, heads, d = x.shape
    return x.new_empty(b, heads, frames * tokens, d)


@jit
def _kernel(
    x_ptr, time_ptr, space_ptr, out_ptr, total, tokens, heads,
    D: tl.constexpr, TIME: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    plane = tl.program_id(1)
    batch, head = plane // heads, plane % heads
    row = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    channels, pair = tl.arange(0, D), tl.arange(0, D // 2)
    ok = (row < total)[:, None]
    source = (batch.to(tl.int64) * total + row) * heads + head
    x = tl.load(x_ptr + source[:, None] * D + channels[None, :], mask=ok, other=0.0).to(tl.float32)
    in_time = (pair < TIME)[None, :]
    time = 2 * ((row // tokens)[:, None] * TIME + pair[None, :])
    space = 2 * ((row % tokens)[:, None] * (D // 2 - TIME) + pair[None, :] - TIME)
    cos = tl.where(
        in_time,
        tl.load(time_ptr + time, mask=ok & in_time, other=1.0),
        tl.load(space_ptr + space, mask=ok & (pair >= TIME)[None, :], other=1.0),
    )
    sin = tl.where(
        in_time,
        tl.load(time_ptr + time + 1, mask=ok & in_time, other=0.0),
        tl.load(space_ptr + space + 1, mask=ok & (pair >= TIME)[None, :], other=0.0),
    )
    target = (plane.to(tl.int64) * total + row)[:, None] * D + channels[None, :]
    tl.store(out_ptr + target, turn(x, cos, sin, BLOCK, D).to(out_ptr.dtype.element_ty), mask=ok)
