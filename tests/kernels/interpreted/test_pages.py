"""Commit and decode: what the kernels write and read back is what the torch references do."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field

import pytest
import torch
from torch import Tensor

from tests.tiny import noise, relative_l2
from vidkv.kernels import pages as pages_module
from vidkv.kernels.int8 import LEVELS, quantize
from vidkv.kernels.jit import interpreted
from vidkv.kernels.pages import (
    Pages,
    _commit,
    _decode,
    commit,
    commit_reference,
    decode,
    decode_reference,
)
from vidkv.kernels.rope import rotate_last, spatial_phases, temporal_phases

FRAMES = [
    # batch, frames, rows, columns, kv heads, head_dim
    (1, 1, 1, 1, 1, 16),
    (1, 3, 2, 5, 2, 64),
    (2, 2, 1, 17, 3, 128),
    (2, 3, 3, 11, 1, 32),
    (1, 2, 4, 4, 2, 256),
]
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
# the interpreter cuts what it stores as bfloat16 instead of rounding it: one unit in the last place
BF16_ULP = 2.0**-7
SPARE = 3
"""Slots that nothing is written to."""

Turn = Callable[[Tensor, Tensor], Tensor]

pytestmark = pytest.mark.usefixtures("poisoned_empty")


@dataclass
class Case:
    """Frames on their way into the cache; k and v in the strides in which a model hands them over."""

    shape: tuple[int, ...]
    dtype: torch.dtype = torch.float32
    seed: int = 0
    slots: Tensor = field(init=False)

    def __post_init__(self) -> None:
        b, frames, rows, columns, heads, d = self.shape
        size = (b, frames, rows * columns, heads, d)
        self.mean = 2 * noise(b, heads, d, seed=self.seed + 3)
        self.k, self.v = (
            (3 * noise(*size, seed=self.seed + s)).to(self.dtype).permute(0, 3, 1, 2, 4) for s in (1, 2)
        )
        self.spatial = spatial_phases(d, rows, columns)
        self.slots = torch.randperm(frames + SPARE, generator=torch.Generator().manual_seed(self.seed))[
            :frames
        ]

    def coded(self, per_channel: bool = False) -> Pages:
        """Empty pages of codes, with something in every slot that must not be found afterwards."""
        b, frames, rows, columns, heads, d = self.shape
        plane = (frames + SPARE, b, heads)
        v_scale = (1, d) if per_channel else (rows * columns, 1)
        return {
            "k": torch.full((*plane, rows * columns, d), 99, dtype=torch.int8),
            "v": torch.full((*plane, rows * columns, d), -99, dtype=torch.int8),
            "k_scale": torch.full((*plane, rows * columns, 1), math.nan, dtype=torch.float16),
            "v_scale": torch.full((*plane, *v_scale), math.nan, dtype=torch.float16),
        }

    def plain(self, dtype: torch.dtype) -> Pages:
        b, frames, rows, columns, heads, d = self.shape
        shape = (frames + SPARE, b, heads, rows * columns, d)
        return {name: torch.full(shape, math.nan, dtype=dtype) for name in ("k", "v")}

    def filled(self, per_channel: bool = False) -> Pages:
        """Coded pages, by the reference."""
        pages = self.coded(per_channel)
        for name, written in commit_reference(pages, self.k, self.v, self.spatial, self.mean).items():
            pages[name][self.slots] = written
        return pages

    @property
    def others(self) -> Tensor:
        return torch.tensor([i for i in range(len(self.slots) + SPARE) if i not in self.slots.tolist()])


@pytest.fixture
def kernel_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither way may fall back to torch."""
    monkeypatch.setattr(pages_module, "commit_reference", None)
    monkeypatch.setattr(pages_module, "decode_reference", None)


def bits(x: Tensor) -> Tensor:
    """For comparing NaN with NaN."""
    return x.view(torch.uint8)


def test_these_tests_are_interpreted() -> None:
    assert interpreted()


