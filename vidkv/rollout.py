"""The loop over chunks: denoise, clean pass, decode."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields, replace
from numbers import Integral
from types import TracebackType
from typing import Any, get_args

import torch
from torch import Tensor

from vidkv.attention import CachedAttention
from vidkv.cache import CacheGeometry, CacheSpec, KVCache, planned_bytes
from vidkv.cache.kv_cache import State
from vidkv.cache.pool import PagePool
from vidkv.cache.saved import check_tensor, entry, whole_numbers
from vidkv.cache.snapshot import CacheSnapshot
from vidkv.decoding import Decoder, LaterFrames, check_decoded
from vidkv.dispatch import check as check_path
from vidkv.dispatch import choose as choose_path
from vidkv.errors import CacheStateError, InputError, NumericsError, ResourceError, StateError
from vidkv.graphs import RecordedPasses
from vidkv.heads import head_order
from vidkv.models.vae import pixel_frames
from vidkv.models.wan import CausalWanTransformer3DModel, TextContext
from vidkv.noise import CounterNoise, NoiseSource
from vidkv.prompts import PromptTransition, Switch
from vidkv.read_path import ReadPath
from vidkv.schedule import FlowSchedule, Solver


@dataclass(frozen=True)
class ChunkStats:
    """What one chunk cost.

    Attributes:
        denoise_s, commit_s, decode_s: seconds of the denoising steps, the clean pass and the decoder.
        kv_bytes: bytes of the cache on the device.
        bytes_per_frame: bytes of one committed latent frame over all layers.
        resident_frames: latent frames in the cache after this chunk.
        pages_read: pages decoded for reading, over all layers and passes; of these `lossy_pages_read`
            came from a quantized format.
        sampled_scores: products of a query and a key that were computed beside the attention, to choose the
            tokens of pages that stay (`keep_by=mass`).
        kv_host_bytes, kv_disk_bytes: bytes of pages that may leave the device, in the host's memory and on
            disk.
        kv_moved_bytes: bytes of pages that have come from the host since the chunk before.
    """

    denoise_s: float
    commit_s: float
    decode_s: float
    kv_bytes: int
    bytes_per_frame: int
    resident_frames: int
    pages_read: int
    lossy_pages_read: int
    sampled_scores: int = 0
    kv_host_bytes: int = 0
    kv_disk_bytes: int = 0
    kv_moved_bytes: int = 0


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


@dataclass(frozen=True)
class Snapshot:
    """A rollout after one of its chunks, in shared pages; its prompt is not part of it.

    Attributes:
        caches: pages of the cache and of the negative text's.
        noise: state of the noise source.
        decoder: its memory, on the host; None without a decoder.
        window_latents, context_frames: by latent frame.
        chunk, prefix_chunks, prefix_frames: counters of the rollout.
        start_frame, latents, frames: of the chunk, see `Chunk`; on the host.
    """

    caches: tuple[CacheSnapshot, ...]
    noise: tuple[dict[str, Tensor], dict[str, Any]]
    decoder: dict[str, Tensor] | None
    window_latents: dict[int, Tensor]
    context_frames: dict[int, Tensor]
    chunk: int
    prefix_chunks: int
    prefix_frames: int
    start_frame: int
    latents: Tensor
    frames: Tensor | None

    def tensors(self) -> Iterator[Tensor]:
        """Everything but pages."""
        yield self.latents
        yield from (self.frames,) if self.frames is not None else ()
        yield from (*self.window_latents.values(), *self.context_frames.values())
        yield from (*self.noise[0].values(), *(self.decoder or {}).values())
        yield from (tensor for cache in self.caches for tensor in cache.tensors())

    def close(self) -> None:
        """Let go of the pages."""
        for cache in self.caches:
            cache.close()


OnStep = Callable[[int, int], None]
"""Called after each denoising step with (chunk, step); may raise `Cancelled` to stop."""

EditStep = Callable[[int, int, Tensor], Tensor]
"""Called after each denoising step with (chunk, step, latents (b, f, c, h, w)); what it returns goes on."""


CACHES = ("cache", "negative_cache")
"""What a rollout's caches are called in its state."""


