"""All jobs of one output folder: an index in sqlite over job folders, which are the truth."""

from __future__ import annotations

import contextlib
import fcntl
import itertools
import json
import os
import re
import sqlite3
import threading
import time
from collections.abc import Callable, Collection, Iterator
from dataclasses import asdict, dataclass, fields
from enum import StrEnum
from pathlib import Path
from typing import Any

from vidkv.errors import InputError, OutputError, StateError, VidkvError
from vidkv.files import reason
from vidkv.jobs.branch import Branch, plan_branch, take_over
from vidkv.jobs.claims import Claim, Claims
from vidkv.jobs.folder import JobFolder
from vidkv.jobs.run import Progress
from vidkv.planning import Plan, plan
from vidkv.prompts import Switch
from vidkv.request import EngineSettings, VideoRequest, below
from vidkv.segments import partial_video, read_metadata

HOME = ".vidkv"
BACKOFF_S, MAX_BACKOFF_S = 2.0, 60.0
LET_GO_S = 2.0
"""How long a worker may take to let go of a job that it has ended."""
BUSY_S = 30.0
"""How long to wait for another process that is writing the index."""
MAX_CRASHES = 5
"""Times that a worker may die over a job without a chunk of progress before the job is set aside."""


class State(StrEnum):
    """What a job is."""

    QUEUED = "queued"
    RUNNING = "running"
    PAUSED = "paused"
    DONE = "done"
    FAILED = "failed"
    CANCELLED = "cancelled"


TRANSITIONS: dict[State, frozenset[State]] = {
    State.QUEUED: frozenset({State.RUNNING, State.PAUSED, State.CANCELLED}),
    State.RUNNING: frozenset({State.QUEUED, State.PAUSED, State.DONE, State.FAILED, State.CANCELLED}),
    State.PAUSED: frozenset({State.QUEUED, State.CANCELLED}),
    # the finished file may have been deleted by its owner
    State.DONE: frozenset({State.QUEUED}),
    State.FAILED: frozenset({State.QUEUED}),
    State.CANCELLED: frozenset({State.QUEUED}),
}
"""What may become of a job; nothing else ever happens to a row."""

ENDED = (State.DONE, State.FAILED, State.CANCELLED)
_WAITING = (State.QUEUED, State.PAUSED)


class _Damaged(Exception):
    """The index file is none."""


class QueueFull(VidkvError):
    """There are as many unfinished jobs as the queue takes."""


@dataclass(frozen=True)
class Job:
    """A row of the index.

    Attributes:
        id: names the job and, with `.mp4`, by default its file.
        key: see `Plan.key`.
        number: place in the queue.
        out: the finished file, relative to the output folder.
        keep: what it was made from stays after its end, so that it can be extended and branched.
        parent: `id` and `chunk` that it goes on from, if it is a branch, and the last claim's `fence` there.
        attempts: times that it failed in a way that may pass.
        crashes: times that its worker died since the last chunk of progress.
        worker: who runs it.
        error: why it failed, or what the last attempt ended in.
        chunks, done, frames: in all; chunks and frames that are finished.
        progress: of the last chunk, see `Progress`.
        result: what `result.json` says.
        submitted, changed: seconds since 1970.
        version: grows with every change of the row.
    """

    id: str
    key: str
    number: int
    state: State
    request: dict[str, Any]
    settings: dict[str, Any]
    out: str
    keep: bool
    parent: dict[str, Any] | None
    attempts: int
    crashes: int
    worker: str | None
    error: str | None
    chunks: int
    done: int
    frames: int
    progress: dict[str, Any]
    result: dict[str, Any]
    submitted: float
    changed: float
    version: int

    @property
    def ended(self) -> bool:
        return self.state in ENDED


