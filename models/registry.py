"""Known models by name: their architecture, how they are rolled out, and where their weights lie."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vidkv.models.bounce.prompts import World


@dataclass(frozen=True)
class ModelEntry:
    """What is known of a model without its weights.

    Attributes:
        name: as given on the command line.
        transformer: arguments of `CausalWanTransformer3DModel`.
        vae: arguments of diffusers' `AutoencoderKLWan`.
        text: arguments of transformers' `UMT5Config`.
        text_tokens: length to which prompts are padded.
        chunk_frames: latent frames per chunk.
        window, sink: default cache settings in latent frames.
        positions: `relative` or `absolute` (the `CacheSpec` setting the model was trained for).
        height, width, fps: default size in pixels and frame rate.
        weights: module whose folder holds the weights; None: the user brings them.
    """

    name: str
    transformer: Mapping[str, Any]
    vae: Mapping[str, Any]
    text: Mapping[str, Any]
    text_tokens: int
    chunk_frames: int
    window: int
    sink: int
    positions: str
    height: int
    width: int
    fps: int
    weights: str | None = None


UMT5_XXL = {
    "vocab_size": 256_384,
    "d_model": 4096,
    "d_kv": 64,
    "d_ff": 10_240,
    "num_layers": 24,
    "num_heads": 64,
    "feed_forward_proj": "gated-gelu",
}
WAN_VAE: dict[str, Any] = {}
"""diffusers' defaults are Wan 2.1's VAE."""

_WAN_21: dict[str, Any] = {
    "vae": WAN_VAE,
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
WAN_21_1_3B = ModelEntry(
    name="wan2.1-1.3b",
    transformer={"num_attention_heads": 12, "attention_head_dim": 128, "ffn_dim": 8960, "num_layers": 30},
    **_WAN_21,
)
WAN_21_14B = ModelEntry(
    name="wan2.1-14b",
    transformer={"num_attention_heads": 40, "attention_head_dim": 128, "ffn_dim": 13_824, "num_layers": 40},
    **_WAN_21,
)

MODELS: dict[str, ModelEntry] = {entry.name: entry for entry in (BOUNCE, WAN_21_1_3B, WAN_21_14B)}


def weights_folder(entry: ModelEntry) -> Path | None:
    """The folder of a model whose weights ship with the package; None for the others."""
    if entry.weights is None:
        return None
    return Path(next(iter(import_module(entry.weights).__path__))) / "weights"


def canonical_prompt(grammar: str | None) -> Callable[[str], str]:
    """How a model wants its prompts spelled; checks them on the way.

    Args:
        grammar: `bounce:WORLD` with a name of `bounce.prompts.WORLDS`, or None for free text.
    """
    if grammar is None:
        return _free_text
    from vidkv.models.bounce.prompts import parse

    world = _world(grammar)
    return lambda text: parse(text, world).text()


def contrast_prompt(grammar: str | None) -> Callable[[str], str]:
    """What guidance leads away from when the user names nothing: the empty prompt for free text."""
    if grammar is None:
        return lambda text: ""
    from vidkv.models.bounce.prompts import contrast, parse

    world = _world(grammar)
    return lambda text: contrast(parse(text, world), world).text()


def _world(grammar: str) -> World:
    from vidkv.errors import InputError
    from vidkv.models.bounce.prompts import WORLDS

    world = WORLDS.get(grammar.removeprefix("bounce:"))
    if world is None:
        known = ", ".join(f"bounce:{name}" for name in WORLDS)
        raise InputError(f"prompt_grammar={grammar!r} is unknown; there are {known}")
    return world


def _free_text(text: str) -> str:
    from vidkv.errors import PromptError

    if not text.strip():
        raise PromptError("the prompt is empty; describe the video in a sentence")
    if len(text) > 10_000:
        raise PromptError(f"the prompt has {len(text):,} characters; use at most 10,000")
    return text
