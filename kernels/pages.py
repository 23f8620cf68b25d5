"""Writing and reading the pages of a KV cache: into slots, and back into dense keys and values.

Commit, one launch for all heads and frames of a layer: keys are turned by row and column, the frozen mean
is taken out, keys and values become INT8 codes with a scale per token and head, and both go to the slots
of the page table. Decode is the way back for a two-pass read: a segment of pages becomes dense keys, turned
to their distance in time, and values. 16-bit and 32-bit pages go the same ways without codes.

Layouts: pages are (slots, b, kv heads, tokens, d) and scales (slots, b, kv heads, tokens, 1), one layer of a
pool. Phases are unit complex numbers as in `rope.py`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from vidkv.kernels.int8 import dequantize, quantize
from vidkv.kernels.jit import ROUND, constexpr, jit, tl, triton, turn, usable
from vidkv.kernels.rope import rotate_first, rotate_last

SMALLEST_NORMAL_HALF = constexpr(6.103515625e-05)
LARGEST_HALF = constexpr(65504.0)
TOKENS_PER_PROGRAM = 16
HEAD_DIMS = (16, 32, 64, 128, 256)
"""What kernels can take: powers of two."""

Pages = dict[str, Tensor]
"""One layer of a pool: k and v, and for codes k_scale and v_scale."""


def commit(
    pages: Pages, slots: Tensor, k: Tensor, v: Tensor, spatial: Tensor | None, mean: Tensor | None
) -> None:
    """Write frames into slots, by the kernel where it can run.

    Args:
        pages: written.
        slots: (frames,) int64.
        k, v: (b, kv heads, frames, tokens, d); k after its RMS norm.
        spatial: (tokens, pairs) complex phases of row and column; None where k is turned already.
        mean: (b, kv heads, d) float32, taken out of the turned keys before coding; None for plain pages.
    """
    if usable(k) and k.shape[-1] in HEAD_DIMS and not _per_channel(pages):
        turns = None if spatial is None else torch.view_as_real(spatial)
        parts = pages["k"], pages["v"], pages.get("k_scale"), pages.get("v_scale")
        _commit(k, v, turns, mean, slots, *parts)
        return
    for name, written in commit_reference(pages, k, v, spatial, mean).items():
        pages[name].index_copy_(0, slots, written.to(pages[name].dtype))


def commit_reference(like: Pages, k: Tensor, v: Tensor, spatial: Tensor | None, mean: Tensor | None) -> Pages:
    """What `commit` puts into the slots of pages like these: (frames, b, kv heads, tokens, d) and scales."""
    if mean is not None:
        k = k.float()
    if spatial is not None:
        k = rotate_last(k, spatial)
    k, v = k.movedim(2, 0), v.movedim(2, 0)
    if mean is None:
        return {"k": k, "v": v}
    k_codes, k_scale = quantize(k - mean[:, :, None])
    v_codes, v_scale = quantize(v, -2 if _per_channel(like) else -1)
    return {"k": k_codes, "v": v_codes, "k_scale": k_scale, "v_scale": v_scale}


def decode(
    pages: Pages, slots: Tensor, temporal: Tensor | None, mean: Tensor | None, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Bring pages back, by the kernel where it can run.

    Args:
        slots: (pages,) int64.
        temporal: (pages, time pairs) complex phases by which keys are turned; None leaves them.
        mean: what `commit` took out; None for plain pages.

    Returns:
        k, v: (b, kv heads, pages, tokens, d) in `dtype`.
    """
    if usable(pages["k"]) and pages["k"].shape[-1] in HEAD_DIMS:
        turns = None if temporal is None else torch.view_as_real(temporal)
        parts = pages["k"], pages["v"], pages.get("k_scale"), pages.get("v_scale")
        return _decode(*parts, mean, slots, turns, dtype)
    return decode_reference(pages, slots, temporal, mean, dtype)


