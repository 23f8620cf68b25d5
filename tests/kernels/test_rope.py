"""Rotary embedding: equal to diffusers' Wan, separable, lazy in time, without a last frame."""

from __future__ import annotations

import inspect
import math
import textwrap
from collections.abc import Callable

import pytest
import torch
from diffusers.models.transformers.transformer_wan import WanAttnProcessor, WanRotaryPosEmbed
from torch import Tensor

from tests.tiny import noise, relative_l2
from vidkv.kernels.rope import (
    axis_channels,
    rotate,
    rotate_full,
    rotate_spatial,
    rotate_temporal,
    spatial_phases,
    temporal_phases,
)

HEAD_DIMS = (24, 64, 128)
GRIDS = ((1, 1, 1), (3, 2, 5), (4, 7, 3), (2, 1, 6))


def stock_apply() -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """`apply_rotary_emb`, which diffusers defines inside the attention processor's call."""
    lines = inspect.getsource(WanAttnProcessor.__call__).splitlines()
    first = next(i for i, line in enumerate(lines) if "def apply_rotary_emb(" in line)
    depth = len(lines[first]) - len(lines[first].lstrip())
    last = next(i for i, line in enumerate(lines) if i > first and line.strip().startswith("return out"))
    assert all(len(line) - len(line.lstrip()) >= depth for line in lines[first : last + 1] if line.strip())
    namespace: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {}
    exec(textwrap.dedent("\n".join(lines[first : last + 1])), {"torch": torch}, namespace)
    return namespace["apply_rotary_emb"]


