"""What a rollout is given: a prefix, latents that are held, noise; and what of it a saved rollout keeps."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tests.tiny import LATENT_SIZE, build_text, build_transformer, build_vae, noise
from vidkv.cache import CacheSpec
from vidkv.errors import InputError, NumericsError, StateError
from vidkv.models.vae import StreamingDecoder
from vidkv.models.wan import CausalWanTransformer3DModel
from vidkv.noise import CounterNoise, StockNoise
from vidkv.rollout import Rollout
from vidkv.schedule import FlowSchedule

SPEC = "fp32,window=9,sink=2"
STEPS = FlowSchedule((1000, 500))
GUIDED = FlowSchedule((1000, 500), guidance=2.0)


@pytest.fixture(scope="module")
def model() -> CausalWanTransformer3DModel:
    return build_transformer()


def build(
    model: CausalWanTransformer3DModel,
    schedule: FlowSchedule = STEPS,
    spec: str = SPEC,
    seeds: tuple[int, ...] = (7,),
    decoder: bool = False,
    **settings: Any,
) -> Rollout:
    rollout = Rollout(
        model,
        build_text(model, len(seeds)),
        CacheSpec.parse(spec),
        schedule,
        LATENT_SIZE,
        seeds,
        decoder=StreamingDecoder(build_vae()) if decoder else None,
        **settings,
    )
    if schedule.guidance != 1:
        rollout.set_text(rollout.text, build_text(model, len(seeds), seed=9))
    return rollout


def clean(frames: int, seed: int = 1, batch: int = 1) -> Tensor:
    return noise(batch, frames, *LATENT_SIZE, seed=seed)


def latents_of(rollout: Rollout, chunks: int) -> Tensor:
    return torch.cat([rollout.step_chunk().latents for _ in range(chunks)], 1)


def untouched(rollout: Rollout, model: CausalWanTransformer3DModel, **settings: Any) -> bool:
    """Does it go on as one to which nothing has happened?"""
    return torch.equal(latents_of(rollout, 3), latents_of(build(model, **settings), 3))


class TestPrefill:
    @pytest.mark.parametrize(
        ("first", "parts"), [(None, [3, 3, 3]), (1, [1, 3, 3]), (1, [1]), (2, [2, 3]), (3, [3])], ids=str
    )
    def test_is_cut_as_chunks_are_made(
        self, model: CausalWanTransformer3DModel, first: int | None, parts: list[int]
    ) -> None:
        rollout, by_hand = (build(model, first_chunk_frames=first, decoder=True) for _ in range(2))
        prefix = clean(sum(parts))
        chunks = rollout.prefill(prefix)
        assert [chunk.index for chunk in chunks] == list(range(len(parts)))
        assert [chunk.start_frame for chunk in chunks] == [sum(parts[:i]) for i in range(len(parts))]
        assert [chunk.latents.shape[1] for chunk in chunks] == parts
        assert torch.equal(torch.cat([chunk.latents for chunk in chunks], 1), prefix)
        for chunk, part in zip(chunks, prefix.split(parts, 1), strict=True):
            frames = by_hand.append(part)
            assert frames is not None and chunk.frames is not None
            assert torch.equal(chunk.frames, frames)
        draws = clean(3, 5), [clean(3, 6)]
        found, wanted = (r.denoise(noise=draws[0], step_noise=draws[1]) for r in (rollout, by_hand))
        assert torch.equal(found, wanted)
        # what follows a prefix is no first chunk
        assert found.shape[1] == rollout.next_chunk_frames == 3

    def test_stats_are_of_the_clean_pass(self, model: CausalWanTransformer3DModel) -> None:
        """Two layers that read nothing, three frames, then six."""
        chunks = build(model).prefill(clean(9))
        assert [chunk.stats.pages_read for chunk in chunks] == [0, 6, 12]
        assert [chunk.stats.resident_frames for chunk in chunks] == [3, 6, 6]

    def test_may_come_in_parts(self, model: CausalWanTransformer3DModel) -> None:
        whole, parts = (build(model, first_chunk_frames=1) for _ in range(2))
        prefix = clean(7)
        whole.prefill(prefix)
        parts.prefill(prefix[:, :1])
        parts.prefill(prefix[:, 1:])
        assert torch.equal(latents_of(parts, 2), latents_of(whole, 2))

    def test_its_frames_take_no_noise(self, model: CausalWanTransformer3DModel) -> None:
        """Stock noise is drawn for the frames that are generated; the first of them start the video."""
        source = StockNoise(7, 6, 1, LATENT_SIZE)
        fresh = torch.Generator().manual_seed(7)
        first = torch.randn(1, 6, *LATENT_SIZE, generator=fresh)
        rollout, told = build(model, noise=source), build(model)
        for r in (rollout, told):
            r.prefill(clean(6))
        for start in (0, 3):
            drawn = torch.randn(3, *LATENT_SIZE, generator=fresh)[None]
            wanted = told.step_chunk(noise=first[:, start : start + 3], step_noise=[drawn])
            assert torch.equal(rollout.step_chunk().latents, wanted.latents)
        with pytest.raises(InputError, match="drawn for 6 latent frames"):
            rollout.step_chunk()

    def test_the_first_generated_chunk_takes_the_first_chunk_s_steps(
        self, model: CausalWanTransformer3DModel
    ) -> None:
        rollout = build(model, FlowSchedule((1000, 500), first_chunk_steps=(1000, 750, 500)))
        rollout.prefill(clean(3))
        calls: list[tuple[int, int]] = []
        for _ in range(2):
            rollout.step_chunk(on_step=lambda chunk, step: calls.append((chunk, step)))
        assert calls == [(1, 0), (1, 1), (1, 2), (2, 0), (2, 1)]

    @pytest.mark.parametrize("copy", ["restore", "fork"])
    def test_is_known_to_copies(self, model: CausalWanTransformer3DModel, copy: str) -> None:
        def make() -> Rollout:
            schedule = FlowSchedule((1000, 500), first_chunk_steps=(1000, 750, 500))
            return build(model, schedule, noise=StockNoise(7, 9, 1, LATENT_SIZE))

        rollout = make()
        rollout.prefill(clean(6))
        if copy == "fork":
            other = rollout.fork()
        else:
            other = make()
            other.restore(*rollout.state())
        assert torch.equal(latents_of(other, 3), latents_of(rollout, 3))

    @pytest.mark.parametrize(
        ("first", "shape", "message"),
        [
            (None, (1, 2, *LATENT_SIZE), "a prefix of 2 latent frames; this model takes 3 and then"),
            (None, (1, 4, *LATENT_SIZE), "a prefix of 4 latent frames"),
            (1, (1, 3, *LATENT_SIZE), "a prefix of 3 latent frames; this model takes 1 and then"),
            (None, (1, 0, *LATENT_SIZE), "a prefix of 0 latent frames"),
            (None, (2, 3, *LATENT_SIZE), "latents are"),
            (None, (1, 3, 4, 4, 8), "latents are"),
            (None, (3, *LATENT_SIZE), "latents are"),
        ],
        ids=str,
    )
    def test_that_does_not_fit(
        self, model: CausalWanTransformer3DModel, first: int | None, shape: tuple[int, ...], message: str
    ) -> None:
        rollout = build(model, first_chunk_frames=first)
        with pytest.raises(InputError, match=message):
            rollout.prefill(noise(*shape))
        assert untouched(rollout, model, first_chunk_frames=first)

    def test_after_a_generated_chunk(self, model: CausalWanTransformer3DModel) -> None:
        rollout = build(model)
        rollout.prefill(clean(3))
        rollout.step_chunk()
        with pytest.raises(InputError, match="a prefix comes first; 1 chunks were generated"):
            rollout.prefill(clean(3))

    @pytest.mark.parametrize("bad", [float("nan"), float("inf")])
    def test_with_nan_in_a_later_chunk(self, model: CausalWanTransformer3DModel, bad: float) -> None:
        """It is refused as a whole, before its first chunk is committed."""
        rollout, prefix = build(model), clean(6)
        prefix[0, 4, 1, 2, 3] = bad
        with pytest.raises(NumericsError):
            rollout.prefill(prefix)
        assert untouched(rollout, model)


class TestGiven:
    @pytest.mark.parametrize("sampler", ["renoise", "euler", "unipc"])
    @pytest.mark.parametrize("frames", [1, 2])
    def test_is_held(self, model: CausalWanTransformer3DModel, sampler: Any, frames: int) -> None:
        """In the result bit for bit, in every step's input at timestep 0; the other frames see it."""
        schedule = FlowSchedule((1000, 500, 250), sampler=sampler)
        rollout, free, given = build(model, schedule), build(model, schedule), clean(frames)
        inputs: list[tuple[Tensor, Tensor]] = []
        handle = model.register_forward_pre_hook(
            lambda _, args: inputs.append((args[0].clone(), args[1].clone()))
        )
        try:
            found = rollout.step_chunk(given=given).latents
        finally:
            handle.remove()
        assert torch.equal(found[:, :frames], given)
        timesteps = schedule.timesteps(0)
        assert len(inputs) == len(timesteps) + 1
        for (x, times), timestep in zip(inputs, timesteps, strict=False):
            assert torch.equal(x[:, :frames], given)
            assert bool((times[:, :frames] == 0).all())
            assert torch.equal(times[:, frames:], torch.full((1, 3 - frames), timestep))
        assert not torch.equal(found[:, frames:], free.step_chunk().latents[:, frames:])

    def test_at_the_model_s_precision(self) -> None:
        rollout, given = build(build_transformer().bfloat16(), spec="bf16,window=9,sink=2"), clean(1)
        found = rollout.step_chunk(given=given).latents
        assert torch.equal(found[:, :1], given.bfloat16())

    def test_is_committed(self, model: CausalWanTransformer3DModel) -> None:
        rollout, appended, given = build(model), build(model), clean(1)
        appended.append(rollout.step_chunk(given=given).latents)
        assert torch.equal(latents_of(rollout, 1), latents_of(appended, 1))

    @pytest.mark.parametrize(
        "shape",
        [
            (1, 3, *LATENT_SIZE),
            (1, 0, *LATENT_SIZE),
            (1, *LATENT_SIZE),
            (2, 1, *LATENT_SIZE),
            (1, 1, 4, 4, 8),
        ],
        ids=str,
    )
    def test_that_does_not_fit(self, model: CausalWanTransformer3DModel, shape: tuple[int, ...]) -> None:
        rollout = build(model)
        with pytest.raises(InputError, match="latents are"):
            rollout.step_chunk(given=noise(*shape))
        assert untouched(rollout, model)


