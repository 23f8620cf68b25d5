"""The cache's contract, against a Python list of frames."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, suppress
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, initialize, invariant, precondition, rule
from torch import Tensor

from tests.cache.oracle import (
    Oracle,
    assert_reads,
    chunk_tensors,
    page_hash,
    poison_free_slots,
    read_all,
    shuffle_slots,
    step,
)
from tests.tiny import build_geometry, noise, relative_l2
from vidkv.attention import CachedAttention
from vidkv.cache import CacheGeometry, CacheSpec, KVCache, planned_bytes
from vidkv.cache.formats import Int8
from vidkv.cache.kv_cache import Page, State, planned_pools
from vidkv.cache.pool import PagePool
from vidkv.errors import CacheStateError, StateError

FORMATS = ("fp32", "bf16", "int8", "int8,keep_newest", "int8,keep_sinks", "int8,keep_newest,keep_sinks")
NARROW = tuple(
    f"{format},fit=largest,hadamard=false"
    for format in (
        "int4", "int4,newer=", "k8v4,newer=,keep_sinks=false", "int4,keep_newest",
        "int4,keyframe,newer=int8:2", "int4,newer=int8:4+k8v4:5,keep_sinks=false",
        "k8v4,keep_newest,newer=bf16:2+int8:1",
    )
)  # fmt: skip
"""Below eight bits, coded as the oracle does."""
TINY = build_geometry(kv_heads=1, head_dim=6, height=1, width=2)


@st.composite
def settings_of_a_cache(draw: st.DrawFn) -> tuple[CacheSpec, CacheGeometry]:
    """Any spec that fits a chunk, on pages of two tokens."""
    chunk = draw(st.integers(1, 4))
    sink = draw(st.integers(0, 5))
    format = draw(st.sampled_from(FORMATS + NARROW))
    scale = "token" if format in NARROW else draw(st.sampled_from(["token", "channel"]))
    options = [format, f"value_scale={scale}"]
    # without a word from any pass, those that go by it keep the newest
    options.append(f"policy={draw(st.sampled_from(['sink_window', 'h2o', 'snapkv']))}")
    if not sink and draw(st.booleans()):
        options[-1] = "policy=sliding_window"
    options.append(f"positions={draw(st.sampled_from(['relative', 'absolute']))}")
    window = sink + chunk + draw(st.integers(0, 12))
    options.append(f"window={window},sink={sink}")
    if window > sink + chunk and draw(st.booleans()):
        options.append(f"select={draw(st.integers(sink + chunk + 1, window))}")
    options.append(f"segment={draw(st.integers(1, 7))}")
    return CacheSpec.parse(",".join(options)), build_geometry(
        kv_heads=1, head_dim=6, height=1, width=2, chunk_frames=chunk, layers=draw(st.integers(1, 2))
    )


def filled(
    spec: str, chunks: int = 4, geometry: CacheGeometry = TINY, **kwargs: Any
) -> tuple[KVCache, Oracle]:
    """A cache after some chunks of three frames, and its oracle."""
    cache = KVCache(CacheSpec.parse(spec), geometry, **kwargs)
    oracle = Oracle(cache.spec, geometry, cache.dtype)
    for i in range(chunks):
        step(cache, oracle, geometry.chunk_frames, 10 * i)
    return cache, oracle


def pools_are_consistent(caches: list[KVCache]) -> None:
    """Slots are held by exactly the page tables that name them."""
    pools = {id(pool): pool for cache in caches for pool in cache.pools.values()}
    for pool in pools.values():
        holders = Counter(
            page.slot for cache in caches for page in cache.table.values() if cache.pools[page.pool] is pool
        )
        assert pool.references == [holders[slot] for slot in range(pool.slots)]


class TestAgainstTheOracle:
    @given(settings_of_a_cache(), st.data())
    @settings(max_examples=100)
    def test_rollouts(self, config: tuple[CacheSpec, CacheGeometry], data: st.DataObject) -> None:
        """What is read is right at every step; pages keep their bytes; memory stays what was planned."""
        spec, geometry = config
        cache, oracle = KVCache(spec, geometry), Oracle(spec, geometry)
        allocated = {name: (id(pool.storage), pool.slots) for name, pool in cache.pools.items()}
        length = data.draw(st.sampled_from([1, 5, 12, 25, 40]))
        chunks = data.draw(st.lists(st.integers(1, geometry.chunk_frames), min_size=length, max_size=length))
        hashes: dict[tuple[int, str], str] = {}
        for i, frames in enumerate(chunks):
            poison_free_slots(cache)
            step(cache, oracle, frames, 10 * i)
            for frame, page in cache.table.items():
                assert hashes.setdefault((frame, page.pool), page_hash(cache, frame)) == page_hash(
                    cache, frame
                )
            assert len(cache.table) <= spec.window - geometry.chunk_frames
            assert allocated == {name: (id(pool.storage), pool.slots) for name, pool in cache.pools.items()}
            assert cache.nbytes == planned_bytes(spec, geometry, torch.float32)
            pools_are_consistent([cache])
        # a full cache has no slot to spare for what is not resident
        held = {name: sum(map(bool, pool.references)) for name, pool in cache.pools.items()}
        assert sum(held.values()) == len(oracle.frames)

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
    @pytest.mark.parametrize("format", FORMATS)
    def test_sixteen_bit_compute(self, format: str, dtype: torch.dtype) -> None:
        """Kept pages are in the compute dtype, so reading them changes nothing."""
        geometry = build_geometry(batch=2)
        filled(f"{format},window=11,sink=2,segment=4", 6, geometry, dtype=dtype)

    @pytest.mark.parametrize("spec", ["fp32", "int8,keep_newest,positions=absolute"])
    def test_ten_thousand_frames(self, spec: str) -> None:
        """Run, not jumped: 3,400 chunks in which slots turn over a thousand times."""
        geometry = build_geometry(layers=1, kv_heads=1, head_dim=2, height=1, width=1)
        cache = KVCache(CacheSpec.parse(f"{spec},window=9,sink=2"), geometry)
        oracle = Oracle(cache.spec, geometry)
        tensors = [chunk_tensors(geometry, 3, seed) for seed in range(16)]
        for i in range(3_400):
            if i % 400 < 3:
                step(cache, oracle, 3, i)
                continue
            keys, values = tensors[i % 16]
            cache.begin(3)
            with cache.committing():
                cache.write(0, keys[0], values[0])
            oracle.commit(keys, values)
        assert oracle.next_frame > 10_000
        assert list(cache.layout.resident) == [0, 1, 10_196, 10_197, 10_198, 10_199]
        step(cache, oracle, 3, 1)

    @given(st.integers(0, 40), st.integers(0, 6), st.integers(1, 6))
    def test_both_policies_agree_without_sinks(self, frames: int, extra: int, chunk: int) -> None:
        """With sink=0 they are one policy."""
        states = []
        for policy in ("sliding_window", "sink_window"):
            spec = CacheSpec(window=chunk + extra, sink=0, policy=policy)
            cache = KVCache(spec, build_geometry(chunk_frames=chunk, layers=1, head_dim=2))
            for _ in range(frames // chunk):
                cache.layout.begin(chunk)
                cache.layout.commit()
            states.append(cache.layout.resident)
        assert states[0] == states[1]


class CacheMachine(RuleBasedStateMachine):
    """Several caches that share pools by forking, driven in any legal order."""

    caches = Bundle("caches")

    def __init__(self) -> None:
        super().__init__()
        self.live: list[tuple[KVCache, Oracle]] = []
        self.hashes: dict[tuple[int, int, str], str] = {}
        self.seed = 0

    @initialize(target=caches, config=settings_of_a_cache())
    def start(self, config: tuple[CacheSpec, CacheGeometry]) -> int:
        spec, geometry = config
        self.live.append((KVCache(spec, geometry), Oracle(spec, geometry)))
        return 0

    @rule(which=caches, frames=st.integers(1, 4))
    def commit(self, which: int, frames: int) -> None:
        cache, oracle = self.live[which]
        self.seed += 10
        step(cache, oracle, min(frames, cache.geometry.chunk_frames), self.seed)

    @rule(which=caches)
    def look_and_abandon(self, which: int) -> None:
        cache, oracle = self.live[which]
        before = dict(cache.table), cache.layout.resident, cache.layout.next_frame
        cache.begin(1)
        assert_reads(cache, oracle)
        cache.abandon()
        assert (dict(cache.table), cache.layout.resident, cache.layout.next_frame) == before

    @precondition(lambda self: len(self.live) < 4)
    @rule(target=caches, which=caches)
    def fork(self, which: int) -> int:
        cache, oracle = self.live[which]
        self.live.append((cache.fork(), oracle.fork()))
        for (owner, frame, pool), digest in list(self.hashes.items()):
            if owner == which:
                self.hashes[len(self.live) - 1, frame, pool] = digest
        return len(self.live) - 1

    @rule(which=caches)
    def save_and_restore(self, which: int) -> None:
        """In place, among forks that go on holding the same pages."""
        cache, _ = self.live[which]
        tensors, header = cache.state_tensors()
        cache.restore({name: tensor.clone() for name, tensor in tensors.items()}, header)

    @rule()
    def poison(self) -> None:
        for cache, _ in self.live:
            poison_free_slots(cache)

    @invariant()
    def all_is_well(self) -> None:
        if not self.live:
            return
        pools_are_consistent([cache for cache, _ in self.live])
        for owner, (cache, _) in enumerate(self.live):
            cache.check_integrity()
            for frame, page in cache.table.items():
                digest = page_hash(cache, frame)
                assert self.hashes.setdefault((owner, frame, page.pool), digest) == digest


TestMachine = CacheMachine.TestCase
TestMachine.settings = settings(max_examples=60, stateful_step_count=40)


class TestWriteOnce:
    def test_int8_is_encoded_once_from_the_first_page(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """A frame that is demoted passes the quantizer once, with the values that were committed."""
        cache, oracle = KVCache(CacheSpec.parse("int8,window=15,sink=2,keep_newest"), TINY), None
        oracle = Oracle(cache.spec, TINY)
        encoded: list[tuple[int, Tensor]] = []
        write = Int8.write

        def spy(self: Int8, storage: Any, layer: int, slots: Any, k: Tensor, *rest: Any) -> None:
            encoded.extend((layer, k[:, :, i].clone()) for i in range(len(slots)))
            write(self, storage, layer, slots, k, *rest)

        monkeypatch.setattr(Int8, "write", spy)
        committed = []
        for i in range(8):
            step(cache, oracle, 3, 10 * i)
            committed.append(chunk_tensors(TINY, 3, 10 * i)[0])
        keys = torch.cat(committed, 3)
        # all but the newest three, once per layer, in order, unrounded
        for layer in range(TINY.layers):
            pages = [k for where, k in encoded if where == layer]
            assert len(pages) == 21
            for frame, page in enumerate(pages):
                assert torch.equal(page, keys[layer, :, :, frame])

    @pytest.mark.parametrize("format", FORMATS)
    def test_slots_are_reused(self, format: str) -> None:
        cache, _ = filled(f"{format},window=8,sink=1", 12)
        slots = [(page.pool, page.slot) for page in cache.table.values()]
        assert len(set(slots)) == len(slots) == 5
        assert sum(pool.slots for pool in cache.pools.values()) == 5

    @pytest.mark.parametrize("format", FORMATS)
    def test_eviction_touches_no_page(self, format: str) -> None:
        cache, oracle = filled(f"{format},window=12,sink=2", 4)
        stays = {f: page for f, page in cache.table.items() if page.pool == "pages" or f < 2}
        before = {f: page_hash(cache, f) for f in stays}
        step(cache, oracle, 3, 99)
        for frame in set(before) & set(cache.table):
            if cache.table[frame].pool == stays[frame].pool:
                assert cache.table[frame] == stays[frame]
                assert page_hash(cache, frame) == before[frame]

    def test_a_page_is_read_before_its_slot_is_reused(self) -> None:
        """No slot is spare, so the clean pass writes over pages that it has read a moment before."""
        cache, oracle = filled("fp32,window=6,sink=0", 2)
        assert not any(references == 0 for references in cache.pools["pages"].references)
        step(cache, oracle, 3, 77)

    @pytest.mark.parametrize("format", FORMATS)
    def test_unused_slots_do_not_leak_into_reads(self, format: str, poisoned_empty: None) -> None:
        """Pools come up as NaN and 127; what is read is finite and right from the first chunk on."""
        cache, oracle = filled(f"{format},window=20,sink=2", 3)
        assert poison_free_slots(cache) > 0
        cache.begin(3)
        assert_reads(cache, oracle)


class TestSlotsDoNotMatter:
    @pytest.mark.parametrize("format", FORMATS)
    def test_attention_is_bit_identical(self, format: str) -> None:
        """The same frames in other slots: equal to the last bit, because reads go in position order."""
        geometry = build_geometry(layers=1, head_dim=24, height=3, width=5)
        outputs = []
        for seed in (None, 1, 2):
            cache, _ = filled(f"{format},window=17,sink=2,segment=4", 7, geometry)
            if seed is not None:
                before = dict(cache.table)
                shuffle_slots(cache, seed)
                assert cache.table != before
                poison_free_slots(cache)
            q, k, v = (noise(1, 3, 15, 2, 24, seed=s) for s in (5, 6, 7))
            cache.begin(3)
            outputs.append(CachedAttention(cache).layer(0)(q, k, v))
        assert torch.equal(outputs[0], outputs[1]) and torch.equal(outputs[0], outputs[2])

    @pytest.mark.parametrize("format", FORMATS)
    def test_restore_into_other_slots(self, format: str) -> None:
        cache, oracle = filled(f"{format},window=11,sink=2", 6)
        tensors, header = cache.state_tensors()
        other = KVCache(cache.spec, TINY)
        # slots of the other cache are taken in another order
        for pool in other.pools.values():
            for slot in range(0, pool.slots, 2):
                pool.references[slot] = 1
            pool.reserve(pool.slots)
        other.restore(tensors, header)
        for name, pool in other.pools.items():
            held = {page.slot for page in other.table.values() if page.pool == name}
            pool.references = [int(slot in held) for slot in range(pool.slots)]
        assert other.table != cache.table
        poison_free_slots(other)
        step(other, oracle.fork(), 3, 5)
        step(cache, oracle, 3, 5)
        for frame in cache.table:
            assert page_hash(cache, frame) == page_hash(other, frame)


class TestKeyMean:
    def test_is_that_of_the_first_chunk_for_good(self) -> None:
        cache = KVCache(CacheSpec.parse("int8,window=9,sink=2"), TINY)
        oracle = Oracle(cache.spec, TINY)
        step(cache, oracle, 2, 0)
        first = chunk_tensors(TINY, 2, 0)[0].mean((3, 4))
        torch.testing.assert_close(cache.means["key_mean"], first)
        frozen = cache.means["key_mean"].clone()
        for i in range(5):
            step(cache, oracle, 3, 10 + i)
        assert torch.equal(cache.means["key_mean"], frozen)

    def test_abandoning_the_first_chunk_freezes_nothing(self) -> None:
        cache, oracle = KVCache(CacheSpec.parse("int8,window=9,sink=2"), TINY), None
        cache.begin(3)
        cache.abandon()
        oracle = Oracle(cache.spec, TINY)
        step(cache, oracle, 3, 42)
        torch.testing.assert_close(cache.means["key_mean"], chunk_tensors(TINY, 3, 42)[0].mean((3, 4)))

    def test_elements_of_a_batch_have_their_own(self) -> None:
        """Otherwise a video would depend on its neighbours in the batch."""
        cache, _ = filled("int8,window=9,sink=2", 1, build_geometry(batch=3))
        assert cache.means["key_mean"].shape[1] == 3
        assert not torch.equal(cache.means["key_mean"][:, 0], cache.means["key_mean"][:, 1])

    @pytest.mark.parametrize("offset", [0.0, 100.0, 3000.0])
    def test_a_common_offset_of_all_keys_costs_nothing(
        self, offset: float, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Codes are for what differs. Without the mean, the same offset drowns the keys."""
        geometry = build_geometry(layers=1, head_dim=24, height=3, width=4)

        def output(format: str) -> Tensor:
            cache = KVCache(CacheSpec.parse(f"{format},window=9,sink=2"), geometry)
            found = []
            for i in range(4):
                q, k, v = (noise(1, 3, 12, 2, 24, seed=10 * i + s) for s in range(3))
                # on the temporal channels, which are stored unrotated
                k[..., :8] += offset * noise(8, seed=99)
                cache.begin(3)
                with cache.committing():
                    found.append(CachedAttention(cache, commit=True).layer(0)(0.2 * q, k, v))
            return torch.cat(found[1:], 1)

        exact = output("fp32")
        assert relative_l2(output("int8"), exact) < 0.005
        if offset:
            monkeypatch.setattr(
                Int8, "write", lambda self, *args, write=Int8.write: write(self, *args[:-1], 0 * args[-1])
            )
            monkeypatch.setattr(
                Int8, "read", lambda self, *args, read=Int8.read: read(self, *args[:-1], 0 * args[-1])
            )
            assert relative_l2(output("int8"), exact) > 0.04


