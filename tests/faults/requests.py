"""Random requests, most of them damaged: what the suite tries a few of and a soak many."""

from __future__ import annotations

import asyncio
import json
import random
from collections import Counter
from collections.abc import Awaitable, Callable, Iterable
from dataclasses import dataclass
from typing import Any, TypeVar
from urllib.parse import quote, unquote

from starlette.types import ASGIApp, Message, Scope

from vidkv.apps.api import UPLOAD, CreateVideo

T = TypeVar("T")
Headers = Iterable[tuple[str, str]]
MOST_QUEUED = 8
"""Accepted jobs are deleted from here on."""


@dataclass(frozen=True)
class Answer:
    """What came back.

    Attributes:
        headers: names in lower case.
    """

    status: int
    headers: dict[str, str]
    body: bytes

    def json(self) -> Any:
        return json.loads(self.body)


class AsgiClient:
    """Requests to an application in this process: all of ASGI, and nothing else that costs time.

    with AsgiClient(app) as client:
        answer = client.ask("GET", "/health")

    Args:
        host: sent with every request that names no other.
    """

    def __init__(self, app: ASGIApp, host: str = "127.0.0.1:8000") -> None:
        self.app, self.host = app, host
        self.loop = asyncio.new_event_loop()

    def __enter__(self) -> AsgiClient:
        return self

    def __exit__(self, *exc: object) -> None:
        self.loop.close()

    def run(self, work: Awaitable[T]) -> T:
        """Run a coroutine that sends."""

        async def wait() -> T:
            return await work

        return self.loop.run_until_complete(wait())

    def ask(self, method: str, target: str, **rest: Any) -> Answer:
        """One request, see `send`."""
        return self.run(self.send(method, target, **rest))

    async def send(
        self, method: str, target: str, body: bytes | Iterable[bytes] = b"", headers: Headers = (),
        drop: Callable[[bytes], bool] = lambda body: False, stall: bool = False,
    ) -> Answer:  # fmt: skip
        """One request.

        Args:
            target: path and query, as they stand in the request line.
            body: whole, or in pieces.
            drop: asked with what has come so far; when true the client goes away.
            stall: never send the end of the body.
        """
        pieces = iter([body] if isinstance(body, bytes) else body)
        gone, status, fields, content = asyncio.Event(), 0, dict[str, str](), bytearray()
        ended = False

        async def receive() -> Message:
            nonlocal ended
            if ended:
                await gone.wait()
                return {"type": "http.disconnect"}
            piece = next(pieces, None)
            if piece is not None:
                return {"type": "http.request", "body": piece, "more_body": True}
            if stall:
                await gone.wait()
            ended = True
            return {"type": "http.request", "body": b"", "more_body": False}

        async def answer(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                fields.update(
                    (k.decode("latin-1").lower(), v.decode("latin-1")) for k, v in message["headers"]
                )
            else:
                content.extend(message.get("body", b""))
                if drop(bytes(content)):
                    gone.set()

        await self.app(self._scope(method, target, list(headers)), receive, answer)
        return Answer(status, fields, bytes(content))

    def _scope(self, method: str, target: str, headers: list[tuple[str, str]]) -> Scope:
        path, _, query = target.partition("?")
        if not any(name.lower() == "host" for name, _ in headers):
            headers = [("host", self.host), *headers]
        raw = [(k.lower().encode("latin-1", "replace"), v.encode("latin-1", "replace")) for k, v in headers]
        return {
            "type": "http", "asgi": {"version": "3.0", "spec_version": "2.3"}, "http_version": "1.1",
            "method": method, "scheme": "http", "path": unquote(path), "root_path": "",
            "raw_path": path.encode("ascii", "replace"), "query_string": query.encode("ascii", "replace"),
            "headers": raw, "client": ("127.0.0.1", 50000), "server": ("127.0.0.1", 8000),
        }  # fmt: skip


def form(
    fields: Iterable[tuple[str, str]],
    files: Iterable[tuple[str, str, bytes]] = (),
    boundary: str = "b0undary",
) -> tuple[bytes, list[tuple[str, str]]]:
    """A multipart body and its headers.

    Args:
        files: field, file name, content.
    """
    lines = b""
    parts = [(f'name="{name}"', value.encode(errors="surrogatepass")) for name, value in fields]
    parts += [(f'name="{name}"; filename="{file}"', data) for name, file, data in files]
    for disposition, data in parts:
        head = f"--{boundary}\r\nContent-Disposition: form-data; {disposition}\r\n\r\n"
        lines += head.encode(errors="surrogatepass") + data + b"\r\n"
    headers = [("content-type", f"multipart/form-data; boundary={boundary}")]
    return lines + f"--{boundary}--\r\n".encode(), headers


def fuzz_requests(count: int, seed: int, client: AsgiClient) -> dict[str, int]:
    """Send random requests; count the answers by status.

    Jobs that are accepted are deleted now and then, so nobody should be working on them.

    Raises:
        AssertionError: an answer is 500 or above, or an error in another shape than all errors.
    """
    return client.run(_fuzz(count, random.Random(seed), client))


async def _fuzz(count: int, rng: random.Random, client: AsgiClient) -> dict[str, int]:
    statuses: Counter[str] = Counter()
    accepted: list[str] = []
    for _ in range(count):
        method, target, body, headers = rng.choice(_KINDS)(rng, accepted)
        answer = await client.send(method, target, body, headers, drop=lambda body: True)
        _check(answer, f"{method} {target} {headers} {body[:400]!r}")
        statuses[str(answer.status)] += 1
        if method == "POST" and target == "/v1/videos" and answer.status == 200:
            accepted.append(answer.json()["id"])
        if len(accepted) >= MOST_QUEUED:
            await _delete(accepted, client)
    await _delete(accepted, client)
    return dict(statuses)


async def _delete(accepted: list[str], client: AsgiClient) -> None:
    for id in set(accepted):
        answer = await client.send("DELETE", f"/v1/videos/{id}")
        assert answer.status in (200, 404), answer
    accepted.clear()


def _check(answer: Answer, request: str) -> None:
    assert 200 <= answer.status < 500, f"{answer.status} for {request}: {answer.body[:400]!r}"
    if answer.status >= 400 and answer.headers.get("content-type") != "text/event-stream":
        error = answer.json()["error"]
        assert set(error) == {"code", "message", "param"} and error["message"], f"{request}: {answer.body!r}"
        assert "Traceback" not in error["message"], request


Request = tuple[str, str, bytes, list[tuple[str, str]]]
_FIELDS = [*CreateVideo.model_fields, UPLOAD, "settings", "device", "output_path", "reference_url", "", "\0"]
_GOOD = {"prompt": "a red circle bouncing", "seconds": 1}
_JSON = [("content-type", "application/json")]
_STRINGS = [
    "", " ", "a", "a red circle bouncing", "-1", "1e999", "nan", "9" * 500, "a" * 20_000, "..", "../x",
    "/etc/passwd", "a\0b", "\x1b[2J", "\u202eabc", "\U0001f98a", "\ud800", "\udcff", "int8,window=21",
    "window=" + "9" * 40, "{}", '{"window": 1, "window": 2}', "[" * 2_000, "5: a; 10: b", "64x64", "0x0",
    "99999x99999", "64X64", "http://169.254.169.254/", "file:///etc/passwd", "keep", "bounce", "wan2.1-1.3b",
    "%2e%2e%2f", "CON", "null", "true", "'; DROP TABLE jobs; --", "\r\nX: y", "\\\\host\\share",
]  # fmt: skip
_NUMBERS = [0, 1, -1, 2.5, 1e300, -0.0, 2**31, 2**63, 2**64, -(2**64), 10**399, 1e-300]
_TOKENS = [
    "NaN",
    "Infinity",
    "-Infinity",
    "1e999",
    "00",
    "'a'",
    "{,}",
    "[1,]",
    "\ufeff{}",
    "[" * 9_000,
    "9" * 9_000,
]
_METHODS = ["GET", "POST", "PUT", "DELETE", "PATCH", "HEAD", "OPTIONS", "TRACE", "BREW"]


def _value(rng: random.Random, depth: int = 0) -> Any:
    kind = rng.randrange(8 if depth < 3 else 5)
    if kind < 2:
        return rng.choice(_STRINGS)
    if kind < 4:
        return rng.choice(_NUMBERS)
    if kind == 4:
        return rng.choice([None, True, False])
    if kind < 7:
        return [_value(rng, depth + 1) for _ in range(rng.randrange(4))]
    return {rng.choice([*_STRINGS, *_FIELDS]): _value(rng, depth + 1) for _ in range(rng.randrange(4))}


def _damaged(rng: random.Random, data: bytes) -> bytes:
    """With a few bytes changed, dropped or repeated."""
    changed = bytearray(data)
    for _ in range(rng.randrange(1, 4)):
        at = rng.randrange(len(changed)) if changed else 0
        match rng.randrange(3):
            case 0 if changed:
                changed[at] = rng.randrange(256)
            case 1:
                del changed[at : at + rng.randrange(1, 9)]
            case _:
                changed[at:at] = changed[at : at + rng.randrange(1, 9)] * 2
    return bytes(changed)


def _creation(rng: random.Random, accepted: list[str]) -> Request:
    """A body of fields, some of them odd."""
    values: dict[str, Any] = dict(_GOOD) | {"seed": rng.randrange(2**64)}
    for _ in range(rng.randrange(1, 4) if rng.random() < 0.97 else 0):
        values[rng.choice(_FIELDS)] = _value(rng)
    body: Any = values if rng.random() < 0.95 else _value(rng)
    return "POST", "/v1/videos", json.dumps(body).encode(), _JSON


def _broken_json(rng: random.Random, accepted: list[str]) -> Request:
    text = json.dumps(_GOOD).encode()
    match rng.randrange(3):
        case 0:
            text = _damaged(rng, text)
        case 1:
            text = text.replace(b"1", rng.choice(_TOKENS).encode())
        case _:
            text = rng.randbytes(rng.randrange(200))
    kinds = [
        "application/json",
        "application/json; charset=utf-16",
        "text/plain",
        "",
        "a/b",
        "multipart/form-data",
    ]
    return (
        "POST",
        "/v1/videos",
        text,
        [("content-type", rng.choice(kinds) if rng.random() < 0.3 else kinds[0])],
    )


def _formed(rng: random.Random, accepted: list[str]) -> Request:
    fields = [(name, str(value)) for name, value in _GOOD.items()]
    fields += [(rng.choice(_FIELDS), rng.choice(_STRINGS)) for _ in range(rng.randrange(4))]
    names = [UPLOAD, UPLOAD, "image", "prompt", "../x"]
    files = [
        (rng.choice(names), rng.choice(_STRINGS), rng.randbytes(rng.randrange(99)))
        for _ in range(rng.randrange(3))
    ]
    body, headers = form([part for part in fields if part[0] != "\0"], files)
    if rng.random() < 0.7:
        body = _damaged(rng, body)
    if rng.random() < 0.1:
        headers = [("content-type", f"multipart/form-data; boundary={rng.choice(_STRINGS)}")]
    return "POST", "/v1/videos", body, headers


def _addressed(rng: random.Random, accepted: list[str]) -> Request:
    """A route of one video, with an id that is there or anything."""
    id = rng.choice(accepted) if accepted and rng.random() < 0.5 else rng.choice(_STRINGS)[:300]
    id = quote(id, safe="/" if rng.random() < 0.5 else "", errors="replace")
    rest = rng.choice(["", "", "/events", "/content", "/cancel", "/", "/content?variant=", "/../x"])
    headers = [("range", rng.choice(["bytes=0-1", "bytes=9-1", "bytes=-", "x", "bytes=" + "0-1," * 500]))]
    return rng.choice(_METHODS[:4]), f"/v1/videos/{id}{rest}", b"", headers


def _listed(rng: random.Random, accepted: list[str]) -> Request:
    names = ["limit", "after", "order", "x"]
    query = "&".join(
        f"{rng.choice(names)}={quote(rng.choice(_STRINGS)[:300], errors='replace')}"
        for _ in range(rng.randrange(4))
    )
    return "GET", f"/v1/videos?{query}", b"", []


def _strange(rng: random.Random, accepted: list[str]) -> Request:
    """Any method, any path, any headers."""
    paths = [
        "/",
        "/v1",
        "/v1/videos",
        "/v1/videos/",
        "/v1/models",
        "/health",
        "/openapi.json",
        "/docs",
        "//",
        "*",
    ]
    names = [
        "host",
        "origin",
        "authorization",
        "content-length",
        "transfer-encoding",
        "accept",
        "last-event-id",
    ]
    headers = [(rng.choice(names), rng.choice(_STRINGS)[:300]) for _ in range(rng.choice([0, 1, 3, 150]))]
    path = (
        rng.choice(paths) if rng.random() < 0.7 else "/" + quote(rng.choice(_STRINGS)[:300], errors="replace")
    )
    return rng.choice(_METHODS), path, rng.randbytes(rng.randrange(20)), headers


_KINDS = (_creation, _creation, _creation, _broken_json, _formed, _addressed, _addressed, _listed, _strange)
