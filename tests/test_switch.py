"""A prompt that changes between two chunks: what each strategy does to the history, and what it leaves."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from tests.cache.oracle import page_hash
from tests.tiny import build_rollout, build_text, build_transformer, noise
from vidkv.cache import KVCache
from vidkv.errors import InputError
from vidkv.models.wan import CausalWanTransformer3DModel, TextContext
from vidkv.prompts import Switch
from vidkv.rollout import Rollout
from vidkv.schedule import FlowSchedule

SPEC = "fp32,window=9,sink=2"
SPECS = (
    SPEC,
    "bf16,window=9,sink=0,policy=sliding_window",
    "int8,window=9,sink=2,keep_newest,keep_sinks",
    "int8,window=10,sink=1,keep_newest,positions=absolute",
)
GUIDED = FlowSchedule((1000, 500), guidance=2.0)
STRATEGIES: tuple[Switch, ...] = ("keep", "recache", "flush", "lerp")


@pytest.fixture(scope="module")
def model() -> CausalWanTransformer3DModel:
    return build_transformer()


@pytest.fixture(scope="module")
def new(model: CausalWanTransformer3DModel) -> TextContext:
    return build_text(model, seed=3)


def started(
    model: CausalWanTransformer3DModel,
    chunks: int,
    spec: str = SPEC,
    schedule: FlowSchedule | None = None,
    chunk_frames: int = 3,
) -> Rollout:
    """A rollout after some chunks under the old prompt."""
    rollout = build_rollout(spec, transformer=model, schedule=schedule, chunk_frames=chunk_frames)
    if schedule is not None:
        rollout.set_text(rollout.text, build_text(model, seed=9))
    for _ in range(chunks):
        rollout.step_chunk()
    return rollout


def latents_of(rollout: Rollout, chunks: int) -> Tensor:
    return torch.cat([rollout.step_chunk().latents for _ in range(chunks)], 1)


def pages(cache: KVCache, shift: int = 0) -> dict[int, str]:
    """Digest of the bytes of every resident frame."""
    return {frame - shift: page_hash(cache, frame) for frame in cache.layout.resident}


def embeds(text: TextContext) -> Tensor:
    assert text.embeds is not None
    return text.embeds


def test_keep_leaves_the_cache_alone(model: CausalWanTransformer3DModel, new: TextContext) -> None:
    rollout, unswitched = started(model, 4), started(model, 4)
    before, layout = pages(rollout.cache), vars(rollout.cache.layout).copy()
    rollout.switch(new)
    assert pages(rollout.cache) == before and vars(rollout.cache.layout) == layout
    unswitched.set_text(new)
    found = latents_of(rollout, 2)
    assert torch.equal(found, latents_of(unswitched, 2))
    assert not torch.equal(found, latents_of(started(model, 4), 2))


class TestRecache:
    @pytest.mark.parametrize("spec", [SPEC, "bf16,window=9,sink=2,positions=absolute"])
    @pytest.mark.parametrize("chunks", [1, 2, 3])
    @pytest.mark.parametrize("keep_sinks", [False, True])
    def test_of_all_there_is(
        self,
        model: CausalWanTransformer3DModel,
        new: TextContext,
        spec: str,
        chunks: int,
        keep_sinks: bool,
    ) -> None:
        """A video that fits the window becomes one that was under the new prompt from the start."""
        rollout = build_rollout(spec, transformer=model)
        history = latents_of(rollout, chunks)
        before = pages(rollout.cache)
        rollout.switch(new, strategy="recache", keep_sinks=keep_sinks)
        fresh = build_rollout(spec, transformer=model, text=new)
        for part in history.split(3, 1):
            fresh.append(part)
        assert pages(rollout.cache) == pages(fresh.cache)
        assert all(before[frame] != page for frame, page in pages(rollout.cache).items())
        assert rollout.cache.layout.sinks == fresh.cache.layout.sinks == (0, 1)
        assert torch.equal(latents_of(rollout, 2), latents_of(fresh, 2))

    def test_of_the_last_window(self, model: CausalWanTransformer3DModel, new: TextContext) -> None:
        """Nothing older is read: as a video that begins with the window."""
        rollout = build_rollout(SPEC, transformer=model)
        history = latents_of(rollout, 6)
        rollout.switch(new, strategy="recache", keep_sinks=False)
        fresh = build_rollout(SPEC, transformer=model, text=new)
        for part in history[:, -9:].split(3, 1):
            fresh.append(part)
        assert rollout.cache.layout.sinks == (9, 10)
        assert pages(rollout.cache, shift=9) == pages(fresh.cache)
        assert rollout.next_frame == 18
        draws = [noise(1, 3, *rollout.latent_size, seed=seed) for seed in (1, 2)]
        found, wanted = (r.denoise(noise=draws[0], step_noise=draws[1:]) for r in (rollout, fresh))
        assert torch.equal(found, wanted)

    def test_with_sinks_kept(self, model: CausalWanTransformer3DModel, new: TextContext) -> None:
        """Sinks keep their bytes and stand in for the window's first frames."""
        rollout = build_rollout(SPEC, transformer=model)
        history = latents_of(rollout, 6)
        before = pages(rollout.cache)
        rollout.switch(new, strategy="recache")
        after = pages(rollout.cache)
        assert set(after) == set(before) == {0, 1, 14, 15, 16, 17}
        assert {frame for frame in after if after[frame] == before[frame]} == {0, 1}

        by_hand = build_rollout(SPEC, transformer=model)
        by_hand.append(history[:, :3])
        by_hand.cache.forget([2])
        by_hand.cache.seek(11)
        by_hand.set_text(new)
        for start, end in ((11, 12), (12, 15), (15, 18)):
            by_hand.append(history[:, start:end])
        assert pages(by_hand.cache) == after

    def test_at_once_frames_see_each_other(
        self, model: CausalWanTransformer3DModel, new: TextContext
    ) -> None:
        """As one chunk of all frames."""
        rollout, block_wise = started(model, 2), started(model, 2)
        rollout.switch(new, strategy="recache", at_once=True)
        block_wise.switch(new, strategy="recache")
        one_chunk = build_rollout("fp32,window=12,sink=2", transformer=model, text=new, chunk_frames=6)
        one_chunk.append(latents_of(build_rollout(SPEC, transformer=model), 2))
        assert pages(rollout.cache) == pages(one_chunk.cache)
        assert pages(rollout.cache) != pages(block_wise.cache)

    def test_of_both_caches(self, model: CausalWanTransformer3DModel, new: TextContext) -> None:
        negative = build_text(model, seed=4)
        rollout = started(model, 0, schedule=GUIDED)
        history = latents_of(rollout, 2)
        rollout.switch(new, negative, "recache")
        fresh = build_rollout(SPEC, transformer=model, schedule=GUIDED)
        fresh.set_text(new, negative)
        for part in history.split(3, 1):
            fresh.append(part)
        assert rollout.negative_cache is not None and fresh.negative_cache is not None
        assert pages(rollout.cache) == pages(fresh.cache)
        assert pages(rollout.negative_cache) == pages(fresh.negative_cache) != pages(rollout.cache)

    @pytest.mark.parametrize("spec", SPECS)
    @pytest.mark.parametrize("keep_sinks", [False, True])
    @pytest.mark.parametrize("at_once", [False, True])
    def test_goes_on_in_every_format(
        self,
        model: CausalWanTransformer3DModel,
        new: TextContext,
        spec: str,
        keep_sinks: bool,
        at_once: bool,
    ) -> None:
        rollout = started(model, 5, spec)
        for text in (new, build_text(model, seed=5)):
            resident = len(rollout.cache.layout.resident)
            rollout.switch(text, strategy="recache", keep_sinks=keep_sinks, at_once=at_once)
            rollout.cache.check_integrity()
            assert len(rollout.cache.layout.resident) == resident
            rollout.step_chunk()
            rollout.cache.check_integrity()

    def test_without_a_negative_prompt_nothing_is_lost(
        self, model: CausalWanTransformer3DModel, new: TextContext
    ) -> None:
        rollout = started(model, 3, schedule=GUIDED)
        before = pages(rollout.cache)
        with pytest.raises(InputError, match="negative prompt"):
            rollout.switch(new, strategy="recache")
        assert pages(rollout.cache) == before
        rollout.switch(new, build_text(model, seed=9), "recache")
        assert pages(rollout.cache) != before