STATES: dict[State, Callable[[KVCache], None]] = {
    State.IDLE: lambda cache: None,
    State.OPEN: lambda cache: cache.begin(3),
    State.COMMITTING: lambda cache: (cache.begin(3), enter(cache)),
    State.BROKEN: lambda cache: broken(cache),
    State.CLOSED: lambda cache: cache.close(),
}
OPERATIONS: dict[str, tuple[State, Callable[[KVCache], object]]] = {
    "begin": (State.IDLE, lambda cache: cache.begin(3)),
    "abandon": (State.OPEN, lambda cache: cache.abandon()),
    "committing": (State.OPEN, lambda cache: enter(cache)),
    "write": (State.COMMITTING, lambda cache: cache.write(0, *(x[0] for x in chunk_tensors(TINY, 3, 0)))),
    "fork": (State.IDLE, lambda cache: cache.fork()),
    "state_tensors": (State.IDLE, lambda cache: cache.state_tensors()),
}


OPEN_PASSES: list[AbstractContextManager[None]] = []


def enter(cache: KVCache) -> None:
    """Begin a clean pass and stay in it; one that is garbage-collected would count as an exception."""
    clean_pass = cache.committing()
    clean_pass.__enter__()
    OPEN_PASSES.append(clean_pass)


def broken(cache: KVCache) -> None:
    """Die half-way through a clean pass."""
    cache.begin(3)
    with suppress(KeyError), cache.committing():
        cache.write(0, *(x[0] for x in chunk_tensors(TINY, 3, 0)))
        raise KeyError


