"""Which tokens of a page are worth keeping."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from vidkv.kernels.rope import rotate_first

SAMPLED_QUERIES = 64
"""Of every head, by which attention mass is measured."""


def sampled(queries: int, device: torch.device) -> Tensor:
    """Which queries of a chunk speak for all: evenly spaced, the same ones every time, int64."""
    number = min(SAMPLED_QUERIES, queries)
    return torch.arange(number, device=device) * queries // number


def attention_mass(k: Tensor, phases: Tensor, q: Tensor, lse: Tensor) -> Tensor:
    """What every token gets of the attention of some queries: the sum over them of exp(q·k / sqrt(d) - lse).

    Args:
        k: (batch, kv_heads, frames, tokens, head_dim), turned by row and column.
        phases: frame phases (frames, time pairs) by which the queries see them.
        q: (batch, heads, queries, head_dim), turned, the heads of one kv head side by side.
        lse: (batch, heads, queries), log-sum-exp of their scores over all that they read.

    Returns:
        (batch, kv_heads, frames, tokens) float32.
    """
    b, kv_heads, frames, tokens, d = k.shape
    keys = rotate_first(k.float(), phases[:, None]).flatten(2, 3)
    asked, total = q.float().reshape(b, kv_heads, -1, d), lse.float().reshape(b, kv_heads, -1, 1)
    scores = asked @ keys.transpose(-1, -2) / math.sqrt(d)
    return (scores - total).exp().sum(2).view(b, kv_heads, frames, tokens)


def difference(k: Tensor, anchor: Tensor) -> Tensor:
    """How far every token's key is from the anchor's at the same place, squared.

    What stands still looks as it did at the start, and the sinks hold it already.

    Args:
        k: (batch, kv_heads, frames, tokens, head_dim), turned by row and column.
        anchor: (batch, kv_heads, tokens, head_dim), likewise.

    Returns:
        (batch, kv_heads, frames, tokens) float32.
    """
    return (k.float() - anchor[:, :, None].float()).square().sum(-1)


def largest(k: Tensor, v: Tensor, scores: Tensor, tokens: int) -> tuple[Tensor, Tensor]:
    """The tokens with the largest scores, in their own order; heads choose for themselves.

    Keys carry their row and column, so those that stay need no place beside them.

    Args:
        k, v: (batch, kv_heads, frames, all tokens, head_dim).
        scores: (batch, kv_heads, frames, all tokens).
        tokens: how many stay of each frame.

    Returns:
        k, v: (batch, kv_heads, frames, tokens, head_dim).
    """
    chosen = scores.topk(tokens, -1).indices.sort(-1).values
    index = chosen[..., None].expand(*chosen.shape, k.shape[-1])
    return k.gather(3, index), v.gather(3, index)
