"""A few mean keys instead of one: what is nearest to a key is taken out of it before it is coded.

Residual coding with k-means centroids as in Quant VideoGen (arXiv 2602.02958), but with the centroids of the
first chunk, frozen like the one mean, for all pages: those of every page would take more bytes than its codes
where pages are small.
"""

from __future__ import annotations

import torch
from torch import Tensor

ROUNDS = 4
"""Of Lloyd's algorithm."""


def centroids_of(keys: Tensor, number: int) -> Tensor:
    """Centroids (…, number, d) float16 of keys (…, n, d); the same ones every time.

    The first is the mean, each further one at first the key that is farthest from those there are; then
    Lloyd's algorithm. One that is nearest to no key stays where it is.
    """
    found = keys.mean(-2, keepdim=True)
    while found.shape[-2] < number:
        farthest = torch.cdist(keys, found).amin(-1).argmax(-1)
        index = farthest[..., None, None].expand(*farthest.shape, 1, keys.shape[-1])
        found = torch.cat([found, keys.gather(-2, index)], -2)
    for _ in range(ROUNDS):
        # a product with ones and zeros: its sums do not depend on the order of threads
        mine = torch.nn.functional.one_hot(nearest(keys, found).long(), number).to(keys.dtype)
        count = mine.sum(-2)[..., None]
        found = torch.where(count > 0, mine.transpose(-1, -2) @ keys / count.clamp_min(1), found)
    return found.half()


def nearest(keys: Tensor, centroids: Tensor) -> Tensor:
    """Which centroid is nearest to every key, (…, n) uint8.

    Args:
        keys: (…, n, d).
        centroids: (…, number, d).
    """
    return torch.cdist(keys, centroids.to(keys.dtype)).argmin(-1).to(torch.uint8)


def taken_from(centroids: Tensor, index: Tensor) -> Tensor:
    """The centroid of every token, float32.

    Args:
        centroids: (batch, kv_heads, number, d).
        index: (batch, kv_heads, pages, tokens) uint8.

    Returns:
        (batch, kv_heads, pages, tokens, d).
    """
    flat = index.long().flatten(2)[..., None].expand(-1, -1, -1, centroids.shape[-1])
    return centroids.float().gather(2, flat).view(*index.shape, centroids.shape[-1])
