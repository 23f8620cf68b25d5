"""Attention mass, selection and pruning: what passes tell of frames, and what a cache makes of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.tiny import build_geometry, noise, relative_l2
from vidkv.attention import CachedAttention, _noise_gain
from vidkv.cache import CacheGeometry, CacheSpec, KVCache
from vidkv.cache.prune import difference, largest, sampled
from vidkv.cache.snapshot import CacheSnapshot
from vidkv.errors import CacheSpecError, StateError
from vidkv.kernels.rope import rotate_spatial, spatial_phases
from vidkv.read_path import REFERENCE, TWO_PASS, ReadPath

GEOMETRY = build_geometry(layers=2, kv_heads=2, head_dim=12, height=2, width=3, chunk_frames=2)
Chunks = Sequence[tuple[Tensor, Tensor, Tensor]]


def chunk(seed: int, geometry: CacheGeometry = GEOMETRY, heads: int = 4) -> tuple[Tensor, Tensor, Tensor]:
    """q, k, v of a chunk: (batch, frames, tokens, heads, d)."""
    g = geometry
    q = noise(g.batch, g.chunk_frames, g.tokens, heads, g.head_dim, seed=3 * seed)
    k, v = (
        noise(g.batch, g.chunk_frames, g.tokens, g.kv_heads, g.head_dim, seed=3 * seed + i) for i in (1, 2)
    )
    return q, k, v


def run(cache: KVCache, chunks: Chunks, path: ReadPath = TWO_PASS) -> None:
    """Commit chunks, the same in every layer."""
    for q, k, v in chunks:
        cache.begin(q.shape[1])
        with cache.committing():
            attention = CachedAttention(cache, path, commit=True)
            for layer in range(cache.geometry.layers):
                attention.layer(layer)(q, k, v)


def cache_of(spec: str, geometry: CacheGeometry = GEOMETRY, **options: Any) -> KVCache:
    return KVCache(CacheSpec.parse(spec), geometry, **options)


class TestMass:
    @pytest.mark.parametrize("path", [TWO_PASS, REFERENCE], ids=str)
    @pytest.mark.parametrize("spec", ["fp32", "int8", "int4,hadamard=false", "int8,keep_newest,segment=3"])
    def test_is_each_frames_share_of_the_attention(self, spec: str, path: ReadPath) -> None:
        """Against one softmax over everything: with values of one-hot frames, the output is the shares."""
        geometry = build_geometry(layers=1, kv_heads=1, head_dim=12, height=2, width=3, chunk_frames=2)
        cache = cache_of(f"{spec},window=14,sink=2,policy=snapkv", geometry)
        run(cache, [chunk(i, geometry, heads=2) for i in range(4)], path)
        q, k, v = chunk(9, geometry, heads=2)
        cache.begin(2)
        frames = cache.layout.resident
        with cache.committing():
            attention = CachedAttention(cache, path, commit=True)
            keys = [cache.read(0, segment, temporal)[0].double() for segment, temporal in attention.segments]
            _, mass, _ = attention._read_segments(0, *turned(attention, q, k, v))
            attention.layer(0)(q, k, v)
        own = turned(attention, q, k, v)
        scores = torch.cat([*(own[0].double() @ x.transpose(-1, -2) for x in keys),
                            own[0].double() @ own[1].double().transpose(-1, -2)], -1) / 12**0.5  # fmt: skip
        shares = scores.softmax(-1).unflatten(-1, (-1, 6)).sum(-1).mean((0, 1, 2))
        assert list(mass) == list(frames)
        torch.testing.assert_close(torch.stack([*mass.values()]).double(), shares[: len(frames)], rtol=1e-5,
                                   atol=1e-7)  # fmt: skip
        assert {f: cache.layout.scores[f] for f in frames} == {f: float(mass[f]) for f in frames}

    def test_measuring_changes_no_bit_of_what_is_denoised(self) -> None:
        outputs = []
        for policy in ("sink_window", "h2o"):
            cache = cache_of(f"fp32,window=30,sink=2,policy={policy}")
            run(cache, [chunk(i) for i in range(4)])
            cache.begin(2)
            outputs.append(CachedAttention(cache).layer(1)(*chunk(8)))
        assert torch.equal(*outputs)

    def test_adds_up_for_one_policy_and_not_for_the_other(self) -> None:
        chunks = [chunk(i) for i in range(5)]
        caches = {policy: cache_of(f"fp32,window=30,sink=2,policy={policy}") for policy in ("h2o", "snapkv")}
        for cache in caches.values():
            run(cache, chunks)
        sums = dict.fromkeys(range(8), 0.0)
        last = cache_of("fp32,window=30,sink=2,policy=snapkv")
        for part in chunks:
            run(last, [part])
            for frame, share in last.layout.scores.items():
                sums[frame] += share
        assert caches["snapkv"].layout.scores == last.layout.scores
        assert caches["h2o"].layout.scores == pytest.approx(sums)

    @pytest.mark.parametrize("policy", ["h2o", "snapkv"])
    def test_what_is_attended_to_stays(self, policy: str) -> None:
        """A frame whose keys point where all queries look outlives its neighbours, and without the policy it
        does not."""
        kept = {}
        for name in (policy, "sink_window"):
            cache = cache_of(f"fp32,window=14,sink=2,policy={name}")
            for i in range(12):
                q, k, v = chunk(i)
                q = q + 2
                if i == 2:
                    k[:, 1] += 4
                run(cache, [(q, k, v)])
            kept[name] = cache.layout.resident
            cache.check_integrity()
        assert 5 in kept[policy] and 5 not in kept["sink_window"]
        assert len(kept[policy]) == len(kept["sink_window"]) == 12
        assert kept[policy][:2] == (0, 1) and kept[policy][-2:] == (22, 23)


def turned(attention: CachedAttention, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    from einops import rearrange

    from vidkv.kernels.rotary import rotate_chunk

    q, k = (rotate_chunk(x, attention.own, attention.spatial) for x in (q, k))
    return q, k, rearrange(v, "b f s n d -> b n (f s) d")


class TestSelection:
    def test_the_frame_that_is_looked_for_is_read(self) -> None:
        cache = cache_of("fp32,window=40,sink=2,select=10")
        for i in range(12):
            q, k, v = chunk(i)
            if i == 3:
                k = k + torch.linspace(-3, 3, 12)
            if i == 11:
                q = q + torch.linspace(-3, 3, 12)
            run(cache, [(q, k, v)])
        opened = cache.begin(2)
        assert {6, 7} <= set(opened.history) and len(opened.history) == 8
        assert opened.history[:2] == (0, 1) and opened.history[-3:] == (21, 22, 23)
        assert opened.positions == tuple(range(8)) and opened.first_position == 8
        assert sum(len(run.slots) for segment in cache.segments for run in segment) == 8

    def test_before_there_is_more_than_it_reads_everything_is(self) -> None:
        selected, whole = cache_of("fp32,window=40,sink=2,select=20"), cache_of("fp32,window=40,sink=2")
        for cache in (selected, whole):
            run(cache, [chunk(i) for i in range(9)])
        assert selected.begin(2) == whole.begin(2)

    def test_true_distances_with_absolute_positions(self) -> None:
        cache = cache_of("fp32,window=40,sink=2,select=10,positions=absolute")
        run(cache, [chunk(i) for i in range(12)])
        opened = cache.begin(2)
        assert opened.positions == opened.history and opened.first_position == 24

    def test_evidence_is_of_frames_that_stay(self) -> None:
        """Rows turn over; what they say is the mean key of their frame."""
        cache = cache_of("fp32,window=12,sink=2,select=8")
        chunks = [chunk(i) for i in range(9)]
        run(cache, chunks)
        evidence = cache.evidence
        assert evidence is not None and set(evidence.rows) == set(cache.layout.resident)
        for frame, row in evidence.rows.items():
            _, k, _ = chunks[frame // 2]
            wanted = k[:, frame % 2].mean(1)
            torch.testing.assert_close(evidence.keys[row, 1], wanted.half(), rtol=1e-2, atol=1e-3)

    def test_relevance_is_shares(self) -> None:
        cache = cache_of("fp32,window=12,sink=2,select=8")
        run(cache, [chunk(i) for i in range(9)])
        assert cache.evidence is not None
        shares = cache.evidence.relevance(cache.layout.resident)
        assert sum(shares.values()) == pytest.approx(1) and min(shares.values()) > 0


class TestPruning:
    def test_what_differs_from_the_anchor_stays(self) -> None:
        anchor = noise(1, 2, 6, 4)
        k = anchor[:, :, None].repeat(1, 1, 3, 1, 1)
        v = torch.arange(6.0).expand(1, 2, 3, 6)[..., None].repeat(1, 1, 1, 1, 4)
        k[0, 0, 1, [4, 1]] += 1
        k[0, 1, 2, [0, 5]] -= 2
        kept_k, kept_v = largest(k, v, difference(k, anchor), 2)
        assert kept_v[0, 0, 1, :, 0].tolist() == [1, 4] and kept_v[0, 1, 2, :, 0].tolist() == [0, 5]
        assert torch.equal(kept_k[0, 0, 1], k[0, 0, 1, [1, 4]])

    def test_a_pruned_page_is_read_without_the_others(self) -> None:
        """Half the tokens of old pages, all of the newest and of sinks, in the order of their places."""
        spec = "fp32,window=12,sink=2,keep_tokens=0.5"
        cache = cache_of(f"{spec},newer=bf16:2,keep_sinks", dtype=torch.bfloat16)
        chunks = [tuple(x.bfloat16() for x in chunk(i)) for i in range(4)]
        run(cache, chunks)
        opened = cache.begin(2)
        k, v = cache.read(0, [run for segment in cache.segments for run in segment])
        assert opened.history == tuple(range(8)) and k.shape[2] == 4 * 6 + 4 * 3
        anchor = cache.means["keyframe"][0]
        phases = spatial_phases(12, 2, 3)
        whole = [rotate_spatial(part[1], phases) for part in chunks]
        at = 12
        for frame in (2, 3, 4, 5):
            keys = whole[frame // 2][:, frame % 2].transpose(1, 2)[:, :, None]
            values = chunks[frame // 2][2][:, frame % 2].transpose(1, 2)[:, :, None]
            wanted = largest(keys, values, difference(keys, anchor), 3)
            for got, want in zip((k, v), wanted, strict=True):
                assert relative_l2(got[:, :, at : at + 3], want[:, :, 0]) < 1e-2
            at += 3

    def test_bytes_are_really_freed(self) -> None:
        whole, half = cache_of("int8,window=12,sink=2"), cache_of("int8,window=12,sink=2,keep_tokens=0.5")
        anchors = half.means["keyframe"].nbytes
        assert half.nbytes - anchors < 0.6 * whole.nbytes
        assert half.bytes_per_frame * 2 == whole.bytes_per_frame


class TestPruningByMass:
    """Values carry the number of their token, so that pages tell which tokens they have kept."""

    SPEC = "bf16,sink=1,segment=2,keep_tokens=0.5,keep_by=mass"
    GEOMETRY = replace(GEOMETRY, head_order=((1, 0), (0, 1)))

    def numbered(self, seed: int) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = chunk(seed)
        v[..., 0] = (torch.arange(12.0) + 12 * seed).view(1, 2, 6, 1)
        return 3 * q, k, v

    @pytest.mark.parametrize("path", [TWO_PASS, REFERENCE], ids=str)
    @pytest.mark.parametrize(
        "settings",
        [
            "window=9",
            "window=9,newer=fp32:3",
            "window=9,positions=absolute,newer=fp32:2",
            "window=9,local_heads=1",
            # some that are read stand nearer than they are
            "window=16,newer=fp32:7,select=9",
        ],
    )
    def test_the_most_attended_stay(
        self, settings: str, path: ReadPath, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Against one softmax of the sampled queries over all that the chunk reads, itself included."""
        monkeypatch.setattr("vidkv.cache.prune.SAMPLED_QUERIES", 5)
        cache = cache_of(f"{self.SPEC},{settings}", self.GEOMETRY)
        checked = 0
        for number in range(11):
            q, k, v = self.numbered(number)
            before = {frame for frame, page in cache.table.items() if page.pool == "pages"}
            cache.begin(2)
            with cache.committing():
                attention = CachedAttention(cache, path, commit=True)
                mass = [self.mass(attention, layer, q, k, v) for layer in range(2)]
                for layer in range(2):
                    attention.layer(layer)(q, k, v)
            pool = cache.pools["pages"]
            for frame in {f for f, page in cache.table.items() if page.pool == "pages"} - before:
                if 6 * frame not in mass[0][0]:
                    # a selection has left it out
                    continue
                slot = torch.tensor([cache.table[frame].slot])
                for layer in range(2):
                    _, kept = pool.format.read(pool.storage, layer, slot, torch.float32, None, None)
                    for head in range(kept.shape[1]):
                        ranked = sorted(range(6), key=lambda token: -mass[layer][head][6 * frame + token])
                        wanted = [6 * frame + token for token in sorted(ranked[:3])]
                        assert kept[0, head, 0, :, 0].tolist() == wanted
                        checked += 1
        assert checked >= 20

    def mass(
        self, attention: CachedAttention, layer: int, q: Tensor, k: Tensor, v: Tensor
    ) -> list[dict[int, float]]:
        """By kv head that keeps pages and number of the token, its mass."""
        q, k, v = turned(attention, q, k, v)
        pages = [attention.cache.read(layer, *segment) for segment in attention.segments]
        heads = attention.cache.heads
        kept = heads[layer][0].tolist() if heads else [0, 1]
        found = []
        for place, head in enumerate(kept):
            keys = torch.cat([*(page[0][0, place] for page in pages), k[0, head]]).double()
            numbers = torch.cat([*(page[1][0, place, :, 0] for page in pages), v[0, head, :, 0]]).int()
            asked = q[0, 2 * head : 2 * head + 2, [0, 2, 4, 7, 9]].double()
            shares = (asked @ keys.T / 12**0.5).softmax(-1).sum((0, 1))
            found.append(dict(zip(numbers.tolist(), shares.tolist(), strict=True)))
        return found

    def test_the_sample_is_spread_over_the_chunk(self) -> None:
        assert sampled(12, torch.device("cpu")).tolist() == list(range(12))
        many = sampled(4680, torch.device("cpu"))
        assert len(many) == 64 and many[0] == 0 and set(many.diff().tolist()) == {73, 74}

    def test_restored_forked_or_gone_on_with_it_keeps_the_same(self) -> None:
        settings = f"{self.SPEC},window=9,newer=fp32:3"
        cache = cache_of(settings)
        run(cache, [self.numbered(i) for i in range(3)])
        other = cache_of(settings)
        other.restore(*cache.state_tensors())
        caches = cache, other, cache.fork()
        for one in caches:
            run(one, [self.numbered(i) for i in (3, 4)])
        for frame in cache.table:
            pages = [one.page(frame) for one in caches]
            assert all(torch.equal(page[name], pages[0][name]) for page in pages for name in page)

    def test_it_keeps_no_anchor_and_counts_its_products(self) -> None:
        by_key, by_mass = (
            cache_of(f"fp32,window=9,sink=1,keep_tokens=0.5{x}") for x in ("", ",keep_by=mass")
        )
        assert by_mass.means == {} and by_key.nbytes - by_key.means["keyframe"].nbytes == by_mass.nbytes
        run(by_mass, [chunk(0)])
        # two layers, four heads, all twelve queries, two pages of six tokens
        assert by_mass.sampled_scores == 2 * 4 * 12 * 2 * 6 and by_key.sampled_scores == 0

    def test_without_a_pass_any_tokens_stay(self) -> None:
        cache = cache_of("fp32,window=9,sink=1,keep_tokens=0.5,keep_by=mass")
        k, v = (noise(1, 2, 2, 6, 12, seed=i) for i in (1, 2))
        cache.begin(2)
        with cache.committing():
            for layer in range(2):
                cache.write(layer, k, v)
        cache.begin(2)
        found, _ = cache.read(0, cache.segments[0])
        for key in found[0, 0]:
            assert (k[0, 0] == key).all(-1).any()


