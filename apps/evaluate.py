"""`vidkv eval world`: rollouts of the embedded world against what the prompt and physics say."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vidkv.apps.bench import hardware
from vidkv.apps.controls import BROKEN_CACHES, EXPECTED
from vidkv.cache import CacheSpec, KVCache
from vidkv.errors import InputError, VidkvError
from vidkv.models.bounce.metrics import (
    FIRST_CHUNK,
    LATER_CHUNK,
    RolloutMetrics,
    bootstrap_ci,
    brightness_creep,
    frozen,
    measure,
    paired_bootstrap,
    returns_by_gap,
)
from vidkv.models.bounce.parser import parse_frames
from vidkv.models.bounce.prompts import WORLDS, Family, ScenePrompt, World
from vidkv.models.bounce.world import sample_scenes
from vidkv.pipeline import CausalVideoPipeline
from vidkv.rollout import Rollout

BATCH = 8
ROLLOUTS, CHUNKS = 200, 21
# nine chunks are 27 latent frames: pages leave a window of 21
QUICK_ROLLOUTS, QUICK_CHUNKS = 6, 9
CONTROL_ROLLOUTS = 16
MOVED_Z = 5.0
MIX: tuple[tuple[Family, bool], ...] = (
    ("bounce", False),
    ("bounce", False),
    ("occluder", False),
    ("camera", False),
    ("still", False),
    ("bounce", True),
)
# in these alone every metric has something to say: all move, and in full view
CONTROL_MIX: tuple[tuple[Family, bool], ...] = (("bounce", False),)
PER_CHUNK = (
    "identity", "colour", "shape", "colour_delta_e", "count_error", "luminance_drift", "trajectory_rmse",
    "speed_error", "teleports", "judged",
)  # fmt: skip
Tell = Callable[[int, int, str], None]


@dataclass(frozen=True)
class Task:
    """One rollout to make: a scene, its seed, and when its event is told."""

    prompt: ScenePrompt
    seed: int
    event_chunk: int | None

    def text(self, chunk: int) -> str:
        """The prompt of a chunk."""
        if self.prompt.event is None:
            return self.prompt.text()
        plain = ScenePrompt(self.prompt.objects, self.prompt.family)
        told = self.event_chunk is not None and chunk >= self.event_chunk
        return (self.prompt if told else plain).text()


@dataclass
class Results:
    """Metrics of the same tasks under one setting."""

    metrics: list[RolloutMetrics]
    lossy_pages_read: int

    def curve(self, name: str) -> np.ndarray:
        """(rollouts, chunks) of one per-chunk metric."""
        return np.stack([getattr(m, name) for m in self.metrics])


def tasks(
    number: int,
    world: World,
    chunks: int,
    seed: int = 1000,
    mix: Sequence[tuple[Family, bool]] = MIX,
) -> list[Task]:
    """Held-out scenes in the proportions of `mix`, the same for every setting."""
    generator = torch.Generator().manual_seed(seed)
    event = torch.tensor([0])
    made = []
    for i in range(number):
        family, happens = mix[i % len(mix)]
        events = event if happens else None
        prompt = sample_scenes(1, generator, family, events, world).prompts()[0]
        made.append(Task(prompt, seed + i, max(2, chunks // 2) if happens else None))
    return made


def evaluate_world(
    model: str,
    rollouts: int | None,
    chunks: int | None,
    kv_format: str,
    quick: bool,
    controls: bool,
    tell: Tell,
    guidance: float | None = None,
) -> dict[str, Any]:
    """Roll the tasks out with the model's own cache and with `kv_format`, and compare.

    Args:
        rollouts, chunks: None for ROLLOUTS of CHUNKS.
        quick: QUICK_ROLLOUTS of QUICK_CHUNKS where none are given.
        guidance: scale of the first chunk's guidance instead of the model's own; 1 for none.

    Returns:
        `identity`, `colour_delta_e`, `count_error` and the other per-chunk metrics of the unquantized
        cache by chunk, each with `value` and `ci95`; `teleports_per_frame`; `reappearance` by gap in
        frames; `event_latency_chunks`; `quantized`: the same metrics under `kv_format` and paired
        differences; with `controls`, what each broken setting moves, see `_controls`, and
        `controls_pass`. A number that is not known or not finite is None.

    Raises:
        InputError: the model is not one of the embedded world, or the format is not lossy.
        VidkvError: no quantized page was read, so nothing was compared.
    """
    pipe = CausalVideoPipeline.from_pretrained(model)
    grammar = pipe.config.prompt_grammar or ""
    if not grammar.startswith("bounce:"):
        raise InputError(f"model={model!r} is no model of the embedded world; its truth is unknown")
    if guidance is not None:
        pipe.register_to_config(first_chunk_guidance=guidance)
    rollouts = rollouts or (QUICK_ROLLOUTS if quick else ROLLOUTS)
    chunks = chunks or (QUICK_CHUNKS if quick else CHUNKS)
    world = WORLDS[grammar.removeprefix("bounce:")]
    spec = pipe.default_cache()
    lossy = CacheSpec.of(spec.model_dump(exclude_unset=True) | {"format": kv_format})
    work = tasks(rollouts, world, chunks)
    plain = _roll(pipe, work, chunks, spec, tell, "unquantized")
    coded = _roll(pipe, work, chunks, lossy, tell, kv_format)
    if not coded.lossy_pages_read:
        raise VidkvError(f"no quantized page was read with {lossy}: nothing was compared; check the format")
    report: dict[str, Any] = {
        "hardware": hardware("cpu"),
        "model": model,
        "world": grammar.removeprefix("bounce:"),
        "rollouts": rollouts,
        "chunks": chunks,
        "cache": str(spec),
    }
    report |= summary(plain)
    report["quantized"] = {"cache": str(lossy), "lossy_pages_read": coded.lossy_pages_read} | summary(coded)
    report["paired_difference"] = {
        name: by_chunk(
            paired_bootstrap(a, b) for a, b in zip(coded.curve(name).T, plain.curve(name).T, strict=True)
        )
        for name in ("identity", "colour_delta_e", "trajectory_rmse")
    }
    if controls:
        report["controls"] = _controls(pipe, world, chunks, spec, tell)
        report["controls_pass"] = all(worked(control) for control in report["controls"].values())
    return finite(report)


def _roll(
    pipe: CausalVideoPipeline,
    work: Sequence[Task],
    chunks: int,
    spec: CacheSpec,
    tell: Tell,
    name: str,
    kind: type[KVCache] = KVCache,
    alter: Callable[[np.ndarray], np.ndarray] | None = None,
    batch: int = BATCH,
) -> Results:
    """Roll all tasks out in batches, parse and measure them.

    Args:
        kind: the class of cache.
        alter: changes the pixels of a rollout (frames, 64, 64, 3) before they are parsed.
        batch: videos at a time.
    """
    metrics, lossy = [], 0
    for start in range(0, len(work), batch):
        group = work[start : start + batch]
        frames, pages = roll_group(pipe, group, chunks, spec, kind)
        lossy += pages
        for task, video in zip(group, frames.numpy(), strict=True):
            parsed = parse_frames(alter(video) if alter else video)
            metrics.append(measure(parsed, task.prompt, event_chunk=task.event_chunk))
        tell(min(start + batch, len(work)), len(work), f"{name} rollouts")
    return Results(metrics, lossy)


def roll_group(
    pipe: CausalVideoPipeline, group: Sequence[Task], chunks: int, spec: CacheSpec, kind: type[KVCache]
) -> tuple[Tensor, int]:
    """Videos of some tasks in one batch, (tasks, frames, 64, 64, 3) uint8, and lossy pages read."""
    rollout = begin(pipe, [task.seed for task in group], spec, kind)
    parts, texts, lossy = [], None, 0
    for chunk in range(chunks):
        wanted = [task.text(chunk) for task in group]
        if wanted != texts:
            pipe.set_prompt(rollout, wanted)
            texts = wanted
        made = rollout.step_chunk()
        assert made.frames is not None
        parts.append(made.frames)
        lossy += made.stats.lossy_pages_read
    return torch.cat(parts, 1), lossy


def begin(
    pipe: CausalVideoPipeline, seeds: Sequence[int], spec: CacheSpec, kind: type[KVCache], decode: bool = True
) -> Rollout:
    """A rollout of one video per seed, without a prompt yet, over a cache of some class."""
    rollout = pipe.rollout(batch=len(seeds), seeds=seeds, cache=spec, decode=decode)
    if kind is not KVCache:
        rollout.cache = kind(spec, rollout.cache.geometry, rollout.device, rollout.dtype)
    return rollout


def summary(results: Results) -> dict[str, Any]:
    """Curves, jumps, returns and latencies with their intervals; see `evaluate_world`."""
    found: dict[str, Any] = {
        name: by_chunk(bootstrap_ci(column) for column in results.curve(name).T) for name in PER_CHUNK
    }
    per_rollout = [mean_known(m.teleports) for m in results.metrics]
    found["teleports_per_frame"] = value_of(bootstrap_ci(per_rollout))
    gaps = returns_by_gap([item for m in results.metrics for item in m.returns])
    found["reappearance"] = {
        f"{low}-{high - 1}": value_of(bootstrap_ci(right)) | {"returns": len(right)}
        for (low, high), right in gaps.items()
    }
    latencies = [m.event_latency for m in results.metrics if not math.isnan(m.event_latency)]
    obeyed = [value for value in latencies if math.isfinite(value)]
    found["event_latency_chunks"] = value_of(bootstrap_ci(obeyed)) | {
        "events": len(latencies),
        "never": len(latencies) - len(obeyed),
    }
    return found


def _controls(
    pipe: CausalVideoPipeline,
    world: World,
    chunks: int,
    spec: CacheSpec,
    tell: Tell,
    rollouts: int = CONTROL_ROLLOUTS,
) -> dict[str, Any]:
    """What each broken setting does to each metric, against the same rollouts unbroken.

    A/A repeats the scenes with what must not matter: other noise, other batches and other segments of
    scratch. `z` is the paired mean difference over its standard error.

    Returns:
        Per control `metric` (its own), that one's `difference` and `z`, whether it `moved` as EXPECTED by
        at least MOVED_Z, and `metrics` with all of them; for `a_a` whether it stayed `still`: no metric
        moved that far.
    """
    work = tasks(rollouts, world, chunks, seed=5000, mix=CONTROL_MIX)
    honest = _roll(pipe, work, chunks, spec, tell, "honest")
    again = [replace(task, seed=task.seed + 100_000) for task in work]
    other = spec.model_copy(update={"segment": spec.segment + 1})
    repeated = _roll(pipe, again, chunks, other, tell, "A/A", batch=BATCH - 3)
    runs = {name: _roll(pipe, work, chunks, spec, tell, name, kind) for name, kind in BROKEN_CACHES.items()}
    middle = chunks // 2
    still = FIRST_CHUNK + (middle - 1) * LATER_CHUNK
    for name, alter in (
        ("frozen_frames", partial(frozen, start=still)),
        ("brightness_creep", brightness_creep),
    ):
        runs[name] = _roll(pipe, work, chunks, spec, tell, name, alter=alter)
    verdicts = {name: judge(name, run, honest, middle) for name, run in runs.items()}
    return {"a_a": judge_repetition(repeated, honest)} | verdicts


def judge(name: str, run: Results, honest: Results, breaking_chunk: int) -> dict[str, Any]:
    """Has a control moved its own metric as far as it must? See `_controls` for what is returned."""
    expected = EXPECTED[name]
    one = slice(breaking_chunk, breaking_chunk + 1)
    shifts = _shifts(run, honest, one if expected.breaking_chunk_only else slice(None))
    own = shifts[expected.metric]
    moved = expected.direction * own["z"] >= MOVED_Z
    return {"metric": expected.metric, **own, "moved": moved, "metrics": shifts}


def judge_repetition(run: Results, honest: Results) -> dict[str, Any]:
    """Has no metric moved where nothing was broken? See `_controls` for what is returned."""
    shifts = _shifts(run, honest, slice(None))
    known = [abs(shift["z"]) for shift in shifts.values() if not math.isnan(shift["z"])]
    return {"still": bool(known) and max(known) < MOVED_Z, "metrics": shifts}


def _shifts(a: Results, b: Results, chunks: slice) -> dict[str, dict[str, float]]:
    return {name: _shift(a.curve(name)[:, chunks], b.curve(name)[:, chunks]) for name in PER_CHUNK}


def worked(control: dict[str, Any]) -> bool:
    """Has a control done what it is there for?"""
    return bool(control["still"] if "still" in control else control["moved"])


def _shift(a: np.ndarray, b: np.ndarray) -> dict[str, float]:
    """Paired difference of rollout means, and how many standard errors it is."""
    pairs = np.array([mean_known(x) - mean_known(y) for x, y in zip(a, b, strict=True)])
    pairs = pairs[~np.isnan(pairs)]
    if len(pairs) < 2:
        return {"difference": math.nan, "z": math.nan}
    error = pairs.std(ddof=1) / math.sqrt(len(pairs))
    mean = float(pairs.mean())
    z = 0.0 if mean == 0 else mean / error if error else math.copysign(math.inf, mean)
    return {"difference": round(mean, 5), "z": round(float(z), 2)}


def finite(value: Any) -> Any:
    """The same without NaN and infinity, which JSON does not have."""
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, list):
        return [finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def by_chunk(intervals: Iterable[tuple[float, float, float]]) -> dict[str, Any]:
    return {str(chunk): value_of(interval) for chunk, interval in enumerate(intervals)}


def value_of(interval: tuple[float, float, float]) -> dict[str, Any]:
    """A mean and its interval for a report."""
    mean, low, high = (None if math.isnan(x) else round(x, 5) for x in interval)
    return {"value": mean, "ci95": [low, high]}


def mean_known(values: np.ndarray) -> float:
    """Mean of what is not NaN; NaN without any."""
    known = values[~np.isnan(values)]
    return float(known.mean()) if len(known) else math.nan


def table(report: dict[str, Any]) -> str:
    """The report as text: a few chunks of each curve, both settings side by side."""
    chunks = report["chunks"]
    shown = sorted({0, min(4, chunks - 1), min(9, chunks - 1), chunks // 2, chunks - 1})
    lines = [
        f"{report['rollouts']} rollouts of {chunks} chunks, world {report['world']}, {report['hardware']}"
    ]
    lines.append("metric (chunk)".ljust(28) + "".join(f"{c:>18}" for c in shown))
    for name in PER_CHUNK:
        for label, part in (
            ("", report),
            (" " + report["quantized"]["cache"].split(",")[0], report["quantized"]),
        ):
            cells = "".join(f"{_cell(part[name][str(c)]):>18}" for c in shown)
            lines.append(f"{name}{label}".ljust(28) + cells)
    for gap, value in report["reappearance"].items():
        lines.append(f"reappearance after {gap} frames: {_cell(value)} of {value['returns']}")
    lines.append(f"teleports per frame: {_cell(report['teleports_per_frame'])}")
    latency = report["event_latency_chunks"]
    lines.append(
        f"event latency: {_cell(latency)} chunks, {latency['never']} of {latency['events']} never obeyed"
    )
    if "controls" in report:
        lines += [control_line(name, control) for name, control in report["controls"].items()]
        lines.append(f"controls: {'pass' if report['controls_pass'] else 'FAIL'}")
    return "\n".join(lines)


def control_line(name: str, control: dict[str, Any]) -> str:
    verdict = "ok  " if worked(control) else "FAIL"
    if "still" in control:
        known = [abs(shift["z"]) for shift in control["metrics"].values() if shift["z"] is not None]
        largest = max(known, default=None)
        return f"{verdict} control {name}: largest |z|={largest} of any metric, must stay under {MOVED_Z:g}"
    return (
        f"{verdict} control {name}: {control['metric']} moved by {control['difference']}, z={control['z']}, "
        f"must reach {EXPECTED[name].direction * MOVED_Z:+g}"
    )


def _cell(value: dict[str, Any]) -> str:
    if value["value"] is None:
        return "-"
    low, high = value["ci95"]
    return f"{value['value']:.3f} [{low:.2f},{high:.2f}]"
