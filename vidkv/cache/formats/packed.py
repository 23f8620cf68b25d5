"""Pages of two to eight bits, for keys and values apart: storage formats, which most reads decode."""

from __future__ import annotations

import torch
from torch import Tensor

from vidkv.cache.centroids import nearest, taken_from
from vidkv.cache.formats.base import PageFormat, Storage
from vidkv.cache.spec import CacheGeometry, CacheSpec
from vidkv.errors import CacheSpecError
from vidkv.kernels.packed import decode, encode
from vidkv.kernels.rope import rotate_first, rotate_last


class Packed(PageFormat):
    """Keys minus a frozen mean, and values, as packed codes (`vidkv.kernels.packed`).

    The spec says what a scale covers (`group`, `key_scale`, `value_scale`), whether channels are turned by a
    Hadamard matrix first (`hadamard`), how scales are fitted (`fit`), and whether keys are coded against the
    mean of the first chunk at their own place in the picture (`keyframe`: what stands still costs nothing)
    rather than one mean of all places, or against the nearest of several means (`centroids`).

    Attributes:
        key_bits, value_bits: of a channel.
    """

    lossless = False
    uses_key_mean = True
    narrow = True
    fused = False
    key_bits: int
    value_bits: int

    def __init__(self, spec: CacheSpec, geometry: CacheGeometry, tokens: int | None = None) -> None:
        super().__init__(spec, geometry, tokens)
        # the fused read knows one mean of a page
        self.fused = self.fused and not spec.centroids
        d = geometry.head_dim
        self.group = spec.group or d
        if d % self.group:
            raise CacheSpecError(f"group={spec.group} does not divide a head of {d} channels")
        if d % (8 // min(self.key_bits, self.value_bits)):
            raise CacheSpecError(
                f"{spec.format} pages cannot hold heads of {d} channels; use int8 or 16 bits"
            )
        if spec.hadamard and d & (d - 1):
            raise CacheSpecError(
                f"hadamard needs heads of 2, 4, 8, … channels, not {d}; say hadamard=false for this model"
            )

    def buffers(self) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        g = self.geometry
        shapes: dict[str, tuple[tuple[int, ...], torch.dtype]] = {}
        for name, bits, per_channel in self._sides():
            scales = (1, g.head_dim) if per_channel else (self.tokens, g.head_dim // self.group)
            shapes[name] = (g.batch, g.kv_heads, self.tokens, g.head_dim * bits // 8), torch.uint8
            shapes[f"{name}_scale"] = (g.batch, g.kv_heads, *scales), torch.float16
        if self.spec.centroids:
            shapes["k_nearest"] = (g.batch, g.kv_heads, self.tokens), torch.uint8
        if self.spec.jensen:
            shapes["k_noise"] = (g.batch, g.kv_heads), torch.float32
        return shapes

    def write(
        self, storage: Storage, layer: int, slots: Tensor, k: Tensor, v: Tensor, spatial: Tensor | None,
        mean: Tensor | None,
    ) -> None:  # fmt: skip
        assert mean is not None
        k = k.float() if spatial is None else rotate_last(k.float(), spatial)
        pages = self.layer(storage, layer)
        coded, taken_out = k, None
        if self.spec.centroids:
            index = nearest(k.flatten(2, 3), mean.float()).view(k.shape[:-1])
            pages["k_nearest"].index_copy_(0, slots, index.movedim(2, 0))
            coded = k - taken_from(mean, index)
        else:
            taken_out = _placed(mean)
        for x, taken, (name, bits, _) in zip((coded, v), (taken_out, None), self._sides(), strict=True):
            encode(
                x, pages[name], pages[f"{name}_scale"], slots, bits, self.group, self.spec.hadamard,
                self.spec.fit == "error", taken,
            )  # fmt: skip
        if self.spec.jensen:
            decoded = self._keys(pages, slots, mean, None, torch.float32)
            noise = (decoded - k).square().mean((3, 4))
            pages["k_noise"].index_copy_(0, slots, noise.movedim(2, 0))

    def read(
        self, storage: Storage, layer: int, slots: Tensor, dtype: torch.dtype, temporal: Tensor | None,
        mean: Tensor | None,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        assert mean is not None
        pages = self.layer(storage, layer)
        k = self._keys(pages, slots, mean, temporal, dtype)
        return k, self._decoded(pages, "v", slots, None, None, dtype)

    def key_noise(self, storage: Storage, layer: int, slots: Tensor) -> Tensor | None:
        return storage["k_noise"][layer].index_select(0, slots) if self.spec.jensen else None

    def _keys(
        self, pages: Storage, slots: Tensor, mean: Tensor, temporal: Tensor | None, dtype: torch.dtype
    ) -> Tensor:
        if not self.spec.centroids:
            return self._decoded(pages, "k", slots, _placed(mean), temporal, dtype)
        wide = torch.promote_types(dtype, torch.float32)
        index = pages["k_nearest"].index_select(0, slots).movedim(0, 2)
        k = self._decoded(pages, "k", slots, None, None, wide).add_(taken_from(mean, index))
        return (k if temporal is None else rotate_first(k, temporal[:, None])).to(dtype)

    def _decoded(
        self, pages: Storage, name: str, slots: Tensor, mean: Tensor | None, temporal: Tensor | None,
        dtype: torch.dtype,
    ) -> Tensor:  # fmt: skip
        bits = self.key_bits if name == "k" else self.value_bits
        scale = pages[f"{name}_scale"]
        return decode(pages[name], scale, slots, bits, self.spec.hadamard, mean, temporal, dtype)

    def _sides(self) -> tuple[tuple[str, int, bool], tuple[str, int, bool]]:
        """(buffer, bits, whether a scale covers a channel) of keys and values."""
        spec = self.spec
        return (
            ("k", self.key_bits, spec.key_scale == "channel"),
            ("v", self.value_bits, spec.value_scale == "channel"),
        )


def _placed(mean: Tensor) -> Tensor:
    """A mean of each place, or one for all of them, (batch, kv_heads, 1 or tokens, head_dim)."""
    return mean.float() if mean.dim() == 4 else mean[:, :, None]


class Int4(Packed):
    """Half the bytes of INT8. The fused read takes pages whose keys have a scale per token."""

    fused = True
    key_bits = value_bits = 4

    def fused_obstacle(self) -> str | None:
        spec = self.spec
        unread = {
            f"group={spec.group}": self.group != self.geometry.head_dim,
            "key_scale=channel": spec.key_scale == "channel",
            "keyframe": spec.keyframe,
            "jensen": spec.jensen,
        }
        for setting in (name for name, given in unread.items() if given):
            return f"the fused read takes int4 pages without {setting}"
        return super().fused_obstacle()


class Int2(Packed):
    """A quarter of the bytes of INT8; most of what keys say is lost (see `keyframe`)."""

    key_bits = value_bits = 2


class K8V4(Packed):
    """Keys need more bits than values: errors in them move attention itself."""

    key_bits, value_bits = 8, 4


class K4V2(Packed):
    """Likewise, at three bits."""

    key_bits, value_bits = 4, 2