class TestStepNoise:
    def test_replaces_the_source_s(self, model: CausalWanTransformer3DModel) -> None:
        schedule = FlowSchedule((1000, 750, 500))
        source = CounterNoise((7,), LATENT_SIZE, "cpu", torch.float32)
        initial, fresh = source.initial(0, 0, 3), [source.fresh(0, step, 3) for step in (1, 2)]
        plain, told, swapped = (build(model, schedule) for _ in range(3))
        wanted = plain.step_chunk().latents
        assert torch.equal(told.step_chunk(noise=initial, step_noise=fresh).latents, wanted)
        assert not torch.equal(swapped.step_chunk(noise=initial, step_noise=fresh[::-1]).latents, wanted)

    @pytest.mark.parametrize(
        ("sampler", "takes"), [("renoise", 2), ("euler", 0), ("unipc", 0)], ids=lambda v: str(v)
    )
    @pytest.mark.parametrize("number", [0, 1, 2, 3])
    def test_is_one_for_every_step_that_takes_some(
        self, model: CausalWanTransformer3DModel, sampler: Any, takes: int, number: int
    ) -> None:
        schedule = FlowSchedule((1000, 750, 500), sampler=sampler)
        rollout = build(model, schedule)
        draws = [clean(3, seed) for seed in range(number)]
        if number != takes:
            with pytest.raises(InputError, match=f"has {number} tensors; this chunk takes {takes}"):
                rollout.step_chunk(step_noise=draws)
            assert untouched(rollout, model, schedule=schedule)
        else:
            rollout.step_chunk(step_noise=draws)
            assert rollout.chunk == 1

    def test_counts_follow_the_first_chunk_s_steps(self, model: CausalWanTransformer3DModel) -> None:
        rollout = build(model, FlowSchedule((1000, 500), first_chunk_steps=(1000, 750, 500)))
        rollout.step_chunk(step_noise=[clean(3), clean(3)])
        with pytest.raises(InputError, match="has 2 tensors; this chunk takes 1"):
            rollout.step_chunk(step_noise=[clean(3), clean(3)])

    def test_of_another_shape(self, model: CausalWanTransformer3DModel) -> None:
        rollout = build(model)
        with pytest.raises(InputError, match="latents are"):
            rollout.step_chunk(step_noise=[clean(2)])
        assert untouched(rollout, model)


