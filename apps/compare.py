"""Two videos side by side over HTTP: two caches on one seed, and how far what they made is apart.

A comparison is a view: of any two jobs of equal size and frame rate, over the chunks that both have finished.
Every question measures a little further, so that an answer comes within moments however long the videos are.
"""

from __future__ import annotations

import contextlib
import hashlib
import math
import threading
import time
from collections import OrderedDict
from collections.abc import Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from types import SimpleNamespace
from typing import Annotated, Any, Literal

import numpy as np
from anyio import CapacityLimiter
from fastapi import FastAPI, Query, Request
from fastapi.responses import HTMLResponse, Response
from pydantic import BaseModel

from vidkv.apps.api import (
    FROM_FILES,
    CreateVideo,
    Incoming,
    Refused,
    Service,
    Video,
    aside,
    faulty,
    require_workers,
)
from vidkv.apps.fidelity import (
    DIVERGED_DB,
    ChunkFidelity,
    Fidelity,
    Frames,
    WorldFidelity,
    is_world_sized,
    world_of,
)
from vidkv.cache import CacheGeometry, CacheSpec
from vidkv.cache.kv_cache import planned_bytes
from vidkv.cache.tiers import planned_pools
from vidkv.errors import CacheSpecError, InputError, PromptError, VidkvError
from vidkv.files import reason
from vidkv.jobs.store import Job, QueueFull, State
from vidkv.loading import find_model, model_entry
from vidkv.memory import latent_size, pixel_size
from vidkv.models.checkpoints.folders import read_json
from vidkv.models.families.base import ModelEntry
from vidkv.models.registry import canonical_prompt
from vidkv.models.vae import pixel_frames
from vidkv.planning import Plan, cache_spec, compute_dtype, first_chunk_frames, pick_device, plan
from vidkv.prompts import PromptSchedule
from vidkv.request import VideoRequest, shown
from vidkv.segments import segment_paths
from vidkv.stream import latents_before

SIDES: tuple[Literal["a", "b"], ...] = ("a", "b")
WORK_S, REPORT_S = 1.0, 20.0
"""How long one question, and one report, measures before it answers with what there is."""
MEASURING = 2
"""Threads that measure at a time."""
KEPT = 6
"""Comparisons whose numbers are kept in memory."""
PAGE = 2_000
"""Chunks of one answer."""
ID_ROOM = 80 - len("-a")
_COPIED = 2**20


class Comparing(BaseModel):
    """Two jobs that were queued together."""

    id: str
    a: Video
    b: Video


class ComparedChunk(BaseModel):
    """Two videos over one chunk.

    `psnr` in dB is null where no pixel differs. `luma` and `saturation` are percent of full scale against the
    video's own first chunk, of a and b.
    """

    chunk: int
    first_frame: int
    frames: int
    psnr: float | None
    ssim: float
    max_difference: int
    luma: tuple[float, float]
    saturation: tuple[float, float]


class Closeness(BaseModel):
    """How far two videos are apart over all chunks measured.

    `psnr` is of all frames together, null where no pixel differs. `diverged_at` is the first chunk below
    `threshold_db`.
    """

    identical: bool
    psnr: float | None
    psnr_lowest: float | None
    ssim: float | None
    ssim_lowest: float | None
    max_difference: int
    diverged_at: int | None
    threshold_db: float = DIVERGED_DB


class WorldShown(BaseModel):
    """What a video of the embedded world shows: means over its chunks, null without evidence.

    `curves` has them by chunk. `right` of `returned` objects that were out of view came back as they were.
    """

    means: dict[str, float | None]
    curves: dict[str, list[float | None]] | None
    returned: int
    right: int


class WorldCompared(BaseModel):
    """Both sides over the first `chunks`, and the first chunk in which they show different states."""

    chunks: int
    diverged_at: int | None
    a: WorldShown
    b: WorldShown


class ComparedSide(BaseModel):
    """One of two videos.

    `kv_bytes` is what its cache takes, `bytes_per_frame` what one latent frame takes in the cache's format.
    """

    video: Video
    cache: str
    seed: int
    prompts: list[tuple[float, str]]
    kv_bytes: int
    bytes_per_frame: int
    fps: float | None


