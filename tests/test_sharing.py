"""Rollouts of one device share what is equal, bit for bit, and nothing else."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.tiny import HEIGHT, WIDTH, build_pipeline, noise
from vidkv import sharing
from vidkv.errors import InputError, NumericsError
from vidkv.models.vae_tiles import Tiling
from vidkv.models.wan import CausalWanTransformer3DModel
from vidkv.pipeline import CausalVideoPipeline
from vidkv.read_path import REFERENCE
from vidkv.rollout import Chunk
from vidkv.sharing import Pools, PrefixCache
from vidkv.stream import VideoStream

PROMPT, OTHER = "a red circle bouncing", "a blue square resting"
CHUNKS, FRAMES = 5, 12 * 5 - 3
SWITCHED = [(0.0, PROMPT), (1.3, OTHER)]
"""The second prompt begins with chunk 2, at frame 21."""
BASE: dict[str, Any] = {"prompt": PROMPT, "cache": "fp32,window=9,sink=2", "seed": 7, "num_frames": FRAMES}
BUDGET = 10**8
SHORT = {"num_frames": 21}
"""Two chunks, for what is seen in the first."""


@pytest.fixture(scope="module")
def pipe() -> CausalVideoPipeline:
    return build_pipeline()


@pytest.fixture
def shared(pipe: CausalVideoPipeline) -> Iterator[CausalVideoPipeline]:
    """The same pipeline while it shares."""
    pipe.pools, pipe.prefixes = Pools(), PrefixCache(BUDGET)
    yield pipe
    pipe.pools = pipe.prefixes = None


def cache_of(pipe: CausalVideoPipeline) -> PrefixCache:
    assert pipe.prefixes is not None
    return pipe.prefixes


def begin(pipe: CausalVideoPipeline, **request: Any) -> VideoStream:
    return pipe.stream(**({"height": HEIGHT, "width": WIDTH} | BASE | request))


def made(pipe: CausalVideoPipeline, **request: Any) -> list[Chunk]:
    stream = begin(pipe, **request)
    chunks = list(stream)
    stream.rollout.cache.check_integrity()
    stream.close()
    return chunks


def alone(pipe: CausalVideoPipeline, **request: Any) -> list[Chunk]:
    """What it gives without sharing."""
    kept = pipe.pools, pipe.prefixes
    pipe.pools = pipe.prefixes = None
    try:
        return made(pipe, **request)
    finally:
        pipe.pools, pipe.prefixes = kept


def same(found: list[Chunk], wanted: list[Chunk]) -> bool:
    assert [(c.index, c.start_frame) for c in found] == [(c.index, c.start_frame) for c in wanted]
    return all(
        torch.equal(a.latents, b.latents)
        and (a.frames is b.frames is None or torch.equal(a.frames, b.frames))
        for a, b in zip(found, wanted, strict=True)
    )


def pictures(frames: int, seed: int = 0) -> np.ndarray:
    source = np.random.default_rng(seed)
    return source.integers(0, 255, (frames, HEIGHT, WIDTH, 3), dtype=np.uint8)


CASES: dict[str, dict[str, Any]] = {
    "plain": {},
    "int8": {"cache": "int8,window=9,sink=2,keep_newest,keep_sinks"},
    "stock": {"noise": "stock"},
    "guided": {"guidance_scale": 2.0},
    "keep": {"prompt": SWITCHED, "prompt_switch": "keep"},
    "recache": {"prompt": SWITCHED, "prompt_switch": "recache"},
    "flush": {"prompt": SWITCHED, "prompt_switch": "flush"},
    "lerp": {"prompt": SWITCHED, "prompt_switch": "lerp"},
    "lerp in a lerp": {"prompt": [*SWITCHED, (2.0, "a green circle resting")], "prompt_switch": "lerp"},
    "image": {"image": pictures(1)},
    "video": {"video": pictures(21)},
    "latents": {"decode": False},
    "noise": {"latents": noise(1, 3 * CHUNKS, 4, 4, 6)},
    "two": {"prompt": [PROMPT, OTHER]},
}


@pytest.fixture
def passes(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """One entry for every pass of the transformer."""
    calls: list[int] = []
    forward = CausalWanTransformer3DModel.forward

    def counted(self: CausalWanTransformer3DModel, *args: Any) -> Tensor:
        calls.append(1)
        return forward(self, *args)

    monkeypatch.setattr(CausalWanTransformer3DModel, "forward", counted)
    return calls


class TestEqualOpenings:
    @pytest.mark.parametrize("case", CASES)
    def test_are_made_once(self, shared: CausalVideoPipeline, passes: list[int], case: str) -> None:
        wanted = alone(shared, **CASES[case])
        first = made(shared, **CASES[case])
        cache, known = cache_of(shared), len(cache_of(shared))
        assert same(first, wanted) and cache.hits == 0 and known >= CHUNKS - 2
        before = len(passes)
        assert same(made(shared, **CASES[case]), wanted)
        assert cache.hits == known == len(cache)
        # what is given is committed again, and a recache comes before its chunk: nothing is denoised
        assert len(passes) - before <= {"image": 1, "video": 2, "recache": 2}.get(case, 0)

    @pytest.mark.parametrize(
        ("format", "noise"), [("fp32", "counter"), ("fp32", "stock"), ("int8,keep_newest", "counter")]
    )
    def test_go_on_apart(self, shared: CausalVideoPipeline, format: str, noise: str) -> None:
        """Interleaved, past the window, each as if alone: what one overwrites the other still reads."""
        spec = f"{format},window=9,sink=2"
        requests = [
            {"cache": spec, "prompt": p, "num_frames": 12 * 7 - 3, "noise": noise} for p in (PROMPT, SWITCHED)
        ]
        wanted = [alone(shared, **request) for request in requests]
        a, b = (begin(shared, **request) for request in requests)
        found: tuple[list[Chunk], list[Chunk]] = ([], [])
        for _ in range(4):
            found[0].append(next(a))
        for _ in range(3):
            found[1].append(next(b))
            found[0].append(next(a))
        found[1].extend(b)
        assert same(found[0], wanted[0]) and same(found[1], wanted[1])
        assert not same(wanted[0], wanted[1]) and cache_of(shared).hits == 2

    def test_pages_are_stored_once(self, shared: CausalVideoPipeline) -> None:
        a, b = begin(shared), begin(shared)
        for stream in (a, b):
            next(stream), next(stream)
        first, second = a.rollout.cache, b.rollout.cache
        assert first.table == second.table and first.pools is second.pools
        # two rollouts, and the snapshots after either chunk
        assert [first.pools["pages"].references[p.slot] for p in first.table.values()] == [4] * 3 + [3] * 3

    def test_what_is_handed_out_is_a_copy(self, shared: CausalVideoPipeline) -> None:
        wanted = alone(shared)
        for _ in range(3):
            stream, found = begin(shared), list[Chunk]()
            for chunk, right in zip(stream, wanted, strict=True):
                assert chunk.frames is not None
                assert same([chunk], [right])
                chunk.latents.zero_(), chunk.frames.zero_()
                found.append(chunk)
            stream.close()

    def test_only_the_beginning_is_remembered(self, shared: CausalVideoPipeline) -> None:
        shared.prefixes = PrefixCache(BUDGET, chunks=2)
        wanted = alone(shared)
        for _ in range(2):
            assert same(made(shared), wanted)
        assert (len(shared.prefixes), shared.prefixes.hits) == (2, 2)

    def test_a_step_by_hand_is_the_end_of_it(self, shared: CausalVideoPipeline) -> None:
        """Somebody else's chunk, prompt or way of switching is not in the key."""
        made(shared)
        for act in (
            lambda rollout: rollout.append(noise(1, 3, 4, 4, 6)),
            lambda rollout: rollout.switch(shared.encode_prompt([OTHER]), strategy="recache"),
            lambda rollout: rollout.restore(*rollout.state()),
        ):
            stream, before = begin(shared), cache_of(shared).hits
            next(stream)
            act(stream.rollout)
            list(stream)
            assert cache_of(shared).hits == before + 1 and len(cache_of(shared)) == CHUNKS
            stream.close()

    def test_parked_in_between(self, shared: CausalVideoPipeline) -> None:
        wanted = alone(shared)
        made(shared)
        assert shared.pools is not None
        stream = begin(shared)
        found = [next(stream)]
        cache = stream.rollout.cache
        stream.rollout.park()
        stream.rollout.unpark(shared.pools.of(cache.spec, cache.geometry, "cpu", torch.float32))
        assert same([*found, *stream], wanted) and cache_of(shared).hits == CHUNKS


