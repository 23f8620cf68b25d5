"""Which tokens of a page are worth keeping."""

from __future__ import annotations

from torch import Tensor


def most_different(k: Tensor, v: Tensor, anchor: Tensor, tokens: int) -> tuple[Tensor, Tensor]:
    """The tokens whose keys are least like the anchor's at the same place, in their own order.

    What stands still looks as it did at the start, and the sinks hold it already. Keys carry their row and
    column, so those that stay need no place beside them. Heads choose for themselves.

    Args:
        k, v: (batch, kv_heads, frames, all tokens, head_dim), k turned by row and column.
        anchor: (batch, kv_heads, all tokens, head_dim), likewise.
        tokens: how many stay of each frame.

    Returns:
        k, v: (batch, kv_heads, frames, tokens, head_dim).
    """
    distance = (k.float() - anchor[:, :, None].float()).square().sum(-1)
    chosen = distance.topk(tokens, -1).indices.sort(-1).values
    index = chosen[..., None].expand(*chosen.shape, k.shape[-1])
    return k.gather(3, index), v.gather(3, index)
