"""`vidkv bench attention`: every row is held against the truth, and none ends the run."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from typing import Any

import pytest
import torch

from tests.apps.commandline import run
from tests.test_architecture import HEAVY, ROOT, loaded_by
from vidkv.apps import bench_attention
from vidkv.apps.bench_attention import Call, Inputs, make_setting, relative_error
from vidkv.attention import CachedAttention

BOUNDS = {"two-pass": 1e-5, "dequantize": 1e-5, "dense": 1e-5, "reference": 1e-5, "fused": 1e-2}
FUSED = """
import json
from vidkv.apps import bench_attention
bench_attention.ROUNDS = 1
print(json.dumps(bench_attention.attention_report("bounce", 7, "int8", False, "cpu", lambda *_: None)))
"""


def test_every_row_is_right(capsys: pytest.CaptureFixture[str]) -> None:
    code, stdout, stderr = run(capsys, "bench", "attention", "--shape", "bounce", "--device", "cpu", "--json")
    assert code == 0, stderr
    report = json.loads(stdout)
    assert set(report) == {
        *("hardware", "torch", "triton", "shape", "ceilings", "rows", "costs", "ratios", "chosen"),
        *("left_out", "not_installed"),
    }  # fmt: skip
    names = [row["name"] for row in report["rows"]]
    assert len(names) == len(set(names))
    assert {
        *("two-pass cpu", "two-pass cpu, bf16 pages", "dequantize all, then SDPA flash"),
        *("fp32 SDPA flash", "reference"),
    } <= set(names)  # fmt: skip
    for row in report["rows"]:
        assert 0 <= row["rel_l2"] <= BOUNDS[row["kind"]], row
        assert 0 < row["ms_min"] <= row["ms"] <= row["ms_max"]
        assert all(row[key] > 0 for key in ("tflops", "gb_per_s", "of_matmul", "of_ceiling"))
        assert row["scratch_bytes"] is None
    assert report["shape"]["keys"] == 21 * 16 and report["shape"]["queries"] == 3 * 16
    assert report["shape"]["flops"] == 4 * 48 * 336 * 64 * 4
    assert set(report["costs"]) == {"commit", "rotate_chunk", "merge", "decode"}
    assert all(cost["ms"] > 0 and cost["gb_per_s"] > 0 for cost in report["costs"].values())
    assert set(report["ceilings"]) == {"matmul", "int8_matmul", "copy"}
    ratios = report["ratios"]
    assert {name for name, value in ratios.items() if value is None} == {
        "fused_to_dense",
        "fused_to_two_pass",
    }
    assert all(math.isfinite(value) and value > 0 for value in ratios.values() if value is not None)
    assert 0.5 < ratios["int8_to_bf16_page_bytes"] < 0.53
    assert report["chosen"] == "two-pass cpu"
    assert "TRITON_INTERPRET" in report["left_out"]["fused"]


def test_the_fused_rows_are_right() -> None:
    """In triton's interpreter, which must be asked for before triton is imported."""
    environment = os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": str(ROOT)}
    stdout = subprocess.check_output([sys.executable, "-c", FUSED], env=environment, cwd=ROOT, text=True)
    report = json.loads(stdout)
    assert not [row for row in report["rows"] if "failed" in row]
    fused = [row for row in report["rows"] if row["kind"].startswith("fused")]
    assert [(row["kind"], row["format"]) for row in fused] == [
        ("fused", "int8"),
        ("fused kernel", "int8"),
        ("fused", "bf16"),
    ]
    assert fused[0]["rel_l2"] == fused[1]["rel_l2"] <= BOUNDS["fused"]
    assert fused[2]["rel_l2"] <= 1e-5
    assert report["costs"]["turn_queries"]["ms"] > 0
    assert None not in report["ratios"].values()
    assert "fused" not in report["left_out"]