def _other_weights(pipe: CausalVideoPipeline, stream: VideoStream) -> Callable[[], None]:
    """A weight that no sample sees."""
    return _nudge(pipe.transformer.blocks[1].ffn.net[2].weight, 7)


def _other_decoder(pipe: CausalVideoPipeline, stream: VideoStream) -> Callable[[], None]:
    return _nudge(pipe.vae.decoder.conv_in.weight, 2)


def _nudge(weight: Tensor, row: int) -> Callable[[], None]:
    kept = weight.data.clone()
    with torch.no_grad():
        weight[row, 1] += 0.5

    def undo() -> None:
        weight.data.copy_(kept)

    return undo


def _path(pipe: CausalVideoPipeline, stream: VideoStream) -> Callable[[], None]:
    stream.rollout.path = REFERENCE
    return lambda: None


def _tiles(pipe: CausalVideoPipeline, stream: VideoStream) -> Callable[[], None]:
    pipe.tiling = Tiling(3, 4)
    return lambda: setattr(pipe, "tiling", Tiling())


Change = Callable[[CausalVideoPipeline, VideoStream], Callable[[], None]]
WORLDS: dict[str, Change] = {
    "weights": _other_weights, "decoder": _other_decoder, "read path": _path,
    "tiling": _tiles,
}  # fmt: skip
"""Changes of what stands around a request; each returns how to undo it."""