@pytest.mark.usefixtures("kernel_only")
class TestCommit:
    @pytest.mark.parametrize("turned", [False, True], ids=["to turn", "turned"])
    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    @pytest.mark.parametrize("shape", FRAMES, ids=str)
    def test_codes(
        self, shape: tuple[int, ...], dtype: torch.dtype, turned: bool, turn_plainly: Turn
    ) -> None:
        """Bit for bit those of the reference, and no other slot is touched."""
        case = Case(shape, dtype)
        pages, spatial = case.coded(), None if turned else case.spatial
        before = {name: x.clone() for name, x in pages.items()}
        commit(pages, case.slots, case.k, case.v, spatial, case.mean)
        k = case.k if turned else turn_plainly(case.k.float(), case.spatial)
        wanted = commit_reference(pages, k, case.v, None, case.mean)
        for name, x in pages.items():
            assert torch.equal(x[case.slots], wanted[name]), name
            assert torch.equal(bits(x[case.others]), bits(before[name][case.others])), name

    @pytest.mark.parametrize("turned", [False, True], ids=["to turn", "turned"])
    @pytest.mark.parametrize(
        ("dtype", "stored"),
        [
            (torch.float32, torch.float32),
            (torch.float16, torch.float32),
            (torch.float32, torch.bfloat16),
            (torch.float16, torch.bfloat16),
            (torch.bfloat16, torch.bfloat16),
        ],
        ids=str,
    )
    @pytest.mark.parametrize("shape", FRAMES, ids=str)
    def test_plain_pages(
        self,
        shape: tuple[int, ...],
        dtype: torch.dtype,
        stored: torch.dtype,
        turned: bool,
        turn_plainly: Turn,
    ) -> None:
        case = Case(shape, dtype, seed=10)
        pages, spatial = case.plain(stored), None if turned else case.spatial
        commit(pages, case.slots, case.k, case.v, spatial, None)
        k = case.k if turned else turn_plainly(case.k, case.spatial)
        wanted = commit_reference(pages, k, case.v, None, None)
        exact = stored == torch.float32 or (dtype == torch.bfloat16 and turned)
        for name, x in pages.items():
            found = x[case.slots].float()
            rtol = 0.0 if exact else BF16_ULP * (1 + BF16_ULP)
            torch.testing.assert_close(found, wanted[name].to(stored).float(), rtol=rtol, atol=0)
            assert bool(x[case.others].isnan().all()), name

    @pytest.mark.parametrize("shape", FRAMES, ids=str)
    def test_turns_as_the_reference_does(self, shape: tuple[int, ...]) -> None:
        """To the last bit or so: see `turn_plainly`."""
        case = Case(shape, seed=15)
        pages = case.plain(torch.float32)
        commit(pages, case.slots, case.k, case.v, case.spatial, None)
        wanted = commit_reference(pages, case.k, case.v, case.spatial, None)
        torch.testing.assert_close(pages["k"][case.slots], wanted["k"], rtol=0, atol=2e-6)

    def test_strides_do_not_matter(self) -> None:
        """Keys and values come permuted, sliced out of one projection, or as every second frame."""
        case = Case((2, 2, 2, 9, 3, 32))
        wanted = case.coded()
        assert not case.k.is_contiguous()
        commit(wanted, case.slots, case.k, case.v, case.spatial, case.mean)
        nan = torch.full_like(case.k, math.nan)
        views = {
            "contiguous": [x.contiguous() for x in (case.k, case.v)],
            "different": [case.k, case.v.contiguous()],
            "sliced channels": [torch.cat([nan, x], -1)[..., 32:] for x in (case.k, case.v)],
            "sliced frames": [torch.stack([x, nan], 3).flatten(2, 3)[:, :, ::2] for x in (case.k, case.v)],
            "transposed": [x.transpose(3, 4).contiguous().transpose(3, 4) for x in (case.k, case.v)],
        }
        for name, (k, v) in views.items():
            found = case.coded()
            commit(found, case.slots, k, v, case.spatial, case.mean)
            assert all(torch.equal(bits(found[part]), bits(wanted[part])) for part in wanted), name

    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    @pytest.mark.parametrize("exponent", [-30, -8, 0, 6])
    def test_bound_of_the_quantizer(self, exponent: int, dtype: torch.dtype) -> None:
        """|x - x̂| <= scale / 2 for every element of what lies in the pages, x in float64."""
        case = Case((2, 3, 2, 9, 2, 64), dtype, seed=20)
        k, v = (x * 2.0**exponent for x in (case.k, case.v))
        mean, pages = case.mean * 2.0**exponent, case.coded()
        commit(pages, case.slots, k, v, case.spatial, mean)
        phases = spatial_phases(64, 2, 9, dtype=torch.float64)
        turned = rotate_last(k.double(), phases) - mean.double()[:, :, None, None]
        for name, x in (("k", turned), ("v", v.double())):
            codes, scale = (
                pages[part][case.slots].movedim(0, 2).double() for part in (name, f"{name}_scale")
            )
            # turning and the division that chose the code are float32's
            slack = 1e-6 * x.abs().amax(-1, keepdim=True)
            assert bool(((x - codes * scale).abs() <= scale / 2 + slack).all()), name
            assert int(codes.abs().max()) <= LEVELS

    def test_zeros(self) -> None:
        """An empty frame keeps its zeros, and its scales can be divided by."""
        case, pages = Case((1, 2, 2, 5, 2, 32)), Case((1, 2, 2, 5, 2, 32)).coded()
        zero = torch.zeros_like(case.k)
        commit(pages, case.slots, zero, zero, case.spatial, torch.zeros_like(case.mean))
        smallest = float(torch.finfo(torch.float16).smallest_normal)
        for name in ("k", "v"):
            assert not pages[name][case.slots].any()
            assert bool((pages[f"{name}_scale"][case.slots] == smallest).all())

    @pytest.mark.parametrize("huge", [9e6, 1e20, 3e38])
    def test_beyond_what_scales_hold(self, huge: float) -> None:
        """Such a token saturates; it does not become infinite, and its neighbours do not change."""
        case = Case((1, 2, 2, 5, 2, 32))
        usual, pages = case.coded(), case.coded()
        commit(usual, case.slots, case.k, case.v, None, case.mean)
        k, v = case.k.clone(), case.v.clone()
        for x in (k, v):
            x[0, 1, 1, 3, 7], x[0, 1, 1, 3, 8] = huge, -huge
        commit(pages, case.slots, k, v, None, case.mean)
        wanted = commit_reference(pages, k, v, None, case.mean)
        slot = int(case.slots[1])
        for name in ("k", "v"):
            assert pages[name][slot, 0, 1, 3, 7:9].tolist() == [127, -127]
            assert float(pages[f"{name}_scale"][slot, 0, 1, 3]) == torch.finfo(torch.float16).max
            for part in (name, f"{name}_scale"):
                assert torch.equal(pages[part][case.slots], wanted[part])
                changed = (bits(pages[part]) != bits(usual[part])).flatten(4).any(-1)
                assert changed.nonzero().tolist() == [[slot, 0, 1, 3]]

    def test_scales_round_up(self) -> None:
        """To the nearest fp16 half of all scales would be too small, and their largest code clipped."""
        case = Case((1, 4, 4, 16, 2, 64), seed=30)
        pages = case.coded()
        commit(pages, case.slots, case.k, case.v, None, case.mean)
        exact = case.v.abs().amax(-1).movedim(2, 0) / LEVELS
        scale = pages["v_scale"][case.slots][..., 0].float()
        assert bool((scale >= exact).all()) and bool((scale <= exact * (1 + 2**-10)).all())
        assert 0.3 < float((scale > exact.half().float()).float().mean()) < 0.7

    def test_opcheck(self) -> None:
        case = Case((1, 2, 2, 3, 2, 32))
        turns = torch.view_as_real(case.spatial)
        # NaN differs from itself where opcheck looks for undeclared changes
        coded = {name: torch.zeros_like(x) for name, x in case.coded().items()}
        plain = {name: torch.zeros_like(x) for name, x in case.plain(torch.float32).items()}
        torch.library.opcheck(_commit, (case.k, case.v, turns, case.mean, case.slots, *coded.values()))
        torch.library.opcheck(_commit, (case.k, case.v, None, None, case.slots, *plain.values(), None, None))


