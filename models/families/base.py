"""What is known of a model without its weights, and the parts that several families share."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Source:
    """Where a user gets the weights, and under which terms.

    Attributes:
        repository: on the Hugging Face hub.
        files: the transformer's weights there, in order; a folder ends in a slash.
        lora: a LoRA file of the same repository that is merged into them.
        ema: whether the authors run the averaged weights where a file has both.
        base: repository of the text encoder, tokenizer and VAE.
        licence: of the weights as its authors state it; `unstated` where they do not.
        code_licence: of the authors' inference code, which vidkv neither contains nor needs.
    """

    repository: str
    files: tuple[str, ...]
    base: str
    licence: str
    code_licence: str
    lora: str | None = None
    ema: bool = True


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
        schedule: arguments of `FlowSchedule`.
        first_chunk_frames: latent frames of the first chunk where it differs from the others.
        recompute_context: the cache is built anew for every chunk from the clean latents before it
            (Krea's loop), instead of being kept.
        image_held: a given image is held clean inside the first chunk (Wan 2.2 TI2V), instead of being a
            chunk of its own before it.
        prompt_switch: what becomes of the history when the prompt changes, by default (see `Rollout.switch`).
        recache_at_once: a recache is one pass, as the model was trained for it.
        negative_prompt: what guidance leads away from by default, for models that are guided.
        weights: module whose folder holds the weights; None: the user brings them.
        source: where to get them.
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
    schedule: Mapping[str, Any] = field(default_factory=dict)
    first_chunk_frames: int | None = None
    recompute_context: bool = False
    image_held: bool = False
    prompt_switch: str = "keep"
    recache_at_once: bool = False
    negative_prompt: str = ""
    weights: str | None = None
    source: Source | None = None


UMT5_XXL = {
    "vocab_size": 256_384,
    "d_model": 4096,
    "d_kv": 64,
    "d_ff": 10_240,
    "num_layers": 24,
    "num_heads": 64,
    "feed_forward_proj": "gated-gelu",
}
FEW_STEPS = {"steps": (1000, 750, 500, 250), "shift": 5.0, "warp": True, "sampler": "renoise"}
"""The schedule of Self-Forcing and of most that came after it."""
