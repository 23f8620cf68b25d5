"""Output folders that are full, read-only, gone or slow.

A disk that is really full is a small file system in memory, mounted where only this campaign sees it:
`python -m tests.faults.disks CAMPAIGN COUNT SEED FOLDER` runs inside such a name space. Where the kernel does
not allow that, files are limited in size instead.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import random
import resource
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

from tests.faults.hooks import working
from tests.faults.kills import ROOT, environment
from tests.faults.oracle import (
    OFTEN,
    Counts,
    Reference,
    References,
    alive,
    bounce_requests,
    check_jobs,
    check_processes,
    check_video,
    finished_row,
    fresh,
    one_threaded,
    wait_for,
)
from vidkv.errors import OutputError, VidkvError
from vidkv.jobs.store import Job, JobStore, State
from vidkv.jobs.supervisor import Supervisor
from vidkv.request import VideoRequest
from vidkv.segments import probe, segment_paths

LARGE = 512 * 2**20
HANG_S = 60.0
NO_ROOM = ("No space left", "disk is full", "File too large", "make room", "choose another")


def disk_full(count: int, seed: int, folder: Path) -> Counts:
    """Disks of so many sizes, each too small for a job at another point of its way."""
    return _apart("disk_full", count, seed, folder)


def bad_folder(count: int, seed: int, folder: Path) -> Counts:
    """A folder that is read-only, one that is deleted while a job runs, one that is slow."""
    return _apart("bad_folder", count, seed, folder)


def can_mount() -> bool:
    """Whether this user may mount file systems that nobody else sees."""
    command = ["unshare", "-rm", "mount", "-t", "tmpfs", "-o", "size=64k", "none", "/mnt"]
    try:
        return subprocess.run(command, capture_output=True, timeout=30).returncode == 0
    except (OSError, subprocess.TimeoutExpired):
        return False


def _apart(name: str, count: int, seed: int, folder: Path) -> Counts:
    """In a process of its own, with mounts of its own where that is allowed."""
    References(folder / "shared").all(bounce_requests(folder / "shared")[:2])
    result = fresh(folder / f"{name}-{seed}") / "counts.json"
    inside = ["unshare", "-rm"] if can_mount() else []
    done = subprocess.run(
        [*inside, sys.executable, "-m", "tests.faults.disks", name, str(count), str(seed), str(folder)],
        cwd=ROOT, env=environment() | {"VIDKV_MOUNTS": "1" if inside else ""}, timeout=600 + 60 * count,
        capture_output=True, text=True,
    )  # fmt: skip
    counts = Counts(**json.loads(result.read_text())) if result.exists() else Counts()
    if done.returncode or not result.exists():
        counts.fail(f"seed {seed}: exit code {done.returncode}: {done.stderr[-300:]}")
    if counts.figures.get("told_above") and not any(words in done.stderr for words in NO_ROOM):
        counts.fail(f"workers ended and did not say why: {done.stderr[-300:]}")
    if "Traceback" in done.stderr:
        counts.fail(f"a traceback was shown: {done.stderr[done.stderr.index('Traceback') :][-250:]}")
    return counts


class Disk:
    """A file system that can be full or read-only; or a limit on the size of files.

    Args:
        folder: where it is mounted.
    """

    def __init__(self, folder: Path) -> None:
        self.folder, self.mounts = folder, bool(os.environ.get("VIDKV_MOUNTS"))

    @contextlib.contextmanager
    def mounted(self, size: int) -> Iterator[None]:
        """An empty one of so many bytes."""
        fresh(self.folder)
        if not self.mounts:
            self.limit(size)
            try:
                yield
            finally:
                self.limit(LARGE)
            return
        _call("mount", "-t", "tmpfs", "-o", f"size={size}", "none", str(self.folder))
        try:
            yield
        finally:
            _call("umount", "-l", str(self.folder))

    def limit(self, size: int) -> None:
        """Its size from now on."""
        if self.mounts:
            _call("mount", "-o", f"remount,size={size},rw", str(self.folder))
        else:
            hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
            resource.setrlimit(resource.RLIMIT_FSIZE, (size if size < LARGE else hard, hard))

    def freeze(self) -> None:
        """Read-only from now on; nothing in it may be open."""
        if self.mounts:
            _call("mount", "-o", "remount,ro", str(self.folder))
        else:
            for path in (self.folder, *self.folder.rglob("*")):
                if path.is_dir():
                    path.chmod(0o555)


def _call(*command: str) -> None:
    subprocess.run(command, check=True, capture_output=True)


def _used(folder: Path) -> int:
    total = 0
    for path in folder.rglob("*"):
        with contextlib.suppress(OSError):
            total += path.stat().st_blocks * 512
    return total


def _peak(request: VideoRequest, folder: Path) -> int:
    """Bytes that a job's folder takes at the most."""
    most = 0
    with JobStore(fresh(folder)) as store, working(store, OFTEN):
        store.submit(request)
        while finished_row(store, str(request.id)) is None:
            most = max(most, _used(folder))
            time.sleep(0.02)
    shutil.rmtree(folder)
    return most


