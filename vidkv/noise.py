"""Noise that depends on where it is used, not on what was drawn before."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor


def chunk_noise(
    seeds: Sequence[int],
    chunk: int,
    step: int,
    shape: tuple[int, ...],
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Standard normal noise of one denoising step of one chunk.

    Each (seed, chunk, step) has a counter range of its own in Philox (Salmon et al. 2011), drawn on the
    CPU in float32 and then cast. So a rollout sees the same noise whether it runs in one go, is streamed,
    interleaved with others, restored or batched.

    Args:
        seeds: one per batch element, each 0 <= seed < 2**64.
        shape: (frames, channels, height, width) of one element.

    Returns:
        (len(seeds), *shape).
    """
    draws = [
        np.random.Generator(np.random.Philox(key=seed, counter=[0, 0, step, chunk])).standard_normal(
            shape, dtype=np.float32
        )
        for seed in seeds
    ]
    return torch.from_numpy(np.stack(draws)).to(device=device, dtype=dtype)
