"""Memory needs from settings alone, before anything is loaded."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from functools import cache

import torch
from accelerate import init_empty_weights

from vidkv.cache import CacheGeometry, CacheSpec, planned_bytes
from vidkv.errors import InputError
from vidkv.models.registry import ModelEntry

MERGE_BYTES = 4
TIED_EMBEDDING = "encoder.embed_tokens.weight"


@dataclass(frozen=True)
class MemoryPlan:
    """Bytes by part.

    Attributes:
        kv_bytes: pages between chunks, exactly what the cache allocates.
        weights_bytes: the transformer.
        text_bytes: the text encoder; it is not needed while chunks are denoised.
        vae_bytes: weights and the decoder's streaming caches.
        activation_bytes: the largest simultaneous intermediates of one transformer pass, scratch of the
            read path and the current chunk's keys and values of one layer included; an estimate.
        peak_bytes: the most that is in use at once with everything resident but the text encoder, or
            the text encoder alone if that is more.
    """

    kv_bytes: int
    weights_bytes: int
    text_bytes: int
    vae_bytes: int
    activation_bytes: int
    peak_bytes: int

    def as_dict(self) -> dict[str, int]:
        return asdict(self)


def plan_memory(
    entry: ModelEntry,
    spec: CacheSpec,
    height: int,
    width: int,
    batch: int = 1,
    dtype: torch.dtype = torch.bfloat16,
) -> MemoryPlan:
    """Plan a rollout of `height` x `width` pixels.

    Raises:
        InputError: a size that the model cannot make.
    """
    latent_height, latent_width = latent_size(entry, height, width)
    geometry = geometry_of(entry, latent_height, latent_width, batch)
    kv = planned_bytes(spec, geometry, dtype)
    weights = parameter_counts(entry.name)
    transformer, vae, text = (count * dtype.itemsize for count in weights)
    vae += _decoder_bytes(entry, height, width) * batch * dtype.itemsize
    activation = _activation_bytes(entry, spec, geometry, dtype)
    return MemoryPlan(kv, transformer, text, vae, activation, max(kv + transformer + vae + activation, text))


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


def geometry_of(entry: ModelEntry, latent_height: int, latent_width: int, batch: int = 1) -> CacheGeometry:
    """Cache geometry of a registry entry (patches are 2x2)."""
    heads = entry.transformer["num_attention_heads"]
    return CacheGeometry(
        layers=entry.transformer["num_layers"],
        kv_heads=entry.transformer.get("num_key_value_heads") or heads,
        head_dim=entry.transformer["attention_head_dim"],
        height=latent_height // 2,
        width=latent_width // 2,
        chunk_frames=entry.chunk_frames,
        batch=batch,
    )


@cache
def parameter_counts(name: str) -> tuple[int, int, int]:
    """Parameters of transformer, VAE and text encoder, counted on empty models."""
    from diffusers.models.autoencoders.autoencoder_kl_wan import AutoencoderKLWan
    from transformers import UMT5Config, UMT5EncoderModel

    from vidkv.models.registry import MODELS
    from vidkv.models.wan import CausalWanTransformer3DModel

    entry = MODELS[name]
    with init_empty_weights():
        models = (
            CausalWanTransformer3DModel(**entry.transformer),
            AutoencoderKLWan(**entry.vae),
            UMT5EncoderModel(UMT5Config(**entry.text)),
        )
    counts = [
        sum(p.numel() for name, p in model.named_parameters() if name != TIED_EMBEDDING) for model in models
    ]
    return counts[0], counts[1], counts[2]


def _activation_bytes(entry: ModelEntry, spec: CacheSpec, g: CacheGeometry, dtype: torch.dtype) -> int:
    """The widest point of a block: residual stream, its float32 copies, q, k, v or the hidden layer.

    Plus the read path: one segment of keys and values decoded and turned, and two float32 partial
    outputs with the running one.
    """
    heads, d = entry.transformer["num_attention_heads"], g.head_dim
    tokens, dim = g.batch * g.chunk_frames * g.tokens, heads * d
    stream = tokens * dim * (dtype.itemsize + 2 * MERGE_BYTES)
    hidden = tokens * max(entry.transformer["ffn_dim"], 4 * dim) * dtype.itemsize
    segment = 3 * 2 * g.batch * spec.segment * g.tokens * g.kv_heads * d * dtype.itemsize
    current = 2 * tokens * g.kv_heads * d * dtype.itemsize
    partial = 3 * tokens * dim * MERGE_BYTES
    return int(stream + hidden + segment + current + partial)


def _decoder_bytes(entry: ModelEntry, height: int, width: int) -> int:
    """Elements of the VAE decoder's two-frame convolution caches, from its layer widths."""
    from diffusers.models.autoencoders.autoencoder_kl_wan import (
        AutoencoderKLWan,
        WanCausalConv3d,
        WanResample,
    )

    with init_empty_weights():
        decoder = AutoencoderKLWan(**entry.vae).decoder
    patch = entry.vae.get("patch_size") or 1
    stride = spatial_stride(entry)
    rows, columns, elements = height // stride, width // stride, 0
    for module in decoder.modules():
        if isinstance(module, WanResample):
            rows, columns = min(2 * rows, height // patch), min(2 * columns, width // patch)
        if isinstance(module, WanCausalConv3d) and module.kernel_size[0] == 3:
            # the resampler's own convolution, over time alone, runs before it enlarges
            before = 4 if module.kernel_size[1] == 1 else 1
            elements += 2 * module.in_channels * rows * columns // before
    return elements
