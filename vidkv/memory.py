"""Memory needs from settings alone, before anything is loaded.

Weights, pages and the VAE's streaming caches are exact. Intermediates are traced: one transformer block, the
decoder over one chunk and one layer of the text encoder run without memory behind their tensors, and the most
that is alive at once is counted. What a library takes beside its tensors (a convolution's workspace, the
context of a GPU, an allocator's fragments) is not: see `room.USABLE`.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, field, fields, replace
from functools import cache
from itertools import combinations
from typing import TYPE_CHECKING, Any, Literal, get_args

import torch
from torch import nn

from vidkv.activations import decode_activations, pass_activations, text_activations
from vidkv.cache import CacheGeometry, CacheSpec, planned_bytes
from vidkv.cache.formats import FORMATS
from vidkv.cache.offload import planned_places
from vidkv.cache.tiers import planned_pools
from vidkv.errors import InputError, ResourceError
from vidkv.models.checkpoints.empty import empty_weights
from vidkv.models.families.base import ModelEntry
from vidkv.models.weights import Precision, cast_bytes, planned_weight_bytes, precision_of, weight_bytes
from vidkv.room import USABLE

if TYPE_CHECKING:
    from diffusers.models.modeling_utils import ModelMixin

Placement = Literal["resident", "offload_text", "cpu_offload", "group_offload"]
PLACEMENTS: tuple[Placement, ...] = get_args(Placement)
OFFLOADS: dict[str, Placement] = dict(zip(("none", "text", "model", "group"), PLACEMENTS, strict=True))
"""Placements by their names on the command line."""
RESIDENT_BLOCKS = 2
"""Blocks on the device while a transformer is streamed: one computes, the next arrives."""
MERGE_BYTES, SCALE_BYTES = 4, 2
TIED_EMBEDDING = "encoder.embed_tokens.weight"
REMEDIES = 3


@dataclass(frozen=True)
class MemorySettings:
    """What a plan is for.

    Attributes:
        dtype: compute dtype, and that of weights at full precision.
        weights, text_weights: how the transformer's and the text encoder's weights are stored.
        placement: `resident`, everything stays on the device; `offload_text`, the text encoder is gone before
            the transformer comes; `cpu_offload`, of text encoder, transformer and VAE one is there at a time;
            `group_offload`, as `offload_text` with the transformer's blocks streamed from the host.
        guidance: guidance scale of every chunk; other than 1 it takes a second cache.
        overlap: the VAE decodes a chunk while the next is denoised.
    """

    entry: ModelEntry
    spec: CacheSpec
    height: int
    width: int
    batch: int = 1
    dtype: torch.dtype = torch.bfloat16
    weights: Precision = "full"
    text_weights: Precision = "full"
    placement: Placement = "offload_text"
    guidance: float = 1.0
    overlap: bool = False

    def plan(self) -> MemoryPlan:
        """See `plan_memory`."""
        entry, dtype, latent = self.entry, self.dtype, latent_size(self.entry, self.height, self.width)
        name = _first_alike(entry.name)
        transformer, vae, text = empty_models(name)
        traced = _entry_activations(name, latent, entry.chunk_frames, self.batch, dtype)
        parts = _Parts(
            transformer=_entry_weights(name, 0, self.weights, dtype),
            streamed=_entry_streamed(name, self.weights, dtype),
            vae=_entry_weights(name, 1, "full", dtype),
            text=_entry_weights(name, 2, self.text_weights, dtype),
            features=_feature_bytes(vae, latent, self.batch, dtype),
            activations=replace(
                traced,
                cast=cast_bytes(transformer, self.weights, dtype),
                text=traced.text + cast_bytes(text, self.text_weights, dtype),
            ),
            context=_context_bytes(transformer.config, entry.text_tokens, self.batch, dtype),
        )
        geometry = CacheGeometry.of_model(transformer.config, *latent, entry.chunk_frames, self.batch)
        contexts = 1 + int(max(self.guidance, entry.schedule.get("first_chunk_guidance", 1.0)) != 1)
        return _plan(
            parts, transformer.config, self.spec, geometry, dtype, self.placement,
            1 + int(self.guidance != 1), contexts, self.overlap, self,
        )  # fmt: skip

    def with_window(self, window: int) -> MemorySettings:
        return replace(self, spec=self.spec.model_copy(update={"window": window}))

    def largest_window(self, usable_bytes: int) -> int | None:
        """The most latent frames whose plan fits; None if not even sinks and one chunk do.

        The search is exact because no part of a plan shrinks as the window grows.
        """

        def fits(window: int) -> bool:
            return self.with_window(window).plan().peak_bytes <= usable_bytes

        low = self.spec.sink + self.entry.chunk_frames
        if not fits(low):
            return None
        high = 2 * low
        while fits(high):
            low, high = high, 2 * high
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if fits(middle) else (low, middle)
        return low


@dataclass(frozen=True)
class MemoryPlan:
    """Bytes by part and by phase.

    Attributes:
        kv_bytes: pages between chunks, exactly what one cache allocates.
        weights_bytes: the transformer.
        text_bytes: the text encoder; it is not needed while chunks are denoised.
        vae_bytes: weights and the decoder's streaming caches.
        activation_bytes: the largest simultaneous intermediates of one transformer pass, scratch of the
            read path and the current chunk's keys and values of one layer included; traced.
        peak_bytes: the most of the three phases.
        negative_kv_bytes: the second cache of a guided model.
        context_bytes: cross-attention keys and values of all layers.
        feature_bytes: of `vae_bytes` the streaming caches.
        text_activation_bytes, decode_activation_bytes: the same of the text encoder and the decoder.
        encode_bytes, rollout_bytes, decode_bytes: on the device at most in each phase.
        host_bytes: weights that wait in the host's memory for their turn.
        kv_host_bytes, kv_disk_bytes: pages of all caches that may leave the device, in the host's memory and
            at most on disk.
        settings: what was planned; None for a plan of loaded networks.
    """

    kv_bytes: int
    weights_bytes: int
    text_bytes: int
    vae_bytes: int
    activation_bytes: int
    peak_bytes: int
    negative_kv_bytes: int
    context_bytes: int
    feature_bytes: int
    text_activation_bytes: int
    decode_activation_bytes: int
    encode_bytes: int
    rollout_bytes: int
    decode_bytes: int
    host_bytes: int
    kv_host_bytes: int
    kv_disk_bytes: int
    settings: MemorySettings | None = field(default=None, compare=False, repr=False)

    def as_dict(self) -> dict[str, int]:
        return {f.name: getattr(self, f.name) for f in fields(self) if f.name != "settings"}

    def need_bytes(self, device: str) -> int:
        """Of a device's memory at most; that of a CPU holds the host's pages too."""
        return self.peak_bytes + (self.kv_host_bytes if device.startswith("cpu") else 0)

    @property
    def phases(self) -> dict[str, int]:
        """Bytes by phase, in the order in which they come."""
        return {"encode": self.encode_bytes, "rollout": self.rollout_bytes, "decode": self.decode_bytes}


def plan_memory(
    entry: ModelEntry,
    spec: CacheSpec,
    height: int,
    width: int,
    batch: int = 1,
    dtype: torch.dtype = torch.bfloat16,
    *,
    weights: Precision = "full",
    text_weights: Precision | None = None,
    placement: Placement = "offload_text",
    guidance: float | None = None,
    overlap: bool = False,
) -> MemoryPlan:
    """Plan a rollout of `height` x `width` pixels.

    Args:
        text_weights: as the transformer's by default.
        guidance: scale of every chunk; the model's own by default.

    Raises:
        InputError: a size that the model cannot make.
    """
    return MemorySettings(
        entry, spec, height, width, batch, dtype, weights, text_weights or weights, placement,
        own_guidance(entry) if guidance is None else guidance, overlap,
    ).plan()  # fmt: skip


def plan_loaded(
    transformer: ModelMixin,
    vae: ModelMixin,
    text_encoder: nn.Module | None,
    spec: CacheSpec,
    latent: tuple[int, int],
    chunk_frames: int,
    batch: int = 1,
    *,
    text_tokens: int = 512,
    placement: Placement = "offload_text",
    guidance: float = 1.0,
    overlap: bool = False,
) -> MemoryPlan:
    """Plan a rollout of networks as they are loaded: their own sizes and precisions.

    Args:
        text_encoder: None if it has been released.
        latent: rows and columns of a latent frame.
        text_tokens: length of the prompt embeddings.
        guidance: scale of every chunk.
    """
    dtype, config = transformer.dtype, transformer.config
    text, encoding = 0, 0
    if text_encoder is not None:
        kept = next(text_encoder.parameters()).dtype
        text = weight_bytes(text_encoder)
        encoding = text_activations(text_encoder, text_tokens, batch, kept)
        encoding += cast_bytes(text_encoder, precision_of(text_encoder), kept)
    traced = pass_activations(transformer, latent, chunk_frames, batch, dtype)
    stored = precision_of(transformer)
    size, block = weight_bytes(transformer), weight_bytes(transformer.blocks[0])
    parts = _Parts(
        transformer=size,
        streamed=min(size, size - block * (len(transformer.blocks) - RESIDENT_BLOCKS)),
        vae=weight_bytes(vae),
        text=text,
        features=_feature_bytes(vae, latent, batch, vae.dtype),
        activations=_Activations(
            *traced,
            encoding,
            decode_activations(vae, latent, chunk_frames, batch, vae.dtype),
            cast_bytes(transformer, stored, dtype),
        ),
        context=_context_bytes(config, text_tokens, batch, dtype),
    )
    geometry = CacheGeometry.of_model(config, *latent, chunk_frames, batch)
    caches = 1 + int(guidance != 1)
    return _plan(parts, config, spec, geometry, dtype, placement, caches, caches, overlap, None)


def own_guidance(entry: ModelEntry) -> float:
    """Guidance scale of every chunk that a model was made for; 1 is none."""
    return float(entry.schedule.get("guidance", 1.0))


def largest_window(
    entry: ModelEntry,
    usable_bytes: int,
    format: str,
    height: int | None = None,
    width: int | None = None,
    dtype: torch.dtype = torch.bfloat16,
    **settings: Any,
) -> int | None:
    """The largest window, in latent frames, whose plan fits into so many bytes; None if none does.

    Args:
        usable_bytes: of the device, see `card_bytes`.
        format: of the pages; sinks are the model's own.
        height, width: pixels; the model's own by default.
        **settings: further arguments of `plan_memory`.
    """
    rows, columns = pixel_size(entry, height, width)
    spec = CacheSpec.of(
        {"format": format, "window": entry.window, "sink": entry.sink, "positions": entry.positions}
    )
    plan = plan_memory(entry, spec, rows, columns, dtype=dtype, **settings)
    assert plan.settings is not None
    return plan.settings.largest_window(usable_bytes)


def card_bytes(gigabytes: float) -> int:
    """Bytes that plans may fill on a card sold with so many (decimal) gigabytes."""
    if not 0 < gigabytes < 1e6:
        raise InputError(f"card={gigabytes:g}: give a card's memory in GB, such as 24 or 80")
    return int(gigabytes * 1e9 * USABLE)


def check_fits(
    plan: MemoryPlan,
    available: int | None,
    device: str = "cuda",
    allowed: Collection[str] = ("kv-format", "offload", "weights", "window", "size"),
) -> None:
    """Refuse a plan that does not fit, with the numbers and what would help.

    Args:
        available: free bytes of the device; None is not checked.
        device: its name for the message; nothing can be offloaded from one that begins with `cpu`.
        allowed: kinds of settings that the caller's user can change.

    Raises:
        ResourceError: it needs more than there is.
    """
    need = plan.need_bytes(device)
    if available is None or need <= available:
        return
    phase = max(plan.phases, key=lambda name: plan.phases[name])
    vae, work = plan.vae_bytes, plan.decode_activation_bytes if phase == "decode" else plan.activation_bytes
    about = f"text encoder {gigabytes(plan.text_bytes)}"
    if phase != "encode":
        about = (
            f"transformer {gigabytes(plan.weights_bytes)}, KV cache "
            f"{gigabytes(plan.kv_bytes + plan.negative_kv_bytes)}, VAE {gigabytes(vae)}, "
            f"intermediates {gigabytes(work)}"
        )
    message = (
        f"the video needs {gigabytes(need)} of memory on {device} ({phase}: {about}), "
        f"{gigabytes(available)} can be used"
    )
    if plan.settings is None:
        raise ResourceError(f"{message}; choose a smaller window, size or page format")
    found = remedies(plan.settings, available, device, allowed)
    named = ", or ".join(f"{text} (needs {gigabytes(need)})" for text, need in found)
    if not found:
        raise ResourceError(f"{message}; no setting makes it fit here, use a smaller model or a larger card")
    few = "" if len(found) == REMEDIES else f"; nothing else of {', '.join(allowed)} makes it fit"
    raise ResourceError(f"{message}; use {named}{few}")


def check_host(plan: MemoryPlan, available: int | None) -> None:
    """Refuse a plan for a GPU whose pages have no room in the host's memory either.

    Args:
        available: free bytes of the host; None is not checked.

    Raises:
        ResourceError: they need more than there is.
    """
    if available is not None and plan.kv_host_bytes > available:
        raise ResourceError(
            f"pages that leave the GPU need {gigabytes(plan.kv_host_bytes)} of the host's memory, "
            f"{gigabytes(available)} can be used; choose a smaller window, or with select budgets of the "
            "host and of a disk (host_gb, disk_gb)"
        )


def remedies(
    settings: MemorySettings, available: int, device: str, allowed: Collection[str]
) -> list[tuple[str, int]]:
    """At most three changes that make a plan fit, least intrusive first, and what it then needs.

    A change is one option or several; none contains another that is enough by itself.
    """
    options = [option for option in _options(settings, device) if option.kind in allowed]
    found: list[tuple[frozenset[str], str, int]] = []
    for number in range(1, len(options) + 1):
        for chosen in combinations(options, number):
            names = frozenset(option.name for option in chosen)
            if len({option.kind for option in chosen}) < number or any(less < names for less, _, _ in found):
                continue
            changed, texts = settings, []
            for option in chosen:
                step = option.change(changed, available)
                if step is None:
                    break
                changed, text = step
                texts.append(text)
            else:
                need = changed.plan().peak_bytes
                if need <= available:
                    found.append((names, " ".join(texts), need))
            if len(found) == REMEDIES:
                return [(text, need) for _, text, need in found]
    return [(text, need) for _, text, need in found]


@dataclass(frozen=True)
class _Option:
    """A setting that takes less memory.

    Attributes:
        kind: options of one kind exclude each other.
        change: from settings and the bytes there are to changed settings and their text, or None.
    """

    kind: str
    name: str
    change: Callable[[MemorySettings, int], tuple[MemorySettings, str] | None]


def _options(settings: MemorySettings, device: str) -> Iterator[_Option]:
    """From what changes nothing in the video to what changes most."""
    gpu = not device.startswith("cpu")
    steps = PLACEMENTS.index(settings.placement)
    if gpu and steps < 1:
        yield _Option("offload", "text", _offloading("text"))
    if FORMATS[settings.spec.format].lossless:
        yield _Option("kv-format", "int8", _with_int8_pages)
    if gpu and steps < 2:
        yield _Option("offload", "model", _offloading("model"))
    if settings.text_weights == "full":
        yield _Option("weights", "text fp8", _with_fp8_text)
    if settings.weights == "full":
        yield _Option("weights", "fp8", _with_fp8_weights)
    yield _Option("window", "window", _with_smaller_window)
    if gpu and steps < 3:
        yield _Option("offload", "group", _offloading("group"))
    yield _Option("size", "size", _with_smaller_size)


def _offloading(name: str) -> Callable[[MemorySettings, int], tuple[MemorySettings, str]]:
    return lambda settings, _: (replace(settings, placement=OFFLOADS[name]), f"--offload {name}")


def _with_int8_pages(settings: MemorySettings, _: int) -> tuple[MemorySettings, str]:
    spec = settings.spec.model_copy(update={"format": "int8"})
    return replace(settings, spec=spec), "--kv-format int8"


def _with_fp8_weights(settings: MemorySettings, _: int) -> tuple[MemorySettings, str]:
    return replace(settings, weights="fp8", text_weights="fp8"), "--weights fp8"


def _with_fp8_text(settings: MemorySettings, _: int) -> tuple[MemorySettings, str]:
    return replace(settings, text_weights="fp8"), "--text-weights fp8"


def _with_smaller_window(settings: MemorySettings, available: int) -> tuple[MemorySettings, str] | None:
    """Sinks and whole chunks, one of them past: with none a chunk knows nothing of the video before it."""
    largest = settings.largest_window(available)
    if largest is None:
        return None
    sink, chunk = settings.spec.sink, settings.entry.chunk_frames
    window = sink + (largest - sink) // chunk * chunk
    if not sink + 2 * chunk <= window < settings.spec.window:
        return None
    return settings.with_window(window), f"--window {window}"


def _with_smaller_size(settings: MemorySettings, available: int) -> tuple[MemorySettings, str] | None:
    """About the same shape, in steps of a quarter."""
    unit = 2 * spatial_stride(settings.entry)
    for quarters in (3, 2, 1):
        height, width = (
            max(unit, round(pixels * quarters / 4 / unit) * unit)
            for pixels in (settings.height, settings.width)
        )
        smaller = replace(settings, height=height, width=width)
        if height * width < settings.height * settings.width and smaller.plan().peak_bytes <= available:
            return smaller, f"--height {height} --width {width}"
    return None


def gigabytes(count: int) -> str:
    """Bytes for people: decimal, with a digit that matters."""
    return f"{count / 1e9:.1f} GB" if count >= 10**9 else f"{count / 1e6:.0f} MB"


def latent_size(entry: ModelEntry, height: int, width: int) -> tuple[int, int]:
    """Latent rows and columns of a pixel size.

    Raises:
        InputError: not positive, or no multiple of the VAE's stride times the patch size.
    """
    stride = spatial_stride(entry)
    unit = 2 * stride
    for name, value in (("height", height), ("width", width)):
        if value <= 0 or value % unit:
            near = max(unit, round(value / unit) * unit)
            raise InputError(f"{name}={value} is no positive multiple of {unit}; the nearest is {near}")
    return height // stride, width // stride


def pixel_size(entry: ModelEntry, height: int | None, width: int | None) -> tuple[int, int]:
    """Rows and columns of a video; the model's own where none are given."""
    return entry.height if height is None else height, entry.width if width is None else width


