"""Small random weights in files of the layouts in which stock checkpoints are published."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from diffusers.models.autoencoders.autoencoder_kl_wan import AutoencoderKLWan
from torch import Tensor
from transformers import UMT5Config, UMT5EncoderModel

from tests.tiny import build_transformer, randomise
from vidkv.models.bounce.text import build_tokenizer
from vidkv.models.checkpoints import layouts
from vidkv.models.families.base import FEW_STEPS, UMT5_XXL, ModelEntry, Source
from vidkv.models.wan import CausalWanTransformer3DModel

Shapes = dict[str, tuple[int, ...]]
TRANSFORMER = {
    "num_attention_heads": 2,
    "attention_head_dim": 24,
    "in_channels": 4,
    "out_channels": 4,
    "text_dim": 64,
    "freq_dim": 32,
    "ffn_dim": 64,
    "num_layers": 2,
}
VAE: dict[str, Any] = {
    "base_dim": 4,
    "z_dim": 4,
    "dim_mult": [1, 2, 2, 2],
    "num_res_blocks": 2,
    "attn_scales": [],
    "temperal_downsample": [False, True, True],
    "latents_mean": [0.1, -0.2, 0.3, 0.0],
    "latents_std": [1.5, 0.5, 1.0, 2.0],
}
TEXT = UMT5_XXL | {"vocab_size": 300, "d_model": 64, "d_kv": 16, "d_ff": 96, "num_layers": 2, "num_heads": 4}
ENTRY = ModelEntry(
    name="tiny-stock",
    transformer=TRANSFORMER,
    vae=VAE,
    text=TEXT,
    text_tokens=24,
    chunk_frames=3,
    window=6,
    sink=0,
    positions="absolute",
    height=32,
    width=48,
    fps=16,
    schedule=FEW_STEPS,
    source=Source("someone/tiny", ("tiny.pt",), base="someone/base", licence="MIT", code_licence="MIT"),
)
"""As the registry has them, at a size for tests."""


def stock_shapes(name: str) -> Shapes:
    """Names and shapes of the published code's own module, at full size (`stock_shapes.json`)."""
    listed = json.loads(Path(__file__).with_name("stock_shapes.json").read_text())[name]
    shapes = {key: tuple(shape) for key, shape in listed["outer"].items()}
    for layer in range(listed["layers"]):
        shapes |= {f"blocks.{layer}.{key}": tuple(shape) for key, shape in listed["block"].items()}
    assert len(shapes) == listed["tensors"]
    return shapes


def in_wan_names(state: Mapping[str, Tensor], pairs: layouts.Pairs) -> dict[str, Tensor]:
    """A state dict under the names of Wan's own code."""
    back = layouts.inverted(pairs)
    renamed = {layouts.rename(name, back): tensor.clone() for name, tensor in state.items()}
    assert None not in renamed
    return {str(name): tensor for name, tensor in renamed.items()}


def transformer(seed: int = 0) -> CausalWanTransformer3DModel:
    return build_transformer(seed, **TRANSFORMER)


def wan_state(seed: int = 0) -> dict[str, Tensor]:
    """A transformer's state dict as Self-Forcing's wrapper saves it."""
    state = in_wan_names(transformer(seed).state_dict(), layouts.transformer_pairs(2))
    return {f"model.{name}": tensor for name, tensor in state.items()}


def vae(seed: int = 0) -> AutoencoderKLWan:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoencoderKLWan(**VAE)
    randomise(model, seed, spread=0.05)
    return model.eval()


def text_encoder(seed: int = 0) -> UMT5EncoderModel:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = UMT5EncoderModel(UMT5Config(**TEXT))
    return model.eval()


def write_base(folder: Path) -> Path:
    """The other parts as Wan-AI publishes them; the text encoder in bf16."""
    text = {k: v.bfloat16() for k, v in text_encoder().state_dict().items() if "embed_tokens" not in k}
    folder.mkdir(parents=True)
    torch.save(in_wan_names(text, layouts.text_pairs(2)), folder / "models_t5_umt5-xxl-enc-bf16.pth")
    pairs = layouts.vae_pairs(vae().config)
    torch.save(in_wan_names(vae().state_dict(), pairs), folder / "Wan2.1_VAE.pth")
    build_tokenizer().save_pretrained(folder / "google" / "umt5-xxl")
    return folder
