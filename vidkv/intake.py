"""Pictures and videos that users hand in, decoded by a process apart.

Decoders are large, written in C, and read what strangers wrote. They run in `vidkv.intake_child`: for a
limited time, in limited memory, on a file that is already open, unable to open another, without the
environment's secrets. Whatever happens there, the caller gets pixels or an InputError.
"""

from __future__ import annotations

import contextlib
import errno
import json
import math
import os
import signal
import stat
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from io import BufferedRandom, FileIO
from pathlib import Path
from typing import Literal, cast

import torch
from torch import Tensor

from vidkv import intake_child
from vidkv.errors import InputError, ResourceError
from vidkv.intake_child import HEAD_BYTES, PICTURE_REMEDY, SHORTEN, THREADS, VIDEO_REMEDY, Task

CHILD = Path(intake_child.__file__)
Kind = Literal["image", "video"]
NOUNS: dict[Kind, str] = {"image": "an image", "video": "a video"}
REMEDIES: dict[Kind, str] = {"image": PICTURE_REMEDY, "video": VIDEO_REMEDY}
SMALLER: dict[Kind, str] = {"image": "scale it down", "video": SHORTEN}

HEADER_BYTES = 4096
"""Most that the child says before the pixels."""

KEPT_VARIABLES = ("LD_LIBRARY_PATH", "PYTHONHOME", "PYTHONPATH", "SYSTEMROOT")
"""Of the environment: what it takes to find the libraries. Tokens and proxies stay behind."""


@dataclass(frozen=True)
class Limits:
    """What is taken from users.

    Attributes:
        max_picture_bytes, max_video_bytes: size of the file.
        max_pixels: width times height of a picture, or of a video's frames.
        max_seconds: length of a video by its header.
        wall_s: seconds until the decoder is stopped.
        memory_bytes: address space of the decoder, besides the frames that were asked for.
    """

    max_picture_bytes: int = 32 * 2**20
    max_video_bytes: int = 2 * 2**30
    max_pixels: int = 64_000_000
    max_seconds: float = 4 * 3600.0
    wall_s: float = 30.0
    memory_bytes: int = 2 * 2**30


LIMITS = Limits()


def picture(path: Path, height: int, width: int, limits: Limits = LIMITS) -> Tensor:
    """An image file, upright, scaled and cropped around the middle: (1, height, width, 3) uint8.

    Raises:
        InputError: missing, or no picture that can be read within the limits.
    """
    return _decode(path, "image", 1, height, width, limits)


def video_end(path: Path, frames: int, height: int, width: int, limits: Limits = LIMITS) -> Tensor:
    """The last frames of a video file, at most so many, scaled and cropped: (frames, height, width, 3) uint8.

    Raises:
        InputError: missing, or no video that can be read within the limits.
    """
    return _decode(path, "video", frames, height, width, limits)


def kind_of(path: Path) -> Kind:
    """What a file is by its first bytes, whatever its name says; nothing is decoded.

    Raises:
        InputError: it is neither a picture nor a video that vidkv takes.
    """
    with _open(path, None) as source:
        kind = intake_child.kind_of_head(source.read(HEAD_BYTES))
    if kind is None:
        taken = "give a PNG, JPEG or WebP, or an MP4, MOV, MKV, WebM or MPEG-TS"
        raise InputError(f"{_shown(path)} is neither a picture nor a video; {taken}")
    return cast(Kind, kind)


def _decode(path: Path, kind: Kind, frames: int, height: int, width: int, limits: Limits) -> Tensor:
    pixels_bytes = frames * height * width * 3
    task = Task(
        kind=kind,
        frames=frames,
        height=height,
        width=width,
        max_pixels=limits.max_pixels,
        max_seconds=limits.max_seconds,
        cpu_s=math.ceil(limits.wall_s) * THREADS + 1,
        memory_bytes=limits.memory_bytes + pixels_bytes,
        answer_bytes=HEADER_BYTES + pixels_bytes,
        parent=os.getpid(),
    )
    with _open(path, kind) as source, _memory() as answer, _memory() as log:
        _check_size(path, kind, os.fstat(source.fileno()).st_size, limits)
        try:
            status = _run(task, source, answer, log, limits.wall_s)
        except subprocess.TimeoutExpired:
            raise _refused(path, kind, f"not decoded within {limits.wall_s:g} s", SMALLER[kind]) from None
        pixels = _pixels(path, task, answer) if status == 0 else None
        if pixels is None:
            within = f"the limits are {limits.wall_s:g} s and {limits.memory_bytes / 2**30:.3g} GiB"
            why = f"its decoder ended with {_ending(status, log)}; {within}"
            raise _refused(path, kind, why, REMEDIES[kind])
    return pixels


