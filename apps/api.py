"""Jobs over HTTP, in the `/v1/videos` shape that today's video servers share.

A request may come from anywhere, so nothing in it names a file, a folder or an address: what a video starts
from is uploaded, checked in a process apart and stored under its content's SHA-256, and media is served by
job id alone. Without a token the server answers to its own name on this machine only, so that no page in a
browser can reach it under another.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import hmac
import logging
import math
import os
import re
import sqlite3
import threading
import time
import uuid
from collections import Counter
from collections.abc import AsyncIterator, Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, cast

from anyio import CapacityLimiter, to_thread
from fastapi import FastAPI, Query, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.openapi.utils import get_openapi
from fastapi.responses import JSONResponse
from pydantic import BaseModel, Field, ValidationError
from python_multipart.exceptions import FormParserError
from python_multipart.multipart import MultipartParser, parse_options_header
from starlette.datastructures import MutableHeaders
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.responses import FileResponse, StreamingResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

import vidkv
from vidkv import intake
from vidkv.apps.login import LOGIN, add_login, has_session
from vidkv.apps.models_table import models_report
from vidkv.errors import InputError, OutputError, StateError, VidkvError
from vidkv.jobs.store import Job, JobStore, QueueFull, State
from vidkv.memory import pixel_size
from vidkv.models.registry import MODELS
from vidkv.planning import Plan, cache_spec, pick_device, plan
from vidkv.prompts import Switch, TimedPrompt
from vidkv.request import (
    ID_PATTERN,
    EngineSettings,
    VideoRequest,
    faults,
    first_fault,
    printable,
    read_json,
    shown,
)
from vidkv.segments import partial_video

LOG = logging.getLogger("vidkv.api")
LOOPBACK = frozenset({"127.0.0.1", "localhost", "[::1]"})
UPLOAD = "input_reference"
FROM_FILES = frozenset({"image", "video", "out"})
"""Fields of a request that name files: not over HTTP."""
UNUSED_S = 3600.0
"""Age from which an upload that no job names is deleted at start-up."""
RETRY_S = 5
"""Retry-After where nothing better is known."""
MAX_MESSAGE = 1_000
MAX_HEADERS = 100
T = TypeVar("T")

Status = Literal["queued", "in_progress", "paused", "completed", "failed", "cancelled"]
STATUSES: dict[State, Status] = {
    State.QUEUED: "queued",
    State.RUNNING: "in_progress",
    State.PAUSED: "paused",
    State.DONE: "completed",
    State.FAILED: "failed",
    State.CANCELLED: "cancelled",
}


@dataclass(frozen=True)
class ApiLimits:
    """What one server takes.

    Attributes:
        queue: unfinished jobs; more are refused with 429.
        seconds: length of a video.
        body_bytes: of a JSON body, or of all text fields of a form together.
        upload_bytes: of the file that a video starts from.
        uploads, decoders: received, and checked, at a time.
        fields: of a form.
        read_s: how long a body may take to arrive.
        decode_s: how long an uploaded file may take to be decoded.
        streams: event streams at a time.
        poll_s, keepalive_s: how often an event stream looks, and how long it is ever silent.
    """

    queue: int = 32
    seconds: float = 4 * 3600.0
    body_bytes: int = 2**20
    upload_bytes: int = 256 * 2**20
    uploads: int = 4
    decoders: int = 2
    fields: int = 32
    read_s: float = 300.0
    decode_s: float = 6.0
    streams: int = 64
    poll_s: float = 0.2
    keepalive_s: float = 15.0


@dataclass(frozen=True)
class Wanted:
    """A request, and what the server is to do beside making it.

    Attributes:
        keep: see `JobStore.submit`.
    """

    request: VideoRequest
    keep: bool


class CreateVideo(VideoRequest):
    """A video as a client asks for it: the fields of every request, `size` for `width` and `height`, and how
    the server is to treat it."""

    size: str | None = Field(
        default=None,
        pattern=r"^[1-9][0-9]{0,4}x[1-9][0-9]{0,4}$",
        description="WIDTHxHEIGHT in pixels; by default the model's own.",
    )
    keep: bool = Field(
        default=False,
        description="Keep what it is made from after its end, so that it can be extended and branched.",
    )
    until_stopped: bool = Field(
        default=False, description="Go on until somebody finishes it, at most as long as this server allows."
    )

    @classmethod
    def read(cls, values: Any, most_seconds: float) -> Wanted:
        """A request from what was sent.

        Args:
            most_seconds: length of a video that is to go on until it is stopped.

        Raises:
            Refused: naming the first field that cannot be used.
        """
        if not isinstance(values, Mapping):
            raise Refused(422, "invalid_value", "the body is not a JSON object; give one with a prompt")
        for name in sorted(FROM_FILES & values.keys()):
            raise Refused(
                422, "unknown_field",
                f"{name}={shown(values[name])}: no path or address is taken from a request; leave it out"
                + (f" and upload the file as {UPLOAD}" if name != "out" else ""), name,
            )  # fmt: skip
        if UPLOAD in values:
            raise Refused(
                422, "invalid_value",
                f"{UPLOAD}={shown(values[UPLOAD])}: nothing is fetched; upload the file itself in a "
                "multipart/form-data body", UPLOAD,
            )  # fmt: skip
        try:
            wanted = cls.model_validate(dict(values))
        except ValidationError as error:
            field, message = next(iter(faults(error, cls)))
            raise Refused(422, "invalid_value", message, field) from None
        given = wanted.model_dump(exclude_unset=True, exclude={"size", "keep", "until_stopped"})
        if wanted.until_stopped:
            if "seconds" in values:
                raise Refused(422, "invalid_value", "give seconds or until_stopped, not both", "seconds")
            given["seconds"] = most_seconds
        if wanted.size is not None:
            if wanted.width is not None or wanted.height is not None:
                raise Refused(422, "invalid_value", "give size, or width and height, not both", "size")
            width, height = wanted.size.split("x")
            given |= {"width": int(width), "height": int(height)}
        try:
            return Wanted(VideoRequest.model_validate(given), wanted.keep)
        except ValidationError as error:
            # `size` has room for sides that the others refuse
            raise Refused(422, "invalid_value", first_fault(error, VideoRequest), "size") from None

    @classmethod
    def schemas(cls) -> dict[str, dict[str, Any]]:
        """OpenAPI schemas by name: of a JSON body, of a form, and of what they refer to."""
        schema = cls.model_json_schema(ref_template="#/components/schemas/{model}")
        defined = schema.pop("$defs", {})
        fields = {name: part for name, part in schema["properties"].items() if name not in FROM_FILES}
        schema["properties"] = fields
        texts = {
            name: {"type": "string", "description": part["description"]} for name, part in fields.items()
        }
        upload = {"type": "string", "format": "binary", "description": "A picture or a video to start from."}
        form = schema | {"title": "CreateVideoForm", "properties": texts | {UPLOAD: upload}}
        return {**defined, "CreateVideo": schema, "CreateVideoForm": form}


class VideoError(BaseModel):
    """Why a video failed."""

    code: str
    message: str


class Origin(BaseModel):
    """What a video goes on from."""

    id: str
    chunk: int


class Video(BaseModel):
    """A job as its clients see it.

    `created_at` and `completed_at` are seconds since 1970; `chunks` are made one after the other.
    `schedule` has [second, prompt, switch] of prompts that take over later, with what was steered in so far.
    `place` is the one in the queue, 1 for the next.
    """

    id: str
    object: Literal["video"] = "video"
    model: str
    status: Status
    progress: int = Field(ge=0, le=100)
    created_at: int
    completed_at: int | None
    seconds: str
    size: str | None
    prompt: str
    error: VideoError | None
    chunks: int
    chunks_done: int
    frames: int
    fps: float | None
    eta_s: float | None
    kv_bytes: int | None
    drift: dict[str, float] | None
    schedule: list[tuple[float, str, Switch | None]]
    seed: int
    cache: str
    frame_rate: int | None
    keep: bool
    parent: Origin | None
    until_stopped: bool
    place: int | None
    has_partial: bool

    @classmethod
    def of(
        cls, job: Job, hide: Callable[[str], str] = str, *, cache: str = "", most_seconds: float = math.inf,
        place: int | None = None, has_partial: bool = False,
    ) -> Video:  # fmt: skip
        """The job's row, without what concerns the server alone.

        Args:
            hide: takes the server's paths out of a message.
            cache: its cache settings on one line.
            most_seconds: that this server allows.
        """
        request, progress = job.request, job.progress
        model = str(request.get("model", "bounce"))
        entry, size = MODELS.get(model), (request.get("height"), request.get("width"))
        if entry is not None:
            size = pixel_size(entry, *size)
        done = 100 if job.state is State.DONE else min(99, 100 * job.done // max(1, job.chunks))
        failed, running = job.state is State.FAILED, job.state is State.RUNNING
        drift = {k: v for k, v in progress.get("drift", {}).items() if math.isfinite(v)}
        timed = _prompts(request, progress.get("steered", ()))
        seconds = float(request.get("seconds", 10.0))
        return cls(
            id=job.id, model=model if entry else Path(model).name, status=STATUSES[job.state], progress=done,
            created_at=int(job.submitted), completed_at=int(job.changed) if job.ended else None,
            seconds=f"{seconds:g}", size=f"{size[1]}x{size[0]}" if None not in size else None,
            prompt=timed[0][1],
            error=VideoError(code="failed", message=hide(job.error or "unknown")) if failed else None,
            chunks=job.chunks, chunks_done=job.done, frames=job.frames, fps=_finite(progress.get("fps")),
            eta_s=_finite(progress.get("eta_s")) if running and progress.get("fps") else None,
            kv_bytes=progress.get("kv_bytes"), drift=drift or None,
            schedule=[(entry[0], entry[1], entry[2] if len(entry) > 2 else None) for entry in timed[1:]],
            seed=int(request.get("seed", 0)), cache=cache,
            frame_rate=entry.fps if entry else None, keep=job.keep,
            parent=Origin.model_validate(job.parent) if job.parent else None,
            until_stopped=seconds >= most_seconds, place=place, has_partial=has_partial,
        )  # fmt: skip


class VideoList(BaseModel):
    """A page of jobs."""

    object: Literal["list"] = "list"
    data: list[Video]
    first_id: str | None
    last_id: str | None
    has_more: bool


class DeletedVideo(BaseModel):
    """What is left of a job."""

    id: str
    object: Literal["video.deleted"] = "video.deleted"
    deleted: Literal[True] = True


class Model(BaseModel):
    """A model whose weights are here."""

    id: str
    object: Literal["model"] = "model"
    owned_by: str
    size: str
    fps: int


class ModelList(BaseModel):
    """All that are here."""

    object: Literal["list"] = "list"
    data: list[Model]


class Health(BaseModel):
    """Whether jobs are being done."""

    status: Literal["ok"] = "ok"
    version: str


class Fault(BaseModel):
    """What is wrong.

    `param` is the field that it is about.
    """

    code: str
    message: str
    param: str | None = None


class Faulty(BaseModel):
    """Every answer from 400 on."""

    error: Fault


class Refused(Exception):
    """A request that is not done.

    Attributes:
        retry_s: when to try again.
    """

    def __init__(
        self, status: int, code: str, message: str, param: str | None = None, retry_s: int | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:  # fmt: skip
        super().__init__(message)
        self.status, self.code, self.param, self.retry_s = status, code, param, retry_s
        self.headers = headers or {}

    def response(self) -> JSONResponse:
        # half a character has no UTF-8 form
        message = str(self).encode(errors="backslashreplace").decode()[:MAX_MESSAGE]
        headers = dict(self.headers)
        if self.retry_s is not None:
            headers["Retry-After"] = str(self.retry_s)
        if self.status == 401:
            headers["WWW-Authenticate"] = 'Bearer realm="vidkv"'
        fault = Fault(code=self.code, message=message, param=self.param)
        return JSONResponse({"error": fault.model_dump()}, self.status, headers)


class Guard:
    """In front of everything: who may ask, under which name, and that no answer is a traceback.

    Args:
        hosts: names in the Host header that are the server's own; None: any.
    """

    def __init__(self, app: ASGIApp, token: str | None, hosts: Collection[str] | None) -> None:
        self.app, self.hosts, self.token = app, hosts, token

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        begun = False

        async def answer(message: Message) -> None:
            nonlocal begun
            if message["type"] == "http.response.start":
                begun = True
                headers = MutableHeaders(scope=message)
                headers["X-Content-Type-Options"] = "nosniff"
                headers["Cross-Origin-Resource-Policy"] = "same-origin"
            await send(message)

        try:
            self._check(scope)
            await self.app(scope, receive, answer)
        except Refused as refused:
            await refused.response()(scope, receive, answer)
        except ClientDisconnect:
            LOG.debug("the client has gone")
        except Exception:
            LOG.exception("%s %s", scope["method"], ascii(scope["path"]))
            if not begun:
                internal = Refused(500, "internal", "something is wrong in the server; its log says what")
                await internal.response()(scope, receive, answer)

    def _check(self, scope: Scope) -> None:
        headers: list[tuple[bytes, bytes]] = scope["headers"]
        if len(headers) > MAX_HEADERS:
            raise Refused(431, "too_many_headers", f"{len(headers)} headers; send at most {MAX_HEADERS}")
        if self.hosts is not None:
            self._check_names(scope, headers, self.hosts)
        if self.token is not None and scope["path"] not in ("/health", LOGIN):
            given = [value for name, value in headers if name == b"authorization"]
            scheme, _, token = given[0].partition(b" ") if len(given) == 1 else (b"", b"", b"")
            if scheme.lower() == b"bearer" and hmac.compare_digest(token.strip(), self.token.encode()):
                return
            if has_session(headers, self.token):
                # a browser sends the cookie whoever makes it ask
                self._check_names(scope, headers, None)
                return
            # a person's browser is shown where to log in
            asked = b"text/html" in b"".join(value for name, value in headers if name == b"accept")
            page = asked and scope["path"] == "/" and scope["method"] == "GET"
            raise Refused(
                303 if page else 401, "unauthorized", "send the header Authorization: Bearer TOKEN",
                headers={"Location": LOGIN} if page else None,
            )  # fmt: skip

    def _check_names(
        self, scope: Scope, headers: list[tuple[bytes, bytes]], hosts: Collection[str] | None
    ) -> None:
        """Refuse what a page of another site makes a browser send.

        Its requests carry an Origin that is not this server, or, if its name was made to resolve to this
        machine, a Host that is not.
        """
        names = [value.decode("latin-1") for name, value in headers if name == b"host"]
        host = re.fullmatch(r"(\[[0-9a-fA-F:.]+\]|[^:/@\[\]]+)(:[0-9]{1,5})?", names[0] if names else "")
        known = host is not None and (hosts is None or host[1].lower() in hosts)
        if len(names) != 1 or not known:
            own = ", ".join(sorted(hosts or ()))
            raise Refused(403, "wrong_host", f"Host {shown(', '.join(names))} is not this server; use {own}")
        own = f"{scope['scheme']}://{names[0]}".lower()
        for name, value in headers:
            text = value.decode("latin-1").lower()
            foreign = (name == b"origin" and text != own) or (
                name == b"sec-fetch-site" and text in ("cross-site", "same-site")
            )
            if foreign:
                raise Refused(403, "wrong_origin", "pages of other sites may not use this server")


class Media(FileResponse):
    """A file that answers to Range; one that cannot be satisfied is refused in the shape of all errors."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        unsatisfied: Refused | None = None

        async def shaped(message: Message) -> None:
            nonlocal unsatisfied
            if message["type"] == "http.response.start" and message["status"] >= 400:
                unsatisfied = Refused(
                    message["status"], "bad_range", "no such range; ask for bytes=FIRST-LAST"
                )
                return
            if unsatisfied is None:
                await send(message)

        await super().__call__(scope, receive, shaped)
        if unsatisfied is not None:
            response = unsatisfied.response()
            size = self.stat_result.st_size if self.stat_result else 0
            response.headers["Content-Range"] = f"bytes */{size}"
            await response(scope, receive, send)


