"""The loops of stock causal Wan code, spelled out: one dense tensor of keys and values a layer, no pages.

Written from the semantics of Self-Forcing's `CausalInferencePipeline` and `CausalDiffusionInferencePipeline`
and what LongLive, Krea Realtime and LongLive 2 changed in them. Everything is computed here, in plain torch:
the transformer too, of which only the parameters are taken.

Shapes: b batch, f latent frames, c channels, s tokens per frame, n heads, d head_dim, w = n d.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

TABLE_POSITIONS = 1024
EPS = 1e-6

Draw = Callable[[Tensor], Tensor]
"""Fresh noise for an estimate (b f, c, h, w)."""


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """torch's global generator as it is after `torch.manual_seed(seed)`."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield


@dataclass
class Recorder:
    """Draws as the stock loop does, from the global generator, and keeps what it drew.

    Attributes:
        initial: noise of the whole video (b, f, c, h, w), drawn before anything else.
        fresh: per chunk, the noise (b, f, c, h, w) of its steps after the first.
    """

    initial: Tensor
    fresh: list[list[Tensor]] = field(default_factory=list)

    @classmethod
    def start(cls, *shape: int, dtype: torch.dtype = torch.float32) -> Recorder:
        return cls(torch.randn(*shape, dtype=dtype))

    def __call__(self, estimate: Tensor) -> Tensor:
        drawn = torch.randn_like(estimate)
        self.fresh[-1].append(drawn.unflatten(0, (self.initial.shape[0], -1)))
        return drawn


class DenseCache:
    """Per layer keys and values (b, capacity, n, d), and how far they are filled, in tokens.

    Attributes:
        reached: tokens of the video so far (the stock code's global end index).
        filled: tokens of the cache in use (its local end index).
    """

    def __init__(self, layers: int, batch: int, tokens: int, heads: int, d: int, dtype: torch.dtype) -> None:
        # never read before it is written
        shape = (batch, tokens, heads, d)
        self.k = [torch.full(shape, math.nan, dtype=dtype) for _ in range(layers)]
        self.v = [torch.full(shape, math.nan, dtype=dtype) for _ in range(layers)]
        self.reached = [0] * layers
        self.filled = [0] * layers


@dataclass(frozen=True)
class Attending:
    """How one pass reads and writes the cache.

    Attributes:
        start: absolute index of its first latent frame.
        rolls: whether a full cache makes room, by shifting what follows the sinks to the left.
        sink: latent frames that do not shift.
        keep_sinks: leave the sinks' slots as they are even when new keys would land there.
    """

    cache: DenseCache
    start: int
    rolls: bool
    sink: int
    keep_sinks: bool = False