def decode_reference(
    pages: Pages, slots: Tensor, temporal: Tensor | None, mean: Tensor | None, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """`decode` in plain torch; float32 inside, or float64 where that is wanted."""
    taken = {name: buffer.index_select(0, slots).movedim(0, 2) for name, buffer in pages.items()}
    wide = torch.promote_types(dtype, torch.float32)
    if mean is None:
        k, v = taken["k"].to(dtype), taken["v"].to(dtype)
    else:
        k = dequantize(taken["k"], taken["k_scale"], wide) + mean[:, :, None, None].to(wide)
        v = dequantize(taken["v"], taken["v_scale"], dtype)
    if temporal is not None:
        k = rotate_first(k, temporal[:, None])
    return k.to(dtype), v


def _per_channel(pages: Pages) -> bool:
    """Whether one scale of V covers a channel of a page rather than a token."""
    return "v_scale" in pages and pages["v_scale"].shape[-1] != 1


@torch.library.custom_op("vidkv::commit_pages", mutates_args=("k_pages", "v_pages", "k_scale", "v_scale"))
def _commit(
    k: Tensor, v: Tensor, turns: Tensor | None, mean: Tensor | None, slots: Tensor,
    k_pages: Tensor, v_pages: Tensor, k_scale: Tensor | None, v_scale: Tensor | None,
) -> None:  # fmt: skip
    b, heads, frames, tokens, d = k.shape
    if k.stride(-1) != 1 or v.stride() != k.stride():
        k, v = k.contiguous(), v.contiguous()
    coded = mean is not None
    _commit_kernel[(triton.cdiv(tokens, TOKENS_PER_PROGRAM), frames, b * heads)](
        k, v, k if turns is None else turns, mean if coded else k, slots, k_pages, v_pages,
        k_scale if coded else k, v_scale if coded else k,
        *k.stride()[:4], tokens, heads, b * heads,
        D=d, PAIRS=0 if turns is None else turns.shape[1], CODED=coded, BLOCK=TOKENS_PER_PROGRAM, num_warps=4,
    )  # fmt: skip


@_commit.register_fake
def _(
    k: Tensor, v: Tensor, turns: Tensor | None, mean: Tensor | None, slots: Tensor,
    k_pages: Tensor, v_pages: Tensor, k_scale: Tensor | None, v_scale: Tensor | None,
) -> None:  # fmt: skip
    return None


@torch.library.custom_op("vidkv::decode_pages", mutates_args=())
def _decode(
    k_pages: Tensor, v_pages: Tensor, k_scale: Tensor | None, v_scale: Tensor | None, mean: Tensor | None,
    slots: Tensor, turns: Tensor | None, dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    b, heads, tokens, d = k_pages.shape[1:]
    count = slots.shape[0]
    k = k_pages.new_empty(b, heads, count, tokens, d, dtype=dtype)
    v = torch.empty_like(k)
    coded = mean is not None
    _decode_kernel[(triton.cdiv(tokens, TOKENS_PER_PROGRAM), count, b * heads)](
        k_pages, v_pages, k_scale if coded else k, v_scale if coded else k, mean if coded else k,
        slots, k if turns is None else turns, k, v, tokens, count, b * heads,
        D=d, PAIRS=0 if turns is None else turns.shape[1], CODED=coded,
        PER_CHANNEL=v_scale is not None and v_scale.shape[-1] != 1,
        BLOCK=TOKENS_PER_PROGRAM, num_warps=4,
    )  # fmt: skip
    return k, v


@_decode.register_fake
def _(
    k_pages: Tensor, v_pages: Tensor, k_scale: Tensor | None, v_scale: Tensor | None, mean: Tensor | None,
    slots: Tensor, turns: Tensor | None, dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    b, heads, tokens, d = k_pages.shape[1:]
    k = k_pages.new_empty(b, heads, slots.shape[0], tokens, d, dtype=dtype)
    return k, torch.empty_like(k)


@jit
def round_up_half(scale):
    """float32 scales as fp16, none of them smaller, as `int8.round_up`."""
    exact = tl.minimum(tl.maximum(scale, SMALLEST_NORMAL_HALF), LARGEST_HALF)
    half = exact.to(tl.float16)
    above = (half.to(tl.int16, bitcast=True) + 1).to(tl.float16, bitcast=True)
    return tl.where(half.to(tl.float32) < exact, above, half)


@jit
def _code(x):
    """Codes (rows, D) and scales (rows,) fp16 of float32 x, as `int8.quantize`: scales round up."""
    half = round_up_half(tl.div_rn(tl.max(tl.abs(x), 1), 127.0))
    # maxima pass over NaN, which must not become a code that looks right
    half = tl.where(tl.max((x != x).to(tl.int32), 1) > 0, float("nan"), half)
    steps = tl.div_rn(x, tl.broadcast_to(half.to(tl.float32)[:, None], x.shape))
    codes = (tl.minimum(tl.maximum(steps, -127.0), 127.0) + ROUND) - ROUND
    return codes.to(tl.int8), half


@jit
def _commit_kernel(
    k_ptr, v_ptr, turns_ptr, mean_ptr, slots_ptr, kp_ptr, vp_ptr, ks_ptr, vs_ptr,
    stride_b, stride_n, stride_f, stride_s, tokens, heads, planes,
    D: tl.constexpr, PAIRS: tl.constexpr, CODED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    frame, plane = tl.program_id(1), tl.program_id(2)
    batch, head = plane // heads, plane % heads
    token = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    channels, pairs = tl.arange(0, D), tl.arange(0, D // 2)
    ok = (token < tokens)[:, None]
    source = batch.to(tl.int64) * stride_b + frame * stride_f + token * stride_s + head * stride_n
    k = tl.load(k_ptr + source[:, None] + channels[None, :], mask=ok, other=0.0).to(tl.float32)
    v = tl.load(v_ptr + source[:, None] + channels[None, :], mask=ok, other=0.0)
    if PAIRS > 0:
        spatial = pairs - (D // 2 - PAIRS)
        at = turns_ptr + 2 * (token[:, None] * PAIRS + spatial[None, :])
        turned = ok & (spatial >= 0)[None, :]
        k = turn(k, tl.load(at, mask=turned, other=1.0), tl.load(at + 1, mask=turned, other=0.0), BLOCK, D)
    target = (tl.load(slots_ptr + frame).to(tl.int64) * planes + plane) * tokens + token
    target_channels = target[:, None] * D + channels[None, :]
    if CODED:
        k_codes, k_half = _code(k - tl.load(mean_ptr + plane * D + channels)[None, :])
        v_codes, v_half = _code(v.to(tl.float32))
        tl.store(kp_ptr + target_channels, k_codes, mask=ok)
        tl.store(vp_ptr + target_channels, v_codes, mask=ok)
        tl.store(ks_ptr + target, k_half, mask=token < tokens)
        tl.store(vs_ptr + target, v_half, mask=token < tokens)
    else:
        # by way of k's own dtype, in which the reference turns
        tl.store(kp_ptr + target_channels, k.to(k_ptr.dtype.element_ty).to(kp_ptr.dtype.element_ty), mask=ok)
        tl.store(vp_ptr + target_channels, v.to(vp_ptr.dtype.element_ty), mask=ok)


@jit
def _decode_kernel(
    kp_ptr, vp_ptr, ks_ptr, vs_ptr, mean_ptr, slots_ptr, turns_ptr, k_ptr, v_ptr, tokens, pages, planes,
    D: tl.constexpr, PAIRS: tl.constexpr, CODED: tl.constexpr, PER_CHANNEL: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    page, plane = tl.program_id(1), tl.program_id(2)
    token = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    channels, pairs = tl.arange(0, D), tl.arange(0, D // 2)
    ok = (token < tokens)[:, None]
    slot = tl.load(slots_ptr + page).to(tl.int64) * planes + plane
    source = slot * tokens + token
    k = tl.load(kp_ptr + source[:, None] * D + channels[None, :], mask=ok, other=0).to(tl.float32)
    v = tl.load(vp_ptr + source[:, None] * D + channels[None, :], mask=ok, other=0).to(tl.float32)
    if CODED:
        k_scale = tl.load(ks_ptr + source, mask=token < tokens, other=0.0).to(tl.float32)
        k = k * k_scale[:, None] + tl.load(mean_ptr + plane * D + channels)[None, :]
        if PER_CHANNEL:
            v = v * tl.load(vs_ptr + slot * D + channels).to(tl.float32)[None, :]
        else:
            v = v * tl.load(vs_ptr + source, mask=token < tokens, other=0.0).to(tl.float32)[:, None]
    if PAIRS > 0:
        at = turns_ptr + 2 * (page * PAIRS + pairs)
        in_time = pairs < PAIRS
        cos, sin = tl.load(at, mask=in_time, other=1.0), tl.load(at + 1, mask=in_time, other=0.0)
        k = turn(k, cos[None, :], sin[None, :], BLOCK, D)
    target = ((plane.to(tl.int64) * pages + page) * tokens + token)[:, None] * D + channels[None, :]
    tl.store(k_ptr + target, k.to(k_ptr.dtype.element_ty), mask=ok)
    tl.store(v_ptr + target, v.to(v_ptr.dtype.element_ty), mask=ok)
