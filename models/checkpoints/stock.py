"""Stock files brought to the names and shapes that vidkv's models have."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vidkv.errors import CheckpointError
from vidkv.models.checkpoints import layouts
from vidkv.models.checkpoints.folders import model_shapes
from vidkv.models.checkpoints.hub import TEXT_FILES
from vidkv.models.checkpoints.sources import Weights
from vidkv.models.families.base import ModelEntry
from vidkv.models.wan import CausalWanTransformer3DModel


def transformer_weights(
    weights: Weights, entry: ModelEntry, path: Path
) -> tuple[Weights, dict[str, str], str]:
    """The transformer's weights under diffusers' names, all there and of the entry's shapes.

    Returns:
        the weights, their names to the names before, and the layout that they had.

    Raises:
        CheckpointError: naming the first tensor that does not fit and the registered models that would.
    """
    weights.require_floats()
    try:
        layout = layouts.transformer_layout(weights.tensors)
    except CheckpointError as error:
        raise CheckpointError(f"{path}: {error}; check that this is the transformer's file") from None
    names = {name: name for name in weights.tensors}
    if layout == "wan":
        pairs = layouts.transformer_pairs(layouts.layers(weights.tensors, "blocks."))
        names = layouts.to_diffusers(weights.tensors, pairs)
    found = weights.renamed(names)
    raw = {new: old for old, new in names.items()}
    if len(raw) < len(names):
        twice = next(old for old, new in names.items() if raw[new] != old)
        raise CheckpointError(
            f"{path}: {twice} and {raw[names[twice]]} are one tensor in two layouts; keep one"
        )
    fitting = [name for name in layouts.fitting_models(found.shapes) if name != entry.name]
    fits = f"it fits {', '.join(fitting)}" if fitting else "no other registered model has these shapes either"
    wanted = model_shapes(CausalWanTransformer3DModel, entry.transformer)
    layouts.compare(found.shapes, wanted, f"{path} as {entry.name}", raw, fits)
    return found, raw, layout


def part_weights(weights: Weights, name: str, vae: Mapping[str, Any]) -> Weights:
    """Weights of a part in Wan's layout under the names of diffusers' or transformers' class.

    Args:
        name: `text_encoder` or `vae`.
        vae: the VAE's settings, all present.
    """
    weights.require_floats()
    count = layouts.layers(weights.tensors, "blocks.")
    pairs = layouts.vae_pairs(vae) if name == "vae" else layouts.text_pairs(count)
    return weights.renamed(layouts.to_diffusers(weights.tensors, pairs))


def part_file(base: Path, name: str) -> Path:
    """A part's file in a folder as Wan-AI publishes it.

    Raises:
        CheckpointError: it is not there.
    """
    patterns = TEXT_FILES if name == "text_encoder" else ("Wan2.*_VAE.pth", "Wan2.*_VAE.safetensors")
    found = [path for pattern in patterns for path in sorted(base.glob(pattern))]
    if not found:
        raise CheckpointError(
            f"{base} holds no {' or '.join(patterns)}; --base is a folder as Wan-AI publishes it, one that "
            "save_pretrained wrote, or one that vidkv convert wrote"
        )
    return found[0]
