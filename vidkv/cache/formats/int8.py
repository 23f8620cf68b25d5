"""INT8 pages: symmetric codes, an fp16 scale per token and head, keys minus a frozen mean."""

from __future__ import annotations

import torch
from torch import Tensor

from vidkv.cache.formats.base import PageFormat, Storage
from vidkv.kernels.pages import commit, decode


class Int8(PageFormat):
    """Keys as INT8 of k - mean with a scale per (token, head); values per (token, head) or channel.

    Wan's keys share a large per-channel offset; taking out one mean per layer and head, frozen at the
    first commit, leaves the codes for what differs (SageAttention, arXiv 2410.02367). The mean is added
    back at every read, because the query's rotation differs from page to page and a constant shift of
    the keys is then not invisible to softmax.
    """

    lossless = False
    uses_key_mean = True
    fused = True

    def buffers(self) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        g = self.geometry
        codes = (g.batch, g.kv_heads, self.tokens, g.head_dim)
        per_token = (g.batch, g.kv_heads, self.tokens, 1)
        per_channel = (g.batch, g.kv_heads, 1, g.head_dim)
        return {
            "k": (codes, torch.int8),
            "v": (codes, torch.int8),
            "k_scale": (per_token, torch.float16),
            "v_scale": (per_token if self.spec.value_scale == "token" else per_channel, torch.float16),
        }

    def write(
        self, storage: Storage, layer: int, slots: Tensor, k: Tensor, v: Tensor, spatial: Tensor | None,
        mean: Tensor | None,
    ) -> None:  # fmt: skip
        assert mean is not None
        commit(self.layer(storage, layer), slots, k, v, spatial, mean)

    def read(
        self, storage: Storage, layer: int, slots: Tensor, dtype: torch.dtype, temporal: Tensor | None,
        mean: Tensor | None,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        assert mean is not None
        return decode(self.layer(storage, layer), slots, temporal, mean, dtype)
