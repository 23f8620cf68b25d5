"""Reading what a saved state says: whatever is wrong with it is a StateError that names it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeVar

import torch
from torch import Tensor

from vidkv.errors import StateError

T = TypeVar("T")


def entry(header: Mapping[str, Any], name: str, kind: type[T]) -> T:
    """The header's value of that name, of exactly that type (a bool is no int).

    Raises:
        StateError: missing, or of another type.
    """
    if not isinstance(header, Mapping) or name not in header:
        raise StateError(f"the saved header has no {name!r}; the state is damaged, save it again")
    value = header[name]
    if type(value) is not kind:
        raise StateError(
            f"the saved {name} is {value!r:.60}, not of type {kind.__name__}; the state is damaged"
        )
    return value


def whole_numbers(header: Mapping[str, Any], name: str) -> list[int]:
    """The header's list of whole numbers of that name.

    Raises:
        StateError: missing, or anything else.
    """
    values = entry(header, name, list)
    if any(type(value) is not int for value in values):
        raise StateError(f"the saved {name} are {values!r:.60}, not whole numbers; the state is damaged")
    return values


def check_tensor(
    tensors: Mapping[str, Tensor], name: str, shape: tuple[int, ...], dtype: torch.dtype
) -> None:
    """There is a tensor of that name, shape and dtype.

    Raises:
        StateError: there is not.
    """
    found = tensors.get(name)
    if found is None or tuple(found.shape) != shape or found.dtype != dtype:
        described = "missing" if found is None else f"{tuple(found.shape)} {found.dtype}"
        raise StateError(
            f"the saved {name} is {described}, this rollout needs {shape} {dtype}; restore with the model "
            "and size it was saved with"
        )
