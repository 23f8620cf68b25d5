"""LoRA files in the layouts that exist for Wan: merged into weights, or loaded as adapters beside them.

A LoRA replaces a linear layer's weight W (out, in) by W + scale·(alpha/r)·up·down, with down (r, in) and up
(out, r). Adapters are diffusers' and peft's own; here every layout is read into one, and a file that would be
applied only in part is refused.
"""

from __future__ import annotations

import json
import math
import re
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping, MutableMapping
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any, ClassVar

import torch
from diffusers.loaders.lora_base import LORA_ADAPTER_METADATA_KEY
from diffusers.loaders.lora_pipeline import WanLoraLoaderMixin
from diffusers.utils.peft_utils import get_adapter_name
from peft.tuners.lora.layer import LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import get_pattern_key
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from vidkv.errors import CheckpointError, InputError
from vidkv.models.checkpoints.folders import read_json
from vidkv.models.checkpoints.layouts import WRAPPERS, layers, transformer_pairs
from vidkv.models.wan import CausalWanTransformer3DModel
from vidkv.models.weights import precision_of

Source = str | Path | Mapping[str, Tensor]
"""A safetensors file, a folder with one, or tensors by name."""
Sizes = dict[str, tuple[int, ...]]
"""Linear layers by diffusers' names: (out, in)."""

FOLDER_NAMES = ("adapter_model.safetensors", "pytorch_lora_weights.safetensors")
"""What peft and diffusers call a LoRA in a folder."""
OUTER = (
    "generator_lora.", "base_model.model.", "model.", "generator.", "diffusion_model.", "transformer.",
)  # fmt: skip
"""What stands before a layer's name: LongLive's key, peft, wrappers, ComfyUI, diffusers."""
KOHYA = "lora_unet_"
FACTOR = re.compile(r"(.+)\.(lora_A|lora_B|lora_down|lora_up|lora\.down|lora\.up)(\.[^.]+)?\.weight")
DOWN = ("lora_A", "lora_down", "lora.down")
OTHER_KINDS = {
    "diff": "the difference of a whole weight",
    "diff_b": "the difference of a bias",
    "bias": "a bias of the LoRA",
    "dora_scale": "part of a DoRA",
    "lora_magnitude_vector": "part of a DoRA",
    "lokr": "part of a LoKr",
    "hada": "part of a LoHa",
}
"""Tensors of other kinds of adapters, by a part of their names."""


@dataclass(frozen=True)
class Factors:
    """The update of one linear layer.

    Attributes:
        down: (r, in).
        up: (out, r).
        alpha: the update is alpha/r times their product.
    """

    down: Tensor
    up: Tensor
    alpha: float

    @property
    def rank(self) -> int:
        return int(self.down.shape[0])

    def added_to(self, weight: Tensor, scale: float) -> Tensor:
        """weight + scale·(alpha/r)·up·down, computed in float32, in the weight's dtype and on its device."""
        up, down = (t.to(weight.device, torch.float32) for t in (self.up, self.down))
        return (weight.float() + scale * (self.alpha / self.rank) * (up @ down)).to(weight.dtype)


