"""INT8 pages: symmetric codes, an fp16 scale per token and head, keys minus a frozen mean."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from vidkv.cache.formats.base import PageFormat, Storage
from vidkv.kernels.int8 import dequantize, quantize


class Int8(PageFormat):
    """Keys as INT8 of k - mean with a scale per (token, head); values per (token, head) or channel.

    Wan's keys share a large per-channel offset; taking out one mean per layer and head, frozen at the
    first commit, leaves the codes for what differs (SageAttention, arXiv 2410.02367). The mean is added
    back at every read, because the query's rotation differs from page to page and a constant shift of
    the keys is then not invisible to softmax.
    """

    lossless = False
    uses_key_mean = True

    def buffers(self) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        g = self.geometry
        codes = (g.batch, g.kv_heads, g.tokens, g.head_dim)
        per_token = (g.batch, g.kv_heads, g.tokens, 1)
        per_channel = (g.batch, g.kv_heads, 1, g.head_dim)
        return {
            "k": (codes, torch.int8),
            "v": (codes, torch.int8),
            "k_scale": (per_token, torch.float16),
            "v_scale": (per_token if self.spec.value_scale == "token" else per_channel, torch.float16),
        }

    def write(
        self, storage: Storage, layer: int, slots: Sequence[int], k: Tensor, v: Tensor, mean: Tensor | None
    ) -> None:
        assert mean is not None
        k_codes, k_scale = quantize(k.float() - mean[:, :, None, None])
        v_codes, v_scale = quantize(v, -1 if self.spec.value_scale == "token" else -2)
        for name, pages in (("k", k_codes), ("v", v_codes), ("k_scale", k_scale), ("v_scale", v_scale)):
            for i, slot in enumerate(slots):
                storage[name][layer, slot] = pages[:, :, i]

    def read(
        self, storage: Storage, layer: int, slots: Tensor, dtype: torch.dtype, mean: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        assert mean is not None
        pages = {name: buffer[layer].index_select(0, slots) for name, buffer in storage.items()}
        k = dequantize(pages["k"], pages["k_scale"]) + mean[:, :, None]
        v = dequantize(pages["v"], pages["v_scale"], dtype)
        return k.to(dtype).permute(1, 2, 0, 3, 4), v.permute(1, 2, 0, 3, 4)
