"""The other commands: what they print, promise as JSON, and refuse."""

from __future__ import annotations

import json
import math
from typing import Any

import numpy as np
import pytest

from tests.apps.commandline import run
from vidkv.apps import evaluate
from vidkv.apps.bench import median_ratio
from vidkv.cache import CacheSpec, KVCache
from vidkv.models.bounce.prompts import WORLDS
from vidkv.pipeline import CausalVideoPipeline

pytestmark = pytest.mark.usefixtures("short_first_chunk")


def as_json(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict[str, Any]:
    code, stdout, stderr = run(capsys, *arguments, "--json")
    assert code == 0, stderr
    result: dict[str, Any] = json.loads(stdout)
    return result


def test_estimate_is_exact_for_a_stock_model(capsys: pytest.CaptureFixture[str]) -> None:
    size = ("--model", "wan2.1-1.3b", "--height", "480", "--width", "832", "--window", "45", "--sink", "0")
    plan = as_json(capsys, "estimate", *size, "--kv-format", "bf16")
    assert plan["kv_bytes"] == 12_076_646_400
    parts = ("kv_bytes", "weights_bytes", "text_bytes", "vae_bytes", "activation_bytes", "peak_bytes")
    assert all(isinstance(plan[name], int) and plan[name] > 0 for name in parts)
    small = as_json(capsys, "estimate", *size, "--kv-format", "int8")
    assert small["kv_bytes"] <= 0.53 * plan["kv_bytes"]


def test_estimate_equals_what_the_rollout_allocates(capsys: pytest.CaptureFixture[str]) -> None:
    pipe = CausalVideoPipeline.from_pretrained("bounce")
    for name in ("fp32", "bf16", "int8"):
        plan = as_json(capsys, "estimate", "--kv-format", name, "--device", "cpu")
        spec = CacheSpec.of(pipe.default_cache().model_dump() | {"format": name})
        assert plan["kv_bytes"] == pipe.rollout(cache=spec).cache.nbytes


def test_estimate_refuses(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments, message in (
        (("--model", "nobody"), "unknown model 'nobody'"),
        (("--height", "100"), "height=100"),
        (("--window", "2"), "window=2"),
    ):
        code, _, stderr = run(capsys, "estimate", *arguments)
        assert code == 2
        assert message in stderr


def test_estimate_is_for_the_device_named(capsys: pytest.CaptureFixture[str]) -> None:
    """Which need not be in this machine, whether or not the model's weights are."""
    for model in ("bounce", "wan2.1-1.3b"):
        plans = {
            name: as_json(capsys, "estimate", "--model", model, "--device", name) for name in ("cpu", "cuda")
        }
        # norms and the time embedder stay at float32
        ratio = plans["cpu"]["weights_bytes"] / plans["cuda"]["weights_bytes"]
        assert 1.9 < ratio < 2
        assert plans["cpu"]["cache"].startswith("fp32") and plans["cuda"]["cache"].startswith("bf16")
        code, _, stderr = run(capsys, "estimate", "--model", model, "--device", "foo")
        assert (code, stderr) == (2, "vidkv: device='foo'; choose auto, cpu or cuda\n")
    stock = ("estimate", "--model", "wan2.1-1.3b")
    assert as_json(capsys, *stock) == as_json(capsys, *stock, "--device", "cuda")


USAGE = {
    "generate": "Missing argument 'prompt'; see vidkv generate --help",
    "foo": "No such command 'foo'; see vidkv --help",
    "generate X --nope": "No such option: --nope",
    "generate X --seconds abc": "'--seconds'",
    "bench rollout --chunks 3": "'--chunks'",
    "eval world --rollouts 1": "'--rollouts'",
    "estimate --batch 0": "'--batch'",
    "doctor extra": "extra",
}


@pytest.mark.parametrize("line", USAGE)
def test_a_usage_error_is_one_clear_line(capsys: pytest.CaptureFixture[str], line: str) -> None:
    code, stdout, stderr = run(capsys, *line.split())
    assert (code, stdout) == (2, "")
    assert stderr.startswith("vidkv: ") and stderr.endswith(" --help\n") and stderr.count("\n") == 1
    assert USAGE[line] in stderr
    assert line.split()[-1] in stderr


def test_no_arguments_show_the_help(capsys: pytest.CaptureFixture[str]) -> None:
    for line in ("", "bench"):
        code, stdout, stderr = run(capsys, *line.split())
        assert code in (0, 2)
        assert "Usage:" in stdout + stderr and "Traceback" not in stderr


def test_doctor_passes_on_this_machine(capsys: pytest.CaptureFixture[str]) -> None:
    report = as_json(capsys, "doctor")
    assert report["healthy"]
    assert {check["status"] for check in report["checks"]} <= {"ok", "warn"}
    assert any("int8" in check["name"] for check in report["checks"])


def test_a_median_ratio_has_its_truth_inside_its_interval() -> None:
    generator = np.random.default_rng(0)
    a, b = generator.normal(2, 0.1, 200), generator.normal(1, 0.1, 200)
    ratio, low, high = median_ratio(a, b)
    assert low < 2 < high
    assert abs(ratio - 2) < 0.1


def test_eval_reports_every_metric(capsys: pytest.CaptureFixture[str]) -> None:
    report = as_json(capsys, "eval", "world", "--quick", "--rollouts", "3")
    for name in ("identity", "colour_delta_e", "count_error"):
        assert set(report[name]) == {str(chunk) for chunk in range(evaluate.QUICK_CHUNKS)}
        assert len(report[name]["0"]["ci95"]) == 2
    assert len(report["teleports_per_frame"]["ci95"]) == 2
    assert all("ci95" in value for value in report["reappearance"].values())
    assert report["quantized"]["lossy_pages_read"] > 0
    assert 0 <= report["identity"]["0"]["value"] <= 1


def test_eval_fails_loudly_when_nothing_was_quantized(capsys: pytest.CaptureFixture[str]) -> None:
    size = ("--rollouts", "2", "--chunks", "4")
    code, stdout, stderr = run(capsys, "eval", "world", *size, "--kv-format", "bf16")
    assert (code, stdout) == (2, "")
    assert "no quantized page was read" in stderr


def test_broken_caches_change_what_is_made() -> None:
    pipe = CausalVideoPipeline.from_pretrained("bounce")
    spec, work = pipe.default_cache(), evaluate.tasks(2, WORLDS["narrow"], 3)
    honest, _ = evaluate.roll_group(pipe, work, 3, spec, KVCache)
    again, _ = evaluate.roll_group(pipe, work, 3, spec, KVCache)
    assert bool((honest == again).all())
    for name, kind in evaluate.BROKEN_CACHES.items():
        broken, _ = evaluate.roll_group(pipe, work, 3, spec, kind)
        assert bool((broken[:, :9] == honest[:, :9]).all()), f"{name}: chunk 0 has no history to break"
        assert bool((broken[:, 9:] != honest[:, 9:]).any()), name


def test_a_shift_counts_standard_errors() -> None:
    generator = np.random.default_rng(0)
    base = generator.normal(0, 1, (50, 4))
    moved = evaluate._shift(base + 1, base + generator.normal(0, 0.1, (50, 4)))
    assert moved["z"] > 50
    assert evaluate._shift(base, base)["z"] == 0
    assert math.isnan(evaluate._shift(base[:1], base[:1])["z"])


def test_training_refuses_what_it_does_not_know(capsys: pytest.CaptureFixture[str], tmp_path: Any) -> None:
    for option, value in (("--world", "flat"), ("--recipe", "tpu"), ("--minutes", "0")):
        code, _, stderr = run(capsys, "train", "bounce", "--out", str(tmp_path), option, value)
        assert code == 2
        assert value in stderr
    assert list(tmp_path.iterdir()) == []
