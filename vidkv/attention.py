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

from vidkv.cache.kv_cache import KVCache
from vidkv.cache.layout import Layout
from vidkv.cache.spec import CacheSpec
from vidkv.errors import CacheStateError
from vidkv.kernels.attention import attend, attend_reference, attend_with_lse, merge
from vidkv.kernels.rope import (
    axis_channels,
    rotate,
    rotate_full,
    rotate_spatial,
    rotate_temporal,
    spatial_phases,
    temporal_phases,
)


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
        self.height, self.width = height, width
        reads = _reads(spec, chunks)
        frames, longest, copies = sum(chunks), max(chunks), 2 if clean_history else 1
        keys = max(len(history) for history, *_ in reads) + longest
        rows = copies * len(reads)
        query_frames = torch.zeros(rows, longest, dtype=torch.int64)
        query_valid = torch.zeros(rows, longest, dtype=torch.bool)
        key_frames = torch.zeros(rows, keys, dtype=torch.int64)
        key_valid = torch.zeros(rows, keys, dtype=torch.bool)
        query_positions = torch.zeros(rows, longest, dtype=torch.int64)
        key_positions = torch.zeros(rows, keys, dtype=torch.int64)
        for copy in range(copies):
            for c, (history, positions, start, first) in enumerate(reads):
                row, n, past = copy * len(reads) + c, chunks[c], len(history)
                own = torch.arange(start, start + n) + copy * frames
                query_frames[row, :n], query_valid[row, :n] = own, True
                query_positions[row, :n] = torch.arange(n)
                key_frames[row, :past], key_frames[row, past : past + n] = torch.tensor(history), own
                key_positions[row, :past] = torch.tensor(positions) - first
                key_positions[row, past : past + n] = torch.arange(n)
                key_valid[row, : past + n] = True
        self.query_frames, self.key_frames = query_frames.to(device), key_frames.to(device)
        self.query_positions, self.key_positions = query_positions.to(device), key_positions.to(device)
        self.key_mask = key_valid.repeat_interleave(height * width, 1)[:, None, None].to(device)
        flat = query_frames[query_valid]
        self.restore_order = torch.nonzero(query_valid.flatten()).flatten()[flat.argsort()].to(device)

    def layer(self, index: int) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
        return self._attend

    def _attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        b, head_dim = q.shape[0], q.shape[-1]
        rows, longest = self.query_frames.shape
        spatial = spatial_phases(head_dim, self.height, self.width, q.device, q.dtype)
        q = self._turn(rotate_spatial(q, spatial), self.query_frames, self.query_positions)
        k = self._turn(rotate_spatial(k, spatial), self.key_frames, self.key_positions)
        v = v[:, self.key_frames.flatten()]
        q, k, v = (rearrange(x, "b (r f) s n d -> (b r) n (f s) d", r=rows) for x in (q, k, v))
        mask = self.key_mask.expand(rows, 1, longest * self.height * self.width, -1).repeat(b, 1, 1, 1)
        out = rearrange(attend(q, k, v, mask), "(b r) n (f s) d -> b (r f) s n d", r=rows, f=longest)
        return out[:, self.restore_order]

    @staticmethod
    def _turn(x: Tensor, frames: Tensor, positions: Tensor) -> Tensor:
        phases = temporal_phases(x.shape[-1], positions.flatten(), x.dtype)
        return rotate_temporal(x[:, frames.flatten()], phases)


def _reads(spec: CacheSpec, chunks: Sequence[int]) -> list[tuple[list[int], list[int], int, int]]:
    """Per chunk: frames read, their positions, the chunk's first frame and its position."""
    layout = Layout(spec, chunk_frames=max(chunks))
    reads = []
    for n in chunks:
        opened = layout.begin(n)
        reads.append((list(opened.history), list(opened.positions), opened.start, opened.first_position))
        layout.commit()
    return reads


class CachedAttention:
    """The open chunk reads the cache and itself: the two-pass read path.

    Segment by segment, pages are decoded into scratch and turned to their distance from the chunk's
    first frame; torch's SDPA attends to each segment and the parts are merged by their log-sum-exp.
    Scratch is one segment, whatever the window.

    Args:
        cache: with an open chunk.
        commit: write each layer's keys and values after reading it (the clean pass).
        reference: attend in plain torch at float64 instead of through the fused operators.
    """

    def __init__(self, cache: KVCache, commit: bool = False, reference: bool = False) -> None:
        if cache.opened is None:
            raise CacheStateError("the cache has no open chunk to attend from")
        self.cache, self.commit = cache, commit
        self.attend = _attend_float64 if reference else attend_with_lse
        g, first, device = cache.geometry, cache.opened.first_position, cache.device
        self.spatial = spatial_phases(g.head_dim, g.height, g.width, device)
        self.own = temporal_phases(g.head_dim, torch.arange(cache.opened.frames, device=device))
        self.past = [
            temporal_phases(g.head_dim, torch.tensor(segment.positions, device=device) - first)
            for segment in cache.segments
        ]

    def layer(self, index: int) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
        return partial(self._attend, index)

    def _attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        frames = q.shape[1]
        q = rearrange(rotate_full(q, self.own, self.spatial), "b f s n d -> b n (f s) d")
        k = rearrange(rotate_spatial(k, self.spatial), "b f s n d -> b n f s d")
        v = rearrange(v, "b f s n d -> b n f s d")
        out, lse = self._part(q, k, v, self.own)
        out = out.float()
        for segment, phases in zip(self.cache.segments, self.past, strict=True):
            past_k, past_v = self.cache.read(layer, segment)
            out, lse = merge(out, lse, *self._part(q, past_k, past_v, phases))
        if self.commit:
            self.cache.write(layer, k, v)
        return rearrange(out.to(q.dtype), "b n (f s) d -> b f s n d", f=frames)

    def _part(self, q: Tensor, k: Tensor, v: Tensor, phases: Tensor) -> tuple[Tensor, Tensor]:
        """Attention of q over pages k, v (b, n, pages, s, d), keys turned by phases (pages, pairs)."""
        time = axis_channels(k.shape[-1])[0]
        k = torch.cat([rotate(k[..., :time], phases[:, None]), k[..., time:]], -1)
        return self.attend(q, k.flatten(2, 3), v.flatten(2, 3).contiguous())


def _attend_float64(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    out, lse = attend_reference(q.double(), k.double(), v.double())
    return out, lse
