"""Noise levels: the numbers of the stock few-step code."""

from __future__ import annotations

import math
from itertools import pairwise

import numpy as np
import pytest
import torch

from tests.tiny import build_pipeline, noise
from vidkv.errors import InputError
from vidkv.schedule import FlowSchedule, Sampler, shifted


def stock_table(shift: float) -> np.ndarray:
    """Self-Forcing's 1,000 sigmas, from 1 downwards, at float64; it has them at float32."""
    s = np.linspace(1, 0, 1001)[:-1]
    return shift * s / (1 + (shift - 1) * s)


class TestLevels:
    def test_warped_steps_of_self_forcing(self) -> None:
        """The marks read through the shifted table."""
        timesteps = [1000 * sigma for sigma in FlowSchedule().sigmas(0)]
        assert timesteps == pytest.approx([1000, 937.5, 833.3333, 625], abs=1e-4)
        assert torch.tensor(timesteps).tolist() == torch.tensor([1000, 937.5, 2500 / 3, 625]).tolist()

    @pytest.mark.parametrize("shift", [1.0, 3.0, 5.0, 8.0])
    @pytest.mark.parametrize("marks", [(1000, 750, 500, 250), (1000, 757, 522), (999, 1), (1000,)], ids=str)
    def test_warped_steps_are_entries_of_the_stock_table(self, marks: tuple[int, ...], shift: float) -> None:
        table = np.append(stock_table(shift), 0.0)
        wanted = [table[1000 - mark] for mark in marks]
        assert FlowSchedule(marks, shift).sigmas(3) == pytest.approx(wanted, abs=1e-6)

    @pytest.mark.parametrize("shift", [1.0, 3.0, 5.0, 8.0])
    @pytest.mark.parametrize("marks", [(1000, 750, 500, 250), (937, 400, 3), (1,)], ids=str)
    def test_unwarped_steps_take_the_nearest_level(self, marks: tuple[int, ...], shift: float) -> None:
        table = stock_table(shift)
        wanted = [table[np.abs(1000 * table - mark).argmin()] for mark in marks]
        found = FlowSchedule(marks, shift, warp=False).sigmas(0)
        assert found == pytest.approx(wanted, abs=1e-6)
        assert found != FlowSchedule(marks, shift).sigmas(0) or shift == 1.0 or marks in ((1000,), (1,))

    def test_shift_keeps_the_ends(self) -> None:
        assert shifted(0, 5) == 0 and shifted(1, 5) == 1
        assert shifted(0.5, 5) == pytest.approx(5 / 6)
        assert shifted(0.3, 1) == pytest.approx(0.3)

    def test_the_first_chunk_may_have_its_own(self) -> None:
        schedule = FlowSchedule((1000, 500), first_chunk_steps=(1000, 900, 500))
        assert len(schedule.sigmas(0)) == 3
        assert schedule.sigmas(1) == schedule.sigmas(7) == FlowSchedule((1000, 500)).sigmas(0)

    @pytest.mark.parametrize("number", [1, 2, 3, 4, 7, 50, 999, 1000])
    @pytest.mark.parametrize("warp", [True, False])
    def test_other_numbers_of_steps(self, number: int, warp: bool) -> None:
        base = FlowSchedule(shift=3.0, warp=warp, first_chunk_steps=(1000,), sampler="euler")
        schedule = base.with_steps(number)
        for chunk in (0, 1):
            sigmas = schedule.sigmas(chunk)
            assert len(sigmas) == number
            assert sigmas[0] == 1 and sigmas[-1] > 0
            falls = [a - b for a, b in pairwise(sigmas)]
            # near zero the table is coarser than unwarped marks: neighbours may share an entry
            assert all(fall > 0 or (fall == 0 and not warp and number > 900) for fall in falls)
        assert (schedule.shift, schedule.warp, schedule.sampler) == (3.0, warp, "euler")

    def test_four_steps_are_the_default(self) -> None:
        assert FlowSchedule().with_steps(4) == FlowSchedule()


