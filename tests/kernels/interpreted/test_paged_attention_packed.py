"""The fused read of packed pages against float64, part by part and whole."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

from tests.kernels.packed_read_cases import ROUNDED, Case, assert_reads
from tests.tiny import noise, relative_l2
from vidkv.kernels.jit import interpreted
from vidkv.kernels.packed import hadamard
from vidkv.kernels.paged_attention import PageRun, Tile
from vidkv.kernels.paged_attention_packed import (
    merge_turned,
    merge_turned_reference,
    turn_packed_queries,
    turn_packed_queries_reference,
    unpack_pages,
    unpack_pages_reference,
)

Mistake = Callable[[PageRun], PageRun]
CASES = [
    Case(),
    Case(kv_heads=1, batch=2, tokens=33, queries=9, offsets=(-2,), coded=True, plain=True),
    Case(d=64, tokens=70, per_channel=True, coded=True, dtype=torch.float16),
    Case(d=128, tokens=40, plain=True, dtype=torch.bfloat16, page_lse=False),
    Case(turned=False, tokens=1, own=1, plain=True, page_lse=False),
    Case(turned=False, tokens=31, per_channel=True, tile=Tile(16, 32, 4, 1)),
]

pytestmark = pytest.mark.usefixtures("poisoned_empty")


def test_these_tests_are_interpreted() -> None:
    assert interpreted()


@pytest.mark.parametrize("case", CASES, ids=str)
def test_whole(case: Case) -> None:
    assert_reads(case, ROUNDED[case.dtype])


@pytest.mark.parametrize("per_channel", [False, True])
def test_unpacked(per_channel: bool) -> None:
    """Code for code, and in the order of the table."""
    case = Case(kv_heads=3, batch=2, tokens=70, per_channel=per_channel, offsets=(-3, -2, -1))
    run = case.runs["packed"]
    pages = [run.pages[name] for name in ("k", "v", "k_scale", "v_scale")]
    found, wanted = unpack_pages(*pages, run.slots), unpack_pages_reference(*pages, run.slots)
    for x, y in zip(found, wanted, strict=True):
        assert x.dtype == y.dtype and torch.equal(x, y)
    assert set(found[0].unique().tolist()) == set(range(-15, 16, 2))


@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize("d", [32, 256])
def test_turned_queries(d: int, turned: bool) -> None:
    case = Case(heads=4, kv_heads=2, d=d, queries=37, turned=turned, offsets=(-20_000, -1))
    run = case.runs["packed"]
    assert run.mean is not None
    turns = torch.view_as_real(run.temporal)
    codes, scale, offsets = turn_packed_queries(case.q, turns, run.mean, turned, 0.25)
    exact, exact_scale = turn_packed_queries_reference(case.q, run.temporal, turned)
    assert relative_l2(scale, 0.25 * exact_scale) <= 1e-6
    steps = exact / exact_scale[..., None]
    assert float((codes - steps).abs().max()) <= 0.5 + 1e-4
    # the scale is a query's own, and wastes nothing
    assert bool((codes.int().abs().amax((0, -1)) == 127).all())
    back = exact @ hadamard(d, case.q.device, torch.float64) if turned else exact
    mean = run.mean.double().repeat_interleave(2, 1)[..., None]
    assert relative_l2(offsets, 0.25 * (back @ mean)[..., 0]) <= 1e-5


def test_one_huge_query_does_not_spoil_others() -> None:
    case = Case(offsets=(-7,), page_lse=False)
    usual = case.attend()
    case.q[:, :, 5] *= 1e4
    case.q[:, :, 6] = 0
    others = torch.tensor([at for at in range(20) if at not in (5, 6)])
    changed = case.attend()
    for x, y in zip(usual[:2], changed[:2], strict=True):
        assert bool(y.isfinite().all())
        assert torch.equal(x[:, :, others], y[:, :, others]) and not torch.equal(x, y)
    # a query of zeros reads everything alike
    assert changed[1][0, :, 6].tolist() == pytest.approx([math.log(17 + 9)] * 2, abs=1e-5)


def test_shares_of_attention_sum_to_one() -> None:
    case = Case(coded=True, plain=True, own=1)
    _, lse, per_page = case.attend()
    own = (case.q * case.k).sum(-1) / math.sqrt(32)
    shares = torch.cat([per_page, own[:, :, None]], 2) - lse[:, :, None]
    torch.testing.assert_close(shares.exp().sum(2), torch.ones_like(lse), rtol=0, atol=1e-5)


def test_merged() -> None:
    out, more = noise(1, 2, 19, 64, seed=1), 3 * noise(1, 2, 19, 64, seed=2)
    lse, more_lse = noise(1, 2, 19, seed=3), noise(1, 2, 19, seed=4)
    lse[0, 0, 0] = -200
    found, wanted = (merge(out, lse, more, more_lse) for merge in (merge_turned, merge_turned_reference))
    for x, y in zip(found, wanted, strict=True):
        assert relative_l2(x, y) <= 1e-6


def not_turned(run: PageRun) -> PageRun:
    return replace(run, turned=False)


def no_mean(run: PageRun) -> PageRun:
    assert run.mean is not None
    return replace(run, mean=torch.zeros_like(run.mean))


def wrong_distance(run: PageRun) -> PageRun:
    return replace(run, temporal=run.temporal.conj().resolve_conj())


def wrong_pages(run: PageRun) -> PageRun:
    return replace(run, slots=run.slots.flip(0))


@pytest.mark.parametrize("mistake", [not_turned, no_mean, wrong_distance, wrong_pages])
def test_would_notice(mistake: Mistake) -> None:
    """Controls: each of these must be far outside the bounds above."""
    case = Case(queries=8, page_lse=False)
    wanted = case.reference()[0]
    case.runs["packed"] = mistake(case.runs["packed"])
    assert relative_l2(case.attend()[0], wanted) > 0.05


def test_operators() -> None:
    case = Case(queries=5, tokens=4, offsets=(-1,))
    run = case.runs["packed"]
    assert run.mean is not None
    pages = [run.pages[name] for name in ("k", "v", "k_scale", "v_scale")]
    turns, lse = torch.view_as_real(run.temporal), noise(1, 2, 5)
    for operator, arguments in (
        (unpack_pages, (*pages, run.slots)),
        (turn_packed_queries, (case.q, turns, run.mean, True, 0.25)),
        (merge_turned, (case.q, lse, case.q, lse)),
    ):
        torch.library.opcheck(operator, arguments, test_utils=("test_schema", "test_faketensor"))