def spatial_stride(entry: ModelEntry) -> int:
    """Pixels per latent row."""
    return int(entry.vae.get("scale_factor_spatial", 8))


@cache
def empty_models(name: str) -> tuple[ModelMixin, ModelMixin, nn.Module]:
    """Transformer, VAE and text encoder of a registry entry without memory for their weights."""
    from diffusers.models.autoencoders.autoencoder_kl_wan import AutoencoderKLWan
    from transformers import UMT5Config, UMT5EncoderModel

    from vidkv.models.registry import MODELS
    from vidkv.models.wan import CausalWanTransformer3DModel

    entry = MODELS[name]
    with empty_weights():
        return (
            CausalWanTransformer3DModel(**entry.transformer),
            AutoencoderKLWan(**entry.vae),
            UMT5EncoderModel(UMT5Config(**entry.text)),
        )


def parameter_counts(name: str) -> tuple[int, int, int]:
    """Parameters of transformer, VAE and text encoder, counted on empty models."""
    counts = [
        sum(p.numel() for name, p in model.named_parameters() if name != TIED_EMBEDDING)
        for model in empty_models(name)
    ]
    return counts[0], counts[1], counts[2]


@dataclass(frozen=True)
class _Activations:
    """Bytes alive at most beside weights, features and pages.

    Attributes:
        transformer: of one transformer pass outside its self-attention.
        attention: of one pass while self-attention reads, without what the read itself takes.
        text, decode: of encoding the prompts and of decoding a chunk.
        cast: of the largest layer whose weights are cast while it runs.
    """

    transformer: int
    attention: int
    text: int
    decode: int
    cast: int = 0


