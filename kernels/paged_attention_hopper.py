"""The fused read for Hopper: INT8 pages of 128-channel heads, in triton's Gluon dialect.

The portable kernel of `paged_attention.py` leaves the matrix units idle while it takes the softmax. Here a
block of 128 queries is four groups of warps, each with registers of its own: two consumers of 64 queries do
all matrix products and the softmax; a converter widens INT8 values times their scales to float16 in shared
memory; a producer issues the bulk copies of query codes, key codes and key scales. In step i a consumer
issues the scores of tile i and the values of tile i - 1 together (FlashAttention-3, arXiv 2407.08608), and
while one consumer takes its softmax the other's products run.

A query tile's keys can be split over several programs whose results are merged, which fills the last wave.
The arithmetic is that of `paged_attention.attend_pages_reference`. Needs compute capability 9.0.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

# renamed between triton 3.6 and 3.7
barrier = getattr(gl, "barrier", None) or gl.thread_barrier

LN2 = tl.constexpr(0.6931471805599453)
LAZY = tl.constexpr(8.0)
"""How far, in base 2, a row's maximum may fall behind before its sums are rescaled."""
REGISTERS = gl.constexpr((216, 56, 24))
"""Of a thread of the second consumer, the converter and the producer; the first consumer gets the rest."""
QUERIES, KEYS = 128, 128
K_STAGES, V_STAGES, V_CHUNKS = 4, 3, 4
"""Depth of the ring of key tiles (even) and of value tiles (no deeper), and pieces of a value tile that the
converter takes at a time."""
HEAD_DIM = 128
OWN_TILE_COST = 4 / 3
"""Of a tile of 16-bit keys, in tiles of codes."""