class Ratio(BaseModel):
    """Of b to a."""

    kv_bytes: float
    bytes_per_frame: float
    fps: float | None


class Compared(BaseModel):
    """Two videos over the chunks that both have finished.

    `measured` of `available` chunks are compared by now; ask again for more. `complete` is true once both
    videos have ended and all is compared. `chunks` begins after those that the client knew, and `next` is
    what it knows now. `caches_alone` says whether nothing but the cache differs.
    """

    a: ComparedSide
    b: ComparedSide
    ratio: Ratio
    width: int
    height: int
    frame_rate: int
    caches_alone: bool
    notes: list[str]
    available: int
    measured: int
    complete: bool
    up_to: str
    fidelity: Closeness
    world: WorldCompared | None
    chunks: list[ComparedChunk]
    next: int


@dataclass(frozen=True)
class Side:
    """A job as one half of a comparison.

    Attributes:
        spec: its cache, whole.
        size: height and width.
        first: latent frames of its first chunk.
        timeline: its prompts, with those that were steered in.
        switches: what became of the history at each later one, where it says so.
        grammar: of the model's prompts.
        frame_bytes, cache_bytes: of one latent frame and of the whole cache.
    """

    job: Job
    request: VideoRequest
    entry: ModelEntry
    spec: CacheSpec
    size: tuple[int, int]
    first: int
    timeline: tuple[tuple[float, str], ...]
    switches: tuple[str | None, ...]
    grammar: str | None
    frame_bytes: int
    cache_bytes: int

    @classmethod
    def of(cls, service: Service, job: Job) -> Side:
        """Look up what a job is made with.

        Raises:
            VidkvError: its model is not here any more.
        """
        request = VideoRequest.of(job.request)
        folder = find_model(request.model)
        entry = model_entry(folder)
        grammar = read_json(folder / "model_index.json").get("prompt_grammar")
        size = pixel_size(entry, request.height, request.width)
        device = pick_device(str(job.settings.get("device", "auto")))
        spec = cache_spec(entry, request.cache, device)
        config = SimpleNamespace(**read_json(folder / "transformer" / "config.json"))
        geometry = CacheGeometry.of_model(config, *latent_size(entry, *size), entry.chunk_frames)
        dtype = compute_dtype(device)
        page = planned_pools(spec, geometry, dtype)["pages"][0].bytes_per_page()
        video = service.show(job)
        return cls(
            job, request, entry, spec, size, first_chunk_frames(request, entry) or entry.chunk_frames,
            _timeline(video), tuple(way for _, _, way in sorted(video.schedule, key=lambda entry: entry[0])),
            str(grammar) if grammar else None, page * geometry.layers,
            planned_bytes(spec, geometry, dtype),
        )  # fmt: skip

    def frames_before(self, chunk: int) -> int:
        """Pixel frames before a chunk, of those that are finished."""
        before = latents_before(chunk, self.entry.chunk_frames, self.first)
        return min(self.job.frames, pixel_frames(before))

    def prompts(self, chunks: int) -> list[str]:
        """The prompt of every chunk, as the model reads it.

        Raises:
            PromptError: one is not of the model's grammar.
        """
        schedule = PromptSchedule.of(self.timeline, canonical_prompt(self.grammar))
        return [schedule.at(self.frames_before(chunk) / self.entry.fps) for chunk in range(chunks)]


def _timeline(video: Video) -> tuple[tuple[float, str], ...]:
    later = {second: text for second, text, _ in video.schedule}
    return tuple(sorted(({0.0: video.prompt} | later).items()))


