"""Caches that are wrong on purpose: what an evaluation of the cache must be able to see."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from vidkv.cache import KVCache
from vidkv.cache.kv_cache import Segment
from vidkv.cache.layout import OpenChunk


class NoHistory(KVCache):
    """Reads nothing but the current chunk."""

    def _read_plan(self, chunk: OpenChunk) -> tuple[Segment, ...]:
        return ()


class ShuffledPages(KVCache):
    """Pages stand at each other's positions."""

    def _read_plan(self, chunk: OpenChunk) -> tuple[Segment, ...]:
        generator = torch.Generator().manual_seed(chunk.start)
        order = torch.randperm(len(chunk.positions), generator=generator).tolist()
        return super()._read_plan(replace(chunk, positions=tuple(chunk.positions[i] for i in order)))


class ShiftedRope(KVCache):
    """History stands one chunk further back than it is."""

    def _read_plan(self, chunk: OpenChunk) -> tuple[Segment, ...]:
        shift = self.geometry.chunk_frames
        return super()._read_plan(replace(chunk, positions=tuple(p - shift for p in chunk.positions)))


class AnotherVideo(KVCache):
    """Every video of the batch reads the pages of its neighbour."""

    def read(self, layer: int, segment: Segment) -> tuple[Tensor, Tensor]:
        k, v = super().read(layer, segment)
        return k.roll(1, 0), v.roll(1, 0)


BROKEN_CACHES: dict[str, type[KVCache]] = {
    "no_history": NoHistory,
    "shuffled_pages": ShuffledPages,
    "rope_off_by_one_chunk": ShiftedRope,
    "another_seeds_cache": AnotherVideo,
}
