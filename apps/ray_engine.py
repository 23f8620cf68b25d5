"""Jobs on a Ray cluster: `vidkv render --engine ray`, with the extra `vidkv[ray]`.

One actor for every GPU keeps a pipeline loaded and pulls jobs from a queue actor on the driver's host, which
alone opens the index. Videos, checkpoints and claims lie on storage that all hosts share, so that a job whose
actor or host is gone goes on where it stopped on another one.
"""

from __future__ import annotations

import contextlib
import importlib
import logging
import os
import signal
import socket
import threading
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from pathlib import Path
from typing import Any, cast

import torch

from vidkv.errors import InputError, OutputError, ResourceError
from vidkv.jobs.claims import Claim, Claims
from vidkv.jobs.folder import JobFolder
from vidkv.jobs.run import Options, Progress
from vidkv.jobs.store import HOME, Job, JobStore, State
from vidkv.jobs.supervisor import MAX_FALSE_STARTS, POLL_S, sole_supervisor
from vidkv.jobs.worker import Orders, Worker

STOP_S = 6.0
"""How long actors have to stop by themselves; Ray itself takes a second or two after that."""
IDLE_S = 0.4
"""Between an actor's questions when there is no job for it."""
PAUSE_S = 5.0
"""After an actor that died before it took a job."""
_PASSED_ON = ("VIDKV_", "HF_HUB_OFFLINE")
_LIKE = tuple[str, dict[str, Any]]
LOG = logging.getLogger("vidkv.jobs")


def render_with_ray(
    store: JobStore, options: Options | None = None, retries: int = 2, address: str | None = None,
    actors: int | None = None, report: Callable[[], None] = lambda: None,
) -> None:  # fmt: skip
    """Do all queued jobs on a Ray cluster; arguments as for `RayEngine`.

    Args:
        report: called several times a second.
    """
    with RayEngine(store, options, retries, address, actors) as engine:
        while engine.step():
            report()


