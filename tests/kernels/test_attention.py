"""Attention in parts: the log-sum-exp is right and merging parts gives the whole."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.tiny import noise, relative_l2
from vidkv.kernels.attention import attend, attend_reference, attend_with_lse, merge, repeat_heads

SHAPES = [
    # batch, heads, kv heads, queries, keys, head_dim
    (1, 1, 1, 1, 1, 8),
    (2, 3, 3, 7, 13, 24),
    (1, 4, 2, 65, 129, 64),
    (1, 4, 1, 33, 260, 64),
    (1, 2, 2, 40, 513, 128),
]
TOLERANCES = {torch.float32: 2e-6, torch.bfloat16: 1e-2, torch.float16: 2e-3, torch.float64: 1e-13}


def inputs(shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    b, heads, kv_heads, queries, keys, d = shape
    q, k, v = (
        noise(b, n, t, d, seed=s, dtype=torch.float64)
        for s, n, t in ((1, heads, queries), (2, kv_heads, keys), (3, kv_heads, keys))
    )
    return (2 * q).to(dtype), k.to(dtype), v.to(dtype)


def by_hand(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Softmax attention with plain loops over batch and heads, at float64."""
    out = torch.empty(*q.shape[:-1], v.shape[-1], dtype=torch.float64)
    lse = torch.empty(q.shape[:-1], dtype=torch.float64)
    group = q.shape[1] // k.shape[1]
    for b in range(q.shape[0]):
        for head in range(q.shape[1]):
            scores = q[b, head].double() @ k[b, head // group].double().T / math.sqrt(q.shape[-1])
            weights = scores.exp()
            out[b, head] = weights @ v[b, head // group].double() / weights.sum(-1, keepdim=True)
            lse[b, head] = weights.sum(-1).log()
    return out, lse


def split(k: Tensor, v: Tensor, cuts: list[int]) -> list[tuple[Tensor, Tensor]]:
    return [(k[:, :, a:b], v[:, :, a:b]) for a, b in pairwise([0, *cuts, k.shape[2]])]


class TestAgainstPlainLoops:
    @pytest.mark.parametrize("shape", SHAPES, ids=str)
    def test_reference(self, shape: tuple[int, ...]) -> None:
        q, k, v = inputs(shape, torch.float64)
        out, lse = attend_reference(q, k, v)
        wanted, wanted_lse = by_hand(q, k, v)
        torch.testing.assert_close(out, wanted, rtol=1e-12, atol=1e-13)
        torch.testing.assert_close(lse, wanted_lse, rtol=1e-12, atol=1e-13)

    @pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
    @pytest.mark.parametrize("shape", SHAPES, ids=str)
    def test_with_lse(self, shape: tuple[int, ...], dtype: torch.dtype) -> None:
        q, k, v = inputs(shape, dtype)
        out, lse = attend_with_lse(q, k, v)
        wanted, wanted_lse = by_hand(q, k, v)
        assert out.dtype == dtype
        assert relative_l2(out, wanted) <= TOLERANCES[dtype]
        assert lse.shape == wanted_lse.shape
        torch.testing.assert_close(lse.double(), wanted_lse, rtol=1e-5, atol=1e-5)

    @pytest.mark.parametrize("shape", SHAPES, ids=str)
    def test_without_lse(self, shape: tuple[int, ...]) -> None:
        q, k, v = inputs(shape)
        assert relative_l2(attend(q, k, v), by_hand(q, k, v)[0]) <= TOLERANCES[torch.float32]

    def test_mask(self) -> None:
        q, k, v = inputs((2, 2, 2, 5, 9, 8))
        mask = torch.zeros(2, 1, 5, 9, dtype=torch.bool)
        mask[..., 2:6] = True
        wanted = by_hand(q, k[:, :, 2:6], v[:, :, 2:6])[0]
        assert relative_l2(attend(q, k, v, mask), wanted) <= TOLERANCES[torch.float32]

    def test_strided_inputs(self) -> None:
        """The cache hands over views."""
        q, k, v = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in inputs((2, 3, 3, 7, 13, 24)))
        assert not k.is_contiguous()
        assert relative_l2(attend_with_lse(q, k, v)[0], by_hand(q, k, v)[0]) <= TOLERANCES[torch.float32]

    def test_large_scores_do_not_overflow(self) -> None:
        q, k, v = inputs((1, 1, 1, 4, 12, 8))
        out, lse = attend_with_lse(100 * q, k, v)
        wanted, wanted_lse = attend_reference(100 * q.double(), k.double(), v.double())
        assert float(wanted_lse.max()) > 100
        torch.testing.assert_close(lse.double(), wanted_lse, rtol=1e-5, atol=0)
        torch.testing.assert_close(out.double(), wanted, rtol=1e-3, atol=1e-4)

    @pytest.mark.gpu
    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
    @pytest.mark.parametrize("shape", SHAPES, ids=str)
    def test_on_a_gpu(self, shape: tuple[int, ...], dtype: torch.dtype) -> None:
        q, k, v = inputs(shape, dtype)
        out, lse = attend_with_lse(q.cuda(), k.cuda(), v.cuda())
        wanted, wanted_lse = by_hand(q, k, v)
        # float32 may run in TF32
        assert relative_l2(out.cpu(), wanted) <= max(TOLERANCES[dtype], 2e-3)
        torch.testing.assert_close(lse.cpu().double(), wanted_lse, rtol=1e-3, atol=1e-2)


class TestGroupedHeads:
    @pytest.mark.parametrize("kv_heads", [1, 2, 4])
    def test_equals_repeated_heads(self, kv_heads: int) -> None:
        q, k, v = inputs((2, 4, kv_heads, 6, 11, 24))
        repeated = (x.repeat_interleave(4 // kv_heads, 1) for x in (k, v))
        many = attend_with_lse(q, *repeated)
        few = attend_with_lse(q, k, v)
        assert torch.equal(few[0], many[0]) and torch.equal(few[1], many[1])

    def test_neighbouring_query_heads_share(self) -> None:
        """Head h of the queries reads key head h // group, as checkpoints lay them out."""
        k = torch.arange(2.0).view(1, 2, 1, 1)
        assert repeat_heads(torch.empty(1, 4, 1, 1), k, k)[0].flatten().tolist() == [0, 0, 1, 1]


class TestMerge:
    @given(
        cuts=st.lists(st.integers(1, 40), unique=True, min_size=1, max_size=6).map(sorted),
        seed=st.integers(0, 99),
    )
    @settings(max_examples=25)
    def test_random_splits_give_the_whole(self, cuts: list[int], seed: int) -> None:
        q = 3 * noise(1, 2, 5, 16, seed=seed)
        k, v = noise(1, 2, 41, 16, seed=seed + 1), noise(1, 2, 41, 16, seed=seed + 2)
        wanted, wanted_lse = attend_reference(q.double(), k.double(), v.double())
        parts = [attend_with_lse(q, *part) for part in split(k, v, cuts)]
        for ordered in (parts, parts[::-1]):
            out, lse = ordered[0]
            for more in ordered[1:]:
                out, lse = merge(out, lse, *more)
            torch.testing.assert_close(out.double(), wanted, rtol=0, atol=3e-6)
            torch.testing.assert_close(lse.double(), wanted_lse, rtol=0, atol=3e-6)

    def test_exact_at_float64(self) -> None:
        q, k, v = inputs((1, 2, 2, 5, 30, 16), torch.float64)
        out, lse = attend_reference(q, *split(k, v, [11])[0])
        out, lse = merge(out, lse, *attend_reference(q, *split(k, v, [11])[1]))
        whole, whole_lse = attend_reference(q, k, v)
        torch.testing.assert_close(out, whole, rtol=1e-13, atol=1e-14)
        torch.testing.assert_close(lse, whole_lse, rtol=1e-13, atol=1e-14)

    def test_order_of_two_does_not_matter(self) -> None:
        q, k, v = inputs((1, 2, 2, 5, 30, 16))
        a, b = (attend_with_lse(q, *part) for part in split(k, v, [9]))
        forward, backward = merge(*a, *b), merge(*b, *a)
        torch.testing.assert_close(forward[0], backward[0], rtol=0, atol=1e-6)
        assert torch.equal(forward[1], backward[1])

    def test_a_part_without_mass_changes_nothing(self) -> None:
        q, k, v = inputs((1, 1, 1, 3, 8, 8))
        out, lse = attend_with_lse(q, k, v)
        merged = merge(out, lse, torch.full_like(out, 7.0), torch.full_like(lse, -1e4))
        assert torch.equal(merged[0], out) and torch.equal(merged[1], lse)

    def test_halves_of_equal_mass_are_averaged(self) -> None:
        out, more = torch.zeros(1, 1, 2, 4), torch.ones(1, 1, 2, 4)
        merged, lse = merge(out, torch.zeros(1, 1, 2), more, torch.zeros(1, 1, 2))
        torch.testing.assert_close(merged, torch.full_like(out, 0.5))
        torch.testing.assert_close(lse, torch.full((1, 1, 2), math.log(2)))

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
    def test_parts_of_another_precision(self, dtype: torch.dtype) -> None:
        """The running output is float32 or wider; a part may come in any precision."""
        q, k, v = inputs((1, 2, 2, 5, 30, 16))
        a, b = (attend_with_lse(q, *part) for part in split(k, v, [9]))
        wide = torch.promote_types(dtype, torch.float32)
        merged, _ = merge(a[0].to(wide), a[1], b[0].to(dtype), b[1].to(wide))
        assert merged.dtype == wide
        assert relative_l2(merged, attend(q, k, v)) <= max(TOLERANCES[dtype], 2e-6)


class TestFallback:
    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
    def test_half_precision_sums_in_float32(
        self, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Where no fused operator applies: a log-sum-exp in bfloat16 would be off by percents."""
        q, k, v = inputs((1, 2, 2, 5, 30, 16), dtype)
        monkeypatch.setattr(torch.Tensor, "device", torch.device("meta"))
        out, lse = attend_with_lse(q, k, v)
        monkeypatch.undo()
        wanted, wanted_lse = by_hand(q, k, v)
        assert out.dtype == dtype and lse.dtype == torch.float32
        assert relative_l2(out, wanted) <= TOLERANCES[dtype]
        torch.testing.assert_close(lse.double(), wanted_lse, rtol=1e-5, atol=1e-5)