@pytest.fixture
def leave_open_passes() -> Iterator[None]:
    yield
    while OPEN_PASSES:
        with suppress(CacheStateError):
            OPEN_PASSES.pop().__exit__(None, None, None)


@pytest.mark.usefixtures("leave_open_passes")
class TestStates:
    @pytest.mark.parametrize("state", STATES, ids=lambda s: s.value)
    @pytest.mark.parametrize("operation", OPERATIONS)
    def test_illegal_transitions_name_both_states(self, operation: str, state: State) -> None:
        wanted, act = OPERATIONS[operation]
        cache, _ = filled("int8,window=9,sink=2,keep_newest", 3)
        STATES[state](cache)
        assert cache.state is state
        if state is wanted:
            act(cache)
            return
        with pytest.raises(CacheStateError) as caught:
            act(cache)
        assert f"is {state.value}" in str(caught.value)
        assert f"needs it {wanted.value}" in str(caught.value)
        assert cache.state is state

    @pytest.mark.parametrize("frames", [0, -1, 4])
    def test_chunks_of_an_impossible_length(self, frames: int) -> None:
        cache, oracle = filled("fp32,window=9,sink=2", 2)
        with pytest.raises(CacheStateError, match=f"chunk of {frames} latent frames"):
            cache.begin(frames)
        step(cache, oracle, 3, 9)

    def test_a_layer_is_written_once(self) -> None:
        cache, _ = filled("fp32,window=9,sink=2", 2)
        keys, values = chunk_tensors(TINY, 3, 1)
        cache.begin(3)
        with (
            pytest.raises(CacheStateError, match="layer 1 of this chunk is committed already"),
            cache.committing(),
        ):
            cache.write(1, keys[1], values[1])
            cache.write(1, keys[1], values[1])
        assert cache.state is State.BROKEN

    def test_every_layer_is_written(self) -> None:
        cache, _ = filled("fp32,window=9,sink=2", 2)
        keys, values = chunk_tensors(TINY, 3, 1)
        cache.begin(3)
        with pytest.raises(CacheStateError, match="1 of 2 layers unwritten"), cache.committing():
            cache.write(1, keys[1], values[1])
        assert cache.state is State.BROKEN

    def test_a_layer_is_not_read_after_it_was_written(self) -> None:
        """Its old pages may be gone, its new ones are not what this chunk reads."""
        cache, _ = filled("fp32,window=9,sink=2", 3)
        keys, values = chunk_tensors(TINY, 3, 1)
        cache.begin(3)
        with pytest.raises(CacheStateError, match="layer 0"), cache.committing():
            cache.read(1, cache.segments[0])
            cache.write(0, keys[0], values[0])
            cache.read(1, cache.segments[0])
            cache.read(0, cache.segments[0])

    @pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
    def test_an_exception_in_the_clean_pass_breaks_the_cache(self, error: type[BaseException]) -> None:
        cache, oracle = filled("int8,window=9,sink=2,keep_newest", 3)
        tensors, header = cache.state_tensors()
        cache.begin(3)
        with pytest.raises(error), cache.committing():
            cache.write(0, *(x[0] for x in chunk_tensors(TINY, 3, 0)))
            raise error
        assert cache.state is State.BROKEN
        # and restoring is the way back
        cache.restore(tensors, header)
        pools_are_consistent([cache])
        step(cache, oracle, 3, 5)

    @pytest.mark.parametrize("format", FORMATS)
    def test_abandon_leaves_everything_as_it_was(self, format: str) -> None:
        cache, oracle = filled(f"{format},window=9,sink=2", 4)
        table, hashes = dict(cache.table), {f: page_hash(cache, f) for f in cache.table}
        references = {name: list(pool.references) for name, pool in cache.pools.items()}
        for _ in range(3):
            cache.begin(2)
            read_all(cache, 0)
            cache.abandon()
        assert cache.table == table
        assert {f: page_hash(cache, f) for f in cache.table} == hashes
        assert {name: pool.references for name, pool in cache.pools.items()} == references
        step(cache, oracle, 3, 7)


