"""What a cache holds between two chunks, kept without a cache: its pages are shared, not copied."""

from __future__ import annotations

import copy
import weakref
from collections.abc import Iterator

from torch import Tensor

from vidkv.cache.kv_cache import KVCache, Page, State
from vidkv.cache.pool import PagePool
from vidkv.errors import CacheStateError


class CacheSnapshot:
    """The pages of one moment, held until it is closed or dropped.

    It reserves no room: whoever keeps snapshots beside caches has to (`PagePool.reserve`), a slot for every
    page that no other snapshot holds, because a cache that moves on needs a slot for what it overwrites.

    Args:
        cache: between two chunks.

    Attributes:
        table: its pages by latent frame.
        pools: where they lie.
    """

    def __init__(self, cache: KVCache) -> None:
        if cache.state is not State.IDLE:
            raise CacheStateError(f"the cache is {cache.state.value}, a snapshot needs it idle")
        self.spec, self.geometry, self.pools = cache.spec, cache.geometry, cache.pools
        self.layout, self.table = cache.layout.copy(), dict(cache.table)
        self.means = {name: mean.clone() for name, mean in cache.means.items()}
        self.evidence = copy.deepcopy(cache.evidence)
        self._mean_frozen, self._serial = cache._mean_frozen, cache._serial
        for page in self.table.values():
            self.pools[page.pool].retain(page.slot)
        self.close = weakref.finalize(self, _release, self.pools, self.table)
        self.close.atexit = False

    def places(self) -> set[tuple[PagePool, int]]:
        """Pool and slot of every page."""
        return {(self.pools[page.pool], page.slot) for page in self.table.values()}

    def tensors(self) -> Iterator[Tensor]:
        """What it keeps beside pages."""
        yield from self.means.values()
        if self.evidence:
            yield from (self.evidence.keys, self.evidence.queries)

    def fits(self, cache: KVCache) -> bool:
        """Whether `give` can make that cache this one: the same kind, on the same pools."""
        same = cache.spec == self.spec and cache.geometry == self.geometry and cache.pools is self.pools
        return same and cache.state is State.IDLE and self.close.alive

    def give(self, cache: KVCache) -> None:
        """Let a cache stand where the snapshot was taken; its own pages go, these are shared from now on.

        Raises:
            CacheStateError: it is of another kind, lies in other pools, or is in the middle of a chunk.
        """
        if not self.fits(cache):
            raise CacheStateError("a snapshot goes back into an idle cache of its own kind and pools only")
        # first: pages that both hold must not be free in between
        for page in self.table.values():
            self.pools[page.pool].retain(page.slot)
        _release(cache.pools, cache.table)
        cache.table.update(self.table)
        cache.layout = self.layout.copy()
        for name, mean in self.means.items():
            cache.means[name].copy_(mean)
        cache.evidence = copy.deepcopy(self.evidence)
        cache._mean_frozen, cache._serial = self._mean_frozen, self._serial


def _release(pools: dict[str, PagePool], table: dict[int, Page]) -> None:
    for page in table.values():
        pools[page.pool].release(page.slot)
    table.clear()
