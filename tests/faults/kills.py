"""Processes that die: workers, the supervisor with and without them, and signals that ask for an end."""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import IO, Any

import psutil

from tests.faults.oracle import (
    OFTEN,
    Counts,
    Reference,
    References,
    bounce_requests,
    check_jobs,
    check_processes,
    check_video,
    fresh,
    one_threaded,
    submit_all,
    tiny_requests,
    wait_for,
)
from vidkv.jobs.store import MAX_CRASHES, Job, JobStore, State
from vidkv.jobs.supervisor import Supervisor
from vidkv.request import VideoRequest
from vidkv.segments import partial_video

ROOT = Path(__file__).parents[2]
HANG_S = 300.0


def jobs_for(count: int, draw: random.Random, folder: Path, prefix: str = "job") -> list[VideoRequest]:
    """So many requests with ids: mostly of the embedded model, some of the small random one."""
    shared = folder / "shared"
    requests = bounce_requests(shared)
    small = tiny_requests(shared)
    order = requests + small[:1] + requests[1:] + small[1:]
    start = draw.randrange(len(order))
    return [
        order[(start + number) % len(order)].model_copy(update={"id": f"{prefix}{number:04d}"})
        for number in range(count)
    ]


class Killer:
    """Kills workers of a supervisor at random times.

    A quarter while they start or load, a quarter while they publish, the others 0.2 to 3 s after a claim.
    A job without progress since two kills is left alone until it has made some: five end it.
    """

    def __init__(self, count: int, draw: random.Random, store: JobStore) -> None:
        self.left, self.draw, self.store = count, draw, store
        self.killed: list[int] = []
        self._due: dict[int, float] = {}
        self._modes: dict[int, str] = {}
        self._false_starts = 0
        self._stuck: dict[str, tuple[int, int]] = {}

    def look(self, supervisor: Supervisor, running: dict[str, Job]) -> None:
        """Kill whom it is time to kill.

        Args:
            running: jobs by worker.
        """
        for name, process in supervisor.workers.items():
            pid = process.pid
            if self.left and pid is not None and pid not in self.killed and process.is_alive():
                self._consider(pid, running.get(name))

    def _consider(self, pid: int, job: Job | None) -> None:
        mode = self._modes.setdefault(pid, self._mode())
        if pid not in self._due:
            if mode == "starting":
                self._due[pid] = time.monotonic() + self.draw.uniform(0.0, 0.8)
            elif job is not None:
                self._due[pid] = time.monotonic() + self.draw.uniform(0.2, 3.0) * (mode == "working")
            return
        if time.monotonic() < self._due[pid] or (job is None and mode != "starting"):
            return
        if job is not None and self._no_progress(job) >= MAX_CRASHES - 3:
            return
        if mode == "publishing":
            if job is None or not self._at_the_end(job):
                return
            time.sleep(self.draw.uniform(0.0, 0.06))
        else:
            time.sleep(self.draw.uniform(0.0, 0.1))
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
            self.killed.append(pid)
            self.left -= 1
            self._false_starts = self._false_starts + 1 if job is None else 0
            if job is not None:
                done, times = self._stuck.get(job.id, (-1, 0))
                self._stuck[job.id] = (job.done, times + 1 if done == job.done else 1)

    def _mode(self) -> str:
        # three false starts in a row end a supervisor
        modes = ["working", "working", "publishing", "starting"]
        return self.draw.choice(modes[: 3 if self._false_starts else 4])

    def _at_the_end(self, job: Job) -> bool:
        """Whether the last segment is there; it is waited for if it is the next one."""
        segments = self.store.folder(job).segments

        def number() -> int:
            return len(list(segments.glob("seg_*.ts")))

        if number() < job.chunks - 1:
            return False
        deadline = time.monotonic() + 2
        while segments.exists() and number() < job.chunks and time.monotonic() < deadline:
            time.sleep(0.001)
        return True

    def _no_progress(self, job: Job) -> int:
        done, times = self._stuck.get(job.id, (-1, 0))
        return times if done == job.done else 0


