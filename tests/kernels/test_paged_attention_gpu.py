"""The fused read on a GPU: both kernels against float64, inside CUDA graphs, and beside poison."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from tests.tiny import relative_l2
from vidkv.cache import CacheGeometry, CacheSpec
from vidkv.dispatch import candidates, choose, full_window, hopper_obstacle
from vidkv.kernels.int8 import quantize
from vidkv.kernels.paged_attention import PageRun, Tile, attend_pages, attend_pages_reference
from vidkv.kernels.rope import temporal_phases
from vidkv.read_path import ReadPath

pytestmark = pytest.mark.gpu
PORTABLE, HOPPER, HOPPER_SPLIT = Tile(64, 64, 4, 3), Tile(64, 64, 4, 3, 1), Tile(64, 64, 4, 3, 2)
TILES = [PORTABLE, HOPPER, HOPPER_SPLIT]


def inputs(
    heads: int, kv_heads: int, queries: int, tokens: int, pages: int, own: int, batch: int, seed: int
) -> tuple[Tensor, Tensor, Tensor, PageRun]:
    """A problem at bfloat16 whose unused slots hold NaN scales and codes of 127."""
    g = torch.Generator("cuda").manual_seed(seed)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g, device="cuda")

    shape = (pages + 2, batch, kv_heads, tokens, 128)
    k, k_scale = quantize(random(*shape))
    v, v_scale = quantize(random(*shape))
    slots = torch.randperm(pages + 2, generator=g, device="cuda")[:pages]
    unused = [slot for slot in range(pages + 2) if slot not in slots.tolist()]
    k[unused], v[unused], k_scale[unused], v_scale[unused] = 127, 127, torch.nan, torch.nan
    temporal = temporal_phases(128, torch.arange(-pages, 0, device="cuda"))
    mean = 2 * random(batch, kv_heads, 128)
    run = PageRun({"k": k, "v": v, "k_scale": k_scale, "v_scale": v_scale}, slots, temporal, mean)
    q = random(batch, heads, queries, 128).bfloat16()
    return (
        q,
        random(batch, kv_heads, own, 128).bfloat16(),
        random(batch, kv_heads, own, 128).bfloat16(),
        run,
    )


def skip_unless_runs(tile: Tile) -> None:
    if tile.hopper_splits and torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("needs a GPU of compute capability 9.0")


@pytest.mark.parametrize("tile", TILES, ids=str)
@pytest.mark.parametrize(
    ("heads", "kv_heads", "queries", "tokens", "pages", "own", "batch"),
    [
        (1, 1, 128, 128, 2, 128, 1),
        (4, 2, 300, 328, 5, 200, 2),
        (2, 1, 70, 1560, 3, 70, 1),
        (2, 2, 129, 16, 7, 300, 1),
        (3, 3, 1, 8, 1, 1, 3),
    ],
)
class TestAgainstFloat64:
    def test_out_and_lse(
        self, tile: Tile, heads: int, kv_heads: int, queries: int, tokens: int, pages: int, own: int,
        batch: int,
    ) -> None:  # fmt: skip
        skip_unless_runs(tile)
        problem = inputs(heads, kv_heads, queries, tokens, pages, own, batch, seed=queries)
        out, lse, _ = attend_pages(*problem, None, tile)
        wanted, wanted_lse, _ = attend_pages_reference(*problem, None, exact_queries=False)
        assert relative_l2(out, wanted) <= 4e-3
        assert float((lse - wanted_lse).abs().max()) <= 1e-3
        exact, _, _ = attend_pages_reference(*problem, None)
        assert relative_l2(out, exact) <= 3e-2

    def test_again_is_bit_for_bit(
        self, tile: Tile, heads: int, kv_heads: int, queries: int, tokens: int, pages: int, own: int,
        batch: int,
    ) -> None:  # fmt: skip
        skip_unless_runs(tile)
        problem = inputs(heads, kv_heads, queries, tokens, pages, own, batch, seed=7)
        first, second = (attend_pages(*problem, None, tile)[0] for _ in range(2))
        assert torch.equal(first, second)


@pytest.mark.parametrize("tile", TILES, ids=str)
def test_captured_in_a_graph(tile: Tile) -> None:
    skip_unless_runs(tile)
    problem = inputs(2, 2, 256, 256, 4, 256, 1, seed=3)
    wanted = attend_pages(*problem, None, tile)[0]
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = attend_pages(*problem, None, tile)[0]
    out.fill_(torch.nan)
    graph.replay()
    assert torch.equal(out, wanted)


@pytest.mark.parametrize("tile", TILES, ids=str)
def test_compiled(tile: Tile) -> None:
    skip_unless_runs(tile)
    problem = inputs(2, 1, 256, 256, 4, 256, 1, seed=4)
    compiled = torch.compile(lambda q, k, v, run: attend_pages(q, k, v, run, None, tile)[0], fullgraph=True)
    assert torch.equal(compiled(*problem), attend_pages(*problem, None, tile)[0])


def test_the_choice_is_never_the_slower_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is one of the candidates, remembered, and all of them read the same window alike."""
    from vidkv.attention import CachedAttention

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    spec, device = CacheSpec(format="int8", window=9, sink=0), torch.device("cuda")
    geometry = CacheGeometry(1, 4, 128, 8, 16)
    paths = candidates(spec, geometry, device, torch.bfloat16)
    chosen = choose(spec, geometry, 4, device, torch.bfloat16)
    assert chosen in paths and (tmp_path / "vidkv" / "read_paths.json").is_file()
    assert choose(spec, geometry, 4, device, torch.bfloat16) == chosen
    with torch.no_grad():
        cache, qkv = full_window(spec, geometry, 4, device, torch.bfloat16)
        exact = CachedAttention(cache, ReadPath("reference")).layer(0)(*qkv)
        # the first tile asks for more shared memory than there is where a page is one tile
        for path in (path for path in paths if str(path) != "fused 128x128, 8 warps, 3 stages"):
            assert relative_l2(CachedAttention(cache, path).layer(0)(*qkv), exact) <= 2e-2
    if torch.cuda.get_device_capability() == (9, 0):
        assert hopper_obstacle(spec, geometry, device, torch.bfloat16) is None
