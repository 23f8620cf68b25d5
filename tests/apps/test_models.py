"""`vidkv models`: every known model, whether its weights are here, and where they come from."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.apps.commandline import run
from tests.models.checkpoints.stock_files import ENTRY
from vidkv.apps.models_table import models_report
from vidkv.models import registry
from vidkv.pipeline import CausalVideoPipeline


@pytest.fixture(autouse=True)
def home(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    monkeypatch.setenv("VIDKV_HOME", str(tmp_path / "home"))
    return tmp_path / "home" / "models"


def rows(capsys: pytest.CaptureFixture[str]) -> dict[str, dict[str, Any]]:
    code, stdout, stderr = run(capsys, "models", "--json")
    assert (code, stderr) == (0, "")
    return {row["name"]: row for row in json.loads(stdout)["models"]}


def test_every_registered_model_has_a_row(capsys: pytest.CaptureFixture[str], home: Path) -> None:
    found = rows(capsys)
    assert list(found) == list(registry.MODELS)
    for name, entry in registry.MODELS.items():
        row = found[name]
        assert row["size"] == f"{entry.width}x{entry.height}" and row["fps"] == entry.fps
        settings = (entry.chunk_frames, entry.window, entry.sink)
        assert (row["chunk_frames"], row["window_frames"], row["sink_frames"]) == settings
        if entry.source:
            assert (row["repository"], row["files"]) == (entry.source.repository, list(entry.source.files))
            assert row["licence"] == entry.source.licence
            assert (row["folder"], row["here"]) == (str(home / name), False)


def test_the_shipped_model_is_here_and_loads(capsys: pytest.CaptureFixture[str]) -> None:
    row = rows(capsys)["bounce"]
    assert row["here"] and row["repository"] is None and row["licence"] == "Apache-2.0"
    assert CausalVideoPipeline.from_pretrained(row["folder"]).entry.name == "bounce"


def test_a_model_is_here_once_its_folder_is(capsys: pytest.CaptureFixture[str], home: Path) -> None:
    name = "self-forcing-1.3b"
    (home / name).mkdir(parents=True)
    assert not rows(capsys)[name]["here"]
    (home / name / "model_index.json").write_text("{}")
    found = rows(capsys)
    assert [key for key, row in found.items() if row["here"]] == ["bounce", name]
    shutil.rmtree(home / name)
    assert not rows(capsys)[name]["here"]


def test_the_table_says_the_same(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, home: Path
) -> None:
    bare = replace(ENTRY, name="tiny-bare", source=None)
    for known in list(registry.MODELS):
        if known != "bounce":
            monkeypatch.delitem(registry.MODELS, known)
    monkeypatch.setitem(registry.MODELS, ENTRY.name, ENTRY)
    monkeypatch.setitem(registry.MODELS, bare.name, bare)
    code, stdout, stderr = run(capsys, "models")
    assert (code, stderr) == (0, "")
    lines = {line.split("│")[1].strip(): line for line in stdout.splitlines() if line.startswith("│")}
    cells = {name: [cell.strip() for cell in line.split("│")[2:-1]] for name, line in lines.items()}
    assert cells["bounce"] == ["yes", "64x64", "16", "3", "21/3", "ships with vidkv", "Apache-2.0"]
    assert cells["tiny-stock"] == ["no", "48x32", "16", "3", "6/0", "someone/tiny: tiny.pt", "MIT"]
    assert cells["tiny-bare"][0] == "no" and "a configuration to plan" in cells["tiny-bare"][5]


def test_stock_models_have_a_source_and_terms() -> None:
    """Whoever downloads must see where from and under which licence."""
    for row in models_report():
        if registry.MODELS[row["name"]].source:
            assert "/" in row["repository"] and row["files"] and row["licence"], row["name"]
