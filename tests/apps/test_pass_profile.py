"""Which phase of a pass a kernel's time belongs to."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.tiny import build_rollout, build_transformer
from vidkv.apps.pass_profile import (
    CROSS,
    ELEMENTWISE,
    GAPS,
    LINEARS,
    PHASES,
    SELF,
    WRITE,
    PassProfile,
    pass_timer,
    phase_seconds,
    profile_passes,
)

CPU = torch.device("cpu")


def marked(label: str, start: float, duration: float) -> dict[str, Any]:
    return {"cat": "user_annotation", "name": f"bench:{label}", "ts": start, "dur": duration, "args": {}}


class Launches:
    """A GPU's trace: kernels run long after the host has launched them."""

    def __init__(self) -> None:
        self.events: list[dict[str, Any]] = []

    def add(self, name: str, at: float, duration: float, cat: str = "kernel") -> None:
        correlation = len(self.events)
        launch = "cuda_driver" if cat == "kernel" else "cuda_runtime"
        self.events.append({"cat": launch, "ts": at, "dur": 1, "args": {"correlation": correlation}})
        run = {"cat": cat, "name": name, "ts": at + 5000, "dur": duration}
        self.events.append(run | {"args": {"correlation": correlation}})


def test_kernels_belong_to_the_range_they_were_launched_in() -> None:
    trace = Launches()
    trace.add("draw noise", 5, 1000)
    trace.add("nvjet_tst_128x256", 21, 10)
    trace.add("attend_pages", 31, 40)
    trace.add("write_page", 35, 6, "gpu_memcpy")
    trace.add("nvjet_tst_128x256", 61, 20)
    trace.add("attend_pages", 71, 60)
    trace.add("attend_pages", 111, 70)
    trace.add("write_page", 116, 8)
    trace.events += [{"cat": "kernel", "name": "lost", "ts": 22, "dur": 9, "args": {"correlation": -1}}]
    trace.events += [
        marked("denoise", 0, 100), marked("pass", 20, 20), marked("linears", 20.5, 2),
        marked("self-attention", 30, 8), marked("cache write", 34, 2), marked("pass", 60, 20),
        marked("linears", 60.5, 2), marked("self-attention", 70, 2), marked("clean", 100, 50),
        marked("pass", 105, 30), marked("self-attention", 110, 20), marked("cache write", 115, 4),
    ]  # fmt: skip
    found = phase_seconds(trace.events)
    mean, span = found["denoise"]
    assert span == pytest.approx(20e-6)
    assert mean == pytest.approx(
        {LINEARS: 15e-6, SELF: 50e-6, WRITE: 3e-6, CROSS: 0, ELEMENTWISE: 0}, abs=1e-12
    )
    mean, span = found["clean"]
    assert span == pytest.approx(30e-6)
    assert mean == pytest.approx({LINEARS: 0, SELF: 70e-6, WRITE: 8e-6, CROSS: 0, ELEMENTWISE: 0}, abs=1e-12)


@pytest.mark.parametrize(
    ("kernel", "phase"),
    [
        ("nvjet_tst_256x128_64x4_2x1_v_bz_coopA_bias_TNT", LINEARS),
        ("sm90_xmma_gemm_bf16bf16_bf16f32_f32_tn_n_tilesize128x128x64", LINEARS),
        ("void cutlass::Kernel2<cutlass_80_wmma_tensorop_bf16_s161616gemm>", LINEARS),
        ("aten::addmm", LINEARS),
        ("cudnn_generated_fort_native_sdpa_sm90_flash_fprop_wgmma_f16_knob_7", CROSS),
        ("void pytorch_flash::flash_fwd_kernel<pytorch_flash::Flash_fwd_kernel_traits>", CROSS),
        ("fmha_cutlassF_bf16_aligned_64x128_rf_sm80", CROSS),
        ("triton_red_fused_native_layer_norm_mul_0", ELEMENTWISE),
        ("triton_poi_fused_addmm_gelu_3", ELEMENTWISE),
        ("triton_per_fused__scaled_dot_product_flash_attention_transpose_1", ELEMENTWISE),
        ("triton_tem_fused_mm_4", LINEARS),
        ("void at::native::vectorized_elementwise_kernel<4, CUDAFunctor_add<float>>", ELEMENTWISE),
        ("aten::common", ELEMENTWISE),
    ],
)
def test_kernels_of_compiled_blocks_are_told_by_name(kernel: str, phase: str) -> None:
    trace = Launches()
    trace.add(kernel, 20, 7)
    trace.events += [marked("clean", 0, 100), marked("pass", 10, 50)]
    phases, _ = phase_seconds(trace.events)["clean"]
    assert {name: value for name, value in phases.items() if value} == {phase: pytest.approx(7e-6)}


