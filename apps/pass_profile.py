"""Where the time of a transformer pass goes, from outside: hooks, and torch's profiler."""

from __future__ import annotations

import json
import math
import re
import statistics
import tempfile
import time
from bisect import bisect_right
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile, record_function

from vidkv.apps.bench import rounded, synchronize
from vidkv.models.wan import Attend, CausalWanTransformer3DModel, CrossAttention
from vidkv.schedule import FlowSchedule

PROFILED_STEPS = 4
"""Denoising steps of the chunk that is profiled, at most: more of them are more of the same."""
SELF, LINEARS, CROSS, ELEMENTWISE, WRITE = PHASES = (
    "self-attention",
    "linears",
    "cross-attention",
    "elementwise",
    "cache write",
)
"""Parts of a pass: rotation and read; products of q, k, v, out and ffn, cross-attention's included;
cross-attention without them; norms, modulation, activations; writes and the stock loop's shift."""
GAPS = "gaps"
"""A pass's time in which the device does nothing."""
DENOISE, CLEAN, PASS = "denoise", "clean", "pass"
RANGE = "bench:"

Seconds = dict[str, float]


class Loop(Protocol):
    """What is measured: `Rollout` and `StockLoop`."""

    schedule: FlowSchedule

    def denoise(self) -> Tensor: ...
    def append(self, latents: Tensor) -> Any: ...


@dataclass(frozen=True)
class PassProfile:
    """Mean seconds of a transformer pass.

    Attributes:
        pass_s: the whole; on a GPU between two events on the device, without the profiler.
        phases_s: by name of `PHASES`: what the device works; on a CPU with the profiler's share.
    """

    pass_s: float
    phases_s: Seconds

    @property
    def gaps_s(self) -> float:
        """What is left of the pass: the device waits for the host."""
        return max(0.0, self.pass_s - sum(self.phases_s.values()))

    def as_dict(self) -> dict[str, Any]:
        parts = {name: rounded(value) for name, value in {**self.phases_s, GAPS: self.gaps_s}.items()}
        return {"pass_s": rounded(self.pass_s), "phases_s": parts}


def profile_passes(
    loop: Loop, transformer: CausalWanTransformer3DModel, device: torch.device, compiled: bool
) -> dict[str, PassProfile]:
    """Break one chunk's passes down: the mean of its denoising passes, and its clean pass.

    The chunk takes at most `PROFILED_STEPS` steps. Of compiled blocks only self-attention is marked; the rest
    is told apart by the names of its kernels.
    """
    own = loop.schedule
    steps = len(own.sigmas(1))
    loop.schedule = own if steps <= PROFILED_STEPS else own.with_steps(PROFILED_STEPS)
    try:
        with pass_timer(transformer, device) as timer:
            latents = loop.denoise()
            denoising = timer.read()
            loop.append(latents)
            clean = timer.read()
        with labelled(transformer, compiled), _profiler(device) as profiler:
            with record_function(RANGE + DENOISE):
                latents = loop.denoise()
            with record_function(RANGE + CLEAN):
                loop.append(latents)
            synchronize(device)
    finally:
        loop.schedule = own
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(file))
        traced = phase_seconds(json.loads(file.read_text())["traceEvents"])
    unprofiled = {DENOISE: denoising, CLEAN: clean}
    profiles = {}
    for kind, (phases, span_s) in traced.items():
        # a CPU's operators are slowed by the profiler, so that only the profiled pass can be their sum
        pass_s = statistics.mean(unprofiled[kind]) if device.type == "cuda" else span_s
        profiles[kind] = PassProfile(pass_s, phases)
    return profiles


def _profiler(device: torch.device) -> profile:
    activities = [ProfilerActivity.CPU]
    if device.type == "cuda":
        activities.append(ProfilerActivity.CUDA)
    return profile(activities=activities)