class TestIntegrity:
    """Each rule is broken by hand; the check must name it."""

    def corrupted(
        self, change: Callable[[KVCache], object], spec: str = "int8,window=9,sink=2,keep_newest"
    ) -> str:
        cache, _ = filled(spec, 4)
        cache.check_integrity()
        # a damaged table cannot be given back
        cache._give_back.detach()
        change(cache)
        with pytest.raises(CacheStateError) as caught:
            cache.check_integrity()
        return str(caught.value)

    def test_a_frame_without_page(self) -> None:
        assert "resident frames" in self.corrupted(lambda cache: cache.table.pop(0))

    def test_a_page_without_frame(self) -> None:
        def change(cache: KVCache) -> None:
            cache.table[77] = Page("pages", 0, 0)

        assert "77" in self.corrupted(change)

    def test_more_frames_than_fit(self) -> None:
        def change(cache: KVCache) -> None:
            cache.layout.resident = (0, 1, 2, *cache.layout.resident[2:])
            cache.table[2] = Page("pages", cache.pools["pages"].slots, 0)
            cache.pools["pages"].references.append(1)

        assert "7 resident frames, but there is room for 6" in self.corrupted(change)

    def test_two_frames_in_one_slot(self) -> None:
        def change(cache: KVCache) -> None:
            cache.table[1] = cache.table[0]

        assert "two frames" in self.corrupted(change)

    def test_frames_out_of_order(self) -> None:
        def change(cache: KVCache) -> None:
            cache.layout.resident = cache.layout.resident[::-1]

        assert "out of order" in self.corrupted(change)

    def test_a_frame_counted_twice(self) -> None:
        def change(cache: KVCache) -> None:
            cache.layout.resident = (0, *cache.layout.resident)

        assert "out of order" in self.corrupted(change)

    def test_a_frame_of_the_future(self) -> None:
        def change(cache: KVCache) -> None:
            cache.layout.next_frame -= 1

        assert "11" in self.corrupted(change)

    def test_a_page_in_a_free_slot(self) -> None:
        def change(cache: KVCache) -> None:
            page = cache.table[1]
            cache.pools[page.pool].references[page.slot] = 0

        assert "frame 1" in self.corrupted(change) and "free" in self.corrupted(change)

    @pytest.mark.parametrize(
        "page", [Page("pages", 99, 0), Page("pages", -1, 0), Page("attic", 0, 0)], ids=str
    )
    def test_a_page_nowhere(self, page: Page) -> None:
        def change(cache: KVCache) -> None:
            cache.table[1] = page

        assert "frame 1" in self.corrupted(change)

    def test_a_sink_gone(self) -> None:
        def change(cache: KVCache) -> None:
            page = cache.table.pop(1)
            cache.pools[page.pool].release(page.slot)
            cache.layout.resident = tuple(f for f in cache.layout.resident if f != 1)

        assert "the sinks are [0, 1], the first resident frames [0, 8]" in self.corrupted(change)

    def test_a_frame_in_the_wrong_format(self) -> None:
        """A sink that is to be kept in 16 bits lies among the INT8 pages."""

        def change(cache: KVCache) -> None:
            cache.table[0], cache.table[8] = cache.table[8], cache.table[0]

        assert "frame 0" in self.corrupted(change, "int8,window=9,sink=2,keep_sinks")

    @pytest.mark.parametrize("buffer", ["k", "v", "k_scale"])
    def test_a_pool_whose_buffers_have_shrunk(self, buffer: str) -> None:
        def change(cache: KVCache) -> None:
            storage = cache.pools["pages"].storage
            storage[buffer] = storage[buffer][:, :-1]

        assert buffer in self.corrupted(change)


