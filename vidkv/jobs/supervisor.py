"""Worker processes, one per device, restarted when they die."""

from __future__ import annotations

import contextlib
import fcntl
import multiprocessing
import os
import re
import time
from collections.abc import Iterator, Sequence
from multiprocessing.process import BaseProcess
from typing import TYPE_CHECKING

import torch

from vidkv.errors import InputError, OutputError, ResourceError
from vidkv.files import reason
from vidkv.jobs.run import Options
from vidkv.jobs.store import JobStore, State
from vidkv.jobs.worker import Orders, Worker, process_main
from vidkv.request import EngineSettings, VideoRequest

if TYPE_CHECKING:
    from multiprocessing.context import ForkServerContext

STOP_S = 5.0
"""How long workers have to stop by themselves."""
POLL_S = 0.1
MAX_FALSE_STARTS = 3


class Supervisor:
    """Runs a worker process for every device until all jobs have ended, or for good.

        with Supervisor(store, devices=["cuda:0", "cuda:1"]) as supervisor:
            while supervisor.step():
                show(store.jobs())

    Leaving the context stops the workers: they save what they have, within ten seconds.

    Args:
        devices: `cpu`, `cuda:N`, one worker each; see `pick_devices`.
        idle: keep waiting for jobs.
        warm: what workers load before the first job comes, see `Orders`.
    """

    def __init__(
        self, store: JobStore, devices: Sequence[str] = ("cpu",), options: Options | None = None,
        retries: int = 2, idle: bool = False, warm: tuple[VideoRequest, EngineSettings] | None = None,
    ) -> None:  # fmt: skip
        self.store, self.devices, self.idle = store, list(devices), idle
        cpus = sum(device == "cpu" for device in devices)
        threads = max(1, (os.cpu_count() or 1) // cpus) if cpus > 1 else None
        self.orders = [
            Orders(
                store.root, store.name, f"worker{i}", options or Options(), retries, idle,
                gpu=None if device == "cpu" else int(device.removeprefix("cuda:")), threads=threads,
                warm=warm,
            )
            for i, device in enumerate(devices)
        ]  # fmt: skip
        self.workers: dict[str, BaseProcess] = {}
        self.false_starts = dict.fromkeys((orders.worker for orders in self.orders), 0)
        self._context = _warm_context()
        self._held = contextlib.ExitStack()

    def __enter__(self) -> Supervisor:
        self._held.enter_context(sole_supervisor(self.store))
        self.store.recover()
        return self

    def __exit__(self, *exc: object) -> None:
        try:
            self.stop()
        finally:
            self._held.close()

    def step(self) -> bool:
        """Look after the workers for a moment; False once all jobs have ended.

        Raises:
            ResourceError: workers die before they take a job.
        """
        for orders in self.orders:
            process = self.workers.get(orders.worker)
            if process is not None and process.is_alive():
                continue
            if process is not None:
                self._bury(orders, process)
            if self.idle or self._unfinished():
                self._start(orders)
        for job in self.store.jobs([State.RUNNING]):
            if job.worker in self.false_starts:
                self.false_starts[job.worker] = 0
        self.store.recover()
        time.sleep(POLL_S)
        return self.idle or self._unfinished() > 0

    def stop(self) -> None:
        """End the workers; jobs they had go back to the queue."""
        living = [process for process in self.workers.values() if process.is_alive()]
        for process in living:
            process.terminate()
        deadline = time.monotonic() + STOP_S
        for process in living:
            process.join(max(0.0, deadline - time.monotonic()))
            if process.is_alive():
                # safe: whatever a worker does, it can be killed at any time
                process.kill()
                process.join()
        self.workers.clear()
        self.store.recover()

    def _unfinished(self) -> int:
        counts = self.store.counts()
        return counts[State.QUEUED] + counts[State.RUNNING]

    def _start(self, orders: Orders) -> None:
        process = self._context.Process(target=process_main, args=(orders,), name=orders.worker, daemon=True)
        process.start()
        self.workers[orders.worker] = process

    def _bury(self, orders: Orders, process: BaseProcess) -> None:
        process.join()
        recovered = self.store.recover([orders.worker])
        worker = orders.worker
        self.false_starts[worker] = 0 if recovered or process.exitcode == 0 else self.false_starts[worker] + 1
        if self.false_starts[worker] >= MAX_FALSE_STARTS:
            raise ResourceError(
                f"{worker} has died {self.false_starts[worker]} times (exit code {process.exitcode}) before "
                "it took a job; see the messages above and `vidkv doctor`"
            )


def work_off(store: JobStore, options: Options | None = None, retries: int = 2) -> None:
    """Do all queued jobs in this process, on whatever device they ask for."""
    with sole_supervisor(store):
        store.recover()
        Worker(store, Orders(store.root, store.name, "here", options or Options(), retries)).work()


def pick_devices(wanted: str) -> list[str]:
    """Devices by name: `auto`, `cpu`, `cpu:2` for two workers on the CPU, or GPU numbers `0,1`.

    Raises:
        InputError: none of these, or a GPU that is not here.
    """
    gpus = torch.cuda.device_count()
    if wanted == "auto":
        return [f"cuda:{number}" for number in range(gpus)] or ["cpu"]
    name, _, number = wanted.partition(":")
    if name == "cpu" and re.fullmatch("[1-9][0-9]?|", number):
        return ["cpu"] * int(number or 1)
    numbers = [part.strip().removeprefix("cuda:") for part in wanted.split(",")]
    if not all(re.fullmatch("[0-9]{1,3}", part) for part in numbers) or len(set(numbers)) != len(numbers):
        raise InputError(
            f"devices={wanted!r:.60}; give auto, cpu, cpu:2 (two workers) or GPU numbers such as 0,1"
        )
    missing = [part for part in numbers if int(part) >= gpus]
    if missing:
        raise InputError(f"devices={wanted!r:.60}: torch sees {gpus} GPUs here, none numbered {missing[0]}")
    return [f"cuda:{int(part)}" for part in numbers]


@contextlib.contextmanager
def sole_supervisor(store: JobStore) -> Iterator[None]:
    """Hold a store: two supervisors of one index would run each other's workers.

    Raises:
        OutputError: another one has it.
    """
    path = store.home / f"{store.name}.lock"
    try:
        lock = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    except OSError as error:
        raise OutputError(f"cannot open {path}: {reason(error)}; choose another output folder") from error
    try:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise OutputError(
                f"another vidkv is rendering to {store.root}; wait for its end or choose another folder"
            ) from None
        except OSError as error:
            raise OutputError(f"cannot lock {path}: {reason(error)}; choose another output folder") from error
        yield
    finally:
        os.close(lock)


def _warm_context() -> ForkServerContext:
    """Processes forked from one that has imported everything: a worker is back within a second."""
    # beside other work, threads that spin at OpenMP's barriers cost most of the speed
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["vidkv.jobs.worker"])
    return context
