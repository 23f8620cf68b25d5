"""Saved rollouts: one safetensors file with a versioned JSON header. Never pickle."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from vidkv.cache.saved import entry
from vidkv.errors import OutputError, StateError
from vidkv.models.lora import fingerprint
from vidkv.rollout import Rollout

SCHEMA = 3


def save_rollout(rollout: Rollout, path: str | Path, extra: dict[str, Any] | None = None) -> None:
    """Write a rollout so that another process can go on from it; the file appears complete or not at all.

    Args:
        rollout: between two chunks.
        path: file to write, by convention `.safetensors`.
        extra: JSON-able values to keep beside it (prompt, settings).
    """
    path = Path(path)
    tensors, header = rollout.state()
    header = {
        "schema": SCHEMA,
        "model": fingerprint(rollout.transformer),
        "torch": torch.__version__,
        "device": rollout.device.type,
        "dtype": str(rollout.dtype),
        "rollout": header,
        "extra": extra or {},
    }
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        save_file({k: v.contiguous() for k, v in tensors.items()}, temporary, {"vidkv": json.dumps(header)})
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        temporary.replace(path)
    except (OSError, SafetensorError) as error:
        temporary.unlink(missing_ok=True)
        raise OutputError(f"cannot write the rollout state {path}: {error}") from None


def load_rollout(rollout: Rollout, path: str | Path) -> dict[str, Any]:
    """Restore a saved rollout into one made with the same model, size and cache settings.

    On the device type and dtype it was saved from, what follows is equal bit for bit.

    Returns:
        The `extra` of `save_rollout`.

    Raises:
        StateError: the file is missing, damaged, of another version, or of another model or cache.
    """
    try:
        with safe_open(path, framework="pt") as file:
            header = dict(json.loads((file.metadata() or {})["vidkv"]))
            tensors = {name: file.get_tensor(name) for name in file.keys()}
    except FileNotFoundError:
        raise StateError(f"there is no saved rollout {path}") from None
    except (SafetensorError, OSError, KeyError, TypeError, ValueError) as error:
        raise StateError(f"{path} is no saved rollout, or a damaged one ({error})") from None
    if header.get("schema") != SCHEMA:
        raise StateError(
            f"{path} has state version {header.get('schema')}, this vidkv reads version {SCHEMA}"
        )
    try:
        dtype, extra = entry(header, "dtype", str), entry(header, "extra", dict)
        if dtype != str(rollout.dtype):
            raise StateError(f"it was saved at {dtype}, this rollout runs at {rollout.dtype}")
        if entry(header, "model", str) != fingerprint(rollout.transformer):
            raise StateError("it was saved with other weights; load the model it was saved with")
        rollout.restore(tensors, entry(header, "rollout", dict))
    except StateError as error:
        raise StateError(f"{path} cannot be restored: {error}") from None
    return extra
