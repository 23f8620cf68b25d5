"""Several caches over the same rollouts, side by side: what `vidkv eval cache` is made of.

Every trial takes its turn chunk by chunk, so that whatever else the machine does hits all of them alike. The
first chunk has no history to read; it is denoised once, by the reference, and given to the others.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from itertools import pairwise
from multiprocessing import get_context
from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from vidkv.activations import LiveBytes
from vidkv.apps.evaluate import Task, begin
from vidkv.apps.fidelity import DIVERGED_DB, LUMA, joined, parted, psnr, squared_error
from vidkv.attention import CachedAttention
from vidkv.cache import CacheSpec, KVCache, planned_bytes
from vidkv.drift import look
from vidkv.errors import VidkvError
from vidkv.models.bounce.metrics import RolloutMetrics, measure
from vidkv.models.bounce.parser import Parsed, parse_frames
from vidkv.models.wan import Attend
from vidkv.pipeline import CausalVideoPipeline
from vidkv.rollout import Chunk, Rollout

Floats = npt.NDArray[np.float64]
Frames = npt.NDArray[np.uint8]
Read = Callable[[Sequence[Frames]], Iterable[Parsed]]
"""From clips (frames, 64, 64, 3) of the embedded world to what they show."""
PROBE_EVERY = 3
PICTURE = ("luma", "saturation", "flicker")


def read_here(clips: Sequence[Frames]) -> Iterable[Parsed]:
    """One after the other."""
    return map(parse_frames, clips)


@contextmanager
def reading(workers: int) -> Iterator[Read]:
    """Read clips back in so many processes: it takes longer than a small model takes to draw them."""
    if workers == 1:
        yield read_here
        return
    # a fork of a process that uses a GPU cannot
    with ProcessPoolExecutor(workers, get_context("spawn")) as pool:
        yield partial(pool.map, parse_frames)


class Work(Protocol):
    """One video to make: `Task`, or `FreeTask`."""

    @property
    def seed(self) -> int: ...
    def text(self, chunk: int) -> str: ...


@dataclass(frozen=True)
class FreeTask:
    """One video of a model whose truth is unknown."""

    prompt: str
    seed: int

    def text(self, chunk: int) -> str:
        return self.prompt


@dataclass(frozen=True)
class Trial:
    """A cache to try.

    Attributes:
        name: unique among the trials of a run.
        spec: its settings.
        kind: its class; another than `KVCache` is broken on purpose.
    """

    name: str
    spec: CacheSpec
    kind: type[KVCache] = KVCache


@dataclass
class Record:
    """What was seen of one trial; videos in the order of the tasks.

    Attributes:
        metrics: of every video, in the embedded world.
        picture: by name of PICTURE, (chunks,) of every video: brightness and saturation against its first
            chunk in percent of full scale (`vidkv.drift`), and flicker, the mean change of a frame's
            brightness from the one before, likewise.
        diverged: of every video the first chunk that shows another state than the reference's, see
            `parted`; without a known world the first below DIVERGED_DB. None if there is none.
        seconds: of denoising and clean pass, of every chunk of every batch but the first chunk.
        kv_bytes: of the cache, the most after any chunk.
        planned_bytes: the same from settings alone.
        allocated_bytes: on a GPU the most that was allocated during a chunk, without the weights and the
            other trials; None elsewhere.
        live_bytes: the cache and all tensors alive while its last chunk was denoised and committed, at most.
        lossy_pages_read: in all.
        sampled_scores: in all, see `ChunkStats`.
        attention: (layers,) of every video, by probed chunk: see `SideBySide`.
        latent_error: of every video, by probed chunk: see `latent_error`.
    """

    metrics: list[RolloutMetrics] = field(default_factory=list)
    picture: dict[str, list[Floats]] = field(default_factory=lambda: {name: [] for name in PICTURE})
    diverged: list[int | None] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    kv_bytes: int = 0
    planned_bytes: int = 0
    allocated_bytes: int | None = None
    live_bytes: int = 0
    lossy_pages_read: int = 0
    sampled_scores: int = 0
    attention: dict[int, list[Floats]] = field(default_factory=dict)
    latent_error: dict[int, list[float]] = field(default_factory=dict)

    @property
    def attention_by_video(self) -> Floats:
        """(videos, layers), mean over probed chunks."""
        return np.mean([np.stack(rows) for rows in self.attention.values()], axis=0)

    def latent_psnr(self, chunk: int | None = None) -> float:
        """dB of one probed chunk or of all, from the mean error; infinite where latents are equal."""
        rows = self.latent_error.values() if chunk is None else [self.latent_error[chunk]]
        error = float(np.mean(list(rows)))
        return -10 * math.log10(error) if error else math.inf

    @property
    def median_divergence(self) -> float:
        """Chunk; infinite if most videos never diverged."""
        return statistics.median(math.inf if chunk is None else chunk for chunk in self.diverged)


def evicting(pipe: CausalVideoPipeline, spec: CacheSpec, chunks: int) -> list[int]:
    """The chunks of a rollout before which frames have left such a cache."""
    size, first = pipe.entry.chunk_frames, pipe.entry.first_chunk_frames or pipe.entry.chunk_frames
    return [chunk for chunk in range(1, chunks) if first + (chunk - 1) * size > spec.capacity(size)]


def probes(pipe: CausalVideoPipeline, trials: Sequence[Trial], chunks: int) -> list[int]:
    """Chunks at which caches are compared: every third once frames have left all of them, and the last; the
    last alone where that never happens."""
    full = min((evicting(pipe, trial.spec, chunks) for trial in trials), key=len)
    return sorted({*full[::PROBE_EVERY], chunks - 1})


def run_trials(
    pipe: CausalVideoPipeline,
    work: Sequence[Work],
    trials: Sequence[Trial],
    chunks: int,
    batch: int,
    judged: bool,
    tell: Callable[[int, int, str], None],
    read: Read | None = None,
) -> dict[str, Record]:
    """Roll every task out freely with every trial, then once more with the reference's latents as history.

    Args:
        trials: the first one is the reference.
        chunks: per rollout, at least 2.
        batch: videos at a time.
        judged: the pixels are the embedded world's and the tasks of `Task`.
        read: how clips are read back; in this process by default.

    Raises:
        VidkvError: a cache has taken other bytes than planned.
    """
    records = {trial.name: Record() for trial in trials}
    at = probes(pipe, trials, chunks)
    groups = [work[start : start + batch] for start in range(0, len(work), batch)]
    for number, group in enumerate(groups):
        done, total = 2 * number * chunks, 2 * len(groups) * chunks

        def tick(chunk: int, what: str, done: int = done, total: int = total) -> None:
            tell(done + chunk, total, f"{what} chunks of {len(trials)} caches")

        latents = free_run(
            pipe, group, trials, chunks, (read or read_here) if judged else None, records,
            lambda c: tick(c, "free"),
        )  # fmt: skip
        teacher_force(pipe, group, trials, latents, at, records, lambda c: tick(chunks + c, "forced"))
    return records


# --- free runs ---


def free_run(
    pipe: CausalVideoPipeline,
    group: Sequence[Work],
    trials: Sequence[Trial],
    chunks: int,
    read: Read | None,
    records: Mapping[str, Record],
    tick: Callable[[int], None],
) -> list[Tensor]:
    """Roll one batch out with every trial from the same noise, and take down what is seen.

    Returns:
        The reference's clean latents (b, f, c, h, w) of every chunk.
    """
    seeds = [task.seed for task in group]
    with _rollouts(pipe, seeds, trials, True) as rollouts:
        footage = [[_Footage() for _ in group] for _ in trials]
        latents: list[Tensor] = []
        for chunk in range(chunks):
            prompt_all(pipe, rollouts, group, chunk)
            for trial, rollout, videos in zip(trials, rollouts, footage, strict=True):
                made = _made(rollout, latents[0] if latents and not chunk else None, records[trial.name])
                if rollout is rollouts[0]:
                    latents.append(made.latents)
                assert made.frames is not None
                shown = list(made.frames.cpu().numpy())
                seen = read(shown) if read else [None] * len(shown)
                for video, frames, parsed in zip(videos, shown, seen, strict=True):
                    video.add(frames, parsed)
            for others in footage:
                for video, reference in zip(others, footage[0], strict=True):
                    video.compare(reference)
            tick(chunk + 1)
        for trial, rollout, videos in zip(trials, rollouts, footage, strict=True):
            _take_down(records[trial.name], rollout, videos, group)
    return latents


def _made(rollout: Rollout, given: Tensor | None, record: Record) -> Chunk:
    """The next chunk, denoised or given."""
    cuda = rollout.device.type == "cuda"
    before = 0
    if cuda:
        torch.cuda.reset_peak_memory_stats(rollout.device)
        before = torch.cuda.memory_allocated(rollout.device) - rollout.held_bytes
    made = rollout.step_chunk() if given is None else rollout.retrace(given)
    if cuda:
        peak = torch.cuda.max_memory_allocated(rollout.device) - before
        record.allocated_bytes = max(record.allocated_bytes or 0, peak)
    record.kv_bytes = max(record.kv_bytes, made.stats.kv_bytes)
    record.lossy_pages_read += made.stats.lossy_pages_read
    record.sampled_scores += made.stats.sampled_scores
    if made.index:
        record.seconds.append(made.stats.denoise_s + made.stats.commit_s)
    return made


def _take_down(record: Record, rollout: Rollout, videos: Sequence[_Footage], group: Sequence[Work]) -> None:
    """What one batch of a trial adds to its record."""
    cache = rollout.cache
    caches = 1 + (rollout.negative_cache is not None)
    planned = caches * planned_bytes(cache.spec, cache.geometry, rollout.dtype)
    record.planned_bytes = max(record.planned_bytes, planned)
    if rollout.kv_bytes != planned:
        raise VidkvError(
            f"the cache {cache.spec} takes {rollout.kv_bytes:,} bytes where {planned:,} were planned: its "
            "format or policy counts wrongly, and so does every memory plan; please report it"
        )
    for video, task in zip(videos, group, strict=True):
        record.diverged.append(video.diverged_at)
        for name in PICTURE:
            record.picture[name].append(np.array([now[name] for now in video.looks]))
        if isinstance(task, Task):
            edges = np.cumsum([0, *(len(part) for part in video.parsed)]).tolist()
            slices = [slice(a, b) for a, b in pairwise(edges)]
            record.metrics.append(measure(joined(video.parsed), task.prompt, slices, task.event_chunk))


class _Footage:
    """One video as it comes, chunk by chunk; of its pixels only the newest chunk is kept.

    Attributes:
        looks: by chunk, PICTURE's values.
        parsed: by chunk, what is read back from pixels of the embedded world.
        frames: the newest chunk.
        diverged_at: see `Record`.
    """

    def __init__(self) -> None:
        self.looks: list[dict[str, float]] = []
        self.parsed: list[Parsed] = []
        self.diverged_at: int | None = None
        self.frames: Frames = np.zeros((0, 1, 1, 3), np.uint8)
        self._first: dict[str, float] = {}
        self._luma: list[float] = []

    def add(self, frames: Frames, parsed: Parsed | None) -> None:
        """The next chunk, (frames, height, width, 3) uint8, and what was read back from it."""
        self.frames = frames
        seen = look(torch.from_numpy(frames))
        self._first = self._first or seen
        luma = self._luma[-1:] + (frames.mean((1, 2)) @ LUMA / 255).tolist()
        self._luma = luma
        moved = {name: 100 * (seen[name] - self._first[name]) for name in ("luma", "saturation")}
        flicker = 100 * float(np.abs(np.diff(luma)).mean()) if len(luma) > 1 else math.nan
        self.looks.append(moved | {"flicker": flicker})
        if parsed:
            self.parsed.append(parsed)

    def compare(self, reference: _Footage) -> None:
        """Note whether the newest chunk is the first that shows something else than the reference's."""
        if self.diverged_at is not None:
            return
        if self.parsed:
            other = parted(self.parsed[-1], reference.parsed[-1])
        else:
            other = psnr(squared_error(self.frames, reference.frames)) < DIVERGED_DB
        if other:
            self.diverged_at = len(self.looks) - 1


