"""`vidkv eval cache`: what is measured, what follows from it, and that broken caches are found out."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from tests.apps.commandline import run
from tests.tiny import build_geometry, build_pipeline, noise, relative_l2
from vidkv.apps import cache_recall, cache_report, cache_trials, evaluate_cache
from vidkv.apps.cache_recall import Absence, absences, by_gap, recall
from vidkv.apps.cache_report import conclusions, markdown, table, write_report
from vidkv.apps.cache_trials import FreeTask, Record, SideBySide, Trial, latent_error, probes, run_trials
from vidkv.apps.controls import BROKEN_CACHES, MISREAD_CACHES, CoarseCodes, DuplicatedChunk, StaleSinks
from vidkv.apps.evaluate_cache import Options, breaking_chunk, evaluate_pipeline, judge_broken, judge_still
from vidkv.attention import CachedAttention
from vidkv.cache import CacheSpec, KVCache
from vidkv.errors import VidkvError
from vidkv.models.bounce.parser import parse_frames
from vidkv.models.bounce.prompts import WORLDS
from vidkv.models.registry import MODELS
from vidkv.pipeline import CausalVideoPipeline

SPEC = CacheSpec.parse("fp32,window=9,sink=3")

pytestmark = pytest.mark.usefixtures("short_first_chunk")


def silent(*_: object) -> None:
    """Progress that nobody watches."""


@pytest.fixture(scope="module")
def tiny() -> CausalVideoPipeline:
    """Random networks that take free text, two steps for every chunk."""
    return build_pipeline(prompt_grammar=None, first_chunk_steps=(1000, 500))


@pytest.fixture(scope="module")
def report(tiny: CausalVideoPipeline) -> dict[str, Any]:
    options = Options(("int8,window=9", "bf16,window=6", "int8,window=6"), seeds=3, chunks=4, batch=2)
    return evaluate_pipeline(tiny, replace(options, controls=False), silent)


def trials_of(
    pipe: CausalVideoPipeline, *trials: Trial, chunks: int = 5, videos: int = 2
) -> dict[str, Record]:
    work = [FreeTask("waves", 5 + i) for i in range(videos)]
    return run_trials(pipe, work, [Trial("reference", SPEC), *trials], chunks, 2, False, silent)


# --- a model without a known truth ---


def test_the_reference_is_held_against_itself_and_is_exact(report: dict[str, Any]) -> None:
    reference, *others = report["caches"]
    assert report["world"] is None and reference["spec"] == report["reference"] == "fp32,window=21,sink=3"
    assert reference["attention_error"]["by_layer"] == [0, 0]
    assert reference["identical"] and reference["latent_psnr_db"]["value"] is None
    assert reference["divergence"] == {"median_chunk": None, "never": 1, "chunks": [None] * 3}
    assert reference["time"]["ratio"] == 1
    assert not any(cache["identical"] for cache in others)


def test_codes_cost_little_and_a_short_window_much(report: dict[str, Any]) -> None:
    errors = {cache["spec"]: cache["attention_error"]["value"] for cache in report["caches"]}
    # a window of six shows the newest three frames beside the sinks
    assert 0 < errors["int8,window=9,sink=3"] < errors["bf16,window=6,sink=3"]
    psnr = {cache["spec"]: cache["latent_psnr_db"]["value"] for cache in report["caches"][1:]}
    assert psnr["int8,window=9,sink=3"] > psnr["bf16,window=6,sink=3"] > 0


def test_bytes_are_those_of_the_caches(tiny: CausalVideoPipeline, report: dict[str, Any]) -> None:
    bf16 = tiny.rollout(cache="bf16").cache.nbytes
    for cache in report["caches"]:
        sizes, spec = cache["bytes"], CacheSpec.of(cache["settings"])
        assert sizes["predicted"] == sizes["resident"] == tiny.rollout(cache=spec).cache.nbytes
        assert sizes["bf16"] == bf16 and sizes["fewer"] == pytest.approx(bf16 / sizes["resident"])
        assert sizes["per_frame"] * spec.capacity(3) == pytest.approx(sizes["resident"])
        assert sizes["live"] > sizes["resident"] and sizes["allocated"] is None
    by_spec = {cache["spec"]: cache["bytes"] for cache in report["caches"]}
    assert by_spec["bf16,window=6,sink=3"]["fewer_per_frame"] == pytest.approx(1)
    assert by_spec["bf16,window=6,sink=3"]["fewer"] == pytest.approx(18 / 3)


def test_without_truth_there_is_fidelity_and_drift_alone(report: dict[str, Any]) -> None:
    for cache in report["caches"]:
        assert not {"metrics", "difference", "recall", "breaks_at_chunk"} & cache.keys()
        assert set(cache["picture"]) == {"luma", "saturation", "flicker"}
    short = report["caches"][2]["picture"]["flicker"]
    assert short["value"] > 0 and short["difference"]["value"] != 0
    assert report["probed_chunks"] == [3]


def test_a_window_that_never_filled_is_named(report: dict[str, Any]) -> None:
    assert report["never_full"] == ["fp32,window=21,sink=3"]
    assert "In 4 chunks no frame had to leave `fp32,window=21,sink=3`" in table(report)


@pytest.mark.parametrize(
    ("entry", "config"),
    [
        ({}, {"guidance": 3.0}),
        ({"recompute_context": True}, {}),
        ({"first_chunk_frames": 1}, {}),
        ({"chunk_frames": 1}, {"sampler": "unipc"}),
    ],
)
def test_models_of_other_kinds(
    monkeypatch: pytest.MonkeyPatch, entry: dict[str, Any], config: dict[str, Any]
) -> None:
    """Two caches, none that is kept, a first frame on its own, single frames: everywhere equal is equal."""
    monkeypatch.setitem(MODELS, "bounce", replace(MODELS["bounce"], window=6, sink=1, **entry))
    settings = {"prompt_grammar": None, "first_chunk_steps": (1000, 500), **config}
    options = Options(("segment=5", "int8"), seeds=2, chunks=3, batch=2, controls=False)
    reference, same, coded = evaluate_pipeline(build_pipeline(**settings), options, silent)["caches"]
    assert reference["identical"] and reference["attention_error"]["worst"] == 0
    assert same["attention_error"]["worst"] < 1e-5 and same["divergence"]["never"] == 1
    assert 1e-4 < coded["attention_error"]["value"] < 0.1
    assert not coded["identical"] and coded["latent_psnr_db"]["value"] > 30
    assert all(c["bytes"]["predicted"] == c["bytes"]["resident"] for c in (reference, same, coded))
    assert reference["bytes"]["fewer"] == pytest.approx(0.5)


def test_what_choosing_tokens_costs_is_told(tiny: CausalVideoPipeline) -> None:
    texts = ("fp32,window=9,keep_tokens=0.5", "fp32,window=9,keep_tokens=0.5,keep_by=mass")
    made = evaluate_pipeline(tiny, Options(texts, seeds=3, chunks=3, batch=2, controls=False), silent)
    by_key, by_mass = made["caches"][1:]
    g = tiny.rollout().cache.geometry
    products = g.layers * 2 * min(64, 3 * g.tokens) * 3 * g.tokens
    assert by_key["sampled_scores"] == 0 and by_mass["sampled_scores"] == products
    assert (
        0 < by_mass["attention_error"]["value"] and by_mass["bytes"]["resident"] < by_key["bytes"]["resident"]
    )
    told = [line for line in table(made).splitlines() if "beside its attention" in line]
    assert len(told) == 1 and f"by {products:,} products" in told[0] and "keep_by=mass" in told[0]


def test_every_word_of_a_report_has_its_number(report: dict[str, Any], tmp_path: Path) -> None:
    json.dumps(report, allow_nan=False)
    write_report(report, tmp_path)
    written = (tmp_path / "report.md").read_text(encoding="utf-8")
    assert json.loads((tmp_path / "report.json").read_text()) == report
    for text in (written, table(report)):
        for cache in report["caches"]:
            assert cache["spec"] in text
            assert f"{cache['bytes']['resident']:,.0f} ({cache['bytes']['fewer']:.2f})" in text
        assert "identity" not in text and "recall" not in text
        assert not {"None", "nan", "inf"} & set(text.replace("(", " ").replace("|", " ").split())
    with Image.open(tmp_path / "pareto.png") as picture:
        colours = picture.convert("RGB").getcolors(1 << 20)
        assert picture.width > 800 and colours is not None and len(colours) > 20


def test_the_rows_come_largest_cache_first(report: dict[str, Any]) -> None:
    rows = [line for line in table(report).splitlines() if "window=" in line and "(reference)" not in line]
    order = ["int8,window=9,sink=3", "bf16,window=6,sink=3", "int8,window=6,sink=3"]
    assert [row.split("  ")[0] for row in rows[1:4]] == order


# --- side by side ---


def test_the_first_chunk_is_common_and_equal_caches_stay_equal(tiny: CausalVideoPipeline) -> None:
    records = trials_of(tiny, Trial("again", SPEC), videos=3)
    ours, theirs = records["again"], records["reference"]
    for name, values in ours.picture.items():
        assert np.array_equal(values, theirs.picture[name]), name
    assert ours.diverged == [None] * 3 and ours.latent_psnr() == math.inf
    assert ours.attention_by_video.shape == (3, 2) and not ours.attention_by_video.any()


def test_free_runs_are_those_of_the_pipeline(tiny: CausalVideoPipeline) -> None:
    work = [FreeTask("waves", 5), FreeTask("waves", 6)]
    trials = [Trial("reference", SPEC), Trial("int8", CacheSpec.parse("int8,window=6,sink=3"))]
    records = {trial.name: Record() for trial in trials}
    latents = cache_trials.free_run(tiny, work, trials, 3, None, records, silent)
    for trial in trials:
        frames, rollout = [], tiny.rollout(seeds=[5, 6], batch=2, cache=trial.spec)
        tiny.set_prompt(rollout, ["waves", "waves"])
        for chunk in range(3):
            made = rollout.step_chunk()
            assert made.frames is not None
            frames.append(made.frames)
            assert trial.name != "reference" or torch.equal(made.latents, latents[chunk])
        levels = torch.stack([part.float().mean((1, 2, 3)) for part in frames])
        luma = torch.stack([(part.float() / 255 @ torch.tensor([0.299, 0.587, 0.114])).mean((1, 2, 3))
                            for part in frames])  # fmt: skip
        assert bool((levels[0] != levels[2]).all())
        wanted = 100 * (luma - luma[:1])
        found = np.stack(records[trial.name].picture["luma"], 1)
        assert torch.allclose(torch.tensor(found, dtype=torch.float32), wanted, atol=1e-4)


def test_side_by_side_goes_on_with_the_reference() -> None:
    geometry = build_geometry(layers=1, batch=2)
    spec = CacheSpec.parse("fp32,window=9,sink=3")
    caches = [KVCache(spec, geometry) for _ in range(2)]
    for number in range(2):
        for seed, cache in enumerate(caches):
            cache.begin(3)
            with cache.committing():
                pages = [noise(2, 2, 3, 4, 8, seed=10 * number + 3 * seed + i) for i in range(2)]
                cache.write(0, *pages)
    for cache in caches:
        cache.begin(3)
    readers = [CachedAttention(cache) for cache in caches]
    q, k, v = (noise(2, 3, 4, 2, 8, seed=50 + i) for i in range(3))
    both = SideBySide(readers[0], {"same": readers[0], "other": readers[1]})
    wanted, other = (reader.layer(0)(q, k, v) for reader in readers)
    assert torch.equal(both.layer(0)(q, k, v), wanted)
    assert not both.squares["same"].any()
    error = (both.squares["other"] / both.own).sqrt()
    for video in range(2):
        assert float(error[video]) == pytest.approx(relative_l2(other[video], wanted[video]))
        assert float(error[video]) > 0.1


def test_the_error_of_latents_is_by_their_own_range() -> None:
    wanted = torch.zeros(2, 1, 1, 2, 2)
    wanted[0, ..., 0, 0], wanted[1, ..., 0, 0] = 4, -2
    found = wanted + torch.tensor([1.0, 0.0]).view(2, 1, 1, 1, 1)
    assert latent_error(found, wanted) == [1 / 16, 0]
    record = Record(latent_error={7: [1 / 16, 0], 9: [0.0, 0.0]})
    assert record.latent_psnr(7) == pytest.approx(10 * math.log10(32))
    assert record.latent_psnr() == pytest.approx(10 * math.log10(64))
    assert record.latent_psnr(9) == math.inf


def test_footage_notes_flicker_and_the_first_chunk_that_differs() -> None:
    one, other = cache_trials._Footage(), cache_trials._Footage()
    for chunk, level in enumerate((100, 100, 140)):
        frames = np.full((4, 8, 8, 3), 100, np.uint8)
        one.add(frames, False)
        other.add(np.where(np.arange(4)[:, None, None, None] % 2, frames, np.uint8(level)), False)
        other.compare(one)
        assert other.diverged_at == (None if chunk < 2 else 2)
    assert [look["flicker"] for look in one.looks] == [0, 0, 0]
    # from 100 to 140 and back, at every of four steps
    assert other.looks[2]["flicker"] == pytest.approx(100 * 40 / 255)
    assert other.looks[2]["luma"] == pytest.approx(100 * 20 / 255, abs=1e-4)


def test_caches_are_compared_once_frames_have_left_all_of_them(tiny: CausalVideoPipeline) -> None:
    long, short = Trial("long", CacheSpec.parse("window=21")), Trial("short", CacheSpec.parse("window=9"))
    # chunk 7 is the first before which 21 frames were made, and 18 are kept
    assert probes(tiny, [long, short], 15) == [7, 10, 13, 14]
    assert probes(tiny, [short], 5) == [3, 4]
    assert probes(tiny, [long], 5) == [4]


def test_a_cache_that_miscounts_stops_the_evaluation(
    tiny: CausalVideoPipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    planned = cache_trials.planned_bytes
    monkeypatch.setattr(cache_trials, "planned_bytes", lambda *args: planned(*args) - 1)
    with pytest.raises(VidkvError, match=r"window=9,sink=3 takes [\d,]+ bytes where [\d,]+ were planned"):
        trials_of(tiny, chunks=2)


# --- broken caches ---


def committed(kind: type[KVCache], chunks: int = 3, **geometry: Any) -> tuple[KVCache, list[torch.Tensor]]:
    cache, keys = kind(CacheSpec.parse("fp32,window=12,sink=2"), build_geometry(batch=2, **geometry)), []
    for chunk in range(chunks):
        cache.begin(3)
        with cache.committing():
            for layer in range(2):
                k, v = (noise(2, 2, 3, 4, 8, seed=100 * chunk + 10 * layer + i) for i in range(2))
                cache.write(layer, k, v)
                keys += [k] if layer == 0 else []
    return cache, keys


def test_stale_sinks_are_the_neighbours_and_nothing_else_is() -> None:
    cache, keys = committed(StaleSinks)
    assert cache.layout.sinks == (0, 1)
    for frame in range(9):
        stored, wanted = cache.page(frame)["k"][0], keys[frame // 3][:, :, frame % 3]
        assert torch.equal(stored, wanted.roll(1, 0) if frame < 2 else wanted), frame


def test_a_duplicated_chunk_stands_in_place_of_the_one_before() -> None:
    cache, _ = committed(DuplicatedChunk)
    slots = [cache.table[frame].slot for frame in (0, 1, 2, 6, 7, 8, 6, 7, 8)]
    cache.begin(3)
    (run,) = cache.history
    assert run.slots.tolist() == slots and run.offsets.tolist() == list(range(-9, 0))


def test_coarse_codes_have_four_levels() -> None:
    cache, keys = committed(CoarseCodes, chunks=1)
    stored = torch.stack([cache.page(frame)["k"][0] for frame in range(3)], 2)
    scale = keys[0].abs().max() / 2
    assert set((stored / scale).round(decimals=4).unique().tolist()) <= {-2, -1, 0, 1}
    assert len(stored.unique()) > 2
    inside = keys[0].abs() < 1.5 * scale
    assert float((stored - keys[0])[inside].abs().max()) <= float(scale) / 2 + 1e-5


def seen(error: float, videos: int = 8, seed: int = 0) -> Record:
    spread = np.random.default_rng(seed).normal(0, error / 20, (videos, 2))
    return Record(attention={5: list(np.abs(error + spread))})


def test_a_broken_cache_must_raise_the_error_beyond_what_a_repetition_has() -> None:
    assert judge_broken("stale_sinks", {"honest": seen(0), "stale_sinks": seen(0.1)}, False, 1e-4)["moved"]
    for honest, error in ((0.0, 1e-5), (0.1, 0.1), (0.2, 0.1), (0.0, 0.0)):
        records = {"honest": seen(honest), "stale_sinks": seen(error, seed=1)}
        verdict = judge_broken("stale_sinks", records, False, 1e-4)
        assert not verdict["moved"], (honest, error)
    assert judge_still(seen(1e-6), seen(0), False, 1e-4)["still"]
    assert not judge_still(seen(1e-3), seen(0), False, 1e-4)["still"]


def test_controls_of_a_model_without_truth(
    tiny: CausalVideoPipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(evaluate_cache, "CONTROL_ROLLOUTS", 3)
    options = Options(("int8,window=6",), seeds=2, chunks=4, batch=3, controls=True)
    report = evaluate_pipeline(tiny, options, silent)
    assert set(report["controls"]) == {"a_a", *MISREAD_CACHES} > {*BROKEN_CACHES}
    assert report["controls"]["a_a"]["still"] and 0 < report["controls"]["a_a"]["attention_error"] < 1e-4
    assert all(report["controls"][name]["attention_error"] > 1e-3 for name in MISREAD_CACHES)
    assert report["controls_pass"]
    said = markdown(report)
    assert "controls: pass" in said
    assert all(name in said for name in MISREAD_CACHES)


# --- what follows ---


def entry(
    spec: str, size: float, error: float, identity: tuple[float, float, float] | None
) -> dict[str, Any]:
    cache: dict[str, Any] = {
        "spec": spec,
        "settings": {"format": spec, "window": 21},
        "lossy_pages_read": int(spec.startswith("int")),
        "sampled_scores": 0.0,
        "bytes": {"resident": 1200 / size, "fewer": size, "fewer_per_frame": size / 2, "allocated": None}
        | {"live": 1000 + 1200 / size},
        "attention_error": {"value": error},
    }
    if identity is not None:
        mean, low, high = identity
        cache |= {"difference": {"identity": {"value": mean, "ci95": [low, high]}}, "breaks_at_chunk": None}
    return cache


def test_the_best_keeps_identity_and_reads_most_exactly() -> None:
    kept, lost = (-0.01, -0.03, 0.01), (-0.2, -0.3, -0.1)
    caches = [
        entry("reference", 0.5, 0, (0, 0, 0)),
        entry("int8", 2, 0.003, kept),
        entry("int4", 3.8, 0.03, kept),
        entry("int4-exact", 3.6, 0.02, lost),
        entry("int4-poor", 3.5, 0.04, kept),
        entry("int2", 6.5, 0.3, lost),
        entry("int2-worse", 7, 0.2, (-0.4, -0.5, -0.3)),
    ]
    found = conclusions(caches)
    assert found["best"]["3.5 fewer"] == {"spec": "int4", "keeps_identity": True}
    assert found["best"]["6 fewer"] == {"spec": "int2", "keeps_identity": False}
    assert found["best"]["3.5 fewer_per_frame"] == {"spec": "int2-worse", "keeps_identity": False}
    assert found["best"]["6 fewer_per_frame"] is None
    assert found["no_help"] == {"int4-poor": "int4-exact", "int2": "int2-worse"}


def test_quantized_caches_are_to_have_lower_peaks_than_bf16() -> None:
    caches = [entry("fp32", 0.5, 0, None), entry("bf16", 1, 0.001, None), entry("int8", 2, 0.01, None)]
    assert conclusions(caches)["peaks_not_below_bf16"] == []
    caches[2]["bytes"]["live"] = caches[1]["bytes"]["live"]
    assert conclusions(caches)["peaks_not_below_bf16"] == ["int8"]
    caches[2]["bytes"]["allocated"] = 1000
    assert conclusions(caches)["peaks_not_below_bf16"] == []
    caches[1]["settings"]["window"] = 9
    assert conclusions(caches)["peaks_not_below_bf16"] is None


def test_without_truth_the_most_exact_is_best() -> None:
    caches = [entry("reference", 1, 0, None), entry("a", 4, 0.1, None), entry("b", 4, 0.05, None)]
    assert conclusions(caches)["best"]["3.5 fewer"] == {"spec": "b", "keeps_identity": None}


def test_one_bad_chunk_is_not_a_break() -> None:
    assert breaking_chunk([0.1, -0.1, 0.1, -0.1, -0.2, 0.1]) == 3
    assert breaking_chunk([0.1, -0.1, 0.1, -0.1]) is None
    assert breaking_chunk([math.nan, math.nan]) is None


# --- what left the view ---


def test_an_absence_is_one() -> None:
    found = absences(WORLDS["narrow"], 2)
    assert len(found) == 12 and [a.chunk for a in found] == sorted(a.chunk for a in found)
    assert all(len(rows) == 2 for rows in by_gap(found, [True] * 12).values())
    for absence in found:
        shown = parse_frames(cache_recall._true_frames(absence)[0])
        there = np.array([any(s.colour == absence.colour for s in objects) for objects in shown.objects])
        begin = absence.frames - 12
        assert there[0] and there[-1] and not there[begin - 1], absence
        away = int((~there).sum())
        # slivers of an object at the border are not seen
        assert absence.gap <= away <= absence.gap + 16 and there[:3].all(), absence


def test_back_is_at_the_place_and_in_the_colour() -> None:
    absence = absences(WORLDS["narrow"], 1)[0]
    truth = cache_recall._true_frames(absence)[0, -1:]
    assert cache_recall._is_back(absence, truth, truth)
    assert not cache_recall._is_back(absence, truth.roll(9, 1), truth)
    assert not cache_recall._is_back(absence, truth.roll(1, -1), truth)
    assert not cache_recall._is_back(absence, torch.zeros_like(truth), truth)


def test_a_window_that_is_too_short_forgets() -> None:
    pipe = CausalVideoPipeline.from_pretrained("bounce")
    found = [a for a in absences(WORLDS["narrow"], 3) if 49 <= a.gap < 61 and a.chunk <= 7][:3]
    specs = [pipe.default_cache(), CacheSpec.parse("window=9,sink=0,policy=sliding_window")]
    kept, forgotten = recall(pipe, found, specs, 3, silent)
    assert len(found) == 3 and sum(kept) >= 2 and sum(forgotten) == 0


# --- from the command line ---


def test_the_embedded_world_is_judged(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    asked: list[Absence] = []

    def remembered(_: Any, absent: Any, specs: Any, *__: Any) -> list[list[bool]]:
        asked.extend(absent)
        return [[True] * len(absent), *([a.gap < 49 for a in absent] for _ in specs[1:])]

    monkeypatch.setattr(evaluate_cache, "recall", remembered)
    options = ("--quick", "--seeds", "2", "--chunks", "4", "--device", "cpu", "--out", str(tmp_path / "new"))
    code, stdout, stderr = run(capsys, "eval", "cache", *options, "--spec", "int8,window=9", "--json")
    assert code == 0, stderr
    report = json.loads(stdout)
    reference, short = report["caches"]
    assert len(asked) == 12 and "controls" not in report
    assert short["recall"]["value"] == 0.5 and short["recall"]["breaks_after_frames"] == 49
    assert reference["recall"]["breaks_after_frames"] is None
    assert reference["difference"]["identity"] == {"value": 0, "ci95": [0, 0]}
    assert set(short["metrics"]["identity"]) == {"0", "1", "2", "3"}
    assert short["identity_difference"]["0"]["value"] == 0, "the first chunk is common"
    assert short["lossy_pages_read"] > 0 == reference["lossy_pages_read"]
    said = (tmp_path / "new" / "report.md").read_text(encoding="utf-8")
    assert "breaks after 49" in said and "## Where each policy breaks" in said
    assert {path.name for path in (tmp_path / "new").iterdir()} == {"report.json", "report.md", "pareto.png"}


def test_what_cannot_be_done_is_said_before_anything_is_loaded(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def load(*_: Any, **__: Any) -> None:
        raise AssertionError("a model was loaded")

    monkeypatch.setattr(CausalVideoPipeline, "from_pretrained", load)
    (tmp_path / "file").touch()
    for arguments, message in (
        (("--spec", "int9"), "cache format 'int9' is unknown"),
        (("--spec", "int8", "--spec", "window=x"), "window='x'"),
        (("--device", "tpu"), "device='tpu'"),
        (("--seeds", "1"), "--seeds"),
        (("--out", str(tmp_path / "file")), "cannot be made into a folder"),
    ):
        code, stdout, stderr = run(capsys, "eval", "cache", *arguments)
        assert (code, stdout) == (2, "") and message in stderr
        assert len(stderr.strip().splitlines()) == 1
    monkeypatch.setattr(cache_report, "find_spec", lambda _: None)
    code, _, stderr = run(capsys, "eval", "cache", "--out", str(tmp_path / "pictures"))
    assert code == 2 and "pip install 'vidkv[plot]'" in stderr and not (tmp_path / "pictures").exists()


def test_a_spec_must_fit_the_model(tiny: CausalVideoPipeline) -> None:
    with pytest.raises(VidkvError, match="window=4"):
        evaluate_pipeline(tiny, Options(("window=4",)), silent)


def test_the_specs_of_a_plain_call_all_fit_and_differ(tiny: CausalVideoPipeline) -> None:
    found = evaluate_cache._trials(tiny, evaluate_cache.SPECS)
    assert len({str(trial.spec) for trial in found}) == len(evaluate_cache.SPECS) + 1 >= 13
    assert evaluate_cache._trials(tiny, ["fp32", "int8", "int8,window=21"])[1:] == [
        Trial("int8,window=21,sink=3", CacheSpec.parse("int8,window=21,sink=3,positions=relative"))
    ]


def test_failing_controls_are_the_exit_code(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, report: dict[str, Any]
) -> None:
    control = {"still": False, "attention_error": 0.1, "limit": 1e-4}
    failing = report | {"controls": {"a_a": control}, "controls_pass": False}
    monkeypatch.setattr(evaluate_cache, "evaluate_cache", lambda *_: failing)
    code, stdout, stderr = run(capsys, "eval", "cache")
    assert code == 1 and "FAIL a_a: attention error 1.00e-01" in stdout and "prove nothing" in stderr


def test_other_processes_read_the_same() -> None:
    generator = np.random.default_rng(1)
    clips = [generator.integers(0, 256, (2, 64, 64, 3), dtype=np.uint8) for _ in range(3)]
    here = list(cache_trials.read_here(clips))
    with cache_trials.reading(2) as read:
        there = list(read(clips))
    assert [parsed.objects for parsed in there] == [parsed.objects for parsed in here]