def read_lora(
    source: Source, sizes: Mapping[str, tuple[int, ...]], alpha: float | None = None
) -> dict[str, Factors]:
    """All factors of a LoRA, by diffusers' names of the layers they belong to.

    Layers may be called as in diffusers (`transformer.blocks.0.attn1.to_q.lora_A.weight`), as in Wan and
    ComfyUI (`diffusion_model.blocks.0.self_attn.q.lora_down.weight`), as by kohya's and musubi's trainers
    (`lora_unet_blocks_0_self_attn_q.…`) or as by peft (`base_model.model.blocks.0.….lora_A.default.weight`).

    Args:
        sizes: the model's linear layers.
        alpha: of layers for which neither the tensors nor the header nor peft's `adapter_config.json` has
            one; None: their rank.

    Raises:
        CheckpointError: the file cannot be read, holds anything but LoRA factors, lacks one of a pair, or has
            a factor without a place in the model, of another shape or not finite.
    """
    tensors, settings, where = _tensors(source)
    pairs, alphas = _sorted_out(tensors, where)
    places = _places(sizes)
    found: dict[str, Factors] = {}
    for called, (down_key, up_key) in pairs.items():
        name = places.get(called)
        if name is None:
            raise CheckpointError(_no_place(where, down_key, called, pairs, places, sizes))
        if name in found:
            raise CheckpointError(f"{where}: {down_key} is a second LoRA of {name}; save one of them alone")
        down, up = tensors[down_key], tensors[up_key]
        _check_shapes(where, (down_key, down), (up_key, up), name, sizes[name])
        given = alphas.pop(called, None)
        if given is None:
            given = _alpha_of(settings, called, where)
        if given is None:
            given = alpha
        found[name] = Factors(down, up, float(down.shape[0]) if given is None else given)
        if not math.isfinite(found[name].alpha):
            raise CheckpointError(f"{where}: the alpha of {called} is {found[name].alpha}; it must be finite")
    if alphas:
        raise CheckpointError(f"{where}: {next(iter(alphas))}.alpha has no LoRA factors beside it")
    return found


def merge_lora(
    state: MutableMapping[str, Tensor], path: Path, scale: float = 1.0, alpha: float | None = None
) -> int:
    """Add a LoRA to a transformer's weights, in place.

    Args:
        state: the transformer in diffusers' names; changed only if the whole file fits.
        path: a safetensors file; see `read_lora` for its layouts.
        scale: 0 leaves every weight as it is.
        alpha: for files that have none; None: their rank.

    Returns:
        How many matrices were changed.

    Raises:
        CheckpointError: see `read_lora`.
        InputError: a scale that is not finite.
    """
    _check_weight(scale)
    sizes = {
        name.removesuffix(".weight"): tuple(tensor.shape)
        for name, tensor in state.items()
        if name.endswith(".weight") and tensor.ndim == 2
    }
    found = read_lora(path, sizes, alpha)
    for name in found:
        kind = state[f"{name}.weight"].dtype
        if not kind.is_floating_point or kind.itemsize < 2:
            raise CheckpointError(
                f"{name}.weight is stored as {kind}; merge a LoRA into weights of at least 16 bits"
            )
    for name, factors in found.items():
        state[f"{name}.weight"] = factors.added_to(state[f"{name}.weight"], scale)
    return len(found)


def load_adapter(
    transformer: CausalWanTransformer3DModel,
    source: Source,
    adapter_name: str | None = None,
    weight: float = 1.0,
    alpha: float | None = None,
    hotswap: bool = False,
    pipeline: Any = None,
) -> str:
    """Load a LoRA beside a transformer's weights; it becomes the only active one, as in diffusers.

    Args:
        adapter_name: by default `default_0`, `default_1` …
        weight: how strongly it acts; `transformer.set_adapters` changes it and combines several.
        alpha: for files that have none; None: their rank.
        hotswap: take the place of the loaded adapter of that name.
        pipeline: whose offloading must be suspended meanwhile.

    Returns:
        The adapter's name.

    Raises:
        CheckpointError: see `read_lora`; the transformer is as it was.
        InputError: a name that is in use or impossible, a weight that is not finite, or fused adapters.
    """
    _check_weight(weight)
    refuse_fused(transformer)
    name = adapter_name or get_adapter_name(transformer)
    loaded = getattr(transformer, "peft_config", {})
    if "." in name:
        raise InputError(f"adapter_name={name!r:.80} has a dot; leave it out")
    if (name in loaded) != hotswap:
        known = ", ".join(loaded) or "none"
        problem = "is not loaded, so it cannot be swapped" if hotswap else "is in use; choose another name"
        raise InputError(f"adapter_name={name!r:.80} {problem} (loaded: {known})")
    found = read_lora(source, linear_sizes(transformer), alpha)
    state = {}
    for layer, factors in found.items():
        # copies: tensors of a file are views of it
        state[f"transformer.{layer}.lora_A.weight"] = factors.down.to(transformer.dtype, copy=True)
        state[f"transformer.{layer}.lora_B.weight"] = factors.up.to(transformer.dtype, copy=True)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Already found a `peft_config` attribute")
        # fusing into integers is refused below
        warnings.filterwarnings("ignore", "TorchaoLoraLinear was instantiated without")
        transformer.load_lora_adapter(
            state, adapter_name=name, metadata=_peft_config(found), hotswap=hotswap, _pipeline=pipeline,
            low_cpu_mem_usage=True,
        )  # fmt: skip
    transformer.set_adapters(name, weight)
    for layer, module in _lora_layers(transformer).items():
        module.requires_grad_(False)
        if layer in found:
            _restore(module.lora_A[name], found[layer].down, transformer.dtype)
            _restore(module.lora_B[name], found[layer].up, transformer.dtype)
    # peft's layers start in training mode
    transformer.train(transformer.training)
    return name


