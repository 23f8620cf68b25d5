"""What becomes of a job, whatever its run ends in."""

from __future__ import annotations

import errno
import logging
import os
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.jobs.test_store import progress, submit
from vidkv.errors import (
    Cancelled,
    CheckpointError,
    InputError,
    NumericsError,
    OutputError,
    ResourceError,
    StateError,
)
from vidkv.jobs import worker as worker_module
from vidkv.jobs.claims import Claim, Claims, Fenced
from vidkv.jobs.folder import JobFolder
from vidkv.jobs.run import Interrupted, Progress
from vidkv.jobs.store import JobStore, State
from vidkv.jobs.worker import Orders, Worker

DONE = {"state": "done", "frames": 33, "chunks": 3}


class Fake:
    """A runner that does what it is told, once for every job."""

    def __init__(self, *acts: Callable[[JobFolder, Claim], Any]) -> None:
        self.acts, self.ran = list(acts), list[str]()

    def run(
        self, folder: JobFolder, claim: Claim, root: Path, report: Callable[[Progress], None]
    ) -> dict[str, Any]:
        self.ran.append(folder.job()["id"])
        act = self.acts.pop(0) if self.acts else (lambda folder, claim: None)
        act(folder, claim)
        report(progress(2))
        return dict(DONE)

    def has_loaded(self, model: str, settings: Any) -> bool:
        return False


def raises(error: BaseException) -> Callable[[JobFolder, Claim], None]:
    def act(folder: JobFolder, claim: Claim) -> None:
        raise error

    return act


@pytest.fixture
def store(tmp_path: Path) -> Iterator[JobStore]:
    with JobStore(tmp_path) as made:
        yield made
    assert [t for t in threading.enumerate() if t.name.startswith("Thread-") and "_beat" in t.name] == []


def worker(
    store: JobStore, *acts: Callable[[JobFolder, Claim], Any], retries: int = 2
) -> tuple[Worker, Fake]:
    made, fake = Worker(store, Orders(store.root, store.name, "w", retries=retries)), Fake(*acts)
    made.runner = fake  # type: ignore[assignment]
    return made, fake


def do(made: Worker) -> Any:
    taken = made.store.claim_next("w")
    assert taken is not None
    made.do(*taken)
    assert not made.store.claims.held(made.store.folder(taken[0]).path)
    return made.store.get(taken[0].id)