class TestBytes:
    @pytest.mark.parametrize("format", FORMATS)
    @pytest.mark.parametrize("value_scale", ["token", "channel"])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
    @pytest.mark.parametrize("size", [(9, 2), (5, 2), (3, 0), (30, 0)], ids=str)
    @pytest.mark.parametrize("batch", [1, 3])
    def test_planned_is_allocated(
        self, format: str, value_scale: str, dtype: torch.dtype, size: tuple[int, int], batch: int
    ) -> None:
        window, sink = size
        spec = CacheSpec.parse(f"{format},value_scale={value_scale},window={window},sink={sink}")
        geometry = build_geometry(batch=batch)
        cache = KVCache(spec, geometry, dtype=dtype)
        storages = [
            b.untyped_storage() for pool in cache.pools.values() for b in pool.storage.values() if b.numel()
        ]
        means = sum(mean.nbytes for mean in cache.means.values())
        assert (
            cache.nbytes == planned_bytes(spec, geometry, dtype) == sum(s.nbytes() for s in storages) + means
        )

    def test_figure_of_the_issue(self) -> None:
        """45 frames attended: 42 pages in each of 30 layers."""
        geometry = CacheGeometry(layers=30, kv_heads=12, head_dim=128, height=30, width=52)
        spec = CacheSpec.parse("bf16,window=45,sink=0")
        assert planned_bytes(spec, geometry) == 12_076_646_400
        assert planned_bytes(CacheSpec.parse("int8,window=45,sink=0"), geometry) <= 0.53 * 12_076_646_400

    @pytest.mark.parametrize("head_dim", [64, 128])
    @pytest.mark.parametrize("value_scale", ["token", "channel"])
    @pytest.mark.parametrize("tokens", [(4, 4), (30, 52)], ids=str)
    def test_an_int8_page_beside_a_bf16_page(
        self, head_dim: int, value_scale: str, tokens: tuple[int, int]
    ) -> None:
        geometry = build_geometry(head_dim=head_dim, height=tokens[0], width=tokens[1])
        pages = {
            f: KVCache(
                CacheSpec.parse(f"{f},value_scale={value_scale},window=4,sink=0"), geometry
            ).bytes_per_frame
            for f in ("bf16", "int8")
        }
        small_page_of_channel_scales = value_scale == "channel" and tokens == (4, 4)
        assert pages["int8"] <= (0.58 if small_page_of_channel_scales else 0.53) * pages["bf16"]
        assert pages["bf16"] == 2 * 2 * geometry.layers * geometry.kv_heads * geometry.tokens * head_dim

    @pytest.mark.parametrize("format", FORMATS)
    def test_every_slot_is_needed_at_some_time(self, format: str) -> None:
        """The plan is tight: each pool is full once."""
        cache, oracle = KVCache(CacheSpec.parse(f"{format},window=11,sink=4"), TINY), None
        oracle = Oracle(cache.spec, TINY)
        most = dict.fromkeys(cache.pools, 0)
        for i in range(8):
            step(cache, oracle, 3, i)
            for name, pool in cache.pools.items():
                most[name] = max(most[name], sum(map(bool, pool.references)))
        assert most == {name: pool.slots for name, pool in cache.pools.items()}

    @pytest.mark.parametrize("format", FORMATS)
    def test_reads_are_counted(self, format: str) -> None:
        cache, _ = filled(f"{format},window=11,sink=2", 5)
        cache.pages_read = cache.lossy_pages_read = 0
        cache.begin(3)
        read_all(cache, 0)
        lossy = sum(page.pool == "pages" for page in cache.table.values()) if "int8" in format else 0
        assert (cache.pages_read, cache.lossy_pages_read) == (8, lossy)


