"""A sentence to a video file: `vidkv generate`."""

from __future__ import annotations

import contextlib
import hashlib
import resource
import shutil
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
from vidkv.errors import Cancelled, InputError, OutputError, VidkvError
from vidkv.memory import latent_size, pixel_size
from vidkv.models.checkpoints import read_json
from vidkv.models.registry import MODELS, ModelEntry, canonical_prompt
from vidkv.pipeline import CausalVideoPipeline, chunks_for, find_model, frames_for
from vidkv.prompts import PromptSchedule
from vidkv.schedule import FlowSchedule
from vidkv.segments import SegmentWriter, check_output, write_video

if TYPE_CHECKING:
    from vidkv.rollout import Chunk


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
    """A request that has been checked against the model, before its weights are read."""

    request: Request
    entry: ModelEntry
    folder: Path
    schedule: PromptSchedule
    spec: CacheSpec
    device: str
    frames: int

    @property
    def chunks(self) -> int:
        return chunks_for(self.frames, self.entry.chunk_frames)


class Reporter(Protocol):
    """Told of every finished chunk."""

    def __call__(self, chunk: Chunk, chunks: int, frames: int, elapsed_s: float) -> None: ...


def plan(request: Request) -> Plan:
    """Check everything that can be checked without weights.

    Raises:
        InputError, OutputError, CheckpointError: the first thing wrong, with its remedy.
    """
    check_output(request.out)
    if not 0 <= request.seed < 2**64:
        raise InputError(f"seed={request.seed} must lie between 0 and 2**64 - 1")
    folder = find_model(request.model)
    config = read_json(folder / "model_index.json")
    entry = MODELS[str(config.get("model", "bounce"))]
    grammar = config.get("prompt_grammar")
    schedule = PromptSchedule.of(request.prompts, canonical_prompt(str(grammar) if grammar else None))
    device = pick_device(request.device)
    latent_size(entry, *pixel_size(entry, request.height, request.width))
    if request.steps is not None:
        FlowSchedule().with_steps(request.steps)
    spec = cache_spec(entry, request.cache, device)
    return Plan(request, entry, folder, schedule, spec, device, frames_for(request.seconds, entry.fps))


def pick_device(name: str) -> str:
    """`auto` is the GPU where there is one.

    Raises:
        InputError: an unknown device, or `cuda` without a GPU.
    """
    available = torch.cuda.is_available()
    if name == "auto":
        return "cuda" if available else "cpu"
    if name not in ("cpu", "cuda"):
        raise InputError(f"device={name!r}; choose auto, cpu or cuda")
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
    the end. Stopped early, by Ctrl-C, SIGTERM or an error, what is there is kept as `NAME.partial.mp4`.

    Args:
        started: `time.perf_counter()` when the command began, for the time to the first frame.

    Returns:
        The JSON object of `vidkv generate --json`.

    Raises:
        Stopped: by a signal; carries the partial file.
    """
    request, entry = plan.request, plan.entry
    dtype = torch.float32 if plan.device == "cpu" else torch.bfloat16
    pipe = CausalVideoPipeline.from_pretrained(plan.folder, dtype=dtype).to(plan.device)
    pipe.set_progress_bar_config(disable=True)
    height, width = pixel_size(entry, request.height, request.width)
    folder = request.out.with_name(request.out.name + ".segments")
    _rescue(folder, request.out, entry.fps)
    writer = SegmentWriter(folder, entry.fps, height, width)
    metadata = _settings(plan, height, width)
    tally = _Tally(plan, started)
    with _stopping() as stopped:
        try:
            stream = pipe.stream(
                list(plan.schedule.entries), height, width, num_frames=plan.frames, seed=request.seed,
                num_inference_steps=request.steps, cache=plan.spec, on_step=stopped.check,
            )  # fmt: skip
            for chunk in stream:
                writer.write(chunk.index, chunk.frames[0])
                tally.add(chunk)
                report(chunk, plan.chunks, tally.frames, tally.elapsed_s)
                stopped.check(chunk.index, -1)
        except (VidkvError, MemoryError, RuntimeError) as error:
            kept = keep_partial(writer, request.out, entry.fps, metadata)
            if isinstance(error, Cancelled):
                raise Stopped(stopped.signal, kept) from None
            raise type(error)(f"{error}{_kept_note(kept)}") from error
    info = write_video(writer.paths(), request.out, entry.fps, metadata)
    shutil.rmtree(folder)
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
        with contextlib.suppress(OSError):
            shutil.rmtree(segments_folder(out))
        return None
    partial = out.with_name(f"{out.stem}.partial.mp4")
    try:
        write_video(segments, partial, fps, metadata | {"partial": "true"})
    except OutputError:
        return segments_folder(out)
    shutil.rmtree(segments_folder(out))
    return partial


def segments_folder(out: Path) -> Path:
    """Where the segments of a video lie while it is made."""
    return out.with_name(out.name + ".segments")


def _rescue(folder: Path, out: Path, fps: int) -> None:
    """Segments of a run that was killed become `NAME.recovered.mp4` before a new run starts."""
    if not folder.is_dir():
        return
    from vidkv.segments import segment_paths

    segments = segment_paths(folder)
    if segments:
        number = 0
        while (target := out.with_name(f"{out.stem}.recovered{number or ''}.mp4")).exists():
            number += 1
        write_video(segments, target, fps, {"recovered": "true"})
    shutil.rmtree(folder)


def _kept_note(kept: Path | None) -> str:
    return f"; what was finished is in {kept}" if kept else "; no chunk was finished"


def _settings(plan: Plan, height: int, width: int) -> dict[str, str]:
    """What made the video, for its metadata."""
    return {
        "vidkv": vidkv.__version__,
        "model": plan.entry.name,
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
            "model": plan.entry.name,
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
