"""Calls inside the engine at which faults happen: every phase of a job is met, not only the longest."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

from vidkv import segments
from vidkv.jobs import run
from vidkv.jobs.checkpoints import Checkpoints
from vidkv.jobs.records import Records
from vidkv.jobs.run import Options
from vidkv.jobs.store import JobStore
from vidkv.jobs.supervisor import sole_supervisor
from vidkv.jobs.worker import Orders, Worker
from vidkv.models.vae import StreamingDecoder
from vidkv.rollout import Rollout

PHASES: dict[str, tuple[Any, str, int]] = {
    "loading": (run, "load_pipeline", 1),
    "denoising": (Rollout, "_flow", 24),
    "clean pass": (Rollout, "_clean_pass", 6),
    "decoding": (StreamingDecoder, "feed", 6),
    "encoding": (segments, "encode_segment", 6),
    "committing": (Records, "add", 6),
    "checkpoint": (Checkpoints, "save", 2),
    "publishing": (run, "write_video", 1),
}
"""Where a phase begins: owner and name of a function, and how often a job of seven chunks calls it."""


class Hook:
    """Calls something once, at the n-th call of a function."""

    def __init__(self, action: Callable[[], None], at: int) -> None:
        self.action, self.left = action, at
        self.fired = threading.Event()

    def __call__(self) -> None:
        self.left -= 1
        if self.left == 0:
            self.action()
            self.fired.set()


@contextlib.contextmanager
def at_phase(phase: str, nth: int, action: Callable[[], None]) -> Iterator[Hook]:
    """While inside, the n-th beginning of a phase first calls `action`."""
    owner, name, _ = PHASES[phase]
    genuine, hook = getattr(owner, name), Hook(action, nth)

    def hooked(*args: Any, **values: Any) -> Any:
        hook()
        return genuine(*args, **values)

    with mock.patch.object(owner, name, hooked):
        yield hook


@contextlib.contextmanager
def working(store: JobStore, options: Options, retries: int = 2) -> Iterator[Worker]:
    """A worker in a thread, with networks that stay loaded; it does what is submitted until the end."""
    stop = threading.Event()
    worker = Worker(store, Orders(store.root, store.name, "thread", options, retries, idle=True), stop.is_set)
    with sole_supervisor(store):
        store.recover()
        thread = threading.Thread(target=worker.work, daemon=True)
        thread.start()
        try:
            yield worker
        finally:
            stop.set()
            thread.join(60)
            if thread.is_alive():
                raise AssertionError("the worker did not stop within 60 s")
