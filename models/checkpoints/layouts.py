"""How stock checkpoints name their tensors, and what a model's shapes say about it.

Three networks come in two layouts each: Wan's own and diffusers' (for the text encoder transformers'). Each
has one table from names of Wan's modules to names of diffusers' modules, read in either direction.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from vidkv.errors import CheckpointError
from vidkv.models.checkpoints.folders import Shapes
from vidkv.models.checkpoints.pickles import PARTS
from vidkv.models.registry import MODELS
from vidkv.models.wan import CausalWanTransformer3DModel

Pairs = dict[str, str]
"""Names of modules or parameters, Wan's to diffusers'."""

WRAPPERS = {"_fsdp_wrapped_module", "module", "_orig_mod", "_checkpoint_wrapped_module"}
"""Parts of names that FSDP, DDP, torch.compile and activation checkpointing put in."""
OUTER = ("model.diffusion_model.", "diffusion_model.", "model.")
"""What stands before all names in the files of ComfyUI and of Self-Forcing's wrapper."""


@dataclass(frozen=True)
class Unwrapped:
    """Bare names of one set of weights in a file.

    Attributes:
        names: bare name to the name in the file.
        taken: the parts unwrapped, from outside inwards.
        beside: outer keys left aside.
    """

    names: dict[str, str]
    taken: tuple[str, ...]
    beside: tuple[str, ...]


def unwrap(names: Iterable[str], parts: Sequence[str] = PARTS) -> Unwrapped:
    """Choose a part by preference and take wrappers' leftovers out of its names.

    Raises:
        CheckpointError: two tensors end up with one name.
    """
    inner = {name: name for name in names}
    taken: list[str] = []
    beside: set[str] = set()
    while part := next((p for p in parts if any(name.startswith(f"{p}.") for name in inner)), None):
        taken.append(part)
        beside |= {name.split(".")[0] for name in inner if not name.startswith(f"{part}.")}
        inner = {
            name.removeprefix(f"{part}."): raw for name, raw in inner.items() if name.startswith(f"{part}.")
        }
    bare: dict[str, str] = {}
    for name, raw in inner.items():
        stripped = bare_name(name)
        if stripped in bare:
            raise CheckpointError(
                f"{raw} and {bare[stripped]} are both {stripped} once wrappers' names are taken out; "
                "the file mixes two sets of weights: save one of them alone"
            )
        bare[stripped] = raw
    return Unwrapped(bare, tuple(taken), tuple(sorted(beside)))


def bare_name(name: str) -> str:
    """A parameter's name without what wrappers put in, anywhere, and without one outer prefix."""
    name = ".".join(part for part in name.split(".") if part not in WRAPPERS)
    prefix = next((prefix for prefix in OUTER if name.startswith(prefix)), "")
    return name.removeprefix(prefix)


def lora_only(names: Iterable[str]) -> bool:
    """Whether all tensors are LoRA factors."""
    marks = (".generator_lora.", ".lora_A.", ".lora_B.", ".lora_down.", ".lora_up.")
    kept = [f".{name}" for name in names if not name.endswith(".alpha")]
    return bool(kept) and all(any(mark in name for mark in marks) for name in kept)


def inverted(pairs: Pairs) -> Pairs:
    return {new: old for old, new in pairs.items()}


def rename(name: str, pairs: Pairs) -> str | None:
    """A parameter's name by a table that has the parameter or its module; None where it has neither."""
    if name in pairs:
        return pairs[name]
    module, _, leaf = name.rpartition(".")
    return f"{pairs[module]}.{leaf}" if module in pairs else None


def layers(names: Iterable[str], prefix: str) -> int:
    """How many blocks `PREFIX.N.` there are."""
    found = {name.removeprefix(prefix).split(".")[0] for name in names if name.startswith(prefix)}
    return 1 + max((int(number) for number in found if number.isdecimal() and len(number) < 5), default=-1)