class RayEngine:
    """Runs an actor for every GPU until all jobs have ended; stands where a `Supervisor` would.

        with RayEngine(store) as engine:
            while engine.step():
                show(store.jobs())

    Leaving the context stops the actors: they save what they have, within ten seconds.

    Args:
        store: on storage that all hosts of the cluster see under the same path.
        retries: attempts after the first, of errors that may pass.
        address: of the cluster, as `ray.init` takes it; by default the one that is known here, else one that
            is started on this host and ends with this.
        actors: how many; by default one for every GPU, and on a cluster without any for every CPU.
    """

    def __init__(
        self, store: JobStore, options: Options | None = None, retries: int = 2, address: str | None = None,
        actors: int | None = None,
    ) -> None:  # fmt: skip
        if actors is not None and actors < 1:
            raise InputError(f"actors={actors}: at least one is needed")
        if address is not None and address.startswith("ray://"):
            raise InputError(
                f"address={address!r:.60}: the index of jobs must be opened where the command runs; start it "
                "on a host of the cluster, for instance with `ray job submit`"
            )
        self.store, self.options, self.retries = store, options or Options(), retries
        self.address, self.most = address, actors
        self.ray = _import_ray()
        self.actors: dict[str, tuple[Any, Any]] = {}
        """Name: (actor, the future of its work)."""
        self.started = self.false_starts = 0
        self._took: set[str] = set()
        self._wait_until = 0.0
        self._gpus: bool | None = None
        self._looking: Any = None
        self._held = contextlib.ExitStack()

    def __enter__(self) -> RayEngine:
        with contextlib.ExitStack() as held:
            held.enter_context(sole_supervisor(self.store))
            self.store.recover()
            held.enter_context(self._cluster())
            self.queue = self._start_queue()
            held.callback(self.ray.kill, self.queue)
            self._held = held.pop_all()
        return self

    def __exit__(self, *exc: object) -> None:
        try:
            self.stop()
        finally:
            self._held.close()

    def step(self) -> bool:
        """Look after the actors for a moment; False once all jobs have ended.

        Raises:
            ResourceError: actors die before they ask for a job.
            InputError: jobs planned on this host cannot run as planned on the others.
        """
        unfinished = self._unfinished()
        if unfinished > len(self.actors) and time.monotonic() >= self._wait_until:
            for _ in range(min(unfinished, self._wanted()) - len(self.actors)):
                self._start()
        self._look()
        work = {future: name for name, (_, future) in self.actors.items()}
        if not work:
            time.sleep(POLL_S)
        else:
            for future in self.ray.wait(list(work), timeout=POLL_S)[0]:
                self._bury(work[future], self._error(future))
        return self._unfinished() > 0

    def stop(self) -> None:
        """End the actors; jobs they had go back to the queue."""
        deadline = time.monotonic() + STOP_S
        working = []
        for name, (actor, future) in self.actors.items():
            if name in self._took:
                actor.stop.remote()
                working.append(future)
        if working:
            self.ray.wait(working, num_returns=len(working), timeout=STOP_S)
        buried = []
        for name, (actor, _) in self.actors.items():
            # safe: whatever an actor does, it can be killed at any time
            self.ray.kill(actor)
            buried.append(self.queue.bury.remote(name))
        self.actors.clear()
        with contextlib.suppress(self.ray.exceptions.RayError):
            self.ray.get(buried, timeout=max(1.0, deadline - time.monotonic()))
        self.store.recover()

    def _unfinished(self) -> int:
        counts = self.store.counts()
        return counts[State.QUEUED] + counts[State.RUNNING]

    # ------------------------------------------------------------------ the cluster

    @contextlib.contextmanager
    def _cluster(self) -> Iterator[None]:
        """Connected; what was connected before stays so."""
        ray = self.ray
        if ray.is_initialized():
            yield
            return
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        # ray.init puts its own in its place
        previous = signal.getsignal(signal.SIGTERM)
        try:
            ray.init(
                address=self.address, include_dashboard=False, log_to_driver=False,
                logging_level=logging.ERROR,
            )  # fmt: skip
        except (ConnectionError, RuntimeError, ValueError) as error:
            raise InputError(
                f"address={self.address!r:.60}: no Ray cluster could be reached ({_first_line(error)}); see "
                "`ray status`"
            ) from error
        finally:
            if threading.current_thread() is threading.main_thread() and previous is not None:
                signal.signal(signal.SIGTERM, previous)
        try:
            yield
        finally:
            ray.shutdown()

    def _start_queue(self) -> Any:
        """On this host, where the index is; Ray brings it back if it dies."""
        here = self.ray.get_runtime_context().get_node_id()
        where = self.ray.util.scheduling_strategies.NodeAffinitySchedulingStrategy(here, soft=False)
        kind = self.ray.remote(
            num_cpus=0, max_restarts=-1, max_task_retries=-1, scheduling_strategy=where,
            runtime_env={"env_vars": {"CUDA_VISIBLE_DEVICES": ""}},
        )(Queue)  # fmt: skip
        return kind.remote(str(self.store.root.absolute()), self.store.name)

    def _wanted(self) -> int:
        resources = self.ray.cluster_resources()
        if self._gpus is None:
            self._gpus = self._on_gpus(resources)
        found = resources.get("GPU" if self._gpus else "CPU", 0)
        return self.most or max(1, int(found))

    def _on_gpus(self, resources: Mapping[str, float]) -> bool:
        """Whether actors take GPUs: jobs must run on what they were planned for, here."""
        jobs = self.store.jobs([State.QUEUED, State.RUNNING])
        if all(job.settings.get("device", "auto") == "cpu" for job in jobs):
            return False
        there = resources.get("GPU", 0) > 0
        if there and not torch.cuda.is_available():
            raise InputError(
                "the Ray cluster has GPUs and this host, on which jobs are planned, has none: start the "
                "command on a host with a GPU, or render with --device cpu"
            )
        return there

    # ------------------------------------------------------------------ actors

    def _start(self) -> None:
        name = f"{socket.gethostname()}-{os.getpid()}-actor{self.started}"
        self.started += 1
        environment = {key: value for key, value in os.environ.items() if key.startswith(_PASSED_ON)}
        if not self._gpus:
            environment["CUDA_VISIBLE_DEVICES"] = ""
        # a second thread to be told to stop
        kind = self.ray.remote(
            num_cpus=1, num_gpus=int(bool(self._gpus)), max_concurrency=2, scheduling_strategy="SPREAD",
            runtime_env={"env_vars": environment},
        )(Renderer)  # fmt: skip
        actor = kind.remote(os.getcwd())
        orders = Orders(self.store.root.absolute(), self.store.name, name, self.options, self.retries)
        self.actors[name] = actor, actor.work.remote(self.queue, orders)

    def _look(self) -> None:
        """Have the queue recover what it can, and learn who has taken jobs; never waits."""
        if self._looking is None:
            self._looking = self.queue.look_after.remote()
        elif self.ray.wait([self._looking], timeout=0)[0]:
            try:
                took = self.ray.get(self._looking)
            except self.ray.exceptions.RayError as error:
                raise ResourceError(f"the queue of jobs has died: {_first_line(error)}") from error
            self._looking = None
            if took - self._took:
                self.false_starts = 0
            self._took |= took

    def _error(self, future: Any) -> Exception | None:
        try:
            self.ray.get(future)
        except self.ray.exceptions.RayError as error:
            return cast(Exception, getattr(error, "cause", None) or error)
        return None

    def _bury(self, name: str, error: Exception | None) -> None:
        """An actor has ended, or Ray says that it is dead."""
        actor, _ = self.actors.pop(name)
        self.ray.kill(actor)
        self.queue.bury.remote(name)
        if error is None:
            return
        LOG.warning("%s: %s", name, _first_line(error))
        if name in self._took:
            return
        self.false_starts += 1
        self._wait_until = time.monotonic() + PAUSE_S
        # a whole host of them may be lost at once, through no fault of theirs
        most = max(MAX_FALSE_STARTS, self._wanted() + 1)
        if self.false_starts >= most and not self._took & set(self.actors):
            raise ResourceError(
                f"{self.false_starts} Ray actors have died before they took a job, the last one of "
                f"{_first_line(error)}; see `ray logs` and `vidkv doctor` there"
            ) from error


