"""Memory needs from settings alone, before anything is loaded."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from functools import cache
from typing import TYPE_CHECKING, Any

import torch
from accelerate import init_empty_weights
from torch import nn

from vidkv.cache import CacheGeometry, CacheSpec, planned_bytes
from vidkv.cache.kv_cache import planned_pools
from vidkv.errors import InputError
from vidkv.models.families.base import ModelEntry

if TYPE_CHECKING:
    from diffusers.models.modeling_utils import ModelMixin

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
    latent = latent_size(entry, height, width)
    transformer, vae, _ = empty_models(entry.name)
    counts = parameter_counts(entry.name)
    weights = (counts[0] * dtype.itemsize, counts[1] * dtype.itemsize, counts[2] * dtype.itemsize)
    features = _feature_elements(vae, *latent) * batch * dtype.itemsize
    geometry = CacheGeometry.of_model(transformer.config, *latent, entry.chunk_frames, batch)
    return _plan(weights, features, transformer.config, spec, geometry, dtype)


def plan_loaded(
    transformer: ModelMixin,
    vae: ModelMixin,
    text_encoder: nn.Module,
    spec: CacheSpec,
    latent: tuple[int, int],
    chunk_frames: int,
    batch: int = 1,
) -> MemoryPlan:
    """Plan a rollout of networks as they are loaded: their own sizes and precisions.

    Args:
        latent: rows and columns of a latent frame.
    """
    modules = (transformer, vae, text_encoder)
    sizes = [sum(parameter.nbytes for parameter in module.parameters()) for module in modules]
    features = _feature_elements(vae, *latent) * batch * vae.dtype.itemsize
    geometry = CacheGeometry.of_model(transformer.config, *latent, chunk_frames, batch)
    weights = (sizes[0], sizes[1], sizes[2])
    return _plan(weights, features, transformer.config, spec, geometry, transformer.dtype)


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
    with init_empty_weights():
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


def _plan(
    weights: tuple[int, int, int],
    feature_bytes: int,
    config: Any,
    spec: CacheSpec,
    geometry: CacheGeometry,
    dtype: torch.dtype,
) -> MemoryPlan:
    """Sum up; weights are bytes of transformer, VAE and text encoder."""
    transformer, vae, text = weights
    vae += feature_bytes
    kv = planned_bytes(spec, geometry, dtype)
    activation = _activation_bytes(config, spec, geometry, dtype)
    return MemoryPlan(kv, transformer, text, vae, activation, max(kv + transformer + vae + activation, text))


def _activation_bytes(config: Any, spec: CacheSpec, g: CacheGeometry, dtype: torch.dtype) -> int:
    """The widest point of a block: residual stream, its float32 copies, q, k, v or the hidden layer.

    Plus what the read takes beside the pages.
    """
    heads, d = config.num_attention_heads, g.head_dim
    tokens, dim = g.batch * g.chunk_frames * g.tokens, heads * d
    stream = tokens * dim * (dtype.itemsize + 2 * MERGE_BYTES)
    hidden = tokens * max(config.ffn_dim, 4 * dim) * dtype.itemsize
    return int(stream + hidden + read_bytes(heads, spec, g, dtype))


def read_bytes(heads: int, spec: CacheSpec, g: CacheGeometry, dtype: torch.dtype) -> int:
    """Scratch of one layer's read, by the read path that takes most.

    A two-pass read holds one segment of keys and values decoded and turned, and two float32 partial outputs
    with the running one; a fused read of codes holds the queries turned to every page, coded, and up to two
    partial outputs. Both hold the current chunk's own keys and values.

    Args:
        heads: query heads.
    """
    d, tokens = g.head_dim, g.batch * g.chunk_frames * g.tokens
    segment = 3 * 2 * g.batch * spec.segment * g.tokens * g.kv_heads * d * dtype.itemsize
    two_pass = segment + 3 * tokens * heads * d * MERGE_BYTES
    fused = 0
    if planned_pools(spec, g, dtype)["pages"][0].uses_key_mean:
        turned = spec.capacity(g.chunk_frames) * tokens * heads * (d + MERGE_BYTES)
        fused = turned + 3 * tokens * heads * d * dtype.itemsize
    current = 2 * tokens * g.kv_heads * d * dtype.itemsize
    return int(max(two_pass, fused) + current)


def _feature_elements(vae: ModelMixin, rows: int, columns: int) -> int:
    """Elements of the two frames that each convolution of the VAE's decoder keeps."""
    from vidkv.models.vae import feature_shapes

    shapes = feature_shapes(vae)
    return sum(2 * channels * int(rows * scale) * int(columns * scale) for channels, scale, _ in shapes)
