"""Is a weights file what its configuration says? Asked before anything is loaded."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path, PurePosixPath

from safetensors import SafetensorError, safe_open
from torch import nn

from vidkv.errors import CheckpointError
from vidkv.models.checkpoints.empty import empty_weights

Shapes = dict[str, tuple[int, ...]]


def models_home() -> Path:
    """Where converted models lie: `$VIDKV_HOME/models`, by default `~/.cache/vidkv/models`."""
    home = os.environ.get("VIDKV_HOME")
    return (Path(home).expanduser() if home else Path.home() / ".cache" / "vidkv") / "models"


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


def index_files(path: Path) -> list[Path]:
    """Files that a `….index.json` names, all beside it.

    Raises:
        CheckpointError: it is damaged or names files elsewhere.
    """
    table = read_json(path).get("weight_map")
    if not isinstance(table, dict) or not table:
        raise CheckpointError(f"{path} has no weight_map; download it again")
    names = sorted({str(name) for name in table.values()})
    outside = next((name for name in names if PurePosixPath(name).name != name), None)
    if outside:
        raise CheckpointError(f"{path} names {outside!r:.80}, which is not beside it; download it again")
    return [path.with_name(name) for name in names]


def stored_files(folder: Path, build: type[nn.Module]) -> list[Path]:
    """The safetensors files of a model folder: one, or the shards that an index names.

    Args:
        build: a model class of diffusers or transformers, which name their files differently.
    """
    stem = "diffusion_pytorch_model" if hasattr(build, "from_config") else "model"
    index = folder / f"{stem}.safetensors.index.json"
    whole = folder / f"{stem}.safetensors"
    return index_files(index) if index.exists() and not whole.exists() else [whole]


def stored_shapes(files: list[Path]) -> Shapes:
    """Names and shapes in all files together.

    Raises:
        CheckpointError: a file is missing or damaged, or two hold one name.
    """
    found: Shapes = {}
    for path in files:
        shapes = file_shapes(path)
        twice = sorted(set(found) & set(shapes))
        if twice:
            raise CheckpointError(f"{path} holds {twice[0]}, as another shard does; re-download the model")
        found |= shapes
    return found


def model_shapes(build: type[nn.Module], config: Mapping[str, object]) -> Shapes:
    """Names and shapes that a model of this configuration has; no memory is allocated.

    Args:
        build: a model class of diffusers or transformers.
    """
    with empty_weights():
        if hasattr(build, "from_config"):
            model = build.from_config(dict(config))
        else:
            model = build(build.config_class.from_dict(dict(config)))  # type: ignore[attr-defined]
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}


@lru_cache(maxsize=64)
def _wanted_shapes(build: type[nn.Module], config: str) -> Shapes:
    """`model_shapes` of a configuration as JSON: networks are asked for before and while they are loaded."""
    return model_shapes(build, json.loads(config))


def verify(folder: Path, build: type[nn.Module]) -> None:
    """Compare `config.json` and the weights of a model folder of diffusers or transformers.

    Raises:
        CheckpointError: naming the first tensor that is missing, unexpected or of another shape.
    """
    config = read_json(folder / "config.json")
    tied = getattr(build, "_tied_weights_keys", None) or ()
    files = stored_files(folder, build)
    found = stored_shapes(files)
    path = files[0] if len(files) == 1 else folder
    try:
        # mypy takes the hash of a class for that of its instances
        wanted = _wanted_shapes(build, json.dumps(config))  # type: ignore[arg-type]
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
