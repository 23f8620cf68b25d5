"""A process that takes jobs from a store, one after the other."""

from __future__ import annotations

import contextlib
import logging
import multiprocessing
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from vidkv.errors import Cancelled, VidkvError
from vidkv.jobs.claims import BEAT_S, Claim, Fenced
from vidkv.jobs.run import Interrupted, Options, Paused, Progress, Runner, permanent
from vidkv.jobs.store import Job, JobStore, State
from vidkv.request import EngineSettings, VideoRequest

IDLE_S = 0.1
LOG = logging.getLogger("vidkv.jobs")


@dataclass(frozen=True)
class Orders:
    """What a worker is to do.

    Attributes:
        root, name: the store.
        worker: its own name.
        retries: attempts after the first, of errors that may pass.
        idle: wait for more jobs when there are none, instead of ending.
        gpu: number of the GPU it computes on; None: the CPU.
        threads: of torch, on the CPU.
        warm: a request whose networks are loaded, and used once, before the first job comes.
    """

    root: Path
    name: str
    worker: str
    options: Options = field(default_factory=Options)
    retries: int = 2
    idle: bool = False
    gpu: int | None = None
    threads: int | None = None
    warm: tuple[VideoRequest, EngineSettings] | None = None


class Worker:
    """Takes jobs until there are none, or until it is told to stop.

    Args:
        stopping: asked at every denoising step.
    """

    def __init__(self, store: JobStore, orders: Orders, stopping: Callable[[], bool] = lambda: False) -> None:
        self.store, self.orders, self.stopping = store, orders, stopping
        self.lost = threading.Event()
        self.runner = Runner(orders.options, lambda: stopping() or self.lost.is_set())

    def work(self) -> None:
        """Do jobs; returns when told to stop or, without `idle`, when all have ended."""
        if self.orders.warm is not None:
            self.runner.warm_up(*self.orders.warm)
        if self.orders.options.concurrent > 1:
            from vidkv.jobs.turns import Turns

            with Turns(self) as turns:
                self._work(turns.step)
        else:
            self._work(self._do_next)

    def _work(self, act: Callable[[], bool]) -> None:
        """Act until told to stop, or there is nothing to do; `act` says whether it found anything."""
        while not self.stopping():
            if act():
                continue
            # jobs that this worker had to leave as they were
            self.store.recover([self.orders.worker])
            counts = self.store.counts()
            if not self.orders.idle and not counts[State.QUEUED] + counts[State.RUNNING]:
                return
            time.sleep(IDLE_S)

    def _do_next(self) -> bool:
        taken = self.store.claim_next(self.orders.worker, self.has_loaded)
        if taken is not None:
            self.do(*taken)
        return taken is not None

    def do(self, job: Job, claim: Claim) -> None:
        """Run one job and say what became of it."""
        self.lost.clear()
        folder, report = self.store.folder(job), self.reporting(job)
        with heartbeat(claim, self.lost):
            self.settle(job, claim, lambda: self.runner.run(folder, claim, self.store.root, report))

    def reporting(self, job: Job) -> Callable[[Progress], None]:
        """What is to be told of a job's progress."""
        return lambda progress: self.store.report(job.id, progress)

    def settle(self, job: Job, claim: Claim, act: Callable[[], dict[str, Any]]) -> None:
        """Say what became of a job.

        Args:
            act: gives its result, or raises what it ended in.
        """
        try:
            self._settle(job, claim, act)
        except Fenced as error:
            LOG.warning("%s", error)
        except VidkvError as error:
            # nothing can be written: the job stays as it is, and whoever recovers finds it so
            LOG.warning("%s: %s", job.id, error)
            time.sleep(IDLE_S)

    def _settle(self, job: Job, claim: Claim, act: Callable[[], dict[str, Any]]) -> None:
        # what becomes of a job is for its holder to say: each of these looks whether that is still this one
        try:
            self.store.finish(job, act())
        except Fenced:
            raise
        except Interrupted:
            claim.check()
            self.store.put_back(job)
        except Paused:
            claim.check()
            self.store.hold(job)
        except Cancelled as error:
            claim.check()
            self.store.finish(job, {"state": State.CANCELLED.value, "error": str(error)})
        except Exception as error:
            claim.check()
            if not isinstance(error, VidkvError):
                LOG.exception("job %s", job.id)
            self._failed(job, error)

    def _failed(self, job: Job, error: Exception) -> None:
        text = str(error) if isinstance(error, VidkvError) else f"{type(error).__name__}: {error}"
        if permanent(error):
            self.store.finish(job, {"state": State.FAILED.value, "error": text})
        else:
            self.store.put_back(job, text, self.orders.retries)

    def has_loaded(self, job: Job) -> bool:
        """Whether a job needs no other networks than those that are loaded."""
        return self.runner.has_loaded(str(job.request.get("model", "bounce")), job.settings)


@contextlib.contextmanager
def heartbeat(claim: Claim, lost: threading.Event) -> Iterator[None]:
    """Hold a claim while inside, and let go of it.

    Args:
        lost: set where another process has taken it over.
    """
    over = threading.Event()
    beating = threading.Thread(target=_beat, args=(claim, over, lost), daemon=True)
    beating.start()
    try:
        yield
    finally:
        over.set()
        beating.join()
        claim.release()


def _beat(claim: Claim, over: threading.Event, lost: threading.Event) -> None:
    while not over.wait(BEAT_S):
        try:
            claim.beat()
        except Fenced:
            lost.set()
            return
        except VidkvError as error:
            LOG.warning("%s", error)


def process_main(orders: Orders) -> None:
    """What a worker process runs; it ends with its parent."""
    # a terminal's Ctrl-C reaches all processes; the parent decides
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    stop = threading.Event()
    signal.signal(signal.SIGTERM, lambda *_: stop.set())
    if orders.gpu is not None:
        # numbers count those that a launcher left visible
        visible = [name for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name]
        os.environ["CUDA_VISIBLE_DEVICES"] = visible[orders.gpu] if visible else str(orders.gpu)
    if orders.threads:
        torch.set_num_threads(orders.threads)
    # its own is a semaphore shared by processes, which a worker that is killed would leave behind
    tqdm.set_lock(threading.RLock())
    parent = multiprocessing.parent_process()
    if parent is not None:
        threading.Thread(target=_outlive, args=(parent, stop), daemon=True).start()
    try:
        with JobStore(orders.root, orders.name) as store:
            Worker(store, orders, stop.is_set).work()
    except VidkvError as error:
        LOG.error("%s", error)
        sys.exit(2)


def _outlive(parent: Any, stop: threading.Event) -> None:
    """Nobody is left to say what to do."""
    parent.join()
    stop.set()
    time.sleep(10)
    os._exit(1)