class StockTransformer:
    """The causal Wan transformer on the parameters of a module that names them as diffusers does.

    At a narrower dtype every operation computes in float32 and rounds its result once, as kernels do.

    Args:
        module: source of parameters and configuration.
        dtype: of all parameters and activations.
    """

    def __init__(self, module: nn.Module, dtype: torch.dtype = torch.float32) -> None:
        self.p = {name: tensor.detach().to(dtype) for name, tensor in module.state_dict().items()}
        self.dtype = dtype
        config = module.config
        self.heads, self.d = config.num_attention_heads, config.attention_head_dim
        self.layers, self.freq_dim, self.patch = config.num_layers, config.freq_dim, config.patch_size[1:]
        spatial = 2 * (self.d // 6)
        self.turns = [_turn_table(channels) for channels in (self.d - 2 * spatial, spatial, spatial)]

    def __call__(self, x: Tensor, timestep: Tensor, text: Tensor, attending: Attending) -> Tensor:
        """Flow of latents (b, f, c, h, w) at timesteps (b, f), text (b, tokens, text_dim) unprojected."""
        b, f, c, height, width = x.shape
        ph, pw = self.patch
        rows, columns = height // ph, width // pw
        patches = x.reshape(b, f, c, rows, ph, columns, pw).permute(0, 1, 3, 5, 2, 4, 6)
        kernel = self.p["patch_embedding.weight"]
        y = patches.reshape(b, f, rows * columns, c * ph * pw).float() @ kernel.flatten(1).float().T
        y = (y + self.p["patch_embedding.bias"].float()).to(self.dtype)
        time = self._time(timestep)
        change = self._linear(silu(time), "condition_embedder.time_proj").reshape(b, f, 1, 6, -1)
        words = self._linear(
            gelu(self._linear(text.to(self.dtype), "condition_embedder.text_embedder.linear_1")),
            "condition_embedder.text_embedder.linear_2",
        )
        for layer in range(self.layers):
            y = self._block(y, change, words, layer, (rows, columns), attending)
        shift, scale = (self.p["scale_shift_table"] + time[:, :, None]).unbind(2)
        y = self._standardise(y) * (1 + scale[:, :, None]) + shift[:, :, None]
        y = self._linear(y, "proj_out").reshape(b, f, rows, columns, ph, pw, -1)
        return y.permute(0, 1, 6, 2, 4, 3, 5).reshape(b, f, -1, height, width)

    def _time(self, timestep: Tensor) -> Tensor:
        half = self.freq_dim // 2
        rate = torch.pow(10_000, -torch.arange(half, dtype=torch.float64) / half)
        angle = timestep.double()[..., None] * rate
        waves = torch.cat([angle.cos(), angle.sin()], -1).to(self.dtype)
        hidden = silu(self._linear(waves, "condition_embedder.time_embedder.linear_1"))
        return self._linear(hidden, "condition_embedder.time_embedder.linear_2")

    def _block(
        self, y: Tensor, change: Tensor, words: Tensor, layer: int, grid: tuple[int, int], how: Attending
    ) -> Tensor:
        name = f"blocks.{layer}"
        e = (self.p[f"{name}.scale_shift_table"] + change).unbind(3)
        y = y + self._self_attention(self._standardise(y) * (1 + e[1]) + e[0], layer, grid, how) * e[2]
        normed = self._standardise(y, self.p[f"{name}.norm2.weight"], self.p[f"{name}.norm2.bias"])
        y = y + self._cross_attention(normed, words, f"{name}.attn2")
        hidden = gelu(self._linear(self._standardise(y) * (1 + e[4]) + e[3], f"{name}.ffn.net.0.proj"))
        return y + self._linear(hidden, f"{name}.ffn.net.2") * e[5]

    def _self_attention(self, y: Tensor, layer: int, grid: tuple[int, int], how: Attending) -> Tensor:
        b, f, s, _ = y.shape
        q, k, v = self._queries_keys_values(y, y, f"blocks.{layer}.attn1")
        q, k = (self._turned(part, how.start, grid) for part in (q, k))
        new, cache, sink = f * s, how.cache, how.sink * s
        v, end = v.reshape(b, new, self.heads, self.d), (how.start + f) * s
        keys, values, filled = cache.k[layer], cache.v[layer], cache.filled[layer]
        ahead = end - cache.reached[layer]
        capacity = keys.shape[1]
        if how.rolls and ahead > 0 and new + filled > capacity:
            gone = new + filled - capacity
            kept = filled - gone - sink
            for tensor in (keys, values):
                tensor[:, sink : sink + kept] = tensor[:, sink + gone : sink + gone + kept].clone()
            filled -= gone
        filled += ahead
        skipped = max(0, sink - (filled - new)) if how.keep_sinks else 0
        keys[:, filled - new + skipped : filled] = k[:, skipped:]
        values[:, filled - new + skipped : filled] = v[:, skipped:]
        cache.reached[layer], cache.filled[layer] = end, filled
        out = softmax_attention(q, keys[:, :filled], values[:, :filled])
        return self._linear(out.reshape(b, f, s, -1), f"blocks.{layer}.attn1.to_out.0")

    def _cross_attention(self, y: Tensor, words: Tensor, name: str) -> Tensor:
        b, f, s, _ = y.shape
        q, k, v = self._queries_keys_values(y, words, name)
        flat = (b, -1, self.heads, self.d)
        out = softmax_attention(q.reshape(flat), k.reshape(flat), v.reshape(flat))
        return self._linear(out.reshape(b, f, s, -1), f"{name}.to_out.0")

    def _queries_keys_values(self, y: Tensor, of: Tensor, name: str) -> tuple[Tensor, Tensor, Tensor]:
        """Not yet split into heads: the norm of queries and keys spans all of them."""
        q = self._by_length(self._linear(y, f"{name}.to_q"), f"{name}.norm_q")
        k = self._by_length(self._linear(of, f"{name}.to_k"), f"{name}.norm_k")
        return q, k, self._linear(of, f"{name}.to_v")

    def _turned(self, y: Tensor, start: int, grid: tuple[int, int]) -> Tensor:
        """(b, f, s, w) to (b, f s, n, d), rotated by absolute frame, row and column in complex128."""
        b, f, s, _ = y.shape
        rows, columns = grid
        time, row, column = self.turns
        if start + f > TABLE_POSITIONS:
            raise IndexError(f"frame {start + f} is past the table")
        turn = torch.cat(
            [
                time[start : start + f, None, None].expand(f, rows, columns, -1),
                row[None, :rows, None].expand(f, rows, columns, -1),
                column[None, None, :columns].expand(f, rows, columns, -1),
            ],
            -1,
        ).reshape(1, f * s, 1, self.d // 2)
        pairs = torch.view_as_complex(y.double().reshape(b, f * s, self.heads, self.d // 2, 2).contiguous())
        return torch.view_as_real(pairs * turn).flatten(-2).to(self.dtype)

    def _linear(self, y: Tensor, name: str) -> Tensor:
        product = y.float() @ self.p[f"{name}.weight"].float().T + self.p[f"{name}.bias"].float()
        return product.to(self.dtype)

    def _by_length(self, y: Tensor, name: str) -> Tensor:
        wide = y.float()
        return (wide / (wide.square().mean(-1, keepdim=True) + EPS).sqrt()).to(self.dtype) * self.p[
            f"{name}.weight"
        ]

    def _standardise(self, y: Tensor, weight: Tensor | None = None, bias: Tensor | None = None) -> Tensor:
        wide = y.float()
        centred = wide - wide.mean(-1, keepdim=True)
        normed = centred / (centred.square().mean(-1, keepdim=True) + EPS).sqrt()
        if weight is not None and bias is not None:
            normed = normed * weight.float() + bias.float()
        return normed.to(self.dtype)


def _turn_table(channels: int) -> Tensor:
    rate = 1 / torch.pow(10_000, torch.arange(0, channels, 2, dtype=torch.float64) / channels)
    angle = torch.outer(torch.arange(TABLE_POSITIONS, dtype=torch.float64), rate)
    return torch.polar(torch.ones_like(angle), angle)


def silu(y: Tensor) -> Tensor:
    wide = y.float()
    return (wide * torch.sigmoid(wide)).to(y.dtype)


def gelu(y: Tensor) -> Tensor:
    wide = y.float()
    return (0.5 * wide * (1 + torch.tanh(math.sqrt(2 / math.pi) * (wide + 0.044715 * wide**3)))).to(y.dtype)


def softmax_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """(b, queries, n, d) and (b, keys, n, d) to (b, queries, n, d), softmax in float32."""
    scores = torch.einsum("bqnd,bknd->bnqk", q.float(), k.float()) / math.sqrt(q.shape[-1])
    return torch.einsum("bnqk,bknd->bqnd", scores.softmax(-1), v.float()).to(q.dtype)


class StepTable:
    """The thousand noise levels of a shift, in float32, and what the few-step loop does with them."""

    def __init__(self, shift: float) -> None:
        s = torch.linspace(1, 0, 1001)[:-1]
        self.sigmas = shift * s / (1 + (shift - 1) * s)
        self.timesteps = 1000 * self.sigmas

    def steps(self, marks: Sequence[int], warp: bool) -> list[Tensor]:
        """Timesteps, 0-dimensional: floats of the table if warped, the marks themselves otherwise."""
        numbers = torch.tensor(marks)
        if warp:
            return list(torch.cat([self.timesteps, torch.zeros(1)])[1000 - numbers])
        return list(numbers)

    def sigma(self, timestep: Tensor) -> Tensor:
        """The level whose timestep is nearest."""
        return self.sigmas[(self.timesteps.double() - timestep.double()).abs().argmin()]

    def estimate(self, x: Tensor, flow: Tensor, timestep: Tensor) -> Tensor:
        """Clean latents, in float64 and back."""
        return (x.double() - self.sigma(timestep).double() * flow.double()).to(flow.dtype)

    def noised(self, clean: Tensor, noise: Tensor, timestep: Tensor) -> Tensor:
        """Back to a level, in float32 and back."""
        sigma = self.sigma(timestep)
        return ((1 - sigma) * clean.float() + sigma * noise.float()).to(noise.dtype)


class UniPC:
    """Order 2 of UniPC (arXiv 2302.04867) with B(h) = e^h - 1 on estimates of the clean latents.

    The levels are `linspace(0.999, 0)` without its end, shifted, in float32, and then 0; the timestep that
    the network sees is cut to a whole number.
    """

    def __init__(self, number: int, shift: float) -> None:
        s = torch.linspace(0.999, 0, number + 1, dtype=torch.float64)[:-1]
        levels = shift * s / (1 + (shift - 1) * s)
        self.timesteps = (1000 * levels).to(torch.int64)
        self.levels = [float(level) for level in levels.float()] + [0.0]
        self.estimates: list[Tensor] = []
        self.origin: Tensor | None = None
        self.order = 0

    def step(self, x: Tensor, flow: Tensor) -> Tensor:
        """From the current level to the next; call it once for each of `timesteps`."""
        index = len(self.estimates)
        estimate = x - self.levels[index] * flow
        if self.origin is not None:
            x = self._move(self.origin, index - 1, self.order, estimate)
        self.estimates.append(estimate)
        self.order = min(2, index + 1, len(self.timesteps) - index)
        self.origin = x
        return self._move(x, index, self.order, None)

    def _move(self, x: Tensor, index: int, order: int, arrived: Tensor | None) -> Tensor:
        """From level `index` to the one after it; `arrived`, the estimate there, makes it the corrector."""
        here, there = self.levels[index], self.levels[index + 1]
        m0 = self.estimates[index]
        h = _log_ratio(there) - _log_ratio(here)
        phi = math.expm1(-h)
        moved = there / here * x - (1 - there) * phi * m0
        correction = torch.zeros_like(x)
        before = back = None
        if order == 2:
            back = (_log_ratio(self.levels[index - 1]) - _log_ratio(here)) / h
            before = (self.estimates[index - 1] - m0) / back
        if arrived is None:
            if before is not None:
                correction = 0.5 * before
        elif before is None or back is None:
            correction = 0.5 * (arrived - m0)
        else:
            first = (phi / -h - 1) / phi
            second = 2 * ((phi / -h - 1) / -h - 0.5) / phi
            # rho_1 + rho_2 = first, back rho_1 + rho_2 = second
            rho = (first - second) / (1 - back)
            correction = rho * before + (first - rho) * (arrived - m0)
        return moved - (1 - there) * phi * correction


def _log_ratio(level: float) -> float:
    return math.log(1 - level) - math.log(level) if level else math.inf


@dataclass
class StockLoop:
    """A video in the making as the stock code makes it.

    Attributes:
        network: the transformer.
        text: prompt embeddings (b, tokens, text_dim).
        window: latent frames that the cache holds, the chunk in work included; None: all, nothing rolls.
        sink: of these, the first ones, which stay.
        marks, first_marks: denoising steps; those of the first generated chunk.
        chunk_frames, first_chunk_frames: latent frames a chunk; of the first chunk if it is another.
        negative, guidance: second text and scale of guidance; a cache of its own follows it.
        unipc: number of UniPC steps instead of the marks.
        longest: latent frames of the whole video, for a cache that does not roll.
    """

    network: StockTransformer
    text: Tensor
    window: int | None = None
    sink: int = 0
    marks: Sequence[int] = (1000, 750, 500, 250)
    first_marks: Sequence[int] | None = None
    shift: float = 5.0
    warp: bool = True
    chunk_frames: int = 3
    first_chunk_frames: int | None = None
    negative: Tensor | None = None
    guidance: float = 1.0
    unipc: int | None = None
    longest: int = 40
    frames: list[Tensor] = field(default_factory=list)
    generated: int = 0
    caches: list[DenseCache] = field(default_factory=list)

    @property
    def latents(self) -> Tensor:
        """The video so far (b, f, c, h, w)."""
        return torch.stack(self.frames, 1)

    def prefill(self, latents: Tensor) -> None:
        """Take given frames as the start of the video, in the chunks that generation would have made."""
        for part in latents.split(self.schedule(latents.shape[1]), 1):
            self._settle(part)

    def run(self, noise: Tensor, draw: Draw | None = None) -> Tensor:
        """Generate as many frames as there is noise for (b, f, c, h, w); returns the video so far."""
        for part in noise.split(self.schedule(noise.shape[1]), 1):
            self.chunk(part, draw)
        return self.latents

    def chunk(self, noise: Tensor, draw: Draw | None = None, given: Tensor | None = None) -> Tensor:
        """One chunk from its noise, then its clean pass.

        Args:
            given: clean frames that replace the chunk's first, at timestep 0, throughout.
        """
        if isinstance(draw, Recorder):
            draw.fresh.append([])
        clean = self._unipc(noise, given) if self.unipc else self._few_steps(noise, draw)
        self._settle(clean)
        self.generated += 1
        return clean

    def switch(self, text: Tensor, keep_sinks: bool) -> None:
        """LongLive's change of prompt: the window's clean frames pass once more, under the new text.

        They all see each other. Their keys fill the cache from its left end, so that the window's first
        frames become the sinks, unless `keep_sinks` (its `global_sink`) leaves the old ones in place. While
        the window still reaches back to the first frame, sinks are made anew even so.
        """
        self.text = text
        number = min(self.window or len(self.frames), len(self.frames))
        start = len(self.frames) - number
        clean = torch.stack(self.frames[start:], 1)
        self._pass(clean, torch.zeros(clean.shape[:2]), start, keep_sinks=keep_sinks and start > 0)

    def schedule(self, frames: int) -> list[int]:
        first = self.first_chunk_frames if self.first_chunk_frames and not self.frames else 0
        full, left = divmod(frames - first, self.chunk_frames)
        if left:
            raise ValueError(f"{frames} frames do not divide into chunks")
        return [first] * bool(first) + [self.chunk_frames] * full

    def _few_steps(self, x: Tensor, draw: Draw | None) -> Tensor:
        table = StepTable(self.shift)
        marks = self.first_marks if self.first_marks and not self.generated else self.marks
        steps = table.steps(marks, self.warp)
        for step, following in zip(steps, [*steps[1:], None], strict=True):
            clean = table.estimate(x, self._guided(x, step.expand(x.shape[:2])), step)
            if following is None:
                return clean
            assert draw is not None
            flat = clean.flatten(0, 1)
            x = table.noised(flat, draw(flat), following).unflatten(0, clean.shape[:2])
        raise ValueError("no steps")

    def _unipc(self, x: Tensor, given: Tensor | None) -> Tensor:
        assert self.unipc is not None
        solver = UniPC(self.unipc, self.shift)
        for step in solver.timesteps:
            timestep = step.float().expand(x.shape[:2]).clone()
            if given is not None:
                x = torch.cat([given, x[:, given.shape[1] :]], 1)
                timestep[:, : given.shape[1]] = 0
            x = solver.step(x, self._guided(x, timestep))
        return x if given is None else torch.cat([given, x[:, given.shape[1] :]], 1)

    def _guided(self, x: Tensor, timestep: Tensor) -> Tensor:
        flows = self._pass(x, timestep, len(self.frames))
        return flows[0] if len(flows) == 1 else flows[1] + self.guidance * (flows[0] - flows[1])

    def _settle(self, clean: Tensor) -> None:
        self._pass(clean, torch.zeros(clean.shape[:2]), len(self.frames))
        self.frames += clean.unbind(1)

    def _pass(self, x: Tensor, timestep: Tensor, start: int, keep_sinks: bool = False) -> list[Tensor]:
        """Flows under the text and, when guided, under the negative one, each with its cache."""
        texts = [self.text] if self.negative is None else [self.text, self.negative]
        if not self.caches:
            self.caches = [self._cache(x) for _ in texts]
        return [
            self.network(
                x, timestep, text, Attending(cache, start, self.window is not None, self.sink, keep_sinks)
            )
            for text, cache in zip(texts, self.caches, strict=True)
        ]

    def _cache(self, x: Tensor) -> DenseCache:
        tokens = x.shape[-2] * x.shape[-1] // math.prod(self.network.patch)
        n = self.network
        return DenseCache(n.layers, x.shape[0], (self.window or self.longest) * tokens, n.heads, n.d, n.dtype)


class KreaLoop(StockLoop):
    """Krea Realtime's loop: for every chunk the cache is made anew from the clean frames before it.

    These pass together, seeing each other, at positions from 0; the chunk follows them.

    Its server encodes the oldest of them again, from pixels; here all are the latents that were generated.
    """

    context_frames: int = 3

    def chunk(self, noise: Tensor, draw: Draw | None = None, given: Tensor | None = None) -> Tensor:
        if isinstance(draw, Recorder):
            draw.fresh.append([])
        whole, self.frames = self.frames, self.frames[-self.context_frames :]
        self.caches = []
        if self.frames:
            context = torch.stack(self.frames, 1)
            self._pass(context, torch.zeros(context.shape[:2]), 0)
        clean = self._few_steps(noise, draw)
        self.frames = [*whole, *clean.unbind(1)]
        self.generated += 1
        return clean