class TestFlush:
    @pytest.mark.parametrize("spec", SPECS)
    def test_keeps_sinks_and_the_newest_frame(
        self, model: CausalWanTransformer3DModel, new: TextContext, spec: str
    ) -> None:
        rollout = started(model, 5, spec)
        before, sinks = pages(rollout.cache), rollout.cache.layout.sinks
        assert len(sinks) == rollout.cache.spec.sink
        rollout.switch(new, strategy="flush")
        assert rollout.cache.layout.resident == (*sinks, 14) and rollout.cache.layout.sinks == sinks
        assert pages(rollout.cache) == {frame: before[frame] for frame in (*sinks, 14)}
        rollout.cache.check_integrity()

        opened = rollout.cache.begin(3)
        assert (opened.start, opened.history) == (15, (*sinks, 14))
        rollout.cache.abandon()
        for chunk in range(4):
            # two layers, two steps and the clean pass
            wanted = 2 * 3 * min(len(sinks) + 1 + 3 * chunk, rollout.cache.layout.capacity)
            assert rollout.step_chunk().stats.pages_read == wanted
            rollout.cache.check_integrity()
        assert rollout.cache.layout.sinks == sinks

    def test_of_both_caches(self, model: CausalWanTransformer3DModel, new: TextContext) -> None:
        rollout = started(model, 4, schedule=GUIDED)
        rollout.switch(new, build_text(model, seed=4), "flush")
        assert rollout.negative_cache is not None
        assert rollout.negative_cache.layout.resident == rollout.cache.layout.resident == (0, 1, 11)
        rollout.step_chunk()
        rollout.negative_cache.check_integrity()

    def test_older_frames_are_out_of_sight(
        self, model: CausalWanTransformer3DModel, new: TextContext
    ) -> None:
        rollout, kept = started(model, 5), started(model, 5)
        rollout.switch(new, strategy="flush")
        kept.switch(new)
        assert not torch.equal(rollout.denoise(), kept.denoise())
        kept.cache.forget([11, 12, 13])
        assert torch.equal(rollout.denoise(), kept.denoise())