class TestOutcome:
    def test_done(self, store: JobStore) -> None:
        submit(store)
        job = do(worker(store)[0])
        assert (job.state, job.frames, job.worker, job.error) == (State.DONE, 33, None, None)
        assert job.progress["frames"] == 21 and store.folder(job).result() == DONE

    @pytest.mark.parametrize(
        "error", [InputError("no"), CheckpointError("no"), StateError("no")], ids=lambda e: type(e).__name__
    )
    def test_what_would_fail_again_fails_at_once(self, store: JobStore, error: Exception) -> None:
        submit(store)
        job = do(worker(store, raises(error))[0])
        assert (job.state, job.error) == (State.FAILED, "no")
        assert store.folder(job).result() == {"state": "failed", "error": "no"}

    @pytest.mark.parametrize(
        "error",
        [OutputError("full"), ResourceError("full"), NumericsError("full")],
        ids=lambda e: type(e).__name__,
    )
    def test_what_may_pass_is_tried_again_later(self, store: JobStore, error: Exception) -> None:
        submit(store)
        made, fake = worker(store, raises(error))
        job = do(made)
        assert (job.state, job.error, job.attempts) == (State.QUEUED, "full", 1)
        assert store.claim_next("w") is None
        store._execute("UPDATE jobs SET not_before = 0")
        assert do(made).state is State.DONE and fake.ran == ["a", "a"]

    def test_and_fails_after_so_many_attempts(self, store: JobStore) -> None:
        submit(store)
        made, fake = worker(store, *[raises(OutputError("full"))] * 9, retries=2)
        while store.get("a").state is not State.FAILED:
            store._execute("UPDATE jobs SET not_before = 0")
            do(made)
        assert len(fake.ran) == 3 and store.get("a").error == "full"

    @pytest.mark.parametrize(
        "error", [ValueError("odd"), MemoryError(), OSError(errno.EIO, "Input/output error")]
    )
    def test_what_nobody_thought_of_is_logged_and_tried_again(
        self, store: JobStore, error: Exception, caplog: pytest.LogCaptureFixture
    ) -> None:
        submit(store)
        job = do(worker(store, raises(error))[0])
        assert job.state is State.QUEUED and str(job.error).startswith(type(error).__name__)
        assert caplog.records[0].levelno == logging.ERROR and caplog.records[0].exc_info

    def test_cancelled(self, store: JobStore) -> None:
        submit(store)
        job = do(worker(store, raises(Cancelled("the job was cancelled")))[0])
        assert (job.state, job.error) == (State.CANCELLED, "the job was cancelled")

    def test_interrupted_goes_back_as_if_nothing_had_happened(self, store: JobStore) -> None:
        submit(store)
        job = do(worker(store, raises(Interrupted("stop")))[0])
        assert (job.state, job.error, job.attempts, job.crashes) == (State.QUEUED, None, 0, 0)

    def test_ctrl_c_leaves_nothing_running(self, store: JobStore) -> None:
        submit(store)
        made, _ = worker(store, raises(KeyboardInterrupt()))
        with pytest.raises(KeyboardInterrupt):
            do(made)
        assert [job.id for job in store.recover()] == ["a"]
        assert do(made).state is State.DONE

    def test_a_full_disk_at_the_end_is_survived(
        self, store: JobStore, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        submit(store)
        made, _ = worker(store)

        def full(*args: Any) -> None:
            raise OSError(errno.ENOSPC, "No space left on device")

        with monkeypatch.context() as patch:
            patch.setattr(os, "replace", full)
            job = do(made)
        assert job.state is State.QUEUED and "No space" in str(job.error)
        store._execute("UPDATE jobs SET not_before = 0")
        assert do(made).state is State.DONE

    @pytest.mark.parametrize(
        "error", [None, InputError("no"), Interrupted("x"), Cancelled("x"), OutputError("x")]
    )
    def test_an_index_that_cannot_be_written_leaves_it_to_whoever_recovers(
        self, store: JobStore, monkeypatch: pytest.MonkeyPatch, error: Exception | None
    ) -> None:
        submit(store)

        def act(folder: JobFolder, claim: Claim) -> None:
            def locked(*args: Any, **kwargs: Any) -> None:
                raise OutputError("database is locked")

            monkeypatch.setattr(store, "_move", locked)
            if error:
                raise error

        made, _ = worker(store, act)
        assert do(made).state is State.RUNNING
        monkeypatch.undo()
        made.work() if not isinstance(error, OutputError) else store.recover()
        assert store.get("a").state in (State.DONE, State.FAILED, State.CANCELLED, State.QUEUED)


class TestReplaced:
    """Another process has taken the job over: it is its to say what becomes of it."""

    @staticmethod
    def replace(folder: JobFolder, claim: Claim) -> Claim:
        claim.release()
        other = Claims().take(folder.path)
        assert other is not None
        return other

    @pytest.mark.parametrize(
        "error", [Interrupted("x"), Cancelled("x"), InputError("x"), OutputError("x"), ValueError("x"),
                  Fenced("x")], ids=lambda e: type(e).__name__,
    )  # fmt: skip
    def test_changes_nothing(self, store: JobStore, error: Exception) -> None:
        submit(store)
        others: list[Claim] = []

        def act(folder: JobFolder, claim: Claim) -> None:
            others.append(self.replace(folder, claim))
            store._execute("UPDATE jobs SET worker = 'other'")
            raise error

        made, _ = worker(store, act)
        taken = store.claim_next("w")
        assert taken is not None
        made.do(*taken)
        job = store.get("a")
        assert (job.state, job.worker) == (State.RUNNING, "other")
        assert store.folder(job).result() is None
        others[0].check()

    def test_the_heartbeat_notices_and_stops_the_job(
        self, store: JobStore, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(worker_module, "BEAT_S", 0.01)
        submit(store)
        made, _ = worker(store)
        # what the real runner asks at every denoising step
        stopping = Worker(store, made.orders).runner.stopping
        assert not stopping()

        def act(folder: JobFolder, claim: Claim) -> None:
            self.replace(folder, claim)
            assert made.lost.wait(10)
            raise Interrupted("stop")

        made.runner.acts = [act]  # type: ignore[attr-defined]
        taken = store.claim_next("w")
        assert taken is not None
        made.do(*taken)
        assert store.get("a").state is State.RUNNING

    def test_a_lost_claim_stops_the_runner(self, store: JobStore) -> None:
        made = Worker(store, Orders(store.root, store.name, "w"))
        assert not made.runner.stopping()
        made.lost.set()
        assert made.runner.stopping()


class TestHeartbeat:
    def test_beats_while_the_job_runs_and_no_longer(
        self, store: JobStore, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(worker_module, "BEAT_S", 0.01)
        submit(store)
        seen: list[int] = []

        def act(folder: JobFolder, claim: Claim) -> None:
            end = time.monotonic() + 10
            while len(set(seen)) < 4 and time.monotonic() < end:
                seen.append(claim._beats)

        before = set(threading.enumerate())
        do(worker(store, act)[0])
        assert len(set(seen)) == 4 and set(threading.enumerate()) == before

    def test_survives_a_disk_that_is_away_for_a_while(
        self, store: JobStore, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(worker_module, "BEAT_S", 0.01)
        submit(store)
        failed = threading.Event()

        def act(folder: JobFolder, claim: Claim) -> None:
            real = claim.check

            def away() -> None:
                failed.set()
                raise OutputError("stale handle")

            claim.check = away  # type: ignore[method-assign]
            assert failed.wait(10)
            claim.check = real  # type: ignore[method-assign]
            before, end = claim._beats, time.monotonic() + 10
            while claim._beats == before:
                assert time.monotonic() < end

        assert do(worker(store, act)[0]).state is State.DONE


class TestWork:
    def test_does_all_and_ends(self, store: JobStore) -> None:
        for id in "abc":
            submit(store, id)
        made, fake = worker(store, raises(InputError("no")))
        made.work()
        assert fake.ran == ["a", "b", "c"]
        assert [job.state for job in store.jobs()] == [State.FAILED, State.DONE, State.DONE]

    def test_one_that_lost_its_job_does_not_wait_for_ever(self, store: JobStore) -> None:
        """The other process dies too, and nobody else recovers."""
        submit(store)

        def act(folder: JobFolder, claim: Claim) -> None:
            TestReplaced.replace(folder, claim).release()
            raise Fenced("taken over")

        made, fake = worker(store, act)
        made.work()
        assert fake.ran == ["a", "a"] and store.get("a").state is State.DONE

    def test_told_to_stop_takes_no_other_job(self, store: JobStore) -> None:
        for id in "ab":
            submit(store, id)
        stop = threading.Event()
        made = Worker(store, Orders(store.root, store.name, "w", idle=True), stop.is_set)
        made.runner = Fake(lambda folder, claim: stop.set())  # type: ignore[assignment]
        made.work()
        assert [job.state for job in store.jobs()] == [State.DONE, State.QUEUED]

    def test_idle_waits_for_more(self, store: JobStore) -> None:
        stop = threading.Event()
        made = Worker(store, Orders(store.root, store.name, "w", idle=True), stop.is_set)
        made.runner = Fake()  # type: ignore[assignment]
        thread = threading.Thread(target=made.work)
        thread.start()
        time.sleep(0.05)
        submit(store)
        for job in store.watch("a", poll_s=0.01):
            last = job
        stop.set()
        thread.join(10)
        assert last.state is State.DONE and not thread.is_alive()
