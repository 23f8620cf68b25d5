"""What people do to a job while it runs and after: other prompts, waiting, ending early, going on from it."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.jobs.test_run import (
    CHUNKS,
    FRAMES,
    LIGHT,
    OFTEN,
    OTHER,
    PROMPT,
    SECONDS,
    SELDOM,
    Bench,
    Killed,
    decoded,
    model,
    pictures,
)
from vidkv.errors import Cancelled, InputError, OutputError, PromptError, ResourceError, StateError
from vidkv.jobs import run
from vidkv.jobs.branch import Branch, finished_chunks
from vidkv.jobs.folder import JobFolder
from vidkv.jobs.run import Options, Paused, Progress
from vidkv.jobs.store import MAX_WAITING, Job, JobStore, QueueFull, State
from vidkv.jobs.worker import Orders, Worker
from vidkv.request import EngineSettings, VideoRequest
from vidkv.segments import probe, read_metadata

__all__ = ["model", "pictures"]
THIRD = "a green triangle resting"


@pytest.fixture
def bench(tmp_path: Path, model: str, pictures: Path) -> Bench:
    return Bench(tmp_path / "videos", model, pictures)


def at_chunk(wanted: int, act: Callable[[], object]) -> Callable[[Progress], None]:
    """Do something once so many chunks are finished."""

    def report(progress: Progress) -> None:
        if progress.chunk == wanted:
            act()

    return report


def keep(bench: Bench, id: str = "kept", **request: Any) -> Job:
    """Submit a job whose parts stay."""
    values = {"cache": "fp32,window=9,sink=2", "seconds": SECONDS, "height": 32, "width": 48}
    whole = VideoRequest.of(values | {"id": id, "prompt": PROMPT, "model": bench.model} | request)
    return bench.store.submit(whole, EngineSettings(device="cpu"), keep=True)


def finish(bench: Bench, job: Job, options: Options = OFTEN, **how: Any) -> Job:
    """Run a job to its end as a worker would."""
    taken = bench.store.claim_next("w", lambda other: other.id == job.id)
    assert taken is not None and taken[0].id == job.id
    _, claim = taken
    claim.release()
    bench.store.finish(taken[0], bench.run(bench.store.folder(job), options, **how))
    return bench.store.get(job.id)


def equal(bench: Bench, found: Job, **request: Any) -> None:
    """A job's video is the one that its request gives from nothing, bit for bit."""
    result = bench.run(bench.submit(f"fresh-{found.id}", **request), SELDOM)
    assert found.result["latents_sha256"] == result["latents_sha256"]
    ours, theirs = (decoded(path) for path in (bench.store.file(found), Path(result["out"])))
    assert ours.shape == theirs.shape and (ours == theirs).all()