def transformer_pairs(num_layers: int) -> Pairs:
    """Wan's transformer to diffusers' `WanTransformer3DModel`."""
    embedder = "condition_embedder"
    pairs = {
        "patch_embedding": "patch_embedding",
        "text_embedding.0": f"{embedder}.text_embedder.linear_1",
        "text_embedding.2": f"{embedder}.text_embedder.linear_2",
        "time_embedding.0": f"{embedder}.time_embedder.linear_1",
        "time_embedding.2": f"{embedder}.time_embedder.linear_2",
        "time_projection.1": f"{embedder}.time_proj",
        "head.head": "proj_out",
        "head.modulation": "scale_shift_table",
    }
    block = {
        "modulation": "scale_shift_table",
        # Wan's second norm has no weights and is diffusers' third
        "norm3": "norm2",
        "ffn.0": "ffn.net.0.proj",
        "ffn.2": "ffn.net.2",
    }
    attention = {
        "q": "to_q",
        "k": "to_k",
        "v": "to_v",
        "o": "to_out.0",
        "norm_q": "norm_q",
        "norm_k": "norm_k",
    }
    for old, new in (("self_attn", "attn1"), ("cross_attn", "attn2")):
        block |= {f"{old}.{a}": f"{new}.{b}" for a, b in attention.items()}
    return pairs | _repeated("blocks", "blocks", block, num_layers)


def text_pairs(num_layers: int) -> Pairs:
    """Wan's umT5 encoder to transformers' `UMT5EncoderModel`."""
    block = {f"attn.{name}": f"layer.0.SelfAttention.{name}" for name in "qkvo"} | {
        "pos_embedding.embedding": "layer.0.SelfAttention.relative_attention_bias",
        "norm1": "layer.0.layer_norm",
        "ffn.gate.0": "layer.1.DenseReluDense.wi_0",
        "ffn.fc1": "layer.1.DenseReluDense.wi_1",
        "ffn.fc2": "layer.1.DenseReluDense.wo",
        "norm2": "layer.1.layer_norm",
    }
    outer = {"token_embedding": "shared", "norm": "encoder.final_layer_norm"}
    return outer | _repeated("blocks", "encoder.block", block, num_layers)


def vae_pairs(config: Mapping[str, Any]) -> Pairs:
    """Wan's VAE to diffusers' `AutoencoderKLWan`.

    Wan 2.1 numbers the layers of its encoder and decoder through; diffusers does so in the encoder alone.
    Wan 2.2 groups both by resolution, and so does diffusers.

    Args:
        config: the VAE's, all settings present.
    """
    levels, depth = len(config["dim_mult"]), config["num_res_blocks"]
    pairs = {"conv1": "quant_conv", "conv2": "post_quant_conv"}
    for side in ("encoder", "decoder"):
        pairs |= {f"{side}.conv1": f"{side}.conv_in", f"{side}.head.0": f"{side}.norm_out"}
        pairs |= {f"{side}.head.2": f"{side}.conv_out"}
        pairs |= _residual(f"{side}.middle.0", f"{side}.mid_block.resnets.0")
        pairs |= _residual(f"{side}.middle.2", f"{side}.mid_block.resnets.1")
        for part in ("norm", "to_qkv", "proj"):
            pairs[f"{side}.middle.1.{part}"] = f"{side}.mid_block.attentions.0.{part}"
    for side, old, new, resnets in (
        ("encoder", "downsamples", "down_blocks", depth),
        ("decoder", "upsamples", "up_blocks", depth + 1),
    ):
        sampler = "downsampler" if side == "encoder" else "upsampler"
        for level in range(levels):
            for i in range(resnets + 1):
                flat = level * (resnets + 1) + i
                last = i == resnets
                if config["is_residual"]:
                    source = f"{side}.{old}.{level}.{old}.{i}"
                    target = f"{side}.{new}.{level}." + (sampler if last else f"resnets.{i}")
                else:
                    source = f"{side}.{old}.{flat}"
                    target = f"{side}.{new}.{level}." + (f"{sampler}s.0" if last else f"resnets.{i}")
                    if side == "encoder":
                        target = f"{side}.{new}.{flat}"
                pairs |= _resample(source, target) if last else _residual(source, target)
    return pairs


def _repeated(old: str, new: str, block: Pairs, count: int) -> Pairs:
    return {f"{old}.{i}.{a}": f"{new}.{i}.{b}" for i in range(count) for a, b in block.items()}


def _residual(old: str, new: str) -> Pairs:
    inner = {"residual.0": "norm1", "residual.2": "conv1", "residual.3": "norm2", "residual.6": "conv2"}
    return {f"{old}.{a}": f"{new}.{b}" for a, b in (inner | {"shortcut": "conv_shortcut"}).items()}


def _resample(old: str, new: str) -> Pairs:
    return {f"{old}.{part}": f"{new}.{part}" for part in ("resample.1", "time_conv")}


