"""The cache, spelled out: a Python list of frames that hold their tensors."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from torch import Tensor

from tests.tiny import noise
from vidkv.cache import CacheGeometry, CacheSpec, KVCache


def quantized(x: Tensor, axis: int) -> Tensor:
    """What INT8 keeps of x, in numpy: scale = max|x| / 127 rounded up to a float16, then round to even."""
    values = x.float().numpy()
    exact = np.abs(values).max(axis, keepdims=True) / np.float32(127)
    limit = np.finfo(np.float16)
    exact = np.clip(exact, np.float32(limit.smallest_normal), np.float32(limit.max))
    scale = exact.astype(np.float16)
    scale = np.where(scale < exact, np.nextafter(scale, np.float16(np.inf)), scale).astype(np.float32)
    return torch.from_numpy(np.clip(np.rint(values / scale), -127, 127) * scale)


def packed(x: Tensor, bits: int) -> Tensor:
    """What a packed page keeps of x with a scale per token that clips nothing, in numpy."""
    values, top = x.float().numpy(), np.float32((2**bits - 1) / 2)
    limit = np.finfo(np.float16)
    exact = np.abs(values).max(-1, keepdims=True) / top
    exact = np.clip(exact, np.float32(limit.smallest_normal), np.float32(limit.max))
    scale = exact.astype(np.float16)
    scale = np.where(scale < exact, np.nextafter(scale, np.float16(np.inf)), scale).astype(np.float32)
    codes = np.clip(np.rint(values / scale + top), 0, 2 * top)
    return torch.from_numpy((codes - top) * scale)


BITS = {"k8v4": (8, 4), "int4": (4, 4)}


@dataclass
class Frame:
    """One latent frame. keys, values: (layers, batch, heads, tokens, d) as they came into the tier."""

    index: int
    keys: Tensor
    values: Tensor
    tier: str = ""


@dataclass
class Oracle:
    """What a cache must hold and say, kept the slow way."""

    spec: CacheSpec
    geometry: CacheGeometry
    dtype: torch.dtype = torch.float32
    frames: list[Frame] = field(default_factory=list)
    next_frame: int = 0
    mean: Tensor | None = None
    keyframe: Tensor | None = None

    @property
    def capacity(self) -> int:
        return self.spec.window - self.geometry.chunk_frames

    @property
    def read(self) -> list[Frame]:
        """Frames that the next chunk reads; no pass has told of any of them."""
        room = (self.spec.select or self.spec.window) - self.geometry.chunk_frames
        if len(self.frames) <= room:
            return self.frames
        return [*self.frames[: self.spec.sink], *self.frames[len(self.frames) - room + self.spec.sink :]]

    def positions(self) -> tuple[list[int], int]:
        """Of what is read, and of the next chunk's first frame."""
        read = self.read
        if self.spec.positions == "absolute":
            return [frame.index for frame in read], self.next_frame
        return list(range(len(read))), len(read)

    def decoded(self, layer: int) -> tuple[Tensor, Tensor]:
        """Keys and values that a read gives: (batch, heads, frames, tokens, d)."""
        pairs = [self._decoded(frame) for frame in self.read]
        return torch.stack([k[layer] for k, _ in pairs], 2), torch.stack([v[layer] for _, v in pairs], 2)

    def _decoded(self, frame: Frame) -> tuple[Tensor, Tensor]:
        """Of all layers."""
        k, v = frame.keys, frame.values
        format = self.spec.format if frame.tier == "pages" else frame.tier
        if format == "int8":
            assert self.mean is not None
            mean = self.mean[:, :, :, None]
            k = quantized(k.float() - mean, -1) + mean
            v = quantized(v, -1 if self.spec.value_scale == "token" else -2)
        elif format in BITS:
            assert self.mean is not None
            mean = self.mean[:, :, :, None] if self.keyframe is None else self.keyframe
            k = packed(k.float() - mean, BITS[format][0]) + mean
            v = packed(v, BITS[format][1])
        elif format == "bf16":
            k, v = k.bfloat16(), v.bfloat16()
        return k.to(self.dtype), v.to(self.dtype)

    def commit(self, keys: Tensor, values: Tensor) -> None:
        """keys, values: (layers, batch, heads, frames, tokens, d)."""
        if self.mean is None:
            self.mean = keys.float().mean((3, 4))
            if self.spec.keyframe:
                self.keyframe = keys.float().mean(3).bfloat16().float()
        for i in range(keys.shape[3]):
            self.frames.append(Frame(self.next_frame, keys[:, :, :, i], values[:, :, :, i]))
            self.next_frame += 1
        while len(self.frames) > self.capacity:
            self.frames.remove(next(f for f in self.frames if f.index >= self.spec.sink))
        for frame in self.frames:
            tier = self._tier(frame)
            if frame.tier not in ("", tier):
                frame.keys, frame.values = self._decoded(frame)
            frame.tier = tier

    def _tier(self, frame: Frame) -> str:
        spec = self.spec
        ages = [("full", self.geometry.chunk_frames)] if spec.keep_newest else []
        ages += [(part.split(":")[0], int(part.split(":")[1])) for part in spec.newer.split("+") if part]
        if spec.format in ("fp32", "bf16"):
            return "pages"
        if spec.keep_sinks and frame.index < spec.sink:
            return ages[0][0] if ages else "full"
        age = self.next_frame - 1 - frame.index
        for name, frames in ages:
            if age < frames:
                return name
            age -= frames
        return "pages"

    def fork(self) -> Oracle:
        other = replace(self, frames=[replace(frame) for frame in self.frames])
        return other


