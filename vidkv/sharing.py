"""What rollouts of one device share: pools of pages, equal openings, and the text of equal prompts."""

from __future__ import annotations

import json
from collections import Counter, OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from hashlib import sha256
from typing import TYPE_CHECKING, Any
from weakref import WeakValueDictionary

import torch
from torch import Tensor

from vidkv.cache import CacheGeometry, CacheSpec
from vidkv.cache.pool import PagePool
from vidkv.cache.tiers import planned_pools
from vidkv.errors import InputError
from vidkv.models.lora import fingerprint
from vidkv.models.wan import Block, CausalWanTransformer3DModel, TextContext
from vidkv.models.weights import precision_of
from vidkv.rollout import Chunk, Rollout, Snapshot

if TYPE_CHECKING:
    from vidkv.pipeline import CausalVideoPipeline

OPENING_CHUNKS = 16
"""Chunks from a video's beginning on that are remembered: what comes later is hardly ever asked for twice."""

PoolSet = dict[str, PagePool]
"""Pools by name, as `KVCache` takes them."""


class Pools:
    """Pools of pages that rollouts share, one set for each kind of cache.

        pools = Pools()
        pipe.pools = pools      # what the pipeline starts from now on lies there

    A set lives as long as anything has a promise of room in it. It grows by a copy, so whoever knows how
    many caches there will be says so beforehand (`prepare`).
    """

    def __init__(self) -> None:
        self._sets: dict[_Kind, PoolSet] = {}

    @property
    def nbytes(self) -> int:
        """Bytes of all pools, used or not."""
        return self.nbytes_without({})

    def nbytes_without(self, promised: Mapping[PagePool, int]) -> int:
        """Likewise, once these promises are taken back."""
        self.trim()
        used = [pools for pools in self._sets.values() if _in_use(pools, promised)]
        return sum(pool.nbytes for pools in used for pool in pools.values())

    def of(
        self, spec: CacheSpec, geometry: CacheGeometry, device: torch.device | str, dtype: torch.dtype
    ) -> PoolSet | None:
        """The set for caches of this kind; made empty where there is none. None for a kind whose pages may
        leave the device: each has pools of its own."""
        if spec.device_gb:
            return None
        kind = kind_of(spec, geometry, device, dtype)
        self.trim(keep=kind)
        return self._sets.get(kind) or self.prepare(0, *kind)

    def prepare(
        self, caches: int, spec: CacheSpec, geometry: CacheGeometry, device: torch.device | str,
        dtype: torch.dtype, spare_bytes: int = 0,
    ) -> PoolSet:  # fmt: skip
        """Likewise, made with memory for so many caches at once, and for so many bytes of other pages."""
        self.trim()
        kind = kind_of(spec, geometry, device, dtype)
        if kind not in self._sets:
            made, planned = {}, planned_pools(spec, geometry, dtype)
            # what is remembered has pages in all of them
            page = sum(format.bytes_per_page() * geometry.layers for format, _ in planned.values())
            for name, (format, slots) in planned.items():
                made[name] = PagePool(format, slots * caches + spare_bytes // page, device)
                # nobody has been promised any of it yet
                made[name].cancel(made[name].slots)
            self._sets[kind] = made
        return self._sets[kind]

    def growth_bytes(
        self, caches: int, spec: CacheSpec, geometry: CacheGeometry, device: torch.device | str,
        dtype: torch.dtype, promised: Mapping[PagePool, int] | None = None,
    ) -> int:  # fmt: skip
        """Bytes that so many more caches of a kind allocate at most: nothing while there is room for them.

        A pool that grows is copied, and counts as a whole.

        Args:
            promised: promises that are taken back before.
        """
        if spec.device_gb:
            return 0
        self.trim()
        promised = promised or {}
        pools, total = self._sets.get(kind_of(spec, geometry, device, dtype), {}), 0
        if not _in_use(pools, promised):
            pools = {}
        for name, (format, slots) in planned_pools(spec, geometry, dtype).items():
            pool = pools.get(name)
            kept = pool.reserved - promised.get(pool, 0) if pool is not None else 0
            wanted = kept + slots * caches
            if wanted > (pool.slots if pool is not None else 0):
                total += wanted * format.bytes_per_page() * geometry.layers
        return total

    def trim(self, keep: _Kind | None = None) -> None:
        """Free sets in which nobody has room."""
        empty = [kind for kind, pools in self._sets.items() if kind != keep and not _in_use(pools, {})]
        for kind in empty:
            del self._sets[kind]


def _in_use(pools: PoolSet, promised: Mapping[PagePool, int]) -> bool:
    """Whether anybody has room in them but for these promises."""
    return any(pool.reserved > promised.get(pool, 0) for pool in pools.values())


_Kind = tuple[CacheSpec, CacheGeometry, str, torch.dtype]


def kind_of(
    spec: CacheSpec, geometry: CacheGeometry, device: torch.device | str, dtype: torch.dtype
) -> _Kind:
    """What caches have in common that may lie in one set of pools."""
    return spec, geometry, str(torch.device(device)), dtype


def pages_bytes(
    spec: CacheSpec, geometry: CacheGeometry, device: torch.device | str, dtype: torch.dtype
) -> int:
    """Bytes of one cache's pages in common pools; one that may leave the device has pools of its own."""
    if spec.device_gb:
        return 0
    pools = planned_pools(spec, geometry, dtype).values()
    return sum(format.bytes_per_page() * geometry.layers * slots for format, slots in pools)


class TextCache:
    """Cross-attention keys and values by prompt, for as long as any rollout reads them.

    What nobody reads is not kept: memory plans count one context for a rollout.
    """

    def __init__(self) -> None:
        self._contexts: WeakValueDictionary[str, TextContext] = WeakValueDictionary()

    def __len__(self) -> int:
        return len(self._contexts)

    def get(
        self, transformer: CausalWanTransformer3DModel, embeds: Tensor, make: Callable[[], TextContext]
    ) -> TextContext:
        """The context of prompt embeddings; rollouts of equal prompts get one and the same.

        Args:
            transformer: as it is now: other weights or adapters make other contexts.
            embeds: (b, text tokens, text_dim).
            make: computes it.
        """
        key = _digest([_network(transformer), str(embeds.device), _tensor_digest(embeds)])
        found = self._contexts.get(key)
        if found is None:
            found = self._contexts[key] = make()
        return found


class PrefixCache:
    """Openings of videos that were made, for videos that begin alike: computed once and stored once.

        pipe.pools, pipe.prefixes = Pools(), PrefixCache(4 * 10**9)

    After each of the first chunks of a video a snapshot is kept under a key of everything that its bits
    depend on: the networks, the cache, the size, schedule, seeds and noise, and chunk by chunk what was given
    and which prompt held (`Opening`). A video whose key is the same takes the snapshot over instead of making
    the chunk; pages are shared by reference and never copied. What was not used for longest goes first.

    Args:
        budget_bytes: of unique pages, latents, frames and decoder states.
        chunks: how many of a video's first are remembered.
        grow: let pools grow for what is remembered; else it is kept only where they have room already.

    Attributes:
        hits, misses: chunks that were taken over, and that were looked for in vain.
    """

    def __init__(self, budget_bytes: int, chunks: int = OPENING_CHUNKS, grow: bool = True) -> None:
        if budget_bytes < 0:
            raise InputError(
                f"budget_bytes={budget_bytes} of the prefix cache; give a number of bytes, 0 for none"
            )
        if chunks < 1:
            raise InputError(f"chunks={chunks} of the prefix cache; give at least 1")
        self.budget_bytes, self.chunks, self.grow = budget_bytes, chunks, grow
        self.hits = self.misses = 0
        self._kept: OrderedDict[str, Snapshot] = OrderedDict()
        self._promised: Counter[PagePool] = Counter()

    def __len__(self) -> int:
        return len(self._kept)

    def __contains__(self, key: str) -> bool:
        return key in self._kept

    @property
    def nbytes(self) -> int:
        """Bytes of what is kept, each page and each storage once."""
        return sum(self._page_bytes(pool) * count for pool, count in self._pages().items()) + sum(
            {
                tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes()
                for snapshot in self._kept.values()
                for tensor in snapshot.tensors()
                if tensor.numel()
            }.values()
        )

    @property
    def promised(self) -> Mapping[PagePool, int]:
        """Slots that pools have promised for what is kept."""
        return self._promised

    def take(self, key: str, rollout: Rollout) -> Chunk | None:
        """The chunk of that key, after which the rollout then stands; None if there is none."""
        found = self._kept.get(key)
        if found is None or not rollout.fits(found):
            self.misses += 1
            return None
        self._kept.move_to_end(key)
        self.hits += 1
        return rollout.take_over(found)

    def remember(self, key: str, rollout: Rollout, chunk: Chunk) -> None:
        """Keep a rollout as it is after the chunk that it has just made, as far as the budget goes."""
        if key in self._kept or chunk.index >= self.chunks or not self.budget_bytes:
            return
        self._kept[key] = rollout.snapshot(chunk)
        while self.nbytes > self.budget_bytes:
            self._drop(next(iter(self._kept)))
        while key in self._kept and (full := self._full_pool()) is not None:
            # the new one last, and then in vain
            self._drop(next(k for k, snapshot in self._kept.items() if full in _pools_of(snapshot)))

    def clear(self) -> None:
        """Forget everything, and give the room back."""
        for key in list(self._kept):
            self._drop(key)
        for pool, slots in self._promised.items():
            pool.cancel(slots)
        self._promised.clear()

    def _drop(self, key: str) -> None:
        self._kept.pop(key).close()

    def _pages(self) -> Counter[PagePool]:
        """How many pages are kept in each pool."""
        places = set[tuple[PagePool, int]]().union(
            *(cache.places() for snapshot in self._kept.values() for cache in snapshot.caches)
        )
        return Counter(pool for pool, _ in places)

    def _full_pool(self) -> PagePool | None:
        """A pool without room for what is kept in it: a cache overwrites elsewhere what it shares."""
        return next((pool for pool, count in self._pages().items() if not self._reserve(pool, count)), None)

    def _reserve(self, pool: PagePool, count: int) -> bool:
        """Whether a pool has promised so many slots; it is asked for more where it has to be."""
        short = count - self._promised[pool]
        if short > pool.slots - pool.reserved:
            if not self.grow:
                return False
            # half as many again, because each time the pool is copied
            short = max(short, min(count // 2, self.budget_bytes // self._page_bytes(pool) - count))
        if short > 0:
            try:
                pool.reserve(short)
            except torch.OutOfMemoryError:
                pool.cancel(short)
                return False
            self._promised[pool] += short
        return True

    @staticmethod
    def _page_bytes(pool: PagePool) -> int:
        """Of one latent frame over all layers."""
        return pool.format.bytes_per_page() * pool.format.geometry.layers


def _pools_of(snapshot: Snapshot) -> set[PagePool]:
    return {pool for cache in snapshot.caches for pool, _ in cache.places()}


class Opening:
    """The key of a video's next chunk while it is made from its beginning.

    Args:
        pipe: whose networks make it.
        rollout: before its first chunk.
    """

    def __init__(self, pipe: CausalVideoPipeline, rollout: Rollout) -> None:
        self._texts: dict[int, tuple[TextContext, str]] = {}
        self.key = _digest(identity(pipe, rollout))

    def advance(self, rollout: Rollout, **given: Any) -> str:
        """The key of the chunk that comes next; those after it depend on it.

        Args:
            given: what else it depends on, by name: tensors, strings, numbers or None.
        """
        described = {name: _tensor_digest(v) if isinstance(v, Tensor) else v for name, v in given.items()}
        transition = rollout.transition
        self.key = _digest(
            {
                "before": self.key,
                "chunk": rollout.chunk,
                "start": rollout.next_frame,
                "frames": rollout.next_chunk_frames,
                "text": self._text(rollout.text),
                "negative": self._text(rollout.negative),
                "transition": transition
                and [_tensor_digest(transition.before), self._text(transition.after), transition.chunks,
                     transition.done],
                "given": described,
            }
        )  # fmt: skip
        return self.key

    def _text(self, text: TextContext | None) -> str | None:
        """A context's digest, computed once while it is the same object."""
        if text is None:
            return None
        known = self._texts.get(id(text))
        if known is None or known[0] is not text:
            # that of a prompt that is no longer shown is not needed again
            self._texts = dict(list(self._texts.items())[-3:])
            self._texts[id(text)] = known = text, text_digest(text)
        return known[1]


def identity(pipe: CausalVideoPipeline, rollout: Rollout) -> dict[str, Any]:
    """Everything that a video's bits depend on from its beginning, but for prompts and what is given."""
    noise, source = rollout.noise.state()
    transformer = rollout.transformer
    compiled = any(block.halves != (Block.before, Block.after) for block in transformer._blocks())
    return {
        "model": _network(transformer),
        "compiled": compiled,
        "decoder": rollout.decoder and [type(rollout.decoder).__name__, _network(pipe.vae)],
        "tiling": asdict(pipe.tiling),
        "spec": rollout.cache.spec.model_dump(),
        "geometry": asdict(rollout.cache.geometry),
        "latent_size": list(rollout.latent_size),
        "chunk_frames": [rollout.first_chunk_frames, rollout.chunk_frames],
        "dtype": str(rollout.dtype),
        "device": str(rollout.device),
        "path": rollout.path.as_dict(),
        "graphs": rollout.recorded,
        "schedule": asdict(rollout.schedule),
        "seeds": list(rollout.seeds),
        "noise": [type(rollout.noise).__name__, source, {k: _tensor_digest(t) for k, t in noise.items()}],
        "context": [rollout.recompute_context, rollout.context_encoder is not None],
        "arithmetic": [torch.__version__, torch.get_num_threads(), torch.get_float32_matmul_precision()],
    }


def _network(network: Any) -> list[Any]:
    """A network as it is now: the object, its weights, and how often they were written to."""
    versions = sum(parameter._version for parameter in network.parameters())
    return [id(network), fingerprint(network), precision_of(network), str(network.dtype), versions]


def text_digest(text: TextContext) -> str:
    """Of the embeddings that a context was computed from, or of itself where they are not known."""
    parts = [text.embeds] if text.embeds is not None else [*text.keys, *text.values]
    return _digest([_tensor_digest(part) for part in (*parts, text.mask)])


def _tensor_digest(tensor: Tensor | None) -> str | None:
    if tensor is None:
        return None
    plain = tensor.detach().cpu().contiguous()
    about = f"{plain.dtype} {tuple(plain.shape)} ".encode()
    return sha256(about + plain.flatten().view(torch.uint8).numpy().tobytes()).hexdigest()


def _digest(value: Mapping[str, Any] | Sequence[Any]) -> str:
    return sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()
