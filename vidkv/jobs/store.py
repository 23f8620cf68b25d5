"""All jobs of one output folder: an index in sqlite over job folders, which are the truth."""

from __future__ import annotations

import contextlib
import itertools
import json
import re
import time
from collections.abc import Callable, Collection, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from vidkv.errors import InputError, OutputError, StateError, VidkvError
from vidkv.files import reason
from vidkv.jobs.branch import Branch, finished_chunks, plan_branch, take_over
from vidkv.jobs.claims import Claim, Claims
from vidkv.jobs.folder import JobFolder
from vidkv.jobs.index import HOME, TRANSITIONS, WAITING, Index, Job, State
from vidkv.jobs.run import Progress
from vidkv.planning import KEY_ID, Plan, plan
from vidkv.prompts import PromptSchedule, Switch
from vidkv.request import MAX_SCHEDULE, EngineSettings, VideoRequest, below
from vidkv.segments import partial_video, read_metadata

__all__ = ["HOME", "MAX_CRASHES", "MAX_WAITING", "TRANSITIONS", "Job", "JobStore", "QueueFull", "State"]

BACKOFF_S, MAX_BACKOFF_S = 2.0, 60.0
MAX_WAITING = 100
"""Prompts that may wait for the next chunk of a job."""
LET_GO_S = 2.0
"""How long a worker may take to let go of a job that it has ended."""
MAX_CRASHES = 5
"""Times that a worker may die over a job without a chunk of progress before the job is set aside."""


class QueueFull(VidkvError):
    """There are as many unfinished jobs as the queue takes."""