# --- the reference's history ---


def teacher_force(
    pipe: CausalVideoPipeline,
    group: Sequence[Work],
    trials: Sequence[Trial],
    latents: Sequence[Tensor],
    at: Sequence[int],
    records: Mapping[str, Record],
    tick: Callable[[int], None],
) -> None:
    """Fill every trial's cache with the same clean latents, and compare what is read from them.

    At every probed chunk each trial denoises it from the reference's noise without committing it (its latents
    against the reference's: `latent_error`), and reads beside the reference, see `SideBySide`.

    Args:
        latents: the reference's, of every chunk.
        at: chunks to probe.
    """
    # a context that is computed anew from pictures needs them
    with _rollouts(pipe, [t.seed for t in group], trials, pipe.entry.recompute_context) as rollouts:
        for chunk, clean in enumerate(latents):
            prompt_all(pipe, rollouts, group, chunk)
            probed, last = chunk in at, chunk + 1 == len(latents)
            live = [LiveBytes() for _ in trials]
            for trial, rollout, counter in zip(trials, rollouts, live, strict=True):
                if probed:
                    with _counting(counter if last else None):
                        found = rollout.denoise()
                    records[trial.name].latent_error.setdefault(chunk, []).extend(latent_error(found, clean))
            if probed:
                for name, errors in attention_errors(rollouts, trials, clean).items():
                    records[name].attention.setdefault(chunk, []).extend(errors)
            for trial, rollout, counter in zip(trials, rollouts, live, strict=True):
                with _counting(counter if last else None):
                    rollout.append(clean)
                record = records[trial.name]
                record.live_bytes = max(record.live_bytes, rollout.kv_bytes + counter.peak)
            tick(chunk + 1)


