"""Many rollouts on one device: turns of a chunk each, within a budget of bytes."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar

import torch

from vidkv.cache import CacheGeometry, CacheSpec
from vidkv.cache.kv_cache import planned_bytes
from vidkv.cache.pool import PagePool
from vidkv.errors import InputError, ResourceError
from vidkv.memory import MemoryPlan, gigabytes
from vidkv.rollout import Rollout
from vidkv.sharing import Pools, PoolSet, PrefixCache, pages_bytes

PATIENCE_S = 20.0
"""How far behind a rollout may fall before another is parked for it: parking copies a whole cache twice."""

T = TypeVar("T")
T_co = TypeVar("T_co", covariant=True)


@dataclass(frozen=True)
class Need:
    """What a rollout takes of a device.

    Attributes:
        spec, geometry, device, dtype: of its caches.
        caches: one, or two with guidance.
        lasting_bytes: what it keeps beside its caches while it is on the device.
        passing_bytes: what making a chunk takes for a while; of all rollouts the most counts once.
    """

    spec: CacheSpec
    geometry: CacheGeometry
    device: torch.device
    dtype: torch.dtype
    caches: int = 1
    lasting_bytes: int = 0
    passing_bytes: int = 0

    @classmethod
    def of_plan(
        cls, plan: MemoryPlan, spec: CacheSpec, geometry: CacheGeometry, device: torch.device | str,
        dtype: torch.dtype,
    ) -> Need:  # fmt: skip
        """As a memory plan says, beside networks that are loaded."""
        return cls(
            spec, geometry, torch.device(device), dtype, 2 if plan.negative_kv_bytes else 1,
            plan.context_bytes + plan.feature_bytes,
            max(plan.activation_bytes, plan.decode_activation_bytes),
        )  # fmt: skip

    @property
    def bytes(self) -> int:
        """All of it, when it is alone."""
        return self.caches * pages_bytes(*self.kind) + self.beside_bytes + self.passing_bytes

    @property
    def beside_bytes(self) -> int:
        """What lies beside the pools while it is on the device, key means included."""
        whole = planned_bytes(self.spec, self.geometry, self.dtype)
        return self.lasting_bytes + self.caches * (whole - pages_bytes(*self.kind))

    @property
    def kind(self) -> tuple[CacheSpec, CacheGeometry, torch.device, torch.dtype]:
        """Which pools it uses."""
        return self.spec, self.geometry, self.device, self.dtype


class Chunks(Protocol[T_co]):
    """A video in the making: a `VideoStream`, or whatever makes one chunk when it is asked for the next.

    Attributes:
        rollout: what it keeps between chunks; None while it has none.
    """

    @property
    def rollout(self) -> Rollout | None: ...
    def __next__(self) -> T_co: ...
    def close(self) -> None: ...


class Entry(Generic[T]):
    """One video that a scheduler looks after.

    Attributes:
        name: given by its owner.
        served_s: time it has had, from where the others stood when it came.
        chunks: how many it has made.
    """

    def __init__(self, name: str, begin: Callable[[], Chunks[T]], need: Need, served_s: float) -> None:
        self.name, self.need, self.served_s, self.chunks = name, need, served_s, 0
        self._begin = begin
        self._work: Chunks[T] | None = None

    @property
    def begun(self) -> bool:
        return self._work is not None

    @property
    def rollout(self) -> Rollout | None:
        return None if self._work is None else self._work.rollout

    @property
    def parked(self) -> bool:
        """Whether it has begun and waits on the host."""
        return self.rollout is not None and self.rollout.parked

    @property
    def here(self) -> bool:
        """Whether it has its room on the device."""
        return self.begun and not self.parked


@dataclass(frozen=True)
class Turn(Generic[T]):
    """What came of a turn.

    Attributes:
        entry: whose it was.
        chunk: what it made; None at its end.
        error: what it ended in.
    """

    entry: Entry[T]
    chunk: T | None = None
    error: BaseException | None = None

    @property
    def ended(self) -> bool:
        return self.chunk is None


class Scheduler(Generic[T]):
    """Makes many videos by turns, each bit for bit as if alone.

        pipe.pools = Pools()
        scheduler = Scheduler(pipe.pools, budget_bytes=20 * 10**9)
        for seed in range(8):
            scheduler.add(f"video {seed}", lambda seed=seed: pipe.stream(prompt, seed=seed), need)
        while (turn := scheduler.step()) is not None:
            show(turn.entry.name, turn.chunk)

    A turn is one chunk, and goes to whoever has had least time. Who does not fit into the budget waits; when
    it has fallen behind by `patience_s`, those that have had most are parked for it: what they keep goes to
    the host, and comes back when it is their turn. What ends one video, an error too, is told in its turn and
    leaves the others alone.

    Args:
        pools: that the videos' rollouts are made in (`CausalVideoPipeline.pools`).
        budget_bytes: for pools, what rollouts keep beside them and what one chunk takes; None: no limit.
        patience_s: see above; 0 parks at every chance.
        prefixes: what is remembered in these pools, and forgotten where it stands in the way of a video; with
            a budget its `grow` is to be False.
        clock: seconds.
    """

    def __init__(
        self, pools: Pools, budget_bytes: int | None = None, patience_s: float = PATIENCE_S,
        prefixes: PrefixCache | None = None, clock: Callable[[], float] = time.perf_counter,
    ) -> None:  # fmt: skip
        for name, value in (("budget_bytes", budget_bytes), ("patience_s", patience_s)):
            if value is not None and not value >= 0:
                raise InputError(f"{name}={value} of the scheduler; give a number that is not negative")
        self.pools, self.budget_bytes, self.patience_s = pools, budget_bytes, patience_s
        self.prefixes, self.clock = prefixes, clock
        self.parkings = 0
        self._entries: list[Entry[T]] = []

    @property
    def entries(self) -> list[Entry[T]]:
        """Videos that have not ended, in the order in which they came."""
        return list(self._entries)

    @property
    def waiting(self) -> list[Entry[T]]:
        """Those that have not begun for want of room, first in line first."""
        return [entry for entry in self._line() if not entry.begun]

    @property
    def held_bytes(self) -> int:
        """Bytes that pools and rollouts on the device take now, and the next chunk at most."""
        return self._bytes_with(None)

    def add(self, name: str, begin: Callable[[], Chunks[T]], need: Need) -> Entry[T]:
        """Let a video take part from now on, as if it had had as much time as who has had least.

        Args:
            begin: starts it once there is room; its rollout lies in the scheduler's pools.
            need: what it takes.

        Raises:
            ResourceError: it does not fit even when it is alone.
        """
        if self.budget_bytes is not None and need.bytes > self.budget_bytes:
            raise ResourceError(
                f"{name} needs {gigabytes(need.bytes)} and {gigabytes(self.budget_bytes)} can be used "
                "for all videos; choose a smaller window or size, or the cache format int8"
            )
        served = min((entry.served_s for entry in self._entries), default=0.0)
        entry = Entry(name, begin, need, served)
        self._entries.append(entry)
        return entry

    def place(self, entry: Entry[T]) -> int:
        """How many are before it in the line for room; 0 also for one that has begun."""
        return self.waiting.index(entry) if entry in self.waiting else 0

    def remove(self, entry: Entry[T]) -> None:
        """End a video between two turns; one that has ended already is no matter."""
        if entry in self._entries:
            self._end(entry)

    def close(self) -> None:
        """End all videos."""
        for entry in self.entries:
            self._end(entry)

    def step(self) -> Turn[T] | None:
        """Give one video its turn; None when there is none left.

        Raises:
            BaseException: what is no `Exception`, such as an interrupt; that video has ended too.
        """
        if not self._entries:
            return None
        entry = next(entry for entry in self._line() if self._has_room(entry))
        started = self.clock()
        try:
            self._bring(entry)
            assert entry._work is not None
            chunk = next(entry._work)
        except StopIteration:
            self._end(entry)
            return Turn(entry)
        except Exception as error:
            self._end(entry)
            return Turn(entry, error=error)
        except BaseException:
            self._end(entry)
            raise
        entry.served_s += self.clock() - started
        entry.chunks += 1
        return Turn(entry, chunk)

    def _line(self) -> list[Entry[T]]:
        """Who has had least first; among equals who came first."""
        return sorted(self._entries, key=lambda entry: entry.served_s)

    def _has_room(self, entry: Entry[T]) -> bool:
        """Whether a video is here or may come, for which what is remembered goes, and others are parked."""
        if entry.here:
            return True
        while not self._fits(entry):
            victim = self._victim(entry)
            if self.prefixes is not None and len(self.prefixes) and (victim or self._fits(entry, True)):
                self.prefixes.clear()
            elif victim is not None:
                self._park(victim)
            else:
                # where nobody is here it is others who fill the pools, and nobody to wait for
                return not any(other.here for other in self._entries)
        return True

    def _park(self, entry: Entry[T]) -> None:
        assert entry.rollout is not None
        entry.rollout.park()
        self.parkings += 1

    def _bring(self, entry: Entry[T]) -> None:
        """Begin a video, or take it back from the host."""
        if entry.here:
            return
        pools = self._prepare(entry)
        if entry._work is None:
            entry._work = entry._begin()
        elif entry.rollout is not None:
            entry.rollout.unpark(pools)

    def _victim(self, entry: Entry[T]) -> Entry[T] | None:
        """Whom to park: of those that are far enough ahead, the one that has had most."""
        here = [other for other in self._entries if other.here and other.rollout is not None]
        ahead = [other for other in here if other.served_s - entry.served_s > self.patience_s]
        return max(ahead, key=lambda other: other.served_s, default=None)

    def _fits(self, entry: Entry[T], forgetting: bool = False) -> bool:
        """Whether there is room for another one, or would be without what is remembered."""
        if self.budget_bytes is None:
            return True
        promised = self.prefixes.promised if forgetting and self.prefixes is not None else {}
        growth = self.pools.growth_bytes(entry.need.caches, *entry.need.kind, promised=promised)
        return self._bytes_with(entry, promised) + growth <= self.budget_bytes

    def _bytes_with(self, entry: Entry[T] | None, promised: Mapping[PagePool, int] | None = None) -> int:
        """Bytes of the pools as they are, and of what rollouts take beside them if another one comes."""
        there = [other.need for other in self._entries if other.here]
        there += [entry.need] if entry is not None else []
        passing = max((need.passing_bytes for need in there), default=0)
        pools = self.pools.nbytes_without(promised or {})
        return pools + sum(need.beside_bytes for need in there) + passing

    def _prepare(self, entry: Entry[T]) -> PoolSet | None:
        """The pools of a video's kind; new ones have room for all of the kind, as far as the budget goes.
        None for a kind whose pages may leave the device.

        What is left of the budget then may be used for what is remembered.
        """
        need, one = entry.need, pages_bytes(*entry.need.kind)
        if need.spec.device_gb:
            return None
        caches = sum(other.need.caches for other in self._entries if other.need.kind == need.kind)
        spare = self.prefixes.budget_bytes if self.prefixes is not None else 0
        if self.budget_bytes is not None:
            free = self.budget_bytes - self._bytes_with(entry)
            caches = max(need.caches, min(caches, free // one))
            beside = need.beside_bytes * (caches // need.caches - 1)
            spare = max(0, min(spare, free - caches * one - beside))
        return self.pools.prepare(caches, *need.kind, spare_bytes=spare)

    def _end(self, entry: Entry[T]) -> None:
        self._entries.remove(entry)
        if entry._work is not None:
            entry._work.close()