class TestLerp:
    def test_goes_in_equal_parts(self, model: CausalWanTransformer3DModel, new: TextContext) -> None:
        rollout = started(model, 2)
        old = rollout.text
        rollout.switch(new, strategy="lerp", chunks=4)
        shares = (0.25, 0.5, 0.75, 1.0)
        for share in shares:
            by_hand = rollout.fork()
            by_hand.set_text(torch.lerp(embeds(old), embeds(new), share))
            assert torch.equal(rollout.step_chunk().latents, by_hand.step_chunk().latents)
            # the keys and values that were committed, too
            assert pages(rollout.cache) == pages(by_hand.cache)
        assert rollout.text is new

    def test_halfway(self, model: CausalWanTransformer3DModel, new: TextContext) -> None:
        rollout = started(model, 1)
        old = embeds(rollout.text)
        rollout.switch(new, strategy="lerp", chunks=2)
        rollout.denoise()
        torch.testing.assert_close(embeds(rollout.text), (old + embeds(new)) / 2)

    def test_over_one_chunk_is_keep(self, model: CausalWanTransformer3DModel, new: TextContext) -> None:
        rollout, kept = started(model, 2), started(model, 2)
        rollout.switch(embeds(new), strategy="lerp", chunks=1)
        kept.switch(new)
        assert torch.equal(latents_of(rollout, 2), latents_of(kept, 2))

    def test_goes_on_in_a_restored_rollout(
        self, model: CausalWanTransformer3DModel, new: TextContext
    ) -> None:
        rollout = started(model, 2)
        rollout.switch(new, strategy="lerp", chunks=4)
        latents_of(rollout, 2)
        restored = build_rollout(SPEC, transformer=model)
        restored.restore(*rollout.state())
        again = restored.fork()
        restored.switch(new, strategy="lerp", chunks=4, done=2)
        again.switch(new, strategy="lerp", chunks=4, done=1)
        wanted = latents_of(rollout, 3)
        assert torch.equal(latents_of(restored, 3), wanted)
        assert not torch.equal(latents_of(again, 3), wanted)

    def test_a_fork_goes_on_alone(self, model: CausalWanTransformer3DModel, new: TextContext) -> None:
        rollout = started(model, 2)
        rollout.switch(new, strategy="lerp", chunks=3)
        rollout.step_chunk()
        fork = rollout.fork()
        found = latents_of(fork, 3)
        assert torch.equal(latents_of(rollout, 3), found)

    def test_a_chunk_that_was_given_up_does_not_count(
        self, model: CausalWanTransformer3DModel, new: TextContext
    ) -> None:
        rollout, straight = started(model, 2), started(model, 2)
        for r in (rollout, straight):
            r.switch(new, strategy="lerp", chunks=3)
        assert torch.equal(rollout.denoise(), rollout.denoise())
        assert torch.equal(latents_of(rollout, 3), latents_of(straight, 3))

    def test_starts_from_where_another_stands(
        self, model: CausalWanTransformer3DModel, new: TextContext
    ) -> None:
        rollout, third = started(model, 1), build_text(model, seed=5)
        old = embeds(rollout.text)
        rollout.switch(new, strategy="lerp", chunks=2)
        rollout.step_chunk()
        rollout.switch(third, strategy="lerp", chunks=2)
        rollout.denoise()
        middle = (old + embeds(new)) / 2
        torch.testing.assert_close(embeds(rollout.text), (middle + embeds(third)) / 2)

    @pytest.mark.parametrize("strategy", ["keep", "flush", "recache"])
    def test_ends_with_another_switch(
        self, model: CausalWanTransformer3DModel, new: TextContext, strategy: Switch
    ) -> None:
        rollout, third = started(model, 1), build_text(model, seed=5)
        rollout.switch(new, strategy="lerp", chunks=3)
        rollout.step_chunk()
        rollout.switch(third, strategy=strategy)
        rollout.step_chunk()
        assert rollout.text is third

    @pytest.mark.parametrize("which", ["old", "new"])
    def test_needs_embeddings(self, model: CausalWanTransformer3DModel, new: TextContext, which: str) -> None:
        rollout = started(model, 1)
        if which == "old":
            rollout.set_text(replace(rollout.text, embeds=None))
        else:
            new = replace(new, embeds=None)
        with pytest.raises(InputError, match=r"needs prompts with their embeddings.*encode_text"):
            rollout.switch(new, strategy="lerp")

    @pytest.mark.parametrize("chunks", [0, -3])
    def test_takes_a_chunk_at_least(
        self, model: CausalWanTransformer3DModel, new: TextContext, chunks: int
    ) -> None:
        rollout, untouched = started(model, 1), started(model, 1)
        with pytest.raises(InputError, match=f"a lerp over {chunks} chunks; give at least 1"):
            rollout.switch(new, strategy="lerp", chunks=chunks)
        assert torch.equal(latents_of(rollout, 1), latents_of(untouched, 1))


