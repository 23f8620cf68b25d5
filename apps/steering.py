"""Routes for those who watch a video being made and change what becomes of it."""

from __future__ import annotations

import json
import shlex
from typing import Annotated, Any, TypeVar

from fastapi import FastAPI, Query, Request
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from vidkv.apps.api import (
    Refused,
    Service,
    Video,
    aside,
    faulty,
    require_workers,
)
from vidkv.jobs.branch import Branch
from vidkv.jobs.store import Job, State
from vidkv.memory import gigabytes
from vidkv.planning import Plan, plan
from vidkv.prompts import Switch
from vidkv.request import ID_PATTERN, Prompt, VideoRequest, faults
from vidkv.room import usable_bytes
from vidkv.segments import read_metadata

Body = TypeVar("Body", bound=BaseModel)
LOG_BYTES = 2**18
"""Of a log, in one answer."""


class NewPrompt(BaseModel):
    """What a video is to show from its next chunk on."""

    model_config = ConfigDict(extra="forbid")

    prompt: Prompt
    switch: Switch | None = Field(default=None, description="What becomes of the history.")


class NewBranch(BaseModel):
    """How a video goes on from a chunk of another one."""

    model_config = ConfigDict(extra="forbid")

    chunk: int | None = Field(
        default=None, ge=1, lt=2**31, description="Chunks that are taken over; by default all."
    )
    prompt: Prompt | None = Field(default=None, description="Takes over there; by default as it goes on.")
    switch: Switch | None = Field(default=None, description="What becomes of the history then.")
    seconds: float | None = Field(
        default=None, gt=0, allow_inf_nan=False, description="Length of the new video."
    )
    more_seconds: float | None = Field(
        default=None, gt=0, allow_inf_nan=False, description="Length beyond what is taken over."
    )
    id: str | None = Field(
        default=None, pattern=f"^{ID_PATTERN}$", description="By default the old one with a number."
    )


class Log(BaseModel):
    """What is known of finished chunks.

    `next` is the place from which to ask again.
    """

    entries: list[dict[str, Any]]
    next: int


class VideoSettings(BaseModel):
    """What made a video.

    `settings` is what its file says, or will say; `request` is a body for `POST /v1/videos` that makes the
    same video, as do the Python program and the command; a file that it started from has to be given again.
    """

    settings: dict[str, str]
    request: dict[str, Any]
    python: str
    cli: str


class Estimate(BaseModel):
    """What a video would take.

    `ok` says whether it fits on this machine now, `verdict` says so in words. `bytes_per_frame` is the whole
    cache over the latent frames that it holds.
    """

    ok: bool
    verdict: str
    device: str
    chunks: int
    frames: int
    kv_bytes: int
    bytes_per_frame: int
    peak_bytes: int
    free_bytes: int | None


def add_steering_routes(app: FastAPI, service: Service) -> None:
    """Add the routes."""
    store = service.store

    # plain functions run in threads: they wait for the index on disk
    @app.post("/v1/videos/{id}/pause", responses=faulty(404, 409, 507))
    def pause_video(id: str) -> Video:
        """Let it wait after the chunk that is being made; others take its place."""
        service.find(id)
        return service.show(store.pause(id))

    @app.post("/v1/videos/{id}/resume", responses=faulty(404, 409, 507))
    def resume_video(id: str) -> Video:
        """Let it go on where it stands."""
        service.find(id)
        return service.show(store.resume(id))

    @app.post("/v1/videos/{id}/finish", responses=faulty(404, 409, 507))
    def finish_video(id: str) -> Video:
        """End it with the chunks that are finished as its video."""
        service.find(id)
        return service.show(store.stop(id))

    @app.post("/v1/videos/{id}/retry", responses=faulty(404, 409, 429, 507))
    def retry_video(id: str) -> Video:
        """Queue it again after it failed or was cancelled; it goes on where it stopped."""
        service.find(id)
        service.require_room(None)
        return service.show(store.retry(id))

    @app.post(
        "/v1/videos/{id}/prompt", responses=faulty(404, 409, 413, 415, 507), openapi_extra=_body(NewPrompt)
    )
    async def change_prompt(id: str, request: Request) -> Video:
        """Change the prompt from the next chunk on."""
        wanted = _read(NewPrompt, await service.fields(request))

        def act() -> Video:
            job = service.find(id)
            if job.ended:
                raise Refused(
                    409, "wrong_state", f"video {id} is {job.state}; branch from one of its chunks instead"
                )
            return service.show(store.steer(id, wanted.prompt, wanted.switch))

        return await aside(act, limiter=service.planners)

    @app.post(
        "/v1/videos/{id}/branch", responses=faulty(404, 409, 413, 415, 429, 507),
        openapi_extra=_body(NewBranch),
    )  # fmt: skip
    async def branch_video(id: str, request: Request) -> Video:
        """A new video that goes on from a chunk of this one; `more_seconds` alone extends it."""
        require_workers(service)
        wanted = _read(NewBranch, await service.fields(request))

        def act() -> Video:
            video = service.show(service.find(id))
            service.require_seconds(wanted.seconds or 0)
            taken = video.frames / video.frame_rate if video.frame_rate else 0
            service.require_seconds(taken + wanted.more_seconds if wanted.more_seconds else 0)
            branch = Branch(**wanted.model_dump())
            return service.show(store.branch(id, branch, most=service.limits.queue))

        return await aside(act, limiter=service.planners)

    @app.get("/v1/videos/{id}/log", responses=faulty(404, 422))
    def get_log(id: str, after: Annotated[int, Query(ge=0, lt=2**62)] = 0) -> Log:
        """What finished chunks cost and what the cache held, from a place of the log on."""
        entries, place = store.folder(service.find(id)).read_log(after, LOG_BYTES)
        return Log(entries=entries, next=place)

    @app.get("/v1/videos/{id}/settings", responses=faulty(404))
    def get_settings(id: str) -> VideoSettings:
        """What made it, and how to make it again."""
        return settings_of(service, service.find(id))

    contents = {"application/json": {"schema": {"$ref": "#/components/schemas/CreateVideo"}}}

    @app.post(
        "/v1/estimate", responses=faulty(413, 415),
        openapi_extra={"requestBody": {"required": True, "content": contents}},
    )  # fmt: skip
    async def estimate_video(request: Request) -> Estimate:
        """What a video would take, without making it."""
        values = await service.fields(request)
        return await aside(lambda: estimate(service, service.read(values).request), limiter=service.planners)


