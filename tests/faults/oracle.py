"""What every campaign of faults is judged by: an uninterrupted run of the same request."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import av
import numpy as np
import psutil

from vidkv.errors import VidkvError
from vidkv.files import write_json
from vidkv.jobs.checkpoints import Interval
from vidkv.jobs.run import Options
from vidkv.jobs.store import Job, JobStore, State
from vidkv.jobs.supervisor import Supervisor, work_off
from vidkv.planning import plan
from vidkv.request import VideoRequest
from vidkv.segments import probe, write_video

PROMPT = "a red circle bouncing"
OTHER = "a blue square bouncing"
OFTEN = Options(interval=Interval(every_s=0.5, share=0.2))
"""So that a job of a few seconds is taken up from checkpoints and from records."""
MAX_NAMED = 40


@dataclass
class Counts:
    """What a campaign found.

    Attributes:
        injections: faults that took place.
        jobs: videos that were checked afterwards.
        lost: jobs without a finished file.
        duplicated: files beyond one per job, and frames that come twice.
        undecodable: finished or partial files that do not play to their end.
        differing: files with other frames or latents than an uninterrupted run gives.
        failures: anything else that must not be, one line each.
        figures: measured on the way, such as seconds to a state.
    """

    injections: int = 0
    jobs: int = 0
    lost: int = 0
    duplicated: int = 0
    undecodable: int = 0
    differing: int = 0
    failures: list[str] = field(default_factory=list)
    figures: dict[str, list[float]] = field(default_factory=dict)

    @property
    def clean(self) -> bool:
        """Nothing is wrong."""
        return not (self.lost or self.duplicated or self.undecodable or self.differing or self.failures)

    def add(self, other: Counts) -> None:
        """Those of another batch."""
        for name in ("injections", "jobs", "lost", "duplicated", "undecodable", "differing"):
            setattr(self, name, getattr(self, name) + getattr(other, name))
        for failure in other.failures:
            self.fail(failure)
        for name, values in other.figures.items():
            self.figures.setdefault(name, []).extend(values)

    def fail(self, text: str) -> None:
        """Note what must not be."""
        if len(self.failures) < MAX_NAMED:
            self.failures.append(" ".join(text.split())[:300])

    def measure(self, name: str, value: float) -> None:
        self.figures.setdefault(name, []).append(round(value, 3))


@dataclass(frozen=True)
class Reference:
    """An uninterrupted run.

    Attributes:
        digest: `latents_sha256` of its result.
        pictures: SHA-256 of every decoded frame.
    """

    digest: str
    pictures: tuple[str, ...]


class References:
    """Uninterrupted runs of requests, made once and kept in a folder.

    Args:
        folder: made where needed; processes may share it.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)

    def of(self, request: VideoRequest) -> Reference:
        """The uninterrupted run of a request, whatever its id and file."""
        return self.all([request])[0]

    def all(self, requests: Sequence[VideoRequest]) -> list[Reference]:
        """Likewise, of several."""
        plain = [request.model_copy(update={"id": None, "out": None}) for request in requests]
        keys = [plan(request).key for request in plain]
        missing = {
            key: request for key, request in zip(keys, plain, strict=True) if not self._path(key).exists()
        }
        if missing:
            self._make(missing)
        return [self._read(key) for key in keys]

    def _make(self, missing: dict[str, VideoRequest]) -> None:
        root = self.folder / f"making-{os.getpid()}"
        with JobStore(root) as store:
            jobs = {key: store.submit(request) for key, request in missing.items()}
            work_off(store)
            for key, job in jobs.items():
                job = store.get(job.id)
                if job.state is not State.DONE:
                    raise AssertionError(f"the uninterrupted run {job.request} is {job.state}: {job.error}")
                found = {"digest": job.result["latents_sha256"], "pictures": pictures(store.file(job))}
                write_json(self._path(key), found)
        shutil.rmtree(root)

    def _path(self, key: str) -> Path:
        return self.folder / f"{key}.json"

    def _read(self, key: str) -> Reference:
        found = json.loads(self._path(key).read_text())
        return Reference(found["digest"], tuple(found["pictures"]))