def chunk_tensors(
    geometry: CacheGeometry, frames: int, seed: int, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor]:
    """Keys and values (layers, batch, heads, frames, tokens, d); keys share an offset as Wan's do."""
    g = geometry
    shape = (g.layers, g.batch, g.kv_heads, frames, g.tokens, g.head_dim)
    offset = 3 * noise(g.layers, 1, g.kv_heads, 1, 1, g.head_dim, seed=1)
    return (noise(*shape, seed=seed) + offset).to(dtype), noise(*shape, seed=seed + 1).to(dtype)


def read_all(cache: KVCache, layer: int) -> tuple[Tensor, Tensor] | None:
    """Everything the open chunk may read, in order: (batch, heads, pages, tokens, d)."""
    parts = [cache.read(layer, segment) for segment in cache.segments]
    if not parts:
        return None
    tokens = cache.geometry.tokens
    k, v = (torch.cat(side, 2).unflatten(2, (-1, tokens)) for side in zip(*parts, strict=True))
    return k, v


def assert_reads(cache: KVCache, oracle: Oracle) -> None:
    """The open chunk sees what the oracle holds: frames, positions, values."""
    assert cache.opened is not None
    positions, first = oracle.positions()
    assert list(cache.opened.history) == [frame.index for frame in oracle.read]
    assert list(cache.opened.positions) == positions
    assert cache.opened.first_position == first
    assert cache.opened.start == oracle.next_frame
    sizes = [sum(len(run.slots) for run in segment) for segment in cache.segments]
    assert all(size == cache.spec.segment for size in sizes[:-1])
    offsets = [position - first for position in positions]
    assert [o for segment in cache.segments for run in segment for o in run.offsets.tolist()] == offsets
    if not any(run.waiting for segment in cache.segments for run in segment):
        assert sorted(o for run in cache.history for o in run.offsets.tolist()) == offsets
    for layer in range(cache.geometry.layers):
        found = read_all(cache, layer)
        if not oracle.frames:
            assert found is None
            continue
        assert found is not None
        for got, wanted in zip(found, oracle.decoded(layer), strict=True):
            assert got.dtype == cache.dtype
            assert torch.equal(got, wanted)


def step(cache: KVCache, oracle: Oracle, frames: int, seed: int) -> None:
    """One chunk: compare what is read, while denoising and again in the clean pass, and commit."""
    keys, values = chunk_tensors(cache.geometry, frames, seed, cache.dtype)
    cache.begin(frames)
    # said by some, as `CachedAttention` does, and not by others
    if seed % 20:
        cache.expect(cache.segments, again=True)
    assert_reads(cache, oracle)
    with cache.committing():
        for layer in range(cache.geometry.layers):
            found = read_all(cache, layer)
            if found is not None:
                assert torch.equal(found[0], oracle.decoded(layer)[0])
            cache.write(layer, keys[layer], values[layer])
    oracle.commit(keys, values)
    assert list(cache.layout.resident) == [frame.index for frame in oracle.frames]
    for frame in oracle.frames:
        assert cache.table[frame.index].pool == frame.tier
    cache.check_integrity()


def page_hash(cache: KVCache, frame: int) -> str:
    """Digest of all bytes of one frame, wherever it lies."""
    digest = hashlib.sha256()
    for _, buffer in sorted(cache.page(frame).items()):
        digest.update(buffer.contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def poison_free_slots(cache: KVCache) -> int:
    """Fill what no page table holds with NaN, or codes of 127; returns how many slots."""
    count = 0
    for pool in cache.pools.values():
        free = [slot for slot, references in enumerate(pool.references) if not references]
        for buffer in pool.storage.values():
            buffer[:, free] = float("nan") if buffer.is_floating_point() else 127
        count += len(free)
    return count


def shuffle_slots(cache: KVCache, seed: int) -> None:
    """Move every page to another slot; nobody but the page table may notice."""
    for name, pool in cache.pools.items():
        if not pool.slots:
            continue
        order = np.random.default_rng(seed).permutation(pool.slots)
        for buffer in pool.storage.values():
            buffer.copy_(buffer[:, torch.from_numpy(order)].clone())
        pool.references = [pool.references[i] for i in order]
        place = {int(old): new for new, old in enumerate(order)}
        for frame, page in cache.table.items():
            if page.pool == name:
                cache.table[frame] = type(page)(name, place[page.slot], page.serial)
