"""Which heads of a model read the history: measured once (`vidkv eval heads`), kept beside its weights."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from vidkv.cache import CacheSpec
from vidkv.errors import CheckpointError, InputError, OutputError
from vidkv.models.checkpoints.folders import read_json

FILE = "heads.json"
"""In a model's folder, beside `model_index.json`."""
Shares = list[list[float]]
"""By layer and kv head, the share of its attention that the history gets."""


def read_shares(folder: Path) -> Shares | None:
    """What was measured for the model in a folder; None if nothing was.

    Raises:
        CheckpointError: the file holds something else.
    """
    path = folder / FILE
    if not path.exists():
        return None
    shares = read_json(path).get("history_share")
    layers: list[Any] = shares if isinstance(shares, list) else [None]
    if not all(isinstance(layer, list) and layer and all(map(_is_share, layer)) for layer in layers):
        raise CheckpointError(
            f"{path} holds no shares from 0 to 1 by layer and head; measure them anew with `vidkv eval heads`"
        )
    return [[float(share) for share in layer] for layer in layers]


def checked(shares: Shares | None, config: Any, path: Path) -> Shares | None:
    """The shares, if they are those of a model of this configuration.

    Raises:
        CheckpointError: they have other layers or heads.
    """
    wanted = [config.num_key_value_heads or config.num_attention_heads] * config.num_layers
    if shares is not None and [len(layer) for layer in shares] != wanted:
        raise CheckpointError(
            f"{path} tells of {[len(layer) for layer in shares]!s:.80} heads by layer, the model has "
            f"{wanted!s:.80}; measure them anew with `vidkv eval heads`"
        )
    return shares


def require_shares(folder: Path, spec: CacheSpec, model: str) -> Shares | None:
    """What a cache with `local_heads` goes by; None for any other.

    Raises:
        InputError: it has not been measured.
    """
    if not spec.local_heads:
        return None
    shares = read_shares(folder)
    if shares is None:
        raise InputError(
            f"local_heads={spec.local_heads}: it is not known which heads of {model} read least of the "
            f"history; run `vidkv eval heads --model {model} --write` first, or leave local_heads out"
        )
    return shares


def write_shares(folder: Path, shares: Shares, about: Mapping[str, Any]) -> Path:
    """Keep what was measured beside the weights.

    Args:
        about: what it was measured on.

    Raises:
        OutputError: it cannot be written.
    """
    path = folder / FILE
    rounded = [[round(share, 5) for share in layer] for layer in shares]
    try:
        path.write_text(json.dumps({"history_share": rounded, **about}, indent=1) + "\n")
    except OSError as error:
        raise OutputError(f"{path} cannot be written ({error.strerror})") from None
    return path


def head_order(shares: Shares | None) -> tuple[tuple[int, ...], ...]:
    """By layer, heads from the one that reads least of the history on; of equal ones the first."""
    return tuple(tuple(_ascending(layer)) for layer in shares or ())


def _ascending(shares: Sequence[float]) -> list[int]:
    return sorted(range(len(shares)), key=lambda head: shares[head])


def _is_share(value: object) -> bool:
    return isinstance(value, int | float) and math.isfinite(value) and 0 <= value <= 1