REQUESTS: dict[str, dict[str, Any]] = {
    "seed": {"seed": 8},
    "prompt": {"prompt": OTHER},
    "steps": {"num_inference_steps": 3},
    "guidance": {"guidance_scale": 2.0},
    "format": {"cache": "int8,window=9,sink=2"},
    "window": {"cache": "fp32,window=10,sink=2"},
    "sink": {"cache": "fp32,window=9,sink=1"},
    "positions": {"cache": "fp32,window=9,sink=2,positions=absolute"},
    "segment": {"cache": "fp32,window=9,sink=2,segment=2"},
    "size": {"width": WIDTH + 16},
    "shape": {"width": HEIGHT, "height": WIDTH},
    "noise": {"noise": "stock"},
    "given noise": {"latents": noise(1, 3 * CHUNKS, 4, 4, 6)},
    "image": {"image": pictures(1)},
    "video": {"video": pictures(21), "num_frames": 33},
    "no decoder": {"decode": False},
    "batch": {"prompt": [PROMPT, OTHER]},
    "the same twice": {"prompt": [PROMPT, PROMPT]},
}
PAIRS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "negative prompt": ({"guidance_scale": 2.0}, {"guidance_scale": 2.0, "negative_prompt": OTHER}),
    "scale of guidance": ({"guidance_scale": 2.0}, {"guidance_scale": 3.0}),
    "length with stock noise": ({"noise": "stock"}, {"noise": "stock", "num_frames": 33}),
    "picture": ({"image": pictures(1)}, {"image": pictures(1, seed=1)}),
    "end of a video": (
        {"video": pictures(21), "num_frames": 33}, {"video": pictures(21, seed=1), "num_frames": 33}
    ),
    "order of a batch": ({"prompt": [PROMPT, OTHER]}, {"prompt": [OTHER, PROMPT]}),
    "value scale": (
        {"cache": "int8,window=9,sink=2"}, {"cache": "int8,window=9,sink=2,value_scale=channel"}
    ),
    "kept sinks": ({"cache": "int8,window=9,sink=2"}, {"cache": "int8,window=9,sink=2,keep_sinks"}),
}  # fmt: skip


def poison(cache: PrefixCache) -> None:
    """Every page and latent that is remembered becomes something that no video survives."""
    assert len(cache)
    for snapshot in cache._kept.values():
        for pool, slot in set().union(*(part.places() for part in snapshot.caches)):
            for buffer in pool.storage.values():
                buffer[:, slot] = float("nan") if buffer.is_floating_point() else 127
        for tensor in snapshot.tensors():
            tensor.fill_(float("nan") if tensor.is_floating_point() else 99)