def kill_workers(
    count: int, seed: int, folder: Path, *, jobs: int | None = None, workers: int | None = None
) -> Counts:
    """`kill -9` workers at random times; every job must end as if nothing had happened."""
    draw, counts = random.Random(seed), Counts()
    references = References(folder / "shared")
    with JobStore(fresh(folder / f"kill_workers-{seed}")) as store:
        number = jobs or max(10, count)
        requests = jobs_for(number, draw, folder)
        wanted = submit_all(store, requests, references)
        devices = ["cpu"] * (workers or draw.choice((1, 2)))
        killer, pids = Killer(count, draw, store), set[int]()
        deadline = time.monotonic() + HANG_S + 15 * count
        with one_threaded(Supervisor(store, devices, OFTEN)) as supervisor:
            while supervisor.step() or killer.left:
                pids |= {process.pid for process in supervisor.workers.values() if process.pid}
                running = {str(job.worker): job for job in store.jobs([State.RUNNING])}
                killer.look(supervisor, running)
                if killer.left and not store.counts()[State.QUEUED]:
                    more = jobs_for(1, draw, folder, f"more{len(wanted):04d}-")
                    wanted |= submit_all(store, more, references)
                if time.monotonic() > deadline:
                    counts.fail(f"no end after {count} kills: {store.counts()}")
                    break
        counts.injections = len(killer.killed)
        check_jobs(store, wanted, counts)
        check_processes(pids, counts)
    return counts


class Standby:
    """Supervisors that wait for their turn; each leads a process group, with its workers in it.

    Args:
        log: takes what they say.
    """

    def __init__(self, store: Path, workers: int, log: IO[str]) -> None:
        self.command = [sys.executable, "-m", "tests.faults.supervised", str(store), str(workers)]
        self.log = log

    def start(self) -> subprocess.Popen[str]:
        """The next one; it is not ready yet."""
        return subprocess.Popen(
            self.command, cwd=ROOT, env=environment(), stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            stderr=self.log, text=True, start_new_session=True,
        )  # fmt: skip


def environment() -> dict[str, str]:
    """Of processes that share a machine with others."""
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    return os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(paths)}


def say_go(process: subprocess.Popen[str]) -> None:
    """Let a supervisor that is ready begin; returns when it holds the store."""
    assert process.stdin is not None and process.stdout is not None
    ready = process.stdout.readline()
    process.stdin.write("go\n")
    process.stdin.flush()
    holding = process.stdout.readline()
    if (ready, holding) != ("ready\n", "holding\n"):
        raise AssertionError(f"the supervisor ended early with {process.wait()}; it said {ready + holding!r}")


class Watch(threading.Thread):
    """Looks at the claims of a store all the time: never may two live ones stand on one job."""

    def __init__(self, root: Path) -> None:
        super().__init__(daemon=True)
        self.jobs, self.over = root / ".vidkv" / "jobs", threading.Event()
        self.doubles: list[str] = []
        self.owners: set[int] = set()
        self.looks = 0

    def run(self) -> None:
        while not self.over.wait(0.02):
            self.looks += 1
            for folder in self.jobs.iterdir():
                living = self._living(folder / "claims")
                self.owners |= set(living.values())
                if len(living) > 1:
                    self.doubles.append(f"{folder.name}: claims {living}")

    def _living(self, claims: Path) -> dict[str, int]:
        living = {}
        with contextlib.suppress(OSError):
            for claim in sorted(claims.iterdir()):
                with contextlib.suppress(OSError, ValueError):
                    owner = json.loads((claim / "owner.json").read_text())
                    # asked last: a claim is let go before the next one is made
                    held = _is(owner) and not (claim / "released").exists() and claim.exists()
                    if held:
                        living[claim.name] = int(owner["pid"])
        return living


def _is(owner: dict[str, Any]) -> bool:
    try:
        process = psutil.Process(int(owner["pid"]))
        same = abs(process.create_time() - float(owner["started"])) < 0.01
        return same and process.status() != psutil.STATUS_ZOMBIE
    except psutil.Error:
        return False


