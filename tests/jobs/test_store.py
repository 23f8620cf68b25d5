"""The index and the folders: what may become of a job, and what survives."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import sqlite3
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from vidkv.errors import InputError, OutputError, StateError
from vidkv.jobs import claims as claims_module
from vidkv.jobs import index as index_module
from vidkv.jobs.claims import Claim, Claims
from vidkv.jobs.run import Progress
from vidkv.jobs.store import MAX_CRASHES, TRANSITIONS, Job, JobStore, QueueFull, State
from vidkv.request import EngineSettings, VideoRequest
from vidkv.segments import SegmentWriter, partial_video, write_video

DONE = {"state": "done", "frames": 33, "chunks": 3}


def planned(id: str, key: str | None = None, out: str | None = None) -> Any:
    """What the store reads of a plan."""
    request = VideoRequest(id=id, prompt="a red circle", out=out)
    return SimpleNamespace(
        id=id, key=key or f"{sum(id.encode()):08x}" * 8, chunks=3,
        resolved=lambda: (request, EngineSettings()),
    )  # fmt: skip


def submit(store: JobStore, id: str = "a", **options: Any) -> Job:
    plan_options = {name: options.pop(name) for name in ("key", "out") if name in options}
    return store.submit_plan(planned(id, **plan_options), **options)


def progress(chunk: int) -> Progress:
    return Progress(
        chunk=chunk, chunks=3, frames=12 * chunk - 3, fps=1.0, eta_s=1.0, kv_bytes=1, held_bytes=1,
        rss_bytes=1, drift={}, blank=False,
    )  # fmt: skip


def run(store: JobStore, worker: str = "w") -> tuple[Job, Claim]:
    taken = store.claim_next(worker)
    assert taken is not None
    return taken


def video(path: Path, job: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    writer = SegmentWriter(path.with_suffix(".segments"), 16, 16, 16)
    writer.write(0, np.zeros((2, 16, 16, 3), np.uint8))
    write_video(writer.paths(), path, 16, {"job": job})
    return path


def abandon(claim: Claim) -> None:
    """As if the process that holds it had died."""
    owner = json.loads((claim.path / "owner.json").read_text())
    (claim.path / "owner.json").write_text(json.dumps(owner | {"started": 0}))


@pytest.fixture
def store(tmp_path: Path) -> Iterator[JobStore]:
    with JobStore(tmp_path / "renders") as made:
        yield made


class TestSubmit:
    def test_is_idempotent(self, store: JobStore) -> None:
        first = submit(store)
        assert first.state is State.QUEUED and first.number == 1
        assert submit(store) == first and len(store.jobs()) == 1
        job, claim = run(store)
        assert submit(store) == job
        store.finish(job, DONE)
        claim.release()
        (store.root / "a.mp4").touch()
        assert submit(store).state is State.DONE

    def test_one_id_means_one_video(self, store: JobStore) -> None:
        submit(store)
        with pytest.raises(InputError, match="other settings"):
            submit(store, key="f" * 64)
        assert len(store.jobs()) == 1 and len(os.listdir(store.home / "jobs")) == 1

    def test_files_do_not_collide_whatever_their_case(self, store: JobStore) -> None:
        submit(store, "a", out="x/Film.mp4")
        with pytest.raises(InputError, match=r"x/film.MP4.*job 'a'"):
            submit(store, "b", out="x/film.MP4")
        submit(store, "Case")
        with pytest.raises(InputError, match="job 'Case'"):
            submit(store, "case")
        submit(store, "c", out="film.mp4")
        assert [job.id for job in store.jobs()] == ["a", "Case", "c"]

    @pytest.mark.parametrize("id", ["a.partial", "a.Partial"])
    def test_a_stopped_video_of_one_is_not_the_file_of_another(self, store: JobStore, id: str) -> None:
        with pytest.raises(InputError, match="partial"):
            submit(store, id)

    @pytest.mark.parametrize("id", ["a.b", "v1.2.3", "a-12345678", "-", "A_b.-", "x" * 80, "con.mp4"])
    def test_ids_of_every_kind(self, store: JobStore, id: str) -> None:
        job = submit(store, id)
        assert store.folder(job).path.parent == store.home / "jobs" and store.folder(job).job()["id"] == id
        assert store.file(job) == store.root / f"{id}.mp4"

    def test_the_queue_takes_exactly_so_many_from_many_threads(self, store: JobStore) -> None:
        accepted, refused, failed = list[str](), list[str](), list[BaseException]()

        def post(thread: int) -> None:
            for i in range(6):
                try:
                    accepted.append(submit(store, f"t{thread}-{i}", most=32).id)
                except QueueFull:
                    refused.append("")
                except BaseException as error:
                    failed.append(error)
                store.jobs(most=5)

        threads = [threading.Thread(target=post, args=(i,)) for i in range(16)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert not failed
        assert len(accepted) == 32 and len(refused) == 64
        assert {job.id for job in store.jobs()} == set(accepted)
        assert [job.number for job in store.jobs()] == list(range(1, 33))
        # what is there already is not refused
        assert submit(store, accepted[0], most=32).id == accepted[0]

    def test_queueing_again_needs_room_too(self, store: JobStore) -> None:
        submit(store, "a")
        store.cancel("a")
        submit(store, "b")
        with pytest.raises(QueueFull):
            submit(store, "a", most=1, again=True)
        assert store.get("a").state is State.CANCELLED
        assert submit(store, "a", most=2, again=True).state is State.QUEUED

    def test_a_full_disk_leaves_no_job(self, store: JobStore, monkeypatch: pytest.MonkeyPatch) -> None:
        def full(*args: Any, **kwargs: Any) -> None:
            raise OSError(errno.ENOSPC, "No space left on device")

        for place, call in ((Path, "mkdir"), (Path, "write_bytes"), (os, "replace")):
            with monkeypatch.context() as patch:
                patch.setattr(place, call, full)
                with pytest.raises(OutputError, match="No space"):
                    submit(store)
            assert store.jobs() == []
        assert submit(store).number == 1


class TestStates:
    def test_only_legal_moves_happen(self, store: JobStore) -> None:
        submit(store)
        for before in State:
            for after in State:
                store._execute("UPDATE jobs SET state = ?", before)
                if after in TRANSITIONS[before]:
                    store._move("a", after)
                    assert store.get("a").state is after
                else:
                    with pytest.raises(StateError, match=f"is {before}, it cannot become {after}"):
                        store._move("a", after)
                    assert store.get("a").state is before
        with pytest.raises(StateError, match="gone"):
            store._move("none", State.RUNNING)

    def test_a_done_one_is_never_lost(self, store: JobStore) -> None:
        submit(store)
        job, claim = run(store)
        store.finish(job, DONE)
        for act in (
            lambda: store.finish(job, {"state": "failed", "error": "late"}),
            lambda: store.put_back(job, "late", 0),
            lambda: store.put_back(job),
        ):
            with pytest.raises(StateError):
                act()
        store.cancel("a")
        store.retry("a")
        claim.release()
        assert store.recover() == []
        assert store.get("a").state is State.DONE and store.folder(job).result() == DONE

    def test_what_another_host_has_done_is_not_overwritten_by_a_late_error(self, store: JobStore) -> None:
        submit(store)
        job, _ = run(store)
        store.folder(job).end(DONE)
        store.finish(job, {"state": "failed", "error": "my files are gone"})
        assert store.get("a").state is State.DONE and store.folder(job).result() == DONE

    def test_a_cancel_that_comes_too_late_does_not_undo_another_hosts_video(self, store: JobStore) -> None:
        job = submit(store)
        store.folder(job).end(DONE)
        store.cancel("a")
        assert store.folder(job).result() == DONE

    def test_cancel_of_one_that_waits(self, store: JobStore) -> None:
        job = submit(store)
        assert store.cancel("a").state is State.CANCELLED
        result = store.folder(job).result()
        assert result is not None and result["state"] == "cancelled"
        assert store.claim_next("w") is None

    def test_cancel_of_one_that_runs_is_for_its_worker_to_see(self, store: JobStore) -> None:
        submit(store)
        job, _ = run(store)
        assert not store.folder(job).marked("cancel")
        assert store.cancel("a").state is State.RUNNING and store.folder(job).marked("cancel")

    def test_cancelled_while_it_ran_and_put_back_is_cancelled(self, store: JobStore) -> None:
        submit(store)
        job, _ = run(store)
        store.cancel("a")
        store.put_back(job)
        assert store.get("a").state is State.CANCELLED

    def test_retry_of_what_has_not_failed_changes_nothing(self, store: JobStore) -> None:
        job = submit(store)
        assert store.retry("a") == job
        with pytest.raises(InputError, match="no job 'b'"):
            store.retry("b")

    def test_retry_goes_on_with_what_is_there(self, store: JobStore) -> None:
        submit(store)
        job, claim = run(store)
        store.folder(job).segments.mkdir()
        (store.folder(job).segments / "seg_00000.ts").touch()
        store.finish(job, {"state": "failed", "error": "why"})
        claim.release()
        assert store.get("a").error == "why"
        again = store.retry("a")
        assert again.state is State.QUEUED and again.error is None and again.result == {}
        assert (store.folder(job).segments / "seg_00000.ts").exists()
        assert run(store)[1].fence == 2

    def test_a_finished_file_that_was_deleted_is_made_again(self, store: JobStore) -> None:
        submit(store)
        job, claim = run(store)
        store.finish(job, DONE)
        claim.release()
        assert submit(store).state is State.QUEUED
        assert run(store)[0].id == "a"

    def test_finishing_drops_what_only_an_unfinished_one_needs(self, store: JobStore) -> None:
        submit(store)
        job, _ = run(store)
        store.folder(job).records.mkdir()
        store.finish(job, DONE)
        assert not store.folder(job).records.exists()
        assert (store.get("a").done, store.get("a").frames) == (3, 33)

    def test_a_done_one_is_not_recorded_without_its_result(
        self, store: JobStore, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def full(*args: Any) -> None:
            raise OSError(errno.ENOSPC, "No space left on device")

        submit(store)
        job, _ = run(store)
        with monkeypatch.context() as patch:
            patch.setattr(os, "replace", full)
            with pytest.raises(OutputError, match="No space"):
                store.finish(job, DONE)
        assert store.get("a").state is State.RUNNING
        store.finish(job, DONE)
        assert store.get("a").state is State.DONE


class TestBackoff:
    @pytest.fixture
    def clock(self, monkeypatch: pytest.MonkeyPatch) -> list[float]:
        now = [5000.0]
        monkeypatch.setattr(time, "monotonic", lambda: now[0])
        return now

    def test_waits_longer_every_time_and_fails_in_the_end(self, store: JobStore, clock: list[float]) -> None:
        submit(store)
        for attempt, wait in enumerate((2, 4, 8), 1):
            job, claim = run(store)
            assert job.attempts == attempt - 1
            store.put_back(job, "disk full", retries=3)
            claim.release()
            assert store.get("a").error == "disk full" and store.get("a").state is State.QUEUED
            clock[0] += wait - 0.1
            assert store.claim_next("w") is None
            clock[0] += 0.2
        job, claim = run(store)
        store.put_back(job, "disk full", retries=3)
        assert store.get("a").state is State.FAILED and store.get("a").error == "disk full"

    def test_is_bounded(self, store: JobStore, clock: list[float]) -> None:
        submit(store)
        store._execute("UPDATE jobs SET attempts = 50")
        job, claim = run(store)
        store.put_back(job, "x", retries=99)
        claim.release()
        clock[0] += 60.1
        assert run(store)[0].id == "a"

    def test_an_interruption_is_no_attempt(self, store: JobStore, clock: list[float]) -> None:
        submit(store)
        for _ in range(5):
            job, claim = run(store)
            store.put_back(job)
            claim.release()
        assert store.get("a").attempts == 0 and store.get("a").error is None

    def test_a_reboot_ends_the_wait(self, store: JobStore, clock: list[float]) -> None:
        submit(store)
        job, claim = run(store)
        store.put_back(job, "x", retries=9)
        claim.release()
        clock[0] = 10.0
        assert run(store)[0].id == "a"

    def test_wall_clocks_do_not_matter(
        self, store: JobStore, clock: list[float], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        submit(store)
        job, claim = run(store)
        store.put_back(job, "x", retries=9)
        claim.release()
        for jump in (-86400.0, 86400.0):
            monkeypatch.setattr(time, "time", lambda jump=jump: 1e9 + jump)
            assert store.claim_next("w") is None
        clock[0] += 3
        assert run(store)[0].id == "a"


class TestClaiming:
    def test_in_order_but_preferred_ones_first(self, store: JobStore) -> None:
        for id in "abc":
            submit(store, id)
        taken = store.claim_next("w", lambda job: job.id == "c")
        assert taken is not None and taken[0].id == "c"
        assert [run(store)[0].id for _ in range(2)] == ["a", "b"]
        assert store.claim_next("w") is None

    def test_what_another_host_has_ended_is_taken_over(self, store: JobStore) -> None:
        for id in ("a", "b", "c"):
            submit(store, id)
        store.folder(store.get("a")).end(DONE)
        store.folder(store.get("b")).end({"state": "failed", "error": "why"})
        assert run(store)[0].id == "c"
        assert store.get("a").state is State.DONE and store.get("a").frames == 33
        assert store.get("b").state is State.FAILED and store.get("b").error == "why"

    @pytest.mark.parametrize("text", ["{}", '{"state": "queued"}', "[", '{"state": "running"}'])
    def test_a_damaged_result_is_none(self, store: JobStore, text: str) -> None:
        job = submit(store)
        (store.folder(job).path / "result.json").write_text(text)
        assert run(store)[0].id == "a"

    def test_a_result_without_numbers(self, store: JobStore) -> None:
        job = submit(store)
        store.folder(job).end({"state": "done", "frames": 3})
        assert store.claim_next("w") is None and store.get("a").state is State.DONE

    def test_what_another_process_holds_is_passed_by(self, store: JobStore) -> None:
        submit(store, "a")
        submit(store, "b")
        other = Claims().take(store.folder(store.get("a")).path)
        assert other is not None
        assert run(store)[0].id == "b" and store.claim_next("w") is None
        other.release()
        assert run(store)[0].id == "a"

    def test_a_folder_that_was_deleted_is_made_again(self, store: JobStore) -> None:
        job = submit(store)
        store.folder(job).remove()
        again, _ = run(store)
        assert again.id == "a" and store.folder(job).job()["key"] == job.key

    def test_a_folder_that_takes_no_claim_fails_in_the_end(
        self, store: JobStore, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        now = [5000.0]
        monkeypatch.setattr(time, "monotonic", lambda: now[0])
        job = submit(store)
        (store.folder(job).path / "claims").touch()
        for _ in range(MAX_CRASHES + 1):
            assert store.claim_next("w") is None
            now[0] += 61
        found = store.get("a")
        assert found.state is State.FAILED and "Not a directory" in str(found.error)

    def test_a_job_is_deleted_between_looking_and_claiming(
        self, store: JobStore, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        submit(store, "a")
        submit(store, "b")

        def prefer(job: Job) -> bool:
            with contextlib.suppress(InputError):
                store.delete("a")
            return False

        taken = store.claim_next("w", prefer)
        assert taken is not None and taken[0].id == "b"
        assert [path.split("-")[0] for path in os.listdir(store.home / "jobs")] == ["b"]

    def test_workers_share_the_jobs_and_none_is_done_twice(self, tmp_path: Path) -> None:
        stores = [JobStore(tmp_path) for _ in range(4)]
        for i in range(24):
            submit(stores[0], f"j{i}")
        done, failed = list[str](), list[BaseException]()

        def work(mine: JobStore, name: str) -> None:
            try:
                while mine.counts()[State.QUEUED] + mine.counts()[State.RUNNING]:
                    taken = mine.claim_next(name)
                    mine.recover()
                    if taken is not None:
                        mine.report(taken[0].id, progress(1))
                        done.append(taken[0].id)
                        mine.finish(taken[0], DONE)
                        taken[1].release()
            except BaseException as error:
                failed.append(error)

        threads = [threading.Thread(target=work, args=(s, f"w{i}")) for i, s in enumerate(stores)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert not failed
        assert sorted(done) == sorted(f"j{i}" for i in range(24))
        assert stores[0].counts()[State.DONE] == 24
        for each in stores:
            each.close()


class TestRecover:
    def test_of_a_live_worker_nothing_changes(self, store: JobStore) -> None:
        submit(store)
        job, _ = run(store)
        assert store.recover() == [] and store.get("a") == job

    def test_of_a_dead_one_it_goes_back_to_the_queue(self, store: JobStore) -> None:
        submit(store)
        _, claim = run(store)
        abandon(claim)
        assert [job.id for job in store.recover()] == ["a"]
        found = store.get("a")
        assert (found.state, found.worker, found.crashes) == (State.QUEUED, None, 1)
        assert run(store)[1].fence == 2

    def test_only_of_the_named_workers(self, store: JobStore) -> None:
        submit(store)
        abandon(run(store, "w1")[1])
        assert store.recover(["w2"]) == [] and len(store.recover(["w1"])) == 1

    def test_one_that_had_written_its_result_is_done(self, store: JobStore) -> None:
        submit(store)
        job, claim = run(store)
        store.folder(job).records.mkdir()
        store.folder(job).end(DONE)
        abandon(claim)
        assert store.recover()[0].state is State.DONE
        assert not store.folder(job).records.exists()

    def test_what_kills_too_many_workers_is_set_aside(self, store: JobStore) -> None:
        submit(store)
        for crash in range(1, MAX_CRASHES + 1):
            assert store.get("a").state is State.QUEUED
            abandon(run(store)[1])
            store.recover()
            assert store.get("a").crashes == (crash if crash < MAX_CRASHES else MAX_CRASHES - 1)
        found = store.get("a")
        assert found.state is State.FAILED and f"died {MAX_CRASHES} times at chunk 0" in str(found.error)
        assert store.retry("a").crashes == 0

    def test_progress_forgives(self, store: JobStore) -> None:
        submit(store)
        for chunk in range(3 * MAX_CRASHES):
            abandon(run(store)[1])
            if chunk % 3 == 0:
                store.report("a", progress(chunk))
            store.recover()
            assert store.get("a").crashes == chunk % 3 + 1
        assert store.get("a").state is State.QUEUED

    @pytest.mark.parametrize("end", ["finish", "put back", "put back and claimed"])
    def test_a_worker_that_ends_meanwhile_is_not_dead(
        self, store: JobStore, monkeypatch: pytest.MonkeyPatch, end: str
    ) -> None:
        """Between the look at the row and the look at the claim."""
        submit(store)
        job, claim = run(store)
        real, second = store.claims.held, list[tuple[Job, Claim]]()

        def late(folder: Path) -> bool:
            store.finish(job, DONE) if end == "finish" else store.put_back(job)
            claim.release()
            held = real(folder)
            if "claimed" in end:
                second.append(run(store, "w2"))
            return held

        monkeypatch.setattr(store.claims, "held", late)
        store.recover()
        found = store.get("a")
        assert found.crashes == 0
        wanted = {"finish": State.DONE, "put back": State.QUEUED}.get(end, State.RUNNING)
        assert (found.state, found.worker) == (wanted, "w2" if second else None)

    def test_a_claim_that_cannot_be_seen_is_left_for_later(
        self, store: JobStore, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        submit(store, "a")
        submit(store, "b")
        claims = [run(store)[1] for _ in range(2)]
        abandon(claims[0])
        abandon(claims[1])
        real = claims_module._numbers

        def numbers(folder: Path) -> list[int]:
            if folder.name.startswith("a"):
                raise OutputError("stale")
            return real(folder)

        monkeypatch.setattr(claims_module, "_numbers", numbers)
        assert [job.id for job in store.recover()] == ["b"]
        assert store.get("a").state is State.RUNNING


class TestDelete:
    def test_takes_folder_rows_and_files_and_nothing_else(self, store: JobStore) -> None:
        job, other = submit(store), submit(store, "b")
        files = [store.file(job), partial_video(store.file(job))]
        for path in files:
            video(path, job.key)
        kept = video(store.file(other), other.key)
        store.delete("a")
        assert not any(path.exists() for path in files) and kept.exists()
        assert [j.id for j in store.jobs()] == ["b"] and not store.folder(job).path.exists()
        with pytest.raises(InputError, match="no job 'a'"):
            store.get("a")
        assert submit(store).state is State.QUEUED

    def test_the_video_can_stay(self, store: JobStore) -> None:
        job = submit(store)
        video(store.file(job), job.key)
        store.delete("a", video=False)
        assert store.file(job).exists()

    @pytest.mark.parametrize("foreign", ["text", "video", "folder"])
    def test_a_file_of_that_name_that_is_not_its_video_stays(self, store: JobStore, foreign: str) -> None:
        job = submit(store)
        for path in (store.file(job), partial_video(store.file(job))):
            if foreign == "folder":
                path.mkdir()
            elif foreign == "text":
                path.write_text("mine")
            else:
                video(path, "another")
        store.delete("a")
        assert store.file(job).exists() and partial_video(store.file(job)).exists()

    def test_a_linked_folder(self, store: JobStore, tmp_path: Path) -> None:
        job = submit(store)
        path = store.folder(job).path
        (tmp_path / "elsewhere").mkdir()
        (tmp_path / "elsewhere" / "precious").write_text("mine")
        store.folder(job).remove()
        path.symlink_to(tmp_path / "elsewhere")
        store.delete("a")
        assert not path.is_symlink() and (tmp_path / "elsewhere" / "precious").read_text() == "mine"

    def test_refuses_one_that_runs(self, store: JobStore) -> None:
        submit(store)
        job, claim = run(store)
        with pytest.raises(InputError, match="is running; cancel it first"):
            store.delete("a")
        assert store.get("a") == job
        claim.check()
        store.finish(job, DONE)
        claim.release()
        store.delete("a")

    def test_one_whose_folder_is_gone(self, store: JobStore) -> None:
        job = submit(store)
        store.folder(job).remove()
        store.delete("a")
        assert store.jobs() == []


class TestWatch:
    def test_yields_every_change_and_ends(self, store: JobStore) -> None:
        submit(store)
        seen, go = list[tuple[str, int]](), threading.Semaphore(0)

        def look() -> None:
            for job in store.watch("a", poll_s=0.001):
                seen.append((job.state.value, job.done))
                go.release()

        thread = threading.Thread(target=look)
        thread.start()
        assert go.acquire(timeout=10)
        job, _ = run(store)
        assert go.acquire(timeout=10)
        for chunk in (1, 2):
            store.report("a", progress(chunk))
            assert go.acquire(timeout=10)
        store.finish(job, DONE)
        thread.join(10)
        assert not thread.is_alive()
        assert seen == [("queued", 0), ("running", 0), ("running", 1), ("running", 2), ("done", 3)]

    def test_of_one_that_has_ended_is_one_look(self, store: JobStore) -> None:
        submit(store)
        store.cancel("a")
        assert [job.state for job in store.watch("a")] == [State.CANCELLED]


def broken(path: Path, how: str) -> None:
    if how == "deleted":
        for suffix in ("", "-wal", "-shm"):
            Path(f"{path}{suffix}").unlink(missing_ok=True)
    elif how == "deleted alone":
        path.unlink()
    elif how == "garbage":
        path.write_bytes(os.urandom(5000))
    elif how == "text":
        path.write_text("this is no database" * 400)
    else:
        data = path.read_bytes()
        path.write_bytes(
            {
                "empty": b"",
                "half": data[: len(data) // 2],
                "short": data[:-1],
                "header": data[:100],
                "page": data[:4096] + os.urandom(4096) + data[8192:],
            }[how]
        )


class TestIndex:
    @pytest.mark.parametrize(
        "how", ["deleted", "deleted alone", "empty", "half", "short", "header", "garbage", "text", "page"]
    )
    def test_is_made_anew_from_the_folders(self, tmp_path: Path, how: str) -> None:
        with JobStore(tmp_path) as store:
            for id in ("z", "a", "m.1", "q", "r"):
                submit(store, id)
            claims = [run(store) for _ in range(4)]
            store.finish(claims[0][0], DONE)
            store.finish(claims[1][0], {"state": "failed", "error": "why"})
            store.finish(claims[2][0], {"state": "cancelled"})
            before = {job.id: job for job in store.jobs()}
            claims[3][1].release()
        broken(tmp_path / ".vidkv" / "jobs.sqlite", how)
        with JobStore(tmp_path) as store:
            # of some damage the index itself makes good
            store.recover()
            after = {job.id: job for job in store.jobs()}
            assert list(after) == ["z", "a", "m.1", "q", "r"]
            wanted = ["done", "failed", "cancelled", "queued", "queued"]
            assert [job.state.value for job in after.values()] == wanted
            for id, job in after.items():
                for name in ("key", "number", "request", "settings", "out", "chunks", "submitted", "result"):
                    assert getattr(job, name) == getattr(before[id], name), name
            assert after["a"].error == "why" and after["z"].frames == 33
            assert submit(store, "new").number == 6 and run(store)[0].id == "q"

    @pytest.mark.parametrize("text", ["{}", "[]", "", '{"id": "b"}', '{"id": 5, "key": "", "number": "x"}'])
    def test_damaged_folders_are_passed_by(self, tmp_path: Path, text: str) -> None:
        with JobStore(tmp_path) as store:
            submit(store, "a")
            bad = submit(store, "b")
            store.delete(submit(store, "c").id)
        (store.folder(bad).path / "job.json").write_text(text)
        (store.home / "jobs" / "file").touch()
        (store.home / "jobs" / "empty").mkdir()
        broken(tmp_path / ".vidkv" / "jobs.sqlite", "deleted")
        with JobStore(tmp_path) as store:
            assert [job.id for job in store.jobs()] == ["a"]
            assert submit(store, "b").state is State.QUEUED

    @pytest.mark.parametrize(
        "change",
        [
            {"number": 2**70},
            {"id": "../a"},
            {"out": "../../a.mp4"},
            {"out": "/a.mp4"},
            {"id": "other"},
            {"prompt": "\ud800", "out": "\ud800.mp4"},
        ],
    )
    def test_a_folder_that_lies_does_no_harm(self, tmp_path: Path, change: dict[str, Any]) -> None:
        with JobStore(tmp_path) as store:
            submit(store, "a")
            bad = submit(store, "b")
        path = store.folder(bad).path / "job.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | change))
        broken(tmp_path / ".vidkv" / "jobs.sqlite", "deleted")
        with JobStore(tmp_path) as store:
            assert [job.id for job in store.jobs()] == ["a"]

    def test_of_another_version_is_made_anew(self, tmp_path: Path) -> None:
        with JobStore(tmp_path) as store:
            submit(store, "a")
            store._execute("ALTER TABLE jobs DROP COLUMN keep")
            store._execute("PRAGMA user_version = 1")
        with JobStore(tmp_path) as store:
            assert [(job.id, job.keep) for job in store.jobs()] == [("a", False)]
            assert submit(store, "b").state is State.QUEUED

    def test_opened_by_many_at_once_when_damaged(self, tmp_path: Path) -> None:
        """One of them makes it anew, the others take what it made: all see one index."""
        with JobStore(tmp_path) as store:
            for i in range(5):
                submit(store, f"j{i}")
        broken(tmp_path / ".vidkv" / "jobs.sqlite", "garbage")
        barrier, opened, failed = threading.Barrier(6), list[JobStore](), list[BaseException]()

        def open_it() -> None:
            barrier.wait()
            try:
                opened.append(JobStore(tmp_path))
            except BaseException as error:
                failed.append(error)

        threads = [threading.Thread(target=open_it) for _ in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert not failed
        submit(opened[0], "last")
        for each in opened:
            assert [job.id for job in each.jobs()] == [f"j{i}" for i in range(5)] + ["last"]
            each.close()

    def test_locked_by_another_process(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """An error of one line for those who want to write; nothing is lost."""
        monkeypatch.setattr(index_module, "BUSY_S", 0.05)
        with JobStore(tmp_path) as store:
            submit(store, "a")
            other = sqlite3.connect(tmp_path / ".vidkv" / "jobs.sqlite", isolation_level=None)
            other.execute("BEGIN EXCLUSIVE")
            for act in (lambda: submit(store, "b"), lambda: store.claim_next("w"), lambda: store.cancel("a")):
                with pytest.raises(OutputError, match="database is locked"):
                    act()
            store.report("a", progress(1))
            assert [job.id for job in store.jobs()] == ["a"]
            other.execute("ROLLBACK")
            other.close()
            submit(store, "b")
            assert store.cancel("a").state is State.CANCELLED
            assert run(store)[0].id == "b"

    def test_a_commit_that_fails_leaves_no_open_transaction(self, store: JobStore) -> None:
        submit(store, "a")
        pages = store._execute("PRAGMA page_count").fetchone()[0]
        store._execute(f"PRAGMA max_page_count = {pages}")
        with pytest.raises(OutputError, match="full"):
            for i in range(500):
                submit(store, f"j{i}")
        count = len(store.jobs())
        store._execute("PRAGMA max_page_count = 100000")
        submit(store, "last")
        assert len(store.jobs()) == count + 1

    def test_a_file_where_the_folder_should_be(self, tmp_path: Path) -> None:
        (tmp_path / "file").touch()
        with pytest.raises(OutputError, match="cannot use the output folder"):
            JobStore(tmp_path / "file")
        (tmp_path / ".vidkv" / "jobs.sqlite").mkdir(parents=True)
        with pytest.raises(OutputError, match="cannot open the job index"):
            JobStore(tmp_path)

    def test_hosts_share_folders_and_not_rows(self, tmp_path: Path) -> None:
        with JobStore(tmp_path, "one") as one, JobStore(tmp_path, "two") as two:
            for each in (one, two):
                submit(each, "a")
            job, claim = run(one)
            assert two.claim_next("w") is None
            one.finish(job, DONE)
            claim.release()
            assert two.claim_next("w") is None and two.get("a").state is State.DONE
            with JobStore(tmp_path, "three") as three:
                assert three.jobs() == []


class Machine(RuleBasedStateMachine):
    """Whatever happens in whatever order, the index agrees with a plain dictionary."""

    ids = st.sampled_from(["a", "b.1", "C"])

    @initialize()
    def begin(self) -> None:
        import tempfile

        self.place = tempfile.TemporaryDirectory()
        self.store = JobStore(self.place.name)
        self.states: dict[str, str] = {}
        self.running: dict[str, tuple[Job, Claim]] = {}
        self.crashes: dict[str, int] = {}
        self.done: set[str] = set()
        self.pausing: set[str] = set()

    def teardown(self) -> None:
        if hasattr(self, "store"):
            self.store.close()
            self.place.cleanup()

    @rule(id=ids, again=st.booleans())
    def submit(self, id: str, again: bool) -> None:
        state = self.states.get(id, "new")
        submit(self.store, id, again=again)
        if state == "new" or (again and state in ("failed", "cancelled")):
            self.states[id], self.crashes[id] = "queued", 0
            self.pausing.discard(id)

    @rule(id=ids)
    def retry(self, id: str) -> None:
        with contextlib.suppress(InputError):
            self.store.retry(id)
        if self.states.get(id) in ("failed", "cancelled"):
            self.states[id], self.crashes[id] = "queued", 0
            self.pausing.discard(id)

    @rule(id=ids)
    def cancel(self, id: str) -> None:
        if id in self.states:
            self.store.cancel(id)
            if self.states[id] in ("queued", "paused"):
                self.states[id] = "cancelled"

    @rule(id=ids)
    def pause(self, id: str) -> None:
        if id in self.states:
            self.store.pause(id)
            if self.states[id] in ("queued", "running"):
                self.pausing.add(id)
            if self.states[id] == "queued":
                self.states[id] = "paused"

    @rule(id=ids)
    def resume(self, id: str) -> None:
        if id in self.states:
            self.store.resume(id)
            if self.states[id] in ("paused", "running"):
                self.pausing.discard(id)
            if self.states[id] == "paused":
                self.states[id] = "queued"

    @precondition(lambda self: self.running)
    @rule(data=st.data())
    def hold(self, data: st.DataObject) -> None:
        """Its worker saw the mark, which may have been taken back since."""
        id = data.draw(st.sampled_from(sorted(self.running)))
        job, claim = self.running.pop(id)
        cancelled = self.store.folder(job).marked("cancel")
        self.store.hold(job)
        claim.release()
        self.states[id] = "cancelled" if cancelled else "paused" if id in self.pausing else "queued"

    @rule(id=ids)
    def delete(self, id: str) -> None:
        if id in self.states:
            if self.states[id] == "running":
                with pytest.raises(InputError):
                    self.store.delete(id)
            else:
                self.store.delete(id)
                del self.states[id]
                self.done.discard(id)

    @rule()
    def claim(self) -> None:
        taken = self.store.claim_next("w")
        waiting = {id for id, state in self.states.items() if state == "queued"}
        assert (taken is not None) == bool(waiting)
        if taken is not None:
            assert taken[0].id in waiting and taken[0].id not in self.running
            self.states[taken[0].id], self.running[taken[0].id] = "running", taken

    @precondition(lambda self: self.running)
    @rule(data=st.data(), state=st.sampled_from(["done", "failed", "cancelled"]))
    def finish(self, data: st.DataObject, state: str) -> None:
        id = data.draw(st.sampled_from(sorted(self.running)))
        job, claim = self.running.pop(id)
        if state == "done":
            (self.store.root / job.out).touch()
            self.done.add(id)
        self.store.finish(job, {"state": state, "frames": 33, "chunks": 3})
        claim.release()
        self.states[id] = state

    @precondition(lambda self: self.running)
    @rule(data=st.data())
    def put_back(self, data: st.DataObject) -> None:
        id = data.draw(st.sampled_from(sorted(self.running)))
        job, claim = self.running.pop(id)
        cancelled = self.store.folder(job).marked("cancel")
        self.store.put_back(job)
        claim.release()
        waiting = "paused" if id in self.pausing else "queued"
        self.states[id] = "cancelled" if cancelled else waiting

    @precondition(lambda self: self.running)
    @rule(data=st.data(), written=st.booleans())
    def die(self, data: st.DataObject, written: bool) -> None:
        """A worker is killed, perhaps after it has written the result."""
        id = data.draw(st.sampled_from(sorted(self.running)))
        job, claim = self.running.pop(id)
        if written:
            self.store.folder(job).end(DONE)
            (self.store.root / job.out).touch()
        abandon(claim)
        self.store.recover()
        if written:
            self.states[id] = "done"
            self.done.add(id)
            return
        self.crashes[id] += 1
        waiting = "paused" if id in self.pausing else "queued"
        waiting = "cancelled" if self.store.folder(job).marked("cancel") else waiting
        self.states[id] = waiting if self.crashes[id] < MAX_CRASHES else "failed"
        self.crashes[id] %= MAX_CRASHES

    @rule(lose=st.booleans())
    def reopen(self, lose: bool) -> None:
        if lose and self.running:
            return
        self.store.close()
        if lose:
            broken(Path(self.place.name) / ".vidkv" / "jobs.sqlite", "deleted")
            self.crashes = dict.fromkeys(self.crashes, 0)
        self.store = JobStore(self.place.name)

    @invariant()
    def agrees(self) -> None:
        if not hasattr(self, "store"):
            return
        jobs = self.store.jobs()
        assert len({job.number for job in jobs}) == len(jobs)
        assert {job.id: job.state.value for job in jobs} == self.states
        assert all(self.states[id] == "done" for id in self.done)
        for _, claim in self.running.values():
            claim.check()


Machine.TestCase.settings = hypothesis_settings(max_examples=25, stateful_step_count=25, deadline=None)
TestMachine = Machine.TestCase