class LoraPipelineMixin(WanLoraLoaderMixin):
    """diffusers' LoRA methods for a pipeline whose `transformer` is ours; files are read by `read_lora`."""

    _lora_loadable_modules: ClassVar = ["transformer"]
    transformer: CausalWanTransformer3DModel

    def load_lora_weights(
        self,
        pretrained_model_name_or_path_or_dict: Source,
        adapter_name: str | None = None,
        hotswap: bool = False,
        *,
        weight_name: str | None = None,
        alpha: float | None = None,
    ) -> None:
        """Load a LoRA from a file, a folder or a state dict; nothing is downloaded.

        Args:
            adapter_name: for `set_adapters`, `fuse_lora` and `delete_adapters`.
            hotswap: take the place of the loaded adapter of that name.
            weight_name: the file, if a folder is given.
            alpha: for files that have none; None: their rank.

        Raises:
            CheckpointError, InputError: see `load_adapter`.
        """
        source = pretrained_model_name_or_path_or_dict
        if weight_name is not None and not isinstance(source, Mapping):
            source = Path(source) / weight_name
        load_adapter(self.transformer, source, adapter_name, alpha=alpha, hotswap=hotswap, pipeline=self)

    def set_adapters(self, adapter_names: list[str] | str, adapter_weights: Any = None) -> None:
        """Choose the active adapters and how strongly each acts.

        Raises:
            InputError: an adapter that is not loaded, as many weights as names are not given, or adapters
                are fused, so that nothing would change.
        """
        refuse_fused(self.transformer)
        try:
            super().set_adapters(adapter_names, adapter_weights)
        except ValueError as error:
            raise InputError(str(error)) from None

    def fuse_lora(
        self,
        components: list[str] | None = None,
        lora_scale: float = 1.0,
        safe_fusing: bool = False,
        adapter_names: list[str] | None = None,
        **kwargs: Any,
    ) -> None:
        """Add the active adapters to the weights; `unfuse_lora` takes them out again up to rounding.

        Raises:
            InputError: the weights are stored in 8 bits.
        """
        precision = precision_of(self.transformer)
        if precision != "full":
            raise InputError(
                f"the weights are stored as {precision}; use the adapter without fusing it, or merge it "
                "while the model is converted"
            )
        super().fuse_lora(components or ["transformer"], lora_scale, safe_fusing, adapter_names, **kwargs)


def refuse_fused(model: nn.Module) -> None:
    """Refuse to load or weigh adapters while some are fused: peft would ignore it silently.

    Raises:
        InputError: adapters are fused.
    """
    fused = {name for layer in _lora_layers(model).values() for name in layer.merged_adapters}
    if fused:
        raise InputError(
            f"the adapters {', '.join(sorted(fused))} are fused; call unfuse_lora() to take them out, or "
            "unload_lora_weights() to keep them in the weights for good"
        )


