"""A sentence to a video file: `vidkv generate`."""

from __future__ import annotations

import contextlib
import hashlib
import resource
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any, Protocol

import torch

import vidkv
from vidkv.cache import CacheSpec
from vidkv.errors import (
    Cancelled,
    CheckpointError,
    InputError,
    OutputError,
    PromptError,
    ResourceError,
    VidkvError,
)
from vidkv.memory import pixel_size, plan_memory
from vidkv.models.checkpoints.folders import read_json, require_tokenizer
from vidkv.models.families.base import ModelEntry
from vidkv.models.registry import MODELS, canonical_prompt
from vidkv.models.vae import pixel_frames
from vidkv.pipeline import CausalVideoPipeline, chunks_for, find_model, frames_for
from vidkv.prompts import PromptSchedule
from vidkv.schedule import FlowSchedule
from vidkv.segments import (
    SegmentWriter,
    check_output,
    claim_folder,
    partial_video,
    rescue_segments,
    segments_folder,
    write_video,
)

if TYPE_CHECKING:
    from vidkv.rollout import Chunk

DEVICES = ("auto", "cpu", "cuda")
_LESS_MEMORY = "choose a smaller --window, --height or --width, or --kv-format int8"


@dataclass(frozen=True)
class Request:
    """What to make.

    Attributes:
        prompts: (second, text), the first at 0.
        cache: settings that differ from the model's defaults, by `CacheSpec` name.
        height, width: pixels; None for the model's own size.
        device: `cpu`, `cuda`, or `auto`.
    """

    prompts: tuple[tuple[float, str], ...]
    out: Path
    seconds: float
    seed: int = 0
    model: str = "bounce"
    cache: dict[str, Any] = field(default_factory=dict)
    height: int | None = None
    width: int | None = None
    steps: int | None = None
    device: str = "auto"


@dataclass(frozen=True)
class Plan:
    """A request that has been checked against the model, before its weights are read.

    Attributes:
        frames: pixel frames of the video.
        need_bytes: memory of the device at the peak, estimated.
    """

    request: Request
    entry: ModelEntry
    folder: Path
    schedule: PromptSchedule
    spec: CacheSpec
    device: str
    frames: int
    need_bytes: int

    @property
    def chunks(self) -> int:
        return chunks_for(self.frames, self.entry.chunk_frames)


class Reporter(Protocol):
    """Told of every finished chunk."""

    def __call__(self, chunk: Chunk, chunks: int, frames: int, elapsed_s: float) -> None: ...


def plan(request: Request) -> Plan:
    """Check everything that can be checked without weights.

    Raises:
        InputError, OutputError, CheckpointError, ResourceError: the first thing wrong, with its remedy.
    """
    check_output(request.out)
    if not 0 <= request.seed < 2**64:
        raise InputError(f"seed={request.seed} must lie between 0 and 2**64 - 1")
    folder = find_model(request.model)
    config = read_json(folder / "model_index.json")
    name = str(config.get("model", "bounce"))
    if name not in MODELS:
        raise CheckpointError(
            f"{folder / 'model_index.json'} names the model {name!r:.60}; known are {', '.join(MODELS)}"
        )
    entry = MODELS[name]
    require_tokenizer(folder / "tokenizer")
    grammar = config.get("prompt_grammar")
    schedule = PromptSchedule.of(request.prompts, canonical_prompt(str(grammar) if grammar else None))
    device = pick_device(request.device)
    frames = frames_for(request.seconds, entry.fps)
    _check_switches(schedule, entry, frames)
    if request.steps is not None:
        FlowSchedule().with_steps(request.steps)
    spec = cache_spec(entry, request.cache, device)
    size = pixel_size(entry, request.height, request.width)
    need_bytes = plan_memory(entry, spec, *size, dtype=compute_dtype(device)).peak_bytes
    free_bytes = available_bytes(device)
    if free_bytes is not None and need_bytes > free_bytes:
        raise ResourceError(
            f"the video needs {_mb(need_bytes)} of memory (window={spec.window}, format={spec.format}, "
            f"{size[1]}x{size[0]}), {device} has {_mb(free_bytes)} free; {_LESS_MEMORY}"
        )
    return Plan(request, entry, folder, schedule, spec, device, frames, need_bytes)


def _check_switches(schedule: PromptSchedule, entry: ModelEntry, frames: int) -> None:
    """Refuse a prompt after the beginning of the last chunk: it would never be shown."""
    second = schedule.entries[-1][0]
    before = (chunks_for(frames, entry.chunk_frames) - 1) * entry.chunk_frames
    last = pixel_frames(before) / entry.fps
    if second > last:
        raise PromptError(
            f"the prompt at second {second:g} would never be shown: prompts change between chunks, and the "
            f"last chunk of {frames / entry.fps:g} seconds begins at second {last:g}; give an earlier second "
            "or more --seconds"
        )


