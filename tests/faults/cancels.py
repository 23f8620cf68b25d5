"""Jobs that are cancelled in every phase: they end at once, keep what plays, and the next one runs."""

from __future__ import annotations

import random
import time
from pathlib import Path

from tests.faults.hooks import PHASES, at_phase, working
from tests.faults.oracle import (
    OFTEN,
    PROMPT,
    Counts,
    Reference,
    References,
    bounce_requests,
    check_jobs,
    check_video,
    fresh,
    wait_end,
    wait_for,
)
from vidkv.jobs.store import JobStore, State
from vidkv.request import VideoRequest
from vidkv.segments import partial_video

LATE_S = 10.0


def cancel(count: int, seed: int, folder: Path) -> Counts:
    """Cancel jobs in random phases; measured is how long they take to be cancelled."""
    draw, counts = random.Random(seed), Counts()
    shared = folder / "shared"
    references = References(shared)
    requests = bounce_requests(shared)
    short = VideoRequest(prompt=PROMPT, seconds=1.0, seed=90)
    after = references.of(short)
    wanted: dict[str, Reference] = {}
    phases = ["queued", *PHASES]
    with JobStore(fresh(folder / f"cancel-{seed}")) as store, working(store, OFTEN) as worker:
        for number in range(count):
            phase = phases[(seed + number) % len(phases)]
            request = draw.choice(requests).model_copy(update={"id": f"victim{number:04d}"})
            reference = references.of(request)
            following = short.model_copy(update={"id": f"next{number:04d}"})
            if phase == "loading":
                worker.runner._loaded = None
            try:
                if phase == "queued":
                    # it waits behind the other one
                    wanted[str(following.id)] = after
                    store.submit(following)
                    store.submit(request)
                    asked = time.monotonic()
                    store.cancel(str(request.id))
                    wait_end(store, str(request.id), "the end of a cancelled job")
                else:
                    asked = _cancel_at(store, phase, draw, request)
                counts.injections += 1
                ended = store.get(str(request.id))
                counts.measure("cancel_s", time.monotonic() - asked)
                if phase != "queued":
                    wanted[str(following.id)] = after
                    store.submit(following)
                wait_end(store, str(following.id), "the next job's end")
            except TimeoutError as error:
                counts.fail(f"{phase}: {error}")
                break
            if ended.state is State.DONE and phase == "publishing":
                # it was there already
                wanted[ended.id] = reference
                continue
            if ended.state is not State.CANCELLED:
                counts.fail(f"{phase}: {ended.id} is {ended.state}: {ended.error}")
            _check_kept(store, ended.id, reference, counts, phase)
            if draw.random() < 0.25:
                store.retry(ended.id)
                wanted[ended.id] = reference
                try:
                    wait_end(store, ended.id, "the end of a job that goes on")
                except TimeoutError as error:
                    counts.fail(f"{phase}: {error}")
                    break
            else:
                path = store.file(ended)
                store.delete(ended.id)
                if partial_video(path).exists() or store.folder(ended).path.exists():
                    counts.fail(f"{ended.id} was deleted and has left something")
    with JobStore(folder / f"cancel-{seed}") as store:
        check_jobs(store, wanted, counts)
    late = [seconds for seconds in counts.figures.get("cancel_s", []) if seconds > LATE_S]
    for seconds in late:
        counts.fail(f"a job took {seconds:g} s to be cancelled")
    return counts


def _cancel_at(store: JobStore, phase: str, draw: random.Random, request: VideoRequest) -> float:
    """Cancel a job in a phase; returns when, once the job has ended."""
    asked: list[float] = []

    def ask() -> None:
        asked.append(time.monotonic())
        store.cancel(str(request.id))

    with at_phase(phase, draw.randint(1, PHASES[phase][2]), ask) as hook:
        store.submit(request)
        wait_for(hook.fired.is_set, f"{phase} of {request.id}")
        wait_end(store, str(request.id), "the end of a cancelled job")
    return asked[0]


def _check_kept(store: JobStore, id: str, reference: Reference, counts: Counts, phase: str) -> None:
    """What was finished is a playable file beside the final name, and there is no final file."""
    job = store.get(id)
    path = store.file(job)
    if path.exists():
        counts.duplicated += 1
        counts.fail(f"{phase}: {id} was cancelled and has a final file")
    segments = len(list(store.folder(job).segments.glob("seg_*.ts")))
    partial = partial_video(path)
    if partial.exists():
        check_video(partial, reference, counts, part=True)
    elif segments:
        counts.lost += 1
        counts.fail(f"{phase}: {id} has {segments} segments and no partial file")