class TestSteps:
    def test_last_step_is_the_estimate_of_clean_latents(self) -> None:
        """With the true flow, any level gives the clean latents back."""
        clean, fresh = noise(1, 3, 4, 2, 2, seed=1), noise(1, 3, 4, 2, 2, seed=2)
        for sigma in (1.0, 0.8333, 0.25):
            x = (1 - sigma) * clean + sigma * fresh
            found = FlowSchedule().advance(x, fresh - clean, sigma, 0.0, None)
            torch.testing.assert_close(found, clean, rtol=1e-5, atol=1e-5)

    def test_renoise_mixes_the_estimate_with_fresh_noise(self) -> None:
        x, flow, fresh = (noise(1, 3, 4, 2, 2, seed=s) for s in (1, 2, 3))
        found = FlowSchedule().advance(x, flow, 0.9, 0.6, fresh)
        torch.testing.assert_close(found, 0.4 * (x - 0.9 * flow) + 0.6 * fresh)

    def test_euler_follows_the_flow(self) -> None:
        x, flow = noise(1, 3, 4, 2, 2, seed=1), noise(1, 3, 4, 2, 2, seed=2)
        schedule = FlowSchedule(sampler="euler")
        torch.testing.assert_close(schedule.advance(x, flow, 0.9, 0.6, None), x - 0.3 * flow)

    def test_euler_is_exact_for_a_straight_flow(self) -> None:
        """Noise to data in any number of steps, when the flow is the true one."""
        clean, fresh = noise(1, 1, 2, 2, 2, seed=1), noise(1, 1, 2, 2, 2, seed=2)
        schedule = FlowSchedule(sampler="euler")
        x, sigmas = fresh, [*schedule.sigmas(0), 0.0]
        for sigma, following in pairwise(sigmas):
            x = schedule.advance(x, fresh - clean, sigma, following, None)
        torch.testing.assert_close(x, clean, rtol=1e-5, atol=1e-5)

    def test_bfloat16_subtracts_at_float64(self) -> None:
        """As stock code: rounding happens once, on the estimate."""
        x, flow = noise(64, seed=1).bfloat16(), noise(64, seed=2).bfloat16()
        found = FlowSchedule().advance(x, flow, 0.9375, 0.0, None)
        assert torch.equal(found, (x.double() - 0.9375 * flow.double()).bfloat16())


class TestErrors:
    @pytest.mark.parametrize("marks", [(), (500, 750), (750, 750), (1001,), (500, 0), (500, -1)], ids=str)
    def test_marks_must_fall(self, marks: tuple[int, ...]) -> None:
        with pytest.raises(InputError, match="denoising steps"):
            FlowSchedule(marks)
        if marks:
            with pytest.raises(InputError, match="denoising steps"):
                FlowSchedule(first_chunk_steps=marks)

    @pytest.mark.parametrize("shift", [0.0, -1.0, math.nan, math.inf])
    def test_shift_must_be_a_positive_number(self, shift: float) -> None:
        with pytest.raises(InputError, match="timestep shift"):
            FlowSchedule(shift=shift)

    def test_samplers_are_listed(self) -> None:
        with pytest.raises(InputError, match=r"'heun'.*renoise.*euler"):
            FlowSchedule(sampler="heun")  # type: ignore[arg-type]

    @pytest.mark.parametrize("number", [0, -1, 1001])
    def test_number_of_steps(self, number: int) -> None:
        with pytest.raises(InputError, match=f"num_inference_steps={number}"):
            FlowSchedule().with_steps(number)


def test_a_pipeline_passes_its_settings_on() -> None:
    pipe = build_pipeline(
        steps=(900, 300), shift=3.0, warp=False, first_chunk_steps=(1000, 10), sampler="euler"
    )
    assert pipe.schedule == FlowSchedule((900, 300), 3.0, False, (1000, 10), "euler")