class TestFork:
    def test_pages_are_shared_until_each_has_moved_on(self) -> None:
        cache, oracle = filled("int8,window=12,sink=3", 4)
        other, twin = cache.fork(), oracle.fork()
        assert other.table == cache.table
        assert set(cache.pools["pages"].references[page.slot] for page in cache.table.values()) == {2}
        step(cache, oracle, 3, 500)
        step(other, twin, 3, 600)
        shared = {p for p in cache.table.values()} & {p for p in other.table.values()}
        assert len(shared) == 6
        for i in range(4):
            step(cache, oracle, 3, 501 + i)
            step(other, twin, 3, 601 + i)
        assert {p for p in cache.table.values()} & {p for p in other.table.values()} == {
            cache.table[f] for f in range(3)
        }
        pools_are_consistent([cache, other])

    def test_room_for_both_is_there(self) -> None:
        """Memory doubles once, in one step, and a closed fork's part is used by the next."""
        cache, oracle = filled("fp32,window=9,sink=0", 4)
        alone = cache.nbytes
        for i in range(3):
            other, twin = cache.fork(), oracle.fork()
            for j in range(4):
                step(other, twin, 3, 100 * i + j)
                step(cache, oracle, 3, 100 * i + j + 50)
            other.close()
            pools_are_consistent([cache])
        assert cache.nbytes == 2 * alone

    def test_the_original_may_end_first(self) -> None:
        cache, oracle = filled("fp32,window=9,sink=2", 4)
        other, twin = cache.fork(), oracle.fork()
        cache.close()
        for i in range(5):
            step(other, twin, 3, i)
        pools_are_consistent([other])
        with pytest.raises(CacheStateError):
            cache.begin(3)

    @pytest.mark.parametrize("format", FORMATS)
    def test_a_dropped_fork_gives_its_room_back(self, format: str) -> None:
        cache, oracle = filled(f"{format},window=9,sink=2", 4)
        references = {name: list(pool.references) for name, pool in cache.pools.items()}
        sizes = []
        for i in range(5):
            other = cache.fork()
            step(other, oracle.fork(), 3, i)
            del other
            sizes.append(cache.nbytes)
            for name, pool in cache.pools.items():
                assert pool.reserved == len(references[name])
                assert pool.references[: len(references[name])] == references[name]
        assert len(set(sizes)) == 1
        pools_are_consistent([cache])
        step(cache, oracle, 3, 99)

    def test_a_closed_cache_holds_no_memory(self) -> None:
        cache, _ = filled("fp32,window=9,sink=2", 4)
        cache.close()
        assert cache.nbytes == 0

    def test_closing_twice_is_closing_once(self) -> None:
        cache, _ = filled("fp32,window=9,sink=2", 4)
        other = cache.fork()
        reserved = cache.pools["pages"].reserved
        other.close()
        other.close()
        assert cache.pools["pages"].reserved == reserved - 6
        pools_are_consistent([cache])


