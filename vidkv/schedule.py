"""Few-step flow-matching schedules, as the distilled causal Wan checkpoints use them."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Literal

from torch import Tensor

from vidkv.errors import InputError

TRAIN_TIMESTEPS = 1000


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
            `euler` follows the probability-flow ODE and draws no further noise.
        first_chunk_guidance: classifier-free guidance scale of chunk 0, which alone has nothing but the
            prompt to go by: v = v_negative + scale (v_prompt - v_negative) (arXiv 2207.12598). 1 is off.
        guided_down_to: noise level below which steps are unguided (limited interval, arXiv 2404.07724).
    """

    steps: tuple[int, ...] = (1000, 750, 500, 250)
    shift: float = 5.0
    warp: bool = True
    first_chunk_steps: tuple[int, ...] | None = None
    sampler: Literal["renoise", "euler"] = "renoise"
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
        if not 1 <= self.first_chunk_guidance < math.inf:
            raise InputError(
                f"guidance scale {self.first_chunk_guidance} must be finite and at least 1 (off)"
            )
        if not 0 <= self.guided_down_to <= 1:
            raise InputError(f"guided_down_to={self.guided_down_to} must lie between 0 and 1")
        if self.sampler not in ("renoise", "euler"):
            raise InputError(f"sampler {self.sampler!r} is unknown; samplers are renoise, euler")

    def with_steps(self, number: int) -> FlowSchedule:
        """The same schedule with `number` evenly spaced marks for every chunk."""
        if not 1 <= number <= TRAIN_TIMESTEPS:
            raise InputError(f"num_inference_steps={number} must lie between 1 and {TRAIN_TIMESTEPS}")
        marks = tuple(round(TRAIN_TIMESTEPS * (1 - i / number)) for i in range(number))
        return replace(self, steps=marks, first_chunk_steps=None)

    def guidance(self, chunk: int, sigma: float) -> float:
        """Guidance scale of one step."""
        guided = chunk == 0 and sigma >= self.guided_down_to
        return self.first_chunk_guidance if guided else 1.0

    def sigmas(self, chunk: int) -> tuple[float, ...]:
        """Noise levels of a chunk, from its first step to its last; the timestep is 1000 sigma."""
        marks = self.first_chunk_steps if chunk == 0 and self.first_chunk_steps else self.steps
        if self.warp:
            return tuple(shifted(mark / TRAIN_TIMESTEPS, self.shift) for mark in marks)
        table = [shifted(1 - i / TRAIN_TIMESTEPS, self.shift) for i in range(TRAIN_TIMESTEPS)]
        return tuple(min(table, key=lambda s: abs(s - mark / TRAIN_TIMESTEPS)) for mark in marks)

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
        return (1 - next_sigma) * clean + next_sigma * noise


def shifted(s: float, shift: float) -> float:
    """Timestep shift of flow matching (Stable Diffusion 3, arXiv 2403.03206, eq. 23)."""
    return shift * s / (1 + (shift - 1) * s)
