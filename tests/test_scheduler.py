"""Many rollouts by turns on one device, each bit for bit what it is alone."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.tiny import HEIGHT, LATENT_SIZE, WIDTH, build_pipeline, build_text, build_transformer
from vidkv.cache import CacheGeometry, CacheSpec, planned_bytes
from vidkv.errors import Cancelled, InputError, ResourceError
from vidkv.pipeline import CausalVideoPipeline
from vidkv.rollout import Chunk, Rollout
from vidkv.schedule import FlowSchedule
from vidkv.scheduler import Entry, Need, Scheduler, Turn
from vidkv.sharing import Pools, PrefixCache

SPECS = ("fp32,window=9,sink=2", "int8,window=9,sink=2,keep_newest,keep_sinks", "fp32,window=8,sink=1")
MODEL = build_transformer()
TEXTS = build_text(MODEL), build_text(MODEL, seed=1)


def need_of(spec: str, caches: int = 1, **bytes: int) -> Need:
    geometry = CacheGeometry.of_model(MODEL.config, *LATENT_SIZE[1:], 3, 1)
    return Need(CacheSpec.parse(spec), geometry, torch.device("cpu"), torch.float32, caches, **bytes)


def room(spec: str, caches: int = 1) -> int:
    need = need_of(spec)
    return caches * planned_bytes(need.spec, need.geometry, need.dtype)


def rollout_of(spec: str, seed: int, guidance: float = 1.0, pools: Pools | None = None) -> Rollout:
    rollout = Rollout(
        MODEL, TEXTS[0], CacheSpec.parse(spec), FlowSchedule(steps=(1000,), guidance=guidance), LATENT_SIZE,
        [seed], pools=None if pools is None else pools.of(*need_of(spec).kind),
    )  # fmt: skip
    if guidance != 1:
        rollout.set_text(TEXTS[0], TEXTS[1])
    return rollout


@lru_cache(maxsize=64)
def alone(spec: str, seed: int, chunks: int, guidance: float = 1.0, switch: int | None = None) -> list[Any]:
    rollout = rollout_of(spec, seed, guidance)
    return list(Video(rollout, chunks, switch))


class Video:
    """A video of so many chunks.

    Args:
        switch: the chunk with which a lerp to another prompt begins.
        fails: what happens instead of a chunk.
    """

    def __init__(
        self, rollout: Rollout, chunks: int, switch: int | None = None,
        fails: tuple[int, BaseException] | None = None,
    ) -> None:  # fmt: skip
        self.rollout, self.chunks, self.switch, self.fails, self.closed = (
            rollout,
            chunks,
            switch,
            fails,
            False,
        )

    def __iter__(self) -> Video:
        return self

    def __next__(self) -> Chunk:
        chunk = self.rollout.chunk
        if chunk == self.chunks:
            raise StopIteration
        if self.fails and self.fails[0] == chunk:
            raise self.fails[1]
        if chunk == self.switch:
            self.rollout.switch(TEXTS[1], strategy="lerp", chunks=3)
        return self.rollout.step_chunk()

    def close(self) -> None:
        self.closed = True
        self.rollout.close()


class Ticks:
    """A clock that a turn moves on by one second."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        self.now += 0.5
        return 2 * self.now


def scheduler_of(budget: int | None = None, patience: float = 0.0, **options: Any) -> Scheduler[Chunk]:
    return Scheduler(Pools(), budget, patience, clock=Ticks(), **options)


def add(
    scheduler: Scheduler[Chunk], seed: int, spec: str = SPECS[0], chunks: int = 5, guidance: float = 1.0,
    switch: int | None = None, fails: tuple[int, BaseException] | None = None, **bytes: int,
) -> Entry[Chunk]:  # fmt: skip
    def begin() -> Video:
        return Video(rollout_of(spec, seed, guidance, scheduler.pools), chunks, switch, fails)

    return scheduler.add(str(seed), begin, need_of(spec, 1 if guidance == 1 else 2, **bytes))


def finish(scheduler: Scheduler[Chunk]) -> list[Turn[Chunk]]:
    turns = []
    while (turn := scheduler.step()) is not None:
        turns.append(turn)
        if scheduler.budget_bytes is not None:
            assert scheduler.held_bytes <= scheduler.budget_bytes
    assert scheduler.entries == [] and scheduler.pools.nbytes == 0
    return turns


