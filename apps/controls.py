"""What an evaluation of the cache must be able to see: caches that are wrong on purpose, and by what."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from vidkv.cache import KVCache
from vidkv.cache.kv_cache import Run, Segment
from vidkv.cache.layout import OpenChunk
from vidkv.kernels.paged_attention import PageRun


class NoHistory(KVCache):
    """Reads nothing but the current chunk."""

    def _read_plan(self, chunk: OpenChunk) -> tuple[tuple[Segment, ...], tuple[Run, ...]]:
        return (), ()


class ShuffledPages(KVCache):
    """Pages stand at each other's positions."""

    def _read_plan(self, chunk: OpenChunk) -> tuple[tuple[Segment, ...], tuple[Run, ...]]:
        generator = torch.Generator().manual_seed(chunk.start)
        order = torch.randperm(len(chunk.positions), generator=generator).tolist()
        return super()._read_plan(replace(chunk, positions=tuple(chunk.positions[i] for i in order)))


class ShiftedRope(KVCache):
    """History stands one chunk further back than it is."""

    def _read_plan(self, chunk: OpenChunk) -> tuple[tuple[Segment, ...], tuple[Run, ...]]:
        shift = self.geometry.chunk_frames
        return super()._read_plan(replace(chunk, positions=tuple(p - shift for p in chunk.positions)))


class AnotherVideo(KVCache):
    """Every video of the batch reads the pages of its neighbour."""

    def read(
        self, layer: int, segment: Segment, temporal: Sequence[Tensor] | None = None
    ) -> tuple[Tensor, Tensor]:
        k, v = super().read(layer, segment, temporal)
        return k.roll(1, 0), v.roll(1, 0)

    def pages(self, layer: int, run: Run, temporal: Tensor) -> PageRun:
        found = super().pages(layer, run, temporal)
        mean = found.mean.roll(1, 0) if found.mean is not None else None
        return replace(found, pages={name: x.roll(1, 1) for name, x in found.pages.items()}, mean=mean)


class DuplicatedChunk(KVCache):
    """The newest chunk stands twice: at its own positions and in place of the chunk before it."""

    def _read_plan(self, chunk: OpenChunk) -> tuple[tuple[Segment, ...], tuple[Run, ...]]:
        frames, history = self.geometry.chunk_frames, chunk.history
        if len(history) >= 2 * frames:
            newest = history[-frames:]
            chunk = replace(chunk, history=history[: -2 * frames] + newest + newest)
        return super()._read_plan(chunk)


class StaleSinks(KVCache):
    """Sinks are those of another video, as if left over: every video has its neighbour's in the batch."""

    def write(self, layer: int, k: Tensor, v: Tensor, spatial: Tensor | None = None) -> None:
        assert self.opened is not None
        start, (_, sinks) = self.opened.start, self.layout.after_commit()
        stale = [frame - start for frame in sinks if frame >= start]
        k, v = k.clone(), v.clone()
        for x in (k, v):
            x[:, :, stale] = x[:, :, stale].roll(1, 0)
        super().write(layer, k, v, spatial)


class CoarseCodes(KVCache):
    """Keys and values are -2, -1, 0 or 1 times one scale for all that a layer writes of a chunk."""

    def write(self, layer: int, k: Tensor, v: Tensor, spatial: Tensor | None = None) -> None:
        super().write(layer, _two_bits(k), _two_bits(v), spatial)


def _two_bits(x: Tensor) -> Tensor:
    scale = (x.abs().amax() / 2).clamp_min(torch.finfo(x.dtype).tiny)
    return (x / scale).round().clamp(-2, 1) * scale


BROKEN_CACHES: dict[str, type[KVCache]] = {
    "no_history": NoHistory,
    "shuffled_pages": ShuffledPages,
    "rope_off_by_one_chunk": ShiftedRope,
    "another_seeds_cache": AnotherVideo,
    "int2_one_scale_per_tensor": CoarseCodes,
}
"""What the world's metrics must see, see EXPECTED."""

MISREAD_CACHES: dict[str, type[KVCache]] = {
    **BROKEN_CACHES,
    "duplicated_chunk": DuplicatedChunk,
    "stale_sinks": StaleSinks,
}
"""What a comparison with the reference's attention must see; of the last two the embedded world shows
little: its model leans on the newest frames and on the prompt."""


@dataclass(frozen=True)
class Expectation:
    """A control works when its metric rises (+1) or falls (-1).

    Attributes:
        metric: field of RolloutMetrics.
        direction: +1 or -1.
        breaking_chunk_only: compare the chunk in which it breaks instead of all of them.
    """

    metric: str
    direction: int
    breaking_chunk_only: bool = False


EXPECTED: dict[str, Expectation] = {
    "no_history": Expectation("trajectory_rmse", 1),
    "shuffled_pages": Expectation("trajectory_rmse", 1),
    # as if a chunk were missing: objects still move on, but not as themselves
    "rope_off_by_one_chunk": Expectation("identity", -1),
    "another_seeds_cache": Expectation("trajectory_rmse", 1),
    "int2_one_scale_per_tensor": Expectation("trajectory_rmse", 1),
    # once at rest a picture is what one expects of a picture at rest
    "frozen_frames": Expectation("trajectory_rmse", 1, breaking_chunk_only=True),
    "brightness_creep": Expectation("luminance_drift", 1),
}
