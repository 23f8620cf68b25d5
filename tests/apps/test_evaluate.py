"""`vidkv eval world`: how long it rolls out, and what its controls prove."""

from __future__ import annotations

import json
import math
from typing import Any

import numpy as np
import pytest

from vidkv.apps import evaluate
from vidkv.apps.controls import BROKEN_CACHES, EXPECTED
from vidkv.apps.evaluate import Results, judge, judge_repetition
from vidkv.errors import VidkvError
from vidkv.models.bounce.metrics import RolloutMetrics
from vidkv.models.bounce.prompts import WORLDS, World
from vidkv.pipeline import CausalVideoPipeline

ROLLOUTS, CHUNKS = 8, 5

pytestmark = pytest.mark.usefixtures("short_first_chunk")


def results(seed: int, **shifts: float) -> Results:
    """Curves of noise around one half, some of them shifted; the same seed gives the same noise."""
    generator = np.random.default_rng(seed)
    metrics = []
    for _ in range(ROLLOUTS):
        curves = {name: generator.normal(0.5, 0.1, CHUNKS) for name in evaluate.PER_CHUNK}
        for name, shift in shifts.items():
            curves[name] = curves[name] + shift
        metrics.append(RolloutMetrics(**curves, returns=[], event_latency=math.nan))
    return Results(metrics, 0)


