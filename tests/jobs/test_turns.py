"""Jobs by turns: the files are those of jobs one after the other, whatever happens to the others."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from itertools import count
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest

from tests.tiny import HEIGHT, WIDTH, build_pipeline
from vidkv.errors import InputError, NumericsError
from vidkv.jobs import turns as turns_module
from vidkv.jobs import worker as worker_module
from vidkv.jobs.checkpoints import Interval
from vidkv.jobs.run import Options, Progress
from vidkv.jobs.store import JobStore, State
from vidkv.jobs.worker import Orders, Worker
from vidkv.request import EngineSettings, VideoRequest
from vidkv.rollout import Rollout

PROMPT, OTHER = "a red circle bouncing", "a blue square resting"
CHUNKS = 4
SECONDS = (12 * CHUNKS - 5) / 16
OFTEN = Interval(every_s=1e-9, share=1.0, bytes_per_s=1e12)
ALONE = Options(interval=OFTEN)
TURNS = Options(interval=OFTEN, concurrent=3, shared_bytes=10**8)
REQUESTS: dict[str, dict[str, Any]] = {
    "a": {"prompt": PROMPT},
    "b": {"prompt": PROMPT, "schedule": [[1.3, OTHER]], "switch": "lerp"},
    "c": {"prompt": OTHER, "seed": 3, "cache": "int8,window=9,sink=2,keep_newest"},
    "d": {"prompt": PROMPT, "seed": 4, "guidance": 2.0},
}


class Killed(BaseException):
    """Nothing catches it, as nothing catches SIGKILL."""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("model") / "tiny"
    build_pipeline().save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def wholes(model: str, tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[str, np.ndarray]]:
    """Digests of latents and pictures, of jobs one after the other."""
    with JobStore(tmp_path_factory.mktemp("whole")) as store:
        submit(store, model)
        work(store, ALONE)
        return {id: found(store, id) for id in REQUESTS}


@pytest.fixture
def store(tmp_path: Path) -> Iterator[JobStore]:
    with JobStore(tmp_path) as made:
        yield made
    assert [thread for thread in threading.enumerate() if "_beat" in thread.name] == []


def submit(store: JobStore, model: str, *ids: str) -> None:
    for id in ids or REQUESTS:
        values = {"cache": "fp32,window=9,sink=2", "seconds": SECONDS, "height": HEIGHT, "width": WIDTH}
        request = VideoRequest.of(values | {"id": id, "model": model} | REQUESTS[id])
        store.submit(request, EngineSettings(device="cpu"))


def work(store: JobStore, options: Options = TURNS, **orders: Any) -> Worker:
    worker = Worker(store, Orders(store.root, store.name, "w", options, **orders))
    worker.work()
    return worker


def found(store: JobStore, id: str) -> tuple[str, np.ndarray]:
    job = store.get(id)
    assert job.state is State.DONE, job.error
    assert not store.claims.held(store.folder(job).path)
    with av.open(str(store.file(job))) as container:
        frames = np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])
    return job.result["latents_sha256"], frames


def as_alone(store: JobStore, wholes: dict[str, tuple[str, np.ndarray]], *ids: str) -> None:
    for id in ids or REQUESTS:
        digest, frames = found(store, id)
        assert digest == wholes[id][0]
        assert np.array_equal(frames, wholes[id][1])


@pytest.fixture
def order(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Whose chunks are reported, in turn."""
    seen: list[str] = []
    report = JobStore.report

    def noted(self: JobStore, id: str, progress: Progress) -> None:
        seen.append(f"{id}{progress.chunk - 1}")
        report(self, id, progress)

    monkeypatch.setattr(JobStore, "report", noted)
    return seen


def after(monkeypatch: pytest.MonkeyPatch, chunk: str, act: Callable[[JobStore], object]) -> None:
    """Do something once a chunk has been reported."""
    report = JobStore.report

    def acting(self: JobStore, id: str, progress: Progress) -> None:
        report(self, id, progress)
        if f"{id}{progress.chunk - 1}" == chunk:
            act(self)

    monkeypatch.setattr(JobStore, "report", acting)


