"""From a request to a plan: everything that can be checked, named and counted before weights are read."""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch

import vidkv
from vidkv.cache import CacheSpec
from vidkv.errors import InputError, PromptError, ResourceError
from vidkv.heads import FILE as HEADS_FILE
from vidkv.heads import head_order, require_shares
from vidkv.intake import picture, video_end
from vidkv.loading import find_model, model_entry
from vidkv.memory import OFFLOADS, MemoryPlan, check_fits, check_host, own_guidance, pixel_size, plan_memory
from vidkv.models.checkpoints.folders import read_json, require_tokenizer
from vidkv.models.families.base import ModelEntry
from vidkv.models.registry import MODELS, canonical_prompt
from vidkv.models.vae import pixel_frames
from vidkv.models.vae_tiles import Tiling
from vidkv.models.weights import check_library, check_precision
from vidkv.pipeline import CausalVideoPipeline, frames_for, spelled_negative
from vidkv.prompts import PromptSchedule
from vidkv.request import EngineSettings, VideoRequest
from vidkv.room import usable_bytes
from vidkv.schedule import FlowSchedule
from vidkv.stream import chunks_for, latents_before

if TYPE_CHECKING:
    from vidkv.stream import VideoStream

DEVICES = ("auto", "cpu", "cuda")
_LESS_MEMORY = "choose a smaller --window, --height or --width, or --kv-format int8"
KEY_ID = 16
"""Characters of a key that name what has no name of its own."""
NUMERICS = 1
"""Raised when the same request would give other latents, so that finished work is not taken for new."""


@dataclass(frozen=True)
class Plan:
    """A request that has been checked against the model, before its weights are read.

    Attributes:
        frames: pixel frames of the video.
        memory: of the device, estimated.
    """

    request: VideoRequest
    settings: EngineSettings
    entry: ModelEntry
    folder: Path
    schedule: PromptSchedule
    spec: CacheSpec
    device: str
    frames: int
    memory: MemoryPlan

    @property
    def need_bytes(self) -> int:
        """Memory of the device at the peak."""
        return self.memory.need_bytes(self.device)

    @property
    def first_chunk_frames(self) -> int | None:
        """Latent frames of the first chunk where it differs."""
        return first_chunk_frames(self.request, self.entry)

    @property
    def chunks(self) -> int:
        return chunks_for(self.frames, self.entry.chunk_frames, first=self.first_chunk_frames)

    def frames_before(self, chunk: int) -> int:
        """Pixel frames of the video before a chunk."""
        before = latents_before(chunk, self.entry.chunk_frames, self.first_chunk_frames)
        return min(self.frames, pixel_frames(before))

    def begins(self, chunk: int) -> float:
        """The second at which a chunk begins, whether the video is that long or not."""
        before = latents_before(chunk, self.entry.chunk_frames, self.first_chunk_frames)
        return pixel_frames(before) / self.entry.fps

    def ended(self, chunks: int, frames: int) -> VideoRequest:
        """The request of what there is of a video that was ended early."""
        return self.request.lasting(frames / self.entry.fps, self.begins(chunks - 1))

    @property
    def size(self) -> tuple[int, int]:
        """Height and width in pixels."""
        return pixel_size(self.entry, self.request.height, self.request.width)

    @cached_property
    def key(self) -> str:
        """Names the work: equal exactly when the same frames would come out, on one kind of machine.

        SHA-256 of the request as it was understood (respelled prompts, whole cache settings, sizes), the
        contents of the model and of all files given, the precision it runs at, and `NUMERICS`.
        """
        request, settings = self.request, self.settings
        work = {
            "numerics": NUMERICS,
            "model": weights_digest(self.folder),
            "prompts": self.schedule.entries,
            "frames": self.frames,
            "size": self.size,
            "seed": request.seed,
            "cache": self.spec.identity,
            "steps": request.steps,
            "guidance": request.guidance,
            "negative": request.negative,
            "switch": request.switch or self.entry.prompt_switch,
            "noise": request.noise,
            "image": request.image and file_digest(request.image),
            "video": request.video and file_digest(request.video),
            "dtype": str(compute_dtype(self.device)),
            "weights": settings.weights,
            "text_weights": settings.text_weights or settings.weights,
            "loras": [(file_digest(path), scale) for path, scale in settings.loras],
            "vae": settings.vae and file_digest(settings.vae),
            "tile": settings.tile,
            "compiled": settings.compiled,
        }
        if self.schedule.switches:
            work["switches"] = self.schedule.switches
        if shares := require_shares(self.folder, self.spec, request.model):
            work["heads"] = head_order(shares)
        return hashlib.sha256(json.dumps(work, sort_keys=True).encode()).hexdigest()

    @property
    def id(self) -> str:
        """The request's, or the beginning of the key."""
        return self.request.id or self.key[:KEY_ID]

    def resolved(self) -> tuple[VideoRequest, EngineSettings]:
        """Request and settings with absolute paths, for processes that stand elsewhere."""
        request, settings = self.request, self.settings
        paths = {name: path.absolute() for name in ("image", "video") if (path := getattr(request, name))}
        model = request.model if request.model in MODELS else str(self.folder.absolute())
        loras = tuple((path.absolute(), scale) for path, scale in settings.loras)
        vae = settings.vae and settings.vae.absolute()
        return (
            request.model_copy(update=paths | {"model": model} if model != request.model else paths),
            settings.model_copy(update={"loras": loras, "vae": vae} if loras or vae else {}),
        )

    def metadata(self) -> dict[str, str]:
        """What made the video, for its metadata; of files only the names."""
        request, settings = self.request, self.settings
        height, width = self.size
        chosen = {
            "guidance": request.guidance, "negative": request.negative, "switch": request.switch,
            "image": request.image and request.image.name, "video": request.video and request.video.name,
            "vae": settings.vae and settings.vae.name, "tile": settings.tile,
            "loras": "; ".join(f"{path.name}:{scale:g}" for path, scale in settings.loras) or None,
            "noise": request.noise if request.noise != "counter" else None,
            "weights": settings.weights if settings.weights != "full" else None,
        }  # fmt: skip
        return {name: str(value) for name, value in chosen.items() if value is not None} | {
            "vidkv": vidkv.__version__,
            "model": request.model,
            "prompts": "; ".join(f"{second:g}: {text}" for second, text in self.schedule.entries),
            "request": request.model_dump_json(exclude_unset=True, exclude={"image", "video", "out"}),
            "seed": str(request.seed),
            "cache": str(self.spec),
            "size": f"{width}x{height}",
            "seconds": f"{request.seconds:g}",
            "steps": str(request.steps or "model"),
        }


