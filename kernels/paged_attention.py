"""Long-query attention that reads the pages of a KV cache where they lie: the fused read.

One launch attends a chunk's queries to its own keys and values, to pages of INT8 codes and to pages kept in
a floating-point dtype. Nothing is decoded to memory: INT8 keys meet INT8 queries on the integer units, and
INT8 values are widened in registers.

Keys are stored without their frame's rotation (`rope.py`). With R_p the rotation of a page that stands p
frames from the chunk's first, q·(R_p k) = (R_-p q)·k, so queries are turned back once per page, in a first
small launch, and no turned key ever exists. Codes are of k - μ, so (R_-p q)·μ, one number per query and page,
is added to the scores. A rotation keeps the norm of each channel pair, so the largest pair norm of a query
bounds its channels on every page, and one scale per query serves all of them.

Packed pages of four bits become INT8 codes first and take a launch of their own, since their values are
turned by a Hadamard matrix and others' are not (`paged_attention_packed.py`); both results are merged.

Scores are kept in units of log2: softmax is taken with exp2.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from vidkv.kernels.attention import attend_with_lse, merge_kernel
from vidkv.kernels.jit import ROUND, constexpr, interpreted, jit, tl, triton, turn
from vidkv.kernels.packed import decode_reference as decode_packed
from vidkv.kernels.packed import hadamard
from vidkv.kernels.paged_attention_packed import (
    BITS,
    merge_turned,
    turn_packed_queries,
    turn_packed_queries_reference,
    unpack_pages,
)
from vidkv.kernels.pages import Pages, decode_reference
from vidkv.kernels.rope import rotate_first

HEAD_DIMS = (32, 64, 128, 256)
KINDS = ("coded", "plain", "packed")
"""Of pages, in the order in which `attend_pages` tells what each got."""
SMALLEST_TAIL = 32
"""Columns of the narrowest score tile: a multiple of every matrix unit's depth."""
LN2 = constexpr(math.log(2))


@dataclass(frozen=True)
class PageRun:
    """Pages of one layer, read through a table.

    Attributes:
        pages: k and v (slots, b, kv heads, tokens, d), or packed (slots, b, kv heads, tokens, d / 2) uint8;
            of codes also k_scale (slots, b, kv heads, tokens, 1) and v_scale, the same or (slots, b, kv
            heads, 1, d), float16.
        slots: (pages,) int64.
        temporal: (pages, time pairs) complex64 phases of the pages' distances from the chunk's first frame.
        mean: (b, kv heads, d) float32 that was taken out of coded keys; None for plain pages.
        turned: channels of packed codes are turned by a Hadamard matrix (`packed.py`).
    """

    pages: Pages
    slots: Tensor
    temporal: Tensor
    mean: Tensor | None = None
    turned: bool = False

    @property
    def kind(self) -> str:
        """Of `KINDS`: the argument of `attend_pages` that takes it."""
        if self.mean is None:
            return "plain"
        return "packed" if self.pages["k"].dtype == torch.uint8 else "coded"


def by_kind(runs: Sequence[PageRun]) -> tuple[PageRun | None, PageRun | None, PageRun | None]:
    """The run of each of `KINDS`; there is at most one of each."""
    of_kind = {run.kind: run for run in runs}
    coded, plain, packed = (of_kind.get(kind) for kind in KINDS)
    return coded, plain, packed


@dataclass(frozen=True)
class Tile:
    """How the kernel is cut.

    Attributes:
        queries, keys: rows and columns of a score tile, powers of two; at least 16 and 32.
        warps, stages: as in triton.
        hopper_splits: programs that share a query tile's keys in Hopper's own kernel
            (`paged_attention_hopper.py`), 1 or 2; 0 for the portable kernel, which also takes what
            Hopper's does not: chunks without history, and plain pages.
    """

    queries: int
    keys: int
    warps: int
    stages: int
    hopper_splits: int = 0


