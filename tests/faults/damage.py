"""Files of unfinished jobs that are damaged, lost or of another time: they are noticed and made again."""

from __future__ import annotations

import contextlib
import random
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from unittest import mock

from tests.faults.hooks import at_phase
from tests.faults.kills import jobs_for
from tests.faults.oracle import Counts, References, check_jobs, fresh, submit_all
from vidkv.errors import OutputError, VidkvError
from vidkv.jobs.checkpoints import Interval
from vidkv.jobs.run import Options
from vidkv.jobs.store import JobStore, State
from vidkv.jobs.supervisor import Supervisor, sole_supervisor, work_off
from vidkv.jobs.worker import Orders, Worker

ALWAYS = Options(interval=Interval(every_s=0.0, bytes_per_s=1e12, share=1.0))
"""A checkpoint after every chunk."""
RARELY = Options(interval=Interval(every_s=1e9))
"""None, so that jobs are taken up from their records."""


def interrupt(store: JobStore, chunks: int, options: Options = ALWAYS) -> None:
    """Work until the next job has so many chunks, and stop there."""
    stop: list[bool] = []
    with sole_supervisor(store):
        store.recover()
        worker = Worker(store, Orders(store.root, store.name, "here", options), lambda: bool(stop))
        with at_phase("committing", chunks, lambda: stop.append(True)):
            worker.work()


def corruption(count: int, seed: int, folder: Path) -> Counts:
    """Damage files of an interrupted job, and let it go on: its result must be right."""
    draw, counts = random.Random(seed), Counts()
    references = References(folder / "shared")
    with JobStore(fresh(folder / f"corruption-{seed}")) as store:
        for number, request in enumerate(jobs_for(count, draw, folder)):
            wanted = submit_all(store, [request], references)
            interrupt(store, draw.randint(2, 6), draw.choice((ALWAYS, ALWAYS, RARELY)))
            job = store.get(str(request.id))
            part = ("checkpoints", "records", "segments")[number % 3]
            files = sorted((store.folder(job).path / part).glob("*"))
            if not files:
                part = "records"
                files = sorted(store.folder(job).records.glob("*"))
            path = draw.choice(files)
            how, harm = draw.choice(HARMS)
            harm(path, draw)
            counts.injections += 1
            before = len(counts.failures)
            work_off(store, ALWAYS)
            if store.get(job.id).state is not State.DONE:
                counts.lost += 1
                counts.fail(f"{how} in {path.name}: {store.get(job.id).state}: {store.get(job.id).error}")
            else:
                check_jobs(store, wanted, counts)
                if len(counts.failures) > before:
                    counts.fail(f"that was {how} in {part}/{path.name}")
            store.delete(job.id)
    return counts


def flip(path: Path, draw: random.Random) -> None:
    """One bit, or a few, anywhere."""
    data = bytearray(path.read_bytes())
    for _ in range(draw.choice((1, 1, 4))):
        data[draw.randrange(len(data))] ^= 1 << draw.randrange(8)
    path.write_bytes(data)


