"""The fused read against float64: random shapes, edges, exact identities, and controls that must fail."""

from __future__ import annotations

import math
import os
import random
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.tiny import generator, relative_l2
from vidkv.kernels.attention import attend_reference
from vidkv.kernels.int8 import quantize
from vidkv.kernels.jit import interpreted
from vidkv.kernels.paged_attention import (
    PageRun,
    Tile,
    _attend,
    _turn_queries,
    attend_pages,
    attend_pages_reference,
    query_scale,
    tail,
)
from vidkv.kernels.pages import decode_reference
from vidkv.kernels.rope import rotate_first, temporal_phases

SHAPES = int(os.environ.get("VIDKV_SHAPES", "0"))
"""Random shapes to try; with none given, the few of the first `DRAWN` that show all there is to see."""
DRAWN = 200
OFFSETS = (-1, -2, -3, -4, -7, -20, -100, -1_000, -20_000)
TOKENS = (1, 2, 7, 15, 16, 17, 31, 32, 33, 48, 63, 64, 65, 100)
TILE = Tile(32, 32, 4, 1)
KERNEL_BOUND = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 8e-3}
"""rel-L2 with queries rounded as the kernel rounds them; the interpreter cuts bfloat16 at the end."""
LSE_BOUND = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 2e-2}
QUERY_CODES = 1.5e-2
"""What the codes of queries cost besides, for normal inputs."""

pytestmark = pytest.mark.usefixtures("poisoned_empty")
pages_may_vanish = pytest.mark.filterwarnings("ignore:divide by zero encountered in log2:RuntimeWarning")
"""A page whose every weight underflows has a log-sum-exp of -inf; numpy warns, a GPU does not."""


@dataclass
class Case:
    """Inputs of one read. Slots that no table names hold NaN, or codes of 127 with scales of NaN."""

    batch: int = 1
    heads: int = 2
    kv_heads: int = 2
    queries: int = 20
    own: int = 20
    tokens: int = 17
    d: int = 32
    coded_offsets: tuple[int, ...] = (-3, -2)
    plain_offsets: tuple[int, ...] = (-1,)
    dtype: torch.dtype = torch.float32
    per_channel: bool = False
    tile: Tile = TILE
    page_lse: bool = True
    mean_size: float = 1.0
    seed: int = 0
    q: Tensor = field(init=False)
    k: Tensor = field(init=False)
    v: Tensor = field(init=False)

    def __post_init__(self) -> None:
        source = generator(self.seed)

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=source)

        b, kv, d = self.batch, self.kv_heads, self.d
        self.q = normal(b, self.heads, self.queries, d).to(self.dtype)
        self.k, self.v = (normal(b, kv, self.own, d).to(self.dtype) for _ in range(2))
        pages = max(len(self.coded_offsets), len(self.plain_offsets)) + 2
        k, v = (normal(pages, b, kv, self.tokens, d) for _ in range(2))
        self.coded = self.plain = None
        if self.coded_offsets:
            k_codes, k_scale = quantize(k)
            v_codes, v_scale = quantize(v, -2 if self.per_channel else -1)
            buffers = {"k": k_codes, "v": v_codes, "k_scale": k_scale, "v_scale": v_scale}
            mean = self.mean_size * normal(b, kv, d)
            self.coded = self._run(buffers, self.coded_offsets, source, mean)
        if self.plain_offsets:
            # other values than those of the codes: pages must not be mixed up
            buffers = {"k": k.flip(0).to(self.dtype), "v": v.flip(0).to(self.dtype)}
            self.plain = self._run(buffers, self.plain_offsets, source, None)

    def _run(
        self,
        buffers: dict[str, Tensor],
        offsets: tuple[int, ...],
        source: torch.Generator,
        mean: Tensor | None,
    ) -> PageRun:
        pages = len(buffers["k"])
        order = torch.randperm(pages, generator=source)
        slots, unused = order[: len(offsets)], order[len(offsets) :]
        for buffer in buffers.values():
            buffer[unused] = 127 if buffer.dtype == torch.int8 else math.nan
        return PageRun(buffers, slots, temporal_phases(self.d, torch.tensor(offsets)), mean)

    @classmethod
    def drawn(cls, number: int) -> Case:
        draw = random.Random(f"shape {number}")
        kv_heads = draw.choice([1, 1, 2, 3])
        pages = draw.choice([0, 0, 1, 2, 3, 5]), draw.choice([0, 0, 1, 2, 3])
        return cls(
            batch=draw.choice([1, 1, 2, 3]),
            heads=kv_heads * draw.choice([1, 1, 2, 4]),
            kv_heads=kv_heads,
            queries=draw.choice([1, 2, 15, 16, 17, 32, 33, 64, draw.randint(1, 70)]),
            own=draw.choice([1, 2, 31, 32, 33, 64, draw.randint(1, 90)]),
            tokens=draw.choice([*TOKENS, draw.randint(1, 130)]),
            d=draw.choice([32, 32, 32, 64, 64, 128]),
            coded_offsets=tuple(draw.choices(OFFSETS, k=pages[0])),
            plain_offsets=tuple(draw.choices(OFFSETS, k=pages[1])),
            dtype=draw.choice([torch.float32, torch.float16, torch.bfloat16]),
            per_channel=draw.random() < 0.3,
            tile=Tile(
                draw.choice([16, 32, 64]), draw.choice([32, 64]), draw.choice([4, 8]), draw.choice([1, 2])
            ),
            page_lse=draw.random() < 0.7,
            mean_size=draw.choice([0.0, 1.0]),
            seed=number,
        )

    def __str__(self) -> str:
        return repr(self).split(", q=")[0]

    @property
    def inputs(self) -> tuple[Any, ...]:
        return self.q, self.k, self.v, self.coded, self.plain

    def attend(self) -> tuple[Tensor, Tensor, Tensor]:
        return attend_pages(*self.inputs, self.tile, self.page_lse)

    def reference(self, exact_queries: bool = False) -> tuple[Tensor, Tensor, Tensor]:
        return attend_pages_reference(*self.inputs, exact_queries)

    def decided(self) -> Tensor:
        """Queries (b, heads, queries) whose codes do not depend on the last bit of a float32.

        About one code in 10,000 lies so close to the middle between two that float64 may round it to the
        other; the kernel is no worse for it, but such a query differs by a step.
        """
        decided = torch.ones(self.q.shape[:-1], dtype=torch.bool)
        for phases in self.coded.temporal if self.coded else ():
            turned = rotate_first(self.q.double(), phases.conj().to(torch.complex128))
            steps = turned / query_scale(self.q).double()[..., None]
            decided &= ((steps - steps.floor() - 0.5).abs() > 1e-4).all(-1)
        return decided