def by_hand(x: Tensor, position: int, channels: int) -> Tensor:
    """Rotation of interleaved pairs, one at a time. x: (…, channels) float64."""
    out = x.clone()
    for pair in range(channels // 2):
        angle = position * 10_000.0 ** (-2 * pair / channels)
        a, b = x[..., 2 * pair], x[..., 2 * pair + 1]
        out[..., 2 * pair] = a * math.cos(angle) - b * math.sin(angle)
        out[..., 2 * pair + 1] = a * math.sin(angle) + b * math.cos(angle)
    return out


class TestAgainstDiffusers:
    @pytest.mark.parametrize("head_dim", HEAD_DIMS)
    @pytest.mark.parametrize("grid", GRIDS, ids=str)
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
    def test_whole_clip(self, head_dim: int, grid: tuple[int, int, int], dtype: torch.dtype) -> None:
        frames, height, width = grid
        stock = WanRotaryPosEmbed(head_dim, (1, 2, 2), 1024)
        cos, sin = stock(torch.zeros(1, 1, frames, 2 * height, 2 * width))
        x = noise(2, frames, height * width, 3, head_dim, dtype=dtype)
        wanted = stock_apply()(x.flatten(1, 2), cos, sin).unflatten(1, (frames, -1))
        found = rotate_full(
            x,
            temporal_phases(head_dim, torch.arange(frames), dtype),
            spatial_phases(head_dim, height, width, dtype=dtype),
        )
        # diffusers rounds its tables to float32, whatever the input
        torch.testing.assert_close(found, wanted, rtol=0, atol=1e-6)
        assert found.dtype == dtype

    @pytest.mark.parametrize("head_dim", HEAD_DIMS)
    def test_channels_of_the_axes(self, head_dim: int) -> None:
        stock = WanRotaryPosEmbed(head_dim, (1, 2, 2), 1024)
        assert axis_channels(head_dim) == (stock.t_dim, stock.h_dim, stock.w_dim)

    def test_pairs_of_stock_wan(self) -> None:
        assert axis_channels(128) == (44, 42, 42)
        assert axis_channels(64) == (24, 20, 20)


class TestByHand:
    @pytest.mark.parametrize("position", [0, 1, 17, 1023, 1024, 20_011, -3, -10_000])
    def test_time(self, position: int) -> None:
        """Also beyond 1,024, where stock code's table ends, and before zero."""
        x = noise(1, 1, 2, 3, 64, dtype=torch.float64)
        time = axis_channels(64)[0]
        wanted = torch.cat([by_hand(x[..., :time], position, time), x[..., time:]], -1)
        phases = temporal_phases(64, torch.tensor([position]), torch.float64)
        torch.testing.assert_close(rotate_temporal(x, phases), wanted, rtol=0, atol=1e-11)

    def test_rows_and_columns(self) -> None:
        height, width, head_dim = 3, 4, 24
        time, rows, columns = axis_channels(head_dim)
        x = noise(1, 2, height * width, 1, head_dim, dtype=torch.float64)
        wanted = x.clone()
        for token in range(height * width):
            row, column = divmod(token, width)
            here = x[:, :, token]
            wanted[:, :, token, :, time : time + rows] = by_hand(here[..., time : time + rows], row, rows)
            wanted[:, :, token, :, time + rows :] = by_hand(here[..., time + rows :], column, columns)
        found = rotate_spatial(x, spatial_phases(head_dim, height, width, dtype=torch.float64))
        torch.testing.assert_close(found, wanted, rtol=0, atol=1e-12)

    def test_float32_phases_are_those_of_float64_rounded(self) -> None:
        """At position 20,000 an angle taken in float32 would be off by a thousandth of a turn."""
        positions = torch.tensor([20_000, 99_991])
        exact = temporal_phases(128, positions, torch.float64)
        torch.testing.assert_close(temporal_phases(128, positions).to(exact.dtype), exact, rtol=0, atol=6e-8)


class TestLazyTime:
    @pytest.mark.parametrize("head_dim", HEAD_DIMS)
    def test_space_then_time_is_both_at_once(self, head_dim: int) -> None:
        x = noise(1, 3, 6, 2, head_dim, dtype=torch.float64)
        temporal = temporal_phases(head_dim, torch.tensor([5, 6, 90]), torch.float64)
        spatial = spatial_phases(head_dim, 2, 3, dtype=torch.float64)
        both = rotate_full(x, temporal, spatial)
        torch.testing.assert_close(
            rotate_temporal(rotate_spatial(x, spatial), temporal), both, rtol=0, atol=1e-14
        )
        torch.testing.assert_close(
            rotate_spatial(rotate_temporal(x, temporal), spatial), both, rtol=0, atol=1e-14
        )

    @pytest.mark.parametrize("key_position", [0, 3, 1_023, 1_500, 10_007])
    @pytest.mark.parametrize("query_position", [4, 1_100, 10_010, 123_456])
    def test_only_the_distance_counts(self, query_position: int, key_position: int) -> None:
        """Absolute rotation of both, of the query by the distance, of the key against it: one score."""
        q, k = (noise(1, 1, 5, 2, 128, seed=s, dtype=torch.float64) for s in (1, 2))

        def turned(x: Tensor, position: int) -> Tensor:
            return rotate_temporal(x, temporal_phases(128, torch.tensor([position]), torch.float64))

        def scores(q: Tensor, k: Tensor) -> Tensor:
            return torch.einsum("bfsnd,bftnd->bnst", q, k) / math.sqrt(128)

        distance = query_position - key_position
        absolute = scores(turned(q, query_position), turned(k, key_position))
        by_query, by_key = scores(turned(q, distance), k), scores(q, turned(k, -distance))
        torch.testing.assert_close(by_query, by_key, rtol=0, atol=1e-12)
        # the angles themselves carry position * 2**-53
        torch.testing.assert_close(by_query, absolute, rtol=0, atol=1e-9)
        torch.testing.assert_close(by_query, scores(turned(q, distance + 7), turned(k, 7)), rtol=0, atol=1e-9)

    def test_a_turn_keeps_lengths(self) -> None:
        x = noise(1, 2, 3, 1, 24, dtype=torch.float64)
        turned = rotate(x, temporal_phases(72, torch.tensor([12_345]), torch.float64)[0, :12])
        torch.testing.assert_close(turned.norm(dim=-1), x.norm(dim=-1), rtol=1e-14, atol=0)
        assert relative_l2(turned, x) > 0.1


class TestPrecision:
    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
    def test_half_precision_is_rounded_once(self, dtype: torch.dtype) -> None:
        x = noise(1, 2, 4, 2, 64).to(dtype)
        phases = temporal_phases(64, torch.tensor([3, 700])), spatial_phases(64, 2, 2)
        assert torch.equal(rotate_full(x, *phases), rotate_full(x.float(), *phases).to(dtype))

    def test_views_with_strides_are_read_right(self) -> None:
        x = noise(3, 4, 2, 1, 24).permute(1, 0, 2, 3, 4)
        phases = temporal_phases(24, torch.arange(3)), spatial_phases(24, 1, 2)
        assert torch.equal(rotate_full(x, *phases), rotate_full(x.contiguous(), *phases))