@dataclass(frozen=True)
class _Parts:
    """Bytes that do not depend on the cache; `streamed` is the transformer's share under group offload."""

    transformer: int
    streamed: int
    vae: int
    text: int
    features: int
    activations: _Activations
    context: int


def _plan(
    parts: _Parts, config: Any, spec: CacheSpec, geometry: CacheGeometry, dtype: torch.dtype,
    placement: Placement, caches: int, contexts: int, overlap: bool, settings: MemorySettings | None,
) -> MemoryPlan:  # fmt: skip
    """Sum up by phase."""
    if placement not in PLACEMENTS:
        raise InputError(f"placement={placement!r:.60}; choose {', '.join(PLACEMENTS)}")
    work = parts.activations
    kv, places = planned_bytes(spec, geometry, dtype), planned_places(spec, geometry, dtype)
    reading = work.attention + read_bytes(config.num_attention_heads, spec, geometry, dtype)
    activation = max(work.transformer + work.cast, reading)
    whole = placement == "resident"
    one_at_a_time = placement == "cpu_offload"
    transformer = parts.streamed if placement == "group_offload" else parts.transformer
    lasting = caches * kv + contexts * parts.context + parts.features + (parts.text if whole else 0)
    encode = parts.text + work.text + (parts.transformer + parts.vae if whole else 0)
    rollout = lasting + transformer + activation + (0 if one_at_a_time else parts.vae)
    decode = lasting + parts.vae + work.decode + (0 if one_at_a_time else transformer)
    if overlap and not one_at_a_time:
        rollout += work.decode
    host = 0
    if one_at_a_time:
        host = parts.transformer + parts.vae + parts.text
    elif placement == "group_offload":
        host = parts.transformer
    return MemoryPlan(
        kv_bytes=kv,
        weights_bytes=parts.transformer,
        text_bytes=parts.text,
        vae_bytes=parts.vae + parts.features,
        activation_bytes=activation,
        peak_bytes=max(encode, rollout, decode),
        negative_kv_bytes=(caches - 1) * kv,
        context_bytes=contexts * parts.context,
        feature_bytes=parts.features,
        text_activation_bytes=work.text,
        decode_activation_bytes=work.decode,
        encode_bytes=encode,
        rollout_bytes=rollout,
        decode_bytes=decode,
        host_bytes=host,
        kv_host_bytes=caches * places.host_bytes if places else 0,
        kv_disk_bytes=caches * places.disk_bytes if places else 0,
        settings=settings,
    )


