"""What a page format is."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch
from torch import Tensor

from vidkv.cache.spec import CacheGeometry, CacheSpec

Storage = dict[str, Tensor]
"""Named buffers of a pool; every one has the axes (layers, slots, batch, …)."""


class PageFormat(ABC):
    """How the keys and values of one latent frame of one layer are laid down in memory.

    Keys arrive with row and column rotation applied and without the frame's. A format holds no state
    but its settings: buffers belong to the pool, the key mean to the cache.

    Shapes: keys and values of m pages are (batch, kv_heads, m, tokens, head_dim).

    Attributes:
        lossless: decoding gives back the 16-bit (or fp32) values that were written.
        uses_key_mean: `write` and `read` need the frozen mean (batch, kv_heads, head_dim).
    """

    lossless: bool
    uses_key_mean: bool

    def __init__(self, spec: CacheSpec, geometry: CacheGeometry) -> None:
        self.spec, self.geometry = spec, geometry

    @abstractmethod
    def buffers(self) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        """Shape of one page, without layers and slots but with batch, and dtype of every buffer."""

    @abstractmethod
    def write(
        self, storage: Storage, layer: int, slots: Sequence[int], k: Tensor, v: Tensor, mean: Tensor | None
    ) -> None:
        """Encode m pages into m slots."""

    @abstractmethod
    def read(
        self, storage: Storage, layer: int, slots: Tensor, dtype: torch.dtype, mean: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Decode pages from slots (m,) int64 into fresh tensors of `dtype`."""

    def bytes_per_page(self) -> int:
        """Bytes of one latent frame of one layer, scales included, for the whole batch."""
        return sum(_elements(shape) * dtype.itemsize for shape, dtype in self.buffers().values())

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