_TABLE = """
CREATE TABLE IF NOT EXISTS jobs (
    id TEXT PRIMARY KEY, key TEXT NOT NULL, number INTEGER NOT NULL, state TEXT NOT NULL,
    request TEXT NOT NULL, settings TEXT NOT NULL, out TEXT NOT NULL, place TEXT NOT NULL UNIQUE,
    keep INTEGER NOT NULL DEFAULT 0, parent TEXT NOT NULL DEFAULT 'null',
    attempts INTEGER NOT NULL DEFAULT 0, crashes INTEGER NOT NULL DEFAULT 0,
    crashed_at INTEGER NOT NULL DEFAULT -1, not_before REAL NOT NULL DEFAULT 0,
    worker TEXT, error TEXT, chunks INTEGER NOT NULL, done INTEGER NOT NULL DEFAULT 0,
    frames INTEGER NOT NULL DEFAULT 0, progress TEXT NOT NULL DEFAULT '{}',
    result TEXT NOT NULL DEFAULT '{}', submitted REAL NOT NULL, changed REAL NOT NULL,
    version INTEGER NOT NULL DEFAULT 0
) STRICT;
CREATE INDEX IF NOT EXISTS by_state ON jobs (state, number);
"""
_COLUMNS = [field.name for field in fields(Job)]