def plan(request: VideoRequest, settings: EngineSettings | None = None, *, fits: bool = True) -> Plan:
    """Check everything that can be checked without weights.

    Args:
        fits: whether the memory that is free now counts, see `require_room`.

    Raises:
        InputError, CheckpointError, ResourceError: the first thing wrong, with its remedy.
    """
    settings = settings or EngineSettings()
    _check_choices(request, settings)
    folder = find_model(request.model)
    config = read_json(folder / "model_index.json")
    entry = model_entry(folder)
    require_tokenizer(folder / "tokenizer")
    grammar = config.get("prompt_grammar")
    schedule = PromptSchedule.of(request.prompts, canonical_prompt(str(grammar) if grammar else None))
    device = pick_device(settings.device)
    frames = frames_for(request.seconds, entry.fps)
    _check_switches(schedule, entry, frames, first_chunk_frames(request, entry))
    if request.steps is not None:
        FlowSchedule().with_steps(request.steps)
    if request.guidance is not None:
        FlowSchedule(guidance=request.guidance)
    if request.negative is not None:
        spelled_negative(request.negative, str(grammar) if grammar else None)
    spec = cache_spec(entry, request.cache, device)
    require_shares(folder, spec, request.model)
    size = pixel_size(entry, request.height, request.width)
    if device == "cpu" and settings.offload in ("model", "group"):
        raise InputError(f"offload={settings.offload} moves networks off a GPU, and this runs on the CPU")
    memory = plan_memory(
        entry, spec, *size, dtype=compute_dtype(device), weights=check_precision(settings.weights),
        text_weights=check_precision(settings.text_weights or settings.weights),
        placement=OFFLOADS[settings.offload], guidance=_lasting_guidance(request, entry, config),
        overlap=device == "cuda",
    )  # fmt: skip
    found = Plan(request, settings, entry, folder, schedule, spec, device, frames, memory)
    if fits:
        require_room(found)
    return found


def require_room(plan: Plan) -> None:
    """Refuse what does not fit into the memory that is free now.

    Raises:
        ResourceError: with the numbers, and settings that would fit.
    """
    offload = {"offload"} if plan.device == "cuda" else set()
    allowed = {"kv-format", "window", "size", "weights"} | offload
    check_fits(plan.memory, usable_bytes(plan.device), plan.device, allowed)
    if plan.device == "cuda":
        check_host(plan.memory, usable_bytes("cpu"))


def load_pipeline(plan: Plan) -> CausalVideoPipeline:
    """The networks of a plan, where and as it wants them."""
    settings = plan.settings
    hooked = settings.offload in ("model", "group")
    pipe = CausalVideoPipeline.from_pretrained(
        plan.folder,
        dtype=compute_dtype(plan.device),
        device="cpu" if hooked else plan.device,
        weights=settings.weights,
        text_weights=settings.text_weights,
        text="resident" if settings.offload in ("none", "model") else "auto",
        vae_path=settings.vae,
    )
    pipe.set_progress_bar_config(disable=True)
    scales = [scale for _, scale in settings.loras]
    for number, (path, _) in enumerate(settings.loras):
        pipe.load_lora_weights(path, adapter_name=f"lora{number}")
        pipe.set_adapters([f"lora{i}" for i in range(number + 1)], scales[: number + 1])
    if settings.tile:
        pipe.tiling = Tiling(*settings.tile, offload=plan.device == "cuda")
    if settings.compiled:
        pipe.transformer.compile_blocks()
    if settings.offload == "model":
        pipe.enable_model_cpu_offload()
    else:
        pipe.graphs = settings.offload != "group"
    if settings.offload == "group":
        pipe.enable_group_offload(
            onload_device=torch.device(plan.device), offload_type="leaf_level", use_stream=True,
            exclude_modules=["vae"],
        )  # fmt: skip
        pipe.vae.to(plan.device)
    return pipe


