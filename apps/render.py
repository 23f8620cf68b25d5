"""Many videos, unattended: `vidkv render`."""

from __future__ import annotations

import contextlib
import signal
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

from vidkv.apps.render_progress import RenderProgress
from vidkv.apps.render_report import write_report
from vidkv.errors import InputError, VidkvError
from vidkv.jobs.run import Options
from vidkv.jobs.shards import Shard
from vidkv.jobs.store import Job, JobStore
from vidkv.jobs.supervisor import Supervisor
from vidkv.manifest import Entry, read_manifest
from vidkv.planning import Plan, plan
from vidkv.request import EngineSettings

if TYPE_CHECKING:
    from vidkv.apps.ray_engine import RayEngine


@dataclass(frozen=True)
class RayCluster:
    """Where Ray renders.

    Attributes:
        address: of a running cluster; None starts one on this machine.
        actors: how many; None for one per GPU.
    """

    address: str | None = None
    actors: int | None = None


@dataclass(frozen=True)
class Batch:
    """What `vidkv render` is asked to do.

    Attributes:
        devices: one worker each, see `Supervisor`.
        retries: attempts after the first, of errors that may pass.
        shard: this process's part of the jobs.
        ray: render on a Ray cluster instead of on this machine.
    """

    manifest: Path
    out: Path
    settings: EngineSettings = field(default_factory=EngineSettings)
    devices: Sequence[str] = ("cpu",)
    options: Options = field(default_factory=Options)
    retries: int = 2
    shard: Shard | None = None
    ray: RayCluster | None = None


def plans(batch: Batch) -> list[Plan]:
    """Every entry of the manifest, checked; of a shard its own.

    Raises:
        InputError: all that is wrong, a line each.
    """
    entries = read_manifest(batch.manifest)
    known, faults = list[tuple[Entry, Plan]](), list[str]()
    for entry in entries:
        try:
            known.append((entry, plan(entry.request, batch.settings)))
        except VidkvError as error:
            faults.append(f"{batch.manifest}:{entry.line}: {error}")
    lines: dict[str, int] = {}
    for entry, planned in known:
        before = lines.setdefault(planned.id.casefold(), entry.line)
        if before != entry.line:
            faults.append(
                f"{batch.manifest}:{entry.line}: id {planned.id!r} is that of line {before}; give one "
                "of them another id, or another seed"
            )
    if faults:
        shown = faults[:20] + ([f"and {len(faults) - 20} more"] if len(faults) > 20 else [])
        raise InputError("\n".join(shown))
    found = [planned for _, planned in known]
    return [planned for planned in found if batch.shard.takes(planned.key)] if batch.shard else found


def open_store(batch: Batch) -> JobStore:
    """The store that a batch's jobs go to; shards have their own index over common folders."""
    shard = batch.shard
    return JobStore(batch.out, shard.name if shard else "jobs")


def _engine(batch: Batch, store: JobStore) -> Supervisor | RayEngine:
    if batch.ray is None:
        return Supervisor(store, batch.devices, batch.options, batch.retries)
    from vidkv.apps.ray_engine import RayEngine

    return RayEngine(store, batch.options, batch.retries, batch.ray.address, batch.ray.actors)


def render(batch: Batch, planned: Sequence[Plan]) -> dict[str, Any]:
    """Make all videos of a batch that are not there yet.

    Returns:
        The content of `report.json`, and `signal` if one ended it early.

    Raises:
        OutputError: the folder cannot be used, or another vidkv renders to it.
        ResourceError: workers die before they take a job.
    """
    started = time.time()
    with open_store(batch) as store, _engine(batch, store) as engine:
        # not before it is known that no other supervisor holds the store
        jobs = [store.submit_plan(one, again=True) for one in planned]
        ids = [job.id for job in jobs]
        with _signals() as caught:
            with RenderProgress() as progress:
                progress.update(jobs)
                while not caught and engine.step():
                    progress.update(_of(store, ids))
                engine.stop()
                progress.update(_of(store, ids))
            report = write_report(
                store, _of(store, ids), batch.out, started, time.time(),
                stopped_by=signal.Signals(caught[0]).name if caught else None, before=jobs,
            )  # fmt: skip
    return report | ({"signal": caught[0]} if caught else {})


def _of(store: JobStore, ids: Sequence[str]) -> list[Job]:
    """The batch's jobs; the store may hold those of others."""
    wanted = set(ids)
    return [job for job in store.jobs() if job.id in wanted]


@contextlib.contextmanager
def _signals() -> Iterator[list[int]]:
    """Collects Ctrl-C and SIGTERM; a second one is an interrupt."""
    caught: list[int] = []

    def catch(number: int, frame: FrameType | None) -> None:
        if caught:
            raise KeyboardInterrupt
        caught.append(number)

    previous = {number: signal.signal(number, catch) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield caught
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
