"""NaN and Inf where they hurt, and many videos made in turns in one process."""

from __future__ import annotations

import contextlib
import hashlib
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from tests.faults.hooks import working
from tests.faults.oracle import (
    OFTEN,
    OTHER,
    PROMPT,
    Counts,
    Reference,
    References,
    bounce_requests,
    check_jobs,
    check_video,
    fresh,
    single_thread,
    wait_end,
)
from vidkv.errors import VidkvError
from vidkv.jobs.records import digest
from vidkv.jobs.run import Runner
from vidkv.jobs.store import JobStore, State
from vidkv.models.vae import StreamingDecoder
from vidkv.models.wan import CausalWanTransformer3DModel
from vidkv.planning import load_pipeline, open_stream, plan
from vidkv.request import VideoRequest
from vidkv.rollout import Rollout
from vidkv.segments import partial_video, read_metadata

PLACES = ("layer", "scale", "decoder")
RETRIES = 1


class Poison:
    """Puts one NaN or Inf into a tensor: at the n-th use once, or at every use from then on.

    Attributes:
        chunk: the rollout's chunk at the first injection.
    """

    def __init__(self, draw: random.Random, at: int, lasting: bool) -> None:
        self.draw, self.at, self.lasting = draw, at, lasting
        self.value = draw.choice((float("nan"), float("inf"), float("-inf")))
        self.uses = self.times = 0

    def __call__(self, tensor: Tensor) -> Tensor:
        """The tensor as it is, or a poisoned copy."""
        self.uses += 1
        if self.uses < self.at or (self.times and not self.lasting):
            return tensor
        self.times += 1
        poisoned = tensor.clone(memory_format=torch.contiguous_format)
        poisoned.view(-1)[self.draw.randrange(poisoned.numel())] = self.value
        return poisoned


def nan(count: int, seed: int, folder: Path) -> Counts:
    """Poison a layer's output, a page's scale or the decoder's input, for a moment or for good."""
    draw, counts = random.Random(seed), Counts()
    shared = folder / "shared"
    references = References(shared)
    plain, coded = bounce_requests(shared)[:2]
    wanted: dict[str, Reference] = {}
    root = fresh(folder / f"nan-{seed}")
    backoff = mock.patch("vidkv.jobs.store.BACKOFF_S", 0.01)
    with backoff, JobStore(root) as store, working(store, OFTEN, RETRIES):
        for number in range(count):
            place, lasting = PLACES[(seed + number) % len(PLACES)], bool(draw.getrandbits(1))
            request = coded if place == "scale" else draw.choice((plain, coded))
            request = request.model_copy(update={"id": f"nan{number:04d}"})
            reference, poison = references.of(request), Poison(draw, _when(place, draw), lasting)
            with poisoned(place, poison, draw):
                store.submit(request)
                try:
                    wait_end(store, str(request.id), f"the end of {place}")
                except TimeoutError as error:
                    counts.fail(str(error))
                    break
            counts.injections += bool(poison.times)
            told = f"{place}, {'lasting' if lasting else 'once'}, {poison.value}"
            if not poison.times:
                counts.fail(f"{told}: it did not take place")
            job = store.get(str(request.id))
            if not lasting:
                wanted[job.id] = reference
                if job.attempts != 1:
                    counts.fail(f"{told}: {job.attempts} retries instead of one")
                continue
            if job.state is not State.FAILED or "NaN or Inf" not in str(job.error):
                counts.fail(f"{told}: {job.state}: {job.error}")
            _check_kept(store, job.id, reference, counts, told)
            store.delete(job.id)
    with JobStore(root) as store:
        check_jobs(store, wanted, counts)
    return counts


def _when(place: str, draw: random.Random) -> int:
    """The use at which it happens, within the first six chunks of seven."""
    return draw.randint(1, {"layer": 24, "scale": 6, "decoder": 6}[place])