def pictures(path: Path) -> list[str]:
    """SHA-256 of every decoded frame of a video."""
    with av.open(str(path)) as container:
        return [
            hashlib.sha256(frame.to_ndarray(format="rgb24").tobytes()).hexdigest()
            for frame in container.decode(video=0)
        ]


def start_video(folder: Path) -> Path:
    """A short clip of a moving square in the embedded world's size, to go on from."""
    path = folder / "start.mp4"
    if not path.exists():
        from vidkv.segments import encode_segment

        folder.mkdir(parents=True, exist_ok=True)
        frames = np.full((33, 64, 64, 3), 200, np.uint8)
        for number, frame in enumerate(frames):
            frame[20:36, number : number + 16] = (220, 30, 30)
        segment = folder / f"start-{os.getpid()}.ts"
        segment.write_bytes(encode_segment(frames, 16))
        write_video([segment], path, 16, {})
        segment.unlink()
    return path


def bounce_requests(folder: Path, seconds: float = 5.0) -> list[VideoRequest]:
    """Videos of the embedded model: both formats, two kinds of prompt switches, one that starts from a video.

    Args:
        folder: where the video to go on from lies.
    """
    later = ((seconds / 2, OTHER),)

    def request(**values: Any) -> VideoRequest:
        return VideoRequest(prompt=PROMPT, seconds=seconds, **values)

    return [
        request(seed=1, cache={"format": "fp32"}),
        request(seed=2, cache={"format": "int8"}),
        request(seed=3, cache={"format": "fp32"}, schedule=later, switch="keep"),
        request(seed=4, cache={"format": "int8"}, schedule=later, switch="recache"),
        request(seed=5, cache={"format": "int8"}, video=start_video(folder)),
        # the window is passed, so that pages are evicted and checkpoints leave some behind
        request(seed=6, cache={"format": "fp32", "window": 9, "sink": 3}),
    ]


def tiny_model(folder: Path) -> Path:
    """The folder of a small random model: a few milliseconds a chunk."""
    from tests.tiny import build_pipeline

    model = folder / "tiny"
    if not (model / "model_index.json").exists():
        making = folder / f"tiny-{os.getpid()}"
        build_pipeline().save_pretrained(making)
        making.rename(model)
    return model


def tiny_request(folder: Path, **values: Any) -> VideoRequest:
    """A video of the small random model; `seconds` of 1 are two chunks."""
    from tests.tiny import HEIGHT, WIDTH

    given = {
        "prompt": PROMPT,
        "seconds": 3.0,
        "model": str(tiny_model(folder)),
        "height": HEIGHT,
        "width": WIDTH,
    }
    return VideoRequest.of(given | values)


def prepare(folder: Path) -> None:
    """What campaigns in this folder share: the small model, the video to go on from, uninterrupted runs."""
    shared = folder / "shared"
    with single_thread():
        References(shared).all([*bounce_requests(shared), *tiny_requests(shared)])


def tiny_requests(folder: Path) -> list[VideoRequest]:
    """Videos of the small random model, in both formats."""
    return [
        tiny_request(folder, seconds=8.0, seed=7, cache={"format": "int8"}),
        tiny_request(folder, seconds=8.0, seed=8, schedule=((4.0, OTHER),)),
    ]