def linear_sizes(model: nn.Module) -> Sizes:
    """(out, in) of a model's linear layers, those beneath adapters included."""
    sizes: Sizes = {}
    for name, module in model.named_modules():
        base = module.get_base_layer() if isinstance(module, BaseTunerLayer) else module
        if isinstance(base, nn.Linear) and ".base_layer" not in name and ".lora_" not in name:
            sizes[name] = (base.out_features, base.in_features)
    return sizes


def fingerprint(model: CausalWanTransformer3DModel, rows: int = 4) -> str:
    """Digest of what a transformer computes: configuration, vectors and some rows of every matrix.

    Adapters count if they act, with their weights; where they are fused, the matrices tell. The time does not
    depend on the matrices' heights, and no matrix is read as a whole.

    Args:
        rows: sampled per matrix, evenly spaced, first and last included.
    """
    config = {name: value for name, value in model.config.items() if not name.startswith("_")}
    digest = sha256(json.dumps(config, sort_keys=True, default=str).encode())
    samples: dict[torch.device, list[Tensor]] = {}
    for name, tensor in _effective(model):
        digest.update(f"{name} {tuple(tensor.shape)};".encode())
        samples.setdefault(tensor.device, []).extend(_rows(tensor, rows))
    for parts in samples.values():
        digest.update(torch.cat(parts).cpu().numpy().tobytes())
    return digest.hexdigest()


def _effective(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """The model's own parameters, then the factors of adapters that act, with their scales in the names."""
    for name, parameter in model.named_parameters():
        if ".lora_" not in name:
            yield name.replace(".base_layer.", "."), parameter
    for name, layer in _lora_layers(model).items():
        if layer.disable_adapters or layer.merged:
            continue
        for adapter in layer.active_adapters:
            scale = layer.scaling.get(adapter, 0.0)
            if scale:
                yield f"{name} down {scale!r}", layer.lora_A[adapter].weight
                yield f"{name} up {scale!r}", layer.lora_B[adapter].weight


def _rows(tensor: Tensor, count: int) -> list[Tensor]:
    tensor = tensor.detach()
    if tensor.ndim < 2:
        return [tensor.float().flatten()]
    last = tensor.shape[0] - 1
    chosen = sorted({round(i * last / max(count - 1, 1)) for i in range(count)})
    parts = [tensor[i : i + 1] for i in chosen]
    # torchao's tensors hand out their numbers only so
    plain = [part.dequantize() if hasattr(part, "__tensor_flatten__") else part for part in parts]
    return [part.float().flatten() for part in plain]


def _lora_layers(model: nn.Module) -> dict[str, Any]:
    """peft's layers, which are modules and `LoraLayer`s both."""
    return {name: module for name, module in model.named_modules() if isinstance(module, LoraLayer)}


def _restore(layer: nn.Linear, factor: Tensor, dtype: torch.dtype) -> None:
    """Undo peft's cast to the dtype that the weights are stored in, where that is another."""
    if layer.weight.dtype != dtype:
        layer.to(dtype).weight.data.copy_(factor)


def _check_weight(weight: float) -> None:
    if not math.isfinite(weight):
        raise InputError(f"a LoRA weight of {weight} cannot be used; give a finite number such as 1.0")


def _tensors(source: Source) -> tuple[Mapping[str, Tensor], dict[str, Any], str]:
    """Tensors, the settings that came with them (peft's `LoraConfig`) and what to call the source."""
    if isinstance(source, Mapping):
        odd = next((name for name, value in source.items() if not isinstance(value, Tensor)), None)
        if odd is not None:
            raise CheckpointError(
                f"the LoRA state dict has {odd!r:.120} of type {type(source[odd]).__name__}; give tensors"
            )
        return source, {}, "the LoRA state dict"
    path = _file(Path(source))
    where = f"the LoRA {path}"
    try:
        with safe_open(path, framework="pt") as file:
            header = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}
    except (SafetensorError, OSError, ValueError) as error:
        raise CheckpointError(f"{where} is damaged or no safetensors file ({error}); get it again") from None
    settings: dict[str, Any] = {}
    if LORA_ADAPTER_METADATA_KEY in header:
        try:
            stored = json.loads(header[LORA_ADAPTER_METADATA_KEY])
            settings = {key.removeprefix("transformer."): value for key, value in stored.items()}
        except (ValueError, AttributeError):
            raise CheckpointError(
                f"{where}: its {LORA_ADAPTER_METADATA_KEY} is no JSON object; get it again"
            ) from None
    elif path.name == FOLDER_NAMES[0] and (config := path.with_name("adapter_config.json")).exists():
        settings = read_json(config)
    for option in ("use_dora", "use_rslora"):
        if settings.get(option):
            raise CheckpointError(f"{where} was trained with {option}, which vidkv does not apply")
    return tensors, settings, where