def _run(task: Task, source: FileIO, answer: BufferedRandom, log: BufferedRandom, wall_s: float) -> int:
    """The exit status of the child, which is gone afterwards in any case.

    Raises:
        subprocess.TimeoutExpired: it was stopped.
        ResourceError: it could not be started.
    """
    try:
        child = subprocess.Popen(
            [sys.executable, "-P", str(CHILD), json.dumps(asdict(task))],
            stdin=source,
            stdout=answer,
            stderr=log,
            cwd="/",
            env=_environment(),
            start_new_session=True,
        )
    except OSError as error:
        reason = error.strerror or type(error).__name__
        raise ResourceError(f"no process can be started to decode files ({reason}); end others") from error
    try:
        return child.wait(wall_s)
    finally:
        if child.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(child.pid, signal.SIGKILL)
            child.wait()


def _environment() -> dict[str, str]:
    kept = {name: os.environ[name] for name in KEPT_VARIABLES if name in os.environ}
    # each thread of a numerics library, and each arena of malloc, takes address space
    return kept | {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "MALLOC_ARENA_MAX": "2"}


def _pixels(path: Path, task: Task, answer: BufferedRandom) -> Tensor | None:
    """What the child answered, or None where that makes no sense.

    Raises:
        InputError: it refuses the file.
    """
    answer.seek(0)
    try:
        header = json.loads(answer.readline(HEADER_BYTES))
        if "why" in header:
            raise _refused(path, cast(Kind, task.kind), str(header["why"]), str(header["remedy"]))
        frames = header["frames"]
    except (ValueError, TypeError, KeyError) as error:
        if isinstance(error, InputError):
            raise
        return None
    if type(frames) is not int or not 1 <= frames <= task.frames:
        return None
    pixels = bytearray(frames * task.height * task.width * 3)
    if answer.readinto(pixels) != len(pixels) or answer.read(1):
        return None
    return torch.frombuffer(pixels, dtype=torch.uint8).view(frames, task.height, task.width, 3)


def _ending(status: int, log: BufferedRandom) -> str:
    """How a process ended, and the last line it wrote about that."""
    log.seek(0)
    lines = log.read(HEADER_BYTES).decode(errors="replace").split("\n")
    last = next((line.strip() for line in reversed(lines) if line.strip()), "")
    with contextlib.suppress(ValueError):
        return signal.Signals(-status).name
    return f"status {status}" + (f", {last}" if last else "")


def _open(path: Path, kind: Kind | None) -> FileIO:
    """A regular file, open for reading; nothing else is opened, let alone waited for.

    Raises:
        InputError: there is none, or it is something else.
    """
    try:
        _check_regular(os.stat(path).st_mode)
        source = FileIO(os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC))
        try:
            # it may have been replaced in between
            _check_regular(os.fstat(source.fileno()).st_mode)
        except OSError:
            source.close()
            raise
        return source
    except FileNotFoundError:
        raise InputError(f"there is no {kind or 'file'} {_shown(path)}") from None
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise _refused(path, kind, reason, "give a file") from None


def _check_regular(mode: int) -> None:
    if not stat.S_ISREG(mode):
        names = {stat.S_IFDIR: "folder", stat.S_IFIFO: "pipe", stat.S_IFSOCK: "socket"}
        raise OSError(errno.EINVAL, f"it is a {names.get(stat.S_IFMT(mode), 'device')}")


def _check_size(path: Path, kind: Kind, size: int, limits: Limits) -> None:
    most = limits.max_picture_bytes if kind == "image" else limits.max_video_bytes
    if not size:
        raise _refused(path, kind, "it is empty", REMEDIES[kind])
    if size > most:
        why = f"it has {size / 2**20:,.0f} MiB, at most {most / 2**20:,.0f} are taken"
        raise _refused(path, kind, why, SMALLER[kind])


@contextlib.contextmanager
def _memory() -> Iterator[BufferedRandom]:
    """A file without a name. Other than a pipe it needs no reader, and the child's limit bounds its size."""
    with os.fdopen(os.memfd_create("vidkv"), "w+b") as file:
        yield file


def _refused(path: Path, kind: Kind | None, why: str, remedy: str) -> InputError:
    why = " ".join(why.encode("unicode_escape").decode().split())[:300]
    noun = NOUNS[kind] if kind else "a file"
    return InputError(f"{_shown(path)} cannot be read as {noun} ({why}); {remedy}")


def _shown(path: Path) -> str:
    """On one line, whatever is in it."""
    text = str(path)
    return text if text.isprintable() else text.encode("unicode_escape", "replace").decode()