def full_disks(count: int, seed: int, folder: Path) -> Counts:
    """`disk_full`, inside."""
    draw, counts = random.Random(seed), Counts()
    own = folder / f"disk_full-{seed}"
    disk = Disk(own / "disk")
    basis = bounce_requests(folder / "shared")[:2]
    request = basis[seed % 2].model_copy(update={"id": "job"})
    reference = References(folder / "shared").of(request)
    peak = _peak(request, own / "measured")
    for number in range(count):
        size = int(peak * (number + draw.random()) / count) if disk.mounts else int(300_000 * draw.random())
        size = max(4096, size - size % 4096)
        with disk.mounted(size):
            counts.injections += 1
            told = f"a disk of {size // 1024} KiB"
            error = _try(disk.folder, request, counts, told)
            _check_named(error, disk.folder, counts, told)
            _check_playable(disk.folder, reference, counts, told)
            disk.limit(LARGE)
            again = _try(disk.folder, request, counts, told)
            if again is not None:
                counts.fail(f"{told}: there is room, and still: {again}")
            with JobStore(disk.folder) as store:
                check_jobs(store, {"job": reference}, counts)
    return counts


def _try(root: Path, request: VideoRequest, counts: Counts, told: str) -> str | None:
    """As `vidkv render` does it; returns the error that a user is told, if there is one."""
    pids, deadline = set[int](), time.monotonic() + HANG_S
    try:
        with (
            JobStore(root) as store,
            one_threaded(Supervisor(store, ["cpu"], OFTEN, retries=0)) as supervisor,
        ):
            store.submit(request, again=True)
            while supervisor.step():
                pids |= {process.pid for process in supervisor.workers.values() if process.pid}
                if time.monotonic() > deadline:
                    counts.fail(f"{told}: no end within {HANG_S:g} s; the job is {store.get('job').state}")
                    break
            job = store.get("job")
        return None if job.state is State.DONE else f"{job.state}: {job.error}"
    except VidkvError as error:
        return str(error)
    except Exception as error:
        counts.fail(f"{told}: {type(error).__name__}: {error}")
        return "no named error"
    finally:
        check_processes(pids, counts)


@contextlib.contextmanager
def _supervised(root: Path) -> Iterator[tuple[JobStore, Supervisor]]:
    """One worker, and no second attempt."""
    with JobStore(root) as store, one_threaded(Supervisor(store, ["cpu"], OFTEN, retries=0)) as supervisor:
        yield store, supervisor


def _check_named(error: str | None, root: Path, counts: Counts, told: str) -> None:
    """It says that there is no room; unless there was enough after all."""
    if error is None:
        return
    counts.measure("told", 1)
    if "see the messages above" in error:
        # workers that cannot even open the index say so themselves
        counts.measure("told_above", 1)
    elif "\n" in error or not any(words in error for words in NO_ROOM):
        counts.fail(f"{told}: the error was {error}")


def _check_playable(root: Path, reference: Reference, counts: Counts, told: str) -> None:
    """Segments that were finished play, and so does what was kept of them."""
    for folder in root.glob(".vidkv/jobs/*/segments"):
        for path in segment_paths(folder):
            with contextlib.suppress(VidkvError):
                if probe(path).frames:
                    continue
            counts.undecodable += 1
            counts.fail(f"{told}: {path.name} does not play")
    for path in root.glob("*.mp4"):
        check_video(path, reference, counts, part=path.name.endswith(".partial.mp4"))


def bad_folders(count: int, seed: int, folder: Path) -> Counts:
    """`bad_folder`, inside."""
    draw, counts = random.Random(seed), Counts()
    disk = Disk(folder / f"bad_folder-{seed}" / "disk")
    request = bounce_requests(folder / "shared")[0].model_copy(update={"id": "job"})
    reference = References(folder / "shared").of(request)
    faults = [_read_only, _gone, _slow]
    for number in range(count):
        fault = faults[(seed + number) % len(faults)]
        with disk.mounted(LARGE):
            counts.injections += 1
            fault(disk, request, reference, draw, counts)
    return counts