@pytest.mark.parametrize(("kv_format", "window"), [("int8", 9), ("bf16", 9), ("int4", 18)])
def test_wrong_pages_make_a_large_error(kv_format: str, window: int) -> None:
    """What the error column could not see would not be worth its width."""
    one = Inputs(make_setting("bounce", window, kv_format, "cpu"))
    head = one.setting.heads - 1
    exact = one.exact(head)

    def error(head: int) -> float:
        out = CachedAttention(one.cache).layer(0)(one.q, one.k, one.v)
        return relative_error(out[0, :, :, head].flatten(0, 1), exact)

    assert error(head) <= 1e-5
    assert error(head - 1) > 0.1
    storage = one.cache.pools["pages"].storage
    whole = {name: buffer.clone() for name, buffer in storage.items()}
    for name in ("k", "v"):
        storage[name].copy_(whole[name].roll(1, 1))
        assert error(head) > 0.1, name
        storage[name].copy_(whole[name])
    assert error(head) <= 1e-5


def test_what_cannot_run_is_a_row(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(_: Any) -> Call:
        raise torch.OutOfMemoryError("no room for [/b]\nand more")

    class Late:
        """Fails when it is timed, not when it is prepared."""

        calls = 0

        def __call__(self, index: int) -> torch.Tensor:
            self.calls += 1
            if self.calls > 1:
                raise RuntimeError("too late")
            return torch.zeros(1)

    monkeypatch.setattr(bench_attention, "_dense", broken)
    monkeypatch.setattr(bench_attention, "_merge", lambda _: Late())
    arguments = ("bench", "attention", "--shape", "bounce", "--window", "9", "--device", "cpu")
    code, stdout, stderr = run(capsys, *arguments, "--json")
    assert code == 0, stderr
    report = json.loads(stdout)
    failed = [row for row in report["rows"] if "failed" in row]
    assert [row["failed"] for row in failed] == ["OutOfMemoryError: no room for [/b]"]
    assert report["costs"]["merge"] == {"name": "merge", "failed": "RuntimeError: too late"}
    assert report["ratios"]["two_pass_to_dense"] is None
    assert report["ratios"]["int8_to_bf16_pages"] > 0

    code, stdout, stderr = run(capsys, *arguments)
    assert code == 0, stderr
    assert "no room for [/b]" in stdout and "two-pass cpu" in stdout and "device copy" in stdout


@pytest.mark.parametrize("kv_format", ["int4", "bf16"])
def test_other_formats_have_their_own_defaults(kv_format: str) -> None:
    """Below eight bits there are kept pages and newer ones; beside them others are measured without."""
    setting = make_setting("bounce", 9, kv_format, "cpu")
    for name in ("int4", "int8", "bf16"):
        spec = setting.with_format(name).spec
        assert str(spec) == f"{name},window=9,sink=3"
        assert (spec.newer, spec.keep_sinks) == (("int8:3", True) if name == "int4" else ("", False))


REFUSED = {
    "--shape nobody": "shape='nobody' is unknown; choose bounce, wan2.1-1.3b, wan2.1-14b",
    "--kv-format int7": "cache format 'int7' is unknown; formats are fp32, bf16, int8",
    "--window 5": "sink=3 plus a chunk of 3 latent frames does not fit into window=5",
    "--shape wan2.1-1.3b --window 3": "window=3 holds no page beside a chunk of 3 latent frames; say at",
    "--device tpu": "device='tpu'; choose auto, cpu or cuda",
}


@pytest.mark.parametrize("line", REFUSED)
def test_what_it_refuses_is_one_line(capsys: pytest.CaptureFixture[str], line: str) -> None:
    device = () if "--device" in line else ("--device", "cpu")
    code, stdout, stderr = run(capsys, "bench", "attention", *line.split(), *device)
    assert (code, stdout) == (2, "")
    assert REFUSED[line] in stderr and stderr.count("\n") == 1


def test_shapes_follow_the_registry() -> None:
    setting = make_setting("wan2.1-1.3b", None, "int8", "cpu")
    assert (setting.geometry.tokens, setting.heads, setting.geometry.head_dim) == (1560, 12, 128)
    assert (setting.pages, setting.queries, setting.keys) == (18, 4680, 32_760)
    assert make_setting("wan2.1-14b", 30, "bf16", "cpu").keys == 30 * 1560


def test_calls_take_turns_among_the_inputs() -> None:
    seen: list[int] = []
    assert bench_attention._median_ms(seen.append, torch.device("cpu")) >= 0
    assert seen[:4] == [0, 1, 2, 0]


def test_it_needs_no_model_libraries() -> None:
    assert not loaded_by("vidkv.apps.bench_attention") & set(HEAVY)
