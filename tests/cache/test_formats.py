"""What every page format owes the cache; a new one in the registry is tested by being there."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence

import pytest
import torch
from torch import Tensor

from tests.cache.test_evidence import cache_of, chunk, run
from tests.tiny import build_geometry, noise, relative_l2
from vidkv.attention import BlockCausalAttention, CachedAttention
from vidkv.cache import CacheGeometry, CacheSpec, KVCache, planned_bytes
from vidkv.cache.formats import FORMATS
from vidkv.cache.formats.base import PageFormat, Storage
from vidkv.cache.policies import POLICIES
from vidkv.cache.policies.mass import HeavyHitter
from vidkv.kernels.rope import rotate_first, spatial_phases, temporal_phases

GEOMETRY = build_geometry(layers=2, kv_heads=2, head_dim=32, height=2, width=3, batch=2)
BITS_OF_ERROR = {
    "fp32": 0.0,
    "bf16": 0.004,
    "int8": 0.01,
    "k8v4": 0.15,
    "int4": 0.15,
    "k4v2": 0.6,
    "int2": 0.6,
}
"""Relative error of normal numbers; a new format's must be at most that of the coarsest."""
SLOTS = torch.tensor([4, 0, 2])


def made(name: str) -> tuple[PageFormat, Storage, Tensor, Tensor, Tensor]:
    """A format, six poisoned slots, three frames of keys and values, and a mean."""
    format = FORMATS[name](CacheSpec.parse(name), GEOMETRY)
    storage = format.allocate(6, "cpu")
    for buffer in storage.values():
        buffer.fill_(math.nan if buffer.is_floating_point() else 93)
    k, v = (noise(2, 2, 3, 6, 32, seed=seed) for seed in (1, 2))
    return format, storage, k, v, noise(2, 2, 32, seed=3)