class TestRestore:
    def test_state_is_a_copy(self) -> None:
        """Going on, or restoring something else, does not change a state taken before."""
        cache, oracle = filled("int8,window=9,sink=2", 3)
        tensors, header = cache.state_tensors()
        before = {name: tensor.clone() for name, tensor in tensors.items()}
        other, _ = filled("int8,window=9,sink=2", 0)
        step(other, Oracle(other.spec, TINY), 3, 1234)
        cache.restore(*other.state_tensors())
        for name, tensor in tensors.items():
            assert torch.equal(tensor, before[name]), name
        cache.restore(tensors, header)
        step(cache, oracle, 3, 3)

    @pytest.mark.parametrize(
        "other", ["int8,window=9,sink=2", "fp32,window=10,sink=2", "fp32,window=9,sink=2,positions=absolute"]
    )
    def test_other_settings(self, other: str) -> None:
        cache, _ = filled("fp32,window=9,sink=2", 3)
        target, _ = filled(other, 0)
        with pytest.raises(StateError) as caught:
            target.restore(*cache.state_tensors())
        assert str(cache.spec) in str(caught.value) and str(target.spec) in str(caught.value)

    @pytest.mark.parametrize(
        "change", [{"layers": 3}, {"kv_heads": 2}, {"head_dim": 4}, {"width": 3}, {"batch": 2}], ids=str
    )
    def test_other_models(self, change: dict[str, int]) -> None:
        cache, _ = filled("int8,window=9,sink=2", 3)
        target, oracle = filled("int8,window=9,sink=2", 2, build_geometry(**{**vars(TINY), **change}))
        with pytest.raises(StateError, match="restore with the model and size"):
            target.restore(*cache.state_tensors())
        # a refused state has changed nothing
        pools_are_consistent([target])
        step(target, oracle, 3, 8)

    @pytest.mark.parametrize("damage", ["missing", "short", "mean", "pool"])
    def test_incomplete_states(self, damage: str) -> None:
        cache, _ = filled("int8,window=9,sink=2", 3)
        tensors, header = cache.state_tensors()
        if damage == "missing":
            del tensors["pages.v_scale"]
        elif damage == "short":
            tensors = {name: t[:, :-1] if name.startswith("pages") else t for name, t in tensors.items()}
        elif damage == "mean":
            tensors["key_mean"] = tensors["key_mean"][:1]
        else:
            header["resident"] = [[frame, "attic"] for frame, _ in header["resident"]]
        target, oracle = filled("int8,window=9,sink=2", 2)
        with pytest.raises(StateError):
            target.restore(tensors, header)
        pools_are_consistent([target])
        step(target, oracle, 3, 8)

    def test_an_empty_cache_can_be_saved(self) -> None:
        cache = KVCache(CacheSpec.parse("int8,window=9,sink=2,keep_newest"), TINY)
        other, _ = filled("int8,window=9,sink=2,keep_newest", 3)
        other.restore(*cache.state_tensors())
        assert other.layout.next_frame == 0 and not other.table
        pools_are_consistent([other])
        step(other, Oracle(other.spec, TINY), 3, 9)


class TestPool:
    @pytest.fixture
    def pool(self) -> Iterator[PagePool]:
        format, slots = planned_pools(CacheSpec.parse("fp32,window=5,sink=0"), TINY, torch.float32)["pages"]
        yield PagePool(format, slots, "cpu")

    def test_a_full_pool(self, pool: PagePool) -> None:
        assert [pool.acquire(), pool.acquire()] == [0, 1]
        with pytest.raises(CacheStateError, match="all 2 slots"):
            pool.acquire()

    def test_counts(self, pool: PagePool) -> None:
        slot = pool.acquire()
        pool.retain(slot)
        pool.release(slot)
        assert pool.acquire() != slot
        pool.release(slot)
        assert pool.acquire() == slot
        with pytest.raises(CacheStateError, match="slot 0 is released more often"):
            pool.release(slot)
            pool.release(slot)
        with pytest.raises(CacheStateError, match="slot 0 is free"):
            pool.retain(slot)

    def test_growing_keeps_the_bytes(self, pool: PagePool) -> None:
        slot = pool.acquire()
        pool.storage["k"][:, slot] = 3.5
        before = pool.nbytes
        pool.reserve(2)
        assert pool.nbytes == 2 * before and pool.slots == 4
        assert bool((pool.storage["k"][:, slot] == 3.5).all())
        pool.cancel(2)
        pool.reserve(2)
        assert pool.slots == 4