def kill_supervisor(count: int, seed: int, folder: Path, *, jobs: int | None = None) -> Counts:
    """`kill -9` supervisors, half of them with all their workers, and start the next at once."""
    draw, counts = random.Random(seed), Counts()
    root = fresh(folder / f"kill_supervisor-{seed}")
    workers = draw.choice((1, 2))
    with JobStore(root) as store, (root / "log.txt").open("w") as log:
        requests = jobs_for(jobs or max(6, 2 * count), draw, folder)
        wanted = submit_all(store, requests, References(folder / "shared"))
        order = [(job.id, job.number) for job in store.jobs()]
        watch = Watch(root)
        watch.start()
        standby, processes = Standby(root, workers, log), list[subprocess.Popen[str]]()
        upcoming = standby.start()
        done: dict[str, dict[str, Any]] = {}
        try:
            for turn in range(count + 1):
                current, upcoming = upcoming, standby.start() if turn < count else upcoming
                processes.append(current)
                say_go(current)
                if turn == count:
                    break
                if not _let_work(store, draw.uniform(0.3, 3.0)):
                    more = jobs_for(2, draw, folder, f"more{turn:03d}-")
                    wanted |= submit_all(store, more, References(folder / "shared"))
                    order = [(job.id, job.number) for job in store.jobs()]
                    _let_work(store, draw.uniform(0.3, 2.0))
                _ready(upcoming)
                if draw.random() < 0.5:
                    os.killpg(current.pid, signal.SIGKILL)
                else:
                    os.kill(current.pid, signal.SIGKILL)
                current.wait()
                counts.injections += 1
                _check_intact(store, order, done, counts)
            code = processes[-1].wait(HANG_S)
            if code:
                counts.fail(f"the last supervisor ended with {code}")
        except (AssertionError, TimeoutError, subprocess.TimeoutExpired) as error:
            counts.fail(str(error))
        finally:
            for process in [*processes, upcoming]:
                _end(process)
            watch.over.set()
            watch.join()
        for double in watch.doubles[:5]:
            counts.fail(f"two live claims: {double}")
        check_processes(watch.owners, counts)
        check_jobs(store, wanted, counts)
    return counts


def _ready(process: subprocess.Popen[str]) -> None:
    """The next supervisor has imported everything, and starts at once; its word is left to `say_go`."""
    import select

    assert process.stdout is not None
    if not select.select([process.stdout], [], [], 120)[0]:
        raise TimeoutError("a supervisor did not start within 120 s")


def _let_work(store: JobStore, seconds: float) -> bool:
    """Wait until some job runs, and then so long; False where all jobs have ended."""

    def runs() -> str | None:
        counts = store.counts()
        if counts[State.RUNNING]:
            return "running"
        return None if counts[State.QUEUED] else "ended"

    if wait_for(runs, "a job's start", 60, 0.02) == "ended":
        return False
    time.sleep(seconds)
    counts = store.counts()
    return counts[State.QUEUED] + counts[State.RUNNING] > 0


def _check_intact(
    store: JobStore, order: list[tuple[str, int]], done: dict[str, dict[str, Any]], counts: Counts
) -> None:
    """The queue is in its order, and what was done stays done."""
    jobs = store.jobs()
    if [(job.id, job.number) for job in jobs] != order:
        counts.fail("the order of the queue has changed")
    for job in jobs:
        if job.state in (State.FAILED, State.CANCELLED):
            counts.fail(f"{job.id} is {job.state}: {job.error}")
        if job.id in done and (job.state is not State.DONE or job.result != done[job.id]):
            counts.fail(f"{job.id} was done and is {job.state}")
        if job.state is State.DONE:
            done[job.id] = job.result


def _end(process: subprocess.Popen[str]) -> None:
    """End a process that this campaign started, whatever state it is in."""
    for stream in (process.stdin, process.stdout):
        if stream is not None:
            with contextlib.suppress(OSError):
                stream.close()
    if process.poll() is None:
        try:
            process.wait(5)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


PHASES = ("importing", "loading", "denoising", "middle", "last chunk", "publishing")
MOST_STOP_S = 10.0


