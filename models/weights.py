"""Weights at less than full precision: stored in 8 bits, computed with in 16 or 32.

`fp8` stores in float8_e4m3fn, unscaled, and casts a layer while it runs (diffusers' layerwise casting).
`int8` stores integers with one scale per output channel (torchao, an optional extra). Only the linear layers
of the blocks change: norms, modulation, embeddings and the output projection are small and sensitive.
"""

from __future__ import annotations

import logging
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from importlib.util import find_spec
from types import ModuleType
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from vidkv.errors import CheckpointError, InputError

Precision = Literal["full", "fp8", "int8"]
PRECISIONS: tuple[str, ...] = get_args(Precision)
FP8 = torch.float8_e4m3fn
INT8_SCALE_BYTES = 5
"""Of one output channel: a float32 scale and an int8 zero point."""
SKIP = ("patch_embed", "norm", "condition_embedder", "^proj_out$", "shared", "embed_tokens", "bias")
"""Modules that keep their precision, by pattern; for the DiT also those that it keeps in float32."""
TIED = "encoder.embed_tokens.weight"
"""umT5's second name of `shared.weight`: on empty models a tensor of its own."""


def check_precision(name: str) -> Precision:
    """A precision by name.

    Raises:
        InputError: there is none of that name.
    """
    if name not in PRECISIONS:
        raise InputError(f"weights={name!r:.60}; choose {', '.join(PRECISIONS)}")
    return name  # type: ignore[return-value]


def check_library(precision: Precision) -> None:
    """What a precision needs is installed.

    Raises:
        InputError: it is not.
    """
    if precision == "int8" and not find_spec("torchao"):
        raise InputError("weights=int8 needs torchao, which is not installed: pip install 'vidkv[int8]'")


def set_precision(model: nn.Module, precision: Precision, compute_dtype: torch.dtype) -> None:
    """Change how a transformer's or umT5 encoder's weights are stored, in place and for good.

    Args:
        compute_dtype: what the changed layers compute in; the others keep their dtype.

    Raises:
        InputError: an unknown precision, one whose library is missing, or weights that have one already.
        CheckpointError: weights beyond what float8 can hold.
    """
    check_library(check_precision(precision))
    if precision == "full":
        return
    found = precision_of(model)
    if found != "full":
        raise InputError(f"the weights are {found} already; load the model anew to make them {precision}")
    layers = list(_layers(model))
    if precision == "int8":
        for layer in layers:
            layer.to(compute_dtype)
        _to_int8(model, layers)
    else:
        _refuse_overflow(model, layers)
        _to_fp8(model, compute_dtype)


def precision_of(model: nn.Module) -> Precision:
    """How a model's weights are stored."""
    for parameter in model.parameters():
        if parameter.dtype == FP8:
            return "fp8"
        if hasattr(parameter, "__tensor_flatten__"):
            return "int8"
    return "full"


def weight_bytes(model: nn.Module) -> int:
    """Bytes of parameters and buffers as they are stored, each storage once."""
    sizes: dict[object, int] = {}
    for tensor in (*model.parameters(), *model.buffers()):
        for part in _parts(tensor):
            storage = part.untyped_storage()
            key = storage.data_ptr() if part.device.type != "meta" else id(part)
            sizes[key] = max(sizes.get(key, 0), storage.nbytes())
    return sum(sizes.values())


def planned_weight_bytes(model: nn.Module, precision: Precision, dtype: torch.dtype, within: str = "") -> int:
    """Bytes that a model's weights will take, from an empty one of the same architecture.

    Args:
        dtype: that it is loaded in; modules that diffusers keeps in float32 stay so.
        within: count only parameters whose names begin so.
    """
    layers = {f"{name}." for name, _ in _named_layers(model)}
    kept = _kept_in_fp32(model)
    total = 0
    for name, parameter in model.named_parameters():
        if name == TIED or not name.startswith(within):
            continue
        owner, _, leaf = name.rpartition(".")
        size = (torch.float32 if kept & set(name.split(".")) else dtype).itemsize
        if f"{owner}." in layers and precision == "fp8":
            size = FP8.itemsize
        elif f"{owner}." in layers and precision == "int8" and leaf == "weight":
            total += parameter.shape[0] * INT8_SCALE_BYTES
            size = 1
        total += parameter.numel() * size
    if not within:
        total += sum(buffer.nbytes for buffer in model.buffers())
    return total


