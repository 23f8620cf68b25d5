"""Flow-matching schedules, as the causal Wan checkpoints use them."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import cache
from typing import TYPE_CHECKING, Literal, get_args

import numpy as np
import torch
from torch import Tensor

from vidkv.errors import InputError

if TYPE_CHECKING:
    from diffusers.schedulers.scheduling_unipc_multistep import UniPCMultistepScheduler

TRAIN_TIMESTEPS = 1000
Sampler = Literal["renoise", "euler", "unipc"]
UNIPC_START = 0.999


@dataclass(frozen=True)
class FlowSchedule:
    """The noise levels that a chunk passes through.

    With x_sigma = (1 - sigma) x_0 + sigma noise and the model predicting v = noise - x_0, each step
    estimates x_0 = x - sigma v and goes to the next level (Self-Forcing, `CausalInferencePipeline`).

    Attributes:
        steps: step marks from 1000 downwards, in thousandths of the *unshifted* schedule when `warp`.
        shift: timestep shift; sigma = shift s / (1 + (shift - 1) s).
        warp: read the marks through the shifted table (1000, 750, 500, 250 at shift 5 become timesteps
            1000, 937.5, 833.3, 625); otherwise the marks are the timesteps.
        first_chunk_steps: marks of chunk 0, which has no history to lean on; None: the same.
        sampler: `renoise` mixes the estimate with fresh noise at the next level (stock few-step code);
            `euler` follows the probability-flow ODE and draws no further noise; `unipc` does so with a
            multistep solver of second order (arXiv 2302.04867), as Wan's own sampler and LongLive 2.0 do.
        guidance: classifier-free guidance scale of every chunk: v = v_negative + scale (v_prompt -
            v_negative) (arXiv 2207.12598). 1 is off. Otherwise the negative text has a cache of its own.
        first_chunk_guidance: the same of chunk 0 alone, which has nothing but the prompt to go by.
        guided_down_to: noise level below which steps are unguided (limited interval, arXiv 2404.07724).
    """

    steps: tuple[int, ...] = (1000, 750, 500, 250)
    shift: float = 5.0
    warp: bool = True
    first_chunk_steps: tuple[int, ...] | None = None
    sampler: Sampler = "renoise"
    guidance: float = 1.0
    first_chunk_guidance: float = 1.0
    guided_down_to: float = 0.0

    def __post_init__(self) -> None:
        for marks in (self.steps, self.first_chunk_steps or self.steps):
            ordered = list(marks) == sorted(set(marks), reverse=True)
            if not marks or not ordered or marks[0] > TRAIN_TIMESTEPS or marks[-1] < 1:
                raise InputError(
                    f"denoising steps {marks} must fall from at most {TRAIN_TIMESTEPS} to at least 1"
                )
        if not 0 < self.shift < math.inf:
            raise InputError(f"timestep shift {self.shift} must be positive and finite")
        for scale in (self.guidance, self.first_chunk_guidance):
            if not 1 <= scale < math.inf:
                raise InputError(f"guidance scale {scale} must be finite and at least 1 (off)")
        if not 0 <= self.guided_down_to <= 1:
            raise InputError(f"guided_down_to={self.guided_down_to} must lie between 0 and 1")
        if self.sampler not in get_args(Sampler):
            raise InputError(
                f"sampler {self.sampler!r} is unknown; samplers are {', '.join(get_args(Sampler))}"
            )

    def with_steps(self, number: int) -> FlowSchedule:
        """The same schedule with `number` evenly spaced marks for every chunk."""
        if not 1 <= number <= TRAIN_TIMESTEPS:
            raise InputError(f"num_inference_steps={number} must lie between 1 and {TRAIN_TIMESTEPS}")
        marks = tuple(round(TRAIN_TIMESTEPS * (1 - i / number)) for i in range(number))
        return replace(self, steps=marks, first_chunk_steps=None)

    def guidance_at(self, chunk: int, sigma: float) -> float:
        """Guidance scale of one step."""
        if sigma < self.guided_down_to:
            return 1.0
        return max(self.guidance, self.first_chunk_guidance) if chunk == 0 else self.guidance

    def sigmas(self, chunk: int) -> tuple[float, ...]:
        """Noise levels of a chunk, from its first step to its last."""
        marks = self._marks(chunk)
        if self.sampler == "unipc":
            # Wan's solver begins at the last but one level of its training table
            return tuple(shifted(UNIPC_START * mark / TRAIN_TIMESTEPS, self.shift) for mark in marks)
        table = _table(self.shift)
        if self.warp:
            return tuple(table[TRAIN_TIMESTEPS - mark] for mark in marks)
        return tuple(min(table, key=lambda s: abs(s - mark / TRAIN_TIMESTEPS)) for mark in marks)

    def timesteps(self, chunk: int) -> tuple[float, ...]:
        """What the model is told of each level: a thousand times it.

        As in stock code, marks that are not warped are passed on as they are, and `unipc` rounds down.
        """
        if self.sampler == "unipc":
            return tuple(float(int(TRAIN_TIMESTEPS * sigma)) for sigma in self.sigmas(chunk))
        if self.warp:
            return tuple(TRAIN_TIMESTEPS * sigma for sigma in self.sigmas(chunk))
        return tuple(float(mark) for mark in self._marks(chunk))

    def solver(self, chunk: int) -> Solver:
        """What walks one chunk through its levels."""
        return Solver(self, chunk)

    def _marks(self, chunk: int) -> tuple[int, ...]:
        return self.first_chunk_steps if chunk == 0 and self.first_chunk_steps else self.steps

    def advance(
        self, x: Tensor, flow: Tensor, sigma: float, next_sigma: float, noise: Tensor | None
    ) -> Tensor:
        """One step from `sigma` to `next_sigma`; at 0 this is the estimate of the clean latents.

        Args:
            x, flow: (b, f, c, h, w).
            noise: fresh noise of that shape for `renoise`; None otherwise and on the last step.
        """
        clean = (x.double() - sigma * flow.double()).to(x.dtype)
        if next_sigma == 0:
            return clean
        if self.sampler == "euler":
            return x + (next_sigma - sigma) * flow
        assert noise is not None
        return ((1 - next_sigma) * clean.float() + next_sigma * noise.float()).to(x.dtype)


class Solver:
    """One chunk's way from noise to clean latents.

        solver = schedule.solver(chunk)
        for step in range(len(solver.sigmas)):
            x = solver.advance(step, x, model(x, solver.timesteps[step]), fresh)

    Attributes:
        sigmas, timesteps: of the steps.
    """

    def __init__(self, schedule: FlowSchedule, chunk: int) -> None:
        self.schedule = schedule
        self.sigmas, self.timesteps = schedule.sigmas(chunk), schedule.timesteps(chunk)
        self._unipc = _unipc(self.sigmas) if schedule.sampler == "unipc" else None

    def draws(self, step: int) -> bool:
        """Does this step take fresh noise?"""
        return self.schedule.sampler == "renoise" and step + 1 < len(self.sigmas)

    def advance(self, step: int, x: Tensor, flow: Tensor, noise: Tensor | None) -> Tensor:
        """From one level to the next; steps are taken in order.

        Args:
            x, flow: (b, f, c, h, w).
            noise: of that shape where the step `draws`.
        """
        if self._unipc is not None:
            stepped: Tensor = self._unipc.step(flow, self._unipc.timesteps[step], x, return_dict=False)[0]
            return stepped
        following = (*self.sigmas[1:], 0.0)[step]
        return self.schedule.advance(x, flow, self.sigmas[step], following, noise)


def _unipc(sigmas: tuple[float, ...]) -> UniPCMultistepScheduler:
    """diffusers' solver with the settings of Wan's `FlowUniPCMultistepScheduler`."""
    from diffusers.schedulers.scheduling_unipc_multistep import UniPCMultistepScheduler

    solver = UniPCMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, solver_order=2, solver_type="bh2"
    )
    # they are shifted already: the scheduler's own flow_shift is 1
    solver.set_timesteps(sigmas=np.array(sigmas))
    solver.set_begin_index(0)
    return solver


@cache
def _table(shift: float) -> list[float]:
    """Noise levels of the thousand training timesteps, from 1 down; at float32 as stock code has them."""
    s = torch.linspace(1, 0, TRAIN_TIMESTEPS + 1)[:-1]
    return [float(level) for level in shift * s / (1 + (shift - 1) * s)]


def shifted(s: float, shift: float) -> float:
    """Timestep shift of flow matching (Stable Diffusion 3, arXiv 2403.03206, eq. 23)."""
    return shift * s / (1 + (shift - 1) * s)
