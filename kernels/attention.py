"""Attention over segments: partial results with their log-sum-exp, and the exact merge of two.

Layout here is that of torch's SDPA: (batch, heads, tokens, head_dim). Key/value heads may be fewer than
query heads (GQA, MQA).
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from vidkv.kernels.jit import jit, tl, triton, usable


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    """softmax(q kᵀ / sqrt(d)) v with torch's SDPA; mask is boolean, True where a key may be read."""
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=q.shape[1] != k.shape[1])


def attend_reference(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Attention and log-sum-exp in plain torch, at the inputs' precision; the truth for the others.

    Returns:
        out (batch, heads, queries, head_dim) and lse (batch, heads, queries), natural logarithm.
    """
    k, v = repeat_heads(q, k, v)
    scores = q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])
    lse = scores.logsumexp(-1)
    return (scores - lse[..., None]).exp() @ v, lse


def attend_with_lse(q: Tensor, k: Tensor, v: Tensor, backend: str = "auto") -> tuple[Tensor, Tensor]:
    """Attention and log-sum-exp through one of torch's fused SDPA operators.

    The operators behind `scaled_dot_product_attention` compute the log-sum-exp anyway; torch exposes it
    only on the operators themselves.

    Args:
        backend: of `sdpa_backends`; `auto` is the first of them.

    Returns:
        As `attend_reference`, with out in q's dtype and lse in float32 or wider.
    """
    if backend == "auto":
        backend = sdpa_backends(q.device, q.dtype, q.shape[-1])[0]
    k, v = repeat_heads(q, k, v)
    if backend == "cpu":
        out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v)
        return out, lse
    if backend == "cudnn":
        out, lse, *_ = torch.ops.aten._scaled_dot_product_cudnn_attention(q, k, v, None, True)
        return out, lse[..., 0]
    if backend == "flash":
        out, lse, *_ = torch.ops.aten._scaled_dot_product_flash_attention(q, k, v)
        return out, lse[..., : q.shape[2]]
    wide = torch.promote_types(q.dtype, torch.float32)
    out, lse = attend_reference(q.to(wide), k.to(wide), v.to(wide))
    return out.to(q.dtype), lse


def sdpa_backends(device: torch.device, dtype: torch.dtype, head_dim: int) -> tuple[str, ...]:
    """Operators that return the log-sum-exp for these inputs, the likely fastest first.

    `cpu` is torch's flash attention there; `math` is the reference and takes anything.
    """
    if dtype != torch.float64 and device.type == "cpu":
        return ("cpu",)
    if device.type != "cuda" or dtype not in (torch.float16, torch.bfloat16) or head_dim % 8:
        return ("math",)
    # cuDNN's is tuned for Hopper and later, and made for at most 128 channels
    if torch.cuda.get_device_capability(device)[0] >= 9 and head_dim <= 128:
        return ("cudnn", "flash")
    return ("flash",)


def merge(out: Tensor, lse: Tensor, more: Tensor, more_lse: Tensor) -> tuple[Tensor, Tensor]:
    """Attention over the union of two disjoint key sets from the attention over each. Exact.

    out, more: (batch, heads, queries, head_dim); lse, more_lse: (batch, heads, queries) in the dtype of
    out, float32 or wider.
    """
    if out.is_cuda and out.dtype == torch.float32 and usable(out):
        return merge_kernel(out, lse, more, more_lse)
    return merge_reference(out, lse, more, more_lse)


def merge_reference(out: Tensor, lse: Tensor, more: Tensor, more_lse: Tensor) -> tuple[Tensor, Tensor]:
    """`merge` in plain torch."""
    total = torch.logaddexp(lse, more_lse)
    weight = (more_lse - total).exp()[..., None]
    return torch.lerp(out, more.to(out.dtype), weight), total


@torch.library.custom_op("vidkv::merge", mutates_args=())
def merge_kernel(out: Tensor, lse: Tensor, more: Tensor, more_lse: Tensor) -> tuple[Tensor, Tensor]:
    """`merge` in one launch, float32 inside; out, here also a 16-bit one, gives the result's dtype."""
    out, lse, more, more_lse = (x.contiguous() for x in (out, lse, more, more_lse))
    merged, total = torch.empty_like(out), torch.empty_like(lse)
    rows, d = lse.numel(), out.shape[-1]
    block = 16
    _merge_kernel[(triton.cdiv(rows, block),)](
        out, lse, more, more_lse, merged, total, rows, d,
        D=triton.next_power_of_2(d), BLOCK=block, num_warps=4,
    )  # fmt: skip
    return merged, total


@merge_kernel.register_fake
def _(out: Tensor, lse: Tensor, more: Tensor, more_lse: Tensor) -> tuple[Tensor, Tensor]:
    return torch.empty_like(out, memory_format=torch.contiguous_format), torch.empty_like(lse)


@jit
def _merge_kernel(
    out_ptr, lse_ptr, more_ptr, more_lse_ptr, merged_ptr, total_ptr, rows, d,
    D: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    channel = tl.arange(0, D)
    ok = row < rows
    at, in_row = row[:, None] * d + channel[None, :], ok[:, None] & (channel < d)[None, :]
    lse, more_lse = (
        tl.load(lse_ptr + row, mask=ok, other=0.0),
        tl.load(more_lse_ptr + row, mask=ok, other=0.0),
    )
    top = tl.maximum(lse, more_lse)
    total = top + tl.log(tl.exp(lse - top) + tl.exp(more_lse - top))
    out = tl.load(out_ptr + at, mask=in_row, other=0.0).to(tl.float32)
    more = tl.load(more_ptr + at, mask=in_row, other=0.0).to(tl.float32)
    merged = out + tl.exp(more_lse - total)[:, None] * (more - out)
    tl.store(merged_ptr + at, merged.to(merged_ptr.dtype.element_ty), mask=in_row)
    tl.store(total_ptr + row, total, mask=ok)


def repeat_heads(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Key/value heads repeated to the number of query heads."""
    groups = q.shape[1] // k.shape[1]
    if groups == 1:
        return k, v
    return k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