def _file(path: Path) -> Path:
    if path.is_dir():
        named = [path / name for name in FOLDER_NAMES if (path / name).exists()]
        files = named or sorted(path.glob("*.safetensors"))
        if len(files) != 1:
            names = ", ".join(file.name for file in files) or "none"
            raise CheckpointError(f"{path} should hold one .safetensors file, it has {names}; name the file")
        return files[0]
    if not path.exists():
        raise CheckpointError(f"there is no LoRA {path}; download it and give its path")
    if path.suffix != ".safetensors":
        raise CheckpointError(f"{path} is no .safetensors file; turn it into one with `vidkv convert`")
    return path


def _sorted_out(
    tensors: Mapping[str, Tensor], where: str
) -> tuple[dict[str, tuple[str, str]], dict[str, float]]:
    """Keys of (down, up), and alphas, by the layers' bare names; nothing may be left over."""
    downs: dict[str, str] = {}
    ups: dict[str, str] = {}
    alphas: dict[str, float] = {}
    for key, tensor in tensors.items():
        if key.endswith(".alpha"):
            if tensor.numel() != 1:
                raise CheckpointError(f"{where}: {key} is {tuple(tensor.shape)}; an alpha is one number")
            alphas[_bare(key.removesuffix(".alpha"))] = float(tensor)
            continue
        match = FACTOR.fullmatch(key)
        if match is None:
            raise CheckpointError(_other_kind(where, key, tensors))
        factors = downs if match[2] in DOWN else ups
        layer = _bare(match[1])
        if layer in factors:
            raise CheckpointError(
                f"{where}: {key} and {factors[layer]} are both for {layer}; save one adapter alone"
            )
        factors[layer] = key
    for layer, key in (downs | ups).items():
        if layer not in downs or layer not in ups:
            lacking = "up (lora_B)" if layer in downs else "down (lora_A)"
            raise CheckpointError(f"{where}: {key} has no {lacking} factor beside it; get the file again")
    if not downs:
        raise CheckpointError(f"{where} holds no LoRA factors; check that it is the right file")
    return {layer: (downs[layer], ups[layer]) for layer in downs}, alphas


def _bare(name: str) -> str:
    """A layer's name without what wrappers and file layouts put around it."""
    name = ".".join(part for part in name.split(".") if part not in WRAPPERS)
    while prefix := next((prefix for prefix in OUTER if name.startswith(prefix)), ""):
        name = name.removeprefix(prefix)
    return name.removeprefix(KOHYA).lstrip("_") if name.startswith(KOHYA) else name


def _places(sizes: Mapping[str, tuple[int, ...]]) -> dict[str, str]:
    """What a file may call each layer, to diffusers' name."""
    places = {name: name for name in sizes}
    wan = transformer_pairs(layers(sizes, "blocks."))
    places |= {old: new for old, new in wan.items() if new in sizes}
    # kohya's names have no dots
    return places | {called.replace(".", "_"): name for called, name in places.items()}


