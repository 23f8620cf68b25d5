"""Runs the tests of `interpreted/`, each file in a process in which triton interprets its kernels.

With `TRITON_INTERPRET=1 python -m pytest tests/kernels/interpreted` they run directly.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from vidkv.kernels.jit import triton

ROOT = Path(__file__).resolve().parents[2]
FOLDER = Path(__file__).parent / "interpreted"
FLOORS = {
    "test_paged_attention.py": 100,
    "test_paged_attention_packed.py": 18,
    "test_packed.py": 50,
    "test_pages.py": 180,
    "test_rollout_fused.py": 25,
    "test_rotary.py": 40,
}
"""Tests that each file holds at least, random shapes not counted: a run that collects nothing must fail."""

pytestmark = [pytest.mark.slow, pytest.mark.skipif(not triton, reason="triton is not installed")]


def test_every_file_is_run() -> None:
    assert {path.name for path in FOLDER.glob("test_*.py")} == set(FLOORS)


@pytest.mark.parametrize("name", FLOORS)
def test_passes(name: str) -> None:
    # options and worker numbers of this run are not for the inner one
    environment = {key: value for key, value in os.environ.items() if not key.startswith("PYTEST_")}
    command = [sys.executable, "-m", "pytest", str(FOLDER / name), "-q", "-p", "no:cacheprovider"]
    finished = subprocess.run(
        command,
        cwd=ROOT,
        env=environment | {"TRITON_INTERPRET": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert finished.returncode == 0, finished.stdout
    passed = re.search(r"^(\d+) passed", finished.stdout.splitlines()[-1])
    assert passed and int(passed[1]) >= FLOORS[name], finished.stdout
