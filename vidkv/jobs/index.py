"""The index of an output folder's jobs: rows in sqlite, made anew from the job folders when it is lost."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import sqlite3
import threading
import time
from collections.abc import Collection, Iterator
from dataclasses import dataclass, fields
from enum import StrEnum
from pathlib import Path
from typing import Any, Self

from vidkv.errors import InputError, OutputError, StateError, VidkvError
from vidkv.files import reason
from vidkv.jobs.folder import JobFolder
from vidkv.jobs.records import Records
from vidkv.request import below

HOME = ".vidkv"
LAYOUT = 2
"""Raised when rows change: an index of another layout is made anew from the folders."""
BUSY_S = 30.0
"""How long to wait for another process that is writing the index."""


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
WAITING = (State.QUEUED, State.PAUSED)


class _Damaged(Exception):
    """The index file is none, or not of this layout."""


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


class Index:
    """Rows of one output folder's jobs; what may become of them is for `JobStore` to say.

    Args:
        root: the output folder; made where needed.
        name: of the index file.
    """

    def __init__(self, root: str | Path, name: str = "jobs") -> None:
        self.root, self.name = Path(root), name
        self.home = self.root / HOME
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

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

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

    def _folder(self, id: str, key: str) -> JobFolder:
        return JobFolder(self.home / "jobs" / f"{id}-{key[:8]}")

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
            made_by = connection.execute("PRAGMA user_version").fetchone()[0]
            if made_by != LAYOUT and connection.execute("SELECT 1 FROM sqlite_master").fetchone():
                raise _Damaged("another version of vidkv has made the index")
            connection.executescript(_TABLE)
            if made_by != LAYOUT:
                # it writes, and others may be writing
                connection.execute(f"PRAGMA user_version = {LAYOUT}")
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
                        continue
                    folder = self._folder(job["id"], job["key"])
                    if folder.marked("pause"):
                        self._move(job["id"], State.PAUSED)
                    records = Records(folder.records)
                    with contextlib.suppress(StateError, KeyError):
                        query = "UPDATE jobs SET done = ?, frames = ? WHERE id = ?"
                        self._execute(
                            query, records.chunks, records.head(records.chunks - 1).frames, job["id"]
                        )


def _job(row: dict[str, Any]) -> Job:
    for name in ("request", "settings", "progress", "result", "parent"):
        row[name] = json.loads(row[name])
    return Job(**(row | {"state": State(row["state"]), "keep": bool(row["keep"])}))