@pytest.mark.parametrize("name", FORMATS)
class TestEveryFormat:
    def test_bytes_are_what_it_says(self, name: str) -> None:
        format, storage, *_ = made(name)
        held = sum(buffer.nbytes for buffer in storage.values())
        assert held == 6 * GEOMETRY.layers * format.bytes_per_page()
        assert all(buffer.shape[:3] == (2, 6, 2) for buffer in storage.values())

    def test_pages_come_back_from_their_slots(self, name: str) -> None:
        format, storage, k, v, mean = made(name)
        format.write(storage, 1, SLOTS, k, v, None, mean)
        got = format.read(storage, 1, SLOTS, torch.float32, None, mean)
        for found, wanted in zip(got, (k, v), strict=True):
            assert found.shape == wanted.shape and found.dtype == torch.float32
            assert relative_l2(found, wanted) <= BITS_OF_ERROR.get(name, max(BITS_OF_ERROR.values()))
            if format.lossless and name == "fp32":
                assert torch.equal(found, wanted)
        one = format.read(storage, 1, SLOTS[1:2], torch.float32, None, mean)
        assert torch.equal(one[0][:, :, 0], got[0][:, :, 1]) and torch.equal(one[1][:, :, 0], got[1][:, :, 1])

    def test_nothing_else_is_written(self, name: str) -> None:
        format, storage, k, v, mean = made(name)
        before = {key: buffer.clone() for key, buffer in storage.items()}
        format.write(storage, 1, SLOTS, k, v, None, mean)
        for key, buffer in storage.items():
            assert torch.equal(buffer[0].nan_to_num(7), before[key][0].nan_to_num(7))
            assert torch.equal(buffer[1, [1, 3, 5]].nan_to_num(7), before[key][1, [1, 3, 5]].nan_to_num(7))

    def test_keys_are_turned_by_place_and_by_time(self, name: str) -> None:
        """Once in `write`, once in `read`, whatever is between."""
        format, storage, k, v, mean = made(name)
        spatial = spatial_phases(32, 2, 3)
        format.write(storage, 0, SLOTS, k, v, spatial, mean)
        plain, _ = format.read(storage, 0, SLOTS, torch.float64, None, mean)
        phases = temporal_phases(32, torch.tensor([-5, -2, -1]))
        turned, _ = format.read(storage, 0, SLOTS, torch.float64, phases, mean)
        assert relative_l2(turned, rotate_first(plain, phases[:, None])) < 1e-6
        other = FORMATS[name](CacheSpec.parse(name), GEOMETRY)
        again = other.allocate(6, "cpu")
        from vidkv.kernels.rope import rotate_last

        other.write(again, 0, SLOTS, rotate_last(k, spatial), v, None, mean)
        assert relative_l2(other.read(again, 0, SLOTS, torch.float64, None, mean)[0], plain) < 0.02

    def test_saying_it_again_says_the_same(self, name: str) -> None:
        """A page that is decoded and coded once more is nearly the same page."""
        format, storage, k, v, mean = made(name)
        format.write(storage, 0, SLOTS, k, v, None, mean)
        once = format.read(storage, 0, SLOTS, torch.float32, None, mean)
        format.write(storage, 0, SLOTS, *once, None, mean)
        twice = format.read(storage, 0, SLOTS, torch.float32, None, mean)
        for a, b, wanted in zip(twice, once, (k, v), strict=True):
            assert relative_l2(a, b) <= 0.35 * max(relative_l2(b, wanted), 1e-9)

    def test_in_a_cache_of_few_heads(self, name: str) -> None:
        """MQA: six query heads share one key head, through the read path, and bytes are a sixth."""
        outputs = []
        for format in (name, "fp32"):
            geometry = build_geometry(layers=1, kv_heads=1, head_dim=32, height=2, width=3, chunk_frames=2)
            cache = cache_of(f"{format},window=12,sink=2", geometry)
            run(cache, [chunk(i, geometry, heads=6) for i in range(5)])
            assert cache.nbytes == planned_bytes(cache.spec, geometry, torch.float32)
            cache.begin(2)
            outputs.append(CachedAttention(cache).layer(0)(*chunk(9, geometry, heads=6)))
        assert relative_l2(*outputs) <= BITS_OF_ERROR.get(name, 0.6)

    def test_with_heads_that_keep_no_pages(self, name: str, poisoned_empty: None) -> None:
        """Those that do read what they read beside the others; the others read the chunk alone."""
        geometry = build_geometry(
            layers=2, kv_heads=3, head_dim=32, height=2, width=3, chunk_frames=2, batch=2,
            head_order=((2, 0, 1), (1, 2, 0)),
        )  # fmt: skip
        spec, outputs = f"{name},window=12,sink=2,segment=3", []
        for settings in (spec, f"{spec},local_heads=1"):
            cache = cache_of(settings, geometry)
            run(cache, [chunk(i, geometry, heads=6) for i in range(6)])
            assert cache.nbytes == planned_bytes(cache.spec, geometry, torch.float32)
            cache.begin(2)
            reader = CachedAttention(cache)
            outputs.append([reader.layer(layer)(*chunk(9, geometry, heads=6)) for layer in range(2)])
        pools = [buffer for pool in cache.pools.values() for buffer in pool.storage.values()]
        assert all(buffer.shape[3] == 2 for buffer in pools), "of three heads two keep pages"
        reads = BlockCausalAttention(2, 3, CacheSpec(window=2, sink=0), [2]).layer(0)
        alone = reads(*chunk(9, geometry, heads=6))
        for layer, (whole, parted) in enumerate(zip(*outputs, strict=True)):
            local = geometry.head_order[layer][0]
            for head in range(6):
                wanted = alone if head // 2 == local else whole
                assert relative_l2(parted[..., head, :], wanted[..., head, :]) < 1e-5, (layer, head)
            assert relative_l2(whole[..., 2 * local, :], alone[..., 2 * local, :]) > 0.1


