"""Pages as they are: float32 or bfloat16."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from vidkv.cache.formats.base import PageFormat, Storage


class Plain(PageFormat):
    """Keys and values in one floating-point dtype."""

    lossless = True
    uses_key_mean = False
    dtype: torch.dtype

    def buffers(self) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        g = self.geometry
        shape = (g.batch, g.kv_heads, g.tokens, g.head_dim)
        return {"k": (shape, self.dtype), "v": (shape, self.dtype)}

    def write(
        self, storage: Storage, layer: int, slots: Sequence[int], k: Tensor, v: Tensor, mean: Tensor | None
    ) -> None:
        for i, slot in enumerate(slots):
            storage["k"][layer, slot] = k[:, :, i]
            storage["v"][layer, slot] = v[:, :, i]

    def read(
        self, storage: Storage, layer: int, slots: Tensor, dtype: torch.dtype, mean: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        k = storage["k"][layer].index_select(0, slots).permute(1, 2, 0, 3, 4)
        v = storage["v"][layer].index_select(0, slots).permute(1, 2, 0, 3, 4)
        return k.to(dtype), v.to(dtype)


class FP32(Plain):
    """The default on a CPU."""

    dtype = torch.float32


class BF16(Plain):
    """The default on a GPU."""

    dtype = torch.bfloat16