class Queue:
    """The actor that owns the index: hands out jobs and is told what became of them.

    Claims are taken by those who run the jobs, where they run them. Here jobs are only booked, from the
    moment that one is handed out until it is back. What is said of a job by a worker that no longer has
    it, because Ray took it for dead, is not heard.
    """

    def __init__(self, root: str, name: str) -> None:
        self.store = JobStore(root, name)
        self.bookings = _Bookings()
        self.store.claims = self.bookings
        self.took: set[str] = set()

    def next(self, worker: str, loaded: _LIKE | None) -> tuple[Job, Path] | None:
        """Hand out a job with its folder; None if there is none now.

        Args:
            loaded: model and settings of jobs that come before others.
        """
        self._forget(worker)
        taken = self.store.claim_next(worker, lambda job: like(job) == loaded)
        if taken is None:
            return None
        self.took.add(worker)
        return taken[0], self.store.folder(taken[0]).path

    def holds(self, worker: str, id: str, fence: int) -> bool:
        """Note the claim that a worker has taken; False if the job is no longer its own."""
        job = self._job_of(worker, id)
        if job is not None:
            self.bookings.fences[self.store.folder(job).path] = fence
        return job is not None

    def report(self, worker: str, id: str, progress: Progress) -> None:
        """Note how far a job is."""
        if self._job_of(worker, id):
            self.store.report(id, progress)

    def finish(self, worker: str, id: str, result: dict[str, Any]) -> None:
        """A job has ended."""
        if job := self._job_of(worker, id):
            self.store.finish(job, result)
            self.bookings.drop(self.store.folder(job).path)

    def put_back(self, worker: str, id: str, error: str | None, retries: int | None) -> None:
        """A job is to go on later."""
        if job := self._job_of(worker, id):
            self.store.put_back(job, error, retries)
            self.bookings.drop(self.store.folder(job).path)

    def recover(self, worker: str) -> None:
        """Put back jobs that a worker had to leave as they were."""
        self._forget(worker)
        self.store.recover([worker])

    def counts(self) -> dict[State, int]:
        """Jobs by state."""
        return self.store.counts()

    def bury(self, worker: str) -> None:
        """Ray knows that a worker is dead: what it held is free at once, on whatever host it was.

        Should Ray be wrong, the worker finds its claim replaced and stops, and nothing that it has written
        by then counts.
        """
        for job in self._jobs_of(worker):
            path = self.store.folder(job).path
            fence = self.bookings.drop(path)
            if fence is not None:
                Claim(path, fence).release()
        self.store.recover([worker])

    def look_after(self) -> set[str]:
        """Put back what nobody holds; returns all workers that have been given jobs."""
        self.store.recover()
        return self.took

    def _forget(self, worker: str) -> None:
        """It has no job now; one that it lost without a word is no longer booked."""
        for job in self._jobs_of(worker):
            self.bookings.drop(self.store.folder(job).path)

    def _jobs_of(self, worker: str) -> list[Job]:
        return [job for job in self.store.jobs([State.RUNNING]) if job.worker == worker]

    def _job_of(self, worker: str, id: str) -> Job | None:
        return next((job for job in self._jobs_of(worker) if job.id == id), None)


