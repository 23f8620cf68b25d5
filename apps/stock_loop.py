"""The loop that others run: a dense window of keys and values, moved by copying, and torch's attention.

Written from how Self-Forcing's inference works, as the counterpart in `vidkv bench rollout --random-weights`:
same transformer, schedule and noise as a `Rollout`, so that nothing differs but the cache and the attention.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from vidkv.apps.bench import median_s
from vidkv.cache import CacheGeometry, CacheSpec
from vidkv.models.wan import Attend, CausalWanTransformer3DModel, TextContext
from vidkv.noise import CounterNoise
from vidkv.schedule import FlowSchedule

SDPA_CHOICES: dict[str, dict[str, SDPBackend | None]] = {
    "cuda": {
        "torch's choice": None,
        "cudnn": SDPBackend.CUDNN_ATTENTION,
        "flash": SDPBackend.FLASH_ATTENTION,
    },
    "cpu": {"torch's choice": None},
}


class StockAttention:
    """Self-attention over a dense window per layer, as Self-Forcing's code keeps it.

    Keys lie turned at absolute positions beside their values, in the order of time. The first pass of a
    chunk that finds no room moves what stays (all after the sinks) to the left, through a copy; every pass,
    noisy ones too, writes its keys and values over those of the pass before. Attention is torch's over the
    filled part. Kinder than stock code in one thing: it turns in float32 by phases made once a chunk, not in
    float64 by phases made at every call.

    Args:
        sink: frames that are never moved out.
    """

    def __init__(
        self, geometry: CacheGeometry, window: int, sink: int, device: torch.device, dtype: torch.dtype
    ) -> None:
        g = geometry
        self.tokens, self.grid, self.head_dim = g.tokens, (g.height, g.width), g.head_dim
        self.capacity, self.sinks = window * g.tokens, sink * g.tokens
        shape = (g.batch, self.capacity, g.kv_heads, g.head_dim)
        self.keys = [torch.zeros(shape, device=device, dtype=dtype) for _ in range(g.layers)]
        self.values = [torch.zeros(shape, device=device, dtype=dtype) for _ in range(g.layers)]
        self.device = device
        self.phases_dtype = torch.promote_types(dtype, torch.float32).to_complex()
        self.backend: SDPBackend | None = None
        self.reset()

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in (*self.keys, *self.values))

    def reset(self) -> None:
        """Forget everything; the next chunk stands at position 0."""
        self.seen = [0] * len(self.keys)
        self.filled = [0] * len(self.keys)

    def begin(self, start: int, frames: int) -> None:
        """The passes that follow are of `frames` latent frames from `start` on."""
        self.end = (start + frames) * self.tokens
        phases = stock_phases(self.head_dim, range(start, start + frames), *self.grid)
        self.phases = phases.to(self.device, self.phases_dtype)[:, None]

    def layer(self, index: int) -> Attend:
        return partial(self._attend, index)

    def _attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k = (self._turn(x.flatten(1, 2)) for x in (q, k))
        self.write(layer, k, v.flatten(1, 2))
        keys, values = (x[layer][:, : self.filled[layer]].transpose(1, 2) for x in (self.keys, self.values))
        out = stock_sdpa(q.transpose(1, 2), keys, values, self.backend)
        return rearrange(out, "b n (f s) d -> b f s n d", s=self.tokens)

    def write(self, layer: int, k: Tensor, v: Tensor) -> None:
        """Put a pass's keys and values (b, tokens, kv heads, d) at the end of the window, making room."""
        new = k.shape[1]
        seen, filled = self.seen[layer], self.filled[layer]
        length = filled + self.end - seen
        if length > self.capacity:
            leaving = length - self.capacity
            kept = filled - leaving - self.sinks
            for dense in (self.keys[layer], self.values[layer]):
                moved = dense[:, self.sinks + leaving : self.sinks + leaving + kept].clone()
                dense[:, self.sinks : self.sinks + kept] = moved
            length = self.capacity
        self.keys[layer][:, length - new : length] = k
        self.values[layer][:, length - new : length] = v
        self.seen[layer], self.filled[layer] = self.end, length

    def _turn(self, x: Tensor) -> Tensor:
        """Rotary embedding of (b, tokens, n, d) by frame, row and column."""
        wide = x.to(self.phases_dtype.to_real())
        pairs = torch.view_as_complex(wide.reshape(*x.shape[:-1], -1, 2))
        return torch.view_as_real(pairs * self.phases).flatten(-2).to(x.dtype)