class TestPrompt:
    @pytest.mark.parametrize("switch", ["keep", "recache", "flush", "lerp", None])
    def test_takes_over_with_the_next_chunk_as_if_it_had_been_scheduled(
        self, bench: Bench, switch: Any
    ) -> None:
        job = keep(bench)
        folder = bench.store.folder(job)
        seen: list[Progress] = []

        def report(progress: Progress) -> None:
            seen.append(progress)
            if progress.chunk == 3:
                bench.store.steer(job.id, OTHER, switch)

        done = finish(bench, job, report=report)
        second = (9 + 2 * 12) / 16
        entry = (second, OTHER, switch)
        assert folder.steered() == [entry] and folder.wanted_prompts() == []
        assert seen[2].steered == () and seen[-1].steered == (entry,)
        equal(bench, done, schedule=[[second, OTHER, switch]])
        said = read_metadata(bench.store.file(done))
        assert f"{second:g}: {OTHER}" in said["prompts"]
        assert VideoRequest.of(json.loads(said["request"])).schedule == (entry if switch else entry[:2],)

    def test_a_killed_worker_has_not_forgotten_it(self, bench: Bench) -> None:
        """Asked for after chunk 2, killed after chunk 4, asked for another one meanwhile."""
        job = keep(bench)

        def report(progress: Progress) -> None:
            if progress.chunk == 2:
                bench.store.steer(job.id, OTHER, "flush")
            if progress.chunk == 4:
                bench.store.steer(job.id, THIRD)
                raise Killed

        with pytest.raises(Killed):
            bench.run(bench.store.folder(job), OFTEN, report)
        done = finish(bench, job)
        schedule = [[21 / 16, OTHER, "flush"], [45 / 16, THIRD]]
        assert done.progress == {} and bench.store.folder(job).steered()[1] == (45 / 16, THIRD, None)
        equal(bench, done, schedule=schedule)

    def test_killed_between_noting_and_the_chunk(self, bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
        job, steer = keep(bench), JobFolder.steer

        def killed(self: JobFolder, *args: Any) -> None:
            steer(self, *args)
            raise Killed

        monkeypatch.setattr(JobFolder, "steer", killed)
        with pytest.raises(Killed):
            bench.run(bench.store.folder(job), OFTEN, at_chunk(2, lambda: bench.store.steer(job.id, OTHER)))
        monkeypatch.undo()
        done = finish(bench, job)
        assert len(bench.store.folder(job).steered()) == 1
        equal(bench, done, schedule=[[21 / 16, OTHER]])

    def test_killed_before_the_wish_was_deleted(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """What has taken over does not do so again, however many follow it."""
        folder, unlink = JobFolder(tmp_path), Path.unlink
        folder.ask_for_prompt(OTHER, None)
        names = [name for name, _, _ in folder.wanted_prompts()]

        def killed(self: Path, *args: Any, **options: Any) -> None:
            if self.parent.name == "steering":
                raise Killed
            unlink(self, *args, **options)

        monkeypatch.setattr(Path, "unlink", killed)
        with pytest.raises(Killed):
            folder.steer([(0.5, OTHER, None)], names)
        monkeypatch.undo()
        folder.ask_for_prompt(THIRD, None)
        [(name, prompt, _)] = folder.wanted_prompts()
        assert prompt == THIRD
        folder.steer([(0.5, OTHER, None), (1.0, THIRD, None)], [name])
        assert folder.wanted_prompts() == []
        assert os.listdir(tmp_path / "steering") == []

    def test_no_endless_wishes(self, bench: Bench) -> None:
        job = keep(bench)
        for _ in range(MAX_WAITING):
            bench.store.folder(job).ask_for_prompt(OTHER, None)
        with pytest.raises(InputError, match=f"{MAX_WAITING} prompts of 'kept' wait"):
            bench.store.steer(job.id, OTHER)

    def test_memory_that_the_job_itself_holds_is_none_that_is_missing(
        self, bench: Bench, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        done = finish(bench, keep(bench, "done"))
        job = keep(bench)
        monkeypatch.setattr("vidkv.planning.usable_bytes", lambda device: 1)
        bench.store.steer(job.id, OTHER)
        bench.store.branch(done.id, Branch(more_seconds=1))
        with pytest.raises(ResourceError, match="needs"):
            keep(bench, "another")
        # networks that are loaded already are no reason either
        assert finish(bench, job).state is State.DONE

    def test_of_several_the_last_one_holds_and_before_the_first_chunk_it_replaces_the_prompt(
        self, bench: Bench
    ) -> None:
        job = keep(bench)
        for prompt in (THIRD, OTHER):
            bench.store.steer(job.id, prompt)
        equal(bench, finish(bench, job), prompt=OTHER)

    def test_later_prompts_of_the_schedule_still_come(self, bench: Bench) -> None:
        job = keep(bench, schedule=[[3.0, THIRD]])
        done = finish(bench, job, report=at_chunk(2, lambda: bench.store.steer(job.id, OTHER)))
        equal(bench, done, schedule=[[21 / 16, OTHER], [3.0, THIRD]])

    def test_too_late_is_no_harm(self, bench: Bench) -> None:
        job = keep(bench)
        done = finish(bench, job, report=at_chunk(CHUNKS, lambda: bench.store.steer(job.id, OTHER)))
        assert bench.store.folder(job).steered() == []
        equal(bench, done)

    def test_what_cannot_be_is_refused(self, bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
        job = keep(bench)
        with pytest.raises(PromptError, match="switch='cut'"):
            bench.store.steer(job.id, OTHER, "cut")  # type: ignore[arg-type]
        with pytest.raises(InputError, match="empty"):
            bench.store.steer(job.id, " ")
        assert bench.store.folder(job).wanted_prompts() == []
        bench.store.cancel(job.id)
        with pytest.raises(InputError, match="is cancelled; branch from"):
            bench.store.steer(job.id, OTHER)

    def test_an_id_that_stands_for_settings_keeps_its_word(self, bench: Bench) -> None:
        whole = VideoRequest(prompt=PROMPT, model=bench.model, seconds=1, height=32, width=48)
        job = bench.store.submit(whole, EngineSettings(device="cpu"))
        with pytest.raises(InputError, match="stands for the settings"):
            bench.store.steer(job.id, OTHER)


class TestPause:
    @pytest.mark.parametrize("options", [OFTEN, SELDOM], ids=["checkpoints", "at the pause alone"])
    def test_goes_on_bit_for_bit(self, bench: Bench, options: Options) -> None:
        job = keep(bench)
        folder = bench.store.folder(job)
        with pytest.raises(Paused):
            bench.run(folder, options, at_chunk(3, lambda: bench.store.pause(job.id)))
        assert finished_chunks(folder) == 3
        assert any(path.name.startswith("checkpoint-000003") for path in folder.checkpoints.iterdir())
        assert not list(bench.root.glob("*.partial.mp4"))
        bench.store.resume(job.id)
        done = finish(bench, job, options)
        assert done.result["resumed_at"] == 3
        equal(bench, done)

    def test_a_worker_takes_others_meanwhile(self, bench: Bench) -> None:
        first, second = keep(bench, "first"), keep(bench, "second")
        store = bench.store
        worker = Worker(store, Orders(store.root, store.name, "w", OFTEN))
        worker.runner._loaded = bench.pipe
        store.pause(first.id)
        worker.work()
        assert store.get("second").state is State.DONE and store.get("first").state is State.PAUSED
        store.resume("first")
        worker.work()
        assert store.get("first").state is State.DONE
        assert second.number > first.number

    def test_a_worker_holds_what_is_paused_while_it_runs(self, bench: Bench, monkeypatch: Any) -> None:
        job, store = keep(bench), bench.store
        worker = Worker(store, Orders(store.root, store.name, "w", OFTEN))
        report = JobStore.report

        def reported(self: JobStore, id: str, progress: Progress) -> None:
            report(self, id, progress)
            if progress.chunk == 2:
                store.pause(id)

        monkeypatch.setattr(JobStore, "report", reported)
        worker.work()
        paused = store.get(job.id)
        assert (paused.state, paused.done, paused.worker) == (State.PAUSED, 2, None)
        assert store.cancel(job.id).state is State.CANCELLED

    @pytest.mark.parametrize("end", ["held", "dead"])
    def test_one_that_is_to_stop_does_not_wait(self, bench: Bench, end: str) -> None:
        job, store = keep(bench), bench.store
        taken = store.claim_next("w")
        assert taken is not None
        store.pause(job.id)
        store.cancel(job.id)
        if end == "held":
            store.hold(taken[0])
        else:
            taken[1].release()
            store.recover()
        assert store.get(job.id).state is State.CANCELLED

    def test_survives_the_index(self, bench: Bench) -> None:
        job = keep(bench)
        bench.store.pause(job.id)
        bench.store.close()
        for path in (bench.root / ".vidkv").glob("jobs.sqlite*"):
            path.unlink()
        bench.store = JobStore(bench.root)
        found = bench.store.get(job.id)
        assert found.state is State.PAUSED and found.keep
        assert bench.store.claim_next("w") is None
        assert bench.store.resume(job.id).state is State.QUEUED


class TestStop:
    def test_what_is_finished_is_the_video(self, bench: Bench) -> None:
        job = keep(bench)
        done = finish(bench, job, report=at_chunk(4, lambda: bench.store.stop(job.id)))
        assert (done.state, done.done, done.frames) == (State.DONE, 4, 45)
        assert done.result["ended_early"] and probe(bench.store.file(done)).frames == 45
        said = read_metadata(bench.store.file(done))
        assert said["seconds"] == f"{45 / 16:g}" and json.loads(said["request"])["seconds"] == 45 / 16
        equal(bench, done, seconds=45 / 16)

    def test_one_that_waits_with_chunks_needs_no_networks(self, bench: Bench, monkeypatch: Any) -> None:
        job = keep(bench)
        with pytest.raises(Paused):
            bench.run(bench.store.folder(job), OFTEN, at_chunk(2, lambda: bench.store.pause(job.id)))
        assert bench.store.get(job.id).state is State.PAUSED
        assert bench.store.stop(job.id).state is State.QUEUED
        monkeypatch.setattr("vidkv.jobs.run.load_pipeline", None)
        done = finish(bench, job)
        assert done.frames == 21 and probe(bench.store.file(done)).frames == 21

    @pytest.mark.parametrize("options", [OFTEN, SELDOM], ids=["checkpoints", "at the end alone"])
    @pytest.mark.parametrize("switch", ["recache", "flush"])
    def test_in_a_chunk_whose_prompt_has_taken_over(
        self, bench: Bench, monkeypatch: pytest.MonkeyPatch, switch: str, options: Options
    ) -> None:
        """The switch has changed the history for a chunk that is never finished: a branch must not see it."""
        job, check = keep(bench, schedule=[[45 / 16, THIRD, switch]]), run._Work._check

        def stopped(self: Any, chunk: int, step: int) -> None:
            if step >= 0 and chunk == 4:
                bench.store.stop(job.id)
            check(self, chunk, step)

        monkeypatch.setattr(run._Work, "_check", stopped)
        done = finish(bench, job, options)
        monkeypatch.undo()
        assert done.done == 4
        child = bench.store.branch(done.id, Branch(prompt=OTHER, switch="keep", seconds=SECONDS))
        equal(bench, finish(bench, child, options), schedule=[[45 / 16, OTHER, "keep"]])

    def test_prompts_that_were_never_shown_are_no_part_of_it(self, bench: Bench) -> None:
        """One lies behind the end, one in the last chunk, which had begun before it."""
        job = keep(bench, seconds=60.0, schedule=[[2.5, OTHER], [30.0, THIRD]])
        done = finish(bench, job, report=at_chunk(4, lambda: bench.store.stop(job.id)))
        said = VideoRequest.of(json.loads(read_metadata(bench.store.file(done))["request"]))
        assert said.schedule == ()
        equal(bench, done, seconds=said.seconds)
        longer = finish(bench, bench.store.branch(done.id, Branch(more_seconds=1.0)))
        equal(bench, longer, seconds=45 / 16 + 1, schedule=[[2.5, OTHER]])

    def test_before_the_first_chunk_there_is_no_video(self, bench: Bench) -> None:
        job = keep(bench)
        assert bench.store.stop(job.id).state is State.CANCELLED
        other = keep(bench, "other")
        bench.store.folder(other).mark("stop")
        with pytest.raises(Cancelled, match="before its first chunk"):
            bench.run(bench.store.folder(other))
        assert bench.store.stop(job.id).state is State.CANCELLED

    def test_an_ended_one_stays_as_it_is(self, bench: Bench) -> None:
        done = finish(bench, keep(bench))
        for act in (bench.store.stop, bench.store.pause, bench.store.resume, bench.store.cancel):
            assert act(done.id) == done


class TestBranch:
    def test_extended_it_is_the_longer_video(self, bench: Bench, monkeypatch: Any) -> None:
        """The old last chunk was cut: it is made again, whole; the others are taken as they are."""
        done = finish(bench, keep(bench))
        child = bench.store.branch(done.id, Branch(more_seconds=1.5))
        assert child.id == "kept-2" and child.parent is not None and child.parent["chunk"] == CHUNKS
        assert (child.done, child.frames) == (CHUNKS - 1, 12 * (CHUNKS - 1) - 3)
        made: list[int] = []
        longer = finish(bench, child, report=lambda progress: made.append(progress.chunk - 1))
        assert made == [CHUNKS - 1, CHUNKS, CHUNKS + 1] and longer.frames == FRAMES + 24
        equal(bench, longer, seconds=SECONDS + 1.5)
        again = bench.store.branch(longer.id, Branch(more_seconds=1.0))
        assert again.id == "kept-3"
        equal(bench, finish(bench, again), seconds=SECONDS + 2.5)
        assert probe(bench.store.file(done)).frames == FRAMES

    @pytest.mark.parametrize("options", [OFTEN, SELDOM], ids=["checkpoints", "records alone"])
    def test_under_another_prompt_from_a_chunk_in_the_middle(self, bench: Bench, options: Options) -> None:
        done = finish(bench, keep(bench, schedule=[[1.3, THIRD], [3.0, PROMPT]]), options)
        child = bench.store.branch(done.id, Branch(chunk=3, prompt=OTHER, switch="recache", id="mine"))
        assert (child.done, child.frames) == (3, 33)
        made: list[int] = []
        other = finish(bench, child, options, report=lambda progress: made.append(progress.chunk - 1))
        assert other.id == "mine" and made == list(range(3, CHUNKS))
        equal(bench, other, schedule=[[1.3, THIRD], [33 / 16, OTHER, "recache"]])

    def test_of_one_that_was_steered_and_stopped(self, bench: Bench) -> None:
        job = keep(bench, seconds=60.0)

        def report(progress: Progress) -> None:
            if progress.chunk == 2:
                bench.store.steer(job.id, OTHER)
            if progress.chunk == 4:
                bench.store.stop(job.id)

        done = finish(bench, job, report=report)
        child = bench.store.branch(done.id, Branch(more_seconds=1.0))
        assert child.request["seconds"] == 45 / 16 + 1
        equal(bench, finish(bench, child), schedule=[[21 / 16, OTHER]], seconds=45 / 16 + 1)

    def test_of_one_that_still_runs(self, bench: Bench) -> None:
        job, children = keep(bench), list[Job]()
        report = at_chunk(3, lambda: children.append(bench.store.branch(job.id, Branch(prompt=OTHER))))
        done = finish(bench, job, report=report)
        equal(bench, done)
        equal(bench, finish(bench, children[0]), schedule=[[33 / 16, OTHER]])

    def test_what_is_shared_is_stored_once(self, bench: Bench) -> None:
        done = finish(bench, keep(bench))
        child = bench.store.branch(done.id, Branch(chunk=4, prompt=OTHER))
        ours, theirs = (bench.store.folder(job) for job in (done, child))
        for part in ("segments", "records"):
            names = sorted(os.listdir(theirs.path / part))
            assert len(names) == 4
            assert all(os.path.samefile(ours.path / part / n, theirs.path / part / n) for n in names)
        assert [line["chunk"] for line in theirs.read_log()[0]] == [0, 1, 2, 3]

    def test_outlives_its_parent(self, bench: Bench) -> None:
        done = finish(bench, keep(bench))
        child = bench.store.branch(done.id, Branch(chunk=4, prompt=OTHER))
        bench.store.delete(done.id)
        equal(bench, finish(bench, child), schedule=[[45 / 16, OTHER]])

    def test_a_killed_branch_goes_on(self, bench: Bench) -> None:
        """Its parent had several claims: the numbers of its own files come after theirs."""
        job = keep(bench)
        for after in (2, 4):
            bench.kill(bench.store.folder(job), after)
        done = finish(bench, job)
        child = bench.store.branch(done.id, Branch(chunk=5, prompt=OTHER))
        bench.kill(bench.store.folder(child), 6)
        equal(bench, finish(bench, child), schedule=[[57 / 16, OTHER]])

    def test_when_the_index_knows_less_than_the_folder(self, bench: Bench) -> None:
        job = keep(bench)
        with pytest.raises(Paused):
            bench.run(bench.store.folder(job), OFTEN, at_chunk(4, lambda: bench.store.pause(job.id)))
        assert bench.store.get(job.id).frames == 0
        child = bench.store.branch(job.id, Branch(more_seconds=1.0))
        assert child.request["seconds"] == 45 / 16 + 1 and (child.done, child.frames) == (4, 45)
        bench.store.close()
        for path in (bench.root / ".vidkv").glob("jobs.sqlite*"):
            path.unlink()
        bench.store = JobStore(bench.root)
        assert {(job.done, job.frames) for job in bench.store.jobs()} == {(4, 45)}

    def test_one_that_cannot_be_filled_leaves_nothing(self, bench: Bench, monkeypatch: Any) -> None:
        done = finish(bench, keep(bench))

        def full(path: Path, folder: Path) -> None:
            raise OSError(errno.ENOSPC, "No space left on device")

        monkeypatch.setattr("vidkv.jobs.branch._link", full)
        with pytest.raises(OutputError, match="No space left"):
            bench.store.branch(done.id, Branch(chunk=3, prompt=OTHER))
        monkeypatch.undo()
        assert [job.id for job in bench.store.jobs()] == ["kept"]
        assert len(os.listdir(bench.root / ".vidkv" / "jobs")) == 1

    def test_of_light_ones(self, bench: Bench) -> None:
        done = finish(bench, keep(bench), LIGHT)
        child = bench.store.branch(done.id, Branch(more_seconds=1.0))
        longer = finish(bench, child, LIGHT)
        assert longer.frames == FRAMES + 16 and longer.result["note"] == f"light, at chunk {CHUNKS - 1}"

    def test_what_cannot_be_is_refused(self, bench: Bench) -> None:
        store, done = bench.store, finish(bench, keep(bench))
        count = len(store.jobs())
        for branch, words in (
            (Branch(chunk=8), "chunk=8: 7 chunks of kept are finished"),
            (Branch(), "nothing is left to make"),
            (Branch(seconds=1.0), "nothing is left to make"),
            (Branch(seconds=9.0, more_seconds=1.0), "not both"),
            (Branch(chunk=2, prompt=OTHER, id="../x"), "id='../x'"),
            (Branch(chunk=2, prompt=OTHER, id="kept"), "other settings"),
        ):
            with pytest.raises(InputError, match=words):
                store.branch(done.id, branch)
        with pytest.raises(InputError, match="no chunk of empty is finished"):
            store.branch(keep(bench, "empty").id, Branch(more_seconds=1))
        with pytest.raises(InputError, match="not submitted with keep"):
            bench.submit("unkept")
            store.branch("unkept")
        with pytest.raises(QueueFull):
            store.branch(done.id, Branch(more_seconds=1), most=2)
        assert len(store.jobs()) == count + 2
        with pytest.raises(StateError, match="cannot become paused"):
            store._move(done.id, State.PAUSED)


class TestLog:
    def test_a_line_for_every_chunk(self, bench: Bench) -> None:
        job = keep(bench)
        folder = bench.store.folder(job)
        bench.kill(folder, 3)
        first, place = folder.read_log()
        finish(bench, job)
        rest, end = folder.read_log(place)
        assert [line["chunk"] for line in first + rest] == list(range(CHUNKS))
        assert [line["frames"] for line in first + rest] == [9, 21, 33, 45, 57, 69, FRAMES]
        assert folder.read_log(end) == ([], end) and folder.read_log(2**40)[0] == []
        window = [set(line["resident"]) for line in first + rest]
        # pages of nine frames less the chunk's own three stay, two of them sinks
        assert window[0] == {0, 1, 2} and window[-1] == {0, 1, 17, 18, 19, 20}
        assert (first + rest)[2]["evicted"] == [2, 3, 4] and (first + rest)[0]["evicted"] == []
        assert {line["prompt"] for line in first + rest} == {PROMPT}

    def test_pages_by_format_and_what_they_get_of_the_attention(self, bench: Bench) -> None:
        cache = "int8,window=12,sink=2,policy=snapkv,newer=bf16:3"
        job = keep(bench, cache=cache)
        finish(bench, job)
        lines, _ = bench.store.folder(job).read_log()
        for line in lines:
            newest = line["resident"][-3:]
            assert line["formats"] == ["bf16" if f in newest else "int8" for f in line["resident"]]
        assert lines[0]["mass"] is None
        for line in lines[1:]:
            # what came with this chunk nobody has read yet
            assert line["mass"][-3:] == [0, 0, 0] and all(share > 0 for share in line["mass"][:-3])
            assert len(line["mass"]) == len(line["resident"]) and sum(line["mass"]) < 1
        plain = keep(bench, "plain")
        finish(bench, plain)
        assert all(line["mass"] is None for line in bench.store.folder(plain).read_log()[0])
        assert all(line["tiers"] is None for line in bench.store.folder(plain).read_log()[0])

    def test_pages_by_where_they_lie(self, bench: Bench) -> None:
        job = keep(bench, cache="int8,window=21,sink=2,segment=1,device_gb=2e-5")
        finish(bench, job)
        lines, _ = bench.store.folder(job).read_log()
        assert all(len(line["tiers"]) == len(line["resident"]) for line in lines)
        assert set(lines[-1]["tiers"]) == {"device", "host"}
        assert lines[-1]["kv_host_bytes"] > lines[-1]["kv_bytes"] / 4 and lines[-1]["kv_disk_bytes"] == 0

    def test_half_a_line_waits_for_its_other_half(self, bench: Bench) -> None:
        folder = bench.store.folder(keep(bench))
        folder.note({"chunk": 0})
        with folder.log.open("a") as file:
            file.write('{"chunk"')
        entries, place = folder.read_log()
        assert entries == [{"chunk": 0}]
        with folder.log.open("a") as file:
            file.write(": 1}\n")
        assert folder.read_log(place)[0] == [{"chunk": 1}]
