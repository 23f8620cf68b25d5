"""Loading a model folder onto a device, tensor by tensor."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import set_module_tensor_to_device
from safetensors import safe_open
from torch import nn

from vidkv.models.checkpoints.empty import empty_weights
from vidkv.models.checkpoints.folders import read_json, stored_files, verify


def load_model(build: type[nn.Module], folder: Path, device: str, dtype: torch.dtype) -> nn.Module:
    """A model in evaluation mode, its parameters read straight to where they stay.

    Beyond the destination, host memory holds one shard at most: a file is mapped, its tensors are cast and
    moved one at a time, and the mapping is dropped before the next.

    Args:
        build: a model class of diffusers or transformers.
        folder: `config.json` and one safetensors file, or shards with an index.
        dtype: of all floating tensors but those that the class keeps in float32.

    Raises:
        CheckpointError: names or shapes differ from the configuration's; nothing has been loaded then.
    """
    verify(folder, build)
    model: nn.Module = empty_model(build, read_json(folder / "config.json"))
    tied = tied_parameters(model)
    for path in stored_files(folder, build):
        with safe_open(path, framework="pt") as file:
            for name in file.keys():
                _place(model, name, file.get_tensor(name), device, dtype)
    for name, source in tied.items():
        _tie(model, name, source)
    # what is computed rather than stored, such as position tables
    for name, buffer in model.named_buffers():
        set_module_tensor_to_device(model, name, device, buffer)
    return model.eval().requires_grad_(False)


def empty_model(build: type[nn.Module], config: Mapping[str, object]) -> Any:
    """The model with parameters that take no memory; buffers are real."""
    with empty_weights(include_buffers=False):
        if hasattr(build, "from_config"):
            return build.from_config(dict(config))
        return build(build.config_class.from_dict(dict(config)))  # type: ignore[attr-defined]


def kept_in_fp32(build: object, name: str, dtype: torch.dtype) -> bool:
    """Whether a model class, or a model, wants this parameter in float32 although the rest is in `dtype`.

    diffusers' classes do at every narrower dtype, transformers' at float16 alone unless they say strictly.
    """
    narrow = (torch.float16, torch.bfloat16) if hasattr(build, "from_config") else (torch.float16,)
    kept = set(getattr(build, "_keep_in_fp32_modules", None) or ()) if dtype in narrow else set()
    if dtype in (torch.float16, torch.bfloat16):
        kept |= set(getattr(build, "_keep_in_fp32_modules_strict", None) or ())
    return not kept.isdisjoint(name.split("."))


def tied_parameters(build: object) -> dict[str, str]:
    """Parameters that are not stored, to those they share; empty for classes without any."""
    table: Any = getattr(build, "_tied_weights_keys", None)
    return dict(table) if isinstance(table, Mapping) else {}


def _place(model: nn.Module, name: str, tensor: torch.Tensor, device: str, dtype: torch.dtype) -> None:
    wanted = tensor.dtype
    if tensor.is_floating_point():
        wanted = torch.float32 if kept_in_fp32(model, name, dtype) else dtype
    # a tensor that needs no cast is still a view of the mapped file
    own = tensor.to(device=device, dtype=wanted, copy=True)
    set_module_tensor_to_device(model, name, device, own, dtype=wanted)


def _tie(model: nn.Module, name: str, source: str) -> None:
    holder, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(holder), leaf, model.get_parameter(source))