class TestTimesteps:
    @pytest.mark.parametrize("shift", [1.0, 5.0])
    def test_warped_marks_are_a_thousand_times_their_level(self, shift: float) -> None:
        schedule = FlowSchedule((1000, 757, 522), shift)
        assert schedule.timesteps(0) == tuple(1000 * sigma for sigma in schedule.sigmas(0))

    def test_unwarped_marks_are_told_as_they_are(self) -> None:
        """Though the level is the nearest of the table: stock code looks it up from the mark."""
        schedule = FlowSchedule((1000, 937, 833, 625), 5.0, warp=False)
        assert schedule.timesteps(2) == (1000.0, 937.0, 833.0, 625.0)
        assert [1000 * sigma for sigma in schedule.sigmas(2)] != [1000.0, 937.0, 833.0, 625.0]

    @pytest.mark.parametrize("number", [3, 4, 20, 50])
    @pytest.mark.parametrize("shift", [3.0, 5.0, 8.0])
    def test_unipc_takes_those_of_wan(self, number: int, shift: float) -> None:
        """np.linspace from the last but one training level to 0, the end left out, shifted, cut to whole."""
        levels = np.linspace(0.999, 0, number + 1)[:-1]
        levels = shift * levels / (1 + (shift - 1) * levels)
        schedule = FlowSchedule(shift=shift, sampler="unipc").with_steps(number)
        # the marks are whole thousandths
        assert schedule.sigmas(1) == pytest.approx(levels, abs=2e-3)
        assert schedule.timesteps(1) == tuple(float(int(1000 * sigma)) for sigma in schedule.sigmas(1))
        if 1000 % number == 0:
            assert schedule.sigmas(1) == pytest.approx(levels, abs=1e-9)
            assert schedule.timesteps(1) == tuple((1000 * levels).astype(np.int64))

    @pytest.mark.parametrize("sampler", ["renoise", "euler", "unipc"])
    def test_of_the_first_chunk(self, sampler: Sampler) -> None:
        schedule = FlowSchedule((1000, 500), first_chunk_steps=(1000, 750, 500), sampler=sampler)
        assert len(schedule.timesteps(0)) == 3 and len(schedule.timesteps(1)) == 2
        for chunk in (0, 1):
            solver = schedule.solver(chunk)
            assert solver.sigmas == schedule.sigmas(chunk)
            assert solver.timesteps == schedule.timesteps(chunk)


def walk(schedule: FlowSchedule, x: torch.Tensor, deviation: float, chunk: int = 0) -> torch.Tensor:
    """Through all levels under the true flow of data that is normal with this deviation.

    x_sigma has the variance v = (1 - sigma)^2 d^2 + sigma^2 and the flow x (sigma - (1 - sigma) d^2) / v.
    """
    solver = schedule.solver(chunk)
    for step, sigma in enumerate(solver.sigmas):
        variance = (1 - sigma) ** 2 * deviation**2 + sigma**2
        flow = x * ((sigma - (1 - sigma) * deviation**2) / variance)
        x = solver.advance(step, x, flow, None)
    return x