def worst(found: Tensor, wanted: Tensor) -> float:
    assert found.shape == wanted.shape and bool(found.isfinite().all())
    return float((found.double() - wanted).abs().max()) if found.numel() else 0.0


def assert_matches(case: Case, bound: float | None = None) -> None:
    """The kernel agrees with the reference, and with exact queries as far as their codes allow."""
    out, lse, per_page = case.attend()
    wanted, wanted_lse, wanted_pages = case.reference()
    assert out.dtype == case.dtype and lse.dtype == per_page.dtype == torch.float32
    decided = case.decided()
    assert decided.numel() < 50 or float(decided.float().mean()) > 0.5
    rows, pages = decided[..., None].expand_as(out), decided[:, :, None].expand_as(wanted_pages)
    bound = bound or KERNEL_BOUND[case.dtype]
    if bool(decided.any()):
        assert relative_l2(out[rows], wanted[rows]) <= bound
        assert worst(lse[decided], wanted_lse[decided]) <= LSE_BOUND[case.dtype]
    if case.page_lse:
        assert worst(per_page[pages], wanted_pages[pages]) <= LSE_BOUND[case.dtype]
        assert worst(per_page, wanted_pages) <= 0.05
    else:
        assert per_page.numel() == 0
    # of a handful of queries one may be twice as far off as they are together elsewhere
    codes = QUERY_CODES * (2 if decided.numel() < 20 else 1)
    assert relative_l2(out, wanted) <= max(bound, codes)
    assert relative_l2(out, case.reference(exact_queries=True)[0]) <= max(bound, codes)


def test_these_tests_are_interpreted() -> None:
    assert interpreted()


def test_poison_reaches_what_a_kernel_leaves_unwritten() -> None:
    """Without pages no query scale is written: it must be the fixture's NaN."""
    assert bool(_turn_queries(Case().q, None, None, None, 1.0)[2].isnan().all())