class _Bookings(Claims):
    """In place of claims: folders that were handed out, with the number of the claim once it is known."""

    def __init__(self) -> None:
        super().__init__()
        self.fences: dict[Path, int | None] = {}

    def take(self, folder: Path) -> Claim | None:
        if self.held(folder):
            return None
        self.fences[folder] = None
        return _Booking(self, folder)

    def held(self, folder: Path) -> bool:
        return folder in self.fences or super().held(folder)

    def drop(self, folder: Path) -> int | None:
        return self.fences.pop(folder, None)


class _Booking(Claim):
    def __init__(self, bookings: _Bookings, folder: Path) -> None:
        super().__init__(folder, 0)
        self.bookings = bookings

    def release(self) -> None:
        self.bookings.drop(self.folder)


class Renderer:
    """The actor that does jobs, one after the other.

    Args:
        folder: the driver's working folder, which paths may be relative to.
    """

    def __init__(self, folder: str) -> None:
        self.stopping = threading.Event()
        with contextlib.suppress(OSError):
            os.chdir(folder)

    def work(self, queue: Any, orders: Orders) -> None:
        """Do jobs until all have ended, or `stop`."""
        store = RemoteStore(queue, orders)
        Worker(cast(JobStore, store), orders, self.stopping.is_set).work()

    def stop(self) -> None:
        """End the job at the next denoising step."""
        self.stopping.set()


class RemoteStore:
    """What a `Worker` needs of a store, by way of the queue actor; claims are taken here.

    Raises:
        InputError: this host does not see the store's folder.
    """

    def __init__(self, queue: Any, orders: Orders) -> None:
        self.root, self.worker, self._retries = orders.root, orders.worker, orders.retries
        # the driver holds it open
        if not (orders.root / HOME / f"{orders.name}.lock").exists():
            raise InputError(
                f"{socket.gethostname()} does not see {orders.root}: choose an output folder on storage that "
                "all hosts of the cluster share under the same path"
            )
        self._queue, self._ray = queue, _import_ray()
        self._claims = Claims()
        self._last: tuple[Job, Path] | None = None

    def claim_next(self, worker: str, prefer: Callable[[Job], bool]) -> tuple[Job, Claim] | None:
        """Ask for a job and claim it; None if there is none now."""
        loaded = like(self._last[0]) if self._last and prefer(self._last[0]) else None
        offered = self._call("next", loaded)
        if offered is None:
            time.sleep(IDLE_S)
            return None
        job, path = self._last = offered
        try:
            claim = self._claims.take(path)
        except OutputError as error:
            self.put_back(job, str(error), self._retries)
            return None
        if claim is not None:
            if self.folder(job).result() is None and self._call("holds", job.id, claim.fence):
                return job, claim
            claim.release()
        # somebody who is not of this cluster has it since, or has ended it
        self.put_back(job)
        return None

    def folder(self, job: Job) -> JobFolder:
        """Of the job that was claimed last."""
        assert self._last is not None and self._last[0].id == job.id
        return JobFolder(self._last[1])

    def counts(self) -> dict[State, int]:
        return cast(dict[State, int], self._ray.get(self._queue.counts.remote()))

    def recover(self, workers: Collection[str]) -> None:
        """Likewise of this worker's jobs, whatever `workers` says."""
        self._call("recover")

    def report(self, id: str, progress: Progress) -> None:
        # nothing is waited for: what is said next arrives after it
        self._queue.report.remote(self.worker, id, progress)

    def finish(self, job: Job, result: dict[str, Any]) -> None:
        self._call("finish", job.id, result)

    def put_back(self, job: Job, error: str | None = None, retries: int | None = None) -> None:
        self._call("put_back", job.id, error, retries)

    def _call(self, method: str, *arguments: Any) -> Any:
        try:
            return self._ray.get(getattr(self._queue, method).remote(self.worker, *arguments))
        except self._ray.exceptions.RayTaskError as error:
            raise error.cause from None


def like(job: Job) -> _LIKE:
    """Equal for jobs that need the same networks loaded."""
    return str(job.request.get("model", "bounce")), job.settings


def _import_ray() -> Any:
    try:
        return importlib.import_module("ray")
    except ImportError:
        raise InputError("engine=ray: Ray is not installed; pip install 'vidkv[ray]'") from None


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[0][:300]
