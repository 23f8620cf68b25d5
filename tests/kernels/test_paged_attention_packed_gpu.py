"""The fused read of packed pages on a GPU: both kernels against float64, and inside CUDA graphs."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.kernels.packed_read_cases import Case, assert_reads
from vidkv.kernels.paged_attention import Tile

pytestmark = pytest.mark.gpu
TILES = {
    "portable": Tile(64, 64, 4, 3), "hopper": Tile(64, 64, 4, 3, 1), "split": Tile(64, 64, 4, 3, 2),
}  # fmt: skip
ROUNDED = 1e-2
"""rel-L2 with queries rounded as the kernel rounds them, but for the digits of its matrix units."""
SHAPES = {
    "one kind": {},
    "beside codes": {"coded": True, "heads": 4, "batch": 2, "tokens": 328, "queries": 300, "own": 200},
    "beside plain pages": {"plain": True, "tokens": 16, "queries": 129, "own": 300},
    "long": {"coded": True, "heads": 2, "kv_heads": 1, "tokens": 1560, "queries": 70, "own": 70},
    "one query": {"coded": True, "queries": 1, "tokens": 8, "own": 1, "heads": 3, "kv_heads": 3, "batch": 3},
}


def case_on(name: str, **changes: object) -> Case:
    tile = TILES[name]
    if tile.hopper_splits and torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("needs a GPU of compute capability 9.0")
    settings: dict[str, Any] = {
        "d": 128, "queries": 128, "own": 128, "tokens": 128, "offsets": (-9, -5, -2), "dtype": torch.bfloat16,
        "page_lse": not tile.hopper_splits, "device": "cuda", "tile": tile,
    }  # fmt: skip
    return Case(**(settings | changes))


@pytest.mark.parametrize("tile", TILES)
@pytest.mark.parametrize("shape", SHAPES)
def test_against_float64(shape: str, tile: str) -> None:
    case = case_on(tile, **SHAPES[shape])
    assert_reads(case, ROUNDED)
    assert all(torch.equal(x, y) for x, y in zip(case.attend(), case.attend(), strict=True))


@pytest.mark.parametrize(
    "changes",
    [
        {"turned": False},
        {"per_channel": True, "coded": True},
        {"d": 64, "dtype": torch.float16, "tokens": 70},
        {"d": 32, "dtype": torch.float16, "tokens": 33},
        {"d": 256, "tile": Tile(32, 32, 4, 2)},
    ],
    ids=str,
)
def test_settings(changes: dict[str, object]) -> None:
    assert_reads(case_on("portable", **changes), ROUNDED)


@pytest.mark.parametrize("tile", ["portable", "split"])
def test_captured_in_a_graph(tile: str) -> None:
    case = case_on(tile, coded=True)
    wanted = case.attend()[0]
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = case.attend()[0]
    out.fill_(torch.nan)
    graph.replay()
    assert torch.equal(out, wanted)