def shown(case: Case) -> set[object]:
    """What a shape has in it: every value that is drawn from a few, and the pairs in which they meet."""
    kinds, tile = (len(case.coded_offsets) > 0, len(case.plain_offsets) > 0), case.tile
    return {
        ("pages", len(case.coded_offsets), "coded"),
        ("pages", len(case.plain_offsets), "plain"),
        *(("far", offset) for offset in case.coded_offsets + case.plain_offsets),
        ("kinds, type", kinds, case.dtype),
        ("kinds, channels", kinds, case.d),
        ("kinds, page sums", kinds, case.page_lse),
        ("kinds, rest of tokens", kinds, case.tokens % tile.keys > 0, case.tokens > tile.keys),
        ("scales of values, type", case.per_channel, case.dtype, kinds[0]),
        ("mean", case.mean_size, kinds[0]),
        ("channels, type", case.d, case.dtype),
        ("batch", case.batch),
        ("heads", case.kv_heads, case.heads),
        ("rest of own keys", case.own % tile.keys > 0, case.own > tile.keys),
        ("rest of queries", case.queries % tile.queries > 0, case.queries > tile.queries),
        ("tile", tile),
    }


def programs(case: Case) -> int:
    """What a shape costs here: steps of the interpreter, in tiles."""
    keys = case.tile.keys
    pages = len(case.coded_offsets) + len(case.plain_offsets)
    steps = -(-case.own // keys) + pages * -(-case.tokens // keys)
    return case.batch * case.heads * -(-case.queries // case.tile.queries) * steps


def covering() -> list[int]:
    """Numbers of cheap shapes among the first `DRAWN` that together show all that those show."""
    cases = {number: Case.drawn(number) for number in range(DRAWN)}
    unseen, found = set().union(*map(shown, cases.values())), []
    while unseen:
        # a shape costs about half a dozen steps beside its own
        gain = {number: len(shown(case) & unseen) / (programs(case) + 6) for number, case in cases.items()}
        found.append(max(gain, key=gain.__getitem__))
        unseen -= shown(cases[found[-1]])
    return found


@pytest.mark.parametrize("number", range(SHAPES) or covering())
def test_random_shapes(number: int) -> None:
    case = Case.drawn(number)
    print(case)
    assert_matches(case)


@cache
def to_tile() -> tuple[Case, tuple[Tensor, Tensor, Tensor]]:
    """A read of more queries and keys than one tile takes, and what the usual tile makes of it."""
    case = Case(heads=1, kv_heads=1, tokens=77, queries=70, own=70, coded_offsets=(-3,), seed=5)
    return case, case.attend()


class TestShapes:
    @pytest.mark.parametrize("dtype", KERNEL_BOUND, ids=str)
    @pytest.mark.parametrize(
        ("coded", "plain"),
        [((), ()), ((-5,), ()), ((), (-5,)), ((-9, -3, -1), ()), ((), (-9, -3, -1)), ((-1_000, -7), (-1,))],
        ids=str,
    )
    def test_kinds_of_pages(self, coded: tuple[int, ...], plain: tuple[int, ...], dtype: torch.dtype) -> None:
        assert_matches(Case(coded_offsets=coded, plain_offsets=plain, dtype=dtype, seed=1))

    @pytest.mark.parametrize("dtype", KERNEL_BOUND, ids=str)
    @pytest.mark.parametrize("tokens", [16, 33])
    def test_heads_of_256_channels(self, tokens: int, dtype: torch.dtype) -> None:
        assert_matches(Case(d=256, queries=9, own=9, tokens=tokens, dtype=dtype, seed=2))

    @pytest.mark.parametrize("per_channel", [False, True])
    @pytest.mark.parametrize("kv_heads", [1, 2, 4])
    def test_grouped_heads(self, kv_heads: int, per_channel: bool) -> None:
        assert_matches(Case(2, 4, kv_heads, per_channel=per_channel, seed=3))

    def test_neighbouring_query_heads_share(self) -> None:
        """Head h of the queries reads key head h // group: what the other key head holds is not seen."""
        case = Case(heads=4, kv_heads=2, seed=4)
        out, lse, per_page = case.attend()
        assert case.coded is not None and case.plain is not None
        for x in (
            case.k,
            case.v,
            *(run.pages[name] for run in (case.coded, case.plain) for name in ("k", "v")),
        ):
            x[..., 1, :, :] = 0
        changed = case.attend()
        for before, after in zip((out, lse, per_page), changed, strict=True):
            assert torch.equal(before[:, :2], after[:, :2])
            assert not torch.isclose(before[:, 2:], after[:, 2:]).all(-1).any()

    @pytest.mark.parametrize(
        "tile", [Tile(m, n, 4, 1) for m in (16, 32, 64, 128) for n in (32, 64, 128)], ids=str
    )
    def test_tiles_do_not_matter(self, tile: Tile) -> None:
        """Only the order of sums is theirs."""
        case, wanted = to_tile()
        found = replace(case, tile=tile).attend()
        assert relative_l2(found[0], wanted[0]) <= 1e-6
        assert all(worst(x, y.double()) <= 2e-6 for x, y in zip(found[1:], wanted[1:], strict=True))

    def test_views_with_strides_are_read_right(self) -> None:
        """Values come as a view of the model's layout."""
        case = Case(batch=2, seed=6)
        wanted = case.attend()
        for name in ("q", "k", "v"):
            x = getattr(case, name)
            setattr(case, name, x.permute(2, 0, 3, 1).contiguous().permute(1, 3, 0, 2))
            assert not getattr(case, name).is_contiguous()
        assert all(torch.equal(x, y) for x, y in zip(case.attend(), wanted, strict=True))

    def test_page_lse_changes_nothing_else(self) -> None:
        case = Case(seed=7)
        with_pages, without = case.attend(), replace(case, page_lse=False).attend()
        assert all(torch.equal(x, y) for x, y in zip(with_pages[:2], without[:2], strict=True))
        assert with_pages[2].shape == (1, 2, 3, 20) and without[2].shape == (1, 2, 0, 20)

    @pytest.mark.parametrize("keys", [32, 64, 128])
    def test_tail(self, keys: int) -> None:
        """It covers what whole tiles leave, wastes less than a factor of two, and suits a matrix unit."""
        for tokens in range(1, 300):
            columns, left = tail(tokens, keys), tokens % keys
            if left == 0:
                assert columns == 0
            else:
                assert left <= columns <= min(keys, max(32, 2 * left - 1))
                assert columns & (columns - 1) == 0


class TestExtremes:
    @pytest.mark.parametrize("dtype", KERNEL_BOUND, ids=str)
    def test_a_query_of_zeros(self, dtype: torch.dtype) -> None:
        """It reads everything alike: the mean of all values, and the logarithm of their number."""
        case = Case(dtype=dtype, seed=20)
        case.q[:, 1, 7] = 0
        out, lse, per_page = case.attend()
        values = []
        for run in (case.coded, case.plain):
            assert run is not None
            values.append(
                decode_reference(run.pages, run.slots, None, run.mean, torch.float64)[1].flatten(2, 3)
            )
        mean = torch.cat([*values, case.v.double()], 2).mean(2)[:, 1]
        torch.testing.assert_close(
            out[:, 1, 7].double(), mean, rtol=2 * KERNEL_BOUND[dtype], atol=KERNEL_BOUND[dtype] / 2
        )
        assert float(lse[0, 1, 7]) == pytest.approx(math.log(3 * 17 + 20), abs=1e-5)
        assert per_page[0, 1, :, 7].tolist() == pytest.approx([math.log(17)] * 3, abs=1e-5)
        assert_matches(case)

    @pages_may_vanish
    @pytest.mark.parametrize(("dtype", "size"), [(torch.float32, 1e4), (torch.float16, 1e3)], ids=str)
    def test_huge_queries(self, dtype: torch.dtype, size: float) -> None:
        """Scores in the thousands: all attention on one key, no overflow, and pages may vanish."""
        case = Case(dtype=dtype, seed=21)
        case.q[:, :, 3:6] *= size
        out, lse, per_page = case.attend()
        wanted, wanted_lse, wanted_pages = case.reference()
        assert float(wanted_lse[:, :, 3:6].min()) > size
        # scores are as exact as a float32, or the rounding of turned queries, is at their size
        digits = 1e-6 if dtype == torch.float32 else 1e-3
        torch.testing.assert_close(lse.double(), wanted_lse, rtol=digits, atol=1e-3)
        assert bool(out.isfinite().all())
        first = slice(0, 3)
        assert relative_l2(out[:, :, first], wanted[:, :, first]) <= QUERY_CODES / 2
        if dtype == torch.float32:
            assert relative_l2(out, wanted) <= 1e-2
        # a page's own sum is kept relative to the greatest score so far: far below, it is nothing
        assert not per_page.isnan().any() and not (per_page == math.inf).any()
        kept = per_page.isfinite()
        torch.testing.assert_close(per_page[kept].double(), wanted_pages[kept], rtol=digits, atol=2e-2)
        assert bool((wanted_pages - wanted_lse[:, :, None])[~kept].lt(-60).all())

    @pages_may_vanish
    def test_only_one_query_is_huge(self) -> None:
        """The scale of a query's codes is its own."""
        case = Case(seed=22)
        usual = case.attend()[0]
        case.q[:, :, 5] *= 1e4
        found = case.attend()[0]
        others = torch.arange(20) != 5
        assert torch.equal(found[:, :, others], usual[:, :, others])
        assert not torch.equal(found[:, :, 5], usual[:, :, 5])

    @pytest.mark.parametrize("kind", ["coded", "plain"])
    def test_all_keys_equal(self, kind: str) -> None:
        """At no distance, and with the chunk's own keys among them: the mean of all values."""
        offsets = {"coded_offsets": (), "plain_offsets": ()} | {f"{kind}_offsets": (0, 0)}
        case = Case(heads=4, seed=23, **offsets)
        key = case.k[:, :, :1].clone()
        case.k.copy_(key.expand_as(case.k))
        run = case.coded or case.plain
        assert run is not None
        if run.mean is None:
            run.pages["k"][run.slots] = key
        else:
            run.pages["k"][run.slots] = 0
            run.mean.copy_(key[:, :, 0])
        out, lse, per_page = case.attend()
        pages = decode_reference(run.pages, run.slots, None, run.mean, torch.float64)[1].flatten(2, 3)
        mean = torch.cat([pages, case.v.double()], 2).mean(2).repeat_interleave(2, 1)
        torch.testing.assert_close(out.double(), mean[:, :, None].expand_as(out), rtol=0, atol=2e-6)
        score = (case.q * key.repeat_interleave(2, 1)).sum(-1) / math.sqrt(32)
        torch.testing.assert_close(lse, score + math.log(2 * 17 + 20), rtol=0, atol=1e-5)
        torch.testing.assert_close(
            per_page, (score + math.log(17))[:, :, None].expand_as(per_page), rtol=0, atol=1e-5
        )

    def test_one_key(self) -> None:
        """With nothing else to read, its value comes back, whatever the query."""
        case = Case(own=1, coded_offsets=(), plain_offsets=(), seed=24)
        assert torch.equal(case.attend()[0], case.v.expand(-1, -1, 20, -1))


def own_lse(case: Case) -> Tensor:
    return attend_reference(case.q.double(), case.k.double(), case.v.double())[1]


class TestIdentities:
    @pytest.mark.parametrize("dtype", KERNEL_BOUND, ids=str)
    @pytest.mark.parametrize("kv_heads", [1, 2])
    def test_shares_of_attention_sum_to_one(self, kv_heads: int, dtype: torch.dtype) -> None:
        case = Case(2, 2, kv_heads, coded_offsets=(-9, -3), plain_offsets=(-2, -1), dtype=dtype, seed=30)
        _, lse, per_page = case.attend()
        shares = (per_page - lse[:, :, None]).exp()
        own = (own_lse(case) - lse.double()).exp()
        bound = {torch.float32: 1e-5, torch.float16: 2e-4, torch.bfloat16: 2e-3}[dtype]
        torch.testing.assert_close(shares.sum(2).double() + own, torch.ones_like(own), rtol=0, atol=bound)
        assert float(shares.min()) > 0 and float(shares.max()) < 1

    @pytest.mark.parametrize("offset", OFFSETS)
    def test_a_turned_query_is_a_turned_key(self, offset: int) -> None:
        """Lazy rotation: a page p frames away is as good as its keys turned by p among the chunk's own."""
        case = Case(heads=4, coded_offsets=(), plain_offsets=(offset,), seed=31)
        run = case.plain
        assert run is not None
        k, v = (run.pages[name][run.slots][0] for name in ("k", "v"))
        exact = temporal_phases(32, torch.tensor([offset]), torch.float64)
        turned = rotate_first(k.double(), exact).float()
        together = torch.cat([turned, case.k], 2), torch.cat([v, case.v], 2)
        found, wanted = case.attend(), attend_pages(case.q, *together, None, None, TILE)
        assert relative_l2(found[0], wanted[0]) <= 1e-5
        assert worst(found[1], wanted[1].double()) <= 1e-5

    def test_pages_cut_another_way(self) -> None:
        """A page of 34 tokens is two of 17 at one distance."""
        case = Case(tokens=34, coded_offsets=(-3,), plain_offsets=(-1,), seed=32)
        halves = []
        for run in (case.coded, case.plain):
            assert run is not None
            pages = {name: torch.cat(x[run.slots].split(17, -2)) for name, x in run.pages.items()}
            halves.append(PageRun(pages, torch.arange(2), run.temporal.repeat(2, 1), run.mean))
        found, wanted = attend_pages(*case.inputs[:3], *halves, TILE), case.attend()
        assert relative_l2(found[0], wanted[0]) <= 1e-6
        assert worst(found[1], wanted[1].double()) <= 2e-6

    def test_order_of_pages_does_not_matter(self) -> None:
        case = Case(coded_offsets=(-9, -4, -3), plain_offsets=(-2, -1), seed=33)
        wanted = case.attend()
        for kind in ("coded", "plain"):
            run = getattr(case, kind)
            setattr(case, kind, replace(run, slots=run.slots.flip(0), temporal=run.temporal.flip(0)))
        found = case.attend()
        assert relative_l2(found[0], wanted[0]) <= 1e-6
        assert worst(found[2], wanted[2][:, :, [2, 1, 0, 4, 3]].double()) <= 2e-6

    def test_twice_is_the_same(self) -> None:
        case = Case(batch=2, dtype=torch.float16, seed=34)
        assert all(torch.equal(x, y) for x, y in zip(case.attend(), case.attend(), strict=True))

    def test_slots_do_not_matter(self) -> None:
        """A video's bits cannot depend on which slots were free."""
        case = Case(coded_offsets=(-9, -4, -3), plain_offsets=(-2, -1), seed=35)
        wanted = case.attend()
        for kind in ("coded", "plain"):
            run = getattr(case, kind)
            moved = torch.randperm(len(run.pages["k"]), generator=generator(36))
            pages = {}
            for name, x in run.pages.items():
                pages[name] = torch.empty_like(x)
                pages[name][moved] = x
            assert not torch.equal(moved[run.slots], run.slots)
            setattr(case, kind, replace(run, pages=pages, slots=moved[run.slots]))
        assert all(torch.equal(x, y) for x, y in zip(case.attend(), wanted, strict=True))

    def test_batch_elements_do_not_meet(self) -> None:
        case = Case(batch=3, seed=37)
        wanted = case.attend()
        alone = Case(batch=3, seed=37)
        for name in ("q", "k", "v"):
            setattr(alone, name, getattr(alone, name)[1:2].contiguous())
        for kind in ("coded", "plain"):
            run = getattr(alone, kind)
            pages = {name: x[:, 1:2].contiguous() for name, x in run.pages.items()}
            mean = None if run.mean is None else run.mean[1:2].contiguous()
            setattr(alone, kind, replace(run, pages=pages, mean=mean))
        assert all(torch.equal(x, y[1:2]) for x, y in zip(alone.attend(), wanted, strict=True))


class TestMean:
    """Codes are of keys less a mean that may be much larger than what is left."""

    @pytest.mark.parametrize("dtype", KERNEL_BOUND, ids=str)
    @pytest.mark.parametrize("offset", [-1, -7, -1_000])
    def test_comes_back_at_every_distance(self, offset: int, dtype: torch.dtype) -> None:
        case = Case(
            heads=4, coded_offsets=(offset, -2), plain_offsets=(), mean_size=3.0, dtype=dtype, seed=40
        )
        assert_matches(case)

    def test_is_exact_for_unrounded_queries(self) -> None:
        """The mean meets the query itself, not its codes: errors do not grow with it."""
        errors = []
        for size in (0.0, 30.0):
            case = Case(coded_offsets=(-7,), plain_offsets=(), mean_size=size, seed=41)
            errors.append(worst(case.attend()[2], case.reference(exact_queries=True)[2]))
        assert 0 < errors[1] <= 1.5 * errors[0]

    @pytest.mark.parametrize("offset", [-1, -7, -1_000])
    def test_left_out_it_is_missed(self, offset: int) -> None:
        """A control: were it a constant shift that softmax does not see, the tests above could not fail."""
        case = Case(coded_offsets=(offset, -2), plain_offsets=(), mean_size=3.0, seed=40)
        out = case.attend()[0]
        assert case.coded is not None and case.coded.mean is not None
        case.coded = replace(case.coded, mean=torch.zeros_like(case.coded.mean))
        assert relative_l2(case.attend()[0], out) > 0.1

    @pytest.mark.parametrize("kind", ["coded", "plain"])
    def test_wrong_distances_are_noticed(self, kind: str) -> None:
        case = Case(coded_offsets=(-3, -2), plain_offsets=(-3, -2), seed=42)
        out, run = case.attend()[0], getattr(case, kind)
        for offsets in ((-2, -3), (3, 2), (-4, -3)):
            setattr(case, kind, replace(run, temporal=temporal_phases(32, torch.tensor(offsets))))
            assert relative_l2(case.attend()[0], out) > 0.05, offsets


class TestPrecision:
    @pytest.mark.parametrize("queries", [16, 70])
    @pytest.mark.parametrize("d", [32, 64, 128])
    def test_twice_the_error_of_plain_attention_at_most(self, d: int, queries: int) -> None:
        """FlashAttention's rule: fp16 against float64, beside naive fp16 attention on decoded keys."""
        case = Case(
            heads=2, queries=queries, own=queries, tokens=65, d=d, coded_offsets=(-9, -3),
            plain_offsets=(-1,), dtype=torch.float16, seed=50 + d,
        )  # fmt: skip
        keys, values = [], []
        for run in (case.coded, case.plain):
            assert run is not None
            k, v = decode_reference(run.pages, run.slots, run.temporal, run.mean, torch.float16)
            keys.append(k.flatten(2, 3))
            values.append(v.flatten(2, 3))
        k, v = torch.cat([*keys, case.k], 2), torch.cat([*values, case.v], 2)
        naive = (case.q @ k.transpose(-1, -2) / math.sqrt(d)).softmax(-1) @ v
        naive_error = relative_l2(naive, case.reference(exact_queries=True)[0])
        decided = case.decided()[..., None].expand_as(case.q)
        error = relative_l2(case.attend()[0][decided], case.reference()[0][decided])
        assert 0 < error <= 2 * naive_error + 2**-13


class TestOperators:
    def turned(self, case: Case) -> tuple[Any, ...]:
        tables = [torch.view_as_real(run.temporal) if run else None for run in (case.coded, case.plain)]
        return case.q, *tables, case.coded.mean if case.coded else None, 0.25

    @pytest.mark.parametrize(
        ("coded", "plain"), [((-3, -2), (-1,)), ((), (-1,)), ((-1,), ()), ((), ())], ids=str
    )
    def test_opcheck(self, coded: tuple[int, ...], plain: tuple[int, ...]) -> None:
        case = Case(queries=5, own=3, tokens=4, coded_offsets=coded, plain_offsets=plain)
        arguments = self.turned(case)
        if not (coded or plain):
            # scales that no kernel writes hold poison, and NaN differs from itself
            case.page_lse = False
            prepared = [torch.zeros_like(x) for x in _turn_queries(*arguments)]
        else:
            prepared = list(_turn_queries(*arguments))
            if coded:
                torch.library.opcheck(_turn_queries, arguments)
        runs = []
        for run in (case.coded, case.plain):
            runs += [list(run.pages.values()), run.slots] if run else [[], None]
        rest = (0.25, [32, 32, 4, 1], case.page_lse)
        torch.library.opcheck(_attend, (case.q, case.k, case.v, *runs, *prepared, *rest))

    @pytest.mark.parametrize("dynamic", [False, True])
    def test_compiled(self, dynamic: bool) -> None:
        """One graph without a break, and the same bits."""

        def read(q: Tensor, k: Tensor, v: Tensor, coded: PageRun, plain: PageRun) -> Tensor:
            out, lse, per_page = attend_pages(2 * q, k, v, coded, plain, TILE, page_lse=True)
            return out + lse[..., None] + per_page.sum(2)[..., None]

        case = Case(seed=60)
        torch.compiler.reset()
        compiled: Callable[..., Tensor] = torch.compile(
            read, backend="aot_eager", fullgraph=True, dynamic=dynamic
        )
        assert torch.equal(compiled(*case.inputs), read(*case.inputs))