def flip_late(path: Path, draw: random.Random) -> None:
    """One bit in the second half, which is pictures or tensors."""
    data = bytearray(path.read_bytes())
    data[draw.randrange(len(data) // 2, len(data))] ^= 1 << draw.randrange(8)
    path.write_bytes(data)


def cut(path: Path, draw: random.Random) -> None:
    data = path.read_bytes()
    path.write_bytes(data[: draw.randrange(len(data))])


def zeros(path: Path, draw: random.Random) -> None:
    """A block that never reached the disk."""
    data = bytearray(path.read_bytes())
    start = draw.randrange(len(data))
    data[start : start + 4096] = bytes(len(data[start : start + 4096]))
    path.write_bytes(data)


def lose(path: Path, draw: random.Random) -> None:
    path.unlink()


HARMS: list[tuple[str, Callable[[Path, random.Random], None]]] = [
    ("flipped bits", flip),
    ("a flipped bit", flip_late),
    ("a cut", cut),
    ("zeros", zeros),
    ("a loss", lose),
]


def index(count: int, seed: int, folder: Path) -> Counts:
    """Lose or damage the index between runs, jump the clock, start a second supervisor."""
    draw, counts = random.Random(seed), Counts()
    references = References(folder / "shared")
    root = fresh(folder / f"index-{seed}")
    faults = [lost, emptied, cut_short, garbage, overwritten, second_supervisor, clock_back, clock_ahead]
    for number in range(count):
        fault = faults[(seed + number) % len(faults)]
        requests = [
            request.model_copy(update={"id": f"{request.id}-{number}"})
            for request in jobs_for(2, draw, folder)
        ]
        fresh(root)
        with JobStore(root) as store:
            wanted = submit_all(store, requests, references)
            interrupt(store, draw.randint(1, 6), OFTEN_ENOUGH)
            order = [job.id for job in store.jobs()]
        try:
            with fault(root, draw, counts):
                counts.injections += 1
                with JobStore(root) as store:
                    if [job.id for job in store.jobs()] != order:
                        counts.fail(f"{fault.__name__}: the queue's order has changed")
                    work_off(store, OFTEN_ENOUGH)
        except VidkvError as error:
            counts.fail(f"{fault.__name__}: {error}")
        with JobStore(root) as store:
            check_jobs(store, wanted, counts)
    return counts


OFTEN_ENOUGH = Options(interval=Interval(every_s=0.3, share=0.5))


@contextlib.contextmanager
def lost(root: Path, draw: random.Random, counts: Counts) -> Iterator[None]:
    for path in (root / ".vidkv").glob("jobs.sqlite*"):
        path.unlink()
    yield


@contextlib.contextmanager
def emptied(root: Path, draw: random.Random, counts: Counts) -> Iterator[None]:
    (root / ".vidkv" / "jobs.sqlite").write_bytes(b"")
    yield


@contextlib.contextmanager
def cut_short(root: Path, draw: random.Random, counts: Counts) -> Iterator[None]:
    cut(root / ".vidkv" / "jobs.sqlite", draw)
    yield


@contextlib.contextmanager
def garbage(root: Path, draw: random.Random, counts: Counts) -> Iterator[None]:
    (root / ".vidkv" / "jobs.sqlite").write_bytes(draw.randbytes(20_000))
    yield


@contextlib.contextmanager
def overwritten(root: Path, draw: random.Random, counts: Counts) -> Iterator[None]:
    """Pages inside: it opens, and fails later."""
    path = root / ".vidkv" / "jobs.sqlite"
    data = bytearray(path.read_bytes())
    start = draw.randrange(100, len(data) - 600)
    data[start : start + 500] = draw.randbytes(500)
    path.write_bytes(data)
    yield


@contextlib.contextmanager
def second_supervisor(root: Path, draw: random.Random, counts: Counts) -> Iterator[None]:
    """While one works, another is refused."""
    tried: list[str] = []

    def another() -> None:
        with JobStore(root) as store:
            for start in (lambda: work_off(store), lambda: Supervisor(store).__enter__()):
                try:
                    start()
                    counts.fail("a second supervisor was let in")
                except OutputError as error:
                    tried.append(str(error))

    with at_phase("encoding", draw.randint(1, 3), another):
        yield
    if len(tried) != 2 or "another vidkv" not in tried[0]:
        counts.fail(f"a second supervisor was told {tried}")


@contextlib.contextmanager
def clock_back(root: Path, draw: random.Random, counts: Counts) -> Iterator[None]:
    with _clock(draw, -86_400.0):
        yield


@contextlib.contextmanager
def clock_ahead(root: Path, draw: random.Random, counts: Counts) -> Iterator[None]:
    with _clock(draw, 86_400.0):
        yield


@contextlib.contextmanager
def _clock(draw: random.Random, by_s: float) -> Iterator[None]:
    """In the middle of a chunk the day changes."""
    genuine, jumped = time.time, list[bool]()

    def told() -> float:
        return genuine() + (by_s if jumped else 0.0)

    with at_phase("encoding", draw.randint(1, 4), lambda: jumped.append(True)), mock.patch("time.time", told):
        yield
