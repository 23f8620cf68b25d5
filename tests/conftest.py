"""Shared by all tests: thread counts, offline operation, GPU skipping, poisoned memory."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

# set before anything reads them: the suite never touches the network
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")

import pytest
import torch
from hypothesis import settings as hypothesis_settings

# the models here are tiny: a second thread gains nothing, and on a busy machine costs tenfold
torch.set_num_threads(1)

# the same examples on every machine: a new failure is the change's, not the day's
hypothesis_settings.register_profile("vidkv", max_examples=40, deadline=None, derandomize=True)
hypothesis_settings.load_profile("vidkv")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="needs a CUDA GPU; none is visible to torch")
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(skip)


@pytest.fixture
def poisoned_empty(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fill uninitialised tensors with NaN, or the largest integer: unwritten output cannot pass."""
    for module, name in (
        (torch, "empty"),
        (torch, "empty_like"),
        (torch, "empty_strided"),
        (torch.Tensor, "new_empty"),
    ):
        monkeypatch.setattr(module, name, _poisoned(getattr(module, name)))


def _poisoned(allocate: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    def allocate_poisoned(*args: Any, **kwargs: Any) -> torch.Tensor:
        tensor = allocate(*args, **kwargs)
        if tensor.is_meta:
            return tensor
        if tensor.dtype == torch.bool:
            return tensor.fill_(True)
        if tensor.is_floating_point() or tensor.is_complex():
            return tensor.fill_(float("nan"))
        return tensor.fill_(torch.iinfo(tensor.dtype).max)

    return allocate_poisoned