class Uploads:
    """Files that clients sent, each under the SHA-256 of its content.

    Args:
        folder: made by the first upload.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._lock = threading.Lock()
        self._held: Counter[Path] = Counter()

    def receive(self, most: int) -> Incoming:
        """A file to write to, of at most so many bytes."""
        self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        return Incoming(self.folder / f".{uuid.uuid4().hex}.part", most)

    def hold(self, incoming: Incoming) -> Path:
        """Store a complete file; it stays at least until `release`."""
        path = self.folder / incoming.digest.hexdigest()
        incoming.file.close()
        with self._lock:
            os.replace(incoming.path, path)
            self._held[path] += 1
        return path

    def release(self, path: Path, store: JobStore) -> None:
        """Delete a file that no job names and nobody else holds."""
        with self._lock:
            self._held[path] -= 1
            if not +self._held[path]:
                del self._held[path]
                if path not in named(store.jobs()):
                    path.unlink(missing_ok=True)

    def drop(self, job: Job, store: JobStore) -> None:
        """Delete what a job that is gone was the last to start from."""
        for path in named([job]):
            if path.parent == self.folder:
                with self._lock:
                    self._held[path] += 1
                self.release(path, store)

    def sweep(self, store: JobStore) -> None:
        """Delete what an earlier server left and no job names."""
        if not self.folder.is_dir():
            return
        kept = named(store.jobs())
        for entry in os.scandir(self.folder):
            old = time.time() - entry.stat(follow_symlinks=False).st_mtime > UNUSED_S
            if old and Path(entry.path) not in kept and not entry.is_dir(follow_symlinks=False):
                Path(entry.path).unlink(missing_ok=True)


class Incoming:
    """A file while it arrives."""

    def __init__(self, path: Path, most: int) -> None:
        self.path, self.most, self.size = path, most, 0
        self.digest = hashlib.sha256()
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        self.file = os.fdopen(descriptor, "wb")

    def write(self, data: bytes) -> None:
        """More of it.

        Raises:
            Refused: it is too large.
        """
        self.size += len(data)
        if self.size > self.most:
            raise Refused(
                413, "too_large", f"the file has more than {self.most:,} bytes; scale or cut it down", UPLOAD
            )
        self.digest.update(data)
        self.file.write(data)

    def discard(self) -> None:
        """Close it; delete it if nobody has stored it."""
        # what could not be written is of no use any more
        with contextlib.suppress(OSError):
            self.file.close()
        self.path.unlink(missing_ok=True)


class Form:
    """A multipart body, read piece by piece: text fields in memory, one file on disk.

    Args:
        boundary: of the parts.

    Attributes:
        fields: texts by name.
        upload: the file.
    """

    def __init__(self, boundary: bytes, limits: ApiLimits, uploads: Uploads) -> None:
        self.limits, self.uploads = limits, uploads
        self.fields: dict[str, str] = {}
        self.upload: Incoming | None = None
        self.complete = False
        self._name, self._parts, self._texts_bytes = "", 0, 0
        self._header, self._value, self._disposition = b"", b"", b""
        self._text: bytearray | None = None
        self._parser = MultipartParser(
            boundary,
            {
                "on_part_begin": self._part_begin,
                "on_header_field": self._header_field,
                "on_header_value": self._header_value,
                "on_header_end": self._header_end,
                "on_headers_finished": self._headers_finished,
                "on_part_data": self._part_data,
                "on_part_end": self._part_end,
                "on_end": self._end,
            },
        )

    def write(self, data: bytes) -> None:
        """More of the body.

        Raises:
            Refused: it is no such form, or exceeds a limit.
        """
        try:
            self._parser.write(data)
        except FormParserError as error:
            raise Refused(400, "bad_form", printable(f"the form cannot be read: {error}", 300)) from None

    def discard(self) -> None:
        """Delete the file unless it was stored."""
        if self.upload is not None:
            self.upload.discard()

    def _part_begin(self) -> None:
        self._parts += 1
        if self._parts > self.limits.fields:
            raise Refused(413, "too_many_fields", f"more than {self.limits.fields} fields; send fewer")
        self._header, self._value, self._disposition = b"", b"", b""

    def _header_field(self, data: bytes, start: int, end: int) -> None:
        self._header += data[start:end]

    def _header_value(self, data: bytes, start: int, end: int) -> None:
        self._value += data[start:end]

    def _header_end(self) -> None:
        if self._header.lower() == b"content-disposition":
            self._disposition = self._value
        self._header, self._value = b"", b""

    def _headers_finished(self) -> None:
        _, options = parse_options_header(self._disposition)
        self._name = _utf8(options.get(b"name", b""), "a field's name")
        if not self._name:
            raise Refused(
                400, "bad_form", "a part of the form has no name; send Content-Disposition with one"
            )
        if self._name in self.fields or (self._name == UPLOAD and self.upload is not None):
            raise Refused(422, "invalid_value", f"{printable(self._name, 40)} is given twice; keep one",
                          printable(self._name, 40))  # fmt: skip
        # the name that the client gave its file is not even looked at
        if self._name == UPLOAD and b"filename" in options:
            self._text, self.upload = None, self.uploads.receive(self.limits.upload_bytes)
        elif b"filename" in options:
            name = printable(self._name, 40)
            raise Refused(422, "invalid_value", f"{name} is a file; only {UPLOAD} may be one", name)
        else:
            self._text = bytearray()

    def _part_data(self, data: bytes, start: int, end: int) -> None:
        if self._text is None:
            cast(Incoming, self.upload).write(data[start:end])
            return
        self._texts_bytes += end - start
        if self._texts_bytes > self.limits.body_bytes:
            raise _too_large(self.limits.body_bytes)
        self._text += data[start:end]

    def _part_end(self) -> None:
        if self._text is not None:
            self.fields[self._name] = _utf8(bytes(self._text), printable(self._name, 40))

    def _end(self) -> None:
        self.complete = True


class Service:
    """What the routes do, apart from HTTP.

    Attributes:
        stopping: asked by event streams; true ends them.
        ailing: why jobs are not being done, or None.
    """

    def __init__(self, store: JobStore, settings: EngineSettings, limits: ApiLimits) -> None:
        self.store, self.settings, self.limits = store, settings, limits
        # jobs name their files, from whatever folder a worker was started in
        self.uploads = Uploads(store.home.resolve() / "uploads")
        self.stopping: Callable[[], bool] = lambda: False
        self.ailing: Callable[[], str | None] = lambda: None
        self.streams = self.receiving = 0
        # files are decoded in processes of their own, each up to gigabytes large
        self.decoders, self.planners = CapacityLimiter(limits.decoders), CapacityLimiter(8)
        self._paths = sorted({str(store.root), str(store.root.resolve())}, key=len, reverse=True)

    def find(self, id: str) -> Job:
        """A job.

        Raises:
            Refused: there is none.
        """
        if re.fullmatch(ID_PATTERN, id):
            with contextlib.suppress(InputError):
                return self.store.get(id)
        raise Refused(404, "not_found", f"there is no video {shown(id)}; GET /v1/videos lists them", "id")

    def show(self, job: Job) -> Video:
        """A job as its clients see it."""
        place = None
        if job.state is State.QUEUED:
            place = sum(other.number <= job.number for other in self.store.jobs([State.QUEUED]))
        partial = job.state is not State.DONE and partial_video(self.store.file(job)).is_file()
        cache = ""
        entry = MODELS.get(str(job.request.get("model", "bounce")))
        if entry is not None:
            with contextlib.suppress(VidkvError):
                spec = cache_spec(entry, job.request.get("cache") or {}, pick_device(self.settings.device))
                cache = str(spec)
        return Video.of(
            job, self.hide, cache=cache, most_seconds=self.limits.seconds, place=place, has_partial=partial
        )  # fmt: skip

    def hide(self, text: str) -> str:
        """A message without the place of the output folder."""
        for path in self._paths:
            if len(path) > 1:
                text = text.replace(path, "OUT")
        return text

    def require_room(self, id: str | None) -> None:
        """Say no before anything costs time.

        Raises:
            QueueFull: there is no room for a job that is not here.
        """
        counts = self.store.counts()
        waiting = counts[State.QUEUED] + counts[State.RUNNING] + counts[State.PAUSED]
        if waiting >= self.limits.queue:
            with contextlib.suppress(InputError):
                if id is not None:
                    self.store.get(id)
                    return
            raise QueueFull(f"{waiting} videos are waiting and the queue takes {self.limits.queue}")

    def retry_s(self) -> int:
        """When the first place in the queue is likely to be free."""
        now = time.time()
        left = [
            job.progress["eta_s"] - (now - job.changed)
            for job in self.store.jobs([State.RUNNING])
            if job.progress.get("eta_s")
        ]
        return max(1, min(3600, math.ceil(min(left)))) if left else RETRY_S

    def read(self, values: Any) -> Wanted:
        """A request from what was sent, if this server takes such.

        Raises:
            Refused: it does not.
        """
        wanted = CreateVideo.read(values, self.limits.seconds)
        request = wanted.request
        if request.model not in (here := installed()):
            raise Refused(
                422,
                "unknown_model",
                f"model={shown(request.model)} is not here; use {', '.join(here)}",
                "model",
            )
        self.require_seconds(request.seconds)
        return wanted

    def require_seconds(self, seconds: float) -> None:
        """Refuse videos that are too long.

        Raises:
            Refused: it is.
        """
        if seconds > self.limits.seconds:
            most = f"this server makes at most {self.limits.seconds:g}"
            raise Refused(422, "invalid_value", f"seconds={seconds:g}: {most}", "seconds")

    def create(self, values: Any, incoming: Incoming | None = None) -> Job:
        """Queue a video.

        Raises:
            Refused, VidkvError: it cannot be made.
            QueueFull: not now.
        """
        wanted = self.read(values)
        request = wanted.request
        self.require_room(request.id)
        if incoming is None:
            return self._submit(plan(request, self.settings), wanted.keep)
        path = self.uploads.hold(incoming)
        try:
            return self._submit(self._started_from(path, request), wanted.keep)
        finally:
            self.uploads.release(path, self.store)

    def _started_from(self, path: Path, request: VideoRequest) -> Plan:
        """The plan of a request with a file whose pixels have been seen."""
        limits = replace(intake.LIMITS, max_video_bytes=self.limits.upload_bytes, wall_s=self.limits.decode_s)
        try:
            kind = intake.kind_of(path)
        except InputError as error:
            raise Refused(415, "unsupported_media", _nameless(path, error), UPLOAD) from None
        planned = plan(request.model_copy(update={kind: path}), self.settings)
        try:
            if kind == "image":
                intake.picture(path, *planned.size, limits)
            else:
                intake.video_end(path, 4 * planned.spec.window, *planned.size, limits)
        except InputError as error:
            raise Refused(422, "invalid_media", _nameless(path, error), UPLOAD) from None
        return planned

    def _submit(self, planned: Plan, keep: bool) -> Job:
        return self.store.submit_plan(planned, most=self.limits.queue, again=True, keep=keep)

    def page(self, limit: int, after: str | None, order: Literal["asc", "desc"]) -> VideoList:
        """Some jobs, in the order they were submitted or against it."""
        cursor = None if after is None else self.find(after).number
        if order == "asc":
            jobs = self.store.jobs(most=limit + 1, after=cursor or 0)
        else:
            jobs = newest(self.store, limit + 1, cursor)
        videos = [self.show(job) for job in jobs[:limit]]
        first, last = (videos[0].id, videos[-1].id) if videos else (None, None)
        return VideoList(data=videos, first_id=first, last_id=last, has_more=len(jobs) > limit)

    def file(self, id: str, variant: Literal["video", "partial"]) -> tuple[Path, os.stat_result]:
        """A complete file to send.

        Raises:
            Refused: there is none, or not yet.
        """
        job = self.find(id)
        path, root = self.store.file(job), self.store.root.resolve()
        status = STATUSES[job.state]
        if variant == "partial":
            path = partial_video(path)
        elif job.state is not State.DONE:
            raise Refused(
                409, f"video_{status}",
                f"video {id} is {status} ({job.done} of {job.chunks} chunks): "
                + ("it has no video; POST it again" if job.ended else f"wait for GET /v1/videos/{id}/events"),
            )  # fmt: skip
        # whoever may write to the folder could have put a link there
        if not path.is_file() or root not in path.resolve().parents:
            remedy = "POST the same request to make it again" if variant == "video" else "ask for the video"
            raise Refused(404, "no_file", f"video {id} is {status} and has no such file; {remedy}", "id")
        return path, path.stat()

    def delete(self, id: str) -> DeletedVideo:
        """Forget a job.

        Raises:
            Refused: it is running, or there is none.
        """
        job = self.find(id)
        try:
            self.store.delete(id)
        except InputError as error:
            self.find(id)
            raise Refused(409, "video_in_progress", str(error)) from None
        self.uploads.drop(job, self.store)
        return DeletedVideo(id=id)

    async def receive(self, request: Request) -> tuple[Any, Form | None]:
        """The fields of a body, and the form if it was one.

        Raises:
            Refused: it is too large, too slow, or of no known kind.
        """
        kind, options = parse_options_header(request.headers.get("content-type"))
        try:
            async with asyncio.timeout(self.limits.read_s):
                if kind == b"application/json":
                    return await self._json(request), None
                if kind == b"multipart/form-data":
                    return await self._form(request, options.get(b"boundary", b""))
        except TimeoutError:
            raise Refused(408, "too_slow", f"the body took more than {self.limits.read_s:g} s") from None
        raise Refused(
            415, "unsupported_media",
            f"content-type={shown(kind.decode('latin-1'))}; send application/json or multipart/form-data",
        )  # fmt: skip

    async def fields(self, request: Request) -> Any:
        """The value of a JSON body.

        Raises:
            Refused: as of `receive`.
        """
        kind, _ = parse_options_header(request.headers.get("content-type"))
        if kind != b"application/json":
            text = shown(kind.decode("latin-1"))
            raise Refused(415, "unsupported_media", f"content-type={text}; send application/json")
        try:
            async with asyncio.timeout(self.limits.read_s):
                return await self._json(request)
        except TimeoutError:
            raise Refused(408, "too_slow", f"the body took more than {self.limits.read_s:g} s") from None

    async def _json(self, request: Request) -> Any:
        body = bytearray()
        # what Content-Length says is not trusted
        async for piece in request.stream():
            body += piece
            if len(body) > self.limits.body_bytes:
                raise _too_large(self.limits.body_bytes)
        try:
            return read_json(_utf8(bytes(body), "the body"))
        except ValueError as error:
            raise Refused(400, "bad_json", f"the body is not JSON: {printable(str(error), 300)}") from None

    async def _form(self, request: Request, boundary: bytes) -> tuple[Any, Form]:
        if not 1 <= len(boundary) <= 70:
            raise Refused(400, "bad_form", "the form needs a boundary of 1 to 70 characters")
        # the file is large: a queue that is full need not receive it
        await aside(self.require_room, None)
        if self.receiving >= self.limits.uploads:
            raise Refused(429, "too_many_uploads", f"{self.receiving} uploads are under way; try again later",
                          retry_s=RETRY_S)  # fmt: skip
        self.receiving += 1
        form = Form(boundary, self.limits, self.uploads)
        try:
            async for piece in request.stream():
                await aside(form.write, piece)
            if not form.complete:
                raise Refused(400, "bad_form", "the form ends in the middle; send it whole")
        except BaseException:
            form.discard()
            raise
        finally:
            self.receiving -= 1
        return form.fields, form

    async def events(self, id: str) -> AsyncIterator[str]:
        """Server-sent events: the video whenever it has changed, until it has ended or is gone."""
        self.streams += 1
        try:
            version, silent_since = -1, time.monotonic()
            while not self.stopping():
                try:
                    job = await aside(self.find, id)
                except Refused:
                    yield f"event: deleted\ndata: {DeletedVideo(id=id).model_dump_json()}\n\n"
                    return
                now = time.monotonic()
                if job.version != version:
                    version, silent_since = job.version, now
                    shown = await aside(self.show, job)
                    yield f"id: {version}\ndata: {shown.model_dump_json()}\n\n"
                elif now - silent_since >= self.limits.keepalive_s:
                    silent_since = now
                    yield ": still there\n\n"
                if job.ended:
                    return
                await asyncio.sleep(self.limits.poll_s)
        finally:
            self.streams -= 1


def create_app(
    store: JobStore, *, settings: EngineSettings, token: str | None, limits: ApiLimits,
    hosts: Collection[str] | None = None,
) -> FastAPI:  # fmt: skip
    """The application.

    Its `state.service` is a `Service`; who runs the server sets `stopping` and `ailing` there.

    Args:
        settings: how videos are made; no request changes it.
        token: that requests must bear; None: requests must come under a name of this machine.
        hosts: those names; by default the loopback's. With a token any will do.
    """
    service = Service(store, settings, limits)
    service.uploads.sweep(store)
    app = FastAPI(
        title="vidkv", version=vidkv.__version__, docs_url=None, redoc_url=None, redirect_slashes=False
    )  # fmt: skip
    app.state.service = service
    app.add_middleware(Guard, token=token, hosts=None if token is not None else frozenset(hosts or LOOPBACK))
    _add_handlers(app, service)
    _add_creation(app, service)
    _add_routes(app, service)
    _add_others(app, service)
    # they stand on this module
    from vidkv.apps.compare import add_compare_routes
    from vidkv.apps.live import add_live_routes
    from vidkv.apps.steering import add_steering_routes

    for add in (add_steering_routes, add_live_routes, add_compare_routes):
        add(app, service)
    if token is not None:
        add_login(app, token)
    app.openapi = partial(_openapi, app)  # type: ignore[method-assign]
    return app


def faulty(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """Responses of a route besides success; the first ones may come from any."""
    reasons = {
        400: "Malformed", 401: "No token, or a wrong one", 403: "From another site", 404: "There is none",
        405: "Another method", 408: "Too slow", 409: "Not in this state", 413: "Too large",
        415: "Unsupported media", 416: "No such range", 422: "A field cannot be used",
        429: "Full; see Retry-After", 431: "Too many headers", 500: "A mistake in the server",
        503: "Not now", 507: "No room",
    }  # fmt: skip
    codes = {400, 401, 403, 422, 431, 500, 503, *statuses}
    return {code: {"model": Faulty, "description": reasons[code]} for code in sorted(codes)}


def _add_handlers(app: FastAPI, service: Service) -> None:
    """Errors that are the client's or the machine's, each with its status."""

    def answer(*kinds: type[Exception]) -> Callable[[Callable[[Any], Refused]], None]:
        def add(make: Callable[[Any], Refused]) -> None:
            def handle(_: Request, error: Exception) -> Response:
                refused = make(error)
                if refused.status >= 500:
                    LOG.error("%s: %s", type(error).__name__, error)
                return refused.response()

            for kind in kinds:
                app.add_exception_handler(kind, handle)

        return add

    @answer(Refused)
    def _(error: Refused) -> Refused:
        return error

    @answer(QueueFull)
    def _(error: QueueFull) -> Refused:
        return Refused(429, "queue_full", str(error), retry_s=service.retry_s())

    @answer(OutputError)
    def _(error: OutputError) -> Refused:
        return Refused(507, "no_room", service.hide(str(error)), retry_s=60)

    @answer(VidkvError)
    def _(error: VidkvError) -> Refused:
        conflict = isinstance(error, StateError)
        message = printable(service.hide(str(error)), MAX_MESSAGE)
        return Refused(409 if conflict else 422, "wrong_state" if conflict else "invalid_value", message)

    @answer(sqlite3.Error, OSError)
    def _(error: Exception) -> Refused:
        return Refused(503, "storage", "the server cannot use its storage now; try again later", retry_s=60)

    @answer(RequestValidationError)
    def _(error: RequestValidationError) -> Refused:
        fault = error.errors()[0]
        name = printable(str(fault["loc"][-1]), 40)
        return Refused(422, "invalid_value", f"{name}={shown(fault['input'])}: {fault['msg']}", name)

    @answer(HTTPException)
    def _(error: HTTPException) -> Refused:
        code = {404: "not_found", 405: "wrong_method"}.get(error.status_code, "bad_request")
        message = printable(str(error.detail), 200)
        return Refused(error.status_code, code, message, headers=error.headers)


def _add_creation(app: FastAPI, service: Service) -> None:
    contents = {
        "application/json": {"schema": {"$ref": "#/components/schemas/CreateVideo"}},
        "multipart/form-data": {"schema": {"$ref": "#/components/schemas/CreateVideoForm"}},
    }

    @app.post(
        "/v1/videos", responses=faulty(408, 413, 415, 422, 429, 507),
        openapi_extra={"requestBody": {"required": True, "content": contents}},
    )  # fmt: skip
    async def create_video(request: Request) -> Video:
        """Queue a video. The same request again is the same video."""
        require_workers(service)
        values, form = await service.receive(request)
        incoming = form.upload if form else None
        try:
            limiter = service.decoders if incoming else service.planners
            job = await aside(service.create, values, incoming, limiter=limiter)
        finally:
            if form:
                form.discard()
        return await aside(service.show, job)


def _add_routes(app: FastAPI, service: Service) -> None:
    """Of jobs that are there. Plain functions run in threads: they wait for the index on disk."""

    @app.get("/v1/videos", responses=faulty(404, 422))
    def list_videos(
        limit: Annotated[int, Query(ge=1, le=100)] = 20,
        after: Annotated[
            str | None, Query(max_length=80, description="The last id of the page before.")
        ] = None,
        order: Literal["asc", "desc"] = "desc",
    ) -> VideoList:
        """Videos by when they were submitted."""
        return service.page(limit, after, order)

    @app.get("/v1/videos/{id}", responses=faulty(404))
    def get_video(id: str) -> Video:
        """How far it is."""
        return service.show(service.find(id))

    @app.delete("/v1/videos/{id}", responses=faulty(404, 409))
    def delete_video(id: str) -> DeletedVideo:
        """Forget it, with its file; not while it runs."""
        return service.delete(id)

    @app.post("/v1/videos/{id}/cancel", responses=faulty(404, 409, 507))
    def cancel_video(id: str) -> Video:
        """Stop it within a denoising step; what is finished stays as its partial video."""
        service.find(id)
        return service.show(service.store.cancel(id))

    streamed = {"content": {"text/event-stream": {"schema": {"type": "string"}}}, "description": "Events"}
    known = {"description": "It has ended and the client knows"}

    @app.get(
        "/v1/videos/{id}/events", response_class=StreamingResponse,
        responses={200: streamed, 204: known, **faulty(404, 429)},
    )  # fmt: skip
    async def watch_video(id: str, request: Request) -> Response:
        """Server-sent events: the video whenever it has changed, until it has ended."""
        job = await aside(service.find, id)
        # browsers reconnect after the end; this stops them
        if job.ended and request.headers.get("last-event-id") == str(job.version):
            return Response(status_code=204)
        if service.streams >= service.limits.streams:
            raise Refused(429, "too_many_streams", f"{service.streams} streams are open; close one",
                          retry_s=RETRY_S)  # fmt: skip
        headers = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}
        return StreamingResponse(service.events(id), media_type="text/event-stream", headers=headers)

    sent = {"content": {"video/mp4": {"schema": {"type": "string", "format": "binary"}}}}
    whole, part = {**sent, "description": "The mp4"}, {**sent, "description": "The range asked for"}

    def get_content(id: str, variant: Literal["video", "partial"] = "video") -> Media:
        """The mp4, once it is complete; or what there is of one that was stopped."""
        path, state = service.file(id, variant)
        name = f"{id}.mp4" if variant == "video" else f"{id}.partial.mp4"
        headers = {"Cache-Control": "private, no-cache"}
        return Media(
            path, media_type="video/mp4", filename=name, content_disposition_type="inline", stat_result=state,
            headers=headers,
        )  # fmt: skip

    app.get(
        "/v1/videos/{id}/content", response_class=Media,
        responses={200: whole, 206: part, **faulty(404, 409, 416, 422)},
    )(get_content)  # fmt: skip
    app.head("/v1/videos/{id}/content", response_class=Media, include_in_schema=False)(get_content)


def _add_others(app: FastAPI, service: Service) -> None:
    @app.get("/health", responses=faulty())
    def health() -> Health:
        """Whether jobs are being done."""
        require_workers(service)
        return Health(version=vidkv.__version__)

    @app.get("/v1/models", responses=faulty())
    def list_models() -> ModelList:
        """Models that can be asked for."""
        rows = [row for row in models_report() if row["here"]]
        return ModelList(
            data=[
                Model(id=row["name"], owned_by=row["repository"] or "vidkv", size=row["size"], fps=row["fps"])
                for row in rows
            ]
        )


def _openapi(app: FastAPI) -> dict[str, Any]:
    """The description of the routes, with the body that `create_video` reads by itself."""
    if app.openapi_schema is None:
        schema = get_openapi(
            title=app.title, version=app.version, openapi_version=app.openapi_version, routes=app.routes
        )
        schemas = schema.setdefault("components", {}).setdefault("schemas", {})
        schemas.update(CreateVideo.schemas())
        app.openapi_schema = schema
    return app.openapi_schema


def require_workers(service: Service) -> None:
    why = service.ailing()
    if why is not None:
        raise Refused(503, "no_workers", f"no videos are being made: {why}", retry_s=60)


def installed() -> list[str]:
    """Names of the models whose weights are here."""
    return [row["name"] for row in models_report() if row["here"]]


def named(jobs: Collection[Job]) -> set[Path]:
    """Files that jobs start from."""
    given = (job.request.get(field) for job in jobs for field in ("image", "video"))
    return {Path(str(path)) for path in given if path}


def newest(store: JobStore, most: int, before: int | None = None) -> list[Job]:
    """The last jobs first.

    Numbers grow but have gaps where jobs were deleted, and the store reads forwards: so backwards in ever
    longer steps.

    Args:
        before: only jobs with lower numbers.
    """
    top = (before - 1) if before is not None else _last_number(store)
    found: list[Job] = []
    step = most
    while top > 0 and len(found) < most:
        bottom = max(0, top - step)
        found += [job for job in reversed(store.jobs(after=bottom, most=top - bottom)) if job.number <= top]
        top, step = bottom, 2 * step
    return found[:most]


def _last_number(store: JobStore) -> int:
    low, step = 0, 1
    while store.jobs(after=low + step, most=1):
        low, step = low + step, 2 * step
    while step > 1:
        step //= 2
        if store.jobs(after=low + step, most=1):
            low += step
    return low + 1


def _finite(value: Any) -> float | None:
    return value if isinstance(value, int | float) and math.isfinite(value) else None


def _prompts(request: Mapping[str, Any], steered: Sequence[Any]) -> list[TimedPrompt]:
    """All prompts of a job, those that were steered in included; what cannot be read is left out."""
    with contextlib.suppress(VidkvError, ValueError, TypeError):
        return list(VideoRequest.of(request).steered((s, text, way) for s, text, way in steered).prompts)
    return [(0.0, str(request.get("prompt", "")))]


def _too_large(most: int) -> Refused:
    return Refused(413, "too_large", f"the body has more than {most:,} bytes; send less")


def _utf8(data: bytes, what: str) -> str:
    try:
        return data.decode()
    except UnicodeDecodeError:
        raise Refused(400, "bad_text", f"{what} is not UTF-8; encode it so") from None


def _nameless(path: Path, error: InputError) -> str:
    """A message about a file, without the name that it has here."""
    return printable(str(error).replace(str(path), UPLOAD), MAX_MESSAGE)


async def aside(function: Callable[..., T], *arguments: Any, limiter: CapacityLimiter | None = None) -> T:
    """In a thread; when the server stops, without waiting for it."""
    call = partial(function, *arguments)
    return await to_thread.run_sync(call, abandon_on_cancel=True, limiter=limiter)