class Latent(PageFormat):
    """Pages of multi-head latent attention (DeepSeek-V2, arXiv 2405.04434): of keys and values only a vector
    per token is kept, from which all heads' are made. What the projections would be trained for is here their
    exact inverse on the keys and values at hand."""

    lossless = False
    uses_key_mean = False
    fused = False
    rank = 8

    def buffers(self) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        return {"latent": ((self.geometry.batch, self.tokens, self.rank), torch.float32)}

    def up(self) -> Tensor:
        """(rank, 2 · kv heads · d)."""
        return noise(self.rank, 2 * self.geometry.kv_heads * self.geometry.head_dim, seed=99)

    def write(
        self, storage: Storage, layer: int, slots: Tensor, k: Tensor, v: Tensor, spatial: Tensor | None,
        mean: Tensor | None,
    ) -> None:  # fmt: skip
        both = torch.cat([k, v], 1).permute(2, 0, 3, 1, 4).flatten(-2)
        storage["latent"][layer].index_copy_(0, slots, both @ torch.linalg.pinv(self.up()))
        # rows and columns are turned when the keys are made again
        assert spatial is None

    def read(
        self, storage: Storage, layer: int, slots: Tensor, dtype: torch.dtype, temporal: Tensor | None,
        mean: Tensor | None,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        made = storage["latent"][layer].index_select(0, slots) @ self.up()
        heads = made.unflatten(-1, (2 * self.geometry.kv_heads, -1)).permute(1, 3, 0, 2, 4)
        k, v = heads.chunk(2, 1)
        k = k if temporal is None else rotate_first(k, temporal[:, None])
        return k.to(dtype), v.to(dtype)


class Trained(HeavyHitter):
    """A scorer with weights: here of mass so far and of this chunk, as a model fitted offline would have."""

    weights = (0.25, 4.0)

    def observe(self, before: float, mass: float) -> float:
        return self.weights[0] * before + self.weights[1] * mass

    def evict(
        self,
        frames: Sequence[int],
        capacity: int,
        held: Collection[int],
        scores: Mapping[int, float] | None = None,
    ) -> set[int]:
        return super().evict(
            frames, capacity, held, {f: 1 / (1 + math.exp(-s)) for f, s in (scores or {}).items()}
        )


class TestWhatTheContractAdmits:
    """Strategies that need more than a setting: one class and one line in a registry each."""

    def test_latent_pages(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setitem(FORMATS, "latent", Latent)
        g = CacheGeometry(layers=1, kv_heads=4, head_dim=16, height=2, width=3, chunk_frames=2)
        spec = CacheSpec.parse("latent,window=8,sink=2")
        cache, format = KVCache(spec, g), Latent(spec, g)
        assert cache.nbytes == planned_bytes(spec, g, torch.float32) == 6 * 6 * 8 * 4
        frames = []
        for i in range(5):
            made = noise(1, 2, 6, Latent.rank, seed=i) @ format.up()
            k, v = made.unflatten(-1, (8, -1)).permute(0, 3, 1, 2, 4).chunk(2, 1)
            frames.append((k, v))
            cache.begin(2)
            with cache.committing():
                cache.write(0, k, v)
        cache.begin(2)
        k, v = cache.read(0, [run for segment in cache.segments for run in segment])
        kept = [(frame // 2, frame % 2) for frame in cache.layout.resident]
        assert cache.layout.resident == (0, 1, 6, 7, 8, 9)
        for got, side in ((k, 0), (v, 1)):
            wanted = torch.cat([frames[c][side][:, :, f] for c, f in kept], 2)
            assert relative_l2(got, wanted) < 1e-4

    def test_a_trained_scorer(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setitem(POLICIES, "trained", Trained)
        cache = cache_of("fp32,window=14,sink=2,policy=trained")
        for i in range(10):
            q, k, v = chunk(i)
            if i == 2:
                k[:, 1] += 4
            run(cache, [(q + 2, k, v)])
            cache.check_integrity()
        assert 5 in cache.layout.resident and len(cache.layout.resident) == 12
