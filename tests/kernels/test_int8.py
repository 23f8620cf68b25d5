"""The INT8 quantizer: the bound holds for every element, whatever is in a group."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.tiny import noise
from vidkv.kernels.int8 import LEVELS, dequantize, quantize, scale_of

SMALLEST = float(torch.finfo(torch.float16).smallest_normal)
LARGEST = LEVELS * float(torch.finfo(torch.float16).max)

finite = st.floats(-LARGEST, LARGEST, width=32, allow_nan=False, allow_infinity=False)
tiny = st.floats(-(2**-13), 2**-13, width=32)
ordinary = st.floats(-20.0, 20.0, width=32)
groups = st.lists(st.one_of(finite, tiny, ordinary, st.just(0.0)), min_size=1, max_size=24)


def assert_bound(x: Tensor, dim: int = -1) -> None:
    """|x - x̂| <= scale / 2, in exact arithmetic up to the float32 division that chose the code."""
    codes, scale = quantize(x, dim)
    assert codes.dtype == torch.int8 and scale.dtype == torch.float16
    assert codes.shape == x.shape
    assert int(codes.abs().max()) <= LEVELS
    exact = codes.double() * scale.double()
    slack = 1e-6 * x.double().abs()
    assert bool(((x.double() - exact).abs() <= scale.double() / 2 + slack).all())
    torch.testing.assert_close(dequantize(codes, scale).double(), exact, rtol=1e-6, atol=0)


class TestBound:
    @given(groups)
    @settings(max_examples=150)
    def test_every_element(self, values: list[float]) -> None:
        assert_bound(torch.tensor([values], dtype=torch.float32))

    @given(groups)
    @settings(max_examples=60)
    def test_a_scale_never_rounds_down(self, values: list[float]) -> None:
        x = torch.tensor(values, dtype=torch.float32)
        scale = float(scale_of(x, -1))
        largest = float(x.abs().max())
        assert scale * LEVELS >= largest * (1 - 2**-23)
        assert scale <= max(SMALLEST, largest / LEVELS * (1 + 2**-9))

    @pytest.mark.parametrize("exponent", range(-40, 24))
    def test_every_magnitude(self, exponent: int) -> None:
        """From far below fp16's smallest scale to the largest that it can hold."""
        x = noise(64, 32, seed=exponent + 99).clamp(-3.8, 3.8) * 2.0**exponent
        assert_bound(x.clamp(-LARGEST, LARGEST))

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
    def test_half_precision_inputs(self, dtype: torch.dtype) -> None:
        assert_bound(noise(50, 24).to(dtype))

    @pytest.mark.parametrize("dim", [0, 1, -1])
    def test_groups_along_any_axis(self, dim: int) -> None:
        x = noise(5, 6, 7) * torch.logspace(-3, 2, 7)
        assert_bound(x, dim)
        assert quantize(x, dim)[1].shape[dim] == 1

    def test_scales_that_fp16_rounds_down_are_raised(self) -> None:
        """Without it the largest element of a group would be clipped."""
        largest = torch.linspace(1.0, 2.0, 4097)
        x = torch.stack([largest, -largest], 1)
        raised = scale_of(x, -1).float()[:, 0]
        nearest = (largest / LEVELS).half().float()
        assert bool((raised >= largest / LEVELS).all())
        assert 0.4 < float((nearest < largest / LEVELS).float().mean()) < 0.6
        assert torch.equal(raised == nearest, nearest >= largest / LEVELS)


class TestExtremes:
    def test_zeros_are_exact(self) -> None:
        codes, scale = quantize(torch.zeros(2, 3, 8))
        assert not codes.any() and bool((scale > 0).all())
        assert not dequantize(codes, scale).any()

    def test_one_outlier_does_not_touch_other_groups(self) -> None:
        x = noise(4, 16)
        alone = quantize(x)
        x[2, 3] = 1e6
        codes, scale = quantize(x)
        others = torch.tensor([0, 1, 3])
        assert torch.equal(codes[others], alone[0][others])
        assert torch.equal(scale[others], alone[1][others])

    @pytest.mark.parametrize("huge", [LARGEST, 9e6, 1e20, torch.finfo(torch.float32).max])
    def test_beyond_what_fp16_scales_hold(self, huge: float) -> None:
        """Such a group saturates; it does not turn into NaN."""
        x = torch.tensor([[huge, -huge, 1.0, 0.0]])
        found = dequantize(*quantize(x))
        torch.testing.assert_close(found, torch.tensor([[LARGEST, -LARGEST, 0.0, 0.0]]))

    def test_nan_is_not_hidden(self) -> None:
        x = noise(2, 8)
        x[0, 3] = math.nan
        found = dequantize(*quantize(x))
        assert bool(found[0].isnan().all())
        assert bool(found[1].isfinite().all())

    def test_symmetry(self) -> None:
        x = noise(20, 24)
        codes, scale = quantize(x)
        negated, same = quantize(-x)
        assert torch.equal(negated, -codes) and torch.equal(same, scale)

    def test_decoding_in_half_precision_rounds_once(self) -> None:
        codes, scale = quantize(noise(9, 24))
        assert torch.equal(
            dequantize(codes, scale, torch.bfloat16), dequantize(codes, scale).to(torch.bfloat16)
        )

    def test_error_of_normal_data(self) -> None:
        """An error this size is what a comparison of formats may count on: 0.3 % of the energy."""
        x = noise(4000, 64)
        assert 0.004 < float((dequantize(*quantize(x)) - x).norm() / x.norm()) < 0.008
