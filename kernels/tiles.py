"""How the fused read is cut: tiles that are known to be good, and the space that tuning searches."""

from __future__ import annotations

import torch

from vidkv.kernels.paged_attention import SMALLEST_TAIL, Tile

GOOD: dict[tuple[int, int], tuple[Tile, ...]] = {
    (80, 64): (Tile(128, 64, 8, 3), Tile(64, 64, 4, 3)),
    (80, 128): (Tile(128, 32, 8, 3), Tile(32, 64, 4, 3)),
    (90, 64): (Tile(128, 64, 8, 3), Tile(64, 64, 4, 3)),
    (90, 128): (Tile(128, 128, 8, 3), Tile(64, 64, 4, 3)),
    (100, 64): (Tile(128, 64, 8, 3), Tile(64, 64, 4, 3)),
    (100, 128): (Tile(128, 64, 8, 3), Tile(64, 64, 4, 3)),
}
"""By (compute capability times 10, head_dim), for 16-bit operands and many queries; the first revision of a
generation speaks for later ones that are not named. `vidkv bench kernels` shows that none of them spills.

Before sm_90 triton gives each warp rows of its own only where a tile has at least as many queries as a head
has channels; otherwise warps share rows, and softmax crosses them.
"""
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
    major, minor = capability
    known = GOOD.get((10 * major + minor, head_dim)) or GOOD.get((10 * major, head_dim))
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
