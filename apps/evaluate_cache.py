"""`vidkv eval cache`: what each cache costs, and what it does to the videos.

All caches see the same seeds, noise and prompts (`vidkv.apps.cache_trials`). Each is held against the model's
own window and sinks, unquantized: fp32 on a CPU, bf16 on a GPU. Fewer bytes are always fewer than bf16.

What eviction must show is a cliff: an object that left the view comes back right only if something in the
cache still shows it. In the embedded world it is asked for directly, with the true video as history
(`vidkv.apps.cache_recall`), beside the returns of free runs.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from vidkv.apps.bench import hardware
from vidkv.apps.cache_recall import absences, by_gap, recall
from vidkv.apps.cache_report import conclusions, require_plotting, write_report
from vidkv.apps.cache_trials import PICTURE, FreeTask, Record, Trial, Work, evicting, reading, run_trials
from vidkv.apps.controls import EXPECTED, MISREAD_CACHES
from vidkv.apps.evaluate import (
    CONTROL_MIX,
    CONTROL_ROLLOUTS,
    MOVED_Z,
    PER_CHUNK,
    Results,
    Tell,
    by_chunk,
    finite,
    judge,
    judge_repetition,
    mean_known,
    summary,
    tasks,
    value_of,
    worked,
)
from vidkv.apps.fidelity import world_of
from vidkv.cache import CacheGeometry, CacheSpec, planned_bytes
from vidkv.memory import latent_size, pixel_size
from vidkv.models.bounce.metrics import bootstrap_ci, paired_bootstrap
from vidkv.models.bounce.prompts import Family, World
from vidkv.pipeline import CausalVideoPipeline
from vidkv.planning import compute_dtype, pick_device

SEEDS, CHUNKS, BATCH = 32, 30, 8
# nine chunks are 27 latent frames: pages leave a window of 21
QUICK_SEEDS, QUICK_CHUNKS = 4, 9
CONTROL_CHUNKS = 12
SPECS = (
    "int8",
    "int4",
    "int4,newer=,keep_sinks=false",
    "int4,keyframe",
    "int2,keyframe",
    "int2,newer=,keep_sinks=false",
    "int2,newer=,keep_sinks=false,centroids=4",
    "int2,newer=,keep_sinks=false,fit=largest,jensen",
    "int8,local_heads=1",
    "int8,keep_tokens=0.5",
    "int8,keep_tokens=0.5,keep_by=mass",
    "bf16,policy=sliding_window,sink=0",
    "int8,window=15",
    "int8,window=15,policy=h2o",
    "int8,window=15,policy=snapkv",
    "int4,window=12,newer=,keep_sinks=false",
    "int8,window=60,select=21",
)
"""Tried where none are given."""
MIX: tuple[tuple[Family, bool], ...] = (
    ("camera", False),
    ("bounce", False),
    ("occluder", False),
    ("camera", False),
    ("bounce", False),
    ("camera", False),
    ("bounce", True),
    ("still", False),
)
"""Kinds of scenes, with or without an event: in more of them than elsewhere something goes and comes back."""
SENTENCES = (
    "a red kite over a green field on a windy day",
    "a cat walks along a garden wall in the sun",
    "waves roll onto a rocky beach at dusk",
    "a train crosses a stone bridge in the mountains",
    "a person pours coffee in a bright kitchen",
    "snow falls on an empty street at night",
    "a drone flight over a river through a forest",
    "a dog runs through shallow water towards the camera",
)
"""Prompts of models that take free text, in turn."""
ABSENCES, QUICK_ABSENCES = 12, 2
"""Scenes per length of absence."""
BREAKS_FOR = 2
"""A cache breaks with the first of so many chunks running whose paired interval excludes 0."""
STILL_ERROR = {"cpu": 1e-4, "cuda": 2e-2}
"""Attention error that other segments of scratch may cause: sums in another order, at 32 and at 16 bits."""


@dataclass(frozen=True)
class Options:
    """What to evaluate, and how much of it.

    Attributes:
        specs: changes to the model's own cache, in the one-line form of `CacheSpec`; none for SPECS.
        seeds, chunks: None for SEEDS of CHUNKS, or with `quick` QUICK_SEEDS of QUICK_CHUNKS.
        batch: videos at a time.
        workers: processes that read pictures of the embedded world back.
        controls: whether to run the negative controls; None: unless `quick`.
        out: folder for report.json, report.md and pareto.png.
    """

    specs: Sequence[str] = ()
    model: str = "bounce"
    seeds: int | None = None
    chunks: int | None = None
    quick: bool = False
    device: str = "auto"
    batch: int = BATCH
    workers: int = 1
    controls: bool | None = None
    out: Path | None = None


def evaluate_cache(options: Options, tell: Tell) -> dict[str, Any]:
    """Try every spec beside the model's own cache.

    Returns:
        `caches`, the reference first and then one entry per spec, see `_entry`; `conclusions`; `never_full`,
        caches that no frame had to leave; and with controls `controls`, see `_controls`, and
        `controls_pass`. A number that is not known or not finite is None.

    Raises:
        InputError: an unknown model or device, a spec that cannot be read or used, or nothing to draw with.
        OutputError: `out` cannot be written.
        VidkvError: a cache has taken other bytes than planned.
    """
    if options.out is not None:
        require_plotting(options.out)
    device = pick_device(options.device)
    for text in options.specs:
        CacheSpec.parse(text)
    pipe = CausalVideoPipeline.from_pretrained(options.model, dtype=compute_dtype(device)).to(device)
    pipe.set_progress_bar_config(disable=True)
    report = evaluate_pipeline(pipe, options, tell)
    if options.out is not None:
        write_report(report, options.out)
    return report


def evaluate_pipeline(pipe: CausalVideoPipeline, options: Options, tell: Tell) -> dict[str, Any]:
    """As `evaluate_cache`, with a pipeline that is loaded."""
    chunks = options.chunks or (QUICK_CHUNKS if options.quick else CHUNKS)
    seeds = options.seeds or (QUICK_SEEDS if options.quick else SEEDS)
    world = world_of(pipe.config.prompt_grammar)
    trials = _trials(pipe, options.specs or SPECS)
    work = work_of(world, seeds, chunks)
    with reading(options.workers) as read:
        records = run_trials(pipe, work, trials, chunks, options.batch, world is not None, tell, read)
    reference = records[trials[0].name]
    videos = min(options.batch, seeds)
    caches = [
        _entry(pipe, trial, records[trial.name], reference, videos, world is not None) for trial in trials
    ]
    if world is not None:
        per_bin = QUICK_ABSENCES if options.quick else ABSENCES
        for cache, recalled in zip(
            caches, _recalls(pipe, world, trials, per_bin, options.batch, tell), strict=True
        ):
            cache["recall"] = recalled
    device = pipe.transformer.device.type
    report = {
        "hardware": hardware(device),
        "model": options.model,
        "world": str(pipe.config.prompt_grammar).removeprefix("bounce:") if world else None,
        "device": device,
        "seeds": seeds,
        "chunks": chunks,
        "batch": videos,
        "reference": trials[0].name,
        "probed_chunks": sorted(reference.attention),
        "never_full": [trial.name for trial in trials if not evicting(pipe, trial.spec, chunks)],
        "caches": caches,
    }
    report["conclusions"] = conclusions(caches)
    if not options.quick if options.controls is None else options.controls:
        report["controls"] = _controls(pipe, world, chunks, max(2, options.batch), tell)
        report["controls_pass"] = all(worked(control) for control in report["controls"].values())
    found: dict[str, Any] = finite(report)
    return found


def _trials(pipe: CausalVideoPipeline, texts: Sequence[str]) -> list[Trial]:
    """The model's own cache, and every spec once.

    Raises:
        CacheSpecError: one cannot be read, or does not fit the model.
    """
    own = pipe.default_cache()
    specs = [own]
    for text in texts:
        changes = CacheSpec.parse(text)
        given = {name: getattr(changes, name) for name in changes.model_fields_set}
        spec = CacheSpec.of(own.model_dump(exclude_unset=True) | given)
        spec.capacity(pipe.entry.chunk_frames)
        if spec not in specs:
            specs.append(spec)
    return [Trial(str(spec), spec) for spec in specs]


def work_of(world: World | None, seeds: int, chunks: int) -> list[Work]:
    """Videos to make: scenes of the embedded world, or SENTENCES in turn."""
    if world is None:
        return [FreeTask(SENTENCES[i % len(SENTENCES)], 1000 + i) for i in range(seeds)]
    return [*tasks(seeds, world, chunks, mix=MIX)]


def _entry(
    pipe: CausalVideoPipeline, trial: Trial, record: Record, reference: Record, videos: int, judged: bool
) -> dict[str, Any]:
    """One cache of the report.

    `bytes` (per video; a latent frame's over all layers), `sampled_scores` of a video's chunk (`ChunkStats`),
    `time`, `attention_error` and `latent_psnr_db` with the reference's history, `divergence` and `picture` of
    free runs; in the embedded world `metrics`, `difference` to the reference's, `identity_difference` by
    chunk and `breaks_at_chunk`.
    """
    spec, attention = trial.spec, record.attention_by_video
    by_layer, (error, low, high) = attention.mean(0), bootstrap_ci(attention.mean(1))
    ratios = np.array(record.seconds) / np.array(reference.seconds)
    diverged = [chunk for chunk in record.diverged if chunk is not None]
    entry: dict[str, Any] = {
        "spec": trial.name,
        "settings": spec.model_dump(),
        "lossy_pages_read": record.lossy_pages_read,
        "sampled_scores": record.sampled_scores / sum(map(len, record.picture["luma"])),
        "bytes": _bytes(pipe, spec, record, videos),
        "time": {
            "chunk_ms": 1e3 * float(np.median(record.seconds)),
            "ratio": float(np.median(ratios)),
        },
        "attention_error": {
            "value": error,
            "ci95": [low, high],
            "by_layer": by_layer.tolist(),
            "worst": float(by_layer.max()),
            "worst_layer": int(by_layer.argmax()),
        },
        "latent_psnr_db": {
            "value": record.latent_psnr(),
            "by_chunk": {str(chunk): record.latent_psnr(chunk) for chunk in record.latent_error},
        },
        "identical": all(error == 0 for errors in record.latent_error.values() for error in errors),
        "divergence": {
            "median_chunk": record.median_divergence,
            "never": 1 - len(diverged) / len(record.diverged),
            "chunks": record.diverged,
        },
        "picture": {name: _paired(*(_per_video(r, name) for r in (record, reference))) for name in PICTURE},
    }
    return entry | _judged(spec, record, reference) if judged else entry


def _per_video(record: Record, name: str) -> list[float]:
    """Drift as far as the last chunk; flicker on the whole."""
    return [mean_known(x) if name == "flicker" else float(x[-1]) for x in record.picture[name]]


def _paired(ours: Sequence[float], theirs: Sequence[float]) -> dict[str, Any]:
    difference = value_of(paired_bootstrap(ours, theirs))
    return value_of(bootstrap_ci(ours)) | {"difference": difference}


def _bytes(pipe: CausalVideoPipeline, spec: CacheSpec, record: Record, videos: int) -> dict[str, Any]:
    own = pipe.default_cache()
    latent = latent_size(pipe.entry, *pixel_size(pipe.entry, None, None))
    frames = pipe.entry.chunk_frames
    geometry = CacheGeometry.of_model(pipe.transformer.config, *latent, frames, videos)
    plain = CacheSpec.of(own.model_dump(exclude_unset=True) | {"format": "bf16"})
    caches = 1 + (pipe.schedule.guidance != 1)
    bf16 = caches * planned_bytes(plain, geometry, pipe.transformer.dtype)
    per_frame = record.kv_bytes / spec.capacity(frames)
    return {
        "predicted": record.planned_bytes / videos,
        "resident": record.kv_bytes / videos,
        "per_frame": per_frame / videos,
        "bf16": bf16 / videos,
        "fewer_per_frame": bf16 / own.capacity(frames) / per_frame,
        "fewer": bf16 / record.kv_bytes,
        "live": record.live_bytes / videos,
        "allocated": None if record.allocated_bytes is None else record.allocated_bytes / videos,
    }


# --- in the embedded world ---


def _judged(spec: CacheSpec, record: Record, reference: Record) -> dict[str, Any]:
    ours = Results(record.metrics, record.lossy_pages_read)
    theirs = Results(reference.metrics, reference.lossy_pages_read)
    pairs = zip(ours.curve("identity").T, theirs.curve("identity").T, strict=True)
    identity = [paired_bootstrap(a, b) for a, b in pairs]
    return {
        "metrics": summary(ours),
        "difference": {name: value_of(_difference(ours, theirs, name)) for name in PER_CHUNK},
        "identity_difference": by_chunk(identity),
        "breaks_at_chunk": breaking_chunk([high for _, _, high in identity]),
    }


def _difference(ours: Results, theirs: Results, name: str) -> tuple[float, float, float]:
    """Of the means over each rollout's chunks."""
    a, b = ([mean_known(row) for row in results.curve(name)] for results in (ours, theirs))
    return paired_bootstrap(a, b)


def breaking_chunk(highs: Sequence[float]) -> int | None:
    """The first of BREAKS_FOR chunks running in which the upper end of an interval is below 0."""
    for chunk in range(len(highs) - BREAKS_FOR + 1):
        if all(high < 0 for high in highs[chunk : chunk + BREAKS_FOR]):
            return chunk
    return None


def _recalls(
    pipe: CausalVideoPipeline, world: World, trials: Sequence[Trial], per_bin: int, batch: int, tell: Tell
) -> list[dict[str, Any]]:
    """Per trial `by_gap` with the share that came back right and its paired `difference` to the reference's,
    the same of all, and `breaks_after_frames`: the shortest gaps at which that is surely negative."""
    absent = absences(world, per_bin)
    right = recall(pipe, absent, [trial.spec for trial in trials], batch, tell)
    reference = by_gap(absent, right[0])
    found = []
    for mine in right:
        bins = by_gap(absent, mine)
        shares = {gap: _paired(rows, reference[gap]) | {"returns": len(rows)} for gap, rows in bins.items()}
        broken = (gap for gap, share in shares.items() if share["difference"]["ci95"][1] < 0)
        first = next(broken, None)
        found.append(
            _paired(mine, right[0])
            | {"returns": len(mine), "by_gap": shares}
            | {"breaks_after_frames": int(first.split("-")[0]) if first else None}
        )
    return found


# --- negative controls ---


def _controls(
    pipe: CausalVideoPipeline, world: World | None, chunks: int, batch: int, tell: Tell
) -> dict[str, Any]:
    """What each cache of MISREAD_CACHES moves, and what an A/A run does.

    A broken cache must raise the attention error of the same rollouts by MOVED_Z standard errors and beyond
    STILL_ERROR, and in the embedded world move its metric of EXPECTED as far, if it has one. A/A is the
    unbroken cache with other segments of scratch in other batches: its attention error must stay below
    STILL_ERROR, and none of the metrics may move that far.
    """
    chunks = min(chunks, CONTROL_CHUNKS)
    spec = pipe.default_cache()
    if world is None:
        work = work_of(None, CONTROL_ROLLOUTS, chunks)
    else:
        work = [*tasks(CONTROL_ROLLOUTS, world, chunks, seed=5000, mix=CONTROL_MIX)]
    honest = Trial("honest", spec)
    broken = [Trial(name, spec, kind) for name, kind in MISREAD_CACHES.items()]
    judged = world is not None
    records = run_trials(pipe, work, [honest, *broken], chunks, batch, judged, tell)
    other = Trial("a_a", spec.model_copy(update={"segment": spec.segment + 1}))
    again = run_trials(pipe, work, [honest, other], chunks, max(2, batch - 3), judged, tell)
    limit = STILL_ERROR[pipe.transformer.device.type]
    verdicts = {"a_a": judge_still(again["a_a"], records["honest"], judged, limit)}
    for trial in broken:
        verdicts[trial.name] = judge_broken(trial.name, records, judged, limit)
    return verdicts


def judge_still(again: Record, honest: Record, judged: bool, limit: float) -> dict[str, Any]:
    """Has A/A moved nothing? See `_controls`."""
    worst = float(again.attention_by_video.max())
    verdict = {"still": worst < limit, "attention_error": worst, "limit": limit}
    if judged:
        repetition = judge_repetition(Results(again.metrics, 0), Results(honest.metrics, 0))
        verdict |= repetition | {"still": verdict["still"] and repetition["still"]}
    return verdict


def judge_broken(name: str, records: Mapping[str, Record], judged: bool, limit: float) -> dict[str, Any]:
    """Has a broken cache moved what it must? See `_controls`."""
    errors = records[name].attention_by_video.mean(1) - records["honest"].attention_by_video.mean(1)
    mean = float(errors.mean())
    spread = float(errors.std(ddof=1)) / math.sqrt(len(errors))
    z = mean / spread if spread else math.copysign(math.inf, mean) if mean else 0.0
    seen = z >= MOVED_Z and mean > limit
    verdict: dict[str, Any] = {"attention_error": mean, "attention_z": z, "moved": seen}
    if judged and name in EXPECTED:
        run, honest = (Results(records[key].metrics, 0) for key in (name, "honest"))
        world = judge(name, run, honest, 0)
        verdict |= world | {"moved": seen and world["moved"]}
    return verdict
