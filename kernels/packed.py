"""Codes of two, four or eight bits: pages that are for storage, and are decoded before they are read.

A code u of b bits stands for (u - (2^b - 1) / 2) · scale: 2^b levels around zero, none of them zero, so that
two bits are four levels and not three. One fp16 scale covers a group of channels of one token, or one channel
of a page, and is chosen to make the squared error least, or so that nothing is clipped.

Channels may be turned by a Hadamard matrix first, which spreads what a few of them hold over all (QuaRot,
arXiv 2404.00456), and decoding turns them back. Byte j of a token holds channel j and those that lie a half
(four bits) or quarters (two bits) of the head behind it, so that each part of a byte is a contiguous part of
the head, and a part of Sylvester's matrix.
"""

from __future__ import annotations

import math
from functools import lru_cache

import torch
from torch import Tensor

from vidkv.kernels.int8 import round_up
from vidkv.kernels.jit import ROUND, jit, tl, triton, turn, usable
from vidkv.kernels.pages import round_up_half
from vidkv.kernels.rope import rotate_first

BITS = (2, 4, 8)
TRIED, TRIED_STEP = 10, 0.0625
"""Scales that are tried for the least squared error: the one that clips nothing, and each next one smaller by
so much of it."""
TOKENS_PER_PROGRAM = 32
MOST_ENCODED = 128
"""Channels whose matrix still fits into a block's shared memory."""
LEAST_PART = 16
"""Channels that a part of a byte must stand for, for the matrix units to take them."""


def quantize(x: Tensor, bits: int, group: int, per_channel: bool, least_error: bool) -> tuple[Tensor, Tensor]:
    """Codes and scales of pages.

    Args:
        x: (…, tokens, d).
        bits: of `BITS`.
        group: channels that share a scale; it divides d.
        per_channel: one scale for each channel of a page instead, and `group` does not matter.
        least_error: choose scales for the least squared error; otherwise they clip nothing, and then
            |x - x̂| <= scale / 2.

    Returns:
        codes (…, tokens, d) uint8, unpacked, and scales fp16: (…, tokens, d / group) or (…, 1, d).
    """
    grouped = x.float().unsqueeze(-1) if per_channel else x.float().unflatten(-1, (-1, group))
    over = -3 if per_channel else -1
    top = (2**bits - 1) / 2
    widest = grouped.abs().amax(over, keepdim=True) / top
    best_scale = round_up(widest)
    if least_error:
        best = torch.full_like(widest, math.inf)
        for step in range(TRIED):
            scale = round_up(widest * (1 - step * TRIED_STEP))
            wide = scale.float()
            error = (_levels(_codes(grouped, wide, top), wide, top) - grouped).square_()
            total = error.sum(over, keepdim=True)
            better = total < best
            best = torch.where(better, total, best)
            best_scale = torch.where(better, scale, best_scale)
    codes = _codes(grouped, best_scale.float(), top).to(torch.uint8)
    return codes.flatten(-2), best_scale.squeeze(-1)


def _codes(grouped: Tensor, scale: Tensor, top: float) -> Tensor:
    return (grouped / scale + top).round_().clamp_(0, 2 * top)


def _levels(codes: Tensor, scale: Tensor, top: float) -> Tensor:
    return (codes - top) * scale


