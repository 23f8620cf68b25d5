"""Recorded passes replayed are the eager ones bit for bit; a second stream decodes the same frames."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.tiny import TEXT_DIM, build_geometry, build_transformer, build_vae, noise
from vidkv.attention import CachedAttention
from vidkv.cache import CacheSpec, KVCache
from vidkv.errors import InputError
from vidkv.graphs import RecordedPasses
from vidkv.models.vae import StreamingDecoder
from vidkv.models.wan import CausalWanTransformer3DModel
from vidkv.read_path import REFERENCE, TWO_PASS
from vidkv.rollout import Rollout
from vidkv.schedule import FlowSchedule

FEW_STEPS = FlowSchedule((1000, 500, 250))
GUIDED = FlowSchedule((1000, 500, 250), guidance=2.0, sampler="unipc")
SPECS = (
    "int8,window=9,sink=2",
    "bf16,window=9,sink=0,positions=absolute",
    "int8,window=9,sink=2,positions=absolute,keep_newest",
)
FULL_AFTER = 2
"""Chunks of three that fill a window of nine but for the open chunk."""


def embeds(model: CausalWanTransformer3DModel, seed: int) -> Tensor:
    return noise(1, 5, TEXT_DIM, seed=seed).to(model.device)


def build(
    model: CausalWanTransformer3DModel,
    graphs: bool,
    spec: str = SPECS[0],
    schedule: FlowSchedule = FEW_STEPS,
    decoder: StreamingDecoder | None = None,
    latent_size: tuple[int, int, int] = (4, 16, 24),
) -> Rollout:
    rollout = Rollout(
        model,
        embeds(model, 1),
        CacheSpec.parse(spec),
        schedule,
        latent_size,
        [7],
        3,
        decoder,
        graphs=graphs,
    )
    if schedule.guidance != 1:
        rollout.set_text(embeds(model, 1), embeds(model, 2))
    return rollout


def recordings(rollout: Rollout) -> int:
    assert isinstance(rollout._pass, RecordedPasses)
    return len(rollout._pass._recordings)


def steps_agree(replayed: Rollout, eager: Rollout, chunks: int) -> None:
    """Latents bit for bit, and the counters of pages."""
    for _ in range(chunks):
        found, wanted = replayed.step_chunk(), eager.step_chunk()
        assert torch.equal(found.latents, wanted.latents), f"chunk {wanted.index}"
        assert found.stats.pages_read == wanted.stats.pages_read > 0 or wanted.index == 0
        assert found.stats.lossy_pages_read == wanted.stats.lossy_pages_read


@pytest.fixture(scope="module", params=[torch.float32, torch.bfloat16], ids=str)
def model(request: pytest.FixtureRequest) -> CausalWanTransformer3DModel:
    return build_transformer(num_attention_heads=2, attention_head_dim=64).to("cuda", request.param)


@pytest.mark.gpu
class TestReplayed:
    @pytest.mark.parametrize("schedule", [FEW_STEPS, GUIDED], ids=["few steps", "guided unipc"])
    @pytest.mark.parametrize("spec", SPECS)
    def test_is_eager_bit_for_bit(
        self, model: CausalWanTransformer3DModel, spec: str, schedule: FlowSchedule
    ) -> None:
        """Through the filling of the window, a change of text and a fork."""
        replayed, eager = (build(model, graphs, spec, schedule) for graphs in (True, False))
        steps_agree(replayed, eager, 5)
        negative = embeds(model, 4) if schedule.guidance != 1 else None
        for rollout in (replayed, eager):
            rollout.set_text(embeds(model, 3), negative)
        steps_agree(replayed, eager, 2)
        # one for each cache, and all later passes are replays of it
        assert recordings(replayed) == (1 if negative is None else 2)
        steps_agree(replayed.fork(), eager.fork(), 3)
        steps_agree(replayed, eager, 2)

    def test_of_chunks_of_other_lengths(self, model: CausalWanTransformer3DModel) -> None:
        replayed, eager = build(model, True), build(model, False)
        steps_agree(replayed, eager, 4)
        for frames in (2, 3, 1, 3, 2):
            found, wanted = replayed.step_chunk(frames), eager.step_chunk(frames)
            assert torch.equal(found.latents, wanted.latents)

    @pytest.mark.parametrize("strategy", ["recache", "flush", "lerp"])
    def test_after_a_switch(self, model: CausalWanTransformer3DModel, strategy: Any) -> None:
        replayed, eager = build(model, True), build(model, False)
        steps_agree(replayed, eager, 4)
        for rollout in (replayed, eager):
            rollout.switch(embeds(model, 3), strategy=strategy, chunks=3)
        steps_agree(replayed, eager, 5)

    def test_restored(self, model: CausalWanTransformer3DModel) -> None:
        replayed, eager, other = build(model, True), build(model, False), build(model, True)
        steps_agree(replayed, eager, 4)
        other.step_chunk()
        other.restore(*replayed.state())
        steps_agree(other, eager, 3)

    def test_latents_outlive_the_next_replay(self, model: CausalWanTransformer3DModel) -> None:
        replayed = build(model, True)
        for _ in range(4):
            replayed.step_chunk()
        kept = replayed.step_chunk().latents
        before = kept.clone()
        replayed.step_chunk()
        assert torch.equal(kept, before)

    def test_a_masked_text_is_not_recorded(self, model: CausalWanTransformer3DModel) -> None:
        replayed, eager = build(model, True), build(model, False)
        mask = torch.ones(1, 3, 5, dtype=torch.bool, device="cuda")
        mask[..., 3:] = False
        for rollout in (replayed, eager):
            rollout.set_text(replace(rollout.text, mask=mask))
        steps_agree(replayed, eager, 5)
        assert recordings(replayed) == 0


@pytest.mark.gpu
class TestLaterFrames:
    def test_are_those_decoded_at_once(self) -> None:
        """Decoded behind the next chunk's denoising, saved and forked in the middle of it."""
        model, vae = build_transformer().to("cuda"), build_vae().to("cuda")
        size = (4, 16, 24)
        later, at_once = (
            build(model, True, decoder=StreamingDecoder(vae), latent_size=size) for _ in range(2)
        )
        wanted = [at_once.step_chunk() for _ in range(8)]
        pending = None
        for index in range(6):
            chunk = later.step_chunk(decode=False)
            assert chunk.frames is None and torch.equal(chunk.latents, wanted[index].latents)
            if pending is not None:
                assert torch.equal(pending.wait(), _frames(wanted[index - 1]))
            pending = later.decode_later(chunk.latents)
        # the decoder is still at work: a fork, a state and the next frames wait for it
        fork, other = later.fork(), build(model, False, decoder=StreamingDecoder(vae), latent_size=size)
        other.restore(*later.state())
        for rollout in (later, fork, other):
            for index in (6, 7):
                found = rollout.step_chunk()
                assert torch.equal(_frames(found), _frames(wanted[index]))
        assert pending is not None and torch.equal(pending.wait(), _frames(wanted[5]))
        assert pending.decode_s > 0


