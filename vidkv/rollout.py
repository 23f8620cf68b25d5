"""The loop over chunks: denoise, clean pass, decode."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from numbers import Integral
from types import TracebackType
from typing import Any, Protocol

import torch
from torch import Tensor

from vidkv.attention import CachedAttention
from vidkv.cache import CacheGeometry, CacheSpec, KVCache
from vidkv.cache.saved import check_tensor, entry, whole_numbers
from vidkv.dispatch import check as check_path
from vidkv.dispatch import choose as choose_path
from vidkv.errors import InputError, NumericsError, StateError
from vidkv.models.wan import CausalWanTransformer3DModel, TextContext
from vidkv.noise import chunk_noise
from vidkv.read_path import ReadPath
from vidkv.schedule import TRAIN_TIMESTEPS, FlowSchedule


class Decoder(Protocol):
    """A streaming decoder: latent frames in, pixel frames out."""

    def feed(self, latents: Tensor) -> Tensor: ...
    def flush(self) -> Tensor: ...
    def reset(self) -> None: ...
    def state(self) -> dict[str, Tensor]: ...
    def restore(self, state: Mapping[str, Tensor], grid: tuple[int, int, int] | None = None) -> None: ...
    def copy(self) -> Decoder: ...


@dataclass(frozen=True)
class ChunkStats:
    """What one chunk cost.

    Attributes:
        denoise_s, commit_s, decode_s: seconds of the denoising steps, the clean pass and the decoder.
        kv_bytes: bytes of the cache.
        bytes_per_frame: bytes of one committed latent frame over all layers.
        resident_frames: latent frames in the cache after this chunk.
        pages_read: pages decoded for reading, over all layers and passes; of these `lossy_pages_read`
            came from a quantized format.
    """

    denoise_s: float
    commit_s: float
    decode_s: float
    kv_bytes: int
    bytes_per_frame: int
    resident_frames: int
    pages_read: int
    lossy_pages_read: int


@dataclass(frozen=True)
class Chunk:
    """One finished chunk.

    Attributes:
        index: from 0.
        start_frame: its first latent frame.
        latents: (b, f, c, h, w).
        frames: (b, pixel frames, height, width, 3) uint8, or None without a decoder.
        stats: what it cost.
    """

    index: int
    start_frame: int
    latents: Tensor
    frames: Tensor | None
    stats: ChunkStats


OnStep = Callable[[int, int], None]
"""Called after each denoising step with (chunk, step); may raise `Cancelled` to stop."""

EditStep = Callable[[int, int, Tensor], Tensor]
"""Called after each denoising step with (chunk, step, latents (b, f, c, h, w)); what it returns goes on."""


class Rollout:
    """A video in the making: cache, schedule, noise, decoder state and frame counter.

        rollout = Rollout(transformer, text, spec, schedule, latent_size=(16, 8, 8), seeds=[7], decoder=d)
        while wanted:
            chunk = rollout.step_chunk()

    Args:
        transformer: the causal DiT.
        text: its text context; replace it between chunks with `set_text`.
        spec: cache settings.
        schedule: noise levels.
        latent_size: (channels, height, width) of a latent frame.
        seeds: one per batch element.
        chunk_frames: latent frames per chunk.
        decoder: turns finished latents into frames; None leaves them latent.
        path: how pages are read; by default what `dispatch.choose` finds fastest. It stays.
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
        decoder: Decoder | None = None,
        cache: KVCache | None = None,
        path: ReadPath | None = None,
    ) -> None:
        _, height, width = latent_size
        for seed in seeds:
            if not isinstance(seed, Integral) or not 0 <= seed < 2**64:
                raise InputError(f"seed {seed} must be a whole number between 0 and 2**64 - 1")
        if not seeds:
            raise InputError("give at least one seed: there is one per batch element")
        self.transformer, self.text, self.schedule = transformer, text, schedule
        self.negative: TextContext | None = None
        self.latent_size, self.chunk_frames = latent_size, chunk_frames
        self.seeds = tuple(int(seed) for seed in seeds)
        self.decoder = decoder
        self.device, self.dtype = transformer.device, transformer.dtype
        geometry = CacheGeometry.of_model(transformer.config, height, width, chunk_frames, len(self.seeds))
        heads = transformer.config.num_attention_heads
        self.path = path or choose_path(spec, geometry, heads, self.device, self.dtype)
        self.cache = cache or KVCache(spec, geometry, self.device, self.dtype)
        self.chunk = 0
        self.window_latents: dict[int, Tensor] = {}

    @property
    def next_frame(self) -> int:
        """Latent frames so far."""
        return self.cache.layout.next_frame

    def set_text(self, text: TextContext, negative: TextContext | None = None) -> None:
        """Use another prompt from the next chunk on; the cache stays (strategy `keep`).

        Args:
            negative: what the schedule's guidance leads away from; without one no step is guided.
        """
        self.text, self.negative = text, negative

    @torch.no_grad()
    def step_chunk(
        self,
        frames: int | None = None,
        noise: Tensor | None = None,
        on_step: OnStep | None = None,
        edit: EditStep | None = None,
    ) -> Chunk:
        """Generate the next chunk: `denoise`, clean pass, decode.

        Args:
            frames: latent frames; by default a full chunk.
            noise: initial noise (b, f, c, h, w) instead of the seed's.
            on_step: called after every denoising step.
            edit: called after every denoising step; may change the latents.

        Raises:
            Cancelled: from `on_step`; the rollout stands before this chunk and can go on.
            InputError: noise, or latents that `edit` returned, not of this rollout's shape; likewise.
            NumericsError: NaN or Inf in the chunk; likewise, unless they appear in the clean pass only:
                then the cache is broken and the way back is `restore`.
        """
        read_before = self.cache.pages_read, self.cache.lossy_pages_read
        started = _seconds(self.device)
        latents = self.denoise(frames, noise, on_step, edit)
        denoised = _seconds(self.device)
        start_frame = self.next_frame
        self._commit(latents)
        committed = _seconds(self.device)
        pixels = self.decoder.feed(latents) if self.decoder else None
        finished = _seconds(self.device)
        stats = ChunkStats(
            denoise_s=denoised - started,
            commit_s=committed - denoised,
            decode_s=finished - committed,
            kv_bytes=self.cache.nbytes,
            bytes_per_frame=self.cache.bytes_per_frame,
            resident_frames=len(self.cache.table),
            pages_read=self.cache.pages_read - read_before[0],
            lossy_pages_read=self.cache.lossy_pages_read - read_before[1],
        )
        return Chunk(self.chunk - 1, start_frame, latents, pixels, stats)

    @torch.no_grad()
    def denoise(
        self,
        frames: int | None = None,
        noise: Tensor | None = None,
        on_step: OnStep | None = None,
        edit: EditStep | None = None,
    ) -> Tensor:
        """The next chunk's clean latents, not committed: the rollout stands before this chunk as it did.

            latents = rollout.denoise()             # look at them, or change them
            frames = rollout.append(change(latents))

        Arguments and errors as for `step_chunk`.

        Returns:
            (b, f, c, h, w).
        """
        frames = self.chunk_frames if frames is None else frames
        if noise is not None:
            self._check_shape(noise, frames)
        self.cache.begin(frames)
        try:
            return self._denoise(frames, noise, on_step, edit)
        finally:
            self.cache.abandon()

    @torch.no_grad()
    def append(self, latents: Tensor) -> Tensor | None:
        """Commit given clean latents (b, f, c, h, w) as the next chunk: a prefix or an extension.

        Raises:
            InputError: not of this rollout's shape.
            NumericsError: NaN or Inf among them.
        """
        self._check_shape(latents, latents.shape[1] if latents.ndim == 5 else self.chunk_frames)
        latents = latents.to(self.device, self.dtype)
        self._check_finite(latents)
        self._commit(latents)
        return self.decoder.feed(latents) if self.decoder else None

    def fork(self) -> Rollout:
        """A second rollout with the same history; pages are shared until each has moved on.

            with rollout.fork() as trial:
                preview = trial.step_chunk()

        Its part of the memory is free for the next fork when it is closed or dropped.
        """
        other = Rollout(
            self.transformer, self.text, self.cache.spec, self.schedule, self.latent_size, self.seeds,
            self.chunk_frames, self.decoder.copy() if self.decoder else None, self.cache.fork(), self.path,
        )  # fmt: skip
        other.negative = self.negative
        other.chunk, other.window_latents = self.chunk, dict(self.window_latents)
        return other

    def close(self) -> None:
        """Let go of the cache and the decoder's memory, for good; forks go on. Twice is once."""
        self.cache.close()
        self.window_latents = {}
        if self.decoder:
            self.decoder.reset()

    def __enter__(self) -> Rollout:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Tensors and a JSON-able header that `restore` turns back into this rollout, bit for bit.

        The transformer and the text are not part of it.
        """
        tensors, cache = self.cache.state_tensors()
        tensors = {f"cache.{name}": tensor for name, tensor in tensors.items()}
        if self.decoder:
            tensors |= {f"decoder.{name}": tensor.cpu() for name, tensor in self.decoder.state().items()}
        if self.window_latents:
            tensors["window_latents"] = torch.stack([t.cpu() for t in self.window_latents.values()], 1)
        header = {
            "cache": cache,
            "chunk": self.chunk,
            "seeds": list(self.seeds),
            "schedule": asdict(self.schedule),
            "window_frames": list(self.window_latents),
            "read_path": self.path.as_dict(),
        }
        return tensors, header

    def restore(self, tensors: Mapping[str, Tensor], header: Mapping[str, Any]) -> None:
        """Become the rollout that `state` described.

        Raises:
            StateError: it does not fit this rollout or is damaged; nothing has changed.
            CacheStateError: the rollout is closed.
        """
        if self.decoder and not _under("decoder.", tensors):
            raise StateError("the state was saved without a decoder; restore it into a rollout without one")
        cache_tensors, cache = _under("cache.", tensors), entry(header, "cache", dict)
        self.cache.check_state(cache_tensors, cache)
        chunk, seeds = entry(header, "chunk", int), tuple(whole_numbers(header, "seeds"))
        schedule = _schedule(entry(header, "schedule", dict))
        path = ReadPath.of(entry(header, "read_path", dict))
        check_path(path, self.cache.spec, self.cache.geometry, self.device, self.dtype)
        if len(seeds) != len(self.seeds) or not all(0 <= seed < 2**64 for seed in seeds):
            raise StateError(f"the saved seeds are {seeds!s:.60}, this rollout needs {len(self.seeds)}")
        if not chunk <= cache["next_frame"] <= chunk * self.chunk_frames:
            raise StateError(
                f"the saved chunk is {chunk} after {cache['next_frame']} latent frames, with at most "
                f"{self.chunk_frames} a chunk"
            )
        frames, resident = whole_numbers(header, "window_frames"), [frame for frame, _ in cache["resident"]]
        if frames != resident:
            raise StateError(f"the saved window_frames are {frames!s:.60}, its pages are of {resident!s:.60}")
        kept: Sequence[Tensor] = ()
        if frames:
            channels, height, width = self.latent_size
            shape = (len(seeds), len(frames), channels, height, width)
            check_tensor(tensors, "window_latents", shape, self.dtype)
            kept = tensors["window_latents"].to(self.device, copy=True).unbind(1)
        if self.decoder:
            self.decoder.restore(_under("decoder.", tensors), (len(seeds), *self.latent_size[1:]))
        self.cache.restore(cache_tensors, cache)
        self.chunk, self.seeds, self.schedule, self.path = chunk, seeds, schedule, path
        self.window_latents = dict(zip(frames, kept, strict=True))

    def _denoise(
        self, frames: int, noise: Tensor | None, on_step: OnStep | None, edit: EditStep | None
    ) -> Tensor:
        sigmas = self.schedule.sigmas(self.chunk)
        attention = CachedAttention(self.cache, self.path)
        x = self._noise(0, frames) if noise is None else noise.to(self.device, self.dtype)
        for step, (sigma, next_sigma) in enumerate(zip(sigmas, (*sigmas[1:], 0.0), strict=True)):
            flow = self._flow(x, sigma, attention)
            fresh = None
            if next_sigma and self.schedule.sampler == "renoise":
                fresh = self._noise(step + 1, frames)
            x = self.schedule.advance(x, flow, sigma, next_sigma, fresh)
            if edit:
                x = edit(self.chunk, step, x)
                self._check_shape(x, frames)
                x = x.to(self.device, self.dtype)
            if on_step:
                on_step(self.chunk, step)
        self._check_finite(x)
        return x

    def _flow(self, x: Tensor, sigma: float, attention: CachedAttention) -> Tensor:
        timestep = self._timestep(sigma, x.shape[1])
        flow = self.transformer(x, timestep, self.text, attention)
        scale = self.schedule.guidance(self.chunk, sigma)
        if scale == 1 or self.negative is None:
            return flow
        return torch.lerp(self.transformer(x, timestep, self.negative, attention), flow, scale)

    def _commit(self, latents: Tensor) -> None:
        start = self.next_frame
        self.cache.begin(latents.shape[1])
        attention = CachedAttention(self.cache, self.path, commit=True)
        with self.cache.committing():
            # not needed for itself, but NaN in any layer's keys or values reaches it
            flow = self.transformer(latents, self._timestep(0.0, latents.shape[1]), self.text, attention)
            self._check_finite(flow)
        for i in range(latents.shape[1]):
            self.window_latents[start + i] = latents[:, i].clone()
        self.window_latents = {f: t for f, t in self.window_latents.items() if f in self.cache.table}
        self.chunk += 1

    def _check_shape(self, latents: Tensor, frames: int) -> None:
        wanted = (len(self.seeds), frames, *self.latent_size)
        if tuple(latents.shape) != wanted:
            raise InputError(f"latents are {tuple(latents.shape)}; this chunk takes {wanted}")

    def _check_finite(self, x: Tensor) -> None:
        if not bool(torch.isfinite(x).all()):
            raise NumericsError(f"NaN or Inf in chunk {self.chunk}")

    def _noise(self, step: int, frames: int) -> Tensor:
        return chunk_noise(self.seeds, self.chunk, step, (frames, *self.latent_size), self.device, self.dtype)

    def _timestep(self, sigma: float, frames: int) -> Tensor:
        return torch.full((len(self.seeds), frames), TRAIN_TIMESTEPS * sigma, device=self.device)


def _under(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): t for name, t in tensors.items() if name.startswith(prefix)}


def _schedule(saved: Mapping[str, Any]) -> FlowSchedule:
    """The schedule that `asdict` wrote."""
    names = {field.name for field in fields(FlowSchedule)}
    if set(saved) != names:
        raise StateError(f"the saved schedule has {sorted(saved)}, this vidkv knows {sorted(names)}")
    levels: dict[str, Any] = {
        name: tuple(value) if isinstance(value, list) else value for name, value in saved.items()
    }
    try:
        return FlowSchedule(**levels)
    except (TypeError, ValueError) as error:
        raise StateError(f"the saved schedule cannot be used: {error}") from None


def _seconds(device: torch.device) -> float:
    """The time once the device has done all it was given: GPU kernels run behind the calls."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