def terminate(count: int, seed: int, folder: Path) -> Counts:
    """SIGTERM, every third time Ctrl-C, to `vidkv render` in every phase; the same command then goes on."""
    draw, counts = random.Random(seed), Counts()
    root = fresh(folder / f"terminate-{seed}")
    requests = jobs_for(2 * count + 1, draw, folder)
    wanted = dict(
        zip((str(r.id) for r in requests), References(folder / "shared").all(requests), strict=True)
    )
    manifest = root.with_suffix(".jsonl")
    lines = (json.dumps(r.model_dump(mode="json", exclude_unset=True)) for r in requests)
    manifest.write_text("".join(f"{line}\n" for line in lines))
    command = [sys.executable, "-m", "vidkv.apps.cli", "render", str(manifest), "--out", str(root)]
    with JobStore(root) as store:
        for number in range(count):
            phase = PHASES[(seed + number) % len(PHASES)]
            sent = signal.SIGINT if number % 3 == 2 else signal.SIGTERM
            process = _render(command, root)
            try:
                if not _await_phase(store, phase, draw, process):
                    counts.fail(f"{phase}: the command ended with {process.poll()} before it was there")
                    continue
                begun = time.monotonic()
                # a terminal sends Ctrl-C to all of its processes, a scheduler SIGTERM to one
                (os.killpg if sent is signal.SIGINT else os.kill)(process.pid, sent)
                counts.injections += 1
                try:
                    process.wait(60)
                except subprocess.TimeoutExpired:
                    counts.fail(f"{phase}: no end within 60 s of {sent.name}")
                    continue
                counts.measure("stop_s", time.monotonic() - begun)
                _check_stopped(process, sent, phase, time.monotonic() - begun, root, counts)
                _check_partials(store, wanted, counts, phase)
            finally:
                if process.poll() is None:
                    os.killpg(process.pid, signal.SIGKILL)
                    process.wait()
        process = _render(command, root)
        try:
            code = process.wait(HANG_S + 10 * len(requests))
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            code = process.wait()
        if code:
            counts.fail(f"the last run ended with {code}: {_said(root)[-200:]}")
        check_jobs(store, wanted, counts)
    manifest.unlink()
    return counts


def _render(command: Sequence[str], root: Path) -> subprocess.Popen[bytes]:
    with (root / "said.txt").open("wb") as said:
        return subprocess.Popen(
            command, cwd=ROOT, env=environment(), stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
            stderr=said, start_new_session=True, preexec_fn=_heed_interrupts,
        )  # fmt: skip


def _heed_interrupts() -> None:
    """Whoever started the tests in the background has them, and all that they start, ignore Ctrl-C."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def _said(root: Path) -> str:
    return (root / "said.txt").read_text(errors="replace")


def _await_phase(store: JobStore, phase: str, draw: random.Random, process: subprocess.Popen[bytes]) -> bool:
    """Wait until some job is in a phase, and a random moment more; False where the command ends before."""
    if phase == "importing":
        time.sleep(draw.uniform(0.1, 3.0))
        return process.poll() is None
    seen: dict[str, int] = {}

    def there() -> bool:
        if process.poll() is not None:
            return True
        for job in store.jobs([State.RUNNING]):
            # what an earlier run left counts as its beginning
            number = len(list(store.folder(job).segments.glob("seg_*.ts")))
            first = seen.setdefault(job.id, number)
            if {
                "loading": True,
                "denoising": number > first or first > 0,
                "middle": number > first and number >= job.chunks // 2,
                "last chunk": number == job.chunks - 1,
                "publishing": number >= job.chunks,
            }[phase]:
                return True
        return False

    wait_for(there, phase, 120, 0.003)
    time.sleep(draw.uniform(0.0, 0.02 if phase == "publishing" else 0.3))
    return process.poll() is None


def _check_stopped(
    process: subprocess.Popen[bytes],
    sent: signal.Signals,
    phase: str,
    took_s: float,
    root: Path,
    counts: Counts,
) -> None:
    # before the command listens, the signal itself ends it, which shells report as the same number
    fine = {128 + sent, -sent} if phase in ("importing", "loading") else {128 + sent}
    if process.returncode not in fine:
        counts.fail(f"{phase}: {sent.name} gave exit code {process.returncode}")
    if took_s > MOST_STOP_S:
        counts.fail(f"{phase}: {sent.name} took {took_s:.1f} s")
    if "Traceback" in _said(root):
        counts.fail(f"{phase}: {sent.name} showed a traceback: {_said(root)[-250:]}")


def _check_partials(store: JobStore, wanted: dict[str, Reference], counts: Counts, phase: str) -> None:
    """What is unfinished plays as far as it is finished."""
    for job in store.jobs([State.QUEUED, State.RUNNING]):
        partial = partial_video(store.file(job))
        if job.state is State.RUNNING:
            counts.fail(f"{phase}: {job.id} is still called running")
        if partial.exists():
            check_video(partial, wanted[job.id], counts, part=True)
        elif list(store.folder(job).segments.glob("seg_*.ts")):
            counts.lost += 1
            counts.fail(f"{phase}: {job.id} has segments and no partial file")
