"""Is a weights file what its configuration says? Asked before anything is loaded."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from accelerate import init_empty_weights
from safetensors import SafetensorError, safe_open
from torch import nn

from vidkv.errors import CheckpointError

Shapes = dict[str, tuple[int, ...]]


def read_json(path: Path) -> dict[str, object]:
    """A JSON object from a file.

    Raises:
        CheckpointError: the file is missing or no JSON object.
    """
    try:
        value = json.loads(path.read_text())
    except FileNotFoundError:
        raise CheckpointError(f"{path} is missing; name a folder written by save_pretrained") from None
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read as JSON ({error}); restore or re-download it") from None
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} holds no JSON object; restore or re-download it")
    return value


def require_tokenizer(folder: Path) -> None:
    """Refuse a tokenizer folder without its files: transformers would look for another kind of tokenizer.

    Raises:
        CheckpointError: `tokenizer_config.json` or `tokenizer.json` is missing or no JSON object.
    """
    for name in ("tokenizer_config.json", "tokenizer.json"):
        read_json(folder / name)


def file_shapes(path: Path) -> Shapes:
    """Names and shapes in a safetensors file, from its header alone.

    Raises:
        CheckpointError: the file is missing, truncated or not safetensors.
    """
    try:
        with safe_open(path, framework="pt") as file:
            return {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}
    except FileNotFoundError:
        raise CheckpointError(
            f"the weights file {path} is missing; reinstall or re-download the model"
        ) from None
    except (SafetensorError, OSError, ValueError) as error:
        raise CheckpointError(
            f"the weights file {path} is damaged ({error}); reinstall or re-download the model"
        ) from None


def model_shapes(build: type[nn.Module], config: Mapping[str, object]) -> Shapes:
    """Names and shapes that a model of this configuration has; no memory is allocated.

    Args:
        build: a model class of diffusers or transformers.
    """
    with init_empty_weights():
        if hasattr(build, "from_config"):
            model = build.from_config(dict(config))
        else:
            model = build(build.config_class.from_dict(dict(config)))  # type: ignore[attr-defined]
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}


def verify(folder: Path, build: type[nn.Module]) -> None:
    """Compare `config.json` and the weights of a model folder of diffusers or transformers.

    Raises:
        CheckpointError: naming the first tensor that is missing, unexpected or of another shape.
    """
    config = read_json(folder / "config.json")
    tied = getattr(build, "_tied_weights_keys", None) or ()
    path = folder / ("diffusion_pytorch_model" if hasattr(build, "from_config") else "model")
    path = path.with_suffix(".safetensors")
    found = file_shapes(path)
    try:
        wanted = model_shapes(build, config)
    # whatever a model class trips over when its settings make no sense
    except (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise CheckpointError(
            f"{folder / 'config.json'} describes no {build.__name__} ({reason}); restore or re-download it"
        ) from None
    for name, shape in wanted.items():
        if name not in found and name in tied:
            continue
        if name not in found:
            raise CheckpointError(f"{path} lacks the tensor {name} {shape} that its configuration asks for")
        if found[name] != shape:
            raise CheckpointError(f"{path}: {name} is {found[name]}, its configuration asks for {shape}")
    extra = sorted(set(found) - set(wanted))
    if extra:
        raise CheckpointError(f"{path} holds {extra[0]}, which its configuration has no place for")
