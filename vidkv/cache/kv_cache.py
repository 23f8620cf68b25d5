"""The chunked temporal KV cache of one rollout."""

from __future__ import annotations

import copy
import math
import weakref
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from enum import Enum
from itertools import groupby
from typing import Any

import torch
from torch import Tensor

from vidkv.cache.centroids import centroids_of
from vidkv.cache.evidence import Evidence, evidence_bytes
from vidkv.cache.formats.base import PageFormat
from vidkv.cache.layout import Layout, OpenChunk
from vidkv.cache.offload import OffloadedPool, planned_places
from vidkv.cache.pool import PagePool, Target
from vidkv.cache.prune import attention_mass, difference, largest
from vidkv.cache.saved import check_tensor, entry, whole_numbers
from vidkv.cache.spec import CacheGeometry, CacheSpec
from vidkv.cache.tiers import history_heads, planned_means, planned_pools, planned_tiers
from vidkv.errors import CacheSpecError, CacheStateError, StateError
from vidkv.kernels.paged_attention import PageRun
from vidkv.kernels.rope import rotate_last, temporal_phases


class State(Enum):
    """What a cache is in the middle of."""

    IDLE = "idle"
    OPEN = "open"
    COMMITTING = "committing"
    BROKEN = "broken"
    CLOSED = "closed"


@dataclass(frozen=True)
class Page:
    """Where one latent frame lies.

    Attributes:
        pool: `pages` or `full`.
        slot: its slot there.
        serial: of this cache's pages written so far; two of its pages of one serial have the same bytes.
    """

    pool: str
    slot: int
    serial: int


@dataclass(frozen=True)
class Run:
    """Pages of one pool in position order.

    Attributes:
        pool: its name.
        slots: (pages,) int64 on the cache's device: where they lie in the buffers that are read.
        offsets: (pages,) frames from the open chunk's first frame, negative, likewise.
        frames: which latent frames they are.
        waiting: if they have no place on the device, their places on the host.
    """

    pool: str
    slots: Tensor
    offsets: Tensor
    frames: tuple[int, ...]
    waiting: tuple[int, ...] = ()

    def pages(self) -> list[Run]:
        """Each page as a run of its own."""
        runs = []
        for i in range(len(self.frames)):
            one = slice(i, i + 1)
            slots = self.slots[:1] if self.waiting else self.slots[one]
            runs.append(Run(self.pool, slots, self.offsets[one], self.frames[one], self.waiting[one]))
        return runs


Segment = tuple[Run, ...]
"""What a two-pass read brings into scratch together, in position order."""


def planned_bytes(spec: CacheSpec, geometry: CacheGeometry, dtype: torch.dtype = torch.bfloat16) -> int:
    """Bytes of a cache on its device: pools, what passes through, key means and what a selection goes by."""
    pools = planned_pools(spec, geometry, dtype)
    places = planned_places(spec, geometry, dtype)
    means = sum(
        math.prod(shape) * kind.itemsize for shape, kind in planned_means(spec, geometry, pools).values()
    )
    pages = 0
    for name, (format, slots) in pools.items():
        layer, layers = format.bytes_per_page(), geometry.layers
        if places is not None and name == "pages":
            pages += layer * (layers * places.device + 2 * places.staged)
        else:
            pages += layer * layers * slots
    return pages + means + evidence_bytes(spec, geometry)


