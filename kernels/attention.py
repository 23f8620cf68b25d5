"""Attention over segments: partial results with their log-sum-exp, and the exact merge of two.

Layout here is that of torch's SDPA: (batch, heads, tokens, head_dim). Key/value heads may be fewer than
query heads (GQA, MQA).
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor


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


def attend_with_lse(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Attention and log-sum-exp through the fused SDPA operator of q's device.

    The operators behind `scaled_dot_product_attention` compute the log-sum-exp anyway; torch exposes it
    only on the operators themselves. Where none applies (float64, an unusual head size) the reference
    runs. Returns as `attend_reference`, with out in q's dtype and lse in float32 or wider.
    """
    k, v = repeat_heads(q, k, v)
    if q.dtype != torch.float64 and q.device.type == "cpu":
        out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v)
        return out, lse
    if q.dtype in (torch.float16, torch.bfloat16) and q.device.type == "cuda" and q.shape[-1] % 8 == 0:
        out, lse, *_ = torch.ops.aten._scaled_dot_product_flash_attention(q, k, v)
        return out, lse[..., : q.shape[2]]
    wide = torch.promote_types(q.dtype, torch.float32)
    out, lse = attend_reference(q.to(wide), k.to(wide), v.to(wide))
    return out.to(q.dtype), lse


def merge(out: Tensor, lse: Tensor, more: Tensor, more_lse: Tensor) -> tuple[Tensor, Tensor]:
    """Attention over the union of two disjoint key sets from the attention over each. Exact.

    out, more: (batch, heads, queries, head_dim); lse, more_lse: (batch, heads, queries) in the dtype of
    out, float32 or wider.
    """
    total = torch.logaddexp(lse, more_lse)
    weight = (more_lse - total).exp()[..., None]
    return torch.lerp(out, more.to(out.dtype), weight), total


def repeat_heads(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Key/value heads repeated to the number of query heads."""
    groups = q.shape[1] // k.shape[1]
    if groups == 1:
        return k, v
    return k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