class Comparison:
    """Two jobs and what has been measured of them.

    Attributes:
        a, b: as they were when last looked at.
    """

    def __init__(self, service: Service, a: Side, b: Side) -> None:
        require_alike(a, b)
        self.service, self.a, self.b = service, a, b
        self.fidelity = Fidelity()
        world = world_of(a.grammar) if a.grammar == b.grammar and is_world_sized(*a.size) else None
        self.world = WorldFidelity(world) if world else None
        self._lock = threading.Lock()

    @property
    def available(self) -> int:
        """Chunks that both have finished."""
        return min(self.a.job.done, self.b.job.done)

    @property
    def expected(self) -> int:
        """Chunks that both will have in the end."""
        return min(job.done if job.ended else job.chunks for job in (self.a.job, self.b.job))

    @property
    def ended(self) -> bool:
        """Nothing about either video will change."""
        return self.a.job.ended and self.b.job.ended

    def advance(self, a: Side, b: Side, budget_s: float) -> None:
        """Measure what both have finished, until it is done or time is up.

        Raises:
            Refused: a video has gone or is damaged.
        """
        begun = time.monotonic()
        # another question may be measuring the same
        if not self._lock.acquire(timeout=budget_s):
            return
        try:
            self.a, self.b = a, b
            since, until = len(self.fidelity.chunks), self.available
            with contextlib.ExitStack() as stack:
                clips = [
                    stack.enter_context(contextlib.closing(read_chunks(self.service, side, since, until)))
                    for side in (a, b)
                ]
                while len(self.fidelity.chunks) < until:
                    first, second = (next(clip, None) for clip in clips)
                    if first is None or second is None:
                        break
                    self._add(first, second)
                    if time.monotonic() - begun > budget_s:
                        break
            if self.world is not None:
                self._update_world(self.world)
        finally:
            self._lock.release()

    def _add(self, a: Frames, b: Frames) -> None:
        # the last chunk of one may be cut where the other goes on
        frames = min(len(a), len(b))
        a, b = a[:frames], b[:frames]
        if self.world is not None:
            self.world.add(a, b)
        self.fidelity.add(a, b)

    def _update_world(self, world: WorldFidelity) -> None:
        done = len(self.fidelity.chunks) >= self.expected
        try:
            world.update([side.prompts(world.added) for side in (self.a, self.b)], last=done)
        except PromptError:
            # a prompt that an older version took
            self.world = None

    def last_frames(self, chunk: int) -> tuple[Frames, Frames] | None:
        """The last frame of a chunk that both have, (height, width, 3) each; None while files change."""
        pair = []
        for side in (self.a, self.b):
            with contextlib.closing(read_chunks(self.service, side, chunk, chunk + 1)) as clip:
                pair.append(next(clip, None))
        a, b = pair
        if a is None or b is None:
            return None
        last = min(len(a), len(b)) - 1
        return a[last], b[last]

    def show(self, after: int, world_known: int) -> Compared:
        """What has been measured, without the chunks before `after`."""
        a, b, chunks = self.a, self.b, list(self.fidelity.chunks)
        page = chunks[after : after + PAGE]
        sides = [_shown(self.service, side) for side in (a, b)]
        fps = [side.fps for side in sides]
        ratio = Ratio(
            kv_bytes=sides[1].kv_bytes / sides[0].kv_bytes,
            bytes_per_frame=b.frame_bytes / a.frame_bytes,
            fps=fps[1] / fps[0] if fps[0] and fps[1] else None,
        )
        differing, notes = explain(a, b)
        first = a.frames_before(after)
        rows: list[ComparedChunk] = []
        for number, chunk in enumerate(page, after):
            rows.append(_row(number, first, chunk))
            first += chunk.frames
        available = max(self.available, len(chunks))
        return Compared(
            a=sides[0], b=sides[1], ratio=ratio, width=a.size[1], height=a.size[0], frame_rate=a.entry.fps,
            caches_alone=not differing, notes=notes, available=available, measured=len(chunks),
            complete=self.ended and len(chunks) >= available, up_to=self._up_to(len(chunks), available),
            fidelity=closeness(self.fidelity), world=self._world(world_known), chunks=rows,
            next=after + len(page),
        )  # fmt: skip

    def _up_to(self, measured: int, available: int) -> str:
        total = max(measured, self.expected)
        if not measured:
            return "nothing is compared yet: both videos need a finished chunk"
        seconds = sum(chunk.frames for chunk in self.fidelity.chunks[:measured]) / self.a.entry.fps
        where = f"compared up to chunk {measured - 1} ({measured} of {total}, {seconds:.3g} s)"
        if measured < available:
            return f"{where}; {available - measured} more are finished and are being compared"
        return where if measured >= total else f"{where}; the rest is being made"

    def _world(self, known: int) -> WorldCompared | None:
        world = self.world
        if world is None or not world.sides:
            return None
        sides = [
            WorldShown(
                means={name: _mean(curve) for name, curve in side.curves.items()},
                curves={name: [_finite(x) for x in curve] for name, curve in side.curves.items()}
                if world.chunks != known
                else None,
                returned=side.returned, right=side.right,
            )
            for side in world.sides
        ]  # fmt: skip
        return WorldCompared(chunks=world.chunks, diverged_at=world.diverged_at, a=sides[0], b=sides[1])


