"""A history that has no room on the device makes the same video as one that has."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.tiny import build_rollout, build_text, build_transformer, noise
from vidkv.cache import CacheSpec, offload, planned_bytes
from vidkv.errors import CacheSpecError, ResourceError
from vidkv.jobs.checkpoints import Checkpoints
from vidkv.memory import check_host, plan_memory
from vidkv.models.registry import MODELS
from vidkv.models.wan import CausalWanTransformer3DModel
from vidkv.prompts import Switch
from vidkv.rollout import Rollout
from vidkv.schedule import FlowSchedule
from vidkv.sharing import Pools, PrefixCache

SELECTING = "int8,window=60,sink=2,select=12,device_gb=2.4e-5,host_gb=1.6e-5,disk_gb=1"


@pytest.fixture(scope="module")
def model() -> CausalWanTransformer3DModel:
    return build_transformer()


@pytest.fixture(autouse=True)
def scratch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv(offload.SCRATCH, str(tmp_path))
    return tmp_path


def pair(model: CausalWanTransformer3DModel, spec: str, **settings: Any) -> tuple[Rollout, Rollout]:
    """The same video within budgets and with everything on the device."""
    within = CacheSpec.parse(spec)
    return (
        build_rollout(within, transformer=model, **settings),
        build_rollout(within.unbudgeted, transformer=model, **settings),
    )


def test_a_history_of_twenty_times_the_device() -> None:
    """All of it read in every pass of eight layers, through two buffers of one page."""
    model, schedule = build_transformer(num_layers=8), FlowSchedule(steps=(1000,))
    spec = "int8,window=33,sink=3,segment=1,device_gb=4.5e-6"
    offloaded, whole = pair(model, spec, schedule=schedule)
    assert offloaded.cache.staged
    assert whole.kv_bytes >= 20 * offloaded.kv_bytes
    for _ in range(14):
        first, second = offloaded.step_chunk(), whole.step_chunk()
        assert torch.equal(first.latents, second.latents)
        assert first.stats.kv_bytes == offloaded.kv_bytes <= 4_500
        assert first.stats.kv_host_bytes == offloaded.cache.host_nbytes > 0
    # one denoising step and the clean pass
    assert first.stats.kv_moved_bytes >= 2 * 25 * offloaded.cache.bytes_per_frame
    assert second.stats.kv_moved_bytes == second.stats.kv_host_bytes == 0


@pytest.mark.parametrize(
    "spec",
    [
        SELECTING,
        "fp32,window=30,sink=3,device_gb=3e-5",
        "int4,hadamard=false,window=30,sink=3,device_gb=1.5e-5,keyframe,jensen",
        "int8,window=30,sink=3,device_gb=2e-5,policy=h2o",
        "int8,window=30,sink=3,device_gb=3.8e-5,keep_newest,keep_sinks,positions=absolute",
    ],
)
def test_the_same_video(model: CausalWanTransformer3DModel, spec: str) -> None:
    offloaded, whole = pair(model, spec)
    assert offloaded.cache.offloaded is not None
    for _ in range(26):
        assert torch.equal(offloaded.step_chunk().latents, whole.step_chunk().latents)
        assert offloaded.kv_bytes == planned_bytes(
            offloaded.cache.spec, offloaded.cache.geometry, torch.float32
        )


@pytest.mark.gpu
@pytest.mark.parametrize(
    "spec",
    [
        "int8,window=60,sink=3,segment=4,device_gb=0.02",
        "bf16,window=90,sink=3,select=21,device_gb=0.1,host_gb=0.2,disk_gb=9",
    ],
)
def test_copies_keep_step_with_the_gpu(spec: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pages of a megabyte, so that a copy that nobody waits for comes too late."""
    monkeypatch.setenv("VIDKV_ATTENTION", "two-pass")
    model = build_transformer(num_layers=6, num_attention_heads=8, attention_head_dim=64, ffn_dim=512)
    model = model.to("cuda", torch.bfloat16)
    embeds = noise(1, 5, model.config.text_dim).to("cuda", torch.bfloat16)
    size = model.config.in_channels, 32, 48
    offloaded, whole = pair(model, spec, latent_size=size, text=model.encode_text(embeds))
    whole.path = offloaded.path
    assert offloaded.cache.offloaded is not None
    for _ in range(36):
        assert torch.equal(offloaded.step_chunk().latents, whole.step_chunk().latents)
    assert offloaded.cache.bytes_moved > 0
    # nor do the latents of a long history lie on the device, also after a restore
    offloaded.restore(*offloaded.state())
    assert {t.device.type for t in offloaded.window_latents.values()} == {"cpu"}
    assert torch.equal(offloaded.step_chunk().latents, whole.step_chunk().latents)


def test_guided(model: CausalWanTransformer3DModel) -> None:
    """Each of two caches has its budget."""
    schedule = FlowSchedule(steps=(1000, 500), guidance=3.0)
    offloaded, whole = pair(model, "int8,window=30,sink=3,device_gb=2e-5", schedule=schedule)
    for rollout in (offloaded, whole):
        rollout.set_text(build_text(model), build_text(model, seed=9))
    for _ in range(12):
        assert torch.equal(offloaded.step_chunk().latents, whole.step_chunk().latents)


