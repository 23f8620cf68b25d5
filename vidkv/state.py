"""Saved rollouts: safetensors with a versioned JSON header. Never pickle."""

from __future__ import annotations

import json
import uuid
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from vidkv.cache.saved import entry
from vidkv.errors import OutputError, StateError
from vidkv.files import publish, reason
from vidkv.models.lora import fingerprint
from vidkv.rollout import Rollout

SCHEMA = 4

Tensors = dict[str, Tensor]


def save_rollout(rollout: Rollout, path: str | Path, extra: dict[str, Any] | None = None) -> None:
    """Write a rollout so that another process can go on from it; the file appears complete or not at all.

    Args:
        rollout: between two chunks.
        path: file to write, by convention `.safetensors`.
        extra: JSON-able values to keep beside it (prompt, settings).
    """
    tensors, header = rollout.state()
    write_tensors(Path(path), tensors, describe(rollout, header) | {"extra": extra or {}})


def load_rollout(rollout: Rollout, path: str | Path) -> dict[str, Any]:
    """Restore a saved rollout into one made with the same model, size and cache settings.

    On the device type and dtype it was saved from, what follows is equal bit for bit.

    Returns:
        The `extra` of `save_rollout`.

    Raises:
        StateError: the file is missing, damaged, of another version, or of another model or cache.
    """
    tensors, header = read_tensors(Path(path))
    try:
        extra = entry(header, "extra", dict)
        rollout.restore(tensors, check_description(rollout, header))
    except StateError as error:
        raise StateError(f"{path} cannot be restored: {error}") from None
    return extra


def describe(rollout: Rollout, state: dict[str, Any]) -> dict[str, Any]:
    """The header of a saved state: what it can be restored into."""
    return {
        "schema": SCHEMA,
        "model": fingerprint(rollout.transformer),
        "torch": torch.__version__,
        "device": rollout.device.type,
        "dtype": str(rollout.dtype),
        "rollout": state,
    }


def check_description(rollout: Rollout, header: dict[str, Any]) -> dict[str, Any]:
    """What `describe` was given, if the rollout is of the same kind.

    Raises:
        StateError: it is of another version, model or dtype.
    """
    if header.get("schema") != SCHEMA:
        raise StateError(f"it has state version {header.get('schema')}, this vidkv reads version {SCHEMA}")
    dtype = entry(header, "dtype", str)
    if dtype != str(rollout.dtype):
        raise StateError(f"it was saved at {dtype}, this rollout runs at {rollout.dtype}")
    if entry(header, "model", str) != fingerprint(rollout.transformer):
        raise StateError("it was saved with other weights; load the model it was saved with")
    return entry(header, "rollout", dict)


def write_tensors(path: Path, tensors: Tensors, header: dict[str, Any]) -> None:
    """A safetensors file with a JSON header, complete or not at all.

    Raises:
        OutputError: it cannot be written.
    """
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")
    try:
        save_file({k: v.contiguous() for k, v in tensors.items()}, temporary, {"vidkv": json.dumps(header)})
        publish(temporary, path)
    except (OSError, SafetensorError) as error:
        temporary.unlink(missing_ok=True)
        raise OutputError(
            f"cannot write {path}: {reason(error)}; make room or choose another folder"
        ) from None


def read_tensors(path: Path) -> tuple[Tensors, dict[str, Any]]:
    """What `write_tensors` wrote.

    Raises:
        StateError: the file is missing or damaged.
    """
    try:
        with safe_open(path, framework="pt") as file:
            header = dict(json.loads((file.metadata() or {})["vidkv"]))
            return {name: file.get_tensor(name) for name in file.keys()}, header
    except FileNotFoundError:
        raise StateError(f"there is no saved rollout {path}") from None
    except (SafetensorError, OSError, KeyError, TypeError, ValueError) as error:
        raise StateError(f"{path} is no saved rollout, or a damaged one ({error})") from None
