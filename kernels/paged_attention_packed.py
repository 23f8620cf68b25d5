"""What the fused read does to packed pages of four bits, before and after its main launch.

A code u stands for (u - 7.5) · scale (`packed.py`), which is (2u - 15) · scale / 2, and 2u - 15 is an INT8
code like any other. Pages are unpacked to such codes, in scratch of half a 16-bit page's bytes, once for all
queries.

Keys and values are turned by a Hadamard matrix H, orthonormal and its own inverse. Neither is turned back:
the query is turned instead, first by the page's distance, then by H, since (R_-p q)·(H c) = (H R_-p q)·c;
and what comes of the values is turned once, after all pages, since H Σ p c = Σ p (H c). The mean that was
taken out of keys is not turned: it meets R_-p q, as in `paged_attention.py`.

Only the lower half of a head turns with time, and H is made of Sylvester's matrix S of half its size:
H (l, h) = (S l + S h, S l - S h) / sqrt(d). So S h is taken once for all pages.

H does not keep the norms of channel pairs. A query's scale is that of its largest channel over all pages.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from vidkv.kernels.attention import merge_reference
from vidkv.kernels.jit import ROUND, interpreted, jit, tl, triton
from vidkv.kernels.packed import hadamard, unpack
from vidkv.kernels.rope import rotate_first

BITS = 4
TOKENS_PER_PROGRAM = 64
ROWS_PER_PROGRAM = {32: 32, 64: 32, 128: 32, 256: 16}
QUERIES_PER_PROGRAM = {32: 64, 64: 64, 128: 64, 256: 16}
"""Of the last and of the first launch, by channels of a head: more would not fit into registers."""
SMALLEST_SCALE = 1e-20
"""Never 0: a masked score of -inf is multiplied by it."""


@torch.library.custom_op("vidkv::unpack_pages", mutates_args=())
def unpack_pages(
    k: Tensor, v: Tensor, k_scale: Tensor, v_scale: Tensor, slots: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Pages as INT8 codes with their scales, in the order of a table.

    Args:
        k, v: (slots, b, kv heads, tokens, d / 2) uint8.
        k_scale, v_scale: (slots, b, kv heads, tokens, 1), v_scale also (slots, b, kv heads, 1, d), float16.
        slots: (pages,) int64.

    Returns:
        k, v (pages, b, kv heads, tokens, d) int8 and their scales (pages, …).
    """
    out = _empty_pages(k, v, k_scale, v_scale, slots)
    b, heads, tokens, size = k.shape[1:]
    _unpack_kernel[(triton.cdiv(tokens, TOKENS_PER_PROGRAM), slots.shape[0], b * heads)](
        k, v, k_scale, v_scale, slots, *out, tokens, b * heads,
        SIZE=size, V_PER_CHANNEL=v_scale.shape[-1] != 1, BLOCK=TOKENS_PER_PROGRAM, num_warps=4,
    )  # fmt: skip
    return out


