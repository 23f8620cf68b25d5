"""Pages as they are: float32 or bfloat16."""

from __future__ import annotations

import torch
from torch import Tensor

from vidkv.cache.formats.base import PageFormat, Storage
from vidkv.kernels.pages import commit, decode


class Plain(PageFormat):
    """Keys and values in one floating-point dtype."""

    lossless = True
    uses_key_mean = False
    fused = True
    dtype: torch.dtype

    def buffers(self) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        g = self.geometry
        shape = (g.batch, g.kv_heads, self.tokens, g.head_dim)
        return {"k": (shape, self.dtype), "v": (shape, self.dtype)}

    def write(
        self, storage: Storage, layer: int, slots: Tensor, k: Tensor, v: Tensor, spatial: Tensor | None,
        mean: Tensor | None,
    ) -> None:  # fmt: skip
        commit(self.layer(storage, layer), slots, k, v, spatial, None)

    def read(
        self, storage: Storage, layer: int, slots: Tensor, dtype: torch.dtype, temporal: Tensor | None,
        mean: Tensor | None,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        return decode(self.layer(storage, layer), slots, temporal, None, dtype)


class FP32(Plain):
    """The default on a CPU."""

    dtype = torch.float32


class BF16(Plain):
    """The default on a GPU."""

    dtype = torch.bfloat16