class TestVideos:
    def test_are_those_of_jobs_alone(
        self, store: JobStore, model: str, wholes: dict[str, tuple[str, np.ndarray]], order: list[str]
    ) -> None:
        """Four jobs in three places, of which two begin alike."""
        submit(store, model)
        worker = work(store)
        as_alone(store, wholes)
        # they took turns, and the fourth came when there was a place
        assert {id[0] for id in order[:3]} == {"a", "b", "c"}
        assert order.index("d0") > min(order.index(f"{id}{CHUNKS - 1}") for id in "abc")
        assert sorted(order) == [f"{id}{chunk}" for id in "abcd" for chunk in range(CHUNKS)]
        assert worker.runner._loaded is not None
        prefixes = worker.runner._loaded[1].prefixes
        assert prefixes is not None and prefixes.hits == 2

    def test_with_room_for_one(
        self, store: JobStore, model: str, wholes: dict[str, tuple[str, np.ndarray]], order: list[str],
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:  # fmt: skip
        """Each is parked for the others, with turns of equal length."""
        made, real = list[Any](), turns_module.Scheduler

        def scheduler(*args: Any, **options: Any) -> Any:
            made.append(real(*args, **options, patience_s=0, clock=count().__next__))
            return made[-1]

        monkeypatch.setattr(turns_module, "Scheduler", scheduler)
        needs = list[int]()
        need_of = turns_module._need
        monkeypatch.setattr(
            turns_module, "_need", lambda *args: needs.append(need_of(*args).bytes) or need_of(*args)
        )
        monkeypatch.setattr(turns_module, "usable_bytes", lambda device: 10**9)
        monkeypatch.setattr(
            turns_module.Turns, "_scheduler_of", _tight(turns_module.Turns._scheduler_of, needs)
        )
        submit(store, model, "a", "b", "c")
        work(store)
        as_alone(store, wholes, "a", "b", "c")
        assert made[0].parkings >= 4 and {id[0] for id in order[:3]} == {"a", "b", "c"}

    def test_without_anything_shared(
        self, store: JobStore, model: str, wholes: dict[str, tuple[str, np.ndarray]]
    ) -> None:
        submit(store, model, "a", "b")
        worker = work(store, Options(concurrent=2))
        as_alone(store, wholes, "a", "b")
        assert worker.runner._loaded is not None and worker.runner._loaded[1].prefixes is None

    def test_one_after_the_other_share_too(
        self, store: JobStore, model: str, wholes: dict[str, tuple[str, np.ndarray]]
    ) -> None:
        submit(store, model, "a", "b")
        worker = work(store, Options(shared_bytes=10**8))
        as_alone(store, wholes, "a", "b")
        assert worker.runner._loaded is not None
        prefixes = worker.runner._loaded[1].prefixes
        assert prefixes is not None and prefixes.hits == 2

    def test_another_model_waits_until_nobody_needs_this_one(
        self, store: JobStore, model: str, tmp_path_factory: pytest.TempPathFactory, order: list[str]
    ) -> None:
        other = tmp_path_factory.mktemp("other") / "tiny"
        build_pipeline(seed=1).save_pretrained(other)
        submit(store, model, "a")
        submit(store, str(other), "b")
        submit(store, model, "d")
        work(store)
        assert {id[0] for id in order[: 2 * CHUNKS]} == {"a", "d"}
        assert [store.get(id).state for id in "abd"] == [State.DONE] * 3

    @pytest.mark.parametrize(("name", "value"), [("concurrent", 0), ("shared_bytes", -1)])
    def test_options(self, name: str, value: int) -> None:
        with pytest.raises(InputError, match=f"{name}={value}"):
            Options(**{name: value})  # type: ignore[arg-type]


def _tight(real: Any, needs: list[int]) -> Any:
    """A budget for whichever job needs most, alone."""

    def scheduler_of(self: Any, pipe: Any, plan: Any) -> Any:
        scheduler = real(self, pipe, plan)
        scheduler.budget_bytes = max([*needs, turns_module._need(plan, pipe).bytes])
        return scheduler

    return scheduler_of


class TestApart:
    @pytest.mark.parametrize("chunk", ["b1", "a1"], ids=["in its own turn", "in another's turn"])
    def test_a_cancelled_one(
        self, store: JobStore, model: str, wholes: dict[str, tuple[str, np.ndarray]],
        monkeypatch: pytest.MonkeyPatch, chunk: str, order: list[str],
    ) -> None:  # fmt: skip
        after(monkeypatch, chunk, lambda store: store.cancel("b"))
        submit(store, model, "a", "b", "c")
        work(store)
        as_alone(store, wholes, "a", "c")
        job = store.get("b")
        assert (job.state, job.error) == (State.CANCELLED, "the job was cancelled")
        assert (store.root / "b.partial.mp4").exists() and len([o for o in order if o[0] == "b"]) <= 2

    def test_a_cancelled_one_does_not_wait_for_its_turn(
        self, store: JobStore, model: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        begun: list[tuple[int, ...]] = []
        step = Rollout.step_chunk

        def noted(self: Rollout, *args: Any, **options: Any) -> Any:
            begun.append(self.seeds)
            return step(self, *args, **options)

        def cancel(store: JobStore) -> None:
            store.cancel("c")
            begun.clear()

        monkeypatch.setattr(Rollout, "step_chunk", noted)
        after(monkeypatch, "a1", cancel)
        submit(store, model, "a", "c")
        work(store)
        assert [store.get(id).state for id in "ac"] == [State.DONE, State.CANCELLED]
        assert begun == [(0,)] * (CHUNKS - 2)

    def test_a_broken_one(
        self, store: JobStore, model: str, wholes: dict[str, tuple[str, np.ndarray]],
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:  # fmt: skip
        step = Rollout.step_chunk

        def failing(self: Rollout, *args: Any, **options: Any) -> Any:
            if self.seeds == (3,) and self.chunk == 2:
                raise NumericsError("NaN in chunk 2")
            return step(self, *args, **options)

        submit(store, model, "a", "b", "c")
        with monkeypatch.context() as patch:
            patch.setattr(Rollout, "step_chunk", failing)
            worker = Worker(store, Orders(store.root, store.name, "w", TURNS, retries=0))
            worker.work()
        assert (store.get("c").state, store.get("c").error) == (State.FAILED, "NaN in chunk 2")
        as_alone(store, wholes, "a", "b")
        store.retry("c")
        work(store)
        as_alone(store, wholes, "c")

    def test_one_that_cannot_begin(
        self, store: JobStore, model: str, wholes: dict[str, tuple[str, np.ndarray]]
    ) -> None:
        submit(store, model, "a", "b")
        path = store.folder(store.get("b")).path / "job.json"
        path.write_text(path.read_text().replace(store.get("b").key, "0" * 64))
        work(store)
        assert store.get("b").state is State.FAILED and "was submitted as" in str(store.get("b").error)
        as_alone(store, wholes, "a")

    def test_one_that_was_taken_over(
        self, store: JobStore, model: str, wholes: dict[str, tuple[str, np.ndarray]],
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:  # fmt: skip
        monkeypatch.setattr(worker_module, "BEAT_S", 0.01)

        def take(store: JobStore) -> None:
            path = store.folder(store.get("b")).path
            (path / "claims" / "000009").mkdir()
            for thread in threading.enumerate():
                if "_beat" in thread.name:
                    thread.join(0.2)

        after(monkeypatch, "a1", take)
        submit(store, model, "a", "b")
        worker = Worker(store, Orders(store.root, store.name, "w", TURNS), lambda: store.get("a").ended)
        worker.work()
        as_alone(store, wholes, "a")
        assert store.get("b").state is State.RUNNING

    def test_paused_and_steered(
        self, store: JobStore, model: str, wholes: dict[str, tuple[str, np.ndarray]],
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:  # fmt: skip
        def act(store: JobStore) -> None:
            store.pause("b")
            store.steer("c", PROMPT)

        after(monkeypatch, "a0", act)
        submit(store, model, "a", "b", "c")
        work(store)
        as_alone(store, wholes, "a")
        assert store.get("b").state is State.PAUSED and 0 < store.get("b").done < CHUNKS
        assert len(store.folder(store.get("c")).steered()) == 1 and store.get("c").state is State.DONE
        store.resume("b")
        work(store)
        as_alone(store, wholes, "b")


class TestStopped:
    def test_told_to_stop_they_go_on_later(
        self, store: JobStore, model: str, wholes: dict[str, tuple[str, np.ndarray]], order: list[str]
    ) -> None:
        submit(store, model)
        worker = Worker(store, Orders(store.root, store.name, "w", TURNS), lambda: len(order) >= 5)
        worker.work()
        assert {job.state for job in store.jobs()} == {State.QUEUED}
        assert [job.crashes + job.attempts for job in store.jobs()] == [0] * 4
        work(store)
        as_alone(store, wholes)
        assert len(set(order)) == len(order) == 4 * CHUNKS

    @pytest.mark.parametrize("chunk", ["b1", "c2"])
    def test_killed_they_go_on_bit_for_bit(
        self, store: JobStore, model: str, wholes: dict[str, tuple[str, np.ndarray]],
        monkeypatch: pytest.MonkeyPatch, chunk: str, order: list[str],
    ) -> None:  # fmt: skip
        def kill(store: JobStore) -> None:
            raise Killed

        submit(store, model)
        with monkeypatch.context() as patch:
            after(patch, chunk, kill)
            with pytest.raises(Killed):
                work(store)
        assert sum(job.state is State.RUNNING for job in store.jobs()) == 3
        assert not any(store.claims.held(store.folder(job).path) for job in store.jobs())
        store.recover()
        work(store)
        as_alone(store, wholes)
        # what was safe was not made a second time
        assert len(set(order)) == len(order)

    def test_one_whose_chunks_are_all_there(
        self, store: JobStore, model: str, wholes: dict[str, tuple[str, np.ndarray]],
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:  # fmt: skip
        submit(store, model, "a", "b")
        with monkeypatch.context() as patch:
            patch.setattr("vidkv.jobs.run.write_video", _kill)
            with pytest.raises(Killed):
                work(store)
        store.recover()
        work(store)
        as_alone(store, wholes, "a", "b")


def _kill(*args: Any) -> None:
    raise Killed