class TestFallback:
    """What no kernel takes goes through torch, with the kernels at hand too."""

    @pytest.fixture(autouse=True)
    def no_kernel(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(pages_module, "_commit", None)

    @pytest.mark.parametrize(("d", "per_channel"), [(24, False), (32, True)])
    def test_commit(self, d: int, per_channel: bool) -> None:
        """A head of 24 channels is no power of two; a scale per channel covers more tokens than a tile."""
        case = Case((2, 2, 2, 9, 3, d))
        pages, wanted = case.coded(per_channel), case.filled(per_channel)
        commit(pages, case.slots, case.k, case.v, case.spatial, case.mean)
        assert all(torch.equal(bits(pages[name]), bits(wanted[name])) for name in wanted)

    def test_decode(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(pages_module, "_decode", None)
        case = Case((1, 2, 2, 3, 2, 24))
        arguments = (case.filled(), case.slots, None, case.mean, torch.float32)
        for found, wanted in zip(decode(*arguments), decode_reference(*arguments), strict=True):
            assert torch.equal(found, wanted)


@pytest.mark.usefixtures("kernel_only")
class TestDecode:
    OFFSETS = (-1, -7, -1_000, -20_000)

    def phases(self, case: Case, dtype: torch.dtype = torch.float32) -> Tensor:
        frames, d = case.shape[1], case.shape[-1]
        return temporal_phases(d, torch.tensor(self.OFFSETS[:frames]), dtype)

    @pytest.mark.parametrize("turned", [False, True], ids=["left", "turned"])
    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    @pytest.mark.parametrize("per_channel", [False, True], ids=["v per token", "v per channel"])
    @pytest.mark.parametrize("shape", FRAMES, ids=str)
    def test_codes(self, shape: tuple[int, ...], per_channel: bool, dtype: torch.dtype, turned: bool) -> None:
        case = Case(shape, seed=40)
        pages = case.filled(per_channel)
        k, v = decode(pages, case.slots, self.phases(case) if turned else None, case.mean, dtype)
        exact = self.phases(case, torch.float64) if turned else None
        wanted_k, wanted_v = decode_reference(pages, case.slots, exact, case.mean.double(), torch.float64)
        assert k.shape == v.shape == case.k.shape and k.dtype == v.dtype == dtype
        bound = {torch.float32: 2e-7, torch.float16: 5e-4, torch.bfloat16: 6e-3}[dtype]
        assert relative_l2(k, wanted_k) <= bound
        if dtype == torch.bfloat16:
            assert relative_l2(v, wanted_v) <= bound
        else:
            # a code times its scale has 18 bits: exact in float32, rounded once to fp16
            assert torch.equal(v, wanted_v.to(dtype))

    @pytest.mark.parametrize("turned", [False, True], ids=["left", "turned"])
    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    @pytest.mark.parametrize("shape", FRAMES, ids=str)
    def test_plain_pages(self, shape: tuple[int, ...], dtype: torch.dtype, turned: bool) -> None:
        case = Case(shape, seed=50)
        pages = case.plain(dtype)
        for name, x in (("k", case.k), ("v", case.v)):
            pages[name][case.slots] = x.movedim(2, 0).to(dtype)
        k, v = decode(pages, case.slots, self.phases(case) if turned else None, None, dtype)
        exact = self.phases(case, torch.float64) if turned else None
        wanted_k, wanted_v = decode_reference(pages, case.slots, exact, None, torch.float64)
        bound = {torch.float32: 2e-7, torch.float16: 5e-4, torch.bfloat16: 6e-3}[dtype]
        assert relative_l2(k, wanted_k) <= (bound if turned else 0)
        assert torch.equal(v.double(), wanted_v)

    def test_any_table(self) -> None:
        """Slots in any order, one of them twice, and none at all."""
        case = Case((2, 3, 2, 9, 2, 32))
        pages = case.filled()
        table = case.slots[[2, 0, 0, 1]]
        phases = temporal_phases(32, torch.tensor([-9, -3, -2, -1]))
        found = decode(pages, table, phases, case.mean, torch.float32)
        wanted = decode_reference(pages, table, phases, case.mean, torch.float32)
        for x, y in zip(found, wanted, strict=True):
            torch.testing.assert_close(x, y, rtol=0, atol=2e-6)
        assert not torch.equal(found[0][:, :, 1], found[0][:, :, 2]), "the same page at two distances"
        assert torch.equal(found[1][:, :, 1], found[1][:, :, 2])

    def test_undoes_commit(self) -> None:
        """Through both kernels: keys come back turned by all three axes, to the precision of a code."""
        case, phases = Case((1, 3, 2, 9, 2, 64), seed=60), None
        pages = case.coded()
        commit(pages, case.slots, case.k, case.v, case.spatial, case.mean)
        k, v = decode(pages, case.slots, phases, case.mean, torch.float32)
        assert 1e-3 < relative_l2(k, rotate_last(case.k, case.spatial)) < 1e-2
        assert 1e-3 < relative_l2(v, case.v) < 1e-2

    def test_the_mean_counts(self) -> None:
        """Keys without it are other keys: what the tests above compare would notice."""
        case = Case((1, 3, 2, 9, 2, 64))
        pages = case.filled()
        k, _ = decode(pages, case.slots, None, case.mean, torch.float32)
        without, _ = decode(pages, case.slots, None, torch.zeros_like(case.mean), torch.float32)
        torch.testing.assert_close(k - without, case.mean[:, :, None, None].expand_as(k), rtol=0, atol=1e-5)

    def test_opcheck(self) -> None:
        case = Case((1, 2, 2, 3, 2, 32))
        turns = torch.view_as_real(self.phases(case))
        pages, dtype = case.filled(), torch.float32
        torch.library.opcheck(_decode, (*pages.values(), case.mean, case.slots, turns, dtype))
        plain = {name: torch.zeros_like(x) for name, x in case.plain(dtype).items()}
        torch.library.opcheck(_decode, (*plain.values(), None, None, None, case.slots, None, torch.float16))


def test_the_reference_s_layout_is_the_quantizer_s() -> None:
    """Anchor: codes of a frame are those of its values, token by token."""
    case = Case((1, 1, 1, 3, 1, 32))
    pages = case.filled()
    codes, scale = quantize(case.v[0, 0, 0])
    assert torch.equal(pages["v"][case.slots][0, 0, 0], codes)
    assert torch.equal(pages["v_scale"][case.slots][0, 0, 0], scale)