def _read_only(
    disk: Disk, request: VideoRequest, reference: Reference, draw: random.Random, counts: Counts
) -> None:
    """From the start: one error before any work."""
    disk.freeze()
    if not disk.mounts and os.access(disk.folder, os.W_OK):
        # nothing is read-only to this user
        return
    try:
        JobStore(disk.folder).close()
        counts.fail("a read-only folder was taken")
    except OutputError as error:
        if "\n" in str(error) or str(disk.folder) not in str(error):
            counts.fail(f"a read-only folder was refused with {error}")


def _gone(
    disk: Disk, request: VideoRequest, reference: Reference, draw: random.Random, counts: Counts
) -> None:
    """Deleted with everything in it: an error, no hang; then it is made anew."""
    _break_in_the_middle(disk, request, draw, counts, lambda: _empty(disk.folder))
    _empty(disk.folder)
    if error := _try(disk.folder, request, counts, "a folder made anew"):
        counts.fail(f"a folder that was deleted and made anew: {error}")
    with JobStore(disk.folder) as store:
        check_jobs(store, {"job": reference}, counts)


def _empty(folder: Path) -> None:
    for path in folder.iterdir():
        shutil.rmtree(path) if path.is_dir() else path.unlink()


def _break_in_the_middle(
    disk: Disk, request: VideoRequest, draw: random.Random, counts: Counts, harm: object
) -> None:
    assert callable(harm)
    name, deadline = harm.__name__, time.monotonic() + HANG_S
    pids, harmed = set[int](), False
    try:
        with _supervised(disk.folder) as (store, supervisor):
            job = store.submit(request)
            segments = store.folder(job).segments
            while supervisor.step():
                pids |= {process.pid for process in supervisor.workers.values() if process.pid}
                if not harmed and len(segment_paths(segments)) >= 2:
                    time.sleep(draw.uniform(0, 0.3))
                    # the worker may be making files in a folder that is being emptied
                    for _ in range(20):
                        with contextlib.suppress(OSError):
                            harm()
                            break
                    harmed = True
                if time.monotonic() > deadline:
                    counts.fail(f"{name}: no end within {HANG_S:g} s")
                    break
    except VidkvError as error:
        if "\n" in str(error):
            counts.fail(f"{name}: more than a line: {error}")
    except Exception as error:
        counts.fail(f"{name}: {type(error).__name__}: {error}")
    if not harmed:
        counts.fail(f"{name}: it did not take place")
    check_processes({pid for pid in pids if alive(pid)}, counts)


def _slow(
    disk: Disk, request: VideoRequest, reference: Reference, draw: random.Random, counts: Counts
) -> None:
    """Three times, making something durable takes five seconds: the claim stays alive, the result right."""
    genuine, slow = os.fsync, sorted(draw.sample(range(2, 20), 3))
    calls: list[int] = []

    def fsync(descriptor: int) -> None:
        calls.append(descriptor)
        if len(calls) in slow:
            time.sleep(5)
        genuine(descriptor)

    beats: set[str] = set()
    with JobStore(disk.folder) as store:
        with (
            mock.patch("os.fsync", fsync),
            mock.patch("vidkv.jobs.worker.BEAT_S", 1.0),
            working(store, OFTEN),
        ):
            job = store.submit(request)

            def look() -> Job | None:
                for path in store.folder(job).path.glob("claims/*/beat"):
                    with contextlib.suppress(OSError):
                        beats.add(path.read_text())
                return finished_row(store, job.id)

            try:
                wait_for(look, "the end on a slow disk", HANG_S)
            except TimeoutError as error:
                counts.fail(str(error))
        if len(beats) < 5:
            counts.fail(f"{len(beats)} heartbeats were seen in more than 15 s")
        check_jobs(store, {"job": reference}, counts)


def main(name: str, count: int, seed: int, folder: Path) -> None:
    campaign = {"disk_full": full_disks, "bad_folder": bad_folders}[name]
    counts = campaign(count, seed, folder)
    (folder / f"{name}-{seed}" / "counts.json").write_text(json.dumps(dataclasses.asdict(counts)))


if __name__ == "__main__":
    import torch

    torch.set_num_threads(1)
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), Path(sys.argv[4]))
