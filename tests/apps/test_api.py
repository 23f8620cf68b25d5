"""Every route and every error of the HTTP API, against a queue that nobody works on unless a test says so."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import io
import json
import logging
import os
import socket
import sqlite3
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any
from urllib.parse import quote

import av
import pytest
from fastapi import FastAPI
from PIL import Image

import vidkv
from tests.faults.requests import Answer, AsgiClient, form, fuzz_requests
from vidkv.apps.api import UNUSED_S, ApiLimits, CreateVideo, Refused, Service, create_app, newest
from vidkv.errors import OutputError
from vidkv.jobs.run import Progress
from vidkv.jobs.store import Job, JobStore, State
from vidkv.jobs.worker import Orders, Worker
from vidkv.request import EngineSettings, VideoRequest

PROMPT = "a red circle bouncing"
TOKEN = "correct-horse-battery"
ONE_SECOND = {"prompt": PROMPT, "seconds": 1}
QUICK = ApiLimits(poll_s=0.01)

pytestmark = pytest.mark.usefixtures("short_first_chunk")


class Api:
    """An application over a store of its own, and a client.

    Attributes:
        root: the output folder.
    """

    def __init__(self, root: Path, limits: ApiLimits = QUICK, token: str | None = None) -> None:
        self.root, self.store = root, JobStore(root)
        self.app: FastAPI = create_app(
            self.store, settings=EngineSettings(device="cpu"), token=token, limits=limits
        )
        self.service: Service = self.app.state.service
        self.client = AsgiClient(self.app)
        self.ask = self.client.ask

    def post(self, *, expect: int = 200, **fields: Any) -> Any:
        """Create a video from JSON."""
        answer = self.ask("POST", "/v1/videos", body=json.dumps(fields).encode(), headers=JSON)
        assert answer.status == expect, answer.body
        return answer.json()

    def upload(self, data: bytes, name: str = "x.png", **fields: Any) -> Answer:
        body, headers = form([(k, str(v)) for k, v in (ONE_SECOND | fields).items()],
                             [("input_reference", name, data)])  # fmt: skip
        return self.ask("POST", "/v1/videos", body=body, headers=headers)

    def uploads(self) -> list[str]:
        folder = self.root / ".vidkv" / "uploads"
        return sorted(os.listdir(folder)) if folder.is_dir() else []

    def run(self, id: str) -> Any:
        """Claim a job as a worker would."""
        job, claim = self.store.claim_next("test", lambda job: job.id == id) or (None, None)
        assert job is not None and job.id == id
        return claim


JSON = [("content-type", "application/json")]


@pytest.fixture
def api(tmp_path: Path) -> Iterator[Api]:
    with opened(tmp_path / "renders") as api:
        yield api


@contextlib.contextmanager
def opened(root: Path, limits: ApiLimits = QUICK, token: str | None = None) -> Iterator[Api]:
    api = Api(root, limits, token)
    with api.client, api.store:
        yield api


def halfway(eta_s: float = 7.5, drift: dict[str, float] | None = None) -> Progress:
    return Progress(
        chunk=1, chunks=2, frames=9, fps=8.5, eta_s=eta_s, kv_bytes=1000, held_bytes=1500, rss_bytes=2000,
        drift=drift or {}, blank=False,
    )  # fmt: skip


def png(color: str = "red", size: tuple[int, int] = (80, 60)) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", size, color).save(buffer, "PNG")
    return buffer.getvalue()


def mp4(frames: int = 20) -> bytes:
    buffer = io.BytesIO()
    with av.open(buffer, "w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=16)
        stream.width = stream.height = 64
        for _ in range(frames):
            container.mux(stream.encode(av.VideoFrame.from_image(Image.new("RGB", (64, 64), "blue"))))
        container.mux(stream.encode(None))
    return buffer.getvalue()


def fault(answer: Answer) -> dict[str, Any]:
    """The error of an answer, which has the one shape."""
    body = answer.json()
    assert set(body) == {"error"} and set(body["error"]) == {"code", "message", "param"}
    assert answer.headers["content-type"] == "application/json"
    return dict(body["error"])


class TestCreate:
    def test_a_video_is_queued_and_shown(self, api: Api) -> None:
        video = api.post(prompt=PROMPT, seconds="1", size="64x64", seed=7, model="bounce", id="fox")
        wanted = {
            "id": "fox", "object": "video", "model": "bounce", "status": "queued", "progress": 0,
            "completed_at": None, "seconds": "1", "size": "64x64", "prompt": PROMPT, "error": None,
            "chunks": 2, "chunks_done": 0, "frames": 0,
        }  # fmt: skip
        assert wanted.items() <= video.items()
        assert api.ask("GET", "/v1/videos/fox").json() == video
        job = api.store.get("fox")
        assert job.request["seed"] == 7 and job.settings == {"device": "cpu"}

    def test_every_field_arrives(self, api: Api) -> None:
        fields = {
            "prompt": PROMPT, "seconds": 3, "seed": 5, "width": 64, "height": 64, "steps": 3, "guidance": 1.5,
            "negative": "a blue square bouncing", "switch": "flush", "noise": "stock", "id": "all",
            "cache": "int8,window=15,sink=3", "schedule": "1: a blue square bouncing", "model": "bounce",
        }  # fmt: skip
        api.post(**fields)
        assert set(fields) == set(api.store.get("all").request)
        assert VideoRequest.of(fields) == VideoRequest.of(api.store.get("all").request)

    def test_a_form_means_the_same(self, api: Api) -> None:
        fields = {"prompt": PROMPT, "seconds": "2", "seed": "3", "cache": "window=15,sink=3", "size": "64x64"}
        body, headers = form(fields.items())
        answer = api.ask("POST", "/v1/videos", body=body, headers=headers)
        assert answer.json()["id"] == api.post(**fields)["id"]

    def test_the_same_request_is_the_same_video(self, api: Api) -> None:
        ids = [api.post(**ONE_SECOND, seed=seed)["id"] for seed in (1, 1, 2)]
        assert ids[0] == ids[1] != ids[2]

    def test_a_cancelled_one_is_queued_again(self, api: Api) -> None:
        video = api.post(**ONE_SECOND)
        assert api.ask("POST", f"/v1/videos/{video['id']}/cancel").json()["status"] == "cancelled"
        assert api.post(**ONE_SECOND)["status"] == "queued"

    @pytest.mark.parametrize(
        ("fields", "param", "said"),
        [
            ({}, "prompt", "required"),
            ({"prompt": 5}, "prompt", "prompt=5"),
            ({"prompt": ""}, "prompt", "describe"),
            ({"prompt": "a\0b"}, "prompt", "NUL"),
            ({"prompt": "\ud800"}, "prompt", "surrogate"),
            ({"prompt": "x" * 20_000}, "prompt", "10000"),
            ({"prompt": "a dog"}, None, "embedded world"),
            ({"prompt": PROMPT, "seconds": -1}, "seconds", "seconds=-1"),
            ({"prompt": PROMPT, "seconds": 1e6}, "seconds", "at most"),
            ({"prompt": PROMPT, "seconds": 90_000, "id": "a"}, "seconds", "at most"),
            ({"prompt": PROMPT, "size": "64X64"}, "size", "64X64"),
            ({"prompt": PROMPT, "size": "64x64", "width": 64}, "size", "not both"),
            ({"prompt": PROMPT, "size": "99999x64"}, "size", "width=99999"),
            ({"prompt": PROMPT, "size": "63x64"}, None, "63"),
            ({"prompt": PROMPT, "size": "8192x8192"}, None, "memory"),
            ({"prompt": PROMPT, "seed": -1}, "seed", "seed=-1"),
            ({"prompt": PROMPT, "model": "nope"}, "model", "use bounce"),
            ({"prompt": PROMPT, "model": "wan2.1-1.3b"}, "model", "use bounce"),
            ({"prompt": PROMPT, "id": "a/b"}, "id", "letters"),
            ({"prompt": PROMPT, "id": ".."}, "id", "dots"),
            ({"prompt": PROMPT, "cache": "int9"}, "cache", "int9"),
            ({"prompt": PROMPT, "sede": 1}, "sede", "seed"),
            ({"prompt": PROMPT, "settings": {"device": "cuda"}}, "settings", "not known"),
            ({"prompt": PROMPT, "image": "/etc/passwd"}, "image", "input_reference"),
            ({"prompt": PROMPT, "video": "a.mp4"}, "video", "input_reference"),
            ({"prompt": PROMPT, "out": "a.mp4"}, "out", "leave it out"),
            ({"prompt": PROMPT, "input_reference": "http://a/b.png"}, "input_reference", "upload"),
        ],
    )
    def test_what_cannot_be_used_is_named(
        self, api: Api, fields: dict[str, Any], param: str | None, said: str
    ) -> None:
        body = json.dumps(fields).encode()
        answer = api.ask("POST", "/v1/videos", body=body, headers=JSON)
        error = fault(answer)
        assert answer.status == 422 and error["param"] == param and said in error["message"], error
        assert not api.store.jobs() and str(api.root) not in error["message"]

    def test_an_id_of_other_work_is_refused(self, api: Api) -> None:
        api.post(**ONE_SECOND, id="a")
        assert "another id" in api.post(**ONE_SECOND, id="a", seed=9, expect=422)["error"]["message"]

    @pytest.mark.parametrize(
        "body",
        [b"", b"{", b"[", b'{"prompt": NaN}', b"\xff", b'{"a": 1, "a": 2}', b"[" * 50_000, b"9" * 9_000],
    )
    def test_what_is_not_json(self, api: Api, body: bytes) -> None:
        answer = api.ask("POST", "/v1/videos", body=body, headers=JSON)
        assert answer.status == 400 and fault(answer)["code"] in ("bad_json", "bad_text")

    @pytest.mark.parametrize("body", [b"[]", b"null", b"5", b'"x"'])
    def test_json_of_another_kind(self, api: Api, body: bytes) -> None:
        assert fault(api.ask("POST", "/v1/videos", body=body, headers=JSON))["code"] == "invalid_value"

    @pytest.mark.parametrize(
        "kind", ["text/plain", "application/x-www-form-urlencoded", "", None, "application/jsonx"]
    )
    def test_what_a_page_may_send_without_asking_is_refused(self, api: Api, kind: str | None) -> None:
        body = json.dumps(ONE_SECOND).encode()
        headers = [] if kind is None else [("content-type", kind)]
        answer = api.ask("POST", "/v1/videos", body=body, headers=headers)
        assert answer.status == 415 and fault(answer)["code"] == "unsupported_media"
        assert not api.store.jobs()

    @pytest.mark.parametrize("claimed", ["10", "999999999", None])
    def test_a_body_that_is_too_large_is_not_read_to_its_end(self, api: Api, claimed: str | None) -> None:
        pulled = 0

        def pieces() -> Iterator[bytes]:
            nonlocal pulled
            while True:
                pulled += 1
                yield b" " * 65536

        headers = JSON + ([("content-length", claimed)] if claimed else [])
        answer = api.ask("POST", "/v1/videos", body=Pieces(pieces()), headers=headers)
        assert answer.status == 413 and fault(answer)["code"] == "too_large" and pulled == 17

    def test_a_body_that_never_ends(self, tmp_path: Path) -> None:
        with opened(tmp_path, replace(QUICK, read_s=0.05)) as api:
            answer = api.ask("POST", "/v1/videos", body=b"{", headers=JSON, stall=True)
            assert answer.status == 408 and fault(answer)["code"] == "too_slow"

    def test_a_client_that_goes_away_in_between(self, api: Api, caplog: pytest.LogCaptureFixture) -> None:
        sent = iter([{"type": "http.request", "body": b"{", "more_body": True}])
        scope = api.client._scope("POST", "/v1/videos", JSON)
        answers: list[Any] = []

        async def receive() -> Any:
            return next(sent, {"type": "http.disconnect"})

        async def send(message: Any) -> None:
            answers.append(message)

        api.client.run(api.app(scope, receive, send))
        assert not answers and not api.store.jobs() and not caplog.records


class Pieces:
    """A body without an end, of which the client holds no more than is asked for."""

    def __init__(self, pieces: Iterator[bytes]) -> None:
        self.pieces = pieces

    def __iter__(self) -> Iterator[bytes]:
        return self.pieces


class TestQueue:
    def test_500_at_once_against_32(self, api: Api) -> None:
        bodies = [json.dumps(ONE_SECOND | {"seed": seed}).encode() for seed in range(500)]

        async def all_at_once() -> list[Answer]:
            sends = (api.client.send("POST", "/v1/videos", body, JSON) for body in bodies)
            return await asyncio.gather(*sends)

        answers = api.client.run(all_at_once())
        accepted = [answer for answer in answers if answer.status == 200]
        refused = [answer for answer in answers if answer.status == 429]
        assert (len(accepted), len(refused)) == (32, 468)
        assert all(int(answer.headers["retry-after"]) >= 1 for answer in refused)
        assert {fault(answer)["code"] for answer in refused} == {"queue_full"}
        assert {job.id for job in api.store.jobs()} == {answer.json()["id"] for answer in accepted}
        assert len(os.listdir(api.root / ".vidkv" / "jobs")) == 32

    def test_a_full_queue_is_refused_before_planning(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        with opened(tmp_path, replace(QUICK, queue=1)) as api:
            api.post(**ONE_SECOND, id="a")
            monkeypatch.setattr("vidkv.apps.api.plan", lambda *_: pytest.fail("planned"))
            api.post(**ONE_SECOND, seed=1, expect=429)
            assert api.upload(png()).status == 429 and not api.uploads()

    def test_what_is_queued_already_is_no_more_work(self, tmp_path: Path) -> None:
        with opened(tmp_path, replace(QUICK, queue=1)) as api:
            assert api.post(**ONE_SECOND, id="a") == api.post(**ONE_SECOND, id="a")

    @pytest.mark.parametrize("named", [True, False])
    def test_a_cancelled_one_does_not_slip_past_the_limit(self, tmp_path: Path, named: bool) -> None:
        name = {"id": "a"} if named else {}
        with opened(tmp_path, replace(QUICK, queue=1)) as api:
            api.store.cancel(api.post(**ONE_SECOND, **name)["id"])
            other = api.post(**ONE_SECOND, seed=1)
            api.post(**ONE_SECOND, **name, expect=429)
            api.store.delete(other["id"])
            assert api.post(**ONE_SECOND, **name)["status"] == "queued"

    def test_retry_after_is_when_the_first_running_one_ends(self, tmp_path: Path) -> None:
        with opened(tmp_path, replace(QUICK, queue=2)) as api:
            etas = {"a": 90.2, "b": 7.6}
            for seed, (id, eta) in enumerate(etas.items()):
                api.post(**ONE_SECOND, id=id, seed=seed)
                api.run(id)
                api.store.report(id, halfway(eta))
            answer = api.ask(
                "POST", "/v1/videos", body=json.dumps(ONE_SECOND | {"seed": 9}).encode(), headers=JSON
            )
            assert answer.status == 429 and answer.headers["retry-after"] == "8"


class TestShow:
    def test_a_running_one(self, api: Api) -> None:
        api.post(**ONE_SECOND, id="a")
        api.run("a")
        drift = {"luma": 1.5, "contrast": float("nan")}
        api.store.report("a", halfway(drift=drift))
        wanted = {
            "status": "in_progress", "progress": 50, "chunks_done": 1, "frames": 9, "fps": 8.5, "eta_s": 7.5,
            "kv_bytes": 1000, "drift": {"luma": 1.5}, "completed_at": None,
        }  # fmt: skip
        assert wanted.items() <= api.ask("GET", "/v1/videos/a").json().items()

    def test_a_failed_one_says_why_but_not_where(self, api: Api) -> None:
        api.post(**ONE_SECOND, id="a")
        api.run("a")
        api.store.finish(api.store.get("a"), {"state": "failed", "error": f"cannot read {api.root}/x"})
        video = api.ask("GET", "/v1/videos/a").json()
        assert video["status"] == "failed" and video["completed_at"] >= video["created_at"]
        assert video["error"] == {"code": "failed", "message": "cannot read OUT/x"}

    def test_a_model_folder_of_another_client_is_not_shown(self, api: Api, tmp_path: Path) -> None:
        weights = Path(vidkv.__file__).parent / "models" / "bounce" / "weights"
        folder = tmp_path / "elsewhere"
        folder.symlink_to(weights)
        api.store.submit(VideoRequest(prompt=PROMPT, seconds=1, model=str(folder), id="a"))
        video = api.ask("GET", "/v1/videos/a").json()
        assert video["model"] == "elsewhere" and video["size"] is None

    @pytest.mark.parametrize("method", ["GET", "DELETE"])
    def test_nothing_of_that_id(self, api: Api, method: str) -> None:
        answer = api.ask(method, "/v1/videos/nope")
        assert answer.status == 404 and "'nope'" in fault(answer)["message"]

    @pytest.mark.parametrize("route", ["cancel", "events", "content"])
    def test_nor_below_it(self, api: Api, route: str) -> None:
        answer = api.ask("POST" if route == "cancel" else "GET", f"/v1/videos/nope/{route}")
        assert answer.status == 404 and fault(answer)["code"] == "not_found"

    def test_models_and_health(self, api: Api) -> None:
        models = api.ask("GET", "/v1/models").json()["data"]
        assert [(model["id"], model["size"], model["fps"]) for model in models] == [("bounce", "64x64", 16)]
        assert api.ask("GET", "/health").json() == {"status": "ok", "version": vidkv.__version__}

    def test_other_methods_and_paths(self, api: Api) -> None:
        answer = api.ask("PUT", "/v1/videos")
        assert answer.status == 405 and fault(answer)["code"] == "wrong_method"
        assert set(answer.headers["allow"].split(", ")) & {"GET", "POST"}
        for path in ("/", "/docs", "/v1/videos/", "/v1/videos/a/b"):
            assert api.ask("GET", path).status == 404


class TestList:
    def test_pages_in_both_orders_hold_every_job_once(self, api: Api) -> None:
        for number in range(23):
            api.post(**ONE_SECOND, id=f"v{number:02}", seed=number)
        for number in (0, 3, 4, 5, 6, 7, 8, 9, 15, 22):
            assert api.ask("DELETE", f"/v1/videos/v{number:02}").status == 200
        left = [job.id for job in api.store.jobs()]
        assert len(left) == 13
        for order, wanted in (("asc", left), ("desc", left[::-1])):
            for limit in (1, 4, 12, 13, 14, 100):
                assert list(self.walk(api, order, limit)) == wanted
        assert self.page(api, "")["first_id"] == left[-1]

    def walk(self, api: Api, order: str, limit: int) -> Iterator[str]:
        after, more = "", True
        while more:
            page = self.page(api, f"?order={order}&limit={limit}{after}")
            ids = [video["id"] for video in page["data"]]
            assert page["last_id"] == (ids[-1] if ids else None) and len(ids) <= limit
            yield from ids
            more, after = page["has_more"], f"&after={page['last_id']}"

    def page(self, api: Api, query: str) -> Any:
        answer = api.ask("GET", f"/v1/videos{query}")
        assert answer.status == 200, answer
        return answer.json()

    def test_none(self, api: Api) -> None:
        empty = {"object": "list", "data": [], "first_id": None, "last_id": None, "has_more": False}
        assert self.page(api, "?order=desc") == self.page(api, "?order=asc") == empty

    def test_newest_looks_at_few_of_many(self) -> None:
        class Many:
            """A store of ten thousand jobs, of whose numbers two in three are gone."""

            read = 0

            def jobs(self, most: int, after: int) -> list[Any]:
                numbers = [number for number in range(after + 1, 30_001) if number % 3 == 0][:most]
                self.read += len(numbers)
                return [type("Job", (), {"number": number}) for number in numbers]

        many: Any = Many()
        assert [job.number for job in newest(many, 4)] == [30_000, 29_997, 29_994, 29_991]
        assert [job.number for job in newest(many, 2, before=9)] == [6, 3]
        assert many.read < 150

    @pytest.mark.parametrize(
        ("query", "status", "param"),
        [("limit=0", 422, "limit"), ("limit=101", 422, "limit"), ("limit=x", 422, "limit"),
         ("order=up", 422, "order"), ("after=nope", 404, "id"), ("after=%00", 404, "id")],
    )  # fmt: skip
    def test_bad_queries(self, api: Api, query: str, status: int, param: str) -> None:
        answer = api.ask("GET", f"/v1/videos?{query}")
        assert answer.status == status and fault(answer)["param"] == param


class TestEnd:
    def test_cancel_keeps_what_has_ended(self, api: Api) -> None:
        api.post(**ONE_SECOND, id="a")
        first = api.ask("POST", "/v1/videos/a/cancel").json()
        assert first["status"] == "cancelled" and first["completed_at"]
        assert api.ask("POST", "/v1/videos/a/cancel").json() == first

    def test_cancel_asks_the_worker_of_a_running_one(self, api: Api) -> None:
        api.post(**ONE_SECOND, id="a")
        api.run("a")
        assert api.ask("POST", "/v1/videos/a/cancel").json()["status"] == "in_progress"
        assert api.store.folder(api.store.get("a")).marked("cancel")

    def test_delete(self, api: Api) -> None:
        api.post(**ONE_SECOND, id="a")
        assert api.ask("DELETE", "/v1/videos/a").json() == {
            "id": "a", "object": "video.deleted", "deleted": True,
        }  # fmt: skip
        assert api.ask("GET", "/v1/videos/a").status == 404
        assert not os.listdir(api.root / ".vidkv" / "jobs")

    def test_a_running_one_stays(self, api: Api) -> None:
        api.post(**ONE_SECOND, id="a")
        api.run("a")
        answer = api.ask("DELETE", "/v1/videos/a")
        assert answer.status == 409 and fault(answer)["code"] == "video_in_progress"
        assert api.store.get("a").state is State.RUNNING


class TestContent:
    @pytest.mark.parametrize("state", ["queued", "in_progress", "failed", "cancelled"])
    def test_only_of_what_is_complete(self, api: Api, state: str) -> None:
        api.post(**ONE_SECOND, id="a")
        if state in ("in_progress", "failed"):
            api.run("a")
        if state == "failed":
            api.store.finish(api.store.get("a"), {"state": "failed", "error": "x"})
        if state == "cancelled":
            api.store.cancel("a")
        # a file of that name is not the video, whoever wrote it
        (api.root / "a.mp4").write_bytes(b"half")
        answer = api.ask("GET", "/v1/videos/a/content")
        error = fault(answer)
        assert (
            answer.status == 409 and error["code"] == f"video_{state}" and f"is {state}" in error["message"]
        )

    def done(self, api: Api, content: bytes | None) -> None:
        """A job that counts as done, with a file of any content."""
        api.post(**ONE_SECOND, id="a")
        api.run("a")
        if content is not None:
            (api.root / "a.mp4").write_bytes(content)
        result = {"state": "done", "frames": 16, "chunks": 2}
        api.store.finish(api.store.get("a"), result)

    def test_whole_and_in_parts(self, api: Api) -> None:
        content = bytes(range(256)) * 700
        self.done(api, content)
        whole = api.ask("GET", "/v1/videos/a/content")
        assert whole.status == 200 and whole.body == content
        assert whole.headers["content-type"] == "video/mp4" and whole.headers["accept-ranges"] == "bytes"
        assert whole.headers["x-content-type-options"] == "nosniff"
        part = api.ask("GET", "/v1/videos/a/content", headers=[("range", "bytes=100-299")])
        assert part.status == 206 and part.body == content[100:300]
        assert part.headers["content-range"] == f"bytes 100-299/{len(content)}"
        head = api.ask("HEAD", "/v1/videos/a/content")
        assert head.status == 200 and not head.body and head.headers["content-length"] == str(len(content))

    @pytest.mark.parametrize(
        ("asked", "status"), [("bytes=900-", 416), ("bytes=x-y", 400), ("lines=1-2", 400)]
    )
    def test_ranges_that_are_not_there(self, api: Api, asked: str, status: int) -> None:
        self.done(api, b"0123456789")
        answer = api.ask("GET", "/v1/videos/a/content", headers=[("range", asked)])
        assert answer.status == status and fault(answer)["code"] == "bad_range"
        assert answer.headers["content-range"] == "bytes */10"

    def test_a_file_that_is_gone(self, api: Api) -> None:
        self.done(api, None)
        answer = api.ask("GET", "/v1/videos/a/content")
        assert answer.status == 404 and fault(answer)["code"] == "no_file"
        assert api.post(**ONE_SECOND, id="a")["status"] == "queued"

    def test_a_link_out_of_the_folder_is_not_followed(self, api: Api, tmp_path: Path) -> None:
        (tmp_path / "secret").write_bytes(b"secret")
        self.done(api, None)
        (api.root / "a.mp4").symlink_to(tmp_path / "secret")
        answer = api.ask("GET", "/v1/videos/a/content")
        assert answer.status == 404 and b"secret" not in answer.body

    def test_no_partial_video(self, api: Api) -> None:
        self.done(api, b"x")
        assert api.ask("GET", "/v1/videos/a/content?variant=partial").status == 404
        assert api.ask("GET", "/v1/videos/a/content?variant=../x").status == 422


def events(body: bytes) -> list[tuple[str, Any]]:
    """(event, data) of a stream."""
    found = []
    for block in body.decode().split("\n\n"):
        lines = dict(line.split(": ", 1) for line in block.splitlines() if not line.startswith(":"))
        if lines:
            found.append((lines.get("event", "message"), json.loads(lines["data"])))
    return found


class TestEvents:
    def test_each_change_until_the_end(self, api: Api) -> None:
        api.post(**ONE_SECOND, id="a")
        steps: list[Callable[[], Any]] = [
            lambda: api.run("a"),
            lambda: api.store.report("a", halfway()),
            lambda: api.store.finish(api.store.get("a"), {"state": "done", "frames": 16, "chunks": 2}),
        ]

        def next_step(body: bytes) -> bool:
            if len(events(body)) + len(steps) == 4 and steps:
                steps.pop(0)()
            return False

        answer = api.ask("GET", "/v1/videos/a/events", drop=next_step)
        assert answer.headers["content-type"].startswith("text/event-stream")
        seen = [(video["status"], video["progress"]) for _, video in events(answer.body)]
        assert seen == [("queued", 0), ("in_progress", 0), ("in_progress", 50), ("completed", 100)]
        assert events(answer.body)[-1][1] == api.ask("GET", "/v1/videos/a").json()

    def test_one_that_has_ended(self, api: Api) -> None:
        api.post(**ONE_SECOND, id="a")
        api.store.cancel("a")
        answer = api.ask("GET", "/v1/videos/a/events")
        assert [video["status"] for _, video in events(answer.body)] == ["cancelled"]
        last = [("last-event-id", str(api.store.get("a").version))]
        assert api.ask("GET", "/v1/videos/a/events", headers=last).status == 204

    def test_one_that_is_deleted_meanwhile(self, api: Api) -> None:
        api.post(**ONE_SECOND, id="a")

        def delete(body: bytes) -> bool:
            with contextlib.suppress(Exception):
                api.store.delete("a")
            return False

        answer = api.ask("GET", "/v1/videos/a/events", drop=delete)
        gone = ("deleted", {"id": "a", "object": "video.deleted", "deleted": True})
        assert events(answer.body)[-1] == gone

    def test_clients_that_go_leave_nothing_behind(self, api: Api) -> None:
        api.post(**ONE_SECOND, id="a")

        async def drop_all() -> tuple[int, int]:
            before = len(asyncio.all_tasks())
            gone = (api.client.send("GET", "/v1/videos/a/events", drop=lambda body: True) for _ in range(30))
            await asyncio.gather(*gone)
            return before, len(asyncio.all_tasks())

        before, after = api.client.run(drop_all())
        assert before == after and api.service.streams == 0

    def test_silence_is_broken_now_and_then(self, tmp_path: Path) -> None:
        with opened(tmp_path, replace(QUICK, keepalive_s=0.02)) as api:
            api.post(**ONE_SECOND, id="a")
            answer = api.ask(
                "GET", "/v1/videos/a/events", drop=lambda body: body.count(b": still there\n\n") > 1
            )
            assert answer.body.count(b": still there\n\n") == 2 and len(events(answer.body)) == 1

    def test_too_many(self, tmp_path: Path) -> None:
        with opened(tmp_path, replace(QUICK, streams=2)) as api:
            api.post(**ONE_SECOND, id="a")

            async def three() -> Answer:
                over = asyncio.Event()
                open_ones = [
                    asyncio.create_task(
                        api.client.send("GET", "/v1/videos/a/events", drop=lambda body: False)
                    )
                    for _ in range(2)
                ]
                while api.service.streams < 2:
                    await asyncio.sleep(0.001)
                refused = await api.client.send("GET", "/v1/videos/a/events")
                over.set()
                api.store.cancel("a")
                await asyncio.gather(*open_ones)
                return refused

            answer = api.client.run(three())
            assert answer.status == 429 and int(answer.headers["retry-after"]) >= 1

    def test_a_server_that_stops_ends_them(self, api: Api) -> None:
        api.post(**ONE_SECOND, id="a")
        stop = threading.Event()
        api.service.stopping = stop.is_set
        answer = api.ask("GET", "/v1/videos/a/events", drop=lambda body: bool(stop.set()))
        assert len(events(answer.body)) == 1


class TestUploads:
    def test_stored_under_its_content_until_the_last_job_is_gone(self, api: Api) -> None:
        data = png()
        first, second = (api.upload(data, "../../evil.png", seed=seed).json()["id"] for seed in (1, 2))
        digest = hashlib.sha256(data).hexdigest()
        assert first != second and api.uploads() == [digest]
        stored = Path(api.store.get(first).request["image"])
        assert stored == api.root.resolve() / ".vidkv" / "uploads" / digest and stored.read_bytes() == data
        api.ask("DELETE", f"/v1/videos/{first}")
        assert api.uploads() == [digest]
        api.ask("DELETE", f"/v1/videos/{second}")
        assert api.uploads() == []

    def test_a_video_is_told_from_a_picture_by_its_content(self, api: Api) -> None:
        request = api.store.get(api.upload(mp4(), "x.png").json()["id"]).request
        assert "video" in request and "image" not in request

    def test_the_same_upload_is_the_same_video(self, api: Api) -> None:
        assert api.upload(png()).json() == api.upload(png(), "other").json() != api.upload(png("blue")).json()
        assert len(api.uploads()) == 2

    @pytest.mark.parametrize(
        ("data", "status", "code"),
        [
            (b"", 415, "unsupported_media"),
            (b"#EXTM3U\nhttp://127.0.0.1/x", 415, "unsupported_media"),
            (b"<svg xmlns='http://www.w3.org/2000/svg'/>", 415, "unsupported_media"),
            (png()[:-30], 422, "invalid_media"),
            (mp4()[:400], 422, "invalid_media"),
            (png(size=(9000, 9000)), 422, "invalid_media"),
        ],
    )
    def test_what_cannot_be_used_is_not_kept(self, api: Api, data: bytes, status: int, code: str) -> None:
        answer = api.upload(data)
        error = fault(answer)
        assert (answer.status, error["code"], error["param"]) == (status, code, "input_reference"), error
        assert error["message"].startswith("input_reference ") and str(api.root) not in error["message"]
        assert api.uploads() == [] and not api.store.jobs()

    def test_a_request_that_fails_otherwise_keeps_nothing(self, api: Api) -> None:
        assert api.upload(png(), seconds=-1).status == 422
        assert api.upload(png(), prompt="a dog").status == 422
        assert api.uploads() == []

    def test_one_that_a_job_starts_from_survives_a_refusal(self, api: Api) -> None:
        api.upload(png())
        kept = api.uploads()
        assert api.upload(png(), prompt="a dog").status == 422
        assert api.uploads() == kept != []

    def test_too_large(self, tmp_path: Path) -> None:
        with opened(tmp_path, replace(QUICK, upload_bytes=1000)) as api:
            answer = api.upload(b"\x89PNG\r\n\x1a\n" + bytes(1000))
            assert answer.status == 413 and fault(answer)["param"] == "input_reference"
            assert api.uploads() == []

    def test_too_many_at_a_time(self, tmp_path: Path) -> None:
        with opened(tmp_path, replace(QUICK, uploads=1, read_s=0.2)) as api:
            body, headers = form([("prompt", PROMPT)], [("input_reference", "x", png())])

            async def two() -> list[Answer]:
                slow = api.client.send("POST", "/v1/videos", body[:-50], headers, stall=True)
                waiting = asyncio.create_task(slow)
                while not api.service.receiving:
                    await asyncio.sleep(0.001)
                return [await api.client.send("POST", "/v1/videos", body, headers), await waiting]

            refused, slow = api.client.run(two())
            assert refused.status == 429 and fault(refused)["code"] == "too_many_uploads"
            assert slow.status == 408 and api.uploads() == [] and api.service.receiving == 0

    @pytest.mark.parametrize(
        ("body", "status", "code"),
        [
            (form([("prompt", PROMPT), ("prompt", PROMPT)])[0], 422, "invalid_value"),
            (
                form([], [("input_reference", "a", png()), ("input_reference", "b", png())])[0],
                422,
                "invalid_value",
            ),
            (form([], [("image", "a", png())])[0], 422, "invalid_value"),
            (form([("image", "/etc/passwd"), *ONE_SECOND.items()][:1])[0], 422, "unknown_field"),
            (form([("input_reference", "http://a/b")])[0], 422, "invalid_value"),
            (form([(f"f{number}", "x") for number in range(40)])[0], 413, "too_many_fields"),
            (form([("prompt", "x" * 2_000_000)])[0], 413, "too_large"),
            (form([("", "x")])[0], 400, "bad_form"),
            (form([("prompt", "\ud800")])[0], 400, "bad_text"),
            (form([("prompt", PROMPT)])[0][:-8], 400, "bad_form"),
            (form([("prompt", PROMPT)], boundary="other")[0], 400, "bad_form"),
            (b"", 400, "bad_form"),
        ],
    )
    def test_forms_that_cannot_be_read(self, api: Api, body: bytes, status: int, code: str) -> None:
        headers = [("content-type", "multipart/form-data; boundary=b0undary")]
        answer = api.ask("POST", "/v1/videos", body=body, headers=headers)
        assert (answer.status, fault(answer)["code"]) == (status, code), answer
        assert api.uploads() == [] and not api.store.jobs()

    @pytest.mark.parametrize("boundary", ["", "; boundary=", "; boundary=" + "x" * 200])
    def test_forms_without_a_boundary(self, api: Api, boundary: str) -> None:
        headers = [("content-type", f"multipart/form-data{boundary}")]
        assert fault(api.ask("POST", "/v1/videos", body=b"x", headers=headers))["code"] == "bad_form"

    def test_what_an_earlier_server_left_is_cleared_away(self, tmp_path: Path) -> None:
        with opened(tmp_path) as api:
            api.upload(png())
            folder = tmp_path / ".vidkv" / "uploads"
            kept = api.uploads()
            for name, age in (
                ("old", 2 * UNUSED_S),
                (".x.part", 2 * UNUSED_S),
                ("new", 0),
                *((k, 1e6) for k in kept),
            ):
                (folder / name).touch()
                os.utime(folder / name, (0, (folder / name).stat().st_mtime - age))
            create_app(api.store, settings=EngineSettings(), token=None, limits=QUICK)
            assert api.uploads() == sorted([*kept, "new"])


class TestWho:
    @pytest.mark.parametrize(
        "headers",
        [
            [], [("authorization", "")], [("authorization", TOKEN)], [("authorization", f"Basic {TOKEN}")],
            [("authorization", f"Bearer {TOKEN}x")], [("authorization", f"Bearer {TOKEN[:-1]}")],
            [("authorization", "Bearer \xff")],
            [("authorization", f"Bearer {TOKEN}"), ("authorization", "x")],
            [("x-authorization", f"Bearer {TOKEN}")], [("cookie", f"token={TOKEN}")],
        ],
    )  # fmt: skip
    def test_without_the_token_nothing_but_health(
        self, tmp_path: Path, headers: list[tuple[str, str]]
    ) -> None:
        with opened(tmp_path, token=TOKEN) as api:
            routes = [("GET", "/v1/videos"), ("POST", "/v1/videos"), ("GET", "/v1/videos/a/content"),
                      ("DELETE", "/v1/videos/a"), ("GET", "/v1/models"), ("GET", "/openapi.json"),
                      ("GET", "/nope"), ("GET", f"/v1/videos?token={TOKEN}")]  # fmt: skip
            for method, path in routes:
                answer = api.ask(method, path, headers=headers)
                assert answer.status == 401 and answer.headers["www-authenticate"].startswith("Bearer"), path
                assert fault(answer)["code"] == "unauthorized"
            assert api.ask("GET", "/health", headers=headers).status == 200

    @pytest.mark.parametrize("scheme", ["Bearer", "bearer"])
    def test_with_it_everything_under_any_name(self, tmp_path: Path, scheme: str) -> None:
        with opened(tmp_path, token=TOKEN) as api:
            headers = [
                ("authorization", f"{scheme} {TOKEN}"),
                ("host", "render.example"),
                ("origin", "https://x"),
            ]
            assert api.ask("GET", "/v1/videos", headers=headers).status == 200

    @pytest.mark.parametrize(
        "host",
        ["evil.example", "127.0.0.1.evil.example:8000", "localhost.evil.example", "0.0.0.0:8000", "", "[::2]",
         "127.0.0.1@evil.example", "127.0.0.1:8000:80", "localhost/", "10.0.0.1", "127.0.0.1, evil.example"],
    )  # fmt: skip
    def test_without_one_only_under_its_own_name(self, api: Api, host: str) -> None:
        for path in ("/v1/videos", "/health"):
            answer = api.ask("GET", path, headers=[("host", host)])
            assert answer.status == 403 and fault(answer)["code"] == "wrong_host"

    @pytest.mark.parametrize("host", ["127.0.0.1", "localhost:1234", "LOCALHOST", "[::1]:8000"])
    def test_its_own_names(self, api: Api, host: str) -> None:
        assert api.ask("GET", "/health", headers=[("host", host)]).status == 200

    def test_two_names(self, api: Api) -> None:
        both = [("host", "127.0.0.1"), ("host", "evil.example")]
        assert api.ask("GET", "/health", headers=both).status == 403

    @pytest.mark.parametrize(
        "header",
        [
            ("origin", "http://evil.example"), ("origin", "null"), ("origin", "http://127.0.0.1:9000"),
            ("origin", "http://localhost:8000"), ("origin", "https://127.0.0.1:8000"), ("origin", ""),
            ("sec-fetch-site", "cross-site"), ("sec-fetch-site", "same-site"),
        ],
    )  # fmt: skip
    def test_pages_of_other_sites_change_nothing(self, api: Api, header: tuple[str, str]) -> None:
        api.post(**ONE_SECOND, id="a")
        body = json.dumps(ONE_SECOND | {"seed": 1}).encode()
        for method, path in (
            ("POST", "/v1/videos"),
            ("POST", "/v1/videos/a/cancel"),
            ("DELETE", "/v1/videos/a"),
        ):
            answer = api.ask(method, path, body=body, headers=[*JSON, header])
            assert answer.status == 403 and fault(answer)["code"] == "wrong_origin"
            assert "access-control-allow-origin" not in answer.headers
        assert [(job.id, job.state) for job in api.store.jobs()] == [("a", State.QUEUED)]

    def test_a_page_of_its_own(self, api: Api) -> None:
        own = [("origin", "http://127.0.0.1:8000"), ("sec-fetch-site", "same-origin")]
        assert api.ask("GET", "/v1/videos", headers=own).status == 200

    def test_preflights_are_not_answered(self, api: Api) -> None:
        asks = [("origin", "http://evil.example"), ("access-control-request-method", "POST")]
        assert api.ask("OPTIONS", "/v1/videos", headers=asks).status == 403

    def test_too_many_headers(self, api: Api) -> None:
        answer = api.ask("GET", "/health", headers=[(f"x-{number}", "") for number in range(101)])
        assert answer.status == 431 and fault(answer)["code"] == "too_many_headers"


class TestServerFaults:
    def test_a_mistake_is_logged_and_not_shown(
        self, api: Api, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
    ) -> None:
        def broken(*_: Any) -> None:
            raise RuntimeError("secret path /root")

        monkeypatch.setattr(api.service, "find", broken)
        for path in ("/v1/videos/a", "/v1/videos/a/events"):
            answer = api.ask("GET", path)
            assert (
                answer.status == 500 and fault(answer)["code"] == "internal" and b"secret" not in answer.body
            )
        assert "secret path" in caplog.text

    def test_a_stream_that_breaks_is_logged(
        self, api: Api, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
    ) -> None:
        api.post(**ONE_SECOND, id="a")
        monkeypatch.setattr(api.service, "show", lambda job: 1 / 0)
        assert api.ask("GET", "/v1/videos/a/events").body == b""
        assert "ZeroDivisionError" in caplog.text and api.service.streams == 0

    @pytest.mark.parametrize(
        ("error", "status", "code"),
        [
            (sqlite3.OperationalError("database is locked"), 503, "storage"),
            (PermissionError(13, "Permission denied"), 503, "storage"),
            (OutputError("cannot write ROOT/x: No space left on device; make room"), 507, "no_room"),
        ],
    )
    def test_storage_that_cannot_be_used(
        self, api: Api, monkeypatch: pytest.MonkeyPatch, error: Exception, status: int, code: str
    ) -> None:
        if isinstance(error, OutputError):
            error = OutputError(str(error).replace("ROOT", str(api.root)))

        def broken(*_: Any, **__: Any) -> Job:
            raise error

        monkeypatch.setattr(api.store, "submit_plan", broken)
        answer = api.ask("POST", "/v1/videos", body=json.dumps(ONE_SECOND).encode(), headers=JSON)
        assert answer.status == status and fault(answer)["code"] == code
        assert str(api.root) not in answer.body.decode() and int(answer.headers["retry-after"]) >= 1

    def test_without_workers_nothing_is_taken(self, api: Api) -> None:
        api.service.ailing = lambda: "worker0 has died"
        answer = api.ask("GET", "/health")
        assert answer.status == 503 and "worker0 has died" in fault(answer)["message"]
        assert api.post(**ONE_SECOND, expect=503)["error"]["code"] == "no_workers"


class Opened:
    """What this process opens, lists, makes or removes outside some folders, and where it connects to.

    An audit hook cannot be taken away again, so there is one for good that an instance listens to.
    """

    current: Opened | None = None
    hooked = False
    EVENTS = (
        "open",
        "os.listdir",
        "os.scandir",
        "os.remove",
        "os.rename",
        "os.mkdir",
        "os.rmdir",
        "os.symlink",
    )

    def __init__(self, *roots: Path) -> None:
        self.roots = [str(root.resolve()) for root in roots]
        self.found: list[tuple[str, str]] = []

    def __enter__(self) -> Opened:
        if not Opened.hooked:
            sys.addaudithook(Opened.hook)
            Opened.hooked = True
        Opened.current = self
        return self

    def __exit__(self, *exc: object) -> None:
        Opened.current = None

    @staticmethod
    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        self = Opened.current
        if self is None:
            return
        if event in ("socket.connect", "socket.getaddrinfo", "socket.gethostbyname"):
            self.found.append((event, repr(arguments)))
        elif event in Opened.EVENTS:
            for argument in arguments[: 2 if event in ("os.rename", "os.symlink") else 1]:
                if isinstance(argument, str | bytes | os.PathLike):
                    path = os.path.realpath(os.fsdecode(argument))
                    if not any(path == root or path.startswith(root + "/") for root in self.roots):
                        self.found.append((event, path))


def code_roots() -> list[Path]:
    """Where modules, weights and the interpreter are."""
    return [Path(vidkv.__file__).parents[1], Path(sys.prefix), Path(sys.base_prefix), Path("/dev/null")]


TRAVERSALS = [
    shape.format(target)
    for target in ("etc/passwd", "secret.mp4", "secret", "link.mp4", ".vidkv/jobs.sqlite")
    for shape in (
        "../{}", "../../../../{}", "/{}", "//{}", "\\\\host\\share\\{}", "..\\..\\{}", "%2e%2e/{}",
        "%2e%2e%2f{}", "..%2f{}", "%252e%252e%252f{}", "{}%00.mp4/..", "../{}\0", "..;/{}", "....//{}",
        "file:///{}", "C:\\{}", "~/{}", "./{}", "%c0%ae%c0%ae/{}", "..%5c{}", "/proc/self/root/{}",
        "outside/../{}", "\u202e../{}", "outside/{}",
    )
]  # fmt: skip


class TestTraversal:
    def test_the_hook_sees_what_is_outside(self, tmp_path: Path) -> None:
        (tmp_path / "in").mkdir()
        (tmp_path / "in" / "link").symlink_to(tmp_path / "secret")
        (tmp_path / "secret").touch()
        with Opened(tmp_path / "in") as seen:
            (tmp_path / "in" / "fine").touch()
            assert seen.found == []
            (tmp_path / "in" / "link").read_bytes()
            assert seen.found == [("open", str((tmp_path / "secret").resolve()))]

    @pytest.fixture
    def api(self, tmp_path: Path) -> Iterator[Api]:
        """With links out of the folder, and a secret outside."""
        (tmp_path / "outside").mkdir()
        for folder in (tmp_path, tmp_path / "outside"):
            for name in ("secret", "secret.mp4"):
                (folder / name).write_text("SECRET")
        with opened(tmp_path / "renders") as api:
            (api.root / "link.mp4").symlink_to(tmp_path / "secret.mp4")
            (api.root / "outside").symlink_to(tmp_path / "outside")
            (api.root / ".vidkv" / "jobs" / "outside").symlink_to(tmp_path / "outside")
            api.post(**ONE_SECOND, id="seen")
            yield api

    def test_there_are_120(self) -> None:
        assert len(set(TRAVERSALS)) == 120

    def test_no_id_leads_outside(self, api: Api, tmp_path: Path) -> None:
        routes = [("GET", ""), ("DELETE", ""), ("POST", "/cancel"), ("GET", "/events"), ("GET", "/content")]
        with Opened(api.root, *code_roots()) as seen:
            for payload in TRAVERSALS:
                for safe in ("/%", "%", "/", ""):
                    for method, rest in routes:
                        answer = api.ask(method, f"/v1/videos/{quote(payload, safe=safe)}{rest}")
                        assert answer.status in (404, 405), (payload, method, rest, answer)
                        assert b"SECRET" not in answer.body
        assert seen.found == []
        self.nothing_changed(api, tmp_path)

    def test_no_field_leads_outside(self, api: Api, tmp_path: Path) -> None:
        with Opened(api.root, *code_roots()) as seen:
            for payload in TRAVERSALS:
                for field in ("id", "out", "model", "image", "video", "input_reference"):
                    error = api.post(**ONE_SECOND, **{field: payload}, expect=422)["error"]
                    assert error["param"] == field, (payload, error)
                query = api.ask("GET", f"/v1/videos?after={quote(payload, safe='')}")
                assert query.status == 404
        assert seen.found == []
        self.nothing_changed(api, tmp_path)

    def test_no_file_name_leads_outside(self, api: Api, tmp_path: Path) -> None:
        with Opened(api.root, *code_roots()) as seen:
            for payload in TRAVERSALS:
                body, headers = form(
                    [(k, str(v)) for k, v in ONE_SECOND.items()], [("input_reference", payload, b"neither")]
                )
                answer = api.ask("POST", "/v1/videos", body=body, headers=headers)
                assert answer.status == 415, (payload, answer)
        assert seen.found == [] and api.uploads() == []
        self.nothing_changed(api, tmp_path)

    def nothing_changed(self, api: Api, tmp_path: Path) -> None:
        assert [job.id for job in api.store.jobs()] == ["seen"]
        assert {path.name for path in tmp_path.iterdir()} == {"renders", "outside", "secret", "secret.mp4"}
        assert {path.name for path in api.root.iterdir() if path.name != "link.mp4"} <= {".vidkv", "outside"}


def ssrf(port: int) -> list[str]:
    """Addresses that a server must not be talked into fetching, most of them of a socket that listens."""
    own = [
        f"{scheme}://{host}:{port}/x.png"
        for scheme in ("http", "https", "ftp", "rtsp", "tcp", "gopher", "HTTP")
        for host in ("127.0.0.1", "localhost", "0x7f000001", "2130706433")
    ]
    others = [
        "http://169.254.169.254/latest/meta-data/", f"//127.0.0.1:{port}/x", f"http://[::1]:{port}/",
        f"http://[::ffff:127.0.0.1]:{port}/", f"http://evil@127.0.0.1:{port}/", f"http:/127.0.0.1:{port}/",
        f"http://127.0.0.1:{port}#.png", f"hls+http://127.0.0.1:{port}/a", f"concat:http://127.0.0.1:{port}/a",
        "file:///etc/passwd", f"data:image/png;base64,http://127.0.0.1:{port}", f"hf://127.0.0.1:{port}/model",
    ]  # fmt: skip
    return own + others


class TestSsrf:
    def test_no_field_is_fetched(self, api: Api, quick_bounce: Path) -> None:
        fields = [*CreateVideo.model_fields, "input_reference", "reference_url", "url"]
        with socket.create_server(("127.0.0.1", 0)) as listener:
            listener.setblocking(False)
            payloads = ssrf(listener.getsockname()[1])
            assert len(set(payloads)) == 40
            with Opened(api.root, *code_roots(), quick_bounce) as seen:
                for payload in payloads:
                    for field in fields:
                        api.post(**(ONE_SECOND | {field: payload}), expect=422)
                    for field in ("input_reference", "image", "model"):
                        body, headers = form([("prompt", PROMPT), (field, payload)])
                        assert api.ask("POST", "/v1/videos", body=body, headers=headers).status == 422
                    upload = api.upload(payload.encode(), payload)
                    assert upload.status == 415
            assert seen.found == []
            with pytest.raises(BlockingIOError):
                listener.accept()
        assert not api.store.jobs()

    def test_a_connection_would_be_seen(self, tmp_path: Path) -> None:
        with socket.create_server(("127.0.0.1", 0)) as listener, Opened(tmp_path) as seen:
            socket.create_connection(listener.getsockname()).close()
            listener.accept()[0].close()
        assert [event for event, _ in seen.found][-1] == "socket.connect"


class TestSchema:
    def test_it_names_no_files_and_every_field(self, api: Api) -> None:
        schemas = api.ask("GET", "/openapi.json").json()["components"]["schemas"]
        fields = set(schemas["CreateVideo"]["properties"])
        assert fields == set(CreateVideo.model_fields) - {"image", "video", "out"}
        assert set(schemas["CreateVideoForm"]["properties"]) == fields | {"input_reference"}
        assert schemas["CreateVideo"]["additionalProperties"] is False

    def test_the_request_is_the_one_of_everything_else(self) -> None:
        own = {name for name in CreateVideo.model_fields if name not in VideoRequest.model_fields}
        assert own == {"size", "keep", "until_stopped"} and issubclass(CreateVideo, VideoRequest)

    def test_what_it_generates_is_answered_as_it_says(self, tmp_path: Path) -> None:
        """Schemathesis: no 5xx, and only statuses, kinds and shapes that the description promises."""
        import schemathesis
        from hypothesis import HealthCheck, given, settings
        from schemathesis.checks import not_a_server_error
        from schemathesis.specs.openapi.checks import (
            content_type_conformance,
            response_schema_conformance,
            status_code_conformance,
        )

        checks = [
            not_a_server_error,
            status_code_conformance,
            content_type_conformance,
            response_schema_conformance,
        ]
        root = tmp_path / "renders"
        with JobStore(root) as store:
            app = create_app(
                store, settings=EngineSettings(device="cpu"), token=None, limits=QUICK, hosts={"testserver"}
            )
            app.state.service.stopping = lambda: True
            store.submit(VideoRequest(prompt=PROMPT, seconds=1, id="a"))
            schema = schemathesis.openapi.from_asgi("/openapi.json", app)
            tried = 0
            for result in schema.get_all_operations():
                operation = result.ok()

                @settings(max_examples=40, deadline=None, database=None, derandomize=True,
                          suppress_health_check=list(HealthCheck))  # fmt: skip
                @given(case=operation.as_strategy())
                def answers_as_described(case: Any) -> None:
                    nonlocal tried
                    tried += 1
                    case.call_and_validate(checks=checks)

                answers_as_described()
            assert tried > 150


class TestFuzz:
    def test_random_requests(self, api: Api, caplog: pytest.LogCaptureFixture) -> None:
        caplog.set_level(logging.ERROR)
        counts = fuzz_requests(800, 1, api.client)
        assert sum(counts.values()) == 800 and {
            "200",
            "400",
            "404",
            "405",
            "413",
            "415",
            "422",
            "431",
        } <= set(counts) | {"413"}
        assert not api.store.jobs() and not caplog.records

    def test_a_server_error_would_be_found(self, api: Api, monkeypatch: pytest.MonkeyPatch) -> None:
        def broken(*_: Any) -> None:
            raise Refused(503, "x", "x")

        monkeypatch.setattr(api.service, "page", broken)
        with pytest.raises(AssertionError, match="503 for GET /v1/videos"):
            fuzz_requests(200, 1, api.client)


@pytest.fixture(scope="module")
def working(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Api]:
    """With a worker beside it, in a thread."""
    root = tmp_path_factory.mktemp("working")
    over = threading.Event()
    with opened(root) as api, JobStore(root) as store:
        worker = Worker(store, Orders(root, store.name, "thread", idle=True), over.is_set)
        thread = threading.Thread(target=worker.work)
        thread.start()
        yield api
        over.set()
        thread.join()


class TestEndToEnd:
    def test_a_second_of_video(self, working: Api) -> None:
        body = json.dumps(ONE_SECOND).encode()
        id = working.ask("POST", "/v1/videos", body=body, headers=JSON).json()["id"]
        seen = [video for _, video in events(working.ask("GET", f"/v1/videos/{id}/events").body)]
        assert seen[-1]["status"] == "completed" and seen[-1]["progress"] == 100 and seen[-1]["frames"] == 16
        assert seen[-1]["kv_bytes"] > 0
        progress = [video["progress"] for video in seen]
        assert progress == sorted(progress)
        content = working.ask("GET", f"/v1/videos/{id}/content")
        with av.open(io.BytesIO(content.body)) as container:
            frames = list(container.decode(video=0))
        assert len(frames) == 16 and (frames[0].width, frames[0].height) == (64, 64)
        last = working.ask("GET", f"/v1/videos/{id}/content", headers=[("range", "bytes=-100")])
        assert last.status == 206 and last.body == content.body[-100:]

    def test_a_running_one_is_cancelled_and_leaves_what_there_is(self, working: Api) -> None:
        id = working.post(prompt=PROMPT, seconds=600)["id"]

        def cancel(body: bytes) -> bool:
            # the first chunk is there
            if any(video["frames"] for _, video in events(body)):
                working.store.folder(working.store.get(id)).mark("cancel")
            return False

        seen = [video for _, video in events(working.ask("GET", f"/v1/videos/{id}/events", drop=cancel).body)]
        assert seen[-1]["status"] == "cancelled" and 0 < seen[-1]["chunks_done"] < 10
        assert working.ask("GET", f"/v1/videos/{id}/content").status == 409
        partial = working.ask("GET", f"/v1/videos/{id}/content?variant=partial")
        assert partial.status == 200
        with av.open(io.BytesIO(partial.body)) as container:
            assert len(list(container.decode(video=0))) == seen[-1]["frames"]

    def test_a_picture_to_start_from(self, working: Api) -> None:
        id = working.upload(png()).json()["id"]
        seen = [video for _, video in events(working.ask("GET", f"/v1/videos/{id}/events").body)]
        assert seen[-1]["status"] == "completed", seen[-1]