def read_bytes(heads: int, spec: CacheSpec, g: CacheGeometry, dtype: torch.dtype) -> int:
    """Scratch of one layer's read, by the read path that takes most.

    A two-pass read holds one segment of keys and values decoded and turned, and two float32 partial outputs
    with the running one; a fused read of codes holds the queries turned to every page, coded, and up to three
    partial outputs; of packed codes also those pages unpacked. Both hold the current chunk's own keys and
    values, and with `local_heads` the queries of either kind of heads and the outputs apart and together.

    Args:
        heads: query heads.
    """
    d, tokens = g.head_dim, g.batch * g.chunk_frames * g.tokens
    segment = 3 * 2 * g.batch * spec.segment * g.tokens * g.kv_heads * d * dtype.itemsize
    two_pass = segment + 3 * tokens * heads * d * MERGE_BYTES
    fused = 0
    pages = spec.attended - g.chunk_frames
    coded = [(f, slots) for f, slots in planned_pools(spec, g, dtype).values() if f.fused and f.uses_key_mean]
    if coded:
        packed = min(pages, sum(slots for f, slots in coded if f.narrow))
        fused = pages * tokens * heads * (d + MERGE_BYTES)
        fused += packed * 2 * g.batch * g.tokens * g.kv_heads * (d + SCALE_BYTES)
        fused += (4 if packed else 3) * tokens * heads * d * dtype.itemsize
    current = 2 * tokens * g.kv_heads * d * dtype.itemsize
    parted = 3 * tokens * heads * d * dtype.itemsize if spec.local_heads else 0
    return int(max(two_pass, fused) + current + parted)


