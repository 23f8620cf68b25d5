"""Who answers a model's self-attention: the whole clip, a block-causal part of it, or the KV cache.

Each class here is an `Attention` of `vidkv.models.wan`: `layer(i)` gives the function that layer i calls
with its queries, keys and values before rotary embedding. Position belongs to the reader, so rotary
embedding is applied here.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch
from einops import rearrange
from torch import Tensor

from vidkv.cache.formats import FORMATS
from vidkv.cache.kv_cache import KVCache, Run, Segment, of_heads
from vidkv.cache.layout import Layout, OpenChunk
from vidkv.cache.prune import sampled
from vidkv.cache.spec import CacheGeometry, CacheSpec
from vidkv.errors import CacheStateError
from vidkv.kernels.attention import attend, attend_reference, attend_with_lse, merge
from vidkv.kernels.gather import Gather
from vidkv.kernels.jit import triton
from vidkv.kernels.paged_attention import KINDS, Tile, attend_pages, by_kind
from vidkv.kernels.rope import rotate_full, spatial_phases, temporal_phases
from vidkv.kernels.rotary import rotate_chunk
from vidkv.read_path import REFERENCE, TWO_PASS, ReadPath


class FullAttention:
    """Every token reads every token of the clip; frame i has position i.

    Args:
        height, width: tokens per column and row of one latent frame.
    """

    def __init__(self, height: int, width: int) -> None:
        self.height, self.width = height, width

    def layer(self, index: int) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
        return self._attend

    def _attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        frames, head_dim = q.shape[1], q.shape[-1]
        temporal = temporal_phases(head_dim, torch.arange(frames, device=q.device), q.dtype)
        spatial = spatial_phases(head_dim, self.height, self.width, q.device, q.dtype)
        q, k = rotate_full(q, temporal, spatial), rotate_full(k, temporal, spatial)
        q, k, v = (rearrange(x, "b f s n d -> b n (f s) d") for x in (q, k, v))
        return rearrange(attend(q, k, v), "b n (f s) d -> b f s n d", f=frames)


class BlockCausalAttention:
    """All chunks of a clip at once, each reading what the cache would hold when its turn comes.

    The layout of the cache is run over the chunk schedule on the host; the frames it would read for each
    chunk become one index table. So training sees sinks, window and positions exactly as a rollout does.
    Keys are rotated once per (frame, position) that occurs, in coordinates in which a chunk stands at its
    true frame index, and then gathered.

    With `clean_history` the clip is given twice along the frame axis, clean frames first and noisy ones
    after: clean chunks read clean history and themselves, noisy chunks read clean history and
    themselves (teacher forcing). Without it, history is what the clip itself holds (diffusion forcing).

    Args:
        height, width: tokens per column and row of one latent frame.
        spec: cache settings; of these sinks, window, policy and positions matter.
        chunks: latent frames per chunk, in order.
    """

    def __init__(
        self,
        height: int,
        width: int,
        spec: CacheSpec,
        chunks: Sequence[int],
        clean_history: bool = False,
        device: torch.device | str | None = None,
    ) -> None:
        self.height, self.width, self.device = height, width, device
        reads = _reads(spec, chunks)
        frames, longest, copies = sum(chunks), max(chunks), 2 if clean_history else 1
        keys = max(len(read.history) for read in reads) + longest
        rows = copies * len(reads)
        queries = torch.full((rows, longest), -1)
        bank = {(frame, frame % frames): frame for frame in range(copies * frames)}
        key_index = torch.full((rows, keys), -1)
        for row in range(rows):
            copy, read = row // len(reads), reads[row % len(reads)]
            own = range(read.start, read.start + read.frames)
            queries[row, : read.frames] = torch.tensor(own) + copy * frames
            shift = read.start - read.first_position
            wanted = [(f, p + shift) for f, p in zip(read.history, read.positions, strict=True)]
            wanted += [(f + copy * frames, f) for f in own]
            key_index[row, : len(wanted)] = torch.tensor([bank.setdefault(w, len(bank)) for w in wanted])
        self.rows, self.longest = rows, longest
        positions = torch.tensor([position for _, position in bank])
        bank_frames = torch.tensor([frame for frame, _ in bank])
        slots = torch.nonzero(queries.flatten() >= 0).flatten()
        self.queries = Gather(queries.flatten(), copies * frames, device)
        self.bank = Gather(bank_frames, copies * frames, device)
        self.keys = Gather(key_index.flatten(), len(bank), device)
        value_index = torch.where(key_index < 0, -1, bank_frames[key_index])
        self.values = Gather(value_index.flatten(), copies * frames, device)
        self.restore = Gather(slots[queries.flatten()[slots].argsort()], queries.numel(), device)
        self.query_positions = self.queries.index % frames
        self.bank_positions = positions.to(device)
        self.key_mask = (key_index >= 0).repeat_interleave(height * width, 1)[:, None, None].to(device)
        self._phases: dict[tuple[int, torch.dtype], tuple[Tensor, Tensor, Tensor]] = {}

    def layer(self, index: int) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
        return self._attend

    @torch.compiler.disable
    def _attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        b, rows, longest = q.shape[0], self.rows, self.longest
        query_phases, bank_phases, spatial = self._turns(q)
        q = rotate_full(self.queries(q), query_phases, spatial)
        k = self.keys(rotate_full(self.bank(k), bank_phases, spatial))
        v = self.values(v)
        q, k, v = (rearrange(x, "b (r f) s n d -> (b r) n (f s) d", r=rows) for x in (q, k, v))
        mask = self.key_mask.expand(-1, 1, longest * self.height * self.width, -1).repeat(b, 1, 1, 1)
        out = rearrange(attend(q, k, v, mask), "(b r) n (f s) d -> b (r f) s n d", r=rows, f=longest)
        return self.restore(out)

    def _turns(self, like: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Phases of queries, of the key bank, and of the grid; made once per head size and precision."""
        d, dtype = like.shape[-1], like.dtype
        if (d, dtype) not in self._phases:
            self._phases[d, dtype] = (
                temporal_phases(d, self.query_positions, dtype),
                temporal_phases(d, self.bank_positions, dtype),
                spatial_phases(d, self.height, self.width, self.device, dtype),
            )
        return self._phases[d, dtype]


