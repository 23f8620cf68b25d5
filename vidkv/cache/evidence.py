"""What a rollout's own passes tell of its resident frames: attention mass, and means of keys and queries."""

from __future__ import annotations

from collections.abc import Collection, Sequence

import torch
from einops import reduce
from torch import Tensor

from vidkv.cache.spec import CacheGeometry, CacheSpec
from vidkv.cache.tiers import page_geometry


def evidence_bytes(spec: CacheSpec, geometry: CacheGeometry) -> int:
    """Bytes that `Evidence` allocates."""
    if not spec.select:
        return 0
    return (spec.capacity(geometry.chunk_frames) * 2 + 4) * _elements(page_geometry(spec, geometry))


def _elements(g: CacheGeometry) -> int:
    return g.layers * g.batch * g.kv_heads * g.head_dim


class Evidence:
    """Mean keys of resident frames and mean queries of the last chunk, for a cache that selects.

    Means are over tokens and before rotation, (layers, batch, kv_heads, head_dim): float16 keys, float32
    queries; queries also over the frames of a chunk and the query heads of a group. Heads without pages are
    not among them.
    """

    def __init__(self, spec: CacheSpec, geometry: CacheGeometry, device: torch.device) -> None:
        g = page_geometry(spec, geometry)
        shape = (g.layers, g.batch, g.kv_heads, g.head_dim)
        self.keys = torch.zeros(spec.capacity(g.chunk_frames), *shape, dtype=torch.float16, device=device)
        self.queries = torch.zeros(shape, device=device)
        self.rows: dict[int, int] = {}

    @property
    def nbytes(self) -> int:
        return self.keys.nbytes + self.queries.nbytes

    def arrange(self, resident: Collection[int]) -> None:
        """Give every resident frame a row; those of frames that have left are free."""
        self.rows = {frame: row for frame, row in self.rows.items() if frame in resident}
        free = sorted(set(range(len(self.keys))) - set(self.rows.values()))
        for frame in sorted(set(resident) - set(self.rows)):
            self.rows[frame] = free.pop(0)

    def take(self, layer: int, frames: Sequence[int], q: Tensor, k: Tensor) -> None:
        """Keep the means of one layer of a chunk, as far as its frames stay.

        Args:
            frames: of the chunk.
            q: (batch, frames, tokens, heads, head_dim), k: likewise with kv_heads; not rotated.
        """
        groups = q.shape[3] // k.shape[3]
        self.queries[layer] = reduce(q.float(), "b f s (n g) d -> b n d", "mean", g=groups)
        means = k.float().mean(2).to(self.keys.dtype)
        for index, frame in enumerate(frames):
            if frame in self.rows:
                self.keys[self.rows[frame], layer] = means[:, index]

    def relevance(self, frames: Sequence[int]) -> dict[int, float]:
        """Share of each frame if means were all there is: softmax over frames of q·k / sqrt(d), mean over
        layers and heads."""
        if not frames:
            return {}
        keys = self.keys[[self.rows[frame] for frame in frames]].float()
        scores = (keys * self.queries).sum(-1) / keys.shape[-1] ** 0.5
        shares = scores.softmax(0).flatten(1).mean(1).tolist()
        return dict(zip(frames, shares, strict=True))