def estimate(service: Service, request: VideoRequest) -> Estimate:
    """What a request would take on this machine.

    Raises:
        VidkvError: it cannot be made, here or anywhere.
    """
    planned = plan(request, service.settings)
    free = usable_bytes(planned.device)
    need = planned.need_bytes
    card = "GPU memory" if planned.device == "cuda" else "memory"
    verdict = f"Fits: {gigabytes(need)} of {card} at the peak"
    if free is not None:
        verdict += f", {gigabytes(free)} are free"
    kept = planned.memory.kv_host_bytes or planned.memory.kv_bytes
    geometry_bytes = kept // max(1, planned.spec.capacity(planned.entry.chunk_frames))
    return Estimate(
        ok=True, verdict=verdict, device=planned.device, chunks=planned.chunks, frames=planned.frames,
        kv_bytes=planned.memory.kv_bytes + planned.memory.negative_kv_bytes, bytes_per_frame=geometry_bytes,
        peak_bytes=need, free_bytes=free,
    )  # fmt: skip


def settings_of(service: Service, job: Job) -> VideoSettings:
    """What made a job's video, or is to make it."""
    folder = service.store.folder(job)
    original, engine = folder.request()
    request = original.steered(folder.steered())
    planned = plan(request, engine, fits=False)
    if job.state is State.DONE and job.result.get("ended_early"):
        planned = plan(planned.ended(job.done, job.frames), engine, fits=False)
    written = read_metadata(service.store.file(job)) if job.state is State.DONE else {}
    body = planned.request.model_dump(
        mode="json", exclude_unset=True, exclude={"id", "out", "image", "video"}
    )
    return VideoSettings(
        settings=written or planned.metadata(), request=body, python=python_program(planned),
        cli=command_line(planned),
    )  # fmt: skip


def python_program(planned: Plan) -> str:
    """A program that makes the same chunks."""
    request, schedule = planned.request, planned.schedule
    prompt: Any = schedule.timed if len(schedule.entries) > 1 else schedule.entries[0][1]
    options: dict[str, Any] = {
        "num_frames": planned.frames, "seed": request.seed, "cache": str(planned.spec),
        "height": request.height, "width": request.width, "num_inference_steps": request.steps,
        "guidance_scale": request.guidance, "negative_prompt": request.negative,
        "prompt_switch": request.switch, "noise": None if request.noise == "counter" else request.noise,
    }  # fmt: skip
    given = "".join(f"    {name}={value!r},\n" for name, value in options.items() if value is not None)
    start = "".join(
        f"    {kind}=...,  # what it started from\n" for kind in ("image", "video") if getattr(request, kind)
    )
    return (
        "from vidkv import CausalVideoPipeline\n\n"
        f"pipe = CausalVideoPipeline.from_pretrained({request.model!r})\n"
        f"stream = pipe.stream(\n    {prompt!r},\n{given}{start})\n"
        "for chunk in stream:\n    print(chunk.index, chunk.frames.shape)\n"
    )


def command_line(planned: Plan) -> str:
    """A command that makes the same video."""
    request, schedule = planned.request, planned.schedule
    if schedule.switches:
        # `generate` knows one switch for all
        line = request.model_dump(mode="json", exclude_unset=True, exclude={"id", "out", "image", "video"})
        return f"echo {shlex.quote(json.dumps(line))} | vidkv render - --out videos"
    words = ["vidkv", "generate", schedule.entries[0][1], "--seconds", f"{request.seconds!r}"]
    for second, text in schedule.entries[1:]:
        words += ["--prompt-at", f"{second!r}:{text}"]
    options = {
        "--seed": request.seed, "--model": request.model, "--cache": str(planned.spec),
        "--height": request.height, "--width": request.width, "--steps": request.steps,
        "--guidance": request.guidance, "--negative": request.negative, "--switch": request.switch,
        "--noise": None if request.noise == "counter" else request.noise,
        "--image": request.image and request.image.name, "--video": request.video and request.video.name,
        "--out": "video.mp4",
    }  # fmt: skip
    for name, value in options.items():
        if value is not None:
            words += [name, str(value)]
    return shlex.join(words)


def _read(kind: type[Body], values: Any) -> Body:
    if not isinstance(values, dict):
        raise Refused(422, "invalid_value", "the body is not a JSON object")
    try:
        return kind.model_validate(values)
    except ValidationError as error:
        field, message = next(iter(faults(error, kind)))
        raise Refused(422, "invalid_value", message, field) from None


def _body(kind: type[BaseModel]) -> dict[str, Any]:
    """The description of a body that is read by the route itself."""
    schema = kind.model_json_schema(ref_template="#/components/schemas/{model}")
    schema.pop("$defs", None)
    return {"requestBody": {"required": True, "content": {"application/json": {"schema": schema}}}}