class Comparisons:
    """Comparisons by their two jobs, the last few of them."""

    def __init__(self, service: Service) -> None:
        self.service = service
        self._kept: OrderedDict[tuple[Any, ...], Comparison] = OrderedDict()
        self._lock = threading.Lock()

    def advanced(self, a: str, b: str, budget_s: float) -> Comparison:
        """The comparison of two jobs, measured further.

        Raises:
            Refused: one of them is not there, or they cannot be compared.
        """
        jobs = [self.service.find(id) for id in (a, b)]
        one, other = (Side.of(self.service, job) for job in jobs)
        # an id may be given again to another video
        key = tuple((job.id, job.submitted) for job in jobs)
        with self._lock:
            comparison = self._kept.get(key)
            if comparison is None or len(comparison.fidelity.chunks) > min(job.done for job in jobs):
                # one of them is made anew
                comparison = self._kept[key] = Comparison(self.service, one, other)
            self._kept.move_to_end(key)
            while len(self._kept) > KEPT:
                self._kept.popitem(last=False)
        comparison.advance(one, other, budget_s)
        return comparison


def require_alike(a: Side, b: Side) -> None:
    """Refuse videos that cannot be laid over each other.

    Raises:
        Refused: their size, frame rate or chunks differ.
    """
    ids = f"{a.job.id} and {b.job.id}"
    for name, values in {
        "size": [f"{side.size[1]}x{side.size[0]}" for side in (a, b)],
        "frame rate": [f"{side.entry.fps} fps" for side in (a, b)],
        "length of chunks": [f"{side.first}+{side.entry.chunk_frames} latent frames" for side in (a, b)],
    }.items():
        if values[0] != values[1]:
            raise Refused(
                422, "not_comparable",
                f"{ids} differ in {name} ({values[0]} and {values[1]}); compare videos of the same one", "b",
            )  # fmt: skip


def explain(a: Side, b: Side) -> tuple[list[str], list[str]]:
    """What differs besides the cache, by name; and sentences that a reader of the numbers must know."""
    names = ("model", "seed", "steps", "guidance", "negative", "switch", "noise", "image", "video")
    pairs = {name: (getattr(a.request, name), getattr(b.request, name)) for name in names}
    pairs["settings"] = a.job.settings, b.job.settings
    pairs["switches of later prompts"] = a.switches, b.switches
    differing = [name for name, (one, other) in pairs.items() if one != other]
    if _spelled(a) != _spelled(b):
        differing.insert(0, "prompt")
    notes = []
    if a.job.id == b.job.id:
        notes.append("This is one video, compared with itself.")
    elif differing:
        notes.append(
            f"This is no comparison of caches alone: the videos also differ in {', '.join(differing)}."
        )
    elif a.spec == b.spec:
        notes.append(f"Both videos were made with the same cache ({a.spec}).")
    if "seed" not in differing and a.job.id != b.job.id:
        notes.append(
            "Both start from the same noise, but a rollout is chaotic: the smallest difference grows from "
            "chunk to chunk. A low PSNR says that the videos have parted, not that one of them is worse."
        )
    if a.job.chunks != b.job.chunks:
        notes.append(
            f"The videos have {a.job.chunks} and {b.job.chunks} chunks; the shorter one is compared."
        )
    return differing, notes


def _spelled(side: Side) -> Sequence[tuple[float, str]]:
    with contextlib.suppress(VidkvError):
        return PromptSchedule.of(side.timeline, canonical_prompt(side.grammar)).entries
    return side.timeline


