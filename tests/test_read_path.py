"""The name of a read path: what is saved comes back, and nothing else does."""

from __future__ import annotations

import json
from typing import Any

import pytest

from vidkv.errors import StateError
from vidkv.kernels.paged_attention import Tile
from vidkv.read_path import NAMES, REFERENCE, TWO_PASS, ReadPath

PATHS = [
    REFERENCE,
    TWO_PASS,
    *(ReadPath("two-pass", backend=backend) for backend in ("cpu", "math", "flash", "cudnn")),
    ReadPath("fused", tile=Tile(128, 64, 8, 3)),
]
FUSED = PATHS[-1].as_dict()
BAD: list[dict[str, Any]] = [
    {},
    {"name": "fused"},
    {"name": "fused", "backend": ""},
    {"backend": "", "tile": None},
    {"name": "best", "backend": "", "tile": None},
    {"name": None, "backend": "", "tile": None},
    {"name": ["fused"], "backend": "", "tile": None},
    {"name": "two-pass", "backend": None, "tile": None},
    {"name": "two-pass", "backend": 3, "tile": None},
    FUSED | {"tile": 3},
    FUSED | {"tile": "128x64"},
    FUSED | {"tile": [128, 64, 8, 3]},
    FUSED | {"tile": {}},
    FUSED | {"tile": {"queries": 128, "keys": 64, "warps": 8}},
    FUSED | {"tile": FUSED["tile"] | {"colour": 1}},
    FUSED | {"tile": FUSED["tile"] | {"keys": "64"}},
    FUSED | {"tile": FUSED["tile"] | {"keys": 64.0}},
    FUSED | {"tile": FUSED["tile"] | {"stages": True}},
    FUSED | {"tile": FUSED["tile"] | {"stages": None}},
    FUSED | {"tile": None},
    FUSED | {"name": "two-pass"},
]


@pytest.mark.parametrize("path", PATHS, ids=str)
def test_comes_back_from_json(path: ReadPath) -> None:
    assert path.name in NAMES
    assert ReadPath.of(json.loads(json.dumps(path.as_dict()))) == path


@pytest.mark.parametrize("saved", BAD, ids=str)
def test_anything_else_is_refused(saved: dict[str, Any]) -> None:
    """A state file may be damaged or of a later version; the message shows what was found."""
    with pytest.raises(StateError, match=r"the saved read path is \{"):
        ReadPath.of(saved)


def test_an_endless_value_is_shortened() -> None:
    with pytest.raises(StateError) as caught:
        ReadPath.of({"name": "x" * 10_000, "backend": "", "tile": None})
    assert len(str(caught.value)) < 250


def test_texts_differ() -> None:
    """They are the names under which times are kept."""
    texts = [str(path) for path in PATHS]
    assert len(set(texts)) == len(texts)
    assert texts == [text.strip() for text in texts]
    assert str(PATHS[-1]) == "fused 128x64, 8 warps, 3 stages"
    assert str(REFERENCE) == "reference"
    one_differs = [ReadPath("fused", tile=tile) for tile in (Tile(64, 64, 8, 3), Tile(128, 64, 8, 2))]
    assert len({str(path) for path in (*one_differs, PATHS[-1])}) == 3