def test_a_cpus_operators_count_once_and_not_within_each_other() -> None:
    def operator(name: str, start: float, duration: float) -> dict[str, Any]:
        return {"cat": "cpu_op", "name": name, "ts": start, "dur": duration, "args": {}}

    events = [
        marked("denoise", 0, 100), marked("pass", 10, 80), marked("linears", 20, 30),
        operator("aten::linear", 21, 25), operator("aten::addmm", 22, 20), operator("aten::t", 21, 0.5),
        operator("aten::mul", 60, 5), operator("aten::randn", 95, 5),
    ]  # fmt: skip
    phases, span = phase_seconds(events)["denoise"]
    assert phases[LINEARS] == pytest.approx(25e-6)
    assert phases[ELEMENTWISE] == pytest.approx(5e-6)
    assert PassProfile(span, phases).gaps_s == pytest.approx(50e-6)


def test_compiled_code_on_a_cpu_counts_its_operators_and_its_own_loops() -> None:
    def operator(name: str, start: float, duration: float) -> dict[str, Any]:
        return {"cat": "cpu_op", "name": name, "ts": start, "dur": duration, "args": {}}

    events = [
        marked("denoise", 0, 100), marked("pass", 10, 80),
        operator("Torch-Compiled Region: 0/0", 20, 50), operator("## Call CompiledFxGraph abc ##", 25, 40),
        operator("aten::addmm", 30, 10), operator("aten::copy_", 31, 4),
        operator("aten::_scaled_dot_product_flash_attention_for_cpu", 50, 6), operator("aten::mul", 75, 1),
    ]  # fmt: skip
    phases, _ = phase_seconds(events)["denoise"]
    assert phases == pytest.approx(
        {LINEARS: 10e-6, CROSS: 6e-6, ELEMENTWISE: 35e-6, SELF: 0, WRITE: 0}, abs=1e-12
    )


def test_a_rollout_is_broken_down_and_left_as_it_was() -> None:
    transformer = build_transformer()
    rollout, other = (
        build_rollout("fp32,window=7,sink=0,positions=absolute", transformer=transformer) for _ in range(2)
    )
    profiles = profile_passes(rollout, transformer, CPU, compiled=False)
    assert set(profiles) == {"denoise", "clean"}
    for kind, one in profiles.items():
        busy = {name for name, value in one.phases_s.items() if value > 0}
        assert busy == set(PHASES) - ({WRITE} if kind == "denoise" else set())
        parts = one.as_dict()["phases_s"]
        assert sum(parts.values()) == pytest.approx(one.pass_s, rel=1e-3)
        assert set(parts) == {*PHASES, GAPS}
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in transformer.modules())
    assert "write" not in vars(rollout.cache)
    for _ in range(2):
        other.append(other.denoise())
    assert torch.equal(rollout.denoise(), other.denoise())


def test_long_schedules_are_profiled_over_a_few_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    transformer = build_transformer()
    rollout = build_rollout("fp32,window=7,sink=0", transformer=transformer)
    rollout.schedule = own = rollout.schedule.with_steps(9)
    calls = []
    handle = transformer.register_forward_hook(lambda *_: calls.append(1))
    profile_passes(rollout, transformer, CPU, compiled=False)
    handle.remove()
    # once with a clock and once with the profiler
    assert len(calls) == 2 * (4 + 1)
    assert rollout.schedule is own


def test_passes_are_timed_one_by_one() -> None:
    transformer = build_transformer()
    rollout = build_rollout("fp32,window=7,sink=0", transformer=transformer)
    with pass_timer(transformer, CPU) as timer:
        latents = rollout.denoise()
        denoising = timer.read()
        rollout.append(latents)
        clean = timer.read()
    assert len(denoising) == 2
    assert len(clean) == 1
    assert min(*denoising, *clean) > 0
