"""The embedded world's own model, whose weights ship with the package."""

from __future__ import annotations

from vidkv.models.families.base import ModelEntry

BOUNCE = ModelEntry(
    name="bounce",
    transformer={
        "num_attention_heads": 4,
        "attention_head_dim": 64,
        "text_dim": 64,
        "ffn_dim": 704,
        "num_layers": 6,
    },
    vae={
        "base_dim": 16,
        "z_dim": 16,
        "dim_mult": [1, 2, 4],
        "num_res_blocks": 1,
        "attn_scales": [],
        "temperal_downsample": [True, True],
        "patch_size": 2,
        "in_channels": 12,
        "out_channels": 12,
        "scale_factor_temporal": 4,
        "scale_factor_spatial": 8,
    },
    text={
        "vocab_size": 26,
        "d_model": 64,
        "d_kv": 16,
        "d_ff": 128,
        "num_layers": 2,
        "num_heads": 4,
        "dropout_rate": 0.0,
        "feed_forward_proj": "gated-gelu",
    },
    text_tokens=32,
    chunk_frames=3,
    window=21,
    sink=3,
    positions="relative",
    height=64,
    width=64,
    fps=16,
    weights="vidkv.models.bounce",
)
MODELS = (BOUNCE,)