def stock_phases(head_dim: int, frames: range, height: int, width: int) -> Tensor:
    """Wan's rotary phases of a chunk's tokens, (frames * height * width, head_dim / 2) complex128."""
    row_pairs = head_dim // 6
    pairs = (head_dim // 2 - 2 * row_pairs, row_pairs, row_pairs)
    axes = (torch.arange(frames.start, frames.stop), torch.arange(height), torch.arange(width))
    places = torch.cartesian_prod(*axes).double()
    angles = [
        places[:, axis, None] / 10_000 ** (torch.arange(n, dtype=torch.float64) / n)
        for axis, n in enumerate(pairs)
    ]
    joined = torch.cat(angles, 1)
    return torch.complex(joined.cos(), joined.sin())


def stock_sdpa(q: Tensor, k: Tensor, v: Tensor, backend: SDPBackend | None) -> Tensor:
    """torch's attention of (b, n, queries, d) to (b, kv heads, keys, d).

    Args:
        backend: None leaves the choice to torch.
    """
    chosen: AbstractContextManager[None] = nullcontext() if backend is None else sdpa_kernel(backend)
    with chosen:
        return F.scaled_dot_product_attention(q, k, v, enable_gqa=q.shape[1] != k.shape[1])


class StockLoop:
    """Self-Forcing's loop over chunks with stock attention, on vidkv's transformer, schedule and noise.

    With the same seed and absolute positions its latents are those of a `Rollout` with unquantized pages, up
    to rounding. Arguments are those of `Rollout`.

    Args:
        negative: what guidance leads away from, with windows of its own.
    """

    def __init__(
        self,
        transformer: CausalWanTransformer3DModel,
        text: TextContext,
        spec: CacheSpec,
        schedule: FlowSchedule,
        latent_size: tuple[int, int, int],
        seeds: Sequence[int],
        chunk_frames: int = 3,
        first_chunk_frames: int | None = None,
        recompute_context: bool = False,
        negative: TextContext | None = None,
    ) -> None:
        self.transformer, self.schedule = transformer, schedule
        self.device, self.dtype = transformer.device, transformer.dtype
        self.geometry = CacheGeometry.of_model(transformer.config, *latent_size[1:], chunk_frames, len(seeds))
        self.chunk_frames, self.first_chunk_frames = chunk_frames, first_chunk_frames or chunk_frames
        self.texts = [text] if negative is None else [text, negative]
        self.attentions = [
            StockAttention(self.geometry, spec.window, spec.sink, self.device, self.dtype) for _ in self.texts
        ]
        self.noise = CounterNoise(seeds, latent_size, self.device, self.dtype)
        self.context_frames = spec.window - chunk_frames if recompute_context else None
        self.context: Tensor | None = None
        self.chunk = self.next_frame = 0
        self.backend_name = "torch's choice"

    @property
    def kv_bytes(self) -> int:
        return sum(attention.nbytes for attention in self.attentions)

    @torch.no_grad()
    def denoise(self) -> Tensor:
        """The next chunk's clean latents (b, f, c, h, w), not committed."""
        frames = self.chunk_frames if self.chunk else self.first_chunk_frames
        if self.context_frames is not None:
            self._rebuild()
        for attention in self.attentions:
            attention.begin(self._position(), frames)
        solver = self.schedule.solver(self.chunk)
        x = self.noise.initial(self.chunk, self.next_frame, frames)
        for step, (sigma, timestep) in enumerate(zip(solver.sigmas, solver.timesteps, strict=True)):
            flows = self._flows(x, timestep)
            scale = self.schedule.guidance_at(self.chunk, sigma)
            flow = flows[0] if len(flows) == 1 else torch.lerp(flows[1], flows[0], scale)
            fresh = self.noise.fresh(self.chunk, step + 1, frames) if solver.draws(step) else None
            x = solver.advance(step, x, flow, fresh)
        return x

    @torch.no_grad()
    def append(self, latents: Tensor) -> None:
        """The clean pass over a chunk's latents (b, f, c, h, w)."""
        frames = latents.shape[1]
        if self.context_frames is None:
            for attention in self.attentions:
                attention.begin(self.next_frame, frames)
            self._flows(latents, 0.0)
        else:
            known = latents if self.context is None else torch.cat([self.context, latents], 1)
            self.context = known[:, max(0, known.shape[1] - self.context_frames) :]
        self.next_frame += frames
        self.chunk += 1

    def choose_backend(self) -> None:
        """Take the attention of torch that is fastest over a full window here."""
        g, heads = self.geometry, self.transformer.config.num_attention_heads
        attention = self.attentions[0]
        q = torch.randn(
            g.batch, g.chunk_frames * g.tokens, heads, g.head_dim, device=self.device, dtype=self.dtype
        )
        q, k, v = (x.transpose(1, 2) for x in (q, attention.keys[0], attention.values[0]))
        times: dict[str, float] = {}
        for name, backend in SDPA_CHOICES[self.device.type].items():
            try:
                times[name] = median_s(partial(stock_sdpa, q, k, v, backend), self.device)
            except torch.OutOfMemoryError:
                raise
            except RuntimeError:
                # this backend does not take these tensors
                continue
        self.backend_name = min(times, key=lambda name: times[name])
        for attention in self.attentions:
            attention.backend = SDPA_CHOICES[self.device.type][self.backend_name]

    def _flows(self, x: Tensor, timestep: float) -> list[Tensor]:
        """Of every text."""
        t = torch.full(x.shape[:2], timestep, device=self.device)
        return [
            self.transformer(x, t, text, attention)
            for text, attention in zip(self.texts, self.attentions, strict=True)
        ]

    def _position(self) -> int:
        if self.context_frames is None:
            return self.next_frame
        return 0 if self.context is None else self.context.shape[1]

    def _rebuild(self) -> None:
        """Windows anew, from one clean pass over the last frames."""
        for attention in self.attentions:
            attention.reset()
        if self.context is not None:
            for attention in self.attentions:
                attention.begin(0, self.context.shape[1])
            self._flows(self.context, 0.0)