@contextmanager
def _counting(counter: LiveBytes | None) -> Iterator[None]:
    if counter is None:
        yield
    else:
        with counter:
            yield


def latent_error(found: Tensor, wanted: Tensor) -> list[float]:
    """Mean squared error of every video by the squared range (largest minus smallest value) of `wanted`.

    10 log10 of its inverse is the PSNR of latents: their range takes the place of a picture's 255 levels.

    Args:
        found, wanted: (b, f, c, h, w).
    """
    a, b = (x.double().flatten(1) for x in (found, wanted))
    return ((a - b).square().mean(1) / (b.amax(1) - b.amin(1)).square()).tolist()


class SideBySide:
    """An `Attention` in which every trial answers, and the pass goes on with the reference's answer.

    So all of them read with the same queries, keys and values in every layer: errors do not add up.

    Args:
        reference: whose answer goes on.
        others: by trial.

    Attributes:
        squares: by trial, (b, layers): sum of squares of the difference to the reference's answers.
        own: (b, layers), sum of squares of the reference's answers.
    """

    def __init__(self, reference: CachedAttention, others: Mapping[str, CachedAttention]) -> None:
        self.reference, self.others = reference, others
        geometry = reference.cache.geometry
        shape = (geometry.batch, geometry.layers)
        self.own = torch.zeros(shape, dtype=torch.float64)
        self.squares = {name: torch.zeros(shape, dtype=torch.float64) for name in others}

    def layer(self, index: int) -> Attend:
        own = self.reference.layer(index)
        readers = {name: other.layer(index) for name, other in self.others.items()}

        def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            wanted = own(q, k, v)
            self.own[:, index] += _squares(wanted)
            for name, read in readers.items():
                self.squares[name][:, index] += _squares(read(q, k, v).double() - wanted.double())
            return wanted

        return attend