class TestSolvers:
    @pytest.mark.parametrize("number", [1, 2, 4, 10])
    @pytest.mark.parametrize("sampler", ["euler", "unipc"])
    def test_a_straight_flow_is_followed_exactly(self, sampler: Sampler, number: int) -> None:
        clean, fresh = noise(1, 3, 4, 2, 2, seed=1), noise(1, 3, 4, 2, 2, seed=2)
        solver = FlowSchedule(sampler=sampler).with_steps(number).solver(0)
        sigma = solver.sigmas[0]
        x = (1 - sigma) * clean + sigma * fresh
        for step in range(number):
            x = solver.advance(step, x, fresh - clean, None)
        torch.testing.assert_close(x, clean, rtol=1e-4, atol=1e-4)

    def test_unipc_is_of_second_order(self) -> None:
        """Half the step, a quarter of the error, where the exact way is known; Euler's is halved."""
        deviation = 2.0
        errors: dict[str, list[float]] = {}
        for sampler in ("euler", "unipc"):
            for number in (20, 40, 80):
                schedule = FlowSchedule(shift=1.0, sampler=sampler).with_steps(number)
                sigma = schedule.sigmas(0)[0]
                x = torch.ones(1, 1, 1, 1, 1, dtype=torch.float64)
                exact = deviation / math.sqrt((1 - sigma) ** 2 * deviation**2 + sigma**2)
                found = float(walk(schedule, x, deviation))
                errors.setdefault(sampler, []).append(abs(found - exact))
        assert all(1.6 < a / b < 2.5 for a, b in pairwise(errors["euler"]))
        assert all(a / b > 3 for a, b in pairwise(errors["unipc"]))
        assert errors["unipc"][0] < 0.2 * errors["euler"][0]

    def test_chunks_do_not_see_each_other_s_steps(self) -> None:
        """A multistep solver remembers; every chunk begins with one that does not."""
        schedule, x = FlowSchedule(sampler="unipc").with_steps(4), noise(1, 3, 4, 2, 2, seed=1)
        first = walk(schedule, x, 0.5)
        half, again = schedule.solver(1), schedule.solver(1)
        half.advance(0, x, x, None)
        assert torch.equal(walk(schedule, x, 0.5, chunk=1), first)
        assert torch.equal(again.advance(0, x, -x, None), schedule.solver(1).advance(0, x, -x, None))

    @pytest.mark.parametrize(
        ("sampler", "draws"),
        [("renoise", [True, True, False]), ("euler", [False] * 3), ("unipc", [False] * 3)],
        ids=str,
    )
    def test_steps_that_draw(self, sampler: Sampler, draws: list[bool]) -> None:
        solver = FlowSchedule((1000, 700, 300), sampler=sampler).solver(1)
        assert [solver.draws(step) for step in range(3)] == draws

    def test_few_steps_are_the_schedule_s_own(self) -> None:
        schedule = FlowSchedule((1000, 500))
        solver, (x, flow, fresh) = schedule.solver(0), (noise(1, 3, 4, 2, 2, seed=s) for s in (1, 2, 3))
        high, low = schedule.sigmas(0)
        assert torch.equal(solver.advance(0, x, flow, fresh), schedule.advance(x, flow, high, low, fresh))
        assert torch.equal(solver.advance(1, x, flow, None), schedule.advance(x, flow, low, 0.0, None))


class TestGuidance:
    @pytest.mark.parametrize(
        ("scale", "first", "wanted"),
        [
            (1.0, 1.0, (1.0, 1.0)),
            (3.0, 1.0, (3.0, 3.0)),
            (1.0, 4.0, (4.0, 1.0)),
            (3.0, 5.0, (5.0, 3.0)),
            (5.0, 3.0, (5.0, 5.0)),
        ],
        ids=str,
    )
    def test_of_the_first_and_of_later_chunks(
        self, scale: float, first: float, wanted: tuple[float, float]
    ) -> None:
        schedule = FlowSchedule(guidance=scale, first_chunk_guidance=first)
        assert (schedule.guidance_at(0, 0.9), schedule.guidance_at(1, 0.9)) == wanted
        assert schedule.guidance_at(7, 0.01) == wanted[1]

    def test_ends_below_a_noise_level(self) -> None:
        schedule = FlowSchedule(guidance=3.0, guided_down_to=0.5)
        assert [schedule.guidance_at(chunk, s) for chunk in (0, 4) for s in (1.0, 0.5, 0.499)] == [
            3,
            3,
            1,
        ] * 2

    @pytest.mark.parametrize("bad", [0.5, 0.0, -1.0, math.nan, math.inf])
    def test_scales_that_cannot_be(self, bad: float) -> None:
        with pytest.raises(InputError, match="guidance scale"):
            FlowSchedule(guidance=bad)
