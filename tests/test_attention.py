"""Who reads what, and where in time: masks over whole clips, and the cache, against plain loops."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.tiny import LATENT_SIZE, build_geometry, build_text, build_transformer, noise, relative_l2
from vidkv.attention import BlockCausalAttention, CachedAttention, FullAttention, self_test
from vidkv.cache import CacheGeometry, CacheSpec, KVCache
from vidkv.cache.formats import FORMATS
from vidkv.errors import CacheStateError
from vidkv.kernels.rope import rotate_full, spatial_phases, temporal_phases
from vidkv.read_path import REFERENCE, TWO_PASS

Reads = list[tuple[list[int], list[tuple[int, int]]]]
"""Per chunk: its frames, and (frame, distance from the chunk's first frame) of everything it reads."""

CHUNKS = ([3, 3, 3, 3, 3], [1, 3, 3, 3, 3], [3, 3, 2], [2, 3, 1, 3, 3, 1], [1, 1, 1, 1, 1, 1])
SPECS = [
    CacheSpec(window=9, sink=2),
    CacheSpec(window=7, sink=1),
    CacheSpec(window=6, sink=3),
    CacheSpec(window=6, sink=0, policy="sliding_window"),
    CacheSpec(window=3, sink=0),
    CacheSpec(window=50, sink=3),
]
SPECS += [spec.model_copy(update={"positions": "absolute"}) for spec in SPECS]


def naive_reads(spec: CacheSpec, chunks: Sequence[int]) -> Reads:
    """The rules of the cache, spelled out on a list of frame numbers."""
    resident: list[int] = []
    reads, start = [], 0
    for n in chunks:
        own = list(range(start, start + n))
        if spec.positions == "absolute":
            history = [(frame, frame - start) for frame in resident]
        else:
            history = [(frame, i - len(resident)) for i, frame in enumerate(resident)]
        reads.append((own, history + [(frame, frame - start) for frame in own]))
        resident += own
        while len(resident) > spec.window - max(chunks):
            resident.remove(next(frame for frame in resident if frame >= spec.sink))
        start += n
    return reads


@dataclass
class Naive:
    """Attention in plain loops at float64: chunk by chunk, head by head, each frame turned by itself."""

    height: int
    width: int
    reads: Reads

    def layer(self, index: int) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
        return self.attend

    def turned(self, x: Tensor, position: int) -> Tensor:
        """One frame (b, s, n, d) at a position."""
        d = x.shape[-1]
        time = temporal_phases(d, torch.tensor([position]), torch.float64)
        space = spatial_phases(d, self.height, self.width, dtype=torch.float64)
        return rotate_full(x.double()[:, None], time, space)[:, 0]

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out = torch.full(q.shape, math.nan, dtype=torch.float64)
        group = q.shape[3] // k.shape[3]
        for own, read in self.reads:
            keys = torch.cat([self.turned(k[:, frame], distance) for frame, distance in read], 1)
            values = torch.cat([v[:, frame].double() for frame, _ in read], 1)
            for i, frame in enumerate(own):
                query = self.turned(q[:, frame], i)
                for head in range(q.shape[3]):
                    scores = query[:, :, head] @ keys[:, :, head // group].transpose(1, 2)
                    weights = (scores / math.sqrt(q.shape[-1])).softmax(-1)
                    out[:, frame, :, head] = weights @ values[:, :, head // group]
        return out.to(q.dtype)


class DenseMask:
    """Absolute positions once more, otherwise: one SDPA over the clip under a boolean frame mask."""

    def __init__(self, height: int, width: int, reads: Reads) -> None:
        self.height, self.width = height, width
        frames = sum(len(own) for own, _ in reads)
        allowed = torch.zeros(frames, frames, dtype=torch.bool)
        for own, read in reads:
            for frame in own:
                allowed[frame, [key for key, _ in read]] = True
        tokens = height * width
        self.mask = allowed.repeat_interleave(tokens, 0).repeat_interleave(tokens, 1)

    def layer(self, index: int) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
        return self.attend

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        frames, d = q.shape[1], q.shape[-1]
        phases = temporal_phases(d, torch.arange(frames)), spatial_phases(d, self.height, self.width)
        q, k = rotate_full(q, *phases), rotate_full(k, *phases)
        q, k, v = (x.flatten(1, 2).transpose(1, 2) for x in (q, k, v))
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=self.mask, enable_gqa=True)
        return out.transpose(1, 2).unflatten(1, (frames, -1))


def random_qkv(
    frames: int, geometry: CacheGeometry, heads: int = 4, batch: int = 2, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor, Tensor]:
    d, tokens = geometry.head_dim, geometry.tokens
    q = 2 * noise(batch, frames, tokens, heads, d, seed=1, dtype=dtype)
    k, v = (noise(batch, frames, tokens, geometry.kv_heads, d, seed=s, dtype=dtype) for s in (2, 3))
    return q, k, v


def through_the_cache(
    cache: KVCache, chunks: Sequence[int], qkv: Sequence[Tensor], reference: bool = False
) -> Tensor:
    """Every chunk reads and is committed, layer 0 alone."""
    outputs = []
    for start, n in zip(accumulate(chunks, initial=0), chunks, strict=False):
        cache.begin(n)
        with cache.committing():
            attention = CachedAttention(cache, REFERENCE if reference else TWO_PASS, commit=True)
            outputs.append(attention.layer(0)(*(x[:, start : start + n] for x in qkv)))
    return torch.cat(outputs, 1)


GEOMETRY = build_geometry(layers=1, kv_heads=2, head_dim=24, height=2, width=3, batch=2)


class TestBlockCausal:
    @pytest.mark.parametrize("chunks", CHUNKS, ids=str)
    @pytest.mark.parametrize("spec", SPECS, ids=str)
    def test_equals_plain_loops_and_the_cache(self, spec: CacheSpec, chunks: list[int]) -> None:
        if spec.sink + max(chunks) > spec.window:
            pytest.skip("does not fit")
        geometry = build_geometry(**{**vars(GEOMETRY), "chunk_frames": max(chunks)})
        qkv = random_qkv(sum(chunks), geometry)
        wanted = Naive(2, 3, naive_reads(spec, chunks)).attend(*qkv)
        block_causal = BlockCausalAttention(2, 3, spec, chunks)
        assert relative_l2(block_causal.layer(0)(*qkv), wanted) <= 2e-6
        assert relative_l2(through_the_cache(KVCache(spec, geometry), chunks, qkv), wanted) <= 2e-6

    @pytest.mark.parametrize("spec", [s for s in SPECS if s.positions == "absolute"], ids=str)
    @pytest.mark.parametrize("chunks", CHUNKS[:4], ids=str)
    def test_equals_one_dense_mask(self, spec: CacheSpec, chunks: list[int]) -> None:
        qkv = random_qkv(sum(chunks), GEOMETRY)
        wanted = DenseMask(2, 3, naive_reads(spec, chunks)).attend(*qkv)
        assert relative_l2(BlockCausalAttention(2, 3, spec, chunks).layer(0)(*qkv), wanted) <= 2e-6

    def test_the_oracle_is_not_blind(self) -> None:
        """Window, sinks and positions each change the numbers by far more than the tolerance."""
        qkv = random_qkv(15, GEOMETRY)
        outputs = [
            Naive(2, 3, naive_reads(spec, [3] * 5)).attend(*qkv)
            for spec in (
                CacheSpec(window=9, sink=2),
                CacheSpec(window=8, sink=2),
                CacheSpec(window=9, sink=1),
                CacheSpec(window=9, sink=2, positions="absolute"),
            )
        ]
        for other in outputs[1:]:
            assert relative_l2(other, outputs[0]) > 0.02

    def test_gradients(self) -> None:
        """Training runs through the mask, so its backward pass has to be that of the loops."""
        spec, chunks = CacheSpec(window=6, sink=2), [1, 3, 3, 3]
        weight = noise(2, 10, 6, 4, 24, seed=9, dtype=torch.float64)
        gradients = []
        for attention in (
            Naive(2, 3, naive_reads(spec, chunks)),
            BlockCausalAttention(2, 3, spec, chunks),
        ):
            qkv = [x.requires_grad_() for x in random_qkv(10, GEOMETRY, dtype=torch.float64)]
            (attention.layer(0)(*qkv) * weight).sum().backward()
            gradients.append([x.grad for x in qkv])
        for wanted, found in zip(*gradients, strict=True):
            assert wanted is not None and found is not None
            assert relative_l2(found, wanted) <= 1e-12

    def test_precision_follows_the_inputs(self) -> None:
        """An object used at float32 first still serves float64 in full."""
        spec, chunks = CacheSpec(window=9, sink=2), [3, 3, 3]
        attention = BlockCausalAttention(2, 3, spec, chunks)
        attention.layer(0)(*random_qkv(9, GEOMETRY))
        qkv = random_qkv(9, GEOMETRY, dtype=torch.float64)
        wanted = Naive(2, 3, naive_reads(spec, chunks)).attend(*qkv)
        assert relative_l2(attention.layer(0)(*qkv), wanted) <= 1e-12

    @pytest.mark.parametrize("spec", SPECS[:4] + SPECS[6:8], ids=str)
    def test_clean_history(self, spec: CacheSpec) -> None:
        """Teacher forcing: noisy chunks read what a rollout has committed, clean ones, and themselves."""
        chunks = [1, 3, 3, 3, 3]
        clean, noisy = (
            random_qkv(sum(chunks), GEOMETRY),
            [3 - x for x in random_qkv(sum(chunks), GEOMETRY)],
        )
        both = [torch.cat([a, b], 1) for a, b in zip(clean, noisy, strict=True)]
        attention = BlockCausalAttention(2, 3, spec, chunks, clean_history=True)
        found_clean, found_noisy = attention.layer(0)(*both).chunk(2, 1)
        cache, wanted_clean, wanted_noisy = KVCache(spec, GEOMETRY), [], []
        for start, n in zip(accumulate(chunks, initial=0), chunks, strict=False):
            part = slice(start, start + n)
            cache.begin(n)
            wanted_noisy.append(CachedAttention(cache).layer(0)(*(x[:, part] for x in noisy)))
            with cache.committing():
                commit = CachedAttention(cache, commit=True).layer(0)
                wanted_clean.append(commit(*(x[:, part] for x in clean)))
        assert relative_l2(found_clean, torch.cat(wanted_clean, 1)) <= 2e-6
        assert relative_l2(found_noisy, torch.cat(wanted_noisy, 1)) <= 2e-6


class TestFull:
    @pytest.mark.parametrize("heads", [2, 4, 6])
    def test_everything_is_read(self, heads: int) -> None:
        qkv = random_qkv(4, GEOMETRY, heads)
        everything = [(list(range(4)), [(frame, frame) for frame in range(4)])]
        found = FullAttention(2, 3).layer(5)(*qkv)
        assert relative_l2(found, Naive(2, 3, everything).attend(*qkv)) <= 2e-6

    def test_equals_one_large_chunk(self) -> None:
        qkv = random_qkv(4, GEOMETRY)
        one = BlockCausalAttention(2, 3, CacheSpec(window=4, sink=0), [4]).layer(0)(*qkv)
        assert relative_l2(FullAttention(2, 3).layer(0)(*qkv), one) <= 2e-6


class TestCached:
    @pytest.mark.parametrize("format", ["fp32", "bf16", "int8", "int8,keep_newest,keep_sinks"])
    @pytest.mark.parametrize("positions", ["relative", "absolute"])
    def test_reference_and_two_pass_agree(self, format: str, positions: str) -> None:
        spec = CacheSpec.parse(f"{format},window=11,sink=2,positions={positions},segment=3")
        qkv = random_qkv(18, GEOMETRY)
        two_pass = through_the_cache(KVCache(spec, GEOMETRY), [3] * 6, qkv)
        reference = through_the_cache(KVCache(spec, GEOMETRY), [3] * 6, qkv, reference=True)
        assert relative_l2(two_pass, reference) <= 2e-6

    @pytest.mark.parametrize(
        ("format", "bound"), [("bf16", 5e-3), ("int8", 2e-2), ("int8,value_scale=channel", 2e-2)]
    )
    def test_error_of_a_format(self, format: str, bound: float) -> None:
        qkv = random_qkv(18, GEOMETRY)
        exact, found = (
            through_the_cache(KVCache(CacheSpec.parse(f"{f},window=9,sink=2"), GEOMETRY), [3] * 6, qkv)
            for f in ("fp32", format)
        )
        assert torch.equal(found[:, :3], exact[:, :3]), "the first chunk reads no page"
        assert bound / 10 < relative_l2(found[:, 3:], exact[:, 3:]) < bound

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
    def test_compute_precision(self, dtype: torch.dtype) -> None:
        format = "bf16" if dtype == torch.bfloat16 else "fp32"
        spec = CacheSpec.parse(f"{format},window=9,sink=2")
        qkv = [x.to(dtype) for x in random_qkv(15, GEOMETRY)]
        found = through_the_cache(KVCache(spec, GEOMETRY, dtype=dtype), [3] * 5, qkv)
        assert found.dtype == dtype
        wanted = Naive(2, 3, naive_reads(spec, [3] * 5)).attend(*(x.double() for x in qkv))
        bound = {torch.bfloat16: 2e-2, torch.float16: 2e-3, torch.float64: 1e-6}[dtype]
        assert relative_l2(found, wanted) <= bound

    @given(segment=st.integers(1, 9), heads=st.sampled_from([2, 4]), window=st.integers(5, 14))
    @settings(max_examples=12)
    def test_segments_do_not_matter(self, segment: int, heads: int, window: int) -> None:
        spec = CacheSpec(window=window, sink=2, segment=segment)
        qkv = random_qkv(18, GEOMETRY, heads)
        wanted = Naive(2, 3, naive_reads(spec, [3] * 6)).attend(*qkv)
        assert relative_l2(through_the_cache(KVCache(spec, GEOMETRY), [3] * 6, qkv), wanted) <= 2e-6

    @pytest.mark.parametrize("positions", ["relative", "absolute"])
    @pytest.mark.parametrize("start", [1_020, 9_999, 1_000_000])
    def test_far_frames(self, start: int, positions: str) -> None:
        """Beyond frame 1,024, where stock tables end, only distances count; sinks may be far away."""
        spec = CacheSpec.parse(f"fp32,window=8,sink=2,positions={positions}")
        qkv = random_qkv(15, GEOMETRY)
        cache = KVCache(spec, GEOMETRY)
        through_the_cache(cache, [3, 3], [x[:, :6] for x in qkv])
        # as if the frames between had come and gone: sinks stay, the newest three are renamed
        jump = start - 6
        cache.table = {f if f < 2 else f + jump: page for f, page in cache.table.items()}
        cache.layout.resident = tuple(sorted(cache.table))
        cache.layout.next_frame = start
        cache.check_integrity()
        found = through_the_cache(cache, [3, 3, 3], [x[:, 6:] for x in qkv])
        cache.check_integrity()
        assert cache.layout.next_frame == start + 9

        def distance(frame: int, first: int, history: list[int]) -> int:
            if positions == "relative":
                return history.index(frame) - len(history) if frame in history else frame - first
            return (frame if frame < 2 else frame + jump) - (first + jump)

        reads: Reads = [([0, 1], []), ([2, 3, 4, 5], [])]
        for first, history in ((6, [0, 1, 3, 4, 5]), (9, [0, 1, 6, 7, 8]), (12, [0, 1, 9, 10, 11])):
            own = list(range(first, first + 3))
            reads.append((own, [(f, distance(f, first, history)) for f in history + own]))
        wanted = Naive(2, 3, reads[2:]).attend(*qkv)[:, 6:]
        assert relative_l2(found, wanted) <= 2e-6

    def test_needs_an_open_chunk(self) -> None:
        with pytest.raises(CacheStateError, match="no open chunk"):
            CachedAttention(KVCache(SPECS[0], GEOMETRY))

    def test_self_test_of_the_read_paths(self) -> None:
        results = self_test()
        assert {name.split()[1] for name, *_ in results} == set(FORMATS)
        assert all(0 < error <= bound for _, error, bound in results)


class TestThroughTheModel:
    """Several layers: keys and values of a chunk depend on what its layers below have read."""

    @pytest.mark.parametrize("chunks", [[3, 3, 3, 3], [1, 3, 3, 3], [3, 3, 2]], ids=str)
    @pytest.mark.parametrize(
        ("spec", "kv_heads"), [*((spec, None) for spec in SPECS), (SPECS[0], 1), (SPECS[6], 1)], ids=str
    )
    def test_mask_loops_and_cache_agree(
        self, spec: CacheSpec, chunks: list[int], kv_heads: int | None
    ) -> None:
        model = build_transformer(num_key_value_heads=kv_heads)
        text = build_text(model, batch=2)
        frames = sum(chunks)
        x, timestep = noise(2, frames, *LATENT_SIZE), torch.zeros(2, frames)
        with torch.no_grad():
            wanted = model(x, timestep, text, Naive(2, 3, naive_reads(spec, chunks)))
            masked = model(x, timestep, text, BlockCausalAttention(2, 3, spec, chunks))
            cache = KVCache(spec, CacheGeometry.of_model(model.config, 4, 6, 3, batch=2))
            parts = []
            for start, n in zip(accumulate(chunks, initial=0), chunks, strict=False):
                cache.begin(n)
                with cache.committing():
                    attention = CachedAttention(cache, commit=True)
                    part = slice(start, start + n)
                    parts.append(model(x[:, part], timestep[:, part], text, attention))
                cache.check_integrity()
        assert relative_l2(masked, wanted) <= 1e-5
        assert relative_l2(torch.cat(parts, 1), wanted) <= 1e-5
