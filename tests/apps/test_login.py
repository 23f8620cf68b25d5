"""The server's token in a person's browser."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.apps.test_api import TOKEN, Api, fault, opened
from tests.faults.requests import Answer
from vidkv.apps import login
from vidkv.apps.login import COOKIE, session_of

FORM = [("content-type", "application/x-www-form-urlencoded")]
HTML = [("accept", "text/html,*/*")]


@pytest.fixture(autouse=True)
def at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(login, "WRONG_S", 0.0)


def log_in(api: Api, token: str) -> Answer:
    return api.ask("POST", "/login", body=f"token={token}".encode(), headers=FORM)


def test_the_way_in(tmp_path: Path) -> None:
    with opened(tmp_path, token=TOKEN) as api:
        shown = api.ask("GET", "/", headers=HTML)
        assert (shown.status, shown.headers["location"]) == (303, "/login")
        page = api.ask("GET", "/login")
        assert page.status == 200 and b'type="password"' in page.body and TOKEN.encode() not in page.body
        answer = log_in(api, TOKEN)
        assert (answer.status, answer.headers["location"]) == (303, "/")
        cookie = answer.headers["set-cookie"]
        assert "HttpOnly" in cookie and "SameSite=strict" in cookie and TOKEN not in cookie
        held = [("cookie", cookie.partition(";")[0])]
        assert api.ask("GET", "/v1/videos", headers=held).status == 200


@pytest.mark.parametrize(
    "token", ["", "wrong", TOKEN[:-1], f"{TOKEN}x", "%00", "%ff%fe", "a&token=b", "x" * 5000]
)
def test_wrong_tokens(tmp_path: Path, token: str) -> None:
    with opened(tmp_path, token=TOKEN) as api:
        answer = log_in(api, token)
        assert answer.status == 401 and "set-cookie" not in answer.headers


@pytest.mark.parametrize(
    "value", ["", TOKEN, session_of("another-token-of-mine"), session_of(TOKEN)[:-1], "\x01"]
)
def test_wrong_cookies(tmp_path: Path, value: str) -> None:
    with opened(tmp_path, token=TOKEN) as api:
        answer = api.ask("GET", "/v1/videos", headers=[("cookie", f"{COOKIE}={value}")])
        assert answer.status == 401 and fault(answer)["code"] == "unauthorized"


@pytest.mark.parametrize(
    "foreign", [("origin", "http://evil.example"), ("sec-fetch-site", "cross-site"), ("origin", "null")]
)
def test_a_cookie_is_no_pass_for_other_sites(tmp_path: Path, foreign: tuple[str, str]) -> None:
    """A browser sends it whoever makes it ask; a program that bears the token is its owner's own."""
    with opened(tmp_path, token=TOKEN) as api:
        held = [("cookie", f"{COOKIE}={session_of(TOKEN)}"), foreign]
        assert api.ask("POST", "/v1/videos/a/cancel", headers=held).status == 403
        borne = [("authorization", f"Bearer {TOKEN}"), foreign]
        assert api.ask("POST", "/v1/videos/a/cancel", headers=borne).status == 404


def test_without_a_token_there_is_nothing_to_log_in_to(tmp_path: Path) -> None:
    with opened(tmp_path) as api:
        assert api.ask("GET", "/login").status == 404


def test_programs_are_told_and_not_sent_to_a_page(tmp_path: Path) -> None:
    with opened(tmp_path, token=TOKEN) as api:
        for path in ("/", "/v1/videos"):
            assert api.ask("GET", path).status == 401
        assert api.ask("GET", "/v1/videos", headers=HTML).status == 401


@pytest.mark.parametrize("others", ["foo", "a b=1", "path=/x", 'theme={"a":1}', "=", ";;", "\xff=\xfe"])
def test_cookies_of_other_programs_on_this_host_do_no_harm(tmp_path: Path, others: str) -> None:
    with opened(tmp_path, token=TOKEN) as api:
        held = f"{others}; {COOKIE}={session_of(TOKEN)}; more"
        assert api.ask("GET", "/v1/videos", headers=[("cookie", held)]).status == 200
