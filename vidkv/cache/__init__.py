"""The KV cache: immutable pages of one latent frame of one layer, in fixed slots of a pool."""

from vidkv.cache.kv_cache import KVCache, planned_bytes
from vidkv.cache.layout import Layout
from vidkv.cache.spec import CacheGeometry, CacheSpec

__all__ = ["CacheGeometry", "CacheSpec", "KVCache", "Layout", "planned_bytes"]
