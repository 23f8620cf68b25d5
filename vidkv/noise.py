"""Where a rollout's noise comes from: streams that depend on their use, or the stock code's one generator."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from vidkv.cache.saved import check_tensor
from vidkv.errors import InputError, StateError

LatentSize = tuple[int, int, int]
"""Channels, rows and columns of a latent frame."""


class NoiseSource(Protocol):
    """Standard normal noise of one rollout."""

    def initial(self, chunk: int, start: int, frames: int) -> Tensor:
        """What a chunk starts from, (batch, frames, c, h, w).

        Args:
            chunk: its index.
            start: latent frames generated before it; frames of a given prefix do not count.
        """
        ...

    def fresh(self, chunk: int, step: int, frames: int) -> Tensor:
        """What is mixed in after `step` (from 1) of a chunk, likewise."""
        ...

    def copy(self) -> NoiseSource:
        """An independent source in the same state."""
        ...

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Tensors and a JSON-able description that `restore` needs."""
        ...

    def restore(self, tensors: Mapping[str, Tensor], header: Mapping[str, Any]) -> None:
        """Go on from a `state`.

        Raises:
            StateError: it is of another source or damaged; nothing has changed.
        """
        ...


class CounterNoise:
    """Noise that depends on where it is used, not on what was drawn before, see `chunk_noise`.

    Args:
        seeds: one per batch element.
        latent_size: (channels, height, width) of a latent frame.
    """

    def __init__(
        self, seeds: Sequence[int], latent_size: LatentSize, device: torch.device | str, dtype: torch.dtype
    ) -> None:
        self.seeds, self.latent_size, self.device, self.dtype = tuple(seeds), latent_size, device, dtype

    def initial(self, chunk: int, start: int, frames: int) -> Tensor:
        return self.fresh(chunk, 0, frames)

    def fresh(self, chunk: int, step: int, frames: int) -> Tensor:
        return chunk_noise(self.seeds, chunk, step, (frames, *self.latent_size), self.device, self.dtype)

    def copy(self) -> CounterNoise:
        return CounterNoise(self.seeds, self.latent_size, self.device, self.dtype)

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        return {}, {"source": "counter", "seeds": list(self.seeds)}

    def restore(self, tensors: Mapping[str, Tensor], header: Mapping[str, Any]) -> None:
        seeds = _seeds(header, "counter", len(self.seeds))
        self.seeds = seeds


class StockNoise:
    """The draws of Self-Forcing's code, in its order: one generator, seeded once.

    First the initial noise of all frames at once, then, step by step in the order in which they are taken,
    fresh noise of the shape (batch x frames, c, h, w) for every step but a chunk's last
    (`CausalInferencePipeline.inference`). They are drawn on the device and at the compute dtype, as stock
    code does, so they are the same only on the same kind of device.

    Asked again for the chunk it has drawn for last, it begins that chunk anew: one that was given up costs
    no draws.

    Args:
        seed: as for stock code; one for the whole batch.
        frames: latent frames generated in all, without a given prefix; the initial noise depends on it.
        latent_size: (channels, height, width) of a latent frame.
    """

    def __init__(
        self,
        seed: int,
        frames: int,
        batch: int,
        latent_size: LatentSize,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> None:
        self.seed, self.frames, self.batch = seed, frames, batch
        self.latent_size, self.device, self.dtype = latent_size, device, dtype
        # stock seeds are ints of numpy, below 2**32
        self.generator = torch.Generator(device).manual_seed(seed)
        self.first = self._draw((batch, frames, *latent_size))
        self.chunk = -1
        self.before_chunk = self.generator.get_state()

    def initial(self, chunk: int, start: int, frames: int) -> Tensor:
        self._enter(chunk)
        if start + frames > self.frames:
            raise InputError(
                f"stock noise was drawn for {self.frames} latent frames, and this chunk goes to "
                f"{start + frames}; give the length of the whole video beforehand"
            )
        return self.first[:, start : start + frames]

    def fresh(self, chunk: int, step: int, frames: int) -> Tensor:
        # a chunk given its initial noise begins here
        if chunk != self.chunk or step == 1:
            self._enter(chunk)
        drawn = self._draw((self.batch * frames, *self.latent_size))
        return drawn.view(self.batch, frames, *self.latent_size)

    def copy(self) -> StockNoise:
        other = StockNoise(self.seed, self.frames, self.batch, self.latent_size, self.device, self.dtype)
        other.restore(*self.state())
        return other

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        tensors = {"generator": self.generator.get_state(), "before_chunk": self.before_chunk}
        header = {"source": "stock", "seeds": [self.seed], "frames": self.frames, "chunk": self.chunk}
        return tensors, header

    def restore(self, tensors: Mapping[str, Tensor], header: Mapping[str, Any]) -> None:
        (seed,) = _seeds(header, "stock", 1)
        if (seed, header.get("frames")) != (self.seed, self.frames):
            raise StateError(
                f"the saved noise is of seed {seed} and {header.get('frames')} latent frames, this "
                f"rollout's of {self.seed} and {self.frames}"
            )
        chunk, size = header.get("chunk"), self.generator.get_state().shape
        if type(chunk) is not int:
            raise StateError(f"the saved noise's chunk is {chunk!r:.60}, not a number; the state is damaged")
        for name in ("generator", "before_chunk"):
            check_tensor(tensors, name, tuple(size), torch.uint8)
            try:
                torch.Generator(self.device).set_state(tensors[name].cpu())
            except RuntimeError as error:
                raise StateError(f"the saved noise's {name} is damaged: {error}") from None
        self.generator.set_state(tensors["generator"].cpu())
        self.chunk, self.before_chunk = chunk, tensors["before_chunk"].cpu()

    def _enter(self, chunk: int) -> None:
        if chunk == self.chunk:
            self.generator.set_state(self.before_chunk)
        self.chunk, self.before_chunk = chunk, self.generator.get_state()

    def _draw(self, shape: tuple[int, ...]) -> Tensor:
        return torch.randn(shape, generator=self.generator, device=self.device, dtype=self.dtype)


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


def _seeds(header: Mapping[str, Any], source: str, number: int) -> tuple[int, ...]:
    """The seeds of a saved source."""
    if header.get("source") != source:
        raise StateError(f"the saved noise is {header.get('source')!r:.60}, this rollout's is {source!r}")
    seeds = header.get("seeds")
    if (
        not isinstance(seeds, list)
        or len(seeds) != number
        or not all(type(seed) is int and 0 <= seed < 2**64 for seed in seeds)
    ):
        raise StateError(f"the saved seeds are {seeds!s:.60}, this rollout needs {number}")
    return tuple(seeds)
