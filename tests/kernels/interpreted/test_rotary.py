"""The two small kernels of a read: a chunk's rotary embedding, and the merge of two partial results."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from tests.tiny import noise, relative_l2
from vidkv.kernels import rotary
from vidkv.kernels.attention import attend_reference, merge_kernel, merge_reference
from vidkv.kernels.jit import interpreted
from vidkv.kernels.rope import spatial_phases, temporal_phases
from vidkv.kernels.rotary import _rotate, rotate_chunk, rotate_chunk_reference

CHUNKS = [
    # batch, frames, rows, columns, heads, head_dim
    (1, 1, 1, 1, 1, 16),
    (1, 3, 2, 5, 2, 64),
    (2, 2, 1, 17, 3, 128),
    (2, 4, 3, 11, 1, 32),
    (1, 2, 4, 4, 2, 256),
]
# the interpreter cuts what it stores as bfloat16 instead of rounding it: one unit in the last place
ULP = {torch.float32: 0.0, torch.float16: 0.0, torch.bfloat16: 2.0**-7}

Turn = Callable[[Tensor, Tensor], Tensor]

pytestmark = pytest.mark.usefixtures("poisoned_empty")


def chunk(shape: tuple[int, ...], dtype: torch.dtype, start: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    b, frames, rows, columns, heads, d = shape
    x = 2 * noise(b, frames, rows * columns, heads, d, seed=sum(shape))
    return (
        x.to(dtype),
        temporal_phases(d, torch.arange(start, start + frames)),
        spatial_phases(d, rows, columns),
    )


def test_these_tests_are_interpreted() -> None:
    assert interpreted()


class TestRotateChunk:
    @pytest.fixture(autouse=True)
    def kernel_only(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(rotary, "rotate_chunk_reference", None)

    @pytest.mark.parametrize("dtype", ULP, ids=str)
    @pytest.mark.parametrize("shape", CHUNKS, ids=str)
    def test_against_plain_products(
        self, shape: tuple[int, ...], dtype: torch.dtype, turn_plainly: Turn
    ) -> None:
        x, temporal, spatial = chunk(shape, dtype)
        frames, tokens = len(temporal), len(spatial)
        phases = [temporal[:, None].expand(-1, tokens, -1), spatial[None].expand(frames, -1, -1)]
        wanted = turn_plainly(x, torch.cat(phases, -1)[:, :, None]).flatten(1, 2).transpose(1, 2)
        found = rotate_chunk(x, temporal, spatial)
        b, frames, rows, columns, heads, d = shape
        assert found.shape == (b, heads, frames * rows * columns, d) and found.dtype == dtype
        assert found.is_contiguous()
        torch.testing.assert_close(found, wanted, rtol=ULP[dtype], atol=0)

    @pytest.mark.parametrize("shape", CHUNKS, ids=str)
    def test_against_the_reference(self, shape: tuple[int, ...]) -> None:
        """To the last bit or so: see `turn_plainly`."""
        arguments = chunk(shape, torch.float32)
        found, wanted = rotate_chunk(*arguments), rotate_chunk_reference(*arguments)
        torch.testing.assert_close(found, wanted, rtol=0, atol=2e-6)

    @pytest.mark.parametrize("start", [-7, 1_500, 1_000_000])
    def test_any_position(self, start: int) -> None:
        x, temporal, spatial = chunk((1, 3, 2, 5, 2, 64), torch.float32, start)
        found = rotate_chunk(x, temporal, spatial)
        wanted = rotate_chunk_reference(x, temporal, spatial)
        torch.testing.assert_close(found, wanted, rtol=0, atol=2e-6)
        assert relative_l2(found, rotate_chunk(x, *chunk((1, 3, 2, 5, 2, 64), x.dtype)[1:])) > 0.1

    def test_views_with_strides_are_read_right(self) -> None:
        """Queries, keys and values come out of one projection or out of a permutation."""
        x, temporal, spatial = chunk((2, 3, 2, 5, 2, 32), torch.float32)
        wanted = rotate_chunk(x, temporal, spatial)
        permuted = x.permute(4, 1, 3, 0, 2).contiguous().permute(3, 1, 4, 2, 0)
        sliced = torch.cat([torch.full_like(x, math.nan), x], -1)[..., 32:]
        for view in (permuted, sliced):
            assert not view.is_contiguous()
            assert torch.equal(rotate_chunk(view, temporal, spatial), wanted)

    def test_other_head_sizes_go_to_the_reference(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """A kernel's tile is a power of two."""
        x, temporal, spatial = chunk((1, 2, 2, 3, 2, 24), torch.float32)
        monkeypatch.setattr(rotary, "rotate_chunk_reference", rotate_chunk_reference)
        monkeypatch.setattr(rotary, "_rotate", None)
        wanted = rotate_chunk_reference(x, temporal, spatial)
        assert torch.equal(rotate_chunk(x, temporal, spatial), wanted)

    def test_opcheck(self) -> None:
        x, temporal, spatial = chunk((1, 2, 2, 3, 2, 32), torch.float32)
        torch.library.opcheck(_rotate, (x, torch.view_as_real(temporal), torch.view_as_real(spatial)))


