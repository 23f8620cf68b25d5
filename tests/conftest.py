"""Shared by all tests: thread counts, offline operation, GPU skipping, poisoned memory."""

from __future__ import annotations

import gc
import json
import os
import shutil
from collections.abc import Callable, Generator, Iterator
from pathlib import Path
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
    # the longest begin first: at the end a core would wait for them
    items.sort(key=lambda item: item.path.name != "test_interpreted.py")
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="needs a CUDA GPU; none is visible to torch")
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(skip)


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Generator[None, object, object]:
    """What is imported stays: garbage is looked for among what tests make, not in a million objects."""
    gc.disable()
    try:
        return (yield)
    finally:
        gc.freeze()
        gc.enable()


@pytest.fixture(scope="session")
def quick_bounce(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the embedded model, its first chunk in as few steps as all others.

    Of the 77 passes of its own first chunk, which cost eight times as much as a later one, 5 are left. It
    is for tests of what happens around the networks, not of what a video looks like.
    """
    from vidkv.models.registry import MODELS, weights_folder

    shipped, folder = weights_folder(MODELS["bounce"]), tmp_path_factory.mktemp("bounce") / "model"
    assert shipped is not None
    shutil.copytree(shipped, folder)
    index = json.loads((folder / "model_index.json").read_text())
    index |= {"first_chunk_steps": index["steps"], "first_chunk_guidance": 1.0}
    (folder / "model_index.json").write_text(json.dumps(index))
    return folder


@pytest.fixture(scope="module")
def short_first_chunk(quick_bounce: Path) -> Iterator[None]:
    """In this process `bounce` is the model of `quick_bounce`; other processes are given its folder."""
    from vidkv import loading

    shipped = loading.weights_folder
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loading, "weights_folder", lambda entry: shipped(entry) and quick_bounce)
        yield


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
