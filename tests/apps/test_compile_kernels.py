"""Kernels compiled ahead of time: what they take on every architecture, and that too much is reported.

In processes of their own: a test run under `TRITON_INTERPRET=1` has no kernels to compile.
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from typing import Any

import pytest
import torch

from tests.apps.commandline import run
from vidkv.apps.compile_kernels import INT8_UNITS, SHARED_BYTES
from vidkv.kernels.paged_attention import Tile
from vidkv.kernels.tiles import good_tiles, tile_space

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="needs triton, which is not installed"
)
KERNELS = {"encode", "fused", "turn", "unpack", "commit", "decode", "rotate", "merge"}


def python(*arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=600)


def compiled(arch: str, tile: Tile, dtype: str = "bf16") -> dict[str, Any]:
    """The fused read with one tile at 128 channels."""
    code = f"""
import dataclasses, json
from vidkv.apps.compile_kernels import compile_variant, fused
from vidkv.kernels.paged_attention import Tile
row = compile_variant(fused({arch!r}, {tile!r}, 128, 1560, {dtype!r}), {arch!r})
print(json.dumps(dataclasses.asdict(row)))
"""
    done = python("-c", code)
    assert done.returncode == 0, done.stderr
    row: dict[str, Any] = json.loads(done.stdout)
    return row


@pytest.mark.slow
@pytest.mark.parametrize("arch", ["sm_90"])
def test_every_kernel_holds(arch: str) -> None:
    """Of one architecture: `make kernels` holds all of them to the same, and it takes minutes."""
    done = python("-m", "vidkv.apps.cli", "bench", "kernels", "--arch", arch, "--json")
    assert done.stdout, done.stderr
    report = json.loads(done.stdout)
    rows = report["kernels"]
    assert [row for row in rows if not row["ok"]] == []
    assert (done.returncode, report["ok"]) == (0, True)
    assert {row["kernel"] for row in rows} == KERNELS
    assert {row["arch"] for row in rows} == {arch}
    assert len({(row["kernel"], row["variant"]) for row in rows}) == len(rows)
    for row in rows:
        assert 0 < row["registers"] <= 255
        assert row["shared_bytes"] <= SHARED_BYTES[arch]
        # products of float32 are taken without matrix units, and operands do not fit
        assert row["spill_bytes"] == 0 or row["variant"].startswith("fp32 d64 t16")
        assert (row["int8_mma"] > 0) == (row["kernel"] == "fused")
    units = {row["int8_unit"] for row in rows if row["kernel"] == "fused" and "d128" in row["variant"]}
    assert units and units <= set(INT8_UNITS[arch])


def test_a_tile_that_takes_too_much_is_reported() -> None:
    row = compiled("sm_89", Tile(128, 128, 8, 4))
    assert not row["ok"]
    assert row["spill_bytes"] > 0
    assert row["shared_bytes"] > SHARED_BYTES["sm_89"]
    assert f"{row['spill_bytes']} bytes spilled" in row["why"]
    assert f"{row['shared_bytes']} bytes of shared memory of 101376" in row["why"]


def test_what_does_not_compile_is_reported() -> None:
    row = compiled("sm_90", Tile(48, 32, 4, 2))
    assert not row["ok"]
    assert row["why"].startswith("does not compile")


def test_codes_on_the_wrong_unit_are_reported() -> None:
    """sm_90 takes sm_80's instructions too, at a fraction of the speed."""
    code = """
import dataclasses, json
from vidkv.apps.compile_kernels import compile_variant, fused
from vidkv.kernels.paged_attention import Tile
small = fused("sm_90", Tile(32, 32, 4, 2), 64, 16)
for variant in (small, dataclasses.replace(small, int8=("wgmma",))):
    print(json.dumps(dataclasses.asdict(compile_variant(variant, "sm_90"))))
"""
    done = python("-c", code)
    assert done.returncode == 0, done.stderr
    good, bad = map(json.loads, done.stdout.splitlines())
    assert (good["ok"], good["int8_unit"]) == (True, "mma")
    assert (bad["ok"], bad["why"]) == (False, "codes meet on mma, not wgmma")


def test_an_unknown_architecture_is_refused() -> None:
    done = python("-m", "vidkv.apps.cli", "bench", "kernels", "--arch", "sm_12345", "--json")
    assert (done.returncode, done.stdout) == (2, "")
    assert "unknown architecture 'sm_12345'; known are sm_80" in done.stderr


def test_interpreted_kernels_are_refused(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("vidkv.kernels.jit.INTERPRETED", True)
    code, stdout, stderr = run(capsys, "bench", "kernels", "--json")
    assert (code, stdout) == (2, "")
    assert "TRITON_INTERPRET=1 leaves no kernels to compile" in stderr


def test_a_later_revision_takes_the_first_ones_tiles() -> None:
    """Of its own generation; a generation that the table does not know searches the whole space."""
    tiles = {
        capability: good_tiles(capability, 128, 4680, 1560, torch.bfloat16)
        for capability in ((8, 0), (8, 6), (8, 9), (9, 0), (12, 0))
    }
    assert tiles[8, 6] == tiles[8, 0]
    assert tiles[12, 0] == tile_space((12, 0), 128, 4680, 1560, torch.bfloat16)
    assert all(0 < len(tiles[known]) < len(tiles[12, 0]) for known in tiles if known != (12, 0))