def attend_split(
    q: Tensor, k: Tensor, v: Tensor, pages: list[Tensor], slots: Tensor, codes: Tensor, q_scale: Tensor,
    offsets: Tensor, scale: float, splits: int,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """One result for each split of the keys.

    Args:
        q, k, v: contiguous, 16-bit; (b, heads, queries, 128) and (b, kv heads, keys, 128); keys may be 0.
        pages: k, v, k_scale, v_scale of the pool; tokens are a multiple of 8, v_scale is per token.
        slots: (pages,) int64, at least one.
        codes, q_scale, offsets: from `paged_attention`'s first launch.
        scale: log2(e) / sqrt(128).
        splits: 1 or 2.

    Returns:
        out (splits, b, heads, queries, 128) in q's dtype and lse (splits, b, heads, queries) float32.
    """
    b, heads, queries, d = q.shape
    kv_heads, own = k.shape[1:3]
    page_k, page_v, k_scale, v_scale = pages
    tokens, planes, count = page_k.shape[3], b * kv_heads, slots.shape[0]
    out = q.new_empty(splits, b, heads, queries, d)
    lse = q.new_empty(splits, b, heads, queries, dtype=torch.float32)
    tiles = triton.cdiv(tokens, KEYS) * count
    share = round((tiles + triton.cdiv(own, KEYS) * OWN_TILE_COST) / splits)
    cut = max(1, min(share, tiles - 1)) if splits > 1 else tiles
    if not own:
        # never read, but a bulk copy's source has at least one element
        k = v = q
    _attend[(triton.cdiv(queries, QUERIES), b * heads, splits)](
        _descriptor(codes.view(-1, queries, d), [1, QUERIES // 2, d], 128),
        _descriptor(page_k.view(-1, tokens, d), [1, KEYS, d], 128),
        _descriptor(k_scale.view(-1, tokens), [1, KEYS], 0),
        _descriptor(q.view(b * heads, queries, d), [1, QUERIES // 2, d], 128),
        _descriptor(k.view(-1, *k.shape[2:]), [1, KEYS, d], 128),
        _descriptor(v.view(-1, *v.shape[2:]), [1, KEYS, d], 128),
        page_v, v_scale, slots, q_scale, offsets, out, lse,
        queries, own, tokens, count, heads, kv_heads, planes, b * heads, cut, scale,
        **constants(splits), num_warps=4,
    )  # fmt: skip
    return out, lse


def constants(splits: int) -> dict[str, int]:
    """Compile-time arguments of the kernel."""
    return {
        "BN": KEYS, "D": HEAD_DIM, "KS": K_STAGES, "VS": V_STAGES, "CHUNKS": V_CHUNKS, "SPLITS": splits
    }  # fmt: skip


def block_layout(block: list[int], swizzle: int, bits: int) -> gl.NVMMASharedLayout:
    """How a bulk copy lays a block down in shared memory."""
    return gl.NVMMASharedLayout(swizzle, bits, len(block))


def _descriptor(x: Tensor, block: list[int], swizzle: int) -> TensorDescriptor:
    layout = block_layout(block, swizzle, 8 * x.element_size())
    return TensorDescriptor(x, list(x.shape), list(x.stride()), block, layout)


@gluon.jit
def _widen(x, scale):
    """Words of four INT8 times a scale (twice in a word, fp16): words of two fp16, twice as many."""
    lo, hi = gl.inline_asm_elementwise(
        """
        {
        .reg .b32 t, lo, hi, c;
        mov.b32 c, 0x64806480;
        xor.b32 t, $2, 0x80808080;
        prmt.b32 lo, t, 0x64646464, 0x4140;
        prmt.b32 hi, t, 0x64646464, 0x4342;
        sub.rn.f16x2 lo, lo, c;
        sub.rn.f16x2 hi, hi, c;
        mul.rn.f16x2 $0, lo, $3;
        mul.rn.f16x2 $1, hi, $3;
        }
        """,
        "=r,=r,r,r", [x, scale], dtype=(gl.int32, gl.int32), is_pure=True, pack=1,
    )  # fmt: skip
    return gl.join(lo, hi).reshape([x.shape[0], 2 * x.shape[1]])


@gluon.jit
def _producer(
    q_desc, k_desc, ks_desc, q16_desc, ok_desc, q_ring, q16, k_ring, ks_ring, k16_ring,
    q_full, q_empty, k_full, done, q16_full, k16_full, done16, slots_ptr,
    start, count, own_tiles, T, head, heads_total, plane, planes, row,
    BN: gl.constexpr, D: gl.constexpr, KS: gl.constexpr,
):  # fmt: skip
    kind: gl.constexpr = q16_desc.dtype
    layout8: gl.constexpr = q_desc.layout
    layout16: gl.constexpr = q16_desc.layout
    mbarrier.expect(q16_full, 2 * 64 * D * 2)
    for w in gl.static_range(2):
        tma.async_copy_global_to_shared(
            q16_desc, [head, row + 64 * w, 0], q16_full, q16.index(w)._reinterpret(kind, [1, 64, D], layout16)
        )
    page = start // T
    t = start % T
    qn = page * 0
    for i in range(count):
        if (t == 0) | (i == 0):
            pair = qn % 2
            mbarrier.wait(q_empty.index(pair), ((qn // 2) & 1) ^ 1)
            mbarrier.expect(q_full.index(pair), 2 * 64 * D)
            for w in gl.static_range(2):
                tma.async_copy_global_to_shared(
                    q_desc, [page * heads_total + head, row + 64 * w, 0], q_full.index(pair),
                    q_ring.index(pair * 2 + w)._reinterpret(gl.int8, [1, 64, D], layout8),
                )  # fmt: skip
            qn += 1
        slot = gl.load(slots_ptr + page).to(gl.int32) * planes + plane
        stage = i % KS
        mbarrier.wait(done.index(stage), ((i // KS) & 1) ^ 1)
        mbarrier.expect(k_full.index(stage), BN * D + BN * 2)
        tma.async_copy_global_to_shared(
            k_desc, [slot, t * BN, 0], k_full.index(stage),
            k_ring.index(stage)._reinterpret(gl.int8, [1, BN, D], k_desc.layout),
        )  # fmt: skip
        tma.async_copy_global_to_shared(ks_desc, [slot, t * BN], k_full.index(stage), ks_ring.index(stage))
        t += 1
        page = gl.where(t == T, page + 1, page)
        t = gl.where(t == T, 0, t)
    # The ring is used again for 16-bit keys once every INT8 tile has been read.
    for s in gl.static_range(KS):
        mbarrier.wait(done.index(s), ((count - s + KS - 1) // KS - 1) & 1)
    for j in range(own_tiles):
        stage = j % (KS // 2)
        freed = gl.maximum(j - KS // 2, 0)
        mbarrier.wait(done16.index(freed % KS), (freed // KS) & 1, pred=j >= KS // 2)
        mbarrier.expect(k16_full.index(stage), BN * D * 2)
        tma.async_copy_global_to_shared(
            ok_desc, [plane, j * BN, 0], k16_full.index(stage),
            k16_ring.index(stage)._reinterpret(kind, [1, BN, D], ok_desc.layout),
        )  # fmt: skip


@gluon.jit
def _load_values(
    v_ptr, vs_ptr, base, first, tokens, ROWS: gl.constexpr, D: gl.constexpr, layout: gl.constexpr
):
    """Values as words of four codes, and scales twice in a word, from a page's token `first` on."""
    rows = gl.arange(0, ROWS, gl.SliceLayout(1, layout))
    words = gl.arange(0, D // 4, gl.SliceLayout(0, layout))
    # tokens and first are multiples of 8, so a thread's four rows are there together or not at all. Codes of
    # rows that are not there may be anything: their scale is 0.
    at = gl.multiple_of(base + first, 8)
    pointers = v_ptr.to(gl.pointer_type(gl.int32), bitcast=True) + at * (D // 4)
    pointers += gl.expand_dims(rows, 1) * (D // 4) + gl.expand_dims(words, 0)
    scales = vs_ptr.to(gl.pointer_type(gl.uint16), bitcast=True) + at
    left = gl.multiple_of(tokens - first, 8)
    ok = rows // 4 < left // 4
    x = gl.load(pointers, mask=gl.expand_dims(ok, 1))
    scale = gl.load(scales + rows, mask=ok, other=0)
    return x, scale.to(gl.int32) * 0x10001


@gluon.jit
def _converter(
    ov_desc, v_ring, v_own, v_full, done, done16, v_ptr, vs_ptr, slots_ptr,
    start, count, own_tiles, T, tokens, plane, planes,
    BN: gl.constexpr, D: gl.constexpr, KS: gl.constexpr, VS: gl.constexpr, CHUNKS: gl.constexpr,
):  # fmt: skip
    ROWS: gl.constexpr = BN // CHUNKS
    layout: gl.constexpr = gl.BlockedLayout([4, 2], [256 // D, D // 8], [4, 1], [1, 0])
    words = v_ring._reinterpret(gl.int32, [VS, BN, D // 2], gl.NVMMASharedLayout(128, 32, 2))
    page = start // T
    t = start % T
    base = (gl.load(slots_ptr + page) * planes + plane) * tokens
    x, scale = _load_values(v_ptr, vs_ptr, base, t * BN, tokens, ROWS, D, layout)
    for i in range(count):
        stage = i % VS
        next_t = gl.where(t + 1 == T, 0, t + 1)
        next_page = gl.where((t + 1 == T) & (i + 1 < count), page + 1, page)
        next_base = (gl.load(slots_ptr + next_page) * planes + plane) * tokens
        freed = gl.maximum(i - VS, 0)
        mbarrier.wait(done.index(freed % KS), (freed // KS) & 1, pred=i >= VS)
        target = words.index(stage)
        for c in gl.static_range(CHUNKS):
            if c + 1 < CHUNKS:
                first = t * BN + (c + 1) * ROWS
                ahead, ahead_scale = _load_values(v_ptr, vs_ptr, base, first, tokens, ROWS, D, layout)
            else:
                first = next_t * BN
                ahead, ahead_scale = _load_values(v_ptr, vs_ptr, next_base, first, tokens, ROWS, D, layout)
            wide = _widen(x, gl.expand_dims(scale, 1).broadcast_to(x.shape))
            target.slice(c * ROWS, ROWS).store(wide)
            x = ahead
            scale = ahead_scale
        base = next_base
        fence_async_shared()
        barrier()
        mbarrier.arrive(v_full.index(stage), count=1)
        t = next_t
        page = next_page
    for j in range(own_tiles):
        stage = (count + j) % VS
        freed = gl.maximum(count + j - VS, 0)
        mbarrier.wait(done.index(freed % KS), (freed // KS) & 1, pred=(j < VS) & (count + j >= VS))
        freed = gl.maximum(j - VS, 0)
        mbarrier.wait(done16.index(freed % KS), (freed // KS) & 1, pred=j >= VS)
        mbarrier.expect(v_full.index(stage), BN * D * 2)
        tma.async_copy_global_to_shared(
            ov_desc, [plane, j * BN, 0], v_full.index(stage),
            v_own.index(stage)._reinterpret(ov_desc.dtype, [1, BN, D], ov_desc.layout),
        )  # fmt: skip


@gluon.jit
def _soften(x, scale, shift, m, total):
    """Online softmax in base 2 of x * scale + shift (per row): probabilities, new max, total and shrink.

    The max moves only when it would grow by more than LAZY, so that most steps have nothing to shrink.
    """
    high = gl.max(x, 1) * scale + shift
    m_new = gl.where(high > m + LAZY, high, m)
    shrink = gl.exp2(m - m_new)
    rest = shift - m_new
    p = gl.exp2(x * gl.expand_dims(scale, 1) + gl.expand_dims(rest, 1))
    total = total * shrink + gl.sum(p, 1)
    return p, m_new, total, shrink


SHRINK_PACK = gl.constexpr(16)
SHRINK_ASM = gl.constexpr(
    "{\n.reg .pred p;\n"
    "setp.eq.f32 p, $32, 0f3F800000;\n"
    "setp.eq.and.f32 p, $34, 0f3F800000, p;\n"
    "vote.sync.all.pred p, p, 0xffffffff;\n"
    "@p bra SKIP;\n" + "".join(f"mul.f32 ${n}, ${n}, ${n + 32};\n" for n in range(16)) + "SKIP:\n}\n"
)
SHRINK_CONSTRAINTS = gl.constexpr(",".join(["=f"] * 16 + [str(n) for n in range(16)] + ["f"] * 16))


@gluon.jit
def _shrink(acc, shrink):
    """Rows of acc times shrink; a warp whose rows all keep their max skips it.

    Registers of a Hopper accumulator go (row, row, row + 8, row + 8) and so on: elements 0 and 2 tell both.
    """
    factor = gl.expand_dims(shrink, 1).broadcast_to(acc.shape)
    return gl.inline_asm_elementwise(
        SHRINK_ASM, SHRINK_CONSTRAINTS, [acc, factor], dtype=gl.float32, is_pure=True, pack=SHRINK_PACK
    )


@gluon.jit
def _forbid(x, allowed):
    """Minus infinity where not allowed. Volatile, or the compiler turns the branch around it into selects."""
    bias = gl.where(allowed, 0.0, float("-inf")).broadcast_to(x.shape)
    return gl.inline_asm_elementwise(
        "add.f32 $0, $1, $2;", "=f,f,f", [x, bias], dtype=gl.float32, is_pure=False, pack=1
    )


@gluon.jit
def _coded_scores(s, ks_slot, t, T, tokens, BN: gl.constexpr, layout: gl.constexpr):
    x = s.to(gl.float32) * ks_slot.load(layout).to(gl.float32)
    if t == T - 1:
        column = gl.arange(0, BN, gl.SliceLayout(0, layout)) + t * BN
        x = _forbid(x, gl.expand_dims(column < tokens, 0))
    return x


@gluon.jit
def _own_tail(z, j, own, BN: gl.constexpr, layout: gl.constexpr):
    column = gl.arange(0, BN, gl.SliceLayout(0, layout)) + j * BN
    return _forbid(z, gl.expand_dims(column < own, 0))


@gluon.jit
def _consumer(
    WG: gl.constexpr, q_ring, q16, k_ring, ks_ring, k16_ring, v_ring, v_own,
    q_full, q_empty, k_full, done, q16_full, k16_full, done16, v_full,
    q_scale_ptr, q_offset_ptr, out_ptr, lse_ptr,
    start, count, own_tiles, T, tokens, own, queries, head, heads_total, row, out_base, scale,
    BN: gl.constexpr, D: gl.constexpr, KS: gl.constexpr, VS: gl.constexpr,
):  # fmt: skip
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BN, 32])
    layout16: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BN, 16])
    wide: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 16])
    p_layout: gl.constexpr = gl.DotOperandLayout(0, wide, 2)
    row_layout: gl.constexpr = gl.SliceLayout(1, layout)
    wide_rows: gl.constexpr = gl.SliceLayout(1, wide)
    rows16: gl.constexpr = gl.SliceLayout(1, layout16)
    own_kind: gl.constexpr = v_own.dtype

    rows = row + WG * 64 + gl.arange(0, 64, row_layout)
    ok = rows < queries
    q_scale = gl.load(q_scale_ptr + head * queries + rows, mask=ok, other=0.0)
    offset_at = q_offset_ptr + head * queries + rows
    page_step = heads_total * queries
    m = gl.full([64], float("-inf"), gl.float32, row_layout)
    total = gl.full([64], 0.0, gl.float32, row_layout)
    acc = gl.full([64, D], 0.0, gl.float32, wide)
    zeros = gl.full([64, BN], 0, gl.int32, layout)

    page = start // T
    t = start % T
    qn = page * 0
    mbarrier.wait(q_full.index(0), 0)
    mbarrier.wait(k_full.index(0), 0)
    s = warpgroup_mma(q_ring.index(WG), k_ring.index(0).permute((1, 0)), zeros, use_acc=False, is_async=True)
    offset = gl.load(offset_at + page * page_step, mask=ok, other=0.0)
    s = warpgroup_mma_wait(0, deps=(s,))
    x = _coded_scores(s, ks_ring.index(0), t, T, tokens, BN, layout)
    p, m, total, shrink = _soften(x, q_scale, offset, m, total)
    p16 = gl.convert_layout(p.to(gl.float16), p_layout)
    for i in range(1, count):
        last = t == T - 1
        old = qn % 2
        page = gl.where(last, page + 1, page)
        qn = gl.where(last, qn + 1, qn)
        t = gl.where(last, 0, t + 1)
        pair = qn % 2
        stage = i % KS
        mbarrier.wait(q_full.index(pair), (qn // 2) & 1)
        mbarrier.wait(k_full.index(stage), (i // KS) & 1)
        s = warpgroup_mma(
            q_ring.index(pair * 2 + WG),
            k_ring.index(stage).permute((1, 0)),
            zeros,
            use_acc=False,
            is_async=True,
        )
        offset = gl.load(offset_at + page * page_step, mask=ok, other=0.0)
        before = (i - 1) % VS
        mbarrier.wait(v_full.index(before), ((i - 1) // VS) & 1)
        acc = warpgroup_mma(p16, v_ring.index(before), acc, is_async=True)
        s = warpgroup_mma_wait(1, deps=(s,))
        x = _coded_scores(s, ks_ring.index(stage), t, T, tokens, BN, layout)
        p, m, total, shrink = _soften(x, q_scale, offset, m, total)
        p_next = gl.convert_layout(p.to(gl.float16), p_layout)
        acc, p16, p_next = warpgroup_mma_wait(0, deps=(acc, p16, p_next))
        mbarrier.arrive(done.index((i - 1) % KS), count=1)
        if last:
            mbarrier.arrive(q_empty.index(old), count=1)
        acc = _shrink(acc, gl.convert_layout(shrink, wide_rows))
        p16 = p_next
    final = (count - 1) % VS
    mbarrier.wait(v_full.index(final), ((count - 1) // VS) & 1)
    acc = warpgroup_mma(p16, v_ring.index(final), acc, is_async=True)
    acc, p16 = warpgroup_mma_wait(0, deps=(acc, p16))
    mbarrier.arrive(done.index((count - 1) % KS), count=1)

    if own_tiles > 0:
        scale16 = gl.full([64], 0.0, gl.float32, rows16) + scale
        shift16 = gl.full([64], 0.0, gl.float32, rows16)
        m16 = gl.convert_layout(m, rows16)
        total16 = gl.convert_layout(total, rows16)
        zeros16 = gl.full([64, BN], 0.0, gl.float32, layout16)
        mbarrier.wait(q16_full, 0)
        mbarrier.wait(k16_full.index(0), 0)
        z = warpgroup_mma(
            q16.index(WG), k16_ring.index(0).permute((1, 0)), zeros16, use_acc=False, is_async=True
        )
        z = warpgroup_mma_wait(0, deps=(z,))
        if own_tiles == 1:
            z = _own_tail(z, 0, own, BN, layout16)
        weights, m16, total16, shrink16 = _soften(z, scale16, shift16, m16, total16)
        p_own = gl.convert_layout(weights.to(own_kind), p_layout)
        acc = acc * gl.expand_dims(gl.convert_layout(shrink16, wide_rows), 1)
        for j in range(1, own_tiles):
            stage16 = j % (KS // 2)
            mbarrier.wait(k16_full.index(stage16), (j // (KS // 2)) & 1)
            z = warpgroup_mma(
                q16.index(WG), k16_ring.index(stage16).permute((1, 0)), zeros16, use_acc=False, is_async=True
            )
            slot = (count + j - 1) % VS
            mbarrier.wait(v_full.index(slot), ((count + j - 1) // VS) & 1)
            acc = warpgroup_mma(p_own, v_own.index(slot), acc, is_async=True)
            z = warpgroup_mma_wait(1, deps=(z,))
            if j == own_tiles - 1:
                z = _own_tail(z, j, own, BN, layout16)
            weights, m16, total16, shrink16 = _soften(z, scale16, shift16, m16, total16)
            p_own_next = gl.convert_layout(weights.to(own_kind), p_layout)
            acc, p_own, p_own_next = warpgroup_mma_wait(0, deps=(acc, p_own, p_own_next))
            mbarrier.arrive(done16.index((j - 1) % KS), count=1)
            acc = _shrink(acc, gl.convert_layout(shrink16, wide_rows))
            p_own = p_own_next
        slot_last = (count + own_tiles - 1) % VS
        mbarrier.wait(v_full.index(slot_last), ((count + own_tiles - 1) // VS) & 1)
        acc = warpgroup_mma(p_own, v_own.index(slot_last), acc, is_async=True)
        acc, p_own = warpgroup_mma_wait(0, deps=(acc, p_own))
        m = gl.convert_layout(m16, row_layout)
        total = gl.convert_layout(total16, row_layout)

    gl.store(lse_ptr + out_base + rows, (m + gl.log2(total)) * LN2, mask=ok)
    acc = acc * gl.expand_dims(gl.convert_layout(1.0 / total, wide_rows), 1)
    out_rows = row + WG * 64 + gl.arange(0, 64, wide_rows)
    channels = gl.arange(0, D, gl.SliceLayout(0, wide))
    at = gl.expand_dims(out_rows, 1) * D + gl.expand_dims(channels, 0)
    good = gl.expand_dims(out_rows < queries, 1)
    gl.store(out_ptr + out_base * D + at, acc.to(out_ptr.dtype.element_ty), mask=good)


@gluon.jit
def _attend(
    q_desc, k_desc, ks_desc, q16_desc, ok_desc, ov_desc,
    v_ptr, vs_ptr, slots_ptr, q_scale_ptr, q_offset_ptr, out_ptr, lse_ptr,
    queries, own, tokens, pages, heads, kv_heads, planes, heads_total, cut, scale,
    BN: gl.constexpr, D: gl.constexpr, KS: gl.constexpr, VS: gl.constexpr, CHUNKS: gl.constexpr,
    SPLITS: gl.constexpr,
):  # fmt: skip
    row = gl.program_id(0) * 128
    head = gl.program_id(1)
    split = gl.program_id(2)
    plane = (head // heads) * kv_heads + (head % heads) // (heads // kv_heads)
    T = gl.cdiv(tokens, BN)
    tiles = T * pages
    # Split 0 .. SPLITS - 2 take `cut` coded tiles each, the last one the rest and the own keys.
    start = split * cut
    if SPLITS == 1:
        count = tiles
        own_tiles = gl.cdiv(own, BN)
    else:
        count = gl.where(split == SPLITS - 1, tiles - start, cut)
        own_tiles = gl.where(split == SPLITS - 1, gl.cdiv(own, BN), 0)
    out_base = (split * heads_total + head).to(gl.int64) * queries

    kind: gl.constexpr = q16_desc.dtype
    flat8: gl.constexpr = gl.NVMMASharedLayout(128, 8, 2)
    flat16: gl.constexpr = gl.NVMMASharedLayout(128, 16, 2)
    q_ring = gl.allocate_shared_memory(gl.int8, [4, 64, D], flat8)
    q16 = gl.allocate_shared_memory(kind, [2, 64, D], flat16)
    k_ring = gl.allocate_shared_memory(gl.int8, [KS, BN, D], flat8)
    k16_ring = k_ring._reinterpret(kind, [KS // 2, BN, D], flat16)
    ks_ring = gl.allocate_shared_memory(gl.float16, [KS, 1, BN], ks_desc.layout)
    v_ring = gl.allocate_shared_memory(gl.float16, [VS, BN, D], flat16)
    v_own = v_ring._reinterpret(kind, [VS, BN, D], flat16)

    one: gl.constexpr = mbarrier.MBarrierLayout()
    q_full = gl.allocate_shared_memory(gl.int64, [2, 1], one)
    q_empty = gl.allocate_shared_memory(gl.int64, [2, 1], one)
    k_full = gl.allocate_shared_memory(gl.int64, [KS, 1], one)
    done = gl.allocate_shared_memory(gl.int64, [KS, 1], one)
    k16_full = gl.allocate_shared_memory(gl.int64, [KS // 2, 1], one)
    done16 = gl.allocate_shared_memory(gl.int64, [KS, 1], one)
    v_full = gl.allocate_shared_memory(gl.int64, [VS, 1], one)
    q16_full = gl.allocate_shared_memory(gl.int64, [1], one)
    mbarrier.init(q16_full, count=1)
    for s in gl.static_range(2):
        mbarrier.init(q_full.index(s), count=1)
        mbarrier.init(q_empty.index(s), count=2)
    for s in gl.static_range(KS):
        mbarrier.init(k_full.index(s), count=1)
        mbarrier.init(done.index(s), count=2)
        mbarrier.init(done16.index(s), count=2)
    for s in gl.static_range(KS // 2):
        mbarrier.init(k16_full.index(s), count=1)
    for s in gl.static_range(VS):
        mbarrier.init(v_full.index(s), count=1)
    fence_async_shared()
    barrier()

    gl.warp_specialize(
        [
            (_consumer, (
                0, q_ring, q16, k_ring, ks_ring, k16_ring, v_ring, v_own,
                q_full, q_empty, k_full, done, q16_full, k16_full, done16, v_full,
                q_scale_ptr, q_offset_ptr, out_ptr, lse_ptr,
                start, count, own_tiles, T, tokens, own, queries, head, heads_total, row, out_base, scale,
                BN, D, KS, VS)),
            (_consumer, (
                1, q_ring, q16, k_ring, ks_ring, k16_ring, v_ring, v_own,
                q_full, q_empty, k_full, done, q16_full, k16_full, done16, v_full,
                q_scale_ptr, q_offset_ptr, out_ptr, lse_ptr,
                start, count, own_tiles, T, tokens, own, queries, head, heads_total, row, out_base, scale,
                BN, D, KS, VS)),
            (_converter, (
                ov_desc, v_ring, v_own, v_full, done, done16, v_ptr, vs_ptr, slots_ptr,
                start, count, own_tiles, T, tokens, plane, planes, BN, D, KS, VS, CHUNKS)),
            (_producer, (
                q_desc, k_desc, ks_desc, q16_desc, ok_desc, q_ring, q16, k_ring, ks_ring, k16_ring,
                q_full, q_empty, k_full, done, q16_full, k16_full, done16, slots_ptr,
                start, count, own_tiles, T, head, heads_total, plane, planes, row, BN, D, KS)),
        ],
        [4, 4, 1],
        list(REGISTERS),
    )  # fmt: skip