class TestCanary:
    """Two requests that differ in anything never read each other's pages: the first one's are poisoned."""

    def test_a_wrong_hit_would_be_seen(self, shared: CausalVideoPipeline) -> None:
        wanted = alone(shared)
        made(shared)
        for snapshot in cache_of(shared)._kept.values():
            # pages alone, so that it is they that are read
            for pool, slot in snapshot.caches[0].places():
                for buffer in pool.storage.values():
                    buffer[:, slot] = float("nan")
        cache_of(shared).chunks = 1
        stream = begin(shared)
        assert same([next(stream)], wanted[:1])
        with pytest.raises(NumericsError, match="chunk 1"):
            next(stream)
        stream.close()

    @pytest.mark.parametrize("change", REQUESTS)
    def test_another_request(self, shared: CausalVideoPipeline, change: str) -> None:
        request = (SHORT if "latents" not in REQUESTS[change] else {}) | REQUESTS[change]
        wanted = alone(shared, **request)
        made(shared, **SHORT)
        poison(cache_of(shared))
        assert same(made(shared, **request), wanted)
        assert cache_of(shared).hits == 0

    @pytest.mark.parametrize("change", PAIRS)
    def test_a_pair(self, shared: CausalVideoPipeline, change: str) -> None:
        one, other = (SHORT | request for request in PAIRS[change])
        wanted = alone(shared, **other)
        made(shared, **one)
        poison(cache_of(shared))
        assert same(made(shared, **other), wanted)
        assert cache_of(shared).hits == 0

    @pytest.mark.parametrize("change", WORLDS)
    def test_another_world(self, shared: CausalVideoPipeline, change: str) -> None:
        made(shared, **SHORT)
        poison(cache_of(shared))
        # a tiling is taken up when a stream begins, a read path when there is a rollout
        undo = WORLDS[change](shared, begin(shared))
        try:
            stream = begin(shared, **SHORT)
            if change == "read path":
                WORLDS[change](shared, stream)
            list(stream)
            stream.close()
        finally:
            undo()
        assert cache_of(shared).hits == 0

    @pytest.mark.parametrize("name", sorted(sharing.identity(build_pipeline(), build_pipeline().rollout())))
    def test_every_part_of_the_identity_counts(
        self, shared: CausalVideoPipeline, monkeypatch: pytest.MonkeyPatch, name: str
    ) -> None:
        next(begin(shared))
        known, real = set(cache_of(shared)._kept), sharing.identity
        monkeypatch.setattr(sharing, "identity", lambda *args: real(*args) | {name: "another"})
        next(begin(shared))
        assert cache_of(shared).hits == 0 and len(set(cache_of(shared)._kept) - known) == 1

    @pytest.mark.parametrize("way", ["recache", "flush", "lerp"])
    def test_ways_of_switching(self, shared: CausalVideoPipeline, way: str) -> None:
        """Equal up to the switch, and from there on strangers."""
        keep = {"prompt": SWITCHED, "prompt_switch": "keep"}
        wanted = alone(shared, **keep | {"prompt_switch": way})
        made(shared, **keep)
        assert same(made(shared, **keep | {"prompt_switch": way}), wanted)
        assert cache_of(shared).hits == 2

    def test_another_second(self, shared: CausalVideoPipeline) -> None:
        later = {"prompt": [(0.0, PROMPT), (2.0, OTHER)]}
        wanted = alone(shared, **later)
        made(shared, prompt=SWITCHED)
        assert same(made(shared, **later), wanted)
        assert cache_of(shared).hits == 2

    def test_back_to_the_first_prompt(self, shared: CausalVideoPipeline) -> None:
        """The same prompt and chunk after another history."""
        back = {"prompt": [(0.0, PROMPT), (0.5, OTHER), (1.3, PROMPT)]}
        wanted = alone(shared, **back)
        made(shared)
        assert same(made(shared, **back), wanted)
        assert cache_of(shared).hits == 1

    def test_steered(self, shared: CausalVideoPipeline) -> None:
        made(shared)
        stream = begin(shared)
        found = [next(stream)]
        stream.steer(OTHER)
        found += stream
        assert cache_of(shared).hits == 1
        assert same(found, alone(shared, prompt=[(0.0, PROMPT), (9 / 16, OTHER)]))

    def test_records_and_edits_are_nobody_s_opening(self, shared: CausalVideoPipeline) -> None:
        stream = begin(shared)
        first = alone(shared)[0]
        stream.records = lambda chunk: sharing_record(first.latents + 1, stream) if chunk == 0 else None
        list(stream)
        assert len(cache_of(shared)) == 0
        brighter: Any = lambda pipe, step, time, tensors: {"latents": tensors["latents"] + 1}  # noqa: E731
        request = BASE | SHORT | {"height": HEIGHT, "width": WIDTH, "callback_on_step_end": brighter}
        shared(**request, output_type="latent")
        assert len(cache_of(shared)) == 0 and cache_of(shared).misses == 0