class KVCache:
    """Pages of the frames that later chunks may read, and the rules by which they change.

        cache.begin(3)                      # idle -> open: fixes what this chunk reads
        …denoising steps read…
        with cache.committing():            # open -> committing -> idle
            …the clean pass reads each layer, then writes it…

    A page is written once, by the clean pass, and never changed. Slots of frames that leave are reused:
    each layer is written after it has been read, so the pool holds `window - chunk` frames and no more.
    An exception inside `committing` leaves the cache broken, because some layers may hold the new chunk
    and others not; `restore` is the way back.

    Pages and the room reserved for them go back to the pools on `close`, or when the cache is dropped.

    Args:
        spec: settings.
        geometry: page sizes.
        dtype: compute dtype: what reads return and 16-bit pages hold.
        pools: pools of another cache to share, in which room is reserved; by default the cache allocates
            its own.

    Attributes:
        heads: by layer, int64 on its device: the kv heads that keep pages, and the others; None if all do.
    """

    def __init__(
        self,
        spec: CacheSpec,
        geometry: CacheGeometry,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
        pools: dict[str, PagePool] | None = None,
    ) -> None:
        self.spec, self.geometry, self.device, self.dtype = spec, geometry, torch.device(device), dtype
        self.layout = Layout(spec, geometry.chunk_frames)
        self._kept_heads = history_heads(spec, geometry)
        self.heads: list[tuple[Tensor, Tensor]] | None = None
        if self._kept_heads:
            self.heads = [self._parted(kept) for kept in self._kept_heads]
        self.tiers = planned_tiers(spec, geometry, dtype)
        self.plan = {tier.name: (tier.format, tier.slots) for tier in reversed(self.tiers)}
        if pools is None:
            pools = self._own_pools()
        else:
            for name, (_, slots) in self.plan.items():
                pools[name].reserve(slots)
        self.pools = pools
        self.table: dict[int, Page] = {}
        room = {name: slots for name, (_, slots) in self.plan.items()}
        self._owner = object()
        self._give_back = weakref.finalize(self, _give_back, self.pools, self.table, room, self._owner)
        self._give_back.atexit = False
        self.state = State.IDLE
        self.opened: OpenChunk | None = None
        self.segments: tuple[Segment, ...] = ()
        self.history: tuple[Run, ...] = ()
        self.means = {
            name: torch.zeros(shape, dtype=kind, device=device)
            for name, (shape, kind) in planned_means(spec, geometry, self.plan).items()
        }
        self.evidence = Evidence(spec, geometry, self.device) if spec.select else None
        self._mean_frozen = False
        self._serial = 0
        self._commit: _Commit | None = None
        self.pages_read = 0
        self.lossy_pages_read = 0
        self.sampled_scores = 0

    def _parted(self, kept: Sequence[int]) -> tuple[Tensor, Tensor]:
        others = [head for head in range(self.geometry.kv_heads) if head not in kept]
        here, local = (torch.tensor(heads, device=self.device) for heads in (kept, others))
        return here, local

    def _own_pools(self) -> dict[str, PagePool]:
        places = planned_places(self.spec, self.geometry, self.dtype)
        pools = {
            name: PagePool(f, slots, self.device) for name, (f, slots) in self.plan.items() if name != "pages"
        }
        format, slots = self.plan["pages"]
        last = (
            OffloadedPool(format, slots, places, self.device)
            if places
            else PagePool(format, slots, self.device)
        )
        return {name: pools.get(name, last) for name in self.plan}

    @property
    def offloaded(self) -> OffloadedPool | None:
        """The pool whose pages need not be on the device, if there is one."""
        pool = self.pools.get("pages")
        return pool if isinstance(pool, OffloadedPool) else None

    @property
    def staged(self) -> bool:
        """Whether pages may pass through the device while they are read, instead of lying there."""
        return self.offloaded is not None and self.offloaded.plan.staged > 0

    @property
    def host_nbytes(self) -> int:
        """Bytes of the host's memory for pages that may leave the device."""
        return self.offloaded.host_nbytes if self.offloaded else 0

    @property
    def disk_nbytes(self) -> int:
        """Bytes of pages on disk."""
        return self.offloaded.disk_nbytes if self.offloaded else 0

    @property
    def bytes_moved(self) -> int:
        """Bytes of pages that have come from the host to the device so far."""
        return self.offloaded.bytes_moved if self.offloaded else 0

    @property
    def nbytes(self) -> int:
        """Bytes allocated on the device: pools, each storage counted once, key means, and what a selection
        goes by."""
        own = sum(mean.nbytes for mean in self.means.values())
        own += self.evidence.nbytes if self.evidence else 0
        return sum(pool.nbytes for pool in self.pools.values()) + own

    @property
    def scored(self) -> bool:
        """Whether the clean pass is to measure what each page gets of the attention."""
        return self.layout.policy.scored

    @property
    def samples(self) -> bool:
        """Whether the clean pass is to hand some of its queries over, to choose the tokens that stay by."""
        return self.spec.keep_by == "mass"

    @property
    def bytes_per_frame(self) -> int:
        """Bytes of one committed latent frame over all layers, in the format of the spec."""
        return self.plan["pages"][0].bytes_per_page() * self.geometry.layers

    def format_of(self, frame: int) -> str:
        """Name of the format in which a resident frame lies."""
        pool = self.table[frame].pool
        plain = "fp32" if self.dtype == torch.float32 else "bf16"
        return {"pages": self.spec.format, "full": plain}.get(pool, pool)

    def tier_of(self, frame: int) -> str:
        """Where a resident frame lies: `device`, `host` or `disk`."""
        page = self.table[frame]
        pool = self.pools[page.pool]
        return pool.tier(page.slot) if isinstance(pool, OffloadedPool) else "device"

    def begin(self, frames: int, at_once: bool = False) -> OpenChunk:
        """Open the next chunk; from here on what it reads is fixed.

        Args:
            at_once: it may be longer than a chunk, to build the cache anew from clean latents.
        """
        self._expect(State.IDLE)
        self.require_room(frames)
        relevance = self._settled() if self.offloaded else self._relevance()
        self.opened = self.layout.begin(frames, at_once, relevance)
        try:
            self.segments, self.history = self._read_plan(self.opened)
        except BaseException:
            self.layout.abandon()
            self._forget_chunk()
            raise
        self.state = State.OPEN
        return self.opened

    def require_room(self, frames: int) -> None:
        """Refuse more latent frames at once than can be written beside the sinks.

        Raises:
            CacheStateError: some of them would have to go to disk before they are whole.
        """
        if self.offloaded is None or not self.offloaded.plan.files:
            return
        most = self.offloaded.plan.host - self.spec.sink
        if frames > most:
            raise CacheStateError(
                f"{frames} latent frames at once; with pages on disk and host_gb={self.spec.host_gb:g} it is "
                f"{most} at most"
            )

    def _relevance(self) -> dict[int, float]:
        """By resident frame, for a cache that reads a selection of them."""
        if self.evidence is None or len(self.layout.resident) <= self.layout.readable:
            return {}
        return self.evidence.relevance(self.layout.resident)

    def _settled(self) -> dict[int, float]:
        """Relevance, once all that the next chunk reads is near; frames that are lost are forgotten."""
        assert self.offloaded is not None
        while True:
            relevance = self._relevance()
            self.offloaded.settle(self._owner, self._wanted(relevance), self.geometry.chunk_frames)
            if not self.forget_lost():
                return relevance

    def _wanted(self, relevance: Mapping[int, float]) -> list[int]:
        """Slots of offloaded pages that the next chunk reads."""
        pages = (self.table[frame] for frame in self.layout.selected(relevance))
        return [page.slot for page in pages if page.pool == "pages"]

    def forget_lost(self) -> bool:
        """Drop frames whose pages a disk could not keep; says whether there were any."""
        if self.offloaded is None:
            return False
        lost = self.offloaded.lost_slots()
        frames = [f for f, page in self.table.items() if page.pool == "pages" and page.slot in lost]
        self.forget(frames)
        return bool(frames)

    def abandon(self) -> None:
        """Give the open chunk up; the cache is as it was before `begin`."""
        self._expect(State.OPEN)
        self.layout.abandon()
        self.state = State.IDLE
        self._forget_chunk()

    def forget(self, frames: Collection[int]) -> None:
        """Drop the pages of these latent frames, between two chunks; sinks among them are sinks no longer."""
        self._expect(State.IDLE)
        for frame in set(frames) & set(self.table):
            page = self.table.pop(frame)
            self.pools[page.pool].release(page.slot)
        self.layout.forget(frames)

    def seek(self, frame: int) -> None:
        """Let the next chunk begin at this latent frame, which lies behind all that are resident."""
        self._expect(State.IDLE)
        self.layout.seek(frame)

    @contextmanager
    def committing(self) -> Iterator[None]:
        """The clean pass of the open chunk: every layer must be read and then written once inside."""
        self._expect(State.OPEN)
        self.state = State.COMMITTING
        try:
            self._commit = self._plan_commit()
            yield
            missing = self.geometry.layers - len(self._commit.written)
            if missing:
                raise CacheStateError(
                    f"the clean pass left {missing} of {self.geometry.layers} layers unwritten"
                )
        except BaseException:
            self.state = State.BROKEN
            raise
        self._finish(self._commit)

    def read(
        self, layer: int, segment: Segment, temporal: Sequence[Tensor] | None = None
    ) -> tuple[Tensor, Tensor]:
        """Decode one segment of one layer.

        Args:
            temporal: frame phases (pages, time pairs) of each run, to turn keys by; None leaves them.

        Returns:
            k, v: (batch, kv_heads, keys, head_dim) in the compute dtype, page after page; of the heads that
            keep pages.
        """
        parts = []
        for index, run in enumerate(segment):
            pool = self._reading(layer, run)
            phases, mean = temporal[index] if temporal else None, self._mean(layer, pool.format)
            storage, at = pool.stored(layer, run.waiting)
            k, v = pool.format.read(storage, at, run.slots, self.dtype, phases, mean)
            parts.append((k.flatten(2, 3), v.flatten(2, 3)))
        if len(parts) == 1:
            return parts[0]
        return torch.cat([k for k, _ in parts], 2), torch.cat([v for _, v in parts], 2)

    def key_noise(self, layer: int, segment: Segment) -> Tensor | None:
        """Mean squared error of a channel of a segment's keys (batch, kv_heads); None if it is not kept."""
        if not self.spec.jensen:
            return None
        noises, pages = [], 0
        for run in segment:
            pool = self.pools[run.pool]
            storage, at = pool.stored(layer, run.waiting)
            noise = pool.format.key_noise(storage, at, run.slots)
            pages += len(run.slots)
            if noise is not None:
                noises.append(noise)
        # at once, so that it does not matter how the segment is cut into runs
        return torch.cat(noises).sum(0) / pages if noises else None

    def pages(self, layer: int, run: Run, temporal: Tensor) -> PageRun:
        """Pages of one layer where they lie, for the fused read.

        Args:
            temporal: frame phases (pages, time pairs).
        """
        pool = self._reading(layer, run)
        stored = pool.format.layer(pool.storage, layer)
        turned = pool.format.narrow and self.spec.hadamard
        return PageRun(stored, run.slots, temporal, self._mean(layer, pool.format), turned)

    def expect(self, segments: Sequence[Segment], again: bool) -> None:
        """Say in which order every layer reads, so that what lies on the host is on its way in time.

        Args:
            again: the last layer is followed by the first.
        """
        if self.offloaded is not None:
            waiting = [run.waiting for segment in segments for run in segment if run.waiting]
            self.offloaded.expect(waiting, again)

    def _reading(self, layer: int, run: Run) -> PagePool:
        """The pool of a run whose pages are about to be read, which is counted."""
        if self._commit is not None and layer in self._commit.written:
            raise CacheStateError(f"layer {layer} of this chunk is committed already; its old pages are gone")
        pool = self.pools[run.pool]
        self.pages_read += len(run.slots)
        self.lossy_pages_read += 0 if pool.format.lossless else len(run.slots)
        return pool

    def _mean(self, layer: int, format: PageFormat) -> Tensor | None:
        if not format.uses_key_mean:
            return None
        coarse = "keyframe" if self.spec.keyframe else "centroids" if self.spec.centroids else "key_mean"
        return self.means[coarse if format.narrow else "key_mean"][layer]

    def observe(
        self,
        layer: int,
        q: Tensor,
        k: Tensor,
        mass: Mapping[int, Tensor] | None = None,
        sampled: tuple[Tensor, Tensor] | None = None,
    ) -> None:
        """Take in what the clean pass shows of one layer.

        Args:
            q, k: of the chunk (batch, frames, tokens, heads, head_dim), k with kv_heads; not rotated.
            mass: by frame, its share of the attention, mean over videos, heads and queries.
            sampled: some queries (batch, heads, queries, head_dim), turned, and their log-sum-exps (batch,
                heads, queries), of the heads that keep pages.
        """
        assert self._commit is not None and self.opened is not None
        self._commit.sampled = sampled
        start = self.opened.start
        if self.evidence:
            if self.heads:
                q, k = (of_heads(x, 3, self.heads[layer][0], self.geometry.kv_heads) for x in (q, k))
            self.evidence.take(layer, range(start, start + self.opened.frames), q, k)
        for frame, share in (mass or {}).items():
            self._commit.mass[frame] = self._commit.mass.get(frame, 0) + share / self.geometry.layers

    def write(self, layer: int, k: Tensor, v: Tensor, spatial: Tensor | None = None) -> None:
        """Commit one layer of the open chunk; the layer must not be read again in this pass.

        Args:
            k, v: (batch, kv_heads, frames, tokens, head_dim).
            spatial: row and column phases (tokens, pairs) to turn keys by; None: they are turned.
        """
        self._expect(State.COMMITTING)
        assert self._commit is not None
        if layer in self._commit.written:
            raise CacheStateError(f"layer {layer} of this chunk is committed already")
        self._commit.written.add(layer)
        if self.heads:
            k, v = (x.index_select(1, self.heads[layer][0]) for x in (k, v))
        if self.means and not self._mean_frozen:
            self._freeze_means(layer, k, spatial)
        for demotion in self._commit.demotions:
            pool = self.pools[demotion.origin]
            mean = self._mean(layer, pool.format)
            old = pool.format.read(pool.storage, layer, demotion.source, self.dtype, None, mean)
            self._store(layer, demotion.pool, demotion.target, *old, None)
        for name, (indices, target) in self._commit.writes.items():
            self._store(layer, name, target, k[:, :, indices], v[:, :, indices], spatial)

    def _freeze_means(self, layer: int, k: Tensor, spatial: Tensor | None) -> None:
        turned = k.float() if spatial is None else rotate_last(k.float(), spatial)
        if "key_mean" in self.means:
            self.means["key_mean"][layer] = turned.mean((2, 3))
        if "keyframe" in self.means:
            self.means["keyframe"][layer] = turned.mean(2).to(self.means["keyframe"].dtype)
        if "centroids" in self.means:
            self.means["centroids"][layer] = centroids_of(turned.flatten(2, 3), self.spec.centroids)

    def _store(
        self, layer: int, name: str, target: Target, k: Tensor, v: Tensor, spatial: Tensor | None
    ) -> None:
        """Lay pages down in slots of a pool, which may hold fewer tokens of each."""
        pool = self.pools[name]
        kept = pool.format.tokens
        if kept < k.shape[3]:
            k, spatial = k if spatial is None else rotate_last(k, spatial), None
            scores = self._mass(k, target) if self.samples else difference(k, self.means["keyframe"][layer])
            k, v = largest(k, v, scores, kept)
        pool.write(layer, target, k, v, spatial, self._mean(layer, pool.format))

    def _mass(self, k: Tensor, target: Target) -> Tensor:
        """What tokens of pages that are about to be written there get of the attention (batch, kv_heads,
        pages, tokens); nothing where no pass has handed queries over."""
        assert self._commit is not None and self._commit.offsets is not None
        if self._commit.sampled is None:
            return k.new_zeros(k.shape[:-1])
        q, lse = self._commit.sampled
        self.sampled_scores += lse.numel() * k.shape[2] * k.shape[3]
        phases = temporal_phases(k.shape[-1], self._commit.offsets[target.slots])
        return attention_mass(k, phases, q, lse)

    def fork(self) -> KVCache:
        """A second cache with the same history; pages are shared until each has moved on."""
        self._expect(State.IDLE)
        other = KVCache(self.spec, self.geometry, self.device, self.dtype, self.pools)
        other.layout = self.layout.copy()
        for frame, page in self.table.items():
            self.pools[page.pool].retain(page.slot)
            other.table[frame] = page
        other.means = {name: mean.clone() for name, mean in self.means.items()}
        other.evidence = copy.deepcopy(self.evidence)
        other._mean_frozen, other._serial = self._mean_frozen, self._serial
        return other

    def close(self) -> None:
        """Let go of all pages and of the pools, for good; forks keep theirs."""
        self._give_back()
        self.pools, self.state = {}, State.CLOSED
        self._forget_chunk()

    def page(self, frame: int) -> dict[str, Tensor]:
        """The bytes of a resident frame on the CPU, (layers, …) by buffer name."""
        page = self.table[frame]
        return {key: buffer[:, 0] for key, buffer in self.pools[page.pool].gather([page.slot]).items()}

    def state_tensors(self, pages: bool = True) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Everything a restore needs: page bytes in position order, and a JSON-able header.

        Args:
            pages: False leaves an empty place for them.
        """
        self._expect(State.IDLE)
        tensors = self._gathered(pages)
        tensors |= {name: mean.clone().cpu() for name, mean in self.means.items()}
        if self.evidence:
            rows = [self.evidence.rows[frame] for frame in self.layout.resident]
            tensors["evidence.keys"] = self.evidence.keys[rows].cpu()
            tensors["evidence.queries"] = self.evidence.queries.clone().cpu()
        header = {
            "spec": self.spec.unbudgeted.model_dump(),
            "resident": [[frame, self.table[frame].pool] for frame in self.layout.resident],
            "serials": [self.table[frame].serial for frame in self.layout.resident],
            "next_serial": self._serial,
            "sinks": list(self.layout.sinks),
            "scores": [self.layout.scores.get(frame) for frame in self.layout.resident],
            "next_frame": self.layout.next_frame,
            "mean_frozen": self._mean_frozen,
        }
        if self._kept_heads:
            header["heads"] = self._kept_heads
        return tensors, header

    def _gathered(self, pages: bool) -> dict[str, Tensor]:
        """Buffers of all resident pages; frames that turn out to be lost are forgotten first."""
        while True:
            self.forget_lost()
            frames = self.layout.resident if pages else ()
            slots = {
                name: [self.table[f].slot for f in frames if self.table[f].pool == name]
                for name in self.pools
            }
            try:
                gathered = {name: pool.gather(slots[name]) for name, pool in self.pools.items()}
            except CacheStateError:
                if self.offloaded is None or not self.offloaded.lost_slots():
                    raise
                continue
            return {f"{n}.{key}": buffer for n, part in gathered.items() for key, buffer in part.items()}

    def restore(self, tensors: Mapping[str, Tensor], header: Mapping[str, Any]) -> None:
        """Become the cache that `state_tensors` described.

        Raises:
            StateError: it was saved with other settings or another geometry, or is damaged; nothing has
                changed.
            CacheStateError: the cache is closed.
        """
        self.check_state(tensors, header)
        if self.offloaded is not None:
            # what was read before is no reason to keep anything
            self.offloaded.done(self._owner)
        for page in self.table.values():
            self.pools[page.pool].release(page.slot)
        self.table.clear()
        counters = dict.fromkeys(self.pools, 0)
        for (frame, name), serial in zip(header["resident"], header["serials"], strict=True):
            pool, index = self.pools[name], counters[name]
            counters[name] += 1
            slot = pool.acquire()
            if isinstance(pool, OffloadedPool) and frame in header["sinks"]:
                pool.hold(self._owner, slot)
            pool.load(slot, {key: tensors[f"{name}.{key}"][:, index] for key in pool.storage})
            self.table[frame] = Page(name, slot, serial)
        for name, mean in self.means.items():
            mean.copy_(tensors[name])
        self._mean_frozen, self._serial = header["mean_frozen"], header["next_serial"]
        self.layout = Layout(self.spec, self.geometry.chunk_frames)
        self.layout.resident = tuple(frame for frame, _ in header["resident"])
        self.layout.sinks = tuple(header["sinks"])
        self.layout.next_frame = header["next_frame"]
        scores = zip(self.layout.resident, _scores(header), strict=True)
        self.layout.scores = {frame: score for frame, score in scores if score is not None}
        if self.evidence:
            self.evidence.rows = {}
            self.evidence.arrange(self.layout.resident)
            self.evidence.keys[: len(self.layout.resident)] = tensors["evidence.keys"]
            self.evidence.queries.copy_(tensors["evidence.queries"])
        self.state = State.IDLE
        self._forget_chunk()

    def check_state(self, tensors: Mapping[str, Tensor], header: Mapping[str, Any]) -> None:
        """Say whether `restore` would take this; nothing is changed.

        Raises:
            StateError: naming the first thing that does not fit.
            CacheStateError: the cache is closed.
        """
        if self.state is State.CLOSED:
            raise CacheStateError("the cache is closed; make a new one to restore into")
        try:
            saved = CacheSpec.of(entry(header, "spec", dict))
        except CacheSpecError as error:
            raise StateError(f"the saved cache settings cannot be read: {error}") from None
        if saved.unbudgeted != self.spec.unbudgeted:
            raise StateError(f"the state was saved with the cache {saved}, this rollout has {self.spec}")
        if self._kept_heads and entry(header, "heads", list) != self._kept_heads:
            raise StateError(
                f"the saved pages are those of the heads {header['heads']!s:.60}, this model keeps "
                f"{self._kept_heads!s:.60}: its heads were measured anew; start again"
            )
        next_frame, frozen = entry(header, "next_frame", int), entry(header, "mean_frozen", bool)
        resident = [tuple(pair) if isinstance(pair, list) else () for pair in entry(header, "resident", list)]
        if any([type(part) for part in pair] != [int, str] for pair in resident):
            raise StateError(
                f"the saved resident frames are {header['resident']!r:.60}, not pairs of a frame and a pool"
            )
        sinks = whole_numbers(header, "sinks")
        pools = [name for _, name in resident]
        unknown = set(pools) - set(self.pools)
        if unknown:
            raise StateError(f"the saved pages are in {sorted(unknown)}, this cache has {sorted(self.pools)}")
        for fault in self._faults(resident, sinks, next_frame):
            raise StateError(f"the saved pages contradict each other: {fault}")
        if frozen < bool(resident):
            raise StateError(f"the saved mean_frozen is {frozen}, but frames {resident!s:.60} are resident")
        for name, pool in self.pools.items():
            for key, buffer in pool.storage.items():
                shape = (buffer.shape[0], pools.count(name), *buffer.shape[2:])
                check_tensor(tensors, f"{name}.{key}", shape, buffer.dtype)
        serials, given = whole_numbers(header, "serials"), range(entry(header, "next_serial", int))
        if len(serials) != len(resident) or len(set(serials) & set(given)) != len(resident):
            raise StateError(
                f"the saved serials are {serials!s:.60}, not {len(resident)} different below {given.stop}"
            )
        for name, mean in self.means.items():
            check_tensor(tensors, name, tuple(mean.shape), mean.dtype)
        if self.evidence:
            shape = tuple(self.evidence.queries.shape)
            check_tensor(tensors, "evidence.keys", (len(resident), *shape), torch.float16)
            check_tensor(tensors, "evidence.queries", shape, torch.float32)
        scores = _scores(header)
        if len(scores) != len(resident) or any(type(x) not in (float, type(None)) for x in scores):
            raise StateError(f"the saved scores are {scores!s:.60}, not {len(resident)} numbers")

    def check_integrity(self) -> None:
        """Audit the page table.

        Raises:
            CacheStateError: naming the first rule that does not hold.
        """
        if set(self.table) != set(self.layout.resident):
            raise CacheStateError(f"pages {sorted(self.table)} but resident frames {self.layout.resident}")
        resident = [(frame, self.table[frame].pool) for frame in self.layout.resident]
        for fault in self._faults(resident, self.layout.sinks, self.layout.next_frame):
            raise CacheStateError(fault)
        if len({(p.pool, p.slot) for p in self.table.values()}) != len(self.table):
            raise CacheStateError("two frames lie in one slot")
        for name, pool in self.pools.items():
            for key, buffer in pool.storage.items():
                if buffer.shape[:2] != (self.geometry.layers, pool.placed):
                    raise CacheStateError(f"{name}.{key} has {tuple(buffer.shape[:2])} layers and slots")
        for frame, page in self.table.items():
            place = self.pools.get(page.pool)
            if place is None or not 0 <= page.slot < place.slots:
                raise CacheStateError(
                    f"frame {frame} lies in slot {page.slot} of {page.pool}, which is nowhere"
                )
            if place.references[page.slot] < 1:
                raise CacheStateError(f"frame {frame} lies in slot {page.slot}, which is free")

    def _faults(
        self, resident: Sequence[tuple[int, str]], sinks: Sequence[int], next_frame: int
    ) -> Iterator[str]:
        """What is wrong with these (frame, pool) and sinks after `next_frame` latent frames."""
        frames = [frame for frame, _ in resident]
        if frames != sorted(set(frames)):
            yield f"resident frames are out of order: {frames}"
        elif frames and (frames[0] < 0 or frames[-1] >= next_frame):
            yield f"frames {frames} are resident, but the next one is {next_frame}"
        elif list(sinks) != frames[: len(sinks)]:
            yield f"the sinks are {list(sinks)}, the first resident frames {frames[: len(sinks)]}"
        elif len(sinks) != min(self.spec.sink, len(frames)):
            yield f"{len(sinks)} sinks among {len(frames)} frames, and sink={self.spec.sink}"
        elif len(frames) > self.layout.capacity:
            yield f"{len(frames)} resident frames, but there is room for {self.layout.capacity}"
        for frame, name in resident:
            if name != self._pool_of(frame, sinks, next_frame):
                yield f"frame {frame} lies among the {name} pages"

    def _expect(self, state: State) -> None:
        if self.state is not state:
            raise CacheStateError(f"the cache is {self.state.value}, this needs it {state.value}")

    def _read_plan(self, chunk: OpenChunk) -> tuple[tuple[Segment, ...], tuple[Run, ...]]:
        """Cut the history at fixed boundaries, whatever the slots, so that sums do not depend on them.

        Returns:
            Segments, and the whole history as one run for each pool that has a part of it.
        """
        size = self.spec.segment
        placed = [
            _Placed(frame, self.table[frame].pool, position - chunk.first_position, *self._place(frame))
            for frame, position in zip(chunk.history, chunk.positions, strict=True)
        ]
        segments = tuple(
            tuple(
                self._run(list(group))
                for _, group in groupby(placed[start : start + size], key=lambda part: (part.pool, part.here))
            )
            for start in range(0, len(placed), size)
        )
        if not all(part.here for part in placed):
            return segments, ()
        history = ([part for part in placed if part.pool == name] for name in self.pools)
        return segments, tuple(self._run(parts) for parts in history if parts)

    def _place(self, frame: int) -> tuple[int | None, int]:
        """Where a frame lies in its pool's buffers, if it does, and on the host."""
        page = self.table[frame]
        pool = self.pools[page.pool]
        return pool.where(page.slot) if isinstance(pool, OffloadedPool) else (page.slot, -1)

    def _run(self, placed: Sequence[_Placed]) -> Run:
        waiting = () if placed[0].here else tuple(part.host for part in placed)
        places = range(len(placed)) if waiting else [part.place for part in placed]
        at, away = (torch.tensor(x, device=self.device) for x in (list(places), [p.offset for p in placed]))
        return Run(placed[0].pool, at, away, tuple(part.frame for part in placed), waiting)

    def _pool_of(self, frame: int, sinks: Collection[int], end: int) -> str:
        """Where a frame belongs when `end` latent frames are committed."""
        if self.spec.keep_sinks and frame in sinks:
            return self.tiers[0].name
        return next(tier.name for tier in self.tiers if end - 1 - frame < tier.below)

    def _plan_commit(self) -> _Commit:
        """Reassign slots on the host: leaving pages, demotions and the new chunk."""
        assert self.opened is not None
        start, end = self.opened.start, self.opened.start + self.opened.frames
        kept, sinks = self.layout.after_commit()
        first_new = self._serial
        for frame in [f for f in self.table if f not in kept]:
            page = self.table.pop(frame)
            self.pools[page.pool].release(page.slot)
        demotions = []
        # the oldest first, so that the slots they leave are free for those behind them
        for tier in reversed(self.tiers):
            leaving: dict[str, list[tuple[int, int]]] = {}
            for frame, page in list(self.table.items()):
                name = self._pool_of(frame, sinks, end)
                if page.pool != tier.name or name == tier.name:
                    continue
                target = self._new_page(name)
                leaving.setdefault(name, []).append((page.slot, target.slot))
                self.pools[page.pool].release(page.slot)
                self.table[frame] = target
            for name, pairs in leaving.items():
                source, into = zip(*pairs, strict=True)
                places = torch.tensor(source, device=self.device)
                demotions.append(_Demotion(tier.name, places, name, self.pools[name].target(into)))
        writes: dict[str, tuple[list[int], list[int]]] = {}
        for frame in (f for f in kept if f >= start):
            name = self._pool_of(frame, sinks, end)
            page = self._new_page(name)
            self.table[frame] = page
            indices, slots = writes.setdefault(page.pool, ([], []))
            indices.append(frame - start)
            slots.append(page.slot)
        if self.evidence:
            self.evidence.arrange(kept)
        return _Commit(
            demotions,
            {
                name: (_span(indices), self.pools[name].target(slots))
                for name, (indices, slots) in writes.items()
            },
            self._offsets(first_new) if self.samples else None,
        )

    def _offsets(self, serial: int) -> Tensor:
        """By slot of the final format, frames from the open chunk's first one to the page that is to go
        there; a page that the chunk does not read counts by its true distance.

        Args:
            serial: of the first page that is new.
        """
        assert self.opened is not None
        opened = self.opened
        read = dict(zip(opened.history, opened.positions, strict=True))
        offsets = torch.zeros(self.pools["pages"].slots, dtype=torch.int64)
        for frame, page in self.table.items():
            if page.pool == "pages" and page.serial >= serial:
                offsets[page.slot] = frame - opened.start
                if frame in read:
                    offsets[page.slot] = read[frame] - opened.first_position
        return offsets.to(self.device)

    def _new_page(self, pool: str) -> Page:
        self._serial += 1
        return Page(pool, self.pools[pool].acquire(), self._serial - 1)

    def _forget_chunk(self) -> None:
        self.opened, self.segments, self.history, self._commit = None, (), (), None
        if self.offloaded is not None:
            self.offloaded.done(self._owner)

    def _finish(self, commit: _Commit) -> None:
        # one transfer, not one a frame
        shares = torch.stack([*commit.mass.values()]).tolist() if commit.mass else []
        self.layout.commit(dict(zip(commit.mass, shares, strict=True)))
        self._mean_frozen = True
        self.state = State.IDLE
        self._forget_chunk()
        if self.offloaded is not None:
            wanted = self._wanted(self._relevance())
            self.offloaded.settle_ahead(self._owner, wanted, self.geometry.chunk_frames)