def latents(turns: list[Turn[Chunk]], name: str) -> torch.Tensor:
    return torch.cat([t.chunk.latents for t in turns if t.entry.name == name and t.chunk is not None], 1)


def is_alone(turns: list[Turn[Chunk]], seed: int, *arguments: Any) -> bool:
    wanted = torch.cat([chunk.latents for chunk in alone(*arguments)], 1)
    return torch.equal(latents(turns, str(seed)), wanted)


def order(turns: list[Turn[Chunk]]) -> str:
    return "".join(turn.entry.name for turn in turns if turn.chunk is not None)


class TestTurns:
    def test_one_chunk_each(self) -> None:
        scheduler = scheduler_of()
        for seed in (1, 2, 3):
            add(scheduler, seed, chunks=seed)
        turns = finish(scheduler)
        assert order(turns) == "123233"
        assert [turn.entry.name for turn in turns if turn.ended] == ["1", "2", "3"]
        for seed in (1, 2, 3):
            assert is_alone(turns, seed, SPECS[0], seed, seed)

    def test_by_time_not_by_chunks(self) -> None:
        """One whose chunks take three times as long has one for three of the other's."""
        scheduler = scheduler_of()
        clock = scheduler.clock

        def slow() -> Video:
            video = Video(rollout_of(SPECS[0], 1, pools=scheduler.pools), 3)
            step = video.rollout.step_chunk

            def stepped() -> Chunk:
                clock(), clock()
                return step()

            video.rollout.step_chunk = stepped  # type: ignore[method-assign]
            return video

        scheduler.add("1", slow, need_of(SPECS[0]))
        add(scheduler, 2, chunks=9)
        assert order(finish(scheduler)) == "122212221222"[: 3 + 9]

    def test_who_comes_later_does_not_take_it_all(self) -> None:
        scheduler = scheduler_of()
        add(scheduler, 1, chunks=6)
        for _ in range(3):
            scheduler.step()
        add(scheduler, 2, chunks=3)
        assert order(finish(scheduler)) == "121212"

    def test_nothing_to_do(self) -> None:
        assert scheduler_of().step() is None

    @pytest.mark.parametrize(("name", "value"), [("budget_bytes", -1), ("patience_s", float("nan"))])
    def test_arguments(self, name: str, value: float) -> None:
        with pytest.raises(InputError, match=f"{name}={value}"):
            Scheduler(Pools(), **{name: value})  # type: ignore[arg-type]


