"""Codes of two, four and eight bits: bounds of the quantizer, packing, and the matrix that turns channels."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from tests.tiny import noise
from vidkv.kernels.packed import BITS, decode_reference, dequantize, hadamard, pack, quantize, unpack
from vidkv.kernels.rope import rotate_first, temporal_phases

CPU = torch.device("cpu")
MAGNITUDES = st.floats(1e-3, 500)


def keys(seed: int, magnitude: float = 1.0, d: int = 32) -> Tensor:
    """(pages, tokens, d) with one channel far larger than the others, as in trained models."""
    x = magnitude * noise(2, 7, d, seed=seed)
    x[..., 3] *= 20
    return x


@pytest.mark.parametrize("bits", BITS)
class TestQuantizer:
    @pytest.mark.parametrize("group", [32, 16, 8])
    @given(seed=st.integers(0, 10_000), magnitude=MAGNITUDES)
    def test_nothing_is_off_by_more_than_half_a_step(
        self, bits: int, group: int, seed: int, magnitude: float
    ) -> None:
        x = keys(seed, magnitude)
        codes, scale = quantize(x, bits, group, per_channel=False, least_error=False)
        assert scale.shape == (2, 7, 32 // group) and int(codes.max()) < 2**bits
        off = (dequantize(pack(codes, bits), scale, bits, False, torch.float64) - x.double()).abs()
        assert bool((off <= scale.double().repeat_interleave(group, -1) * (0.5 + 1e-4)).all())

    @given(seed=st.integers(0, 10_000))
    def test_of_a_channel_likewise(self, bits: int, seed: int) -> None:
        x = keys(seed)
        codes, scale = quantize(x, bits, 32, per_channel=True, least_error=False)
        assert scale.shape == (2, 1, 32)
        off = (dequantize(pack(codes, bits), scale, bits, False, torch.float64) - x.double()).abs()
        assert bool((off <= scale.double() * (0.5 + 1e-4)).all())

    @pytest.mark.parametrize("per_channel", [False, True])
    @given(seed=st.integers(0, 10_000))
    def test_least_error_is_no_more_than_without_clipping(
        self, bits: int, per_channel: bool, seed: int
    ) -> None:
        x = keys(seed)
        errors = []
        for least_error in (True, False):
            codes, scale = quantize(x, bits, 16, per_channel, least_error)
            off = dequantize(pack(codes, bits), scale, bits, False, torch.float32) - x
            axes = (-2,) if per_channel else (-1,)
            squares = off.square() if per_channel else off.square().unflatten(-1, (-1, 16))
            errors.append(squares.sum(axes))
        assert bool((errors[0] <= errors[1] * (1 + 1e-5) + 1e-12).all())

    def test_clipping_helps_with_few_bits(self, bits: int) -> None:
        """Of normal numbers: the best four levels do not reach the largest."""
        x, means = noise(64, 16, 64, seed=1), []
        for least_error in (True, False):
            codes, scale = quantize(x, bits, 64, False, least_error)
            means.append(
                float((dequantize(pack(codes, bits), scale, bits, False, torch.float32) - x).square().mean())
            )
        gain = means[1] / means[0]
        assert gain > {2: 2.0, 4: 1.1, 8: 0.999}[bits]

    def test_nan_does_not_become_a_number(self, bits: int) -> None:
        x = keys(1)
        x[0, 0, 0] = math.nan
        for least_error in (True, False):
            codes, scale = quantize(x, bits, 32, False, least_error)
            back = dequantize(pack(codes, bits), scale, bits, False, torch.float32)
            assert bool(back[0, 0].isnan().all()) and bool(back[0, 1:].isfinite().all())

    def test_beyond_what_a_scale_can_say_it_saturates(self, bits: int) -> None:
        x = torch.full((1, 1, 32), 1e9)
        codes, scale = quantize(x, bits, 32, False, True)
        back = dequantize(pack(codes, bits), scale, bits, False, torch.float32)
        assert torch.equal(back, torch.full_like(x, 65504.0 * (2**bits - 1) / 2))

    def test_packing_is_undone(self, bits: int) -> None:
        codes = torch.randint(0, 2**bits, (3, 5, 32), generator=torch.Generator().manual_seed(bits))
        packed = pack(codes.to(torch.uint8), bits)
        assert packed.shape == (3, 5, 32 * bits // 8) and torch.equal(unpack(packed, bits), codes)

    def test_a_byte_holds_channels_of_each_part(self, bits: int) -> None:
        """The layout that pages on disk rely on."""
        codes = torch.zeros(32, dtype=torch.uint8)
        codes[5] = 2**bits - 1
        packed = pack(codes, bits)
        size = 32 * bits // 8
        wanted = torch.zeros(size, dtype=torch.uint8)
        wanted[5 % size] = (2**bits - 1) << (5 // size * bits)
        assert torch.equal(packed, wanted)


class TestHadamard:
    @pytest.mark.parametrize("d", [1, 2, 16, 64, 256])
    def test_is_its_own_inverse(self, d: int) -> None:
        matrix = hadamard(d, CPU, torch.float64)
        torch.testing.assert_close(matrix @ matrix, torch.eye(d, dtype=torch.float64))
        assert torch.equal(matrix, matrix.T)

    def test_what_one_channel_holds_is_spread(self) -> None:
        x = torch.zeros(1, 64)
        x[0, 9] = 8.0
        assert torch.equal((x @ hadamard(64, CPU)).abs(), torch.ones(1, 64))

    @pytest.mark.parametrize("bits", BITS)
    def test_an_outlier_costs_less(self, bits: int) -> None:
        x, errors = keys(3, d=64), []
        for turned in (False, True):
            into = x @ hadamard(64, CPU) if turned else x
            codes, scale = quantize(into, bits, 64, False, True)
            back = dequantize(pack(codes, bits), scale, bits, turned, torch.float32)
            errors.append(float((back - x).square().mean()))
        assert errors[1] < 0.7 * errors[0]


class TestDecode:
    @pytest.mark.parametrize("turned", [False, True])
    @pytest.mark.parametrize("places", [1, 6])
    def test_spelled_out(self, turned: bool, places: int) -> None:
        """Two pages in their slots, turned in time, with the mean added: element by element."""
        x = noise(4, 1, 2, 6, 64, seed=5)
        codes, scale = quantize(x, 4, 32, False, True)
        mean = noise(1, 2, places, 64, seed=6)
        slots, phases = torch.tensor([2, 0]), temporal_phases(64, torch.tensor([-4, -1]))
        got = decode_reference(pack(codes, 4), scale, slots, 4, turned, mean, phases, torch.float64)
        assert got.shape == (1, 2, 2, 6, 64)
        for page, slot in enumerate(slots.tolist()):
            steps = codes[slot].double() - 7.5
            values = steps * scale[slot].double().repeat_interleave(32, -1)
            if turned:
                values = values @ hadamard(64, CPU, torch.float64)
            wanted = rotate_first(values + mean.double(), phases[page].to(torch.complex128))
            torch.testing.assert_close(got[:, :, page], wanted)
