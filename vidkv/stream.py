"""A video in the making as its user sees it: chunks to iterate over, under prompts that change."""

from __future__ import annotations

import math
from collections.abc import Callable, Generator, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, cast

from torch import Tensor

from vidkv.decoding import LaterFrames
from vidkv.models.registry import canonical_prompt
from vidkv.models.vae import pixel_frames
from vidkv.prompts import PromptSchedule, Switch
from vidkv.rollout import Chunk, EditStep, OnStep, Rollout
from vidkv.sharing import Opening

if TYPE_CHECKING:
    from vidkv.pipeline import CausalVideoPipeline


@dataclass(frozen=True)
class ChunkRecord:
    """What is needed to pass over a chunk that was made before, without denoising it again.

    Attributes:
        latents: clean, (b, f, c, h, w).
        noise: state of the noise source after it, see `NoiseSource.state`.
        prefix: chunks and latent frames of the video that were given.
    """

    latents: Tensor
    noise: tuple[Mapping[str, Tensor], Mapping[str, Any]]
    prefix: tuple[int, int] = (0, 0)


Records = Callable[[int], ChunkRecord | None]
"""The record of a chunk, or None if it is to be made."""


class VideoStream(Iterator[Chunk]):
    """Chunks of one video; made by `CausalVideoPipeline.stream`.

        stream = pipe.stream("a red circle bouncing", num_frames=81)
        for chunk in stream:
            show(chunk.frames)

    Attributes:
        rollout: the rollout underneath; look at it between chunks.
        records: chunks that it returns are taken over, their latents committed and decoded instead of
            denoised; bit for bit what making them again would give.
    """

    def __init__(
        self, pipe: CausalVideoPipeline, rollout: Rollout, prompts: list[PromptSchedule],
        negative_prompt: str | None = None, num_frames: int | None = None, latents: Tensor | None = None,
        start: Tensor | None = None, switch: Switch | None = None, on_step: OnStep | None = None,
        edit: EditStep | None = None, overlap: bool = False,
    ) -> None:  # fmt: skip
        self.pipe, self.rollout, self.prompts = pipe, rollout, prompts
        self.negative_prompt, self.num_frames, self.latents, self.start = (
            negative_prompt, num_frames, latents, start,
        )  # fmt: skip
        self.switch, self.on_step, self.edit, self.overlap = switch, on_step, edit, overlap
        self.records: Records = lambda chunk: None
        self._texts: list[str] | None = None
        self._opening: Opening | None = None
        self._way: Switch | None = None
        self._revision = 0
        self._chunks = self._run()

    def __next__(self) -> Chunk:
        return next(self._chunks)

    def close(self) -> None:
        """End the rollout."""
        self._chunks.close()
        self.rollout.close()

    @property
    def chunks(self) -> int | None:
        """How many there will be; None without an end."""
        if self.num_frames is None:
            return None
        rollout = self.rollout
        return chunks_for(self.num_frames, rollout.chunk_frames, first=rollout.first_chunk_frames)

    @property
    def next_second(self) -> float:
        """Where in the video the next chunk begins."""
        return pixel_frames(self.rollout.next_frame) / self.pipe.fps

    @property
    def has_begun(self) -> bool:
        """Whether the next chunk's prompt has taken over already, and with it what it made of the history."""
        chunk = self.rollout.chunk
        return bool(self._texts) and chunk > 0 and self._texts != self._wanted(chunk - 1)

    def steer(self, prompt: str, switch: Switch | None = None) -> float:
        """Change the prompt from the next chunk on, as a schedule could have said from the beginning.

        A later prompt of the schedule takes over at its time all the same.

        Args:
            switch: what becomes of the history; by default the video's own way.

        Returns:
            The second at which it takes over.

        Raises:
            PromptError: the model does not understand it; nothing has changed.
        """
        second = self.next_second
        canonical = canonical_prompt(self.pipe.config.prompt_grammar)
        self.prompts = [s.steered(second, prompt, switch, canonical) for s in self.prompts]
        return second

    def restore(self, tensors: Mapping[str, Tensor], header: Mapping[str, Any]) -> None:
        """Go on from a `Rollout.state` of this very video, before the first chunk is taken.

        Raises:
            StateError: it does not fit; nothing has changed.
        """
        self.rollout.restore(tensors, header)
        self._stand()

    def rebuild(self, chunk: int, records: Mapping[int, ChunkRecord]) -> None:
        """Go on at a chunk from records of `rollout.chunks_kept(chunk)`, see `Rollout.rebuild`.

        Raises:
            StateError: they do not fit; nothing has changed.
        """
        last = records[chunk - 1]
        if chunk < last.prefix[0]:
            # what is given comes first, and all of it
            return
        self._texts = self._wanted(chunk - 1)
        self.pipe.set_prompt(self.rollout, self._texts, self.negative_prompt)
        latents = {index: record.latents for index, record in records.items()}
        self.rollout.rebuild(chunk, latents, last.noise, last.prefix)
        self._stand()

    def _stand(self) -> None:
        """Under the prompts of the chunk before."""
        rollout = self.rollout
        if rollout.chunk:
            self.start = None
            if self.prompts:
                self._texts = self._wanted(rollout.chunk - 1)
                self.pipe.set_prompt(rollout, self._texts, self.negative_prompt)

    def _wanted(self, chunk: int) -> list[str]:
        """The prompts of a chunk."""
        second = pixel_frames(self.rollout.chunk_start(chunk)) / self.pipe.fps
        return [schedule.at(second) for schedule in self.prompts]

    def _cut(self, chunk: Chunk) -> Chunk:
        """Without the frames that nobody asked for."""
        begun = pixel_frames(chunk.start_frame)
        if chunk.frames is None or self.num_frames is None:
            return chunk
        return replace(chunk, frames=chunk.frames[:, : max(0, self.num_frames - begun)])

    def _run(self) -> Generator[Chunk, None, None]:
        waiting: tuple[Chunk, LaterFrames] | None = None
        rollout, pipe = self.rollout, self.pipe
        first = rollout.first_chunk_frames
        self._opening, self._revision = self._begin(), rollout.revision
        # tqdm takes infinity for unknown; diffusers takes None for a mistake
        with pipe.progress_bar(total=self.chunks or math.inf) as bar:
            while self.num_frames is None or pixel_frames(rollout.next_frame) < self.num_frames:
                if rollout.revision != self._revision:
                    # somebody has changed it by hand
                    self._opening = None
                self._prompt()
                given, self.start = self.start, None
                awaken(pipe.vae)
                if given is not None and given.shape[1] >= first:
                    self._next_key(given)
                    prefix = rollout.prefill(given)
                    self._revision = rollout.revision
                    for chunk in prefix:
                        bar.update()
                        yield self._cut(chunk)
                    continue
                record = self.records(rollout.chunk)
                if record is not None:
                    # where it comes from is not known here
                    self._opening = None
                    chunk = rollout.retrace(record.latents)
                    rollout.noise.restore(*record.noise)
                else:
                    chunk = self._made(given)
                self._revision = rollout.revision
                bar.update()
                if waiting:
                    yield self._cut(_decoded(*waiting))
                    waiting = None
                if not self.overlap:
                    yield self._cut(chunk)
                    continue
                waiting = chunk, rollout.decode_later(chunk.latents)
                if chunk.index == rollout.prefix_chunks:
                    # the first frames are wanted soon
                    yield self._cut(_decoded(*waiting))
                    waiting = None
            if waiting:
                yield self._cut(_decoded(*waiting))

    def _begin(self) -> Opening | None:
        """The key of what comes, where it can be shared: from the beginning on, and made by nobody's hand."""
        shared = self.pipe.prefixes is not None and self.edit is None and not self.overlap
        shared = shared and self.rollout.shares_pools
        return Opening(self.pipe, self.rollout) if shared and self.rollout.chunk == 0 else None

    def _next_key(self, given: Tensor | None, noise: Tensor | None = None) -> str | None:
        """The key of the next chunk."""
        if self._opening is None or self.pipe.prefixes is None:
            return None
        if self.rollout.chunk >= self.pipe.prefixes.chunks:
            self._opening = None
            return None
        at_once = self.pipe.entry.recache_at_once
        return self._opening.advance(self.rollout, held=given, noise=noise, switch=self._way, at_once=at_once)

    def _made(self, given: Tensor | None) -> Chunk:
        """The next chunk: taken over where one with its key was made before, else made."""
        noise, rollout, prefixes = self._noise(), self.rollout, self.pipe.prefixes
        key = self._next_key(given, noise)
        if key is not None and prefixes is not None and (known := prefixes.take(key, rollout)) is not None:
            return known
        chunk = rollout.step_chunk(
            noise=noise, on_step=self.on_step, edit=self.edit, given=given, decode=not self.overlap
        )
        if key is not None and prefixes is not None:
            prefixes.remember(key, rollout, chunk)
        return chunk

    def _prompt(self) -> None:
        """Change the prompts of the next chunk where the schedule says so."""
        second, self._way = self.next_second, None
        wanted = [schedule.at(second) for schedule in self.prompts]
        if wanted and wanted != self._texts:
            own = next((s.switch_at(second) for s in self.prompts if s.switch_at(second)), None)
            way = (own or self.switch or self.pipe.entry.prompt_switch) if self._texts else "keep"
            self._way = cast(Switch, way)
            self.pipe.set_prompt(self.rollout, wanted, self.negative_prompt, self._way)
            self._texts = wanted

    def _noise(self) -> Tensor | None:
        """The next chunk's part of noise that was given."""
        if self.latents is None:
            return None
        begun = self.rollout.next_frame - self.rollout.prefix_frames
        return self.latents[:, begun : begun + self.rollout.next_chunk_frames]


def chunks_for(num_frames: int, chunk_frames: int, temporal_scale: int = 4, first: int | None = None) -> int:
    """Chunks that hold `num_frames` pixel frames: ceil((frames + 3) / 12) for chunks of three.

    Args:
        first: latent frames of the first chunk, where it differs.
    """
    later = num_frames + temporal_scale - 1 - temporal_scale * (first or chunk_frames)
    return 1 + max(0, -(-later // (temporal_scale * chunk_frames)))


def latents_before(chunk: int, chunk_frames: int, first: int | None = None) -> int:
    """Latent frames before a chunk, whose first one may have another length."""
    return (first or chunk_frames) + (chunk - 1) * chunk_frames if chunk else 0


def _decoded(chunk: Chunk, later: LaterFrames) -> Chunk:
    """The chunk with its frames, once they are there."""
    frames = later.wait()
    return replace(chunk, frames=frames, stats=replace(chunk.stats, decode_s=later.decode_s))


def awaken(module: Any) -> None:
    """Bring an offloaded network to its device; diffusers' hooks do so when it is called as a whole."""
    hook = getattr(module, "_hf_hook", None)
    if hook is not None:
        hook.pre_forward(module)
