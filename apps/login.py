"""How a person's browser bears the server's token: a page that asks for it, and a cookie."""

from __future__ import annotations

import asyncio
import hashlib
import hmac
from urllib.parse import parse_qs

from fastapi import FastAPI, Request
from starlette.responses import HTMLResponse, RedirectResponse, Response

COOKIE = "vidkv_session"
LOGIN = "/login"
MOST_BYTES = 4096
WRONG_S = 0.5
"""How long a wrong token takes to be answered."""
SESSION_S = 30 * 24 * 3600

_PAGE = """<!doctype html>
<html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>vidkv: log in</title>
<style>
  :root {{ color-scheme: light dark; font: 16px/1.5 system-ui, sans-serif }}
  body {{ display: grid; place-items: center; min-height: 95vh; margin: 0; padding: 1rem }}
  form {{ display: grid; gap: .75rem; width: min(22rem, 100%) }}
  input, button {{ font: inherit; padding: .6rem .75rem; border-radius: .5rem; border: 1px solid #8888 }}
  button {{ background: #2f6bff; color: white; border: 0; cursor: pointer }}
  [role=alert] {{ color: #d33; min-height: 1.5em }}
</style>
<form method="post" action="/login">
  <h1>vidkv</h1>
  <label for="token">Token of this server</label>
  <input id="token" name="token" type="password" autocomplete="current-password" required autofocus>
  <button>Log in</button>
  <div role="alert">{alert}</div>
</form></html>
"""


def session_of(token: str) -> str:
    """What the cookie holds: not the token, and nothing that it can be computed from."""
    return hmac.new(token.encode(), b"vidkv session", hashlib.sha256).hexdigest()


def has_session(headers: list[tuple[bytes, bytes]], token: str) -> bool:
    """Whether a request bears the cookie."""
    for name, value in headers:
        # those of other programs on this host come with it, and need not be well formed
        for part in value.split(b";") if name == b"cookie" else ():
            key, _, given = part.strip().partition(b"=")
            if key == COOKIE.encode() and hmac.compare_digest(given, session_of(token).encode()):
                return True
    return False


def add_login(app: FastAPI, token: str) -> None:
    """Add the page."""

    @app.get(LOGIN, include_in_schema=False)
    def ask() -> Response:
        return HTMLResponse(_PAGE.format(alert=""))

    @app.post(LOGIN, include_in_schema=False)
    async def log_in(request: Request) -> Response:
        body = bytearray()
        async for piece in request.stream():
            body += piece
            if len(body) > MOST_BYTES:
                break
        given = _field(bytes(body[:MOST_BYTES]))
        if not hmac.compare_digest(given.encode(errors="replace"), token.encode()):
            await asyncio.sleep(WRONG_S)
            return HTMLResponse(_PAGE.format(alert="This is not the token; look into the token file."), 401)
        answer = RedirectResponse("/", 303)
        answer.set_cookie(
            COOKIE, session_of(token), max_age=SESSION_S, httponly=True, samesite="strict",
            secure=request.url.scheme == "https",
        )  # fmt: skip
        return answer


def _field(body: bytes) -> str:
    try:
        return parse_qs(body.decode("ascii"), max_num_fields=4).get("token", [""])[0].strip()
    except (ValueError, UnicodeDecodeError):
        return ""