def _frames(chunk: Any) -> Tensor:
    assert chunk.frames is not None
    return chunk.frames.cpu()


class TestOnTheCPU:
    def test_a_rollout_ignores_graphs(self) -> None:
        model = build_transformer()
        asked, plain = (build(model, graphs, latent_size=(4, 4, 6)) for graphs in (True, False))
        asked.record_passes()
        assert asked._pass is asked.fork()._pass is model
        steps_agree(asked, plain, 5)

    def test_later_frames_are_there_at_once(self) -> None:
        model, vae = build_transformer(), build_vae()
        later, at_once = (
            build(model, False, decoder=StreamingDecoder(vae), latent_size=(4, 4, 6)) for _ in range(2)
        )
        for _ in range(3):
            chunk = later.step_chunk(decode=False)
            frames = later.decode_later(chunk.latents)
            assert torch.equal(frames.wait(), _frames(at_once.step_chunk()))
            assert frames.decode_s > 0
        assert torch.equal(_frames(later.fork().step_chunk()), _frames(at_once.step_chunk()))

    def test_later_frames_need_a_decoder(self) -> None:
        rollout = build(build_transformer(), False, latent_size=(4, 4, 6))
        with pytest.raises(InputError, match="a decoder that keeps its cache"):
            rollout.decode_later(rollout.step_chunk().latents)