def _squares(x: Tensor) -> Tensor:
    return x.double().square().flatten(1).sum(1).cpu()


@torch.no_grad()
def attention_errors(
    rollouts: Sequence[Rollout], trials: Sequence[Trial], clean: Tensor
) -> dict[str, list[Floats]]:
    """Relative L2 error of the attention of every layer, over passes at all noise levels of the next chunk.

    Args:
        rollouts: they stand before the chunk, the reference first.
        clean: its clean latents (b, f, c, h, w), which are noised to each level with the chunk's own noise.

    Returns:
        By trial, (layers,) of every video: ‖answer - reference's‖ / ‖reference's‖.
    """
    reference = rollouts[0]
    for rollout in rollouts:
        rollout.cache.begin(clean.shape[1])
    try:
        readers = {
            trial.name: CachedAttention(rollout.cache, rollout.path)
            for trial, rollout in zip(trials, rollouts, strict=True)
        }
        both = SideBySide(readers[trials[0].name], readers)
        for noised, times in noise_levels(reference, clean):
            reference.transformer(noised, times, reference.text, both)
    finally:
        for rollout in rollouts:
            rollout.cache.abandon()
    return {name: list((square / both.own).sqrt().numpy()) for name, square in both.squares.items()}


def noise_levels(rollout: Rollout, clean: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """What the steps of the next chunk would see: latents (b, f, c, h, w) noised to each level with the
    chunk's own noise, and timesteps (b, f).

    Args:
        clean: its clean latents.
    """
    solver = rollout.schedule.solver(rollout.chunk - rollout.prefix_chunks)
    start = rollout.next_frame - rollout.prefix_frames
    noise = rollout.noise.initial(rollout.chunk, start, clean.shape[1]).to(clean)
    for sigma, timestep in zip(solver.sigmas, solver.timesteps, strict=True):
        times = torch.full(clean.shape[:2], timestep, device=rollout.device)
        yield torch.lerp(clean, noise, sigma), times


# --- rollouts ---


@contextmanager
def _rollouts(
    pipe: CausalVideoPipeline, seeds: Sequence[int], trials: Sequence[Trial], decode: bool
) -> Iterator[list[Rollout]]:
    """One per trial; their memory is free afterwards."""
    rollouts = [begin(pipe, seeds, trial.spec, trial.kind, decode) for trial in trials]
    try:
        yield rollouts
    finally:
        for rollout in rollouts:
            rollout.close()


def prompt_all(
    pipe: CausalVideoPipeline, rollouts: Sequence[Rollout], group: Sequence[Work], chunk: int
) -> None:
    """Tell all rollouts what the chunk shows, where that is new."""
    texts = [task.text(chunk) for task in group]
    if chunk and texts == [task.text(chunk - 1) for task in group]:
        return
    reference = rollouts[0]
    pipe.set_prompt(reference, texts)
    for rollout in rollouts[1:]:
        rollout.set_text(reference.text, reference.negative)