class PassTimer:
    """Times of a module's calls, on a GPU by events that nobody waits for until they are read."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.marks: list[Any] = []

    def mark(self, *_: Any) -> None:
        if self.device.type == "cuda":
            make: Any = torch.cuda.Event
            event = make(enable_timing=True)
            event.record()
            self.marks.append(event)
        else:
            self.marks.append(time.perf_counter())

    def read(self) -> list[float]:
        """Seconds of the calls since the last reading."""
        synchronize(self.device)
        pairs = list(zip(self.marks[::2], self.marks[1::2], strict=True))
        self.marks = []
        if self.device.type == "cuda":
            return [start.elapsed_time(end) / 1e3 for start, end in pairs]
        return [end - start for start, end in pairs]


@contextmanager
def pass_timer(module: nn.Module, device: torch.device) -> Iterator[PassTimer]:
    timer = PassTimer(device)
    hooks = module.register_forward_pre_hook(timer.mark), module.register_forward_hook(timer.mark)
    try:
        yield timer
    finally:
        for hook in hooks:
            hook.remove()


class _Marked:
    """An `Attention` whose calls are marked for the profiler, and their cache writes within them."""

    def __init__(self, attention: Any) -> None:
        self.attention = attention
        # `CachedAttention` writes into its cache, `StockAttention` itself
        self.writer = getattr(attention, "cache", attention)
        self.writer.write = _ranged(WRITE, self.writer.write)

    def layer(self, index: int) -> Attend:
        return _ranged(SELF, self.attention.layer(index))

    def unmark(self) -> None:
        del self.writer.write


def _ranged(label: str, call: Callable[..., Any]) -> Callable[..., Any]:
    def marked(*args: Any) -> Any:
        with record_function(RANGE + label):
            return call(*args)

    return marked


@contextmanager
def labelled(transformer: nn.Module, compiled: bool) -> Iterator[None]:
    """Within this context the transformer's passes, and phases in them, are marked for the profiler."""
    hooks, marked = [], []

    def mark_attention(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        marked.append(_Marked(args[-1]))
        return *args[:-1], marked[-1]

    def unmark_attention(*_: Any) -> None:
        marked.pop().unmark()

    hooks += _mark(transformer, PASS)
    hooks.append(transformer.register_forward_pre_hook(mark_attention))
    hooks.append(transformer.register_forward_hook(unmark_attention))
    if not compiled:
        kinds = ((nn.Linear, LINEARS), (CrossAttention, CROSS), (nn.RMSNorm, ELEMENTWISE))
        for module in transformer.modules():
            for kind, label in kinds:
                if isinstance(module, kind):
                    hooks += _mark(module, label)
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _mark(module: nn.Module, label: str) -> list[Any]:
    """Hooks that put a module's calls into a range of the profiler."""
    opened: list[Any] = []

    def enter(*_: Any) -> None:
        opened.append(record_function(RANGE + label))
        opened[-1].__enter__()

    def leave(*_: Any) -> None:
        opened.pop().__exit__(None, None, None)

    return [module.register_forward_pre_hook(enter), module.register_forward_hook(leave)]


@dataclass(frozen=True)
class _Range:
    """A marked stretch of the host's time."""

    label: str
    start: float
    end: float
    parent: _Range | None

    def path(self) -> list[str]:
        """Its label and those around it, innermost first."""
        return [self.label, *(self.parent.path() if self.parent else [])]


def phase_seconds(events: Sequence[Mapping[str, Any]]) -> dict[str, tuple[Seconds, float]]:
    """Mean seconds per pass by phase, of denoising and clean passes, from a profiler's trace.

    A kernel belongs to the innermost range in which the host launched it, whenever it ran; without kernels,
    operators that no other operator called take their place. What belongs to no phase's range is told by its
    name. Work outside transformer passes (noise, solver) is left out.

    Args:
        events: of Chrome's trace format, in microseconds.

    Returns:
        Per kind of pass: the phases, and the host's time in the pass.
    """
    ranges = _ranges(events)
    starts = [one.start for one in ranges]
    sums: dict[str, Seconds] = {kind: dict.fromkeys(PHASES, 0.0) for kind in (DENOISE, CLEAN)}
    for name, at, duration in _work(events):
        path = _innermost(ranges, starts, at)
        if PASS in path and path[-1] in sums:
            phase = path[0] if path[0] in PHASES else _phase_by_name(name)
            sums[path[-1]][phase] += duration / 1e6
    passes = {
        kind: [r.end - r.start for r in ranges if r.label == PASS and r.path()[-1] == kind] for kind in sums
    }
    return {
        kind: (
            {name: value / len(passes[kind]) for name, value in phases.items()},
            statistics.mean(passes[kind]) / 1e6,
        )
        for kind, phases in sums.items()
        if passes[kind]
    }


def _ranges(events: Sequence[Mapping[str, Any]]) -> list[_Range]:
    """The bench's own ranges by start; those of one thread, so that they nest."""
    found = sorted(
        (e["ts"], -e["dur"], e["name"].removeprefix(RANGE))
        for e in events
        if e.get("cat") == "user_annotation" and e["name"].startswith(RANGE)
    )
    ranges: list[_Range] = []
    parent: _Range | None = None
    for start, negative, label in found:
        while parent and parent.end <= start:
            parent = parent.parent
        parent = _Range(label, start, start - negative, parent)
        ranges.append(parent)
    return ranges


def _innermost(ranges: Sequence[_Range], starts: Sequence[float], at: float) -> list[str]:
    """Labels around a moment, innermost first; none outside all ranges."""
    index = bisect_right(starts, at) - 1
    around: _Range | None = ranges[index] if index >= 0 else None
    while around and around.end < at:
        around = around.parent
    return around.path() if around else []


def _work(events: Sequence[Mapping[str, Any]]) -> Iterator[tuple[str, float, float]]:
    """(name, when the host asked for it, duration) of kernels and copies, or of a CPU's operators."""
    launches = {
        e["args"]["correlation"]: e["ts"]
        for e in events
        if e.get("cat") in ("cuda_runtime", "cuda_driver") and "correlation" in e.get("args", {})
    }
    kernels = [e for e in events if e.get("cat") in ("kernel", "gpu_memcpy", "gpu_memset")]
    if kernels:
        for e in kernels:
            at = launches.get(e["args"].get("correlation"))
            if at is not None:
                yield e["name"], at, e["dur"]
        return
    yield from _operators(events)


def _operators(events: Sequence[Mapping[str, Any]]) -> Iterator[tuple[str, float, float]]:
    """A CPU's operators that no other called, as in `_work`.

    Frames of compiled code (their names have no namespace) count for what lies between the operators in them:
    the loops that the compiler has fused.
    """
    operators = sorted((e["ts"], -e["dur"], e["name"]) for e in events if e.get("cat") == "cpu_op")
    end = -math.inf
    frames: list[list[float]] = []
    for start, negative, name in [*operators, (math.inf, 0.0, "::")]:
        while frames and frames[-1][1] <= start:
            began, _, own = frames.pop()
            yield "compiled", began, own
        if start < end or start == math.inf:
            continue
        if frames:
            frames[-1][2] += negative
        if "::" in name:
            end = start - negative
            yield name, start, -negative
        else:
            frames.append([start, start - negative, -negative])


ATTENTION_NAME = re.compile(r"flash|fmha|sdpa|attention", re.IGNORECASE)
PRODUCT_NAME = re.compile(r"gemm|nvjet|cutlass|cublas|xmma|(^|_|::)(add|b)?mm(_|$)", re.IGNORECASE)


def _phase_by_name(name: str) -> str:
    """Of a kernel outside self-attention."""
    if name.startswith("triton_"):
        # the compiler's own kernels are named after all that they stand beside, products and attention too
        return LINEARS if name.startswith("triton_tem_") else ELEMENTWISE
    if ATTENTION_NAME.search(name):
        return CROSS
    return LINEARS if PRODUCT_NAME.search(name) else ELEMENTWISE
