"""Pages of one moment outlive the cache that wrote them, unchanged, and go back when nobody holds them."""

from __future__ import annotations

import gc

import pytest
import torch

from tests.tiny import build_rollout, build_text, build_transformer
from vidkv.cache.kv_cache import KVCache
from vidkv.cache.snapshot import CacheSnapshot
from vidkv.errors import CacheStateError
from vidkv.rollout import Rollout

MODEL = build_transformer()
TEXT = build_text(MODEL)
INT8 = "int8,window=9,sink=2,keep_newest,keep_sinks"


def rollout_after(chunks: int, spec: str = INT8) -> Rollout:
    rollout = build_rollout(spec, transformer=MODEL, text=TEXT)
    for _ in range(chunks):
        rollout.step_chunk()
    return rollout


def fresh(cache: KVCache) -> KVCache:
    return KVCache(cache.spec, cache.geometry, cache.device, cache.dtype, cache.pools)


def held(cache: KVCache) -> int:
    return sum(sum(pool.references) for pool in cache.pools.values())


SELECTED = "int4,hadamard=false,keyframe,window=14,sink=2,select=9,policy=h2o"


@pytest.mark.parametrize("spec", ["fp32,window=9,sink=2", INT8, SELECTED])
def test_a_cache_stands_where_it_was_taken(spec: str) -> None:
    """After the other has moved on over all of its pages, as far as there was room promised."""
    rollout = rollout_after(3, spec)
    cache = rollout.cache
    for name, pool in cache.pools.items():
        pool.reserve(sum(page.pool == name for page in cache.table.values()))
    snapshot = CacheSnapshot(cache)
    wanted, header = cache.state_tensors()
    for _ in range(4):
        rollout.step_chunk()
    other = fresh(cache)
    snapshot.give(other)
    tensors, again = other.state_tensors()
    assert again == header and tensors.keys() == wanted.keys()
    assert all(torch.equal(tensors[name], wanted[name]) for name in wanted)
    other.check_integrity()
    # given once more, over pages of its own
    snapshot.give(other)
    other.check_integrity()
    assert all(torch.equal(t, wanted[name]) for name, t in other.state_tensors()[0].items())


@pytest.mark.parametrize("way", ["close", "drop"])
def test_gives_its_pages_back(way: str) -> None:
    cache = rollout_after(3).cache
    before = held(cache)
    snapshot = CacheSnapshot(cache)
    assert held(cache) == 2 * before == 2 * len(snapshot.places())
    if way == "close":
        snapshot.close(), snapshot.close()
        assert not snapshot.fits(cache)
    del snapshot
    gc.collect()
    assert held(cache) == before


def test_is_for_its_own_kind_and_pools() -> None:
    rollout = rollout_after(2)
    cache = rollout.cache
    snapshot = CacheSnapshot(cache)
    elsewhere = KVCache(cache.spec, cache.geometry, cache.device, cache.dtype)
    wider = cache.spec.model_copy(update={"window": 10})
    other = KVCache(wider, cache.geometry, cache.device, cache.dtype, cache.pools)
    opened = fresh(cache)
    opened.begin(3)
    for unfit in (elsewhere, other, opened):
        before = held(cache)
        with pytest.raises(CacheStateError, match="its own kind and pools"):
            snapshot.give(unfit)
        assert held(cache) == before and not unfit.table
    with pytest.raises(CacheStateError, match="is open"):
        CacheSnapshot(opened)