def _feature_bytes(vae: ModelMixin, latent: tuple[int, int], batch: int, dtype: torch.dtype) -> int:
    """What the streaming decoder keeps between chunks."""
    from vidkv.models.vae_decoders import feature_bytes

    return feature_bytes(vae, *latent, batch=batch, dtype=dtype)


def _context_bytes(config: Any, text_tokens: int, batch: int, dtype: torch.dtype) -> int:
    """Keys and values of one prompt for every layer's cross-attention."""
    width = config.num_attention_heads * config.attention_head_dim
    return int(2 * config.num_layers * batch * text_tokens * width * dtype.itemsize)


@cache
def _entry_weights(name: str, part: int, precision: Precision, dtype: torch.dtype) -> int:
    return planned_weight_bytes(empty_models(name)[part], precision, dtype)


@cache
def _entry_streamed(name: str, precision: Precision, dtype: torch.dtype) -> int:
    transformer = empty_models(name)[0]
    block = planned_weight_bytes(transformer, precision, dtype, within="blocks.0.")
    whole = _entry_weights(name, 0, precision, dtype)
    return min(whole, whole - block * (len(transformer.blocks) - RESIDENT_BLOCKS))


@cache
def _first_alike(name: str) -> str:
    """The first model of the registry with the same networks: most differ in weights and schedule alone."""
    from vidkv.models.registry import MODELS

    def networks(entry: ModelEntry) -> tuple[object, ...]:
        return entry.transformer, entry.vae, entry.text, entry.text_tokens

    wanted = networks(MODELS[name])
    return next(other.name for other in MODELS.values() if networks(other) == wanted)


@cache
def _entry_activations(
    name: str, latent: tuple[int, int], chunk_frames: int, batch: int, dtype: torch.dtype
) -> _Activations:
    from vidkv.models.registry import MODELS

    entry = MODELS[name]
    transformer, vae, text = empty_models(name)
    return _Activations(
        *pass_activations(transformer, latent, chunk_frames, batch, dtype),
        text_activations(text, entry.text_tokens, batch, dtype),
        decode_activations(vae, latent, chunk_frames, batch, dtype),
    )
