"""`vidkv bench rollout --random-weights`: what is built, what is reported, and what is refused."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from typing import Any

import pytest
import torch
from rich.console import Console

from tests.apps.commandline import run
from vidkv.apps import bench_rollout
from vidkv.apps.bench_rollout import (
    Measured,
    check_room,
    empty_transformer,
    empty_vae,
    fill_randomly,
    make_setup,
    pass_flops,
    render,
    rollout_benchmark,
)
from vidkv.apps.pass_profile import CROSS, GAPS, LINEARS, PHASES, SELF, WRITE
from vidkv.errors import InputError, ResourceError
from vidkv.models.registry import MODELS
from vidkv.models.wan import CausalWanTransformer3DModel

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def report() -> dict[str, Any]:
    told: list[tuple[int, int]] = []
    found = rollout_benchmark(
        "bounce", window=9, kv_format="int8", height=32, width=48, chunks=2, device="cpu",
        tell=lambda done, total, what: told.append((done, total)),
    )  # fmt: skip
    assert told[-1][0] == told[-1][1]
    assert sorted(told) == told
    return found


@pytest.mark.parametrize(
    ("name", "wanted"),
    [
        ("wan2.1-1.3b", {LINEARS: 11.70, CROSS: 0.44, SELF: 28.26}),
        ("wan2.1-14b", {LINEARS: 111.9, CROSS: 2.0, SELF: 125.6}),
    ],
)
def test_the_floor_counts_the_operations_of_a_pass(name: str, wanted: dict[str, float]) -> None:
    """Published budgets at 832x480, window 21, in TFLOP."""
    setup = make_setup(name, window=21, device="cpu")
    flops = pass_flops(
        empty_transformer(setup.entry).config, setup.geometry, setup.spec.window, setup.entry.text_tokens
    )
    assert {key: value / 1e12 for key, value in flops.items()} == pytest.approx(wanted, rel=0.02)


def test_the_operations_are_those_that_torch_counts() -> None:
    """With few key heads too; torch also counts what lies around the blocks, so the blocks alone are run."""
    from torch.utils.flop_counter import FlopCounterMode

    for key_heads in (4, 2):
        with torch.device("meta"):
            model = CausalWanTransformer3DModel(
                num_attention_heads=4, num_key_value_heads=key_heads, attention_head_dim=24, text_dim=32,
                ffn_dim=80, num_layers=2, freq_dim=16,
            )  # fmt: skip
            text = model.encode_text(torch.randn(1, 7, 32))
            x, modulation = torch.randn(1, 3, 6, 96), torch.randn(1, 3, 1, 6, 96)
        counter = FlopCounterMode(display=False)
        with counter, torch.no_grad():
            for index, block in enumerate(model.blocks):
                block(x, modulation, text.keys[index], text.values[index], None, lambda q, k, v: q)
        geometry = bench_rollout.CacheGeometry.of_model(model.config, 4, 6, 3)
        flops = pass_flops(model.config, geometry, 9, 7)
        assert flops[LINEARS] + flops[CROSS] == counter.get_total_flops()
        assert flops[SELF] == 2 * (2 * 4 * 18 * 54 * 24) * 2


@pytest.mark.parametrize("name", MODELS)
def test_nothing_of_any_model_is_left_without_a_value(name: str) -> None:
    """Buffers would be: only parameters are filled."""
    for model in (empty_transformer(MODELS[name]), empty_vae(MODELS[name])):
        assert not list(model.buffers())
        assert {parameter.device.type for parameter in model.parameters()} == {"meta"}


@pytest.mark.usefixtures("poisoned_empty")
def test_weights_are_finite_reproducible_and_in_the_precisions_of_a_loaded_model() -> None:
    one, two = (fill_randomly(empty_transformer(MODELS["bounce"]), CPU, torch.bfloat16) for _ in range(2))
    assert one.dtype == torch.bfloat16
    for (name, a), b in zip(one.named_parameters(), two.parameters(), strict=True):
        assert torch.equal(a, b)
        assert bool(torch.isfinite(a).all()), name
    dtypes = {name: parameter.dtype for name, parameter in one.named_parameters()}
    assert dtypes["blocks.0.scale_shift_table"] == dtypes["blocks.0.norm2.weight"] == torch.float32
    assert dtypes["blocks.0.ffn.net.2.weight"] == dtypes["patch_embedding.weight"] == torch.bfloat16
    weight = one.blocks[0].ffn.net[2].weight.float()
    assert float(weight.std()) == pytest.approx(weight.shape[1] ** -0.5, rel=0.05)
    vae = fill_randomly(empty_vae(MODELS["bounce"]), CPU, torch.float32)
    assert all(bool((p == 1).all()) for name, p in vae.named_parameters() if name.endswith("gamma"))
    assert all(bool(torch.isfinite(p).all()) for p in vae.parameters())


def test_a_report_says_what_was_run_and_adds_up(report: dict[str, Any]) -> None:
    model, memory = report["model"], report["memory"]
    assert model["cache"] == "int8,window=9,sink=3"
    assert (model["queries"], model["keys"]) == (3 * 6, 9 * 6)
    assert model["passes"] == {"denoise": 4, "clean": 1}
    assert memory["kv_predicted_bytes"] == memory["kv_resident_bytes"] > 0
    layers, heads, head_dim = 6, 4, 64
    assert report["stock"]["kv_resident_bytes"] == 2 * layers * 9 * 6 * heads * head_dim * 4
    assert report["read_path"] == "two-pass cpu"
    assert report["first_frame_s"]["cold"] > 0 < report["first_frame_s"]["warm"]
    for name in ("vidkv", "stock"):
        row = report[name]
        assert row["denoise_s"]["min"] <= row["denoise_s"]["median"] <= row["denoise_s"]["max"]
        assert row["end_to_end_fps"] < row["transformer_fps"]
        assert set(report["phases"][name]) == {"denoise", "clean"}
    assert report["phases"]["vidkv"]["denoise"]["phases_s"][WRITE] == 0
    assert report["phases"]["stock"]["denoise"]["phases_s"][WRITE] > 0
    assert json.loads(json.dumps(report, allow_nan=False)) == report


def test_the_floor_names_the_three_largest_gaps(report: dict[str, Any]) -> None:
    floor, phases = report["floor"], report["phases"]["vidkv"]
    gaps = floor["largest_gaps_per_chunk"]
    assert len({gap["phase"] for gap in gaps} & {*PHASES, GAPS}) == 3
    above = []
    for name in (*PHASES, GAPS):
        measured = 4 * phases["denoise"]["phases_s"][name] + phases["clean"]["phases_s"][name]
        least = 5 * floor["tflop_per_pass"].get(name, 0) / floor["matmul_tflops"]
        above.append(measured - least)
    assert [gap["above_s"] for gap in gaps] == pytest.approx(sorted(above, reverse=True)[:3], rel=1e-2)
    per_chunk = 5 * sum(floor["tflop_per_pass"].values()) / floor["matmul_tflops"]
    assert floor["chunk_s"] == pytest.approx(per_chunk, rel=1e-3)


def test_ratios_are_taken_round_by_round() -> None:
    stock, vidkv = Measured([2.0, 9.0, 4.0], [1.0, 1.0, 1.0]), Measured([1.0, 3.0, 4.0], [1.0, 0.5, 2.0])
    ratios = bench_rollout._ratios(stock, vidkv, [1.0, 1.0, 1.0])
    assert ratios["denoise"] == {"median": 2.0, "min": 1.0, "max": 3.0}
    assert ratios["clean"] == {"median": 1.0, "min": 0.5, "max": 2.0}
    assert ratios["end_to_end"]["max"] == pytest.approx(11 / 4.5, rel=1e-4)


def test_tables_show_both_loops_the_phases_and_the_floor(report: dict[str, Any]) -> None:
    console = Console(width=200)
    with console.capture() as printed:
        console.print(render(report))
    text = printed.get()
    for part in ("stock / vidkv", "vidkv: ms of a pass", "stock: ms of a pass", "above the floor", "clean"):
        assert part in text


def test_a_guided_model_asks_twice_with_two_caches() -> None:
    setup = make_setup("bounce", window=6, sink=0, height=16, width=16, device="cpu")
    guided = replace(setup, schedule=replace(setup.schedule, guidance=2.0, steps=(1000, 500)))
    found = bench_rollout._benchmark(guided, 1, False, True, False, False, lambda *_: None)
    assert found["model"]["passes"] == {"denoise": 4, "clean": 2}
    assert (
        found["memory"]["kv_resident_bytes"] == found["memory"]["kv_predicted_bytes"] == 2 * (setup.kv_bytes)
    )
    assert found["phases"] == {}


def test_a_model_that_recomputes_its_context_has_no_clean_pass() -> None:
    setup = make_setup("bounce", window=6, sink=0, height=16, width=16, steps=2, device="cpu")
    setup = replace(setup, entry=replace(setup.entry, recompute_context=True))
    found = bench_rollout._benchmark(setup, 1, False, True, True, False, lambda *_: None)
    assert found["model"]["passes"] == {"denoise": 3, "clean": 0}
    assert set(found["stock_to_vidkv"]) == {"denoise", "transformer", "end_to_end"}
    assert set(found["phases"]["vidkv"]) == {"denoise"}
    assert found["phases"]["vidkv"]["denoise"]["phases_s"][WRITE] > 0
    Console(quiet=True).print(render(found))


def test_the_command_prints_one_object_and_leaves_out_what_is_not_wanted(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    compiled: list[str] = []
    monkeypatch.setattr(
        CausalWanTransformer3DModel, "compile_blocks", lambda self: compiled.append("all"), raising=False
    )
    code, stdout, stderr = run(
        capsys, "bench", "rollout", "--random-weights", "--window", "6", "--sink", "0", "--height", "16",
        "--width", "16", "--chunks", "1", "--steps", "1", "--no-baseline", "--no-profile", "--compile",
        "--device", "cpu", "--json",
    )  # fmt: skip
    assert code == 0, stderr
    found = json.loads(stdout)
    assert compiled == ["all"]
    assert found["model"]["compiled"] is True
    assert found["model"]["passes"] == {"denoise": 1, "clean": 1}
    assert found["stock"] == {"left_out": "not asked for"}
    assert found["stock_to_vidkv"] == found["phases"] == {}
    assert found["floor"]["largest_gaps_per_chunk"] == []


def test_what_cannot_be_used_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments, message in (
        (("--random-weights", "--model", "nobody"), "unknown model 'nobody'"),
        (("--random-weights", "--formats", "int8"), "--kv-format"),
        (("--random-weights", "--height", "63"), "height=63 is no positive multiple"),
        (("--random-weights", "--window", "4"), "does not fit into window=4"),
        (("--random-weights", "--steps", "0"), "num_inference_steps=0"),
        (("--window", "21"), "goes with --random-weights only"),
        (("--no-profile",), "goes with --random-weights only"),
        (("--chunks", "59"), "take at least 60"),
    ):
        code, stdout, stderr = run(capsys, "bench", "rollout", *arguments, "--device", "cpu", "--json")
        assert (code, stdout) == (2, ""), arguments
        assert message in stderr
        assert "Traceback" not in stderr


def test_what_does_not_fit_a_gpu_is_refused_before_it_is_built(monkeypatch: pytest.MonkeyPatch) -> None:
    on_cpu = make_setup("wan2.1-14b", device="cpu")
    setup = replace(on_cpu, device=torch.device("cuda"), dtype=torch.bfloat16)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (24 * 10**9, 24 * 10**9))
    with pytest.raises(
        ResourceError, match=r"wan2.1-14b needs 28\.\d GB of weights and .* 24\.0 GB are free"
    ):
        check_room(setup)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (10**12, 10**12))
    check_room(setup)


def test_running_out_of_memory_is_a_named_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def burst(setup: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 3 GiB.\nmore")

    monkeypatch.setattr(bench_rollout, "random_networks", burst)
    with pytest.raises(ResourceError, match=r"Tried to allocate 3 GiB\. Choose a smaller window"):
        rollout_benchmark("bounce", device="cpu")


def test_a_stock_loop_without_room_is_left_out_and_said_so(monkeypatch: pytest.MonkeyPatch) -> None:
    class Full:
        def __init__(self, *_: Any) -> None:
            raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr(bench_rollout, "StockLoop", Full)
    found = rollout_benchmark(
        "bounce", window=6, sink=0, height=16, width=16, chunks=1, steps=1, device="cpu", profiled=False
    )
    assert found["stock"] == {"left_out": "out of memory: CUDA out of memory."}
    assert found["vidkv"]["transformer_fps"] > 0


def test_chunks_must_be_positive() -> None:
    with pytest.raises(InputError, match="chunks=0"):
        rollout_benchmark("bounce", chunks=0)


def test_it_runs_where_only_the_core_is_installed() -> None:
    script = """
import sys
# peft needs transformers; diffusers does without the two
for name in ("typer", "av", "gradio", "transformers", "peft", "torchao"):
    sys.modules[name] = None
from vidkv.apps.bench_rollout import rollout_benchmark
report = rollout_benchmark("bounce", window=6, sink=0, height=16, width=16, chunks=1, steps=1, device="cpu")
assert report["stock"]["transformer_fps"] > 0
print("ran")
"""
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=False, timeout=300
    )
    assert done.stdout.splitlines()[-1:] == ["ran"], done.stderr[-2000:]