def check_device(name: str) -> None:
    """Whether it is there is another question, see `pick_device`.

    Raises:
        InputError: a device that vidkv does not know.
    """
    if name not in DEVICES:
        raise InputError(f"device={name!r:.60}; choose auto, cpu or cuda")


def compute_dtype(device: str) -> torch.dtype:
    """What networks compute in on a device."""
    return torch.float32 if device == "cpu" else torch.bfloat16


def available_bytes(device: str) -> int | None:
    """Memory that can be had without swapping; None where the system does not say."""
    if device == "cuda":
        return int(torch.cuda.mem_get_info()[0])
    with contextlib.suppress(OSError):
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    return None


def pick_device(name: str) -> str:
    """`auto` is the GPU where there is one.

    Raises:
        InputError: an unknown device, or `cuda` without a GPU.
    """
    check_device(name)
    available = torch.cuda.is_available()
    if name == "auto":
        return "cuda" if available else "cpu"
    if name == "cuda" and not available:
        raise InputError("device=cuda, but torch sees no GPU here; use --device cpu or see `vidkv doctor`")
    return name


def cache_spec(entry: ModelEntry, changes: dict[str, Any], device: str) -> CacheSpec:
    """The model's default cache with some settings changed."""
    defaults = {
        "format": "fp32" if device == "cpu" else "bf16",
        "window": entry.window,
        "sink": entry.sink,
        "positions": entry.positions,
    }
    spec = CacheSpec.of(defaults | changes)
    spec.capacity(entry.chunk_frames)
    return spec


def generate(plan: Plan, report: Reporter, started: float) -> dict[str, Any]:
    """Make the video of a plan.

    Segments collect in `OUT.segments` beside the file and the finished mp4 appears under its name at
    the end. Stopped early, by Ctrl-C, SIGTERM or an error, what is there is kept as `NAME.partial.mp4`;
    stopped while the file is joined, it is finished.

    Args:
        started: `time.perf_counter()` when the command began, for the time to the first frame.

    Returns:
        The JSON object of `vidkv generate --json`. Its `first_frame_s` counts from `started`, its
        `end_to_end_fps` from when the model has been loaded, with encoding and writing.

    Raises:
        Stopped: by a signal; carries the partial file.
        OutputError: another run writes to the same file, or it cannot be written.
        ResourceError: memory ran out.
    """
    request, entry = plan.request, plan.entry
    height, width = pixel_size(entry, request.height, request.width)
    metadata = _settings(plan, height, width)
    folder = segments_folder(request.out)
    with claim_folder(folder):
        with _naming_shortage(plan):
            dtype = compute_dtype(plan.device)
            pipe = CausalVideoPipeline.from_pretrained(plan.folder, dtype=dtype).to(plan.device)
        pipe.set_progress_bar_config(disable=True)
        rescue_segments(folder, request.out)
        writer = SegmentWriter(folder, entry.fps, height, width)
        tally = _Tally(plan, started)
        with _stopping() as stopped:
            try:
                with _naming_shortage(plan):
                    stream = pipe.stream(
                        list(plan.schedule.entries), height, width, num_frames=plan.frames,
                        seed=request.seed, num_inference_steps=request.steps, cache=plan.spec,
                        on_step=stopped.check,
                    )  # fmt: skip
                    for chunk in stream:
                        writer.write(chunk.index, chunk.frames[0])
                        tally.add(chunk)
                        report(chunk, plan.chunks, tally.frames, tally.elapsed_s)
                        stopped.check(chunk.index, -1)
            except (VidkvError, RuntimeError) as error:
                kept = keep_partial(writer, request.out, entry.fps, metadata)
                if isinstance(error, Cancelled):
                    raise Stopped(stopped.signal, kept) from None
                if isinstance(error, VidkvError):
                    raise type(error)(f"{error}{_kept_note(kept)}") from error
                error.add_note(_kept_note(kept).removeprefix("; "))
                raise
            info = write_video(writer.paths(), request.out, entry.fps, metadata)
            writer.drop_from(0)
    return tally.result() | {"out": str(request.out), "frames": info.frames, "seconds": info.seconds}


class Stopped(Exception):
    """The user stopped a run.

    Attributes:
        signal: its number.
        kept: the partial video, or None when no chunk was finished.
    """

    def __init__(self, number: int, kept: Path | None) -> None:
        super().__init__(f"stopped{_kept_note(kept)}")
        self.signal, self.kept = number, kept


