"""What a page format is."""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor

from vidkv.cache.spec import CacheGeometry, CacheSpec

Storage = dict[str, Tensor]
"""Named buffers of a pool; every one has the axes (layers, slots, batch, …)."""


class PageFormat(ABC):
    """How the keys and values of one latent frame of one layer are laid down in memory.

    Keys are stored with row and column rotation and without the frame's. A format holds no state but its
    settings: buffers belong to the pool, the key mean to the cache.

    Shapes: keys and values of m pages are (batch, kv_heads, m, tokens, head_dim).

    Args:
        tokens: of a page; those of a latent frame by default.

    Attributes:
        lossless: decoding gives back the 16-bit (or fp32) values that were written.
        uses_key_mean: `write` and `read` need the frozen mean (batch, kv_heads, head_dim), or one for each
            place (batch, kv_heads, tokens, head_dim) with a `keyframe`, or several (batch, kv_heads, number,
            head_dim) with `centroids`.
        narrow: it has fewer than eight bits a channel.
        fused: the fused read takes these pages as they are (`kernels.paged_attention.PageRun`), unless
            `fused_obstacle` says otherwise of their settings.
    """

    lossless: bool
    uses_key_mean: bool
    narrow: bool = False
    fused: bool

    def __init__(self, spec: CacheSpec, geometry: CacheGeometry, tokens: int | None = None) -> None:
        self.spec, self.geometry = spec, geometry
        self.tokens = geometry.tokens if tokens is None else tokens

    @abstractmethod
    def buffers(self) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        """Shape of one page, without layers and slots but with batch, and dtype of every buffer."""

    @abstractmethod
    def write(
        self, storage: Storage, layer: int, slots: Tensor, k: Tensor, v: Tensor, spatial: Tensor | None,
        mean: Tensor | None,
    ) -> None:  # fmt: skip
        """Encode m pages into slots (m,) int64.

        Args:
            spatial: row and column phases (tokens, pairs) to turn keys by first; None: they are turned.
        """

    @abstractmethod
    def read(
        self, storage: Storage, layer: int, slots: Tensor, dtype: torch.dtype, temporal: Tensor | None,
        mean: Tensor | None,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        """Decode pages from slots (m,) int64 into fresh tensors of `dtype`.

        Args:
            temporal: frame phases (m, pairs) to turn keys by; None leaves them.
        """

    def fused_obstacle(self) -> str | None:
        """Why the fused read does not take these pages, or None."""
        return None if self.fused else f"the fused read does not know pages of {self.spec}"

    def key_noise(self, storage: Storage, layer: int, slots: Tensor) -> Tensor | None:
        """Mean squared error of a channel of the keys (pages, batch, kv_heads); None where it is not kept."""
        return None

    def bytes_per_page(self) -> int:
        """Bytes of one latent frame of one layer, scales included, for the whole batch."""
        return sum(_elements(shape) * dtype.itemsize for shape, dtype in self.buffers().values())

    def layer(self, storage: Storage, layer: int) -> Storage:
        """One layer of the buffers, as views (slots, batch, …)."""
        return {name: buffer[layer] for name, buffer in storage.items()}

    def allocate(self, slots: int, device: torch.device | str) -> Storage:
        """Uninitialised buffers for `slots` frames of every layer."""
        layers = self.geometry.layers
        return {
            name: torch.empty((layers, slots, *shape), dtype=dtype, device=device)
            for name, (shape, dtype) in self.buffers().items()
        }


def _elements(shape: tuple[int, ...]) -> int:
    total = 1
    for size in shape:
        total *= size
    return total