def encode(pixels: Tensor) -> Tensor:
    """(b, h, w, 3) uint8 to (b, 4, h / 8, w / 8): colours and their mean over each patch."""
    x = F.avg_pool2d(pixels.movedim(-1, 1).float() / 127.5 - 1, 8)
    return torch.cat([x, x.mean(1, keepdim=True)], 1)


SAVED: dict[str, dict[str, Any]] = {
    "guided": {"schedule": GUIDED, "spec": "int8,window=9,sink=2,keep_newest"},
    "guided unipc": {"schedule": FlowSchedule((1000, 500, 250), guidance=3.0, sampler="unipc")},
    "recomputed": {"spec": "fp32,window=6,sink=0", "recompute_context": True},
    "recomputed int8": {"spec": "int8,window=9,sink=2", "recompute_context": True},
    "recomputed guided": {"schedule": GUIDED, "recompute_context": True},
    "encoded anew": {
        "spec": "fp32,window=6,sink=0",
        "recompute_context": True,
        "context_encoder": encode,
        "decoder": True,
    },
    "encoded anew, first frame alone": {
        "spec": "bf16,window=7,sink=0",
        "first_chunk_frames": 1,
        "recompute_context": True,
        "context_encoder": encode,
        "decoder": True,
    },
}


class TestSaved:
    @pytest.mark.parametrize("settings", SAVED.values(), ids=SAVED)
    @pytest.mark.parametrize("chunks", [0, 1, 4])
    @pytest.mark.parametrize("copy", ["restore", "fork"])
    def test_goes_on_bit_for_bit(
        self, model: CausalWanTransformer3DModel, settings: dict[str, Any], chunks: int, copy: str
    ) -> None:
        rollout = build(model, **settings)
        for _ in range(chunks):
            rollout.step_chunk()
        if copy == "fork":
            other = rollout.fork()
        else:
            other = build(model, **settings)
            # what it did before is forgotten
            other.step_chunk()
            other.restore(*rollout.state())
        for _ in range(3):
            found, wanted = other.step_chunk(), rollout.step_chunk()
            assert (found.index, found.start_frame) == (wanted.index, wanted.start_frame)
            assert torch.equal(found.latents, wanted.latents)
            if settings.get("decoder"):
                assert found.frames is not None and wanted.frames is not None
                assert torch.equal(found.frames, wanted.frames)
        for cache in other._caches():
            cache.check_integrity()

    def test_after_a_chunk_that_was_given_up(self, model: CausalWanTransformer3DModel) -> None:
        """A recomputed context that is in the cache is saved with it, and changes nothing."""
        settings = SAVED["encoded anew"]
        rollout, straight, other = (build(model, **settings) for _ in range(3))
        for r in (rollout, straight):
            latents_of(r, 3)
        rollout.denoise()
        other.restore(*rollout.state())
        assert torch.equal(latents_of(other, 2), latents_of(straight, 2))

    def test_the_encoded_frame_matters(self, model: CausalWanTransformer3DModel) -> None:
        """And with it the pictures that are saved: those of the frames a context may begin with."""
        settings = SAVED["encoded anew"]
        rollout = build(model, **settings)
        plain = build(model, **settings | {"context_encoder": None})
        latents_of(rollout, 3), latents_of(plain, 3)
        tensors, header = rollout.state()
        assert header["context_frames"] == [6, 7, 8]
        assert tensors["context_frames"].shape == (1, 3, 32, 48, 3)
        first = torch.equal(latents_of(rollout, 1), latents_of(plain, 1))
        other = build(model, **settings)
        other.restore(tensors | {"context_frames": 255 - tensors["context_frames"]}, header)
        restored = build(model, **settings)
        restored.restore(tensors, header)
        assert not first and not torch.equal(latents_of(other, 1), latents_of(restored, 1))

    @pytest.mark.parametrize("saved_guided", [True, False])
    def test_with_and_without_guidance_do_not_mix(
        self, model: CausalWanTransformer3DModel, saved_guided: bool
    ) -> None:
        saved = build(model, GUIDED if saved_guided else STEPS)
        schedule = STEPS if saved_guided else GUIDED
        target = build(model, schedule)
        latents_of(saved, 2)
        with pytest.raises(StateError, match="with and without guidance do not mix"):
            target.restore(*saved.state())
        assert untouched(target, model, schedule=schedule)

    @pytest.mark.parametrize(
        "damage",
        [
            lambda tensors, header: header.pop("negative_cache"),
            lambda tensors, header: header["negative_cache"].update(next_frame=5),
            lambda tensors, header: tensors.pop("negative_cache.pages.k"),
            lambda tensors, header: tensors.update({"negative_cache.pages.v": torch.zeros(2)}),
        ],
        ids=["no header", "another frame", "no keys", "other values"],
    )
    def test_damage_of_the_second_cache_changes_nothing(
        self,
        model: CausalWanTransformer3DModel,
        damage: Callable[[dict[str, Tensor], dict[str, Any]], object],
    ) -> None:
        saved, target = build(model, GUIDED), build(model, GUIDED)
        latents_of(saved, 2)
        tensors, header = saved.state()
        damage(tensors, header)
        with pytest.raises(StateError):
            target.restore(tensors, header)
        assert untouched(target, model, schedule=GUIDED)

    @pytest.mark.parametrize("damage", ["shape", "dtype", "missing"])
    def test_damage_of_context_frames(self, model: CausalWanTransformer3DModel, damage: str) -> None:
        settings = SAVED["encoded anew"]
        saved, target = build(model, **settings), build(model, **settings)
        latents_of(saved, 3)
        tensors, header = saved.state()
        if damage == "shape":
            tensors["context_frames"] = tensors["context_frames"][:, :2]
        elif damage == "dtype":
            tensors["context_frames"] = tensors["context_frames"].float()
        else:
            del tensors["context_frames"]
        with pytest.raises(StateError, match="context_frames"):
            target.restore(tensors, header)
        assert untouched(target, model, **settings)


class TestGuided:
    def test_without_a_negative_prompt(self, model: CausalWanTransformer3DModel) -> None:
        """The chunk is refused before either cache has it."""
        rollout = build(model, GUIDED)
        negative = rollout.negative
        rollout.set_text(rollout.text)
        with pytest.raises(InputError, match="give a negative prompt with set_text"):
            rollout.step_chunk()
        rollout.set_text(rollout.text, negative)
        assert untouched(rollout, model, schedule=GUIDED)

    def test_memory_is_twice_a_cache(self, model: CausalWanTransformer3DModel) -> None:
        assert build(model, GUIDED).kv_bytes == 2 * build(model).kv_bytes