def closeness(fidelity: Fidelity) -> Closeness:
    """Over all chunks measured."""
    chunks = fidelity.chunks
    return Closeness(
        identical=bool(chunks) and fidelity.identical, psnr=_finite(fidelity.psnr),
        psnr_lowest=_finite(min((chunk.psnr for chunk in chunks), default=math.nan)),
        ssim=_finite(fidelity.ssim), ssim_lowest=_finite(min((c.ssim for c in chunks), default=math.nan)),
        max_difference=max((chunk.max_difference for chunk in chunks), default=0),
        diverged_at=fidelity.diverged_at,
    )  # fmt: skip


def _row(number: int, first_frame: int, chunk: ChunkFidelity) -> ComparedChunk:
    return ComparedChunk(
        chunk=number, first_frame=first_frame, frames=chunk.frames, psnr=_finite(chunk.psnr),
        ssim=round(chunk.ssim, 5), max_difference=chunk.max_difference, luma=chunk.luma,
        saturation=chunk.saturation,
    )  # fmt: skip


def _shown(service: Service, side: Side) -> ComparedSide:
    video = service.show(side.job)
    return ComparedSide(
        video=video, cache=str(side.spec), seed=side.request.seed, prompts=list(side.timeline),
        kv_bytes=video.kv_bytes or side.cache_bytes, bytes_per_frame=side.frame_bytes, fps=video.fps,
    )  # fmt: skip


def _finite(value: float) -> float | None:
    return round(float(value), 4) if math.isfinite(value) else None


def _mean(curve: np.ndarray) -> float | None:
    known = curve[~np.isnan(curve)]
    return _finite(float(known.mean())) if len(known) else None


# --- pictures ---


def read_chunks(service: Service, side: Side, since: int, until: int) -> Generator[Frames, None, None]:
    """Decode chunks of a job in order, from its segments or else from its file.

    It ends early in the moment in which the ones are becoming the other.

    Raises:
        Refused: there is no such file any more, or it is damaged.
    """
    for chunk in range(since, until):
        paths = segment_paths(service.store.folder(side.job).segments)
        try:
            frames = list(_decoded(str(paths[chunk].absolute()))) if chunk < len(paths) else None
        except FileNotFoundError:
            frames = None
        if frames is None:
            yield from _from_file(service, side, chunk, until)
            return
        yield _whole(side, chunk, frames)


def _from_file(service: Service, side: Side, since: int, until: int) -> Iterator[Frames]:
    job = service.find(side.job.id)
    if not job.ended:
        return
    path, _ = service.file(job.id, "video" if job.state is State.DONE else "partial")
    frames = _decoded(str(path.resolve()), side.frames_before(since), side.entry.fps)
    with contextlib.closing(frames):
        for chunk in range(since, until):
            count = side.frames_before(chunk + 1) - side.frames_before(chunk)
            yield _whole(side, chunk, list(islice(frames, count)))


def _whole(side: Side, chunk: int, frames: Sequence[Frames]) -> Frames:
    """The frames of a chunk, all of them."""
    wanted = side.frames_before(chunk + 1) - side.frames_before(chunk)
    if len(frames) < wanted or not frames:
        raise Refused(
            422, "damaged_video",
            f"video {side.job.id} has {len(frames)} of the {wanted} frames of chunk {chunk}; delete it and "
            "make it again",
        )  # fmt: skip
    return np.stack(frames[:wanted])


def _decoded(path: str, since: int = 0, fps: int = 1) -> Generator[Frames, None, None]:
    """RGB frames of a segment, or of an mp4 from a frame on.

    Raises:
        FileNotFoundError: there is none.
    """
    import av

    try:
        with av.open(path, "r", format="mpegts" if path.endswith(".ts") else None) as container:
            stream = container.streams.video[0]
            # a few small frames: starting threads costs more
            stream.codec_context.thread_count = 1
            if since and stream.time_base:
                container.seek(round(since / fps / stream.time_base), stream=stream)
            for frame in container.decode(stream):
                if not since or (frame.time is not None and round(frame.time * fps) >= since):
                    yield np.asarray(frame.to_ndarray(format="rgb24"), np.uint8)
    except FileNotFoundError:
        raise
    except (OSError, IndexError, ValueError, av.error.FFmpegError) as error:
        raise InputError(f"a video cannot be decoded: {reason(error)}; delete it and make it again") from None