def _no_place(
    where: str, key: str, called: str, pairs: Mapping[str, object], places: Mapping[str, str],
    sizes: Mapping[str, tuple[int, ...]],
) -> str:  # fmt: skip
    count, blocks = sum(name not in places for name in pairs), layers(sizes, "blocks.")
    if count == len(pairs):
        return (
            f"{where}: none of its {count} layers is in the model, the first is {key}; is it for a Wan model?"
        )
    block = re.match(r"blocks[._](\d+)[._]", called)
    if block and int(block[1]) >= blocks:
        return (
            f"{where}: {key} is for block {block[1]}, the model has blocks 0 to {blocks - 1} "
            f"({count} of {len(pairs)} layers without a place); use a LoRA for a model of this size"
        )
    return (
        f"{where}: {key} has no place in the model ({count} of {len(pairs)} such layers); "
        "use a LoRA for this architecture, or save the layers that fit alone"
    )


def _other_kind(where: str, key: str, tensors: Mapping[str, Tensor]) -> str:
    ending = key.rpartition(".")[2]
    kind = (
        ending if ending in OTHER_KINDS else next((kind for kind in OTHER_KINDS if f".{kind}" in key), None)
    )
    if kind is None:
        return f"{where}: {key} is no LoRA factor that vidkv knows; check that it is the right file"
    others = sum(FACTOR.fullmatch(name) is None and not name.endswith(".alpha") for name in tensors)
    return (
        f"{where}: {key} is {OTHER_KINDS[kind]}, which vidkv does not apply; "
        f"leave out such tensors ({others} of {len(tensors)}) to use the LoRA without them"
    )


def _check_shapes(
    where: str, down: tuple[str, Tensor], up: tuple[str, Tensor], name: str, size: tuple[int, ...]
) -> None:
    wide = tuple(size)
    rank = down[1].shape[0] if down[1].ndim == 2 else 0
    for (key, tensor), wanted in ((down, (rank or "r", wide[1])), (up, (wide[0], rank or "r"))):
        if tuple(tensor.shape) != wanted:
            raise CheckpointError(
                f"{where}: {key} is {tuple(tensor.shape)}, for {name} of {wide} it should be "
                f"({wanted[0]}, {wanted[1]}); use a LoRA for a model of this size"
            )
        if not tensor.is_floating_point():
            raise CheckpointError(f"{where}: {key} has the dtype {tensor.dtype}; it should be floating")
        if not bool(tensor.float().isfinite().all()):
            raise CheckpointError(f"{where}: {key} holds NaN or infinity; get the file again")


def _alpha_of(settings: Mapping[str, Any], layer: str, where: str) -> float | None:
    """A layer's alpha by peft's configuration; None where it has none."""
    if settings.get("lora_alpha") is None:
        return None
    try:
        pattern = settings.get("alpha_pattern") or {}
        return float(pattern.get(get_pattern_key(list(pattern), layer), settings["lora_alpha"]))
    except (TypeError, ValueError, AttributeError, re.error) as error:
        raise CheckpointError(f"{where}: its lora_alpha or alpha_pattern is unusable ({error})") from None


def _peft_config(found: Mapping[str, Factors]) -> dict[str, Any]:
    """Arguments of peft's `LoraConfig`, named as diffusers expects them."""
    rank = Counter(factors.rank for factors in found.values()).most_common(1)[0][0]
    alpha = Counter(factors.alpha for factors in found.values()).most_common(1)[0][0]
    config = {
        "r": rank,
        "lora_alpha": alpha,
        "rank_pattern": {f"^{re.escape(n)}": f.rank for n, f in found.items() if f.rank != rank},
        "alpha_pattern": {f"^{re.escape(n)}": f.alpha for n, f in found.items() if f.alpha != alpha},
        "target_modules": sorted(found),
    }
    return {f"transformer.{key}": value for key, value in config.items()}