class JobStore:
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
        self.root, self.name = Path(root), name
        self.home = self.root / HOME
        self.claims = Claims()
        self._lock = threading.RLock()
        try:
            (self.home / "jobs").mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise OutputError(
                f"cannot use the output folder {self.root}: {reason(error)}; choose another"
            ) from error
        self._connection = self._open()

    def close(self) -> None:
        """Let go of the index file."""
        with self._lock:
            self._connection.close()

    def __enter__(self) -> JobStore:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

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
    ) -> Job:  # fmt: skip
        """Likewise, of a request that was planned with `plan`.

        Args:
            parent: see `Job`.
            fill: puts into its folder what is made already, before anybody can claim it.
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
            folder.create(job)
            fill(folder)
            self._insert(job)
        return self.get(planned.id)

    def get(self, id: str) -> Job:
        """A job.

        Raises:
            InputError: there is none of that id.
        """
        found = self._row("id = ?", id)
        if found is None:
            raise InputError(f"there is no job {id!r:.100} in {self.root}")
        return found

    def jobs(self, states: Collection[State] = tuple(State), most: int = -1, after: int = 0) -> list[Job]:
        """Jobs in the order they were submitted.

        Args:
            most: at most so many.
            after: leave out numbers up to this one.
        """
        marks = ",".join("?" * len(states))
        query = f"state IN ({marks}) AND number > ? ORDER BY number LIMIT ?"
        return self._rows(query, *states, after, most)

    def counts(self) -> dict[State, int]:
        """Jobs by state."""
        rows = self._execute("SELECT state, count(*) FROM jobs GROUP BY state")
        return dict.fromkeys(State, 0) | {State(state): number for state, number in rows}

    def folder(self, job: Job) -> JobFolder:
        """Where its segments are."""
        return self._folder(job.id, job.key)

    def file(self, job: Job) -> Path:
        """Where its video appears."""
        return self.root / job.out

    def cancel(self, id: str) -> Job:
        """Stop a job within one denoising step; what is finished stays as `ID.partial.mp4`.

        Of one that has ended nothing changes.
        """
        job = self.get(id)
        if not job.ended:
            self.folder(job).mark("cancel")
            with contextlib.suppress(StateError):
                # a running one is ended by its worker
                self._move(id, State.CANCELLED, only=_WAITING)
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
        if not job.done and job.state is not State.RUNNING:
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
        if job.id == job.key[: len(job.id)]:
            raise InputError(
                f"id {id!r} was derived from the settings; to steer a video give it an id of its own"
            )
        folder = self.folder(job)
        request, settings = folder.request()
        # with all that can be wrong with a prompt
        plan(request.scheduled([(0.0, prompt, switch)]), settings)
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
        planned, chunk = plan_branch(folder, branch, branch.id or self._free_id(id), job.frames)
        fence = self.claims.newest(folder.path) + int((job.parent or {}).get("fence", 0))
        return self.submit_plan(
            planned, most=most, keep=True, parent={"id": id, "chunk": chunk, "fence": fence},
            fill=lambda child: take_over(folder, child, chunk),
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
        self, worker: str, prefer: Callable[[Job], bool] = lambda job: False
    ) -> tuple[Job, Claim] | None:
        """Take the next job that nobody has; None if there is none now.

        Args:
            prefer: jobs that come before others, such as those of the model that is loaded.
        """
        now = time.monotonic()
        ready = self._rows(
            # of another boot's clock nothing is known
            "state = 'queued' AND (not_before <= ? OR not_before > ?) ORDER BY number",
            now, now + MAX_BACKOFF_S,
        )  # fmt: skip
        for job in sorted(ready, key=lambda job: not prefer(job)):
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
        if not self.folder(job).marked("pause"):
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

    # ------------------------------------------------------------------ inside

    def _waiting(self, job: Job) -> State:
        """What a job becomes that is not run any more and has not ended."""
        return State.PAUSED if self.folder(job).marked("pause") else State.QUEUED

    def _require_room(self, most: int, id: str | None) -> None:
        unfinished = self._execute(
            "SELECT count(*) FROM jobs WHERE state IN ('queued', 'running')"
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

    def _folder(self, id: str, key: str) -> JobFolder:
        return JobFolder(self.home / "jobs" / f"{id}-{key[:8]}")

    def _write_result(self, job: Job, result: dict[str, Any]) -> None:
        try:
            self.folder(job).end(result)
        except OSError as error:
            raise OutputError(f"cannot write the result of {job.id}: {reason(error)}; make room") from error

    def _end(self, id: str, result: dict[str, Any], version: int | None = None) -> None:
        changes: dict[str, Any] = {
            "worker": None, "error": result.get("error"), "result": json.dumps(result),
        }  # fmt: skip
        if type(result.get("frames")) is type(result.get("chunks")) is int:
            changes |= {"frames": result["frames"], "done": result["chunks"]}
        self._move(id, State(result["state"]), version=version, **changes)

    def _move(
        self, id: str, to: State, only: State | Collection[State] = tuple(State), version: int | None = None,
        **changes: Any,
    ) -> None:  # fmt: skip
        """Change a job's state, if that may be.

        Args:
            only: from this state, or one of these.
            version: while its row is still this one.

        Raises:
            StateError: it may not, or there is no such job.
        """
        allowed = (only,) if isinstance(only, State) else only
        legal = [state for state, following in TRANSITIONS.items() if to in following and state in allowed]
        names = "".join(f", {name} = ?" for name in changes)
        marks = ",".join("?" * len(legal))
        done = self._execute(
            f"UPDATE jobs SET state = ?, changed = ?, version = version + 1{names} "
            f"WHERE id = ? AND version = coalesce(?, version) AND state IN ({marks})",
            to, time.time(), *changes.values(), id, version, *legal,
        )  # fmt: skip
        if not done.rowcount:
            found = self._row("id = ?", id)
            raise StateError(f"job {id!r} is {found.state if found else 'gone'}, it cannot become {to}")

    def _insert(self, job: dict[str, Any]) -> None:
        self._execute(
            "INSERT INTO jobs (id, key, number, state, request, settings, out, place, chunks, submitted, "
            "changed, keep, parent) VALUES (?, ?, ?, 'queued', ?, ?, ?, ?, ?, ?, ?, ?, ?)",
            job["id"], job["key"], job["number"], json.dumps(job["request"]), json.dumps(job["settings"]),
            job["out"], job["out"].casefold(), job["chunks"], job["submitted"], job["submitted"],
            bool(job.get("keep")), json.dumps(job.get("parent")),
        )  # fmt: skip

    def _row(self, condition: str, *values: Any) -> Job | None:
        found = self._rows(condition, *values)
        return found[0] if found else None

    def _rows(self, condition: str, *values: Any) -> list[Job]:
        with self._lock:
            # fetched before another thread begins to change them
            found = self._execute(f"SELECT {', '.join(_COLUMNS)} FROM jobs WHERE {condition}", *values)
            rows = found.fetchall()
        return [_job(dict(zip(_COLUMNS, row, strict=True))) for row in rows]

    def _execute(self, statement: str, *values: Any) -> sqlite3.Cursor:
        try:
            with self._lock:
                return self._connection.execute(statement, values)
        except sqlite3.IntegrityError:
            raise
        except sqlite3.DatabaseError as error:
            raise OutputError(
                f"cannot use the job index in {self.home}: {error}; make room, then start again"
            ) from error

    @contextlib.contextmanager
    def _transaction(self) -> Iterator[None]:
        self._execute("BEGIN IMMEDIATE")
        try:
            yield
            self._execute("COMMIT")
        except BaseException:
            # a full disk may have ended it already
            if self._connection.in_transaction:
                self._execute("ROLLBACK")
            raise

    def _open(self) -> sqlite3.Connection:
        path = self.home / f"{self.name}.sqlite"
        try:
            with self._opening():
                try:
                    return self._connect(path)
                except _Damaged:
                    # the folders know it all
                    for suffix in ("", "-wal", "-shm"):
                        with contextlib.suppress(FileNotFoundError):
                            os.replace(f"{path}{suffix}", f"{path}{suffix}.damaged")
                    return self._connect(path)
        except (OSError, sqlite3.Error, _Damaged) as error:
            raise OutputError(f"cannot open the job index {path}: {reason(error)}; make room") from error

    @contextlib.contextmanager
    def _opening(self) -> Iterator[None]:
        """One process at a time: what one has made anew must not be taken for damaged by another."""
        lock = os.open(self.home / f"{self.name}.opening", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        try:
            # some network file systems have no locks
            with contextlib.suppress(OSError):
                fcntl.flock(lock, fcntl.LOCK_EX)
            yield
        finally:
            os.close(lock)

    def _connect(self, path: Path) -> sqlite3.Connection:
        connection = sqlite3.connect(path, timeout=BUSY_S, isolation_level=None, check_same_thread=False)
        try:
            connection.execute("PRAGMA journal_mode = WAL")
            connection.execute("PRAGMA synchronous = NORMAL")
            if connection.execute("PRAGMA quick_check").fetchone()[0] != "ok":
                raise _Damaged("the index is damaged")
            connection.executescript(_TABLE)
            self._connection = connection
            self._rebuild_rows()
        except BaseException as error:
            connection.close()
            if type(error) is sqlite3.DatabaseError:
                raise _Damaged(str(error)) from error
            raise
        return connection

    def _rebuild_rows(self) -> None:
        """Fill an empty index from the folders."""
        if self.name != "jobs" or self._execute("SELECT 1 FROM jobs LIMIT 1").fetchone():
            # what other hosts submitted is for them to do
            return
        known = []
        for path in sorted((self.home / "jobs").iterdir()):
            folder = JobFolder(path)
            with contextlib.suppress(VidkvError, ValueError):
                job = folder.job()
                below(job["out"])
                if folder.path == self._folder(job["id"], job["key"]).path:
                    known.append((job["number"], job, folder.result()))
        with self._transaction():
            if self._execute("SELECT 1 FROM jobs LIMIT 1").fetchone():
                # another process was faster
                return
            for _, job, result in sorted(known, key=lambda entry: (entry[0], entry[1]["id"])):
                # numbers and texts that JSON can hold and sqlite cannot
                with contextlib.suppress(sqlite3.IntegrityError, OverflowError, ValueError):
                    self._insert(job)
                    if result is not None:
                        self._move(job["id"], State.RUNNING)
                        self._end(job["id"], result)
                    elif self._folder(job["id"], job["key"]).marked("pause"):
                        self._move(job["id"], State.PAUSED)


def _made_by(path: Path, key: str) -> bool:
    """Whether a file is the video of the job of that key, and not one that its user put there."""
    with contextlib.suppress(VidkvError):
        return path.is_file() and read_metadata(path).get("job") == key
    return False


def _job(row: dict[str, Any]) -> Job:
    for name in ("request", "settings", "progress", "result", "parent"):
        row[name] = json.loads(row[name])
    return Job(**(row | {"state": State(row["state"]), "keep": bool(row["keep"])}))
