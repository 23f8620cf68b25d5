"""A sentence to a video file: `vidkv generate`."""

from __future__ import annotations

import contextlib
import hashlib
import math
import resource
import signal
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any, Protocol, cast, get_args

import torch

import vidkv
from vidkv.cache import CacheSpec
from vidkv.conditioning import read_picture, read_video_end
from vidkv.errors import (
    Cancelled,
    InputError,
    OutputError,
    PromptError,
    ResourceError,
    VidkvError,
)
from vidkv.loading import find_model, model_entry
from vidkv.memory import OFFLOADS, check_fits, own_guidance, pixel_size, plan_memory
from vidkv.models.checkpoints.folders import read_json, require_tokenizer
from vidkv.models.families.base import ModelEntry
from vidkv.models.registry import canonical_prompt
from vidkv.models.vae import pixel_frames
from vidkv.models.vae_tiles import Tiling
from vidkv.models.weights import check_library, check_precision
from vidkv.pipeline import CausalVideoPipeline, chunks_for, frames_for, latents_before, spelled_negative
from vidkv.prompts import PromptSchedule
from vidkv.rollout import Switch
from vidkv.room import usable_bytes
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
        guidance, negative: classifier-free guidance scale, and what it leads away from.
        image, video: files to start from.
        switch: what becomes of the history when the prompt changes, see `Rollout.switch`.
        noise: `counter`, or `stock` for the stock code's draws.
        weights, text_weights: `full`, `fp8` or `int8`.
        offload: what leaves the GPU when it is not needed: none, text, model or group.
        loras: (file, scale) to load, in order.
        vae: a file with another decoder; `tile`: rows and columns of latents that are decoded at a time.
        compiled: let torch.compile fuse what stands around attention.
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
    guidance: float | None = None
    negative: str | None = None
    image: Path | None = None
    video: Path | None = None
    switch: Switch | None = None
    noise: str = "counter"
    weights: str = "full"
    text_weights: str | None = None
    offload: str = "text"
    loras: tuple[tuple[Path, float], ...] = ()
    vae: Path | None = None
    tile: tuple[int, int] | None = None
    compiled: bool = False


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
        first = _first_chunk_frames(self.request, self.entry)
        return chunks_for(self.frames, self.entry.chunk_frames, first=first)


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
    _check_choices(request)
    folder = find_model(request.model)
    config = read_json(folder / "model_index.json")
    entry = model_entry(folder)
    require_tokenizer(folder / "tokenizer")
    grammar = config.get("prompt_grammar")
    schedule = PromptSchedule.of(request.prompts, canonical_prompt(str(grammar) if grammar else None))
    device = pick_device(request.device)
    frames = frames_for(request.seconds, entry.fps)
    _check_switches(schedule, entry, frames, _first_chunk_frames(request, entry))
    if request.steps is not None:
        FlowSchedule().with_steps(request.steps)
    if request.guidance is not None:
        FlowSchedule(guidance=request.guidance)
    if request.negative is not None:
        spelled_negative(request.negative, str(grammar) if grammar else None)
    spec = cache_spec(entry, request.cache, device)
    size = pixel_size(entry, request.height, request.width)
    if device == "cpu" and request.offload in ("model", "group"):
        raise InputError(f"offload={request.offload} moves networks off a GPU, and this runs on the CPU")
    memory = plan_memory(
        entry, spec, *size, dtype=compute_dtype(device), weights=check_precision(request.weights),
        text_weights=check_precision(request.text_weights or request.weights),
        placement=OFFLOADS[request.offload], guidance=_lasting_guidance(request, entry, config),
        overlap=device == "cuda",
    )  # fmt: skip
    allowed = {"kv-format", "window", "size", "weights"} | ({"offload"} if device == "cuda" else set())
    check_fits(memory, usable_bytes(device), device, allowed)
    return Plan(request, entry, folder, schedule, spec, device, frames, memory.peak_bytes)


def _check_choices(request: Request) -> None:
    """Refuse what does not depend on the model."""
    chosen = (
        ("switch", request.switch or "keep", get_args(Switch)),
        ("noise", request.noise, ("counter", "stock")),
        ("offload", request.offload, tuple(OFFLOADS)),
    )
    for name, value, known in chosen:
        if value not in known:
            raise InputError(f"{name}={value!r:.60}; choose {', '.join(known)}")
    check_library(check_precision(request.weights))
    check_library(check_precision(request.text_weights or request.weights))
    if request.image and request.video:
        raise InputError("give either --image or --video, not both")
    for path in (request.image, request.video, request.vae, *(path for path, _ in request.loras)):
        if path is not None and not path.exists():
            raise InputError(f"there is no file {path}")
    for path, scale in request.loras:
        if not math.isfinite(scale):
            raise InputError(f"a LoRA weight of {scale} for {path} cannot be used; give a finite number")
    if request.tile:
        Tiling(*request.tile)


