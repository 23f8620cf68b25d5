"""The folder of one job: everything that its video is made from, and what became of it."""

from __future__ import annotations

import contextlib
import json
import shutil
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import ValidationError

from vidkv.errors import InputError, OutputError, StateError
from vidkv.files import reason, write_json
from vidkv.prompts import Switch
from vidkv.request import EngineSettings, VideoRequest, first_fault

ENDS = ("done", "failed", "cancelled")
"""What `result.json` may say that has become of a job."""
_JOB: dict[str, tuple[type, ...]] = {
    "id": (str,), "key": (str,), "number": (int,), "out": (str,), "request": (dict,), "settings": (dict,),
    "chunks": (int,), "submitted": (int, float),
}  # fmt: skip
"""What `job.json` holds; beside it `keep` and `parent`, see `store.Job`."""
Mark = Literal["cancel", "stop", "pause"]
"""What somebody wants of whoever works on a job: to give up, to end with what there is, to wait."""
Steer = tuple[float, str, Switch | None]
"""(second, prompt, switch) from which it holds."""


@dataclass(frozen=True)
class JobFolder:
    """Paths and small files of one job.

    ID-KEY/job.json          what to make; written once
           cancel stop pause what somebody wants, see `Mark`
           steering/         prompts that are to take over with the next chunk
           steered.json      prompts that have taken over so, and when
           claims/           who works on it, see `claims`
           segments/         finished chunks as video
           records/          finished chunks as latents, see `records`
           checkpoints/      cache and decoder now and then, see `checkpoints`
           log.jsonl         a line for every finished chunk, for those who watch
           result.json       how it ended
    """

    path: Path

    @property
    def segments(self) -> Path:
        return self.path / "segments"

    @property
    def records(self) -> Path:
        return self.path / "records"

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    def making(self, fence: int) -> Path:
        """Where the holder of a claim joins the video, before it appears under its name."""
        return self.path / f"making-{fence:06d}.mp4"

    @property
    def log(self) -> Path:
        return self.path / "log.jsonl"

    def marked(self, mark: Mark) -> bool:
        """Whether somebody wants this."""
        return (self.path / mark).exists()

    def mark(self, mark: Mark) -> None:
        """Say that this is wanted.

        Raises:
            OutputError: the folder cannot be written.
        """
        with self._writing():
            (self.path / mark).touch()

    def unmark(self, *marks: Mark) -> None:
        """Say that these are not wanted any more.

        Raises:
            OutputError: the folder cannot be written.
        """
        with self._writing():
            for mark in marks:
                (self.path / mark).unlink(missing_ok=True)

    def ask_for_prompt(self, prompt: str, switch: Switch | None) -> None:
        """Say that another prompt is to take over with the next chunk.

        Raises:
            OutputError: the folder cannot be written.
        """
        with self._writing():
            folder = self.path / "steering"
            folder.mkdir(exist_ok=True)
            name = f"{time.time_ns():020d}-{uuid.uuid4().hex[:8]}.json"
            write_json(folder / name, {"prompt": prompt, "switch": switch})

    def wanted_prompts(self) -> list[tuple[str, str, Switch | None]]:
        """(name, prompt, switch) of prompts that wait to take over, in the order they were asked for."""
        taken = set((self._read("steered.json") or {}).get("taken", ()))
        found = list[tuple[str, str, Switch | None]]()
        with contextlib.suppress(FileNotFoundError):
            for path in sorted((self.path / "steering").glob("[0-9]*.json")):
                asked = self._read(f"steering/{path.name}")
                if asked and path.name not in taken:
                    found.append((path.name, asked["prompt"], asked["switch"]))
        return found

    def steer(self, entries: Sequence[Steer], taken: Sequence[str]) -> None:
        """Prompts have taken over: noted before the first frame under them is made.

        Args:
            entries: all of this video so far.
            taken: names of `wanted_prompts` that are among them, or cannot be.

        Raises:
            OutputError: the folder cannot be written.
        """
        with self._writing():
            # a worker that was killed here has left some that are taken
            old = (self._read("steered.json") or {}).get("taken", ())
            left = [name for name in old if name not in taken and (self.path / "steering" / name).exists()]
            taken = [*taken, *left]
            write_json(self.path / "steered.json", {"entries": entries, "taken": taken})
            for name in taken:
                (self.path / "steering" / name).unlink(missing_ok=True)

    def steered(self) -> list[Steer]:
        """What `steer` has noted."""
        found = (self._read("steered.json") or {}).get("entries", ())
        return [(second, prompt, switch) for second, prompt, switch in found]

    def note(self, line: Mapping[str, Any]) -> None:
        """Add to the log; a view for people, so a disk that is full is no reason to stop."""
        with contextlib.suppress(OSError), self.log.open("a") as file:
            file.write(json.dumps(line) + "\n")

    def read_log(self, after: int = 0, most_bytes: int = 2**20) -> tuple[list[dict[str, Any]], int]:
        """Lines from a place on, and the place after them.

        A chunk that was made again has a line again.
        """
        entries = list[dict[str, Any]]()
        try:
            with self.log.open("rb") as file:
                file.seek(after)
                data = file.read(most_bytes)
        except (FileNotFoundError, ValueError):
            return [], 0
        whole = data[: data.rfind(b"\n") + 1]
        for line in whole.splitlines():
            # a worker may have been killed in the middle of one
            with contextlib.suppress(ValueError):
                entries.append(json.loads(line))
        return entries, after + len(whole)

    def make(self) -> None:
        """Make the folder, which says nothing yet.

        Raises:
            OutputError: it cannot be made.
        """
        with self._writing():
            self.path.mkdir(parents=True, exist_ok=True)

    def create(self, job: dict[str, Any]) -> None:
        """Make the folder with its `job.json`; what is there already stays.

        Raises:
            OutputError: it cannot be made.
        """
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            if self._job() is None:
                write_json(self.path / "job.json", job)
        except OSError as error:
            raise OutputError(
                f"cannot create the job folder {self.path}: {reason(error)}; make room or choose another "
                "output folder"
            ) from error

    def job(self) -> dict[str, Any]:
        """What `create` wrote.

        Raises:
            StateError: it is missing or damaged.
        """
        found = self._job()
        if found is None:
            raise StateError(f"{self.path / 'job.json'} is missing or damaged; delete the folder")
        return found

    def request(self) -> tuple[VideoRequest, EngineSettings]:
        """What to make, and how.

        Raises:
            StateError, InputError: it is missing, damaged or of another version.
        """
        job = self.job()
        try:
            return VideoRequest.of(job["request"]), EngineSettings.model_validate(job["settings"])
        except ValidationError as error:
            raise InputError(first_fault(error, EngineSettings)) from None

    def result(self) -> dict[str, Any] | None:
        """How the job ended; None if it has not, or if that cannot be read."""
        found = self._read("result.json")
        return found if found and found.get("state") in ENDS else None

    def end(self, result: dict[str, Any]) -> None:
        """Say how the job ended.

        Raises:
            OSError: it cannot be written.
        """
        write_json(self.path / "result.json", result)

    def reopen(self) -> None:
        """The job has not ended after all.

        Raises:
            OutputError: the folder cannot be written.
        """
        with self._writing():
            (self.path / "result.json").unlink(missing_ok=True)
        self.unmark("cancel", "stop", "pause")

    def clear(self, keep: bool = False) -> None:
        """Drop what only an unfinished video needs.

        Args:
            keep: what it can be extended and branched from stays.
        """
        for folder in () if keep else (self.segments, self.records, self.checkpoints):
            shutil.rmtree(folder, ignore_errors=True)
        # of workers that were killed while they wrote
        for path in [*self.path.glob("making-*.mp4"), *self.path.glob(".*.tmp")]:
            with contextlib.suppress(OSError):
                path.unlink(missing_ok=True)

    def remove(self) -> None:
        """Drop the job; of a link to a folder, the link."""
        if self.path.is_symlink():
            with self._writing():
                self.path.unlink(missing_ok=True)
        shutil.rmtree(self.path, ignore_errors=True)

    def _job(self) -> dict[str, Any] | None:
        found = self._read("job.json")
        if found is None or not all(type(found.get(name)) in kinds for name, kinds in _JOB.items()):
            return None
        return found

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise OutputError(
                f"cannot change the job folder {self.path}: {reason(error)}; make room or check its rights"
            ) from error

    def _read(self, name: str) -> dict[str, Any] | None:
        with contextlib.suppress(OSError, ValueError):
            found = json.loads((self.path / name).read_text())
            return found if isinstance(found, dict) else None
        return None