def transformer_layout(names: Iterable[str]) -> str:
    """`wan` or `diffusers`.

    Raises:
        CheckpointError: these are no names of a Wan transformer.
    """
    names = list(names)
    for layout, mark in (("wan", ".self_attn."), ("diffusers", ".attn1.")):
        if any(mark in name for name in names):
            return layout
    some = ", ".join(sorted(names)[:3]) or "nothing"
    raise CheckpointError(f"these are no weights of a Wan transformer: the names are {some} …")


def to_diffusers(names: Iterable[str], pairs: Pairs) -> dict[str, str]:
    """Names in Wan's layout to diffusers'; a name without a place keeps its own, to be refused later."""
    return {name: rename(name, pairs) or name for name in names}


def transformer_config(shapes: Shapes, head_dim: int = 128) -> dict[str, Any]:
    """Settings of `CausalWanTransformer3DModel` that shapes in diffusers' layout imply.

    Args:
        head_dim: channels per head, which no shape shows.

    Raises:
        CheckpointError: a tensor that tells a setting is missing or of another rank.
    """
    dim, in_channels, *patch = _shape(shapes, "patch_embedding.weight", 5)
    outputs = _shape(shapes, "proj_out.weight", 2)[0]
    text_dim = _shape(shapes, "condition_embedder.text_embedder.linear_1.weight", 2)[1]
    freq_dim = _shape(shapes, "condition_embedder.time_embedder.linear_1.weight", 2)[1]
    ffn_dim = _shape(shapes, "blocks.0.ffn.net.0.proj.weight", 2)[0]
    kv_dim = _shape(shapes, "blocks.0.attn1.to_k.weight", 2)[0]
    if dim % head_dim or kv_dim % head_dim:
        raise CheckpointError(
            f"widths of {dim} and {kv_dim} channels are no multiples of head_dim {head_dim}; "
            "name a registered model with the right one"
        )
    return {
        "patch_size": tuple(patch),
        "num_attention_heads": dim // head_dim,
        "num_key_value_heads": kv_dim // head_dim,
        "attention_head_dim": head_dim,
        "in_channels": in_channels,
        "out_channels": outputs // (patch[1] * patch[2]),
        "text_dim": text_dim,
        "freq_dim": freq_dim,
        "ffn_dim": ffn_dim,
        "num_layers": layers(shapes, "blocks."),
        "cross_attn_norm": "blocks.0.norm2.weight" in shapes,
        "eps": 1e-6,
    }


def full_config(transformer: Mapping[str, Any]) -> dict[str, Any]:
    """A registry entry's transformer settings with the defaults filled in."""
    parameters = inspect.signature(CausalWanTransformer3DModel.__init__).parameters
    config = {name: p.default for name, p in parameters.items() if name != "self"} | dict(transformer)
    config["num_key_value_heads"] = config["num_key_value_heads"] or config["num_attention_heads"]
    return config


def fitting_models(shapes: Shapes) -> list[str]:
    """Registered models whose architecture these shapes (diffusers' layout) imply."""
    fitting = []
    for name, entry in MODELS.items():
        wanted = full_config(entry.transformer)
        try:
            if transformer_config(shapes, wanted["attention_head_dim"]) == wanted:
                fitting.append(name)
        except CheckpointError:
            continue
    return fitting


def compare(found: Shapes, wanted: Shapes, where: str, raw: Mapping[str, str], advice: str) -> None:
    """Hold shapes against those of a model, in one layout.

    Args:
        where: the file and what it should be, to start the message.
        raw: names to what the file calls them.
        advice: what to do, to end it.

    Raises:
        CheckpointError: naming the first tensor that is missing, of another shape or unexpected.
    """
    for name, shape in wanted.items():
        if name not in found:
            raise CheckpointError(f"{where}: {name} {shape} is missing; {advice}")
        if found[name] != shape:
            called = raw.get(name, name)
            raise CheckpointError(f"{where}: {called} is {found[name]}, the model has {shape}; {advice}")
    extra = sorted(set(found) - set(wanted))
    if extra:
        called = raw.get(extra[0], extra[0])
        raise CheckpointError(
            f"{where}: {called} {found[extra[0]]} has no place in it ({len(extra)} such tensors); {advice}"
        )


def _shape(shapes: Shapes, name: str, rank: int) -> tuple[int, ...]:
    shape = shapes.get(name, ())
    if len(shape) != rank:
        found = f"is {shape}" if name in shapes else "is missing"
        raise CheckpointError(f"{name} {found}; a Wan transformer has it with {rank} dimensions")
    return shape