@dataclass(frozen=True)
class _Placed:
    """A page that is about to be read: `place` in its pool's buffers, None while it waits on the `host`."""

    frame: int
    pool: str
    offset: int
    place: int | None
    host: int

    @property
    def here(self) -> bool:
        return self.place is not None


def of_heads(x: Tensor, dim: int, heads: Tensor, kv_heads: int) -> Tensor:
    """Of an axis of heads, or of query heads that share kv heads in equal groups, those of some kv heads.

    Args:
        heads: which, (n,) int64.
        kv_heads: how many there are.
    """
    groups = x.reshape(*x.shape[:dim], kv_heads, -1, *x.shape[dim + 1 :])
    return groups.index_select(dim, heads).flatten(dim, dim + 1)


def _scores(header: Mapping[str, Any]) -> list[float | None]:
    """Of resident frames; states from before there were any say nothing of them."""
    return entry(header, "scores", list) if "scores" in header else [None] * len(header["resident"])


def _give_back(
    pools: dict[str, PagePool], table: dict[int, Page], room: dict[str, int], owner: object
) -> None:
    """Free the pages of a table and the room that was reserved for them."""
    last = pools["pages"]
    if isinstance(last, OffloadedPool):
        last.done(owner)
    for page in table.values():
        pools[page.pool].release(page.slot)
    table.clear()
    for name, slots in room.items():
        pools[name].cancel(slots)


def _span(indices: list[int]) -> slice | list[int]:
    """Ascending indices as a slice where they follow one another, so that taking them copies nothing."""
    first, last = indices[0], indices[-1]
    return slice(first, last + 1) if last - first + 1 == len(indices) else indices


@dataclass(frozen=True)
class _Demotion:
    """Pages that move down: from slots (pages,) int64 of one pool to those of another."""

    origin: str
    source: Tensor
    pool: str
    target: Target


@dataclass
class _Commit:
    """Slot assignments of one clean pass.

    Attributes:
        demotions: in the order in which they must be made.
        writes: per pool, which of the chunk's frames and where they go.
        offsets: by slot of the pages in their final format, see `KVCache._offsets`.
        written: layers done.
        mass: by frame that was read, its share of the attention so far.
        sampled: of the layer that is about to be written, see `KVCache.observe`.
    """

    demotions: list[_Demotion]
    writes: dict[str, tuple[slice | list[int], Target]]
    offsets: Tensor | None = None
    written: set[int] = field(default_factory=set)
    mass: dict[int, Tensor] = field(default_factory=dict)
    sampled: tuple[Tensor, Tensor] | None = None
