"""`vidkv eval heads`: how much of its attention each head gives to earlier chunks, and what it costs to take
them from the heads that use them least (`local_heads` of a cache)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from einops import rearrange
from torch import Tensor

from vidkv.apps.bench import hardware
from vidkv.apps.cache_trials import (
    Record,
    Trial,
    Work,
    noise_levels,
    probes,
    prompt_all,
    teacher_force,
)
from vidkv.apps.evaluate import MOVED_Z, Tell, begin, finite
from vidkv.apps.evaluate_cache import judge_broken, work_of
from vidkv.apps.fidelity import world_of
from vidkv.attention import CachedAttention
from vidkv.cache import CacheGeometry, CacheSpec, KVCache, planned_bytes
from vidkv.errors import InputError
from vidkv.heads import Shares, write_shares
from vidkv.kernels.attention import attend_with_lse
from vidkv.kernels.rotary import rotate_chunk
from vidkv.loading import find_model
from vidkv.memory import latent_size, pixel_size
from vidkv.models.wan import Attend
from vidkv.pipeline import CausalVideoPipeline
from vidkv.planning import compute_dtype, pick_device
from vidkv.read_path import TWO_PASS
from vidkv.rollout import Rollout

SEEDS, CHUNKS, BATCH = 16, 12, 8
PARTS = (0.25, 0.5)
"""Of the heads, how many are made local."""


@dataclass(frozen=True)
class Options:
    """What to measure, and how much of it.

    Attributes:
        seeds, chunks: videos and their length; None for SEEDS of CHUNKS.
        batch: videos at a time.
        write: keep the shares beside the weights, unless the control fails.
    """

    model: str = "bounce"
    seeds: int | None = None
    chunks: int | None = None
    batch: int = BATCH
    device: str = "auto"
    write: bool = False


class MostReadingHeads(KVCache):
    """Takes the history from the heads that read most of it: the negative control."""

    def __init__(self, spec: CacheSpec, geometry: CacheGeometry, *rest: Any) -> None:
        turned = tuple(order[::-1] for order in geometry.head_order)
        super().__init__(spec, replace(geometry, head_order=turned), *rest)


def evaluate_heads(options: Options, tell: Tell) -> dict[str, Any]:
    """As `evaluate_pipeline`, with a model by name; where its shares were written, `written` says so.

    Raises:
        InputError: an unknown model or device, or one whose weights are not here.
        OutputError: the shares cannot be written.
    """
    device = pick_device(options.device)
    folder = find_model(options.model)
    pipe = CausalVideoPipeline.from_pretrained(folder, dtype=compute_dtype(device)).to(device)
    pipe.set_progress_bar_config(disable=True)
    report = evaluate_pipeline(pipe, options, tell)
    if options.write and report["control_passes"]:
        about = {name: report[name] for name in ("seeds", "chunks", "cache", "hardware")}
        report["written"] = str(write_shares(folder, report["history_share"], about))
    return report


@torch.no_grad()
def evaluate_pipeline(pipe: CausalVideoPipeline, options: Options, tell: Tell) -> dict[str, Any]:
    """Measure a pipeline that is loaded; its rollouts go by what was found from then on.

    The model's own cache makes the videos. At probed chunks every noise level is passed once more and the
    shares are read off the log-sum-exps; they are means over queries, videos and passes. Then caches with
    local heads read the same history (`cache_trials.teacher_force`).

    Returns:
        `history_share`, (layers, kv heads); `costs`, see `_cost`, for each part of PARTS; `control_passes`. A
        number that is not finite is None.

    Raises:
        InputError: the videos are too short for a history.
    """
    seeds, chunks = options.seeds or SEEDS, options.chunks or CHUNKS
    if chunks < 2:
        raise InputError(f"chunks={chunks}: the first chunk has no history; take at least 2")
    work = work_of(world_of(pipe.config.prompt_grammar), seeds, chunks)
    groups = [work[start : start + options.batch] for start in range(0, seeds, options.batch)]
    own = Trial(str(pipe.default_cache()), pipe.default_cache())
    at = probes(pipe, [own], chunks)
    total = 2 * len(groups) * chunks

    def tick(done: int, chunk: int) -> None:
        tell(done + chunk, total, "chunks")

    clean, shares = [], []
    for number, group in enumerate(groups):
        latents, share = _free_run(pipe, group, own, chunks, at, partial(tick, number * chunks))
        clean.append(latents)
        shares.append(len(group) * share)
    found: Shares = (torch.stack(shares).sum(0) / seeds).tolist()
    pipe.transformer.history_share = found
    trials = _trials(own.spec, len(found[0]))
    records = {trial.name: Record() for trial in (own, *trials)}
    for number, (group, latents) in enumerate(zip(groups, clean, strict=True)):
        done = (len(groups) + number) * chunks
        teacher_force(pipe, group, [own, *trials], latents, at, records, partial(tick, done))
    costs = [
        _cost(pipe, own.spec, least.spec, records[least.name], records[most.name])
        for least, most in zip(trials[::2], trials[1::2], strict=True)
    ]
    report: dict[str, Any] = finite(
        {
            "hardware": hardware(pipe.transformer.device.type),
            "model": options.model,
            "seeds": seeds,
            "chunks": chunks,
            "cache": own.name,
            "probed_chunks": at,
            "history_share": found,
            "costs": costs,
            "control_passes": all(cost["control"]["moved"] for cost in costs),
        }
    )
    return report


def _trials(own: CacheSpec, kv_heads: int) -> list[Trial]:
    """For each part of the heads, those local that read least, and then those that read most."""
    numbers = sorted({max(1, round(part * kv_heads)) for part in PARTS if kv_heads > 1})
    specs = [own.model_copy(update={"local_heads": number}) for number in numbers]
    return [
        Trial(f"{spec}, {which}", spec, kind)
        for spec in specs
        for which, kind in (("least", KVCache), ("most", MostReadingHeads))
    ]


def _cost(
    pipe: CausalVideoPipeline, own: CacheSpec, spec: CacheSpec, least: Record, most: Record
) -> dict[str, Any]:
    """What so many local heads spare and do to attention and latents.

    `control`: with the most-reading heads local instead, the attention error must be larger by MOVED_Z
    standard errors over videos.
    """
    latent = latent_size(pipe.entry, *pixel_size(pipe.entry, None, None))
    geometry = CacheGeometry.of_model(pipe.transformer.config, *latent, pipe.entry.chunk_frames)
    whole, less = (planned_bytes(s, geometry, pipe.transformer.dtype) for s in (own, spec))
    return {
        "local_heads": spec.local_heads,
        "fewer": whole / less,
        "attention_error": float(least.attention_by_video.mean()),
        "latent_psnr_db": least.latent_psnr(),
        "control": judge_broken("most", {"honest": least, "most": most}, False, 0.0)
        | {"attention_error": float(most.attention_by_video.mean()), "latent_psnr_db": most.latent_psnr()},
    }


def _free_run(
    pipe: CausalVideoPipeline, group: Sequence[Work], own: Trial, chunks: int, at: Sequence[int],
    tick: Callable[[int], None],
) -> tuple[list[Tensor], Tensor]:  # fmt: skip
    """Clean latents (b, f, c, h, w) of every chunk, and the mean shares (layers, kv heads) of those `at`."""
    latents, shares = [], []
    # a context that is computed anew from pictures needs them
    decoded = pipe.entry.recompute_context
    with begin(pipe, [task.seed for task in group], own.spec, KVCache, decoded) as rollout:
        for chunk in range(chunks):
            prompt_all(pipe, [rollout], group, chunk)
            latents.append(rollout.denoise())
            if chunk in at:
                shares.append(history_shares(rollout, latents[-1]))
            rollout.append(latents[-1])
            tick(chunk + 1)
    return latents, torch.stack(shares).mean(0)


@torch.no_grad()
def history_shares(rollout: Rollout, clean: Tensor) -> Tensor:
    """(layers, kv heads) float64: share of the next chunk's attention that earlier chunks get, mean over
    videos, queries, the query heads of a group and noise levels.

    Args:
        clean: the chunk's clean latents (b, f, c, h, w).
    """
    cache = rollout.cache
    cache.begin(clean.shape[1])
    try:
        reader = _Shares(CachedAttention(cache, TWO_PASS))
        passes = 0
        for noised, times in noise_levels(rollout, clean):
            rollout.transformer(noised, times, rollout.text, reader)
            passes += 1
    finally:
        cache.abandon()
    return reader.sums / passes


class _Shares:
    """An `Attention` that answers as another does and adds up what the history gets.

    Attributes:
        sums: (layers, kv heads), of the means over one pass.
    """

    def __init__(self, reader: CachedAttention) -> None:
        self.reader = reader
        geometry = reader.cache.geometry
        self.sums = torch.zeros(geometry.layers, geometry.kv_heads, dtype=torch.float64)

    def layer(self, index: int) -> Attend:
        answer = self.reader.layer(index)

        def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            share = self._share(index, q, k, v).double().mean((0, 2)).view(k.shape[3], -1)
            self.sums[index] += share.mean(1).cpu()
            return answer(q, k, v)

        return attend

    def _share(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """(batch, heads, queries)."""
        reader = self.reader
        q, k = (rotate_chunk(x, reader.own, reader.spatial) for x in (q, k))
        _, own = attend_with_lse(q, k, rearrange(v, "b f s n d -> b n (f s) d"))
        total = own
        for segment, temporal in reader.segments:
            _, lse = attend_with_lse(q, *reader.cache.read(layer, segment, temporal))
            total = torch.logaddexp(total, lse)
        return -(own - total).expm1()


def table(report: Mapping[str, Any]) -> str:
    """Shares and costs as text for a terminal."""
    head = (
        f"Share of the attention that earlier chunks get, by layer and kv head: {report['seeds']} videos of "
        f"{report['chunks']} chunks with the model {report['model']} and {report['cache']}, on "
        f"{report['hardware']}"
    )
    lines = [head]
    for layer, shares in enumerate(report["history_share"]):
        lines.append(f"layer {layer:>2}  " + "  ".join(f"{share:.3f}" for share in shares))
    for cost in report["costs"]:
        control = cost["control"]
        lines.append(
            f"local_heads={cost['local_heads']}: {cost['fewer']:.2f}x fewer bytes, attention error "
            f"{cost['attention_error']:.2e}, one chunk {_decibel(cost)} dB; with the heads that read most "
            f"{control['attention_error']:.2e}, {_decibel(control)} dB "
            f"({'ok' if control['moved'] else 'FAIL'}, z={_z(control['attention_z'])} of {MOVED_Z:g})"
        )
    if "written" in report:
        lines.append(f"written to {report['written']}")
    return "\n".join(lines)


def _z(value: float | None) -> str:
    return "∞" if value is None else f"{value:.1f}"


def _decibel(cost: Mapping[str, Any]) -> str:
    value = cost["latent_psnr_db"]
    return "–" if value is None else f"{value:.1f}"