def _reads(spec: CacheSpec, chunks: Sequence[int]) -> list[OpenChunk]:
    """What the cache's layout gives each chunk to read."""
    layout = Layout(spec, chunk_frames=max(chunks))
    reads = []
    for n in chunks:
        reads.append(layout.begin(n))
        layout.commit()
    return reads


Mass = dict[int, Tensor]
"""Share of the attention by latent frame, mean over videos, heads and queries."""
Found = tuple[Tensor, Mass, Tensor]
"""What a read gives: out (batch, heads, queries, head_dim), shares, log-sum-exps (batch, heads, queries)."""


class CachedAttention:
    """The open chunk reads the cache and itself, by one of the read paths.

    *two-pass*: segment by segment, pages are decoded into scratch and turned to their distance from the
    chunk's first frame; torch's SDPA attends to each segment and the parts are merged by their log-sum-exp.
    Scratch is one segment, whatever the window. *reference* is the same at float64. *fused*: one kernel
    reads the pages where they lie (`kernels.paged_attention`).

    Heads whose pages the cache does not keep attend to the chunk alone.

    Args:
        cache: with an open chunk.
        path: how to read; it must not change within a rollout, whose bits depend on it.
        commit: write each layer's keys and values after reading it (the clean pass).
    """

    def __init__(self, cache: KVCache, path: ReadPath = TWO_PASS, commit: bool = False) -> None:
        if cache.opened is None:
            raise CacheStateError("the cache has no open chunk to attend from")
        self.cache, self.path, self.commit = cache, path, commit
        self.scoring = commit and cache.scored
        g, device = cache.geometry, cache.device
        self.spatial = spatial_phases(g.head_dim, g.height, g.width, device)
        self.own = temporal_phases(g.head_dim, torch.arange(cache.opened.frames, device=device))
        self.history: list[tuple[Run, Tensor]] = []
        self.segments: list[tuple[Segment, list[Tensor]]] = []
        if path.name == "fused":
            self.history = [(run, temporal_phases(g.head_dim, run.offsets)) for run in cache.history]
        else:
            self.segments = [
                (segment, [temporal_phases(g.head_dim, run.offsets) for run in segment])
                for segment in (self._single_pages() if self.scoring else cache.segments)
            ]
            cache.expect([segment for segment, _ in self.segments], again=not commit)

    @property
    def steady(self) -> bool:
        """Whether the window is full: from here on every chunk reads as many pages, all on the device."""
        opened = self.cache.opened
        layout = self.cache.layout
        if self.cache.staged:
            return False
        return opened is not None and len(opened.history) == min(layout.readable, layout.capacity)

    def _single_pages(self) -> list[Segment]:
        """The history page by page: with one to a segment, a part's log-sum-exp tells of that page."""
        return [(page,) for segment in self.cache.segments for run in segment for page in run.pages()]

    def signature(self) -> tuple[object, ...]:
        """What two objects have in common if they launch the same kernels on the same memory."""
        runs = [run for run, _ in self.history] + [run for segment, _ in self.segments for run in segment]
        cuts = tuple(len(segment) for segment, _ in self.segments)
        # a pool that a fork has made grow lies elsewhere
        buffers = [buffer for pool in self.cache.pools.values() for buffer in pool.storage.values()]
        pools = tuple((buffer.data_ptr(), tuple(buffer.shape)) for buffer in buffers)
        return self.path, self.commit, pools, cuts, tuple((run.pool, len(run.slots)) for run in runs)

    def take(self, other: CachedAttention) -> None:
        """Read from now on, in place, what an object with the same signature reads."""
        for mine, theirs in zip(self._changing(), other._changing(), strict=True):
            mine.copy_(theirs)

    def _changing(self) -> list[Tensor]:
        """What differs from chunk to chunk: slots, and phases of the pages' positions."""
        parts = [(run, phases) for run, phases in self.history]
        parts += [pair for segment, phases in self.segments for pair in zip(segment, phases, strict=True)]
        return [tensor for run, phases in parts for tensor in (run.slots, phases)]

    def layer(self, index: int) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
        return partial(self._attend, index)

    def _attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        frames = q.shape[1]
        turned, own_k = (rotate_chunk(x, self.own, self.spatial) for x in (q, k))
        own_v = rearrange(v, "b f s n d -> b n (f s) d")
        read = self._read_parted if self.cache.heads else self._read
        out, mass, lse = read(layer, turned, own_k, own_v)
        if self.commit:
            self.cache.observe(layer, q, k, mass, self._sampled(layer, turned, lse))
            k, v = (rearrange(x, "b f s n d -> b n f s d") for x in (k, v))
            self.cache.write(layer, k, v, self.spatial)
        return rearrange(out, "b n (f s) d -> b f s n d", f=frames)

    def _sampled(self, layer: int, q: Tensor, lse: Tensor) -> tuple[Tensor, Tensor] | None:
        """Some of the queries, of the heads that read pages, and their log-sum-exps."""
        if not self.cache.samples:
            return None
        chosen = sampled(q.shape[2], q.device)
        q = q.index_select(2, chosen)
        if self.cache.heads:
            q = of_heads(q, 1, self.cache.heads[layer][0], self.cache.geometry.kv_heads)
        return q, lse.index_select(2, chosen)

    def _read(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Found:
        read = self._read_fused if self.path.name == "fused" else self._read_segments
        return read(layer, q, k, v)

    def _read_parted(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Found:
        """Heads without pages read the chunk alone, the others as ever; log-sum-exps are of the others."""
        assert self.cache.heads is not None
        kv_heads, (reading, local) = k.shape[1], self.cache.heads[layer]
        part, mass, lse = self._read(layer, *(of_heads(x, 1, reading, kv_heads) for x in (q, k, v)))
        alone = [of_heads(x, 1, local, kv_heads) for x in (q, k, v)]
        rest = attend(*alone) if self.path.name == "fused" else self._part(*alone)[0]
        out = torch.empty_like(q)
        groups = out.view(len(q), kv_heads, -1, *q.shape[2:])
        for heads, found in ((reading, part), (local, rest)):
            groups.index_copy_(1, heads, found.to(q.dtype).reshape(len(q), len(heads), *groups.shape[2:]))
        return out, {frame: share * len(reading) / kv_heads for frame, share in mass.items()}, lse

    def _read_segments(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Found:
        out, lse = self._part(q, k, v)
        out = out.to(lse.dtype)
        seen: dict[int, Tensor] = {}
        for segment, temporal in self.segments:
            part, part_lse = self._part(q, *self.cache.read(layer, segment, temporal))
            noise = self.cache.key_noise(layer, segment)
            if noise is not None:
                part_lse = part_lse - _noise_gain(q, noise).to(part_lse.dtype)
            if self.scoring:
                seen[segment[0].frames[0]] = part_lse
            out, lse = merge(out, lse, part, part_lse)
        return out.to(q.dtype), {frame: (part - lse).exp().mean() for frame, part in seen.items()}, lse

    def _part(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        if self.path.name == "reference":
            return attend_reference(q.double(), k.double(), v.double())
        return attend_with_lse(q, k, v, self.path.backend)

    def _read_fused(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Found:
        runs = [self.cache.pages(layer, run, temporal) for run, temporal in self.history]
        coded, plain, packed = by_kind(runs)
        assert self.path.tile is not None
        out, lse, per_page = attend_pages(q, k, v, coded, plain, self.path.tile, self.scoring, packed)
        if not self.scoring:
            return out, {}, lse
        frames_of = {run.kind: read.frames for run, (read, _) in zip(runs, self.history, strict=True)}
        frames = [frame for kind in KINDS for frame in frames_of.get(kind, ())]
        shares = (per_page - lse[:, :, None]).exp().mean((0, 1, 3))
        return out, dict(zip(frames, shares.unbind(), strict=True)), lse


def _noise_gain(q: Tensor, noise: Tensor) -> Tensor:
    """What noise of variance s² in every channel of a key adds to the logarithm of its weight on average:
    |q|² s² / (2 d) (arXiv 2605.26266), (batch, heads, queries).

    Args:
        q: (batch, heads, queries, d).
        noise: s², (batch, kv_heads).
    """
    variance = noise.repeat_interleave(q.shape[1] // noise.shape[1], 1)
    return q.float().square().sum(-1) * variance[..., None] / (2 * q.shape[-1])


def self_test(device: str = "cpu") -> list[tuple[str, float, float]]:
    """Run the read paths of every page format on small random data against float64.

    Returns:
        (name, rel-L2 error, bound) per path and format; the bound of a quantized one is against the values
        that went in, not those decoded.
    """
    bounds = {
        "fp32": 1e-5, "bf16": 1e-2, "int8": 2e-2, "k8v4": 0.07, "int4": 0.09, "k4v2": 0.3, "int2": 0.4,
    }  # fmt: skip
    paths = [TWO_PASS]
    if device != "cpu" and triton:
        paths.append(ReadPath("fused", tile=Tile(32, 32, 4, 2)))
    return [
        (f"{path.name}, {name} pages", _read_error(path, name, device), bounds[name])
        for path in paths
        for name in bounds
        if path.name != "fused" or FORMATS[name].fused
    ]


def _read_error(path: ReadPath, format: str, device: str) -> float:
    spec = CacheSpec(format=format, window=9, sink=2, segment=2)
    geometry = CacheGeometry(layers=1, kv_heads=2, head_dim=64, height=3, width=5)
    generator = torch.Generator().manual_seed(0)
    frames = [torch.randn(3, 1, 3, 15, 2, 64, generator=generator).to(device) for _ in range(4)]
    exact_spec, outputs = spec.model_copy(update={"format": "fp32"}), []
    for chosen, settings in ((path, spec), (REFERENCE, exact_spec)):
        cache = KVCache(settings, geometry, device)
        for q, k, v in frames:
            cache.begin(3)
            with cache.committing():
                out = CachedAttention(cache, chosen, commit=True).layer(0)(q, k, v)
        outputs.append(out)
    return float((outputs[0] - outputs[1]).norm() / outputs[1].norm())