def _check_kept(store: JobStore, id: str, reference: Reference, counts: Counts, told: str) -> None:
    job = store.get(id)
    partial = partial_video(store.file(job))
    if store.file(job).exists():
        counts.differing += 1
        counts.fail(f"{told}: {id} failed and has a final file")
    if not partial.exists():
        if any(store.folder(job).segments.glob("seg_*.ts")):
            counts.lost += 1
            counts.fail(f"{told}: segments and no partial file")
        return
    check_video(partial, reference, counts, part=True)
    if "NaN" not in str(read_metadata(partial).get("stopped")):
        counts.fail(f"{told}: the partial file does not say why it is one")


@contextlib.contextmanager
def poisoned(place: str, poison: Poison, draw: random.Random) -> Iterator[None]:
    """While inside, a place of the engine is poisoned."""
    if place == "layer":
        which = draw.random()

        def flow(self: Rollout, *values: Any) -> Tensor:
            model: CausalWanTransformer3DModel = self.transformer
            block = model.blocks[int(which * len(model.blocks))]
            hook = block.register_forward_hook(lambda module, given, out: poison(out))
            try:
                return genuine_flow(self, *values)
            finally:
                hook.remove()

        genuine_flow = Rollout._flow
        with mock.patch.object(Rollout, "_flow", flow):
            yield
    elif place == "decoder":
        genuine = StreamingDecoder.feed

        def feed(self: StreamingDecoder, latents: Tensor) -> Tensor:
            return genuine(self, poison(latents))

        with mock.patch.object(StreamingDecoder, "feed", feed):
            yield
    else:
        name = draw.choice(("k_scale", "v_scale"))

        def commit(self: Rollout, latents: Tensor, *values: Any) -> None:
            genuine_commit(self, latents, *values)
            for cache, frame in [self.pages()[min(self.pages())]]:
                page = cache.table[frame]
                scale = cache.pools[page.pool].storage[name][:, page.slot]
                scale.copy_(poison(scale))

        genuine_commit = Rollout._clean_pass
        with mock.patch.object(Rollout, "_clean_pass", commit):
            yield


def interleaved(count: int, seed: int, folder: Path) -> Counts:
    """So many videos, a chunk of one and a chunk of another in turns: each equals its solo run bit for bit.

    All run over one set of networks, as sessions of a server would.
    """
    draw, counts = random.Random(seed), Counts()
    shared = folder / "shared"
    prompts = (PROMPT, OTHER, "a green triangle bouncing", "a yellow circle bouncing")
    basis = bounce_requests(shared, 4.0)
    requests = [
        VideoRequest.model_validate(
            basis[number % len(basis)].model_dump(exclude_unset=True)
            | {"prompt": prompts[number % len(prompts)], "seed": 1000 * seed + number}
        )
        for number in range(count)
    ]
    with single_thread():
        plans = [plan(request) for request in requests]
        pipe = Runner().pipeline(plans[0])
        solo = []
        for planned in plans:
            stream = open_stream(planned, load_pipeline(planned))
            solo.append([_prints(chunk.latents, chunk.frames) for chunk in stream])
            stream.close()
        streams = {number: open_stream(planned, pipe) for number, planned in enumerate(plans)}
        made: dict[int, list[tuple[str, str]]] = {number: [] for number in streams}
        waiting = dict(streams)
        while waiting:
            number = draw.choice(list(waiting))
            try:
                chunk = next(waiting[number])
            except StopIteration:
                waiting.pop(number).close()
            except VidkvError as error:
                waiting.pop(number).close()
                counts.fail(f"rollout {number}: {error}")
            else:
                made[number].append(_prints(chunk.latents, chunk.frames))
    counts.injections = counts.jobs = count
    owners = {prints: number for number, video in enumerate(solo) for prints in video}
    for number, video in made.items():
        if video != solo[number]:
            counts.differing += 1
            at = next((i for i, (a, b) in enumerate(zip(video, solo[number], strict=False)) if a != b), -1)
            counts.fail(f"rollout {number} of {count} differs from its solo run at chunk {at}")
        if {owners.get(prints, number) for prints in video} - {number}:
            counts.fail(f"rollout {number} shows another one's chunks")
    return counts


def _prints(latents: Tensor, frames: Tensor | None) -> tuple[str, str]:
    assert frames is not None
    return digest("", latents), hashlib.sha256(torch.as_tensor(frames).numpy().tobytes()).hexdigest()
