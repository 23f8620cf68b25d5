"""Builders of small random models, caches and rollouts that several tests share."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from diffusers.models.autoencoders.autoencoder_kl_wan import AutoencoderKLWan
from torch import Tensor, nn

from vidkv.cache import CacheGeometry, CacheSpec
from vidkv.models.vae import StreamingDecoder
from vidkv.models.wan import CausalWanTransformer3DModel, TextContext
from vidkv.pipeline import CausalVideoPipeline
from vidkv.rollout import Rollout
from vidkv.schedule import FlowSchedule

CHANNELS, TEXT_DIM = 4, 64
LATENT_SIZE = (CHANNELS, 4, 6)
"""2x3 tokens a frame; 32x48 pixels with the VAE of `build_vae`."""
HEIGHT, WIDTH = 32, 48


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def noise(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=generator(seed), dtype=dtype)


def relative_l2(found: Tensor, wanted: Tensor) -> float:
    """‖found - wanted‖ / ‖wanted‖ at float64."""
    assert found.shape == wanted.shape
    return float((found.double() - wanted.double()).norm() / wanted.double().norm())


def randomise(module: nn.Module, seed: int = 0, spread: float = 0.3) -> None:
    """Every parameter away from its initial value: no bias of zero, no gain of one hides a mistake."""
    source = generator(seed)
    for parameter in module.parameters():
        with torch.no_grad():
            parameter.add_(torch.randn(parameter.shape, generator=source) * spread)


def build_transformer(seed: int = 0, **config: Any) -> CausalWanTransformer3DModel:
    """Two layers of two heads at head_dim 24."""
    settings: dict[str, Any] = {
        "num_attention_heads": 2,
        "attention_head_dim": 24,
        "in_channels": CHANNELS,
        "out_channels": CHANNELS,
        "text_dim": TEXT_DIM,
        "freq_dim": 32,
        "ffn_dim": 64,
        "num_layers": 2,
    }
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = CausalWanTransformer3DModel(**(settings | config))
    randomise(model, seed, spread=0.1)
    return model.eval().requires_grad_(False)


def build_text(
    transformer: CausalWanTransformer3DModel, batch: int = 1, tokens: int = 5, seed: int = 0
) -> TextContext:
    embeds = noise(batch, tokens, transformer.config.text_dim, seed=100 + seed).to(transformer.device)
    with torch.no_grad():
        return transformer.encode_text(embeds)


def build_vae(seed: int = 0, **config: Any) -> AutoencoderKLWan:
    """The geometry of the embedded world's VAE (4x time, 8x space), with four channels in every layer."""
    settings: dict[str, Any] = {
        "base_dim": 4,
        "z_dim": CHANNELS,
        "dim_mult": [1, 1, 1],
        "num_res_blocks": 1,
        "attn_scales": [],
        "temperal_downsample": [True, True],
        "latents_mean": [0.1, -0.2, 0.3, 0.0],
        "latents_std": [1.5, 0.5, 1.0, 2.0],
        "patch_size": 2,
        "in_channels": 12,
        "out_channels": 12,
        "scale_factor_temporal": 4,
        "scale_factor_spatial": 8,
    }
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        vae = AutoencoderKLWan(**(settings | config))
    randomise(vae, seed, spread=0.1)
    return vae.eval().requires_grad_(False)


def build_pipeline(seed: int = 0, **config: Any) -> CausalVideoPipeline:
    """The embedded world's interface on random networks; two denoising steps."""
    from vidkv.models.bounce.text import build_text_encoder, build_tokenizer

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        encoder = build_text_encoder()
    settings: dict[str, Any] = {"steps": (1000, 500), "prompt_grammar": "bounce:wide"}
    pipe = CausalVideoPipeline(
        build_transformer(seed), build_vae(seed), encoder.eval(), build_tokenizer(), **(settings | config)
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def build_rollout(
    spec: CacheSpec | str = "fp32,window=9,sink=2",
    *,
    transformer: CausalWanTransformer3DModel | None = None,
    text: TextContext | None = None,
    seeds: Sequence[int] = (7,),
    schedule: FlowSchedule | None = None,
    vae: AutoencoderKLWan | None = None,
    latent_size: tuple[int, int, int] = LATENT_SIZE,
    chunk_frames: int = 3,
) -> Rollout:
    """A rollout of two denoising steps."""
    transformer = transformer or build_transformer()
    return Rollout(
        transformer,
        text or build_text(transformer, len(seeds)),
        CacheSpec.parse(spec) if isinstance(spec, str) else spec,
        schedule or FlowSchedule(steps=(1000, 500)),
        latent_size,
        seeds,
        chunk_frames,
        StreamingDecoder(vae) if vae else None,
    )


def build_geometry(**settings: Any) -> CacheGeometry:
    """Two layers of two heads with pages of four tokens and eight channels."""
    defaults: dict[str, Any] = {"layers": 2, "kv_heads": 2, "head_dim": 8, "height": 2, "width": 2}
    return CacheGeometry(**(defaults | settings))
