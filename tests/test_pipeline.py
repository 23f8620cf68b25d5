"""Text in, frames out: diffusers' arguments, chunks as they come, one clear line for every mistake."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from tests.tiny import (
    CHANNELS,
    HEIGHT,
    WIDTH,
    build_pipeline,
    build_transformer,
    generator,
    noise,
    relative_l2,
)
from vidkv.cache import CacheSpec
from vidkv.errors import CacheSpecError, Cancelled, InputError, PromptError
from vidkv.models.vae import pixel_frames
from vidkv.noise import chunk_noise
from vidkv.pipeline import CausalVideoPipeline, chunks_for, frames_for
from vidkv.schedule import FlowSchedule

PROMPT, OTHER = "a red circle bouncing", "a blue square resting"
SIZE = {"height": HEIGHT, "width": WIDTH}


@pytest.fixture(scope="module")
def pipe() -> CausalVideoPipeline:
    return build_pipeline()


def video(pipe: CausalVideoPipeline, prompt: Any = PROMPT, **kwargs: Any) -> Any:
    """Frames of a call; by default 21 of them, as bytes."""
    return pipe(prompt, **(SIZE | {"num_frames": 21, "output_type": "pt"} | kwargs)).frames


def latents_of(pipe: CausalVideoPipeline, prompt: Any = PROMPT, **kwargs: Any) -> Tensor:
    found: Tensor = video(pipe, prompt, output_type="latent", **kwargs)
    return found


class TestFiles:
    def test_round_trip_gives_identical_frames(self, pipe: CausalVideoPipeline, tmp_path: Path) -> None:
        pipe.save_pretrained(tmp_path)
        loaded = CausalVideoPipeline.from_pretrained(tmp_path)
        assert torch.equal(video(loaded), video(pipe))
        assert loaded.schedule == pipe.schedule == FlowSchedule((1000, 500))
        assert loaded.default_cache() == pipe.default_cache()
        assert loaded.tokenizer.model_max_length == 32

    def test_settings_survive(self, tmp_path: Path) -> None:
        settings = {
            "steps": [900, 300],
            "shift": 3.0,
            "warp": False,
            "first_chunk_steps": [1000, 500, 100],
            "sampler": "euler",
            "prompt_grammar": None,
        }
        build_pipeline(**settings).save_pretrained(tmp_path)
        loaded = CausalVideoPipeline.from_pretrained(str(tmp_path))
        assert {name: loaded.config[name] for name in settings} == settings
        assert loaded.schedule == FlowSchedule((900, 300), 3.0, False, (1000, 500, 100), "euler")
        assert len(video(loaded, "anything goes without a grammar", num_frames=1)) == 1

    @pytest.mark.parametrize("name", ["dtype", "torch_dtype"])
    def test_bfloat16(self, pipe: CausalVideoPipeline, tmp_path: Path, name: str) -> None:
        pipe.save_pretrained(tmp_path)
        half = CausalVideoPipeline.from_pretrained(tmp_path, **{name: torch.bfloat16})
        assert half.transformer.dtype == torch.bfloat16
        assert half.default_cache().format == "bf16"
        found, exact = latents_of(half), latents_of(pipe)
        assert found.dtype == torch.bfloat16
        assert 0 < relative_l2(found.float(), exact) < 0.2
        assert video(half).shape == video(pipe).shape

    def test_parts_may_be_given(self, pipe: CausalVideoPipeline, tmp_path: Path) -> None:
        pipe.save_pretrained(tmp_path)
        other = build_transformer(seed=5)
        loaded = CausalVideoPipeline.from_pretrained(tmp_path, transformer=other)
        assert loaded.transformer is other
        assert not torch.equal(latents_of(loaded), latents_of(pipe))


class TestStream:
    def test_is_the_call_in_pieces(self, pipe: CausalVideoPipeline) -> None:
        chunks = list(pipe.stream(PROMPT, **SIZE, num_frames=30, seed=3))
        assert [c.index for c in chunks] == [0, 1, 2]
        assert [c.start_frame for c in chunks] == [0, 3, 6]
        whole = video(pipe, num_frames=30, seed=3)
        assert torch.equal(torch.cat([c.frames for c in chunks], 1), whole)
        assert torch.equal(torch.cat([c.latents for c in chunks], 1), latents_of(pipe, num_frames=30, seed=3))

    def test_without_an_end(self, pipe: CausalVideoPipeline) -> None:
        endless = pipe.stream(PROMPT, **SIZE, seed=3)
        chunks = list(itertools.islice(endless, 4))
        endless.close()
        assert [c.frames.shape[1] for c in chunks] == [9, 12, 12, 12]
        assert torch.equal(torch.cat([c.frames for c in chunks], 1), video(pipe, num_frames=45, seed=3))

    def test_two_at_once(self, pipe: CausalVideoPipeline) -> None:
        """Streams share the networks and nothing else."""
        alone = [video(pipe, num_frames=30, seed=s) for s in (1, 2)]
        streams = [pipe.stream(PROMPT, **SIZE, num_frames=30, seed=s) for s in (1, 2)]
        pairs = list(zip(*streams, strict=True))
        for i in range(2):
            assert torch.equal(torch.cat([pair[i].frames for pair in pairs], 1), alone[i])

    def test_mistakes_are_found_before_the_first_chunk(self, pipe: CausalVideoPipeline) -> None:
        """On the call, not when someone begins to read."""
        with pytest.raises(PromptError):
            pipe.stream("a red elephant")
        with pytest.raises(PromptError):
            pipe.stream([(0, PROMPT), (5, "a red elephant")])
        with pytest.raises(InputError):
            pipe.stream(PROMPT, num_frames=0)

    def test_without_decoder(self, pipe: CausalVideoPipeline) -> None:
        (chunk,) = pipe.stream(PROMPT, **SIZE, num_frames=9, decode=False)
        assert chunk.frames is None and chunk.latents.shape == (1, 3, CHANNELS, 4, 6)

    def test_cancelling(self, pipe: CausalVideoPipeline) -> None:
        def stop(chunk: int, step: int) -> None:
            if (chunk, step) == (1, 0):
                raise Cancelled("stop")

        chunks = pipe.stream(PROMPT, **SIZE, num_frames=30, on_step=stop)
        assert next(chunks).index == 0
        with pytest.raises(Cancelled):
            next(chunks)


class TestLength:
    @pytest.mark.parametrize("frames", [1, 8, 9, 10, 21])
    def test_cut_to_the_frames_asked_for(self, pipe: CausalVideoPipeline, frames: int) -> None:
        """A shorter video is the beginning of a longer one."""
        found = video(pipe, num_frames=frames)
        assert found.shape == (1, frames, HEIGHT, WIDTH, 3)
        assert torch.equal(found, video(pipe, num_frames=33)[:, :frames])
        sizes = [c.frames.shape[1] for c in pipe.stream(PROMPT, **SIZE, num_frames=frames)]
        assert sum(sizes) == frames and min(sizes) > 0
        assert len(sizes) == chunks_for(frames, 3)

    def test_chunks_for(self) -> None:
        assert [chunks_for(n, 3) for n in (1, 9, 10, 21, 22, 81, 960)] == [1, 1, 2, 2, 3, 7, 81]
        for frames in range(1, 200):
            for size in (1, 2, 3, 5):
                chunks = chunks_for(frames, size)
                assert pixel_frames(chunks * size) >= frames > pixel_frames((chunks - 1) * size)

    def test_frames_for(self) -> None:
        assert [frames_for(s, 16) for s in (60, 1, 0.0625, 0.1, 2.53)] == [960, 16, 1, 2, 40]

    @pytest.mark.parametrize(
        ("seconds", "words"),
        [
            (0, "positive"),
            (-1, "positive"),
            (float("nan"), "nan"),
            (float("inf"), "inf"),
            (0.01, "less than one frame"),
            (1e9, "a day"),
        ],
    )
    def test_impossible_lengths(self, seconds: float, words: str) -> None:
        with pytest.raises(InputError, match=words):
            frames_for(seconds, 16)


class TestOutput:
    def test_kinds_agree(self, pipe: CausalVideoPipeline) -> None:
        as_bytes = video(pipe, num_frames=10)
        assert as_bytes.dtype == torch.uint8
        as_floats = video(pipe, num_frames=10, output_type="np")
        assert isinstance(as_floats, np.ndarray) and as_floats.dtype == np.float32
        assert 0 <= as_floats.min() < 0.2 and 0.8 < as_floats.max() <= 1
        np.testing.assert_array_equal(np.rint(as_floats * 255), as_bytes.numpy())
        pictures = video(pipe, num_frames=10, output_type="pil")
        assert [len(v) for v in pictures] == [10]
        assert isinstance(pictures[0][0], Image.Image) and pictures[0][0].size == (WIDTH, HEIGHT)
        np.testing.assert_array_equal(np.stack([np.asarray(p) for p in pictures[0]]), as_bytes[0].numpy())
        latents = video(pipe, num_frames=10, output_type="latent")
        assert latents.shape == (1, 6, CHANNELS, 4, 6)

    def test_numpy_is_the_default(self, pipe: CausalVideoPipeline) -> None:
        assert isinstance(pipe(PROMPT, **SIZE, num_frames=1).frames, np.ndarray)

    def test_a_tuple_on_request(self, pipe: CausalVideoPipeline) -> None:
        (frames,) = pipe(PROMPT, **SIZE, num_frames=9, output_type="pt", return_dict=False)
        assert torch.equal(frames, video(pipe, num_frames=9))

    def test_no_graph_is_kept(self, pipe: CausalVideoPipeline) -> None:
        pipe.transformer.requires_grad_(True)
        try:
            chunks = list(pipe.stream(PROMPT, **SIZE, num_frames=10))
        finally:
            pipe.transformer.requires_grad_(False)
        assert not any(chunk.latents.requires_grad for chunk in chunks)

    def test_the_default_size_is_the_model_s(self, pipe: CausalVideoPipeline) -> None:
        assert pipe(PROMPT, num_frames=1, output_type="pt").frames.shape == (1, 1, 64, 64, 3)


class TestRandomness:
    def test_seeds(self, pipe: CausalVideoPipeline) -> None:
        assert torch.equal(video(pipe, seed=5), video(pipe, seed=5))
        assert not torch.equal(video(pipe, seed=5), video(pipe, seed=6))
        assert torch.equal(video(pipe), video(pipe, seed=0))

    def test_a_generator_gives_its_seed(self, pipe: CausalVideoPipeline) -> None:
        used = generator(5)
        torch.randn(3, generator=used)
        assert torch.equal(video(pipe, generator=used), video(pipe, seed=5))

    @pytest.mark.parametrize("seed", [2**63 + 5, 2**64 - 1])
    def test_a_generator_gives_all_bits_of_its_seed(self, pipe: CausalVideoPipeline, seed: int) -> None:
        found = latents_of(pipe, generator=generator(seed), num_frames=9)
        assert torch.equal(found, latents_of(pipe, seed=seed, num_frames=9))
        assert not torch.equal(found, latents_of(pipe, seed=seed % 2**63, num_frames=9))

    def test_global_state_is_not_touched(self, pipe: CausalVideoPipeline) -> None:
        torch.manual_seed(1)
        before = torch.get_rng_state()
        first = video(pipe, num_frames=9)
        assert torch.equal(torch.get_rng_state(), before)
        torch.manual_seed(2)
        assert torch.equal(video(pipe, num_frames=9), first)

    def test_latents_are_the_initial_noise(self, pipe: CausalVideoPipeline) -> None:
        own = torch.cat([chunk_noise([4], chunk, 0, (3, CHANNELS, 4, 6)) for chunk in range(2)], 1)
        assert torch.equal(video(pipe, latents=own, seed=4), video(pipe, seed=4))
        # the second chunk's noise is of no concern to the first
        changed = own.clone()
        changed[:, 3:] *= -1
        found = latents_of(pipe, latents=changed, seed=4)
        wanted = latents_of(pipe, seed=4)
        assert torch.equal(found[:, :3], wanted[:, :3])
        assert relative_l2(found[:, 3:], wanted[:, 3:]) > 0.01

    def test_number_of_steps(self, pipe: CausalVideoPipeline) -> None:
        default = latents_of(pipe)
        assert torch.equal(latents_of(pipe, num_inference_steps=2), default)
        assert relative_l2(latents_of(pipe, num_inference_steps=5), default) > 0.01


class TestPrompts:
    def test_embeddings_instead(self, pipe: CausalVideoPipeline) -> None:
        from vidkv.models.text import encode_prompts

        embeds = encode_prompts(pipe.tokenizer, pipe.text_encoder, [PROMPT])
        assert torch.equal(video(pipe, None, prompt_embeds=embeds), video(pipe))
        assert relative_l2(latents_of(pipe, None, prompt_embeds=-embeds), latents_of(pipe)) > 0.01
        two = video(pipe, None, prompt_embeds=torch.cat([embeds, -embeds]))
        assert two.shape[0] == 2

    def test_the_text_matters(self, pipe: CausalVideoPipeline) -> None:
        assert relative_l2(latents_of(pipe, OTHER), latents_of(pipe)) > 1e-3

    def test_spelling_does_not(self, pipe: CausalVideoPipeline) -> None:
        assert torch.equal(video(pipe, "A  red BALL moving."), video(pipe, PROMPT))

    def test_a_batch_is_its_elements(self, pipe: CausalVideoPipeline) -> None:
        """Element i has the i-th prompt and seed + i."""
        batch = latents_of(pipe, [PROMPT, OTHER, PROMPT], seed=10)
        assert batch.shape[0] == 3
        for i, prompt in enumerate((PROMPT, OTHER, PROMPT)):
            assert relative_l2(batch[i : i + 1], latents_of(pipe, prompt, seed=10 + i)) < 1e-5

    @pytest.mark.parametrize(
        ("second", "chunk"), [(0.01, 1), (0.5625, 1), (0.5626, 2), (1.3125, 2), (1.32, 3), (100, 9)]
    )
    def test_a_switch_begins_with_the_next_chunk(
        self, pipe: CausalVideoPipeline, second: float, chunk: int
    ) -> None:
        """Chunks begin at 0, 9/16, 21/16 s …; what is before the switch is untouched."""
        plain = latents_of(pipe, num_frames=45)
        found = latents_of(pipe, [(0, PROMPT), (second, OTHER)], num_frames=45)
        for i in range(4):
            part = slice(3 * i, 3 * i + 3)
            assert torch.equal(found[:, part], plain[:, part]) == (i < chunk)

    def test_back_and_forth(self, pipe: CausalVideoPipeline, monkeypatch: pytest.MonkeyPatch) -> None:
        """The text is encoded when it changes and at no other time."""
        encoded: list[list[str]] = []
        encode = CausalVideoPipeline.encode_prompt
        monkeypatch.setattr(
            CausalVideoPipeline, "encode_prompt", lambda self, p: (encoded.append(p), encode(self, p))[1]
        )
        schedule = [(0, PROMPT), (0.5, OTHER), (0.5625, PROMPT), (2, OTHER)]
        list(pipe.stream(schedule, **SIZE, num_frames=57))
        assert encoded == [[PROMPT], [OTHER]]

    def test_a_schedule_of_one_is_the_prompt(self, pipe: CausalVideoPipeline) -> None:
        assert torch.equal(video(pipe, [(0, PROMPT)]), video(pipe))

    def test_when_chunks_begin(self, pipe: CausalVideoPipeline) -> None:
        assert [pipe.chunk_second(i) for i in range(3)] == [0, 9 / 16, 21 / 16]


class TestCache:
    def test_default(self, pipe: CausalVideoPipeline) -> None:
        assert str(pipe.default_cache()) == "fp32,window=21,sink=3"

    def test_a_line_or_an_object(self, pipe: CausalVideoPipeline) -> None:
        line = "int8,window=7,sink=1,keep_newest"
        found = latents_of(pipe, cache=line, num_frames=57)
        assert torch.equal(found, latents_of(pipe, cache=CacheSpec.parse(line), num_frames=57))
        error = relative_l2(found, latents_of(pipe, cache="fp32,window=7,sink=1", num_frames=57))
        assert 1e-6 < error < 0.05

    def test_stats_tell_what_was_used(self, pipe: CausalVideoPipeline) -> None:
        chunks = list(pipe.stream(PROMPT, **SIZE, num_frames=33, cache="int8,window=7,sink=1"))
        assert chunks[-1].stats.resident_frames == 4
        assert chunks[-1].stats.lossy_pages_read == chunks[-1].stats.pages_read > 0

    def test_seeds_of_a_rollout(self, pipe: CausalVideoPipeline) -> None:
        assert pipe.rollout(seed=4, batch=3).seeds == (4, 5, 6)
        assert pipe.rollout(seeds=[9, 2]).seeds == (9, 2)


class TestCallback:
    @pytest.mark.parametrize("steps", [None, 1, 3, 5])
    def test_every_step_of_every_chunk(self, pipe: CausalVideoPipeline, steps: int | None) -> None:
        calls: list[tuple[Any, ...]] = []
        video(
            pipe,
            num_frames=22,
            num_inference_steps=steps,
            callback_on_step_end=lambda *args: calls.append(args) or {},
        )
        schedule = pipe.schedule if steps is None else pipe.schedule.with_steps(steps)
        timesteps = [round(1000 * sigma) for sigma in schedule.sigmas(1)]
        assert [call[1] for call in calls] == list(range(3 * len(timesteps)))
        assert [call[2] for call in calls] == 3 * timesteps
        assert all(call[0] is pipe for call in calls)
        assert all(set(call[3]) == {"latents"} for call in calls)
        assert all(call[3]["latents"].shape == (1, 3, CHANNELS, 4, 6) for call in calls)

    def test_first_chunk_steps(self) -> None:
        calls: list[int] = []
        pipe = build_pipeline(first_chunk_steps=(1000, 900, 500))
        video(pipe, num_frames=21, callback_on_step_end=lambda _, step, t, kwargs: calls.append(t) or {})
        assert len(calls) == 3 + 2
        assert calls[:3] == [1000, 978, 833] and calls[3:] == [1000, 833]

    def test_latents_after_the_last_step_are_the_chunk_s(self, pipe: CausalVideoPipeline) -> None:
        seen: list[Tensor] = []
        found = latents_of(pipe, callback_on_step_end=lambda *args: seen.append(args[3]["latents"].clone()))
        assert len(seen) == 4
        assert torch.equal(torch.cat(seen[1::2], 1), found)
        assert relative_l2(torch.cat(seen[::2], 1), found) > 0.01

    def test_changed_latents_go_on(self, pipe: CausalVideoPipeline) -> None:
        """The last step of chunk 0: the chunk is what was returned, and the next one saw it."""
        own = noise(1, 3, CHANNELS, 4, 6)
        found = latents_of(
            pipe, callback_on_step_end=lambda _, step, t, tensors: {"latents": own} if step == 1 else {}
        )
        assert torch.equal(found[:, :3], own)
        rollout = pipe.rollout(**SIZE)
        rollout.set_text(pipe.encode_prompt([PROMPT]))
        rollout.append(own)
        assert torch.equal(found[:, 3:], rollout.step_chunk().latents)

    def test_without_tensors(self, pipe: CausalVideoPipeline) -> None:
        seen: list[Any] = []
        video(
            pipe,
            callback_on_step_end=lambda *args: seen.append(args[3]),
            callback_on_step_end_tensor_inputs=[],
        )
        assert seen == [{}] * 4

    @pytest.mark.parametrize(
        ("latents", "words"),
        [(torch.zeros(1, 3, 4, 4), r"latents are \(1, 3, 4, 4\)"), ([1], r"latents \[1\]")],
    )
    def test_unusable_latents(self, pipe: CausalVideoPipeline, latents: Any, words: str) -> None:
        with pytest.raises(InputError, match=words):
            video(pipe, callback_on_step_end=lambda *args: {"latents": latents})

    @pytest.mark.parametrize(
        ("at", "latent_frames"), [(0, 0), (1, 3), (2, 3), (3, 6), (4, 6), (5, 9)], ids=str
    )
    def test_interrupted_after_a_step(self, pipe: CausalVideoPipeline, at: int, latent_frames: int) -> None:
        """Whole chunks are kept; the next call is not interrupted."""
        calls: list[int] = []

        def stop(pipe: CausalVideoPipeline, step: int, t: int, tensors: dict[str, Tensor]) -> None:
            calls.append(step)
            if step == at:
                pipe._interrupt = True

        found = latents_of(pipe, num_frames=33, callback_on_step_end=stop)
        assert calls == list(range(at + 1))
        wanted = latents_of(pipe, num_frames=33)
        assert found.shape[1] == latent_frames and torch.equal(found, wanted[:, :latent_frames])

    @pytest.mark.parametrize("output_type", ["np", "pt", "pil"])
    def test_interrupted_before_any_frame(self, pipe: CausalVideoPipeline, output_type: str) -> None:
        def stop(pipe: CausalVideoPipeline, *args: Any) -> None:
            pipe._interrupt = True

        found = video(pipe, [PROMPT, OTHER], output_type=output_type, callback_on_step_end=stop)
        assert found == [[], []] if output_type == "pil" else found.shape == (2, 0, HEIGHT, WIDTH, 3)


class TestMistakes:
    """Each is an InputError in one line that names the value."""

    @pytest.mark.parametrize(
        ("arguments", "words"),
        [
            ({"height": 33}, "height=33"),
            ({"height": 0}, "height=0"),
            ({"width": -16}, "width=-16"),
            ({"width": 47}, "nearest is 48"),
            ({"num_frames": 0}, "num_frames=0"),
            ({"num_frames": -9}, "num_frames=-9"),
            ({"num_frames": 9.5}, "num_frames=9.5"),
            ({"num_frames": float("nan")}, "num_frames=nan"),
            ({"num_frames": None}, "num_frames is missing"),
            ({"num_inference_steps": 0}, "num_inference_steps=0"),
            ({"num_inference_steps": 1001}, "num_inference_steps=1001"),
            ({"prompt": None}, "either a prompt or prompt_embeds"),
            ({"prompt": ""}, "prompt is empty"),
            ({"prompt": " "}, "prompt is empty"),
            ({"prompt": []}, "schedule is empty"),
            ({"prompt": 5}, "prompt 5"),
            ({"prompt": [(0, PROMPT), (1, 7)]}, "list of"),
            ({"prompt": [[(0, PROMPT)], [(0, OTHER)]]}, "list of"),
            ({"prompt": [(1, PROMPT)]}, "start at 0"),
            ({"prompt": [PROMPT, "a red elephant"]}, "elephant"),
            ({"prompt": "x" * 1_000_000}, "1,000,000 characters"),
            ({"prompt_embeds": torch.zeros(1, 3, 64)}, "either a prompt or prompt_embeds"),
            ({"prompt": None, "prompt_embeds": torch.zeros(1, 3, 63)}, "batch, tokens, 64"),
            ({"prompt": None, "prompt_embeds": torch.zeros(3, 64)}, "batch, tokens, 64"),
            ({"prompt": None, "prompt_embeds": torch.zeros(0, 3, 64)}, "at least one"),
            ({"seed": -1}, "seed -1"),
            ({"seed": 2**64}, "seed"),
            ({"seed": 1.5}, "seed=1.5"),
            ({"seed": "7"}, "seed='7'"),
            ({"seed": 1, "generator": generator()}, "either seed or generator"),
            ({"generator": [generator()]}, "generator is a list"),
            ({"output_type": "mp4"}, "output_type='mp4'"),
            ({"callback_on_step_end_tensor_inputs": ["prompt_embeds"]}, "prompt_embeds"),
            ({"latents": noise(1, 3, CHANNELS, 4, 5)}, r"latents are \(1, 3, 4, 4, 5\)"),
            ({"latents": noise(1, 6, CHANNELS, 4, 6)}, r"9 frames need \(1, 3, 4, 4, 6\)"),
            ({"latents": noise(2, 3, CHANNELS, 4, 6)}, "latents are"),
            ({"cache": "int9"}, "int9"),
            ({"cache": "window=5,sink=3"}, "at least 6"),
        ],
        ids=lambda value: str(value)[:40] if isinstance(value, str) else "-".join(value),
    )
    def test_is_named(self, pipe: CausalVideoPipeline, arguments: dict[str, Any], words: str) -> None:
        with pytest.raises(InputError, match=words) as caught:
            pipe(**({"prompt": PROMPT, "num_frames": 9} | SIZE | arguments))
        assert "\n" not in str(caught.value) and len(str(caught.value)) < 600
        if "cache" in arguments:
            assert isinstance(caught.value, CacheSpecError)

    def test_latents_without_length(self, pipe: CausalVideoPipeline) -> None:
        with pytest.raises(InputError, match="latents need num_frames"):
            pipe.stream(PROMPT, **SIZE, latents=noise(1, 3, CHANNELS, 4, 6))

    def test_unknown_model(self) -> None:
        with pytest.raises(InputError, match="model 'wan9' is unknown"):
            build_pipeline(model="wan9")

    def test_the_pipeline_is_fine_afterwards(self, pipe: CausalVideoPipeline) -> None:
        before = video(pipe)
        for arguments in ({"seed": -1}, {"num_frames": 0}, {"prompt": "?"}):
            with pytest.raises(InputError):
                pipe(**({"prompt": PROMPT, "num_frames": 9} | SIZE | arguments))
        assert torch.equal(video(pipe), before)