@pytest.mark.parametrize("name", EXPECTED)
def test_a_control_has_moved_when_its_own_metric_has_in_its_own_direction(name: str) -> None:
    honest, expected = results(0), EXPECTED[name]

    def moved(**shifts: float) -> bool:
        verdict = judge(name, results(1, **shifts), honest, CHUNKS // 2)
        assert verdict["metric"] == expected.metric
        assert {key: verdict[key] for key in ("difference", "z")} == verdict["metrics"][expected.metric]
        return bool(verdict["moved"])

    assert moved(**{expected.metric: expected.direction * 1.0})
    assert not moved()
    assert not moved(**{expected.metric: expected.direction * -1.0})
    assert not moved(judged=1.0)


def test_a_freeze_is_judged_where_it_begins() -> None:
    """Afterwards a picture at rest is just what is expected of one."""
    honest, run = results(0), results(1)
    for metrics in run.metrics:
        metrics.trajectory_rmse += np.array([0, 0, 2, -2, -2])
    assert judge("frozen_frames", run, honest, 2)["moved"]
    assert not judge("frozen_frames", run, honest, 3)["moved"]
    assert not judge("no_history", run, honest, 2)["moved"]


def test_a_repetition_is_still_unless_any_metric_moves() -> None:
    honest = results(0)
    assert judge_repetition(results(1), honest)["still"]
    assert not judge_repetition(results(1, teleports=1.0), honest)["still"]
    assert not judge_repetition(results(1, teleports=-1.0), honest)["still"]
    unknown = results(1, **dict.fromkeys(evaluate.PER_CHUNK, math.nan))
    assert not judge_repetition(unknown, honest)["still"]


def test_a_constant_shift_moves_though_its_z_has_no_number() -> None:
    verdict = judge("brightness_creep", results(0, luminance_drift=1.0), results(0), 2)
    assert verdict["moved"]
    for run in (results(0), results(0, luminance_drift=math.nan)):
        assert not judge("brightness_creep", run, results(0), 2)["moved"]


def test_no_number_of_a_report_is_outside_json() -> None:
    report = {"a": [1.5, math.nan], "b": {"c": math.inf, "d": -math.inf, "e": True, "f": "nan", "g": 3}}
    assert evaluate.finite(report) == {
        "a": [1.5, None],
        "b": {"c": None, "d": None, "e": True, "f": "nan", "g": 3},
    }


def test_controls_run_from_end_to_end(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two rollouts of four chunks prove nothing; that no history moves objects shows even there."""
    pipe = CausalVideoPipeline.from_pretrained("bounce")
    seen: list[tuple[str, int, int, list[int]]] = []
    alters: dict[str, Any] = {}
    roll = evaluate._roll

    def watched(pipe: Any, work: Any, chunks: Any, spec: Any, *args: Any, **kwargs: Any) -> Results:
        seen.append((args[1], spec.segment, kwargs.get("batch", evaluate.BATCH), [t.seed for t in work]))
        alters[args[1]] = kwargs.get("alter")
        return roll(pipe, work, chunks, spec, *args, **kwargs)

    monkeypatch.setattr(evaluate, "_roll", watched)
    spec, world = pipe.default_cache(), WORLDS["narrow"]
    controls = evaluate._controls(pipe, world, 4, spec, lambda *_: None, rollouts=2)
    assert set(controls) == {"a_a", *EXPECTED}
    assert set(EXPECTED) == {*BROKEN_CACHES, "frozen_frames", "brightness_creep"}
    honest, repeated = ({name: rest for name, *rest in seen}[name] for name in ("honest", "A/A"))
    assert all(ours != theirs for ours, theirs in zip(honest, repeated, strict=True))
    assert not set(honest[2]) & set(repeated[2])
    assert controls["brightness_creep"]["moved"]
    assert controls["no_history"]["difference"] > 2
    numbered = np.arange(45, dtype=np.uint8).reshape(45, 1, 1, 1)
    assert alters["frozen_frames"](numbered).ravel().tolist() == [*range(21), *[20] * 24]
    report = {"controls": evaluate.finite(controls), "controls_pass": False}
    json.dumps(report, allow_nan=False)
    lines = [evaluate.control_line(*item) for item in report["controls"].items()]
    assert any(line.startswith("ok   control brightness_creep: luminance_drift moved by") for line in lines)


@pytest.mark.parametrize("blind", [False, True])
def test_the_report_says_whether_the_controls_pass(monkeypatch: pytest.MonkeyPatch, blind: bool) -> None:
    """Over made-up curves that every broken setting moves, or, blind to the cache, only the pixels' do."""

    def roll(*args: Any, **_: Any) -> Results:
        name = args[5]
        shown = name in EXPECTED and not (blind and name in BROKEN_CACHES)
        shift = {EXPECTED[name].metric: EXPECTED[name].direction * 1.0} if shown else {}
        made = results(len(name), **shift, teleports=math.nan)
        made.lossy_pages_read = 1
        return made

    monkeypatch.setattr(evaluate, "_roll", roll)
    monkeypatch.setattr(evaluate, "summary", lambda _: {})
    report = evaluate.evaluate_world("bounce", 8, CHUNKS, "int8", False, True, lambda *_: None)
    assert report["controls_pass"] is not blind
    assert report["controls"]["a_a"]["still"]
    assert report["controls"]["brightness_creep"]["moved"]
    assert report["controls"]["no_history"]["moved"] is not blind
    assert report["controls"]["no_history"]["metrics"]["teleports"] == {"difference": None, "z": None}
    json.dumps(report, allow_nan=False)


def test_given_numbers_win_over_quick(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def stop(number: int, world: World, chunks: int) -> list[evaluate.Task]:
        asked.append((number, chunks))
        raise VidkvError("that is enough")

    monkeypatch.setattr(evaluate, "tasks", stop)
    for rollouts, chunks, quick in (
        (None, None, True),
        (200, None, True),
        (None, 21, True),
        (None, None, False),
    ):
        with pytest.raises(VidkvError, match="enough"):
            evaluate.evaluate_world("bounce", rollouts, chunks, "int8", quick, False, lambda *_: None)
    assert asked == [(6, 9), (200, 9), (6, 21), (200, 21)]


def test_a_quick_evaluation_is_long_enough_to_evict() -> None:
    spec = CausalVideoPipeline.from_pretrained("bounce").default_cache()
    assert evaluate.QUICK_CHUNKS * 3 > spec.window