class TestLocalHeads:
    GEOMETRY = build_geometry(
        layers=2, kv_heads=2, head_dim=12, height=2, width=3, chunk_frames=2, head_order=((1, 0), (0, 1))
    )

    def test_mass_is_that_of_all_heads(self) -> None:
        """Local heads give the history nothing: shares are half of what the other heads give."""
        chunks = [chunk(i) for i in range(4)]
        parted = cache_of("fp32,window=14,sink=2,policy=snapkv,local_heads=1", self.GEOMETRY)
        run(parted, chunks)
        # layer 0 keeps head 0, layer 1 head 1: each of them in a cache of its own
        shares: dict[int, float] = dict.fromkeys(parted.layout.scores, 0.0)
        for head in range(2):
            one = build_geometry(layers=1, kv_heads=1, head_dim=12, height=2, width=3, chunk_frames=2)
            cache = cache_of("fp32,window=14,sink=2,policy=snapkv", one)
            mine = slice(2 * head, 2 * head + 2)
            run(cache, [(q[..., mine, :], k[..., [head], :], v[..., [head], :]) for q, k, v in chunks])
            for frame, share in cache.layout.scores.items():
                shares[frame] += share / 4
        assert shares and parted.layout.scores == pytest.approx(shares)

    def test_a_selection_goes_by_the_heads_with_pages(self) -> None:
        cache = cache_of("fp32,window=12,sink=2,select=8,local_heads=1", self.GEOMETRY)
        chunks = [chunk(i) for i in range(9)]
        run(cache, chunks)
        evidence = cache.evidence
        assert evidence is not None and evidence.keys.shape[2:] == (1, 1, 12)
        q, _, _ = chunks[-1]
        for layer, head in ((0, 0), (1, 1)):
            frame, row = next(iter(evidence.rows.items()))
            wanted = chunks[frame // 2][1][:, frame % 2, :, head].mean(1)
            torch.testing.assert_close(evidence.keys[row, layer, :, 0], wanted.half(), rtol=1e-2, atol=1e-3)
            groups = q[..., 2 * head : 2 * head + 2, :].mean((1, 2, 3))
            torch.testing.assert_close(evidence.queries[layer, :, 0], groups)

    def test_pruning_and_keyframes_know_the_heads_with_pages(self) -> None:
        for settings in ("fp32,keep_tokens=0.5", "int2,hadamard=false,keyframe,newer=,jensen"):
            cache = cache_of(f"{settings},window=12,sink=2,local_heads=1", self.GEOMETRY)
            run(cache, [chunk(i) for i in range(6)])
            turned = rotate_spatial(chunk(0)[1], spatial_phases(12, 2, 3))
            for layer, head in ((0, 0), (1, 1)):
                wanted = turned[..., head, :].mean(1)
                assert relative_l2(cache.means["keyframe"][layer, :, 0], wanted) < 1e-2

    def test_state_forks_and_snapshots(self) -> None:
        spec = "int8,window=12,sink=2,local_heads=1"
        cache = cache_of(spec, self.GEOMETRY)
        run(cache, [chunk(i) for i in range(4)])
        restored, forked, given = cache_of(spec, self.GEOMETRY), cache.fork(), cache.fork()
        restored.restore(*cache.state_tensors())
        snapshot = CacheSnapshot(cache)
        run(given, [chunk(8)])
        snapshot.give(given)
        outputs = []
        for other in (cache, restored, forked, given):
            other.begin(2)
            outputs.append(CachedAttention(other).layer(1)(*chunk(9)))
        assert all(torch.equal(out, outputs[0]) for out in outputs[1:])

    def test_pages_of_other_heads_are_refused(self) -> None:
        spec = "int8,window=12,sink=2,local_heads=1"
        cache = cache_of(spec, self.GEOMETRY)
        run(cache, [chunk(0)])
        tensors, header = cache.state_tensors()
        other = cache_of(spec, replace(self.GEOMETRY, head_order=((0, 1), (0, 1))))
        with pytest.raises(StateError, match=r"heads \[\[0\], \[1\]\].*\[\[1\], \[1\]\]"):
            other.restore(tensors, header)
        del header["heads"]
        with pytest.raises(StateError, match="no 'heads'"):
            cache.restore(tensors, header)

    def test_unmeasured_heads_are_an_error(self) -> None:
        with pytest.raises(CacheSpecError, match="vidkv eval heads"):
            cache_of("int8,window=12,local_heads=1")


class TestJensen:
    def test_gain_is_what_noise_adds_on_average(self) -> None:
        q, variance = 2 * noise(1, 1, 5, 16, seed=1), 0.09
        e = variance**0.5 * noise(200_000, 16, seed=2)
        measured = (q[0, 0] @ e.T / 4).exp().mean(1).log()
        gain = _noise_gain(q, torch.full((1, 1), variance))
        torch.testing.assert_close(gain[0, 0], measured, rtol=0.05, atol=2e-3)

    def test_old_pages_take_less_from_the_chunk_itself(self) -> None:
        """With two bits that clip nothing, history is attended to too much; taking the gain out brings its
        share nearer to the truth."""
        geometry = build_geometry(layers=1, kv_heads=2, head_dim=16, height=4, width=4, chunk_frames=2)
        chunks = [chunk(i, geometry) for i in range(6)]
        coarse = "int2,newer=,keep_sinks=false,fit=largest"
        shares = {}
        for spec in ("fp32", coarse, f"{coarse},jensen"):
            cache = cache_of(f"{spec},window=30,sink=2,policy=snapkv", geometry)
            run(cache, chunks)
            shares[spec] = sum(cache.layout.scores.values())
        exact, plain, corrected = shares.values()
        assert plain > exact and abs(corrected - exact) < 0.7 * abs(plain - exact)