def attend_pages(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    coded: PageRun | None,
    plain: PageRun | None,
    tile: Tile,
    page_lse: bool = False,
    packed: PageRun | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """softmax over a chunk's own keys and all pages of the tables.

    Args:
        q: (b, heads, queries, d), turned by their own frames counted from the chunk's first.
        k, v: (b, kv heads, keys, d), the chunk's own, likewise; kv heads divide heads.
        coded, plain: pages of the same batch, kv heads, tokens and d; None where there are none. Values
            beyond ±65504 overflow beside 16-bit queries.
        tile: how to cut.
        page_lse: also return each page's own log-sum-exp.
        packed: pages of four bits, likewise. They take a launch of their own, after one that unpacks them.

    Returns:
        out: (b, heads, queries, d) in q's dtype.
        lse: (b, heads, queries) float32, natural logarithm.
        per_page: (b, heads, pages, queries) float32 in the order of `KINDS`, or empty; a page's share of a
            query's attention is exp(per_page - lse).
    """
    if packed is None:
        return _attend_unpacked(q, k, v, coded, plain, tile, page_lse)
    if coded or plain:
        out, lse, per_page = _attend_unpacked(q, k, v, coded, plain, tile, page_lse)
    else:
        out, lse = attend_with_lse(q, k, v)
        per_page = lse.new_empty(*lse.shape[:2], 0, lse.shape[2])
    more, more_lse, more_pages = _attend_packed(q, packed, tile, page_lse)
    merge = merge_turned if packed.turned else merge_kernel
    out, lse = merge(out, lse, more, more_lse)
    return out, lse, torch.cat([per_page, more_pages], 2)


def _attend_unpacked(
    q: Tensor, k: Tensor, v: Tensor, coded: PageRun | None, plain: PageRun | None, tile: Tile, page_lse: bool
) -> tuple[Tensor, Tensor, Tensor]:
    scale = _score_scale(q)
    if tile.hopper_splits and coded and not plain and not page_lse:
        _, codes, q_scale, offsets = _turn_queries(q, *_tables(coded, plain), scale)
        pages, slots = _buffers(coded)
        out, lse = _attend_hopper(q, k, v, pages, slots, codes, q_scale, offsets, scale, tile.hopper_splits)
        return out, lse, out.new_empty(*lse.shape[:2], 0, lse.shape[2], dtype=torch.float32)
    turned, codes, q_scale, offsets = _turn_queries(q, *_tables(coded, plain), scale)
    out, lse, per_page = _attend(
        q, k, v, *_buffers(coded), *_buffers(plain), turned, codes, q_scale, offsets,
        scale, [tile.queries, tile.keys, tile.warps, tile.stages], page_lse,
    )  # fmt: skip
    return out, lse, per_page


def _attend_packed(q: Tensor, run: PageRun, tile: Tile, page_lse: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Attention to packed pages alone, its output as turned as their values are."""
    codes, q_scale, offsets = turn_packed(q, run)
    pages, table = unpacked(run)
    scale = _score_scale(q)
    none = q.new_empty(q.shape[0], pages[0].shape[2], 0, q.shape[-1])
    if tile.hopper_splits and not page_lse:
        splits = tile.hopper_splits
        out, lse = _attend_hopper(q, none, none, pages, table, codes, q_scale, offsets, scale, splits)
        return out, lse, out.new_empty(*lse.shape[:2], 0, lse.shape[2], dtype=torch.float32)
    return _attend(
        q, none, none, pages, table, [], None, q.new_empty(0, *q.shape), codes, q_scale, offsets,
        scale, [tile.queries, tile.keys, tile.warps, tile.stages], page_lse,
    )  # fmt: skip


def turn_packed(q: Tensor, run: PageRun) -> tuple[Tensor, Tensor, Tensor]:
    """Queries as they meet packed pages; see `paged_attention_packed.turn_packed_queries`."""
    assert run.mean is not None
    return turn_packed_queries(q, torch.view_as_real(run.temporal), run.mean, run.turned, _score_scale(q))


def unpacked(run: PageRun) -> tuple[Sequence[Tensor], Tensor]:
    """Packed pages as INT8 pages in the kernel's order, and their slots."""
    pages, slots = _buffers(run)
    assert slots is not None
    return unpack_pages(*pages, slots), torch.arange(len(slots), device=slots.device)


def _score_scale(q: Tensor) -> float:
    return math.log2(math.e) / math.sqrt(q.shape[-1])


def attend_pages_reference(
    q: Tensor, k: Tensor, v: Tensor, coded: PageRun | None, plain: PageRun | None, exact_queries: bool = True,
    packed: PageRun | None = None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """`attend_pages` in float64 on decoded pages.

    Args:
        exact_queries: False rounds queries as the kernel does before they meet codes; what is left between
            this and the kernel is then only the order and the precision of sums.
    """
    scores, values = [], []
    groups = q.shape[1] // k.shape[1]
    for run in (coded, plain):
        if run is None:
            continue
        keys, decoded = decode_reference(run.pages, run.slots, None, run.mean, torch.float64)
        back = run.temporal.conj().to(torch.complex128)
        for page, page_keys in enumerate(keys.unbind(2)):
            turned = rotate_first(q.double(), back[page])
            against = page_keys.repeat_interleave(groups, 1).transpose(-1, -2)
            if run.mean is None or exact_queries:
                scores.append(turned @ against)
                continue
            mean = run.mean.double().repeat_interleave(groups, 1)[..., None]
            scale = query_scale(q).double()[..., None]
            scores.append((turned / scale).round() * scale @ (against - mean) + turned @ mean)
        values.append(decoded.flatten(2, 3))
    if packed is not None:
        packed_scores, packed_values = _packed_reference(q, packed, groups, exact_queries)
        scores += packed_scores
        values.append(packed_values)
    scores.append(q.double() @ k.double().repeat_interleave(groups, 1).transpose(-1, -2))
    sizes = [part.shape[-1] for part in scores]
    joined = torch.cat(scores, -1) / math.sqrt(q.shape[-1])
    lse = joined.logsumexp(-1)
    out = (joined - lse[..., None]).exp() @ torch.cat([*values, v.double()], 2).repeat_interleave(groups, 1)
    per_page = torch.stack([part.logsumexp(-1) for part in joined.split(sizes, -1)], 2)[:, :, :-1]
    return out, lse, per_page


def _packed_reference(
    q: Tensor, run: PageRun, groups: int, exact_queries: bool
) -> tuple[list[Tensor], Tensor]:
    """Scores of each page times sqrt(d), and all pages' values (b, kv heads, keys, d)."""
    assert run.mean is not None
    keys, values = (
        decode_packed(run.pages[name], scale, run.slots, BITS, run.turned, None, None, torch.float64)
        for name, scale in (("k", run.pages["k_scale"]), ("v", run.pages["v_scale"]))
    )
    exact, scale = turn_packed_queries_reference(q, run.temporal, run.turned)
    meeting = exact if exact_queries else (exact / scale[..., None]).round() * scale[..., None]
    if run.turned:
        meeting = meeting @ hadamard(q.shape[-1], q.device, torch.float64)
    mean = run.mean.double().repeat_interleave(groups, 1)[..., None]
    scores = [
        page_q @ page_k.repeat_interleave(groups, 1).mT + rotate_first(q.double(), phases) @ mean
        for page_q, page_k, phases in zip(
            meeting, keys.unbind(2), run.temporal.conj().to(torch.complex128), strict=True
        )
    ]
    return scores, values.flatten(2, 3)


def query_scale(q: Tensor) -> Tensor:
    """One scale per query for its codes at every page: its largest channel-pair norm over 127, float32."""
    norms = q.float().unflatten(-1, (-1, 2)).square().sum(-1)
    return (norms.amax(-1).sqrt() / 127.0).clamp_min(1e-20)


def _tables(
    coded: PageRun | None, plain: PageRun | None
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Phases of coded pages and of plain ones as real numbers, and the mean."""
    return (
        torch.view_as_real(coded.temporal) if coded else None,
        torch.view_as_real(plain.temporal) if plain else None,
        coded.mean if coded else None,
    )


def _buffers(run: PageRun | None) -> tuple[Sequence[Tensor], Tensor | None]:
    """A run's tensors in the kernel's order, and its slots."""
    if run is None:
        return [], None
    names = ("k", "v") if run.mean is None else ("k", "v", "k_scale", "v_scale")
    return [run.pages[name] for name in names], run.slots


@torch.library.custom_op("vidkv::turn_queries", mutates_args=())
def _turn_queries(
    q: Tensor, coded_turns: Tensor | None, plain_turns: Tensor | None, mean: Tensor | None, scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Queries turned back to every page: (plain, b, n, q, d), codes (coded, b, n, q, d) int8, their scale
    (b, n, q) and (R_-p q)·μ (coded, b, n, q), both times `scale`, float32."""
    q = q.contiguous()
    turned, codes, q_scale, offsets = _empty_turned(q, coded_turns, plain_turns)
    b, heads, queries, d = q.shape
    turns = coded_turns if coded_turns is not None else plain_turns
    if turns is None:
        return turned, codes, q_scale, offsets
    block = 32
    _turn_kernel[(triton.cdiv(queries, block), b * heads)](
        q, coded_turns if coded_turns is not None else q, plain_turns if plain_turns is not None else q,
        mean if mean is not None else q, turned, codes, q_scale, offsets,
        queries, codes.shape[0], turned.shape[0], heads, mean.shape[1] if mean is not None else heads,
        scale,
        D=d, PAIRS=turns.shape[1], CODED=coded_turns is not None, BLOCK=block, num_warps=4,
    )  # fmt: skip
    return turned, codes, q_scale, offsets


def _empty_turned(
    q: Tensor, coded_turns: Tensor | None, plain_turns: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    coded = coded_turns.shape[0] if coded_turns is not None else 0
    plain = plain_turns.shape[0] if plain_turns is not None else 0
    return (
        q.new_empty(plain, *q.shape),
        q.new_empty(coded, *q.shape, dtype=torch.int8),
        q.new_empty(q.shape[:-1], dtype=torch.float32),
        q.new_empty(coded, *q.shape[:-1], dtype=torch.float32),
    )


@_turn_queries.register_fake
def _(
    q: Tensor, coded_turns: Tensor | None, plain_turns: Tensor | None, mean: Tensor | None, scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    return _empty_turned(q, coded_turns, plain_turns)


@torch.library.custom_op("vidkv::attend_pages", mutates_args=())
def _attend(
    q: Tensor, k: Tensor, v: Tensor,
    coded: Sequence[Tensor], coded_slots: Tensor | None, plain: Sequence[Tensor], plain_slots: Tensor | None,
    turned: Tensor, codes: Tensor, q_scale: Tensor, offsets: Tensor,
    scale: float, tile: Sequence[int], page_lse: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    q, k, v = q.contiguous(), k.contiguous(), v.contiguous()
    out, lse, per_page = _empty_outputs(q, codes.shape[0] + turned.shape[0], page_lse)
    b, heads, queries, d = q.shape
    kv_heads, own = k.shape[1:3]
    block_m, block_n, warps, stages = tile
    tokens = (coded or plain or [k])[0].shape[-2]
    ck, cv, ck_scale, cv_scale = coded or [q] * 4
    pk, pv = plain or [q] * 2
    _attend_kernel[(triton.cdiv(queries, block_m), b * heads)](
        q, k, v, ck, cv, ck_scale, cv_scale, coded_slots if coded else q, pk, pv, plain_slots if plain else q,
        turned, codes, q_scale, offsets, out, lse, per_page,
        queries, own, codes.shape[0], turned.shape[0], heads, kv_heads, b * kv_heads, scale,
        TOKENS=tokens, D=d, BLOCK_M=block_m, BLOCK_N=block_n, TAIL=tail(tokens, block_n),
        CODED=bool(coded), V_PER_CHANNEL=bool(coded) and cv_scale.shape[-1] != 1,
        PAGE_LSE=page_lse, INTERPRETED=interpreted(),
        num_warps=warps, num_stages=stages,
    )  # fmt: skip
    return out, lse, per_page


def _empty_outputs(q: Tensor, pages: int, page_lse: bool) -> tuple[Tensor, Tensor, Tensor]:
    b, heads, queries, _ = q.shape
    return (
        torch.empty_like(q, memory_format=torch.contiguous_format),
        q.new_empty(b, heads, queries, dtype=torch.float32),
        q.new_empty(b, heads, pages if page_lse else 0, queries, dtype=torch.float32),
    )


@_attend.register_fake
def _(
    q: Tensor, k: Tensor, v: Tensor,
    coded: Sequence[Tensor], coded_slots: Tensor | None, plain: Sequence[Tensor], plain_slots: Tensor | None,
    turned: Tensor, codes: Tensor, q_scale: Tensor, offsets: Tensor,
    scale: float, tile: Sequence[int], page_lse: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    return _empty_outputs(q, codes.shape[0] + turned.shape[0], page_lse)


def tail(tokens: int, keys: int) -> int:
    """Columns of the last score tile of a page, 0 where whole tiles fill it."""
    left = tokens % keys
    return max(SMALLEST_TAIL, 1 << (left - 1).bit_length()) if left else 0


@torch.library.custom_op("vidkv::attend_pages_hopper", mutates_args=())
def _attend_hopper(
    q: Tensor, k: Tensor, v: Tensor, pages: Sequence[Tensor], slots: Tensor,
    codes: Tensor, q_scale: Tensor, offsets: Tensor, scale: float, splits: int,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    # triton's Gluon dialect changes between versions: it is imported where it is used
    from vidkv.kernels.paged_attention_hopper import KEYS, attend_split

    if slots.shape[0] * -(-pages[0].shape[-2] // KEYS) < 2 * splits:
        splits = 1
    q, k, v = q.contiguous(), k.contiguous(), v.contiguous()
    out, lse = attend_split(q, k, v, list(pages), slots, codes, q_scale, offsets, scale, splits)
    if splits == 1:
        return out[0], lse[0]
    merged, total = merge_kernel(out[0], lse[0], out[1], lse[1])
    return merged, total


@_attend_hopper.register_fake
def _(
    q: Tensor, k: Tensor, v: Tensor, pages: Sequence[Tensor], slots: Tensor,
    codes: Tensor, q_scale: Tensor, offsets: Tensor, scale: float, splits: int,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    out, lse, _ = _empty_outputs(q, 0, False)
    return out, lse


@jit
def _turn_kernel(
    q_ptr, coded_turns_ptr, plain_turns_ptr, mean_ptr, turned_ptr, codes_ptr, q_scale_ptr, offsets_ptr,
    queries, coded, plain, heads, kv_heads, scale,
    D: tl.constexpr, PAIRS: tl.constexpr, CODED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    head = tl.program_id(1)
    rows = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    channels, pairs = tl.arange(0, D), tl.arange(0, D // 2)
    row_ok = rows < queries
    row_at = head.to(tl.int64) * queries + rows
    at = row_at[:, None] * D + channels[None, :]
    q = tl.load(q_ptr + at, mask=row_ok[:, None], other=0.0).to(tl.float32)
    in_time = pairs < PAIRS
    page_size = tl.num_programs(1).to(tl.int64) * queries
    if CODED:
        even, odd = tl.split(tl.reshape(q, (BLOCK, D // 2, 2)))
        # never 0: a masked score of -inf is multiplied by it
        q_scale = tl.maximum(tl.sqrt(tl.max(even * even + odd * odd, 1)) / 127.0, 1e-20)
        inverse = 1.0 / q_scale
        tl.store(q_scale_ptr + row_at, q_scale * scale, mask=row_ok)
        kv_plane = (head // heads) * kv_heads + (head % heads) // (heads // kv_heads)
        mean = tl.load(mean_ptr + kv_plane * D + channels)
        for page in range(coded):
            phase = coded_turns_ptr + 2 * (page * PAIRS + pairs)
            cos, sin = tl.load(phase, mask=in_time, other=1.0), tl.load(phase + 1, mask=in_time, other=0.0)
            back = turn(q, cos[None, :], -sin[None, :], BLOCK, D)
            code = (back * inverse[:, None] + ROUND) - ROUND
            tl.store(codes_ptr + page * page_size * D + at, code.to(tl.int8), mask=row_ok[:, None])
            tl.store(
                offsets_ptr + page * page_size + row_at, tl.sum(back * mean[None, :], 1) * scale, mask=row_ok
            )
    for page in range(plain):
        phase = plain_turns_ptr + 2 * (page * PAIRS + pairs)
        cos, sin = tl.load(phase, mask=in_time, other=1.0), tl.load(phase + 1, mask=in_time, other=0.0)
        back = turn(q, cos[None, :], -sin[None, :], BLOCK, D)
        tl.store(
            turned_ptr + page * page_size * D + at, back.to(turned_ptr.dtype.element_ty), mask=row_ok[:, None]
        )


@jit
def _widen(codes, scale, DTYPE: tl.constexpr, INTERPRETED: tl.constexpr):
    """INT8 codes times float16 scales, in DTYPE: float16 or float32."""
    if INTERPRETED or DTYPE == tl.float32:
        return (codes.to(tl.float32) * scale.to(tl.float32)).to(DTYPE)
    else:
        # a byte u = code + 128 under the exponent of 1024 reads 1024 + u in float16; four at a time
        halves = tl.inline_asm_elementwise(
            """
            {
            .reg .b32 bytes, bias;
            xor.b32 bytes, $2, 0x80808080;
            mov.b32 bias, 0x64806480;
            prmt.b32 $0, bytes, 0x64646464, 0x4140;
            prmt.b32 $1, bytes, 0x64646464, 0x4342;
            sub.f16x2 $0, $0, bias;
            sub.f16x2 $1, $1, bias;
            }
            """,
            "=r,=r,r", [codes], dtype=tl.float16, is_pure=True, pack=4,
        )  # fmt: skip
        return halves * scale


@jit
def _dot(a, b, acc, INTERPRETED: tl.constexpr):
    if INTERPRETED:
        return tl.dot(a.to(tl.float32), b.to(tl.float32), acc)
    elif a.dtype == tl.float32:
        return tl.dot(a, b, acc, input_precision="ieee")
    else:
        return tl.dot(a, b, acc)


@jit
def _absorb(x, row_scale, offset, v, m, total, acc, INTERPRETED: tl.constexpr):
    """One step of the online softmax over scores x * row_scale + offset."""
    m_new = tl.maximum(m, tl.max(x, 1) * row_scale + offset)
    shrink = tl.exp2(m - m_new)
    p = tl.exp2(x * row_scale[:, None] + (offset - m_new)[:, None])
    added = tl.sum(p, 1)
    acc = _dot(p.to(v.dtype), v, acc * shrink[:, None], INTERPRETED)
    return m_new, total * shrink + added, acc, shrink, added


@jit
def _coded_tile(
    codes, row_scale, offset, k_ptr, v_ptr, k_scale_ptr, v_scale_ptr, base, plane_slot, start, m, total, acc,
    TOKENS: tl.constexpr, COLUMNS: tl.constexpr, D: tl.constexpr, MASKED: tl.constexpr,
    V_PER_CHANNEL: tl.constexpr, WIDE: tl.constexpr, INTERPRETED: tl.constexpr,
):  # fmt: skip
    token = start + tl.arange(0, COLUMNS)
    channels = tl.arange(0, D)
    at = base + token
    ok = token < TOKENS
    if MASKED:
        k = tl.load(k_ptr + at[None, :] * D + channels[:, None], mask=ok[None, :], other=0)
        v = tl.load(v_ptr + at[:, None] * D + channels[None, :], mask=ok[:, None], other=0)
        k_scale = tl.load(k_scale_ptr + at, mask=ok, other=0.0)
    else:
        k = tl.load(k_ptr + at[None, :] * D + channels[:, None])
        v = tl.load(v_ptr + at[:, None] * D + channels[None, :])
        k_scale = tl.load(k_scale_ptr + at)
    x = tl.dot(codes, k).to(tl.float32) * k_scale.to(tl.float32)[None, :]
    if MASKED:
        x = tl.where(ok[None, :], x, float("-inf"))
    if V_PER_CHANNEL:
        v_scale = tl.load(v_scale_ptr + plane_slot * D + channels)[None, :]
    elif MASKED:
        v_scale = tl.load(v_scale_ptr + at, mask=ok, other=0.0)[:, None]
    else:
        v_scale = tl.load(v_scale_ptr + at)[:, None]
    return _absorb(x, row_scale, offset, _widen(v, v_scale, WIDE, INTERPRETED), m, total, acc, INTERPRETED)


@jit
def _plain_tile(
    q, row_scale, offset, k_ptr, v_ptr, base, start, end, m, total, acc,
    COLUMNS: tl.constexpr, D: tl.constexpr, MASKED: tl.constexpr, INTERPRETED: tl.constexpr,
):  # fmt: skip
    token = start + tl.arange(0, COLUMNS)
    channels = tl.arange(0, D)
    at = base + token
    ok = token < end
    if MASKED:
        k = tl.load(k_ptr + at[None, :] * D + channels[:, None], mask=ok[None, :], other=0.0)
        v = tl.load(v_ptr + at[:, None] * D + channels[None, :], mask=ok[:, None], other=0.0)
    else:
        k = tl.load(k_ptr + at[None, :] * D + channels[:, None])
        v = tl.load(v_ptr + at[:, None] * D + channels[None, :])
    x = _dot(q, k.to(q.dtype), None, INTERPRETED)
    if MASKED:
        x = tl.where(ok[None, :], x, float("-inf"))
    return _absorb(x, row_scale, offset, v.to(q.dtype), m, total, acc, INTERPRETED)


@jit
def _attend_kernel(
    q_ptr, k_ptr, v_ptr, ck_ptr, cv_ptr, ck_scale_ptr, cv_scale_ptr, cslots_ptr, pk_ptr, pv_ptr, pslots_ptr,
    turned_ptr, codes_ptr, q_scale_ptr, offsets_ptr, out_ptr, lse_ptr, per_page_ptr,
    queries, own, coded, plain, heads, kv_heads, planes, scale,
    TOKENS: tl.constexpr, D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, TAIL: tl.constexpr,
    CODED: tl.constexpr, V_PER_CHANNEL: tl.constexpr, PAGE_LSE: tl.constexpr, INTERPRETED: tl.constexpr,
):  # fmt: skip
    head = tl.program_id(1)
    plane = (head // heads) * kv_heads + (head % heads) // (heads // kv_heads)
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    channels = tl.arange(0, D)
    row_ok = rows < queries
    row_at = head.to(tl.int64) * queries + rows
    q_at = row_at[:, None] * D + channels[None, :]
    page_size = tl.num_programs(1).to(tl.int64) * queries
    DTYPE: tl.constexpr = out_ptr.dtype.element_ty
    # plain pages' queries by their place in the tile: fewer registers live in the loops
    first_row = head.to(tl.int64) * queries + tl.program_id(0) * BLOCK_M
    in_tile = tl.arange(0, BLOCK_M)[:, None] * D + channels[None, :]
    # bfloat16 holds too few bits for a code times its scale
    WIDE: tl.constexpr = tl.float32 if DTYPE == tl.float32 else tl.float16
    FULL: tl.constexpr = TOKENS // BLOCK_N * BLOCK_N
    m = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    acc = tl.zeros((BLOCK_M, D), tl.float32)
    zero = tl.zeros((BLOCK_M,), tl.float32)

    if CODED:
        row_scale = tl.load(q_scale_ptr + row_at, mask=row_ok, other=1.0)
        for page in range(coded):
            slot = tl.load(cslots_ptr + page).to(tl.int64) * planes + plane
            codes = tl.load(codes_ptr + page * page_size * D + q_at, mask=row_ok[:, None], other=0)
            offset = tl.load(offsets_ptr + page * page_size + row_at, mask=row_ok, other=0.0)
            page_total = zero
            for start in range(0, FULL, BLOCK_N):
                m, total, acc, shrink, added = _coded_tile(
                    codes, row_scale, offset, ck_ptr, cv_ptr, ck_scale_ptr, cv_scale_ptr,
                    slot * TOKENS, slot, start, m, total, acc,
                    TOKENS, BLOCK_N, D, False, V_PER_CHANNEL, WIDE, INTERPRETED,
                )  # fmt: skip
                page_total = page_total * shrink + added
            if TAIL > 0:
                m, total, acc, shrink, added = _coded_tile(
                    codes, row_scale, offset, ck_ptr, cv_ptr, ck_scale_ptr, cv_scale_ptr,
                    slot * TOKENS, slot, FULL, m, total, acc,
                    TOKENS, TAIL, D, True, V_PER_CHANNEL, WIDE, INTERPRETED,
                )  # fmt: skip
                page_total = page_total * shrink + added
            if PAGE_LSE:
                at = (head.to(tl.int64) * (coded + plain) + page) * queries + rows
                tl.store(per_page_ptr + at, (m + tl.log2(page_total)) * LN2, mask=row_ok)

    own_scale = zero + scale
    for page in range(plain):
        slot = tl.load(pslots_ptr + page).to(tl.int64) * planes + plane
        turned_at = turned_ptr + (page * page_size + first_row) * D + in_tile
        turned = tl.load(turned_at, mask=row_ok[:, None], other=0.0)
        page_total = zero
        for start in tl.range(0, FULL, BLOCK_N, num_stages=2):
            m, total, acc, shrink, added = _plain_tile(
                turned, own_scale, zero, pk_ptr, pv_ptr, slot * TOKENS, start, TOKENS, m, total, acc,
                BLOCK_N, D, False, INTERPRETED,
            )  # fmt: skip
            page_total = page_total * shrink + added
        if TAIL > 0:
            m, total, acc, shrink, added = _plain_tile(
                turned, own_scale, zero, pk_ptr, pv_ptr, slot * TOKENS, FULL, TOKENS, m, total, acc,
                TAIL, D, True, INTERPRETED,
            )  # fmt: skip
            page_total = page_total * shrink + added
        if PAGE_LSE:
            at = (head.to(tl.int64) * (coded + plain) + coded + page) * queries + rows
            tl.store(per_page_ptr + at, (m + tl.log2(page_total)) * LN2, mask=row_ok)

    q = tl.load(q_ptr + q_at, mask=row_ok[:, None], other=0.0)
    base = plane.to(tl.int64) * own
    full = own // BLOCK_N * BLOCK_N
    for start in tl.range(0, full, BLOCK_N, num_stages=2):
        m, total, acc, _, _ = _plain_tile(
            q, own_scale, zero, k_ptr, v_ptr, base, start, own, m, total, acc, BLOCK_N, D, False, INTERPRETED
        )
    if full < own:
        m, total, acc, _, _ = _plain_tile(
            q, own_scale, zero, k_ptr, v_ptr, base, full, own, m, total, acc, BLOCK_N, D, True, INTERPRETED
        )
    tl.store(out_ptr + q_at, (acc / total[:, None]).to(DTYPE), mask=row_ok[:, None])
    tl.store(lse_ptr + row_at, (m + tl.log2(total)) * LN2, mask=row_ok)