def open_stream(plan: Plan, pipe: CausalVideoPipeline, **options: Any) -> VideoStream:
    """The chunks of a plan.

    Args:
        options: as for `CausalVideoPipeline.stream`: `on_step`, `overlap`.
    """
    request = plan.request
    height, width = plan.size
    start: dict[str, Any] = {}
    if request.image:
        start = {"image": picture(request.image, height, width)}
    if request.video:
        start = {"video": video_end(request.video, 4 * plan.spec.window, height, width)}
    return pipe.stream(
        plan.schedule.timed, height, width, num_frames=plan.frames, seed=request.seed,
        num_inference_steps=request.steps, cache=plan.spec, guidance_scale=request.guidance,
        negative_prompt=request.negative, prompt_switch=request.switch, noise=request.noise,
        **start, **options,
    )  # fmt: skip


@contextlib.contextmanager
def naming_shortage(plan: Plan) -> Iterator[None]:
    """Turn what allocators raise into one line that says what was needed."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        # the allocator of torch for the CPU has no exception of its own
        if not isinstance(error, MemoryError | torch.OutOfMemoryError) and "Allocator" not in str(error):
            raise
        raise ResourceError(
            f"{plan.device} has run out of memory: the video needs about {plan.need_bytes // 10**6:,} MB "
            f"({plan.spec}); {_LESS_MEMORY}"
        ) from error


def file_digest(path: Path) -> str:
    """SHA-256 of a file's content.

    Raises:
        InputError: it cannot be read.
    """
    try:
        state = path.stat()
        return _file_digest(str(path.absolute()), state.st_size, state.st_mtime_ns)
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror or error}") from None


@lru_cache(maxsize=1024)
def _file_digest(path: str, size: int, changed: int) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def weights_digest(folder: Path) -> str:
    """Identity of a model folder by content, the same wherever it lies and whenever it was copied.

    Small files count whole; weights with their size, their header and blocks spread over them, because
    reading tens of gigabytes for a name would take longer than some videos. What was measured of heads does
    not count: only caches with `local_heads` go by it.
    """
    files = sorted(
        path
        for path in folder.rglob("*")
        if path.suffix in (".json", ".safetensors") and path != folder / HEADS_FILE
    )
    state = tuple((str(p), p.stat().st_size, p.stat().st_mtime_ns) for p in files)
    return _weights_digest(str(folder), state)


@lru_cache(maxsize=64)
def _weights_digest(folder: str, files: tuple[tuple[str, int, int], ...]) -> str:
    digest, block, blocks = hashlib.sha256(), 1 << 16, 64
    for name, size, _ in files:
        digest.update(f"{Path(name).relative_to(folder).as_posix()}\0{size}\0".encode())
        with open(name, "rb") as file:
            if size <= 2 * block * blocks:
                digest.update(file.read())
                continue
            for number in range(blocks):
                file.seek(number * (size - block) // (blocks - 1))
                digest.update(file.read(block))
    return digest.hexdigest()


def _check_choices(request: VideoRequest, settings: EngineSettings) -> None:
    """Refuse what does not depend on the model."""
    if settings.offload not in OFFLOADS:
        raise InputError(f"offload={settings.offload!r:.60}; choose {', '.join(OFFLOADS)}")
    check_library(check_precision(settings.weights))
    check_library(check_precision(settings.text_weights or settings.weights))
    if request.image and request.video:
        raise InputError("give either an image or a video to start from, not both")
    for path in (request.image, request.video, settings.vae, *(path for path, _ in settings.loras)):
        if path is not None and not path.exists():
            raise InputError(f"there is no file {path}")
    for path, scale in settings.loras:
        if not math.isfinite(scale):
            raise InputError(f"a LoRA weight of {scale} for {path} cannot be used; give a finite number")
    if settings.tile:
        Tiling(*settings.tile)


def first_chunk_frames(request: VideoRequest, entry: ModelEntry) -> int | None:
    """Latent frames of the first chunk where it differs: an image is a chunk of its own."""
    return 1 if request.image and not entry.image_held else entry.first_chunk_frames


def _lasting_guidance(request: VideoRequest, entry: ModelEntry, config: Mapping[str, object]) -> float:
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