def parts(shape: tuple[int, ...], seed: int = 0) -> list[tuple[Tensor, Tensor]]:
    """Attention over two disjoint sets of keys, and over both, in float64."""
    b, heads, queries, d = shape
    q, k, v = (noise(b, heads, n, d, seed=seed + n, dtype=torch.float64) for n in (queries, 51, 52))
    v = v[:, :, :51]
    return [
        attend_reference(3 * q, k[:, :, cut], v[:, :, cut]) for cut in (slice(20), slice(20, 51), slice(51))
    ]


class TestMerge:
    @pytest.mark.parametrize(
        "shape", [(1, 1, 1, 8), (2, 3, 7, 24), (1, 2, 16, 64), (1, 2, 33, 128), (1, 1, 5, 1)], ids=str
    )
    def test_gives_the_whole(self, shape: tuple[int, ...]) -> None:
        (out, lse), (more, more_lse), (whole, whole_lse) = parts(shape)
        found, total = merge_kernel(out.float(), lse.float(), more.float(), more_lse.float())
        assert found.dtype == total.dtype == torch.float32
        torch.testing.assert_close(found.double(), whole, rtol=0, atol=3e-6)
        torch.testing.assert_close(total.double(), whole_lse, rtol=0, atol=3e-6)

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
    def test_against_the_reference(self, dtype: torch.dtype) -> None:
        """The running output is float32; a part may come in any precision."""
        (out, lse), (more, more_lse), _ = parts((2, 3, 19, 32), seed=5)
        arguments = out.float(), lse.float(), more.to(dtype), more_lse.float()
        for found, wanted in zip(merge_kernel(*arguments), merge_reference(*arguments), strict=True):
            torch.testing.assert_close(found, wanted, rtol=2e-6, atol=1e-6)

    def test_views_with_strides_are_read_right(self) -> None:
        (out, lse), (more, more_lse), _ = parts((2, 3, 19, 32))
        arguments = out.float(), lse.float(), more.float(), more_lse.float()
        views = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in arguments]
        assert not any(view.is_contiguous() for view in views)
        for found, wanted in zip(merge_kernel(*views), merge_kernel(*arguments), strict=True):
            assert torch.equal(found, wanted)

    @pytest.mark.parametrize("mass", [-1e4, -math.inf])
    def test_a_part_without_mass_changes_nothing(self, mass: float) -> None:
        (out, lse), _, _ = parts((1, 2, 9, 16))
        out, lse = out.float(), lse.float()
        found, total = merge_kernel(out, lse, torch.full_like(out, 7.0), torch.full_like(lse, mass))
        assert torch.equal(found, out) and torch.equal(total, lse)
        found, total = merge_kernel(torch.full_like(out, 7.0), torch.full_like(lse, mass), out, lse)
        torch.testing.assert_close(found, out, rtol=1e-6, atol=1e-6)
        assert torch.equal(total, lse)

    @pytest.mark.parametrize("level", [-1e3, 1e3])
    def test_large_sums_do_not_overflow(self, level: float) -> None:
        """exp of a log-sum-exp beyond 88 is no float32."""
        out, more = torch.zeros(1, 1, 2, 4), torch.ones(1, 1, 2, 4)
        lse = torch.full((1, 1, 2), level)
        found, total = merge_kernel(out, lse, more, lse)
        # a float32 near 1000 is known to 3e-5
        torch.testing.assert_close(found, torch.full_like(out, 0.5), rtol=0, atol=5e-5)
        torch.testing.assert_close(total, lse + math.log(2), rtol=0, atol=7e-5)

    def test_opcheck(self) -> None:
        (out, lse), (more, more_lse), _ = parts((1, 2, 5, 16))
        torch.library.opcheck(merge_kernel, (out.float(), lse.float(), more.half(), more_lse.float()))
