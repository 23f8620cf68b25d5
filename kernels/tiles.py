"""How the fused read is cut: tiles that are known to be good, and the space that tuning searches."""

from __future__ import annotations

import torch

from vidkv.kernels.paged_attention import SMALLEST_TAIL, Tile

GOOD: dict[tuple[int, int], tuple[Tile, ...]] = {
    (8, 64): (Tile(128, 64, 4, 3), Tile(64, 64, 4, 3)),
    (8, 128): (Tile(64, 64, 4, 2), Tile(64, 32, 4, 3)),
    (9, 64): (Tile(128, 64, 8, 3), Tile(64, 64, 4, 3)),
    (9, 128): (Tile(128, 128, 8, 3), Tile(64, 64, 4, 3)),
}
"""By (major compute capability, head_dim), for 16-bit operands and many queries."""
SPACE = (
    *(Tile(128, keys, 8, stages) for keys in (64, 128) for stages in (2, 3)),
    *(Tile(64, keys, 4, stages) for keys in (32, 64) for stages in (2, 3)),
    Tile(128, 64, 4, 3),
)
SMALL = Tile(32, 32, 4, 2)
"""Runs everywhere, at every precision."""


def good_tiles(
    capability: tuple[int, int], head_dim: int, queries: int, tokens: int, dtype: torch.dtype
) -> list[Tile]:
    """Tiles to start with; the whole space on an architecture that the table does not know.

    Args:
        queries: of one chunk.
        tokens: per page.
    """
    if dtype == torch.float32:
        return [SMALL]
    known = GOOD.get((capability[0], head_dim))
    if known is None:
        return tile_space(capability, head_dim, queries, tokens, dtype)
    return _fitted(known, queries, tokens)


def tile_space(
    capability: tuple[int, int], head_dim: int, queries: int, tokens: int, dtype: torch.dtype
) -> list[Tile]:
    """Every tile worth measuring. Arguments as for `good_tiles`."""
    if dtype == torch.float32:
        return [SMALL, Tile(16, 32, 4, 2)]
    return _fitted((*SPACE, SMALL), queries, tokens)


def _fitted(tiles: tuple[Tile, ...], queries: int, tokens: int) -> list[Tile]:
    """Tiles no larger than a small chunk and its pages need, each once."""
    rows = max(16, 1 << (queries - 1).bit_length())
    columns = max(SMALLEST_TAIL, 1 << (tokens - 1).bit_length())
    fitted: dict[Tile, None] = {}
    for tile in tiles:
        m, n = min(tile.queries, rows), min(tile.keys, columns)
        fitted[Tile(m, n, tile.warps if m == tile.queries else 4, tile.stages)] = None
    return list(fitted)