@unpack_pages.register_fake
def _empty_pages(
    k: Tensor, v: Tensor, k_scale: Tensor, v_scale: Tensor, slots: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    pages = slots.shape[0]
    codes = (pages, *k.shape[1:-1], 2 * k.shape[-1])
    return (
        k.new_empty(codes, dtype=torch.int8),
        k.new_empty(codes, dtype=torch.int8),
        k_scale.new_empty(pages, *k_scale.shape[1:]),
        v_scale.new_empty(pages, *v_scale.shape[1:]),
    )


def unpack_pages_reference(
    k: Tensor, v: Tensor, k_scale: Tensor, v_scale: Tensor, slots: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`unpack_pages` in plain torch."""
    k_codes, v_codes = (2 * unpack(x[slots], BITS).to(torch.int8) - 15 for x in (k, v))
    return k_codes, v_codes, k_scale[slots] / 2, v_scale[slots] / 2


@torch.library.custom_op("vidkv::turn_packed_queries", mutates_args=())
def turn_packed_queries(
    q: Tensor, turns: Tensor, mean: Tensor, turned: bool, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Queries as they meet the codes of every page.

    Args:
        q: (b, heads, queries, d).
        turns: (pages, time pairs, 2) float32, phases of the pages' distances as real numbers.
        mean: μ (b, kv heads, d) float32.
        turned: also by H.
        scale: of scores.

    Returns:
        codes (pages, b, heads, queries, d) int8, their scale (b, heads, queries) and (R_-p q)·μ (pages, b,
        heads, queries), both times `scale`, float32.
    """
    q = q.contiguous()
    out = _empty_queries(q, turns, mean, turned, scale)
    b, heads, queries, d = q.shape
    pages, pairs = turns.shape[:2]
    wide = q.dtype if q.dtype == torch.float32 else torch.float16
    matrices = q.new_empty(pages, d // 2, d // 2, dtype=wide)
    _matrix_kernel[(pages,)](turns, matrices, SIZE=d // 2, PAIRS=pairs, TURNED=turned, num_warps=4)
    block = QUERIES_PER_PROGRAM[d]
    _turn_kernel[(triton.cdiv(queries, block), b * heads)](
        q, turns, matrices, mean, *out, queries, pages, heads, mean.shape[1], scale, 1 / math.sqrt(d),
        D=d, PAIRS=pairs, TURNED=turned, BLOCK=block, INTERPRETED=interpreted(), num_warps=4,
    )  # fmt: skip
    return out


@turn_packed_queries.register_fake
def _empty_queries(
    q: Tensor, turns: Tensor, mean: Tensor, turned: bool, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    pages = turns.shape[0]
    return (
        q.new_empty(pages, *q.shape, dtype=torch.int8),
        q.new_empty(q.shape[:-1], dtype=torch.float32),
        q.new_empty(pages, *q.shape[:-1], dtype=torch.float32),
    )


def turn_packed_queries_reference(q: Tensor, temporal: Tensor, turned: bool) -> tuple[Tensor, Tensor]:
    """Queries as they meet every page's codes, (pages, b, heads, queries, d), and the scale (b, heads,
    queries) in whose steps they are rounded; float64.

    Args:
        temporal: (pages, time pairs) complex phases of the pages' distances.
    """
    back = temporal.conj().to(torch.complex128)
    exact = torch.stack([rotate_first(q.double(), phases) for phases in back])
    if turned:
        exact = exact @ hadamard(q.shape[-1], q.device, torch.float64)
    return exact, (exact.abs().amax((0, -1)) / 127.0).clamp_min(SMALLEST_SCALE)


@torch.library.custom_op("vidkv::merge_turned", mutates_args=())
def merge_turned(out: Tensor, lse: Tensor, more: Tensor, more_lse: Tensor) -> tuple[Tensor, Tensor]:
    """`attention.merge` of out and H more; d is a power of two from 32 to 256."""
    out, lse, more, more_lse = (x.contiguous() for x in (out, lse, more, more_lse))
    merged, total = torch.empty_like(out), torch.empty_like(lse)
    rows, d = lse.numel(), out.shape[-1]
    block = ROWS_PER_PROGRAM[d]
    _merge_kernel[(triton.cdiv(rows, block),)](
        out, lse, more, more_lse, merged, total, rows, 1 / math.sqrt(d),
        D=d, BLOCK=block, PRECISION=_precision(more), num_warps=4,
    )  # fmt: skip
    return merged, total


@merge_turned.register_fake
def _(out: Tensor, lse: Tensor, more: Tensor, more_lse: Tensor) -> tuple[Tensor, Tensor]:
    return torch.empty_like(out, memory_format=torch.contiguous_format), torch.empty_like(lse)


def merge_turned_reference(out: Tensor, lse: Tensor, more: Tensor, more_lse: Tensor) -> tuple[Tensor, Tensor]:
    """`merge_turned` in float64."""
    turned = more.double() @ hadamard(more.shape[-1], more.device, torch.float64)
    return merge_reference(out.double(), lse.double(), turned, more_lse.double())


def _precision(x: Tensor) -> str:
    return "tf32x3" if x.dtype == torch.float32 else "tf32"


@jit
def _unpack_kernel(
    k_ptr, v_ptr, k_scale_ptr, v_scale_ptr, slots_ptr, k_out_ptr, v_out_ptr, k_scale_out_ptr, v_scale_out_ptr,
    tokens, planes,
    SIZE: tl.constexpr, V_PER_CHANNEL: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    page, plane = tl.program_id(1), tl.program_id(2)
    token = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    within = tl.arange(0, SIZE)
    ok = token < tokens
    slot = tl.load(slots_ptr + page).to(tl.int64) * planes + plane
    place = page.to(tl.int64) * planes + plane
    source = (slot * tokens + token)[:, None] * SIZE + within[None, :]
    target = (place * tokens + token)[:, None] * (2 * SIZE) + within[None, :]
    k = tl.load(k_ptr + source, mask=ok[:, None], other=0).to(tl.int32)
    v = tl.load(v_ptr + source, mask=ok[:, None], other=0).to(tl.int32)
    tl.store(k_out_ptr + target, (2 * (k & 15) - 15).to(tl.int8), mask=ok[:, None])
    tl.store(k_out_ptr + target + SIZE, (2 * (k >> 4) - 15).to(tl.int8), mask=ok[:, None])
    tl.store(v_out_ptr + target, (2 * (v & 15) - 15).to(tl.int8), mask=ok[:, None])
    tl.store(v_out_ptr + target + SIZE, (2 * (v >> 4) - 15).to(tl.int8), mask=ok[:, None])
    k_scale = tl.load(k_scale_ptr + slot * tokens + token, mask=ok, other=0.0).to(tl.float32)
    tl.store(k_scale_out_ptr + place * tokens + token, (k_scale * 0.5).to(tl.float16), mask=ok)
    if V_PER_CHANNEL:
        channel = tl.arange(0, 2 * SIZE)
        once = (channel >= 0) & (tl.program_id(0) == 0)
        v_scale = tl.load(v_scale_ptr + slot * 2 * SIZE + channel, mask=once, other=0.0).to(tl.float32)
        tl.store(v_scale_out_ptr + place * 2 * SIZE + channel, (v_scale * 0.5).to(tl.float16), mask=once)
    else:
        v_scale = tl.load(v_scale_ptr + slot * tokens + token, mask=ok, other=0.0).to(tl.float32)
        tl.store(v_scale_out_ptr + place * tokens + token, (v_scale * 0.5).to(tl.float16), mask=ok)


@jit
def _sign(bits):
    """Of Sylvester's matrix, from the bits that both indices have set: -1 where they are odd in number."""
    bits ^= bits >> 4
    bits ^= bits >> 2
    bits ^= bits >> 1
    return 1.0 - 2.0 * (bits & 1).to(tl.float32)


@jit
def _phases(turns_ptr, page, SIZE: tl.constexpr, PAIRS: tl.constexpr):
    """What a channel of a lower half takes of itself and of its pair's other one when it is turned back."""
    channel = tl.arange(0, SIZE)
    at = turns_ptr + 2 * (page * PAIRS + channel // 2)
    in_time = channel < 2 * PAIRS
    sin = tl.load(at + 1, mask=in_time, other=0.0)
    return tl.load(at, mask=in_time, other=1.0), tl.where(channel % 2 == 0, -sin, sin)


@jit
def _matrix_kernel(turns_ptr, out_ptr, SIZE: tl.constexpr, PAIRS: tl.constexpr, TURNED: tl.constexpr):
    """R_-p and then S, or R_-p alone, as the matrix by which the lower half of a query is multiplied."""
    tl.static_assert(2 * PAIRS <= SIZE)
    page = tl.program_id(0)
    cos, sin = _phases(turns_ptr, page, SIZE, PAIRS)
    row, column = tl.arange(0, SIZE)[:, None], tl.arange(0, SIZE)[None, :]
    if TURNED:
        own, other = _sign(row & column), _sign((row ^ 1) & column)
    else:
        own, other = (row == column).to(tl.float32), ((row ^ 1) == column).to(tl.float32)
    matrix = cos[:, None] * own + sin[:, None] * other
    tl.store(out_ptr + (page * SIZE + row) * SIZE + column, matrix.to(out_ptr.dtype.element_ty))


@jit
def _product(a, b, INTERPRETED: tl.constexpr):
    if INTERPRETED:
        return tl.dot(a.to(tl.float32), b.to(tl.float32))
    elif a.dtype == tl.float32:
        return tl.dot(a, b, input_precision="tf32x3")
    else:
        return tl.dot(a, b)


@jit
def _turn_kernel(
    q_ptr, turns_ptr, matrix_ptr, mean_ptr, codes_ptr, q_scale_ptr, offsets_ptr,
    queries, pages, heads, kv_heads, scale, root,
    D: tl.constexpr, PAIRS: tl.constexpr, TURNED: tl.constexpr, BLOCK: tl.constexpr,
    INTERPRETED: tl.constexpr,
):  # fmt: skip
    SIZE: tl.constexpr = D // 2
    WIDE: tl.constexpr = matrix_ptr.dtype.element_ty
    head = tl.program_id(1)
    rows = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    within = tl.arange(0, SIZE)
    row_ok = rows < queries
    row_at = head.to(tl.int64) * queries + rows
    at = row_at[:, None] * D + within[None, :]
    low = tl.load(q_ptr + at, mask=row_ok[:, None], other=0.0).to(tl.float32)
    high = tl.load(q_ptr + at + SIZE, mask=row_ok[:, None], other=0.0).to(tl.float32)
    mean_at = mean_ptr + ((head // heads) * kv_heads + (head % heads) // (heads // kv_heads)) * D + within
    mean, paired = tl.load(mean_at), tl.load(mean_at - within + (within ^ 1))
    of_high = tl.sum(high * tl.load(mean_at + SIZE)[None, :], 1)
    # in units of the largest channel, which sixteen bits hold whatever the query
    unit = tl.maximum(tl.maximum(tl.max(tl.abs(low), 1), tl.max(tl.abs(high), 1)), 1e-20)
    narrow = (low / unit[:, None]).to(WIDE)
    upper = high / unit[:, None]
    if TURNED:
        signs = _sign(within[:, None] & within[None, :]).to(WIDE)
        upper = _product(upper.to(WIDE), signs, INTERPRETED)
    square = within[:, None] * SIZE + within[None, :]
    largest = tl.zeros((BLOCK,), tl.float32)
    for page in range(pages):
        x = _product(narrow, tl.load(matrix_ptr + page * SIZE * SIZE + square), INTERPRETED)
        if TURNED:
            # the larger of |x + upper| and |x - upper|
            largest = tl.maximum(largest, tl.max(tl.abs(x) + tl.abs(upper), 1))
        else:
            largest = tl.maximum(largest, tl.max(tl.maximum(tl.abs(x), tl.abs(upper)), 1))
    largest = tl.maximum(largest, 1e-20)
    size = unit * root if TURNED else unit
    tl.store(q_scale_ptr + row_at, tl.maximum(largest * size / 127.0, 1e-20) * scale, mask=row_ok)
    inverse = (127.0 / largest)[:, None]
    page_size = tl.num_programs(1).to(tl.int64) * queries
    for page in range(pages):
        x = _product(narrow, tl.load(matrix_ptr + page * SIZE * SIZE + square), INTERPRETED)
        if TURNED:
            y, x = x - upper, x + upper
        else:
            y = upper
        target = codes_ptr + page * page_size * D + at
        tl.store(target, ((x * inverse + ROUND) - ROUND).to(tl.int8), mask=row_ok[:, None])
        tl.store(target + SIZE, ((y * inverse + ROUND) - ROUND).to(tl.int8), mask=row_ok[:, None])
        cos, sin = _phases(turns_ptr, page, SIZE, PAIRS)
        offset = (tl.sum(low * (cos * mean + sin * paired)[None, :], 1) + of_high) * scale
        tl.store(offsets_ptr + page * page_size + row_at, offset, mask=row_ok)


@jit
def _merge_kernel(
    out_ptr, lse_ptr, more_ptr, more_lse_ptr, merged_ptr, total_ptr, rows, root,
    D: tl.constexpr, BLOCK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    SIZE: tl.constexpr = D // 2
    row = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    ok = row < rows
    in_row = ok[:, None]
    at = row[:, None] * D + tl.arange(0, SIZE)[None, :]
    lse = tl.load(lse_ptr + row, mask=ok, other=0.0)
    more_lse = tl.load(more_lse_ptr + row, mask=ok, other=0.0)
    top = tl.maximum(lse, more_lse)
    total = top + tl.log(tl.exp(lse - top) + tl.exp(more_lse - top))
    weight = tl.exp(more_lse - total)[:, None]
    low = tl.load(more_ptr + at, mask=in_row, other=0.0).to(tl.float32)
    high = tl.load(more_ptr + at + SIZE, mask=in_row, other=0.0).to(tl.float32)
    within = tl.arange(0, SIZE)
    matrix = _sign(within[:, None] & within[None, :])
    more = tl.dot((low + high) * root, matrix, input_precision=PRECISION)
    out = tl.load(out_ptr + at, mask=in_row, other=0.0).to(tl.float32)
    tl.store(merged_ptr + at, (out + weight * (more - out)).to(merged_ptr.dtype.element_ty), mask=in_row)
    more = tl.dot((low - high) * root, matrix, input_precision=PRECISION)
    out = tl.load(out_ptr + at + SIZE, mask=in_row, other=0.0).to(tl.float32)
    tl.store(
        merged_ptr + at + SIZE, (out + weight * (more - out)).to(merged_ptr.dtype.element_ty), mask=in_row
    )
    tl.store(total_ptr + row, total, mask=ok)
