"""Wan 2.1 text-to-video (Wan-AI): the architecture that causal checkpoints share, and the two base models.

The base models were trained to see a whole clip at once and are not distilled. They can be rolled out
causally, with guidance and many steps as the non-distilled pipeline of Self-Forcing does, but were never
trained for it.
"""

from __future__ import annotations

from typing import Any

from vidkv.models.families.base import UMT5_XXL, ModelEntry, Source

BASE = "Wan-AI/Wan2.1-T2V-1.3B"
TRANSFORMER_1_3B = {"num_attention_heads": 12, "attention_head_dim": 128, "ffn_dim": 8960, "num_layers": 30}
TRANSFORMER_14B = {"num_attention_heads": 40, "attention_head_dim": 128, "ffn_dim": 13_824, "num_layers": 40}
VAE: dict[str, Any] = {}
"""diffusers' defaults are Wan 2.1's VAE."""
NEGATIVE_PROMPT = (
    "色调艳丽，过曝，静态，细节模糊不清，字幕，风格，作品，画作，画面，静止，整体发灰，最差质量，低质量，"  # noqa: RUF001
    "JPEG压缩残留，丑陋的，残缺的，多余的手指，画得不好的手部，画得不好的脸部，畸形的，毁容的，形态畸形的肢体，"  # noqa: RUF001
    "手指融合，静止不动的画面，杂乱的背景，三条腿，背景人很多，倒着走"  # noqa: RUF001
)
"""The one that Wan 2.1 was released with."""


def wan21(name: str, transformer: dict[str, int], **changes: Any) -> ModelEntry:
    """An entry with Wan 2.1's text encoder, VAE, size and chunk, changed where a checkpoint differs."""
    settings: dict[str, Any] = {
        "vae": VAE,
        "text": UMT5_XXL,
        "text_tokens": 512,
        "chunk_frames": 3,
        "window": 21,
        "sink": 0,
        "positions": "absolute",
        "height": 480,
        "width": 832,
        "fps": 16,
    }
    return ModelEntry(name=name, transformer=transformer, **(settings | changes))


def _base(name: str, transformer: dict[str, int], repository: str, files: tuple[str, ...]) -> ModelEntry:
    return wan21(
        name,
        transformer,
        schedule={"steps": tuple(range(1000, 0, -20)), "shift": 5.0, "sampler": "unipc", "guidance": 5.0},
        negative_prompt=NEGATIVE_PROMPT,
        source=Source(
            repository,
            files=files,
            base=repository,
            licence="Apache-2.0",
            code_licence="Apache-2.0",
        ),
    )


WAN_21_1_3B = _base("wan2.1-1.3b", TRANSFORMER_1_3B, BASE, ("diffusion_pytorch_model.safetensors",))
WAN_21_14B = _base(
    "wan2.1-14b",
    TRANSFORMER_14B,
    "Wan-AI/Wan2.1-T2V-14B",
    tuple(f"diffusion_pytorch_model-{i:05}-of-00006.safetensors" for i in range(1, 7)),
)
MODELS = (WAN_21_1_3B, WAN_21_14B)