def pack(codes: Tensor, bits: int) -> Tensor:
    """(…, d) uint8 codes into (…, d · bits / 8) bytes."""
    parts = codes.unflatten(-1, (8 // bits, -1)).unbind(-2)
    packed = parts[0].clone()
    for place, part in enumerate(parts[1:], 1):
        packed |= part << (place * bits)
    return packed


def unpack(packed: Tensor, bits: int) -> Tensor:
    """What `pack` was given."""
    parts = [(packed >> (place * bits)) & (2**bits - 1) for place in range(8 // bits)]
    return torch.cat(parts, -1)


@lru_cache(maxsize=16)
def hadamard(d: int, device: torch.device, dtype: torch.dtype = torch.float32) -> Tensor:
    """Sylvester's matrix (d, d), orthonormal and its own inverse; d is a power of two."""
    matrix = torch.ones(1, 1, device=device, dtype=torch.float64)
    while matrix.shape[0] < d:
        matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)])
    return (matrix / math.sqrt(d)).to(dtype)


def dequantize(packed: Tensor, scale: Tensor, bits: int, turned: bool, dtype: torch.dtype) -> Tensor:
    """(…, tokens, d) in `dtype` of packed codes and their scales, as `quantize` gives them; float32 inside.

    Args:
        turned: by `hadamard`, which is undone.
    """
    wide = torch.promote_types(dtype, torch.float32)
    codes = unpack(packed, bits).to(wide) - (2**bits - 1) / 2
    group = codes.shape[-1] // scale.shape[-1]
    x = codes * scale.to(wide).repeat_interleave(group, -1)
    return (x @ hadamard(x.shape[-1], x.device, wide) if turned else x).to(dtype)


def encode(
    x: Tensor, packed: Tensor, scale: Tensor, slots: Tensor, bits: int, group: int, turned: bool,
    least_error: bool, mean: Tensor | None,
) -> None:  # fmt: skip
    """Write keys or values of frames into slots, by the kernel where it can run.

    Args:
        x: (b, kv heads, frames, tokens, d); keys turned by row and column.
        packed, scale: one layer of a pool as in `decode`; written.
        slots: (frames,) int64.
        group: channels that share a scale.
        turned: turn by `hadamard` first.
        least_error: see `quantize`.
        mean: (b, kv heads, 1 or tokens, d) float32 to take out before; None takes out nothing.
    """
    d, one_scale = x.shape[-1], scale.shape[-2:] == (x.shape[-2], 1)
    fits = d & (d - 1) == 0 and d <= MOST_ENCODED and d * bits // 8 >= LEAST_PART
    if usable(x) and one_scale and group == d and fits:
        _encode(x, packed, scale, slots, bits, turned, least_error, mean)
        return
    codes, scales = encode_reference(x, bits, group, scale.shape[-2:] == (1, d), turned, least_error, mean)
    packed.index_copy_(0, slots, codes)
    scale.index_copy_(0, slots, scales)


def encode_reference(
    x: Tensor, bits: int, group: int, per_channel: bool, turned: bool, least_error: bool, mean: Tensor | None
) -> tuple[Tensor, Tensor]:
    """What `encode` puts into slots: packed codes (frames, b, kv heads, tokens, bytes) and scales."""
    x = x.float() if mean is None else x.float() - mean[:, :, None]
    if turned:
        x = x @ hadamard(x.shape[-1], x.device)
    codes, scale = quantize(x, bits, group, per_channel, least_error)
    return pack(codes, bits).movedim(2, 0), scale.movedim(2, 0)


def decode(
    packed: Tensor, scale: Tensor, slots: Tensor, bits: int, turned: bool, mean: Tensor | None,
    temporal: Tensor | None, dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    """Bring keys or values back from slots, by the kernel where it can run.

    Args:
        packed: (slots, b, kv heads, tokens, bytes) uint8, one layer of a pool.
        scale: (slots, b, kv heads, tokens, groups) or (slots, b, kv heads, 1, d) fp16.
        slots: (pages,) int64.
        turned: by `hadamard`.
        mean: (b, kv heads, 1 or tokens, d) float32 to add; None adds nothing.
        temporal: (pages, time pairs) complex phases by which keys are turned; None leaves them.

    Returns:
        (b, kv heads, pages, tokens, d) in `dtype`.
    """
    d = packed.shape[-1] * 8 // bits
    fits = d & (d - 1) == 0 and d * bits // 8 >= LEAST_PART
    if usable(packed) and fits and dtype != torch.float64:
        turns = None if temporal is None else torch.view_as_real(temporal)
        return _decode(packed, scale, slots, bits, turned, mean, turns, dtype)
    return decode_reference(packed, scale, slots, bits, turned, mean, temporal, dtype)


def decode_reference(
    packed: Tensor, scale: Tensor, slots: Tensor, bits: int, turned: bool, mean: Tensor | None,
    temporal: Tensor | None, dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    """`decode` in plain torch; float32 inside, or float64 where that is wanted."""
    wide = torch.promote_types(dtype, torch.float32)
    codes, scales = (x.index_select(0, slots).movedim(0, 2) for x in (packed, scale))
    x = dequantize(codes, scales, bits, turned, wide)
    if mean is not None:
        x = x + mean[:, :, None].to(wide)
    if temporal is not None:
        x = rotate_first(x, temporal[:, None])
    return x.to(dtype)


@torch.library.custom_op("vidkv::decode_packed", mutates_args=())
def _decode(
    packed: Tensor, scale: Tensor, slots: Tensor, bits: int, turned: bool, mean: Tensor | None,
    turns: Tensor | None, dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    out = _empty(packed, scale, slots, bits, turned, mean, turns, dtype)
    b, heads, tokens, size = packed.shape[1:]
    d, groups = out.shape[-1], scale.shape[-1]
    per_channel = scale.shape[-2] == 1 and groups == d
    one_scale = groups == 1 and not per_channel
    # of ±1, which sixteen bits hold exactly like the codes
    exact = hadamard(size, packed.device) * math.sqrt(size)
    _decode_kernel[(triton.cdiv(tokens, TOKENS_PER_PROGRAM), slots.shape[0], b * heads)](
        packed, scale, out if mean is None else mean, slots, out if turns is None else turns,
        exact.half() if one_scale else exact, out, tokens, slots.shape[0], b * heads,
        0 if per_channel else groups, scale.shape[-2] * groups, *_mean_strides(mean), 1 / math.sqrt(d),
        D=d, PARTS=8 // bits, BITS=bits, GROUP=d // groups, ONE_SCALE=one_scale, TURNED=turned,
        MEAN=mean is not None, PAIRS=0 if turns is None else turns.shape[1], BLOCK=TOKENS_PER_PROGRAM,
        PRECISION="ieee" if dtype == torch.float32 else "tf32", num_warps=4,
    )  # fmt: skip
    return out


@_decode.register_fake
def _empty(
    packed: Tensor, scale: Tensor, slots: Tensor, bits: int, turned: bool, mean: Tensor | None,
    turns: Tensor | None, dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    b, heads, tokens, size = packed.shape[1:]
    return packed.new_empty(b, heads, slots.shape[0], tokens, size * 8 // bits, dtype=dtype)


@torch.library.custom_op("vidkv::encode_packed", mutates_args=("packed", "scale"))
def _encode(
    x: Tensor, packed: Tensor, scale: Tensor, slots: Tensor, bits: int, turned: bool, least_error: bool,
    mean: Tensor | None,
) -> None:  # fmt: skip
    b, heads, frames, tokens, d = x.shape
    if x.stride(-1) != 1:
        x = x.contiguous()
    matrix = hadamard(d, x.device) if turned else x
    _encode_kernel[(triton.cdiv(tokens, TOKENS_PER_PROGRAM), frames, b * heads)](
        x, x if mean is None else mean, matrix, slots, packed, scale, *x.stride()[:4], tokens, heads,
        b * heads, *_mean_strides(mean),
        D=d, PARTS=8 // bits, BITS=bits, TURNED=turned, MEAN=mean is not None,
        TRY=TRIED if least_error else 1, STEP=TRIED_STEP, BLOCK=TOKENS_PER_PROGRAM, num_warps=4,
    )  # fmt: skip


def _mean_strides(mean: Tensor | None) -> tuple[int, int]:
    """From token to token and from one (video, head) to the next of a mean (b, kv heads, 1 or tokens, d)."""
    if mean is None:
        return 0, 0
    places, d = mean.shape[-2:]
    return 0 if places == 1 else d, places * d


@_encode.register_fake
def _(
    x: Tensor, packed: Tensor, scale: Tensor, slots: Tensor, bits: int, turned: bool, least_error: bool,
    mean: Tensor | None,
) -> None:  # fmt: skip
    return None


@jit
def _encode_kernel(
    x_ptr, mean_ptr, matrix_ptr, slots_ptr, packed_ptr, scale_ptr,
    stride_b, stride_n, stride_f, stride_s, tokens, heads, planes, mean_token, mean_plane,
    D: tl.constexpr, PARTS: tl.constexpr, BITS: tl.constexpr, TURNED: tl.constexpr, MEAN: tl.constexpr,
    TRY: tl.constexpr, STEP: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    TOP: tl.constexpr = (2**BITS - 1) / 2
    SIZE: tl.constexpr = D // PARTS
    frame, plane = tl.program_id(1), tl.program_id(2)
    token = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    channel = tl.arange(0, D)
    ok = (token < tokens)[:, None]
    batch, head = plane // heads, plane % heads
    source = batch.to(tl.int64) * stride_b + frame * stride_f + token * stride_s + head * stride_n
    x = tl.load(x_ptr + source[:, None] + channel[None, :], mask=ok, other=0.0).to(tl.float32)
    if MEAN:
        at = mean_ptr + plane * mean_plane + token[:, None] * mean_token + channel[None, :]
        x -= tl.load(at, mask=ok, other=0.0)
    if TURNED:
        matrix = tl.load(matrix_ptr + channel[:, None] * D + channel[None, :])
        x = tl.dot(x, matrix, input_precision="ieee")
    widest = tl.div_rn(tl.max(tl.abs(x), 1), TOP)
    scale = round_up_half(widest)
    if TRY > 1:
        least = tl.full((BLOCK,), float("inf"), tl.float32)
        for step in range(TRY):
            tried = round_up_half(widest * (1.0 - step * STEP))
            wide = tl.broadcast_to(tried.to(tl.float32)[:, None], x.shape)
            codes = tl.minimum(tl.maximum((tl.div_rn(x, wide) + TOP + ROUND) - ROUND, 0.0), 2 * TOP)
            off = (codes - TOP) * wide - x
            total = tl.sum(off * off, 1)
            scale = tl.where(total < least, tried, scale)
            least = tl.minimum(total, least)
    # maxima pass over NaN, which must not become a code that looks right
    scale = tl.where(tl.max((x != x).to(tl.int32), 1) > 0, float("nan"), scale)
    wide = tl.broadcast_to(scale.to(tl.float32)[:, None], x.shape)
    codes = tl.minimum(tl.maximum((tl.div_rn(x, wide) + TOP + ROUND) - ROUND, 0.0), 2 * TOP).to(tl.int32)
    place = tl.arange(0, PARTS) * BITS
    bytes = tl.sum(tl.reshape(codes, (BLOCK, PARTS, SIZE)) << place[None, :, None], 1)
    target = (tl.load(slots_ptr + frame).to(tl.int64) * planes + plane) * tokens + token
    within = tl.arange(0, SIZE)
    tl.store(packed_ptr + target[:, None] * SIZE + within[None, :], bytes.to(tl.uint8), mask=ok)
    tl.store(scale_ptr + target, scale, mask=token < tokens)


@jit
def _decode_kernel(
    packed_ptr, scale_ptr, mean_ptr, slots_ptr, turns_ptr, matrix_ptr, out_ptr,
    tokens, pages, planes, scale_token, scale_plane, mean_token, mean_plane, root,
    D: tl.constexpr, PARTS: tl.constexpr, BITS: tl.constexpr, GROUP: tl.constexpr, ONE_SCALE: tl.constexpr,
    TURNED: tl.constexpr, MEAN: tl.constexpr, PAIRS: tl.constexpr, BLOCK: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    SIZE: tl.constexpr = D // PARTS
    page, plane = tl.program_id(1), tl.program_id(2)
    token = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    within, pairs = tl.arange(0, SIZE), tl.arange(0, SIZE // 2)
    ok = (token < tokens)[:, None]
    slot = tl.load(slots_ptr + page).to(tl.int64) * planes + plane
    source = packed_ptr + (slot * tokens + token)[:, None] * SIZE + within[None, :]
    packed = tl.load(source, mask=ok, other=0).to(tl.int32)
    scales = scale_ptr + slot * scale_plane + token[:, None] * scale_token
    target = ((plane.to(tl.int64) * pages + page) * tokens + token)[:, None] * D
    if TURNED:
        matrix = tl.load(matrix_ptr + within[:, None] * SIZE + within[None, :])
    if ONE_SCALE:
        of_token = tl.load(scales, mask=ok, other=0.0).to(tl.float32)
    for part in tl.static_range(PARTS):
        x = tl.zeros((BLOCK, SIZE), tl.float32)
        for place in tl.static_range(PARTS):
            if TURNED or place == part:
                code = ((packed >> (place * BITS)) & (2**BITS - 1)).to(tl.float32) - (2**BITS - 1) / 2
                if not ONE_SCALE:
                    group = (place * SIZE + within) // GROUP
                    code *= tl.load(scales + group[None, :], mask=ok, other=0.0).to(tl.float32)
                # Sylvester's matrix over the parts: minus where an odd number of bits is set in both
                if TURNED and ((place & part & 1) + ((place & part) >> 1)) % 2 == 1:
                    x -= code
                else:
                    x += code
        if TURNED:
            if ONE_SCALE:
                x = tl.dot(x.to(tl.float16), matrix) * root
            else:
                x = tl.dot(x, matrix, input_precision=PRECISION) * root
        if ONE_SCALE:
            x *= of_token
        channel = part * SIZE + within
        if MEAN:
            at = mean_ptr + plane * mean_plane + token[:, None] * mean_token + channel[None, :]
            x += tl.load(at, mask=ok, other=0.0)
        if PAIRS > 0:
            pair = part * (SIZE // 2) + pairs
            in_time = pair < PAIRS
            turned_by = turns_ptr + 2 * (page * PAIRS + pair)
            cos = tl.load(turned_by, mask=in_time, other=1.0)
            sin = tl.load(turned_by + 1, mask=in_time, other=0.0)
            x = turn(x, cos[None, :], sin[None, :], BLOCK, SIZE)
        tl.store(out_ptr + target + channel[None, :], x.to(out_ptr.dtype.element_ty), mask=ok)