class TestGoingOn:
    @pytest.mark.parametrize("spec", [SELECTING, "int8,window=30,sink=3,device_gb=2e-5"])
    @pytest.mark.parametrize("into", ["budgets", "the device"])
    def test_saved_and_restored(self, model: CausalWanTransformer3DModel, spec: str, into: str) -> None:
        offloaded, _ = pair(model, spec)
        for _ in range(24):
            offloaded.step_chunk()
        other = pair(model, spec)[into == "the device"]
        other.restore(*offloaded.state())
        for _ in range(4):
            assert torch.equal(offloaded.step_chunk().latents, other.step_chunk().latents)

    @pytest.mark.parametrize("strategy", ["recache", "flush", "keep"])
    def test_another_prompt(self, model: CausalWanTransformer3DModel, strategy: Switch) -> None:
        offloaded, whole = pair(model, SELECTING)
        for rollout in (offloaded, whole):
            for _ in range(22):
                rollout.step_chunk()
            rollout.switch(build_text(model, seed=5), strategy=strategy)
        for _ in range(6):
            assert torch.equal(offloaded.step_chunk().latents, whole.step_chunk().latents)

    def test_forked_and_parked(self, model: CausalWanTransformer3DModel) -> None:
        offloaded, whole = pair(model, SELECTING)
        for rollout in (offloaded, whole):
            for _ in range(22):
                rollout.step_chunk()
        branch = offloaded.fork()
        offloaded.park()
        wanted = [whole.step_chunk().latents for _ in range(4)]
        assert all(torch.equal(branch.step_chunk().latents, latents) for latents in wanted)
        offloaded.unpark()
        assert all(torch.equal(offloaded.step_chunk().latents, latents) for latents in wanted)

    @pytest.mark.filterwarnings("default:pages of .* latent frames:RuntimeWarning")
    def test_a_full_disk_costs_frames_and_nothing_else(
        self, model: CausalWanTransformer3DModel, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def full(*args: object) -> None:
            raise OSError(28, "No space left on device")

        rollout, _ = pair(model, SELECTING)
        for _ in range(15):
            rollout.step_chunk()
        monkeypatch.setattr(offload, "save_file", full)
        for _ in range(15):
            chunk = rollout.step_chunk()
        places = offload.planned_places(rollout.cache.spec, rollout.cache.geometry, torch.float32)
        assert places is not None and chunk.stats.resident_frames < 57
        assert bool(torch.isfinite(chunk.latents).all())
        # what is saved then is whole: it goes on bit for bit elsewhere
        _, other = pair(model, SELECTING)
        other.restore(*rollout.state())
        assert torch.equal(rollout.step_chunk().latents, other.step_chunk().latents)


def test_a_checkpoint_does_without_pages_that_cannot_be_read(
    model: CausalWanTransformer3DModel, tmp_path: Path
) -> None:
    rollout, whole = pair(model, SELECTING)
    for _ in range(20):
        rollout.step_chunk()
    pool = rollout.cache.offloaded
    assert pool is not None
    pool.lost_slots()
    away = [slot for slot in pool.files if slot not in pool.on_host]
    for slot in away:
        pool.files[slot].unlink()
    lost = {frame for frame, page in rollout.cache.table.items() if page.slot in away}
    assert lost
    checkpoints = Checkpoints(tmp_path / "checkpoints", 1)
    with pytest.warns(RuntimeWarning, match="evicted"):
        checkpoints.save(rollout)
    assert not lost & set(rollout.cache.table)
    again = Checkpoints(tmp_path / "checkpoints", 1)
    assert again.load(whole.restore, whole, 99) == 20
    assert torch.equal(rollout.step_chunk().latents, whole.step_chunk().latents)


def test_what_is_remembered_of_openings_lies_in_common_pools_only(
    model: CausalWanTransformer3DModel,
) -> None:
    from tests.tiny import build_pipeline

    pipe = build_pipeline()
    pipe.pools, pipe.prefixes = Pools(), PrefixCache(10**8)
    for _ in pipe.stream(
        "a red circle bouncing", num_frames=33, seed=1, cache="int8,window=21,sink=3,device_gb=2.2e-5"
    ):
        pass
    assert len(pipe.prefixes) == 0 and pipe.pools.nbytes == 0
    for _ in pipe.stream("a red circle bouncing", num_frames=33, seed=1, cache="int8,window=21,sink=3"):
        pass
    assert len(pipe.prefixes) > 0


def test_planned() -> None:
    """A minute of the 1.3B model's history within 4 GB of a card, and what it takes on the host."""
    spec = CacheSpec.parse("int8,window=240,sink=3,select=21,device_gb=4")
    plan = plan_memory(MODELS["self-forcing-1.3b"], spec, 480, 832)
    assert 3.7e9 < plan.kv_bytes <= 4e9
    assert plan.kv_host_bytes == 237 * 30 * 12 * 1560 * (2 * 128 + 4)
    assert plan.need_bytes("cuda") == plan.peak_bytes == plan.need_bytes("cpu") - plan.kv_host_bytes
    check_host(plan, plan.kv_host_bytes)
    check_host(plan, None)
    with pytest.raises(ResourceError, match=r"34.6 GB of the host's memory, 34.6 GB can .*host_gb, disk_gb"):
        check_host(plan, plan.kv_host_bytes - 1)
    with pytest.raises(CacheSpecError, match="at least"):
        plan_memory(MODELS["self-forcing-1.3b"], spec.model_copy(update={"device_gb": 0.01}), 480, 832)