def fresh(folder: Path) -> Path:
    """An empty folder."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    return folder


def check_jobs(store: JobStore, wanted: dict[str, Reference], counts: Counts) -> None:
    """Hold a store whose work is done against uninterrupted runs: every job once, whole and equal.

    Args:
        wanted: the uninterrupted run of every id that was submitted, and of no other.
    """
    jobs = {job.id: job for job in store.jobs()}
    counts.jobs += len(wanted)
    counts.duplicated += len(set(jobs) - set(wanted))
    files = {path.resolve() for path in store.root.rglob("*.mp4") if ".vidkv" not in path.parts}
    finals = {store.file(job).resolve() for job in jobs.values()}
    counts.duplicated += len([path for path in files - finals if ".partial." not in path.name])
    for id, reference in wanted.items():
        job = jobs.get(id)
        if job is None or job.state is not State.DONE or not store.file(job).is_file():
            counts.lost += 1
            counts.fail(f"{id} is {job.state if job else 'gone'}: {job.error if job else ''}")
            continue
        check_video(store.file(job), reference, counts)
        if job.result.get("latents_sha256") != reference.digest:
            counts.differing += 1
            counts.fail(f"{id}: latents differ (resumed at {job.result.get('resumed_at')})")
    check_left_over(store, counts)


def check_video(path: Path, reference: Reference, counts: Counts, *, part: bool = False) -> None:
    """Compare a file frame by frame with an uninterrupted run, or with its beginning."""
    try:
        stated, found = probe(path).frames, pictures(path)
    except (VidkvError, OSError, ValueError) as error:
        counts.undecodable += 1
        counts.fail(f"{path.name}: {error}")
        return
    whole = reference.pictures
    expected = whole[: len(found)] if part else whole
    if stated != len(found) or not found:
        counts.undecodable += 1
        counts.fail(f"{path.name}: {stated} frames counted, {len(found)} decoded")
    elif len(found) > len(whole):
        counts.duplicated += 1
        counts.fail(f"{path.name}: {len(found)} frames instead of {len(whole)}")
    elif tuple(found) != tuple(expected):
        counts.differing += 1
        first = next((i for i, (a, b) in enumerate(zip(found, whole, strict=False)) if a != b), len(found))
        counts.fail(f"{path.name}: differs from frame {first} of {len(whole)}, it has {len(found)}")


def check_left_over(store: JobStore, counts: Counts) -> None:
    """At the end: no temporaries, no partial file beside a whole one, no claim, nothing of finished jobs."""
    for path in store.root.rglob("*"):
        if path.name.endswith(".tmp"):
            counts.fail(f"left over: {path.relative_to(store.root)}")
    for job in store.jobs([State.DONE]):
        folder, partial = store.folder(job), store.file(job).with_suffix(".partial.mp4")
        if partial.exists():
            counts.fail(f"left over: {partial.name} beside the whole file")
        if store.claims.held(folder.path):
            counts.fail(f"left over: a live claim on {job.id}")
        for part in (folder.segments, folder.records, folder.checkpoints):
            if part.exists():
                counts.fail(f"left over: {job.id}/{part.name}")


def check_processes(pids: Iterable[int], counts: Counts, within_s: float = 12.0) -> None:
    """All of these have ended, or do so by themselves."""
    left = {pid for pid in pids if alive(pid)}
    deadline = time.monotonic() + within_s
    while left and time.monotonic() < deadline:
        time.sleep(0.1)
        left = {pid for pid in left if alive(pid)}
    for pid in left:
        counts.fail(f"process {pid} is still there")


def alive(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.Error:
        return False


def one_threaded(supervisor: Supervisor) -> Supervisor:
    """Its workers share a machine with others: more threads than cores cost tenfold."""
    supervisor.orders = [dataclasses.replace(orders, threads=1) for orders in supervisor.orders]
    return supervisor


def submit_all(
    store: JobStore, requests: Sequence[VideoRequest], references: References
) -> dict[str, Reference]:
    """Queue requests that have ids; returns what each must become."""
    found = dict(zip((str(r.id) for r in requests), references.all(requests), strict=True))
    for request in requests:
        store.submit(request)
    return found


def wait_for(condition: Callable[[], Any], what: str, timeout_s: float = 60.0, poll_s: float = 0.005) -> Any:
    """The first true answer.

    Raises:
        TimeoutError: there is none in time.
    """
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        if answer := condition():
            return answer
        time.sleep(poll_s)
    raise TimeoutError(f"{what} did not happen within {timeout_s:g} s")


def wait_end(store: JobStore, id: str, what: str) -> Job:
    """The job, once it has ended."""
    ended: Job = wait_for(lambda: finished_row(store, id), what)
    return ended


@contextmanager
def single_thread() -> Iterator[None]:
    """What is computed here uses one thread, as workers do."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def finished_row(store: JobStore, id: str) -> Job | None:
    """The job, once it has ended."""
    job = store.get(id)
    return job if job.ended else None