class TestRoom:
    def test_who_does_not_fit_waits_in_line(self) -> None:
        scheduler = scheduler_of(2 * room(SPECS[0]), patience=100)
        entries = [add(scheduler, seed, chunks=3) for seed in (1, 2, 3, 4)]
        scheduler.step(), scheduler.step(), scheduler.step()
        assert scheduler.waiting == entries[2:]
        assert [scheduler.place(entry) for entry in entries] == [0, 0, 0, 1]
        turns = finish(scheduler)
        # who has waited has had nothing: it has all turns until it has had as much
        assert order(turns) == "212333444" and scheduler.parkings == 0

    def test_too_large_for_ever(self) -> None:
        scheduler = scheduler_of(room(SPECS[0]) - 1)
        with pytest.raises(ResourceError, match="1 needs"):
            add(scheduler, 1)
        assert scheduler.entries == []

    def test_what_is_kept_beside_the_pages_counts(self) -> None:
        """And what a chunk takes counts once, for the one that takes most."""
        one = room(SPECS[0])
        for budget, together in ((2 * one + 2 * 500 + 70, True), (2 * one + 2 * 500 + 69, False)):
            scheduler = scheduler_of(budget, patience=100)
            add(scheduler, 1, chunks=2, lasting_bytes=500, passing_bytes=70)
            add(scheduler, 2, chunks=2, lasting_bytes=500, passing_bytes=30)
            assert order(finish(scheduler)) == ("1212" if together else "1122")

    def test_a_pool_has_room_for_all_from_the_start(self) -> None:
        """So that it is never copied, which would take its size once more."""
        scheduler = scheduler_of(3 * room(SPECS[0]))
        for seed in (1, 2, 3, 4):
            add(scheduler, seed, chunks=1)
        scheduler.step()
        assert scheduler.pools.nbytes == 3 * room(SPECS[0])

    @pytest.mark.parametrize("spec", SPECS)
    def test_parked_for_others(self, spec: str) -> None:
        """Room for one of three: all advance, and nobody can tell."""
        scheduler = scheduler_of(room(spec))
        for seed in (1, 2, 3):
            add(scheduler, seed, spec, 5)
        turns = finish(scheduler)
        # among equals who is there stays
        assert order(turns) == "123312213312213" and scheduler.parkings == 10
        for seed in (1, 2, 3):
            assert is_alone(turns, seed, spec, seed, 5)

    @pytest.mark.parametrize("budget", [1, 3])
    def test_pages_that_may_leave_the_device(self, budget: int) -> None:
        """Each video's lie in pools of its own, and count as what they take on the device."""
        spec = "int8,window=24,sink=2,segment=1,device_gb=1.2e-5"
        assert need_of(spec).bytes == room(spec) < room("int8,window=24,sink=2,segment=1") / 2
        scheduler = scheduler_of(budget * room(spec))
        for seed in (1, 2, 3):
            add(scheduler, seed, spec, chunks=9)
        turns = finish(scheduler)
        assert (scheduler.parkings > 0) is (budget == 1)
        for seed in (1, 2, 3):
            assert is_alone(turns, seed, "int8,window=24,sink=2,segment=1", seed, 9)

    def test_not_before_it_has_waited(self) -> None:
        scheduler = scheduler_of(room(SPECS[0]), patience=2)
        add(scheduler, 1, chunks=6), add(scheduler, 2, chunks=6)
        assert order(finish(scheduler)) == "111222222111"

    def test_guided_and_on_the_way_to_another_prompt(self) -> None:
        scheduler = scheduler_of(2 * room(SPECS[1]))
        add(scheduler, 1, SPECS[1], 5, 2.0), add(scheduler, 2, SPECS[1], 5, 1.0, 1)
        turns = finish(scheduler)
        assert scheduler.parkings
        assert is_alone(turns, 1, SPECS[1], 1, 5, 2.0) and is_alone(turns, 2, SPECS[1], 2, 5, 1.0, 1)

    def test_of_another_kind(self) -> None:
        """Their pages cannot lie together, so a pool has to go before the other comes."""
        scheduler = scheduler_of(room(SPECS[0], 2))
        add(scheduler, 1, SPECS[0]), add(scheduler, 2, SPECS[0]), add(scheduler, 3, SPECS[2])
        turns = finish(scheduler)
        for seed, spec in ((1, SPECS[0]), (2, SPECS[0]), (3, SPECS[2])):
            assert is_alone(turns, seed, spec, seed, 5)
        assert order(turns)[:3] == "123"