# --- two jobs at once ---


def queue_pair(service: Service, values: Any, incoming: Incoming | None) -> Comparing:
    """Queue two videos that differ in their cache alone: both or neither.

    Raises:
        Refused, VidkvError: they cannot be made, or are the same.
        QueueFull: there is no room for two.
    """
    if not isinstance(values, Mapping):
        raise Refused(422, "invalid_value", "the body is not a JSON object; give one with a prompt, a and b")
    if "cache" in values:
        raise Refused(422, "unknown_field", f"cache={shown(values['cache'])}: give a and b instead", "cache")
    for side in SIDES:
        if side not in values:
            raise Refused(
                422, "invalid_value", f"{side} is missing; give a cache such as 'int8,window=21'", side
            )
    if values.get("until_stopped"):
        raise Refused(422, "invalid_value", "until_stopped: a comparison has an end; give seconds",
                      "until_stopped")  # fmt: skip
    shared = {name: value for name, value in values.items() if name not in ("a", "b", "id")}
    if "keep" in CreateVideo.model_fields:
        shared["keep"] = True
    plans = [_planned(service, side, shared | {"cache": values[side]}) for side in SIDES]
    if plans[0].spec == plans[1].spec:
        raise Refused(
            422, "same_cache",
            f"a and b are the same cache ({plans[0].spec}): nothing would be compared; change one", "b",
        )  # fmt: skip
    base = _base(values.get("id"), plans, incoming)
    ids = {side: f"{base}-{side}" for side in SIDES}
    _require_room_for_two(service, list(ids.values()))
    jobs = _create_both(
        service, [shared | {"cache": values[side], "id": ids[side]} for side in SIDES], incoming
    )
    return Comparing(id=base, a=service.show(jobs[0]), b=service.show(jobs[1]))


def _planned(service: Service, side: str, values: Mapping[str, Any]) -> Plan:
    """What would be made of one side; a fault of its cache is one of that side."""
    try:
        return plan(service.read(values).request, service.settings)
    except Refused as error:
        if error.param != "cache":
            raise
        raise Refused(error.status, error.code, f"{side}: {error}", side) from None
    except CacheSpecError as error:
        raise Refused(422, "invalid_value", f"{side}: {error}", side) from None


def _base(wanted: Any, plans: Sequence[Plan], incoming: Incoming | None) -> str:
    """What both ids begin with: as asked for, or named after the work."""
    if wanted is None:
        work = [planned.key for planned in plans] + ([incoming.digest.hexdigest()] if incoming else [])
        return f"compare-{hashlib.sha256(' '.join(work).encode()).hexdigest()[:12]}"
    if isinstance(wanted, str) and 0 < len(wanted) <= ID_ROOM:
        return wanted
    raise Refused(422, "invalid_value", f"id={shown(wanted)}: use 1 to {ID_ROOM} letters, digits, '.', '_' "
                  "and '-'", "id")  # fmt: skip


def _require_room_for_two(service: Service, ids: Sequence[str]) -> None:
    counts = service.store.counts()
    waiting = counts[State.QUEUED] + counts[State.RUNNING] + counts[State.PAUSED]
    new = 0
    for id in ids:
        try:
            new += service.store.get(id).ended
        except InputError:
            new += 1
    if waiting + new > service.limits.queue:
        raise QueueFull(
            f"{waiting} videos are waiting and the queue takes {service.limits.queue}: no room for two"
        )


def _create_both(
    service: Service, requests: Sequence[Mapping[str, Any]], incoming: Incoming | None
) -> list[Job]:
    """Queue both; if the second cannot be, the first is taken back."""
    copy = _copied(service, incoming) if incoming else None
    made: list[Job] = []
    there = [_there(service, str(request["id"])) for request in requests]
    try:
        for request, upload in zip(requests, (incoming, copy), strict=True):
            made.append(service.create(dict(request), upload))
    except BaseException:
        for job, was_there in zip(made, there, strict=False):
            if not was_there:
                # a worker that has begun with it keeps it, cancelled
                with contextlib.suppress(VidkvError, Refused):
                    service.store.cancel(job.id)
                    service.delete(job.id)
        raise
    finally:
        if copy:
            copy.discard()
    return made