class Rollout:
    """A video in the making: cache, schedule, noise, decoder state and frame counter.

        rollout = Rollout(transformer, text, spec, schedule, latent_size=(16, 8, 8), seeds=[7], decoder=d)
        while wanted:
            chunk = rollout.step_chunk()

    Args:
        transformer: the causal DiT.
        text: its text context, or prompt embeddings (b, text tokens, text_dim); replace it between chunks
            with `set_text` or `switch`.
        spec: cache settings.
        schedule: noise levels.
        latent_size: (channels, height, width) of a latent frame.
        seeds: one per batch element.
        chunk_frames: latent frames per chunk.
        decoder: turns finished latents into frames; None leaves them latent.
        path: how pages are read; by default what `dispatch.choose` finds fastest. It stays.
        first_chunk_frames: latent frames of the first chunk where it differs (models with an independent
            first frame: 1).
        noise: where noise comes from; by default streams of the seeds (`CounterNoise`).
        recompute_context: build the cache anew before every chunk from the last `window - chunk_frames` clean
            latents, in one pass, instead of keeping it (Krea's loop).
        context_encoder: with `recompute_context`, (b, height, width, 3) uint8 to latents (b, c, h, w): the
            first latent frame of the context is encoded anew from the last of its decoded frames, because
            the VAE knows a video's first frame as something special (likewise).
        graphs: on a GPU, replay recorded denoising passes once the window is full (`RecordedPasses`).
        device: where to compute; by default where the transformer is, but an offloaded one is elsewhere.
        pools: where the caches' pages lie; by default in pools of their own.

    Attributes:
        revision: raised by everything that changes what comes next: chunks, prompts, restored states.
    """

    def __init__(
        self,
        transformer: CausalWanTransformer3DModel,
        text: TextContext | Tensor,
        spec: CacheSpec,
        schedule: FlowSchedule,
        latent_size: tuple[int, int, int],
        seeds: Sequence[int],
        chunk_frames: int = 3,
        decoder: Decoder | None = None,
        cache: KVCache | None = None,
        path: ReadPath | None = None,
        *,
        first_chunk_frames: int | None = None,
        noise: NoiseSource | None = None,
        recompute_context: bool = False,
        context_encoder: Callable[[Tensor], Tensor] | None = None,
        device: torch.device | str | None = None,
        graphs: bool = False,
        pools: dict[str, PagePool] | None = None,
    ) -> None:
        _, height, width = latent_size
        for seed in seeds:
            if not isinstance(seed, Integral) or not 0 <= seed < 2**64:
                raise InputError(f"seed {seed} must be a whole number between 0 and 2**64 - 1")
        if not seeds:
            raise InputError("give at least one seed: there is one per batch element")
        if first_chunk_frames is not None and not 1 <= first_chunk_frames <= chunk_frames:
            raise InputError(
                f"first_chunk_frames={first_chunk_frames} must lie between 1 and chunk_frames={chunk_frames}"
            )
        self.transformer, self.schedule = transformer, schedule
        self.device, self.dtype = torch.device(device or transformer.device), transformer.dtype
        self.text = self._text(text)
        self.negative: TextContext | None = None
        self._transition: PromptTransition | None = None
        self.latent_size, self.chunk_frames = latent_size, chunk_frames
        self.first_chunk_frames = first_chunk_frames or chunk_frames
        self.seeds = tuple(int(seed) for seed in seeds)
        self.noise = noise or CounterNoise(self.seeds, latent_size, self.device, self.dtype)
        self.decoder = decoder
        self.recompute_context, self.context_encoder = recompute_context, context_encoder
        geometry = CacheGeometry.of_model(transformer.config, height, width, chunk_frames, len(self.seeds))
        geometry = replace(geometry, head_order=head_order(transformer.history_share))
        heads = transformer.config.num_attention_heads
        self.path = path or choose_path(spec, geometry, heads, self.device, self.dtype)
        self._pools, self._moved_bytes = pools, 0
        self.cache = cache or KVCache(spec, geometry, self.device, self.dtype, pools)
        self.negative_cache: KVCache | None = None
        if schedule.guidance != 1 and cache is None:
            self.negative_cache = KVCache(spec, geometry, self.device, self.dtype, pools)
        self.chunk = self.prefix_chunks = self.prefix_frames = self.revision = 0
        self.window_latents: dict[int, Tensor] = {}
        self.context_frames: dict[int, Tensor] = {}
        self._later: LaterFrames | None = None
        self._parked: tuple[dict[str, Tensor], dict[str, Any]] | None = None
        self._pass: CausalWanTransformer3DModel | RecordedPasses = transformer
        if graphs:
            self.record_passes()

    @property
    def next_frame(self) -> int:
        """Latent frames so far."""
        return self.cache.layout.next_frame

    @property
    def next_chunk_frames(self) -> int:
        """Latent frames of the next chunk."""
        return self.chunk_frames if self.chunk else self.first_chunk_frames

    @property
    def shares_pools(self) -> bool:
        """Whether its pages lie beside those of other rollouts."""
        return self._pools is not None

    @property
    def kv_bytes(self) -> int:
        """Bytes of the cache, and of the negative text's where there is one; of shared pools its part."""
        if self._pools is not None:
            return sum(
                planned_bytes(c.spec, c.geometry, c.dtype)
                for c in self._caches()
                if c.state is not State.CLOSED
            )
        return sum(cache.nbytes for cache in self._caches())

    @property
    def held_bytes(self) -> int:
        """Bytes of all tensors that it keeps between chunks: caches, latents, decoder; each storage once."""
        kept = [*self.window_latents.values(), *self.context_frames.values()]
        kept += self.decoder.state().values() if self.decoder else []
        storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in kept if t.numel()}
        return self.kv_bytes + sum(storages.values())

    @property
    def in_transition(self) -> bool:
        """Whether a `lerp` from one prompt to another is under way, which `state` does not know."""
        return self._transition is not None

    @property
    def transition(self) -> PromptTransition | None:
        """The `lerp` that is under way."""
        return self._transition

    @property
    def recorded(self) -> bool:
        """Whether denoising passes are replayed from recordings once the window is full."""
        return self._pass is not self.transformer

    def record_passes(self) -> None:
        """From now on replay recorded denoising passes once the window is full; on a CPU nothing changes."""
        if self.device.type == "cuda":
            self._pass = RecordedPasses(self.transformer)

    def set_text(self, text: TextContext | Tensor, negative: TextContext | Tensor | None = None) -> None:
        """Use another prompt from the next chunk on; the cache stays (strategy `keep`).

        Args:
            text: a context, or embeddings (b, text tokens, text_dim).
            negative: what the schedule's guidance leads away from; without one no step is guided.
        """
        self.revision += 1
        self.text, self._transition = self._text(text), None
        self.negative = None if negative is None else self._text(negative)

    def switch(
        self,
        text: TextContext | Tensor,
        negative: TextContext | Tensor | None = None,
        strategy: Switch = "keep",
        chunks: int = 4,
        keep_sinks: bool = True,
        at_once: bool = False,
        done: int = 0,
    ) -> None:
        """Change the prompt between two chunks, and say what becomes of the history.

        Args:
            strategy: `keep`: cross-attention alone sees the new prompt. `recache`: keys and values of the
                last window of clean latents are computed anew under it (LongLive, arXiv 2509.22622).
                `flush`: all but the sinks and the newest latent frame is dropped (Infinity-RoPE, arXiv
                2511.20649). `lerp`: the embeddings go from the old prompt to the new one in equal parts over
                the next chunks (Krea).
            chunks: of a `lerp`; the last of them has the new prompt alone.
            keep_sinks: a `recache` leaves sinks as they are; otherwise its first frames become the sinks.
                In a video not longer than the window all is computed anew.
            at_once: a `recache` in one pass in which its frames see each other, as LongLive was trained;
                otherwise chunk after chunk, as they were made.
            done: chunks of a `lerp` that lie behind already, for a restored rollout.

        What a `lerp` still has to do is not part of `state`.
        """
        if strategy not in get_args(Switch):
            raise InputError(f"prompt switch {strategy!r:.60}; choose {', '.join(get_args(Switch))}")
        if strategy == "lerp":
            if chunks < 1:
                raise InputError(f"a lerp over {chunks} chunks; give at least 1")
            before, text = self.text, self._text(text)
            if before.embeds is None or text.embeds is None:
                raise InputError("a lerp needs prompts with their embeddings; use transformer.encode_text")
            self.set_text(before, negative)
            self._transition = PromptTransition(before.embeds, text, chunks, done)
            return
        self.set_text(text, negative)
        if strategy == "recache":
            self._recache(keep_sinks, at_once)
        elif strategy == "flush":
            newest = self.cache.layout.resident[-1:]
            for cache in self._caches():
                cache.forget(set(cache.layout.resident) - set(cache.layout.sinks) - set(newest))

    @torch.no_grad()
    def step_chunk(
        self,
        frames: int | None = None,
        noise: Tensor | None = None,
        on_step: OnStep | None = None,
        edit: EditStep | None = None,
        *,
        step_noise: Sequence[Tensor] | None = None,
        given: Tensor | None = None,
        decode: bool = True,
    ) -> Chunk:
        """Generate the next chunk: `denoise`, clean pass, decode.

        Args:
            frames: latent frames; by default a full chunk.
            noise: initial noise (b, f, c, h, w) instead of the source's.
            step_noise: fresh noise of that shape for every step that takes some, likewise.
            given: clean latents (b, fewer frames, c, h, w) that the chunk begins with: they are held at
                timestep 0 through its steps (Wan 2.2 TI2V's image conditioning).
            decode: False leaves its frames to `decode_later`.
            on_step: called after every denoising step.
            edit: called after every denoising step; may change the latents.

        Raises:
            Cancelled: from `on_step`; the rollout stands before this chunk and can go on.
            InputError: noise, or latents that `edit` returned, not of this rollout's shape; likewise.
            NumericsError: NaN or Inf in the chunk; likewise, unless they appear in the clean pass only:
                then the cache is broken and the way back is `restore`.
            ResourceError: the device has run out of memory; likewise.
        """
        read_before = self._counts()
        started = _seconds(self.device)
        latents = self.denoise(frames, noise, on_step, edit, step_noise=step_noise, given=given)
        denoised = _seconds(self.device)
        start_frame = self.next_frame
        with _naming_shortage(self.device):
            self._commit(latents)
            committed = _seconds(self.device)
            pixels = self._decode(latents, start_frame) if decode else None
        seconds = denoised - started, committed - denoised, _seconds(self.device) - committed
        return Chunk(self.chunk - 1, start_frame, latents, pixels, self._stats(seconds, read_before))

    @torch.no_grad()
    def denoise(
        self,
        frames: int | None = None,
        noise: Tensor | None = None,
        on_step: OnStep | None = None,
        edit: EditStep | None = None,
        *,
        step_noise: Sequence[Tensor] | None = None,
        given: Tensor | None = None,
    ) -> Tensor:
        """The next chunk's clean latents, not committed: the rollout stands before this chunk as it did.

            latents = rollout.denoise()             # look at them, or change them
            frames = rollout.append(change(latents))

        Arguments and errors as for `step_chunk`.

        Returns:
            (b, f, c, h, w).
        """
        frames = self.next_chunk_frames if frames is None else frames
        solver = self.schedule.solver(self.chunk - self.prefix_chunks)
        for tensor in (noise, *(step_noise or ())):
            if tensor is not None:
                self._check_shape(tensor, frames)
        draws = sum(solver.draws(step) for step in range(len(solver.sigmas)))
        if step_noise is not None and len(step_noise) != draws:
            raise InputError(f"step_noise has {len(step_noise)} tensors; this chunk takes {draws}")
        if given is not None:
            if given.ndim != 5 or not 1 <= given.shape[1] < frames:
                raise InputError(f"given latents are {tuple(given.shape)}; fewer than {frames} frames fit")
            self._check_shape(given, given.shape[1])
            given = given.to(self.device, self.dtype)
        self._take_text()
        with _naming_shortage(self.device):
            if self.recompute_context:
                self._rebuild(range(max(0, self.next_frame - self.cache.layout.capacity), self.next_frame))
            try:
                for cache in self._caches():
                    cache.begin(frames)
                return self._denoise(solver, frames, noise, step_noise, given, on_step, edit)
            finally:
                for cache in self._caches():
                    if cache.state is State.OPEN:
                        cache.abandon()

    @torch.no_grad()
    def decode_later(self, latents: Tensor) -> LaterFrames:
        """Decode a chunk on a second stream of the GPU, while the next one is denoised.

            chunk = rollout.step_chunk(decode=False)
            frames = rollout.decode_later(chunk.latents)
            following = rollout.step_chunk(decode=False)
            show(frames.wait())

        Chunks are decoded in the order in which this is called. On a CPU it is done at once.
        """
        if not self.decoder or self.recompute_context:
            raise InputError("only a rollout with a decoder that keeps its cache can decode later")
        self._await_decoder()
        self._later = LaterFrames(self.decoder, latents, self._later)
        return self._later

    @torch.no_grad()
    def prefill(self, latents: Tensor) -> list[Chunk]:
        """Commit given clean latents (b, f, c, h, w) before the first generated chunk: an image or a video.

        They are cut into chunks as the stock code does it: the first chunk's frames, then full chunks.

        Raises:
            InputError: not of this rollout's shape, no whole number of chunks, or chunks have been generated.
            NumericsError: NaN or Inf among them; nothing has changed.
        """
        if self.chunk != self.prefix_chunks:
            raise InputError(f"a prefix comes first; {self.chunk - self.prefix_chunks} chunks were generated")
        first, frames = self.next_chunk_frames, latents.shape[1] if latents.ndim == 5 else 0
        self._check_shape(latents, frames)
        if frames < first or (frames - first) % self.chunk_frames:
            raise InputError(
                f"a prefix of {frames} latent frames; this model takes {first} and then multiples of "
                f"{self.chunk_frames}"
            )
        self._check_finite(latents)
        parts = latents.tensor_split(list(range(first, frames, self.chunk_frames)), 1)
        chunks = [self.retrace(part) for part in parts]
        self.prefix_chunks, self.prefix_frames = self.chunk, self.next_frame
        return chunks

    @torch.no_grad()
    def append(self, latents: Tensor) -> Tensor | None:
        """Commit given clean latents (b, f, c, h, w) as the next chunk, in place of a generated one.

        Raises:
            InputError: not of this rollout's shape.
            NumericsError: NaN or Inf among them.
        """
        return self.retrace(latents).frames

    @torch.no_grad()
    def retrace(self, latents: Tensor) -> Chunk:
        """As `append`, with what it cost.

        Latents that this rollout once denoised lead to where it stood then, bit for bit.
        """
        self._check_shape(latents, latents.shape[1] if latents.ndim == 5 else self.chunk_frames)
        latents = latents.to(self.device, self.dtype)
        self._check_finite(latents)
        self._take_text()
        read_before = self._counts()
        started, start_frame = _seconds(self.device), self.next_frame
        with _naming_shortage(self.device):
            self._commit(latents)
            committed = _seconds(self.device)
            pixels = self._decode(latents, start_frame)
        seconds = 0.0, committed - started, _seconds(self.device) - committed
        return Chunk(self.chunk - 1, start_frame, latents, pixels, self._stats(seconds, read_before))

    def chunk_start(self, chunk: int) -> int:
        """First latent frame of a chunk."""
        return self.first_chunk_frames + (chunk - 1) * self.chunk_frames if chunk else 0

    def chunks_kept(self, chunk: int) -> list[int]:
        """Which chunks `rebuild` needs in order to stand before a chunk: those of sinks and window."""
        window = self.chunk_start(chunk) - self.cache.spec.window
        return [
            i
            for i in range(chunk)
            if self.chunk_start(i) < self.cache.spec.sink or self.chunk_start(i + 1) > window
        ]

    @torch.no_grad()
    def rebuild(
        self,
        chunk: int,
        latents: Mapping[int, Tensor],
        noise: tuple[Mapping[str, Tensor], Mapping[str, Any]],
        prefix: tuple[int, int] = (0, 0),
    ) -> None:
        """Stand before a chunk with nothing but clean latents of chunks before it; for a fresh rollout.

        Keys and values of the sinks and of the last window are computed anew, and the decoder runs over the
        window once more. What they remembered of frames that have left is lost, so what follows is close to
        what would have followed; it is equal while nothing has left.

        Args:
            latents: (b, f, c, h, w) by chunk, at least of `chunks_kept`.
            noise: state of the noise source.
            prefix: chunks and latent frames that were given.

        Raises:
            StateError: chunks are missing or of another shape; nothing has changed.
        """
        wanted = self.chunks_kept(chunk)
        for index in wanted:
            frames = self.chunk_start(index + 1) - self.chunk_start(index)
            shape, found = (len(self.seeds), frames, *self.latent_size), latents.get(index)
            if found is None or tuple(found.shape) != shape:
                raise StateError(
                    f"the latents of chunk {index} are {'missing' if found is None else tuple(found.shape)}, "
                    f"going on with chunk {chunk} needs {shape}"
                )
        self.noise.restore(*noise)
        for index in wanted:
            start, part = self.chunk_start(index), latents[index].to(self.device, self.dtype)
            gap = start != self.next_frame
            if gap:
                for cache in self._caches():
                    cache.seek(start)
                if self.decoder:
                    self.decoder.reset()
            self._commit(part)
            # after a gap its first latent frame is taken for a video's, which has fewer pixel frames
            if gap and self.decoder:
                self.decoder.feed(part)
            else:
                self._decode(part, start)
        self.chunk, (self.prefix_chunks, self.prefix_frames) = chunk, prefix

    def fork(self) -> Rollout:
        """A second rollout with the same history; pages are shared until each has moved on.

            with rollout.fork() as trial:
                preview = trial.step_chunk()

        Its part of the memory is free for the next fork when it is closed or dropped.
        """
        self._await_decoder()
        other = Rollout(
            self.transformer, self.text, self.cache.spec, self.schedule, self.latent_size, self.seeds,
            self.chunk_frames, self.decoder.copy() if self.decoder else None, self.cache.fork(), self.path,
            first_chunk_frames=self.first_chunk_frames, noise=self.noise.copy(),
            recompute_context=self.recompute_context, context_encoder=self.context_encoder,
            device=self.device, graphs=self.recorded, pools=self._pools,
        )  # fmt: skip
        other.negative = self.negative
        other.negative_cache = self.negative_cache.fork() if self.negative_cache else None
        other._transition = self._transition.copy() if self._transition else None
        other._moved()
        other.chunk, other.window_latents = self.chunk, dict(self.window_latents)
        other.prefix_chunks, other.prefix_frames = self.prefix_chunks, self.prefix_frames
        other.context_frames = dict(self.context_frames)
        return other

    def snapshot(self, chunk: Chunk) -> Snapshot:
        """What it is after the chunk that it has just made; pages are shared, not copied.

        Whoever keeps it reserves room in the pools, see `CacheSnapshot`.
        """
        self._await_decoder()
        decoder = {name: t.cpu() for name, t in self.decoder.state().items()} if self.decoder else None
        frames = None if chunk.frames is None else chunk.frames.to("cpu", copy=True)
        return Snapshot(
            tuple(CacheSnapshot(cache) for cache in self._caches()), self.noise.state(), decoder,
            dict(self.window_latents), dict(self.context_frames), self.chunk, self.prefix_chunks,
            self.prefix_frames, chunk.start_frame, chunk.latents.to("cpu", copy=True), frames,
        )  # fmt: skip

    def fits(self, snapshot: Snapshot) -> bool:
        """Whether `take_over` can use it: its pages lie in this rollout's pools."""
        caches = self._caches()
        return len(caches) == len(snapshot.caches) and all(
            part.fits(cache) for part, cache in zip(snapshot.caches, caches, strict=True)
        )

    @torch.no_grad()
    def take_over(self, snapshot: Snapshot) -> Chunk:
        """Stand after a chunk that a rollout equal to this one has made, without making it.

        Equal is what its chunks' bits depend on, all of it, see `sharing.PrefixCache`; nobody else can tell.

        Returns:
            That chunk, in tensors of its own.

        Raises:
            CacheStateError: its pages are of another kind or lie in other pools; nothing has changed.
        """
        if not self.fits(snapshot):
            raise CacheStateError("the snapshot is of another kind of rollout or lies in other pools")
        self._await_decoder()
        self._take_text()
        if self.decoder and snapshot.decoder is not None:
            self.decoder.restore(snapshot.decoder, (len(self.seeds), *self.latent_size[1:]))
        for cache, part in zip(self._caches(), snapshot.caches, strict=True):
            part.give(cache)
        self.noise.restore(*snapshot.noise)
        self.window_latents = dict(snapshot.window_latents)
        self.context_frames = dict(snapshot.context_frames)
        self.chunk = snapshot.chunk
        self.revision += 1
        self.prefix_chunks, self.prefix_frames = snapshot.prefix_chunks, snapshot.prefix_frames
        self._advance_text()
        latents = snapshot.latents.to(self.device, copy=True)
        frames = None if snapshot.frames is None else snapshot.frames.to(self.device, copy=True)
        read = self._counts()
        return Chunk(
            self.chunk - 1, snapshot.start_frame, latents, frames, self._stats((0.0, 0.0, 0.0), read)
        )

    @property
    def parked(self) -> bool:
        """Whether what it keeps lies on the host, see `park`."""
        return self._parked is not None

    def park(self) -> None:
        """Move caches, window and decoder to the host's memory and give their room back, between two chunks.

        Until `unpark` no chunk can be made. Prompts stay where they are. Twice is once.
        """
        if self._parked is not None:
            return
        state, recorded = self.state(), self.recorded
        self.close()
        self._parked = state
        if recorded:
            # recordings would keep what they read; those of the next cache are others anyway
            self.record_passes()

    def unpark(self, pools: dict[str, PagePool] | None = None) -> None:
        """Take everything back onto the device, bit for bit; of a rollout that is not parked nothing changes.

        Args:
            pools: where the pages go; by default to pools of its own.

        Raises:
            ResourceError: the device has no room; it is parked still.
        """
        if self._parked is None:
            return
        before, revision = (self.cache, self.negative_cache, self._pools), self.revision
        spec, geometry = self.cache.spec, self.cache.geometry
        try:
            with _naming_shortage(self.device):
                self.cache = KVCache(spec, geometry, self.device, self.dtype, pools)
                if self.negative_cache is not None:
                    self.negative_cache = KVCache(spec, geometry, self.device, self.dtype, pools)
                self._pools = pools
                self.restore(*self._parked)
        except BaseException:
            for cache in self._caches():
                cache.close()
            self.cache, self.negative_cache, self._pools = before
            raise
        self._parked, self.revision, self._moved_bytes = None, revision, 0

    def close(self) -> None:
        """Let go of the cache and the decoder's memory, for good; forks go on. Twice is once."""
        for cache in self._caches():
            cache.close()
        self.window_latents, self.context_frames = {}, {}
        self._pass, self._parked = self.transformer, None
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

    def pages(self) -> dict[str, tuple[KVCache, int]]:
        """Resident pages by a name that is never given to other bytes: the cache and the latent frame."""
        self._forget_lost()
        return {
            f"{name}.{cache.table[frame].serial}": (cache, frame)
            for name, cache in zip(CACHES, self._caches(), strict=False)
            for frame in cache.layout.resident
        }

    def state(self, pages: bool = True) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Tensors and a JSON-able header that `restore` turns back into this rollout, bit for bit.

        The transformer and the text are not part of it.

        Args:
            pages: False leaves them out, for those who keep them by name (`pages`).
        """
        self._forget_lost()
        tensors: dict[str, Tensor] = {}
        headers: dict[str, Any] = {}
        for name, cache in zip(CACHES, self._caches(), strict=False):
            parts, headers[name] = cache.state_tensors(pages)
            tensors |= {f"{name}.{key}": tensor for key, tensor in parts.items()}
        noise, headers["noise"] = self.noise.state()
        tensors |= {f"noise.{key}": tensor for key, tensor in noise.items()}
        self._await_decoder()
        if self.decoder:
            tensors |= {f"decoder.{name}": tensor.cpu() for name, tensor in self.decoder.state().items()}
        for name, kept in (("window_latents", self.window_latents), ("context_frames", self.context_frames)):
            headers[name] = list(kept)
            if kept:
                tensors[name] = torch.stack([tensor.cpu() for tensor in kept.values()], 1)
        header = headers | {
            "chunk": self.chunk,
            "prefix": [self.prefix_chunks, self.prefix_frames],
            "schedule": asdict(self.schedule),
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
        schedule = _schedule(entry(header, "schedule", dict))
        if (schedule.guidance != 1) != (self.negative_cache is not None):
            raise StateError(
                f"the state was saved with guidance {schedule.guidance:g}, this rollout has "
                f"{self.schedule.guidance:g}; with and without guidance do not mix"
            )
        names = CACHES[: len(self._caches())]
        saved = {name: (_under(f"{name}.", tensors), entry(header, name, dict)) for name in names}
        for cache, parts in zip(self._caches(), saved.values(), strict=True):
            cache.check_state(*parts)
        resident = [frame for frame, _ in saved["cache"][1]["resident"]]
        next_frame = saved["cache"][1]["next_frame"]
        chunk, prefix = entry(header, "chunk", int), whole_numbers(header, "prefix")
        path = ReadPath.of(entry(header, "read_path", dict))
        check_path(path, self.cache.spec, self.cache.geometry, self.device, self.dtype)
        if not chunk <= next_frame <= chunk * self.chunk_frames:
            raise StateError(
                f"the saved chunk is {chunk} after {next_frame} latent frames, with at most "
                f"{self.chunk_frames} a chunk"
            )
        if len(prefix) != 2 or not 0 <= prefix[0] <= chunk or not prefix[0] <= prefix[1] <= next_frame:
            raise StateError(
                f"the saved prefix is {prefix!s:.60} of {chunk} chunks, {next_frame} latent frames"
            )
        wanted = sorted({*resident, *range(max(0, next_frame - self.cache.spec.window), next_frame)})
        if whole_numbers(header, "window_latents") != wanted:
            raise StateError(
                f"the saved window_latents are of {header['window_latents']!s:.60}, its pages need "
                f"{wanted!s:.60}"
            )
        channels, height, width = self.latent_size
        latents = self._kept("window_latents", tensors, header, (channels, height, width), self.dtype)
        stored = tensors.get("context_frames")
        pixels = tuple(stored.shape[2:]) if stored is not None else ()
        contexts = self._kept("context_frames", tensors, header, pixels, torch.uint8)
        noise = self.noise.copy()
        noise.restore(_under("noise.", tensors), entry(header, "noise", dict))
        self._await_decoder()
        if self.decoder:
            self.decoder.restore(_under("decoder.", tensors), (len(self.seeds), height, width))
        for cache, parts in zip(self._caches(), saved.values(), strict=True):
            cache.restore(*parts)
        seeds = tuple(entry(header["noise"], "seeds", list))
        # a stock source has one for the whole batch
        self.noise, self.seeds = noise, seeds if len(seeds) == len(self.seeds) else self.seeds
        self.chunk, self.schedule, self.path = chunk, schedule, path
        self.revision += 1
        self.prefix_chunks, self.prefix_frames = prefix
        self.window_latents = {frame: self._laid_by(tensor) for frame, tensor in latents.items()}
        self.context_frames = contexts

    def _kept(
        self, name: str, tensors: Mapping[str, Tensor], header: Mapping[str, Any], shape: tuple[int, ...],
        dtype: torch.dtype,
    ) -> dict[int, Tensor]:  # fmt: skip
        """Saved tensors (b, *shape) by latent frame."""
        frames = whole_numbers(header, name)
        if not frames:
            return {}
        check_tensor(tensors, name, (len(self.seeds), len(frames), *shape), dtype)
        return dict(zip(frames, tensors[name].to(self.device, copy=True).unbind(1), strict=True))

    def _counts(self) -> tuple[int, int, int]:
        cache = self.cache
        return cache.pages_read, cache.lossy_pages_read, cache.sampled_scores

    def _stats(self, seconds: tuple[float, float, float], before: tuple[int, int, int]) -> ChunkStats:
        denoise_s, commit_s, decode_s = seconds
        pages, lossy, scores = (now - then for now, then in zip(self._counts(), before, strict=True))
        return ChunkStats(
            denoise_s=denoise_s,
            commit_s=commit_s,
            decode_s=decode_s,
            kv_bytes=self.kv_bytes,
            bytes_per_frame=self.cache.bytes_per_frame,
            resident_frames=len(self.cache.table),
            pages_read=pages,
            lossy_pages_read=lossy,
            sampled_scores=scores,
            kv_host_bytes=sum(cache.host_nbytes for cache in self._caches()),
            kv_disk_bytes=sum(cache.disk_nbytes for cache in self._caches()),
            kv_moved_bytes=self._moved(),
        )

    def _moved(self) -> int:
        """Bytes of pages that have come from the host since this was asked last."""
        total = sum(cache.bytes_moved for cache in self._caches())
        moved, self._moved_bytes = total - self._moved_bytes, total
        return max(0, moved)

    @torch.no_grad()
    def _text(self, text: TextContext | Tensor) -> TextContext:
        return text if isinstance(text, TextContext) else self.transformer.encode_text(text.to(self.device))

    def _take_text(self) -> None:
        """On the way from one prompt to another, the next chunk's."""
        if self._transition is not None:
            self.text = self._transition.text(self.transformer)

    def _caches(self) -> list[KVCache]:
        return [self.cache] if self.negative_cache is None else [self.cache, self.negative_cache]

    def _denoise(
        self, solver: Solver, frames: int, noise: Tensor | None, step_noise: Sequence[Tensor] | None,
        given: Tensor | None, on_step: OnStep | None, edit: EditStep | None,
    ) -> Tensor:  # fmt: skip
        attention = [CachedAttention(cache, self.path) for cache in self._caches()]
        if noise is None:
            noise = self.noise.initial(self.chunk, self.next_frame - self.prefix_frames, frames)
        x = _hold(noise.to(self.device, self.dtype), given)
        own = iter(step_noise) if step_noise is not None else None
        for step, sigma in enumerate(solver.sigmas):
            flow = self._flow(x, sigma, solver.timesteps[step], given, attention)
            fresh = None
            if solver.draws(step):
                fresh = next(own).to(x) if own else self.noise.fresh(self.chunk, step + 1, frames)
            x = _hold(solver.advance(step, x, flow, fresh), given)
            if edit:
                x = edit(self.chunk, step, x)
                self._check_shape(x, frames)
                x = x.to(self.device, self.dtype)
            if on_step:
                on_step(self.chunk, step)
        self._check_finite(x)
        return x

    def _flow(
        self, x: Tensor, sigma: float, timestep: float, given: Tensor | None, attention: list[CachedAttention]
    ) -> Tensor:
        times = self._timestep(timestep, x.shape[1])
        if given is not None:
            times[:, : given.shape[1]] = 0
        flow = self._pass(x, times, self.text, attention[0])
        scale = self.schedule.guidance_at(self.chunk, sigma)
        if scale == 1 or self.negative is None:
            return flow
        # a first chunk has no history: without a cache of its own the negative text reads the same nothing
        return torch.lerp(self._pass(x, times, self.negative, attention[-1]), flow, scale)

    def _commit(self, latents: Tensor) -> None:
        start, frames = self.next_frame, latents.shape[1]
        if self.recompute_context:
            # the next chunk computes its context from these; keys and values now would be thrown away
            for cache in self._caches():
                cache.forget(cache.layout.resident)
                cache.seek(start + frames)
        else:
            self._clean_pass(latents)
        for i in range(frames):
            self.window_latents[start + i] = self._laid_by(latents[:, i].clone())
        self._drop_latents()
        self.chunk += 1
        self.revision += 1
        self._advance_text()

    def _advance_text(self) -> None:
        """A chunk of the way from one prompt to another is done."""
        if self._transition is not None and self._transition.advance():
            self.text, self._transition = self._transition.after, None

    def _laid_by(self, latents: Tensor) -> Tensor:
        """A history that has no room on the device needs none there for its latents."""
        return latents.cpu() if self.cache.spec.device_gb else latents

    def _forget_lost(self) -> None:
        """Drop frames that a disk could not keep, and their latents."""
        for cache in self._caches():
            cache.forget_lost()
        self._drop_latents()

    def _drop_latents(self) -> None:
        """Keep the clean latents of resident frames and of the window."""
        window = range(self.next_frame - self.cache.spec.window, self.next_frame)
        kept = {*self.cache.layout.resident, *window}
        self.window_latents = {f: t for f, t in self.window_latents.items() if f in kept}

    def _texts(self) -> list[TextContext]:
        """One per cache."""
        if self.negative_cache is None:
            return [self.text]
        if self.negative is None:
            raise InputError("this schedule guides every chunk; give a negative prompt with set_text")
        return [self.text, self.negative]

    def _clean_pass(self, latents: Tensor, at_once: bool = False) -> None:
        """Write the keys and values of clean latents into the cache, or both of them."""
        frames = latents.shape[1]
        for cache, text in zip(self._caches(), self._texts(), strict=True):
            cache.begin(frames, at_once)
            attention = CachedAttention(cache, self.path, commit=True)
            with cache.committing():
                # not needed for itself, but NaN in any layer's keys or values reaches it
                flow = self.transformer(latents, self._timestep(0.0, frames), text, attention)
                self._check_finite(flow)

    def _recache(self, keep_sinks: bool, at_once: bool) -> None:
        """Compute the last window's keys and values anew under the current text."""
        start = max(0, self.next_frame - self.cache.spec.window)
        if start and keep_sinks:
            # the window's first frames are those that the sinks stand in for
            start += len(self.cache.layout.sinks)
        self._rebuild(range(start, self.next_frame), keep_sinks and start > 0, at_once)
        self._drop_latents()

    def _rebuild(self, frames: range, keep_sinks: bool = False, at_once: bool = True) -> None:
        """Fill the caches from clean latents of these frames, which end where the rollout stands."""
        if not frames:
            return
        size = len(frames) if at_once else self.chunk_frames
        self._texts()  # if one is missing, nothing is dropped
        for cache in self._caches():
            cache.require_room(size)
        for cache in self._caches():
            cache.forget(set(cache.layout.resident) - set(cache.layout.sinks if keep_sinks else ()))
            cache.seek(frames.start)
        latents = torch.stack([self._context(frame, frames.start) for frame in frames], 1)
        # chunks are counted from the end: the first may be shorter
        cuts = sorted(range(len(frames) - size, 0, -size))
        for part in latents.tensor_split(cuts, 1):
            self._clean_pass(part, at_once)

    def _context(self, frame: int, first: int) -> Tensor:
        """Clean latents (b, c, h, w) of a frame whose context begins with `first`."""
        pixels = self.context_frames.get(frame)
        if frame == first and frame > 0 and pixels is not None and self.context_encoder:
            return self.context_encoder(pixels).to(self.device, self.dtype)
        return self.window_latents[frame].to(self.device)

    def _await_decoder(self) -> None:
        """Until the second stream is done with the decoder's memory."""
        if self._later is not None:
            self._later.wait()

    def _decode(self, latents: Tensor, start: int) -> Tensor | None:
        if not self.decoder:
            return None
        self._await_decoder()
        frames = self.decoder.feed(latents)
        check_decoded(self.decoder.finite)
        if self.recompute_context and self.context_encoder:
            for i in range(latents.shape[1]):
                last = pixel_frames(start + i + 1) - pixel_frames(start) - 1
                self.context_frames[start + i] = frames[:, last].clone()
            first = self.next_frame - self.cache.layout.capacity
            self.context_frames = {f: t for f, t in self.context_frames.items() if f >= first}
        return frames

    def _check_shape(self, latents: Tensor, frames: int) -> None:
        wanted = (len(self.seeds), frames, *self.latent_size)
        if tuple(latents.shape) != wanted:
            raise InputError(f"latents are {tuple(latents.shape)}; this chunk takes {wanted}")

    def _check_finite(self, x: Tensor) -> None:
        if not bool(torch.isfinite(x).all()):
            raise NumericsError(f"NaN or Inf in chunk {self.chunk}")

    def _timestep(self, timestep: float, frames: int) -> Tensor:
        return torch.full((len(self.seeds), frames), timestep, device=self.device)


def _hold(x: Tensor, given: Tensor | None) -> Tensor:
    """x with its first frames as they were given."""
    return x if given is None else torch.cat([given, x[:, given.shape[1] :]], 1)


@contextmanager
def _naming_shortage(device: torch.device) -> Iterator[None]:
    """Turn what torch raises when a GPU has run out of memory into an error that lets go of it."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        # not `from error`: its traceback would hold the tensors that memory is short of
        raise ResourceError(
            f"{device} has run out of memory in the middle of a chunk ({_first_sentence(error)}); choose a "
            "smaller window or size, or the cache format int8"
        ) from None


def _first_sentence(error: Exception) -> str:
    return str(error).split(". ")[0].strip() or type(error).__name__


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
        # not the whole device: a second stream may be decoding
        torch.cuda.current_stream(device).synchronize()
    return time.perf_counter()
