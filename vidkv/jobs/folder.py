"""The folder of one job: everything that its video is made from, and what became of it."""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from vidkv.errors import InputError, OutputError, StateError
from vidkv.files import reason, write_json
from vidkv.request import EngineSettings, VideoRequest, first_fault

ENDS = ("done", "failed", "cancelled")
"""What `result.json` may say that has become of a job."""
_JOB: dict[str, tuple[type, ...]] = {
    "id": (str,), "key": (str,), "number": (int,), "out": (str,), "request": (dict,), "settings": (dict,),
    "chunks": (int,), "submitted": (int, float),
}  # fmt: skip
"""What `job.json` holds."""


@dataclass(frozen=True)
class JobFolder:
    """Paths and small files of one job.

    ID-KEY/job.json          what to make; written once
           cancel            somebody wants it to stop
           claims/           who works on it, see `claims`
           segments/         finished chunks as video
           records/          finished chunks as latents, see `records`
           checkpoints/      cache and decoder now and then, see `checkpoints`
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
    def cancelled(self) -> bool:
        """Whether somebody wants it to stop."""
        return (self.path / "cancel").exists()

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
            for name in ("result.json", "cancel"):
                (self.path / name).unlink(missing_ok=True)

    def ask_to_cancel(self) -> None:
        """Say that it is to stop.

        Raises:
            OutputError: the folder cannot be written.
        """
        with self._writing():
            (self.path / "cancel").touch()

    def clear(self) -> None:
        """Drop what only an unfinished video needs."""
        for folder in (self.segments, self.records, self.checkpoints):
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