class TestSignature:
    """What a recording is found by: CPU caches have it too."""

    @staticmethod
    def commit(cache: KVCache, seed: int, frames: int = 3) -> None:
        g = cache.geometry
        shape = (g.layers, g.batch, g.kv_heads, frames, g.tokens, g.head_dim)
        cache.begin(frames)
        with cache.committing():
            for layer in range(g.layers):
                cache.write(layer, noise(*shape, seed=seed)[layer], noise(*shape, seed=seed + 50)[layer])

    def filled(self, chunks: int, spec: str = "fp32,window=9,sink=2") -> KVCache:
        cache = KVCache(CacheSpec.parse(spec), build_geometry())
        for seed in range(chunks):
            self.commit(cache, seed)
        return cache

    def test_steady_is_a_full_window(self) -> None:
        cache = self.filled(0)
        for chunk in range(5):
            cache.begin(3)
            assert CachedAttention(cache).steady is (chunk >= FULL_AFTER)
            cache.abandon()
            self.commit(cache, chunk)
        cache.forget([12])
        cache.begin(3)
        attention = CachedAttention(cache)
        assert not attention.steady
        cache.abandon()
        assert not attention.steady

    @pytest.mark.parametrize("spec", ["fp32,window=9,sink=2", "int8,window=9,sink=2,keep_newest,segment=4"])
    @pytest.mark.parametrize("path", [TWO_PASS, REFERENCE], ids=str)
    def test_comes_back_once_the_window_is_full(self, spec: str, path: Any) -> None:
        cache = self.filled(1, spec)
        found = []
        for seed in range(5):
            cache.begin(3)
            found.append(CachedAttention(cache, path).signature())
            cache.abandon()
            self.commit(cache, seed)
        assert found[0] != found[1] == found[2] == found[3] == found[4]

    def test_tells_apart_what_launches_other_kernels(self) -> None:
        caches = [
            self.filled(3),
            self.filled(3),
            self.filled(3, "fp32,window=9,sink=2,segment=2"),
            self.filled(3, "int8,window=9,sink=2"),
        ]
        for cache in caches:
            cache.begin(3)
        attentions = [CachedAttention(cache) for cache in caches]
        attentions += [CachedAttention(caches[0], REFERENCE), CachedAttention(caches[0], commit=True)]
        assert len({attention.signature() for attention in attentions}) == len(attentions)

    def test_tells_a_pool_that_has_moved(self) -> None:
        """A fork makes the pools grow: whoever knew their addresses reads what is there no longer."""
        cache = self.filled(3)
        cache.begin(3)
        before = CachedAttention(cache).signature()
        cache.abandon()
        fork = cache.fork()
        cache.begin(3)
        assert CachedAttention(cache).signature() != before
        cache.abandon()
        assert fork.layout.resident == cache.layout.resident

    @pytest.mark.parametrize("spec", ["fp32,window=9,sink=2", "int8,window=9,sink=2,positions=absolute"])
    def test_take_reads_what_the_other_reads(self, spec: str) -> None:
        """In place, from the same tensors, as a recorded kernel has them."""
        cache = self.filled(3, spec)
        q, k, v = (noise(1, 3, 4, 2, 8, seed=seed) for seed in (1, 2, 3))
        cache.begin(3)
        recorded = CachedAttention(cache)
        places = [tensor.data_ptr() for tensor in recorded._changing()]
        old = recorded.layer(1)(q, k, v)
        cache.abandon()
        self.commit(cache, 9, frames=2)
        cache.begin(3)
        current = CachedAttention(cache)
        wanted = current.layer(1)(q, k, v)
        assert not torch.equal(recorded.layer(1)(q, k, v), wanted)
        recorded.take(current)
        assert torch.equal(recorded.layer(1)(q, k, v), wanted)
        assert [tensor.data_ptr() for tensor in recorded._changing()] == places
        assert not torch.equal(old, wanted)