def sharing_record(latents: Tensor, stream: VideoStream) -> Any:
    from vidkv.stream import ChunkRecord

    return ChunkRecord(latents, stream.rollout.noise.state())


class TestBudget:
    def test_the_oldest_goes_first(self, shared: CausalVideoPipeline) -> None:
        made(shared)
        one = cache_of(shared).nbytes
        cache = shared.prefixes = PrefixCache(int(1.5 * one))
        for seed in (1, 2):
            made(shared, seed=seed)
            assert cache.nbytes <= cache.budget_bytes
        assert cache.hits == 0 and CHUNKS < len(cache) < 2 * CHUNKS
        # its first chunks were used for longest ago
        made(shared, seed=1)
        assert cache.hits == 0
        made(shared, seed=1)
        assert cache.hits == CHUNKS

    def test_what_was_used_stays(self, shared: CausalVideoPipeline) -> None:
        cache_of(shared).chunks = 1
        made(shared, seed=1)
        one = cache_of(shared).nbytes
        cache = shared.prefixes = PrefixCache(int(2.5 * one), chunks=1)
        for seed in (1, 2, 1, 3, 1):
            made(shared, seed=seed)
        assert cache.hits == 2
        made(shared, seed=2)
        assert cache.hits == 2

    def test_pages_are_counted_once(self, shared: CausalVideoPipeline) -> None:
        """Against a count by hand of slots and tensors."""
        made(shared)
        cache, slots, tensors = cache_of(shared), set(), {}
        for snapshot in cache._kept.values():
            (part,) = snapshot.caches
            slots |= {page.slot for page in part.table.values()}
            tensors |= {t.data_ptr(): t.untyped_storage().nbytes() for t in snapshot.tensors()}
        assert len(slots) == 3 * CHUNKS
        page = 2 * 2 * 2 * 24 * 6 * 4
        assert cache.nbytes == len(slots) * page + sum(tensors.values())

    def test_what_goes_gives_its_pages_back(self, shared: CausalVideoPipeline) -> None:
        cache_of(shared).chunks = 4
        stream = begin(shared)
        chunks = [next(stream) for _ in range(4)]
        pool = stream.rollout.cache.pools["pages"]
        # a video's six, and those of the first chunk that were not sinks, and of the second
        assert sum(count > 0 for count in pool.references) == 12
        cache_of(shared).clear()
        assert sum(count > 0 for count in pool.references) == 6 == sum(pool.references)
        assert cache_of(shared).nbytes == 0 and pool.reserved == 6
        chunks += stream
        assert same(chunks, alone(shared))
        stream.close()
        assert sum(pool.references) == pool.reserved == 0
        assert shared.pools is not None and shared.pools.nbytes == 0

    def test_room_is_promised_for_all_that_is_kept(self, shared: CausalVideoPipeline) -> None:
        """However many videos move on at a time, none runs out of slots."""
        streams = [begin(shared, seed=seed) for seed in (1, 1, 2, 3)]
        for _ in range(CHUNKS):
            for stream in streams:
                next(stream)
                pool = stream.rollout.cache.pools["pages"]
                kept = {slot for s in cache_of(shared)._kept.values() for _, slot in s.caches[0].places()}
                assert pool.reserved >= 6 * len(streams) + len(kept)
                assert pool.slots >= pool.reserved
                stream.rollout.cache.check_integrity()

    def test_a_full_device_forgets(
        self, shared: CausalVideoPipeline, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        wanted = alone(shared)
        stream = begin(shared)
        pool = stream.rollout.cache.pools["pages"]

        def full(slots: int, device: Any) -> Any:
            raise torch.OutOfMemoryError("no room")

        monkeypatch.setattr(pool.format, "allocate", full)
        assert same(list(stream), wanted)
        assert len(cache_of(shared)) == 0 and pool.reserved == 6

    @pytest.mark.parametrize("budget", [0, 100])
    def test_too_small_for_anything(self, shared: CausalVideoPipeline, budget: int) -> None:
        shared.prefixes = PrefixCache(budget)
        wanted = alone(shared)
        for _ in range(2):
            assert same(made(shared), wanted)
        assert len(shared.prefixes) == shared.prefixes.nbytes == shared.prefixes.hits == 0

    def test_arguments(self) -> None:
        with pytest.raises(InputError, match="budget_bytes=-1"):
            PrefixCache(-1)
        with pytest.raises(InputError, match="chunks=0"):
            PrefixCache(1, chunks=0)


class TestPools:
    def test_one_set_for_each_kind(self, shared: CausalVideoPipeline) -> None:
        pools = [
            begin(shared, cache=c).rollout.cache.pools for c in ("fp32", "fp32", "int8", "fp32,window=9")
        ]
        assert pools[0] is pools[1] and len({id(p) for p in pools}) == 3

    def test_growth_is_what_is_then_allocated(self, shared: CausalVideoPipeline) -> None:
        assert shared.pools is not None
        stream = begin(shared)
        cache = stream.rollout.cache
        stream.close()
        kind = cache.spec, cache.geometry, cache.device, cache.dtype
        page = 2 * 2 * 2 * 24 * 6 * 4
        assert shared.pools.nbytes == 0
        assert shared.pools.growth_bytes(1, *kind) == 6 * page
        shared.pools.prepare(2, *kind)
        first = begin(shared)
        assert shared.pools.nbytes == 12 * page and shared.pools.growth_bytes(1, *kind) == 0
        second = begin(shared)
        assert shared.pools.nbytes == 12 * page
        # the old buffers stay until the new ones are filled
        assert shared.pools.growth_bytes(1, *kind) == 18 * page
        third = begin(shared)
        assert shared.pools.nbytes == 18 * page
        for stream in (first, second):
            stream.close()
        assert shared.pools.growth_bytes(2, *kind) == 0
        third.close()
        assert shared.pools.nbytes == 0

    def test_a_rollout_counts_its_part(self, shared: CausalVideoPipeline) -> None:
        streams = [begin(shared) for _ in range(3)]
        lone = alone(shared)[0].stats.kv_bytes
        assert {next(stream).stats.kv_bytes for stream in streams} == {lone}
        streams[0].close()
        assert streams[0].rollout.kv_bytes == 0


class TestTexts:
    def test_one_context_while_it_is_read(self, pipe: CausalVideoPipeline) -> None:
        gc.collect()
        a, b, c = begin(pipe), begin(pipe, seed=8), begin(pipe, prompt=OTHER)
        for stream in (a, b, c):
            next(stream)
        assert a.rollout.text is b.rollout.text and a.rollout.text is not c.rollout.text
        before = len(pipe._contexts)
        a.close(), b.close()
        del a, b, stream
        gc.collect()
        assert len(pipe._contexts) == before - 1

    def test_other_weights_make_another(self, pipe: CausalVideoPipeline) -> None:
        weight = pipe.transformer.blocks[0].attn2.to_k.weight
        before = pipe.encode_prompt([PROMPT])
        kept = weight.data.clone()
        try:
            with torch.no_grad():
                weight[5, 5] += 1
            after = pipe.encode_prompt([PROMPT])
        finally:
            weight.data.copy_(kept)
        assert after is not before and not torch.equal(after.keys[0], before.keys[0])

    def test_given_embeddings_of_the_same_numbers(self, pipe: CausalVideoPipeline) -> None:
        embeds = noise(1, 5, pipe.transformer.config.text_dim)
        kept = pipe.text_context(embeds)
        assert pipe.text_context(embeds.clone()) is kept
        assert pipe.text_context(embeds + 1e-6) is not kept
