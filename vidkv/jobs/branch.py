"""A video that goes on from a chunk of another one: under other prompts, or for longer.

What the two share is made and stored once: files of finished chunks never change, so the new job's folder
holds links to them. The request of a branch says all that it is, prompts that were steered in included, and
chunks have noise of their own, so a branch is bit for bit the video that its request would give from nothing.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from vidkv.errors import InputError, OutputError
from vidkv.files import reason, sync_folder
from vidkv.jobs.checkpoints import Checkpoints
from vidkv.jobs.folder import JobFolder
from vidkv.jobs.records import Records
from vidkv.pipeline import frames_for
from vidkv.planning import Plan, plan
from vidkv.prompts import Switch
from vidkv.request import VideoRequest
from vidkv.segments import segment_paths
from vidkv.stream import chunks_for


@dataclass(frozen=True)
class Branch:
    """What becomes of a video from a chunk on.

    Attributes:
        chunk: chunks that are taken over; None: all that are finished.
        prompt: takes over there, instead of what the schedule still holds; None: as the video itself goes on.
        switch: what becomes of the history then.
        seconds: length of the new video.
        more_seconds: likewise, beyond what is taken over.
        id: of the new job; by default the old one's with a number.
    """

    chunk: int | None = None
    prompt: str | None = None
    switch: Switch | None = None
    seconds: float | None = None
    more_seconds: float | None = None
    id: str | None = None


def finished_chunks(folder: JobFolder) -> int:
    """Chunks that can be taken over."""
    return min(len(segment_paths(folder.segments)), Records(folder.records).chunks)


def plan_branch(folder: JobFolder, branch: Branch, id: str) -> tuple[Plan, int, int]:
    """The plan of a branch, how many chunks it takes over, and how many of these are whole.

    The last chunk of a video that has ended may have been cut; it is made again.

    Args:
        id: of the new job.

    Raises:
        InputError: there is nothing to take over, or nothing to make.
        VidkvError: what `planning.plan` raises.
    """
    original, settings = folder.request()
    request = original.steered(folder.steered())
    # the video itself may hold the memory
    old = plan(request, settings, fits=False)
    done = finished_chunks(folder)
    chunk = done if branch.chunk is None else branch.chunk
    if not 1 <= chunk <= done:
        raise InputError(
            f"chunk={chunk}: {done} chunks of {old.id} are finished and kept; give a number from 1 to {done}"
            if done
            else f"no chunk of {old.id} is finished and kept; wait for the first one"
        )
    if branch.seconds is not None and branch.more_seconds is not None:
        raise InputError("give seconds or more_seconds, not both")
    fps, second = old.entry.fps, old.begins(chunk)
    # the index may not know yet
    frames = Records(folder.records).head(chunk - 1).frames
    if branch.more_seconds is not None:
        seconds = frames / fps + branch.more_seconds
    elif branch.seconds is not None:
        seconds = branch.seconds
    else:
        # one that was stopped by hand was to be this long
        seconds = request.seconds
    if round(seconds * fps) <= frames:
        raise InputError(
            f"seconds={seconds:g}: nothing is left to make after the {frames / fps:g} seconds that are taken "
            "over; give more_seconds"
        )
    timed = list(request.prompts)
    if branch.prompt is not None:
        timed = [entry for entry in timed if entry[0] < second - 1e-9]
        timed.append((second, branch.prompt, branch.switch))
    chunks = chunks_for(frames_for(seconds, fps), old.entry.chunk_frames, first=old.first_chunk_frames)
    last = old.begins(chunks - 1)
    if branch.prompt is not None and second > last:
        raise InputError(
            f"seconds={seconds:g}: the prompt takes over at second {second:g} and would never be shown; give "
            "more_seconds"
        )
    fresh = request.scheduled(timed).lasting(seconds, last).model_copy(update={"id": id, "out": None})
    new = plan(VideoRequest.of(fresh.model_dump(exclude_unset=True)), settings, fits=False)
    return new, chunk, chunk if new.frames_before(chunk) <= frames else chunk - 1


def take_over(parent: JobFolder, child: JobFolder, chunk: int) -> None:
    """Link the first chunks of a job into the folder of a new one, with a checkpoint if there is one.

    Raises:
        OutputError: the folder cannot be written.
    """
    try:
        for path in segment_paths(parent.segments)[:chunk]:
            _link(path, child.segments)
        for path in Records(parent.records).paths(range(chunk)):
            _link(path, child.records)
        # the worker of a parent that goes on drops old ones; going on without takes longer, that is all
        with contextlib.suppress(FileNotFoundError):
            for path in Checkpoints(parent.checkpoints).newest_files(chunk):
                _link(path, child.checkpoints)
        with child.log.open("a") as log:
            log.writelines(_lines(parent.log, chunk))
        for folder in (child.segments, child.records, child.checkpoints):
            if folder.is_dir():
                sync_folder(folder)
    except OSError as error:
        raise OutputError(f"cannot fill the job folder {child.path}: {reason(error)}; make room") from error


def _link(path: Path, folder: Path) -> None:
    folder.mkdir(exist_ok=True)
    try:
        os.link(path, folder / path.name)
    except FileExistsError:
        pass
    except FileNotFoundError:
        raise
    except OSError:
        # some file systems have no links
        shutil.copyfile(path, folder / path.name)


def _lines(log: Path, chunk: int) -> Iterator[str]:
    with contextlib.suppress(FileNotFoundError), log.open() as file:
        for line in file:
            with contextlib.suppress(ValueError, KeyError, TypeError):
                if json.loads(line)["chunk"] < chunk:
                    yield line
