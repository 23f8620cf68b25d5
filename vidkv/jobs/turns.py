"""Several jobs of one worker by turns, a chunk each, over common pools of pages."""

from __future__ import annotations

import contextlib
import threading
from dataclasses import replace
from typing import TYPE_CHECKING, Any, cast

from vidkv.cache import CacheGeometry
from vidkv.errors import Cancelled
from vidkv.jobs.claims import Claim
from vidkv.jobs.run import Interrupted, Rolling
from vidkv.jobs.store import Job
from vidkv.jobs.worker import heartbeat
from vidkv.memory import latent_size
from vidkv.pipeline import CausalVideoPipeline
from vidkv.planning import Plan
from vidkv.room import usable_bytes
from vidkv.scheduler import Entry, Need, Scheduler

if TYPE_CHECKING:
    from vidkv.jobs.worker import Worker


class _Running:
    """A job that the worker has taken.

    Attributes:
        held: its claim with the heartbeat, let go of when closed.
        lost: set where another process has taken it over.
        rolling: what makes it.
    """

    def __init__(self, job: Job, claim: Claim) -> None:
        self.job, self.claim = job, claim
        self.held, self.lost = contextlib.ExitStack(), threading.Event()
        self.rolling: Rolling | None = None


class Turns:
    """Takes jobs of the networks that are loaded, and gives them turns; every file is written as for one job.

    Leaving the context puts the jobs back that have not ended; each goes on later where it stands.
    """

    def __init__(self, worker: Worker) -> None:
        self.worker, self.store, self.runner = worker, worker.store, worker.runner
        self.most = worker.orders.options.concurrent
        self.scheduler: Scheduler[int] | None = None
        self._running: dict[Entry[int], _Running] = {}

    def __enter__(self) -> Turns:
        return self

    def __exit__(self, kind: type[BaseException] | None, *exc: object) -> None:
        for entry, running in list(self._running.items()):
            if kind is None:
                self._stop(entry, Interrupted("this process was told to stop"))
            else:
                # as if the process had died
                self._rolling(running).close()
                running.held.close()

    def step(self) -> bool:
        """Take jobs as far as there are places, and give one of them a turn; False where there is none."""
        while len(self._running) < self.most and not self.worker.stopping():
            # another model has to wait until nobody needs this one
            taken = self.store.claim_next(
                self.worker.orders.worker, self.worker.has_loaded, only=bool(self._running)
            )
            if taken is None:
                break
            self._take(_Running(*taken))
        for entry, running in list(self._running.items()):
            if running.lost.is_set():
                self._stop(entry, Interrupted("another process has taken the job over"))
            elif self._rolling(running).cancelled:
                self._stop(entry, Cancelled("the job was cancelled"))
        turn = None if self.scheduler is None else self.scheduler.step()
        if turn is not None and turn.ended:
            self._settle(self._running.pop(turn.entry), turn.error)
        return turn is not None

    def _take(self, running: _Running) -> None:
        running.held.enter_context(heartbeat(running.claim, running.lost))
        try:
            entry = self._begin(running)
        except Exception as error:
            self._settle(running, error)
        except BaseException:
            running.held.close()
            raise
        else:
            if entry is None:
                self._settle(running, None)
            else:
                self._running[entry] = running

    def _begin(self, running: _Running) -> Entry[int] | None:
        """A place among the others; None for a job that wants only its file."""
        folder, report = self.store.folder(running.job), self.worker.reporting(running.job)
        rolling = running.rolling = self.runner.begin(
            folder, running.claim, self.store.root, report, running.lost.is_set
        )
        if rolling.finished:
            for _ in rolling:
                pass
            return None
        pipe = self.runner.pipeline(rolling.plan)
        scheduler = self._scheduler_of(pipe, rolling.plan)
        return scheduler.add(running.job.id, lambda: rolling, _need(rolling.plan, pipe))

    def _scheduler_of(self, pipe: CausalVideoPipeline, plan: Plan) -> Scheduler[int]:
        """One for each set of networks; its budget is what is free while nobody is there."""
        assert pipe.pools is not None
        if self.scheduler is None or self.scheduler.pools is not pipe.pools:
            self.scheduler = Scheduler(pipe.pools, prefixes=pipe.prefixes)
        if not self.scheduler.entries:
            free = usable_bytes(plan.device)
            self.scheduler.budget_bytes = None if free is None else free + pipe.pools.nbytes
        return self.scheduler

    def _stop(self, entry: Entry[int], error: Cancelled) -> None:
        """End a job between two chunks."""
        assert self.scheduler is not None
        running, ended = self._running.pop(entry), cast(Exception, error)
        try:
            self._rolling(running).stop(error)
        except Exception as raised:
            ended = raised
        self.scheduler.remove(entry)
        self._settle(running, ended)

    def _settle(self, running: _Running, error: BaseException | None) -> None:
        """Say what became of a job, and let go of it."""

        def act() -> dict[str, Any]:
            if error is not None:
                raise error
            result = self._rolling(running).result
            assert result is not None
            return result

        with running.held:
            self.worker.settle(running.job, running.claim, act)

    @staticmethod
    def _rolling(running: _Running) -> Rolling:
        assert running.rolling is not None
        return running.rolling


def _need(plan: Plan, pipe: CausalVideoPipeline) -> Need:
    """What a job takes beside the networks."""
    transformer, device = pipe.transformer, pipe._execution_device
    rows, columns = latent_size(plan.entry, *plan.size)
    geometry = CacheGeometry.of_model(transformer.config, rows, columns, plan.entry.chunk_frames)
    need = Need.of_plan(plan.memory, plan.spec, geometry, device, transformer.dtype)
    if pipe.text_encoder is not None:
        return need
    # it is loaded beside what others keep
    encoding = plan.memory.text_bytes + plan.memory.text_activation_bytes
    return replace(need, passing_bytes=max(need.passing_bytes, encoding))