class TestForget:
    """Frames that are dropped between two chunks, and a next chunk that begins elsewhere."""

    @pytest.mark.parametrize("format", FORMATS)
    @pytest.mark.parametrize("positions", ["relative", "absolute"])
    def test_the_others_stay(self, format: str, positions: str) -> None:
        """Byte for byte, in order; later chunks read them and fill the room."""
        cache, oracle = filled(f"{format},window=11,sink=2,segment=3,positions={positions}", 5)
        kept = {frame: page_hash(cache, frame) for frame in (0, 1, 10, 14)}
        # one that has left, one never seen, and one twice
        cache.forget([9, 11, 12, 13, 13, 3, 99])
        oracle.frames = [frame for frame in oracle.frames if frame.index in kept]
        assert cache.layout.resident == tuple(kept) and cache.layout.sinks == (0, 1)
        assert {frame: page_hash(cache, frame) for frame in cache.layout.resident} == kept
        cache.check_integrity()
        pools_are_consistent([cache])
        for i in range(4):
            poison_free_slots(cache)
            step(cache, oracle, 3, 10 * i)
            pools_are_consistent([cache])

    @given(settings_of_a_cache(), st.data())
    @settings(max_examples=40)
    def test_whatever_is_dropped(self, config: tuple[CacheSpec, CacheGeometry], data: st.DataObject) -> None:
        spec, geometry = config
        cache, oracle = KVCache(spec, geometry), Oracle(spec, geometry)
        for i in range(12):
            step(cache, oracle, data.draw(st.integers(1, geometry.chunk_frames)), 10 * i)
            free = [frame for frame in cache.layout.resident if frame not in cache.layout.sinks]
            dropped = data.draw(st.sets(st.sampled_from(free))) if free else set()
            cache.forget(dropped)
            oracle.frames = [frame for frame in oracle.frames if frame.index not in dropped]
            cache.check_integrity()
            pools_are_consistent([cache])
            poison_free_slots(cache)

    def test_sinks_too(self) -> None:
        """Then the next frames become sinks, wherever they are."""
        cache, _ = filled("int8,window=9,sink=2,keep_sinks", 4)
        cache.forget(cache.layout.resident)
        assert not cache.table and cache.layout.resident == cache.layout.sinks == ()
        cache.check_integrity()
        cache.seek(30)
        oracle = Oracle(cache.spec, TINY, mean=cache.means.get("key_mean"))
        oracle.next_frame = 30
        keys, values = chunk_tensors(TINY, 3, 5)
        assert cache.begin(3).start == 30
        with cache.committing():
            for layer in range(TINY.layers):
                cache.write(layer, keys[layer], values[layer])
        assert cache.layout.resident == (30, 31, 32) and cache.layout.sinks == (30, 31)
        assert [cache.table[frame].pool for frame in (30, 31, 32)] == ["full", "full", "pages"]
        cache.check_integrity()
        pools_are_consistent([cache])

    def test_nothing(self) -> None:
        cache, oracle = filled("int8,window=9,sink=2", 4)
        cache.forget([])
        cache.forget([100])
        step(cache, oracle, 3, 8)

    def test_in_one_branch_alone(self) -> None:
        cache, oracle = filled("int8,window=9,sink=2,keep_newest", 4)
        other, other_oracle = cache.fork(), oracle.fork()
        other.forget([8, 9, 10])
        other_oracle.frames = [frame for frame in other_oracle.frames if frame.index in (0, 1, 11)]
        pools_are_consistent([cache, other])
        for i in range(3):
            step(cache, oracle, 3, 20 + i)
            step(other, other_oracle, 3, 30 + i)
            pools_are_consistent([cache, other])

    def test_survives_saving(self) -> None:
        cache, oracle = filled("int8,window=9,sink=2", 4)
        cache.forget([9, 10, 11])
        cache.seek(20)
        oracle.frames = [frame for frame in oracle.frames if frame.index < 9]
        oracle.next_frame = 20
        other, _ = filled("int8,window=9,sink=2", 2)
        other.restore(*cache.state_tensors())
        other.check_integrity()
        for both in (cache, other):
            step(both, oracle.fork(), 3, 8)
        assert cache.layout.resident == other.layout.resident == (0, 1, 8, 20, 21, 22)

    def test_seeking_behind_what_is_resident(self) -> None:
        cache, oracle = filled("fp32,window=9,sink=2", 4)
        for frame in (0, 8, 11):
            with pytest.raises(CacheStateError, match=f"frame {frame} does not lie behind"):
                cache.seek(frame)
        step(cache, oracle, 3, 8)
        cache.forget([frame for frame in cache.layout.resident if frame > 1])
        cache.seek(2)
        assert cache.begin(3).start == 2
        cache.abandon()
        cache.check_integrity()

    @pytest.mark.parametrize("enter_state", ["open", "closed"])
    def test_only_between_chunks(self, enter_state: str) -> None:
        cache, _ = filled("fp32,window=9,sink=2", 2)
        if enter_state == "open":
            cache.begin(3)
        else:
            cache.close()
        with pytest.raises(CacheStateError, match=f"the cache is {enter_state}"):
            cache.forget([0])
        with pytest.raises(CacheStateError, match=f"the cache is {enter_state}"):
            cache.seek(50)


class TestAtOnce:
    @pytest.mark.parametrize("format", FORMATS)
    @pytest.mark.parametrize("frames", [4, 7, 9])
    def test_more_than_a_chunk(self, format: str, frames: int) -> None:
        """Of what does not fit, the sinks and the newest stay; chunks after it are as usual."""
        cache = KVCache(CacheSpec.parse(f"{format},window=9,sink=2"), TINY)
        oracle = Oracle(cache.spec, TINY)
        keys, values = chunk_tensors(TINY, frames, 3)
        assert cache.begin(frames, at_once=True).frames == frames
        with cache.committing():
            for layer in range(TINY.layers):
                cache.write(layer, keys[layer], values[layer])
        oracle.commit(keys, values)
        cache.check_integrity()
        pools_are_consistent([cache])
        assert cache.layout.sinks == (0, 1)
        for i in range(3):
            poison_free_slots(cache)
            step(cache, oracle, 3, 10 * i)

    def test_no_more_than_the_window(self) -> None:
        cache, oracle = filled("fp32,window=9,sink=2", 2)
        with pytest.raises(CacheStateError, match="a chunk of 10 latent frames; this cache takes 1 to 9"):
            cache.begin(10, at_once=True)
        with pytest.raises(CacheStateError, match="a chunk of 4 latent frames; this cache takes 1 to 3"):
            cache.begin(4)
        with pytest.raises(CacheStateError, match="a chunk of 0 latent frames"):
            cache.begin(0, at_once=True)
        step(cache, oracle, 3, 8)