def keep_partial(writer: SegmentWriter, out: Path, fps: int, metadata: dict[str, str]) -> Path | None:
    """Join what there is to a playable `NAME.partial.mp4`; the segments stay if that fails."""
    segments = writer.paths()
    if not segments:
        return None
    partial = partial_video(out)
    try:
        write_video(segments, partial, fps, metadata | {"partial": "true"})
    except OutputError:
        return segments_folder(out)
    with contextlib.suppress(OutputError):
        writer.drop_from(0)
    return partial


@contextlib.contextmanager
def _naming_shortage(plan: Plan) -> Iterator[None]:
    """Turn what allocators raise into one line that says what was needed."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        # the allocator of torch for the CPU has no exception of its own
        if not isinstance(error, MemoryError | torch.OutOfMemoryError) and "Allocator" not in str(error):
            raise
        raise ResourceError(
            f"{plan.device} has run out of memory: the video needs about {_mb(plan.need_bytes)} "
            f"({plan.spec}); {_LESS_MEMORY}"
        ) from error


def _mb(count: int) -> str:
    return f"{count // 10**6:,} MB"


def _kept_note(kept: Path | None) -> str:
    return f"; what was finished is in {kept}" if kept else "; no chunk was finished"


def _settings(plan: Plan, height: int, width: int) -> dict[str, str]:
    """What made the video, for its metadata."""
    return {
        "vidkv": vidkv.__version__,
        "model": plan.request.model,
        "prompts": "; ".join(f"{second:g}: {text}" for second, text in plan.schedule.entries),
        "seed": str(plan.request.seed),
        "cache": str(plan.spec),
        "size": f"{width}x{height}",
        "seconds": f"{plan.request.seconds:g}",
        "steps": str(plan.request.steps or "model"),
    }


class _Tally:
    """Running totals of one video."""

    def __init__(self, plan: Plan, started: float) -> None:
        self.plan, self.started, self.begun = plan, started, time.perf_counter()
        self.frames = self.chunks = self.kv_bytes = 0
        self.denoise_s = self.decode_s = 0.0
        self.first_frame_s = float("nan")
        self.digest = hashlib.sha256()
        self.geometry_bytes = 0

    @property
    def elapsed_s(self) -> float:
        return time.perf_counter() - self.begun

    def add(self, chunk: Chunk) -> None:
        if not self.chunks:
            self.first_frame_s = time.perf_counter() - self.started
        assert chunk.frames is not None
        self.chunks += 1
        self.frames += chunk.frames.shape[1]
        self.denoise_s += chunk.stats.denoise_s + chunk.stats.commit_s
        self.decode_s += chunk.stats.decode_s
        self.kv_bytes = max(self.kv_bytes, chunk.stats.kv_bytes)
        self.geometry_bytes = chunk.stats.bytes_per_frame
        self.digest.update(chunk.latents.float().cpu().contiguous().numpy().tobytes())

    def result(self) -> dict[str, Any]:
        plan = self.plan
        return {
            "fps": plan.entry.fps,
            "chunks": self.chunks,
            "seed": plan.request.seed,
            "model": plan.request.model,
            "kv_format": plan.spec.format,
            "window_frames": plan.spec.window,
            "sink_frames": plan.spec.sink,
            "kv_bytes_per_frame": self.geometry_bytes,
            "kv_bytes_peak": self.kv_bytes,
            "peak_rss_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
            "first_frame_s": round(self.first_frame_s, 3),
            "denoise_fps": round(self.frames / self.denoise_s, 2),
            "decode_fps": round(self.frames / self.decode_s, 2),
            "end_to_end_fps": round(self.frames / self.elapsed_s, 2),
            "latents_sha256": self.digest.hexdigest(),
        }


class _Stop:
    """Set by a signal, asked between denoising steps."""

    signal: int = 0

    def check(self, chunk: int, step: int) -> None:
        if self.signal:
            raise Cancelled("stopped by a signal")

    def __call__(self, number: int, frame: FrameType | None) -> None:
        if self.signal:
            raise KeyboardInterrupt
        self.signal = number


@contextlib.contextmanager
def _stopping() -> Iterator[_Stop]:
    """Within this context Ctrl-C and SIGTERM end the run at the next step; a second one at once."""
    stop = _Stop()
    previous: dict[int, Callable[..., Any] | int | None] = {}
    for number in (signal.SIGINT, signal.SIGTERM):
        with contextlib.suppress(ValueError):
            previous[number] = signal.signal(number, stop)
    try:
        yield stop
    finally:
        for caught, handler in previous.items():
            signal.signal(caught, handler)