@pytest.mark.parametrize("strategy", ["Keep", "", "forget", None, 3])
def test_strategies_are_listed(
    model: CausalWanTransformer3DModel, new: TextContext, strategy: object
) -> None:
    rollout, untouched = started(model, 1), started(model, 1)
    with pytest.raises(InputError, match=r"prompt switch .*keep, recache, flush, lerp"):
        rollout.switch(new, strategy=strategy)  # type: ignore[arg-type]
    assert torch.equal(latents_of(rollout, 1), latents_of(untouched, 1))


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_before_the_first_chunk(
    model: CausalWanTransformer3DModel, new: TextContext, strategy: Switch
) -> None:
    """There is no history: it is the new prompt's video."""
    rollout = started(model, 0)
    rollout.switch(new, strategy=strategy, chunks=1)
    fresh = build_rollout(SPEC, transformer=model, text=new)
    assert torch.equal(latents_of(rollout, 2), latents_of(fresh, 2))


@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("strategy", ["flush", "recache", "recache with sinks"])
def test_saved_right_after_a_switch(
    model: CausalWanTransformer3DModel, new: TextContext, spec: str, strategy: str
) -> None:
    rollout = started(model, 5, spec)
    if strategy == "flush":
        rollout.switch(new, strategy="flush")
    else:
        rollout.switch(new, strategy="recache", keep_sinks=strategy == "recache with sinks")
    restored = build_rollout(spec, transformer=model, text=new)
    restored.restore(*rollout.state())
    assert pages(restored.cache) == pages(rollout.cache)
    assert torch.equal(latents_of(restored, 4), latents_of(rollout, 4))
    restored.cache.check_integrity()
