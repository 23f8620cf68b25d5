"""A rollout is the same video however it is run: streamed, interleaved, batched, forked, saved."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from copy import deepcopy
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.tiny import (
    LATENT_SIZE,
    build_rollout,
    build_text,
    build_transformer,
    build_vae,
    noise,
    relative_l2,
)
from vidkv.cache import planned_bytes
from vidkv.cache.kv_cache import State
from vidkv.errors import (
    CacheSpecError,
    CacheStateError,
    Cancelled,
    InputError,
    NumericsError,
    ResourceError,
    StateError,
)
from vidkv.models.wan import CausalWanTransformer3DModel
from vidkv.noise import chunk_noise
from vidkv.rollout import Chunk, Rollout, _seconds
from vidkv.schedule import FlowSchedule

FORMATS = ("fp32", "bf16", "int8", "int8,keep_newest,keep_sinks,value_scale=channel")
WINDOW = "window=9,sink=2"


@pytest.fixture(scope="module")
def model() -> CausalWanTransformer3DModel:
    return build_transformer()


def chunks_of(rollout: Rollout, number: int) -> list[Chunk]:
    return [rollout.step_chunk() for _ in range(number)]


def latents_of(rollout: Rollout, number: int) -> Tensor:
    return torch.cat([chunk.latents for chunk in chunks_of(rollout, number)], 1)


def same(found: list[Chunk], wanted: list[Chunk]) -> bool:
    """Bit for bit, frames and latents."""
    assert [c.index for c in found] == [c.index for c in wanted]
    return all(
        torch.equal(a.latents, b.latents)
        and (a.frames is b.frames is None or torch.equal(a.frames, b.frames))
        for a, b in zip(found, wanted, strict=True)
    )


class TestOneVideo:
    @pytest.mark.parametrize("format", FORMATS)
    def test_interleaved_with_others(self, model: CausalWanTransformer3DModel, format: str) -> None:
        """Two rollouts in turn, with other work and other random numbers between."""
        vae = build_vae()
        one_shot = [
            chunks_of(build_rollout(f"{format},{WINDOW}", transformer=model, seeds=[s], vae=vae), 5)
            for s in (7, 8)
        ]
        a, b = (build_rollout(f"{format},{WINDOW}", transformer=model, seeds=[s], vae=vae) for s in (7, 8))
        found: tuple[list[Chunk], list[Chunk]] = ([], [])
        for _ in range(5):
            found[0].append(a.step_chunk())
            torch.randn(10)
            found[1].append(b.step_chunk())
        assert same(found[0], one_shot[0]) and same(found[1], one_shot[1])
        assert not same(one_shot[0], one_shot[1])

    @pytest.mark.parametrize("format", FORMATS)
    def test_elements_of_a_batch(self, model: CausalWanTransformer3DModel, format: str) -> None:
        """Equal up to what BLAS makes of another matrix size; INT8 may flip a code where it rounds."""
        text = build_text(model, 3)
        batch = latents_of(
            build_rollout(f"{format},{WINDOW}", transformer=model, text=text, seeds=[5, 6, 7]), 5
        )
        for i, seed in enumerate((5, 6, 7)):
            own = replace(
                text, keys=[k[i : i + 1] for k in text.keys], values=[v[i : i + 1] for v in text.values]
            )
            alone = build_rollout(f"{format},{WINDOW}", transformer=model, text=own, seeds=[seed])
            assert relative_l2(batch[i : i + 1], latents_of(alone, 5)) < (1e-5 if format == "fp32" else 1e-3)

    def test_a_bfloat16_model(self) -> None:
        model = build_transformer().bfloat16()
        a, b = (build_rollout(f"bf16,{WINDOW}", transformer=model) for _ in range(2))
        first = chunks_of(a, 4)
        assert first[0].latents.dtype == torch.bfloat16
        assert same(chunks_of(b, 4), first)
        exact = latents_of(build_rollout(f"fp32,{WINDOW}", transformer=build_transformer()), 4)
        assert relative_l2(torch.cat([c.latents for c in first], 1).float(), exact) < 0.1

    def test_what_makes_it_this_video(self, model: CausalWanTransformer3DModel) -> None:
        """Seed, text, schedule, window and positions each lead elsewhere."""
        base = latents_of(build_rollout(f"fp32,{WINDOW}", transformer=model), 5)
        others = [
            build_rollout(f"fp32,{WINDOW}", transformer=model, seeds=[8]),
            build_rollout(f"fp32,{WINDOW}", transformer=model, text=build_text(model, seed=1)),
            build_rollout(f"fp32,{WINDOW}", transformer=model, schedule=FlowSchedule((1000, 750))),
            build_rollout(
                f"fp32,{WINDOW}", transformer=model, schedule=FlowSchedule((1000, 500), sampler="euler")
            ),
            build_rollout("fp32,window=8,sink=2", transformer=model),
            build_rollout(f"fp32,{WINDOW},positions=absolute", transformer=model),
        ]
        for other in others:
            assert relative_l2(latents_of(other, 5), base) > 1e-3

    def test_first_chunk_steps(self, model: CausalWanTransformer3DModel) -> None:
        calls: list[tuple[int, int]] = []
        schedule = FlowSchedule((1000, 500), first_chunk_steps=(1000, 750, 500, 250))
        rollout = build_rollout(transformer=model, schedule=schedule)
        for _ in range(2):
            rollout.step_chunk(on_step=lambda chunk, step: calls.append((chunk, step)))
        assert calls == [(0, 0), (0, 1), (0, 2), (0, 3), (1, 0), (1, 1)]

    def test_by_hand(self, model: CausalWanTransformer3DModel) -> None:
        """The first chunk, spelled out: no history, two steps, fresh noise between."""
        from vidkv.attention import FullAttention

        rollout = build_rollout(transformer=model)
        chunk = rollout.step_chunk()
        first, second = (chunk_noise([7], 0, step, (3, *LATENT_SIZE)) for step in (0, 1))

        def flow(x: Tensor, sigma: float) -> Tensor:
            with torch.no_grad():
                return model(x, torch.full((1, 3), 1000 * sigma), rollout.text, FullAttention(2, 3))

        low = 5 * 0.5 / (1 + 4 * 0.5)
        x = (1 - low) * (first - flow(first, 1.0)) + low * second
        torch.testing.assert_close(chunk.latents, x - low * flow(x, low), rtol=1e-4, atol=1e-5)

    def test_given_noise_replaces_the_seed_s(self, model: CausalWanTransformer3DModel) -> None:
        own = chunk_noise([7], 0, 0, (3, *LATENT_SIZE))
        a, b, c = (build_rollout(transformer=model) for _ in range(3))
        assert torch.equal(a.step_chunk(noise=own).latents, b.step_chunk().latents)
        assert not torch.equal(c.step_chunk(noise=-own).latents, a.step_chunk().latents)

    def test_shorter_chunks(self, model: CausalWanTransformer3DModel) -> None:
        rollout = build_rollout(transformer=model, vae=build_vae())
        shapes = []
        for frames in (1, 3, 2):
            chunk = rollout.step_chunk(frames)
            assert chunk.frames is not None
            shapes.append((chunk.start_frame, chunk.latents.shape[1], chunk.frames.shape[1]))
        assert shapes == [(0, 1, 1), (1, 3, 12), (4, 2, 8)]


class TestFork:
    @pytest.mark.parametrize("format", FORMATS)
    def test_both_branches_go_on_as_if_alone(self, model: CausalWanTransformer3DModel, format: str) -> None:
        vae = build_vae()

        def fresh() -> Rollout:
            return build_rollout(f"{format},{WINDOW}", transformer=model, vae=vae)

        other_text = build_text(model, seed=3)
        plain, changed = fresh(), fresh()
        wanted = chunks_of(plain, 7)
        chunks_of(changed, 3)
        changed.set_text(other_text)
        wanted_other = chunks_of(changed, 4)
        assert not same(wanted_other, wanted[3:])

        trunk = fresh()
        chunks_of(trunk, 3)
        branch = trunk.fork()
        branch.set_text(other_text)
        found, found_other = [], []
        for _ in range(4):
            found_other.append(branch.step_chunk())
            found.append(trunk.step_chunk())
        assert same(found, wanted[3:])
        assert same(found_other, wanted_other)
        trunk.cache.check_integrity()
        branch.cache.check_integrity()

    def test_forks_of_forks(self, model: CausalWanTransformer3DModel) -> None:
        wanted = chunks_of(build_rollout(f"int8,{WINDOW}", transformer=model), 6)
        rollout = build_rollout(f"int8,{WINDOW}", transformer=model)
        rollouts = [rollout]
        for i in range(4):
            found = [r.step_chunk() for r in rollouts]
            assert all(same([chunk], [wanted[i]]) for chunk in found)
            rollouts.append(rollouts[i % len(rollouts)].fork())

    def test_dropped_forks_leave_no_memory_behind(self, model: CausalWanTransformer3DModel) -> None:
        wanted = chunks_of(build_rollout(f"int8,{WINDOW}", transformer=model), 4)
        rollout = build_rollout(f"int8,{WINDOW}", transformer=model)
        chunks_of(rollout, 3)
        sizes = []
        for _ in range(5):
            trial = rollout.fork()
            assert same(chunks_of(trial, 1), wanted[3:])
            del trial
            with rollout.fork() as trial:
                assert same(chunks_of(trial, 1), wanted[3:])
            sizes.append(rollout.cache.nbytes)
        assert len(set(sizes)) == 1
        assert same(chunks_of(rollout, 1), wanted[3:])

    def test_closed(self, model: CausalWanTransformer3DModel) -> None:
        rollout = build_rollout(transformer=model, vae=build_vae())
        chunks_of(rollout, 2)
        saved, branch = rollout.state(), rollout.fork()
        rollout.close()
        rollout.close()
        assert rollout.cache.nbytes == 0 and not rollout.window_latents
        for act in (rollout.step_chunk, rollout.denoise, rollout.fork, lambda: rollout.restore(*saved)):
            with pytest.raises(CacheStateError, match="closed"):
                act()
        fresh = build_rollout(transformer=model, vae=build_vae())
        assert same(chunks_of(branch, 2), chunks_of(fresh, 4)[2:])


class TestPark:
    """What it keeps lies on the host for a while, and nobody can tell."""

    @pytest.mark.parametrize("format", FORMATS)
    @pytest.mark.parametrize("after", [0, 1, 4])
    def test_comes_back_bit_for_bit(
        self, model: CausalWanTransformer3DModel, format: str, after: int
    ) -> None:
        vae = build_vae()
        wanted = chunks_of(build_rollout(f"{format},{WINDOW}", transformer=model, vae=vae), after + 3)
        rollout = build_rollout(f"{format},{WINDOW}", transformer=model, vae=vae)
        found = chunks_of(rollout, after)
        for _ in range(2):
            rollout.park(), rollout.park()
            assert rollout.parked and (rollout.chunk, rollout.next_frame) == (after, 3 * after)
            rollout.unpark(), rollout.unpark()
            rollout.cache.check_integrity()
        assert not rollout.parked
        assert same(found + chunks_of(rollout, 3), wanted)

    def test_gives_its_room_to_others(self, model: CausalWanTransformer3DModel) -> None:
        """In pools for one cache, which another fills with its own pages meanwhile."""
        wanted = [chunks_of(build_rollout(transformer=model, seeds=[s], vae=build_vae()), 5) for s in (7, 8)]
        first = build_rollout(transformer=model, vae=build_vae())
        pools = first.cache.pools
        found = chunks_of(first, 3)
        serials = list(first.pages())
        first.park()
        assert first.kv_bytes == 0 and not first.window_latents
        assert sum(pools["pages"].references) == pools["pages"].reserved == 0
        second = build_rollout(transformer=model, seeds=[8], vae=build_vae())
        second.park()
        second.unpark(pools)
        assert same(chunks_of(second, 5), wanted[1]) and pools["pages"].slots == 6
        second.close()
        first.unpark(pools)
        # checkpoints know pages by these
        assert list(first.pages()) == serials
        assert same(found + chunks_of(first, 2), wanted[0]) and pools["pages"].slots == 6

    def test_on_the_way_to_another_prompt(self, model: CausalWanTransformer3DModel) -> None:
        """Which a saved state does not know."""
        text, other = build_text(model), build_text(model, seed=3)
        videos = []
        for parks in (False, True):
            rollout = build_rollout(transformer=model, text=text)
            chunks = chunks_of(rollout, 2)
            rollout.switch(other, strategy="lerp", chunks=3)
            for _ in range(4):
                if parks:
                    rollout.park()
                    rollout.unpark()
                chunks += chunks_of(rollout, 1)
            videos.append(chunks)
        assert same(*videos)

    def test_makes_nothing_meanwhile(self, model: CausalWanTransformer3DModel) -> None:
        rollout = build_rollout(transformer=model)
        chunks_of(rollout, 1)
        rollout.park()
        for act in (rollout.step_chunk, rollout.denoise, rollout.fork, rollout.state):
            with pytest.raises(CacheStateError, match="closed"):
                act()
        rollout.unpark()
        assert same(chunks_of(rollout, 1), chunks_of(build_rollout(transformer=model), 2)[1:])

    def test_closed_for_good(self, model: CausalWanTransformer3DModel) -> None:
        rollout = build_rollout(transformer=model)
        rollout.park()
        rollout.close()
        assert not rollout.parked
        rollout.unpark()
        with pytest.raises(CacheStateError, match="closed"):
            rollout.step_chunk()

    def test_without_room_it_stays_parked(
        self, model: CausalWanTransformer3DModel, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        rollout = build_rollout(transformer=model)
        found = chunks_of(rollout, 2)
        pools = build_rollout(transformer=model).cache.pools
        rollout.park()
        before = pools["pages"].reserved

        def full(self: Rollout, *args: Any) -> None:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1 GiB")

        with monkeypatch.context() as patch:
            patch.setattr(Rollout, "restore", full)
            with pytest.raises(ResourceError, match="out of memory"):
                rollout.unpark(pools)
        assert rollout.parked and pools["pages"].reserved == before
        rollout.unpark(pools)
        assert same(found + chunks_of(rollout, 2), chunks_of(build_rollout(transformer=model), 4))


class TestSnapshot:
    def test_goes_only_where_its_pages_lie(self, model: CausalWanTransformer3DModel) -> None:
        source = build_rollout(transformer=model)
        (chunk,) = chunks_of(source, 1)
        snapshot = source.snapshot(chunk)
        target = build_rollout(transformer=model)
        assert not target.fits(snapshot)
        with pytest.raises(CacheStateError, match="other pools"):
            target.take_over(snapshot)
        wanted = chunks_of(build_rollout(transformer=model), 3)
        assert same(chunks_of(target, 3), wanted)

    @pytest.mark.parametrize("format", FORMATS)
    def test_taken_over_it_is_the_same_video(self, model: CausalWanTransformer3DModel, format: str) -> None:
        vae = build_vae()
        wanted = chunks_of(build_rollout(f"{format},{WINDOW}", transformer=model, vae=vae), 6)
        source = build_rollout(f"{format},{WINDOW}", transformer=model, vae=vae)
        target = source.fork()
        found = []
        for _ in range(4):
            (chunk,) = chunks_of(source, 1)
            snapshot = source.snapshot(chunk)
            found.append(target.take_over(snapshot))
            snapshot.close()
        assert found[0].stats.denoise_s == 0 and target.revision > 0
        assert same(found + chunks_of(target, 2), wanted)
        assert same(chunks_of(source, 2), wanted[4:])


class TestDenoise:
    @pytest.mark.parametrize("format", FORMATS)
    def test_then_append_is_a_step(self, model: CausalWanTransformer3DModel, format: str) -> None:
        """However often it is looked at first."""
        vae = build_vae()
        wanted = chunks_of(build_rollout(f"{format},{WINDOW}", transformer=model, vae=vae), 5)
        rollout = build_rollout(f"{format},{WINDOW}", transformer=model, vae=vae)
        for chunk in wanted:
            for _ in range(2):
                latents = rollout.denoise()
                assert (rollout.chunk, rollout.next_frame) == (chunk.index, chunk.start_frame)
                assert torch.equal(latents, chunk.latents)
                rollout.cache.check_integrity()
            frames = rollout.append(latents)
            assert frames is not None and torch.equal(frames, chunk.frames)

    def test_stats_of_a_step_are_its_own(self, model: CausalWanTransformer3DModel) -> None:
        rollout = build_rollout(f"int8,{WINDOW}", transformer=model)
        rollout.step_chunk()
        rollout.denoise()
        # three passes over three pages in each of two layers
        assert rollout.step_chunk().stats.pages_read == 18

    def test_arguments(self, model: CausalWanTransformer3DModel) -> None:
        own, calls = noise(1, 2, *LATENT_SIZE), []
        rollout = build_rollout(transformer=model)
        found = rollout.denoise(2, own, lambda chunk, step: calls.append((chunk, step)))
        assert calls == [(0, 0), (0, 1)]
        assert torch.equal(found, rollout.step_chunk(2, own).latents)

    def test_a_changed_chunk_is_what_follows_from(self, model: CausalWanTransformer3DModel) -> None:
        plain, changed = build_rollout(transformer=model), build_rollout(transformer=model)
        plain.append(plain.denoise())
        changed.append(changed.denoise().flip(-1))
        assert relative_l2(changed.denoise(), plain.denoise()) > 1e-3


class TestTimes:
    def test_wait_for_the_gpu(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """For the stream that the rollout runs on, not for one that decodes beside it."""
        waited: list[torch.device] = []

        def stream(device: torch.device) -> SimpleNamespace:
            return SimpleNamespace(synchronize=lambda: waited.append(device))

        monkeypatch.setattr(torch.cuda, "current_stream", stream)
        monkeypatch.setattr(torch.cuda, "synchronize", _fail)
        monkeypatch.setattr("vidkv.rollout.time.perf_counter", lambda: float(len(waited)))
        gpu = torch.device("cuda", 1)
        assert _seconds(gpu) == 1.0 and waited == [gpu]

    def test_wait_for_nothing_on_a_cpu(
        self, model: CausalWanTransformer3DModel, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(torch.cuda, "synchronize", _fail)
        monkeypatch.setattr(torch.cuda, "current_stream", _fail)
        build_rollout(transformer=model).step_chunk()

    @pytest.mark.gpu
    def test_every_measuring_point_waits(self, monkeypatch: pytest.MonkeyPatch) -> None:
        measured: list[torch.device] = []
        real = _seconds

        def seconds(device: torch.device) -> float:
            measured.append(device)
            return real(device)

        monkeypatch.setattr("vidkv.rollout._seconds", seconds)
        build_rollout(transformer=build_transformer().cuda(), vae=build_vae().cuda()).step_chunk()
        assert len(measured) == 4


class TestAppend:
    def test_is_the_clean_pass_of_given_latents(self, model: CausalWanTransformer3DModel) -> None:
        """A rollout whose chunks are appended elsewhere goes on there as here."""
        vae = build_vae()
        source = build_rollout(transformer=model, vae=vae)
        first = chunks_of(source, 3)
        target = build_rollout(transformer=model, vae=vae)
        for chunk in first:
            frames = target.append(chunk.latents)
            assert frames is not None and torch.equal(frames, chunk.frames)
        assert target.chunk == 3 and target.next_frame == 9
        assert same(chunks_of(target, 3), chunks_of(source, 3))

    def test_one_frame_prefix(self, model: CausalWanTransformer3DModel) -> None:
        """An image to start from: it changes what follows, and what follows has full chunks."""
        images = [noise(1, 1, *LATENT_SIZE, seed=s) for s in (1, 2)]
        videos = []
        for image in images:
            rollout = build_rollout(transformer=model, vae=build_vae())
            frames = rollout.append(image)
            assert frames is not None and frames.shape == (1, 1, 32, 48, 3)
            chunks = chunks_of(rollout, 2)
            assert [c.start_frame for c in chunks] == [1, 4]
            assert list(rollout.window_latents) == [0, 1, 2, 3, 4, 5, 6]
            assert torch.equal(rollout.window_latents[0], image[:, 0])
            videos.append(torch.cat([c.latents for c in chunks], 1))
        assert relative_l2(videos[0], videos[1]) > 0.01

    @pytest.mark.parametrize(
        "shape", [(1, 3, 4, 4, 4), (2, 3, *LATENT_SIZE), (1, 3, 3, 4, 6), (3, *LATENT_SIZE)], ids=str
    )
    def test_wrong_shapes_leave_the_rollout_usable(
        self, model: CausalWanTransformer3DModel, shape: tuple[int, ...]
    ) -> None:
        rollout = build_rollout(transformer=model)
        wanted = chunks_of(build_rollout(transformer=model), 2)
        with pytest.raises(InputError, match="latents are"):
            rollout.append(noise(*shape))
        with pytest.raises(InputError, match="latents are"):
            rollout.step_chunk(noise=noise(*shape))
        assert same(chunks_of(rollout, 2), wanted)

    def test_too_long(self, model: CausalWanTransformer3DModel) -> None:
        rollout = build_rollout(transformer=model)
        with pytest.raises(CacheStateError, match="chunk of 4"):
            rollout.append(noise(1, 4, *LATENT_SIZE))
        assert rollout.cache.state is State.IDLE

    def test_nan(self, model: CausalWanTransformer3DModel) -> None:
        rollout = build_rollout(transformer=model)
        latents = noise(1, 3, *LATENT_SIZE)
        latents[0, 2, 1, 3, 5] = float("nan")
        with pytest.raises(NumericsError, match="chunk 0"):
            rollout.append(latents)
        assert same(chunks_of(rollout, 2), chunks_of(build_rollout(transformer=model), 2))


class TestInterruptions:
    @pytest.mark.parametrize("format", [FORMATS[0], FORMATS[3]])
    @pytest.mark.parametrize("at", [(0, 0), (0, 1), (2, 0), (3, 1)], ids=str)
    def test_cancelled_between_steps(
        self, model: CausalWanTransformer3DModel, format: str, at: tuple[int, int]
    ) -> None:
        """The rollout stands before the chunk and goes on as if nothing had happened."""
        vae = build_vae()
        wanted = chunks_of(build_rollout(f"{format},{WINDOW}", transformer=model, vae=vae), 5)
        rollout = build_rollout(f"{format},{WINDOW}", transformer=model, vae=vae)

        def stop(chunk: int, step: int) -> None:
            if (chunk, step) == at:
                raise Cancelled("enough")

        found = chunks_of(rollout, at[0])
        for _ in range(2):
            with pytest.raises(Cancelled, match="enough"):
                rollout.step_chunk(on_step=stop)
            assert rollout.chunk == at[0] and rollout.next_frame == 3 * at[0]
            rollout.cache.check_integrity()
        assert same(found + chunks_of(rollout, 5 - at[0]), wanted)

    @pytest.mark.parametrize("bad", [float("nan"), float("inf")], ids=str)
    @pytest.mark.parametrize("call", [0, 1, 3, 7])
    def test_nan_in_a_denoising_step(
        self, model: CausalWanTransformer3DModel, monkeypatch: pytest.MonkeyPatch, call: int, bad: float
    ) -> None:
        """Found in its chunk; nothing of it is committed; the chunk can be made again."""
        wanted = chunks_of(build_rollout(f"int8,{WINDOW}", transformer=model), 4)
        rollout = build_rollout(f"int8,{WINDOW}", transformer=model)
        # two denoising steps and a clean pass a chunk
        assert call % 3 < 2
        with monkeypatch.context() as patch:
            inject(patch, call, bad)
            found = chunks_of(rollout, call // 3)
            with pytest.raises(NumericsError, match=f"chunk {call // 3}"):
                rollout.step_chunk()
        rollout.cache.check_integrity()
        assert same(found + chunks_of(rollout, 4 - call // 3), wanted)

    @pytest.mark.parametrize("call", [2, 8])
    def test_nan_in_the_clean_pass(
        self, model: CausalWanTransformer3DModel, monkeypatch: pytest.MonkeyPatch, call: int
    ) -> None:
        """Pages are overwritten by then: the cache says so, and a saved state is the way back."""
        rollout = build_rollout(f"int8,{WINDOW}", transformer=model)
        wanted = chunks_of(build_rollout(f"int8,{WINDOW}", transformer=model), 4)
        found = chunks_of(rollout, call // 3)
        saved = rollout.state()
        with monkeypatch.context() as patch:
            inject(patch, call % 3, float("nan"))
            with pytest.raises(NumericsError, match=f"chunk {call // 3}"):
                rollout.step_chunk()
        with pytest.raises(CacheStateError, match="broken"):
            rollout.step_chunk()
        rollout.restore(*saved)
        assert same(found + chunks_of(rollout, 4 - call // 3), wanted)

    def test_a_failing_decoder_does_not_repeat_noise(self, model: CausalWanTransformer3DModel) -> None:
        """The chunk is committed by then, so the next one is the next one."""
        rollout = build_rollout(transformer=model, vae=build_vae())
        wanted = chunks_of(build_rollout(transformer=model), 3)
        feed, rollout.decoder.feed = rollout.decoder.feed, _fail  # type: ignore[union-attr, method-assign]
        with pytest.raises(OSError):
            rollout.step_chunk()
        rollout.decoder.feed = feed  # type: ignore[union-attr, method-assign]
        assert rollout.chunk == 1
        for found, chunk in zip(chunks_of(rollout, 2), wanted[1:], strict=True):
            assert found.index == chunk.index and torch.equal(found.latents, chunk.latents)


def inject(patch: pytest.MonkeyPatch, call: int, value: float) -> None:
    """Spoil one element of what the transformer says at its n-th call."""
    counter: Iterator[int] = iter(range(10**6))
    forward = CausalWanTransformer3DModel.forward

    def spoilt(self: CausalWanTransformer3DModel, *args: object) -> Tensor:
        out: Tensor = forward(self, *args)
        if next(counter) == call:
            out[0, -1, 1, 2, 3] = value
        return out

    patch.setattr(CausalWanTransformer3DModel, "forward", spoilt)


def _fail(latents: Tensor) -> Tensor:
    raise OSError("no decoder today")


class TestMemory:
    @pytest.mark.parametrize("format", FORMATS)
    def test_flat_over_sixty_chunks(self, model: CausalWanTransformer3DModel, format: str) -> None:
        rollout = build_rollout(f"{format},{WINDOW}", transformer=model)
        stats, tensors = [], []
        for _ in range(60):
            stats.append(rollout.step_chunk().stats)
            assert len(rollout.window_latents) <= 11
            gc.collect(0)
            tensors.append(sum(t.nbytes for t in rollout.window_latents.values()))
        planned = planned_bytes(rollout.cache.spec, rollout.cache.geometry, torch.float32)
        assert {s.kv_bytes for s in stats} == {planned}
        assert {s.resident_frames for s in stats[2:]} == {6}
        # three passes over six pages in each of two layers
        assert {s.pages_read for s in stats[2:]} == {36}
        lossy = {"fp32": 0, "bf16": 0, "int8": 36}.get(format, 6)
        assert {s.lossy_pages_read for s in stats[3:]} == {lossy}
        assert len(set(tensors[3:])) == 1
        assert list(rollout.window_latents) == [0, 1, *range(171, 180)]

    def test_window_latents_do_not_hold_whole_chunks(self, model: CausalWanTransformer3DModel) -> None:
        """Nor do they change when a caller works on a chunk in place."""
        rollout = build_rollout(transformer=model)
        chunk = rollout.step_chunk()
        kept = {f: t.clone() for f, t in rollout.window_latents.items()}
        for t in rollout.window_latents.values():
            assert t.untyped_storage().nbytes() == t.nbytes
        chunk.latents.zero_()
        assert all(torch.equal(rollout.window_latents[f], t) for f, t in kept.items())

    def test_stats(self, model: CausalWanTransformer3DModel) -> None:
        rollout = build_rollout(f"int8,{WINDOW}", transformer=model, vae=build_vae())
        chunk = rollout.step_chunk()
        stats = chunk.stats
        assert min(stats.denoise_s, stats.commit_s, stats.decode_s) > 0
        assert stats.bytes_per_frame * 6 + 2 * 2 * 24 * 4 == stats.kv_bytes
        assert (stats.resident_frames, stats.pages_read, stats.lossy_pages_read) == (3, 0, 0)
        second = rollout.step_chunk().stats
        assert second.pages_read == second.lossy_pages_read == 3 * 3 * 2


class TestInputs:
    @pytest.mark.parametrize("seed", [-1, 2**64, 1.5, "7", None])
    def test_seeds(self, model: CausalWanTransformer3DModel, seed: object) -> None:
        with pytest.raises(InputError, match="seed"):
            build_rollout(transformer=model, text=build_text(model), seeds=[seed])  # type: ignore[list-item]

    def test_no_seed(self, model: CausalWanTransformer3DModel) -> None:
        with pytest.raises(InputError, match="at least one seed"):
            build_rollout(transformer=model, text=build_text(model), seeds=[])

    def test_largest_seed(self, model: CausalWanTransformer3DModel) -> None:
        build_rollout(transformer=model, seeds=[2**64 - 1]).step_chunk()

    def test_a_window_without_room(self, model: CausalWanTransformer3DModel) -> None:
        with pytest.raises(CacheSpecError, match="at least 5"):
            build_rollout("fp32,window=4,sink=2", transformer=model)

    @pytest.mark.parametrize("frames", [0, -1, 4])
    def test_frames_of_a_chunk(self, model: CausalWanTransformer3DModel, frames: int) -> None:
        rollout = build_rollout(transformer=model)
        with pytest.raises(CacheStateError, match=f"chunk of {frames} "):
            rollout.step_chunk(frames)
        assert same(chunks_of(rollout, 1), chunks_of(build_rollout(transformer=model), 1))


def _swap(resident: list[Any]) -> None:
    resident[2], resident[3] = resident[3], resident[2]


DAMAGE: dict[str, tuple[str, Callable[[dict[str, Tensor], dict[str, Any]], object]]] = {
    **{
        f"no {name}": (f"no '{name}'", lambda t, h, name=name: h.pop(name))
        for name in ("cache", "chunk", "prefix", "noise", "schedule", "window_latents")
    },
    **{
        f"no cache {name}": (f"no '{name}'", lambda t, h, name=name: h["cache"].pop(name))
        for name in ("spec", "resident", "next_frame", "mean_frozen")
    },
    **{
        f"no {name}": (name.split(".", 1)[-1], lambda t, h, name=name: t.pop(name))
        for name in (
            "window_latents", "cache.pages.k", "cache.full.v", "cache.key_mean", "decoder.replicate",
            "decoder.fed_frames", "decoder.feature.0", "decoder.feature.3",
        )
    },
    "chunk of text": ("chunk is '3'", lambda t, h: h.update(chunk="3")),
    "chunk too large": ("chunk is 10 after 9", lambda t, h: h.update(chunk=10)),
    "two seeds": ("seeds are", lambda t, h: h["noise"].update(seeds=[7, 8])),
    "a negative seed": ("seeds are", lambda t, h: h["noise"].update(seeds=[-1])),
    "a broken seed": ("seeds are", lambda t, h: h["noise"].update(seeds=[1.5])),
    "no shift": ("schedule has", lambda t, h: h["schedule"].pop("shift")),
    "a rising schedule": ("schedule cannot", lambda t, h: h["schedule"].update(steps=[1, 5])),
    "a schedule of text": ("schedule cannot", lambda t, h: h["schedule"].update(steps=["x"])),
    "another window": ("window_latents are", lambda t, h: h["window_latents"].pop()),
    "spec of text": ("spec is", lambda t, h: h["cache"].update(spec="int8")),
    "unknown spec": ("settings cannot", lambda t, h: h["cache"]["spec"].update(format="int9")),
    "duplicated frames": (
        "out of order", lambda t, h: h["cache"]["resident"].__setitem__(3, h["cache"]["resident"][2])
    ),
    "unsorted frames": ("out of order", lambda t, h: _swap(h["cache"]["resident"])),
    "too few frames": (r"full\.k is", lambda t, h: h["cache"]["resident"].pop()),
    "too many frames": ("7 resident", lambda t, h: h["cache"]["resident"].insert(2, [2, "pages"])),
    "future frames": ("the next one is 8", lambda t, h: h["cache"].update(next_frame=8)),
    "a lost sink": (
        "the sinks are", lambda t, h: h["cache"]["resident"].__setitem__(slice(0, 3), [[2, "pages"]] * 1)
    ),
    "frames alone": ("not pairs", lambda t, h: h["cache"].update(resident=[0, 1])),
    "another pool": ("attic", lambda t, h: h["cache"]["resident"][0].__setitem__(1, "attic")),
    "the wrong pool": ("lies among", lambda t, h: h["cache"]["resident"][0].__setitem__(1, "full")),
    "never frozen": ("mean_frozen", lambda t, h: h["cache"].update(mean_frozen=False)),
    "pages of another type": (
        "pages.k is", lambda t, h: t.update({"cache.pages.k": t["cache.pages.k"].float()})
    ),
    "window of another type": (
        "window_latents is", lambda t, h: t.update(window_latents=t["window_latents"].double())
    ),
    "decoder of another size": (
        "feature.3", lambda t, h: t.update({"decoder.feature.3": t["decoder.feature.3"].mT})
    ),
}  # fmt: skip


class TestState:
    """In memory; files and other processes are in test_state."""

    @pytest.mark.parametrize("format", FORMATS)
    @pytest.mark.parametrize("after", [0, 1, 4])
    def test_restore_goes_on_bit_for_bit(
        self, model: CausalWanTransformer3DModel, format: str, after: int
    ) -> None:
        vae = build_vae()

        def fresh(seed: int = 7) -> Rollout:
            return build_rollout(f"{format},{WINDOW}", transformer=model, vae=vae, seeds=[seed])

        source = fresh()
        chunks_of(source, after)
        tensors, header = source.state()
        wanted = chunks_of(source, 3)
        other = fresh(seed=99)
        chunks_of(other, 2)
        other.restore(tensors, header)
        assert other.seeds == (7,)
        assert same(chunks_of(other, 3), wanted)
        # the state is good for a second time, and for the rollout that it came from
        source.restore(tensors, header)
        assert same(chunks_of(source, 3), wanted)

    def test_holds_the_clean_latents_of_the_window(self, model: CausalWanTransformer3DModel) -> None:
        rollout = build_rollout(transformer=model)
        latents = latents_of(rollout, 4)
        tensors, header = rollout.state()
        wanted = [0, 1, *range(3, 12)]
        assert header["window_latents"] == wanted
        assert torch.equal(tensors["window_latents"], latents[:, wanted])

    def test_without_the_decoder_s_part(self, model: CausalWanTransformer3DModel) -> None:
        source = build_rollout(transformer=model)
        chunks_of(source, 2)
        target = build_rollout(transformer=model, vae=build_vae())
        with pytest.raises(StateError, match="without a decoder"):
            target.restore(*source.state())
        wanted = chunks_of(build_rollout(transformer=model, vae=build_vae()), 1)
        assert same(chunks_of(target, 1), wanted)

    @pytest.mark.parametrize(
        ("name", "decoder"),
        [(name, decoder) for name in DAMAGE for decoder in (False, True) if decoder or "decoder" not in name],
    )
    def test_a_corrupt_state_changes_nothing(
        self, model: CausalWanTransformer3DModel, name: str, decoder: bool
    ) -> None:
        """What is wrong is named, and the refused rollout goes on bit for bit."""
        vae = build_vae() if decoder else None
        spec = f"int8,{WINDOW},keep_newest"
        source = build_rollout(spec, transformer=model, vae=vae)
        chunks_of(source, 3)
        tensors, header = source.state()
        header = deepcopy(header)
        words, change = DAMAGE[name]
        change(tensors, header)
        target, undisturbed = (build_rollout(spec, transformer=model, vae=vae, seeds=[99]) for _ in range(2))
        chunks_of(target, 1), chunks_of(undisturbed, 1)
        with pytest.raises(StateError, match=words) as caught:
            target.restore(tensors, header)
        assert "\n" not in str(caught.value)
        target.cache.check_integrity()
        assert same(chunks_of(target, 3), chunks_of(undisturbed, 3))

    @pytest.mark.parametrize("decoder", [False, True], ids=["latents", "decoded"])
    def test_the_same_number_of_tokens_in_another_shape(
        self, model: CausalWanTransformer3DModel, decoder: bool
    ) -> None:
        vae = build_vae() if decoder else None
        source = build_rollout(transformer=model, vae=vae)
        chunks_of(source, 2)
        target, undisturbed = (
            build_rollout(transformer=model, vae=vae, latent_size=(4, 6, 4)) for _ in range(2)
        )
        with pytest.raises(StateError, match=r"window_latents is .*model and size"):
            target.restore(*source.state())
        assert same(chunks_of(target, 2), chunks_of(undisturbed, 2))