def _first_chunk_frames(request: Request, entry: ModelEntry) -> int | None:
    """Latent frames of the first chunk where it differs: an image is a chunk of its own."""
    return 1 if request.image and not entry.image_held else entry.first_chunk_frames


def _lasting_guidance(request: Request, entry: ModelEntry, config: Mapping[str, object]) -> float:
    """Guidance scale of every chunk; of a model that is not guided throughout --guidance is the first's."""
    own = config.get("guidance")
    lasting = own_guidance(entry) if own is None else float(cast(Any, own))
    return lasting if lasting == 1 or request.guidance is None else request.guidance


def _check_switches(schedule: PromptSchedule, entry: ModelEntry, frames: int, first: int | None) -> None:
    """Refuse a prompt after the beginning of the last chunk: it would never be shown.

    Args:
        first: latent frames of the first chunk where it differs.
    """
    second = schedule.entries[-1][0]
    chunks = chunks_for(frames, entry.chunk_frames, first=first)
    before = latents_before(chunks - 1, entry.chunk_frames, first)
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
            pipe = load_pipeline(plan)
            start = _start(request, plan.spec.window)
        rescue_segments(folder, request.out)
        writer = SegmentWriter(folder, entry.fps, height, width)
        tally = _Tally(plan, started)
        with _stopping() as stopped:
            try:
                with _naming_shortage(plan):
                    stream = pipe.stream(
                        list(plan.schedule.entries), height, width, num_frames=plan.frames,
                        seed=request.seed, num_inference_steps=request.steps, cache=plan.spec,
                        on_step=stopped.check, guidance_scale=request.guidance,
                        negative_prompt=request.negative, prompt_switch=request.switch,
                        noise=cast(Any, request.noise), overlap=True, **start,
                    )  # fmt: skip
                    for chunk in stream:
                        assert chunk.frames is not None
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


def load_pipeline(plan: Plan) -> CausalVideoPipeline:
    """The networks of a plan, where and as it wants them."""
    request = plan.request
    hooked = request.offload in ("model", "group")
    pipe = CausalVideoPipeline.from_pretrained(
        plan.folder,
        dtype=compute_dtype(plan.device),
        device="cpu" if hooked else plan.device,
        weights=request.weights,
        text_weights=request.text_weights,
        text="resident" if request.offload in ("none", "model") else "auto",
        vae_path=request.vae,
    )
    pipe.set_progress_bar_config(disable=True)
    scales = [scale for _, scale in request.loras]
    for number, (path, _) in enumerate(request.loras):
        pipe.load_lora_weights(path, adapter_name=f"lora{number}")
        pipe.set_adapters([f"lora{i}" for i in range(number + 1)], scales[: number + 1])
    if request.tile:
        pipe.tiling = Tiling(*request.tile, offload=plan.device == "cuda")
    if request.compiled:
        pipe.transformer.compile_blocks()
    if request.offload == "model":
        pipe.enable_model_cpu_offload()
    else:
        pipe.graphs = request.offload != "group"
    if request.offload == "group":
        pipe.enable_group_offload(
            onload_device=torch.device(plan.device), offload_type="leaf_level", use_stream=True,
            exclude_modules=["vae"],
        )  # fmt: skip
        pipe.vae.to(plan.device)
    return pipe


def _start(request: Request, window: int) -> dict[str, Any]:
    """The picture or video to start from, as an argument of `stream`."""
    if request.image:
        return {"image": read_picture(request.image)}
    if request.video:
        return {"video": read_video_end(request.video, 4 * window)}
    return {}


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
    request = plan.request
    chosen = {
        "guidance": request.guidance, "negative": request.negative, "image": request.image,
        "video": request.video, "switch": request.switch, "vae": request.vae, "tile": request.tile,
        "loras": "; ".join(f"{path}:{scale:g}" for path, scale in request.loras) or None,
        "noise": request.noise if request.noise != "counter" else None,
        "weights": request.weights if request.weights != "full" else None,
    }  # fmt: skip
    return {name: str(value) for name, value in chosen.items() if value is not None} | {
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