class TestApart:
    @pytest.mark.parametrize("error", [ValueError("broken"), Cancelled("enough")], ids=str)
    @pytest.mark.parametrize("budget", [1, 3])
    def test_an_error_is_its_own(self, error: Exception, budget: int) -> None:
        scheduler = scheduler_of(budget * room(SPECS[0]))
        add(scheduler, 1), add(scheduler, 2, fails=(2, error)), add(scheduler, 3)
        turns = finish(scheduler)
        assert [(t.entry.name, t.error) for t in turns if t.error] == [("2", error)]
        assert order(turns).count("2") == 2
        assert is_alone(turns, 1, SPECS[0], 1, 5) and is_alone(turns, 3, SPECS[0], 3, 5)

    def test_one_that_cannot_begin(self) -> None:
        scheduler = scheduler_of()

        def begin() -> Video:
            raise ResourceError("no networks")

        scheduler.add("x", begin, need_of(SPECS[0]))
        add(scheduler, 1)
        turns = finish(scheduler)
        assert [str(t.error) for t in turns if t.error] == ["no networks"] and is_alone(
            turns, 1, SPECS[0], 1, 5
        )

    def test_an_interrupt_ends_the_turn(self) -> None:
        scheduler = scheduler_of()
        add(scheduler, 1, fails=(1, KeyboardInterrupt())), add(scheduler, 2)
        with pytest.raises(KeyboardInterrupt):
            finish(scheduler)
        assert [entry.name for entry in scheduler.entries] == ["2"]
        assert order(finish(scheduler)) == "2222"

    @pytest.mark.parametrize("parked", [False, True])
    def test_removed(self, parked: bool) -> None:
        scheduler = scheduler_of(room(SPECS[0]) if parked else None)
        entries = [add(scheduler, seed) for seed in (1, 2)]
        turns = [scheduler.step() for _ in range(2)]
        assert entries[0].parked is parked
        scheduler.remove(entries[0]), scheduler.remove(entries[0])
        rest = finish(scheduler)
        assert order(rest) == "2222"
        assert is_alone([*(t for t in turns if t), *rest], 2, SPECS[0], 2, 5)

    def test_closed(self) -> None:
        scheduler = scheduler_of()
        entries = [add(scheduler, seed) for seed in (1, 2)]
        scheduler.step()
        scheduler.close()
        assert scheduler.step() is None and scheduler.pools.nbytes == 0
        assert entries[1].rollout is None

    def test_no_room_on_the_way_back(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """It is told, and the others go on."""
        scheduler = scheduler_of(room(SPECS[0]))
        first = add(scheduler, 1)
        add(scheduler, 2)
        for _ in range(2):
            scheduler.step()
        assert first.parked and first.rollout is not None

        def full(*args: Any) -> None:
            raise ResourceError("no room")

        monkeypatch.setattr(first.rollout, "restore", full)
        turns = finish(scheduler)
        assert [(t.entry.name, str(t.error)) for t in turns if t.error] == [("1", "no room")]
        assert order(turns) == "2222"


acts = st.lists(
    st.tuples(
        st.sampled_from(["add", "step", "step", "step", "remove", "park"]), st.integers(0, 5),
    ),
    max_size=25,
)  # fmt: skip


class TestAnySchedule:
    @given(acts=acts, budget=st.sampled_from([1, 2, 3, None]), patience=st.sampled_from([0, 1.5, 100]))
    @settings(max_examples=25)
    def test_bit_for_bit(self, acts: list[tuple[str, int]], budget: int | None, patience: float) -> None:
        """Videos come, go, are cancelled and parked in any order."""
        specs = SPECS[0], SPECS[2]
        scheduler = scheduler_of(budget and budget * room(SPECS[0]), patience)
        turns, gone = list[Turn[Chunk]](), set[int]()
        seeds = iter(range(100))
        for act, number in acts:
            entries = scheduler.entries
            if act == "add" and len(entries) < 4:
                seed = next(seeds)
                add(scheduler, seed, specs[number % 2], 1 + number % 4)
                scheduler.entries[-1].name = f"{seed}:{number}"
            elif act == "step":
                turns += filter(None, [scheduler.step()])
            elif entries and act == "remove":
                entry = entries[number % len(entries)]
                gone.add(int(entry.name.split(":")[0]))
                scheduler.remove(entry)
            elif entries and act == "park":
                rollout = entries[number % len(entries)].rollout
                if rollout is not None:
                    rollout.park()
        turns += finish(scheduler)
        for name in {turn.entry.name for turn in turns}:
            seed, number = (int(part) for part in name.split(":"))
            wanted = alone(specs[number % 2], seed, 1 + number % 4)
            found = [t.chunk for t in turns if t.entry.name == name and t.chunk is not None]
            assert len(found) == len(wanted) or seed in gone
            for chunk, right in zip(found, wanted, strict=False):
                assert torch.equal(chunk.latents, right.latents)


@pytest.fixture(scope="module")
def pipe() -> CausalVideoPipeline:
    return build_pipeline()


class TestStreams:
    """Whole videos, decoded and sharing their beginnings."""

    def test_beginnings_are_shared_under_pressure(self, pipe: CausalVideoPipeline) -> None:
        requests: list[dict[str, Any]] = [
            {"prompt": "a red circle bouncing"},
            {"prompt": [(0.0, "a red circle bouncing"), (1.3, "a blue square resting")]},
            {"prompt": "a red circle bouncing", "seed": 8},
        ]
        common = {"height": HEIGHT, "width": WIDTH, "num_frames": 57, "cache": SPECS[1]}
        wanted = [list(pipe.stream(**common, **request)) for request in requests]
        pipe.pools, pipe.prefixes = Pools(), PrefixCache(10**8)
        try:
            plan = pipe.estimate_memory(HEIGHT, WIDTH, SPECS[1])
            rollout = pipe.rollout(HEIGHT, WIDTH, cache=SPECS[1])
            cache = rollout.cache
            need = Need.of_plan(plan, cache.spec, cache.geometry, cache.device, cache.dtype)
            rollout.close()
            scheduler: Scheduler[Chunk] = Scheduler(
                pipe.pools, int(2.5 * need.bytes), 0.0, pipe.prefixes, Ticks()
            )
            found: dict[str, list[Chunk]] = {}
            for number, request in enumerate(requests):
                scheduler.add(str(number), lambda r=request: pipe.stream(**common, **r), need)  # type: ignore[misc]
            while (turn := scheduler.step()) is not None:
                assert turn.error is None
                if turn.chunk is not None:
                    found.setdefault(turn.entry.name, []).append(turn.chunk)
            assert pipe.prefixes.hits >= 1
        finally:
            pipe.pools = pipe.prefixes = None
        for number, chunks in enumerate(wanted):
            for chunk, right in zip(found[str(number)], chunks, strict=True):
                assert chunk.frames is not None and right.frames is not None
                assert torch.equal(chunk.latents, right.latents) and torch.equal(chunk.frames, right.frames)

    def test_what_is_remembered_goes_before_anybody_is_parked(self, pipe: CausalVideoPipeline) -> None:
        """And fills only what no video needs."""
        common: dict[str, Any] = {"height": HEIGHT, "width": WIDTH, "num_frames": 33, "cache": SPECS[0]}
        prompt, one = "a red circle bouncing", room(SPECS[0])
        pipe.pools, pipe.prefixes = Pools(), PrefixCache(10**8, grow=False)
        scheduler: Scheduler[Chunk] = Scheduler(pipe.pools, 4 * one, 100.0, pipe.prefixes, Ticks())
        try:
            for seed in (1, 2):
                request = common | {"seed": seed, "prompt": prompt}
                scheduler.add(str(seed), _begin(pipe, request), need_of(SPECS[0]))
            for _ in range(4):
                scheduler.step()
                assert scheduler.held_bytes <= 4 * one
            # twelve pages of room, three for each of two chunks of two videos
            assert len(pipe.prefixes) == 4
            scheduler.add("3", _begin(pipe, common | {"seed": 3, "prompt": prompt}), need_of(SPECS[0]))
            before = set(pipe.prefixes._kept)
            while not scheduler.entries[2].begun:
                scheduler.step()
            assert not before & set(pipe.prefixes._kept) and scheduler.parkings == 0
            assert scheduler.held_bytes <= 4 * one
        finally:
            scheduler.close()
            pipe.pools = pipe.prefixes = None

    def test_what_is_remembered_stays_where_forgetting_would_not_help(
        self, pipe: CausalVideoPipeline
    ) -> None:
        """A third video waits for one of two to end, not for their beginnings."""
        common: dict[str, Any] = {"height": HEIGHT, "width": WIDTH, "num_frames": 33, "cache": SPECS[0]}
        pipe.pools, pipe.prefixes = Pools(), PrefixCache(10**8, chunks=1, grow=False)
        budget = room(SPECS[0]) * 5 // 2
        scheduler: Scheduler[Chunk] = Scheduler(pipe.pools, budget, 100.0, pipe.prefixes, Ticks())
        try:
            for seed in (1, 2, 3):
                request = common | {"seed": seed, "prompt": "a red circle bouncing"}
                scheduler.add(str(seed), _begin(pipe, request), need_of(SPECS[0]))
            for _ in range(4):
                scheduler.step()
                assert scheduler.held_bytes <= budget
            assert not scheduler.entries[2].begun and len(pipe.prefixes) == 1
        finally:
            scheduler.close()
            pipe.pools = pipe.prefixes = None


def _begin(pipe: CausalVideoPipeline, request: dict[str, Any]) -> Callable[[], Any]:
    return lambda: pipe.stream(**request)