class JobStore(Index):
    """Jobs of one output folder.

        store = JobStore("renders")
        job = store.submit(VideoRequest(prompt="a red circle bouncing", seconds=60))
        for job in store.watch(job.id):
            print(job.state, job.done, "of", job.chunks)

    Somebody must do the work: `vidkv render`, `vidkv serve`, or `vidkv.jobs.supervisor.work_off(store)`. Any
    number of processes of one host may have a store open. Hosts that share the storage of the output folder
    each open it under a `name` of their own: what they share are the folders and their claims.

    Args:
        root: the output folder; made where needed.
        name: of the index file.
    """

    def __init__(self, root: str | Path, name: str = "jobs") -> None:
        self.claims = Claims()
        super().__init__(root, name)

    # ------------------------------------------------------------------ for users

    def submit(
        self, request: VideoRequest, settings: EngineSettings | None = None, *, most: int | None = None,
        again: bool = False, keep: bool = False,
    ) -> Job:  # fmt: skip
        """Check a request and put it into the queue; one that is there already stays what it is.

        Args:
            most: refuse when so many jobs are unfinished.
            again: queue it once more if it failed or was cancelled.
            keep: keep what it is made from after its end, for `branch`.

        Raises:
            VidkvError: the request cannot be used, or its id or file belongs to another one.
            QueueFull: there are `most` unfinished jobs.
        """
        # before planning, which costs more than saying no
        if most is not None:
            self._require_room(most, request.id)
        return self.submit_plan(plan(request, settings), most=most, again=again, keep=keep)

    def submit_plan(
        self, planned: Plan, *, most: int | None = None, again: bool = False, keep: bool = False,
        parent: dict[str, Any] | None = None, fill: Callable[[JobFolder], None] = lambda folder: None,
        finished: int = 0,
    ) -> Job:  # fmt: skip
        """Likewise, of a request that was planned with `plan`.

        Args:
            parent: see `Job`.
            fill: puts into its folder what is made already, before anybody can claim it.
            finished: chunks that are made already.
        """
        request, settings = planned.resolved()
        try:
            out = request.out or below(f"{planned.id}.mp4")
        except ValueError as error:
            raise InputError(f"id={planned.id!r}: {error}") from None
        with self._lock, self._transaction():
            found = self._row("id = ?", planned.id)
            if found is not None:
                if found.key != planned.key:
                    raise InputError(
                        f"id {planned.id!r} was rendered or queued with other settings in {self.root}; "
                        "choose another id or output folder, or delete the old job first"
                    )
                return self._resubmitted(found, again, most)
            taken = self._row("place = ?", out.casefold())
            if taken is not None:
                raise InputError(f"out={out!r} is the file of job {taken.id!r}; choose another name")
            if most is not None:
                self._require_room(most, planned.id)
            number = self._connection.execute("SELECT coalesce(max(number), 0) + 1 FROM jobs").fetchone()[0]
            job = {
                "id": planned.id,
                "key": planned.key,
                "number": number,
                "out": out,
                "request": request.model_dump(mode="json", exclude_unset=True),
                "settings": settings.model_dump(mode="json", exclude_unset=True),
                "chunks": planned.chunks,
                "submitted": time.time(),
                "keep": keep,
                "parent": parent,
            }
            folder = self._folder(planned.id, planned.key)
            # another host may have made it
            ours = not folder.path.exists()
            try:
                # before it says what it is, or an index that is made anew would take up half of one
                folder.make()
                fill(folder)
                folder.create(job)
            except BaseException:
                if ours:
                    folder.remove()
                raise
            self._insert(job)
            if finished:
                query = "UPDATE jobs SET done = ?, frames = ? WHERE id = ?"
                self._execute(query, finished, planned.frames_before(finished), planned.id)
        return self.get(planned.id)

    def cancel(self, id: str) -> Job:
        """Stop a job within one denoising step; what is finished stays as `ID.partial.mp4`.

        Of one that has ended nothing changes.
        """
        job = self.get(id)
        if not job.ended:
            self.folder(job).mark("cancel")
            with contextlib.suppress(StateError):
                # a running one is ended by its worker
                self._move(id, State.CANCELLED, only=WAITING)
                if self.folder(job).result() is None:
                    self._write_result(job, {"state": State.CANCELLED.value})
        return self.get(id)

    def stop(self, id: str) -> Job:
        """End a job with the chunks that are finished as its video; one that has none is cancelled.

        Of one that has ended nothing changes.
        """
        job = self.get(id)
        if job.ended:
            return job
        if job.state is not State.RUNNING and not finished_chunks(self.folder(job)):
            return self.cancel(id)
        self.folder(job).mark("stop")
        return self.resume(id)

    def pause(self, id: str) -> Job:
        """Let a job wait after the chunk that is being made; other jobs take its place meanwhile.

        Of one that has ended nothing changes.
        """
        job = self.get(id)
        if not job.ended:
            self.folder(job).mark("pause")
            with contextlib.suppress(StateError):
                self._move(id, State.PAUSED, only=State.QUEUED)
        return self.get(id)

    def resume(self, id: str) -> Job:
        """Let a paused job go on where it stands."""
        job = self.get(id)
        if not job.ended:
            self.folder(job).unmark("pause")
            with contextlib.suppress(StateError):
                self._move(id, State.QUEUED, only=State.PAUSED)
        return self.get(id)

    def steer(self, id: str, prompt: str, switch: Switch | None = None) -> Job:
        """Change the prompt of a job from its next chunk on.

        Args:
            switch: what becomes of the history; by default the job's own way.

        Raises:
            InputError: it has ended, its id stands for its settings, or the model does not understand the
                prompt.
        """
        job = self.get(id)
        if job.ended:
            raise InputError(f"job {id!r} is {job.state}; branch from one of its chunks instead")
        if job.id == job.key[:KEY_ID]:
            raise InputError(f"id {id!r} stands for the settings; to steer a video give it an id of its own")
        folder = self.folder(job)
        request, settings = folder.request()
        waiting = len(folder.wanted_prompts())
        if waiting >= MAX_WAITING or len(request.schedule) + len(folder.steered()) + waiting >= MAX_SCHEDULE:
            raise InputError(
                f"{waiting} prompts of {id!r} wait for its next chunk and {len(folder.steered())} have taken "
                "over; no more can be taken"
            )
        # with all that can be wrong with a prompt
        PromptSchedule.of([(0.0, prompt, switch)])
        plan(request.scheduled([(0.0, prompt)]), settings, fits=False)
        folder.ask_for_prompt(prompt, switch)
        return job

    def branch(self, id: str, branch: Branch | None = None, *, most: int | None = None) -> Job:
        """A new job that goes on from a chunk of this one: under another prompt, or for longer.

        Args:
            most: refuse when so many jobs are unfinished.

        Raises:
            InputError: the job was not submitted with `keep`, or see `plan_branch`.
            QueueFull: there are `most` unfinished jobs.
        """
        job, branch = self.get(id), branch or Branch()
        if not job.keep:
            raise InputError(
                f"job {id!r} was not submitted with keep, so nothing is left to go on from; give its file as "
                "the video to start from"
            )
        if most is not None:
            self._require_room(most, branch.id)
        folder = self.folder(job)
        planned, chunk, whole = plan_branch(folder, branch, branch.id or self._free_id(id))
        fence = self.claims.newest(folder.path) + int((job.parent or {}).get("fence", 0))
        return self.submit_plan(
            planned, most=most, keep=True, parent={"id": id, "chunk": chunk, "fence": fence},
            fill=lambda child: take_over(folder, child, chunk), finished=whole,
        )  # fmt: skip

    def retry(self, id: str) -> Job:
        """Queue a failed or cancelled job again; it goes on where it stopped."""
        job = self.get(id)
        if job.state in (State.FAILED, State.CANCELLED):
            self._requeue(job)
        return self.get(id)

    def delete(self, id: str, *, video: bool = True) -> None:
        """Forget a job that is not running, with its folder and its file.

        Raises:
            InputError: it is running; cancel it first.
        """
        job = self.get(id)
        folder = self.folder(job)
        # what has been deleted by hand cannot be claimed
        there = folder.path.exists()
        claim = self.claims.take(folder.path) if there else None
        deadline = time.monotonic() + LET_GO_S
        while there and claim is None and job.ended and time.monotonic() < deadline:
            # a worker says how a job ended a moment before it lets go of it
            time.sleep(0.02)
            claim = self.claims.take(folder.path)
        if (there and claim is None) or job.state is State.RUNNING:
            if claim:
                claim.release()
            raise InputError(f"job {id!r} is running; cancel it first")
        with self._lock:
            self._execute("DELETE FROM jobs WHERE id = ?", id)
        if video:
            for path in (self.file(job), partial_video(self.file(job))):
                if _made_by(path, job.key):
                    path.unlink(missing_ok=True)
        folder.remove()

    def watch(self, id: str, poll_s: float = 0.1) -> Iterator[Job]:
        """The job now, and again whenever it has changed, until it has ended."""
        version = -1
        while True:
            job = self.get(id)
            if job.version != version:
                version = job.version
                yield job
            if job.ended:
                return
            time.sleep(poll_s)

    # ------------------------------------------------------------------ for workers

    def claim_next(
        self, worker: str, prefer: Callable[[Job], bool] = lambda job: False, only: bool = False
    ) -> tuple[Job, Claim] | None:
        """Take the next job that nobody has; None if there is none now.

        Args:
            prefer: jobs that come before others, such as those of the model that is loaded.
            only: leave the others.
        """
        now = time.monotonic()
        ready = self._rows(
            # of another boot's clock nothing is known
            "state = 'queued' AND (not_before <= ? OR not_before > ?) ORDER BY number",
            now, now + MAX_BACKOFF_S,
        )  # fmt: skip
        for job in sorted(ready, key=lambda job: not prefer(job)):
            if only and not prefer(job):
                continue
            folder = self.folder(job)
            try:
                if not folder.path.is_dir():
                    self._mend(job)
                claim = self.claims.take(folder.path)
            except OutputError as error:
                self._unclaimable(job, worker, error)
                continue
            except StateError:
                continue
            if claim is None:
                continue
            result = folder.result()
            try:
                self._move(job.id, State.RUNNING, worker=worker)
            except VidkvError as error:
                claim.release()
                if isinstance(error, StateError):
                    continue
                raise
            if result is not None:
                # another host has ended it
                self._end(job.id, result)
                claim.release()
                continue
            return self.get(job.id), claim
        return None

    def _mend(self, job: Job) -> None:
        """Somebody has deleted the folder of a job that waits: what is to be made is known, so start over.

        Raises:
            StateError: the job was deleted with it.
        """
        with self._lock, self._transaction():
            found = self._row("id = ?", job.id)
            if found is None or found.state is not State.QUEUED:
                raise StateError(f"job {job.id!r} is not waiting")
            self.folder(job).create(self._job_json(job))

    def _unclaimable(self, job: Job, worker: str, error: OutputError) -> None:
        """An attempt that could not even begin: wait for better times, but not for ever."""
        with contextlib.suppress(StateError):
            self._move(job.id, State.RUNNING, worker=worker, version=job.version)
            self.put_back(self.get(job.id), str(error), MAX_CRASHES)

    def report(self, id: str, progress: Progress) -> None:
        """Note how far a running job is."""
        # the row is a view; a full disk must not stop what the folder holds
        with contextlib.suppress(OutputError):
            self._execute(
                "UPDATE jobs SET done = ?, frames = ?, progress = ?, changed = ?, version = version + 1 "
                "WHERE id = ? AND state = 'running'",
                progress.chunk, progress.frames, json.dumps(asdict(progress)), time.time(), id,
            )  # fmt: skip

    def finish(self, job: Job, result: dict[str, Any]) -> None:
        """A job has ended: `result["state"]` says how."""
        folder = self.folder(job)
        ended = folder.result()
        if ended is not None and ended["state"] == State.DONE:
            # by another host; what is done stays done
            result = ended
        else:
            try:
                self._write_result(job, result)
            except OutputError:
                # an index that is made anew without it takes the job up again; what is done must not be lost
                if result["state"] == State.DONE:
                    raise
        if result["state"] == State.DONE:
            # before the row says so: nobody looks at the folder of an ended job again
            folder.clear(job.keep)
        self._end(job.id, result)

    def hold(self, job: Job) -> None:
        """A running job waits as it was asked to."""
        self._move(job.id, State.PAUSED, only=State.RUNNING, worker=None)
        if self.folder(job).marked("cancel"):
            self.cancel(job.id)
        elif not self.folder(job).marked("pause"):
            # somebody has changed their mind meanwhile
            self.resume(job.id)

    def put_back(self, job: Job, error: str | None = None, retries: int | None = None) -> None:
        """A running job is to go on later.

        Args:
            error: what went wrong; counts as an attempt.
            retries: after so many attempts it has failed.
        """
        if self.folder(job).marked("cancel"):
            # while it was running; nobody else looks
            self.finish(job, {"state": State.CANCELLED.value, "error": "the job was cancelled"})
            return
        waiting = self._waiting(job)
        if error is None:
            self._move(job.id, waiting, only=State.RUNNING, worker=None)
            return
        attempts = job.attempts + 1
        if retries is not None and attempts > retries:
            self.finish(job, {"state": State.FAILED.value, "error": error})
            return
        wait = min(MAX_BACKOFF_S, BACKOFF_S * 2 ** (attempts - 1))
        self._move(
            job.id, waiting, only=State.RUNNING, worker=None, error=error, attempts=attempts,
            not_before=time.monotonic() + wait,
        )  # fmt: skip

    def recover(self, workers: Collection[str] | None = None) -> list[Job]:
        """Put jobs back whose worker has died; a job that killed too many of them is set aside.

        Args:
            workers: only theirs; by default all whose claim no live process holds.
        """
        moved = []
        for job in self.jobs([State.RUNNING]):
            if workers is not None and job.worker not in workers:
                continue
            try:
                if self.claims.held(self.folder(job).path):
                    continue
            except OutputError:
                # it cannot be seen now: the next time
                continue
            # its worker may have moved the row meanwhile; an index that cannot be written must be told of,
            # or a full disk would be waited for without end
            with contextlib.suppress(StateError):
                self._recover(job)
                moved.append(self.get(job.id))
        return moved

    def _recover(self, job: Job) -> None:
        """Move a job that no live process has, unless it has changed since it was looked up."""
        folder = self.folder(job)
        result = folder.result()
        if result is not None:
            if result["state"] == State.DONE:
                folder.clear(job.keep)
            self._end(job.id, result, version=job.version)
            return
        with self._lock, self._transaction():
            query = "SELECT crashed_at, crashes, version FROM jobs WHERE id = ?"
            row = self._execute(query, job.id).fetchone()
            if row is None or row[2] != job.version:
                raise StateError(f"job {job.id!r} has changed meanwhile")
            crashes = row[1] + 1 if row[0] == job.done else 1
            if crashes >= MAX_CRASHES:
                error = f"its worker died {crashes} times at chunk {job.done} without an error; see the log"
                self.finish(job, {"state": State.FAILED.value, "error": error})
            else:
                self._move(job.id, self._waiting(job), worker=None, crashes=crashes, crashed_at=job.done)
        if folder.marked("cancel"):
            self.cancel(job.id)

    # ------------------------------------------------------------------ inside

    def _waiting(self, job: Job) -> State:
        """What a job becomes that is not run any more and has not ended."""
        return State.PAUSED if self.folder(job).marked("pause") else State.QUEUED

    def _require_room(self, most: int, id: str | None) -> None:
        unfinished = self._execute(
            "SELECT count(*) FROM jobs WHERE state IN ('queued', 'running', 'paused')"
        ).fetchone()[0]
        if unfinished >= most and (id is None or self._row("id = ?", id) is None):
            raise QueueFull(f"{unfinished} jobs are waiting and the queue takes {most}; try again later")

    def _resubmitted(self, found: Job, again: bool, most: int | None) -> Job:
        lost = found.state is State.DONE and not self.file(found).is_file()
        if lost or (again and found.state in (State.FAILED, State.CANCELLED)):
            if most is not None:
                self._require_room(most, None)
            self._requeue(found)
        return self.get(found.id)

    def _requeue(self, job: Job) -> None:
        folder = self.folder(job)
        folder.create(self._job_json(job))
        folder.reopen()
        changes: dict[str, Any] = {"crashed_at": -1, "not_before": 0.0, "result": "{}"}
        if job.state is State.DONE:
            # its segments are gone
            changes |= {"done": 0, "frames": 0}
        self._move(job.id, State.QUEUED, worker=None, error=None, attempts=0, crashes=0, **changes)

    @staticmethod
    def _job_json(job: Job) -> dict[str, Any]:
        names = ("id", "key", "number", "out", "request", "settings", "chunks", "submitted", "keep", "parent")
        return {name: getattr(job, name) for name in names}

    def _free_id(self, id: str) -> str:
        """An id like this one that no job has."""
        stem = re.sub(r"-[0-9]{1,4}$", "", id)[:74]
        return next(new for i in itertools.count(2) if self._row("id = ?", new := f"{stem}-{i}") is None)

    def _write_result(self, job: Job, result: dict[str, Any]) -> None:
        try:
            self.folder(job).end(result)
        except OSError as error:
            raise OutputError(f"cannot write the result of {job.id}: {reason(error)}; make room") from error


def _made_by(path: Path, key: str) -> bool:
    """Whether a file is the video of the job of that key, and not one that its user put there."""
    with contextlib.suppress(VidkvError):
        return path.is_file() and read_metadata(path).get("job") == key
    return False