def _there(service: Service, id: str) -> bool:
    with contextlib.suppress(InputError):
        return bool(service.store.get(id))
    return False


def _copied(service: Service, incoming: Incoming) -> Incoming:
    """The upload once more: each video is given its own."""
    incoming.file.flush()
    copy = service.uploads.receive(service.limits.upload_bytes)
    try:
        with incoming.path.open("rb") as file:
            while part := file.read(_COPIED):
                copy.write(part)
    except BaseException:
        copy.discard()
        raise
    return copy


# --- routes ---


def add_compare_routes(app: FastAPI, service: Service) -> None:
    """POST and GET under /v1/compare."""
    # of its own: measuring takes seconds of a core and must not keep other answers waiting
    limiter, planners = CapacityLimiter(MEASURING), CapacityLimiter(4)
    comparisons = Comparisons(service)
    contents = {kind: {"schema": schema} for kind, schema in _bodies().items()}

    @app.post(
        "/v1/compare", responses=faulty(408, 413, 415, 422, 429, 507),
        openapi_extra={"requestBody": {"required": True, "content": contents}},
    )  # fmt: skip
    async def create_comparison(request: Request) -> Comparing:
        """Queue two videos with the same noise and prompts under the caches a and b: both or neither."""
        require_workers(service)
        values, form = await service.receive(request)
        try:
            return await aside(queue_pair, service, values, form.upload if form else None, limiter=planners)
        finally:
            if form:
                form.discard()

    @app.get("/v1/compare/{a}/{b}", responses=faulty(404, 409))
    async def compare_videos(
        a: str,
        b: str,
        after: Annotated[int, Query(ge=0, le=10**9, description="Chunks that the client knows.")] = 0,
        world: Annotated[
            int, Query(ge=0, le=10**9, description="Chunks of the world's curves that it knows.")
        ] = 0,
    ) -> Compared:
        """How far two videos of one size are apart, over the chunks that both have finished."""
        comparison = await aside(comparisons.advanced, a, b, WORK_S, limiter=limiter)
        return await aside(comparison.show, after, world)

    sent = {"content": {"text/html": {"schema": {"type": "string"}}}, "description": "A page of its own"}

    @app.get(
        "/v1/compare/{a}/{b}/report", response_class=Response,
        responses={200: sent, **faulty(404, 409)},
    )  # fmt: skip
    async def report_comparison(a: str, b: str) -> HTMLResponse:
        """The comparison as one HTML file without links to elsewhere."""
        from vidkv.apps.compare_report import comparison_report

        comparison = await aside(comparisons.advanced, a, b, REPORT_S, limiter=limiter)
        page = await aside(comparison_report, comparison, limiter=limiter)
        # both ids are of letters, digits, dots, _ and - alone
        name = f"compare-{comparison.a.job.id}-{comparison.b.job.id}.html"
        headers = {
            "Content-Disposition": f'attachment; filename="{name}"', "Cache-Control": "private, no-store",
        }  # fmt: skip
        return HTMLResponse(page, headers=headers)


def _bodies() -> dict[str, Any]:
    """Schemas of what `create_comparison` takes, by media type."""
    schemas = CreateVideo.schemas()
    kinds = {"application/json": "CreateVideo", "multipart/form-data": "CreateVideoForm"}
    bodies: dict[str, Any] = {}
    for kind, name in kinds.items():
        whole = schemas[name]
        fields = {key: part for key, part in whole["properties"].items() if key not in FROM_FILES | {"cache"}}
        sides = {
            side: whole["properties"]["cache"] | {"description": f"The cache of video {side}."}
            for side in SIDES
        }
        bodies[kind] = whole | {
            "title": name.replace("CreateVideo", "CreateComparison"), "properties": fields | sides,
            "required": [*whole.get("required", []), *SIDES],
        }  # fmt: skip
    return bodies