def cast_bytes(model: nn.Module, precision: Precision, dtype: torch.dtype) -> int:
    """Scratch of the largest layer while it runs in `dtype`; none at full precision."""
    if precision == "full":
        return 0
    layers: list[nn.Module] = [module for _, module in _named_layers(model)]
    if precision == "fp8":
        layers += list(_feed_forwards(model))
    return max((sum(p.numel() for p in layer.parameters()) for layer in layers), default=0) * dtype.itemsize


def _named_layers(model: nn.Module) -> Iterator[tuple[str, nn.Linear]]:
    """The layers whose precision can change."""
    skip = _skip(model)
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and not any(re.search(pattern, name) for pattern in skip):
            yield name, module


def _layers(model: nn.Module) -> Iterator[nn.Linear]:
    return (module for _, module in _named_layers(model))


def _skip(model: nn.Module) -> tuple[str, ...]:
    return (*SKIP, *sorted(_kept_in_fp32(model)))


def _kept_in_fp32(model: nn.Module) -> set[str]:
    """Names in parameter paths that diffusers loads in float32 whatever the dtype.

    transformers has a setting of the same name, which is for float16 alone.
    """
    of_diffusers = hasattr(model, "register_to_config")
    return set(getattr(model, "_keep_in_fp32_modules", None) or ()) if of_diffusers else set()


def _feed_forwards(model: nn.Module) -> Iterator[nn.Module]:
    """umT5's feed-forward networks, which look at the dtype of their last layer before they call it."""
    from transformers.models.umt5.modeling_umt5 import UMT5DenseActDense, UMT5DenseGatedActDense

    kinds = (UMT5DenseActDense, UMT5DenseGatedActDense)
    return (module for module in model.modules() if isinstance(module, kinds))


def _to_fp8(model: nn.Module, compute_dtype: torch.dtype) -> None:
    from diffusers.hooks import apply_layerwise_casting

    whole = list(_feed_forwards(model))
    kinds: tuple[type[nn.Module], ...] | None = tuple({type(module) for module in whole}) or None
    apply_layerwise_casting(model, FP8, compute_dtype, _skip(model), kinds)
    for module in whole:
        apply_layerwise_casting(module, FP8, compute_dtype, None)


def _refuse_overflow(model: nn.Module, layers: list[nn.Linear]) -> None:
    """float8_e4m3fn has no infinity: what is too large would become NaN."""
    limit = torch.finfo(FP8).max
    names = {id(module): name for name, module in model.named_modules()}
    for layer in layers:
        for parameter in layer.parameters():
            largest = float(parameter.detach().abs().amax())
            if not largest <= limit:
                raise CheckpointError(
                    f"{names[id(layer)]} has a weight of {largest:g}, float8 holds at most {limit:g}; "
                    "use weights=int8 or full"
                )


def _to_int8(model: nn.Module, layers: list[nn.Linear]) -> None:
    chosen = {id(layer) for layer in layers}
    with _quiet():
        torchao = _torchao()
        # without its settings for the compiler, which are global and change float32 products everywhere
        config = torchao.Int8WeightOnlyConfig(set_inductor_config=False)
        torchao.quantize_(model, config, filter_fn=lambda module, name: id(module) in chosen)


def _torchao() -> ModuleType:
    try:
        return import_module("torchao.quantization")
    except ImportError as error:
        raise InputError(
            f"weights=int8 needs torchao, which cannot be loaded ({error}): pip install 'vidkv[int8]'"
        ) from None


@contextmanager
def _quiet() -> Iterator[None]:
    """torchao tells of kernels that it cannot load and does not need here."""
    before = logging.root.manager.disable
    logging.disable(max(before, logging.WARNING))
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


def _parts(tensor: Any) -> list[Tensor]:
    """The plain tensors of which a quantized one is made."""
    if not hasattr(tensor, "__tensor_flatten__"):
        return [tensor]
    names, _ = tensor.__tensor_flatten__()
    return [part for name in names for part in _parts(getattr(tensor, name))]
